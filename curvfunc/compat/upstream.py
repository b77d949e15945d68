"""What lies before an extended loss in the autograd graph: the recorded uses of parameters, and how the graph curves."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from curvfunc import losses
from curvfunc.compat.delivery import FREED, repeat
from curvfunc.compat.notes import LossCall, ModuleUse, NodeLayouts, Region, RegionOutput, nodes, notes
from curvfunc.engine.cotangents import chunks, pull
from curvfunc.engine.sites import Site, Trace
from curvfunc.hessian.residuals import Curvature, curvature
from curvfunc.rules.graph_axis import CONSTANT, follow, inputs_of, shape_of
from curvfunc.rules.nonlinear import is_once_differentiable
from curvfunc.uses.forms import Form, flat_vectors

__all__ = ["Curved", "Upstream", "whole_model"]


@dataclass
class Upstream:
    """The uses of parameters before a loss.

    Attributes:
        trace: The recorded operations, and the outputs of calls that would have to be repeated.
        outputs: Such outputs, by position.
        params: By identity; of calls that would have to be repeated, all.
        regions: The calls they belong to.
    """

    trace: Trace
    outputs: dict[int, RegionOutput]
    params: dict[int, Tensor]
    regions: list[Region]
    create_graph: bool

    @classmethod
    def of(cls, call: LossCall, create_graph: bool) -> Upstream:
        """Find what was noted before the output."""
        graph = cls(Trace(call.out, [], "plain"), {}, {}, [], create_graph)
        for node, note in ((n, note) for n in nodes(call.out) for note in notes(n)):
            region = note.region
            if not region.params:
                continue
            if region not in graph.regions:
                graph.regions.append(region)
            if region.samples != len(call.out):
                raise ValueError(
                    f"{region.name} ran on {region.samples} samples, but the loss has {len(call.out)}. Second-order "
                    "quantities need one output per sample."
                )
            edge = GradientEdge(node, note.output)
            if isinstance(note, ModuleUse):
                if note.site is None:
                    raise RuntimeError(FREED)
                site = note.site
                graph.trace.sites.append(replace(site, forms=_by_identity(site.forms, region.params), edge=edge))
            elif region.refusal is not None or region.reason is not None:
                graph.outputs[len(graph.trace.sites)] = note
                graph.trace.sites.append(Site(region.name, {}, edge, 0, [], note.shape, []))
        used = {p for site in graph.trace.sites for p in site.forms}
        for region in graph.regions:
            plain = region.refusal is None and region.reason is None
            graph.params |= {id(p): p for p in region.params if not plain or id(p) in used}
        return graph

    def names(self) -> list[str]:
        """Of the parameters."""
        found = {id(p): name for region in self.regions for p, name in zip(region.params, region.names, strict=True)}
        return [found[i] for i in self.params]

    @cached_property
    def repeated(self) -> dict[int, tuple[Trace, list[Tensor]]]:
        """The calls, repeated, by the position of their output."""
        found = self.outputs.items()
        return {j: (repeat(output, self.create_graph)[0], output.region.params) for j, output in found}

    def curvature(self) -> Curved | None:
        """How it curves, if nothing has to be repeated."""
        if self.outputs:
            return None
        leaves = list(self.params.values())
        trace = self.by_position(leaves)
        return Curved(trace, leaves, curvature(trace, leaves, self.layouts))

    @cached_property
    def layouts(self) -> OutsideLayouts:
        """Of the tensors that operations took."""
        return OutsideLayouts(self.trace.out)

    def by_position(self, params: list[Tensor]) -> Trace:
        """The recorded operations, with parameters by their position in a list."""
        place = {id(p): i for i, p in enumerate(params)}
        sites = [replace(s, forms={place[p]: form for p, form in s.forms.items()}) for s in self.trace.sites]
        return replace(self.trace, sites=sites)

    def keeps_samples_apart(self, call: LossCall) -> bool:
        """Whether no sample's output depends on other samples by what lies between the calls, and before the loss.

        Inside of the calls this is known. Outside of them nothing was recorded, so it is tried: for any two samples there is
        a column that is zero for one of them and not for the other.
        """
        if self._outside_is_known():
            return True
        index, bits = torch.arange(len(call.out), device=call.out.device), (len(call.out) - 1).bit_length()
        chosen = torch.stack([index >> b & 1 == side for b in range(bits) for side in (0, 1)])  # [columns, n]
        values = torch.arange(1, call.out.numel() + 1, device=call.out.device).cos().view(call.out.shape).to(call.out.dtype)
        for start, stop in chunks(len(chosen), self.trace, None):
            some = chosen[start:stop]
            columns = values * some.reshape(*some.shape, *[1] * (values.ndim - 1))
            for g in pull(self.trace, columns, create_graph=False, retain_graph=True)[0]:
                if bool(((flat_vectors(g).abs() > 0).any(2) & ~some).any()):
                    return False
        return True

    def _outside_is_known(self) -> bool:
        """Whether the sample axis can be followed through what lies between the calls, and before the loss; or there is one."""
        if len(self.trace.out) == 1:
            return True
        met: list[Region] = []

        def of_call(edge: GradientEdge) -> int | None:
            calls = outputs_of_calls(edge)
            met.extend(note.region for note in calls)
            return calls[0].axis if calls else None

        found: dict[GradientEdge, int] = {}
        seen: set[Region] = set()
        edges = [get_gradient_edge(self.trace.out)]
        while edges:
            if follow(edges.pop(), of_call, found) not in (0, CONSTANT):
                return False
            edges += [edge for region in {*met} - seen for edge in region.before]
            seen.update(met)
        return True

    def is_twice_differentiable(self) -> bool:
        """Whether the backward pass of all operations can be differentiated."""
        return not any(is_once_differentiable(node) for node in nodes(self.trace.out))

    def pull(self, columns: Tensor, create_graph: bool) -> Iterator[tuple[int, Form, Tensor]]:
        """Parameter, form and cotangent for each use."""
        gs, _ = pull(self.trace, columns, create_graph=create_graph, retain_graph=True)
        for j, (site, g) in enumerate(zip(self.trace.sites, gs, strict=True)):
            if j in self.outputs:
                trace, params = self.repeated[j]
                inner, _ = pull(trace, g, create_graph=create_graph, retain_graph=True)
                for inner_site, h in zip(trace.sites, inner, strict=True):
                    yield from ((i, f, h) for i, f in _by_identity(inner_site.forms, params).items())
            else:
                yield from ((i, form, g) for i, form in site.forms.items())


@dataclass
class Curved:
    """A graph with its curvature.

    Attributes:
        trace: The recorded operations, by position of the parameter.
        leaves: The parameters.
        curvature: Of ``trace``.
    """

    trace: Trace
    leaves: list[Tensor]
    curvature: Curvature

    def is_ggn(self, call: LossCall) -> bool:
        """Whether the Hessian is the GGN: all operations are linear by pieces, and the loss is convex."""
        if call.loss.name is None or self.curvature.curved or self.curvature.residuals:
            return False
        if not call.loss.tensors and not (call.loss.name == "cross_entropy" and call.y.is_floating_point()):
            return True  # no weights, of classes or of targets, that could be negative
        return losses.signed_root(call.loss, self.trace.out.detach(), call.y)[1] is None

    def suffices(self, create_graph: bool) -> bool:
        """Whether the Hessian can be read off this graph, whose operations can be differentiated often enough."""
        if self.curvature.split:
            return False
        if self.is_resolved():
            return True
        return not create_graph and not any(is_once_differentiable(node) for node in nodes(self.trace.out))

    def is_resolved(self) -> bool:
        """Whether all operations are linear by pieces, or smooth and elementwise."""
        return not self.curvature.curved


def _by_identity(forms: dict[int, Form], params: list[Tensor]) -> dict[int, Form]:
    return {id(params[i]): form for i, form in forms.items()}


class OutsideLayouts(NodeLayouts):
    """Layouts between calls of extended modules too, where nothing was recorded."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self._out = out
        self._axes: dict[GradientEdge, int] = {}

    def of(self, edge: GradientEdge) -> tuple[int, torch.Size] | None:
        """Sample axis and shape of a tensor."""
        if (known := super().of(edge)) is not None:
            return known
        axis, shape = follow(edge, self._known, self._axes), shape_of(edge)
        return None if axis < 0 or shape is None else (axis, shape)

    def _known(self, edge: GradientEdge) -> int | None:
        if (known := super().of(edge)) is not None:
            return known[0]
        return next((note.axis for note in outputs_of_calls(edge) if note.region.reason is None), None)

    def several(self, node: Node) -> bool:
        """Whether an operation took several tensors that depend on samples, or may have."""
        return super().several(node) or node not in self._inside

    @cached_property
    def _inside(self) -> set[Node]:
        """The nodes that calls of extended modules have made."""
        found: set[Node] = set()
        for end in nodes(self._out):
            for note in notes(end):
                if isinstance(note, RegionOutput):
                    before, stack = {edge.node for edge in note.region.before}, [end]
                    while stack:
                        node = stack.pop()
                        if node not in found and node not in before:
                            found.add(node)
                            stack.extend(e.node for e in inputs_of(node))
        return found


def outputs_of_calls(edge: GradientEdge) -> list[RegionOutput]:
    """The calls of extended modules that made this tensor; one that returned what it was given has not."""
    return [
        note
        for note in notes(edge.node)
        if isinstance(note, RegionOutput)
        and note.output == edge.output_nr
        and not any((e.node, e.output_nr) == (edge.node, edge.output_nr) for e in note.region.before)
    ]


def whole_model(call: LossCall, params: Collection[int]) -> Region | None:
    """The call whose output went straight into the loss, if it has all of these parameters, by identity."""
    calls = [note.region for note in outputs_of_calls(get_gradient_edge(call.out))]
    return next((region for region in calls if {id(p) for p in region.params} >= set(params)), None)
