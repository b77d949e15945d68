"""Is the batch large enough? Tests of how far its gradient may be from the true one."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvfunc.diagnostics.moments import Moments, check_number, check_samples, listed, moments, scale, total, with_shared
from curvfunc.tensors.inputs import flatten_params

__all__ = ["Verdict", "inner_product_test", "inner_products", "norm_test", "orthogonality_test"]


class Verdict(NamedTuple):
    """What a test says.

    Attributes:
        passed: Whether the batch is large enough, a boolean.
        ratio: The left side of the test over the right side; the batch is large enough where this is at most 1.
        samples: The batch size at which both sides would be equal, if mean and variance stayed as they are.
    """

    passed: Tensor
    ratio: Tensor
    samples: Tensor


@with_shared
def norm_test(
    grad: Any, variance: Any, samples: int, *, theta: float, population: int | None = None, reduction: str = "mean"
) -> Verdict:
    """Whether the gradient's expected error is at most θ times its norm: Σ s² / N ≤ θ² ‖m‖².

    Of a data set of ``population`` samples, from which the batch is drawn without replacement, the left side has the factor
    (population − N) / (population − 1).

    Args:
        theta: θ; with θ < 1 the gradient is a direction of descent if the test is true of the error itself.
        population: Number of samples of the data set; unlimited if None.

    Returns:
        A `Verdict`: three scalars.

    References:
        Byrd, Chin, Nocedal, Wu 2012, "Sample size selection in optimization methods for machine learning", sec. 3.

    Example:
        >>> grad, variance = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.1, 0.1])}
        >>> diagnostics.norm_test(grad, variance, samples=2, theta=0.5)
        Verdict(passed=tensor(True), ratio=tensor(0.8000), samples=tensor(1.6000))
    """
    check_number("theta", theta)
    m = moments(grad, variance, samples, reduction)
    needed = m.trace() / (theta**2 * m.square())
    if population is None:
        return _verdict(needed / samples, needed)
    check_samples("population", population, samples, "the batch is drawn from it")
    ratio = needed / samples * (population - samples) / max(1, population - 1)
    return _verdict(ratio, needed * population / (needed + population - 1))


@with_shared
def inner_products(batch_grad: Any, grad: Any) -> Tensor:
    """Inner products of each sample's gradient with the batch's, over all parameters together: ⟨gₙ, g⟩.

    The same is ``batch_dot_total(...).sum(1)``, where no per-sample gradients are formed; those of `accumulate` are for several
    batches.

    Args:
        batch_grad: Result of `BatchGrad`, [N, *shape] per parameter.
        grad: Result of `Grad`, [*shape] per parameter.

    Returns:
        [N].

    Example:
        >>> diagnostics.inner_products({"w": torch.eye(2)}, {"w": torch.tensor([3.0, 4.0])})
        tensor([3., 4.])
    """
    names, whole, _ = flatten_params(grad)
    own, each, _ = flatten_params(batch_grad)
    if own != names or any(g.shape[1:] != h.shape or g.ndim == 0 for g, h in zip(each, whole, strict=True)):
        shapes = [{n: tuple(t.shape) for n, t in zip(*pair, strict=True)} for pair in ((own, each), (names, whole))]
        raise ValueError(f"batch_grad needs [N, *shape] where grad has [*shape]; they have {shapes[0]} and {shapes[1]}.")
    parts = [g.reshape(len(g), h.numel()) @ h.reshape(-1).to(g.dtype) for g, h in zip(each, whole, strict=True)]
    return torch.stack([part.to(parts[0]) for part in parts]).sum(0)


@with_shared
def inner_product_test(grad: Any, dots: Tensor, *, theta: float, reduction: str = "mean") -> Verdict:
    """Whether batches' gradients keep to the side of the true one: Varₙ⟨∇ℓₙ, m⟩ / N ≤ θ² ‖m‖⁴, the variance with N − 1 below.

    It lets the error be as large as it likes across the gradient, so that batches may be smaller than those of `norm_test`.

    Args:
        theta: θ; 0.9 in the paper.

    Returns:
        A `Verdict`: three scalars.

    References:
        Bollapragada, Byrd, Nocedal 2017, "Adaptive sampling strategies for stochastic optimization", sec. 2.

    Example:
        >>> per_sample, grad = {"w": torch.tensor([[1.0, 1.0], [2.0, -1.0]])}, {"w": torch.tensor([3.0, 0.0])}
        >>> diagnostics.inner_product_test(grad, diagnostics.inner_products(per_sample, grad), theta=0.9).passed
        tensor(True)
    """
    check_number("theta", theta)
    variance, square = _along(grad, dots, reduction)
    needed = variance / (theta**2 * square.square())
    return _verdict(needed / len(dots), needed)


@with_shared
def orthogonality_test(grad: Any, variance: Any, dots: Tensor, *, nu: float, reduction: str = "mean") -> Verdict:
    """Whether batches' gradients have little across the true one: (Σ s² − Varₙ⟨∇ℓₙ, m⟩ / ‖m‖²) / N ≤ ν² ‖m‖².

    With `inner_product_test`, the augmented inner product test. The left side is the variance of the gradients' parts that are
    orthogonal to m.

    Args:
        nu: ν; tan 80° = 5.84 in the paper.

    Returns:
        A `Verdict`: three scalars.

    References:
        Bollapragada, Byrd, Nocedal 2017, "Adaptive sampling strategies for stochastic optimization", sec. 3.

    Example:
        >>> per_sample, grad = {"w": torch.tensor([[1.0, 1.0], [2.0, -1.0]])}, {"w": torch.tensor([3.0, 0.0])}
        >>> variance = {"w": torch.tensor([0.25, 1.0])}
        >>> diagnostics.orthogonality_test(grad, variance, diagnostics.inner_products(per_sample, grad), nu=5.84).passed
        tensor(True)
    """
    check_number("nu", nu)
    along, square = _along(grad, dots, reduction)
    m: Moments = moments(grad, variance, len(dots), reduction)
    needed = (m.trace() - along / square) / (nu**2 * square)
    return _verdict(needed / len(dots), needed)


def _along(grad: Any, dots: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Varₙ⟨∇ℓₙ, m⟩ and ‖m‖²."""
    if not isinstance(dots, Tensor) or dots.ndim != 1 or len(dots) < 2:
        got = f"shape {tuple(dots.shape)}" if isinstance(dots, Tensor) else type(dots).__name__
        raise ValueError(f"dots must hold one inner product for each of at least two samples, [N]; got {got}.")
    _, (leaves,) = listed(grad=grad)
    samples = len(dots)
    rate = scale(samples, reduction)
    square = total([g.square().sum() for g in leaves]) * (rate / samples) ** 2
    return (dots.to(square) * (rate**2 / samples)).var(), square


def _verdict(ratio: Tensor, samples: Tensor) -> Verdict:
    return Verdict(ratio <= 1, ratio, samples)
