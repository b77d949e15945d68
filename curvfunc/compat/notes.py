"""What recording notes for the backward pass, on the nodes of the autograd graph.

A note refers only to what comes before its node in the graph, so that it goes when the graph goes, without cycles.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from curvfunc import losses
from curvfunc.compat.context import paused
from curvfunc.engine.places import call
from curvfunc.engine.sites import Layouts, Site
from curvfunc.rules.nonlinear import COMPOSITES

__all__ = ["Call", "LossCall", "ModuleUse", "NodeLayouts", "Region", "RegionOutput", "nodes", "note", "notes"]

# In a node's metadata.
KEY = "curvfunc"
LAYOUTS = "curvfunc layouts"  # by output
COMPOSITE = "curvfunc composite"
SEVERAL = "curvfunc several"


@dataclass(eq=False)
class Region:
    """One call of an extended module that was not called by another one.

    Modules without parameters that require grad make regions too where gradients go through them: what lies between two uses
    of parameters is known then.

    Attributes:
        name: Class of the module.
        params: Its parameters that require grad.
        names: Their names.
        owners: The modules they belong to.
        samples: Number of samples.
        inputs: The call itself, to be able to repeat it; None once the graph was freed.
        before: The gradient edges of its inputs.
        versions: The parameters' version counters after the call.
        uses: How often each parameter is used, by index.
        calls: Modules without submodules, in the order of their calls.
        refusal: Why no quantity is defined.
        reason: Why the plain path does not hold.
        pending: How many of its notes are still waiting for a backward pass.
    """

    name: str
    params: list[Tensor]
    names: list[str]
    owners: list["weakref.ref[nn.Module]"]
    samples: int
    inputs: "Call | None"
    before: list[GradientEdge]
    versions: list[int] = field(default_factory=list)
    uses: dict[int, int] = field(default_factory=dict)
    calls: list["weakref.ref[nn.Module]"] = field(default_factory=list)
    refusal: str | None = None
    reason: str | None = None
    pending: int = 0

    def release(self) -> None:
        """One note less to wait for; forget the inputs with the last one."""
        self.pending -= 1
        if self.pending == 0:
            self.inputs = None


@dataclass(eq=False)
class ModuleUse:
    """An operation that uses parameters, as the hook on its node sees it; without what comes after that node.

    Attributes:
        site: As captured, but for its edge, which would be a cycle.
        region: The call it belongs to.
        output: Which output of the node.
    """

    site: Site | None
    region: Region
    output: int


@dataclass(eq=False)
class RegionOutput:
    """The output of a region, as the hook on its node sees it.

    Attributes:
        region: The region.
        output: Which output of the node.
        axis: Its sample axis, where the plain path holds.
        shape: Its shape.
        value: The output, detached, where the region has to be repeated; None once the graph was freed.
        version: Its version counter.
    """

    region: Region
    output: int
    axis: int
    shape: torch.Size
    value: Tensor | None
    version: int


@dataclass(eq=False)
class LossCall:
    """A call of an extended loss.

    Attributes:
        module: The loss module.
        loss: In normal form.
        out: The model's output, with its graph.
        y: Targets.
    """

    module: nn.Module
    loss: losses.Loss
    out: Any
    y: Any


@dataclass(eq=False)
class Call:
    """A call of a module, as a function of its parameters and of those inputs that have a sample axis.

    Attributes:
        module: The module.
        leaves: All arguments, flattened.
        rebuild: Makes (args, kwargs) of them.
        sampled: Which of them have the samples on axis 0.
        random_state: Of the random number generators before the call, in training mode.
    """

    module: "weakref.ref[nn.Module]"
    leaves: list[Any]
    rebuild: Callable[[Sequence[Any]], Any]
    sampled: list[int]
    random_state: list[Tensor] | None

    @property
    def X(self) -> list[Tensor]:
        """The inputs that have a sample axis."""
        return [self.leaves[i] for i in self.sampled]

    def function(self) -> "Repeated":
        """The call as a function."""
        return Repeated(self)

    def again(self, params: dict[str, Tensor], X: Sequence[Tensor]) -> Any:
        """The call again, with the same draws of dropout."""
        leaves = list(self.leaves)
        for i, x in zip(self.sampled, X, strict=True):
            leaves[i] = x
        args, kwargs = self.rebuild(leaves)
        module = self.module()
        assert module is not None
        with paused(), _random_state(self.random_state):
            return call(module, params, args, kwargs)


@dataclass(eq=False)
class Repeated:
    """A call as a function of parameters by name and of the inputs that have a sample axis; it does not hold the module."""

    call: Call

    @property
    def module(self) -> nn.Module | None:
        """The module, for what looks into it."""
        return self.call.module()

    def __call__(self, params: dict[str, Tensor], X: Sequence[Tensor]) -> Any:
        """Run it."""
        return self.call.again(params, X)


class NodeLayouts(Layouts):
    """Layouts that lie on the nodes themselves, and go when the graph goes."""

    def __init__(self) -> None:
        super().__init__(COMPOSITES)

    def note(self, edge: GradientEdge, axis: int, shape: torch.Size) -> None:
        """An operation took this tensor."""
        metadata: Any = edge.node.metadata
        metadata.setdefault(LAYOUTS, {})[edge.output_nr] = (axis, shape)

    def note_composite(self, node: Node, source: GradientEdge) -> None:
        """A function in ``functions`` made the output of ``node`` from the tensor at ``source``."""
        metadata: Any = node.metadata
        metadata[COMPOSITE] = source

    def note_several(self, node: Node) -> None:
        """The operation with this output took several tensors that depend on samples."""
        metadata: Any = node.metadata
        metadata[SEVERAL] = True

    def several(self, node: Node) -> bool:
        """Whether an operation took several tensors that depend on samples."""
        metadata: Any = node.metadata
        return SEVERAL in metadata

    def of(self, edge: GradientEdge) -> tuple[int, torch.Size] | None:
        """Sample axis and shape of a tensor."""
        metadata: Any = edge.node.metadata
        found: tuple[int, torch.Size] | None = metadata.get(LAYOUTS, {}).get(edge.output_nr)
        return found

    def composite(self, node: Node) -> GradientEdge | None:
        """The input of the function that ``node`` is the last operation of."""
        metadata: Any = node.metadata
        found: GradientEdge | None = metadata.get(COMPOSITE)
        return found


@contextmanager
def _random_state(state: list[Tensor] | None) -> Iterator[None]:
    if state is None:
        yield
        return
    with torch.random.fork_rng(range(len(state) - 1)):
        torch.set_rng_state(state[0])
        for device, s in enumerate(state[1:]):
            torch.cuda.set_rng_state(s, device)
        yield


def note(node: Node, what: Any) -> None:
    """Leave a note on a node."""
    metadata: Any = node.metadata
    metadata.setdefault(KEY, []).append(what)


def notes(node: Node) -> list[Any]:
    """What was noted on a node."""
    metadata: Any = node.metadata
    return list(metadata.get(KEY, []))


def nodes(out: Tensor) -> Iterator[Node]:
    """The graph before a tensor."""
    seen: set[Node] = set()
    stack: list[Node | None] = [get_gradient_edge(out).node] if out.requires_grad else []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend([n for n, _ in node.next_functions])
