"""KFRA: Kronecker factors from the loss Hessian, averaged over samples after each step back.

Let G = Σ_{n,m} ∂²L/∂zₙ∂zₘ, restricted to n = m, be a square matrix over the entries of one sample's z. It starts as the loss
Hessian at the output, summed over samples, and goes back through the operation z → f(z) by

    G ← (1/N) Σₙ Jₙᵀ G Jₙ,    Jₙ the Jacobian of f at sample n.

This needs a chain of operations, which is found in the autograd graph: from each tensor that an operation took to the last
one before it that all paths go through. Three kinds of steps have rules:

- the Jacobian is diagonal (activations, dropout, batch norm in evaluation mode): G ∘ (1/N) Σₙ dₙ dₙᵀ, dₙ its diagonal;
- it is the same for all samples (linear, convolution, average pooling, padding, ...): its VJP for the rows, then the columns;
- each output selects one input (max pooling): the entries of G are added up where both indices agree.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from curvfunc.engine.columns import over_columns
from curvfunc.engine.cotangents import CHUNK_BYTES, together
from curvfunc.engine.graph import edge_of
from curvfunc.engine.sites import Layouts, Site, Trace
from curvfunc.hessian.residuals import is_affine
from curvfunc.rules.nonlinear import is_diagonal, is_linear, is_reshape, name_of, operation, takes_data
from curvfunc.tensors.precision import wide
from curvfunc.tensors.sizes import hint
from curvfunc.uses import second_moments
from curvfunc.uses.forms import Direct, Outer, Rows, bind, per_sample
from curvfunc.uses.second_moments import second_moment

__all__ = ["factors"]

_SELECTIONS = {
    f"{name}Backward0" for name in ("MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D")
}


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the forward pass that depends on parameters."""

    edge: GradientEdge
    axis: int
    shape: torch.Size


@dataclass(frozen=True)
class _Step:
    """What lies between a tensor and the last one before it that all paths go through, if there is one."""

    output: _Tensor
    data: list[_Tensor]
    branches: int

    @classmethod
    def before(cls, output: _Tensor, layouts: Layouts) -> "_Step":
        """Follow the graph to the tensors that operations took, and from the latest of them on while there are several."""
        found = _taken(output.edge, layouts)
        branches = len(found)
        while len(found) > 1:
            latest = max(found, key=lambda place: place[0]._sequence_nr())
            found |= _taken(found.pop(latest).edge, layouts)
        return cls(output, list(found.values()), branches)

    @property
    def name(self) -> str:
        return operation(self.output.edge.node)


def _taken(edge: GradientEdge, layouts: Layouts) -> dict[tuple[Node, int], _Tensor]:
    """The last tensors before ``edge`` that operations took, by node and output number."""
    found: dict[tuple[Node, int], _Tensor] = {}
    seen: set[tuple[Node, int]] = set()
    stack = list(edge.node.next_functions)
    while stack:
        node, number = stack.pop()
        if node is None or (node, number) in seen:
            continue
        seen.add((node, number))
        before = GradientEdge(node, number)
        # the matrices are of real numbers: complex tensors are inside of a step
        if (layout := layouts.of(before)) is not None and not node._input_metadata[number].dtype.is_complex:
            found[node, number] = _Tensor(before, *layout)
        else:
            stack.extend(node.next_functions)
    return found


def factors(
    trace: Trace,
    leaves: Sequence[Tensor],
    names: Sequence[str],
    layouts: Layouts,
    hessian: Tensor,
    differentiable: bool,
) -> list[tuple[Tensor, ...]]:
    """The Kronecker factors of each parameter.

    Args:
        trace: The forward pass.
        leaves: The parameters.
        names: Their names.
        layouts: The tensors that its operations took.
        hessian: Of the loss with respect to the output, summed over samples; in float32 at least, as the factors are.
        differentiable: Whether the results will be differentiated.

    Returns:
        (B, A), in the order of the parameter's axes, or (B,), for each parameter.
    """
    if trace.mode != "plain":
        reasons = "; ".join(f"{'the model' if i is None else names[i]}: {why}" for i, why in trace.reasons.items())
        raise NotImplementedError(f"kfra needs a rule for each use of a parameter ({reasons}). Use kflr or kfac.")
    found: dict[int, tuple[Tensor, ...]] = {}
    sites = {(s.edge.node, s.edge.output_nr): s for s in trace.sites}
    G = hessian
    output = _Tensor(edge_of(trace.out), 0, trace.out.shape) if trace.out.requires_grad else None
    while output is not None and sites:
        step = _Step.before(output, layouts)
        if output.axis != 0:
            raise NotImplementedError(f"kfra: the samples of the output of {step.name} are not its first axis.")
        key = (output.edge.node, output.edge.output_nr)
        for at in [key] if key in sites else [k for k in sites if k in _inside(step)]:
            site = sites.pop(at)
            at_site = _through_diagonal(step, site.edge, site.shape, G, differentiable)
            for i, form in site.forms.items():
                if i in found:
                    raise NotImplementedError(f"kfra: parameter {names[i]!r} is used more than once. Use kflr or kfac.")
                found[i] = _parameter_factors(form, at_site, site)
        if sites and not step.data:
            raise NotImplementedError(f"kfra cannot see the operations before {step.name}. Use kflr or kfac.")
        output = step.data[0] if sites else None
        if output is not None:
            G = _step_back(step, output, layouts, G, trace.out.shape[0], differentiable)
    return [found[i] if i in found else (p.new_zeros(p.numel(), p.numel(), dtype=wide(p.dtype)),) for i, p in enumerate(leaves)]


