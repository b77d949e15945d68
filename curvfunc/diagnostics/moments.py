"""Mean and variance of the gradients of samples, from results that have the scale of their loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvfunc.tensors.docstrings import documented, entries
from curvfunc.tensors.inputs import flatten_params
from curvfunc.tensors.layers import by_layer
from curvfunc.tensors.precision import at_least_float32

__all__ = ["Moments", "check_number", "check_samples", "dot", "listed", "moments", "scale", "with_shared"]

with_shared = documented(
    entries(
        """
        grad: Result of `Grad`, [*shape] per parameter: the mean m of the samples' gradients, or of a loss that is a sum, N m.
        variance: Result of `Variance`, [*shape] per parameter. Their variance s², with N − 1 below, is N³ / (N − 1) times this,
            or of a loss that is a sum, N / (N − 1) times.
        samples: N, of which both are.
        dots: ⟨gₙ, g⟩ of all parameters, [N]: `inner_products`, or ``batch_dot_total(...).sum(1)``.
        reduction: "mean" or "sum", that of the loss.
        """
    ),
    entries(
        """
        TypeError: If a number is none, or an argument is no tree of tensors.
        ValueError: If trees are of different parameters, numbers out of range, or shapes do not fit.
        """
    ),
)


@dataclass(frozen=True)
class Moments:
    """Mean and variance (with N − 1 below) of the gradients of N samples.

    Attributes:
        names: Of the parameters.
        mean: Per parameter.
        variance: Per parameter.
        samples: N.
    """

    names: Sequence[str]
    mean: Sequence[Tensor]
    variance: Sequence[Tensor]
    samples: int

    def square(self) -> Tensor:
        """‖m‖²."""
        return dot(self.mean, self.mean)

    def trace(self) -> Tensor:
        """Σ s²."""
        return total([v.sum() for v in self.variance])

    def layers(self) -> "dict[str, Moments]":
        """Those of each layer."""
        pick = lambda of, places: [of[i] for i in places]
        return {
            layer: Moments(pick(self.names, at), pick(self.mean, at), pick(self.variance, at), self.samples)
            for layer, at in by_layer(self.names).items()
        }


def moments(grad: Any, variance: Any, samples: int, reduction: str) -> Moments:
    """From the results of `Grad` and `Variance`."""
    check_samples("samples", samples, least=2, why="one has no variance")
    rate = scale(samples, reduction)
    names, (means, variances) = listed(grad=grad, variance=variance)
    unbiased = rate**2 * samples / (samples - 1)
    return Moments(names, [m * (rate / samples) for m in means], [v * unbiased for v in variances], samples)


def scale(samples: int, reduction: str) -> int:
    """1/R, what a sample's gradient was divided by."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', that of the loss, got {reduction!r}.")
    return samples if reduction == "mean" else 1


def listed(**trees: Any) -> tuple[list[str], list[list[Tensor]]]:
    """The tensors of several trees like the parameters, in one order, and the names of the parameters."""
    found = {argument: flatten_params(tree)[:2] for argument, tree in trees.items()}
    (first, (names, leaves)), *others = found.items()
    for argument, (own, tensors) in others:
        if own != names:
            raise ValueError(f"{argument} has {own}, and {first} has {names}; both need the same parameters in the same order.")
        for name, a, b in zip(names, leaves, tensors, strict=True):
            if a.shape != b.shape:
                raise ValueError(
                    f"{argument} has shape {tuple(b.shape)} for {name!r}, and {first} {tuple(a.shape)}; both "
                    "need one entry for each of the parameter's."
                )
    return names, [[at_least_float32(t) for t in tensors] for _, tensors in found.values()]


def check_samples(name: str, value: Any, least: int = 1, why: str = "there have to be some") -> None:
    """Raise unless it is a number of samples, large enough."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, the number of samples, got {value!r} of type {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, for {why}; got {value}.")


def check_number(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise unless it is positive; or zero where that has a meaning."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    if not (value > 0 or (zero and value == 0)):
        raise ValueError(f"{name} must be {'at least 0' if zero else 'positive'}, got {value!r}.")


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product of two lists of tensors."""
    return total([(s * t).sum() for s, t in zip(a, b, strict=True)])


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of scalars, wherever they are."""
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()
