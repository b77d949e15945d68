"""Differentiable operations and modules of torch, as models see them: tables for the sweep in `test_operations`.

An operation is a function of tensors with a leading sample axis, in which every sample is treated by itself. Most take one
shape, some two or three, and some take parameters as such (``weights``). Domains are part of the operation.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["OPERATIONS", "Operation"]

Shape = tuple[int, ...]


class Operation(NamedTuple):
    """An operation of the sweep.

    Attributes:
        function: ``(*tensors, *weights) -> z``; tensors are [N, *shape], z is [N, ...].
        shapes: Of the tensors, for one sample.
        weights: Shapes of the arguments that are parameters.
        truth: What it computes, where torch's own derivatives of it are wrong or missing.
        broadcasts: Whether a tensor may also be [1, *shape] where another one has the samples.
        differences: Whether finite differences show its derivatives.
        at_zero: Whether hidden features are zero, where the formulas of derivatives often have a case of their own.
    """

    function: Callable[..., Tensor]
    shapes: tuple[Shape, ...]
    weights: tuple[Shape, ...] = ()
    truth: Callable[..., Tensor] | None = None
    broadcasts: bool = True
    differences: bool = True
    at_zero: bool = False


OPERATIONS: dict[str, Operation] = {}


def add(name: str, function: Callable[..., Tensor], *shapes: Shape, **options: Any) -> None:
    assert name not in OPERATIONS, name
    OPERATIONS[name] = Operation(function, shapes or ((4,),), **options)


def of(owner: Any, names: str, *shapes: Shape, domain: Callable[[Tensor], Tensor] | None = None, **options: Any) -> None:
    """Operations by name, each applied to ``domain`` of a hidden feature."""
    for name in names.split():
        function = getattr(owner, name)
        label = f"{owner.__name__.removeprefix('torch.').replace('nn.functional', 'F')}.{name}"
        label = f"{label} {len([k for k in OPERATIONS if k.split()[0] == label]) + 1}" if label in OPERATIONS else label
        composed = (lambda h, *more, f=function: f(domain(h), *more)) if domain else function
        add(label, composed, *shapes, **options)


def module(name: str, make: Callable[[], nn.Module], *shapes: Shape, **options: Any) -> None:
    """A module, whose parameters are the weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        own = make().double().eval()
    for b in own.buffers():
        b += 0.25 if b.is_floating_point() else 0
    names = [n for n, _ in own.named_parameters()]

    def function(*tensors: Tensor) -> Any:
        inputs, weights = tensors[: len(shapes)], tensors[len(shapes) :]
        return functional_call(own, dict(zip(names, weights, strict=True)), inputs)

    after = options.pop("after", None)
    run = function if after is None else (lambda *tensors: after(function(*tensors)))
    if options.get("truth") is True:  # the fused kernels of attention have no second derivative
        options["truth"] = sdpa_kernel(SDPBackend.MATH)(run)
    add(f"nn.{name}", run, *shapes, weights=tuple(tuple(p.shape) for p in own.parameters()), **options)


# -- domains


def unit(h: Tensor) -> Tensor:
    return 0.9 * torch.tanh(h)


def positive(h: Tensor) -> Tensor:
    return F.softplus(h) + 0.1


def above_one(h: Tensor) -> Tensor:
    return F.softplus(h) + 1.1


def probability(h: Tensor) -> Tensor:
    return 0.8 * torch.sigmoid(h) + 0.1


def regular(h: Tensor) -> Tensor:
    """Matrices far from singular."""
    return 0.5 * torch.tanh(h) + torch.tensor([[2.0, 0.3, -0.2], [0.1, -1.5, 0.4], [0.2, -0.3, 1.0]])[
        : h.shape[-2], : h.shape[-1]
    ].to(h)


def symmetric(h: Tensor) -> Tensor:
    h = regular(h)
    return h + h.mT


def definite(h: Tensor) -> Tensor:
    h = regular(h)
    return h @ h.mT + 0.5 * torch.eye(h.shape[-1]).to(h)


def lower(h: Tensor) -> Tensor:
    return torch.tril(regular(h))


def order(h: Tensor) -> Tensor:
    """Indices along the last axis, a permutation for each sample."""
    return h.detach().argsort(-1)


def labels(h: Tensor) -> Tensor:
    return (h.detach()[..., 0] > 0).long()


def signs(h: Tensor) -> Tensor:
    return torch.where(h.detach() > 0, 1.0, -1.0).to(h)


def targets(h: Tensor) -> Tensor:
    return torch.linspace(0.15, 0.85, h[0].numel()).view(h.shape[1:]).expand_as(h).to(h)


def index(*entries: int) -> Tensor:
    return torch.tensor(entries)


def joined(outs: Any) -> Tensor:
    """Several outputs as one."""
    return torch.cat([t.flatten(1) for t in outs if t.is_floating_point()], dim=1)


