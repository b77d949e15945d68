"""The sample axis: every claim is checked by perturbing one sample, and two lists say what is proven and what is not.

Sizes are chosen alike on purpose: a wrong axis has the right size here.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvfunc.rules.batch_axis import RULES, mutates, propagate

N = 4
torch.set_num_threads(1)


class Tracker(TorchFunctionMode):
    """Carries sample axes by ``propagate``; "mixed" once a proof is lost."""

    def __init__(self):
        super().__init__()
        self.axes, self.keep = {}, []

    def mark(self, t, axis):
        self.axes[id(t)] = axis
        self.keep.append(t)

    def axis(self, t):
        return self.axes.get(id(t))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        axes = [self.axis(t) for t in tensors]
        out = func(*args, **kwargs)
        if all(a is None for a in axes):
            return out
        claim = None
        result = args[0] if mutates(func) else out
        if "mixed" not in axes:
            claim = propagate(func, args, kwargs, result, self.axis)
        outs = as_list(result)
        for o, axis in zip(outs, claim if isinstance(claim, tuple) else [claim] * len(outs), strict=True):
            if isinstance(o, Tensor):
                self.mark(o, "mixed" if axis is None else axis)
        return out


def claimed(fn, inputs, axes):
    """(Output, claimed axis) pairs of ``fn(*inputs)``; the axis is None where nothing is proven."""
    tracker = Tracker()
    copies = [t.clone() for t in inputs]
    for t, axis in zip(copies, axes, strict=True):
        if axis is not None:
            tracker.mark(t, axis)
    torch.manual_seed(0)
    with tracker:
        out = fn(*copies)
    pairs = [(o.detach().clone(), tracker.axis(o)) for o in as_list(out)]
    return [(o, None if axis == "mixed" else axis) for o, axis in pairs]


def as_list(out):
    return list(out) if isinstance(out, (tuple, list)) else [out]


def other_values(t, generator):
    if t.dtype == torch.bool:
        return ~t
    if t.is_floating_point():
        return torch.rand(t.shape, generator=generator, dtype=t.dtype) * 0.8 + 0.1
    return (t + 1) % 3


def assert_sound(fn, inputs, axes):
    """Where an axis is claimed, other values for sample n change the output at n only. Returns the claims."""
    pairs = claimed(fn, inputs, axes)
    if all(axis is None for _, axis in pairs):
        return [None] * len(pairs)
    n = next(t.shape[a] for t, a in zip(inputs, axes, strict=True) if a is not None)
    generator = torch.Generator().manual_seed(1)
    for i in range(n):
        changed = []
        for t, axis in zip(inputs, axes, strict=True):
            t = t.clone()
            if axis is not None:
                t.select(axis, i).copy_(other_values(t.select(axis, i), generator))
            changed.append(t)
        torch.manual_seed(0)
        for (before, axis), after in zip(pairs, as_list(fn(*changed)), strict=True):
            if axis is None:
                continue
            assert before.shape[axis] == n
            others = [k for k in range(n) if k != i]
            rest = [t.index_select(axis, torch.tensor(others, dtype=torch.long)) for t in (before, after)]
            torch.testing.assert_close(rest[0], rest[1], rtol=1e-12, atol=1e-12, equal_nan=True)
    return [axis for _, axis in pairs]


def x(*shape):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.8 + 0.1


def ints(*shape):
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(3))


def c(*shape):
    """A constant, closed over by a call."""
    return x(*shape)


X2, X3, X4, X5 = x(N, N), x(N, N, N), x(N, N, N, N), x(N, N, N, N, N)
IDX = torch.tensor([2, 0, 1, 1])

# (call, inputs, axes of the inputs, axis of the output)
PROVEN = {}


def proven(name, fn, inputs, axes, want):
    assert name not in PROVEN, name
    PROVEN[name] = (fn, inputs, axes, want)


UNARY = {
    "torch": "relu abs exp sigmoid tanh erf sin cos sqrt rsqrt square neg round sign log log1p clone detach selu "
    "logical_not isnan zeros_like ones_like bernoulli resolve_conj threshold rrelu",
    "tensor": "relu relu_ abs exp exp_ sigmoid sigmoid_ tanh tanh_ sin_ clone contiguous detach float double half "
    "bfloat16 neg_ sqrt_ reciprocal requires_grad_ zero_ normal_ clamp_",
    "F": "relu relu_ relu6 elu elu_ selu selu_ celu gelu silu mish leaky_relu leaky_relu_ hardtanh hardtanh_ softplus "
    "softsign hardswish hardsigmoid hardshrink softshrink tanhshrink logsigmoid sigmoid tanh dropout alpha_dropout "
    "rrelu rrelu_ feature_alpha_dropout dropout1d",
    "special": "expit erf exp2 log1p sinc i0 logit entr",
}
EXTRA = {"threshold": (0.1, 0.0), "threshold_": (0.1, 0.0), "clamp_": (0.2, 0.5)}
for space, names in UNARY.items():
    for name, axis in itertools.product(names.split(), (0, 2)):
        func = getattr({"torch": torch, "tensor": Tensor, "F": F, "special": torch.special}[space], name)
        extra = EXTRA.get(name, ())
        proven(f"{space}.{name}-{axis}", lambda a, func=func, extra=extra: func(a, *extra), [X3], [axis], axis)

BINARY = {
    "add": torch.add,
    "radd": lambda a, b: b + a,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: torch.rsub(a, b),
    "mul": Tensor.mul,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "maximum": torch.maximum,
    "max": torch.max,
    "min": torch.min,
    "gt": lambda a, b: a > b,
    "le": torch.le,
    "eq": lambda a, b: a == b,
    "ne": Tensor.ne,
    "atan2": torch.atan2,
    "and": lambda a, b: (a > 0.5) & (b > 0.5),
    "xlogy": torch.special.xlogy,
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "where": lambda a, b: torch.where(a > b, a, b),
    "addcmul": lambda a, b: torch.addcmul(a, b, b),
    "clamp": lambda a, b: a.clamp(min=b),
    "kwarg": lambda a, b: torch.add(a, other=b),
    "input": lambda a, b: torch.mul(input=a, other=b),
    "masked_fill": lambda a, b: a.masked_fill(b > 0.5, 0.0),
    "logaddexp": torch.logaddexp,
    "hypot": Tensor.hypot,
    "isub": lambda a, b: a.add(0).sub_(b),
    "iadd": Tensor.__iadd__,
    "imul": Tensor.__imul__,
    "copy_": Tensor.copy_,
    "masked_fill_": lambda a, b: a.masked_fill_(b > 0.5, 0.0),
    "dunder": Tensor.__radd__,
    "rpow": Tensor.__rpow__,
    "rtruediv": Tensor.__rtruediv__,
    "complex": torch.complex,
}
for name, func in BINARY.items():
    proven(f"{name}-both", func, [X3, X3 * 0.7], [1, 1], 1)
    proven(f"{name}-right", func, [X3, X2 * 0.7], [2, 1], 2)
    proven(f"{name}-constant", func, [X3, X3 * 0.7], [1, None], 1)
    proven(f"{name}-row", func, [X3, x(N)], [0, None], 0)

for name, fn, want in [
    ("number", lambda a: 1 - 2 * a, 1),
    ("reverse", lambda a: 2**a + 3 / a + (1 - a), 1),
    ("invert", lambda a: ~(a > 0.5), 1),
    ("to", lambda a: a.to(torch.float32), 1),
    ("to-like", lambda a: a.to(c(2)), 1),
    ("type_as", lambda a: a.type_as(c(2)), 1),
    ("type", lambda a: a.type(torch.float32), 1),
    ("inplace-relu", lambda a: F.relu(a, inplace=True), 1),
    ("prelu", lambda a: F.prelu(a, c(N)), 1),
    ("inplace-dropout", lambda a: F.dropout(a, 0.5, True, True), 1),
    ("normalize", lambda a: F.normalize(a, dim=-1), 1),
    ("glu", F.glu, 1),
    ("softmax", lambda a: a.softmax(-1), 1),
    ("log_softmax", lambda a: F.log_softmax(a, dim=2), 1),
    ("special-softmax", lambda a: torch.special.softmax(a, 0), 1),
    ("softmin", lambda a: F.softmin(a, dim=0), 1),
    ("gumbel", lambda a: F.gumbel_softmax(a, dim=-1), 1),
    ("axis-name", lambda a: torch.softmax(a, axis=0), 1),
    ("tril", lambda a: a.movedim(1, 0).tril(), 0),
    ("one_hot", lambda a: F.one_hot((a > 0.5).long(), 2), 1),
    ("fft", lambda a: torch.fft.fft(a).abs(), 1),
    ("rfft2", lambda a: torch.fft.rfft2(a, dim=(0, 2)).abs(), 1),
    ("bucketize", lambda a: torch.bucketize(a, c(3).sort()[0]), 1),
    # reductions
    ("sum", lambda a: a.sum(0), 0),
    ("sum-keep", lambda a: a.sum(0, keepdim=True), 1),
    ("mean", lambda a: torch.mean(a, (0, 2)), 0),
    ("mean-axis", lambda a: a.mean(axis=-1), 1),
    ("amax", lambda a: a.amax(-1), 1),
    ("prod", lambda a: a.prod(0), 0),
    ("var", lambda a: a.var(-1, keepdim=True), 1),
    ("std", lambda a: torch.std(a, 0), 0),
    ("norm", lambda a: a.norm(dim=0), 0),
    ("torch-norm", lambda a: torch.norm(a, dim=2), 1),
    ("linalg-norm", lambda a: torch.linalg.norm(a, dim=0), 0),
    ("vector-norm", lambda a: torch.linalg.vector_norm(a, dim=(0, -1)), 0),
    ("argmax", lambda a: a.argmax(0), 0),
    ("matrix-norm", lambda a: torch.linalg.matrix_norm(a, dim=(0, 2)), 0),
    ("logsumexp", lambda a: a.logsumexp(0), 0),
    ("special-logsumexp", lambda a: torch.special.logsumexp(a, 2), 1),
    ("any", lambda a: (a > 0.5).any(0), 0),
    ("max", lambda a: a.max(0), (0, 0)),
    ("min", lambda a: torch.min(a, dim=2, keepdim=True), (1, 1)),
    ("median", lambda a: a.median(0), (0, 0)),
    ("var_mean", lambda a: torch.var_mean(a, dim=[0, 2]), (0, 0)),
    ("kthvalue", lambda a: a.kthvalue(2), (1, 1)),
    ("cumsum", lambda a: a.cumsum(0), 1),
    ("cumprod", lambda a: torch.cumprod(a, dim=-1), 1),
    ("cummax", lambda a: a.cummax(0), (1, 1)),
    ("sort", lambda a: a.sort(), (1, 1)),
    ("sort-dim", lambda a: torch.sort(a, dim=0, descending=True), (1, 1)),
    ("argsort", lambda a: a.argsort(0), 1),
    ("topk", lambda a: a.topk(2), (1, 1)),
    ("diff", lambda a: a.diff(), 1),
    # shapes
    ("flatten", lambda a: a.transpose(0, 1).flatten(1), 0),
    ("flatten-end", lambda a: a[None].flatten(0, 1), 1),
    ("unflatten", lambda a: a.unflatten(0, (2, 2)), 2),
    ("unflatten-last", lambda a: a.unflatten(-1, (2, -1)), 1),
    ("view", lambda a: a.view(2, 2, N, N), 2),
    ("reshape", lambda a: torch.reshape(a, (N, N, 2, 2)), 1),
    ("view_as", lambda a: a.view_as(c(2, 2, N, N)), 2),
    ("expand", lambda a: a.expand(3, -1, -1, -1), 2),
    ("expand_as", lambda a: a[:1].expand_as(a), 1),
    ("expand_as-constant", lambda a: c(1, N).expand_as(a), 1),
    ("expand_as-constant-row", lambda a: c(N).expand_as(a), 1),
    ("broadcast_to", lambda a: torch.broadcast_to(a, (2, N, N, N)), 2),
    ("repeat", lambda a: a.repeat(2, 3, 1, 2), 2),
    ("tile", lambda a: torch.tile(a, (2,)), 1),
    ("squeeze", lambda a: a[:1].squeeze(0), 0),
    ("unsqueeze", lambda a: a.unsqueeze(1), 2),
    ("unsqueeze-end", lambda a: torch.unsqueeze(a, -1), 1),
    ("permute", lambda a: a.permute(1, 2, 0), 0),
    ("permute-list", lambda a: torch.permute(a, (2, 0, 1)), 2),
    ("transpose", lambda a: a.transpose(0, 1), 0),
    ("swapaxes", lambda a: torch.swapaxes(a, axis0=1, axis1=2), 2),
    ("swapdims", lambda a: a.swapdims(-1, 0), 1),
    ("movedim", lambda a: a.movedim(1, -1), 2),
    ("moveaxis", lambda a: a.moveaxis(0, 2), 0),
    ("movedim-several", lambda a: torch.movedim(a, (0, 1), (1, 2)), 2),
    ("mT", lambda a: a.mT, 2),
    ("mH", lambda a: a.mH, 2),
    ("T", lambda a: a[:, :, 0].T, 0),
    ("t", lambda a: a[0].t(), 1),
    ("adjoint", lambda a: a.adjoint(), 2),
    ("chunk", lambda a: a.chunk(2, -1), (1, 1)),
    ("split", lambda a: a.split([1, 3]), (1, 1)),
    ("torch-split", lambda a: torch.split(a, 2, dim=2), (1, 1)),
    ("tensor_split", lambda a: a.tensor_split(2, dim=0), (1, 1)),
    ("unbind", lambda a: a.unbind(), (0,) * N),
    ("unbind-last", lambda a: torch.unbind(a, -1), (1,) * N),
    ("narrow", lambda a: a.narrow(0, 1, 2), 1),
    ("select", lambda a: a.select(0, -1), 0),
    ("index_select", lambda a: a.index_select(2, IDX), 1),
    ("roll", lambda a: torch.roll(a, (1, 2), (0, -1)), 1),
    ("flip", lambda a: a.flip(0, 2), 1),
    ("repeat_interleave", lambda a: a.repeat_interleave(2, dim=0), 1),
    ("tensor-unfold", lambda a: a.unfold(2, 2, 1), 1),
    ("gather-constant", lambda a: a.gather(2, ints(N, N, N)), 1),
    ("iterate", lambda a: list(a), (0,) * N),
    # indexing
    ("int", lambda a: a[1], 0),
    ("slice", lambda a: a[1:3], 1),
    ("ellipsis", lambda a: a[..., -1], 1),
    ("none", lambda a: a[:, None], 2),
    ("cls", lambda a: a[:, :, 0], 1),
    ("mixed-index", lambda a: a[None, 0, ..., None, ::2], 1),
    ("full-range", lambda a: a[:, 0:N], 1),
    ("tensor-index", lambda a: a[IDX], 1),
    ("matrix-index", lambda a: a[:, :, IDX.view(2, 2)], 1),
    ("list-index", lambda a: a[..., [0, 2]], 1),
    ("matrix-in-front", lambda a: a[IDX.view(2, 2)], 2),
    ("neighbours", lambda a: a.movedim(1, 0)[:, IDX, IDX.view(4, 1)], 0),
    ("setitem-constant", lambda a: (a.__setitem__((0, 0), 1.0), a)[1], 1),
    ("setitem-mask", lambda a: (a.__setitem__(a > 0.5, 0.0), a)[1], 1),
    ("setitem", lambda a: (a.__setitem__((slice(1, 2), slice(None), 0), a[1:2, :, 1]), a)[1], 1),
    ("cat", lambda a: torch.cat([a, 2 * a], -1), 1),
    ("cat-constant", lambda a: torch.cat([c(2, N, N), a]), 1),
    ("cat-kwargs", lambda a: torch.cat(tensors=(a, a), dim=0), 1),
    ("concat", lambda a: torch.concat((a, a), axis=0), 1),
    ("stack", lambda a: torch.stack([a, a], 1), 2),
    ("stack-last", lambda a: torch.stack([a, c(N, N, N)], -1), 1),
    ("scatter", lambda a: torch.zeros(N, N, N, dtype=a.dtype).scatter(2, a.topk(2)[1], a.topk(2)[0]), 1),
    ("scatter_", lambda a: torch.zeros_like(a).scatter_(-1, a.argsort(-1), a), 1),
    ("new_zeros", lambda a: a[0].new_zeros(N, 3), 0),
    # layers
    ("linear", lambda a: F.linear(a, c(3, N), c(3)), 1),
    ("linear-kw", lambda a: F.linear(input=a, weight=c(3, N)), 1),
    ("layer_norm", lambda a: F.layer_norm(a, (N,)), 1),
    ("rms_norm", lambda a: F.rms_norm(a, [N], c(N)), 1),
    ("interpolate", lambda a: F.interpolate(a, scale_factor=2), 1),
    ("pad", lambda a: F.pad(a, (1, 2)), 1),
    ("pad-zero", lambda a: F.pad(a, (1, 2, 0, 0, 1, -1)), 1),
    ("bilinear", lambda a: F.bilinear(a, a, c(2, N, N)), 1),
    ("pool-unbatched", lambda a: F.max_pool1d(a, 2), 1),
    # products
    ("matmul", lambda a: a @ c(N, 3), 1),
    ("matmul-left", lambda a: c(3, N) @ a.mT, 2),
    ("matmul-batch", lambda a: a.transpose(0, 1) @ a.permute(1, 2, 0), 0),
    ("rmatmul", lambda a: a.mT.__rmatmul__(c(N, N)), 2),
    ("matmul-vector", lambda a: a @ c(N), 1),
    ("mm", lambda a: torch.mm(a[0], c(N, 2)), 0),
    ("mv", lambda a: a[0].mv(c(N)), 0),
    ("bmm", lambda a: torch.bmm(a.transpose(0, 1), c(N, N, 2)), 0),
    ("addmm", lambda a: torch.addmm(c(3), a[0], c(N, 3)), 0),
    ("addmm-bias", lambda a: torch.addmm(a[0], a[1], c(N, N)), 0),
    ("baddbmm", lambda a: torch.baddbmm(c(N, 1, 1), a.movedim(1, 0), a.movedim(1, 0)), 0),
    ("vector-matmul", lambda a: c(N) @ a.movedim(1, 0), 0),
    ("einsum", lambda a: torch.einsum("tnd,de->nte", a, c(N, N)), 0),
    ("einsum-ellipsis", lambda a: torch.einsum("...d,de->...e", a, c(N, N)), 1),
    ("einsum-two", lambda a: torch.einsum("t n d, t n e -> n d e", a, a), 0),
    ("einsum-const", lambda a: torch.einsum("tnd,n->dtn", a, c(N)), 2),
    ("einsum-list", lambda a: torch.einsum("tnd->nd", [a]), 0),
    ("einsum-middle", lambda a: torch.einsum("t...d,s...->s...d", a, c(2, 1)), 1),
    ("cosine", lambda a: F.cosine_similarity(a, c(N), dim=-1), 1),
    ("cosine-first", lambda a: F.cosine_similarity(a, a * 2, dim=0), 0),
    ("pairwise", lambda a: F.pairwise_distance(a, 2 * a), 1),
    ("pairwise-keep", lambda a: F.pairwise_distance(a, c(N, N), keepdim=True), 1),
]:
    proven(f"middle-{name}", fn, [X3], [1], want)

for name, fn in [
    *((f"conv{k}d", lambda a, k=k: getattr(F, f"conv{k}d")(a, c(2, N, *[2] * k), c(2))) for k in (1, 2, 3)),
    *((f"conv_transpose{k}d", lambda a, k=k: getattr(F, f"conv_transpose{k}d")(a, c(N, 2, *[2] * k))) for k in (1, 2, 3)),
    *((f"avg_pool{k}d", lambda a, k=k: getattr(F, f"avg_pool{k}d")(a, 2)) for k in (1, 2, 3)),
    *((f"adaptive_avg_pool{k}d", lambda a, k=k: getattr(F, f"adaptive_avg_pool{k}d")(a, 2)) for k in (1, 2, 3)),
    *((f"lp_pool{k}d", lambda a, k=k: getattr(F, f"lp_pool{k}d")(a, 2.0, 2)) for k in (1, 2, 3)),
    *((f"max_pool{k}d", lambda a, k=k: getattr(F, f"max_pool{k}d")(a, 2)) for k in (1, 2, 3)),
    *((f"max_pool{k}d-indices", lambda a, k=k: getattr(F, f"max_pool{k}d")(a, 2, return_indices=True)) for k in (1, 2, 3)),
    *((f"adaptive_max_pool{k}d", lambda a, k=k: getattr(F, f"adaptive_max_pool{k}d")(a, 2)) for k in (1, 2, 3)),
    *(
        (
            f"adaptive_max_pool{k}d-indices",
            lambda a, k=k: getattr(F, f"adaptive_max_pool{k}d")(a, 2, return_indices=True),
        )
        for k in (1, 2, 3)
    ),
    ("batch_norm2d", lambda a: F.batch_norm(a, c(N), c(N), c(N), c(N))),
    ("instance_norm2d", F.instance_norm),
    ("group_norm2d", lambda a: F.group_norm(a, 2, c(N), c(N))),
    ("local_response_norm2d", lambda a: F.local_response_norm(a, 2)),
    ("unfold2d", lambda a: F.unfold(a, 2)),
    ("fold1d", lambda a: F.fold(a, (3, 3), 2)[:, :, :2]),
    ("pixel_shuffle2d", lambda a: F.pixel_shuffle(a, 2)),
    ("pixel_unshuffle2d", lambda a: F.pixel_unshuffle(a, 2)),
    ("channel_shuffle2d", lambda a: F.channel_shuffle(a, 2)),
    ("interpolate2d", lambda a: F.interpolate(a, size=(2, 3), mode="bilinear")),
    ("pad2d", lambda a: F.pad(a, (1, 1, 1, 1), mode="reflect")),
    ("dropout2d", F.dropout2d),
    ("dropout3d", F.dropout3d),
    (
        "module2d",
        torch.nn.Sequential(
            torch.nn.Conv2d(N, 4, 1),
            torch.nn.ReLU(True),
            torch.nn.GroupNorm(2, 4),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(4, 2),
        ).double(),
    ),
]:
    sample = X3 if "1d" in name else X5 if "3d" in name else X4
    proven(f"layer-{name}", fn, [sample], [0], (0, 0) if "indices" in name else 0)

TABLE = c(3, 5)
SELF = lambda q, k, v: F.scaled_dot_product_attention(q, k, v)
for name, fn, inputs, axes, want in [
    ("embedding", lambda i: F.embedding(i, TABLE), [ints(N, N)], [1], 1),
    ("lookup", lambda i: TABLE[i], [ints(N, N)], [1], 1),
    ("lookup-second", lambda i: c(2, 3, 5)[:, i], [ints(N, N)], [0], 1),
    ("embedding_bag", lambda i: F.embedding_bag(i, TABLE), [ints(N, N)], [0], 0),
    ("gather", lambda a, i: a.gather(1, i), [X3, ints(N, N, N)], [0, 0], 0),
    ("gather-table", lambda i: torch.gather(c(N, N), 0, i), [ints(2, N)], [1], 1),
    ("where-mask", lambda m, a: torch.where(m, a, 0.0), [X3 > 0.5, X3], [0, 0], 0),
    ("attention", SELF, [X4, X4, X4], [0, 0, 0], 0),
    (
        "attention-mask",
        lambda q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=m),
        [X4, X4[:, :1] > 0.3],
        [0, 0],
        0,
    ),
    ("attention-constant-kv", lambda q: F.scaled_dot_product_attention(q, c(N, 2, N), c(N, 2, N)), [X4], [0], 0),
    ("attention-causal", lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), [X4], [1], 1),
    (
        "attention-gqa",
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
        [X4, X4[:, :2]],
        [0, 0],
        0,
    ),
    ("gating", lambda a, g: (a * g.softmax(-1)[:, None]).sum(-1), [X3, X2], [0, 0], 0),
    ("siamese", lambda a, b: F.cosine_similarity(a, b), [X2, 1 - X2], [0, 0], 0),
    (
        "lstm-cell",
        lambda h, z: torch.tanh(F.linear(h, c(8, N)) + F.linear(z, c(8, N))).chunk(2, 1)[0],
        [X2, 1 - X2],
        [0, 0],
        0,
    ),
    ("cross-attention", lambda q, k: (q @ k.mT).softmax(-1) @ k, [X3, X3[:, :2]], [0, 0], 0),
    ("setitem-tagged", lambda a, b: (a.__setitem__((slice(None), 0), b), a)[1], [X3, X2], [0, 0], 0),
    ("one-sample-view", lambda a: a.view(1, 6), [x(1, 2, 3)], [0], 0),
    ("one-sample-sequence", lambda a: a.reshape(7, 1, 3, 2), [x(7, 1, 6)], [1], 1),
]:
    proven(name, fn, inputs, axes, want)


def window_attention(a):
    """Swin's rearrangement, the windows beside the samples and not folded into them. [n, 4, 4, 4]."""
    windows = a.roll((1, 1), (1, 2)).view(N, 2, 2, 2, 2, N).permute(0, 1, 3, 2, 4, 5).reshape(N, 4, 4, N)
    q, k, v = F.linear(windows, c(3 * N, N)).view(N, 4, 4, 3, 2, 2).permute(3, 0, 1, 4, 2, 5).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(3)


