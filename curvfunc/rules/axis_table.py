"""The table of operations that take the sample axis along: names in lists, each list under its rule."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvfunc.rules.axis_rules import (
    REDUCED,
    addmm,
    aligned_self,
    attention,
    bilinear,
    distance,
    einsum,
    expand_as,
    extremum,
    fresh,
    frozen_statistics,
    gather,
    getitem,
    join,
    matmul,
    movedim,
    normalized,
    padding,
    permute,
    plain_lookup,
    reshape,
    rmatmul,
    scatter,
    setitem,
    swap,
    unsqueeze,
)
from curvfunc.rules.batch_axis import (
    RULES,
    WRITING,
    Rule,
    along,
    batched,
    dimensions,
    elementwise,
    in_place,
    keep,
    of_self,
    reduce,
    trailing,
    varargs,
)


def _register(rule: Rule, names: str, *spaces: Any) -> None:
    """Enter ``rule`` for each of ``names`` in each namespace that has it."""
    for space in spaces or (torch, Tensor, F, torch.special, torch.linalg):
        for name in names.split():
            func = getattr(space, name, None)
            if callable(func):  # torch.float is a dtype
                RULES[func] = rule


def _underscored(names: str) -> str:
    return " ".join(name + "_" for name in names.split())


_ELEMENTWISE = """
    abs absolute acos acosh arccos arccosh arcsin arcsinh arctan arctanh asin asinh atan atanh ceil conj conj_physical
    cos cosh deg2rad digamma entr erf erfc erfcx erfinv exp exp2 expit expm1 fix floor frac gammaln i0 i0e i1 i1e
    isfinite isinf isnan isneginf isposinf lgamma log log10 log1p log2 log_ndtr logit multigammaln mvlgamma nan_to_num
    ndtr ndtri neg negative polygamma positive psi rad2deg reciprocal resolve_conj resolve_neg round rsqrt sgn sigmoid
    sign signbit sin sinc sinh sqrt square tan tanh trunc bernoulli
    add addcdiv addcmul arctan2 atan2 clamp clamp_max clamp_min clip copysign div divide eq float_power floor_divide
    fmax fmin fmod ge greater greater_equal gt heaviside hypot isclose ldexp le lerp less less_equal logaddexp
    logaddexp2 lt masked_fill maximum minimum mul multiply ne nextafter not_equal pow remainder rsub sub subtract
    true_divide where xlog1py xlogy zeta complex polar
    bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor logical_and logical_not
    logical_or logical_xor
    celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 rrelu selu silu
    softplus softshrink softsign tanhshrink threshold
    __abs__ __add__ __and__ __div__ __eq__ __floordiv__ __ge__ __gt__ __invert__ __le__ __lshift__ __lt__ __mod__
    __mul__ __ne__ __neg__ __or__ __pos__ __pow__ __radd__ __rand__ __rdiv__ __rfloordiv__ __rlshift__ __rmod__
    __rmul__ __ror__ __rpow__ __rrshift__ __rshift__ __rsub__ __rtruediv__ __rxor__ __sub__ __truediv__ __xor__"""
_DROPOUT = "alpha_dropout dropout dropout1d dropout2d dropout3d feature_alpha_dropout feature_dropout"

_unary = of_self(lambda axis, x, out, args, kw: axis)
_any_axis = keep(lambda axis, x, args, kw: True)
_first_axis = keep(lambda axis, x, args, kw: axis == 0 and x.ndim >= 2)
_reverse = of_self(lambda axis, x, out, args, kw: x.ndim - 1 - axis)
_swap_last = of_self(lambda axis, x, out, args, kw: axis if axis < x.ndim - 2 else 2 * x.ndim - 3 - axis)

_register(elementwise, _ELEMENTWISE)
_register(in_place(elementwise), _underscored(_ELEMENTWISE) + WRITING)
_register(in_place(elementwise), "copy_ fill_ zero_ normal_ uniform_ exponential_ random_", Tensor)
_register(_any_axis, _DROPOUT + " prelu one_hot bucketize")
_register(in_place(_any_axis), _underscored(_DROPOUT))
_register(
    _unary,
    "to type type_as float double half bfloat16 int long short bool byte char cfloat cdouble cpu cuda clone contiguous "
    "detach detach_ requires_grad_ zeros_like ones_like full_like empty_like rand_like randn_like",
    torch,
    Tensor,
)
_register(fresh, "new_zeros new_ones new_empty new_full", Tensor)

_register(trailing(1), "linear", F)
for _k in (1, 2, 3):
    _register(batched(_k + 2), f"conv{_k}d conv_transpose{_k}d", F)
    for _pool in (f"max_pool{_k}d", f"adaptive_max_pool{_k}d"):
        _register(trailing(_k), f"{_pool} {_pool}_with_indices", torch, F)
    _register(trailing(_k), f"avg_pool{_k}d adaptive_avg_pool{_k}d lp_pool{_k}d", torch, F)
_register(trailing(2), "tril triu", torch, Tensor)
_register(trailing(3), "pixel_shuffle pixel_unshuffle", F)
_register(keep(lambda axis, x, args, kw: axis < 2), "interpolate upsample upsample_nearest upsample_bilinear", F)
_register(batched(4), "unfold", F)
_register(batched(3), "fold affine_grid", F)
_register(keep(padding), "pad", F)
_register(keep(frozen_statistics), "batch_norm", torch, F)
_register(keep(normalized), "layer_norm rms_norm", torch, F)
_register(keep(lambda axis, x, args, kw: axis == 0 and x.ndim >= 3), "instance_norm local_response_norm", F)
_register(_first_axis, "group_norm channel_shuffle native_channel_shuffle", torch, F)
_register(keep(lambda axis, x, args, kw: plain_lookup(args, kw)), "embedding", F)
_register(keep(lambda axis, x, args, kw: x.ndim == 2 and axis == 0 and plain_lookup(args, kw)), "embedding_bag", F)
_register(bilinear, "bilinear", F)
_register(attention, "scaled_dot_product_attention", F)

_register(along(1), "softmax log_softmax softmin cumsum cumprod logcumsumexp cummax cummin narrow index_select")
_register(along(1), "_safe_softmax", torch)
_register(along(1, -1), "glu sort argsort")
_register(along(2, -1), "topk diff")
_register(along(2, 1), "normalize", F)
_register(along(4, -1), "gumbel_softmax", F)
_register(along(2, 0), "chunk split tensor_split split_with_sizes unsafe_chunk unsafe_split", torch, Tensor)
_register(along(2, name="dims"), "roll", torch, Tensor)
_register(along(2), "repeat_interleave", torch, Tensor)
_register(along(1, name="dimension"), "unfold", Tensor)
_register(along(2, -1), "fft ifft rfft irfft hfft ihfft", torch.fft)
_register(along(2, (-2, -1)), "fft2 ifft2 rfft2 irfft2", torch.fft)
_register(along(2), "fftn ifftn rfftn irfftn", torch.fft)
_register(keep(lambda axis, x, args, kw: axis not in dimensions(varargs(args, kw, "dims"), x.ndim)), "flip", torch, Tensor)

_register(
    REDUCED,
    "sum nansum mean nanmean prod amax amin aminmax var std var_mean std_mean logsumexp argmax argmin all any "
    "count_nonzero median nanmedian select",
)
_register(reduce(1, -1), "mode")
_register(reduce(1, 0), "unbind")
_register(reduce(2, -1), "kthvalue")
_register(reduce(2), "norm vector_norm")
_register(reduce(2, (-2, -1)), "matrix_norm")
_register(extremum, "max min", torch, Tensor)

_register(of_self(reshape), "flatten unflatten view reshape view_as reshape_as ravel squeeze", torch, Tensor)
_register(of_self(unsqueeze), "unsqueeze")
_register(aligned_self, "expand broadcast_to repeat tile", torch, Tensor)
_register(expand_as, "expand_as", Tensor)
_register(of_self(permute), "permute", torch, Tensor)
_register(swap("dim0", "dim1"), "transpose swapdims", torch, Tensor)
_register(swap("axis0", "axis1"), "swapaxes", torch, Tensor)
_register(of_self(movedim), "movedim moveaxis", torch, Tensor)
_register(_reverse, "t", torch, Tensor)
_register(_swap_last, "adjoint", torch, Tensor)
_register(_any_axis, "view_as_real real imag angle", torch, Tensor)
_register(keep(lambda axis, x, args, kw: axis < x.ndim - 1), "view_as_complex", torch)
for _name in ("real", "imag"):
    RULES[getattr(Tensor, _name).__get__] = _any_axis
for _name, _rule in (("T", _reverse), ("H", _reverse), ("mT", _swap_last), ("mH", _swap_last)):
    RULES[getattr(Tensor, _name).__get__] = _rule
_register(getitem, "__getitem__", Tensor)
_register(setitem, "__setitem__", Tensor)
_register(join(new_dim=False), "cat concat concatenate", torch)
_register(join(new_dim=True), "stack", torch)
_register(gather, "gather", torch, Tensor)
_register(scatter, "scatter scatter_add", torch, Tensor)
_register(in_place(scatter), "scatter_ scatter_add_", Tensor)

_register(matmul, "matmul __matmul__ mm bmm mv", torch, Tensor, torch.linalg)
_register(rmatmul, "__rmatmul__", Tensor)
_register(addmm("mat1", "mat2"), "addmm", torch, Tensor)
_register(addmm("batch1", "batch2"), "baddbmm", torch, Tensor)
_register(addmm("mat", "vec"), "addmv", torch, Tensor)
_register(einsum, "einsum", torch)
_register(distance(2, 1), "cosine_similarity", F)
_register(distance(99, -1), "pairwise_distance", F)