def old_weight_norm(linear: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(linear)


# -- what torch's kernels should compute


def hardsigmoid(h: Tensor) -> Tensor:
    return F.relu6(h + 3) / 6


def distances(a: Tensor, b: Tensor, p: float = 2.0) -> Tensor:
    difference = (a.unsqueeze(-2) - b.unsqueeze(-3)).abs()
    return difference.amax(-1) if p == float("inf") else (difference**p).sum(-1) ** (1 / p)


MEAN, VARIANCE = torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor([1.5, 0.7], dtype=torch.float64)


def sinc_near_zero(h: Tensor) -> Tensor:
    x, out = (torch.pi * h).square(), torch.ones_like(h)
    for k in range(12, 0, -1):
        out = 1 - x / (2 * k * (2 * k + 1)) * out
    return out


def normalized(h: Tensor) -> Tensor:
    shape = [1, -1] + [1] * (h.ndim - 2)
    return (h - MEAN.view(shape)) / (VARIANCE.view(shape) + 1e-5).sqrt()


# -- elementwise, one tensor

of(torch, "abs asinh atan ceil cos cosh deg2rad erf erfc exp exp2 expm1 fix floor frac i0 nan_to_num neg positive relu")
of(torch, "round selu sgn sigmoid sign sin sinc sinh square tan tanh trunc arcsinh arctan")
of(torch, "acos arcsin asin atanh erfinv", domain=unit)
of(torch, "digamma lgamma log log10 log1p log2 reciprocal rsqrt sqrt", domain=positive)
of(torch, "acosh arccosh", domain=above_one)
of(torch, "logit", domain=probability)
of(torch.special, "entr i1", domain=positive)
of(torch.special, "erfcx expit i0e i1 i1e log_ndtr ndtr")
of(torch.special, "ndtri", domain=probability)
of(torch.special, "gammaln psi", domain=positive)
of(torch.Tensor, "abs exp sigmoid tanh square sin sqrt log reciprocal", domain=positive)
of(F, "celu elu gelu hardshrink hardswish hardtanh leaky_relu logsigmoid mish relu relu6 rrelu selu silu")
of(F, "sigmoid softplus softshrink softsign tanh tanhshrink")
add("torch.rad2deg", lambda h: torch.rad2deg(0.02 * h))
add("clamp", lambda h: torch.clamp(h, -0.5, 0.5))
add("clamp tensors", lambda h, low: torch.clamp(h, low, low + 1.0), (4,), (4,))
add("clamp_min", lambda h: torch.clamp_min(h, 0.1))
add("clamp_max", lambda h: h.clamp_max(0.1))
add("pow 3", lambda h: h**3)
add("pow 2.5", lambda h: torch.pow(positive(h), 2.5))
add("pow base", lambda h: torch.pow(2.0, h))
add("float_power", lambda h: torch.float_power(positive(h), 1.5))
add("mvlgamma", lambda h: torch.mvlgamma(above_one(h), 2))
add("multigammaln", lambda h: torch.special.multigammaln(above_one(h), 2))
add("polygamma", lambda h: torch.polygamma(1, positive(h)))
add("gelu tanh", lambda h: F.gelu(h, approximate="tanh"))
add("F.hardsigmoid", F.hardsigmoid, truth=hardsigmoid)
add("glu", F.glu)
add("threshold", lambda h: F.threshold(h, 0.1, 0.3))
add("softplus beta", lambda h: F.softplus(h, beta=2.0, threshold=1.0))
add("softmax", lambda h: F.softmax(h, -1))
add("log_softmax", lambda h: F.log_softmax(h, -1))
add("softmin", lambda h: F.softmin(h, -1))
add("torch.softmax", lambda h: torch.softmax(h, 1))
add("Tensor.softmax", lambda h: h.softmax(dim=-1))
add("normalize", F.normalize)
add("normalize 1", lambda h: F.normalize(h, p=1.0))
add("dropout without training", lambda h: F.dropout(h, 0.5, training=False))
add("alpha_dropout without training", lambda h: F.alpha_dropout(h, 0.5, training=False))
add("to float32 and back", lambda h: h.to(torch.float64).clone().contiguous())

# -- elementwise, several tensors

of(torch, "add sub mul atan2 copysign fmax fmin hypot logaddexp logaddexp2 maximum minimum rsub", (4,), (4,))
add("div", lambda a, b: a / positive(b), (4,), (4,))
add("true_divide", lambda a, b: torch.true_divide(a, above_one(b)), (4,), (4,))
add("div floor", lambda a, b: torch.div(a, positive(b), rounding_mode="floor"), (4,), (4,))
add("fmod", lambda a, b: torch.fmod(a, positive(b)), (4,), (4,))
add("remainder", lambda a, b: torch.remainder(a, positive(b)), (4,), (4,))
add("pow", lambda a, b: torch.pow(positive(a), b), (4,), (4,))
add("xlogy", lambda a, b: torch.xlogy(a, positive(b)), (4,), (4,))
add("xlog1py", lambda a, b: torch.special.xlog1py(a, positive(b)), (4,), (4,))
add("zeta", lambda a, b: torch.special.zeta(2.0 + targets(a), positive(b)) * a, (4,), (4,))
add("ldexp", lambda a, b: torch.ldexp(a, b), (4,), (4,))
add("where", lambda a, b: torch.where(a > b, a, 2 * b), (4,), (4,))
add("lerp", torch.lerp, (4,), (4,), (4,))
add("lerp number", lambda a, b: torch.lerp(a, b, 0.3), (4,), (4,))
add("addcmul", lambda a, b, c: torch.addcmul(a, b, c, value=0.5), (4,), (4,), (4,))
add("addcdiv", lambda a, b, c: torch.addcdiv(a, b, positive(c)), (4,), (4,), (4,))
add("view_as_complex", lambda h: torch.view_as_complex(h).abs(), (2, 2))
add("view_as_real", lambda h: torch.view_as_real(torch.view_as_complex(h) * (1 + 2j)), (2, 2))
add("complex", lambda a, b: torch.complex(a, b).exp().real, (4,), (4,), broadcasts=False)
add("polar", lambda a, b: torch.polar(positive(a), b).imag, (4,), (4,), broadcasts=False)
add("angle", lambda h: torch.angle(torch.view_as_complex(h)), (2, 2))
add("threshold_", lambda h: F.threshold_(h * 1.0, 0.1, 0.3))
add("prelu", F.prelu, (4,), weights=((4,),))

# -- in place

for name in ["relu_", "sigmoid_", "tanh_", "exp_", "sin_", "abs_", "neg_", "square_", "zero_"]:
    add(f"Tensor.{name}", lambda h, name=name: getattr(h * 1.0, name)())
add("Tensor.add_", lambda a, b: (a * 1.0).add_(b), (4,), (4,), broadcasts=False)
add("Tensor.add_ parameter", lambda h, w: (h * 1.0).add_(w), (4,), weights=((4,),))
add("Tensor.mul_ parameter", lambda h, w: (h * 1.0).mul_(w), (4,), weights=((4,),))
add("Tensor.mul_", lambda a, b: (a * 1.0).mul_(b), (4,), (4,), broadcasts=False)
add("Tensor.clamp_", lambda h: (h * 1.0).clamp_(-0.3, 0.4))
add("Tensor.__setitem__", lambda a, b: _with_column(a, b), (4,), (2,), broadcasts=False)
add("Tensor.masked_fill_", lambda h: (h * 1.0).masked_fill_(h.detach() > 0.2, 0.5))
add("Tensor.copy_", lambda a, b: torch.zeros_like(a).copy_(b * 2), (4,), (4,), broadcasts=False)
add("hardsigmoid inplace", lambda h: F.hardsigmoid(h * 1.0, inplace=True), truth=hardsigmoid)
add("silu inplace", lambda h: F.silu(h * 1.0, inplace=True))


def _with_column(a: Tensor, b: Tensor) -> Tensor:
    a = a * 1.0
    a[:, 1:3] = b.exp()
    return a


# -- reductions

of(torch, "logsumexp amax amin", (2, 2))
OPERATIONS |= {
    f"torch.{k}": v._replace(function=lambda h, f=v.function: f(h, -1))
    for k, v in ((k.removeprefix("torch."), OPERATIONS.pop(k)) for k in ("torch.logsumexp", "torch.amax", "torch.amin"))
}
for name in ["sum", "mean", "prod", "std", "var", "norm", "nansum", "nanmean", "median", "nanmedian", "mode", "max", "min"]:
    add(
        f"torch.{name} axis",
        lambda h, f=getattr(torch, name): (lambda z: z if isinstance(z, Tensor) else z.values)(f(h, dim=-1)),
        (2, 4),
    )
add("Tensor.sum axes", lambda h: h.sum((1, 2), keepdim=True), (2, 3))
add("Tensor.mean axes", lambda h: (h**2).mean(dim=(-1, -2)), (2, 3))
add("Tensor.var biased", lambda h: h.var(-1, correction=0), (2, 3))
add("var_mean", lambda h: joined(torch.var_mean(h, -1)), (2, 3))
add("std_mean", lambda h: joined(torch.std_mean(h, -1)), (2, 3))
add("prod with zeros", lambda h: torch.prod(h * torch.tensor([0.0, 1.0, 1.0]).to(h), -1), (2, 3))
add("aminmax", lambda h: joined(torch.aminmax(h, dim=-1)), (2, 3))
add("quantile", lambda h: torch.quantile(h, 0.3, dim=-1), (2, 3))
add("nanquantile", lambda h: torch.nanquantile(h, 0.6, dim=1), (2, 3))
add("kthvalue", lambda h: torch.kthvalue(h, 2, dim=-1).values)
add("topk", lambda h: torch.topk(h, 2, dim=-1).values)
add("sort", lambda h: torch.sort(h, dim=-1).values * torch.arange(4.0).to(h))
add("msort", lambda h: torch.msort(h.mT).mT)
add("cummax", lambda h: torch.cummax(h, -1).values)
add("cummin", lambda h: torch.cummin(h, -1).values)
add("cumprod", lambda h: torch.cumprod(h, -1))
add("cumprod with zeros", lambda h: torch.cumprod(h * torch.tensor([1.0, 0.0, 1.0, 1.0]).to(h), -1))
add("cumsum", lambda h: torch.cumsum(h, -1))
add("logcumsumexp", lambda h: torch.logcumsumexp(h, -1))
add("trapezoid", lambda h: torch.trapezoid(h, dx=0.5))
add("cumulative_trapezoid", lambda h: torch.cumulative_trapezoid(h))
add("diff", lambda h: torch.diff(h, dim=-1) ** 2)
add("renorm", lambda h: torch.renorm(h, 2, 0, 0.5))
add("gradient", lambda h: torch.gradient(h, dim=1)[0])
add("vector_norm 2", lambda h: torch.linalg.vector_norm(h, dim=-1), (2, 3))
add("vector_norm 1", lambda h: torch.linalg.vector_norm(h, 1, dim=-1), (2, 3))
add("vector_norm 3", lambda h: torch.linalg.vector_norm(h, 3, dim=(-1, -2)), (2, 3))
add("vector_norm inf", lambda h: torch.linalg.vector_norm(h, float("inf"), dim=-1), (2, 3))
add("norm axes", lambda h: torch.norm(h, dim=(1, 2)), (2, 3))
add("Tensor.norm 4", lambda h: h.norm(4, -1), (2, 3))
add("cosine_similarity", F.cosine_similarity, (4,), (4,))
add("pairwise_distance", F.pairwise_distance, (4,), (4,))
add("pairwise_distance 1", lambda a, b: F.pairwise_distance(a, b, p=1.0), (4,), (4,))
add("cdist", torch.cdist, (2, 2), (3, 2), broadcasts=False, truth=distances)
add("cdist 1", lambda a, b: torch.cdist(a, b, p=1.0), (2, 2), (3, 2), broadcasts=False, truth=partial(distances, p=1.0))
add("cdist 3", lambda a, b: torch.cdist(a, b, p=3.0), (2, 2), (3, 2), broadcasts=False, truth=partial(distances, p=3.0))
add(
    "cdist without matmul",
    lambda a, b: torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist"),
    (2, 2),
    (3, 2),
    broadcasts=False,
    truth=distances,
)
add("cdist to parameter", torch.cdist, (2, 2), weights=((3, 2),), truth=distances)
add("cdist of vectors to parameter", torch.cdist, (2,), weights=((3, 2),), truth=lambda a, b: distances(a[None], b[None])[0])
add(
    "cdist inf",
    lambda a, b: torch.cdist(a, b, p=float("inf")),
    (2, 2),
    (3, 2),
    broadcasts=False,
    truth=partial(distances, p=float("inf")),
)
add(
    "softmax of cdist",
    lambda a, b: torch.softmax(-torch.cdist(a, b), -1),
    (2, 2),
    (3, 2),
    broadcasts=False,
    truth=lambda a, b: torch.softmax(-distances(a, b), -1),
)

# -- shapes

for name, function in {
    "reshape": lambda h: h.reshape(-1, 6),
    "view": lambda h: h.view(len(h), 3, 2),
    "flatten": lambda h: h.flatten(1),
    "torch.flatten": lambda h: torch.flatten(h, start_dim=1),
    "unflatten": lambda h: h.unflatten(-1, (3, 1)),
    "squeeze": lambda h: h[:, :1].squeeze(1),
    "unsqueeze": lambda h: h.unsqueeze(-1),
    "transpose": lambda h: h.transpose(1, 2),
    "swapaxes": lambda h: torch.swapaxes(h, 1, 2),
    "swapdims": lambda h: torch.swapdims(h, -1, -2),
    "permute": lambda h: h.permute(0, 2, 1),
    "movedim": lambda h: torch.movedim(h, -1, 1),
    "moveaxis": lambda h: torch.moveaxis(h, 1, -1),
    "mT": lambda h: h.mT,
    "adjoint": lambda h: torch.adjoint(h),
    "flip": lambda h: torch.flip(h, (-1,)),
    "fliplr": torch.fliplr,
    "rot90": lambda h: torch.rot90(h, 1, (1, 2)),
    "roll": lambda h: torch.roll(h, 1, -1),
    "roll axes": lambda h: torch.roll(h, (1, 1), (1, 2)),
    "tile": lambda h: torch.tile(h, (1, 2)),
    "repeat": lambda h: h.repeat(1, 2, 1),
    "repeat_interleave": lambda h: torch.repeat_interleave(h, 2, dim=-1),
    "repeat_interleave tensor": lambda h: h.repeat_interleave(index(1, 2, 0), dim=2),
    "expand": lambda h: h.unsqueeze(1).expand(-1, 2, -1, -1),
    "broadcast_to": lambda h: torch.broadcast_to(h, (2, *h.shape)).movedim(1, 0),
    "narrow": lambda h: h.narrow(2, 1, 2),
    "select": lambda h: h.select(1, 1),
    "slice": lambda h: h[:, :, 1:],
    "slice with step": lambda h: h[..., ::2],
    "None": lambda h: h[:, None, 0],
    "index": lambda h: h[:, [1, 0, 1]],
    "index pairs": lambda h: h[:, index(0, 1, 1), index(2, 0, 2)],
    "index mask": lambda h: h[:, :, torch.tensor([True, False, True])],
    "index_select": lambda h: h.index_select(2, index(2, 0, 2)),
    "torch.index_select": lambda h: torch.index_select(h, -1, index(1)),
    "gather": lambda h: h.gather(-1, order(h)[..., :2]),
    "torch.gather": lambda h: torch.gather(h, 1, torch.zeros_like(h, dtype=torch.long)),
    "take_along_dim": lambda h: torch.take_along_dim(h, order(h), -1),
    "masked_fill": lambda h: h.masked_fill(h.detach() > 0.1, 0.7),
    "masked_scatter": lambda h: h.masked_scatter(torch.ones_like(h, dtype=torch.bool), h.flip(-1) ** 2),
    "tril": torch.tril,
    "triu": lambda h: torch.triu(h, 1),
    "diagonal": lambda h: torch.diagonal(h, dim1=-2, dim2=-1),
    "diag_embed": lambda h: torch.diag_embed(h),
    "chunk": lambda h: torch.chunk(h, 2, dim=1)[1],
    "split": lambda h: h.split([1, 2], dim=-1)[1],
    "tensor_split": lambda h: torch.tensor_split(h, 2, dim=-1)[0],
    "hsplit": lambda h: torch.hsplit(h, 2)[1],
    "dsplit": lambda h: torch.dsplit(h, 3)[2],
    "unbind": lambda h: h.unbind(1)[1],
    "unsafe_chunk": lambda h: h.unsafe_chunk(2, 1)[0],
    "Tensor.unfold": lambda h: h.unfold(-1, 2, 1),
    "clone": torch.clone,
    "contiguous": lambda h: h.mT.contiguous(),
    "atleast_3d": lambda h: torch.atleast_3d(h[:, 0]),
    "pad": lambda h: F.pad(h, (1, 0, 2, 1), value=0.3),
    "pad reflect": lambda h: F.pad(h, (1, 2), mode="reflect"),
    "pad replicate": lambda h: F.pad(h, (2, 1), mode="replicate"),
    "pad circular": lambda h: F.pad(h, (1, 1), mode="circular"),
    "vander": lambda h: torch.linalg.vander(h[:, 0]),
    "scatter": lambda h: torch.zeros_like(h).scatter(-1, order(h), h),
    "scatter_add": lambda h: torch.zeros_like(h).scatter_add(-1, torch.zeros_like(h, dtype=torch.long), h),
    "index_add": lambda h: torch.zeros_like(h).index_add(2, index(0, 0, 1), h),
    "index_copy": lambda h: (h * 2).index_copy(2, index(1, 0), h[..., :2] ** 2),
    "index_fill": lambda h: h.index_fill(-1, index(1), 0.5),
    "index_put": lambda h: (h * 1.0).index_put((torch.arange(len(h)), index(1)), h[:, 0]),
    "index_put accumulate": lambda h: (h.mT * 1.0).mT.index_put(
        (torch.arange(len(h))[:, None], index(1, 1)), h**2, accumulate=True
    ),
    "index_reduce": lambda h: torch.index_reduce(h + 0, 2, index(0, 1, 0), h**2 + 1, "mean"),
    "concat": lambda h: torch.concat([h, h**2], dim=-1),
}.items():
    add(name, function, (2, 3))
for reduce in ("sum", "prod", "mean", "amax", "amin"):
    add(
        f"scatter_reduce {reduce}",
        lambda h, reduce=reduce: (h + 2).scatter_reduce(-1, torch.tensor([0, 1, 0]).expand(h.shape), h.flip(1) + 3, reduce),
        (2, 3),
    )
for name in ["cat", "stack", "hstack", "column_stack", "dstack"]:
    add(
        f"torch.{name}",
        lambda a, b, f=getattr(torch, name), o=({"dim": 1} if name in ("cat", "stack") else {}): f([a, b**2], **o),
        (2, 3),
        (2, 3),
        broadcasts=False,
    )
add(
    "as_strided_scatter",
    lambda a, b: torch.as_strided_scatter(a * 1.0, b, (len(a), 2), (4, 1), 1),
    (4,),
    (2,),
    truth=lambda a, b: torch.slice_scatter(a, b, 1, 1, 3),
    broadcasts=False,
)
add("select_scatter", lambda a, b: torch.select_scatter(a, b, 1, 1), (2, 3), (3,), broadcasts=False)
add("select_scatter last", lambda a, b: a.select_scatter(b, -1, 0), (2, 3), (2,), broadcasts=False)
add("slice_scatter", lambda a, b: torch.slice_scatter(a, b, 2, 1, 3), (2, 3), (2, 2), broadcasts=False)
add("diagonal_scatter", lambda a, b: torch.diagonal_scatter(a, b, dim1=-2, dim2=-1), (2, 2), (2,), broadcasts=False)
add("pixel_shuffle", lambda h: F.pixel_shuffle(h, 2), (4, 1, 2))
add("pixel_unshuffle", lambda h: F.pixel_unshuffle(h, 2), (1, 2, 4))
add("channel_shuffle", lambda h: F.channel_shuffle(h, 2), (4, 1, 2))
add("unfold", lambda h: F.unfold(h, 2), (1, 3, 3))
add("fold", lambda h: F.fold(h, (2, 3), (2, 2)), (4, 2))

# -- products

add("matmul", torch.matmul, (2, 2), (2, 3))
add("matmul vectors", lambda a, b: a @ b.unsqueeze(-1), (2, 2), (2,))
add("matmul parameter", torch.matmul, (2,), weights=((2, 3),))
add("matmul parameter first", lambda h, w: (w @ h.unsqueeze(-1)).squeeze(-1), (2,), weights=((3, 2),))
add("mm", torch.mm, (2,), weights=((2, 3),))
add("mv", lambda h, w: torch.mv(h, w), (2,), weights=((2,),))
add("bmm", torch.bmm, (2, 2), (2, 3), broadcasts=False)
add("baddbmm", torch.baddbmm, (2, 3), (2, 2), (2, 3), broadcasts=False)
add("addmm", lambda h, b, w: torch.addmm(b, h, w, beta=0.5), (2,), weights=((3,), (2, 3)))
add("addmv", lambda h, b, w: torch.addmv(b, h, w), (2,), weights=((1,), (2,)))
add("einsum", lambda a, b: torch.einsum("nij,njk->nik", a, b), (2, 2), (2, 3), broadcasts=False)
add("einsum parameter", lambda h, w: torch.einsum("ni,oi->no", h, w), (2,), weights=((3, 2),))
add("einsum squares", lambda h: torch.einsum("nij,nkj->nik", h, h), (2, 2))
add("inner", lambda h, w: torch.inner(h, w), (2,), weights=((3, 2),))
add("tensordot", lambda h, w: torch.tensordot(h, w, dims=([1], [0])), (2,), weights=((2, 3),))
add("kron", lambda h, w: torch.kron(h, w), (2, 2), weights=((1, 2, 1),))
add("outer", lambda a, b: a.unsqueeze(-1) * b.unsqueeze(-2), (2,), (3,))
add("vecdot", torch.linalg.vecdot, (4,), (4,))
add("cross", lambda a, b: torch.cross(a, b, dim=-1), (3,), (3,))
add("linalg.cross", torch.linalg.cross, (3,), (3,))
add("multi_dot", lambda h, a, b: torch.linalg.multi_dot([h, a, b]), (2,), weights=((2, 3), (3, 2)))
add("linear", F.linear, (2,), weights=((3, 2), (3,)))
add("linear by positions", F.linear, (2, 2), weights=((3, 2),))
add("bilinear", F.bilinear, (2,), (2,), weights=((2, 2, 2), (2,)), broadcasts=False)
add(
    "weight_norm",
    lambda h, v, g: F.linear(h, torch._weight_norm(v, g, 0)),
    (2,),
    weights=((3, 2), (3, 1)),
    truth=lambda h, v, g: F.linear(h, v * (g / v.norm(dim=1, keepdim=True))),
)
add(
    "weight_norm last",
    lambda h, v, g: F.linear(h, torch._weight_norm(v, g, 1)),
    (2,),
    weights=((3, 2), (1, 2)),
    truth=lambda h, v, g: F.linear(h, v * (g / v.norm(dim=0, keepdim=True))),
)
add(
    "weight_norm of features",
    lambda v, g: torch._weight_norm(v.flatten(0, 1), g.flatten()[:, None], 0).view(v.shape),
    (2, 3),
    (2,),
    broadcasts=False,
    truth=lambda v, g: v * (g / v.norm(dim=2)).unsqueeze(-1),
)
add("scaled_dot_product_attention", F.scaled_dot_product_attention, (2, 2), (2, 2), (2, 2), broadcasts=False)
add("causal attention", lambda h: F.scaled_dot_product_attention(h, h, h, is_causal=True), (2, 2))

# -- linear algebra

of(torch.linalg, "det inv eigvalsh svdvals matrix_exp cholesky pinv cond matrix_norm", (2, 2), domain=definite)
add("torch.det", lambda h: torch.det(regular(h)), (3, 3))
add("Tensor.det", lambda h: regular(h).det(), (2, 2))
add("logdet", lambda h: torch.logdet(definite(h)), (3, 3))
add("Tensor.logdet", lambda h: definite(h).logdet(), (2, 2))
add("slogdet", lambda h: torch.linalg.slogdet(regular(h)).logabsdet, (3, 3))
add("torch.slogdet", lambda h: torch.slogdet(regular(h))[1], (2, 2))
add("torch.inverse", lambda h: torch.inverse(regular(h)), (3, 3))
add("Tensor.inverse", lambda h: regular(h).inverse(), (2, 2))
add("inv_ex", lambda h: torch.linalg.inv_ex(regular(h)).inverse, (2, 2))
add("torch.pinverse", lambda h: torch.pinverse(regular(h)), (2, 3))
add("pinv hermitian", lambda h: torch.linalg.pinv(definite(h), hermitian=True), (2, 2))
add("solve", lambda a, b: torch.linalg.solve(regular(a), b), (2, 2), (2, 2), broadcasts=False)
add("solve vectors", lambda a, b: torch.linalg.solve(regular(a), b), (3, 3), (3,), broadcasts=False)
add("solve left", lambda a, b: torch.linalg.solve(regular(a), b, left=False), (2, 2), (3, 2), broadcasts=False)
add("solve parameter", lambda h, w: torch.linalg.solve(regular(w), h.unsqueeze(-1)), (2,), weights=((2, 2),))
add("solve_ex", lambda a, b: torch.linalg.solve_ex(regular(a), b).result, (2, 2), (2, 2), broadcasts=False)
add("solve_triangular", lambda a, b: torch.linalg.solve_triangular(lower(a), b, upper=False), (2, 2), (2, 2), broadcasts=False)
add(
    "triangular_solve", lambda a, b: torch.triangular_solve(b, lower(a), upper=False).solution, (2, 2), (2, 2), broadcasts=False
)
add("lstsq", lambda a, b: torch.linalg.lstsq(a + regular(a), b).solution, (3, 2), (3, 1), broadcasts=False)
add("torch.cholesky", lambda h: torch.cholesky(definite(h)), (2, 2))
add("cholesky_ex", lambda h: torch.linalg.cholesky_ex(definite(h)).L, (3, 3))
add(
    "cholesky_solve", lambda a, b: torch.cholesky_solve(b, torch.linalg.cholesky(definite(a))), (2, 2), (2, 1), broadcasts=False
)
add("cholesky_inverse", lambda h: torch.cholesky_inverse(torch.linalg.cholesky(definite(h))), (2, 2))
add("qr", lambda h: joined(torch.linalg.qr(regular(h))), (3, 2))
add("torch.qr", lambda h: torch.qr(regular(h))[1], (2, 2))
add("svd", lambda h: _from_svd(*torch.linalg.svd(regular(h), full_matrices=False)), (3, 2))
add("torch.svd", lambda h: torch.svd(regular(h)).S, (2, 2))
add("eigh", lambda h: _from_eigh(*torch.linalg.eigh(symmetric(h))), (2, 2))
add("eigvalsh 3", lambda h: torch.linalg.eigvalsh(symmetric(h)), (3, 3))
add("eigvals", lambda h: torch.linalg.eigvals(symmetric(h)).real.sum(-1), (2, 2))
add("eig", lambda h: torch.linalg.eig(definite(h)).eigenvalues.abs().square().sum(-1), (2, 2))
add("lu", lambda h: joined(torch.linalg.lu(regular(h))[1:]), (2, 2))
add("lu_factor", lambda h: torch.linalg.lu_factor(regular(h)).LU, (2, 2))
add("lu_solve", lambda a, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(regular(a)), b), (2, 2), (2, 1), broadcasts=False)
add("torch.lu_solve", lambda a, b: torch.lu_solve(b, *torch.linalg.lu_factor(regular(a))), (2, 2), (2, 1), broadcasts=False)
add("torch.matrix_exp", lambda h: torch.matrix_exp(regular(h)), (3, 3))
add("matrix_power", lambda h: torch.linalg.matrix_power(h, 3), (2, 2))
add("matrix_power negative", lambda h: torch.linalg.matrix_power(regular(h), -2), (2, 2))
add("matrix_norm nuclear", lambda h: torch.linalg.matrix_norm(regular(h), "nuc"), (2, 2))
add("matrix_norm spectral", lambda h: torch.linalg.matrix_norm(regular(h), 2), (2, 2))
add("matrix_norm 1", lambda h: torch.linalg.matrix_norm(h, 1), (2, 2))
add("linalg.norm", lambda h: torch.linalg.norm(h, dim=(-2, -1)), (2, 2))
add("householder_product", lambda h, t: torch.linalg.householder_product(h, t), (3, 2), (2,), broadcasts=False)
add("ormqr", lambda h, t: torch.ormqr(h, t, targets(h)), (3, 2), (2,), broadcasts=False)
add("tensorinv", lambda h: torch.stack([torch.linalg.tensorinv(m.view(2, 1, 2), ind=2).view(2, 2) for m in regular(h)]), (2, 2))
add(
    "tensorsolve",
    lambda a, b: torch.stack([torch.linalg.tensorsolve(m, v) for m, v in zip(regular(a), b, strict=True)]),
    (2, 2),
    (2,),
    broadcasts=False,
)
add("trace", lambda h: torch.stack([torch.trace(m) for m in h]), (2, 2))
add("vmap of det", lambda h: torch.vmap(torch.linalg.det)(regular(h)), (2, 2))


