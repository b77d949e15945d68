"""Calls of torch's functions, as a mode sees them: the tensors in them, and which of them are more than their result."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvfunc.engine.effects import HIDDEN_WRITES
from curvfunc.rules import RULES
from curvfunc.rules.batch_axis import RULES as PROPAGATED
from curvfunc.rules.batch_axis import mutates

__all__ = [
    "BATCH_NORMS",
    "BATCH_STATISTICS",
    "DROPS",
    "ESCAPES",
    "ORDINARY",
    "holds_tensor",
    "name_of",
    "takes_batch_statistics",
    "tensors_in",
]


def tensors_in(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments, nested lists and tuples included."""
    found: list[Tensor] = []
    for a in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, (tuple, list)):
            found += tensors_in(a, {})
    return found


def holds_tensor(out: Any) -> bool:
    """Whether a result is a tensor, or has one in it."""
    return isinstance(out, Tensor) or (isinstance(out, (tuple, list)) and any(holds_tensor(o) for o in out))


def name_of(func: Any) -> str:
    """The function's name, for messages."""
    return getattr(func, "__name__", str(func))


def _escape_table() -> dict[Any, str]:
    """Functions that tell Python values, shapes or nodes of tensors, that may draw at random, and that set attributes."""
    values = """item tolist numpy __float__ __int__ __bool__ __index__ __complex__ __array__ __contains__ equal allclose
        is_nonzero"""
    random = """rand randn randint randperm normal bernoulli multinomial poisson rand_like randn_like randint_like
        native_dropout normal_ uniform_ random_ bernoulli_ exponential_ geometric_ log_normal_ cauchy_ dropout dropout_
        dropout1d dropout2d dropout3d alpha_dropout alpha_dropout_ feature_alpha_dropout feature_dropout rrelu rrelu_
        gumbel_softmax multi_head_attention_forward scaled_dot_product_attention lstm gru rnn_tanh rnn_relu
        kaiming_uniform_"""
    table = {}
    for names, what in ((values, "value"), ("size __len__ numel nelement", "shape"), (random, "random")):
        for name in names.split():
            for space in (torch, Tensor, F, nn.init):
                if (func := getattr(space, name, None)) is not None:
                    table[func] = what
    table[Tensor.shape.__get__] = "shape"  # type: ignore[attr-defined]
    table[Tensor.grad_fn.__get__] = "node"  # type: ignore[union-attr]
    for name in dir(Tensor):
        if (setter := getattr(getattr(Tensor, name), "__set__", None)) is not None:
            table[setter] = "set"
    return table


def _is_on(name: str, place: int, default: Any) -> Callable[[Sequence[Any], dict[str, Any]], bool]:
    return lambda args, kwargs: bool(args[place] if len(args) > place else kwargs.get(name, default))


def _drop_table() -> dict[Any, Callable[[Sequence[Any], dict[str, Any]], bool]]:
    """Functions that draw at random only where an argument has them do so."""
    table: dict[Any, Callable[[Sequence[Any], dict[str, Any]], bool]] = {}
    table[F.scaled_dot_product_attention] = _is_on("dropout_p", 4, 0.0)
    table[F.multi_head_attention_forward] = _is_on("training", 14, True)
    for name in ("rrelu", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"):
        table[getattr(F, name)] = _is_on("training", 3 if name == "rrelu" else 2, name not in ("rrelu", "alpha_dropout"))
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        table[getattr(torch, name)] = lambda args, kwargs: len(args) < 7 or bool(args[5] and args[6])
    return table


ESCAPES, DROPS = _escape_table(), _drop_table()

BATCH_NORMS = {F.batch_norm, torch.batch_norm, torch.native_batch_norm}

# Functions of which nothing but their result is to be looked at: most calls are of these.
ORDINARY = {
    func
    for func in {*PROPAGATED, *RULES}
    if not (func in ESCAPES or func in HIDDEN_WRITES or func in BATCH_NORMS or mutates(func))
}

BATCH_STATISTICS = (
    "batch normalization in training mode mixes the samples of a batch, so that per-sample gradients and curvature are not "
    "defined: call module.eval() before functionalize's function runs (running statistics are then used), or use GroupNorm or "
    "LayerNorm."
)


def takes_batch_statistics(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of a batch normalization is in training mode."""
    return bool(kwargs.get("training", args[5] if len(args) > 5 else False))
