"""Preconditioning by diagonals."""

from typing import Any

import optree
import torch
from torch import Tensor

from curvfunc.optim.transformation import (
    Transformation,
    check_state,
    check_tree,
    count,
    is_hidden,
    labelled,
    number,
    ticks,
    zeros,
)
from curvfunc.quantities.quantity import Quantity

__all__ = ["scale_by_diagonal"]

KEYS = ("count", "mass", "diagonal")


def scale_by_diagonal(
    spec: Quantity | None = None,
    *,
    damping: float = 0.0,
    exponent: float = 1.0,
    decay: float = 0.95,
    squares: bool = False,
    bias_correction: bool = True,
    floor: float = 0.0,
    clip: float | None = None,
    every: int = 1,
) -> Transformation:
    """Divides by a diagonal of curvature: u = clip(g / (max(D̄ᵖ, floor) + δ), ±clip).

    D̄ is a moving average of diagonals D, that is D̄ ← β D̄ + (1 − β) D, divided by 1 − βᵗ after t of them; with
    ``squares=True``, the root of that of D². Entries of D̄ below zero count as zero. Well-known members of the family (m is
    ``momentum(0.9, average=True)``, before it in the chain):

    - diagonal Gauss-Newton: ``scale_by_diagonal(DiagGGN(mc_samples=1), damping=1e-3)``.
    - AdaHessian, m / (D̄ᵏ + ε) with Hessian power k: ``DiagHessian(mc_samples=1), squares=True, exponent=k, decay=0.999,
      damping=1e-8``. (Averages over the entries of a kernel are left to whoever passes D.)
    - Sophia, clip(m / max(γ D̄, ε), ±1): ``floor=ε/γ, clip=γ, every=10, bias_correction=False``, with the learning rate divided
      by γ. For Sophia-G, ``DiagGGN(mc_samples=1)``; for Sophia-H, ``DiagHessian(mc_samples=1)``.
    - RMSprop or Adam with the second moment of per-sample gradients in place of that of their mean: ``SumGradSquared()`` with
      ``exponent=1/2``. Its scale is the loss's: for a mean over N samples, N times it is the empirical Fisher's diagonal.

    Args:
        spec: What `curvfunc.compute` is asked for: a quantity whose result has the parameter's shape. None if curvature
            comes from elsewhere: then pass ``update`` a tree like the parameters whenever "diagonal" is due.
        damping: δ, added to the denominator.
        exponent: p, 1 or 1/2, or any Hessian power.
        decay: β, from 0 (none of the past) to less than 1.
        squares: Whether to average squares.
        bias_correction: Whether averages are divided by 1 − βᵗ.
        floor: The least value of D̄ᵖ.
        clip: Bound on the entries of u, or None.
        every: Steps from one diagonal to the next.

    Returns:
        A `Transformation` with the state ``{"count", "mass", "diagonal"}``.

    Raises:
        TypeError: If ``spec`` is no quantity, or a number none.
        ValueError: For numbers out of range, gradients, diagonals or states of other parameters; with neither damping nor
            floor, if D̄ has entries that are not positive.

    References:
        Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney 2021, "AdaHessian", eq. 9 and algorithm 1; Liu, Li, Hall, Liang, Ma
        2023, "Sophia", algorithm 3.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> method = optim.chain(optim.scale_by_diagonal(DiagGGN(), damping=0.01), optim.scale(-0.1))
        >>> state = method.init(params)
        >>> before, params, state = optim.step(model_fn, method, params, state, X, y)
        >>> after, params, state = optim.step(model_fn, method, params, state, X, y)
        >>> bool(after < before)
        True
    """
    me = "scale_by_diagonal"
    if spec is not None and not isinstance(spec, Quantity):
        raise TypeError(f"{me}: spec must be a quantity such as DiagGGN(mc_samples=1), or None, got {spec!r}.")
    for what, value in (("damping", damping), ("floor", floor), ("exponent", exponent)):
        number(me, what, value)
    number(me, "decay", decay, below=1.0)
    if clip is not None and number(me, "clip", clip) == 0:
        raise ValueError(f"{me}: clip must be positive or None, got {clip}.")
    count(me, "every", every)
    safe = damping > 0 or floor > 0

    def init(params: Any) -> dict[str, Any]:
        counters = {"count": torch.zeros((), dtype=torch.int64), "mass": torch.zeros((), dtype=torch.float64)}
        return counters | {"diagonal": zeros(params)}

    def due(state: Any) -> tuple[str, ...]:
        return ("diagonal",) if ticks(check_state(me, state, KEYS)["count"], every) else ()

    def needs(state: Any, now: Any) -> Any:
        return spec if spec is not None and "diagonal" in now else ()

    def update(grads: Any, state: Any, params: Any, curvature: Any = (), now: Any = None) -> tuple[Any, Any]:
        check_state(me, state, KEYS)
        now = due(state) if now is None else now
        check_tree(f"{me}: grads", grads, params)
        check_tree(f"the state of {me}", state["diagonal"], params)
        average, mass = state["diagonal"], state["mass"]
        if "diagonal" in now:
            check_tree(f"{me}: curvature", curvature, params)
            power = (lambda d: d.square()) if squares else (lambda d: d)
            average = optree.tree_map(lambda old, d: decay * old + (1 - decay) * power(d.to(old.dtype)), average, curvature)
            mass = decay * mass + (1 - decay)
        corrected = bias_correction and decay > 0
        p = exponent / 2 if squares else exponent

        def divided(g: Tensor, d: Tensor) -> Tensor:
            if corrected:
                d = d / mass.to(d)
            d = d.clamp_min(0)
            if p != 1:
                d = d.sqrt() if p == 0.5 else d**p
            if floor > 0:
                d = d.clamp_min(floor)
            u = g / (d + damping if damping > 0 else d)
            return u if clip is None else u.clamp(-clip, clip)

        if not safe and not is_hidden(*optree.tree_leaves(average)):
            _check_positive(average)
        new = {"count": state["count"] + 1, "mass": mass, "diagonal": average}
        return optree.tree_map(divided, grads, average), new

    label = labelled(me, spec, damping=damping, exponent=exponent, decay=decay)
    return Transformation(init, update, due, needs, label)


def _check_positive(average: Any) -> None:
    paths, leaves, _ = optree.tree_flatten_with_path(average)
    for path, d in zip(paths, leaves, strict=True):
        if d.numel() and not (d > 0).all():
            raise ValueError(
                f"scale_by_diagonal: damping is 0, and the curvature of parameter {'.'.join(map(str, path))!r} has "
                f"entries that "
                f"are not positive (the least is {float(d.min()):.2g}), by which nothing can be divided. Set damping "
                f"or floor to a "
                "positive number."
            )
