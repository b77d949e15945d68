"""Every quantity: a cotangent and a contraction.

A spec names what is backpropagated (``cotangent``), what each layer makes of it (``contractions``), how the parts
become the result (``finish``), and how results of several batches merge (``laws``). Each public function asks
`curvfunc.compute` for one spec.

What a sample's gradient is: with f the outputs of the whole batch, gₙ = R ∂ℓₙ(fₙ)/∂θ, everything else held as it is. Other
samples may enter fₙ as data, or detached; where the gradient of fₙ would flow to other samples (normalization over the
batch), the model is refused. Of a batch whose samples need the others as data, a subset costs as much as the whole.

Shared by all functions below:

Args:
    model_fn: ``(params, X) -> output [N, ...]``, from `curvfunc.functionalize` or any function.
    params: Pytree of real floating-point tensors, usually ``{name: tensor}``; what is not in it stays fixed.
    X: Input, a tensor or a pytree of tensors with leading sample axis N.
    y: Targets, likewise.
    loss_fn: ``(output, y) -> scalar`` that sums or averages over samples: L = R Σₙ ℓ(fₙ, yₙ), R = 1/N for a mean, 1 for
        a sum. Results follow it. Default: cross-entropy, averaged.
    subsampling: Indices of samples (a sequence or a tensor, repeats allowed). Per-sample results are those of the listed
        samples, sums run over them, and R stays that of the whole batch. The cost is that of the subset. A sample that is
        listed twice has the same Monte-Carlo draws both times.
    chunk_size: Number of vectors that are backpropagated together; by default chosen by memory. It changes results by
        rounding only.
    out: Of functions with large results, that of an earlier call (or tensors like it), in whose memory this one is formed, and
        which is returned; see `curvfunc.compute`.
    mc_samples: 0 for the exact loss Hessian, else the number of Monte-Carlo draws per sample.
    generator: Source of the draws; the default generator if None. Cannot be used inside ``torch.compile``.

Returns:
    A pytree like ``params``. A parameter that the output does not depend on gets zeros.

Raises:
    TypeError, ValueError: For input that has no answer; the message names the argument, the shapes and the remedy.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Generator, Tensor

from curvfunc import losses
from curvfunc.quantities.call import compute
from curvfunc.quantities.quantity import Quantity
from curvfunc.quantities.specs import (
    KFAC,
    KFLR,
    KFRA,
    BatchDiagGGN,
    BatchDiagHessian,
    BatchGrad,
    BatchJac,
    BatchL2,
    ClippedGrad,
    DiagGGN,
    DiagHessian,
    EmpiricalKFAC,
    SqrtGGN,
    SumGradSquared,
    Variance,
)

__all__ = [
    "batch_diag_ggn",
    "batch_diag_hessian",
    "batch_grad",
    "batch_jac",
    "batch_l2",
    "clipped_grad",
    "diag_ggn",
    "diag_hessian",
    "kfac",
    "kfac_empirical",
    "kflr",
    "kfra",
    "sqrt_ggn",
    "sum_grad_squared",
    "variance",
]

Model = Callable[[Any, Any], Tensor]
LossFunction = Callable[[Tensor, Any], Tensor]
Indices = Sequence[int] | Tensor


def batch_grad(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
    out: Any = None,
) -> Any:
    """Per-sample gradients, gₙ = R ∇ℓ(fₙ, yₙ).

    Returns:
        [N, *shape] per parameter; they add up to the gradient. Arguments: see `curvfunc.quantities`.

    References:
        BackPACK's ``BatchGrad`` (``p.grad_batch``).
    """
    return _one(BatchGrad(), model_fn, params, X, y, loss_fn, subsampling, None, chunk_size, out)


def batch_jac(
    model_fn: Model,
    params: Any,
    X: Any,
    *,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
    out: Any = None,
) -> Any:
    """The Jacobian of each sample's output, Jₙ[c, p] = ∂fₙ[c] / ∂θ[p]; there is no loss.

    With a loss, `batch_grad` is Jₙᵀ ∂L/∂fₙ, and `sqrt_ggn` Jₙᵀ √R Sₙ. Each entry of a sample's output is a column to
    backpropagate, and the result has as many numbers as samples times entries times parameters: where products with the
    Jacobian do, `curvfunc.jvp` and `curvfunc.vjp` never form it. What `compute` gives for `BatchJac` does not depend on y
    and loss_fn.

    Args:
        model_fn: ``(params, X) -> output [N, *out]``.
        params: Pytree of real floating-point tensors.
        X: Input with leading sample axis N, of which there may be none.
        subsampling: Indices of samples, repeats allowed.
        chunk_size: Number of entries that are backpropagated together; by default chosen by memory.
        out: The result of an earlier call, in whose memory this one is formed. Other tensors of its shapes will do, but the
            result is copied into these if they have another layout, such as contiguous ones.

    Returns:
        [N, *out, *shape] per parameter, in memory with the samples after the output's axes; zeros for one of
        several that the output does not depend on.

    Raises:
        TypeError, ValueError: For input that has no answer, as `curvfunc.quantities`: a complex output, for instance.

    References:
        Daxberger et al. 2021, "Laplace Redux – effortless Bayesian deep learning", for what it is needed for.

    Example:
        >>> model_fn, params = functionalize(nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3))))
        >>> jacobian = batch_jac(model_fn, params, torch.randn(8, 4))
        >>> jacobian["0.weight"].shape, jacobian["0.bias"].shape
        (torch.Size([8, 2, 3, 6, 4]), torch.Size([8, 2, 3, 6]))
    """
    given: dict[str, Any] = {"subsampling": subsampling, "chunk_size": chunk_size, "out": out}
    return compute(model_fn, params, X, X, BatchJac(), loss_fn=losses.no_loss, **given)


def batch_l2(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Squared Euclidean norms of the per-sample gradients, ‖gₙ‖², without forming them where that is cheaper.

    Returns:
        [N] per parameter. Arguments: see `curvfunc.quantities`.

    References:
        BackPACK's ``BatchL2Grad`` (``p.batch_l2``); Goodfellow 2015, "Efficient per-example gradient computations", sec. 4.
    """
    return _one(BatchL2(), model_fn, params, X, y, loss_fn, subsampling, None, chunk_size)


