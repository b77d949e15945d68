"""What one sample sends through each layer, for the Kronecker factors of :mod:`curvfunc.reference`."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Layer", "layers"]


@dataclass(frozen=True)
class Layer:
    """What one sample sends through a weight: the operation, its inputs and the Jacobian of its output.

    Attributes:
        op: ``F.linear``, ``F.conv1d``, ...
        x: Inputs ``[g, s, k]`` of each group at each position.
        D: ``[c, s, o]``, derivative of the model's output with respect to the layer's.
        biased: Whether a leaf of params is the bias beside the weight, the same in all its calls, and only there.
    """

    op: Callable[..., Tensor]
    x: Tensor
    D: Tensor
    biased: bool


def layers(model_fn: Callable[[Any, Any], Tensor], params: Any, x: Any) -> list[Layer | None]:
    """The layer of each leaf of params for a batch of one; None if it is anything but its weight."""
    leaves, treespec = optree.tree_flatten(params)
    leaves = [p.view_as(p) for p in leaves]  # told apart by identity, also where two names share a tensor

    def run(probes: list[Tensor] | None) -> tuple[Tensor, _Calls]:
        with _Calls(leaves, probes) as calls:
            return model_fn(optree.tree_unflatten(treespec, leaves), x).flatten(), calls

    def from_probes(probes: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        out, calls = run(probes)
        return out, calls.inputs

    _, calls = run(None)
    if calls.probes:
        found: tuple[Any, ...] = torch.func.vjp(from_probes, calls.probes, has_aux=True)
        out, pullback, inputs = found
        rows = [pullback(row)[0] for row in torch.eye(len(out), dtype=out.dtype, device=out.device)]
        jacobians = [torch.stack(row) for row in zip(*rows, strict=True)]

    def jacobian(k: int, axis: int) -> Tensor:
        return jacobians[k].movedim(axis, -1).reshape(len(jacobians[k]), -1, calls.probes[k].shape[axis])

    def layer(i: int) -> Layer | None:
        uses, axis = calls.as_weight[i], 1 - leaves[i].ndim  # features are last for linear, before space for convolution
        if i in calls.otherwise or len({len(inputs[k]) for k in uses}) != 1:  # no use, or different groups
            return None
        x, D = torch.cat([inputs[k] for k in uses], dim=1), torch.cat([jacobian(k, axis) for k in uses], dim=1)
        beside = {calls.biases[k] for k in uses}
        biased = len(beside) == 1 and None not in beside and calls.uses[next(iter(beside))] == len(uses)
        return Layer(calls.ops[uses[0]], x, D, biased)

    return [layer(i) for i in range(len(leaves))]


class _Calls(TorchFunctionMode):
    """Writes down each call that takes one of ``leaves``: as the weight of a linear or convolution layer, or otherwise.

    To the output of such a layer it adds a zero, the *probe*: the derivative with respect to the output is the one with
    respect to the probe, whatever is done to the output in place afterwards.
    """

    def __init__(self, leaves: list[Tensor], probes: list[Tensor] | None) -> None:
        super().__init__()
        self.number = {id(leaf): i for i, leaf in enumerate(leaves)}
        self.given = probes
        self.probes: list[Tensor] = []
        self.ops: list[Callable[..., Tensor]] = []
        self.inputs: list[Tensor] = []
        self.as_weight: list[list[int]] = [[] for _ in leaves]
        self.otherwise: set[int] = set()
        self.biases: list[int | None] = []
        self.uses: Counter[int | None] = Counter()  # of any kind

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        used = [self.number[id(a)] for a in _leaves((args, kwargs)) if id(a) in self.number]
        self.uses.update(used)
        if not used or not (out is None or any(isinstance(t, Tensor) for t in _leaves(out))):
            return out  # p.shape, p.dim(), ...: the value is not read
        if func in _INPUTS:
            weight = self.number.get(id(kwargs["weight"] if "weight" in kwargs else args[1]))
            if weight is not None:
                used.remove(weight)
                k = len(self.probes)
                self.as_weight[weight].append(k)
                self.ops.append(func)
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                self.biases.append(self.number.get(id(bias)))
                self.inputs.append(_INPUTS[func](*args, **kwargs))
                self.probes.append(torch.zeros_like(out) if self.given is None else self.given[k])
                out = out + self.probes[k]
        self.otherwise.update(used)
        return out


def _leaves(tree: Any) -> list[Any]:
    return optree.tree_leaves(tree)


def _linear_inputs(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Inputs of a linear layer ``[1, s, k]``: all axes but the last are positions."""
    return input.reshape(1, -1, input.shape[-1])


def _conv_inputs(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Patches of a convolution ``[g, s, k]``: what each position of the output sees, k over (channel, kernel)."""
    kernel = weight.shape[2:]
    stride, dilation = _per_axis(stride, kernel), _per_axis(dilation, kernel)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if isinstance(padding, str):
        pads = [(t // 2, t - t // 2) if padding == "same" else (0, 0) for t in total]
    else:
        pads = [(p, p) for p in _per_axis(padding, kernel)]
    x = F.pad(input, [p for pair in reversed(pads) for p in pair])  # F.pad begins with the last axis
    x = x.reshape(-1, *x.shape[-len(kernel) - 1 :])
    ends = [size - t for size, t in zip(x.shape[2:], total, strict=True)]

    def entry(offset: Sequence[int]) -> Tensor:
        """What this entry of the kernel meets at each position: [n, c, *positions]."""
        axes = zip(offset, dilation, ends, stride, strict=True)
        window = tuple(slice(i * d, i * d + end, step) for i, d, end, step in axes)
        return x[(slice(None), slice(None), *window)]

    offsets = list(itertools.product(*map(range, kernel)))
    patches = torch.stack([entry(offset) for offset in offsets], dim=2)
    patches = patches.reshape(len(x), groups, *weight.shape[1:2], len(offsets), -1)  # [n, g, c, kernel, positions]
    return patches.permute(1, 0, 4, 2, 3).reshape(groups, -1, weight[0].numel())


def _conv_transpose_inputs(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """Patches of a transposed convolution ``[g, s, k]``: what each position of the output sees, k over (channel, kernel)."""
    kernel, channels = weight.shape[2:], weight.shape[0]
    x = input.reshape(-1, *input.shape[-len(kernel) - 1 :])
    convolve = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[len(kernel)]
    entries = torch.eye(kernel.numel(), dtype=x.dtype, device=x.device).reshape(-1, 1, 1, *kernel)

    def entry(one: Tensor) -> Tensor:
        """What this entry of the kernel meets at each position, channel by channel: [n, c, *positions]."""
        each = one.expand(channels, 1, *kernel)
        return convolve(x, each, None, stride, padding, output_padding, channels, dilation)

    patches = torch.stack([entry(one) for one in entries], dim=2)
    patches = patches.reshape(len(x), groups, channels // groups, len(entries), -1)  # [n, g, c, kernel, positions]
    return patches.permute(1, 0, 4, 2, 3).reshape(groups, -1, channels // groups * len(entries))


def _per_axis(value: Any, kernel: Sequence[int]) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [value]
    return values * len(kernel) if len(values) == 1 else values


_INPUTS: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    F.linear: _linear_inputs,
    F.conv1d: _conv_inputs,
    F.conv2d: _conv_inputs,
    F.conv3d: _conv_inputs,
    F.conv_transpose1d: _conv_transpose_inputs,
    F.conv_transpose2d: _conv_transpose_inputs,
    F.conv_transpose3d: _conv_transpose_inputs,
}
