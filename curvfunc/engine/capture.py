"""One forward pass, and where it uses the parameters.

The model runs once under a ``TorchFunctionMode`` that sees every call with the parameter tensors themselves. For an
operation with a rule it keeps a *site*: the forms of the parameters' use, and the gradient edge of the output, which
stays right when the output is changed in place later. Two ways of running keep samples apart:

- *plain*, on the whole batch. Valid if every use of a parameter has a rule and the sample axis is proven
  (`curvfunc.rules.batch_axis`) from each site to the output.
- *vmapped* over samples, where the sample axis is explicit. A parameter that is used without a rule (*generic*) is
  expanded to one copy per sample, whose gradient is the per-sample gradient: right for every operation.

Where vmap cannot run the model either, samples run one after another, all parameters generic. Nothing is guessed.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from curvfunc.engine import plans
from curvfunc.engine.effects import Attributes, Effects, ParameterChanged
from curvfunc.engine.graph import reached
from curvfunc.engine.observer import Observer
from curvfunc.engine.outputs import check_leaves, visible
from curvfunc.engine.runs import CHANGING, UNFOLLOWED, Runs, hides_calls, nothing_hidden
from curvfunc.engine.separation import FINE, SEEDED, differ, holds, outcome
from curvfunc.engine.sites import Layouts, Trace
from curvfunc.engine.surroundings import ALTERED, altering_mode
from curvfunc.rules.kernels import INSTEAD
from curvfunc.rules.pooling import FASTER
from curvfunc.tensors.inputs import check_used

__all__ = ["capture"]

_VERSION = attrgetter("_version")
FASTEST = {order: instead | FASTER for order, instead in INSTEAD.items()}


def capture(
    model_fn: Callable[..., Any],
    leaves: list[Tensor],
    rebuild: Callable[[Sequence[Tensor]], Any],
    X: Any,
    samples: int,
    *,
    generic: Sequence[int] = (),
    layouts: Layouts | None = None,
    faster: bool = False,
    order: int = 1,
) -> Trace:
    """Run ``model_fn(rebuild(leaves), X)`` once and find the sites.

    Args:
        model_fn: The model.
        leaves: The parameters, requiring grad.
        rebuild: Makes the params pytree of a list of tensors.
        X: The input, every tensor [N, ...].
        samples: N.
        generic: Indices of parameters that are to be generic whatever use they have.
        layouts: Filled with the layouts of intermediate tensors if given.
        faster: Whether operations may be replaced by faster ones with the same values, so that the graph is another one.
        order: The number of derivatives that will be taken of the model's function.
    """
    run = Runs(model_fn, leaves, rebuild, X, samples, order, Attributes.of(model_fn))
    try:
        try:
            return _attempt(run, generic, layouts, faster)
        except Exception as error:
            if not hides_calls(error):
                raise
        if layouts is not None:
            layouts.clear()
        for mode in reversed(run.started):
            mode.undo()
        run.attributes.restore()
        with nothing_hidden():
            return _attempt(run, generic, layouts, faster)
    finally:
        run.attributes.take_back()


def _attempt(run: "Runs", generic: Sequence[int], layouts: Layouts | None, faster: bool) -> Trace:
    """On the whole batch; if that does not hold, under vmap; if that does not run, sample by sample."""
    leaves, samples = run.leaves, run.samples
    instead = (FASTEST if faster else INSTEAD)[run.order]
    versions = [] if torch.compiler.is_dynamo_compiling() else [*map(_VERSION, leaves)]
    for guesses in (None, False):
        mode = Observer(dict(enumerate(leaves)), None, samples, layouts, instead)
        mode.guesses, mode.plan = guesses, plans.expected(run.model_fn, samples)
        mode.note(generic, "on request")
        if altering_mode():
            mode.note([None, *range(len(leaves))], ALTERED)
        run.started.append(mode)
        try:
            out = run.whole(mode)
        except ParameterChanged:
            mode.undo()
            run = replace(run, changing=True)
            run.begin()
            mode = run.watch({}, None, samples)
            out = run.whole(mode)
            mode.note([None], CHANGING)
        plans.keep(run.model_fn, samples, mode.plan)
        if not mode.reasons and out.requires_grad and mode.axis_of(out) != 0:
            mode.reasons[None] = UNFOLLOWED
        if not mode.reasons:
            found = reached([out], mode.sites, mode.tracked)
            check_used(out, bool(found.params or found.sites))
            mode.note(found.params, "it is used where calls cannot be seen")
            mode.note_hooks(found.nodes)
            check_leaves(run.model_fn, found.leaves, leaves)
            if run.attributes.kept():
                run.check_unused({*found.params, *(i for site in found.sites for i in site.forms)})
        _check_versions(leaves, versions)
        if not mode.reasons:
            assert mode.effects is not None
            restart = partial(_restart, mode.effects, run.attributes)
            return _with_doubts(Trace(out, mode.sites, "plain", restart=restart), mode)
        if not mode.guesses:
            break
        mode.undo()
        run.attributes.restore()
    compiling = torch.compiler.is_compiling() or not visible(out)
    whole = None if compiling and mode.random else outcome(out, leaves, retain_graph=False)
    if whole is not None:
        used = {i for i, g in enumerate(whole.gradients) if g is not None}
        check_used(out, bool(used))
        if len(used) < len(leaves):
            check_leaves(run.model_fn, reached([out], [], dict(enumerate(leaves))).leaves, leaves)
            run.check_unused(used)
    # all other passes start where this one did: with stand-ins for what modules hold, for graphs may hold it too
    assert mode.effects is not None
    attributes, values = run.attributes.now(), mode.effects.values()
    restart = partial(_restart, copy(mode.effects), run.attributes)
    run = replace(run, values={key: values[key] for key in run.attributes.holds() & values.keys()})
    effects = mode.undo(but=run.values)
    try:
        trace = run.apart(mode.reasons, layouts)
        mine = None if whole is None else run.outcome(trace)
        alike = doubtful = False
        if whole is not None and mine is not None:
            alike = holds(differ(whole, mine), compiling)
            doubtful = alike and not compiling and bool(differ(whole, mine, FINE))
        if run.order > 1 or doubtful:  # what mixes by second derivatives alone, or hardly, may do so openly elsewhere
            run.moved().compare(trace.mode, compiling, mode.random)
        if not alike:
            if whole is not None and mode.random and run.repeats(whole.out):
                raise ValueError(SEEDED)
            tried = compiling or whole is None or mode.random or trace.mode == "loop"
            slow = None if tried or whole is None else run.like(whole)
            if slow is None:
                run.compare(trace.mode, compiling)
            else:
                trace = slow
                if layouts is not None:
                    layouts.clear()
    except Exception:  # whoever tries again starts there, too
        restart()
        raise
    effects.undo()
    attributes.restore()
    if mode.entangled is None and mode.axis_of(out) != 0:
        mode.entangled = UNFOLLOWED
    trace.restart = restart
    return _with_doubts(trace, mode)


def _with_doubts(trace: Trace, mode: Observer) -> Trace:
    """A trace with what the whole batch's forward pass left unproven."""
    trace.entangled, trace.counts, trace.random = mode.entangled, mode.counts, mode.random
    trace.rows, trace.foreign = mode.rows, mode.foreign.values()
    return trace


def _restart(effects: Effects, attributes: Attributes) -> None:
    """Take back what a forward pass changed, before another one."""
    effects.rewind()
    attributes.restore()


def _check_versions(leaves: Sequence[Tensor], versions: Sequence[int]) -> None:
    if versions and versions != [*map(_VERSION, leaves)]:
        raise RuntimeError(
            "the forward pass changed a parameter in place where calls cannot be seen (compiled or scripted code, or a block "
            "that disables torch functions). Change it outside of the model."
        )
