"""Every quantity: a cotangent and a contraction.

A spec names what is backpropagated (``cotangent``), what each layer makes of it (``contractions``), how the parts
become the result (``finish``), and how results of several batches merge (``laws``). Each public function asks
`curvfunc.compute` for one spec.

What they have in common in their docstrings, arguments above all, is pasted into each (`curvfunc.tensors.docstrings`).
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
from curvfunc.tensors.docstrings import ARGUMENTS, documented, entries

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

_documented = documented(
    ARGUMENTS
    | entries(
        """
        kfac_approx: How S positions s of a parameter's use make its factors: "expand" sums over products, B = Σ_vns g gᵀ and
            A = 1/(N S) Σ_ns x xᵀ; "reduce" takes products of sums, B = Σ_vn (Σ_s g)(Σ_s g)ᵀ and A = 1/N Σₙ (1/S Σ_s x)(1/S Σ_s
            x)ᵀ. None: BackPACK's convention for convolutions, B of "reduce" and A = 1/N Σ_ns x xᵀ, "expand" for all else.
        joined: Whether the inputs of layers with a bias have a one appended, so that the weight's factors are (B [o, o],
            Ā [k + 1, k + 1]), those of [weight | bias]; the bias keeps its (B,).
        """
    )
)


@_documented
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

    What a sample's gradient is: with f the outputs of the whole batch, gₙ = R ∂ℓₙ(fₙ)/∂θ, everything else held as it is. Other
    samples may enter fₙ as data, or detached; where the gradient of fₙ would flow to other samples (normalization over the
    batch), the model is refused. The gₙ add up to the gradient of L.

    Returns:
        A pytree like ``params``, [N, *shape] per parameter; zeros for one that the output does not depend on.

    References:
        BackPACK's ``BatchGrad`` (``p.grad_batch``).

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> g = batch_grad(model_fn, params, X, y)
        >>> g["weight"].shape, g["bias"].shape
        (torch.Size([8, 3, 4]), torch.Size([8, 3]))
    """
    return _one(BatchGrad(), model_fn, params, X, y, loss_fn, subsampling, None, chunk_size, out)


@_documented
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
        model_fn: ``(params, X) -> output [N, *out]``, from `curvfunc.functionalize` or any function; a module itself is none.
        X: Input, a tensor [N, ...] or a pytree of tensors with leading sample axis N, of which there may be none.
        subsampling: Indices [M] of samples, repeats allowed: those of n, M in place of N. The cost is that of the subset.
        chunk_size: Number of entries that are backpropagated together; by default chosen by memory.
        out: The result of an earlier call, in whose memory this one is formed. Other tensors of its shapes will do, but the
            result is copied into these if they have another layout, such as contiguous ones.

    Returns:
        A pytree like ``params``, [N, *out, *shape] per parameter, in memory with the samples after the output's axes; zeros for
        one that the output does not depend on.

    Raises:
        TypeError: For a complex output.

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


@_documented
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
        A pytree like ``params``, [N] per parameter; zeros for one that the output does not depend on.

    References:
        BackPACK's ``BatchL2Grad`` (``p.batch_l2``); Goodfellow 2015, "Efficient per-example gradient computations", sec. 4.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> norms = batch_l2(model_fn, params, X, y)
        >>> torch.allclose(norms["bias"], batch_grad(model_fn, params, X, y)["bias"].square().sum(1))
        True
    """
    return _one(BatchL2(), model_fn, params, X, y, loss_fn, subsampling, None, chunk_size)


@_documented
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
        max_norm: C; or the bound of each layer or parameter by name, of which the longest that fits counts.
        per_layer: Whether each layer is clipped by itself.
        loss_fn: ``(output, y) -> scalar`` that sums over samples; by default cross-entropy, summed. A mean is refused.
        chunk_size: No effect, as there is one column.

    Returns:
        A pytree like ``params``, [*shape] per parameter; zeros for one that the output does not depend on.

    Raises:
        ValueError: For bounds that are not positive, a loss that is no sum, and a model in which samples depend on each other.

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


@_documented
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
        A pytree like ``params``, [*shape] per parameter; zeros for one that the output does not depend on.

    References:
        BackPACK's ``SumGradSquared`` (``p.sum_grad_squared``); Dangel, Kunstner, Hennig 2020, "BackPACK", appendix A.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> squares = sum_grad_squared(model_fn, params, X, y)
        >>> torch.allclose(squares["weight"], batch_grad(model_fn, params, X, y)["weight"].square().sum(0))
        True
    """
    return _one(SumGradSquared(), model_fn, params, X, y, loss_fn, subsampling, None, chunk_size)