def vision_transformer(a):
    z = F.conv2d(a, c(N, N, 2, 2), stride=2).flatten(2).transpose(1, 2)
    z = torch.cat([c(1, 1, N).expand(z.shape[0], -1, -1), z], dim=1) + c(1, 5, N)
    z = z + F.gelu(F.linear(F.layer_norm(z, (N,)), c(N, N)))
    return F.linear(z[:, 0], c(3, N))


def sequence_first(a):
    """[t, n, d], with t = n = d."""
    h = torch.zeros(N, N, dtype=a.dtype)
    states = []
    for step in a:
        i, f, g, o = (F.linear(step, c(4 * N, N)) + F.linear(h, c(4 * N, N))).chunk(4, 1)
        h = torch.sigmoid(o) * torch.tanh(torch.sigmoid(f) * h + torch.sigmoid(i) * torch.tanh(g))
        states.append(h)
    return torch.stack(states)


def fourier_field(a):
    z = 2 * math.pi * a[..., None] * 2 ** torch.arange(3, dtype=a.dtype)
    return F.linear(torch.cat([z.sin(), z.cos()], -1).flatten(1), c(2, 6 * N))


proven("windows", window_attention, [X4], [0], 0)
proven("vision-transformer", vision_transformer, [X4], [0], 0)
proven("sequence-first", sequence_first, [X3], [1], 1)
proven("fourier", fourier_field, [X2], [0], 0)
proven("deep-sets", lambda a: F.linear(F.linear(a, c(3, N)).relu().sum(1), c(2, 3)), [X3], [0], 0)
proven("mixer", lambda a: a + F.linear(F.linear(a.transpose(1, 2), c(3, N)).tanh(), c(N, 3)).mT, [X3], [0], 0)

