"""Inner products of per-sample gradients, of the columns of the GGN's root, and of the rows of the output's Jacobian.

With these vectors as the rows of a matrix, these are its Gram matrices. They are small where the parameters
are many, and they have the non-zero eigenvalues of the matrices that are large: `ggn_gram` those of the GGN,
`batch_dot` those of the empirical Fisher Σₙ gₙ gₙᵀ, `ntk` those of Σₙ Jₙᵀ Jₙ.

A layer's gradients are sums of outer products, ⟨Σ_s g_s x_sᵀ, Σ_t h_t y_tᵀ⟩ = Σ_st ⟨g_s, h_t⟩ ⟨x_s, y_t⟩, so they need
not be formed; where forming them takes fewer operations, it happens for a part of the parameter at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch._C import _functorch
from torch.utils import _pytree as pytree

from curvfunc import losses
from curvfunc.engine.company import are_apart
from curvfunc.engine.contractions import CONTRACTIONS
from curvfunc.engine.cotangents import LossRoot, OutputEntries
from curvfunc.quantities.call import compute
from curvfunc.quantities.functions import batch_jac
from curvfunc.quantities.laws import Refused
from curvfunc.quantities.quantity import GaussNewton, Quantity
from curvfunc.quantities.run import trace
from curvfunc.tensors.docstrings import ARGUMENTS, documented, entries
from curvfunc.tensors.inputs import read_batch
from curvfunc.tensors.samples import flatten
from curvfunc.uses import second_moments
from curvfunc.uses.forms import Bound

__all__ = ["NTK", "BatchDot", "GGNGram", "batch_dot", "batch_dot_total", "ggn_gram", "ggn_gram_total", "ntk", "ntk_total"]

# The use of a parameter itself, with all columns: for what a spec makes of it with arguments of its own.
CONTRACTIONS["use"] = (lambda b: b, "join")

Model = Callable[[Any, Any], Tensor]
LossFunction = Callable[[Tensor, Any], Tensor]
Indices = Sequence[int] | Tensor

_documented = documented(
    ARGUMENTS
    | entries(
        """
        model_fn: ``(params, X) -> output [N, *out]``; C entries c of one sample's output, in the order of its flattened axes.
        X2: Input of M other samples, a tensor [M, ...] or pytree, of the same structure, shapes and dtypes as X but for M; X
            itself if None.
        subsampling: Indices [K] of samples of X, repeats allowed: those of n, K in place of N, and without X2 of m.
        chunk_size: Number of entries that are backpropagated together; by default chosen by memory.
        """
    )
)

_PAIRS = Refused(
    "it holds inner products of samples with each other, of which those between two batches are in neither. Use BatchGrad or "
    "SqrtGGN, and multiply"
)


@dataclass(frozen=True)
class BatchDot(Quantity):
    """Inner products ⟨gₙ, gₘ⟩ of the per-sample gradients, [N, N]."""

    contractions = ("gram",)
    laws = (_PAIRS,)

    def finish(self, samples: int, *parts: Tensor) -> Tensor:
        """Of the only column."""
        return parts[0][0, :, 0]


@dataclass(frozen=True)
class GGNGram(GaussNewton):
    """Inner products of the columns of the GGN's root, [V, N, V, N].

    Attributes:
        mc_samples: 0 for the exact loss Hessian, else the number of Monte-Carlo draws per sample.
    """

    contractions = ("gram",)
    laws = (_PAIRS,)

    @property
    def cotangent(self) -> LossRoot:
        """All columns, since the matrix has a row for each."""
        return LossRoot(self.mc_samples)


@dataclass(frozen=True)
class NTK(Quantity):
    """The empirical neural tangent kernel, [N, C, N, C] for outputs of C entries; whatever the loss."""

    contractions = ("gram",)
    laws = (_PAIRS,)
    cotangent = OutputEntries()

    def finish(self, samples: int, *parts: Any) -> Tensor:
        """Samples first."""
        kernel: Tensor = parts[0]
        return kernel.permute(1, 0, 3, 2)


@dataclass(frozen=True)
class _NTKBetween(Quantity):
    """The kernel between the first samples and the others, [first, C, N - first, C]: none that is not asked for."""

    first: int
    contractions = ("use",)
    cotangent = OutputEntries()

    def finish(self, samples: int, *parts: Bound | Tensor) -> Tensor:
        """Products of two parts of the use, samples first."""
        use = parts[0]
        if isinstance(use, Tensor):  # outputs without entries
            return use.new_zeros(self.first, 0, samples - self.first, 0)
        return second_moments.cross_gram(use, self.first).permute(1, 0, 3, 2)


@documented()
def batch_dot(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Inner products of the per-sample gradients, ⟨gₙ, gₘ⟩ with gₙ = R ∇ℓ(fₙ, yₙ), for each parameter.

    The diagonal is `curvfunc.batch_l2`. Over all parameters: `batch_dot_total`.

    Returns:
        A pytree like ``params``, [N, N] per parameter; zeros for one that the output does not depend on.

    References:
        Schneider, Dangel, Hennig 2021, "Cockpit: a practical debugging tool for the training of deep neural networks", which
        takes its instruments from them.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> dots = batch_dot(model_fn, params, X, y)["weight"]
        >>> dots.shape, torch.allclose(dots.diagonal(), batch_l2(model_fn, params, X, y)["weight"])
        (torch.Size([8, 8]), True)
    """
    return compute(model_fn, params, X, y, BatchDot(), loss_fn=loss_fn, subsampling=subsampling, chunk_size=chunk_size)


