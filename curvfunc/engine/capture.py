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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._C import _functorch

from curvfunc.engine.chance import Chance
from curvfunc.engine.columns import without_fallback_warnings
from curvfunc.engine.effects import Attributes, Effects, ParameterChanged, all_held, kept_tensors, shares_memory
from curvfunc.engine.graph import Opaque, calls_may_hide, edge_of, reached
from curvfunc.engine.model import without_recomputation
from curvfunc.engine.observer import Observer
from curvfunc.engine.separation import ALONE, SEEDED, Outcome, differ, holds, outcome, require, same_chance
from curvfunc.engine.sites import Layouts, Site, Trace
from curvfunc.rules.kernels import INSTEAD
from curvfunc.rules.pooling import FASTER
from curvfunc.tensors.inputs import Batch, check_used
from curvfunc.tensors.ownership import base
from curvfunc.tensors.samples import flatten, tree_map
from curvfunc.uses.forms import Direct

__all__ = ["Entangled", "capture", "check_leaves", "check_output", "check_subset", "nothing_hidden"]

UNFOLLOWED = "the sample axis could not be followed to the output"
CHANGING = "the forward pass changes parameters in place"

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
    run = _Runs(model_fn, leaves, rebuild, X, samples, order, Attributes.of(model_fn))
    try:
        try:
            return _attempt(run, generic, layouts, faster)
        except Exception as error:
            if not _hides_calls(error):
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


def _attempt(run: "_Runs", generic: Sequence[int], layouts: Layouts | None, faster: bool) -> Trace:
    """On the whole batch; if that does not hold, under vmap; if that does not run, sample by sample."""
    leaves, samples = run.leaves, run.samples
    instead = (FASTEST if faster else INSTEAD)[run.order]
    versions = [] if torch.compiler.is_dynamo_compiling() else [p._version for p in leaves]
    for guesses in (None, False):
        mode = Observer(dict(enumerate(leaves)), None, samples, layouts, instead)
        mode.guesses = guesses
        mode.note(generic, "on request")
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
        if not mode.reasons and out.requires_grad and mode.axis_of(out) != 0:
            mode.reasons[None] = UNFOLLOWED
        if not mode.reasons:
            found = reached([out], mode.sites, mode.tracked)
            check_used(out, bool(found.params or found.sites))
            mode.note(found.params, "it is used where calls cannot be seen")
            check_leaves(run.model_fn, found.leaves, leaves)
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
    compiling = torch.compiler.is_compiling() or not _visible(out)
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
        if whole is None or not run.is_alike(trace, whole, compiling):
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
    trace.foreign = mode.foreign.values()
    return trace


def _restart(effects: Effects, attributes: Attributes) -> None:
    """Take back what a forward pass changed, before another one."""
    effects.rewind()
    attributes.restore()


