"""Convolutions of 1, 2 and 3 dimensions: a linear map of patches, z[n,s,o] = Σ_k W[o,k] x[n,s,k] + b[o]."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvfunc.forms import Direct, Form, Outer
from curvfunc.pages import may_overwrite
from curvfunc.rules import Use, rule

# Patches that have fewer entries, and fewer products, than this are formed: products of rows take many small steps.
MOMENT_ENTRIES = 2**20
MOMENT_PRODUCTS = 2 * 10**8


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

    def inputs(samples: slice = slice(None)) -> Tensor:
        some = input[samples]
        flat = some.reshape(-1, *some.shape[-dims - 1 :])
        patches = unfold(flat, weight.shape[2:], stride, padding, dilation, samples_first=groups > 1)
        return _grouped(patches.unflatten(0, (some.shape[0], -1)), groups)  # of [n, b, c k, s]

    def cotangent(g: Tensor) -> Tensor:
        return _grouped(g.reshape(*g.shape[:2], -1, g.shape[-dims - 1], math.prod(g.shape[-dims:])), groups)

    channels = input.shape[-dims - 1] // groups

    def moment() -> Tensor:  # a group is as good as another sample
        x = input.reshape(-1, channels, *input.shape[-dims:])
        return patch_moment(x, weight.shape[2:], stride, padding, dilation)

    def gradient(g: Tensor) -> Tensor:
        x = input.reshape(input.shape[0], -1, *input.shape[-dims - 1 :]).to(torch.promote_types(input.dtype, g.dtype))
        g = g.reshape(*g.shape[:2], -1, *g.shape[-dims - 1 :])
        return depthwise_gradient(x, g, weight.shape, stride, padding, dilation)

    usual = "weight" not in use.sampled and input.numel() > 0
    grouped = torch.Size((input.shape[:-dims].numel() // max(1, channels), channels, *input.shape[-dims:]))
    shared = usual and moment_pays(grouped, weight.shape[2:], stride, padding, dilation)
    made = usual and math.prod(weight.shape[2:]) > 1
    outer = Outer(
        *(inputs, cotangent, weight.shape),
        sum_positions=True,
        moment=moment if shared else None,
        part=inputs if made else None,
        gradient=gradient if usual and channels == 1 < groups else None,
    )
    forms: dict[str, Form] = {"weight": outer}
    if bias is not None:
        forms["bias"] = Direct(lambda g: _sum_positions(g, dims), bias.shape, sums=outer)
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
    dims, shape, kernel = weight.ndim - 2 - ("weight" in use.sampled), weight.shape, weight.shape[2:]

    def inputs() -> Tensor:
        x = input.reshape(-1, *input.shape[-dims - 1 :])
        patches = unfold_transpose(x, kernel, stride, padding, output_padding, dilation)
        return _grouped(patches.unflatten(0, (input.shape[0], -1)), groups)

    def cotangent(g: Tensor) -> Tensor:
        return _grouped(g.reshape(*g.shape[:2], -1, g.shape[-dims - 1], math.prod(g.shape[-dims:])), groups)

    def arrange(result: Tensor) -> Tensor:  # [..., q, o, c k] to [..., q c, o, *kernel]
        result = result.unflatten(-1, (shape[0] // groups, -1)).transpose(-3, -2)
        return result.reshape(*result.shape[:-4], *shape)

    outer = Outer(inputs, cotangent, shape, arrange, sum_positions=True)
    forms: dict[str, Form] = {"weight": outer}
    if bias is not None:
        forms["bias"] = Direct(lambda g: _sum_positions(g, dims), bias.shape, sums=outer)
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
    samples_first: bool = False,
) -> Tensor:
    """The patches that a convolution sees: [n, c, *space] to [n, c * prod(kernel), positions].

    A copy of strided views takes a fraction of the time of ``F.unfold``. In memory, features come first, so that neither
    sums over samples nor those of one sample need another copy, or samples, so that products of groups need none.
    """
    dims = len(kernel)
    stride, dilation = _tuple(stride, dims), _tuple(dilation, dims)
    before, after = _padding(padding, kernel, dilation)
    if math.prod(kernel) == 1 and not any(before) and not any(after):
        window = (slice(None), slice(None), *(slice(None, None, t) for t in stride))
        return x[window].flatten(2)
    x = _windows(x, kernel, stride, before, after, dilation, 0)  # [n, c, *positions, *kernel]
    if samples_first:
        x = x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
        return x.flatten(1, 1 + dims).flatten(2)
    x = x.permute(1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims))
    return x.flatten(0, dims).flatten(2).transpose(0, 1)


def depthwise_gradient(
    x: Tensor,
    g: Tensor,
    shape: torch.Size,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
) -> Tensor:
    """Per-sample gradients of a convolution whose every output channel sees one channel of the input.

    Those of all samples are one gradient, of a convolution that has the channels of each sample as groups of their own.

    Args:
        x: Input [n, b, c, *space].
        g: Cotangents [v, n, b, o, *space] of the output.
        shape: Of the weight, [o, 1, *kernel].
        stride: Of the convolution.
        padding: Likewise.
        dilation: Likewise.

    Returns:
        [v, n, *shape].
    """
    dims, v, n, o = len(shape) - 2, *g.shape[:2], shape[0]
    stride, dilation = _tuple(stride, dims), _tuple(dilation, dims)
    before, after = _padding(padding, shape[2:], dilation)
    x = x.transpose(0, 1).flatten(1, 2)  # [b, n c, *space]
    if before != after:
        x, before = F.pad(x, [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]), (0,) * dims
    weights = x.new_zeros(()).expand(n * o, 1, *shape[2:])  # for their shape
    fixed: Any = (weights, None, stride, before, dilation, False, (0,) * dims, x.shape[1], (False, True, False))
    found = [torch.ops.aten.convolution_backward(h.transpose(0, 1).flatten(1, 2), x, *fixed)[1] for h in g]
    return torch.stack(found).reshape(v, n, *shape)


def _windows(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    dilation: Sequence[int],
    first: int,
) -> Tensor:
    """x [n, c, *space], padded, with an axis of the kernel behind for each dimension from ``first`` on: strided views."""
    if any(before) or any(after):
        x = F.pad(x, [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair])
    for d in range(first, len(kernel)):
        x = x.unfold(2 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])[..., :: dilation[d]]
    return x


def moment_pays(
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
) -> bool:
    """Whether `patch_moment` takes less time than patches and their products, for an input [..., c, *space]."""
    dims = len(kernel)
    stride, dilation = _tuple(stride, dims), _tuple(dilation, dims)
    if kernel[0] == 1 or stride[0] > 1 or dilation[0] > 1:
        return False
    before, after = _padding(padding, kernel, dilation)
    space = [size + b + a for size, b, a in zip(shape[-dims:], before, after, strict=True)]
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    positions = math.prod(shape[: -dims - 1]) * math.prod(
        max(0, (size - r) // t + 1) for size, r, t in zip(space, reach, stride, strict=True)
    )
    features = shape[-dims - 1] * math.prod(kernel)
    large = positions * features >= MOMENT_ENTRIES or positions * features**2 >= MOMENT_PRODUCTS
    return 2 * positions >= features and large


def patch_moment(
    x: Tensor,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
) -> Tensor:
    """Σ p pᵀ over the patches p of `unfold` and all samples, [c * prod(kernel), c * prod(kernel)].

    With stride 1 along the first dimension, the rows of a patch are rows r[h] of the input, and products of rows that are
    as far apart recur: block (i, j) of the result, of rows i and j of a patch, is Σ_h r[h + i] r[h + j]ᵀ over the positions
    h. All blocks with j - i = d are sums of the same r[h] r[h + d]ᵀ over windows of h, which have all but 2 (k - 1 - d) of
    them in common. That is about 1/k of the products, and patches are formed along the other dimensions only.
    """
    dims = len(kernel)
    stride, dilation = _tuple(stride, dims), _tuple(dilation, dims)
    before, after = _padding(padding, kernel, dilation)
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    x = _windows(x, kernel, stride, before, after, dilation, 1)  # [n, c, h, *positions, *kernel]
    x = x.permute(1, *range(2 + dims, 1 + 2 * dims), 2, 0, *range(3, 2 + dims))
    c, k, height = x.shape[0], kernel[0], x.shape[dims]
    rows = x.flatten(0, dims - 1).flatten(2)  # [c * other kernel dimensions, h, n * other positions]
    windows = height - k + 1
    blocks = {}
    for d in range(k):
        found = _window_sums(rows, d, k, windows)  # [k - d, f, f]
        for i, block in enumerate(found.unflatten(2, (c, -1)).unflatten(1, (c, -1))):
            blocks[i, i + d] = block
            blocks[i + d, i] = block.permute(2, 3, 0, 1) if d else block
    if not may_overwrite() or torch.compiler.is_compiling():
        rows_of_blocks = [torch.stack([blocks[i, j] for j in range(k)], dim=3) for i in range(k)]  # [c, f, c, k, f]
        return torch.stack(rows_of_blocks, dim=1).flatten(3).flatten(0, 2)
    f = len(rows) // c
    result = rows.new_empty(c, k, f, c, k, f)
    for (i, j), block in blocks.items():
        result[:, i, :, :, j] = block
    return result.view(c * k * f, c * k * f)


def _window_sums(rows: Tensor, d: int, k: int, windows: int) -> Tensor:
    """Σ_h rows[:, h + i] rows[:, h + i + d]ᵀ over ``windows`` positions h, for i = 0 ... k - 1 - d: [k - d, f, f]."""
    first, last = k - 1 - d, windows  # from first to last, all windows have the products in common
    parts = []
    if last > first:
        parts.append((rows[:, first:last].flatten(1) @ rows[:, first + d : last + d].flatten(1).mT).unsqueeze(0))
    if first == 0:
        return parts[0]
    ends = [h for h in range(windows + first) if not first <= h < last]
    parts.append(torch.stack([rows[:, h] @ rows[:, h + d].mT for h in ends]))
    counts = [[1.0] * (last > first) + [float(i <= h < i + windows) for h in ends] for i in range(k - d)]
    products = torch.cat(parts)
    return (rows.new_tensor(counts) @ products.flatten(1)).view(-1, *products.shape[1:])


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
