"""Steps by conjugate gradients on products with a curvature matrix."""

import functools
import math
from typing import Any

import optree
import torch
from torch import Tensor

from curvfunc.optim.transformation import (
    Local,
    Locally,
    Transformation,
    check_state,
    check_tree,
    count,
    is_hidden,
    labelled,
    number,
)

__all__ = ["newton_cg"]

KEYS = ("damping", "solution")
Tree = Any


def newton_cg(
    matrix: str = "ggn",
    *,
    damping: float = 1.0,
    iterations: int = 50,
    tolerance: float = 5e-4,
    warm_start: float = 0.95,
    adapt: float = 1.5,
    mc_samples: int = 0,
) -> Transformation:
    """Hessian-free optimization: u solves (A + λ) u = g by conjugate gradients, with A the GGN or the Hessian of the batch.

    CG minimizes q(u) = ½ uᵀ(A + λ)u − gᵀu, starting at ρ times the u of the step before. It stops after i iterations if q has
    fallen by less than k · ε · |q| in the last k = max(10, i/10) of them, if the residual is at the level of rounding, or at a
    direction of curvature that is not positive (which the Hessian may have). If it has then found nothing better than zero, u
    is g.

    Damping follows Levenberg and Marquardt: with the reduction ratio r = (L(θ) − L(θ − u)) / (gᵀu − ½ uᵀ(A + λ)u) on the same
    batch, λ becomes λ · c if r < 1/4, and λ / c if r > 3/4. A step at which the loss would rise, or not be finite, is not
    taken: u is zero, and λ grows.

    So u is a whole step: chain it with ``scale(-1.0)``.

    Args:
        matrix: "ggn" or "hessian".
        damping: λ at the start.
        iterations: The most of CG. In compiled code all of them are computed; those after the stop change nothing.
        tolerance: ε; with 0 CG goes on to the level of rounding, or to the last iteration.
        warm_start: ρ, from 0 to 1.
        adapt: c, at least 1; with 1 the damping stays.
        mc_samples: For the GGN, 0 or the number of draws per sample.

    Returns:
        A `Transformation` with the state ``{"damping", "solution"}``. Its curvature is a `Local`.

    Raises:
        TypeError: If a number is none, or the curvature that ``update`` is given is no `Local`.
        ValueError: For numbers out of range; for gradients or states of other parameters; if the GGN has negative curvature,
            since the loss is not convex in the model's output. (In compiled code, CG stops there.)

    References:
        Martens 2010, "Deep learning via Hessian-free optimization", sec. 4.1 (damping), 4.4 (when to stop), 4.5 (start).

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> method = optim.chain(optim.newton_cg(damping=0.1), optim.scale(-1.0))
        >>> state = method.init(params)
        >>> before, params, state = optim.step(model_fn, method, params, state, X, y)
        >>> after, params, state = optim.step(model_fn, method, params, state, X, y)
        >>> bool(after < before)
        True
    """
    me = "newton_cg"
    if matrix not in ("ggn", "hessian"):
        raise ValueError(f'{me}: matrix must be "ggn" or "hessian", got {matrix!r}.')
    if matrix == "hessian" and mc_samples:
        raise ValueError(f"{me}: the Hessian has no draws; leave mc_samples at 0.")
    number(me, "damping", damping)
    number(me, "tolerance", tolerance)
    number(me, "adapt", adapt, least=1.0)
    if number(me, "warm_start", warm_start) > 1:
        raise ValueError(f"{me}: warm_start must be at most 1, got {warm_start}.")
    count(me, "iterations", iterations)
    need = Locally(matrix, mc_samples)

    def init(params: Any) -> dict[str, Any]:
        leaf = optree.tree_leaves(params)[0]
        size = torch.full((), damping, dtype=torch.float64, device=leaf.device)
        return {"damping": size, "solution": optree.tree_map(torch.zeros_like, params)}

    def needs(state: Any, now: Any) -> Any:
        return need

    def update(grads: Any, state: Any, params: Any, curvature: Any = (), now: Any = None) -> tuple[Any, Any]:
        check_state(me, state, KEYS)
        check_tree(f"{me}: grads", grads, params)
        check_tree(f"the state of {me}", state["solution"], params)
        if not isinstance(curvature, Local):
            raise TypeError(f"{me}: curvature must be a curvfunc.optim.Local, as optim.step makes it, got {curvature!r}.")
        size: Tensor = state["damping"]
        start = optree.tree_map(lambda s: warm_start * s, state["solution"])
        u, fall = _solve(curvature.product, grads, start, size, iterations, tolerance, convex=matrix == "ggn")
        moved = curvature.loss(optree.tree_map(torch.sub, params, u))
        gain = (curvature.value - moved).to(fall)
        ratio = torch.where(fall > 0, gain / fall, torch.ones_like(fall))  # at a minimum there is nothing to judge by
        good = moved.isfinite() & (gain >= 0)
        factor = torch.where(good & (ratio > 0.75), 1 / adapt, torch.where(good & (ratio >= 0.25), 1.0, adapt))
        u = optree.tree_map(lambda t: torch.where(good, t, torch.zeros_like(t)), u)
        return u, {"damping": size * factor.to(size), "solution": u}

    label = labelled(me, matrix, damping=damping, iterations=iterations)
    return Transformation(init, update, needs=needs, label=label)


