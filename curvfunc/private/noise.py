"""Random numbers that hide a sample: from a generator, or from the operating system's, which nobody can predict."""

import math
import os
from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Generator, Tensor

from curvfunc.tensors.inputs import check_generator

__all__ = ["add_noise", "check_chance", "check_positive", "normal", "uniform"]

TERMS = 4  # normal numbers in a secure one


def add_noise(tree: Any, std: float, *, generator: Generator | None = None, secure: bool = False) -> Any:
    """The tree with independent noise N(0, std²) on each entry; nothing is changed in place.

    For a sum of clipped gradients, ``std`` is the noise multiplier times ``ClippedGrad(...).sensitivity``. Noise belongs on the
    sum over a whole batch, once, before anything is divided: where a batch goes through the model in parts, `accumulate` adds
    these up.

    Args:
        tree: Pytree of tensors [*shape].
        std: Standard deviation, which may be 0.
        generator: Source of the noise; the default generators if None. Who has enough of these numbers can predict the others.
        secure: Whether the noise comes from the operating system, as keys do: then nobody can repeat it. Each number is the sum
            of four normal ones in float64, divided by two, against attacks on the grid of floating-point numbers.

    Returns:
        A tree like the one that was given, of the same shapes.

    Raises:
        TypeError, ValueError: For a negative ``std``, or a generator beside ``secure``.

    References:
        Mironov 2012, "On significance of the least significant bits for differential privacy"; Holohan and Braghin 2021,
        "Secure random sampling in differential privacy", for sums of normal numbers.

    Example:
        >>> private.add_noise({"w": torch.zeros(2, 3)}, 0.5, secure=True)["w"].shape
        torch.Size([2, 3])
    """
    check_positive("std", std, zero=True)
    check_chance(generator, secure)
    return optree.tree_map(lambda t: t + std * normal(t, generator, secure) if std else t.clone(), tree)


def normal(like: Tensor, generator: Generator | None, secure: bool) -> Tensor:
    """Normal numbers of this shape, type and device."""
    if not secure:
        return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)
    pairs = -(-like.numel() // 2)
    total = torch.zeros(2 * pairs, dtype=torch.float64, device="cpu")
    for _ in range(TERMS):
        radius, angle = (-2 * (1 - uniform(pairs)).log()).sqrt(), 2 * math.pi * uniform(pairs)  # of Box and Muller
        total += torch.cat([radius * angle.cos(), radius * angle.sin()])
    return (total / TERMS**0.5)[: like.numel()].reshape(like.shape).to(like.device, like.dtype)


def uniform(size: int, generator: Generator | None = None, secure: bool = True) -> Tensor:
    """Numbers in [0, 1) in float64, all multiples of 2⁻⁵³ alike."""
    if not secure:
        device = "cpu" if generator is None else generator.device
        return torch.rand(size, dtype=torch.float64, generator=generator, device=device)
    if not size:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    bits = torch.frombuffer(bytearray(os.urandom(8 * size)), dtype=torch.int64)
    return (bits & ((1 << 53) - 1)).double() * 2.0**-53


def check_chance(generator: Any, secure: Any) -> None:
    """Raise unless the source of random numbers is one, and can be drawn from here."""
    if not isinstance(secure, bool):
        raise TypeError(f"secure must be True or False, got {secure!r}.")
    check_generator(generator)
    if secure and generator is not None:
        raise ValueError("secure takes the numbers of the operating system, and generator others. Pass one of them.")
    if torch.compiler.is_compiling() and (secure or generator is not None):
        raise ValueError(
            "compiled code draws from torch's default generators alone. Compile curvfunc.clipped_grad, and add the noise to "
            "its result outside: private.add_noise(clipped, std, ...)."
        )


def check_positive(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise unless it is a positive, finite number; or zero where that has a meaning."""
    if isinstance(value, bool | str | Tensor | Sequence) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    if not 0 <= value < math.inf or (value == 0 and not zero):
        raise ValueError(f"{name} must be {'at least 0' if zero else 'positive'} and finite, got {value!r}.")
