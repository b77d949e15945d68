"""Signal and noise in the gradients of samples."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvfunc.diagnostics.moments import Moments, check_samples, dot, listed, moments, scale, total, with_shared

__all__ = ["NoiseScale", "early_stopping", "noise_scale", "noise_scale_of_two", "signal_to_noise"]


@with_shared
def signal_to_noise(grad: Any, variance: Any, samples: int, *, reduction: str = "mean") -> dict[str, Tensor]:
    """Gradient signal-to-noise ratio of each layer, Σ m² / Σ s² over the layer's entries.

    It is that of one sample's gradient; the gradient of a batch of B has B times as much. Where there is no signal, N times the
    ratio is about 1.

    Returns:
        A scalar by layer; infinite without noise, NaN without noise and signal.

    References:
        Liu et al. 2020, "Understanding why neural networks generalize well through GSNR of parameters", for entries.

    Example:
        >>> grad, variance = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.1, 0.1])}
        >>> diagnostics.signal_to_noise(grad, variance, samples=2)  # s² = N³ / (N - 1) of the variance
        {'w': tensor(2.5000)}
    """
    return {layer: m.square() / m.trace() for layer, m in moments(grad, variance, samples, reduction).layers().items()}


class NoiseScale(NamedTuple):
    """The gradient noise scale and what it is made of.

    Attributes:
        scale: B = noise / signal, the batch size at which both are alike in a gradient.
        noise: Estimate of tr(Σ), the variance of a sample's gradient.
        signal: Estimate of ‖G‖², the squared norm of the true gradient. It has no bias, so that it may be negative. Average
            noise and signal over steps before the ratio is taken, which is biased.
    """

    scale: Tensor
    noise: Tensor
    signal: Tensor


@with_shared
def noise_scale(grad: Any, variance: Any, samples: int, *, reduction: str = "mean") -> NoiseScale:
    """Simple gradient noise scale from one batch, tr(Σ) / ‖G‖² with tr(Σ) = Σ s² and ‖G‖² = ‖m‖² − Σ s² / N.

    These are the estimates of `noise_scale_of_two` from all batches of one sample beside that of N.

    Returns:
        A `NoiseScale`: three scalars.

    References:
        McCandlish, Kaplan, Amodei et al. 2018, "An empirical model of large-batch training", eq. 2.9 and appendix A.1.

    Example:
        >>> grad, variance = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.1, 0.1])}
        >>> diagnostics.noise_scale(grad, variance, samples=2)
        NoiseScale(scale=tensor(0.5000), noise=tensor(1.6000), signal=tensor(3.2000))
    """
    m = moments(grad, variance, samples, reduction)
    return _ratio(m.trace(), m.square() - m.trace() / samples)


@with_shared
def noise_scale_of_two(small: Any, small_samples: int, big: Any, big_samples: int, *, reduction: str = "mean") -> NoiseScale:
    """Simple gradient noise scale from the gradients of two batches of different sizes b < B.

        ‖G‖² = (B ‖g_B‖² − b ‖g_b‖²) / (B − b),    tr(Σ) = (‖g_b‖² − ‖g_B‖²) / (1/b − 1/B)

    Args:
        small: Result of `Grad` for the small batch, [*shape] per parameter.
        small_samples: b, positive.
        big: Result of `Grad` for the big batch, [*shape] per parameter.
        big_samples: B, larger than b.

    Returns:
        A `NoiseScale`: three scalars, noisy ones: average noise and signal over steps.

    References:
        McCandlish, Kaplan, Amodei et al. 2018, "An empirical model of large-batch training", appendix A.1.

    Example:
        >>> small, big = {"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([2.0, 0.0])}
        >>> diagnostics.noise_scale_of_two(small, 1, big, 5).noise
        tensor(1.2500)
    """
    check_samples("small_samples", small_samples)
    check_samples("big_samples", big_samples, small_samples + 1, "the big batch is the larger one")
    _, (a, b) = listed(small=small, big=big)
    less = dot(a, a) * (scale(small_samples, reduction) / small_samples) ** 2
    more = dot(b, b) * (scale(big_samples, reduction) / big_samples) ** 2
    signal = (big_samples * more - small_samples * less) / (big_samples - small_samples)
    return _ratio((less - more) / (1 / small_samples - 1 / big_samples), signal)


@with_shared
def early_stopping(grad: Any, variance: Any, samples: int, *, reduction: str = "mean") -> Tensor:
    """Evidence that the gradient is but noise of sampling, so that training may stop: 1 − (N/P) Σ m² / s² over P entries.

    Stop where it is positive. It is that of all parameters together; pass those of one layer for one. Entries without variance
    and gradient (a ReLU that is dead) have no evidence and do not count in P.

    Args:
        grad: Result of `Grad`, [*shape] per parameter, on the training data.

    Returns:
        A scalar; NaN where no entry has evidence, minus infinity where one has a gradient without variance.

    References:
        Mahsereci, Balles, Lassner, Hennig 2017, "Early stopping without a validation set".

    Example:
        >>> grad, variance = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.1, 0.1])}
        >>> diagnostics.early_stopping(grad, variance, samples=2)
        tensor(-4.)
    """
    m: Moments = moments(grad, variance, samples, reduction)
    ratios, counts = [], []
    for mean, v in zip(m.mean, m.variance, strict=True):
        silent = (v == 0) & (mean == 0)
        ratios.append((mean.square() / torch.where(silent, 1.0, v)).sum())
        counts.append((~silent).sum().to(v.dtype))
    return 1 - samples * total(ratios) / total(counts)


def _ratio(noise: Tensor, signal: Tensor) -> NoiseScale:
    return NoiseScale(noise / signal, noise, signal)