def _from_svd(u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
    return (u * s.sqrt().unsqueeze(-2)) @ vh


def _from_eigh(values: Tensor, vectors: Tensor) -> Tensor:
    return (vectors * values.tanh().unsqueeze(-2)) @ vectors.mT


# -- Fourier transforms

for name in ["rfft", "fft", "ifft", "ihfft"]:
    add(f"fft.{name}", lambda h, f=getattr(torch.fft, name): torch.view_as_real(f(h).resolve_conj()))
add("fft power", lambda h: torch.fft.fft(h).abs() ** 2)
add("fft.irfft", lambda h: torch.fft.irfft(torch.fft.rfft(h) * (1 + 0.5j)))
add("fft.hfft", lambda h: torch.fft.hfft(torch.view_as_complex(h)), (3, 2))
add("fft.rfft2", lambda h: torch.fft.rfft2(h).real, (2, 2))
add("fft.irfft2", lambda h: torch.fft.irfft2(torch.fft.rfft2(h) ** 2), (2, 4))
add("fft.fft2", lambda h: torch.fft.fft2(h).imag, (2, 3))
add("fft.fftn", lambda h: torch.fft.fftn(h, dim=(1, 2)).real, (2, 3))
add("fft.irfftn", lambda h: torch.fft.irfftn(torch.fft.rfftn(h, dim=(-1,)), s=(4,), dim=(-1,)))
add("fft.fftshift", lambda h: torch.fft.fftshift(h, dim=-1))
add("fft.ifftshift", lambda h: torch.fft.ifftshift(h, dim=-1))
add("stft", lambda h: torch.stft(h, 4, hop_length=2, window=torch.ones(4).to(h), return_complex=True).abs(), (6,))

# -- convolutions, pooling, images

add("conv1d", F.conv1d, (2, 3), weights=((2, 2, 2), (2,)))
add("conv2d", lambda h, w: F.conv2d(h, w, padding=1, stride=2), (1, 3, 3), weights=((2, 1, 2, 2),))
add("conv2d groups", lambda h, w: F.conv2d(h, w, groups=2), (2, 2, 2), weights=((2, 1, 2, 1),))
add("conv3d", F.conv3d, (1, 2, 2, 2), weights=((2, 1, 2, 1, 2),))
add("conv_transpose1d", F.conv_transpose1d, (2, 2), weights=((2, 1, 2), (1,)))
add("conv_transpose2d", lambda h, w: F.conv_transpose2d(h, w, stride=2), (1, 2, 2), weights=((1, 1, 2, 2),))
add("conv_transpose3d", F.conv_transpose3d, (1, 1, 2, 2), weights=((1, 1, 1, 2, 2),))
add(
    "conv_tbc",
    lambda h, w, b: torch.conv_tbc(h.movedim(0, 1).contiguous(), w, b).movedim(1, 0),
    (3, 2),
    weights=((2, 2, 2), (2,)),
)
add("avg_pool1d", lambda h: F.avg_pool1d(h, 2), (1, 4))
add("avg_pool2d", lambda h: F.avg_pool2d(h, 2, 1), (1, 3, 3))
add("avg_pool3d", lambda h: F.avg_pool3d(h, (1, 2, 2)), (1, 2, 2, 2))
add("max_pool1d", lambda h: F.max_pool1d(h, 2, 1), (1, 4))
add("max_pool2d", lambda h: F.max_pool2d(h, 2, 1), (1, 3, 3))
add("max_pool2d indices", lambda h: F.max_pool2d(h, 2, return_indices=True)[0], (1, 4, 2))
add("max_pool3d", lambda h: F.max_pool3d(h, (1, 2, 2), 1), (1, 2, 2, 2))
add("torch.max_pool2d", lambda h: torch.max_pool2d(h, 2), (1, 2, 4))
add("max_unpool1d", lambda h: F.max_unpool1d(*F.max_pool1d(h, 2, return_indices=True), 2), (1, 4))
add("max_unpool2d", lambda h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2), (1, 2, 4))
add("adaptive_avg_pool1d", lambda h: F.adaptive_avg_pool1d(h, 2), (1, 4))
add("adaptive_avg_pool2d", lambda h: F.adaptive_avg_pool2d(h, (2, 1)), (1, 3, 2))
add("adaptive_avg_pool3d", lambda h: F.adaptive_avg_pool3d(h, (1, 2, 1)), (1, 2, 2, 2))
add("adaptive_max_pool1d", lambda h: F.adaptive_max_pool1d(h, 2), (1, 4))
add("adaptive_max_pool2d", lambda h: F.adaptive_max_pool2d(h, (2, 1)), (1, 3, 2))
add("adaptive_max_pool3d", lambda h: F.adaptive_max_pool3d(h, (1, 2, 1)), (1, 2, 2, 2))
add(
    "fractional_max_pool2d",
    lambda h: F.fractional_max_pool2d(h, 2, output_size=2, _random_samples=torch.full((len(h), 1, 2), 0.3).to(h)),
    (1, 3, 3),
)
add("lp_pool1d", lambda h: F.lp_pool1d(positive(h), 2, 2), (1, 4))
add("lp_pool2d", lambda h: F.lp_pool2d(positive(h), 3, 2, 1), (1, 2, 3))
for mode, shape, size in (
    ("nearest", (1, 3), 5),
    ("nearest-exact", (1, 3), 5),
    ("linear", (1, 3), 5),
    ("bilinear", (1, 2, 2), (3, 4)),
    ("bicubic", (1, 2, 2), (3, 3)),
    ("trilinear", (1, 2, 1, 2), (3, 2, 2)),
    ("area", (1, 4), 2),
):
    add(f"interpolate {mode}", lambda h, mode=mode, size=size: F.interpolate(h, size, mode=mode), shape)
