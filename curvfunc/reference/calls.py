"""The calls of torch that a model makes for one sample, for the quantities that name its operations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvfunc.reference.dense import TwiceDifferentiable

__all__ = ["Call", "Chain", "Point", "derivative", "record"]


@dataclass(frozen=True)
class Point:
    """A tensor as it was at one time of the forward pass: where autograd knows it, its shape, dtype and device."""

    edge: GradientEdge
    shape: torch.Size
    kind: dict[str, Any]

    @classmethod
    def of(cls, t: Tensor) -> "Point":
        """The place of a tensor as it is now."""
        return cls(get_gradient_edge(t), t.shape, {"dtype": t.dtype, "device": t.device})

    @property
    def key(self) -> Any:
        """What is the same for the same place."""
        return self.edge.node, self.edge.output_nr


@dataclass(frozen=True)
class Call:
    """One call of a function of torch that took and made tensors which depend on parameters.

    Attributes:
        func: The function.
        values: What it was given, as leaves, tensors without a graph.
        tree: How these leaves make up ``(args, kwargs)``.
        inputs: Those that depend on parameters, by their number among the leaves.
        outputs: Those of its results, by their number among the results' leaves.
        of_data: Whether anything it was given depends on the model's input.
    """

    func: Callable[..., Any]
    values: list[Any]
    tree: Any
    inputs: dict[int, Point]
    outputs: dict[int, Point]
    of_data: bool

    def of(self, k: int, z: Tensor) -> list[Tensor]:
        """The outputs as a function of input k alone."""
        values = [v.clone() if isinstance(v, Tensor) else v for v in self.values]
        values[k] = z.clone()  # it may be changed in place
        results = _results(self.func, *optree.tree_unflatten(self.tree, values))
        return [results[i] for i in self.outputs]


def record(model_fn: Callable[[Any, Any], Tensor], params: Any, x: Any) -> tuple[Tensor, list[Tensor], list[Call]]:
    """The model's output for one sample, the parameters that it can be differentiated by, and its calls in order."""
    leaves, tree = optree.tree_flatten(params)
    leaves = [p.detach().requires_grad_() for p in leaves]
    x = optree.tree_map(torch.Tensor.detach, x)
    with torch.enable_grad(), TwiceDifferentiable():
        given = [p.view_as(p) for p in leaves]
        with _Calls(given, x) as calls:
            out = model_fn(optree.tree_unflatten(tree, given), x)
    return out, leaves, calls.found


class _Calls(TorchFunctionMode):
    """Writes calls down. ``of_data`` says of each known tensor whether it depends on the model's input."""

    def __init__(self, params: Sequence[Tensor], x: Any) -> None:
        super().__init__()
        self.found: list[Call] = []
        self.of_data: dict[Any, bool] = {Point.of(p).key: False for p in params}
        self.data = {id(t): t for t in optree.tree_leaves(x)}  # those that do not depend on parameters

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        called: Any = (args, kwargs or {})
        given, tree = optree.tree_flatten(called)
        tensors = {k: t for k, t in enumerate(given) if isinstance(t, Tensor)}
        inputs = {k: Point.of(t) for k, t in tensors.items() if t.requires_grad}
        known = [self._known(func, z) for z in inputs.values()]
        of_data = any(known) or any(id(t) in self.data for t in tensors.values())
        values = [t.detach().clone() if isinstance(t, Tensor) else t for t in given]
        out = func(*args, **(kwargs or {}))
        results = [t for t in _leaves(out, args) if isinstance(t, Tensor)]
        outputs = {i: Point.of(t) for i, t in enumerate(results) if t.requires_grad}
        for z in outputs.values():
            self.of_data.setdefault(z.key, of_data)
        if of_data:
            self.data |= {id(t): t for t in results if not t.requires_grad}
        if inputs and outputs:
            self.found.append(Call(func, values, tree, inputs, outputs, of_data))
        return out

    def _known(self, func: Callable[..., Any], z: Point) -> bool:
        if z.key not in self.of_data:
            raise NotImplementedError(
                f"the input of {getattr(func, '__name__', func)} comes from {z.edge.node.name()}, which is no call of torch "
                "that the reference can see. Write the model without autograd.Function and without changing views in place."
            )
        return self.of_data[z.key]


def _results(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [t for t in _leaves(func(*args, **kwargs), args) if isinstance(t, Tensor)]


def _leaves(out: Any, args: tuple[Any, ...]) -> list[Any]:
    """What a function returns; if that is nothing, what it changed: ``z[i] = a``."""
    return optree.tree_leaves(args[0] if out is None and args else out)


def derivative(output: Point, inputs: Sequence[Any]) -> Tensor:
    """The Jacobian ``[output, inputs side by side]`` between points or parameters, one row at a time."""
    ends = [z.edge if isinstance(z, Point) else z for z in inputs]

    def row(unit: Tensor) -> Tensor:
        grads = torch.autograd.grad([output.edge], ends, [unit.reshape(output.shape)], retain_graph=True, allow_unused=True)
        parts = [unit.new_zeros(z.shape) if g is None else g for g, z in zip(grads, inputs, strict=True)]
        return torch.cat([g.reshape(-1) for g in parts])

    return torch.stack([row(unit) for unit in torch.eye(output.shape.numel(), **output.kind)])


class Chain:
    """The tensors ``z_0, z_1, ...`` of one sample that depend on its input and on parameters, in the order of their making.

    Attributes:
        z: The tensors that the output depends on.
        links: The numbers of those that everything later goes through: no call takes an earlier one and makes a later one.
            The last is the output.
    """

    def __init__(self, model_fn: Callable[[Any, Any], Tensor], params: Any, x: Any) -> None:
        out, self.parameters, calls = record(model_fn, params, x)
        end = [Point.of(out)] if out.requires_grad else []  # otherwise it depends on no parameter
        made = {z.key: z for call in calls if call.of_data for z in call.outputs.values()}
        made |= {z.key: z for z in end}
        self.z = [z for z in made.values() if _depends(end[0], z.edge)] if end else []
        number = {z.key: k for k, z in enumerate(self.z)}
        spans = [
            (number[a.key], number[b.key])
            for call in calls
            for a in call.inputs.values()
            for b in call.outputs.values()
            if a.key in number and b.key in number
        ]
        self.links = [k for k in range(len(self.z)) if not any(a < k < b for a, b in spans)]

    def use(self, i: int) -> int | None:
        """The number of the tensor in which parameter i is used: the first that depends on it, and the way of all the rest."""
        k = next((k for k, z in enumerate(self.z) if _depends(z, self.parameters[i])), None)
        if k is not None:
            last = self.links[-1]
            whole, way = self.parameter_jacobian(last, i), self.jacobian(last, k) @ self.parameter_jacobian(k, i)
            if (whole - way).norm() > torch.finfo(whole.dtype).eps ** 0.5 * whole.norm():
                raise NotImplementedError("kfra: a parameter is used more than once. Use kflr or kfac.")
        return k

    def jacobian(self, k: int, j: int) -> Tensor:
        """``d z_k / d z_j``."""
        return derivative(self.z[k], [self.z[j]])

    def parameter_jacobian(self, k: int, i: int) -> Tensor:
        """``d z_k / d theta_i``."""
        return derivative(self.z[k], [self.parameters[i]])


def _depends(z: Point, source: Any) -> bool:
    ones = torch.ones(z.shape, **z.kind)
    return torch.autograd.grad([z.edge], [source], [ones], retain_graph=True, allow_unused=True)[0] is not None