@documented()
def batch_dot_total(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Inner products of the per-sample gradients with respect to all parameters together: the sum of `batch_dot`.

    Returns:
        [N, N].

    References:
        Schneider, Dangel, Hennig 2021, "Cockpit: a practical debugging tool for the training of deep neural networks", which
        takes its instruments from them.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> batch_dot_total(model_fn, params, torch.randn(8, 4), torch.arange(8) % 3).shape
        torch.Size([8, 8])
    """
    return _sum(batch_dot(model_fn, params, X, y, loss_fn=loss_fn, subsampling=subsampling, chunk_size=chunk_size))


@documented()
def ggn_gram(
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
    """Gram matrix of the GGN's root, ⟨s[v,n], s[w,m]⟩ with s = `curvfunc.sqrt_ggn`, for each parameter.

    As a matrix [V N, V N] it has the non-zero eigenvalues of the parameter's diagonal block. For those of the whole GGN
    use `ggn_gram_total`. The outputs' cotangents of all V columns are held at once; ``chunk_size`` bounds what else is.

    Returns:
        A pytree like ``params``, [V, N, V, N] per parameter; V is the number of outputs of one sample, or ``mc_samples``.

    Raises:
        ValueError: If a custom loss has an indefinite Hessian.

    References:
        Dangel, Tatzel, Hennig 2022, "ViViT: Curvature access through the generalized Gauss-Newton's low-rank
        structure".

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> ggn_gram(model_fn, params, torch.randn(8, 4), torch.arange(8) % 3)["weight"].shape
        torch.Size([3, 8, 3, 8])
    """
    return compute(
        model_fn,
        params,
        X,
        y,
        GGNGram(mc_samples),
        loss_fn=loss_fn,
        subsampling=subsampling,
        generator=generator,
        chunk_size=chunk_size,
    )


@documented()
def ggn_gram_total(
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
) -> Tensor:
    """Gram matrix of the root of the whole GGN: the sum of `ggn_gram`, with the non-zero eigenvalues of the GGN.

    Returns:
        [V, N, V, N]; V is the number of outputs of one sample, or ``mc_samples``.

    Raises:
        ValueError: If a custom loss has an indefinite Hessian.

    References:
        Dangel, Tatzel, Hennig 2022, "ViViT: Curvature access through the generalized Gauss-Newton's low-rank
        structure".

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> gram = ggn_gram_total(model_fn, params, X, y)
        >>> top = torch.linalg.eigvalsh(gram.reshape(24, 24))[-1]  # as of the GGN, which is 15 x 15
        >>> torch.allclose(top, torch.linalg.eigvalsh(ggn_operator(model_fn, params, X, y).dense())[-1], atol=1e-5)
        True
    """
    return _sum(
        ggn_gram(
            model_fn,
            params,
            X,
            y,
            loss_fn=loss_fn,
            mc_samples=mc_samples,
            subsampling=subsampling,
            generator=generator,
            chunk_size=chunk_size,
        )
    )


@_documented
def ntk(
    model_fn: Model,
    params: Any,
    X: Any,
    X2: Any = None,
    *,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Empirical neural tangent kernel, K[n,c,m,d] = Σ_p Jₙ[c,p] Jₘ[d,p] with J = `batch_jac`, for each parameter.

    With a second batch, m runs over its samples. Both go through the model together where each sample can be followed through
    it by itself, and no products are formed but those of a sample of the one with a sample of the other; elsewhere (a model
    that asks for the size of its batch, or has other samples as data), and in transformed code, the Jacobians of both are
    multiplied. Jacobians are not formed where their products cost less without,
    which is so for vectors and few shared positions. The layers' cotangents of all C entries are held at once;
    ``chunk_size`` bounds what else is. For the whole kernel use `ntk_total`; in `compute`, what `NTK` gives does not
    depend on y and loss_fn.

    Returns:
        A pytree like ``params``, [N, C, N, C] per parameter, or [N, C, M, C] with X2.

    Raises:
        ValueError: If X2 is no input like X.

    References:
        Jacot, Gabriel, Hongler 2018, "Neural tangent kernel"; Novak, Sohl-Dickstein, Schoenholz 2022, "Fast finite width
        neural tangent kernel", who form no Jacobians where the structure of a layer spares them.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> train, test = torch.randn(8, 4), torch.randn(2, 4)
        >>> ntk(model_fn, params, train)["weight"].shape, ntk(model_fn, params, test, train)["weight"].shape
        (torch.Size([8, 3, 8, 3]), torch.Size([2, 3, 8, 3]))
    """
    spec: Quantity = NTK()
    if X2 is not None:
        joint = _side_by_side(X, X2, subsampling)
        if not _may_go_together(model_fn, params, X):
            return _of_jacobians(model_fn, params, X, X2, subsampling, chunk_size)
        X, subsampling, first = joint
        spec = spec if first is None else _NTKBetween(first)
    return compute(model_fn, params, X, X, spec, loss_fn=losses.no_loss, subsampling=subsampling, chunk_size=chunk_size)


@_documented
def ntk_total(
    model_fn: Model,
    params: Any,
    X: Any,
    X2: Any = None,
    *,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Empirical neural tangent kernel of all parameters together: the sum of `ntk`.

    Returns:
        [N, C, N, C], or [N, C, M, C] with X2.

    Raises:
        ValueError: If X2 is no input like X.

    References:
        Jacot, Gabriel, Hongler 2018, "Neural tangent kernel"; Novak, Sohl-Dickstein, Schoenholz 2022, "Fast finite width
        neural tangent kernel".

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 1))
        >>> kernel = ntk_total(model_fn, params, torch.ones(1, 4), torch.eye(4))
        >>> kernel.shape, kernel.flatten()  # of the bias 1, of the weight xᵀ x'
        (torch.Size([1, 1, 4, 1]), tensor([2., 2., 2., 2.]))
    """
    return _sum(ntk(model_fn, params, X, X2, subsampling=subsampling, chunk_size=chunk_size))


def _may_go_together(model_fn: Model, params: Any, X: Any) -> bool:
    """Whether each sample's output is its own, whatever else is in the batch."""
    if torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is not None:
        return False
    if not len(_parts(X)[0][0]):
        return True
    with torch.enable_grad():
        found = trace(model_fn, params, X)[1]
    found.restart()
    return are_apart(model_fn, found)


