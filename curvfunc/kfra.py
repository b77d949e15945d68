"""KFRA: Kronecker factors from the loss Hessian, averaged over samples after each step back.

Let G = Σ_{n,m} ∂²L/∂zₙ∂zₘ, restricted to n = m, be a square matrix over the entries of one sample's z. It starts as the loss
Hessian at the output, summed over samples, and goes back through the operation z → f(z) by

    G ← (1/N) Σₙ Jₙᵀ G Jₙ,    Jₙ the Jacobian of f at sample n.

This needs a chain of operations. Three kinds of them have rules:

- the Jacobian is diagonal (activations, dropout, batch norm in evaluation mode): G ∘ (1/N) Σₙ dₙ dₙᵀ, dₙ its diagonal;
- it is the same for all samples (linear, convolution, average pooling, padding, ...): its VJP for the rows, then the columns;
- each output selects one input (max pooling): the entries of G are added up where both indices agree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.overrides import TorchFunctionMode

from curvfunc import second_moments
from curvfunc.cotangents import CHUNK_BYTES
from curvfunc.forms import Direct, Outer, Rows, bind, per_sample
from curvfunc.observer import axis_or_none, edge_of, tensors_in
from curvfunc.residuals import is_affine
from curvfunc.rules.nonlinear import is_diagonal, is_linear, is_reshape
from curvfunc.second_moments import second_moment
from curvfunc.sites import Site, Trace

__all__ = ["Chain", "factors"]

_SELECTIONS = {
    f"{name}Backward0" for name in ("MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D")
}


@dataclass(frozen=True)
class _Call:
    """One operation: its call, its output, and its tensors that depend on samples: those with a gradient, and how many."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: GradientEdge
    shape: torch.Size
    axis: int | None
    data: list[tuple[Tensor, GradientEdge, torch.Size]]
    sampled: int

    @property
    def name(self) -> str:
        return getattr(self.func, "__qualname__", str(self.func)).replace("boolean_dispatch.<locals>.fn", "max_pool")


@dataclass
class Chain:
    """The operations of a forward pass, by the graph node of their output."""

    calls: dict[tuple[Node, int], _Call] = field(default_factory=dict)

    def recording(self, model_fn: Callable[..., Any]) -> Callable[..., Any]:
        """The same model, its operations written down at each call."""

        def recorded(params: Any, X: Any) -> Any:
            with self.recorder():
                return model_fn(params, X)

        return recorded

    def recorder(self) -> TorchFunctionMode:
        """A mode under which operations are written down, in place of those that were written down before."""
        self.calls.clear()
        return _Recorder(self.calls)


