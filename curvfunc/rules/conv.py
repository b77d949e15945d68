"""Convolutions of 1, 2 and 3 dimensions: a linear map of patches, z[n,s,o] = Σ_k W[o,k] x[n,s,k] + b[o]."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from curvfunc.forms import Direct, Form, Outer
from curvfunc.rules import Use, rule


@rule(
    F.conv1d,
    F.conv2d,
    F.conv3d,
    arguments="input weight bias stride padding dilation groups",
    parameters="weight bias",
)
def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    use: Use,
) -> dict[str, Form]:
    """x [n, *b, c, *space], g [v, n, *b, o, *space]; a batch axis b inside one sample joins the shared positions."""
    dims = weight.ndim - 2 - ("weight" in use.sampled)  # a weight that is data has its samples first

    def inputs() -> Tensor:
        x = input.reshape(-1, *input.shape[-dims - 1 :])
        patches = unfold(x, weight.shape[2:], stride, padding, dilation)  # [n b, c k, s]
        return _grouped(patches.unflatten(0, (input.shape[0], -1)), groups)

    def cotangent(g: Tensor) -> Tensor:
        return _grouped(g.reshape(*g.shape[:2], -1, g.shape[-dims - 1], math.prod(g.shape[-dims:])), groups)

    forms: dict[str, Form] = {"weight": Outer(inputs=inputs, cotangent=cotangent, shape=weight.shape, sum_positions=True)}
    if bias is not None:
        forms["bias"] = Direct(cotangent=lambda g: _sum_positions(g, dims), shape=bias.shape)
    return forms


@rule(
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    arguments="input weight bias stride padding output_padding groups dilation",
    parameters="weight bias",
)
def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    use: Use,
) -> dict[str, Form]:
    """As `conv`, with the patches of the input that each position of the output sees; weight [c, o, *kernel]."""
    dims, kernel = weight.ndim - 2 - ("weight" in use.sampled), weight.shape[2:]

    def inputs() -> Tensor:
        x = input.reshape(-1, *input.shape[-dims - 1 :])
        patches = unfold_transpose(x, kernel, stride, padding, output_padding, dilation)
        return _grouped(patches.unflatten(0, (input.shape[0], -1)), groups)

    def cotangent(g: Tensor) -> Tensor:
        return _grouped(g.reshape(*g.shape[:2], -1, g.shape[-dims - 1], math.prod(g.shape[-dims:])), groups)

    def arrange(result: Tensor) -> Tensor:  # [..., q, o, c k] to [..., q c, o, *kernel]
        result = result.unflatten(-1, (weight.shape[0] // groups, -1)).transpose(-3, -2)
        return result.reshape(*result.shape[:-4], *weight.shape)

    forms: dict[str, Form] = {"weight": Outer(inputs, cotangent, weight.shape, arrange, sum_positions=True)}
    if bias is not None:
        forms["bias"] = Direct(cotangent=lambda g: _sum_positions(g, dims), shape=bias.shape)
    return forms


def _grouped(t: Tensor, groups: int) -> Tensor:
    """[..., b, (q f), s] as [..., q, (b s), f]."""
    b, s = t.shape[-3], t.shape[-1]
    t = t.unflatten(-2, (groups, -1))  # [..., b, q, f, s]
    if b == 1:  # a view; the general case moves b beside s
        return t.squeeze(-4).mT
    return t.movedim(-4, -2).reshape(*t.shape[:-4], groups, t.shape[-2], b * s).mT


def _sum_positions(g: Tensor, dims: int) -> Tensor:
    """[v, n, *b, o, *space] to [v, n, o]."""
    g = g.flatten(-dims).sum(-1)
    return g.flatten(2, -2).sum(2) if g.ndim > 3 else g


def unfold(
    x: Tensor,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
) -> Tensor:
    """The patches that a convolution sees: [n, c, *space] to [n, c * prod(kernel), positions].

    A copy of strided views takes a fraction of the time of ``F.unfold``.
    """
    dims = len(kernel)
    stride, dilation = _tuple(stride, dims), _tuple(dilation, dims)
    before, after = _padding(padding, kernel, dilation)
    if math.prod(kernel) == 1 and not any(before) and not any(after):
        window = (slice(None), slice(None), *(slice(None, None, t) for t in stride))
        return x[window].flatten(2)
    if any(before) or any(after):
        x = F.pad(x, [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair])
    for d in range(dims):  # one strided view per dimension: [n, c, *space] -> [n, c, *positions, *kernel]
        x = x.unfold(2 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])[..., :: dilation[d]]
    # features, samples, positions in memory: neither sums over samples nor those of one sample need another copy
    x = x.permute(1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims))
    return x.flatten(0, dims).flatten(2).transpose(0, 1)


def unfold_transpose(
    x: Tensor,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> Tensor:
    """The patches that a transposed convolution sees: [n, c, *space] to [n, c * prod(kernel), positions].

    Output t is Σ_k w[k] y[t + padding - dilation k], y the input with stride - 1 zeros between its entries.
    """
    dims = len(kernel)
    stride, dilation = _tuple(stride, dims), _tuple(dilation, dims)
    padding, output_padding = _tuple(padding, dims), _tuple(output_padding, dims)
    pads: list[int] = []
    for d in range(dims):
        if stride[d] > 1:
            x = F.pad(x.unsqueeze(3 + d), [0, 0] * (dims - 1 - d) + [0, stride[d] - 1]).flatten(2 + d, 3 + d)
            x = x.narrow(2 + d, 0, x.shape[2 + d] - stride[d] + 1)
        reach = dilation[d] * (kernel[d] - 1)
        pads = [reach - padding[d], reach - padding[d] + output_padding[d], *pads]
    windows = unfold(F.pad(x, pads), kernel, 1, 0, dilation)
    windows = windows.unflatten(1, (x.shape[1], *kernel))
    return windows.flip(tuple(range(2, 2 + dims))).flatten(1, 1 + dims)


def _padding(
    padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding before and after each dimension; "same" puts an odd one after, as torch does."""
    if padding == "valid":
        before = after = (0,) * len(kernel)
    elif padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        before = tuple(t // 2 for t in total)
        after = tuple(t - t // 2 for t in total)
    else:
        before = after = _tuple(padding, len(kernel))  # type: ignore[arg-type]
    return before, after


def _tuple(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)
