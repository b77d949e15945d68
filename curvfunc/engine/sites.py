"""What a forward pass leaves behind: where it uses the parameters."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from curvfunc.uses.forms import Direct, Form, Outer

__all__ = ["Layouts", "Parameter", "Site", "Trace", "biases"]


@dataclass(eq=False)
class Site:
    """A use of parameters: forms by parameter index, and how to read the cotangent of the output.

    Attributes:
        name: Of the operation.
        forms: ``{parameter index: form}``.
        edge: Gradient edge of the operation's output, up to a reshape to ``shape``.
        axis: Sample axis of that output.
        inputs: The input tensors and their version counters, to notice changes in place.
        shape: Of the output, all samples together.
        producers: Graph nodes that made the inputs.
    """

    name: str
    forms: dict[int, Form]
    edge: GradientEdge
    axis: int
    inputs: list[tuple[Tensor, int]]
    shape: torch.Size
    producers: list[Node]


@dataclass(eq=False, slots=True)
class Parameter:
    """A parameter, or a tensor made of parameters and constants alone.

    Attributes:
        tensor: It; kept so that its identity stays its own.
        leaf: Index of the parameter, None if made.
        parents: What it was made of.
        transposed_of: The matrix whose transpose it is.
        block_of: The matrix of which it is a block of rows or columns, the axis along which it is one, and where it starts.
    """

    tensor: Tensor
    leaf: int | None
    parents: Sequence["Parameter"] = ()
    transposed_of: "Parameter | None" = None
    block_of: "tuple[Parameter, int, int] | None" = None

    def ancestors(self) -> list["Parameter"]:
        """The parameters that it is made of."""
        if self.leaf is not None:
            return [self]
        return list({id(q): q for p in self.parents for q in p.ancestors()}.values())


@dataclass
class Trace:
    """A finished forward pass.

    Attributes:
        out: The output [N, ...], with its autograd graph.
        sites: Uses of parameters whose cotangents give everything; a generic parameter is a site of its own.
        mode: "plain", "vmap" or "loop".
        reasons: ``{parameter index: why it is generic}``, under the index None why the plain path does not hold.
        entangled: Why the data of samples may have met when the whole batch ran; None if it did not.
        counts: Whether Python asked for the shape of a batch.
        random: Whether something may have been drawn at random.
        rows: Constants that were taken for samples.
        foreign: Constants that were met, and not seen to be made.
        restart: Takes back what the forward pass changed besides, so that another one starts where it did.
    """

    out: Tensor
    sites: list[Site]
    mode: str
    reasons: dict[int | None, str] = field(default_factory=dict)
    entangled: str | None = None
    counts: bool = False
    random: bool = False
    rows: Sequence[Tensor] = ()
    foreign: Collection[Tensor] = ()
    restart: Callable[[], Any] = lambda: None


def biases(sites: Sequence[Site]) -> dict[int, int]:
    """For each weight that has one and the same bias beside it wherever either of them is used, this bias."""
    found: dict[int, set[tuple[int, ...]]] = {}
    for site in sites:
        for i in site.forms:
            found.setdefault(i, set()).add(_pair(site, i))
    pairs = {i: next(iter(f)) for i, f in found.items() if len(f) == 1}
    return {i: pair[1] for i, pair in pairs.items() if len(pair) == 2 and pair[0] == i and pairs.get(pair[1]) == pair}


def _pair(site: Site, i: int) -> tuple[int, ...]:
    """Weight and bias at a use of one of them, or the parameter alone."""
    own = site.forms[i]
    weight = own.sums if isinstance(own, Direct) else own
    if not isinstance(weight, Outer) or weight.inputs_first:
        return (i,)
    weights = [j for j, form in site.forms.items() if form is weight]
    sums = [j for j, form in site.forms.items() if isinstance(form, Direct) and form.sums is weight]
    return (*weights, *sums) if len(weights) == len(sums) == 1 else (i,)


@dataclass
class Layouts:
    """What a forward pass notes on request about the tensors that it passes through, by graph node and output number.

    Attributes:
        functions: Python functions of one tensor that count as one operation.
        parts: What runs in place of functions, its operations watched one by one; NotImplemented if it does not hold.
    """

    functions: frozenset[Any] = frozenset()
    parts: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)
    _of: dict[tuple[Node, int], tuple[int, torch.Size]] = field(default_factory=dict)
    _composites: dict[Node, GradientEdge] = field(default_factory=dict)
    _several: set[Node] = field(default_factory=set)

    def note(self, edge: GradientEdge, axis: int, shape: torch.Size) -> None:
        """An operation took this tensor."""
        self._of[edge.node, edge.output_nr] = axis, shape

    def note_composite(self, node: Node, source: GradientEdge) -> None:
        """A function in ``functions`` made the output of ``node`` from the tensor at ``source``."""
        self._composites[node] = source

    def note_several(self, node: Node) -> None:
        """The operation with this output took several tensors that depend on samples."""
        self._several.add(node)

    def several(self, node: Node) -> bool:
        """Whether an operation took several tensors that depend on samples."""
        return node in self._several

    def of(self, edge: GradientEdge) -> tuple[int, torch.Size] | None:
        """Sample axis and shape of a tensor."""
        return self._of.get((edge.node, edge.output_nr))

    def shapes(self) -> list[torch.Size]:
        """Of all tensors that were noted."""
        return [shape for _, shape in self._of.values()]

    def composite(self, node: Node) -> GradientEdge | None:
        """The input of the function that ``node`` is the last operation of."""
        return self._composites.get(node)

    def clear(self) -> None:
        """Forget everything, before another forward pass."""
        self._of.clear()
        self._composites.clear()
        self._several.clear()
