"""Normalizations, z = x̂ γ + β, where x̂ does not depend on the parameters: dγ = Σ_s g x̂ and dβ = Σ_s g."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from curvfunc.rules.registry import Use, rule
from curvfunc.uses.forms import Direct, Form, sum_to_shape


@rule(F.layer_norm, arguments="input normalized_shape weight bias eps", parameters="weight bias")
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> dict[str, Form]:
    """x [n, *s, *normalized_shape]; γ, β [*normalized_shape]."""
    return _last_axes(lambda: F.layer_norm(input, normalized_shape, eps=eps), weight, bias)


@rule(F.rms_norm, arguments="input normalized_shape weight eps", parameters="weight")
def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> dict[str, Form]:
    """x [n, *s, *normalized_shape]; γ [*normalized_shape]."""
    return _last_axes(lambda: F.rms_norm(input, normalized_shape, eps=eps), weight, None)


def _last_axes(normalized: Callable[[], Tensor], weight: Tensor | None, bias: Tensor | None) -> dict[str, Form]:
    forms: dict[str, Form] = {}
    if weight is not None:
        w = weight.shape
        forms["weight"] = Direct(lambda g: sum_to_shape(g * normalized(), w), w)
    if bias is not None:
        b = bias.shape
        forms["bias"] = Direct(lambda g: sum_to_shape(g, b), b, reads=False)
    return forms


@rule(F.group_norm, arguments="input num_groups weight bias eps", parameters="weight bias")
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    use: Use,
) -> dict[str, Form]:
    """x [n, *b, c, *s]; γ, β [c]."""
    return _channels(input, lambda x: F.group_norm(x, num_groups, eps=eps), weight, bias, use)


@rule(
    F.instance_norm,
    arguments="input running_mean running_var weight bias use_input_stats momentum eps",
    parameters="weight bias running_mean running_var",
)
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    use: Use,
) -> Any:
    """x [n, *b, c, *s]; γ, β [c]."""
    if use_input_stats:
        return _channels(input, lambda x: F.instance_norm(x, eps=eps), weight, bias, use)
    return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps, use=use)


@rule(
    F.batch_norm,
    arguments="input running_mean running_var weight bias training momentum eps",
    parameters="weight bias running_mean running_var",
)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    use: Use,
) -> Any:
    """x [n, *b, c, *s] normalized by running statistics; γ, β [c]."""
    if training or {"running_mean", "running_var"} & (use.parameters | use.sampled):
        return NotImplemented
    return _channels(input, lambda x: F.batch_norm(x, running_mean, running_var, eps=eps), weight, bias, use)


def _channels(
    input: Tensor, normalize: Callable[[Tensor], Tensor], weight: Tensor | None, bias: Tensor | None, use: Use
) -> dict[str, Form]:
    """Channels follow the operation's own batch axis, which under vmap comes after the sample axis."""
    channel = 1 if use.axis is not None else 2

    def normalized() -> Tensor:
        x = normalize(input.flatten(0, channel - 1)) if channel > 1 else normalize(input)
        return x.reshape(input.shape)

    def total(g: Tensor) -> Tensor:
        others = [d for d in range(2, g.ndim) if d != channel + 1]
        return g.sum(others) if others else g

    forms: dict[str, Form] = {}
    if weight is not None:
        forms["weight"] = Direct(lambda g: total(g * normalized()), weight.shape)
    if bias is not None:
        forms["bias"] = Direct(total, bias.shape, reads=False)
    return forms
