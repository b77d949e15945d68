"""Products of two tensors that both depend on parameters, as weighted squares.

In a direction of the parameters, the product a b of two tensors curves by 2 ȧ ḃ. With δ the gradient of the loss at it,
this is Σᵢ 2 ȧᵢ (C ḃ)ᵢ, where C ḃ is the gradient at a, with ḃ in the place of b, and

    2 ȧᵢ (C ḃ)ᵢ = ½ (ȧᵢ + (C ḃ)ᵢ)² − ½ (ȧᵢ − (C ḃ)ᵢ)².

So two columns that go back from both tensors together are there for each entry of one of them; it may be the smaller one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from curvfunc.engine.sites import Layouts
from curvfunc.rules.graph_axis import shape_of
from curvfunc.rules.nonlinear import is_reshape, operation
from curvfunc.uses.forms import sum_to_shape

__all__ = ["Operand", "Pair", "operand_of", "pair_of"]


@dataclass(frozen=True)
class Operand:
    """A tensor that an operation took.

    Attributes:
        edge: Its gradient edge.
        shape: Its shape.
        samples: Number of samples.
        axis: Their axis; None if it is folded into the first one, outermost.
    """

    edge: GradientEdge
    shape: torch.Size
    samples: int
    axis: int | None

    @property
    def entries(self) -> int:
        """Of one sample."""
        if self.axis is None:
            return prod(self.shape) // self.samples
        return prod(size for d, size in enumerate(self.shape) if d != self.axis)

    def read(self, t: Tensor) -> Tensor:
        """[v, *shape] as [v, n, entry]."""
        return (t if self.axis is None else t.movedim(self.axis + 1, 1)).reshape(len(t), self.samples, -1)

    def place(self, t: Tensor) -> Tensor:
        """[v, n, entry] as [v, *shape]."""
        if self.axis is None:
            return t.reshape(len(t), *self.shape)
        rest = [size for d, size in enumerate(self.shape) if d != self.axis]
        return t.reshape(*t.shape[:2], *rest).movedim(1, self.axis + 1)


@dataclass(frozen=True)
class Pair:
    """A product.

    Attributes:
        output: Gradient edge of it.
        first: The operand whose entries have columns.
        second: The other operand.
        partner: C: from tensors [v, *] in the place of the first operand, and δ, to cotangents [v, *] of the second one.
        targets: Mask of the parameters to which the columns go.
    """

    output: GradientEdge
    first: Operand
    second: Operand
    partner: Callable[[Tensor, Tensor], Tensor]
    targets: int = 0

    @property
    def is_square(self) -> bool:
        """Whether both operands are the same tensor."""
        return self.first.edge == self.second.edge

    @property
    def columns(self) -> int:
        """How many there are."""
        return self.first.entries * (1 if self.is_square else 2)

    @property
    def sources(self) -> list[GradientEdge]:
        """Where they start."""
        return [self.first.edge] if self.is_square else [self.first.edge, self.second.edge]

    def weights(self, delta: Tensor) -> Tensor:
        """Of the squares [v, n]."""
        if self.is_square:
            return 2 * self.first.read(delta[None])[0].mT
        signs = 1 - 2 * (torch.arange(self.columns, device=delta.device) % 2)
        return (signs / 2).to(delta.dtype).unsqueeze(1).expand(-1, self.first.samples)

    def get(self, delta: Tensor, start: int, stop: int) -> list[Tensor]:
        """Columns at the sources, [v, *shape] each."""
        places, entries = torch.arange(start, stop, device=delta.device), torch.arange(self.first.entries, device=delta.device)
        entry, sign = (places, None) if self.is_square else (places // 2, 1 - 2 * (places % 2))
        unit = (entry.unsqueeze(1) == entries).to(delta.dtype).unsqueeze(1).expand(-1, self.first.samples, -1)
        if sign is None:
            return [self.first.place(unit)]
        other = self.second.read(self.partner(self.first.place(unit), delta))
        # whatever the scale, its square cancels; this one makes both parts alike, so that their difference loses nothing
        norm = other.detach().norm(dim=2, keepdim=True)
        scale = torch.where(norm > 0, norm, 1.0).sqrt()
        return [self.first.place(unit * scale), self.second.place(other * (sign[:, None, None] / scale))]


def pair_of(node: Node, layouts: Layouts) -> Pair | None:
    """The product behind a node, if its operands and their sample axes are known."""
    name = operation(node)
    if name not in ("Mul", "Bmm"):
        return None
    shape = shape_of(GradientEdge(node, 0))
    operands = [operand_of(GradientEdge(n, k), layouts) for n, k in node.next_functions if n is not None]
    if shape is None or len(operands) != 2 or node._input_metadata[0].dtype.is_complex:
        return None
    a, b = operands
    if a is None or b is None:
        return None
    turned = b.entries < a.entries
    first, second = (b, a) if turned else (a, b)
    output = GradientEdge(node, 0)
    if name == "Bmm":
        if a.axis or b.axis:
            return None
        by = (lambda u, delta: delta @ u.mT) if turned else (lambda u, delta: u.mT @ delta)
        return Pair(output, first, second, by)
    if a.axis is None or b.axis is None or a.axis - len(a.shape) != b.axis - len(b.shape):
        return None
    if a.edge == b.edge and a.shape != shape:
        return None
    lead, own = [1] * (len(shape) - len(first.shape)), second.shape

    def multiplied(u: Tensor, delta: Tensor) -> Tensor:
        return sum_to_shape((u.reshape(len(u), *lead, *u.shape[1:]) * delta).unsqueeze(1), own).squeeze(1)

    return Pair(output, first, second, multiplied)


def operand_of(edge: GradientEdge, layouts: Layouts) -> Operand | None:
    """A tensor by its edge, known itself or through reshapes that leave the samples outermost."""
    shape = shape_of(edge)
    if shape is None:
        return None
    before = edge
    while (layout := layouts.of(before)) is None:
        kept = is_reshape(before.node) or operation(before.node) == "Expand"
        if not kept or layouts.composite(before.node) is not None:
            return None
        inputs = [GradientEdge(n, k) for n, k in before.node.next_functions if n is not None]
        size = shape_of(inputs[0]) if len(inputs) == 1 else None
        if size is None or prod(size) != prod(shape):
            return None
        (before,) = inputs
    axis, own = layout
    if before is edge:
        return Operand(edge, shape, own[axis], axis) if own == shape else None
    samples = own[axis]
    if axis != 0 or shape_of(before) != own or not shape or not samples or shape[0] % samples:
        return None
    return Operand(edge, shape, samples, 0 if shape[0] == samples else None)