# (call, inputs, axes): nothing may be claimed
LOST = {
    "mean": (lambda a: a.mean(0), [X2], [0]),
    "mean-all": (lambda a: a.mean(), [X2], [0]),
    "var-all": (lambda a: torch.var(a, True), [X3], [2]),
    "sum-empty": (lambda a: a.sum(()), [X2], [0]),
    "centered": (lambda a: a - a.mean(0), [X2], [0]),
    "max": (lambda a: a.max(0), [X2], [0]),
    "norm-all": (lambda a: a / a.norm(), [X2], [0]),
    "flatten": (lambda a: a.flatten(), [X2], [0]),
    "fold": (lambda a: a.flatten(0, 1), [X3], [1]),
    "reshape-TN": (lambda a: a.reshape(N * N, N), [X3], [1]),
    "windows-folded": (lambda a: a.view(2 * N, 2, N), [X3], [0]),
    "wrong-view": (lambda a: a.view(2, N, 2), [X2], [0]),
    "index": (lambda a: a[IDX], [X2], [0]),
    "index-sample": (lambda a: a[0], [X2], [0]),
    "reversed-index": (lambda a: a[[3, 2, 1, 0]], [X2], [0]),
    "mask": (lambda a: a[c(N, N) > 0.5], [X2], [0]),
    "step": (lambda a: a[::2], [X2], [0]),
    "apart": (lambda a: a[IDX, :, IDX], [X3], [1]),
    "int-and-tensor": (lambda a: a[0, :, IDX], [X3], [1]),
    "own-index": (lambda a, i: a[i], [X2, IDX], [0, 0]),
    "cat": (lambda a: torch.cat([a, a]), [X2], [0]),
    "cat-halves": (lambda a: torch.cat([a[2:], a[:2]]), [X2], [0]),
    "stack-other": (lambda a, b: torch.stack([a, b]), [X2, X2], [0, 1]),
    "transposed": (lambda a: a + a.T, [X2], [0]),
    "different-axes": (torch.add, [X2, X2], [0, 1]),
    "broadcast-other": (lambda a, b: a * b, [X2, x(N)], [0, 0]),
    "gram": (lambda a: a @ a.T, [X2], [0]),
    "contracted": (lambda a: c(N, N) @ a, [X2], [0]),
    "linear-last": (lambda a: F.linear(a, c(N, N)), [X2], [1]),
    "linear-both": (F.linear, [X2, 1 - X2], [0, 0]),
    "linear-keyword": (lambda a, b: F.linear(a, weight=b), [X2, 1 - X2], [0, 0]),
    "index_select-both": (lambda a, i: a.index_select(1, i), [X2, IDX], [0, 0]),
    "bilinear-features": (lambda a: F.bilinear(a, a, c(N, N, N)), [X2], [1]),
    "hypernetwork": (lambda a: F.linear(c(N, N), a), [X2], [0]),
    "attention-over-samples": (lambda a: F.scaled_dot_product_attention(a, a, a), [X2], [0]),
    "attention-rows": (lambda a: F.scaled_dot_product_attention(a, c(N, N, N), c(N, N, N)), [X3], [1]),
    "softmax": (lambda a: a.softmax(0), [X2], [0]),
    "softmax-none": (lambda a: F.softmax(a.requires_grad_(), dim=-2), [X2], [0]),
    "flip": (lambda a: a.flip(0), [X2], [0]),
    "roll": (lambda a: a.roll(1, 0), [X2], [0]),
    "roll-flat": (lambda a: a.roll(1), [X2], [0]),
    "cumsum": (lambda a: a.cumsum(0), [X2], [0]),
    "sort": (lambda a: a.sort(0), [X2], [0]),
    "sort-default": (lambda a: a.sort(), [X2], [1]),
    "axis-keyword": (lambda a: a.sort(axis=0), [X2], [0]),
    "normalize-axis": (lambda a: F.normalize(a), [X2], [1]),
    "batch_norm": (lambda a: F.batch_norm(a, c(N), c(N), training=True), [X4], [0]),
    "instance_norm-channels": (F.instance_norm, [X4], [1]),
    "group_norm": (lambda a: F.group_norm(a, 2), [X4], [1]),
    "layer_norm": (lambda a: F.layer_norm(a, (N, N)), [X2], [0]),
    "conv-unbatched": (lambda a: F.conv1d(a, c(N, N, 1)), [X2], [0]),
    "conv-channel": (lambda a: F.conv2d(a, c(N, N, 1, 1)), [X4], [1]),
    "conv-weight": (lambda a: F.conv2d(c(N, N, N, N), a), [X4], [0]),
    "pad": (lambda a: F.pad(a, (0, 0, 1, -1)), [X2], [0]),
    "pool": (lambda a: F.avg_pool1d(a, 3, 1, 1), [X2], [1]),
    "pool-batch": (lambda a: F.max_pool2d(a, 3, 1, 1), [X3], [1]),
    "einsum-sum": (lambda a: torch.einsum("nd->d", a), [X2], [0]),
    "einsum-crossed": (lambda a: torch.einsum("nd,dn->n", a, a), [X2], [0]),
    "einsum-outer": (lambda a: torch.einsum("nd,md->nm", a, a), [X2], [0]),
    "gather": (lambda a: a.gather(0, ints(N, N)), [X2], [0]),
    "scatter": (lambda a: c(N, N).scatter(0, ints(N, N), a), [X2], [0]),
    "repeat": (lambda a: a.repeat(2, 1), [X2], [0]),
    "broadcast-one": (lambda a: a + c(5, 1), [x(1, 3)], [0]),
    "expand-one": (lambda a: a.expand(5, 3), [x(1, 3)], [0]),
    "repeat_interleave": (lambda a: a.repeat_interleave(2, 0)[::2], [X2], [0]),
    "glu": (lambda a: F.glu(a, 0), [X2], [0]),
    "unfold": (lambda a: a.unfold(0, 2, 1), [X2], [0]),
    "into-constant": (lambda a: c(N, N).add_(a), [X2], [0]),
    "copy-other": (lambda a, b: a.copy_(b), [X2, X2], [0, 1]),
    "setitem-shifted": (lambda a: (a.__setitem__(slice(1, None), a[:-1].clone()), a)[1], [X2], [0]),
    "setitem-crossed": (lambda a, b: (a.__setitem__((slice(None), 0), b), a)[1], [X3, X2], [0, 1]),
    "expand_as-constant": (lambda a: c(N, 1).expand_as(a), [X3], [1]),
    "setitem-constant": (lambda a: (z := c(N, N), z.__setitem__((slice(None), 0), a[:, 0]))[0], [X2], [0]),
    "max_norm": (lambda i: F.embedding(i, c(3, 5), max_norm=1.0), [ints(N, N)], [0]),
    "nonzero": (lambda a: torch.where(a > 0.5)[0], [X2], [0]),
    "unknown": (lambda a: torch.linalg.qr(a)[0], [X2], [0]),
    "transpose_": (lambda a: a.transpose_(0, 1), [X2], [0]),
    "cosine-samples": (lambda a: F.cosine_similarity(a, a, dim=0), [X2], [0]),
    "pairwise": (lambda a: F.pairwise_distance(a, a[:1]), [X2], [0]),
    "fft": (lambda a: torch.fft.fft2(a).abs(), [X2], [0]),
    "fftn": (lambda a: torch.fft.fftn(a).abs(), [X2], [0]),
    "empty": (lambda a: a.view(0, N), [x(N, 0)], [0]),
    "masked_scatter": (lambda a: a.masked_scatter(c(N, N) > 0.5, a), [X2], [0]),
}