add("interpolate antialias", lambda h: F.interpolate(h, (2, 2), mode="bilinear", antialias=True), (1, 3, 3))
for mode in ("bilinear", "nearest", "bicubic"):
    add(
        f"grid_sample {mode}",
        lambda h, g, mode=mode: F.grid_sample(h, unit(g), mode=mode, align_corners=False),
        (1, 3, 3),
        (1, 2, 2),
        broadcasts=False,
    )
add("grid_sample 3d", lambda h, g: F.grid_sample(h, unit(g), align_corners=True), (1, 2, 2, 2), (1, 1, 2, 3), broadcasts=False)
add("affine_grid", lambda h: F.affine_grid(h, [len(h), 1, 2, 2], align_corners=False), (2, 3))

# -- normalizations

add("layer_norm", lambda h: F.layer_norm(h, (3,)), (2, 3))
add("layer_norm affine", lambda h, w, b: F.layer_norm(h, (3,), w, b), (2, 3), weights=((3,), (3,)))
add("layer_norm two axes", lambda h: F.layer_norm(h, (2, 3)), (2, 3))
add("torch.layer_norm", lambda h: torch.layer_norm(h, (3,)), (2, 3))
add("group_norm", lambda h, w, b: F.group_norm(h, 2, w, b), (4, 2), weights=((4,), (4,)))
add("torch.group_norm", lambda h: torch.group_norm(h, 1), (2, 2))
add("instance_norm", lambda h: F.instance_norm(h), (2, 3))
add("instance_norm affine", lambda h, w, b: F.instance_norm(h, weight=w, bias=b), (2, 2, 2), weights=((2,), (2,)))
add("torch.instance_norm", lambda h: torch.instance_norm(h, None, None, None, None, True, 0.1, 1e-5, False), (2, 3))
add("rms_norm", lambda h: F.rms_norm(h, (3,)), (2, 3))
add("rms_norm affine", lambda h, w: F.rms_norm(h, (3,), w, eps=1e-3), (2, 3), weights=((3,),))
add("torch.rms_norm", lambda h: torch.rms_norm(h, (3,)), (2, 3))
add("local_response_norm", lambda h: F.local_response_norm(h, 2, alpha=1.0), (3, 2))
add("batch_norm", lambda h, w, b: F.batch_norm(h, MEAN, VARIANCE, w, b), (2, 2), weights=((2,), (2,)))
add("batch_norm without weights", lambda h: F.batch_norm(h, MEAN, VARIANCE), (2,))
add(
    "batch_norm transposed",
    lambda h: F.batch_norm(h, MEAN, VARIANCE).flatten(2).transpose(1, 2) * torch.arange(8.0).view(4, 2).to(h),
    (2, 2, 2),
    truth=lambda h: normalized(h).flatten(2).transpose(1, 2) * torch.arange(8.0).view(4, 2).to(h),
)
add("batch_norm of transposed", lambda h: F.batch_norm(h.mT, MEAN, VARIANCE), (3, 2), truth=lambda h: normalized(h.mT))
add(
    "batch_norm of strided weights",
    lambda h, w: F.batch_norm(h, MEAN, VARIANCE, w[:, 0], w[:, 1]),
    (2, 3),
    weights=((2, 2),),
    truth=lambda h, w: normalized(h) * w[:, :1] + w[:, 1:],
)
add(
    "batch_norm of expanded weight",
    lambda h, w: F.batch_norm(h, MEAN, VARIANCE, w.expand(2)),
    (2, 3),
    weights=((1,),),
    truth=lambda h, w: normalized(h) * w,
)
add(
    "instance_norm of statistics", lambda h: F.instance_norm(h, MEAN, VARIANCE, use_input_stats=False), (2, 3), truth=normalized
)
add(
    "instance_norm of statistics transposed",
    lambda h: F.instance_norm(h, MEAN, VARIANCE, use_input_stats=False).flatten(2).mT * torch.arange(8.0).view(4, 2).to(h),
    (2, 2, 2),
    truth=lambda h: normalized(h).flatten(2).mT * torch.arange(8.0).view(4, 2).to(h),
)
add("torch.batch_norm", lambda h: torch.batch_norm(h, None, None, MEAN, VARIANCE, False, 0.1, 1e-5, False), (2, 3))

