"""The mode that watches a forward pass: it sees every call with the parameter tensors themselves.

For an operation with a rule it keeps a site; on the plain path it follows the sample axis from tensor to tensor
(`curvfunc.engine.following`).
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from operator import attrgetter
from types import MappingProxyType
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch
from torch.autograd.graph import Node, get_gradient_edge

from curvfunc.engine.calls import (
    BATCH_NORMS,
    BATCH_STATISTICS,
    ESCAPES,
    ORDINARY,
    holds_tensor,
    name_of,
    takes_batch_statistics,
    tensors_in,
)
from curvfunc.engine.effects import HIDDEN_WRITES, Effects
from curvfunc.engine.following import CONSTANT, MIXED
from curvfunc.engine.graph import Opaque, calls_may_hide, edge_of, pullback, viewed
from curvfunc.engine.hooks import register_unchanging, watched_node
from curvfunc.engine.layouts import Surveyor
from curvfunc.engine.plans import Plan, SiteStep, Step, step
from curvfunc.engine.sites import Layouts, Parameter, Site
from curvfunc.engine.surroundings import ALTERED, PACKING, altered
from curvfunc.rules import DECOMPOSITIONS, EXPANSIONS, RULES, SPLITS, TRANSPOSES, Use
from curvfunc.rules.batch_axis import mutates
from curvfunc.rules.checks import guarded
from curvfunc.rules.kernels import standardized
from curvfunc.uses.forms import Direct, Form, Through, reads, squeezed_all, sum_to_shape
from curvfunc.uses.matrices import block_of, transposed

__all__ = ["Observer"]

HOOK = Tensor.register_hook
_REQUIRES_GRAD = attrgetter("requires_grad")

# Functions whose own kernels warn under vmap.
UNDER_VMAP: dict[Any, Any] = {f: DECOMPOSITIONS[f] for f in (torch.prelu, F.prelu, Tensor.prelu)}


class Observer(Surveyor):
    """Records sites, generic parameters and the sample axis. ``level`` is the vmap level, None on the plain path.

    Functions in ``instead`` are replaced by those that do the same, faster or with the right derivatives.
    """

    repeats = True  # whether the forward pass can run again, with nothing hidden

    def __init__(
        self,
        tracked: dict[int, Tensor],
        level: int | None,
        samples: int,
        layouts: Layouts | None = None,
        instead: Mapping[Any, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__(level, layouts)
        self.tracked = tracked
        self.instead = instead
        params = tracked.values()
        ids = [*map(id, params)]
        self.index = dict(zip(ids, map(Parameter, params, tracked), strict=True))
        if level is None:
            self.marks = dict(zip(ids, zip(map(ref, params), repeat(CONSTANT), map(_REQUIRES_GRAD, params)), strict=True))
        self.depth = _functorch.maybe_current_level() or 0  # of the transformations around the model
        self.samples = samples
        self.guesses: bool | None = None  # whether constants were taken for samples; False forbids it
        self.rows: list[Tensor] = []  # these constants
        self.sites: list[Site] = []
        self.plan: Plan | None = None  # what is expected of it
        self.hooked: set[Node] = set()  # with these nodes the model registered hooks
        self.effects: Effects | None = Effects(tracked.values())  # None where they are the user's own

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and note what it does with parameters and samples."""
        kwargs = kwargs or {}
        if (types or PACKING(False) is not None) and altered(types):
            self.note(self.tracked if self.level is not None else [None, *self.tracked], ALTERED)
        if self.layouts is not None and (parts := self.layouts.parts.get(func)) is not None:
            if calls_may_hide() and PACKING(False) is not None:
                raise Opaque  # a checkpoint would not run in parts again
            with self:
                if (found := parts(*args, **kwargs)) is not NotImplemented:
                    return found
        plan, now = self.plan, None
        if plan is not None and (now := plan.next(func)) is not None:
            values = (*args, *kwargs.values()) if kwargs else args
            data = now.meets(self, values, kwargs)
            if data is not None:
                out = self._run(func, args, kwargs, data)
                if now.gave(out, data) and (now.site is None or self._use_again(now, values, data, out)):
                    plan.taken()
                    self.mark(out, now.axis)
                    return out
                tensors = tensors_in(args, kwargs)
                used = [p for t in tensors if (p := self.index.get(id(t))) is not None]
                sampled = any(map(self._sampled, tensors))
                self._look(func, args, kwargs, tensors, out, used, sampled, self._before(tensors) if used else [])
                plan.decided(None)
                return out
        tensors = tensors_in(args, kwargs)
        writes = False
        if func not in ORDINARY:
            if func in BATCH_NORMS and takes_batch_statistics(args, kwargs):
                if func is not F.batch_norm or self.normalizes_samples(args, kwargs):
                    raise ValueError(BATCH_STATISTICS)
                if torch.is_grad_enabled():  # without, as for running statistics alone, there are no derivatives
                    with self:
                        return standardized(*args, **kwargs)
            if (what := ESCAPES.get(func)) is not None:
                if what == "set":  # autograd itself sets attributes, while it holds what a look at the graph would wait for
                    return func(*args, **kwargs)
                if what == "node":
                    return watched_node(args[0], self.hooked)
                self._escapes(what, func, args, kwargs, tensors)
            writes = mutates(func)
            if self.effects is not None and (writes or func in HIDDEN_WRITES):
                self.effects.before(func, args, kwargs, self._is_made)
        used = [p for t in tensors if (p := self.index.get(id(t))) is not None]
        if used and (decomposition := DECOMPOSITIONS.get(func)) is not None:
            with self:
                return decomposition(*args, **kwargs)
        before: list[Node] = []
        sampled = repeated = False
        if used:
            sampled = any(map(self._sampled, tensors))
            if not sampled and func in RULES:
                args, kwargs = (self._repeated(a) for a in (args, kwargs))
                tensors = tensors_in(args, kwargs)
                sampled = repeated = any(map(self._sampled, tensors))
            before = self._before(tensors)  # before the call, which may move on from these nodes in place
        ordinary = func in ORDINARY or func in BATCH_NORMS
        now = step(self, func, (*args, *kwargs.values()), kwargs) if plan is not None and ordinary and not repeated else None
        out = self._run(func, args, kwargs, tensors)
        site = self._look(func, args, kwargs, tensors, out, used, sampled, before, writes)
        if plan is not None:
            plan.decided(None if now is None or (used and site is None) else self._decided(now, tensors, out, site))
        return out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """The function, or what does the same in its place; ``tensors`` are those among the arguments that may have samples."""
        run = self.instead.get(func, func)
        if func is HOOK:
            run = partial(register_unchanging, known=self.index.get(id(args[0])))
        if self.level is not None:
            run = UNDER_VMAP.get(func, run)
        if self.layouts is not None:
            return self._laid_out(self.layouts, func, run, args, kwargs, tensors)
        return run(*args, **kwargs)

    def _before(self, tensors: list[Tensor]) -> list[Node]:
        """The nodes that made the inputs."""
        if not torch.is_grad_enabled():
            return []
        data = [self._raw(t) for t in tensors if id(t) not in self.index]
        return [edge_of(t).node for t in data if t.requires_grad]

    def _look(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        out: Any,
        used: list["Parameter"],
        sampled: bool,
        before: list[Node],
        writes: bool = False,
    ) -> SiteStep | None:
        """Note what a call did; returns the use of parameters in it, where this may come again."""
        if used and holds_tensor(out):
            if sampled or writes or not self._derive(func, out, used):
                return self._use(func, args, kwargs, tensors, out, used, before, writes)
        elif self.level is None:
            self._follow(func, args, kwargs, tensors, out, writes)
        elif isinstance(out, Tensor) and not any(out is t for t in tensors):
            self.mark(out, None)
        return None

    # -- calls that come again

    def _decided(self, now: Step, tensors: list[Tensor], out: Any, site: SiteStep | None) -> Step | None:
        """What was decided of a call, if it can be taken over."""
        if type(out) is not Tensor or any(out is t for t in tensors) or (axis := self.axis_of(out)) == MIXED:
            return None
        now.axis, now.shape, now.requires_grad, now.site = axis, out.shape, out.requires_grad, site
        return now

    def _use_again(self, now: Step, values: Sequence[Any], data: list[Tensor], out: Tensor) -> bool:
        """Keep the site of a call that uses parameters as it did before; False if the rule does not cover this one."""
        again, axis = now.site, now.axis
        assert again is not None
        assert axis is not None
        if RULES.get(now.func) is not again.rule or (forms := again.forms(values)) is None:
            return False
        self._keep(again.name, forms, out, axis, data, [edge_of(t).node for t in data if t.requires_grad])
        return True

    def undo(self, but: Container[int] = ()) -> Effects:
        """Take back what the forward pass wrote into tensors that it did not make."""
        assert self.effects is not None
        return self.effects.undo(but)

    def normalizes_samples(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether what is normalized may depend on samples; weights may be standardized by their own statistics.

        Looked at on the whole batch alone, which runs before all else: elsewhere each sample has statistics of its own.
        """
        x = args[0] if args else kwargs["input"]
        return self.level is None and bool(self.index) and self._sampled(x)

    # -- parameters

    def _derive(self, func: Any, out: Any, used: list["Parameter"]) -> bool:
        """Keep what is made of parameters and constants alone, as a parameter of its own."""
        if not torch.is_grad_enabled():  # views may look as if they had a gradient
            return True
        if (made := self._expanded(func, out, used[0])) is not None:
            self.sites.append(made)
            self.mark(out, made.axis)
            return True
        for k, t in enumerate((out,) if isinstance(out, Tensor) else out):
            if not isinstance(t, Tensor) or not t.requires_grad:
                continue
            if self.level is None:
                self.mark(t, CONSTANT)
            p = self.index[id(t)] = Parameter(t, None, [*used])
            if len(used) == 1 and func in TRANSPOSES and t.ndim == 2:
                p.transposed_of = used[0]
            elif len(used) == 1 and func in SPLITS and t.ndim == 2:
                whole = used[0].tensor.shape
                dim = int(t.shape[0] == whole[0] and t.shape[1] != whole[1])
                if sum(o.shape[dim] for o in out) == whole[dim]:  # its pieces follow each other
                    p.block_of = (used[0], dim, sum(o.shape[dim] for o in out[:k]))
        return True

    def _sampled(self, t: Tensor) -> bool:
        """Whether a tensor may depend on samples with a gradient, or on a single one of them.

        Of what a transformation inside of the model (`torch.func.jvp`, `grad`, `vmap`) wraps nobody knows that it does not.
        """
        if _functorch.maybe_get_level(t) > self.depth:
            return True
        if self.level is None:
            return self.axis_of(t) not in (None, CONSTANT)
        return id(t) not in self.index and (t.requires_grad or _functorch.is_batchedtensor(t))

    def _repeated(self, args: Any) -> Any:
        """Constant arguments of an operation with a rule as samples, so that it stays a site.

        On the plain path a constant with N rows is taken to have one per sample; like all sites, this one counts only
        if the sample axis can be followed from it to the output. Under vmap constants are repeated.
        """

        def samples(t: Any) -> Any:
            if not isinstance(t, Tensor) or id(t) in self.index:
                return t
            if self.level is not None:
                return _functorch._add_batch_dim(t.expand(self.samples, *t.shape), 0, self.level)
            if self.guesses is False or t.ndim == 0 or not t.shape[0] == self.samples > 1:
                return t
            self.guesses = True
            self.doubt(t)
            self.rows.append(t)
            return self.marked(t)

        return {k: samples(t) for k, t in args.items()} if isinstance(args, dict) else tuple(map(samples, args))

    def _expanded(self, func: Any, out: Any, p: "Parameter") -> Site | None:
        """A parameter that is repeated once per sample: the site at which it meets them."""
        if self.level is not None or func not in EXPANSIONS or not isinstance(out, Tensor) or self.guesses is False:
            return None
        if out.is_complex() or not out.numel():
            return None
        own = [1] * (out.ndim - p.tensor.ndim) + list(p.tensor.shape)
        if self.samples == 1 or any(a not in (1, b) for a, b in zip(own, out.shape, strict=True)):
            return None
        axis = next((d for d, (a, b) in enumerate(zip(own, out.shape, strict=True)) if a == 1 and b == self.samples), None)
        if axis is None:
            return None
        del own[axis]
        lead, shape = torch.Size(own), p.tensor.shape
        form = Direct(lambda g: sum_to_shape(g, lead).reshape(*g.shape[:2], *shape), shape)
        self.guesses = True
        return Site(name_of(func), dict(self._leaf_forms(p, form)), get_gradient_edge(out), axis, [], out.shape, [])

    def _use(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        out: Any,
        used: list["Parameter"],
        before: list[Node],
        writes: bool,
    ) -> SiteStep | None:
        if self.level is None:
            self._follow(func, args, kwargs, tensors, out, writes)
        rule = RULES.get(func)
        if rule is None:
            return self._refuse(used, f"{name_of(func)} has no rule")
        for t in tensors:
            if t.is_complex():  # rules are for real numbers: no conjugates, no real parts
                return self._refuse(used, f"{name_of(func)} takes complex numbers")
            if not t.numel():
                return self._refuse(used, f"{name_of(func)} takes a tensor of no elements")
        bound = dict(zip(rule.arguments, args, strict=False))
        bound.update(kwargs)
        if not bound.keys() <= rule.accepts:  # an option of torch's that the rule does not know
            bound = {name: value for name, value in bound.items() if name in rule.accepts or value is not None}
            if unknown := bound.keys() - rule.accepts:
                return self._refuse(used, f"the rule of {name_of(func)} does not know {sorted(unknown)}")
        roles: dict[str, Parameter] = {}
        inputs: dict[str, Tensor] = {}
        for name, t in bound.items():
            if isinstance(t, Tensor):
                if (p := self.index.get(id(t))) is not None and name in rule.parameters:
                    roles[name] = p
                else:
                    inputs[name] = t
        if len(roles) != len(used) or not isinstance(out, Tensor):
            return self._decline(used, f"{name_of(func)} takes it as an argument that has no rule")
        axis, raw = self._sample_axis(out)
        if axis is None:
            return self._unproven(used, func)
        if not raw.requires_grad:  # no gradient flows here; reentrant checkpoints only look as if
            if self.repeats and calls_may_hide():
                raise Opaque
            return None
        batched: dict[str, Tensor] = {}
        for name, t in inputs.items():
            if (first := self._batch_first(t)) is not None:
                batched[name] = first
            elif name not in rule.parameters:
                return self._unproven(used, func)
        alone = rule.samples_first and self.level is not None
        if alone:  # each sample is a batch of its own: one axis for both
            if any(t.shape[1:2] != (1,) for t in batched.values()):
                return self._refuse(used, f"the inputs of {name_of(func)} do not have the samples first")
            batched = {k: t.squeeze(1) for k, t in batched.items()}
        bound |= batched
        if rule.takes_use:
            bound["use"] = Use(axis if self.level is None else None, frozenset(roles), frozenset(batched))
        forms = rule.forms(**bound)
        if forms is NotImplemented or (isinstance(forms, dict) and not roles.keys() <= forms.keys()):
            return self._decline(used, f"the rule of {name_of(func)} does not cover this use")
        if rule.own:
            shapes = {k: p.tensor.shape for k, p in roles.items()}
            forms = guarded(name_of(func), forms, shapes, rule.parameters, self.samples)
        if alone:
            forms = squeezed_all(forms)
        of_leaves: dict[int, Form] = {}
        twice = False
        for name, p in roles.items():
            form = forms[name]
            for i, own in ((p.leaf, form),) if p.leaf is not None else self._leaf_forms(p, form):
                twice = twice or i in of_leaves
                of_leaves[i] = own
        if twice:
            return self._decline(used, f"{name_of(func)} takes it in two arguments")
        self._keep(name_of(func), of_leaves, raw, axis, [self._raw(t) for t in inputs.values()], before)
        if self.level is not None or rule.own or any(p.leaf is None for p in roles.values()):
            return None
        taken = [name if name in bound else None for name in (*rule.arguments[: len(args)], *kwargs)]
        moved = {name: k for name in batched if (k := self.axis_of(inputs[name]))}
        leaves = [p.leaf for p in roles.values() if p.leaf is not None]  # all of them
        return SiteStep(rule, name_of(func), tuple(taken), moved, bound.get("use"), leaves, tuple(roles))

    def _keep(
        self, name: str, forms: dict[int, Form], out: Tensor, axis: int, inputs: list[Tensor], before: list[Node]
    ) -> None:
        read = [(t, t._version) for t in inputs] if any(map(reads, forms.values())) else []
        self.sites.append(Site(name, forms, edge_of(viewed(out)), axis, read, out.shape, before))

    def _leaf_forms(self, p: "Parameter", form: Form) -> list[tuple[int, Form]]:
        """The forms of the parameters that ``p`` is made of."""
        if p.leaf is not None:
            return [(p.leaf, form)]
        if p.transposed_of is not None and (flipped := transposed(form)) is not None:
            return self._leaf_forms(p.transposed_of, flipped)
        if p.block_of is not None:
            parent, dim, start = p.block_of
            if (whole := block_of(form, dim, start, parent.tensor.shape)) is not None:
                return self._leaf_forms(parent, whole)
        edge = get_gradient_edge(p.tensor)
        leaves = {q.leaf: q.tensor for q in p.ancestors()}
        return [(i, Through(form, pullback(edge, t), t.shape)) for i, t in leaves.items() if i is not None]

    def _refuse(self, used: list["Parameter"], why: str) -> SiteStep | None:
        self.note([q.leaf for p in used for q in p.ancestors()], why)
        return None

    def _unproven(self, used: list["Parameter"], func: Any) -> SiteStep | None:
        """On the plain path the samples may mix; under vmap the operation sees no sample at all."""
        return self._decline(used, f"{name_of(func)} has no proven sample axis")

    def _decline(self, used: list["Parameter"], why: str) -> SiteStep | None:
        """What does not hold on the whole batch may hold for each sample by itself."""
        if self.level is not None:
            return self._refuse(used, why)
        self.note([None], why)
        return None

    def note(self, used: Iterable[int | None], why: str) -> None:
        """Note why parameters are generic, or for None why the plain path does not hold."""
        for i in used:
            self.reasons.setdefault(i, why)

    def note_hooks(self, passed: set[Node]) -> None:
        """Note that all parameters are generic if a backward pass that passes these nodes would not run all hooks."""
        if self.hooked and not self.hooked <= passed - {site.edge.node for site in self.sites}:
            self.note(self.tracked, "the model registers hooks with nodes of autograd's graph, all of which have to run")

    def _sample_axis(self, out: Tensor) -> tuple[int | None, Tensor]:
        """The sample axis of a site's output, and the tensor that carries its graph."""
        if self.level is None:
            return self.axis_or_none(out), out
        if not _functorch.is_batchedtensor(out) or _functorch.maybe_get_level(out) != self.level:
            return None, out
        return _functorch.maybe_get_bdim(out), _functorch.get_unwrapped(out)

    def _batch_first(self, t: Tensor) -> Tensor | None:
        """An input [n, ...]; None where it has no sample axis on the plain path."""
        if self.level is None:
            axis = self.axis_of(t)
            return None if axis is None or axis < 0 else t.movedim(axis, 0) if axis else t
        if _functorch.is_batchedtensor(t) and _functorch.maybe_get_level(t) == self.level:
            return _functorch.get_unwrapped(t).movedim(_functorch.maybe_get_bdim(t), 0)
        return t.expand(self.samples, *t.shape)