def _dot(a: Tree, b: Tree) -> Tensor:
    """Inner product, in double precision, which sums of many terms need."""
    products = optree.tree_map(lambda x, y: (x * y).sum(dtype=torch.float64), a, b)
    return functools.reduce(torch.add, optree.tree_leaves(products))


def _along(x: Tree, step: Tensor, d: Tree) -> Tree:
    return optree.tree_map(lambda a, b: a + step.to(a) * b, x, d)


def _solve(
    product: Any, g: Tree, start: Tree, damping: Tensor, iterations: int, tolerance: float, convex: bool
) -> tuple[Tree, Tensor]:
    """The u that CG finds, and by how much q falls from zero to u."""

    def times(v: Tree) -> tuple[Tree, Tree]:
        Av = product(v)
        return Av, _along(Av, damping, v)

    hidden = is_hidden(*optree.tree_leaves(g))
    eps = torch.finfo(optree.tree_leaves(g)[0].dtype).eps
    least = (4 * eps) ** 2 * _dot(g, g)
    x = start
    r = optree.tree_map(torch.sub, g, times(x)[1])
    d, rr = r, _dot(r, r)
    falls = [(_dot(g, x) + _dot(r, x)) / 2]  # -q(x)
    running = rr > least
    largest = torch.zeros_like(rr)
    for i in range(1, iterations + 1):
        if not hidden and not running:
            break
        Ad, damped = times(d)
        curve, dd = _dot(d, damped), _dot(d, d)
        if convex and not hidden:
            largest = torch.maximum(largest, (_dot(Ad, Ad) / dd).sqrt())
            _check_convex(_dot(d, Ad), dd, largest, eps)
        running = running & (curve > 0)
        step = torch.where(running, rr / torch.where(curve > 0, curve, torch.ones_like(curve)), torch.zeros_like(rr))
        x, r = _along(x, step, d), _along(r, -step, damped)
        new = torch.where(running, _dot(r, r), rr)
        turn = torch.where(running & (rr > 0), new / torch.where(rr > 0, rr, torch.ones_like(rr)), torch.zeros_like(rr))
        d, rr = _along(r, turn, d), new
        falls.append((_dot(g, x) + _dot(r, x)) / 2)
        running = running & (rr > least)
        k = max(10, math.ceil(i / 10))
        if tolerance > 0 and i > k:
            running = running & ~((falls[i] > 0) & (falls[i] - falls[i - k] < k * tolerance * falls[i]))
    better = falls[-1] > 0
    x = optree.tree_map(lambda a, b: torch.where(better, a, b), x, g)
    return x, torch.where(better, falls[-1], _dot(g, g))


def _check_convex(curve: Tensor, dd: Tensor, largest: Tensor, eps: float) -> None:
    """A GGN has no negative curvature, but by rounding.

    Which is relative to the largest curvature that has been seen, not to that along d, where there may be none at all; and to
    the loss Hessian's entries, which cancel where a classifier is sure. In doubt CG just stops there.
    """
    if curve < -100 * eps**0.5 * largest * dd:
        raise ValueError(
            f"newton_cg: the GGN has negative curvature ({float(curve / dd):.2g} along a direction of conjugate "
            f"gradients), so the "
            'loss is not convex in the model\'s output. Use matrix="hessian", or a loss that is convex.'
        )
