"""Quantities, update and new parameters in one call."""

from collections.abc import Callable
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from curvfunc.data.call import compute
from curvfunc.data.operators import ggn_operator, hessian_operator
from curvfunc.operators.products import ggn_vp, hessian_vp
from curvfunc.optim.transformation import Local, Locally, Transformation, apply_updates
from curvfunc.quantities.quantity import Quantity
from curvfunc.quantities.specs import Grad, Loss
from curvfunc.tensors.docstrings import documented

__all__ = ["measure", "step"]


@documented()
def step(
    model_fn: Callable[[Any, Any], Tensor],
    transformation: Transformation,
    params: Any,
    state: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    due: Any = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
    group: Any = None,
) -> tuple[Tensor, Any, Any]:
    """One step: loss, gradient and the curvature that is due in one call, the update, and new parameters.

    Nothing is changed in place. Inside ``torch.compile`` pass ``due=transformation.due(state)``, from outside of it; then the
    step compiles with ``fullgraph=True``, once for each answer.

    Args:
        transformation: Mostly a `chain` that ends with ``scale(-lr)``.
        state: From ``transformation.init(params)``, or from the step before: a tree of tensors of its own shapes.
        due: What is to be renewed; what ``transformation.due(state)`` says, nested tuples of strings, if None.
        group: A process group of `torch.distributed`, each of whose processes passes its part of the batch. All of them get
            what one process would get for all parts; Monte-Carlo draws are their own.

    Returns:
        The loss before the step (a scalar), the new parameters [*shape], the new state.

    Raises:
        ValueError: If the state is that of another transformation or of other parameters.
        RuntimeError: If another process of the group has failed or is gone.
        NotImplementedError: In compiled code, for products with a Monte-Carlo GGN (`newton_cg`), which would draw anew for
            each.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> method = optim.chain(optim.scale_by_diagonal(DiagGGN(mc_samples=1), damping=0.1), optim.scale(-0.1))
        >>> state = method.init(params)
        >>> for _ in range(3):
        ...     X, y = torch.randn(8, 4), torch.arange(8) % 3
        ...     loss, params, state = optim.step(model_fn, method, params, state, X, y)
    """
    due = transformation.due(state) if due is None else due
    given: dict[str, Any] = {"loss_fn": loss_fn, "generator": generator, "chunk_size": chunk_size, "group": group}
    loss, grads, curvature = measure(model_fn, params, X, y, transformation.needs(state, due), **given)
    updates, state = transformation.update(grads, state, params, curvature, due)
    return loss, apply_updates(params, updates), state


def measure(
    model_fn: Callable[[Any, Any], Tensor],
    params: Any,
    X: Any,
    y: Any,
    needs: Any,
    *,
    loss_fn: Callable[[Tensor, Any], Tensor],
    generator: Generator | None = None,
    chunk_size: int | None = None,
    group: Any = None,
) -> tuple[Tensor, Any, Any]:
    """Loss, gradient, and what a transformation needs; the one place where an update meets model, data and processes."""
    leaves, tree = optree.tree_flatten(needs, is_leaf=lambda leaf: isinstance(leaf, (Quantity, Locally)))
    specs = (Loss(), Grad(), *[leaf for leaf in leaves if isinstance(leaf, Quantity)])
    given: dict[str, Any] = {"loss_fn": loss_fn, "generator": generator, "chunk_size": chunk_size, "group": group}
    loss, grads, *results = compute(model_fn, params, X, y, specs, **given)
    others = iter(results)

    def found(leaf: Any) -> Any:
        if isinstance(leaf, Quantity):
            return next(others)
        return _local(model_fn, params, X, y, leaf, loss_fn, loss, generator, group)

    return loss, grads, tree.unflatten([found(leaf) for leaf in leaves])


def _local(
    model_fn: Any,
    params: Any,
    X: Any,
    y: Any,
    need: Locally,
    loss_fn: Any,
    loss: Tensor,
    generator: Generator | None,
    group: Any,
) -> Local:
    """Products from one linearization, or, inside of compiled code, each from its own."""

    @torch.no_grad()
    def loss_at(params: Any) -> Tensor:
        if group is None:
            return loss_fn(model_fn(params, X), y)
        value: Tensor = compute(model_fn, params, X, y, Loss(), loss_fn=loss_fn, group=group)
        return value

    given: dict[str, Any] = {"loss_fn": loss_fn, "group": group}
    if need.matrix == "hessian":
        if torch.compiler.is_compiling():
            return Local(lambda v: hessian_vp(model_fn, params, X, y, v, loss_fn=loss_fn), loss_at, loss)
        return Local(hessian_operator(model_fn, params, X, y, **given).__matmul__, loss_at, loss)
    if not torch.compiler.is_compiling():
        operator = ggn_operator(model_fn, params, X, y, mc_samples=need.mc_samples, generator=generator, **given)
        return Local(operator.__matmul__, loss_at, loss)
    if need.mc_samples:
        raise NotImplementedError(
            "products with a Monte-Carlo GGN draw anew at each call inside of torch.compile, so that they are of no "
            "one matrix. Use "
            "mc_samples=0, or do not compile this step."
        )
    return Local(lambda v: ggn_vp(model_fn, params, X, y, v, loss_fn=loss_fn), loss_at, loss)