@_documented
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
        A pytree like ``params``, [*shape] per parameter; zeros for one that the output does not depend on.

    References:
        BackPACK's ``Variance`` (``p.variance``).

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> g = batch_grad(model_fn, params, X, y)["weight"]
        >>> torch.allclose(variance(model_fn, params, X, y)["weight"], g.var(0, correction=0))
        True
    """
    return _one(Variance(), model_fn, params, X, y, loss_fn, subsampling, None, chunk_size)


@_documented
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

    Jₙ is the Jacobian of sample n's output with respect to the parameters, ∇²ℓₙ the Hessian of its loss with respect to the
    output. With ``mc_samples`` the loss Hessian is replaced by draws from the likelihood that the loss implies; for
    cross-entropy, squared error and BCE with logits the matrix is the Fisher information, so this is an unbiased estimate.

    Returns:
        A pytree like ``params``, [*shape] per parameter; zeros for one that the output does not depend on.

    Raises:
        ValueError: If a custom loss has an indefinite Hessian.

    References:
        BackPACK's ``DiagGGNExact``, ``DiagGGNMC``; Schraudolph 2002; Martens 2020, "New insights and perspectives on
        the natural gradient method", secs. 8 and 9.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> exact, estimate = (diag_ggn(model_fn, params, X, y, mc_samples=m) for m in (0, 1))
        >>> exact["weight"].shape, estimate["bias"].shape
        (torch.Size([3, 4]), torch.Size([3]))
    """
    return _one(DiagGGN(mc_samples), model_fn, params, X, y, loss_fn, subsampling, generator, chunk_size)


@_documented
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
        A pytree like ``params``, [N, *shape] per parameter; zeros for one that the output does not depend on.

    Raises:
        ValueError: If a custom loss has an indefinite Hessian.

    References:
        BackPACK's ``BatchDiagGGNExact``, ``BatchDiagGGNMC``.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> parts = batch_diag_ggn(model_fn, params, X, y)["weight"]
        >>> parts.shape, torch.allclose(parts.sum(0), diag_ggn(model_fn, params, X, y)["weight"])
        (torch.Size([8, 3, 4]), True)
    """
    return _one(BatchDiagGGN(mc_samples), model_fn, params, X, y, loss_fn, subsampling, generator, chunk_size, out)


@_documented
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
    2 a b = ½ (a + b)² − ½ (a − b)². Softmax and layer, group and RMS norms add one for each entry, like an activation, and up
    to three for each row that they normalize. Parameters before any other operation take one Hessian-vector product for each
    entry of their layer's output or of the parameter, and so do those for which it costs less than such columns; parameters
    that are used again on what they produced (recurrent layers, tied embeddings) one for each entry of theirs. From 10,000 of
    these products, and columns of what is not elementwise, on there is a warning.

    Returns:
        A pytree like ``params``, [*shape] per parameter; zeros for one that the output does not depend on.

    Raises:
        RuntimeError: If an operation has no second derivative in PyTorch.

    References:
        BackPACK's ``DiagHessian``; Dangel, Harmeling, Hennig 2020, "Modular block-diagonal curvature approximations for
        feedforward architectures", eq. 4. Estimate: Bekas, Kokiopoulou, Saad 2007, "An estimator for the diagonal of a
        matrix"; Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney 2021, "AdaHessian", eq. 9.

    Example:
        >>> model_fn, params = functionalize(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double())
        >>> X, y = torch.randn(8, 4).double(), torch.arange(8) % 3
        >>> diagonal = diag_hessian(model_fn, params, X, y)
        >>> H = hessian_operator(model_fn, params, X, y)
        >>> torch.allclose(H.flatten(diagonal), H.dense().diagonal())
        True
    """
    return _one(DiagHessian(mc_samples), model_fn, params, X, y, loss_fn, subsampling, generator, chunk_size)


@_documented
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
        A pytree like ``params``, [N, *shape] per parameter; zeros for one that the output does not depend on.

    Raises:
        RuntimeError: If an operation has no second derivative in PyTorch.

    References:
        BackPACK's ``BatchDiagHessian``.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> batch_diag_hessian(model_fn, params, torch.randn(8, 4), torch.arange(8) % 3)["bias"].shape
        torch.Size([8, 3])
    """
    return _one(BatchDiagHessian(mc_samples), model_fn, params, X, y, loss_fn, subsampling, generator, chunk_size, out)


@_documented
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

    Jₙ is the Jacobian of sample n's output with respect to the parameters, ∇²ℓₙ the Hessian of its loss with respect to the
    output.

    Returns:
        A pytree like ``params``, [V, N, *shape] per parameter; V is the number of outputs of one sample, or ``mc_samples``.
        Zeros for a parameter that the output does not depend on.

    Raises:
        ValueError: If a custom loss has an indefinite Hessian.

    References:
        BackPACK's ``SqrtGGNExact``, ``SqrtGGNMC``.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> root = sqrt_ggn(model_fn, params, X, y)["weight"]
        >>> root.shape, torch.allclose(root.square().sum((0, 1)), diag_ggn(model_fn, params, X, y)["weight"])
        (torch.Size([3, 8, 3, 4]), True)
    """
    return _one(SqrtGGN(mc_samples), model_fn, params, X, y, loss_fn, subsampling, generator, chunk_size, out)


