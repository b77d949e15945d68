"""Where a model curves: for each parameter, the operations after it whose second derivative enters its Hessian.

The autograd graph of the output is walked once, from the parameters up. For each node there is a mask of the parameters
that it depends on (bit i for parameter i), and `curvfunc.rules.nonlinear` says how its operation curves. Parameters fall
into two classes:

- *resolved*: every operation between the parameter and the output is linear by pieces, or smooth and elementwise. Its
  Hessian is the GGN plus the terms of the smooth operations, the *residuals*.
- *curved*: there is any other operation, or a product of two tensors that both depend on the parameter. If there are but
  products that `curvfunc.hessian.pairs` knows, and softmax and norms as `curvfunc.hessian.rows` knows them, it may be resolved
  as well.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from curvfunc.engine.sites import Layouts, Site, Trace
from curvfunc.hessian.pairs import Pair, pair_of
from curvfunc.hessian.rows import Rows, rows_of
from curvfunc.rules.nonlinear import MULTILINEAR, Curve, curve, is_diagonal
from curvfunc.tensors.sizes import hint
from curvfunc.uses.forms import Direct, Outer

__all__ = ["Curvature", "Meeting", "Residual", "curvature", "is_affine"]

# Operations in which each entry of the output is an affine function of one entry of the bias and one row of the weight.
AFFINE = {"linear", *(f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3))}


@dataclass(frozen=True)
class Residual:
    """A smooth elementwise operation a = φ(z).

    Attributes:
        output: Gradient edge of a.
        input: Gradient edge of z.
        axis: Sample axis of z.
        shape: Shape of z.
        targets: Mask of the resolved parameters that z depends on.
        composite: Whether it is a function of several operations.
        reached: Mask of all parameters that z depends on.
    """

    output: GradientEdge
    input: GradientEdge
    axis: int
    shape: torch.Size
    targets: int
    composite: bool
    reached: int


@dataclass(frozen=True)
class Meeting:
    """What lies before a tensor, up to operations whose Jacobian is diagonal.

    Attributes:
        own: ``{site: mask of its parameters that have no other path to the tensor}``; the site's output has the tensor's
            number of entries, in the same order.
        rest: Mask of all other parameters that the tensor depends on.
        alone: Whether there is a single site, and nothing but what is before it.
    """

    own: dict[int, int]
    rest: int
    alone: bool


@dataclass(frozen=True)
class Curvature:
    """The result of the walk.

    Attributes:
        residuals: The smooth operations before which there are resolved parameters.
        curved: Mask of the curved parameters.
        split: Mask of the curved parameters p for which an operation between p and the outputs of p's sites curves, so
            that p's Hessian is not determined by the Hessian with respect to those outputs.
        pairs: The products behind which there are parameters that they curve.
        rows: All softmax and norms behind parameters.
        resolvable: Mask of the curved parameters that residuals, these products and rows cover.
        smooth: All smooth operations.
    """

    residuals: list[Residual]
    curved: int
    split: int
    pairs: list[Pair]
    rows: list[Rows]
    resolvable: int
    smooth: list[Residual]
    _masks: dict[Node, int]
    _sites: dict[tuple[Node, int], int]
    _trace: Trace
    _layouts: Layouts

    def widest(self) -> int:
        """The number of entries of the largest tensor with a gradient that an operation took."""
        return max([1, *[hint(math.prod(shape)) for shape in self._layouts.shapes()]])

    def starts(self) -> list[GradientEdge]:
        """Of smooth operations, products, softmax and norms."""
        return [*[r.output for r in self.smooth], *[pair.output for pair in self.pairs], *[r.output for r in self.rows]]

    def operations(self) -> list[tuple[Node, int]]:
        """Those that depend on parameters, each after those that it depends on, and masks of these parameters."""
        return list(self._masks.items())

    def resolved(self, mask: int) -> "Curvature":
        """The same with some of the resolvable parameters resolved."""
        curved = self.curved & ~mask
        residuals = [replace(r, targets=r.reached & ~curved) for r in self.smooth if r.reached & ~curved]
        rows = [replace(r, targets=r.reached & ~curved) for r in self.rows]
        left = self.resolvable & ~mask
        return replace(self, residuals=residuals, rows=rows, curved=curved, split=self.split & curved, resolvable=left)

    def meeting(self, edge: GradientEdge, numel: int) -> Meeting:
        """What lies before a tensor of ``numel`` entries."""
        found: list[int] = []
        others = before = 0
        stack = [edge]
        while stack:
            edge = stack.pop()
            node = edge.node
            if not (mask := self._masks.get(node, 0)):
                continue
            j = self._sites.get((node, edge.output_nr))
            if j is not None and is_affine(self._trace.sites[j]) and math.prod(self._trace.sites[j].shape) == numel:
                found.append(j)
                for producer in self._trace.sites[j].producers:
                    before |= self._masks.get(producer, 0)
            elif j is None and (self._layouts.composite(node) or is_diagonal(node)):
                stack.extend(_inputs(node, self._layouts))
            else:
                others |= mask
        once = twice = 0
        for j in found:
            for i in self._trace.sites[j].forms:
                twice |= once & 1 << i
                once |= 1 << i
        rest = before | others | twice
        own = {j: sum(1 << i for i in self._trace.sites[j].forms) & ~rest for j in found}
        return Meeting(own, rest, len(found) == 1 and not others)


def is_affine(site: Site) -> bool:
    """Whether each entry of the output is an affine function of one row of a weight and one entry of a bias."""
    return site.name in AFFINE and all(isinstance(f, (Outer, Direct)) for f in site.forms.values())


def curvature(trace: Trace, leaves: Sequence[Tensor], layouts: Layouts) -> Curvature:
    """Walk the graph of ``trace.out``."""
    ends = {get_gradient_edge(p).node: 1 << i for i, p in enumerate(leaves)}
    masks: dict[Node, int] = {}
    kinks: dict[Node, int] = {}  # parameters for which the operation curves in a way that residuals do not cover
    bends: dict[Node, int] = {}  # parameters for which it is a residual
    smooth: list[Residual] = []
    pairs: list[Pair] = []
    rows: list[Rows] = []
    hard = 0  # parameters for which something curves that neither residuals nor pairs nor rows cover
    for node, source, below in _from_below(get_gradient_edge(trace.out).node, ends, layouts) if trace.out.requires_grad else ():
        if node in ends:
            masks[node] = ends[node]
            continue
        own = [masks.get(child, 0) for _, child, _ in below]
        masks[node] = _union(own)
        kinks[node], elementwise = (0, (0,)) if source is not None else _bends(curve(node), own, [k for k, *_ in below])
        bends[node] = 0
        if kinks[node]:
            positions = [k for k, *_ in below]
            row = rows_of(node, layouts) if 0 in positions else None
            if row is not None:  # linear in weight and bias
                rows.append(replace(row, reached=own[positions.index(0)]))
                hard |= _bends(MULTILINEAR, own, positions)[0]
            elif (pair := pair_of(node, layouts)) is not None:
                pairs.append(replace(pair, targets=kinks[node]))
            else:
                hard |= kinks[node]
        for k in elementwise if masks[node] else ():
            if k < len(own) and own[k]:
                residual = _residual(node, GradientEdge(*below[k][1:]), source is not None, layouts, own[k])
                if residual is None:
                    kinks[node] |= own[k]
                    hard |= own[k]
                else:
                    bends[node] |= own[k]
                    smooth.append(residual)
    curved = _union(kinks.values())
    residuals = [replace(r, targets=r.reached & ~curved) for r in smooth if r.reached & ~curved]
    sites = {(s.edge.node, s.edge.output_nr): j for j, s in enumerate(trace.sites)}
    split = _split(trace, curved, masks, {n: kinks[n] | bends[n] for n in kinks}, layouts)
    return Curvature(residuals, curved, split, pairs, rows, curved & ~hard, smooth, masks, sites, trace, layouts)


def _inputs(node: Node, layouts: Layouts) -> list[GradientEdge]:
    if (source := layouts.composite(node)) is not None:
        return [source]
    return [GradientEdge(child, k) for child, k in node.next_functions if child is not None]


def _from_below(
    top: Node, ends: dict[Node, int], layouts: Layouts
) -> Iterator[tuple[Node, GradientEdge | None, list[tuple[int, Node, int]]]]:
    """All nodes, each after those that it depends on.

    Yields:
        The node; if it is the last of a composite, that one's input; and position, node and output number of its inputs.
    """
    seen: set[Node] = set()
    stack: list[tuple[Node, GradientEdge | None, list[tuple[int, Node, int]] | None]] = [(top, None, None)]
    while stack:
        node, source, below = stack.pop()
        if below is not None:
            yield node, source, below
        elif node not in seen:
            seen.add(node)
            source = layouts.composite(node)
            if source is not None:
                below = [(0, source.node, source.output_nr)]
            else:
                below = [(k, child, number) for k, (child, number) in enumerate(node.next_functions) if child is not None]
            stack.append((node, source, below))
            if node not in ends:
                stack.extend((child, None, None) for _, child, _ in below)


def _bends(known: Curve, own: Sequence[int], reached: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Parameters for which an operation curves otherwise than elementwise in one input, and where it is elementwise.

    Args:
        known: How it curves.
        own: The parameters that each input that requires grad depends on.
        reached: The positions of these inputs among all.
    """
    if known.unknown is None:
        return _union(own), ()
    kinks = _union(mask for k, mask in zip(reached, own, strict=True) if k in known.unknown) if known.unknown else 0
    if not known.additive:
        once = 0
        for mask in own:
            kinks |= once & mask
            once |= mask
    return kinks, tuple(reached.index(k) for k in known.elementwise if k in reached)


def _residual(node: Node, source: GradientEdge, composite: bool, layouts: Layouts, reached: int) -> Residual | None:
    """The residual of an operation in one input, if the layout of that is known and nothing is broadcast."""
    layout = layouts.of(source)
    if layout is None or torch.Size(node._input_metadata[0].shape) != layout[1]:
        return None
    return Residual(GradientEdge(node, 0), source, *layout, 0, composite, reached)


def _split(trace: Trace, curved: int, masks: dict[Node, int], curves: dict[Node, int], layouts: Layouts) -> int:
    """Follow each curved parameter from its sites' outputs down to itself."""
    found = 0
    for site in trace.sites:
        mine = curved & sum(1 << i for i in site.forms)
        stack, seen = [(site.edge.node, mine)] if mine else [], set()
        while stack:
            node, mine = stack.pop()
            mine &= masks.get(node, 0)
            if not mine or (node, mine) in seen:
                continue
            seen.add((node, mine))
            found |= curves.get(node, 0) & mine
            stack.extend((e.node, mine) for e in _inputs(node, layouts))
    return found


def _union(masks: object) -> int:
    total = 0
    for mask in masks:  # type: ignore[attr-defined]
        total |= mask
    return total
