"""Which function runs in place of which: a table for each number of derivatives, and one of what is watched in parts."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvfunc.rules.kernels.attention import attention
from curvfunc.rules.kernels.convolutions import CONVOLUTIONS
from curvfunc.rules.kernels.elementwise import angle, hardsigmoid, i1, precise_hardsigmoid, prelu, prelu_of_levels, sgn, sinc
from curvfunc.rules.kernels.indexing import (
    as_strided_scatter,
    embedding,
    embedding_bag,
    embedding_of_any_size,
    index_fill,
    roll,
    scatter_reduce,
    select_scatter,
)
from curvfunc.rules.kernels.libraries import as_laid_out, data_ptr, without_cudnn
from curvfunc.rules.kernels.linear_algebra import (
    cholesky_inverse,
    det,
    det_by_lu,
    logdet,
    lu_solve,
    slogdet,
    solve,
    solve_ex,
    tensorsolve,
    triangular_solve,
)
from curvfunc.rules.kernels.norms import (
    batch_norm,
    batch_norm_of_any_size,
    group_norm,
    in_order_of_torch,
    instance_norm,
    layer_norm,
    rms_norm,
    running_instance_norm,
    torch_batch_norm,
    weight_norm,
    weight_norm_of_any_size,
)
from curvfunc.rules.kernels.reductions import cdist, linear_cross_entropy, logcumsumexp

__all__ = ["INSTEAD", "PARTS", "Instead"]

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


def _unary(function: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """Whatever the name of its argument."""
    return lambda *args, **kwargs: function(*args, *kwargs.values())


def _functions(**replaced: Callable[..., Any]) -> Functions:
    """By name: a function is the same in torch and its modules, and as a method."""
    owners = (torch, torch.linalg, torch.special, Tensor)
    return {f: new for name, new in replaced.items() for owner in owners if (f := getattr(owner, name, None)) is not None}


_FIRST: Functions = {
    F.batch_norm: batch_norm,
    F.instance_norm: running_instance_norm,
    F.hardsigmoid: precise_hardsigmoid,
    F.embedding: embedding,
    F.prelu: prelu_of_levels,
    torch.batch_norm: torch_batch_norm,
    torch.instance_norm: in_order_of_torch(running_instance_norm),
    torch._weight_norm: weight_norm_of_any_size,
    torch.lu_solve: lambda b, LU_data, LU_pivots: lu_solve(LU_data, LU_pivots, b),
    Tensor.lu_solve: lambda b, LU_data, LU_pivots: lu_solve(LU_data, LU_pivots, b),
    torch.linalg.lu_solve: lu_solve,
    torch.linalg.solve: solve,
    torch.linalg.solve_ex: solve_ex,
    torch.linalg.tensorsolve: tensorsolve,
    Tensor.data_ptr: data_ptr,
    torch._cudnn_rnn_flatten_weight: as_laid_out,
    **{f: without_cudnn(f) for f in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
    **_functions(
        prelu=prelu_of_levels,
        cdist=cdist,
        select_scatter=select_scatter,
        as_strided_scatter=as_strided_scatter,
        roll=roll,
        index_fill=index_fill,
        det=_unary(det),
        slogdet=_unary(slogdet),
        logdet=_unary(logdet),
    ),
}
if hasattr(F, "linear_cross_entropy"):
    _FIRST[F.linear_cross_entropy] = linear_cross_entropy

_SECOND: Functions = {
    **CONVOLUTIONS,
    F.batch_norm: batch_norm_of_any_size,
    F.embedding: embedding_of_any_size,
    F.hardsigmoid: hardsigmoid,
    F.prelu: prelu,
    F.embedding_bag: embedding_bag,
    torch._weight_norm: weight_norm,
    **_functions(prelu=prelu, logcumsumexp=logcumsumexp, sinc=_unary(sinc), angle=_unary(angle), sgn=_unary(sgn)),
}

_THIRD: Functions = {
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.rms_norm: rms_norm,
    torch.layer_norm: layer_norm,
    torch.group_norm: group_norm,
    torch.instance_norm: in_order_of_torch(instance_norm),
    torch.rms_norm: rms_norm,
    torch.special.i1: _unary(i1),
    **_functions(
        det=_unary(det_by_lu),
        triangular_solve=triangular_solve,
        cholesky_inverse=cholesky_inverse,
        scatter_reduce=scatter_reduce,
    ),
}

# By the number of derivatives that are taken of the model's function.
INSTEAD: dict[int, Functions] = {1: _FIRST, 2: _FIRST | _SECOND, 3: _FIRST | _SECOND | _THIRD}

# Functions that do the same in operations whose second derivatives are known one by one, but not those of the whole.
_PARTS: Functions = {F.scaled_dot_product_attention: attention, F.rms_norm: rms_norm, torch.rms_norm: rms_norm}
_NORMS: Functions = {f: _THIRD[f] for f in (F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm)}
PARTS: dict[int, Functions] = {1: {}, 2: _PARTS, 3: _PARTS | _NORMS}
