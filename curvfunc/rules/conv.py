"""Convolutions of 1, 2 and 3 dimensions: a linear map of patches, z[n,s,o] = Σ_k W[o,k] x[n,s,k] + b[o]."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvfunc.rules.affine import affine
from curvfunc.rules.patches import (
    moment_pays,
    paddings,
    patch_moment,
    patch_sum,
    per_dimension,
    transposed_moment,
    unfold,
    unfold_transpose,
)
from curvfunc.rules.registry import Use, rule
from curvfunc.uses import forms
from curvfunc.uses.forms import Direct, Form, Outer

# Kernels for groups of fewer channels, but for one, are slower than patches.
FEWEST_CHANNELS = 8

# Gradients of samples as that of one convolution with a group for each sample, measured with oneDNN (torch 2.13, AMD EPYC):
# patches are not copied (0.4 ns for an entry [n, s, k]), but the gradients are arranged (1 ns for an entry [n, o, k]), so that
# it pays from about this many positions for an output channel on. Fewer input channels do not fill a vector.
LEAST_POSITIONS = 2
CHANNELS_OF_VECTORS = 16


@dataclass(eq=False)  # as forms: quicker to make than if it were frozen
class Call:
    """A call of a convolution, or of its transpose.

    Attributes:
        input: Its input x, [n, *b, c, *space]; a batch axis b inside one sample joins the shared positions.
        shape: Shape of the weight.
        dims: Number of axes of the kernel.
    """

    input: Tensor
    shape: torch.Size
    dims: int
    stride: int | Sequence[int] = 1
    padding: Any = 0  # numbers, or for convolutions the name of a way
    dilation: int | Sequence[int] = 1
    groups: int = 1
    output_padding: int | Sequence[int] = 0

    @property
    def kernel(self) -> torch.Size:
        """Size of the kernel."""
        return self.shape[2:]

    def images(self, channels: int) -> Tensor:
        """The input as [(n b q), channels, *space]: a group is as good as another sample."""
        return self.input.reshape(-1, channels, *self.input.shape[-self.dims :])

    def cotangent(self, g: Tensor) -> Tensor:
        """g [v, n, *b, o, *space] as [v, n, q, (b s), o]."""
        return _grouped(g.reshape(*g.shape[:2], -1, g.shape[-self.dims - 1], math.prod(g.shape[-self.dims :])), self.groups)


@rule(
    F.conv1d,
    F.conv2d,
    F.conv3d,
    arguments="input weight bias stride padding dilation groups",
    parameters="weight bias",
)
def conv(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, use: Use, **settings: Any) -> dict[str, Form]:
    """x are the patches of the input that each position of the output sees, [n, q, (b s), c k]."""
    dims = weight.ndim - 2 - ("weight" in use.sampled)  # a weight that is data has its samples first
    call = Call(input, weight.shape, dims, **settings)
    sizes = (call.kernel, call.stride, call.padding, call.dilation)
    groups, channels = call.groups, input.shape[-dims - 1] // call.groups

    def inputs(samples: slice = slice(None)) -> Tensor:
        some = input[samples]
        patches = unfold(some.reshape(-1, *some.shape[-dims - 1 :]), *sizes, samples_first=groups > 1)
        return _grouped(patches.unflatten(0, (some.shape[0], -1)), groups)  # of [n, b, c k, s]

    usual = "weight" not in use.sampled and input.numel() > 0
    grouped = torch.Size((math.prod(input.shape[:-dims]) // max(1, channels), channels, *input.shape[-dims:]))
    shared = usual and moment_pays(grouped, *sizes, input.device.type != "cpu")
    made = usual and math.prod(call.kernel) > 1
    positions = math.prod(
        size // step for size, step in zip(input.shape[-dims:], per_dimension(call.stride, dims), strict=True)
    )
    few = channels == 1 or (channels >= FEWEST_CHANNELS and channels * math.prod(weight.shape[-dims:]) <= positions)
    grouped_samples = made and groups == 1 and _samples_as_groups(call)
    outer = Outer(
        *(inputs, call.cotangent, weight.shape),
        sum_positions=True,
        moment=(lambda: patch_moment(call.images(channels), *sizes)) if shared else None,
        sums=(lambda: patch_sum(call.images(channels), *sizes)) if shared else None,
        part=inputs if made else None,
        instead=_as_groups(call, transposed=False) if usual and groups > 1 and few else None,
        alone=_as_groups(call, transposed=False) if grouped_samples else None,
    )
    return affine(outer, bias, behind=dims)


@rule(
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    arguments="input weight bias stride padding output_padding groups dilation",
    parameters="weight bias",
)
def conv_transpose(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, use: Use, **settings: Any) -> dict[str, Form]:
    """As `conv`, with the patches of the input that each position of the output sees; weight [c, o, *kernel]."""
    dims, shape = weight.ndim - 2 - ("weight" in use.sampled), weight.shape
    call = Call(input, shape, dims, **settings)
    kernel, stride, padding, more, groups = call.kernel, call.stride, call.padding, call.output_padding, call.groups

    def inputs() -> Tensor:
        patches = unfold_transpose(call.images(input.shape[-dims - 1]), kernel, stride, padding, more, call.dilation)
        return _grouped(patches.unflatten(0, (input.shape[0], -1)), groups)

    def arrange(result: Tensor) -> Tensor:  # [..., q, o, c k] to [..., q c, o, *kernel]
        result = result.unflatten(-1, (shape[0] // groups, -1)).transpose(-3, -2)
        return result.reshape(*result.shape[:-4], *shape)

    def patches_of_outputs(g: Tensor) -> Tensor:  # [v, n, *b, o, *space] to [v, n, q, (b s), o k]
        lead = g.shape[:2]
        patches = unfold(g.reshape(-1, *g.shape[-dims - 1 :]), kernel, stride, padding, call.dilation, samples_first=True)
        return _grouped(patches.unflatten(0, (*lead, -1)), groups)

    def inputs_alone() -> Tensor:
        return _grouped(input.reshape(input.shape[0], -1, input.shape[-dims - 1], math.prod(input.shape[-dims:])), groups)

    # the other way round, in which a convolution is the transpose of this one: patches of g meet entries of x
    instead: Outer | Direct = Outer(inputs_alone, patches_of_outputs, shape, inputs_first=True)
    # with more padding of outputs, which dilation allows, there are more patches of outputs than entries of x
    matches = all(p < s for p, s in zip(per_dimension(more, dims), per_dimension(stride, dims), strict=True))
    usual = matches and "weight" not in use.sampled and input.numel() > 0
    if usual and groups == shape[0] > 1:
        instead = _as_groups(call, transposed=True)
    dense = usual and set(per_dimension(call.dilation, dims)) == {1}
    moment = lambda: transposed_moment(call.images(shape[0] // groups), kernel, stride, padding, more)
    outer = Outer(
        *(inputs, call.cotangent, shape, arrange),
        sum_positions=True,
        moment=moment if dense else None,
        instead=instead if usual else None,
    )
    return affine(outer, bias, behind=dims)


def _grouped(t: Tensor, groups: int) -> Tensor:
    """[..., b, (q f), s] as [..., q, (b s), f]."""
    b, s = t.shape[-3], t.shape[-1]
    t = t.unflatten(-2, (groups, -1))  # [..., b, q, f, s]
    if b == 1:  # a view; the general case moves b beside s
        return t.squeeze(-4).mT
    return t.movedim(-4, -2).reshape(*t.shape[:-4], groups, t.shape[-2], b * s).mT


def _samples_as_groups(call: Call) -> bool:
    """Whether gradients of samples take less time as that of one convolution, which has them as groups, than from patches."""
    input, shape, dims = call.input, call.shape, call.dims
    eager_cpu = input.device.type == "cpu" and not torch.compiler.is_compiling() and torch.backends.mkldnn.is_available()
    if not eager_cpu or input.dtype != torch.float32 or dims != 2 or shape[1] < CHANNELS_OF_VECTORS:
        return False
    if input.shape[0] * shape.numel() * input.element_size() > forms.PATCHES_BYTES:  # all gradients are formed at once
        return False
    stride, dilation = per_dimension(call.stride, dims), per_dimension(call.dilation, dims)
    padded = zip(input.shape[-dims:], *paddings(call.padding, call.kernel, dilation), strict=True)
    steps = zip(padded, call.kernel, stride, dilation, strict=True)
    return math.prod((sum(size) - d * (k - 1) - 1) // t + 1 for size, k, t, d in steps) >= LEAST_POSITIONS * shape[0]


def _as_groups(call: Call, transposed: bool) -> Direct:
    """The use of a weight with few channels in a group, by gradients that need no patches.

    Those of all samples are one gradient, of a convolution that has the groups of each sample as its own.
    """
    input, shape, dims, groups = call.input, call.shape, call.dims, call.groups
    stride, dilation, output_padding = (per_dimension(a, dims) for a in (call.stride, call.dilation, call.output_padding))
    before, after = paddings(call.padding, shape[2:], dilation)

    def gradient(g: Tensor) -> Tensor:  # [v, n, *b, o, *space] to [v, n, *shape]
        n = input.shape[0]
        x = input.reshape(n, -1, *input.shape[-dims - 1 :]).transpose(0, 1).flatten(1, 2)  # [b, n c, *space]
        x, padded = x.to(torch.promote_types(x.dtype, g.dtype)), before
        if before != after:
            x = F.pad(x, [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair])
            padded = (0,) * dims
        weights = x.new_zeros(n * shape[0], *shape[1:])  # for their shape
        options: Any = (None, stride, padded, dilation, transposed, output_padding, n * groups, (False, True, False))
        g = g.reshape(*g.shape[:2], -1, *g.shape[-dims - 1 :]).transpose(1, 2).flatten(2, 3)  # [v, b, n o, *space]
        found = [torch.ops.aten.convolution_backward(column, x, weights, *options)[1] for column in g]
        return torch.stack(found).reshape(-1, n, *shape)

    return Direct(gradient, shape)
