"""Functions of torch (2.13) whose kernels give wrong derivatives without a word, or none, and what runs in their place.

A kernel may be right in a forward pass, and wrong in one of three other places: in a backward pass (of first order: under
vmap over columns or samples, or with certain strides), when its backward pass is differentiated, and when that is
differentiated again. `INSTEAD` has a table for each number of derivatives, ``{function: function with the same values}``;
whoever watches a forward pass asks it once per call (`Instead`, `curvfunc.engine.observer`). What runs in place of a kernel is
written out in operations that are right, or is the same kernel on tensors that it treats right.

`curvfunc.check` finds kernels that are not listed here.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch
from torch.overrides import TorchFunctionMode

__all__ = ["INSTEAD", "Instead", "standardized"]

Functions = dict[Any, Callable[..., Any]]


class Instead(TorchFunctionMode):
    """Runs the functions of a table in place of those that it lists."""

    def __init__(self, functions: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.functions = functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, or what stands for it."""
        return self.functions.get(func, func)(*args, **(kwargs or {}))


# -- first order


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """On CPU, the backward pass with running statistics reads strided vectors as if they were dense.

    With axes of size one, which make layouts ambiguous, it does the same with a gradient whose axes have another order; as
    sequences, images have a single one.
    """
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    vectors: list[Any] = [t if t is None else t.contiguous() for t in (running_mean, running_var, weight, bias)]
    mean, var, weight, bias = vectors
    if input.ndim > 3 and 1 in (input.shape[0], *input.shape[2:]):
        return F.batch_norm(input.flatten(2), mean, var, weight, bias, False, momentum, eps).reshape(input.shape)
    return F.batch_norm(input, mean, var, weight, bias, False, momentum, eps)


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    if training or running_mean is None:
        return torch.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
    return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


def _precise_hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """In double precision, the kernel's slope is 1/6 in single precision."""
    return _hardsigmoid(input, inplace) if input.dtype == torch.float64 else F.hardsigmoid(input, inplace)


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = "use_mm_for_euclid_dist_if_necessary") -> Tensor:
    """The backward kernel is wrong under vmap, and has no derivative; where matrix products do the work it does not run."""
    large = x1.shape[-2] > 25 or x2.shape[-2] > 25
    modes = {None: large, "use_mm_for_euclid_dist_if_necessary": large, "use_mm_for_euclid_dist": True}
    if p == 2 and modes.get(compute_mode, False):
        return torch.cdist(x1, x2, p, compute_mode)  # type: ignore[arg-type]
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    if p == 0:
        return (difference != 0).sum(-1) + (difference * 0).sum(-1)
    if p == 1:
        return difference.abs().sum(-1)
    if p == float("inf"):
        return difference.abs().amax(-1)
    powers = difference.square() if p == 2 else _nonzero_power(difference.abs(), p)
    return _nonzero_power(powers.sum(-1), 1 / p)


def _nonzero_power(x: Tensor, p: float) -> Tensor:
    """x**p, with derivative 0 at 0."""
    zero = x == 0
    safe = torch.where(zero, 1.0, x)
    return torch.where(zero, 0.0, safe.sqrt() if p == 0.5 else safe**p)


def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """Its backward pass is wrong under vmap."""
    start = index % input.shape[dim]
    return torch.slice_scatter(input, src.unsqueeze(dim), dim, start, start + 1)