@dataclass(frozen=True)
class _Runs:
    """The forward passes of one call, in each way of running."""

    model_fn: Callable[..., Any]
    leaves: list[Tensor]
    rebuild: Callable[[Sequence[Tensor]], Any]
    X: Any
    samples: int
    order: int
    attributes: Attributes
    values: Mapping[int, Tensor] = field(default_factory=dict)
    seeded: bool = False
    changing: bool = False  # parameters, which are copies then
    started: list[Observer] = field(default_factory=list)  # what watched forward passes of the whole batch

    def begin(self) -> None:
        """Start where the first forward pass did."""
        self.attributes.restore(self.values)
        if self.seeded:
            same_chance()

    def end(self, mode: Observer) -> None:
        """Take back what a later forward pass changed; the stand-ins that modules hold are its own."""
        if mode.effects:
            mode.undo(but=self.attributes.now().holds())

    def watch(self, tracked: dict[int, Tensor], level: int | None, samples: int, layouts: Layouts | None = None) -> Observer:
        """A mode for another forward pass."""
        return Observer(tracked, level, samples, layouts, INSTEAD[self.order])

    def whole(self, mode: Observer) -> Tensor:
        """On the whole batch, watched."""
        leaves = [p.clone() for p in self.leaves] if self.changing else self.leaves
        params, X = self.rebuild(leaves), tree_map(mode.marked, self.X)
        with mode:
            out = self.model_fn(params, X)
        check_output(out, self.samples)
        return out

    def check_unused(self, used: set[int]) -> None:
        """Raise if parameters seem unused, because the model kept values of them from an earlier call without a graph."""
        if len(used) == len(self.leaves) or not (kept := self.attributes.kept()):
            return
        after = self.attributes.now()
        for delete in (False, True):
            after.hide(delete=delete)
            trial = self.watch(dict(enumerate(self.leaves)), None, self.samples)
            try:
                found = reached([self.whole(trial)], trial.sites, trial.tracked)
                then = {*found.params, *(i for site in found.sites for i in site.forms)}
            except Exception:  # they are not what it can do without
                then = set()
            finally:
                trial.undo()
                after.restore()
            if more := sorted(then - used):
                m, key = kept[0]
                raise ValueError(
                    f"the model does not use parameter number {more[0]} of params in this call, but values made of it earlier, "
                    f"without a graph, that it kept in attribute {key!r} of {type(m).__name__}. Clear them before the call "
                    "(module.train() followed by module.eval() often does), or compute them anew in each forward pass."
                )

    def apart(self, reasons: dict[int | None, str], layouts: Layouts | None = None) -> Trace:
        """Under vmap, or sample by sample."""
        try:
            if not self.changing:
                return self.vmapped(reasons, layouts)
            why = CHANGING
        except ParameterChanged:
            why = CHANGING
        except (RuntimeError, NotImplementedError, IndexError) as error:
            if _hides_calls(error):
                raise
            if layouts is not None:
                layouts.clear()
            why = f"vmap cannot run the model: {(str(error) or type(error).__name__).splitlines()[0]}"
        try:
            return self.one_by_one(why)
        except (RuntimeError, NotImplementedError, IndexError) as error:
            if _hides_calls(error):
                raise
            raise ValueError(ALONE.format(why=next(iter(reasons.values()), why), error=error)) from error

    def vmapped(self, reasons: dict[int | None, str], layouts: Layouts | None = None) -> Trace:
        """Under vmap over samples, generic parameters expanded; again if more of them turn out to be generic."""
        leaves, samples, reasons = self.leaves, self.samples, dict(reasons)
        while True:
            tracked = {i: p for i, p in enumerate(leaves) if i not in reasons}
            generic = {i: _copies(leaves[i], samples) for i in reasons if i is not None}
            modes: list[Observer] = []
            inputs, rebuild_X = flatten(self.X)
            self.begin()

            def one(xs: list[Tensor], own: dict[int, Tensor]) -> Tensor:
                level = _functorch.maybe_get_level(xs[0])
                modes.append(self.watch(tracked, level, samples, layouts))  # noqa: B023 (called at once, below)
                params = self.rebuild([own.get(i, p) for i, p in enumerate(leaves)])
                x = rebuild_X([t.unsqueeze(0) for t in xs])  # noqa: B023
                with modes[0]:  # noqa: B023
                    out = self.model_fn(params, x)
                check_output(out, 1)
                return out.squeeze(0)

            try:
                with without_fallback_warnings(), _no_checkpoints():
                    out = torch.vmap(one, randomness="different")(inputs, generic)
            finally:
                for mode in modes:
                    self.end(mode)
            mode = modes[0]
            found = reached([out], mode.sites, tracked, list(generic.values()))
            mode.note(found.params, "it is used where calls cannot be seen")
            check_leaves(self.model_fn, found.leaves, leaves)
            if not mode.reasons:
                return Trace(out, mode.sites + _generic_sites(generic, leaves), "vmap", reasons)
            reasons |= mode.reasons

    def one_by_one(self, why: str) -> Trace:
        """Sample by sample, every parameter with a copy per sample, in memory of its own: the model may change it."""
        generic = {i: _copies(p, self.samples) for i, p in enumerate(self.leaves)}
        outs = []
        inputs, rebuild_X = flatten(self.X)
        for n in range(self.samples):
            x = rebuild_X([t[n : n + 1] for t in inputs])
            own = [p[n].clone() for p in generic.values()]
            self.begin()
            mode = self.watch({}, None, 1)
            try:
                with mode:
                    out = self.model_fn(self.rebuild(own), x)
            finally:
                self.end(mode)
            check_output(out, 1)
            check_leaves(self.model_fn, reached([out], [], {}, own).leaves, [*self.leaves, *generic.values()])
            outs.append(out)
        return Trace(torch.cat(outs), _generic_sites(generic, self.leaves), "loop", dict.fromkeys(generic, why))

    def is_alike(self, trace: Trace, whole: Outcome, compiling: bool) -> bool:
        """Whether samples by themselves give what the batch does; what vmap runs forwards may not run backwards."""
        try:
            return holds(differ(whole, outcome(trace.out, self.leaves, retain_graph=True)), compiling)
        except (RuntimeError, NotImplementedError):
            if trace.mode != "vmap":
                raise
            return False

    def like(self, whole: Outcome) -> Trace | None:
        """Sample by sample, if that gives what the batch does: then it is vmap that is wrong."""
        try:
            trace = self.one_by_one("under vmap the model has other values or gradients; curvfunc.check finds the operation")
        except (RuntimeError, NotImplementedError, IndexError, ValueError):
            return None
        return trace if self.is_alike(trace, whole, False) else None

    def repeats(self, out: Tensor) -> bool:
        """Whether the batch has the same output again, although something is drawn at random."""
        self.begin()
        mode = self.watch({}, None, self.samples)
        try:
            with torch.no_grad():
                return torch.equal(base(self.whole(mode)), base(out))
        finally:
            self.end(mode)

    def compare(self, way: str, compiling: bool) -> None:
        """Raise unless the batch gives what the samples give by themselves, when nothing is drawn at random."""
        seeded = replace(self, seeded=True)

        def run() -> tuple[Outcome, Outcome]:
            found = []
            for apart in (False, True):
                mode = self.watch(dict(enumerate(self.leaves)), None, self.samples)
                try:
                    if not apart:
                        seeded.begin()
                        out = seeded.whole(mode)
                    else:
                        out = (seeded.one_by_one("") if way == "loop" else seeded.vmapped({None: ""})).out
                    found.append(outcome(out, self.leaves, retain_graph=False))
                finally:
                    self.end(mode)
            return found[0], found[1]

        require(run, compiling)