# -- embeddings

add("embedding", lambda h, w: F.embedding(order(h), w), (3,), weights=((3, 2),))
add("embedding padding_idx", lambda h, w: F.embedding(order(h), w, padding_idx=1), (3,), weights=((3, 2),), differences=False)
for mode in ("sum", "mean", "max"):
    add(
        f"embedding_bag {mode}",
        lambda h, w, mode=mode: F.embedding_bag(order(h)[:, :2], w, mode=mode),
        (3,),
        weights=((3, 2),),
        truth=lambda h, w, mode=mode: getattr(torch, mode.replace("max", "amax"))(F.embedding(order(h)[:, :2], w), 1),
    )
add(
    "embedding_bag weights",
    lambda h, w: F.embedding_bag(order(h), w, mode="sum", per_sample_weights=h),
    (3,),
    weights=((3, 2),),
    truth=lambda h, w: (F.embedding(order(h), w) * h.unsqueeze(-1)).sum(1),
)

# -- losses as layers

SUM = {"reduction": "none"}
of_target: dict[str, Callable[[Tensor], Tensor]] = {
    "mse_loss": lambda h: F.mse_loss(h, targets(h), **SUM),
    "l1_loss": lambda h: F.l1_loss(h, targets(h), **SUM),
    "smooth_l1_loss": lambda h: F.smooth_l1_loss(h, targets(h), **SUM),
    "huber_loss": lambda h: F.huber_loss(h, targets(h), delta=0.5, **SUM),
    "binary_cross_entropy": lambda h: F.binary_cross_entropy(probability(h), targets(h), **SUM),
    "binary_cross_entropy_with_logits": lambda h: F.binary_cross_entropy_with_logits(h, targets(h), **SUM),
    "kl_div": lambda h: F.kl_div(h.log_softmax(-1), targets(h), **SUM),
    "poisson_nll_loss": lambda h: F.poisson_nll_loss(h, targets(h), **SUM),
    "soft_margin_loss": lambda h: F.soft_margin_loss(h, signs(h), **SUM),
    "hinge_embedding_loss": lambda h: F.hinge_embedding_loss(h, signs(h), **SUM),
    "multilabel_soft_margin_loss": lambda h: F.multilabel_soft_margin_loss(h, targets(h), **SUM),
    "multilabel_margin_loss": lambda h: F.multilabel_margin_loss(h, order(h), **SUM),
    "multi_margin_loss": lambda h: F.multi_margin_loss(h, labels(h), **SUM),
    "cross_entropy": lambda h: F.cross_entropy(h, labels(h), **SUM),
    "cross_entropy soft": lambda h: F.cross_entropy(h, targets(h), **SUM),
    "cross_entropy smoothed": lambda h: F.cross_entropy(h, labels(h), label_smoothing=0.1, **SUM),
    "nll_loss": lambda h: F.nll_loss(h.log_softmax(-1), labels(h), **SUM),
    "ctc_loss": lambda h: F.ctc_loss(
        h.view(len(h), 2, 2).movedim(1, 0).log_softmax(-1),
        torch.ones(len(h), 1, dtype=torch.long),
        torch.full((len(h),), 2),
        torch.ones(len(h), dtype=torch.long),
        **SUM,
    ),
}
for name, function in of_target.items():
    add(name, function)