@_documented
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
        A pytree like ``params`` with a tuple per parameter: (B [o, o], A [k, k]) for a weight with o outputs and k inputs (of a
        convolution, k = inputs times kernel size), (A, B) where its axes are those of the inputs first; (B [o, o],) for a bias,
        and in general (B [numel, numel],) for a parameter without input factor.

    Raises:
        ValueError: If a custom loss has an indefinite Hessian; if there are no samples.
        NotImplementedError: If a large parameter has no Kronecker structure.

    References:
        Martens and Grosse 2015, eq. 1 ff.; Grosse and Martens 2016, eq. 32; Eschenhagen et al. 2023, eq. 22 (expand).
        BackPACK's ``KFAC`` (``p.kfac``).

    Example:
        >>> model_fn, params = functionalize(nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)))
        >>> factors = kfac(model_fn, params, torch.randn(8, 2, 4, 4), torch.arange(8) % 3)
        >>> {name: [tuple(factor.shape) for factor in own] for name, own in factors.items()}
        {'0.weight': [(5, 5), (18, 18)], '0.bias': [(5, 5)], '3.weight': [(3, 3), (20, 20)], '3.bias': [(3, 3)]}
    """
    return _one(KFAC(mc_samples, kfac_approx, joined), model_fn, params, X, y, loss_fn, subsampling, generator, chunk_size)


@_documented
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
        loss_fn: ``(output, y) -> scalar`` that sums or averages over samples. It need not be convex. By default cross-entropy,
            averaged.
        subsampling: Indices [M] of samples, repeats allowed: B sums and A averages over them, R stays that of the whole batch.
        chunk_size: No effect, since there is one vector.

    Returns:
        A pytree like ``params`` with a tuple per parameter: (B [o, o], A [k, k]) for a weight with o outputs and k inputs (of a
        convolution, k = inputs times kernel size), (A, B) where its axes are those of the inputs first; (B [o, o],) for a bias,
        and in general (B [numel, numel],) for a parameter without input factor.

    Raises:
        ValueError: If a loss of one's own is neither a sum nor a mean of one term per sample; if there are no samples.
        NotImplementedError: If a large parameter has no Kronecker structure.

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


@_documented
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
    """Kronecker factors whose product approximates each parameter's GGN block, GGN ≈ B ⊗ A, from the exact loss Hessian.

    As `kfac`, with a column v of the root of the loss Hessian for each output in place of draws. With their cotangents g and
    layer inputs x, B = Σ_vn g gᵀ and A = 1/N Σₙ x xᵀ; of a parameter that is used at several positions, see ``kfac_approx``.

    Returns:
        A pytree like ``params`` with a tuple per parameter: (B [o, o], A [k, k]) for a weight with o outputs and k inputs (of a
        convolution, k = inputs times kernel size), (A, B) where its axes are those of the inputs first; (B [o, o],) for a bias,
        and in general (B [numel, numel],) for a parameter without input factor.

    Raises:
        ValueError: If a custom loss has an indefinite Hessian; if there are no samples.
        NotImplementedError: If a large parameter has no Kronecker structure.

    References:
        Botev, Ritter, Barber 2017, sec. 3.3. BackPACK's ``KFLR`` (``p.kflr``).

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> B, A = kflr(model_fn, params, torch.randn(1, 4), torch.tensor([0]))["weight"]
        >>> B.shape, A.shape  # for one sample and one position, B ⊗ A is the GGN's block
        (torch.Size([3, 3]), torch.Size([4, 4]))
    """
    return _one(KFLR(kfac_approx, joined), model_fn, params, X, y, loss_fn, subsampling, None, chunk_size)


@_documented
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

    Args:
        chunk_size: No effect, as there is one matrix.

    Returns:
        A pytree like ``params`` with a tuple per parameter: (B [o, o], A [k, k]) for a weight with o outputs and k inputs (of a
        convolution, k = inputs times kernel size), (B [o, o],) for a bias.

    Raises:
        ValueError: If a custom loss has an indefinite Hessian; if there are no samples.
        NotImplementedError: If the graph branches otherwise, or for an operation without a rule; the message names it.

    References:
        Botev, Ritter, Barber 2017, "Practical Gauss-Newton optimisation for deep learning", sec. 3.2, eqs. 19 ff.; Grosse and
        Martens 2016, eq. 32, for convolutions. BackPACK's ``KFRA`` (``p.kfra``).

    Example:
        >>> model_fn, params = functionalize(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
        >>> factors = kfra(model_fn, params, torch.randn(8, 4), torch.arange(8) % 3)
        >>> [tuple(factor.shape) for factor in factors["0.weight"]]
        [(5, 5), (4, 4)]
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