def _hides_calls(error: Exception) -> bool:
    """Whether activation checkpointing or compiled code inside the model made the capture fail."""
    return calls_may_hide() and (
        isinstance(error, (Opaque, torch._dynamo.exc.TorchDynamoException))
        or "saved tensor hooks" in str(error)
        or "use_reentrant" in str(error)
        or "autograd.Function with functorch" in str(error)
    )


@contextmanager
def _no_checkpoints() -> Iterator[None]:
    """Have checkpoints raise: what they run again in the backward pass would meet tensors of a vmap that is over."""

    def opaque(*args: Any, **kwargs: Any) -> Iterator[None]:
        raise Opaque
        yield

    if not calls_may_hide():
        yield
        return
    with patch.object(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", opaque):
        yield


@contextmanager
def nothing_hidden() -> Iterator[None]:
    """Run checkpointed parts of a model as they are, and compiled parts eagerly."""
    quiet = nullcontext() if torch.compiler.is_compiling() else torch.compiler.set_stance("force_eager")
    with without_recomputation(), quiet:
        yield


def _copies(p: Tensor, samples: int) -> Tensor:
    """One copy of a parameter per sample, sharing memory, whose gradient is the per-sample gradient."""
    return p.expand(samples, *p.shape)


def _generic_sites(generic: dict[int, Tensor], leaves: list[Tensor]) -> list[Site]:
    return [
        Site("generic", {i: Direct(lambda g: g, leaves[i].shape)}, edge_of(copies), 0, [], copies.shape, [])
        for i, copies in generic.items()
    ]


def check_subset(
    model_fn: Callable[..., Any],
    leaves: Sequence[Tensor],
    rebuild: Callable[[Sequence[Tensor]], Any],
    batch: Batch,
    found: Trace | Observer,
    out: Tensor,
) -> None:
    """Raise unless samples of a subset have the outputs that they have in the whole batch.

    Nothing is compared where the samples could be followed all the way. Otherwise one of them runs in other company, and
    where their data may have met, the whole batch.

    Args:
        model_fn: The model.
        leaves: The parameters.
        rebuild: Makes the params pytree of a list of tensors.
        batch: The subset.
        found: What is known of the forward pass of the subset.
        out: Its output.
    """
    index = batch.index
    if index is None:
        return
    foreign = found.foreign if isinstance(found, Trace) else found.foreign.values()
    whole = found.entangled is not None or batch.size == batch.total or not all_held(model_fn, foreign)
    apart = bool(found.reasons)  # each sample was run by itself, but a batch of one is that anyway
    if not (whole or found.counts or found.random or (apart and batch.size == 1)):
        return
    last = index[-1:]
    company, place = (last, slice(0, 1)) if batch.size > 1 else (torch.cat([(last + 1) % batch.total, last]), slice(1, 2))
    attributes = Attributes.of(model_fn).now()

    def other(X: Any, samples: int) -> Tensor:
        mode = Observer({}, None, samples)  # for what it writes
        try:
            with torch.no_grad(), mode:
                result: Tensor = model_fn(rebuild([p.clone() for p in leaves]), X)
            check_output(result, samples)
        finally:
            mode.undo()
            attributes.restore()
        return result

    def pair(mine: Tensor | None) -> tuple[Outcome, Outcome]:
        if again := mine is None:
            same_chance()
        mine = other(batch.inputs(), batch.size) if mine is None else mine.detach()
        if again:
            same_chance()
        if whole:
            return Outcome(other(batch.X, batch.total)[index.to(mine.device)], []), Outcome(mine, [])
        theirs = other(tree_map(lambda x: x[company.to(x.device)], batch.X), len(company))[place]
        return Outcome(theirs, []), Outcome(mine[-1:], [])

    compiling = torch.compiler.is_compiling() or not _visible(out)
    chance, seeded = Chance(leaves), False
    if found.random and not whole and not compiling:
        with chance:
            again = other(batch.inputs(), batch.size)
        chance.undo()
        # draws that come out the same depend on their place in the batch, as after a seed
        whole = seeded = torch.equal(base(again), base(out.detach()))
        if not (whole or found.counts or (apart and batch.size == 1)):
            return
    why = (
        f"subsampling: the output for a sample depends on which others are in the batch "
        f"({found.entangled or 'for instance on their number'}), so a subset cannot run by itself. Leave subsampling away, and "
        "choose from the results for the whole batch."
    )
    try:
        with chance:
            if (found.random and compiling) or not holds(differ(*pair(out)), compiling, why):
                if seeded:
                    raise Entangled(why)
                require(lambda: pair(None), compiling, why)
    except (RuntimeError, IndexError, ValueError) as error:
        raise Entangled(why) from error
    finally:
        chance.undo()


class Entangled(ValueError):
    """Samples of a subset have other outputs by themselves than in the whole batch."""


def check_leaves(model_fn: Any, others: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Raise if the output's graph ends in a parameter that is not this call's."""
    if not others:
        return
    module = getattr(model_fn, "module", None)  # of a functionalized one all parameters are replaced
    replaced = {id(p) for p in module.parameters()} if isinstance(module, torch.nn.Module) else set()
    for t in others:
        if getattr(t, "_curvfunc_leaf", False) or id(t) in replaced or any(t is p or shares_memory(t, p) for p in leaves):
            where = _holder(model_fn, t)
            raise ValueError(
                f"the output depends on a tensor{where} that was made from parameters in an earlier call, and that the model "
                "kept: its values are old, and its gradient is lost. Clear it before the call (modules that keep it in eval "
                "mode often do so in module.train(), followed by module.eval()), or compute it anew in each forward pass."
            )


def _holder(model_fn: Any, leaf: Tensor) -> str:
    """Where a module keeps a tensor whose graph ends in ``leaf``, for messages."""
    module = getattr(model_fn, "module", None)
    for prefix, m in module.named_modules() if isinstance(module, torch.nn.Module) else ():
        for key, value in vars(m).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            for t in kept_tensors(value):
                if t is leaf or (t.requires_grad and any(v is leaf for v in reached([t], [], {}).leaves)):
                    return f" in attribute {key!r} of {f'module {prefix!r}' if prefix else 'the module'} ({type(m).__name__})"
    return ""


def _check_versions(leaves: Sequence[Tensor], versions: Sequence[int]) -> None:
    if any(p._version != version for p, version in zip(leaves, versions, strict=False)):
        raise RuntimeError(
            "the forward pass changed a parameter in place where calls cannot be seen (compiled or scripted code, or a block "
            "that disables torch functions). Change it outside of the model."
        )


def _visible(t: Tensor) -> bool:
    t = base(t)
    return not isinstance(t, torch._subclasses.FakeTensor) and not torch._is_functional_tensor(t)


def check_output(out: Any, samples: int) -> None:
    """Raise if a model's output is not one tensor with the samples first."""
    if not isinstance(out, Tensor):
        what = f"a {type(out).__name__}"
        if isinstance(out, dict):
            what += f" with keys {list(out)}"
        raise TypeError(
            f"the model returned {what}; a single tensor is needed. Choose one: functionalize(module, output_fn=lambda "
            "out: out[0]), or a model_fn that returns it."
        )
    if out.ndim == 0 or out.shape[0] != samples:
        raise ValueError(
            f"the model's output has shape {tuple(out.shape)} for {samples} sample(s); its first axis must be the "
            "sample axis. Permute it in model_fn or output_fn."
        )
    if not out.is_floating_point():
        raise TypeError(f"the model's output has dtype {out.dtype}; a real floating-point tensor is needed.")
