"""The mode that watches a forward pass: it sees every call with the parameter tensors themselves.

For an operation with a rule it keeps a site; on the plain path it follows the sample axis from tensor to tensor.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._C import _functorch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvfunc.engine.effects import HIDDEN_WRITES, Effects
from curvfunc.engine.sites import Layouts, Parameter, Site
from curvfunc.rules import DECOMPOSITIONS, EXPANSIONS, RULES, SPLITS, TRANSPOSES, Use
from curvfunc.rules.batch_axis import RULES as PROPAGATED
from curvfunc.rules.batch_axis import mutates, propagate
from curvfunc.rules.checks import guarded
from curvfunc.rules.kernels import standardized
from curvfunc.uses.forms import Direct, Form, Through, block_of, reads, sum_to_shape, transposed

__all__ = ["Observer", "over_columns", "reached", "without_fallback_warnings"]

MIXED = -1  # a tensor whose sample axis is not known
UNSEEN = -3  # a tensor that the mode did not see made
CONSTANT = -2  # a tensor that requires grad and depends on no sample: parameters, and what is made of them alone


class Observer(TorchFunctionMode):
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
        super().__init__()
        self.tracked = tracked
        self.instead = instead
        self.layouts = layouts
        if layouts is not None:
            layouts.clear()
        self.index = {id(p): Parameter(p, i) for i, p in tracked.items()}
        self.level = level
        self.samples = samples
        self.guesses: bool | None = None  # whether constants were taken for samples; False forbids it
        self.sites: list[Site] = []
        self.reasons: dict[int | None, str] = {}
        self.entangled: str | None = None  # what may make a sample's output depend on the data of others
        self.counts = False  # whether Python asked for the shape of a batch
        self.random = False
        self.foreign: dict[int, Tensor] = {}  # constants that it did not see made: captured, or made where calls are hidden
        self.effects: Effects | None = Effects(tracked.values())  # None where they are the user's own
        self._marks: dict[int, tuple[Any, int | None, bool]] = {}
        if level is None:
            for p in tracked.values():
                self.mark(p, CONSTANT)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and note what it does with parameters and samples."""
        kwargs = kwargs or {}
        tensors = tensors_in(args, kwargs)
        writes = False
        if func not in ORDINARY:
            if func in BATCH_NORMS and takes_batch_statistics(args, kwargs):
                if func is not F.batch_norm or self.normalizes_samples(args, kwargs):
                    raise ValueError(BATCH_STATISTICS)
                with self:
                    return standardized(*args, **kwargs)
            if (what := ESCAPES.get(func)) is not None:
                if what == "set":  # autograd itself sets attributes, while it holds what a look at the graph would wait for
                    return func(*args, **kwargs)
                self._escapes(what, func, args, kwargs, tensors)
            writes = mutates(func)
            if self.effects is not None and (writes or func in HIDDEN_WRITES):
                self.effects.before(func, args, kwargs, self._is_made)
        used = [p for t in tensors if (p := self.index.get(id(t))) is not None]
        if used and (decomposition := DECOMPOSITIONS.get(func)) is not None:
            with self:
                return decomposition(*args, **kwargs)
        before: list[Node] = []
        if used:
            sampled = any(map(self._sampled, tensors))
            if not sampled and func in RULES:
                args, kwargs = (self._repeated(a) for a in (args, kwargs))
                tensors = tensors_in(args, kwargs)
                sampled = any(map(self._sampled, tensors))
            if torch.is_grad_enabled():  # before the call, which may move on from these nodes in place
                data = [self._raw(t) for t in tensors if id(t) not in self.index]
                before = [edge_of(t).node for t in data if t.requires_grad]
        run = self.instead.get(func, func)
        if self.level is not None:
            run = UNDER_VMAP.get(func, run)
        out = run(*args, **kwargs) if self.layouts is None else self._laid_out(self.layouts, func, run, args, kwargs, tensors)
        if used and _tensor_in(out):
            if sampled or writes or not self._derive(func, out, used):
                self._use(func, args, kwargs, tensors, out, used, before, writes)
        elif self.level is None:
            self._follow(func, args, kwargs, tensors, out, writes)
        elif isinstance(out, Tensor) and not any(out is t for t in tensors):
            self.mark(out, None)
        return out

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
        """Whether a tensor may depend on samples with a gradient, or on a single one of them."""
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
            self._doubt(t)
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
        return Site(_name(func), dict(self._leaf_forms(p, form)), get_gradient_edge(out), axis, [], out.shape, [])

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
    ) -> None:
        if self.level is None:
            self._follow(func, args, kwargs, tensors, out, writes)
        rule = RULES.get(func)
        if rule is None:
            return self._refuse(used, f"{_name(func)} has no rule")
        for t in tensors:
            if t.is_complex():  # rules are for real numbers: no conjugates, no real parts
                return self._refuse(used, f"{_name(func)} takes complex numbers")
            if not t.numel():
                return self._refuse(used, f"{_name(func)} takes a tensor of no elements")
        bound = {**dict(zip(rule.arguments, args, strict=False)), **kwargs}
        if not bound.keys() <= rule.accepts:  # an option of torch's that the rule does not know
            bound = {name: value for name, value in bound.items() if name in rule.accepts or value is not None}
            if unknown := bound.keys() - rule.accepts:
                return self._refuse(used, f"the rule of {_name(func)} does not know {sorted(unknown)}")
        roles = {name: p for name in rule.parameters if (p := self.index.get(id(bound.get(name)))) is not None}
        if len(roles) != len(used) or not isinstance(out, Tensor):
            return self._decline(used, f"{_name(func)} takes it as an argument that has no rule")
        axis, raw = self._sample_axis(out)
        if axis is None:
            return self._unproven(used, func)
        if not raw.requires_grad:  # no gradient flows here; reentrant checkpoints only look as if
            if self.repeats and calls_may_hide():
                raise Opaque
            return None
        inputs = {k: t for k, t in bound.items() if isinstance(t, Tensor) and k not in roles}
        batched = {k: first for k, t in inputs.items() if (first := self._batch_first(t)) is not None}
        if any(k not in batched and k not in rule.parameters for k in inputs):
            return self._unproven(used, func)
        alone = rule.samples_first and self.level is not None
        if alone:  # each sample is a batch of its own: one axis for both
            if any(t.shape[1:2] != (1,) for t in batched.values()):
                return self._refuse(used, f"the inputs of {_name(func)} do not have the samples first")
            batched = {k: t.squeeze(1) for k, t in batched.items()}
        bound |= batched
        if rule.takes_use:
            bound["use"] = Use(axis if self.level is None else None, frozenset(roles), frozenset(batched))
        forms = rule.forms(**bound)
        if forms is NotImplemented or (isinstance(forms, dict) and not roles.keys() <= forms.keys()):
            return self._decline(used, f"the rule of {_name(func)} does not cover this use")
        if rule.own:
            shapes = {k: p.tensor.shape for k, p in roles.items()}
            forms = guarded(_name(func), forms, shapes, rule.parameters, self.samples)
        if alone:
            forms = {k: _squeezed(f) for k, f in forms.items()}
        of_leaves = [(i, form) for name, p in roles.items() for i, form in self._leaf_forms(p, forms[name])]
        if len({i for i, _ in of_leaves}) != len(of_leaves):
            return self._decline(used, f"{_name(func)} takes it in two arguments")
        reading = any(reads(forms[name]) for name in roles)
        self.sites.append(
            Site(
                name=_name(func),
                forms=dict(of_leaves),
                edge=edge_of(viewed(raw)),
                axis=axis,
                inputs=[(t, t._version) for t in map(self._raw, inputs.values())] if reading else [],
                shape=raw.shape,
                producers=before,
            )
        )
        return None

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
        return [(i, Through(form, _pullback(edge, t), t.shape)) for i, t in leaves.items() if i is not None]

    def _refuse(self, used: list["Parameter"], why: str) -> None:
        self.note([q.leaf for p in used for q in p.ancestors()], why)

    def _unproven(self, used: list["Parameter"], func: Any) -> None:
        """On the plain path the samples may mix; under vmap the operation sees no sample at all."""
        self._decline(used, f"{_name(func)} has no proven sample axis")

    def _decline(self, used: list["Parameter"], why: str) -> None:
        """What does not hold on the whole batch may hold for each sample by itself."""
        return self.note([None], why) if self.level is None else self._refuse(used, why)

    def note(self, used: Sequence[int | None], why: str) -> None:
        """Note why parameters are generic, or for None why the plain path does not hold."""
        for i in used:
            self.reasons.setdefault(i, why)

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

    def _raw(self, t: Tensor) -> Tensor:
        if self.level is not None and _functorch.is_batchedtensor(t) and _functorch.maybe_get_level(t) == self.level:
            return _functorch.get_unwrapped(t)
        return t

    # -- samples

    def _laid_out(
        self, layouts: Layouts, func: Any, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        """Run an operation; note before it, since it may change them in place, the layouts of the tensors with a gradient."""
        source, sampled = None, set()
        for t in tensors:
            raw = self._raw(t)
            axis = self.axis_or_none(t) if self.level is None else _functorch.maybe_get_bdim(t) if raw is not t else None
            if axis is not None:
                sampled.add(id(t))
            if t.requires_grad and torch.is_grad_enabled():
                if axis is not None:
                    layouts.note(edge_of(raw), axis, raw.shape)
                if source is None and func in layouts.functions:
                    source = edge_of(raw)
        out = run(*args, **kwargs)
        if isinstance(out, Tensor) and (raw := self._raw(out)).grad_fn is not None:
            if source is not None and not out.is_complex():
                layouts.note_composite(edge_of(raw).node, source)
            if len(sampled) > 1:
                layouts.note_several(edge_of(raw).node)
        return out

    def _follow(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], out: Any, writes: bool
    ) -> None:
        """Mark each tensor of ``out`` with its sample axis."""
        if writes:  # its views keep their marks, so the axis must not change
            target = args[0] if args else next(iter(kwargs.values()))
            known = self._marked_axis(target)
            axis = self._propagated(func, args, kwargs, tensors, target)
            if axis is None:
                return
            others = any(self.axis_of(t) not in (None, CONSTANT) for t in tensors if t is not target)
            # where the axis of a view is lost, it may be one sample's: what is written there reaches the others
            if known is not None and (axis != known or (axis == MIXED and others and target._base is not None)):
                self.reasons.setdefault(None, f"{_name(func)} changes a tensor in place and mixes samples")
            self.mark(target, axis)
        elif isinstance(out, Tensor):
            axis = self._propagated(func, args, kwargs, tensors, out)
            if axis is not None or not any(out is t for t in tensors):  # what is returned as it came was made elsewhere
                self.mark(out, axis)
        elif isinstance(out, (tuple, list)) and _tensor_in(out):
            axes = self._propagated(func, args, kwargs, tensors, out)
            if isinstance(axes, tuple):
                axes = tuple([MIXED if axis is None else axis for axis in axes])
            else:
                axes = (axes,) * len(out)
            for t, axis in zip(out, axes, strict=True):
                if isinstance(t, Tensor):
                    self.mark(t, axis)

    def _propagated(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], out: Any) -> Any:
        """Sample axis of ``out``: an axis, MIXED, CONSTANT; None for a constant without gradient."""
        sampled = constant_with_grad = mixed = unknown = False
        for t in tensors:
            axis = self.axis_of(t)
            if axis is None:
                constant_with_grad |= t.requires_grad
                self._doubt(t)
            elif axis >= 0:
                sampled = True
            elif axis == CONSTANT:
                constant_with_grad = True
            elif t.requires_grad:
                mixed = True
            else:
                unknown = True
        if mixed or (unknown and not sampled):
            return MIXED
        if sampled:
            found = propagate(func, args, kwargs, out, self.axis_or_none)
            if found is None and self.entangled is None:
                self.entangled = f"{_name(func)} is not known to keep samples apart"
            return MIXED if found is None else found
        return CONSTANT if constant_with_grad else None

    def _doubt(self, t: Tensor) -> None:
        if self._marked_axis(t, UNSEEN) == UNSEEN:
            self.foreign[id(t)] = t

    def _escapes(self, what: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
        """Note what the model asks of tensors that the sample axis cannot tell."""
        if what == "random":
            self.random |= func not in DROPS or DROPS[func](args, kwargs)
        elif any(self.axis_of(t) not in (None, CONSTANT) for t in tensors):
            if what == "shape":
                self.counts = True
            elif self.entangled is None:
                self.entangled = f"{_name(func)} gives Python a value that depends on samples"

    # -- marks

    def mark(self, t: Tensor, axis: int | None) -> None:
        """Note the sample axis of a tensor that the forward pass made; nothing is left on the tensor itself."""
        self._marks[id(t)] = (ref(t), axis, t.requires_grad)

    def marked(self, x: Tensor) -> Tensor:
        """A view of ``x`` whose first axis is known to be that of the samples."""
        x = x.view_as(x)
        self.mark(x, 0)
        return x

    def axis_of(self, t: Tensor) -> int | None:
        """The sample axis, MIXED or CONSTANT; None for a constant without gradient."""
        found = self._marks.get(id(t))
        if found is not None and found[0]() is t and found[2] == t.requires_grad:
            return found[1]
        # what has a gradient now and had none then was made where the mode cannot see it
        return MIXED if t.grad_fn is not None else None

    def axis_or_none(self, t: Tensor) -> int | None:
        """The sample axis if it is known."""
        axis = self.axis_of(t)
        return None if axis is None or axis < 0 else axis

    def _marked_axis(self, t: Tensor, default: int | None = None) -> int | None:
        found = self._marks.get(id(t))
        return found[1] if found is not None and found[0]() is t else default

    def _is_made(self, t: Tensor) -> bool:
        """Whether a tensor is known to be made in this forward pass; those of a transformation do not outlive it."""
        if _functorch.is_functorch_wrapped_tensor(t):
            return True
        if (base := t._base) is not None:
            t = base
        found = self._marks.get(id(t))
        return t.grad_fn is not None or (found is not None and found[0]() is t)


def _squeezed(form: Form) -> Form:
    """The form for cotangents with an axis of their own for each sample's batch of one."""
    if isinstance(form, Through):
        return replace(form, form=_squeezed(form.form))
    inner = form.cotangent
    return replace(form, cotangent=lambda g: inner(g.squeeze(2)))


def _pullback(edge: GradientEdge, leaf: Tensor) -> Callable[[Tensor], Tensor]:
    """Takes gradients [v, n, ...] at ``edge`` to gradients [v, n, *shape] of ``leaf``."""

    def one(g: Tensor) -> Tensor:
        create = torch.is_grad_enabled()
        found = torch.autograd.grad(edge, leaf, g, retain_graph=True, create_graph=create, materialize_grads=True)
        return found[0]

    def pull(g: Tensor) -> Tensor:
        found: Tensor = over_columns(lambda column: over_columns(one, column), g)
        return found

    return pull


def viewed(t: Tensor) -> Tensor:
    """The tensor that a view shows whole, in the same order; otherwise ``t``.

    A change in place of a view replaces the view's graph node, but not the one that its base had before.
    """
    base = t._base
    same = base is not None and base.numel() == t.numel() and base.is_contiguous() and t.is_contiguous()
    return base if same and base.requires_grad else t  # type: ignore[return-value, union-attr]


def tensors_in(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments, nested lists and tuples included."""
    found: list[Tensor] = []
    for a in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, (tuple, list)):
            found += tensors_in(a, {})
    return found


def edge_of(t: Tensor) -> GradientEdge:
    """The gradient edge of a tensor with a gradient; as torch's own function, which takes longer."""
    node = t.grad_fn
    return get_gradient_edge(t) if node is None or isinstance(node, torch._C._FunctionBase) else GradientEdge(node, t.output_nr)


def _tensor_in(out: Any) -> bool:
    return isinstance(out, Tensor) or (isinstance(out, (tuple, list)) and any(_tensor_in(o) for o in out))


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _escape_table() -> dict[Any, str]:
    """Functions that tell Python values or shapes of tensors, that may draw at random, and that set attributes."""
    values = """item tolist numpy __float__ __int__ __bool__ __index__ __complex__ __array__ __contains__ equal allclose
        is_nonzero"""
    random = """rand randn randint randperm normal bernoulli multinomial poisson rand_like randn_like randint_like
        native_dropout normal_ uniform_ random_ bernoulli_ exponential_ geometric_ log_normal_ cauchy_ dropout dropout_
        dropout1d dropout2d dropout3d alpha_dropout alpha_dropout_ feature_alpha_dropout feature_dropout rrelu rrelu_
        gumbel_softmax multi_head_attention_forward scaled_dot_product_attention lstm gru rnn_tanh rnn_relu
        kaiming_uniform_"""
    table = {}
    for names, what in ((values, "value"), ("size __len__ numel nelement", "shape"), (random, "random")):
        for name in names.split():
            for space in (torch, Tensor, F, nn.init):
                if (func := getattr(space, name, None)) is not None:
                    table[func] = what
    table[Tensor.shape.__get__] = "shape"  # type: ignore[attr-defined]
    for name in dir(Tensor):
        if (setter := getattr(getattr(Tensor, name), "__set__", None)) is not None:
            table[setter] = "set"
    return table


def _is_on(name: str, place: int, default: Any) -> Callable[[Sequence[Any], dict[str, Any]], bool]:
    return lambda args, kwargs: bool(args[place] if len(args) > place else kwargs.get(name, default))


def _drop_table() -> dict[Any, Callable[[Sequence[Any], dict[str, Any]], bool]]:
    """Functions that draw at random only where an argument has them do so."""
    table: dict[Any, Callable[[Sequence[Any], dict[str, Any]], bool]] = {}
    table[F.scaled_dot_product_attention] = _is_on("dropout_p", 4, 0.0)
    table[F.multi_head_attention_forward] = _is_on("training", 14, True)
    for name in ("rrelu", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"):
        table[getattr(F, name)] = _is_on("training", 3 if name == "rrelu" else 2, name not in ("rrelu", "alpha_dropout"))
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        table[getattr(torch, name)] = lambda args, kwargs: len(args) < 7 or bool(args[5] and args[6])
    return table


ESCAPES, DROPS = _escape_table(), _drop_table()

BATCH_NORMS = {F.batch_norm, torch.batch_norm, torch.native_batch_norm}

# Functions of which nothing but their result is to be looked at: most calls are of these.
ORDINARY = {
    func
    for func in {*PROPAGATED, *RULES}
    if not (func in ESCAPES or func in HIDDEN_WRITES or func in BATCH_NORMS or mutates(func))
}

BATCH_STATISTICS = (
    "batch normalization in training mode mixes the samples of a batch, so that per-sample gradients and curvature are not "
    "defined: call module.eval() before functionalize's function runs (running statistics are then used), or use GroupNorm or "
    "LayerNorm."
)


def takes_batch_statistics(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of a batch normalization is in training mode."""
    return bool(kwargs.get("training", args[5] if len(args) > 5 else False))


class Opaque(Exception):
    """The model runs in a way that hides calls from the mode, and that can be switched off."""


# Nodes behind which calls were hidden.
HIDING = ("CheckpointFunctionBackward", "CompiledFunctionBackward")


def calls_may_hide() -> bool:
    """Whether this is not yet the attempt with nothing hidden."""
    return torch.utils.checkpoint.CheckpointFunction.__module__ == "torch.utils.checkpoint"


def over_columns(backward: Callable[..., Any], *columns: Tensor) -> Any:
    """``torch.vmap`` of a backward pass that keeps its graph; one column after another where an operation has no rule for it.

    Complex numbers have such: the gradient of an imaginary part may be a view that negates.
    """
    try:
        with without_fallback_warnings():
            # what a checkpoint draws in the backward pass is what it drew in the forward pass
            return torch.vmap(backward, randomness="same")(*columns)
    except RuntimeError as error:
        if "Batching rule not implemented" not in str(error):
            raise
    found = [backward(*column) for column in zip(*columns, strict=True)]
    return torch.stack(found) if isinstance(found[0], Tensor) else tuple(map(torch.stack, zip(*found, strict=True)))


@contextmanager
def without_fallback_warnings() -> Iterator[None]:
    """Silence vmap where it runs an operation sample by sample: that is slower, and right."""
    _functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]  # Python's filters take long
    try:
        yield
    finally:
        _functorch._set_vmap_fallback_warning_enabled(True)  # type: ignore[attr-defined]


# Functions whose own kernels warn under vmap.
UNDER_VMAP: dict[Any, Any] = {f: DECOMPOSITIONS[f] for f in (torch.prelu, F.prelu, Tensor.prelu)}


class Reached(NamedTuple):
    """What the graph of an output reaches.

    Attributes:
        params: Parameters, by index, other than through sites.
        leaves: All other leaves.
        sites: Those among what was reached.
    """

    params: list[int]
    leaves: list[Tensor]
    sites: list[Site]


def reached(outputs: Sequence[Tensor], sites: list[Site], tracked: dict[int, Tensor], stops: Sequence[Tensor] = ()) -> Reached:
    """What the graph of the outputs reaches other than through the sites, by walking the graph.

    Args:
        outputs: Of the forward pass.
        sites: What is known of it.
        tracked: Parameters by index.
        stops: Tensors of this forward pass behind which nothing is looked for.

    Returns:
        A `Reached`.
    """
    ends: dict[Any, int] = {id(p) if p.grad_fn is None else p.grad_fn: i for i, p in tracked.items()}
    producers: dict[Node, list[Node]] = {edge_of(t).node: [] for t in stops}
    for site in sites:
        producers.setdefault(site.edge.node, []).extend(site.producers)
    seen: set[Node] = set()
    stack = [edge_of(out).node for out in outputs if out.requires_grad]
    found: set[int] = set()
    leaves: dict[int, Tensor] = {}
    may_hide = calls_may_hide()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if may_hide and type(node).__name__ in HIDING:
            raise Opaque
        leaf = getattr(node, "variable", None)
        end = node if leaf is None else id(leaf)
        if end in ends:
            found.add(ends[end])
        elif node in producers:
            stack.extend(producers[node])
        elif leaf is not None:
            leaves[id(leaf)] = leaf
        else:
            stack.extend([n for n, _ in node.next_functions if n is not None])
    return Reached(sorted(found), list(leaves.values()), [site for site in sites if site.edge.node in seen])
