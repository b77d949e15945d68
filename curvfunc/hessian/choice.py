"""Which parameters are resolved, where there is a choice: by what columns and products cost that go back through the model.

Parameters that are curved by pairs, softmax and norms alone have their Hessian's second term either from columns of these and
of residuals, which all parameters before an operation share, or from Hessian-vector products of their own. The former go
through what is before the operation, the latter, more than once, through what is behind the parameter.
"""

import math
from dataclasses import dataclass

from torch.autograd.graph import GradientEdge, Node

from curvfunc.engine.sites import Trace
from curvfunc.hessian.products import columns_of
from curvfunc.hessian.residuals import Curvature
from curvfunc.rules.graph_axis import inputs_of, shape_of
from curvfunc.rules.nonlinear import is_reshape, operation
from curvfunc.tensors.sizes import hint
from curvfunc.uses.forms import Outer

__all__ = ["columns_beside", "resolve", "uses_of"]

# What operations cost, in multiplications; measured on gated MLPs, networks with squeeze and excitation, transformers, and
# networks with norms, and a RegNet, whose convolutions have groups.
ENTRY = 16  # an entry of what is made
FORMED = 24  # an entry of a gradient that is formed, which is squared and added up, too
PRODUCT = 1.75  # a Hessian-vector product, in backward passes through the same operations
AGAIN = {"Convolution": 9, "NativeLayerNorm": 3, "NativeGroupNorm": 5}  # times more where it goes through these
CALL = 5e6  # what comes once for columns that go together, whatever their number; for products, twice

VIEWS = {"T", "Transpose", "Permute", "Expand"}  # of parameters, too
CHOICES = 16  # at most so many are compared


