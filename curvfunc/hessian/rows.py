"""Softmax and norms, as weighted squares: closed forms of how they curve, for each row that they normalize.

With δ the gradient of the loss at the row f(z) of m entries, the second derivatives Σₖ δₖ ∂²fₖ/∂z² are a diagonal and few
squares beside it. For a softmax, p = softmax(z) and a = p ∘ (δ − δᵀp). For a norm, c = z − mean(z), ρ = (mean(c²) + ε)^(-1/2),
b = δ − mean(δ), where δ has been multiplied by the norm's weight, β = bᵀc, and e = b − 3/2 β ρ² c / m. They are

    softmax      diag(a) − (a pᵀ + p aᵀ)           = Σᵢ aᵢ (eᵢ − p)(eᵢ − p)ᵀ
    log_softmax  −(Σδ) (diag(p) − p pᵀ)            = −(Σδ) Σᵢ pᵢ (eᵢ − p)(eᵢ − p)ᵀ
    norm         −ρ³/m (β I − β 1 1ᵀ/m + e cᵀ + c eᵀ)

The diagonal is that of an elementwise operation, whose columns are often spared. Where they are not, those of a softmax are
centered, and none comes beside them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from curvfunc.engine.sites import Layouts
from curvfunc.hessian.pairs import operand_of
from curvfunc.rules.graph_axis import shape_of
from curvfunc.rules.nonlinear import operation
from curvfunc.tensors.precision import wide

__all__ = ["Form", "Rows", "rows_of"]


@dataclass(frozen=True)
class Form:
    """Second derivatives for each row, diag(d) + Σ_k w_k u_k u_kᵀ.

    Attributes:
        diagonal: d, [n, row, m].
        vectors: u, [k, n, row, m].
        weights: w, [k, n, row].
        center: If given, p with which they are Σᵢ dᵢ (eᵢ − p)(eᵢ − p)ᵀ as well.
    """

    diagonal: Tensor
    vectors: Tensor
    weights: Tensor
    center: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """An operation that normalizes rows.

    Attributes:
        output: Gradient edge of what it makes.
        input: Gradient edge of z.
        axis: Sample axis of z.
        shape: Shape of z.
        split: Shape in which the rows have axes of their own; that of z but for groups of channels.
        dims: The axes of a row in ``split``; the samples' are not among them.
        squares: How many squares there are beside the diagonal.
        centers: Whether centered columns do without them.
        form: From δ [n, row, m].
        reached: Mask of all parameters that z depends on.
        targets: Mask of the resolved ones among them.
    """

    output: GradientEdge
    input: GradientEdge
    axis: int
    shape: torch.Size
    split: torch.Size
    dims: tuple[int, ...]
    squares: int
    centers: bool
    form: Callable[["Rows", Tensor], Form]
    reached: int = 0
    targets: int = 0

    @property
    def width(self) -> int:
        """Entries of a row, m."""
        return prod(self.split[d] for d in self.dims)

    @property
    def rows(self) -> int:
        """Of one sample."""
        return prod(self.shape) // max(1, self.shape[self.axis] * self.width)

    @property
    def columns(self) -> int:
        """How many there are beside the diagonal's."""
        return self.squares * self.rows

    def spared(self, own: Mapping[int, int]) -> bool:
        """Whether there are parameters for which the diagonal takes no columns; ``own`` is that of what lies before z."""
        return any(mask & self.reached for mask in own.values())

    def _order(self) -> list[int]:
        others = [d for d in range(len(self.split)) if d != self.axis and d not in self.dims]
        return [self.axis, *others, *self.dims]

    def read(self, t: Tensor) -> Tensor:
        """[*shape] as [n, row, m], in single precision at least."""
        t = t.reshape(self.split).permute(self._order())
        return t.reshape(self.shape[self.axis], self.rows, self.width).to(wide(t.dtype))

    def place(self, t: Tensor) -> Tensor:
        """[v, n, row, m] as [v, *shape]."""
        order = self._order()
        back = [0, *[order.index(d) + 1 for d in range(len(order))]]
        return t.reshape(len(t), *[self.split[d] for d in order]).permute(back).reshape(len(t), *self.shape)

    def get(self, form: Form, dtype: torch.dtype, start: int, stop: int) -> list[Tensor]:
        """Columns at z, [v, *shape]: the vectors of each row by itself."""
        places = torch.arange(start, stop, device=form.vectors.device)
        mine = (places // self.squares).unsqueeze(1) == torch.arange(self.rows, device=places.device)
        vectors = form.vectors[places % self.squares]
        return [self.place(torch.where(mine[:, None, :, None], vectors, 0.0)).to(dtype)]

    def weights(self, form: Form) -> Tensor:
        """Of their squares, [v, n]."""
        return form.weights.permute(2, 0, 1).flatten(0, 1)

    def get_centered(self, form: Form, dtype: torch.dtype, start: int, stop: int) -> list[Tensor]:
        """Columns eᵢ − p, in the order of the entries of [row, m]."""
        assert form.center is not None
        places = torch.arange(start, stop, device=form.center.device)
        entries = torch.arange(self.rows * self.width, device=places.device).reshape(self.rows, self.width)
        unit = (places[:, None, None] == entries).unsqueeze(1)
        mine = (places // self.width).unsqueeze(1) == entries[:, 0] // self.width
        center = torch.where(mine[:, None, :, None], form.center, 0.0)
        return [self.place(unit.to(center.dtype) - center).to(dtype)]


def rows_of(node: Node, layouts: Layouts) -> Rows | None:
    """The softmax or norm behind a node, if the axes of what it took are known, and no row has several samples."""
    found = _KINDS.get(operation(node))
    source, number = node.next_functions[0] if node.next_functions else (None, 0)
    if found is None or source is None:
        return None
    input, output = GradientEdge(source, number), GradientEdge(node, 0)
    operand, shape = operand_of(input, layouts), shape_of(output)
    if operand is None or operand.axis is None or operand.shape != shape or 0 in shape:
        return None
    saved: Any = node
    split, dims = found.axes(saved, operand.shape)
    if operand.axis in dims or (split != operand.shape and operand.axis != 0):
        return None
    form = partial(found.form, saved)
    return Rows(output, input, operand.axis, operand.shape, split, dims, found.squares, found.centers, form)


def _one(node: Any, shape: torch.Size) -> tuple[torch.Size, tuple[int, ...]]:
    signed = (node._saved_dim + 2**63) % 2**64 - 2**63
    return shape, (signed % len(shape),)


def _last(node: Any, shape: torch.Size) -> tuple[torch.Size, tuple[int, ...]]:
    return shape, tuple(range(len(shape) - len(node._saved_normalized_shape), len(shape)))


def _groups(node: Any, shape: torch.Size) -> tuple[torch.Size, tuple[int, ...]]:
    split = torch.Size([shape[0], node._saved_group, shape[1] // node._saved_group, *shape[2:]])
    return split, tuple(range(2, len(split)))


def _softmax(node: Any, rows: Rows, delta: Tensor) -> Form:
    p, delta = rows.read(node._saved_result), rows.read(delta)
    a = p * (delta - (p * delta).sum(2, keepdim=True))
    vectors, weights = _product(a, p, -torch.ones_like(p[..., 0]))
    return Form(a, torch.stack(vectors), torch.stack(weights), p)


def _log_softmax(node: Any, rows: Rows, delta: Tensor) -> Form:
    p, total = rows.read(node._saved_result).exp(), rows.read(delta).sum(2)
    return Form(-total.unsqueeze(2) * p, p[None], total[None], p)


def _layer_norm(node: Any, rows: Rows, delta: Tensor) -> Form:
    weight = node._saved_weight
    rho = rows.read(node._saved_result2.expand(rows.shape))[..., 0]
    return _norm(node, rows, delta if weight is None else delta * weight, rho)


def _group_norm(node: Any, rows: Rows, delta: Tensor) -> Form:
    weight = node._saved_weight
    rho = node._saved_result2  # [n, group]
    return _norm(node, rows, delta if weight is None else delta * weight.reshape(-1, *[1] * (delta.ndim - 2)), rho)


def _norm(node: Any, rows: Rows, delta: Tensor, rho: Tensor) -> Form:
    x, delta, m = rows.read(node._saved_input), rows.read(delta), rows.width
    c, b = x - x.mean(2, keepdim=True), delta - delta.mean(2, keepdim=True)
    rho, beta = rho.to(x.dtype), (b * c).sum(2)
    scale = -(rho**3) / m
    vectors, weights = _product(b - (1.5 / m * beta * rho**2).unsqueeze(2) * c, c, scale)
    diagonal = (scale * beta).unsqueeze(2).expand_as(x)
    return Form(diagonal, torch.stack([torch.ones_like(c), *vectors]), torch.stack([-scale * beta / m, *weights]))


def _product(x: Tensor, y: Tensor, weight: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Vectors and weights of w (x yᵀ + y xᵀ), as a difference of squares that are alike."""
    sizes = [t.detach().norm(dim=2, keepdim=True) for t in (x, y)]
    scale = torch.where((sizes[0] > 0) & (sizes[1] > 0), sizes[1] / sizes[0], 1.0).sqrt()
    x, y = x * scale, y / scale
    return [x + y, x - y], [weight / 2, -weight / 2]


@dataclass(frozen=True)
class _Kind:
    axes: Callable[[Any, torch.Size], tuple[torch.Size, tuple[int, ...]]]
    form: Callable[[Any, Rows, Tensor], Form]
    squares: int
    centers: bool


_KINDS = {
    "Softmax": _Kind(_one, _softmax, 2, True),
    "SafeSoftmax": _Kind(_one, _softmax, 2, True),
    "LogSoftmax": _Kind(_one, _log_softmax, 1, True),
    "NativeLayerNorm": _Kind(_last, _layer_norm, 3, False),
    "NativeGroupNorm": _Kind(_groups, _group_norm, 3, False),
}