# -- factors of a parameter


def _parameter_factors(form: Any, G: Tensor, site: Site) -> tuple[Tensor, ...]:
    """The factors of a use z = f(x; p), from G at z."""
    prepared: dict[int, Tensor] = {}
    samples, shape = site.shape[0], site.shape

    def inputs(form: Any) -> Tensor:
        return prepared.setdefault(id(form), form.inputs())

    if isinstance(form, Direct) and is_affine(site):  # a bias, for which all samples are alike
        return (G.clone() if len(G) == form.shape.numel() else _block(form.cotangent, G, 1, shape),)
    if not isinstance(form, (Outer, Rows)):
        return (_block(lambda g: per_sample(bind(form, g, inputs)), G, samples, shape),)
    b = bind(form, G.new_zeros(1, samples, *shape[1:]), inputs)
    A = second_moments.input_factor(b)
    assert A is not None
    whole = isinstance(form, Outer) and b.x.shape[1:3] == (1, 1) and b.g.shape[4] == len(G) and is_affine(site)
    B = G if whole else _output_factor(form, G, shape)
    return (A.factor, B) if A.first else (B, A.factor)


def _output_factor(form: Outer | Rows, G: Tensor, shape: torch.Size) -> Tensor:
    """G with the positions summed, both or on the diagonal only."""
    rows = _features(form.cotangent(G.reshape(len(G), 1, *shape[1:])))  # [z, s, o]
    G = _features(form.cotangent(rows.movedim(0, -1).flatten(0, 1).reshape(-1, 1, *shape[1:])))
    G = G.reshape(*rows.shape[1:], *rows.shape[1:])  # [s, o, s, o]
    summed = isinstance(form, Outer) and form.sum_positions
    return G.sum((0, 2)) if summed else G.diagonal(dim1=0, dim2=2).sum(-1)


def _features(g: Tensor) -> Tensor:
    """[v, 1, q, s, o] as [v, s, q o]; embeddings have [v, 1, s, o]."""
    g = g.squeeze(1)
    return g if g.ndim == 3 else g.transpose(1, 2).flatten(2)


