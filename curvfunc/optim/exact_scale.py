"""How far along a direction: the minimum of the quadratic model with the exact matrix."""

from typing import Any

import optree
import torch
from torch import Tensor

from curvfunc.optim.transformation import Local, Locally, Transformation, check_state, check_tree, labelled, number

__all__ = ["scale_exactly"]

KEYS = ("damping", "inner", "last")


def scale_exactly(inner: Transformation, *, damping: float = 1.0, adapt: float = 0.8) -> Transformation:
    """The direction of another transformation and the step before, scaled to the minimum of the quadratic model.

    With Δ = ``inner``'s update, δ₀ the step before and G the exact GGN of the batch, the step is u = αΔ + μδ₀, where (α, μ)
    minimizes ½ uᵀ(G + λ)u − gᵀu, at the cost of two products with G. So K-FAC needs neither a learning rate nor a momentum
    of its own. λ adapts by the reduction ratio ρ of loss and model: times ``adapt`` where ρ > 3/4, divided by it where
    ρ < 1/4. A step that would raise the loss is not taken.

    Args:
        inner: Gives the direction, such as `scale_by_kfac`.
        damping: λ at the start.
        adapt: The factor of λ, in (0, 1].

    Returns:
        A `Transformation` with the state ``{"damping", "inner", "last"}``. Its curvature is a pair: that of ``inner``, and
        a `Local`.

    Raises:
        TypeError: If ``inner`` is no transformation, or a number none.
        ValueError: For numbers out of range, and for gradients or states of other parameters.

    References:
        Martens and Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate curvature", sec. 6.4 (scale),
        6.5 (λ), 7 (the step before).

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> kfac = optim.scale_by_kfac(kronecker.structure(model_fn, params, X))
        >>> method = optim.chain(optim.scale_exactly(kfac), optim.scale(-1.0))
        >>> state = method.init(params)
        >>> before, params, state = optim.step(model_fn, method, params, state, X, y)
        >>> after, params, state = optim.step(model_fn, method, params, state, X, y)
        >>> bool(after < before)
        True
    """
    me = "scale_exactly"
    number(me, "damping", damping)
    if not 0 < number(me, "adapt", adapt) <= 1:
        raise ValueError(f"{me}: adapt must be in (0, 1], got {adapt}.")

    def init(params: Any) -> dict[str, Any]:
        size = torch.full((), damping, dtype=torch.float64, device=optree.tree_leaves(params)[0].device)
        return {"damping": size, "inner": inner.init(params), "last": optree.tree_map(torch.zeros_like, params)}

    def due(state: Any) -> Any:
        return inner.due(state["inner"])

    def needs(state: Any, now: Any) -> Any:
        return inner.needs(state["inner"], now), Locally()

    def update(grads: Any, state: Any, params: Any, curvature: Any = (), now: Any = None) -> tuple[Any, Any]:
        check_state(me, state, KEYS)
        check_tree(f"{me}: grads", grads, params)
        check_tree(f"the state of {me}", state["last"], params)
        if not isinstance(curvature, tuple) or len(curvature) != 2 or not isinstance(curvature[1], Local):
            raise TypeError(f"{me}: curvature must be a pair, of the inner transformation and a Local, as optim.step makes it.")
        of_inner, local = curvature
        direction, kept = inner.update(grads, state["inner"], params, of_inner, due(state) if now is None else now)
        size, two = state["damping"], (direction, state["last"])
        D = torch.stack([_flat(d) for d in two])
        A = D @ (torch.stack([_flat(local.product(d)) for d in two]) + size * D).mT
        b = D @ _flat(grads)
        best = torch.linalg.pinv(A, hermitian=True) @ b  # the step before may be zero, or along the direction
        step = optree.tree_map(lambda d, last: best[0].to(d) * d + best[1].to(d) * last, *two)
        moved = local.loss(optree.tree_map(torch.sub, params, step))
        fall = b @ best / 2
        ratio = torch.where(fall > 0, (local.value - moved).to(fall) / fall, torch.ones_like(fall))
        good = moved.isfinite() & (ratio >= 0)
        factor = torch.where(good & (ratio > 0.75), adapt, torch.where(good & (ratio >= 0.25), 1.0, 1 / adapt))
        step = optree.tree_map(lambda t: torch.where(good, t, torch.zeros_like(t)), step)
        return step, {"damping": (size * factor.to(size)).clamp(min=1e-10), "inner": kept, "last": step}

    return Transformation(init, update, due, needs, labelled("scale_exactly", inner, damping=damping, adapt=adapt))


def _flat(tree: Any) -> Tensor:
    """All entries as one vector, in double precision."""
    return torch.cat([t.flatten().double() for t in optree.tree_leaves(tree)])