def clipped_grad(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    max_norm: float | Mapping[str, float],
    per_layer: bool = False,
    loss_fn: LossFunction = losses.SUMMED,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Sum of clipped per-sample gradients, Σₙ min(1, C / ‖gₙ‖) gₙ, without per-sample gradients in memory.

    Two backward passes: one for the norms, and one in which each sample's part of the loss gradient is weighted. The norms are
    those of all parameters together; or with ``per_layer`` of each of L layers, bounded by C / √L each, so that the whole
    still has at most norm C. Layers are told by names: those that are the same up to the last dot belong together.

    The loss is to be a sum, gₙ = ∇ℓₙ: clipping a mean's gradients ∇ℓₙ / N would depend on the size of the batch. What to divide
    by is left to the caller. Nothing in the model may depend on which other samples are in the batch, even where no gradient
    flows: then each sample adds a vector of at most norm C. See `curvfunc.private` for noise and batches.

    Args:
        model_fn: ``(params, X) -> output [N, ...]``.
        params: Pytree of real floating-point tensors.
        X: Input with leading sample axis N.
        y: Targets, likewise.
        max_norm: C; or the bound of each layer or parameter by name, of which the longest that fits counts.
        per_layer: Whether each layer is clipped by itself.
        loss_fn: ``(output, y) -> scalar`` that sums over samples; by default cross-entropy.
        subsampling: Indices of samples, repeats allowed.
        chunk_size: No effect, as there is one column.

    Returns:
        [*shape] per parameter.

    Raises:
        TypeError, ValueError: As all quantities; for bounds that are not positive, a loss that is no sum, and a model in which
            samples depend on each other.

    References:
        Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1; Lee and Kifer 2021, "Scaling up
        differentially private deep learning with fast per-example gradient clipping", for the second pass; Li et al. 2022,
        "Large language models can be strong differentially private learners", for sequences ("ghost clipping").

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> clipped = clipped_grad(model_fn, params, torch.randn(8, 4), torch.arange(8) % 3, max_norm=0.1)
        >>> bool(sum(g.square().sum() for g in clipped.values()).sqrt() <= 8 * 0.1)
        True
    """
    return _one(ClippedGrad(max_norm, per_layer), model_fn, params, X, y, loss_fn, subsampling, None, chunk_size)


def sum_grad_squared(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Sum of the squared per-sample gradients, Σₙ gₙ² (N² times the uncentered second moment for a mean loss).

    Returns:
        [*shape] per parameter. Arguments: see `curvfunc.quantities`.

    References:
        BackPACK's ``SumGradSquared`` (``p.sum_grad_squared``); Dangel, Kunstner, Hennig 2020, "BackPACK", appendix A.
    """
    return _one(SumGradSquared(), model_fn, params, X, y, loss_fn, subsampling, None, chunk_size)


def variance(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Variance of the per-sample gradients, (1/N) Σₙ gₙ² − ((1/N) Σₙ gₙ)², with gₙ as in `batch_grad`.

    Returns:
        [*shape] per parameter. Arguments: see `curvfunc.quantities`.

    References:
        BackPACK's ``Variance`` (``p.variance``).
    """
    return _one(Variance(), model_fn, params, X, y, loss_fn, subsampling, None, chunk_size)


def diag_ggn(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    mc_samples: int = 0,
    subsampling: Indices | None = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Diagonal of the generalized Gauss-Newton matrix, diag(R Σₙ Jₙᵀ ∇²ℓₙ Jₙ).

    With ``mc_samples`` the loss Hessian is replaced by draws from the likelihood that the loss implies; for
    cross-entropy, squared error and BCE with logits the matrix is the Fisher information, so this is an unbiased estimate.

    Returns:
        [*shape] per parameter. Arguments: see `curvfunc.quantities`.

    Raises:
        ValueError: Besides the common errors, if a custom loss has an indefinite Hessian.

    References:
        BackPACK's ``DiagGGNExact``, ``DiagGGNMC``; Schraudolph 2002; Martens 2020, "New insights and perspectives on
        the natural gradient method", secs. 8 and 9.
    """
    return _one(DiagGGN(mc_samples), model_fn, params, X, y, loss_fn, subsampling, generator, chunk_size)


def batch_diag_ggn(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    mc_samples: int = 0,
    subsampling: Indices | None = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
    out: Any = None,
) -> Any:
    """Each sample's part of the GGN's diagonal, diag(R Jₙᵀ ∇²ℓₙ Jₙ); over n they add up to `diag_ggn`.

    Returns:
        [N, *shape] per parameter. Arguments: see `curvfunc.quantities`.

    Raises:
        ValueError: As `diag_ggn`.

    References:
        BackPACK's ``BatchDiagGGNExact``, ``BatchDiagGGNMC``.
    """
    return _one(BatchDiagGGN(mc_samples), model_fn, params, X, y, loss_fn, subsampling, generator, chunk_size, out)


def diag_hessian(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    mc_samples: int = 0,
    subsampling: Indices | None = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Diagonal of the Hessian of the loss, diag(∇²L), for every model and every twice differentiable loss.

    It is exact, or with ``mc_samples`` an unbiased estimate from M Hessian-vector products with random signs z,

        diag(∇²L) ≈ (1/M) Σ_m z_m ⊙ ∇²L z_m.

    The variance of entry i is Σ_{j≠i} (∇²L)ᵢⱼ² / M, with j over the entries of all parameters. A product costs about as much
    as two gradients.

    What is exact is made of sums of squares. With Jₙ the Jacobian of the output, and for each operation m that is not linear by
    pieces, Jₙₘ that of its input and Rₙₘ its second derivative contracted with the loss gradient at its output,

        ∇²L = R Σₙ Jₙᵀ ∇²ℓₙ Jₙ + Σₙₘ Jₙₘᵀ Rₙₘ Jₙₘ.

    The first term costs as much as `diag_ggn`, and for models that are linear by pieces there is no other. Each smooth
    elementwise operation (an activation, ``exp``, ``z ** 2``) adds one column to backpropagate for each entry of z, of
    one sample, but none to the layer directly before it. A product of two tensors that both depend on a parameter (gates,
    squeeze and excitation, attention scores) adds two columns for each entry of the smaller one, by
    2 a b = ½ (a + b)² − ½ (a − b)². Parameters before any other operation (softmax, norms) take one Hessian-vector product for
    each entry of their layer's output or of the parameter, and so do those for which it costs less than columns of products;
    parameters that are used again on what they produced (recurrent layers, tied embeddings) one for each entry of theirs. From
    10,000 of these products and columns of products on there is a warning.

    Returns:
        [*shape] per parameter. Arguments: see `curvfunc.quantities`.

    Raises:
        RuntimeError: If an operation has no second derivative in PyTorch, for instance cuDNN's recurrent layers.

    References:
        BackPACK's ``DiagHessian``; Dangel, Harmeling, Hennig 2020, "Modular block-diagonal curvature approximations for
        feedforward architectures", eq. 4. Estimate: Bekas, Kokiopoulou, Saad 2007, "An estimator for the diagonal of a
        matrix"; Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney 2021, "AdaHessian", eq. 9.
    """
    return _one(DiagHessian(mc_samples), model_fn, params, X, y, loss_fn, subsampling, generator, chunk_size)


def batch_diag_hessian(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    mc_samples: int = 0,
    subsampling: Indices | None = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
    out: Any = None,
) -> Any:
    """Each sample's part of the Hessian's diagonal, diag(R ∇²ℓₙ); over n they add up to `diag_hessian`.

    With ``mc_samples`` it is (1/M) Σ_m z_m ⊙ R ∇²ℓₙ z_m, with signs z_m that all samples share, so that both have the same
    draws if they are asked for in one call of `compute`.

    Returns:
        [N, *shape] per parameter. Arguments: see `curvfunc.quantities`.

    Raises:
        RuntimeError: As `diag_hessian`.

    References:
        BackPACK's ``BatchDiagHessian``.
    """
    return _one(BatchDiagHessian(mc_samples), model_fn, params, X, y, loss_fn, subsampling, generator, chunk_size, out)


def sqrt_ggn(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    mc_samples: int = 0,
    subsampling: Indices | None = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
    out: Any = None,
) -> Any:
    """A root of the generalized Gauss-Newton matrix: G = Σ_vn s[v,n] s[v,n]ᵀ, s[v,n] = √R Jₙᵀ Sₙ[:, v], Sₙ Sₙᵀ = ∇²ℓₙ.

    Returns:
        [V, N, *shape] per parameter; V is the number of outputs of one sample, or ``mc_samples``. Arguments: see
        `curvfunc.quantities`.

    Raises:
        ValueError: As `diag_ggn`.

    References:
        BackPACK's ``SqrtGGNExact``, ``SqrtGGNMC``.
    """
    return _one(SqrtGGN(mc_samples), model_fn, params, X, y, loss_fn, subsampling, generator, chunk_size, out)


def kfac(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    mc_samples: int = 1,
    kfac_approx: str | None = None,
    joined: bool = False,
    subsampling: Indices | None = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Kronecker factors whose product approximates each parameter's GGN block, GGN ≈ B ⊗ A.

    With output cotangents g and layer inputs x (k features, o outputs), and shared positions s (time steps, pixels, or
    the uses of a tied weight):

    - ``kfac_approx="expand"``: B = Σ_vns g gᵀ, A = 1/(N S) Σ_ns x xᵀ.
    - ``kfac_approx="reduce"``: B = Σ_vn (Σ_s g)(Σ_s g)ᵀ, A = 1/N Σₙ (1/S Σ_s x)(1/S Σ_s x)ᵀ.
    - None: BackPACK's convention for convolutions, B = Σ_vn (Σ_s g)(Σ_s g)ᵀ and A = 1/N Σ_ns x xᵀ, with x the patches;
      expand for all else.

    Without shared positions they all are B = Σ_vn g gᵀ, A = 1/N Σₙ x xᵀ. With groups, A is the mean of the groups'. An
    embedding has one-hot inputs. Any other parameter has its exact block as its one factor. For a weight whose axes are
    those of the inputs first, as in x @ W, the order is (A, B).

    With ``joined`` the inputs of linear layers and convolutions with a bias have a one appended, x̄ = [x, 1], as the authors
    of K-FAC have it: B ⊗ Ā is then the block of weight and bias together, [weight | bias] with the bias as the last column,
    and the weight's result is (B [o, o], Ā [k + 1, k + 1]). The bias keeps its (B,).

    Returns:
        A tuple per parameter: (B [o, o], A [k, k]) for weights, (B [numel, numel],) for others. Arguments: see
        `curvfunc.quantities`.

    Raises:
        ValueError: As `diag_ggn`.
        NotImplementedError: If a large parameter has no Kronecker structure.

    References:
        Martens and Grosse 2015, eq. 1 ff.; Grosse and Martens 2016, eq. 32; Eschenhagen et al. 2023, eq. 22 (expand).
        BackPACK's ``KFAC`` (``p.kfac``).
    """
    return _one(KFAC(mc_samples, kfac_approx, joined), model_fn, params, X, y, loss_fn, subsampling, generator, chunk_size)


def kfac_empirical(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    kfac_approx: str | None = None,
    joined: bool = False,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Kronecker factors as `kfac`, of the empirical Fisher: the loss gradient at the targets in place of those at draws.

    With Jₙ the Jacobian and ∂ℓₙ the gradient of sample n's terms of the loss with respect to its output,

        B ⊗ A ≈ R Σₙ Jₙᵀ ∂ℓₙ ∂ℓₙᵀ Jₙ.

    The scale is that of `kfac`, whose expectation this is if the targets are distributed as the model predicts: R = 1 for a
    sum, and for a mean one over the number of terms that are averaged. These are the positions of the output for
    cross-entropy (for outputs [N, C] the N samples; ignored ones do not count, others with the weights of their labels),
    and the entries of the output for squared error and BCE with logits. For a loss of one's own they are the samples, also
    where it averages over more. In terms of the gradients gₙ = R ∇ℓₙ that `batch_grad` gives, the approximated block is
    (1/R) Σₙ gₙ gₙᵀ, for a mean over N samples N Σₙ gₙ gₙᵀ; `curvfunc.fisher_vp` with ``empirical=True`` has Σₙ gₙ gₙᵀ.

    Unlike the Fisher information, the empirical one is no curvature away from a good fit.

    Args:
        model_fn: ``(params, X) -> output [N, ...]``.
        params: Pytree of real floating-point tensors.
        X: Input with leading sample axis N.
        y: Targets.
        loss_fn: ``(output, y) -> scalar`` that sums or averages over samples. It need not be convex.
        kfac_approx: "expand", "reduce" or None, as in `kfac`.
        joined: Whether weights that have a bias beside them share one block with it, as in `kfac`.
        subsampling: Indices of samples: B sums and A averages over them, R stays that of the whole batch.
        chunk_size: No effect, since there is one vector.

    Returns:
        A tuple per parameter, as `kfac`: (B [o, o], A [k, k]) for weights, (B [numel, numel],) for others.

    Raises:
        ValueError: If a loss of one's own is neither a sum nor a mean of one term per sample; if there are no samples.
        NotImplementedError: As `kfac`.

    References:
        Kunstner, Balles, Hennig 2019, "Limitations of the empirical Fisher approximation for natural gradient descent", for
        what it is and is not; Eschenhagen et al. 2023 for the approximations. curvlinops' ``FisherType.EMPIRICAL``.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> [tuple(factor.shape) for factor in kfac_empirical(model_fn, params, X, y)["weight"]]
        [(3, 3), (4, 4)]
        >>> (bias,) = kfac_empirical(model_fn, params, X, y)["bias"]
        >>> g = batch_grad(model_fn, params, X, y)["bias"]
        >>> torch.allclose(bias, 8 * g.T @ g)
        True
    """
    return _one(EmpiricalKFAC(kfac_approx, joined), model_fn, params, X, y, loss_fn, subsampling, None, chunk_size)


def kflr(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    kfac_approx: str | None = None,
    joined: bool = False,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Kronecker factors as `kfac`, with the exact loss Hessian in place of draws.

    Returns:
        A tuple per parameter, as `kfac`. Arguments: see `curvfunc.quantities`.

    Raises:
        ValueError, NotImplementedError: As `kfac`.

    References:
        Botev, Ritter, Barber 2017, sec. 3.3. BackPACK's ``KFLR`` (``p.kflr``).
    """
    return _one(KFLR(kfac_approx, joined), model_fn, params, X, y, loss_fn, subsampling, None, chunk_size)


def kfra(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Kronecker factors whose output factor comes from one matrix, averaged over samples at each step back.

    The matrix G over the entries of one sample's activation starts as the loss Hessian with respect to the output, summed
    over samples, and goes back through each operation with Jacobians Jₙ by

        G ← (1/N) Σₙ Jₙᵀ G Jₙ.

    At a layer z = W x + b the factors are B = G for W and b, and A = (1/N) Σₙ x xᵀ for W. With shared positions s, G has
    blocks G_st: convolutions sum them, B = Σ_st G_st and A = (1/N) Σₙₛ x xᵀ (BackPACK's convention); linear layers have
    B = Σ_s G_ss and A = 1/(N S) Σₙₛ x xᵀ. For N = 1 and no shared positions, B ⊗ A is the exact block of the GGN.

    The model must be a chain of linear layers, convolutions, also transposed, elementwise operations, max, average and
    adaptive pooling, padding, reshapes, dropout, batch norm in evaluation mode, and other operations that are linear with
    constant coefficients. Branches that meet again, such as x σ(x), count as one operation, which must be elementwise or
    linear as a whole. G has as many rows as one sample's activation has entries, at each operation after the first layer
    with parameters; two such matrices are held at once, for max pooling a third one. ``chunk_size`` has no effect.

    Returns:
        A tuple per parameter, as `kfac`. Arguments: see `curvfunc.quantities`.

    Raises:
        ValueError: As `diag_ggn`.
        NotImplementedError: If the graph branches otherwise, or for an operation without a rule; the message names it.

    References:
        Botev, Ritter, Barber 2017, "Practical Gauss-Newton optimisation for deep learning", sec. 3.2, eqs. 19 ff.; Grosse and
        Martens 2016, eq. 32, for convolutions. BackPACK's ``KFRA`` (``p.kfra``).
    """
    return _one(KFRA(), model_fn, params, X, y, loss_fn, subsampling, None, chunk_size)


def _one(
    spec: Quantity,
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    loss_fn: LossFunction,
    subsampling: Indices | None,
    generator: Generator | None,
    chunk_size: int | None,
    out: Any = None,
) -> Any:
    return compute(
        model_fn,
        params,
        X,
        y,
        spec,
        loss_fn=loss_fn,
        subsampling=subsampling,
        generator=generator,
        chunk_size=chunk_size,
        out=out,
    )