def resolve(trace: Trace, found: Curvature) -> Curvature:
    """Resolve those of the resolvable parameters with which the columns cost least.

    Operations behind a parameter are behind those before it, too. So parameters are added in the order of the columns that each
    of them would need by itself, and where to stop is what is chosen.
    """
    if not found.resolvable:
        return found
    behind, work = _columns_behind(found), _work(trace, found)
    mine = [1 << i for i in range(found.resolvable.bit_length()) if found.resolvable >> i & 1]
    alone = {mask: sum(c.number for c in behind if c.targets & mask) for mask in mine}
    bounds = sorted(set(alone.values()))
    compared = [-1, *bounds[: -1 : -(-len(bounds) // CHOICES)], bounds[-1]]
    best, least = 0, None
    for bound in compared:
        chosen = sum(mask for mask in mine if alone[mask] <= bound)
        curved = found.curved & ~chosen
        products = columns_of(trace, uses_of(trace, curved))
        cost = sum(2 * work.call + number * work.behind(mask) for mask, number in products)
        cost += sum(work.call + c.number * work.before(c, ~curved) for c in behind if c.targets & ~curved)
        if least is None or cost < least:
            best, least = chosen, cost
    return found.resolved(best)


def uses_of(trace: Trace, targets: int) -> dict[int, list[int]]:
    """``{parameter: its sites}`` for the parameters in a mask."""
    found: dict[int, list[int]] = {}
    for j, site in enumerate(trace.sites):
        for i in site.forms:
            if targets >> i & 1:
                found.setdefault(i, []).append(j)
    return found


@dataclass(frozen=True)
class _Columns:
    """Columns that start before an operation: which parameters take them, all those that it depends on, how many."""

    start: Node
    targets: int
    reached: int
    number: int


@dataclass(frozen=True)
class _Part:
    """Operations that follow each other.

    Attributes:
        mask: The parameters that they depend on.
        once: What columns cost that go back through them.
        product: What Hessian-vector products cost.
        formed: What forming gradients costs, for layers among them: masks of parameters, and the costs.
    """

    mask: int
    once: float
    product: float
    formed: list[tuple[int, float]]


@dataclass(frozen=True)
class _Work:
    """Costs for one sample.

    Attributes:
        parts: What it goes through, in the order of the forward pass.
        place: The number of parts before an operation.
        call: The share of what comes once for all samples.
    """

    parts: list[_Part]
    place: dict[Node, int]
    call: float

    def behind(self, mask: int) -> float:
        """Of a Hessian-vector product with respect to the output of these parameters' layer."""
        return sum(part.product for part in self.parts if part.mask & mask)

    def before(self, columns: _Columns, resolved: int) -> float:
        """Of a column."""
        mine, total = columns.targets & resolved, 0.0
        for part in self.parts[: self.place[columns.start]]:
            if part.mask & mine and not part.mask & ~columns.reached:
                total += part.once + sum(cost for own, cost in part.formed if own & mine)
        return total


def columns_beside(found: Curvature) -> int:
    """The number of columns of the resolved parameters that are not of elementwise operations."""
    return sum(c.number for c in _of_pairs_and_rows(found) if c.targets & ~found.curved)


def _columns_behind(found: Curvature) -> list[_Columns]:
    """Of each residual, pair, and softmax or norm."""
    columns = _of_pairs_and_rows(found)
    for r in found.smooth:
        own = found.meeting(r.input, math.prod(r.shape))
        number = hint(math.prod(r.shape)) // max(1, hint(r.shape[r.axis]))
        columns.append(_Columns(r.output.node, r.reached & own.rest, r.reached, number))
    return columns


def _of_pairs_and_rows(found: Curvature) -> list[_Columns]:
    columns, masks = [], dict(found.operations())
    for pair in found.pairs:
        node = pair.output.node
        columns.append(_Columns(node, pair.targets, masks[node], hint(pair.columns)))
    for row in found.rows:
        node, own, entries = row.output.node, found.meeting(row.input, math.prod(row.shape)), hint(row.rows) * hint(row.width)
        if row.centers and not row.spared(own.own):
            columns.append(_Columns(node, row.reached, row.reached, entries))
        else:
            columns.append(_Columns(node, row.reached & own.rest, row.reached, entries))
            columns.append(_Columns(node, row.reached, row.reached, hint(row.columns)))
    return columns


def _work(trace: Trace, found: Curvature) -> _Work:
    """What the operations of a forward pass cost; views are for nothing."""
    samples = max(1, hint(trace.out.shape[0]))
    multiplied: dict[Node, float] = {}
    formed: dict[Node, list[tuple[int, float]]] = {}
    for site in trace.sites:
        entries = hint(math.prod(site.shape)) / samples
        for i, f in site.forms.items():
            if isinstance(f, Outer):
                features = f.shape[-1 if f.inputs_first else 0]
                products = entries * f.shape.numel() / max(1, features)
                multiplied[site.edge.node] = products
                if entries > features:  # positions are shared
                    formed.setdefault(site.edge.node, []).append((1 << i, products + FORMED * f.shape.numel()))
    starts = {edge.node for edge in found.starts()}
    parts: list[_Part] = []
    place: dict[Node, int] = {}
    for node, mask in found.operations():
        place[node] = len(parts)
        cost = 0.0
        if not is_reshape(node) and operation(node) not in VIEWS:
            entries = _entries(node) / samples
            inner = shape_of(inputs_of(node)[0]) if operation(node) == "Bmm" else None
            cost = ENTRY * entries + (multiplied.get(node, 0.0) if inner is None else entries * hint(inner[-1]))
        mine = _Part(mask, cost, PRODUCT * AGAIN.get(operation(node), 1) * cost, formed.get(node, []))
        if parts and parts[-1].mask == mask and node not in starts:
            last = parts.pop()
            mine = _Part(mask, last.once + mine.once, last.product + mine.product, last.formed + mine.formed)
        parts.append(mine)
    return _Work(parts, place, CALL / samples)


def _entries(node: Node) -> int:
    return hint(math.prod(shape_of(GradientEdge(node, 0)) or ()))