add("nll_loss of images", lambda h: F.nll_loss(h.log_softmax(1), order(h)[:, 0], **SUM), (2, 2))
add("margin_ranking_loss", lambda a, b: F.margin_ranking_loss(a, b, signs(a), margin=0.1, **SUM), (4,), (4,))
add(
    "cosine_embedding_loss",
    lambda a, b: F.cosine_embedding_loss(a, b, signs(a[:, 0]), margin=-0.9, **SUM),
    (4,),
    (4,),
    broadcasts=False,
)
add(
    "triplet_margin_loss", lambda a, b, c: F.triplet_margin_loss(a, b, c, margin=5.0, **SUM), (4,), (4,), (4,), broadcasts=False
)
add(
    "triplet_margin_with_distance_loss",
    lambda a, b, c: F.triplet_margin_with_distance_loss(a, b, c, margin=5.0, **SUM),
    (4,),
    (4,),
    (4,),
    broadcasts=False,
)
add("gaussian_nll_loss", lambda a, b: F.gaussian_nll_loss(a, targets(a), positive(b), **SUM), (4,), (4,), broadcasts=False)
if hasattr(F, "linear_cross_entropy"):
    add("linear_cross_entropy", lambda h, w: F.linear_cross_entropy(h, w, labels(h), **SUM), (3,), weights=((2, 3),))