@pytest.mark.parametrize("name", PROVEN)
def test_proven(name):
    fn, inputs, axes, want = PROVEN[name]
    got = assert_sound(fn, inputs, axes)
    assert (tuple(got) if isinstance(want, tuple) else got[0]) == want


@pytest.mark.parametrize("name", LOST)
def test_lost(name):
    fn, inputs, axes = LOST[name]
    assert [axis for _, axis in claimed(fn, inputs, axes) if axis is not None] == []


ALL = {**{f"proven-{k}": v[:2] for k, v in PROVEN.items()}, **{f"lost-{k}": v[:2] for k, v in LOST.items()}}


@pytest.mark.parametrize("name", ALL)
def test_any_claim_is_sound(name):
    """Each call with the samples along every axis of every input, and with constants."""
    fn, inputs = ALL[name]
    for axes in itertools.product(*([None, *range(t.ndim)] for t in inputs)):
        sizes = {t.shape[a] for t, a in zip(inputs, axes, strict=True) if a is not None}
        if len(sizes) == 1:
            assert_sound(fn, inputs, axes)


RANDOM = ("bernoulli", "normal_", "dropout", "gumbel")
OWN_CONSTANT_PER_SAMPLE = {
    "middle-bmm",
    "middle-baddbmm",
    "middle-einsum-const",
    "middle-stack-last",
    "middle-pairwise-keep",
    "gather-table",
}


