"""Curvature matrices as linear operators: the model runs once, and every product is linear work on what it left behind.

An operator acts on the parameters, as a pytree like ``params`` or flattened into a vector [P], P being the number of
entries of all parameters. It is symmetric. Its shape, dtype and device are those of the matrix it stands for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from curvfunc import losses
from curvfunc.operators.linearization import (
    GaussNewton,
    Hessian,
    Product,
    batched,
    check_vector,
    linearize,
    read_vector,
)
from curvfunc.operators.products import _mc, fisher_matrix
from curvfunc.operators.unions import Union, union
from curvfunc.tensors.ownership import own

__all__ = ["LinearOperator", "fisher_operator", "ggn_operator", "hessian_operator"]

Model = Callable[[Any, Any], Tensor]
LossFunction = Callable[[Tensor, Any], Tensor]
Indices = Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class LinearOperator:
    """A symmetric matrix that is known by its products; made by `hessian_operator`, `ggn_operator`, `fisher_operator`.

    ``operator @ v`` accepts, and returns in the same format:

    - a vector [P] or a matrix [P, K];
    - a pytree like ``params``, or one whose tensors have a leading axis, [K, *shape].

    Attributes:
        names: Of the parameters, in the order of the flat vector.
        shape: (P, P).
        dtype: Of the parameters.
        device: Of the parameters.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    _leaves: list[Tensor] = field(repr=False)
    _rebuild: Callable[[Sequence[Any]], Any] = field(repr=False)
    _product: Product = field(repr=False)
    _chunk_size: int | None = field(repr=False)
    _union: Union | None = field(repr=False, default=None)  # with the samples of other processes
    __array_ufunc__ = None  # so that numpy leaves products to this class

    def __matmul__(self, v: Any) -> Any:
        """The product with v.

        Raises:
            TypeError, ValueError: If v does not fit the parameters.
        """
        if not isinstance(v, Tensor):
            values = self._read(v)
            if values[0].ndim > self._leaves[0].ndim:
                return self._rebuild(self._multiply(values))
            return self._rebuild([t[0] for t in self._multiply([t[None] for t in values])])
        if v.ndim not in (1, 2) or v.shape[0] != self.shape[1]:
            raise ValueError(f"v has shape {tuple(v.shape)}; [P] or [P, K] with P = {self.shape[1]} is needed.")
        rows = v.mT if v.ndim == 2 else v[None]
        split = torch.split(rows, [p.numel() for p in self._leaves], dim=1)
        vectors = [t.reshape(len(rows), *p.shape) for t, p in zip(split, self._leaves, strict=True)]
        for name, t, p in zip(self.names, vectors, self._leaves, strict=True):
            check_vector(f"v at {name!r}", t, p, batched=True)
        result = _rows(self._multiply(vectors))
        return result.mT if v.ndim == 2 else result[0]

    def __rmatmul__(self, v: Any) -> Any:
        """Refused: the operator is on the left."""
        raise TypeError(f"{type(v).__name__} @ operator is not defined. The matrix is symmetric: use operator @ v.")

    def flatten(self, v: Any) -> Tensor:
        """A pytree like ``params`` as a vector [P], or with leading axes [K, *shape] as a matrix [P, K]."""
        values = self._read(v)
        if values[0].ndim > self._leaves[0].ndim:
            return _rows(values).mT
        return torch.cat([t.flatten() for t in values])

    def unflatten(self, v: Tensor) -> Any:
        """A vector [P] as a pytree like ``params``; a matrix [P, K] as one with leading axes [K, *shape]."""
        if v.ndim not in (1, 2) or v.shape[0] != self.shape[1]:
            raise ValueError(f"v has shape {tuple(v.shape)}; [P] or [P, K] with P = {self.shape[1]} is needed.")
        split = torch.split(v.mT if v.ndim == 2 else v, [p.numel() for p in self._leaves], dim=-1)
        parts = [t.reshape((*v.shape[1:], *p.shape)) for t, p in zip(split, self._leaves, strict=True)]
        return self._rebuild(own(parts, lambda: [v]))

    def dense(self) -> Tensor:
        """The matrix itself, [P, P]: P products, for small problems."""
        result: Tensor = self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return result

    def to_scipy(self) -> Any:
        """The same as a ``scipy.sparse.linalg.LinearOperator``, which computes in this operator's dtype and device.

        Raises:
            ImportError: If scipy is not installed.
        """
        return as_scipy(self)

    def _read(self, v: Any) -> list[Tensor]:
        if isinstance(v, LinearOperator):
            raise TypeError("operator @ operator is not formed. Multiply one after the other: A @ (B @ v).")
        leaves: list[Any] = optree.tree_leaves(v)
        wrong = [type(t).__name__ for t in leaves if not isinstance(t, Tensor)]
        if wrong and not isinstance(v, dict):
            raise TypeError(
                f"v must be a tensor [P] or [P, K], or a pytree of tensors like params, got {wrong[0]}. Convert it by "
                "torch.as_tensor(v), or use operator.to_scipy() for numpy arrays."
            )
        extra = sum(t.ndim for t in leaves if isinstance(t, Tensor)) > sum(p.ndim for p in self._leaves)
        return read_vector("v", v, self.names, self._leaves, batched=extra)

    def _multiply(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        own = lambda: batched(self._product, self._leaves, range(len(self._leaves)), vectors, self._chunk_size)
        return own() if self._union is None else self._union(vectors, own)


def _rows(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors [K, *shape] side by side, [K, P]; a parameter without axes has one entry."""
    return torch.cat([t.reshape(len(t), t.shape[1:].numel()) for t in tensors], dim=1)


def as_scipy(operator: Any) -> Any:
    """Any symmetric operator as scipy's: what has ``shape``, ``dtype``, ``device`` and ``@`` on [P, K]."""
    linalg = scipy_linalg()

    def product(v: Any) -> Any:
        return (operator @ torch.tensor(v, dtype=operator.dtype, device=operator.device)).cpu().numpy()

    def vector_product(v: Any) -> Any:  # scipy passes [P] or [P, 1]
        return product(v.reshape(-1, 1)).reshape(-1)

    return linalg.LinearOperator(
        tuple(operator.shape),
        matvec=vector_product,
        rmatvec=vector_product,
        matmat=product,
        rmatmat=product,
        dtype=torch.empty(0, dtype=operator.dtype).numpy().dtype,
    )


def scipy_linalg() -> Any:
    """``scipy.sparse.linalg``."""
    try:
        import scipy.sparse.linalg
    except ImportError as error:
        raise ImportError(
            "this needs scipy, which is not installed: pip install 'curvfunc[scipy]', or pip install scipy."
        ) from error
    return scipy.sparse.linalg


def hessian_operator(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
) -> LinearOperator:
    """The Hessian ∇²L at ``params`` as a linear operator.

    The model runs once, here; memory and lifetime are those of `curvfunc.hmp`.

    Returns:
        Operator of shape (P, P). Arguments: see `curvfunc.operators.products`.

    Raises:
        TypeError, ValueError, NotImplementedError: As `curvfunc.hmp`.

    Example:
        >>> import curvfunc
        >>> model_fn, params = curvfunc.functionalize(torch.nn.Linear(4, 3))
        >>> H = hessian_operator(model_fn, params, torch.randn(8, 4), torch.arange(8) % 3)
        >>> H.shape, (H @ torch.randn(15)).shape, (H @ params)["weight"].shape
        ((15, 15), torch.Size([15]), torch.Size([3, 4]))
    """
    return _operator("hessian_operator", Hessian(), model_fn, params, X, y, loss_fn, subsampling, None, chunk_size)


def ggn_operator(
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
    group: Any = None,
) -> LinearOperator:
    """The generalized Gauss-Newton matrix R Σₙ Jₙᵀ ∇²ℓₙ Jₙ at ``params`` as a linear operator.

    Draws (``mc_samples``) are made once, here. Memory and lifetime are those of `curvfunc.hmp`.

    With a ``group`` of torch.distributed it is the matrix of the samples of all its processes, each of which passes its own X
    and y, of which there may be none. A product is then made by all of them at once, with the same vector, and all have it:
    where an estimator draws vectors, seed it alike everywhere. The loss has to be cross-entropy, squared error or BCE with
    logits.

    Returns:
        Operator of shape (P, P). Arguments: see `curvfunc.operators.products`.

    Raises:
        TypeError, ValueError, NotImplementedError: As `curvfunc.hmp`.
        RuntimeError: If another process of the group has failed or is gone, here or at a product.
    """
    matrix = GaussNewton(_mc("ggn_operator", mc_samples))
    return _operator("ggn_operator", matrix, model_fn, params, X, y, loss_fn, subsampling, generator, chunk_size, group)


def fisher_operator(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    empirical: bool = False,
    mc_samples: int = 0,
    subsampling: Indices | None = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
) -> LinearOperator:
    """The Fisher information, or the empirical one, at ``params`` as a linear operator; scaled as `curvfunc.fisher_vp`.

    Draws (``mc_samples``) are made once, here. Memory and lifetime are those of `curvfunc.hmp`.

    Returns:
        Operator of shape (P, P). Arguments: see `curvfunc.fisher_vp` and `curvfunc.operators.products`.

    Raises:
        TypeError, ValueError, NotImplementedError: As `curvfunc.hmp` and `curvfunc.fisher_vp`.
    """
    matrix = fisher_matrix("fisher_operator", loss_fn, empirical, mc_samples)
    return _operator("fisher_operator", matrix, model_fn, params, X, y, loss_fn, subsampling, generator, chunk_size)


def _operator(
    caller: str,
    matrix: Any,
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    loss_fn: LossFunction,
    subsampling: Indices | None,
    generator: Generator | None,
    chunk_size: int | None,
    group: Any = None,
) -> LinearOperator:
    together, run = (
        None,
        partial(linearize, caller, matrix, model_fn, params, X, y, loss_fn, subsampling, generator, chunk_size),
    )
    if group is None:
        names, leaves, rebuild, product = run()
    else:
        (names, leaves, rebuild, product), together = union(group, matrix, params, y, losses.normalize(loss_fn), run)
    kinds = sorted({f"{p.dtype} on {p.device}" for p in leaves})
    if len(kinds) > 1:
        raise ValueError(f"{caller}: parameters are {', '.join(kinds)}; an operator needs one dtype and one device.")
    size = sum(p.numel() for p in leaves)
    kind = leaves[0].dtype, leaves[0].device
    return LinearOperator(tuple(names), (size, size), *kind, leaves, rebuild, product, chunk_size, together)