# -- modules

module("Bilinear", lambda: nn.Bilinear(2, 2, 2), (2,), (2,), broadcasts=False)
module("RNN", lambda: nn.RNN(2, 2, batch_first=True), (2, 2), after=lambda out: out[0])
module("LSTM", lambda: nn.LSTM(2, 1, batch_first=True), (2, 2), after=lambda out: out[0])
module("GRU", lambda: nn.GRU(2, 1, batch_first=True), (2, 2), after=lambda out: out[0])
module("RNNCell", lambda: nn.RNNCell(2, 2), (2,))
module("LSTMCell", lambda: nn.LSTMCell(2, 1), (2,), after=joined)
module("GRUCell", lambda: nn.GRUCell(2, 1), (2,))
module(
    "MultiheadAttention",
    lambda: nn.MultiheadAttention(2, 2, batch_first=True),
    (2, 2),
    (2, 2),
    (2, 2),
    after=lambda out: out[0],
    broadcasts=False,
)
module(
    "TransformerEncoderLayer",
    lambda: nn.TransformerEncoderLayer(2, 1, 2, batch_first=True, activation=torch.tanh),
    (2, 2),
    truth=True,
)
module("BatchNorm1d", lambda: nn.BatchNorm1d(2), (2, 3))
module("BatchNorm2d", lambda: nn.BatchNorm2d(2), (2, 2, 1))
module("InstanceNorm1d", lambda: nn.InstanceNorm1d(2, affine=True), (2, 3))
module("GroupNorm", lambda: nn.GroupNorm(1, 2), (2, 2))
module("LayerNorm", lambda: nn.LayerNorm(3), (3,))
module("RMSNorm", lambda: nn.RMSNorm(3), (3,))
module("PReLU", lambda: nn.PReLU(2), (2, 2))
module("weight_norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), (2,))
module("weight_norm whole", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 3), dim=None), (2,))
module("old weight_norm", lambda: old_weight_norm(nn.Linear(2, 3)), (2,))
module("spectral_norm", lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(2, 3)), (2,))
module("orthogonal", lambda: nn.utils.parametrizations.orthogonal(nn.Linear(2, 2), orthogonal_map="cayley"), (2,))
module("orthogonal exp", lambda: nn.utils.parametrizations.orthogonal(nn.Linear(2, 2), orthogonal_map="matrix_exp"), (2,))
module("ConvTranspose1d", lambda: nn.ConvTranspose1d(2, 1, 2), (2, 2))
for name in [
    "Hardsigmoid",
    "Softsign",
    "LogSoftmax",
    "Softmax2d",
    "Tanhshrink",
    "Mish",
    "Hardswish",
    "ReLU6",
    "Softshrink",
    "ELU",
]:
    make = getattr(nn, name)
    module(name, partial(make, 1) if name == "LogSoftmax" else make, (2, 2, 1))