def _of_jacobians(model_fn: Model, params: Any, X: Any, X2: Any, subsampling: Indices | None, chunk_size: int | None) -> Any:
    ours = batch_jac(model_fn, params, X, subsampling=subsampling, chunk_size=chunk_size)
    theirs = batch_jac(model_fn, params, X2, chunk_size=chunk_size)

    def kernel(p: Tensor, *jacobians: Tensor) -> Tensor:
        rows = [J.reshape(len(J), J.shape[1 : J.ndim - p.ndim].numel(), p.numel()) for J in jacobians]
        return torch.einsum("ncp,mdp->ncmd", *rows)

    return pytree.tree_map(kernel, params, ours, theirs)


def _side_by_side(X: Any, X2: Any, subsampling: Indices | None) -> tuple[Any, Indices | None, int | None]:
    """Two batches as one, the samples of it that are wanted, and how many of them are of X; None if there are no samples."""
    batch = read_batch(X, X, subsampling, may_be_empty=True)
    (ours, rebuild), (theirs, again) = _parts(X), _parts(X2)
    places = list(range(len(ours)))
    alike = len(ours) == len(theirs) and rebuild(places) == again(places)
    for a, b in zip(ours, theirs, strict=False):
        alike = alike and isinstance(b, Tensor) and b.ndim > 0 and len(b) == len(theirs[0])
        alike = alike and (a.shape[1:], a.dtype, a.device) == (b.shape[1:], b.dtype, b.device)
    if not alike:
        raise ValueError(
            f"X2 must be like X but for the number of samples, since both go through the model together: X has {_shown(ours)} "
            f"and X2 has {_shown(theirs)}. Pad or convert one of them, or multiply the Jacobians of both: batch_jac."
        )
    others = len(theirs[0])
    if batch.total + others == 0:
        return X, None, None
    index = None
    if batch.index is not None:
        index = torch.cat([batch.index, torch.arange(batch.total, batch.total + others, device=batch.index.device)])
    return rebuild([torch.cat(pair) for pair in zip(ours, theirs, strict=True)]), index, batch.size


def _parts(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """As `flatten`; where dynamo traces, which cannot follow how optree puts dictionaries together, by torch's own means."""
    if not torch.compiler.is_compiling():
        return flatten(tree)
    leaves, structure = pytree.tree_flatten(tree)
    return leaves, lambda values: pytree.tree_unflatten(values, structure)


def _shown(leaves: Sequence[Any]) -> str:
    found = [f"{t.dtype} {tuple(t.shape)} on {t.device}" if isinstance(t, Tensor) else type(t).__name__ for t in leaves]
    return ", ".join(found) or "nothing"


def _sum(tree: Any) -> Tensor:
    first, *others = optree.tree_leaves(tree)
    total: Tensor = sum(others, first)
    return total
