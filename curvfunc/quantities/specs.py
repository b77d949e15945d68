"""The quantities, one row each; see `curvfunc.quantities.functions` for what they are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvfunc.engine.clipping import ClippedLossGradient
from curvfunc.engine.cotangents import AveragedHessian, EmpiricalRoot, FullHessian, LossRoot, OutputEntries
from curvfunc.quantities.laws import Averaged, Joined, Refused, Summed
from curvfunc.quantities.quantity import GaussNewton, Quantity, Sampled
from curvfunc.tensors.pages import may_overwrite

__all__ = [
    "KFAC",
    "KFLR",
    "KFRA",
    "BatchDiagGGN",
    "BatchDiagHessian",
    "BatchGrad",
    "BatchJac",
    "BatchL2",
    "ClippedGrad",
    "DiagGGN",
    "DiagHessian",
    "EmpiricalKFAC",
    "Grad",
    "Loss",
    "Output",
    "SqrtGGN",
    "SumGradSquared",
    "Variance",
]


@dataclass(frozen=True)
class Loss(Quantity):
    """The loss, a scalar; of the whole batch."""

    forward = "loss"
    laws = (Summed(1),)
    whole_batch = True


@dataclass(frozen=True)
class Output(Quantity):
    """The model's output [N, ...], detached unless the call is differentiated; of the whole batch."""

    forward = "output"
    laws = (Joined(0),)
    whole_batch = True


@dataclass(frozen=True)
class Grad(Quantity):
    """The gradient of the loss, [*shape]; of the whole batch."""

    contractions = ("total",)
    laws = (Summed(1),)
    whole_batch = True


@dataclass(frozen=True)
class BatchGrad(Quantity):
    """Per-sample gradients gₙ = R ∇ℓₙ, [N, *shape]."""

    contractions = ("per_sample",)
    laws = (Joined(1),)
    of_one_column = True

    def lead(self, columns: int, samples: int) -> tuple[int, ...]:
        """N."""
        return (samples,)

    def finish(self, samples: int, *parts: Tensor) -> Tensor:
        """The only column."""
        return parts[0][0]


@dataclass(frozen=True)
class BatchJac(Quantity):
    """The Jacobian of each sample's output, [N, *out, *shape]; whatever the loss."""

    contractions = ("per_sample",)
    laws = (Joined(0),)
    of_entries = True
    cotangent = OutputEntries()

    def finish(self, samples: int, *parts: Tensor) -> Tensor:
        """A column for each entry of the output, samples first."""
        return parts[0].transpose(0, 1)


@dataclass(frozen=True)
class BatchL2(Quantity):
    """Squared norms ‖gₙ‖² of the per-sample gradients, [N]."""

    contractions = ("sample_norms",)
    laws = (Joined(2),)


@dataclass(frozen=True)
class ClippedGrad(Quantity):
    """Σₙ min(1, C / ‖gₙ‖) gₙ of a loss that is a sum, [*shape]; see `clipped_grad`.

    Attributes:
        max_norm: C; or the bound of each layer or parameter by name.
        per_layer: Whether each layer is clipped by itself.
    """

    max_norm: float | Mapping[str, float] | tuple[tuple[str, float], ...]
    per_layer: bool = False

    contractions = ("weighted_total",)
    laws = (Summed(0),)

    def __post_init__(self) -> None:
        given = self.max_norm
        pairs = tuple(given.items()) if isinstance(given, Mapping) else given
        if not isinstance(self.per_layer, bool):
            raise TypeError(f"ClippedGrad: per_layer must be True or False, got {self.per_layer!r}.")
        if isinstance(pairs, tuple) and (self.per_layer or not pairs):
            why = "leave out per_layer" if self.per_layer else "there are none"
            raise ValueError(f"ClippedGrad: max_norm by name has bounds of its own for each layer; {why}.")
        bounds = {"max_norm": pairs} if not isinstance(pairs, tuple) else {f"max_norm[{name!r}]": c for name, c in pairs}
        for name, bound in bounds.items():
            if isinstance(bound, bool) or not isinstance(bound, int | float):
                raise TypeError(f"ClippedGrad: {name} must be a number, got {bound!r} of type {type(bound).__name__}.")
            if not 0 < bound < math.inf:
                raise ValueError(f"ClippedGrad: {name} must be positive and finite, got {bound!r}.")
        object.__setattr__(self, "max_norm", pairs)

    @property
    def cotangent(self) -> ClippedLossGradient:
        """The loss gradient, clipped."""
        return ClippedLossGradient(self.max_norm, self.per_layer)  # type: ignore[arg-type]

    @property
    def sensitivity(self) -> float:
        """The norm of what one sample can add, over all parameters: C, or that of all layers' bounds."""
        bounds = self.max_norm
        return math.hypot(*[c for _, c in bounds]) if isinstance(bounds, tuple) else float(bounds)  # type: ignore[arg-type]


