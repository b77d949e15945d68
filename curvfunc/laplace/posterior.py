"""The approximate posterior of parameters, from one pass over the data."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from curvfunc import kronecker, losses
from curvfunc.data.batches import split_batch, to_device
from curvfunc.data.merging import accumulation
from curvfunc.data.scales import Reduction
from curvfunc.kronecker import Decomposition
from curvfunc.kronecker.decomposition import hidden
from curvfunc.quantities.quantity import Quantity
from curvfunc.quantities.specs import KFAC, KFLR, DiagGGN, EmpiricalKFAC, Loss
from curvfunc.tensors.docstrings import documented, entries

__all__ = ["Posterior", "check_precision", "covariance", "fit", "sample"]

SHARED = entries(
    """
    posterior: From `fit`: its mean [*shape] per parameter, and its curvature.
    prior_precision: δ, positive, a number or a tensor without axes.
    """
)
RAISED = entries(
    """
    TypeError: If the prior precision is no number.
    ValueError: If it is not positive and finite; if δ is so small that rounding could spoil (K + δ)⁻¹.
    """
)
_documented = documented(SHARED, RAISED)


@dataclass(frozen=True)
class Posterior:
    """N(θ, (K + δ)⁻¹) for any prior precision δ; from `fit`.

    Attributes:
        mean: The parameters θ.
        curvature: K, that of the sum of all negative log-likelihoods.
        loss: This sum, up to a constant, in float64.
        samples: The number of samples.
    """

    mean: Any
    curvature: Decomposition
    loss: Tensor
    samples: int

    def __repr__(self) -> str:
        return f"Posterior(of {self.samples} samples, curvature={self.curvature!r})"


@documented()
def fit(
    model_fn: Callable[[Any, Any], Tensor],
    params: Any,
    data: Iterable[Any],
    *,
    curvature: Quantity | Decomposition = KFLR(joined=True),  # noqa: B008
    samples: int | None = None,
    loss_fn: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    reduction: Reduction | None = None,
    scale: float = 1.0,
    generator: Generator | None = None,
    split: Callable[[Any], tuple[Any, Any]] | None = None,
    device: torch.device | str | None = None,
) -> Posterior:
    """Log-likelihood and curvature of all samples, whether the loss is their sum or their mean.

    Args:
        params: Pytree of real floating-point tensors [*shape], usually ``{name: tensor}``, at a minimum of the loss.
        data: Iterable of batches, each a pair (X [N, ...], y [N, ...]) or a mapping, as for `curvfunc.accumulate`. The first
            one is looked at beforehand, for the structure of the model, so that an iterator, which gives it but once, will not
            do.
        curvature: A spec of Kronecker factors or of the GGN's diagonal; or a decomposition of what these gave for the
            same data, with the same loss (`curvfunc.kronecker.decompose`, `correct`, `of_diagonal`).
        samples: The number of samples that a given decomposition is of.
        loss_fn: ``(output, y) -> scalar``, the negative log-likelihood up to constants, summed or averaged. By default
            cross-entropy.
        reduction: For losses of one's own: "sum" or "mean", as for `curvfunc.accumulation`.
        scale: What the loss is to be multiplied by to be the negative log-likelihood: 1 / (2 σ²) for squared errors with noise
            of variance σ².
        split: ``batch -> (X, y)`` for batches of another kind.
        device: Where batches are copied to.

    Returns:
        A `Posterior`: its mean [*shape] per parameter, and its curvature.

    Raises:
        TypeError: If the data is an iterator, or the curvature neither a spec nor a decomposition.
        ValueError: If the decomposition is of other parameters, or of another number of samples than the data has.

    References:
        MacKay 1992, "A practical Bayesian framework for backpropagation networks"; Ritter, Botev, Barber 2018, "A scalable
        Laplace approximation for neural networks"; Daxberger et al. 2021, "Laplace redux".

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> batches = [(torch.randn(n, 4), torch.arange(n) % 3) for n in (8, 8, 5)]
        >>> laplace.fit(model_fn, params, batches)
        Posterior(of 21 samples, curvature=Decomposition(weight + bias: Kronecker 3 x 5))
    """
    if isinstance(data, Iterator) or not isinstance(data, Iterable) or isinstance(data, Tensor):
        raise TypeError(f"data is a {type(data).__name__}; a list of batches or a DataLoader is needed.")
    given = curvature if isinstance(curvature, Decomposition) else None
    if (given is None) != (samples is None):
        raise ValueError("samples is the number of samples that a decomposition is of. Pass it with one, and not with a spec.")
    if isinstance(curvature, Quantity) and not isinstance(curvature, (DiagGGN, KFAC, KFLR, EmpiricalKFAC)):
        raise TypeError(f"curvature must be a spec such as KFLR(joined=True) or DiagGGN(), got {curvature!r}.")
    specs = (Loss(),) if given is not None else (Loss(), curvature)
    acc = accumulation(model_fn, params, specs, loss_fn=loss_fn, reduction=reduction)
    state, structure = acc.init(), None if given is None else given.structure
    for number, batch in enumerate(data):
        X, y = split_batch(batch, split, number)
        if device is not None:
            X, y = (to_device(tree, torch.device(device)) for tree in (X, y))
        if structure is None:
            structure = kronecker.structure(model_fn, params, X)
        with torch.no_grad():
            state = acc.update(state, params, X, y, generator=generator)
    loss, *found = acc.result(state)
    seen = int(state["samples"])
    if given is None:
        assert structure is not None
        if isinstance(curvature, DiagGGN):
            given = kronecker.of_diagonal(found[0], structure)
        else:
            given = kronecker.decompose(found[0], structure)
    else:
        _check_fits(given, params, samples, seen)
    summed = reduction == "sum" or (reduction is None and losses.is_sum(losses.normalize(loss_fn)))
    factor = scale if summed else scale * float(state["mass"])
    return Posterior(optree.tree_map(Tensor.detach, params), _times(given, factor), loss.double() * factor, seen)


def _check_fits(given: Decomposition, params: Any, samples: int | None, seen: int) -> None:
    for layout, p in zip(given.structure.layouts, given.structure.flatten("params", params), strict=True):
        if tuple(p.shape) != layout.shape:
            raise ValueError(
                f"the decomposition has shape {layout.shape} for parameter {layout.name!r}, and params has {tuple(p.shape)}. "
                "Compute factors and structure with the same model and params."
            )
    if samples != seen:
        raise ValueError(
            f"the decomposition is of {samples} samples, and the data has {seen}, so that curvature and likelihood would have "
            "different scales. Accumulate the factors over the same data set."
        )


def _times(K: Decomposition, factor: float) -> Decomposition:
    """The same matrices, as many times as large."""
    spectra = tuple([(s[0] * factor, *s[1:]) for s in K.spectra])
    return replace(K, values=tuple([v * factor for v in K.values]), spectra=spectra)


def check_precision(prior_precision: float | Tensor) -> None:
    """Raise unless it is a positive number, as far as it can be seen."""
    given = prior_precision
    if isinstance(given, bool) or not isinstance(given, (int, float, Tensor)) or (isinstance(given, Tensor) and given.ndim):
        found = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
        raise TypeError(f"prior_precision must be a number or a tensor without axes, got {found}.")
    if isinstance(given, Tensor) and hidden(given):
        return
    value = float(given.detach() if isinstance(given, Tensor) else given)
    if not 0 < value < float("inf"):
        raise ValueError(
            f"prior_precision must be positive and finite, got {value}: it is 1 / σ² of the prior N(0, σ²). To optimize it, "
            "take its logarithm, which can have any value."
        )


@_documented
def covariance(posterior: Posterior, prior_precision: float | Tensor) -> Decomposition:
    """(K + δ)⁻¹, for `curvfunc.kronecker` and the scores of `curvfunc.influence`.

    Returns:
        A `Decomposition`.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> posterior = laplace.fit(model_fn, params, [(torch.randn(8, 4), torch.arange(8) % 3)])
        >>> kronecker.diagonal(laplace.covariance(posterior, 1.0))["weight"].shape
        torch.Size([3, 4])
    """
    check_precision(prior_precision)
    return kronecker.inverse(posterior.curvature, damping=prior_precision)


@_documented
def sample(posterior: Posterior, num: int, prior_precision: float | Tensor, *, generator: Generator | None = None) -> Any:
    """Draws from N(θ, (K + δ)⁻¹), for ``vmap`` over the first axis.

    Args:
        num: Number of draws.
        generator: Source of the draws; the default generator if None.

    Returns:
        A tree like the parameters, [num, *shape] per parameter.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> posterior = laplace.fit(model_fn, params, [(torch.randn(8, 4), torch.arange(8) % 3)])
        >>> draws = laplace.sample(posterior, 5, prior_precision=1.0)
        >>> torch.vmap(model_fn, (0, None))(draws, torch.randn(2, 4)).shape
        torch.Size([5, 2, 3])
    """
    check_precision(prior_precision)
    deviations = kronecker.sample(posterior.curvature, num, damping=prior_precision, generator=generator)
    structure = posterior.curvature.structure
    pairs = zip(structure.flatten("mean", posterior.mean), structure.flatten("draws", deviations), strict=True)
    return structure.unflatten([(p + d).to(p.dtype) for p, d in pairs])