class _Recorder(TorchFunctionMode):
    def __init__(self, calls: dict[tuple[Node, int], _Call]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and write it down if gradients flow through it."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():  # the capture need not see the questions asked here
            sampled = [t for t in tensors_in(args, kwargs) if axis_or_none(t) is not None]
            # before the call, which may change them in place
            data = [(t, edge_of(t), t.shape) for t in sampled if t.requires_grad]
        out = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            self._write(func, args, kwargs, out, data, len(sampled))
        return out

    def _write(self, func: Any, args: Any, kwargs: Any, out: Any, data: list[Any], sampled: int) -> None:
        for t in (out,) if isinstance(out, Tensor) else out if isinstance(out, (tuple, list)) else ():
            if isinstance(t, Tensor) and t.requires_grad and axis_or_none(t) is not None:
                edge = edge_of(t)
                if any(edge.node is e.node and edge.output_nr == e.output_nr for _, e, _ in data):
                    continue  # nothing happened: dropout in evaluation mode, x.contiguous()
                call = _Call(func, args, kwargs, edge, t.shape, axis_or_none(t), data, sampled)
                self.calls[edge.node, edge.output_nr] = call


def factors(
    trace: Trace,
    leaves: Sequence[Tensor],
    names: Sequence[str],
    chain: Chain,
    hessian: Tensor,
    differentiable: bool,
) -> list[tuple[Tensor, ...]]:
    """The Kronecker factors of each parameter.

    Args:
        trace: The forward pass.
        leaves: The parameters.
        names: Their names.
        chain: The operations of that forward pass.
        hessian: Of the loss with respect to the output, summed over samples.
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
    edge = edge_of(trace.out) if trace.out.requires_grad else None
    while edge is not None and sites:
        call = chain.calls.get((edge.node, edge.output_nr))
        if call is None:
            raise NotImplementedError(f"kfra cannot see the operation behind {edge.node.name()}. Use kflr or kfac.")
        if call.axis != 0:
            raise NotImplementedError(f"kfra: the samples of the output of {call.name} are not its first axis.")
        output = (call.output.node, call.output.output_nr)
        for key in [output] if output in sites else [key for key in sites if key in _inside(call)]:
            site = sites.pop(key)
            at_site = _through_diagonal(call, site.edge, site.shape, G, differentiable)
            for i, form in site.forms.items():
                if i in found:
                    raise NotImplementedError(f"kfra: parameter {names[i]!r} is used more than once. Use kflr or kfac.")
                found[i] = _parameter_factors(form, at_site, site)
        if sites and len(call.data) != 1:
            raise NotImplementedError(
                f"kfra needs a chain of operations, and {call.name} takes {len(call.data)} tensors that depend on "
                "parameters: the graph branches. Use kflr or kfac."
            )
        edge = call.data[0][1] if sites else None
        if edge is not None:
            G = _step_back(call, G, len(trace.out), differentiable)
    return [found[i] if i in found else (p.new_zeros(p.numel(), p.numel()),) for i, p in enumerate(leaves)]


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
    B = G if isinstance(form, Outer) and b.x.shape[1:3] == (1, 1) else _output_factor(form, G, shape)
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
    for rows in G.split(max(1, CHUNK_BYTES["cpu"] // max(1, G.element_size() * samples * len(G)))):
        g = rows.reshape(-1, 1, *shape[1:]).expand(-1, samples, *shape[1:])
        half.append(_flat(gradient(g)))
    columns = torch.cat(half).permute(2, 1, 0)  # [p, n, z]
    return _flat(gradient(columns.reshape(*columns.shape[:2], *shape[1:]))).mean(1)


def _flat(g: Tensor) -> Tensor:
    """[v, n, *shape] as [v, n, numel]."""
    return g.reshape(*g.shape[:2], g.shape[2:].numel())


# -- one step back


def _step_back(call: _Call, G: Tensor, samples: int, differentiable: bool) -> Tensor:
    """(1/N) Σₙ Jₙᵀ G Jₙ."""
    x, edge, shape = call.data[0]
    nodes = _between(call.output.node, edge.node)
    if shape[0] == samples and call.shape[0] == samples:
        if all(map(is_reshape, nodes)):
            return G
        if all(map(is_diagonal, nodes)) and shape.numel() == call.shape.numel():
            return _through_diagonal(call, edge, shape, G, differentiable)
        if all(map(is_linear, nodes)) and call.sampled == 1:
            return _shared(call, x, shape, G)
        chosen = [node for node in nodes if node.name() in _SELECTIONS]
        if len(chosen) == 1 and all(is_reshape(node) for node in nodes if node is not chosen[0]):
            return _selected(chosen[0]._saved_result1, shape, G)  # type: ignore[attr-defined]
    return _refuse(call)


def _refuse(call: _Call) -> NoReturn:
    raise NotImplementedError(f"kfra has no rule for {call.name}. Use kflr or kfac.")


def _through_diagonal(call: _Call, edge: GradientEdge, shape: torch.Size, G: Tensor, differentiable: bool) -> Tensor:
    """G ∘ (1/N) Σₙ dₙ dₙᵀ, from the operation's output to a tensor of that shape before it."""
    nodes = _between(call.output.node, edge.node)
    if all(map(is_reshape, nodes)):
        return G
    if shape.numel() != call.shape.numel() or not all(map(is_diagonal, nodes)):
        _refuse(call)
    ones = torch.ones(call.shape, dtype=G.dtype, device=G.device)
    if len(nodes) == 1 and not differentiable and len(nodes[0].next_functions) == 1:  # no need of the engine
        d = nodes[0](ones)  # type: ignore[operator]
    else:
        d = torch.autograd.grad([call.output], [edge], [ones], retain_graph=True, create_graph=differentiable)[0]
    d = d.reshape(shape[0], -1)
    return G * second_moment(d.mT, 1 / shape[0])


def _inside(call: _Call) -> set[tuple[Node, int]]:
    """The outputs of the nodes that an operation is made of."""
    ends = {edge.node for _, edge, _ in call.data}
    found: set[tuple[Node, int]] = set()
    stack = [(call.output.node, call.output.output_nr)]
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


def _shared(call: _Call, x: Tensor, shape: torch.Size, G: Tensor) -> Tensor:
    """Jᵀ G J for an operation whose Jacobian is the same for all samples; columns take the place of samples."""
    if call.func is F.linear and len(shape) == 2:
        weight = call.kwargs["weight"] if "weight" in call.kwargs else call.args[1]
        return weight.mT @ (G @ weight)

    def transposed(rows: Tensor) -> Tensor:
        parts = []
        widest = max(shape.numel(), call.shape.numel()) // shape[0]
        for part in rows.split(max(1, CHUNK_BYTES.get(G.device.type, 1 << 28) // (widest * G.element_size()))):
            zeros = G.new_zeros(len(part), *shape[1:])
            run = lambda z: call.func(*_replaced(call.args, x, z), **_replaced(call.kwargs, x, z))
            _, pullback = torch.func.vjp(run, zeros)  # type: ignore[misc]
            parts.append(pullback(part.reshape(-1, *call.shape[1:]))[0].flatten(1))
        return torch.cat(parts)

    return transposed(transposed(G).mT)


def _replaced(arguments: Any, old: Tensor, new: Tensor) -> Any:
    """The arguments with another tensor in place of ``old``."""
    if isinstance(arguments, dict):
        return {k: new if a is old else a for k, a in arguments.items()}
    return tuple(new if a is old else a for a in arguments)


def _selected(index: Tensor, shape: torch.Size, G: Tensor) -> Tensor:
    """For each sample, G[o,p] is added to entry (i(o), i(p)); index [n, c, *out] counts within a channel.

    Beyond G and the result, this takes the memory of one matrix of indices of the size of G.
    """
    channels = index.shape[1]
    size, pixels = shape.numel() // shape[0], shape.numel() // (shape[0] * channels)
    offset = torch.arange(channels, device=index.device) * pixels
    place = (index.flatten(2) + offset.unsqueeze(1)).flatten(1)  # [n, o]
    total = G.new_zeros(size * size)
    for row in place:
        total = total.index_add(0, (row.unsqueeze(1) * size + row).flatten(), G.flatten())
    return total.reshape(size, size) / len(index)