OPERATIONS |= {
    name: OPERATIONS[name]._replace(truth=written)
    for name, written in {
        "nn.Hardsigmoid": hardsigmoid,
        "nn.weight_norm": lambda h, b, g, v: F.linear(h, v * (g / v.norm(dim=1, keepdim=True)), b),
        "nn.old weight_norm": lambda h, b, g, v: F.linear(h, v * (g / v.norm(dim=1, keepdim=True)), b),
    }.items()
}

# -- at zero

for name in (
    *(f"torch.{n}" for n in ("asinh", "atan", "cos", "cosh", "erf", "exp", "expm1", "i0", "sigmoid", "sin", "sinc", "sinh")),
    *(f"torch.{n}" for n in ("square", "tan", "tanh")),
    *(f"special.{n}" for n in ("i1 2", "log_ndtr", "ndtr", "erfcx")),
    *(f"F.{n}" for n in ("gelu", "logsigmoid", "mish", "silu", "softplus", "hardswish", "hardsigmoid")),
    *(
        "pow 3",
        "softmax",
        "log_softmax",
        "glu",
        "torch.logaddexp",
        "torch.logaddexp2",
        "prod with zeros",
        "cumprod",
        "torch.mul",
    ),
    *("logcumsumexp", "torch.logsumexp", "matmul", "matrix_power", "nn.GRU", "pow base"),
    *("scaled_dot_product_attention", "torch.prod axis", "rms_norm affine"),
):
    OPERATIONS[f"{name} at zero"] = OPERATIONS[name]._replace(at_zero=True)
OPERATIONS["torch.sinc at zero"] = OPERATIONS["torch.sinc at zero"]._replace(truth=sinc_near_zero)