@dataclass(frozen=True)
class SumGradSquared(Quantity):
    """Σₙ gₙ², [*shape]."""

    contractions = ("squares",)
    laws = (Summed(2),)


@dataclass(frozen=True)
class Variance(Quantity):
    """(1/N) Σₙ gₙ² − ((1/N) Σₙ gₙ)², [*shape]."""

    contractions = ("squares", "total")
    laws = (Summed(2), Summed(1))
    averages = True
    entrywise = True

    def finish(self, samples: int | Tensor, *parts: Tensor) -> Tensor:
        """Second moment minus squared mean."""
        squared, total = parts
        if isinstance(samples, Tensor):  # of several batches, maybe a mean
            samples = samples.to(squared.dtype)
            return squared / samples - (total / samples).square()
        return torch.addcmul(squared, total, total, value=-1 / samples) / samples

    def finish_all(self, samples: int, *parts: Sequence[Tensor]) -> list[Tensor]:
        """All parameters' in two operations."""
        squared, totals = parts
        if type(samples) is not int or not may_overwrite() or torch.compiler.is_compiling():
            return super().finish_all(samples, *parts)
        found = torch._foreach_addcmul([*squared], [*totals], [*totals], -1 / samples)
        # numbers are dear on the CPU, where they become a tensor for each parameter
        torch._foreach_div_(found, samples if found[0].is_cuda else found[0].new_full((), samples))
        return [*found]


@dataclass(frozen=True)
class DiagGGN(GaussNewton):
    """Diagonal of the generalized Gauss-Newton matrix, [*shape].

    Attributes:
        mc_samples: 0 for the exact loss Hessian, else the number of Monte-Carlo draws per sample.
    """

    contractions = ("squares",)
    laws = (Summed(1),)


@dataclass(frozen=True)
class BatchDiagGGN(GaussNewton):
    """Each sample's part of the diagonal of the generalized Gauss-Newton matrix, [N, *shape].

    Attributes:
        mc_samples: 0 for the exact loss Hessian, else the number of Monte-Carlo draws per sample.
    """

    contractions = ("sample_squares",)
    laws = (Joined(1),)

    def lead(self, columns: int, samples: int) -> tuple[int, ...]:
        """N."""
        return (samples,)


@dataclass(frozen=True)
class DiagHessian(Sampled):
    """Diagonal of the Hessian, [*shape].

    Attributes:
        mc_samples: 0 for the exact diagonal, else the number of products with random signs that estimate it.
    """

    contractions = ("squares",)
    laws = (Summed(1),)

    @property
    def cotangent(self) -> FullHessian:
        """What curves, or products with random signs."""
        return FullHessian(self.mc_samples)


@dataclass(frozen=True)
class BatchDiagHessian(Sampled):
    """Each sample's part of the diagonal of the Hessian, [N, *shape].

    Attributes:
        mc_samples: 0 for the exact diagonal, else the number of products with random signs that estimate it.
    """

    contractions = ("sample_squares",)
    laws = (Joined(1),)

    @property
    def cotangent(self) -> FullHessian:
        """What curves, or products with random signs."""
        return FullHessian(self.mc_samples)


