"""Preconditioning by Kronecker factors."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvfunc import kronecker
from curvfunc.kronecker.decomposition import blocks_of
from curvfunc.optim.transformation import Transformation, check_state, check_tree, count, is_hidden, labelled, number, ticks
from curvfunc.quantities.specs import KFAC, KFLR, KFRA, EmpiricalKFAC

__all__ = ["scale_by_ekfac", "scale_by_kfac"]

Factors = KFAC | KFLR | KFRA | EmpiricalKFAC

SAFE = 1e-9  # ratio of eigenvalues that inverses in double precision keep far more of than is trusted

KEYS = ("count", "averages", "factors", "inverses")
CORRECTED = (*KEYS, "moments")


def scale_by_kfac(
    structure: kronecker.Structure,
    spec: Factors | None = None,
    *,
    damping: float = 0.03,
    split: str = "pi",
    decay: float = 0.95,
    kl_clip: float | None = None,
    factors_every: int = 1,
    inverses_every: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Transformation:
    """K-FAC: u = (B ⊗ A + δ)⁻¹ g, block by block, with moving averages of the factors.

    At the k-th renewal, factors are averaged as F̄ ← (1 − w) F̄ + w F with w = max(1/k, 1 − β).

    Args:
        structure: From `curvfunc.kronecker.structure`, for the same parameters.
        spec: Which factors: `curvfunc.KFAC`, `KFLR`, `KFRA`, or `EmpiricalKFAC`; ``KFAC(joined=True)`` if None, which has
            weight and bias of a layer as one block.
        damping: δ.
        split: "pi", where δ goes into the factors (B + π√δ) ⊗ (A + √δ/π), and a step takes two products with matrices per
            block; or "exact", by eigenvalues (λ_B λ_A + δ), which takes four. See `curvfunc.kronecker.power`.
        decay: β, from 0 to less than 1.
        kl_clip: κ: u is scaled by min(1, √(κ / uᵀg)), and uᵀg = uᵀ(K + δ)u is twice the KL divergence that the step is expected
            to cause, so that a step α u causes at most α² κ / 2. Where others take κ for the step with learning rate α, pass
            κ/α².
        factors_every: Steps from one renewal of the factors to the next.
        inverses_every: Steps from one renewal of the inverses to the next.
        dtype: In which factors are decomposed; see `curvfunc.kronecker.decompose`. Inverses are kept in the parameters' type,
            or single precision if that is more.

    Returns:
        A `Transformation` with the state ``{"count", "averages", "factors", "inverses"}``; factors and inverses are empty
        before the first update.

    Raises:
        TypeError: If the structure, ``spec`` or a number is none.
        ValueError: For numbers out of range; gradients, factors, or states of other parameters; if the damped factors are
            singular, with the damping that would do.

    References:
        Martens and Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate curvature", sec. 5 (averages),
        6.3 (π), 6.4 (which uses exact products in place of κ: `scale_exactly`); Ba, Grosse, Martens 2017, "Distributed
        second-order optimization using Kronecker-factored approximations", sec. 5 (clipping).

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> structure = kronecker.structure(model_fn, params, X)
        >>> method = optim.chain(optim.scale_by_kfac(structure, damping=0.01), optim.momentum(0.5), optim.scale(-0.3))
        >>> state = method.init(params)
        >>> before, params, state = optim.step(model_fn, method, params, state, X, y)
        >>> after, params, state = optim.step(model_fn, method, params, state, X, y)
        >>> bool(after < before)
        True
    """
    me = "scale_by_kfac"
    spec = _checked(me, structure, spec, damping, decay, kl_clip, factors_every, inverses_every)
    if split not in ("pi", "exact"):
        raise ValueError(f'{me}: split must be "pi" or "exact", got {split!r}.')

    def init(params: Any) -> dict[str, Any]:
        _check_structure(me, structure, params)
        return {"count": _zero(), "averages": _zero(), "factors": (), "inverses": ()}

    def due(state: Any) -> tuple[str, ...]:
        steps = check_state(me, state, KEYS)["count"]
        factors, inverses = ticks(steps, factors_every), ticks(steps, inverses_every)
        return ("factors",) * factors + ("inverses",) * inverses

    def needs(state: Any, now: Any) -> Any:
        return spec if "factors" in now else ()

    def update(grads: Any, state: Any, params: Any, curvature: Any = (), now: Any = None) -> tuple[Any, Any]:
        check_state(me, state, KEYS)
        now = due(state) if now is None else now
        check_tree(f"{me}: grads", grads, params)
        new = state | _averaged(structure, state, curvature, decay) if "factors" in now else dict(state)
        new["count"] = state["count"] + 1
        if "inverses" in now:
            quick = _cholesky(structure, new["factors"], damping) if split == "pi" else None
            if quick is None:
                K = kronecker.decompose(new["factors"], structure, dtype=dtype)
                inverse = kronecker.inverse(K, damping=damping, split=split)
                quick = _kept(inverse, _split_up if split == "pi" else _eigenbasis)
            new["inverses"] = quick
        _check_inverses(me, structure, new)
        updates = (_by_factors if split == "pi" else _by_eigenbasis)(structure, new, grads)
        return _clipped(updates, grads, kl_clip, structure), new

    label = labelled(me, spec, damping=damping, split=split, decay=decay)
    return Transformation(init, update, due, needs, label)


def scale_by_ekfac(
    structure: kronecker.Structure,
    spec: Factors | None = None,
    *,
    damping: float = 1e-3,
    decay: float = 0.95,
    kl_clip: float | None = None,
    factors_every: int = 1,
    bases_every: int = 1,
    moments_every: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Transformation:
    """E-KFAC: u = U (Λ + δ)⁻¹ Uᵀ g, with K-FAC's eigenbasis U, and in it moving averages of second moments Λ.

    When the basis is renewed, Λ starts anew at K-FAC's eigenvalues λ_B λ_A. At other steps Λ ← β Λ + (1 − β) Λ', with the
    moments Λ' of the batch, from `curvfunc.kronecker.EKFAC`.

    Args:
        structure: From `curvfunc.kronecker.structure`, for the same parameters.
        spec: Which factors, as in `scale_by_kfac`; moments are of the same kind.
        damping: δ.
        decay: β, of factors and moments, from 0 to less than 1.
        kl_clip: κ: u is scaled by min(1, √(κ / uᵀg)), or None.
        factors_every: Steps from one renewal of the factors to the next.
        bases_every: Steps from one renewal of the bases to the next.
        moments_every: Steps from one batch that enters the moments to the next; about as dear as a gradient.
        dtype: In which factors are decomposed.

    Returns:
        A `Transformation` with the state ``{"count", "averages", "factors", "inverses", "moments"}``.

    Raises:
        TypeError: If the structure, ``spec`` or a number is none.
        ValueError: For numbers out of range; gradients, factors, or states of other parameters; if the damped moments are
            singular, with the damping that would do.

    References:
        George, Laurent, Bouthillier, Ballas, Vincent 2018, "Fast approximate natural gradient descent in a Kronecker-factored
        eigenbasis", algorithm 1.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> structure = kronecker.structure(model_fn, params, X)
        >>> method = optim.chain(optim.scale_by_ekfac(structure, damping=0.01, bases_every=10), optim.scale(-0.3))
        >>> state = method.init(params)
        >>> before, params, state = optim.step(model_fn, method, params, state, X, y)
        >>> after, params, state = optim.step(model_fn, method, params, state, X, y)
        >>> bool(after < before)
        True
    """
    me = "scale_by_ekfac"
    spec = _checked(me, structure, spec, damping, decay, kl_clip, factors_every, bases_every)
    count(me, "moments_every", moments_every)
    if isinstance(spec, KFRA):
        raise ValueError(f"{me}: moments are those of columns of the GGN's root, which KFRA has none of. Use KFLR or KFAC.")
    empirical, draws = isinstance(spec, EmpiricalKFAC), spec.mc_samples if isinstance(spec, KFAC) else 0

    def init(params: Any) -> dict[str, Any]:
        _check_structure(me, structure, params)
        return {"count": _zero(), "averages": _zero(), "factors": (), "inverses": (), "moments": ()}

    def due(state: Any) -> tuple[str, ...]:
        steps = check_state(me, state, CORRECTED)["count"]
        bases = ticks(steps, bases_every)
        moments = not bases and ticks(steps, moments_every)
        return ("factors",) * ticks(steps, factors_every) + ("bases",) * bases + ("moments",) * moments

    def needs(state: Any, now: Any) -> Any:
        asked: dict[str, Any] = {"factors": spec} if "factors" in now else {}
        if "moments" in now:
            asked["moments"] = kronecker.EKFAC(draws, empirical, decomposition=_decomposition(structure, state))
        return asked

    def update(grads: Any, state: Any, params: Any, curvature: Any = (), now: Any = None) -> tuple[Any, Any]:
        check_state(me, state, CORRECTED)
        now = due(state) if now is None else now
        check_tree(f"{me}: grads", grads, params)
        new = state | _averaged(structure, state, curvature["factors"], decay) if "factors" in now else dict(state)
        new["count"] = state["count"] + 1
        K = None
        if "bases" in now:
            K = kronecker.decompose(new["factors"], structure, dtype=dtype)
            found = {name: K.values[0].new_zeros(0) for name in structure.names}  # each its own, on which compiled code guards
            found |= {b.names[0]: v.clamp_min(0) for b, v in zip(K.blocks, K.values, strict=True)}
            new["moments"] = structure.unflatten([found[name] for name in structure.names])
        elif "moments" in now:
            _check_inverses(me, structure, new)
            given = structure.unflatten([m.to(dtype) for m in structure.flatten("moments", curvature["moments"])])
            new["moments"] = kronecker.interpolate(state["moments"], given, 1 - decay)
            K = _decomposition(structure, new)
            K = replace(K, values=tuple([v.to(dtype) for v in K.values]))  # which are corrected below
        if K is not None:
            new["inverses"] = _kept(kronecker.inverse(kronecker.correct(K, new["moments"]), damping=damping), _eigenbasis)
        _check_inverses(me, structure, new)
        return _clipped(_by_eigenbasis(structure, new, grads), grads, kl_clip, structure), new

    return Transformation(init, update, due, needs, labelled(me, spec, damping=damping, decay=decay))


def _checked(
    caller: str, structure: Any, spec: Any, damping: float, decay: float, kl_clip: float | None, *every: int
) -> Factors:
    """The spec, once all options are known to be good."""
    if not isinstance(structure, kronecker.Structure):
        raise TypeError(
            f"{caller}: structure must come from curvfunc.kronecker.structure(model_fn, params, X), got "
            f"{type(structure).__name__}."
        )
    spec = KFAC(joined=True) if spec is None else spec
    if not isinstance(spec, Factors):
        raise TypeError(f"{caller}: spec must be KFAC(...), KFLR(...), KFRA() or EmpiricalKFAC(...), got {spec!r}.")
    number(caller, "damping", damping)
    number(caller, "decay", decay, below=1.0)
    if kl_clip is not None and number(caller, "kl_clip", kl_clip) == 0:
        raise ValueError(f"{caller}: kl_clip must be positive or None, got {kl_clip}.")
    for value in every:
        count(caller, "the number of steps between renewals", value)
    return spec


def _check_structure(caller: str, structure: kronecker.Structure, params: Any) -> None:
    for layout, p in zip(structure.layouts, structure.flatten("params", params), strict=True):
        if tuple(p.shape) != layout.shape:
            raise ValueError(
                f"{caller}: parameter {layout.name!r} has shape {tuple(p.shape)}, and the structure is of one with "
                f"{layout.shape}. "
                "Make it with curvfunc.kronecker.structure(model_fn, params, X)."
            )


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


def _averaged(structure: kronecker.Structure, state: Any, factors: Any, decay: float) -> dict[str, Any]:
    """The averages with one more batch."""
    structure.flatten("factors", factors)
    averages = state["averages"] + 1
    if isinstance(state["factors"], tuple):  # none yet
        blocks_of(factors, structure)
        return {"averages": averages, "factors": factors}
    weight = (1 / averages.to(torch.float64)).clamp_min(1 - decay)
    return {"averages": averages, "factors": kronecker.interpolate(state["factors"], factors, weight)}


def _check_inverses(caller: str, structure: kronecker.Structure, state: Any) -> None:
    if isinstance(state["factors"], tuple) or not state["inverses"]:
        raise ValueError(
            f"the state of {caller} has no {'factors' if isinstance(state['factors'], tuple) else 'inverses'} yet. Pass what "
            "``due`` says of it, or None, as due."
        )
    structure.flatten(f"the state of {caller}", state["factors"])


# -- inverses, as tensors for each block in the type of its parameters


def _kept(inverse: kronecker.Decomposition, form: Callable[..., tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], ...]:
    rows = zip(inverse.blocks, inverse.bases, inverse.values, strict=True)
    return tuple([tuple([t.to(block.weight.dtype) for t in form(bases, values)]) for block, bases, values in rows])


def _cholesky(structure: kronecker.Structure, factors: Any, damping: float) -> tuple[tuple[Tensor, ...], ...] | None:
    """The inverses of split damping, about ten times as fast as by eigenvalues; None where these have to be looked at."""
    blocks, of = blocks_of(factors, structure)
    if is_hidden(*[F for own in of for F in own]) or damping == 0:
        return None
    found = []
    for block, own in zip(blocks, of, strict=True):
        wide = [F.double() for F in own]
        means = [F.diagonal().mean() for F in wide]
        pi = (means[0] / means[1]).sqrt() if len(own) == 2 else 1.0
        shifts = [pi * damping**0.5, damping**0.5 / pi] if len(own) == 2 else [means[0].new_tensor(damping)]
        inverses, ratio = [], 1.0
        for F, mean, shift in zip(wide, means, shifts, strict=True):
            rounding = 64 * len(F) ** 0.5 * torch.finfo(own[0].dtype).eps
            L, info = torch.linalg.cholesky_ex(F + shift * torch.eye(len(F), dtype=F.dtype, device=F.device))
            symmetric = (F - F.mT).abs().amax() <= rounding * F.abs().amax() if F.numel() else False
            if not symmetric or info or not L.isfinite().all():
                return None
            ratio = ratio * float(shift / (mean * len(F) + shift))  # at least that of the eigenvalues
            inverses.append(torch.cholesky_inverse(L).to(block.weight.dtype))
        if not ratio > SAFE:
            return None
        found.append(tuple(inverses))
    return tuple(found)


def _eigenbasis(bases: tuple[Tensor, ...], values: Tensor) -> tuple[Tensor, ...]:
    return (*bases, values)


def _split_up(bases: tuple[Tensor, ...], values: Tensor) -> tuple[Tensor, ...]:
    """B⁻¹ and A⁻¹, whose eigenvalues have the given ones as their outer product; or the inverse of an exact block."""
    parts: tuple[Tensor, ...] = (values,)
    if len(bases) == 2:
        parts = (values[:, 0], values[0] / values[0, 0]) if values.numel() else (values.sum(1), values.sum(0))
    return tuple([(U * d) @ U.mT for U, d in zip(bases, parts, strict=True)])


def _by_factors(structure: kronecker.Structure, state: Any, grads: Any) -> Any:
    """B⁻¹ G A⁻¹ for each block."""
    given = dict(zip(structure.names, structure.flatten("grads", grads), strict=True))
    results: dict[str, Tensor] = {}
    blocks, _ = blocks_of(state["factors"], structure)
    for block, inverse in zip(blocks, state["inverses"], strict=True):
        own = {name: given[name].to(inverse[0].dtype) for name in block.names}
        G = block.matrix(own, len(inverse), len(inverse[0]))
        u = inverse[0] @ G @ inverse[1] if len(inverse) == 2 else G @ inverse[0]
        results |= block.parameters(u, len(inverse))
    return structure.unflatten([results[name].to(given[name].dtype) for name in structure.names])


def _decomposition(structure: kronecker.Structure, state: Any) -> kronecker.Decomposition:
    """The inverse in its eigenbasis."""
    bases = tuple([inverse[:-1] for inverse in state["inverses"]])
    values = tuple([inverse[-1] for inverse in state["inverses"]])
    return kronecker.Decomposition(bases, values, (), structure, tuple(blocks_of(state["factors"], structure)[0]))


def _by_eigenbasis(structure: kronecker.Structure, state: Any, grads: Any) -> Any:
    return kronecker.matmul(_decomposition(structure, state), grads)


def _clipped(updates: Any, grads: Any, kl_clip: float | None, structure: kronecker.Structure) -> Any:
    """Scaled by min(1, √(κ / uᵀg))."""
    if kl_clip is None:
        return updates
    us, gs = structure.flatten("updates", updates), structure.flatten("grads", grads)
    size = torch.stack([(u * g).sum().to(us[0]) for u, g in zip(us, gs, strict=True)]).sum()
    factor = (kl_clip / size.clamp_min(torch.finfo(size.dtype).tiny)).sqrt().clamp_max(1)
    return structure.unflatten([factor.to(u) * u for u in us])
