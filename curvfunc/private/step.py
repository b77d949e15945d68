"""The gradient of a private step."""

from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
from torch import Generator, Tensor

from curvfunc import losses
from curvfunc.private.noise import add_noise, check_chance, check_positive
from curvfunc.quantities.call import compute
from curvfunc.quantities.specs import ClippedGrad
from curvfunc.tensors.docstrings import documented
from curvfunc.tensors.inputs import flatten_params, read_batch

__all__ = ["noisy_grad"]


@documented()
@torch.no_grad()
def noisy_grad(
    model_fn: Callable[[Any, Any], Tensor],
    params: Any,
    X: Any,
    y: Any,
    *,
    max_norm: float | Mapping[str, float],
    noise_multiplier: float,
    denominator: float,
    per_layer: bool = False,
    loss_fn: Callable[[Tensor, Any], Tensor] = losses.SUMMED,
    generator: Generator | None = None,
    secure: bool = False,
) -> Any:
    """A private estimate of the gradient of the mean loss, (Σₙ min(1, C / ‖gₙ‖) gₙ + N(0, (σC)² I)) / D.

    A batch without samples gives noise alone.

    Args:
        X: Input, a tensor [N, ...] or a pytree of tensors with leading sample axis N, of which there may be none.
        max_norm: C, the largest norm that a sample's gradient keeps, or one for each layer; see `curvfunc.clipped_grad`.
        noise_multiplier: σ, the standard deviation of the noise over what one sample can add: C, or for bounds by name the norm
            of these.
        denominator: D, the same for all batches: the expected number of samples, which is the rate times that of the data.
        per_layer: Whether each layer is clipped by itself.
        loss_fn: ``(output, y) -> scalar`` that sums over samples; by default cross-entropy, summed. A mean is refused.
        generator: Source of the noise; the default generators if None.
        secure: Whether the noise comes from the operating system instead; see `add_noise`.

    Returns:
        A tree like ``params``, [*shape] per parameter, without graph.

    Raises:
        ValueError: For numbers that are not positive, losses that are no sum, models in which samples depend on each other, and
            a generator beside ``secure``.

    References:
        Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> given = {"max_norm": 1.0, "noise_multiplier": 1.1, "denominator": 8.0}
        >>> private.noisy_grad(model_fn, params, torch.randn(8, 4), torch.arange(8) % 3, **given)["weight"].shape
        torch.Size([3, 4])
    """
    spec = ClippedGrad(max_norm, per_layer)
    check_positive("noise_multiplier", noise_multiplier, zero=True)
    check_positive("denominator", denominator)
    check_chance(generator, secure)
    if read_batch(X, y, None, may_be_empty=True).total:
        clipped = compute(model_fn, params, X, y, spec, loss_fn=loss_fn)
    else:  # not every model runs on nothing
        losses.refuse_means(losses.normalize(loss_fn))
        flatten_params(params)  # for its errors
        clipped = optree.tree_map(torch.zeros_like, params)
    noisy = add_noise(clipped, noise_multiplier * spec.sensitivity, generator=generator, secure=secure)
    return optree.tree_map(lambda t: t / denominator, noisy)
