"""The forward passes of one call: on the whole batch, under vmap over samples, and sample by sample."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from curvfunc.engine.columns import without_fallback_warnings
from curvfunc.engine.effects import Attributes, ParameterChanged
from curvfunc.engine.graph import Opaque, all_visible, calls_may_hide, edge_of, reached
from curvfunc.engine.model import recomputation, without_recomputation
from curvfunc.engine.observer import Observer
from curvfunc.engine.outputs import check_leaves, check_output
from curvfunc.engine.separation import ALONE, Outcome, chance_put_back, differ, holds, moved, outcome, require, same_chance
from curvfunc.engine.sites import Layouts, Site, Trace
from curvfunc.rules.kernels import INSTEAD
from curvfunc.tensors.ownership import base
from curvfunc.tensors.samples import flatten, tree_map
from curvfunc.uses.forms import Direct

__all__ = ["CHANGING", "UNFOLLOWED", "Runs", "hides_calls", "nothing_hidden"]

UNFOLLOWED = "the sample axis could not be followed to the output"
CHANGING = "the forward pass changes parameters in place"


@dataclass(eq=False)  # quicker to make than if it were frozen
class Runs:
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
        with mode, recomputation(self.model_fn):
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
        except (RuntimeError, NotImplementedError, IndexError, AttributeError, TypeError) as error:
            if hides_calls(error):  # attributes: tensors have no graph there
                raise
            if layouts is not None:
                layouts.clear()
            why = f"vmap cannot run the model: {(str(error) or type(error).__name__).splitlines()[0]}"
        try:
            return self.one_by_one(why)
        except (RuntimeError, NotImplementedError, IndexError) as error:
            if hides_calls(error):
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
                # what checkpoints run again in the backward pass would meet tensors of a vmap that is over
                with without_fallback_warnings(), without_recomputation():
                    out = torch.vmap(one, randomness="different")(inputs, generic)
            finally:
                for mode in modes:
                    self.end(mode)
            mode = modes[0]
            found = reached([out], mode.sites, tracked, list(generic.values()))
            mode.note(found.params, "it is used where calls cannot be seen")
            mode.note_hooks(found.nodes)
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
                with mode, recomputation(self.model_fn):
                    out = self.model_fn(self.rebuild(own), x)
            finally:
                self.end(mode)
            check_output(out, 1)
            check_leaves(self.model_fn, reached([out], [], {}, own).leaves, [*self.leaves, *generic.values()])
            outs.append(out)
        return Trace(torch.cat(outs), _generic_sites(generic, self.leaves), "loop", dict.fromkeys(generic, why))

    def outcome(self, trace: Trace) -> Outcome | None:
        """What samples by themselves give; None where vmap, which ran forwards, does not run backwards."""
        try:
            return outcome(trace.out, self.leaves, retain_graph=True)
        except (RuntimeError, NotImplementedError):
            if trace.mode != "vmap":
                raise
            return None

    def like(self, whole: Outcome) -> Trace | None:
        """Sample by sample, if that gives what the batch does: then it is vmap that is wrong."""
        try:
            trace = self.one_by_one("under vmap the model has other values or gradients; curvfunc.check finds the operation")
        except (RuntimeError, NotImplementedError, IndexError, ValueError):
            return None
        mine = self.outcome(trace)
        return trace if mine is not None and holds(differ(whole, mine), False) else None

    def repeats(self, out: Tensor) -> bool:
        """Whether the batch has the same output again, although something is drawn at random."""
        self.begin()
        mode = self.watch({}, None, self.samples)
        try:
            with torch.no_grad():
                return torch.equal(base(self.whole(mode)), base(out))
        finally:
            self.end(mode)

    def moved(self) -> "Runs":
        """The same at other parameters."""
        return replace(self, leaves=moved(self.leaves))

    def compare(self, way: str, compiling: bool, draws: bool = True) -> None:
        """Raise unless the batch gives what the samples give by themselves, when nothing is drawn at random."""
        seeded = replace(self, seeded=True)

        def by_themselves() -> Outcome:
            if way != "loop":
                try:
                    return outcome(seeded.vmapped({None: ""}).out, self.leaves, retain_graph=False)
                except (RuntimeError, NotImplementedError):  # of scripted parts, or of kernels, once backwards
                    if compiling:
                        raise
            return outcome(seeded.one_by_one("").out, self.leaves, retain_graph=False)

        def run() -> tuple[Outcome, Outcome]:
            found = []
            for apart in (False, True):
                mode = self.watch(dict(enumerate(self.leaves)), None, self.samples)
                try:
                    if not apart:
                        seeded.begin()
                    found.append(by_themselves() if apart else outcome(seeded.whole(mode), self.leaves, retain_graph=False))
                finally:
                    self.end(mode)
            return found[0], found[1]

        if not draws:
            with chance_put_back():
                if holds(differ(*run()), compiling):
                    return
        require(run, compiling)


def hides_calls(error: Exception) -> bool:
    """Whether activation checkpointing or compiled code inside the model made the capture fail."""
    return calls_may_hide() and (
        isinstance(error, (Opaque, torch._dynamo.exc.TorchDynamoException))
        or "saved tensor hooks" in str(error)
        or "use_reentrant" in str(error)
        or "autograd.Function with functorch" in str(error)
    )


@contextmanager
def nothing_hidden() -> Iterator[None]:
    """Run checkpointed parts of a model as they are, and compiled parts eagerly."""
    with all_visible(), without_recomputation(), nullcontext() if torch.compiler.is_compiling() else _eager():
        yield


_LOCK, _STANCES = threading.Lock(), list[Any]()


@contextmanager
def _eager() -> Iterator[None]:
    """Run compiled code eagerly, in all threads; the last of those that want it puts back what the first one found."""
    with _LOCK:
        try:
            _STANCES.append(nullcontext() if _STANCES else torch.compiler.set_stance("force_eager"))
        except RuntimeError as error:  # dynamo runs this code
            raise NotImplementedError(
                "the model has compiled parts, whose derivatives this call needs in another way than torch.compile gives them. "
                "Make the call outside of compiled code, or ask with fullgraph=True why it was not compiled as a whole."
            ) from error
    try:
        yield
    finally:
        with _LOCK:
            _STANCES.pop().__exit__(None, None, None)  # the first one is the last


def _copies(p: Tensor, samples: int) -> Tensor:
    """One copy of a parameter per sample, sharing memory, whose gradient is the per-sample gradient."""
    return p.expand(samples, *p.shape)


def _generic_sites(generic: dict[int, Tensor], leaves: list[Tensor]) -> list[Site]:
    return [
        Site("generic", {i: Direct(lambda g: g, leaves[i].shape)}, edge_of(copies), 0, [], copies.shape, [])
        for i, copies in generic.items()
    ]