def _as_strided_scatter(
    input: Tensor, src: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Tensor:
    """Its backward pass is wrong, everywhere."""
    if not input.is_contiguous() or (storage_offset is None and input.storage_offset()):
        raise NotImplementedError(
            "as_strided_scatter has a wrong gradient in torch, and curvfunc can do without its kernel only where the input is "
            "contiguous and storage_offset is given. Use scatter, slice_scatter or index_put."
        )
    places = torch.arange(input.numel(), device=input.device).as_strided(size, stride, storage_offset or 0)
    return input.reshape(-1).scatter(0, places.reshape(-1), src.expand(size).reshape(-1)).view(input.shape)


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Under vmap the row of padding gets a gradient."""
    if padding_idx is None or _levels() == 0:
        return F.embedding(input, weight, padding_idx, *args, **kwargs)
    out = F.embedding(input, weight, None, *args, **kwargs)
    return torch.where((input == padding_idx % len(weight)).unsqueeze(-1), out.detach(), out)


def _linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    """In chunks, the gradient is made in the forward pass: wrong under vmap, and with derivative zero."""
    return F.linear_cross_entropy(*args, **kwargs)


def _roll(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Under vmap, a scalar's samples are rolled."""
    return torch.roll(input, *args, **kwargs) if input.ndim else input.clone()


def _index_fill(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    """Under vmap, the samples of a scalar are filled."""
    if input.ndim or not index.numel():
        return torch.index_fill(input, dim, index, value)
    return torch.as_tensor(value, dtype=input.dtype, device=input.device) + input * 0


# Without a graph of its own, a backward pass solves by `torch.linalg.lu_solve`, which takes the wrong factors where those
# of several matrices meet an axis of right-hand sides between them: two levels of vmap, or leading axes of size one.


def _levels() -> int:
    """How many transformations of torch.func are active."""
    return len(_functorch.get_interpreter_stack() or ())


def _det(input: Tensor) -> Tensor:
    return _det_by_lu(input) if _levels() > 1 else torch.linalg.det(input)


def _det_by_lu(input: Tensor) -> Tensor:
    lu, pivots = torch.linalg.lu_factor(input)
    return _parity(pivots).to(lu.dtype) * lu.diagonal(dim1=-2, dim2=-1).prod(-1)


def _parity(pivots: Tensor) -> Tensor:
    swaps = (pivots != torch.arange(1, pivots.shape[-1] + 1, device=pivots.device)).sum(-1)
    return 1 - 2 * (swaps % 2)


def _slogdet(input: Tensor) -> Any:
    if _levels() < 2 or input.is_complex():
        return torch.linalg.slogdet(input)
    lu, pivots = torch.linalg.lu_factor(input)
    diagonal = lu.diagonal(dim1=-2, dim2=-1)
    sign = _parity(pivots) * diagonal.detach().sign().prod(-1)
    return torch.return_types.linalg_slogdet((sign, diagonal.abs().log().sum(-1)))  # type: ignore[attr-defined]


def _logdet(input: Tensor) -> Tensor:
    if _levels() < 2 or input.is_complex():
        return torch.logdet(input)
    sign, value = _slogdet(input)
    return torch.where(sign < 0, float("nan"), value)


def _solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    if _levels() < 2:
        return torch.linalg.solve(A, B, left=left)
    inverse = torch.linalg.inv(A)
    if B.ndim == 1 or (A.ndim - 1 == B.ndim and B.shape == A.shape[:-1]):
        return (inverse @ B.unsqueeze(-1)).squeeze(-1)
    return inverse @ B if left else B @ inverse


def _solve_ex(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False) -> Any:
    if _levels() < 2:
        return torch.linalg.solve_ex(A, B, left=left, check_errors=check_errors)
    info = torch.linalg.inv_ex(A.detach(), check_errors=check_errors).info
    return torch.return_types.linalg_solve_ex((_solve(A, B, left=left), info))  # type: ignore[attr-defined]


def _tensorsolve(A: Tensor, B: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    if _levels() < 2:
        return torch.linalg.tensorsolve(A, B, dims)
    if dims is not None:
        A = A.movedim(tuple(dims), tuple(range(-len(dims), 0)))
    return (torch.linalg.inv(A.reshape(B.numel(), -1)) @ B.flatten()).reshape(A.shape[B.ndim :])


def _lu_solve(LU: Tensor, pivots: Tensor, B: Tensor, *, left: bool = True, adjoint: bool = False) -> Tensor:
    if not left:
        return _lu_solve(LU, pivots, B.mH, adjoint=not adjoint).mH
    P, L, U = torch.lu_unpack(LU, pivots)
    solve: Any = torch.linalg.solve_triangular
    if adjoint:
        return P @ solve(L.mH, solve(U.mH, B, upper=False), upper=True, unitriangular=True)
    return solve(U, solve(L, P.mH @ B, upper=False, unitriangular=True), upper=True)


# -- second order


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """The backward kernel has no derivative."""
    out = F.relu6(input + 3) / 6
    return input.copy_(out) if inplace else out


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """The derivative of the backward kernel is wrong."""
    others = [d for d in range(v.ndim) if dim == -1 or d != dim % v.ndim]
    return (v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1))).contiguous()


def _logcumsumexp(input: Tensor, dim: int) -> Tensor:
    """The derivative of the backward kernel by the cotangent is zero at zero, and the next one is nan."""
    if input.is_complex() or input.ndim == 0:
        return torch.logcumsumexp(input, dim)
    x, step, size = input, 1, input.shape[dim]
    while step < size:  # after step k, each entry stands for itself and the 2**k - 1 before it
        later, earlier = x.narrow(dim, step, size - step), x.narrow(dim, 0, size - step)
        x = torch.cat([x.narrow(dim, 0, step), torch.logaddexp(later, earlier)], dim)
        step *= 2
    return x if x is not input else input.clone()


def _sinc(input: Tensor) -> Tensor:
    """The second derivative is nan at 0."""
    if input.is_complex():
        return torch.sinc(input)
    x = torch.pi * input
    near = x.abs() < 0.5
    far = torch.where(near, 1.0, x)
    return torch.where(near, _series(torch.where(near, x, 0.0).square(), SINC), far.sin() / far)


SINC = [1 / 1, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800, 1 / 6227020800, -1 / 1307674368000]


def _series(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    out = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        out = out * x + c
    return out


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """The backward kernels have no derivatives."""
    unusual = input.is_floating_point() or sparse or scale_grad_by_freq or max_norm is not None
    if unusual or offsets is not None or input.ndim != 2 or input.shape[1] == 0:
        rest = (offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset)
        return F.embedding_bag(input, weight, *rest, padding_idx)
    rows = F.embedding(input, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    count: Any = input.shape[1]
    if padding_idx is not None:
        padding = (input == padding_idx % len(weight)).unsqueeze(-1)
        rows = rows.masked_fill(padding, float("-inf") if mode == "max" else 0.0)
        count = (~padding).sum(1)
        if mode == "max":
            return torch.where(count == 0, 0.0, rows.max(1).values)
    if mode == "max":
        return rows.max(1).values
    return rows.sum(1) if mode == "sum" else rows.sum(1) / (count if padding_idx is None else count.clamp_min(1))


# -- third order


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """In the third derivative of norms, the statistics are taken for constants."""
    return _affine(_normalized(input, [*range(-len(normalized_shape), 0)], eps), weight, bias).contiguous()


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    channels = [-1] + [1] * (input.ndim - 2)
    out = _normalized(input.reshape(len(input), num_groups, -1), [2], eps).reshape(input.shape)
    return _affine(out, *(None if p is None else p.reshape(channels) for p in (weight, bias)))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _running_instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        with torch.no_grad():  # for the update of the running statistics alone
            F.instance_norm(input, running_mean, running_var, None, None, True, momentum, eps)
    return _group_norm(input, input.shape[1], weight, bias, eps)


def _running_instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """By running statistics it is a batch normalization of all samples' channels as those of one sample."""
    if use_input_stats or running_mean is None or running_var is None:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


def _in_order_of_torch(instance_norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.instance_norm`, which has the arguments of ``F.instance_norm`` in another order."""

    @wraps(instance_norm)
    def reordered(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        use_input_stats: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        return instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)

    return reordered


def _rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    axes = [*range(-len(normalized_shape), 0)]
    return _affine(input * (input.square().mean(axes, keepdim=True) + eps).rsqrt(), weight, None).contiguous()


def standardized(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` in training mode, of weights: its kernel's derivatives are wrong under vmap."""
    if running_mean is not None:
        with torch.no_grad():  # for the update of the running statistics alone
            F.batch_norm(input, running_mean, running_var, None, None, True, momentum, eps)
    channels = [-1] + [1] * (input.ndim - 2)
    out = _normalized(input, [0, *range(2, input.ndim)], eps)
    return _affine(out, *(None if p is None else p.reshape(channels) for p in (weight, bias)))


def _normalized(x: Tensor, axes: list[int], eps: float) -> Tensor:
    centered = x - x.mean(axes, keepdim=True)
    return centered * (centered.square().mean(axes, keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _i1(input: Tensor) -> Tensor:
    """The third derivative is wrong at 0."""
    near = input.abs() < 0.1
    x = torch.where(near, input, 0.0)
    return torch.where(near, x / 2 * _series(x.square() / 4, I1), torch.special.i1(torch.where(near, 1.0, input)))


I1 = [1.0, 1 / 2, 1 / 12, 1 / 144, 1 / 2880, 1 / 86400]


def _triangular_solve(b: Tensor, A: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False) -> Any:
    """Its forward-mode derivative is wrong."""
    solution = torch.linalg.solve_triangular(A.mT if transpose else A, b, upper=upper != transpose, unitriangular=unitriangular)
    return torch.return_types.triangular_solve((solution, A.clone()))


def _cholesky_inverse(L: Tensor, upper: bool = False) -> Tensor:
    """Its forward-mode derivative is wrong."""
    return torch.cholesky_solve(torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L), L, upper)


def _scatter_reduce(input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True) -> Tensor:
    """The forward-mode derivative of products is wrong."""
    stack = _functorch.get_interpreter_stack() or ()
    if reduce == "prod" and any(level.key() == _functorch.TransformType.Jvp for level in stack):
        raise NotImplementedError(
            'scatter_reduce with reduce="prod" has a wrong forward-mode derivative in torch. Use torch.func.grad or vjp in '
            "place of jvp."
        )
    return torch.scatter_reduce(input, dim, index, src, reduce, include_self=include_self)


# -- the tables


def _unary(function: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """Whatever the name of its argument."""
    return lambda *args, **kwargs: function(*args, *kwargs.values())


def _functions(**replaced: Callable[..., Any]) -> Functions:
    """By name: a function is the same in torch and its modules, and as a method."""
    owners = (torch, torch.linalg, torch.special, Tensor)
    return {f: new for name, new in replaced.items() for owner in owners if (f := getattr(owner, name, None)) is not None}


_FIRST: Functions = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _running_instance_norm,
    F.hardsigmoid: _precise_hardsigmoid,
    F.embedding: _embedding,
    torch.batch_norm: _torch_batch_norm,
    torch.instance_norm: _in_order_of_torch(_running_instance_norm),
    torch.lu_solve: lambda b, LU_data, LU_pivots: _lu_solve(LU_data, LU_pivots, b),
    Tensor.lu_solve: lambda b, LU_data, LU_pivots: _lu_solve(LU_data, LU_pivots, b),
    torch.linalg.lu_solve: _lu_solve,
    torch.linalg.solve: _solve,
    torch.linalg.solve_ex: _solve_ex,
    torch.linalg.tensorsolve: _tensorsolve,
    **_functions(
        cdist=_cdist,
        select_scatter=_select_scatter,
        as_strided_scatter=_as_strided_scatter,
        roll=_roll,
        index_fill=_index_fill,
        det=_unary(_det),
        slogdet=_unary(_slogdet),
        logdet=_unary(_logdet),
    ),
}
if hasattr(F, "linear_cross_entropy"):
    _FIRST[F.linear_cross_entropy] = _linear_cross_entropy

_SECOND: Functions = {
    F.hardsigmoid: _hardsigmoid,
    F.embedding_bag: _embedding_bag,
    torch._weight_norm: _weight_norm,
    **_functions(logcumsumexp=_logcumsumexp, sinc=_unary(_sinc)),
}

_THIRD: Functions = {
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.rms_norm: _rms_norm,
    torch.layer_norm: _layer_norm,
    torch.group_norm: _group_norm,
    torch.instance_norm: _in_order_of_torch(_instance_norm),
    torch.rms_norm: _rms_norm,
    torch.special.i1: _unary(_i1),
    **_functions(
        det=_unary(_det_by_lu),
        triangular_solve=_triangular_solve,
        cholesky_inverse=_cholesky_inverse,
        scatter_reduce=_scatter_reduce,
    ),
}

# By the number of derivatives that are taken of the model's function.
INSTEAD: dict[int, Functions] = {1: _FIRST, 2: _FIRST | _SECOND, 3: _FIRST | _SECOND | _THIRD}