def is_equivariant(name):
    """Not if there is noise, or a constant with one entry per sample: these do not move with the samples."""
    return not name.endswith("-constant") and name not in OWN_CONSTANT_PER_SAMPLE and not any(r in name for r in RANDOM)


@pytest.mark.parametrize("name", [name for name in PROVEN if is_equivariant(name)])
def test_permuted_samples_permute_the_output(name):
    fn, inputs, axes, _ = PROVEN[name]
    n = inputs[0].shape[axes[0]]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(5))
    permuted = [t if a is None else t.index_select(a, order) for t, a in zip(inputs, axes, strict=True)]
    for (want, axis), (got, _) in zip(claimed(fn, inputs, axes), claimed(fn, permuted, axes), strict=True):
        torch.testing.assert_close(got, want.index_select(axis, order), equal_nan=True)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_composed_shapes_are_sound(data):
    """Random chains of rearrangements of a tensor whose other sizes may equal n."""
    n = data.draw(st.integers(1, 4))
    shape = data.draw(st.lists(st.sampled_from([1, 2, n, 4]), min_size=1, max_size=3))
    axis = data.draw(st.integers(0, len(shape)))
    shape.insert(axis, n)
    steps = [data.draw(st.tuples(st.sampled_from(list(STEPS)), st.randoms(use_true_random=False))) for _ in range(4)]
    seeds = [(name, random.random()) for name, random in steps]

    def chain(a):
        for name, seed in seeds:
            a = STEPS[name](a, torch.Generator().manual_seed(int(seed * 2**31)))
        return a

    assert_sound(chain, [x(*shape)], [axis])


