"""Symmetric matrices as linear operators, and their algebra: sums, multiples, shifts, solutions of linear systems.

An operator acts on the parameters, as a pytree like ``params`` or flattened into a vector [P], P being the number of
entries of all parameters. It is symmetric. Its shape, dtype and device are those of the matrix it stands for.
"""

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from curvfunc.operators.conjugate_gradients import conjugate_gradients
from curvfunc.operators.matrices import Space, as_scipy, size_of, watched

__all__ = ["LinearOperator", "Source"]


class Source(Protocol):
    """Where products come from."""

    def multiply(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The product with vectors, a tensor [K, *shape] for each parameter."""


@dataclass(frozen=True, eq=False)
class LinearOperator:
    """A symmetric matrix that is known by its products; made by `hessian_operator`, `ggn_operator`, `fisher_operator`.

    ``operator @ v`` accepts, and returns in the same format:

    - a vector [P] or a matrix [P, K];
    - a pytree like ``params``, or one whose tensors have a leading axis, [K, *shape].

    Operators at the same parameters form an algebra: ``A + B``, ``A - B``, ``-A``, ``2 * A``, ``A / 2``; a number that is added
    is a shift, ``A + 0.1`` being A + 0.1 I. Symmetric tensors [P, P], and other objects with ``shape``, ``dtype``, ``device``
    and ``@``, can be added too. Nothing is multiplied before ``@``; a product with a sum is one with each of its terms.

    Operators can be pickled where the model, the loss and the data can be: the model runs again when they are loaded,
    with the same random numbers.

    Attributes:
        names: Of the parameters, in the order of the flat vector.
        shape: (P, P).
        dtype: Of the parameters.
        device: Of the parameters.

    Example:
        >>> import curvfunc
        >>> model_fn, params = curvfunc.functionalize(torch.nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> G, H = (f(model_fn, params, X, y) for f in (curvfunc.ggn_operator, curvfunc.hessian_operator))
        >>> ((G - H) @ params)["bias"].shape
        torch.Size([3])
        >>> step = (G + 0.1).solve(curvfunc.compute(model_fn, params, X, y, curvfunc.Grad()))
        >>> step["weight"].shape
        torch.Size([3, 4])
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    _space: Space = field(repr=False)
    _source: Source = field(repr=False)
    __array_ufunc__ = None  # so that numpy leaves products to this class

    @classmethod
    def of(cls, space: Space, source: Source) -> "LinearOperator":
        """The operator on a space that multiplies as ``source`` does."""
        first = space.like[0]
        return cls(space.names, (space.size, space.size), first.dtype, first.device, space, source)

    def __repr__(self) -> str:
        size, names = self.shape[0], len(self.names)
        return f"LinearOperator({size} x {size}, {self.dtype}, {self.device}, of {names} parameter{'s' * (names != 1)})"

    # -- products

    def __matmul__(self, v: Any) -> Any:
        """The product with v.

        Raises:
            TypeError, ValueError: If v does not fit the parameters.
        """
        if isinstance(v, LinearOperator):
            raise TypeError("operator @ operator is not formed. Multiply one after the other: A @ (B @ v).")
        values, back = self._space.read(v)
        return back(self._source.multiply(values))

    def __rmatmul__(self, v: Any) -> Any:
        """Refused: the operator is on the left."""
        raise TypeError(f"{type(v).__name__} @ operator is not defined. The matrix is symmetric: use operator @ v.")

    def flatten(self, v: Any) -> Tensor:
        """A pytree like ``params`` as a vector [P], or with leading axes [K, *shape] as a matrix [P, K]."""
        return self._space.flatten(v)

    def unflatten(self, v: Tensor) -> Any:
        """A vector [P] as a pytree like ``params``; a matrix [P, K] as one with leading axes [K, *shape]."""
        return self._space.unflatten(v)

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

    # -- the algebra

    def __add__(self, other: Any) -> "LinearOperator":
        """The sum with another matrix, or with a multiple of the identity."""
        mine = Combination.of(self)
        if (number := _number(other)) is not None:
            return LinearOperator.of(self._space, Combination(mine.terms, mine.shift + number))
        self._check(other)
        theirs = Combination.of(other)
        return LinearOperator.of(self._space, Combination((*mine.terms, *theirs.terms), mine.shift + theirs.shift))

    __radd__ = __add__

    def __mul__(self, factor: Any) -> "LinearOperator":
        """A multiple."""
        number = _number(factor)
        if number is None:
            raise TypeError(f"an operator can be multiplied by a number, and is, by @, with vectors; got {_kind(factor)}.")
        mine = Combination.of(self)
        terms = tuple((number * weight, term) for weight, term in mine.terms)
        return LinearOperator.of(self._space, Combination(terms, number * mine.shift))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "LinearOperator":
        """A multiple."""
        number = _number(divisor)
        if number is None:
            raise TypeError(f"an operator can be divided by a number, got {_kind(divisor)}. See A.solve(b).")
        return self * (1 / number)

    def __neg__(self) -> "LinearOperator":
        """Minus the matrix."""
        return self * -1

    def __sub__(self, other: Any) -> "LinearOperator":
        """The difference to another matrix, or to a multiple of the identity."""
        number = _number(other)
        if number is not None:
            return self + -number
        return -(-self + other)

    def __rsub__(self, other: Any) -> "LinearOperator":
        """The difference of another matrix, or of a multiple of the identity, to this one."""
        return -self + other

    def _check(self, other: Any) -> None:
        """Raise unless it is a matrix on the same parameters."""
        try:
            size = size_of(other)
        except TypeError as error:
            raise TypeError(f"{_kind(other)} cannot be added to an operator: {error} Numbers are shifts.") from error
        if size != self.shape[0]:
            raise ValueError(f"matrices of shapes {self.shape} and {(size, size)} cannot be added.")
        if (other.dtype, other.device) != (self.dtype, self.device):
            raise ValueError(
                f"matrices in {self.dtype} on {self.device}, and in {other.dtype} on {other.device} cannot be added. Convert."
            )
        if isinstance(other, LinearOperator):
            why = self._space.difference(other._space)
            if why is not None:
                raise ValueError(f"operators at other parameters cannot be added; they have {why}.")
        elif isinstance(other, Tensor) and not _is_symmetric(other):
            raise ValueError("the tensor is not symmetric, and operators are. Add (A + A.mT) / 2.")

    # -- linear systems

    def solve(
        self,
        b: Any,
        *,
        damping: float = 0.0,
        preconditioner: Any = None,
        tol: float = 1e-5,
        max_iterations: int | None = None,
        strict: bool = True,
        progress: bool = False,
    ) -> Any:
        """The solution x of (A + damping) x = b by conjugate gradients, for a positive definite matrix.

        Several right-hand sides are solved for together, each until its residual |b - (A + damping) x| is at most
        ``tol`` |b|, which is computed anew at the end.

        Args:
            b: Right-hand sides, in a format that ``@`` takes.
            damping: A shift, not negative.
            preconditioner: An approximation of (A + damping)⁻¹, symmetric positive definite: a matrix [P, P] (a tensor, or
                an object with ``shape``, ``dtype``, ``device`` and ``@``), or a function that maps a tree like ``params`` with
                leading axes [K, *shape] to one, such as ``lambda r: kronecker.matmul(inverse, r)``.
            tol: Relative residual.
            max_iterations: Most products, by default 10 P, and 1000 at most.
            strict: If False, nothing is raised where it does not converge or meets negative curvature, and the last
                iterate is returned: truncated conjugate gradients, with ``tol=0`` of ``max_iterations`` steps.
            progress: Whether to show a bar of the products, where there are a terminal and tqdm.

        Returns:
            x, in the format of ``b``.

        Raises:
            ArithmeticError: If the matrix is not positive definite, or the residual is not reached.
            TypeError, ValueError: If b or the preconditioner does not fit the parameters.

        References:
            Hestenes, Stiefel 1952, "Methods of conjugate gradients for solving linear systems"; Martens 2010, "Deep learning
            via Hessian-free optimization".
        """
        shift = _number(damping)
        if shift is None or not shift >= 0:
            raise ValueError(f"solve: damping must be a number that is not negative, got {damping!r}.")
        if _number(tol) is None or not tol >= 0:
            raise ValueError(f"solve: tol must be a number that is not negative, got {tol!r}.")
        steps = min(10 * self.shape[0], 1000) if max_iterations is None else max_iterations
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"solve: max_iterations must be a positive int, got {max_iterations!r}.")
        values, back = self._space.read(b)
        precondition = self._preconditioner(preconditioner)
        with watched("solve", self + shift if shift else self, None, progress) as matrix, torch.no_grad():
            x = conjugate_gradients(
                lambda v: matrix @ v,
                self._space.columns(values),
                tol=tol,
                max_iterations=steps,
                precondition=precondition,
                strict=strict,
            )
        return back([t.contiguous() for t in self._space.split(x)])

    def _preconditioner(self, given: Any) -> Callable[[Tensor], Tensor] | None:
        """The preconditioner as a function on [P, K]."""
        if given is None:
            return None
        if hasattr(given, "__matmul__"):
            if (size := size_of(given)) != self.shape[0]:
                raise ValueError(f"solve: the preconditioner has shape {(size, size)}, and the operator {self.shape}.")
            return lambda r: given @ r
        if not callable(given):
            raise TypeError(f"solve: the preconditioner is {_kind(given)}; a matrix or a function of trees is needed.")
        space = self._space
        return lambda r: space.columns(space.read_tree(given(space.build(space.split(r)))))


@dataclass(frozen=True, eq=False)
class Combination:
    """Σ_i w_i A_i + shift; the terms are what `LinearOperator` multiplies with, or other matrices [P, P]."""

    terms: tuple[tuple[float, Any], ...]
    shift: float

    @classmethod
    def of(cls, operator: Any) -> "Combination":
        """A matrix as a sum."""
        if isinstance(operator, LinearOperator):
            source = operator._source
            return source if isinstance(source, Combination) else cls(((1.0, source),), 0.0)
        matrix = operator.detach() if isinstance(operator, Tensor) else operator
        return cls(((1.0, _Foreign(matrix)),), 0.0)

    def multiply(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The product with vectors [K, *shape]."""
        total = [self.shift * v for v in vectors]
        for weight, term in self.terms:
            for t, part in zip(total, term.multiply(vectors), strict=True):
                t.add_(part, alpha=weight)
        return total


@dataclass(frozen=True, eq=False)
class _Foreign:
    """A matrix that knows vectors alone."""

    matrix: Any

    def multiply(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The product with vectors [K, *shape]."""
        rows = torch.cat([t.reshape(len(t), t.shape[1:].numel()) for t in vectors], dim=1)
        parts = torch.split((self.matrix @ rows.mT).mT, [t.shape[1:].numel() for t in vectors], dim=1)
        return [part.reshape(t.shape) for part, t in zip(parts, vectors, strict=True)]


def _is_symmetric(matrix: Tensor) -> bool:
    """Whether it is, up to rounding."""
    largest = matrix.abs().max() if matrix.numel() else 0.0
    return bool(((matrix - matrix.mT).abs() <= torch.finfo(matrix.dtype).eps ** 0.5 * largest).all())


def _number(value: Any) -> float | None:
    """A real number, as a float; None for anything else."""
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex() and value.dtype != torch.bool:
        return float(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
