"""Batches of the kind that accounts of privacy are for: each sample is in each of them by the same chance, by itself."""

from collections.abc import Iterator

from torch import Generator, Tensor

from curvfunc.private.noise import check_chance, uniform

__all__ = ["poisson_batches"]


def poisson_batches(
    samples: int, rate: float, *, steps: int, generator: Generator | None = None, secure: bool = False
) -> Iterator[Tensor]:
    """Indices of the samples in each of several batches; a sample is in a batch with probability ``rate``, by itself.

    So batches are of different sizes, and one may be empty: then a step of noise alone is due, and leaving it out would tell
    that it was. Shuffled batches of one size are another mechanism, which the usual accounts do not cover.

    Args:
        samples: Number N of samples in the data set.
        rate: q, in (0, 1].
        steps: Number of batches.
        generator: Source of the choice, on the CPU; the default generator if None.
        secure: Whether the choice comes from the operating system, which nobody can repeat.

    Returns:
        An iterator over integer tensors [B] in increasing order, B other in each batch.

    Raises:
        TypeError, ValueError: For what is no number of samples or steps, or no rate.

    References:
        Abadi et al. 2016, "Deep learning with differential privacy", sec. 3.1; Chua et al. 2024, "How private are DP-SGD
        implementations?", for the difference that it makes.

    Example:
        >>> batches = list(private.poisson_batches(10, 0.5, steps=3, generator=torch.Generator().manual_seed(0)))
        >>> len(batches), [len(batch) <= 10 for batch in batches]
        (3, [True, True, True])
    """
    for name, value in (("samples", samples), ("steps", steps)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}.")
    if samples < 1 or steps < 0:
        raise ValueError(f"samples must be positive and steps at least 0, got {samples} and {steps}.")
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise TypeError(f"rate must be a number, got {rate!r} of type {type(rate).__name__}.")
    if not 0 < rate <= 1:
        raise ValueError(f"rate must be in (0, 1], the chance of a sample to be in a batch, such as B / N; got {rate!r}.")
    check_chance(generator, secure)
    return ((uniform(samples, generator, secure) < rate).nonzero().flatten() for _ in range(steps))
