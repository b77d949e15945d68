"""The hooks by which a backward pass of the user's turns cotangents into results on the parameters.

Three kinds of nodes carry hooks (`curvfunc.compat.recording` puts them there):

- operations that use parameters: the user's own backward pass brings the cotangent, and first-order quantities are
  contracted on the spot (`curvfunc.compat.delivery`);
- outputs of modules for which the plain path does not hold: the functional core runs on the recorded input, with the
  cotangent that arrived;
- extended losses: columns of a root of the loss Hessian are pulled through the graph, which the user's backward pass has
  not freed yet, and second-order quantities are contracted (`curvfunc.compat.curvature`).
"""

from __future__ import annotations

import warnings

from curvfunc.compat import curvature
from curvfunc.compat.context import State, retained, state
from curvfunc.compat.delivery import FREED, Grads, Pass, forget
from curvfunc.compat.notes import LossCall, ModuleUse, RegionOutput

__all__ = ["NOTHING_USED", "on_disabled", "on_loss", "on_nothing_used", "on_output", "on_use"]


def on_use(use: ModuleUse, grads: Grads) -> None:
    """The cotangent of an operation that uses parameters has arrived."""
    cotangent, now = grads[use.output], state()
    if now.paused or cotangent is None:
        return
    if now.active_exts:
        try:
            if use.site is None:
                raise RuntimeError(FREED)
            Pass.current(now).deliver(use, cotangent)
        except Exception:
            forget(use.region.params, now.active_exts)
            raise
    if not _keeps_graph(now) and use.site is not None:  # what the hook holds would live as long as the loss tensor
        use.site = None
        use.region.release()


def on_output(output: RegionOutput, grads: Grads) -> None:
    """The cotangent of the output of a module has arrived, and the plain path does not hold for it."""
    cotangent, now = grads[output.output], state()
    if now.paused or cotangent is None:
        return
    if now.active_exts:
        try:
            Pass.current(now).replay(output, cotangent)
        except Exception:
            forget(output.region.params, now.active_exts)
            raise
    if not _keeps_graph(now) and output.value is not None:
        output.value = None
        output.region.release()


def on_loss(held: list[LossCall], grads: Grads) -> None:
    """The backward pass starts at an extended loss; ``held`` is emptied once the graph is freed."""
    now = state()
    if now.paused:
        return
    if now.active_exts:
        if not held:
            raise RuntimeError(FREED)
        current = Pass.current(now)
        current.losses.append(held[0])
        if current.second_order:
            if (g := grads[0]) is not None and g.numel() == 1 and g.item() != 1:
                warnings.warn(CHANGED.format(type(held[0].module).__name__), stacklevel=2)
            curvature.evaluate(held[0], current)
        current.say("Running extension hook on", held[0].module)
        current.hook(held[0].module)
    if not _keeps_graph(now):
        held.clear()


def on_nothing_used(name: str, grads: Grads) -> None:
    """A backward pass runs through a module whose output depends on none of its parameters."""
    now = state()
    if now.active_exts and not now.paused:
        Pass.current(now).reached = True
        warnings.warn(NOTHING_USED.format(name, "its output depends on none of them"), stacklevel=2)


def on_disabled(grads: Grads) -> None:
    """A backward pass runs through a module whose forward pass was not recorded."""
    if state().active_exts:
        raise RuntimeError(
            "this forward pass ran inside disable(), which records nothing, so extensions have nothing to work with. "
            "Leave the disable() block for passes whose backward pass runs in backpack(...)."
        )


NOTHING_USED = (
    "{0} has parameters that require grad, but {1}, so that extensions deliver nothing for it: look for no_grad or detach "
    "in its forward pass, and for parameters that are replaced while it runs (as in fully_shard, which is not supported)."
)
CHANGED = (
    "the value of {0} was changed before backward, as in (2 * loss).backward(): second-order quantities are those of the loss "
    "itself, without the change."
)


def _keeps_graph(now: State) -> bool:
    """Whether another backward pass may follow."""
    return retained() and not now.retained