def _block(gradient: Callable[[Tensor], Tensor], G: Tensor, samples: int, shape: torch.Size) -> Tensor:
    """(1/N) Σₙ Cₙ G Cₙᵀ with ``gradient`` = Cₙ, the map from cotangents of z to the parameter's gradient."""
    half = []
    for rows in G.split(max(1, CHUNK_BYTES["cpu"] // max(1, hint(G.element_size() * samples * len(G))))):
        g = rows.reshape(-1, 1, *shape[1:]).expand(-1, samples, *shape[1:])
        half.append(_flat(gradient(g)))
    columns = torch.cat(half).permute(2, 1, 0)  # [p, n, z]
    return _flat(gradient(columns.reshape(*columns.shape[:2], *shape[1:]))).mean(1)


def _flat(g: Tensor) -> Tensor:
    """[v, n, *shape] as [v, n, numel]."""
    return g.reshape(*g.shape[:2], g.shape[2:].numel())


# -- one step back


def _step_back(step: _Step, x: _Tensor, layouts: Layouts, G: Tensor, samples: int, differentiable: bool) -> Tensor:
    """(1/N) Σₙ Jₙᵀ G Jₙ, to the tensor before the step."""
    nodes = _between(step.output.edge.node, x.edge.node)
    if x.shape[0] == samples and step.output.shape[0] == samples:
        if all(map(is_reshape, nodes)):
            return G
        if all(map(is_diagonal, nodes)) and math.prod(x.shape) == math.prod(step.output.shape):
            return _through_diagonal(step, x.edge, x.shape, G, differentiable)
        if all(map(is_linear, nodes)) and not _by_sample(nodes, layouts):
            return _shared(step, x, nodes, G, differentiable)
        chosen = [node for node in nodes if name_of(node) in _SELECTIONS]
        if len(chosen) == 1 and all(is_reshape(node) for node in nodes if node is not chosen[0]):
            return _selected(chosen[0]._saved_result1, x.shape, G)  # type: ignore[attr-defined]
    return _refuse(step)


def _by_sample(nodes: Sequence[Node], layouts: Layouts) -> bool:
    """Whether Jacobians of linear operations may differ from sample to sample, since data are in them."""
    return any(map(takes_data, nodes)) and any(map(layouts.several, nodes))


def _refuse(step: _Step) -> NoReturn:
    if step.branches > 1:
        raise NotImplementedError(
            f"kfra needs a chain of operations, and {step.name} takes {step.branches} tensors that depend on parameters: the "
            "graph branches. Use kflr or kfac."
        )
    raise NotImplementedError(f"kfra has no rule for {step.name}. Use kflr or kfac.")


def _through_diagonal(step: _Step, edge: GradientEdge, shape: torch.Size, G: Tensor, differentiable: bool) -> Tensor:
    """G ∘ (1/N) Σₙ dₙ dₙᵀ, from the step's output to a tensor of that shape before it."""
    output = step.output
    nodes = _between(output.edge.node, edge.node)
    if all(map(is_reshape, nodes)):
        return G
    if math.prod(shape) != math.prod(output.shape) or not all(map(is_diagonal, nodes)):
        _refuse(step)
    ones = torch.ones(output.shape, dtype=_dtype(output.edge), device=G.device)
    if len(nodes) == 1 and not differentiable and len(nodes[0].next_functions) == 1:  # no need of the engine
        d = nodes[0](ones)  # type: ignore[operator]
    else:
        d = torch.autograd.grad([output.edge], [edge], [ones], retain_graph=True, create_graph=differentiable)[0]
    d = d.reshape(shape[0], -1).to(G.dtype)
    return G * second_moment(d.mT, 1 / shape[0])


def _inside(step: _Step) -> set[tuple[Node, int]]:
    """The outputs of the nodes that a step is made of."""
    ends = {x.edge.node for x in step.data}
    found: set[tuple[Node, int]] = set()
    stack = [(step.output.edge.node, step.output.edge.output_nr)]
    while stack:
        place = stack.pop()
        if place not in found and place[0] not in ends:
            found.add(place)
            stack.extend((node, number) for node, number in place[0].next_functions if node is not None)
    return found


def _between(output: Node, source: Node) -> list[Node]:
    """The nodes on paths from ``output`` to ``source``, without the latter."""
    reaches: dict[Node, bool] = {source: True}
    stack = [output]
    while stack:
        node = stack[-1]
        if node in reaches:
            stack.pop()
            continue
        below = [child for child, _ in node.next_functions if child is not None]
        missing = [child for child in below if child not in reaches]
        if missing:
            stack.extend(missing)
        else:
            reaches[node] = any(reaches[child] for child in below)
    return [node for node, found in reaches.items() if found and node is not source]


def _shared(step: _Step, x: _Tensor, nodes: list[Node], G: Tensor, differentiable: bool) -> Tensor:
    """Jᵀ G J for operations whose Jacobian is the same for all samples; rows of G take the place of samples."""
    product: Any = nodes[0]
    if len(nodes) == 1 and product.name() == "AddmmBackward0" and product.next_functions[1][0] is x.edge.node:
        weight = product._saved_mat2 if product._saved_alpha == 1 else product._saved_alpha * product._saved_mat2
        weight = weight.to(G.dtype)
        return weight @ (G @ weight.mT)
    samples, given = x.shape[0], step.output.shape

    def pullback(rows: Tensor) -> Tensor:
        (g,) = torch.autograd.grad([step.output.edge], [x.edge], [rows], retain_graph=True, create_graph=differentiable)
        return g

    def transposed(rows: Tensor) -> Tensor:
        rows = rows.to(_dtype(step.output.edge))
        batches = F.pad(rows, (0, 0, 0, -len(rows) % samples)).reshape(-1, samples, *given[1:])
        parts = batches.split(together(G, x.shape, given))
        found = [over_columns(pullback, part) if len(part) > 1 else pullback(part[0])[None] for part in parts]
        return torch.cat(found).reshape(-1, x.shape[1:].numel())[: len(rows)].to(G.dtype)

    return transposed(transposed(G).mT)


def _dtype(edge: GradientEdge) -> torch.dtype:
    """Of the tensor at an edge."""
    dtype: torch.dtype = edge.node._input_metadata[edge.output_nr].dtype
    return dtype


def _selected(index: Tensor, shape: torch.Size, G: Tensor) -> Tensor:
    """For each sample, G[o,p] is added to entry (i(o), i(p)); index [n, c, *out] counts within a channel.

    Beyond G and the result, this takes the memory of one matrix of indices of the size of G.
    """
    channels = index.shape[1]
    size, pixels = math.prod(shape) // shape[0], math.prod(shape) // (shape[0] * channels)
    offset = torch.arange(channels, device=index.device) * pixels
    place = (index.flatten(2) + offset.unsqueeze(1)).flatten(1)  # [n, o]
    total = G.new_zeros(size * size)
    for row in place:
        total = total.index_add(0, (row.unsqueeze(1) * size + row).flatten(), G.flatten())
    return total.reshape(size, size) / len(index)
