"""Patches of convolutions, and their second moments."""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from curvfunc.tensors.pages import may_overwrite
from curvfunc.tensors.precision import at_least_float32
from curvfunc.tensors.sizes import hint
from curvfunc.uses.second_moments import second_moment

__all__ = [
    "moment_pays",
    "paddings",
    "patch_moment",
    "patch_sum",
    "per_dimension",
    "transposed_moment",
    "unfold",
    "unfold_transpose",
]

# Patches that have fewer entries, and fewer products, than this are formed: products of rows take many small steps.
MOMENT_ENTRIES = 2**20
MOMENT_PRODUCTS = 2 * 10**8
# On a GPU a small step takes no less than its launch, some 10 μs, in which it could do 3 * 10**8 products.
MOMENT_PRODUCTS_ON_GPU = 10**11


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
    stride, dilation = per_dimension(stride, dims), per_dimension(dilation, dims)
    before, after = paddings(padding, kernel, dilation)
    if math.prod(kernel) == 1 and not any(before) and not any(after):
        window = (slice(None), slice(None), *(slice(None, None, t) for t in stride))
        return x[window].flatten(2)
    x = _windows(x, kernel, stride, before, after, dilation, 0)  # [n, c, *positions, *kernel]
    if samples_first:
        x = x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
        return x.flatten(1, 1 + dims).flatten(2)
    x = x.permute(1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims))
    return x.flatten(0, dims).flatten(2).transpose(0, 1)


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
    on_gpu: bool = False,
) -> bool:
    """Whether `patch_moment` takes less time than patches and their products, for an input [..., c, *space]."""
    dims = len(kernel)
    stride, dilation = per_dimension(stride, dims), per_dimension(dilation, dims)
    if kernel[0] == 1 or stride[0] > 1 or dilation[0] > 1:
        return False
    before, after = paddings(padding, kernel, dilation)
    space = [size + b + a for size, b, a in zip(shape[-dims:], before, after, strict=True)]
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    positions = hint(math.prod(shape[: -dims - 1])) * math.prod(
        max(0, (hint(size) - r) // t + 1) for size, r, t in zip(space, reach, stride, strict=True)
    )
    features = shape[-dims - 1] * math.prod(kernel)
    products = positions * features**2
    if on_gpu:
        return 2 * positions >= features and products >= MOMENT_PRODUCTS_ON_GPU
    return 2 * positions >= features and (positions * features >= MOMENT_ENTRIES or products >= MOMENT_PRODUCTS)


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
    stride, dilation = per_dimension(stride, dims), per_dimension(dilation, dims)
    before, after = paddings(padding, kernel, dilation)
    x = at_least_float32(x)
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


def patch_sum(
    x: Tensor,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
) -> Tensor:
    """Σ p over the patches p of `unfold` and all samples, [c * prod(kernel)]: those of the samples' sum."""
    return unfold(at_least_float32(x).sum(0, keepdim=True), kernel, stride, padding, dilation)[0].sum(-1)


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
    h = torch.arange(windows + first, device=rows.device)  # counts are made on the device: a copy would make it wait
    starts = torch.arange(k - d, device=rows.device)[:, None]
    counts = ((starts <= h) & (h < starts + windows)).to(rows.dtype)
    if last > first:  # all of the middle as one
        counts = torch.cat([counts[:, first : first + 1], counts[:, :first], counts[:, last:]], dim=1)
    products = torch.cat(parts)
    return (counts @ products.flatten(1)).view(-1, *products.shape[1:])


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
    stride, dilation = per_dimension(stride, dims), per_dimension(dilation, dims)
    padding, output_padding = per_dimension(padding, dims), per_dimension(output_padding, dims)
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


def transposed_moment(
    x: Tensor,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
) -> Tensor:
    """Σ p pᵀ over the patches p of `unfold_transpose` and all samples, [c * prod(kernel), c * prod(kernel)].

    Output t sees input τ - j through entry ρ + stride j of the kernel, with t + padding = ρ + stride τ. Outputs with the same
    remainder ρ see the same entries, and the patches of dense convolutions: zeros between inputs are never multiplied.
    """
    dims, c, x = len(kernel), x.shape[1], at_least_float32(x)
    stride, padding, output_padding = (per_dimension(a, dims) for a in (stride, padding, output_padding))
    phases = []
    for d in range(dims):
        size = (x.shape[2 + d] - 1) * stride[d] - 2 * padding[d] + kernel[d] + output_padding[d]
        phases.append([_phase(r, kernel[d], stride[d], padding[d], x.shape[2 + d], size) for r in range(stride[d])])
    features = torch.arange(c * math.prod(kernel), device=x.device).view(c, *kernel)
    result = x.new_zeros(features.numel(), features.numel())
    for phase in itertools.product(*phases):
        entries, pads = [e for e, _ in phase], [p for _, pad in reversed(phase) for p in pad]
        if not all(entries):
            continue
        inputs, inner = F.pad(x, pads), [len(e) for e in entries]
        if moment_pays(inputs.shape, inner, 1, 0, 1, inputs.device.type != "cpu"):
            block = patch_moment(inputs, inner, 1, 0, 1)
        else:
            block = second_moment(unfold(inputs, inner, 1, 0, 1).transpose(0, 1).flatten(1))
        seen = features
        for d, some in enumerate(entries):
            step = some[0] - some[1] if len(some) > 1 else 1
            seen = seen.index_select(1 + d, torch.arange(some[0], some[-1] - 1, -step, device=x.device))
        rows = seen.flatten()
        result = result.index_put((rows.unsqueeze(1), rows), block)
    return result


def _phase(
    remainder: int, kernel: int, stride: int, padding: int, inputs: int, outputs: int
) -> tuple[list[int], tuple[int, int]]:
    """For outputs of that remainder in one dimension: entries of the kernel, the last first, and padding of the inputs."""
    entries = [*range(remainder, kernel, stride)][::-1]
    first, last = -((remainder - padding) // stride), (outputs - 1 + padding - remainder) // stride  # τ
    return ([] if last < first else entries), (len(entries) - 1 - first, last - inputs + 1)


def paddings(
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
        before = after = per_dimension(padding, len(kernel))  # type: ignore[arg-type]
    return before, after


def per_dimension(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """An argument of a convolution that may be one number for all dimensions."""
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)