def pick(generator, high):
    return int(torch.randint(high, (), generator=generator))


def reshaped(a, generator):
    """Merge two neighbours, or split one dimension, so that all factorizations can be reached."""
    sizes = list(a.shape)
    if len(sizes) > 1 and pick(generator, 2):
        i = pick(generator, len(sizes) - 1)
        sizes[i : i + 2] = [sizes[i] * sizes[i + 1]]
    else:
        i = pick(generator, max(len(sizes), 1))
        factors = [d for d in range(1, sizes[i] + 1) if sizes[i] % d == 0] if sizes else [1]
        d = factors[pick(generator, len(factors))]
        sizes[i : i + 1] = [d, sizes[i] // d] if sizes else [1]
    return a.reshape(sizes)


STEPS = {
    "reshape": reshaped,
    "regroup": lambda a, g: reshaped(a, g) if a.ndim < 2 else a.reshape(a.shape[-1:] + a.shape[:-1]),
    "permute": lambda a, g: a.permute(torch.randperm(a.ndim, generator=g).tolist()) if a.ndim else a,
    "transpose": lambda a, g: a.transpose(pick(g, a.ndim), pick(g, a.ndim)) if a.ndim else a,
    "movedim": lambda a, g: a.movedim(pick(g, a.ndim), pick(g, a.ndim)) if a.ndim else a,
    "unsqueeze": lambda a, g: a.unsqueeze(pick(g, a.ndim + 1)),
    "squeeze": lambda a, g: a.squeeze(),
    "flatten": lambda a, g: a.flatten(pick(g, a.ndim)) if a.ndim else a,
    "sum": lambda a, g: a.sum(pick(g, a.ndim)) if a.ndim else a,
    "select": lambda a, g: a.select(pick(g, a.ndim), 0) if a.ndim else a,
    "index": lambda a, g: a[(slice(None),) * pick(g, a.ndim) + (torch.tensor([[0, 0]]),)] if a.ndim else a,
    "stack": lambda a, g: torch.stack([a, a.flip(0)] if a.ndim else [a, a], pick(g, a.ndim + 1)),
    "cat": lambda a, g: torch.cat([a, a], pick(g, a.ndim)) if a.ndim else a,
    "expand": lambda a, g: a.expand(2, *a.shape),
    "transposed-sum": lambda a, g: a + a.mT if a.ndim > 1 and a.shape[-1] == a.shape[-2] else a,
    "softmax": lambda a, g: a.softmax(pick(g, a.ndim)) if a.ndim else a,
    "repeat": lambda a, g: a.repeat(*[1 + pick(g, 2) for _ in a.shape]) if a.ndim and a.numel() < 500 else a,
    "gram": lambda a, g: a @ a.mT if a.ndim > 1 else a,
}


def test_mutation():
    written = (
        Tensor.add_,
        Tensor.__iadd__,
        Tensor.__setitem__,
        F.relu_,
        torch.relu_,
        Tensor.copy_,
        Tensor.data.__set__,
    )
    kept = (Tensor.add, F.relu, Tensor.__add__, Tensor.__getitem__, Tensor.T.__get__, Tensor.requires_grad_)
    assert all(map(mutates, written))
    assert not any(map(mutates, kept))
    assert mutates(torch.ops.aten.add_.Tensor)
    assert not mutates(torch.ops.aten.add.Tensor)


def test_rules_in_place_mutate():
    """A name that ends in an underscore has a rule that asks for the axis of its destination."""
    named = [f for f in RULES if getattr(f, "__name__", "").endswith("_") and mutates(f)]
    constant, tagged = torch.zeros(2), torch.ones(2)
    assert len(named) > 100
    for func in named:
        if func is not Tensor.__setitem__:
            assert propagate(func, (constant, tagged), {}, constant, lambda t: 0 if t is tagged else None) is None


def test_no_rule_is_lost():
    assert propagate(torch.linalg.qr, (X2,), {}, X2, lambda t: 0) is None


def test_size_changed_is_lost():
    assert propagate(torch.add, (x(1, 3), x(5, 3)), {}, x(5, 3), lambda t: 0 if t.shape[0] == 1 else None) is None