@dataclass(frozen=True)
class SqrtGGN(GaussNewton):
    """Root of the generalized Gauss-Newton matrix, [V, N, *shape]; V is the number of outputs of one sample, or ``mc_samples``.

    Attributes:
        mc_samples: 0 for the exact loss Hessian, else the number of Monte-Carlo draws per sample.
    """

    contractions = ("per_sample",)
    laws = (Joined(1 / 2, axis=1),)

    def lead(self, columns: int, samples: int) -> tuple[int, ...]:
        """V and N."""
        return columns, samples

    @property
    def cotangent(self) -> LossRoot:
        """All columns, as they are returned."""
        return LossRoot(self.mc_samples)


@dataclass(frozen=True)
class KFAC(GaussNewton):
    """Kronecker factors of each parameter's GGN block, (B [o, o], A [k, k]) or (B [numel, numel],); see `kfac`.

    Attributes:
        mc_samples: 0 for the exact loss Hessian, else the number of Monte-Carlo draws per sample.
        kfac_approx: "expand", "reduce" or None, for parameters with several positions.
        joined: Whether the factors of a weight with a bias beside it are those of both, Ā [k + 1, k + 1].
    """

    mc_samples: int = 1
    kfac_approx: str | None = None
    joined: bool = False

    laws = (Summed(1), Averaged())
    averages = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_approximation(self.kfac_approx)

    @property
    def contractions(self) -> tuple[str, ...]:  # type: ignore[override]
        """Both factors, in the chosen approximation."""
        return _factors(self.kfac_approx, self.joined)

    def finish(self, samples: int, *parts: Any) -> tuple[Tensor, ...]:
        """(B, A) in the order of the parameter's axes, or (B,) for a parameter without input factor."""
        B, A = parts
        if A is None:
            return (B,)
        return (A.factor, B) if A.first else (B, A.factor)


@dataclass(frozen=True)
class KFLR(Quantity):
    """Kronecker factors as `KFAC`, from the exact loss Hessian: (B [o, o], A [k, k]) or (B [numel, numel],).

    Attributes:
        kfac_approx: "expand", "reduce" or None, for parameters with several positions.
        joined: Whether the factors of a weight with a bias beside it are those of both, Ā [k + 1, k + 1].
    """

    kfac_approx: str | None = None
    joined: bool = False
    cotangent = LossRoot(0, fewest=True)

    def __post_init__(self) -> None:
        _check_approximation(self.kfac_approx)

    contractions = KFAC.contractions
    laws = KFAC.laws
    averages = True
    finish = KFAC.finish


@dataclass(frozen=True)
class EmpiricalKFAC(Quantity):
    """Kronecker factors as `KFAC` of the empirical Fisher, with the targets in the place of draws; see `kfac_empirical`.

    Attributes:
        kfac_approx: "expand", "reduce" or None, for parameters with several positions.
        joined: Whether the factors of a weight with a bias beside it are those of both, Ā [k + 1, k + 1].
    """

    kfac_approx: str | None = None
    joined: bool = False
    cotangent = EmpiricalRoot()

    def __post_init__(self) -> None:
        _check_approximation(self.kfac_approx)

    contractions = KFAC.contractions
    laws = KFAC.laws
    averages = True
    finish = KFAC.finish


@dataclass(frozen=True)
class KFRA(Quantity):
    """Kronecker factors from the loss Hessian, averaged at each step back, (B [o, o], A [k, k]) or (B,); see `kfra`."""

    contractions = ("factors",)
    laws = (
        Refused(
            "it averages over the samples of one batch at each step back, and the means of two batches' products are not the "
            "products of their means. Use KFLR or KFAC"
        ),
    )
    averages = True
    cotangent = AveragedHessian()


def _factors(approximation: str | None, joined: bool = False) -> tuple[str, ...]:
    suffix = f"_{approximation}" if approximation else ""
    return "output_factor" + suffix, ("joined_input_factor" if joined else "input_factor") + suffix


def _check_approximation(approximation: str | None) -> None:
    if approximation not in (None, "expand", "reduce"):
        raise ValueError(f'kfac_approx must be "expand", "reduce" or None, got {approximation!r}.')
