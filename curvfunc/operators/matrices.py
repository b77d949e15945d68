"""What operators have in common with other matrices, and the trees that they act on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from curvfunc.operators.linearization import check_vector, read_vector
from curvfunc.tensors.inputs import flatten_params
from curvfunc.tensors.ownership import own
from curvfunc.tensors.progress import bar

__all__ = ["Space", "as_scipy", "scipy_linalg", "size_of", "watched"]


def size_of(operator: Any) -> int:
    """The number of rows of a square matrix; raises for anything else."""
    kinds = {"dtype": torch.dtype, "device": torch.device}
    if not all(isinstance(getattr(operator, name, None), kind) for name, kind in kinds.items()):
        raise TypeError(
            f"the operator is a {type(operator).__name__}; a curvfunc.LinearOperator, a tensor [P, P], or an object with "
            "shape, dtype and device as tensors have them, and @ on matrices [P, K], is needed. Convert arrays by "
            "torch.as_tensor."
        )
    if len(operator.shape) != 2:
        raise ValueError(f"the operator has shape {tuple(operator.shape)}; a square one is needed.")
    rows, columns = operator.shape
    if rows != columns:
        raise ValueError(f"the operator has shape {tuple(operator.shape)}; a square one is needed.")
    return int(rows)


@dataclass(frozen=True, eq=False)
class Space:
    """The vectors that an operator acts on: trees like the parameters, or these as vectors [P].

    Attributes:
        names: Of the parameters, in the order of the flat vector.
        like: For each a tensor of its shape, type and device, without values of its own.
        tree: Structure of the parameters; None for a dictionary by name.
    """

    names: tuple[str, ...]
    like: tuple[Tensor, ...]
    tree: optree.PyTreeSpec | None

    @classmethod
    def of(cls, caller: str, params: Any) -> "Space":
        """That of the parameters, which need one type and one device."""
        names, tensors, _ = flatten_params(params)
        kinds = sorted({f"{p.dtype} on {p.device}" for p in tensors})
        if len(kinds) > 1:
            raise ValueError(f"{caller}: parameters are {', '.join(kinds)}; an operator needs one dtype and one device.")
        by_name = type(params) is dict and list(params) == names
        like = [torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape) for p in tensors]
        return cls(tuple(names), tuple(like), None if by_name else optree.tree_structure(params))

    @property
    def size(self) -> int:
        """Number P of entries of all parameters."""
        return sum(p.numel() for p in self.like)

    def build(self, values: Sequence[Any]) -> Any:
        """The tree of a value for each parameter."""
        return dict(zip(self.names, values, strict=True)) if self.tree is None else self.tree.unflatten(values)

    def difference(self, other: "Space") -> str | None:
        """What to say of the first thing in which the parameters of another operator differ."""
        mine, theirs = ({n: tuple(p.shape) for n, p in zip(s.names, s.like, strict=True)} for s in (self, other))
        if list(mine) != list(theirs):
            return f"parameters {list(mine)} and {list(theirs)}"
        if mine != theirs:
            name = next(n for n in mine if mine[n] != theirs[n])
            return f"parameter {name!r} of shapes {mine[name]} and {theirs[name]}"
        if self.tree == other.tree:
            return None
        kinds = [s.tree or "a dictionary" for s in (self, other)]
        return f"parameters in {kinds[0]} and in {kinds[1]}"

    # -- as vectors

    def columns(self, vectors: Sequence[Tensor]) -> Tensor:
        """Tensors [K, *shape] as a matrix [P, K]; a parameter without axes has one entry."""
        return torch.cat([t.reshape(len(t), t.shape[1:].numel()) for t in vectors], dim=1).mT

    def split(self, v: Tensor) -> list[Tensor]:
        """A matrix [P, K] as tensors [K, *shape]."""
        parts = torch.split(v.mT, [p.numel() for p in self.like], dim=1)
        return [t.reshape(len(t), *p.shape) for t, p in zip(parts, self.like, strict=True)]

    def read(self, v: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
        """Tensors [K, *shape] of anything that an operator takes, and what brings others to the format of that.

        Raises:
            TypeError, ValueError: If it does not fit the parameters.
        """
        if not isinstance(v, Tensor):
            values = self.read_tree(v)
            if values[0].ndim > self.like[0].ndim:
                return values, self.build
            return [t[None] for t in values], lambda found: self.build([t[0] for t in found])
        self.check_flat(v)
        values = self.split(v if v.ndim == 2 else v[:, None])
        for name, t, p in zip(self.names, values, self.like, strict=True):
            check_vector(f"v at {name!r}", t, p, batched=True)
        return values, self.columns if v.ndim == 2 else lambda found: self.columns(found)[:, 0]

    def check_flat(self, v: Tensor) -> None:
        """Raise unless it is a vector, or a matrix of columns."""
        if v.ndim not in (1, 2) or v.shape[0] != self.size:
            raise ValueError(f"v has shape {tuple(v.shape)}; [P] or [P, K] with P = {self.size} is needed.")

    def read_tree(self, v: Any) -> list[Tensor]:
        """The tensors of a tree like the parameters, with or without a leading axis."""
        leaves: list[Any] = optree.tree_leaves(v)
        wrong = [type(t).__name__ for t in leaves if not isinstance(t, Tensor)]
        if wrong and not isinstance(v, dict):
            raise TypeError(
                f"v must be a tensor [P] or [P, K], or a pytree of tensors like params, got {wrong[0]}. Convert it by "
                "torch.as_tensor(v), or use operator.to_scipy() for numpy arrays."
            )
        extra = sum(t.ndim for t in leaves if isinstance(t, Tensor)) > sum(p.ndim for p in self.like)
        return read_vector("v", v, self.names, self.like, batched=extra)

    def flatten(self, v: Any) -> Tensor:
        """A tree as a vector [P], or with leading axes [K, *shape] as a matrix [P, K]."""
        values = self.read_tree(v)
        if values[0].ndim > self.like[0].ndim:
            return self.columns(values)
        return torch.cat([t.flatten() for t in values])

    def unflatten(self, v: Tensor) -> Any:
        """A vector [P] as a tree; a matrix [P, K] as one with leading axes [K, *shape]."""
        self.check_flat(v)
        parts = self.split(v if v.ndim == 2 else v[:, None])
        return self.build(own(parts if v.ndim == 2 else [t[0] for t in parts], lambda: [v]))


@dataclass(frozen=True, eq=False)
class Watched:
    """An operator of which each product is counted."""

    operator: Any
    advance: Callable[[], Any]

    @property
    def shape(self) -> Any:
        """That of the operator."""
        return self.operator.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of the operator."""
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        """That of the operator."""
        return self.operator.device

    def __matmul__(self, v: Tensor) -> Tensor:
        result: Tensor = self.operator @ v
        self.advance()
        return result


@contextmanager
def watched(caller: str, operator: Any, total: int | None, progress: bool) -> Iterator[Any]:
    """The operator, with a bar of its products if asked for."""
    if not progress:
        yield operator
        return
    with bar(caller, "product", total, progress) as advance:
        yield Watched(operator, advance)


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
        dtype=torch.empty(0, dtype=operator.dtype, device="cpu").numpy().dtype,
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
