"""Specs in, results out: one forward pass, one backward pass per kind of cotangent, shared by all specs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import optree
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch._C import _functorch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from curvfunc import hessian, kfra, losses, scripted
from curvfunc.buffers import copied, deliver, parameter_buffers, read_buffers
from curvfunc.capture import Entangled, capture, check_output, check_subset
from curvfunc.chance import Chance
from curvfunc.cotangents import AveragedHessian, FullHessian, LossGradient, LossRoot, common
from curvfunc.effects import Attributes
from curvfunc.inputs import Batch, check_generator, explain_limits, flatten_params, forward_errors, read_batch
from curvfunc.model import check_function, without_recomputation
from curvfunc.ownership import apart, check_apart, own
from curvfunc.passes import FACTORS, BackwardPass, Prepared, check_unchanged, sums_of_nothing
from curvfunc.residuals import Curvature, curvature
from curvfunc.rules.kernels import INSTEAD, Instead
from curvfunc.rules.nonlinear import COMPOSITES
from curvfunc.samples import check_crosses, tree_map
from curvfunc.samples import leaves as tensors_of
from curvfunc.sites import Layouts, Trace

try:
    from curvfunc import compiled
except ImportError:  # it looks into dynamo, which other versions of torch may have arranged in another way
    compiled = None  # type: ignore[assignment]

__all__ = ["Quantity", "compiled", "compute", "of_nothing"]


@dataclass(frozen=True)
class Quantity:
    """What `compute` can be asked for; results are one per parameter unless ``forward`` is set."""

    contractions: ClassVar[tuple[str, ...]] = ()
    forward: ClassVar[str | None] = None
    whole_batch: ClassVar[bool] = False
    averages: ClassVar[bool] = False  # over samples, so that there has to be one

    @property
    def cotangent(self) -> LossGradient | LossRoot | FullHessian | AveragedHessian:
        """What is backpropagated."""
        return LossGradient()

    def lead(self, columns: int, samples: int) -> tuple[int, ...] | None:
        """Axes before the parameter's in a result that is formed in the caller's memory; None where it is copied there."""
        return None

    def finish(self, samples: int, *parts: Any) -> Any:
        """The result for one parameter from its contractions, for that many samples."""
        return parts[0]

    def key(self) -> tuple[Any, ...]:
        """The constructor's arguments."""
        return tuple([getattr(self, f.name) for f in fields(self)])


def compute(
    model_fn: Callable[[Any, Any], Tensor],
    params: Any,
    X: Any,
    y: Any,
    specs: Any,
    *,
    loss_fn: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    subsampling: Sequence[int] | Tensor | None = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
    out: Any = None,
) -> Any:
    """Several quantities at once, from one forward pass and one backward pass per kind of cotangent.

    Args:
        model_fn: ``(params, X) -> output [N, ...]``, from `curvfunc.functionalize` or any function.
        params: Pytree of real floating-point tensors, usually ``{name: tensor}``.
        X: Input, a tensor or a pytree of tensors with leading sample axis N.
        y: Targets, likewise.
        specs: Any pytree of specs such as ``(Loss(), Grad(), DiagGGN(mc_samples=1))``.
        loss_fn: ``(output, y) -> scalar`` that sums or averages over samples.
        subsampling: Indices of samples for everything but `Loss`, `Output` and `Grad`, which are of the whole batch. The
            subset has a forward pass of its own, which costs as much as it is large; but if the model draws random numbers,
            as dropout does, one pass of the whole batch serves everything, so that each sample has one mask in a call,
            also where it is listed twice. Draws from the default generators of torch, Python and numpy, and from
            generators that are passed to torch's operations, are noticed.
        generator: Source of Monte-Carlo draws. Specs with the same ``mc_samples`` share their draws.
        chunk_size: Number of vectors that are backpropagated together; by default chosen by memory.
        out: Tensors for the results to be written to, as an earlier call with the same specs returned them; None in place
            of a result, or of all, means new memory. Large results (`BatchGrad`, `SqrtGGN`, `BatchDiagGGN`) are formed
            there, without a copy: memory that is new at each step costs more than the arithmetic. Not for calls that
            are differentiated.

    Returns:
        The tree of ``specs`` with each spec replaced by its result; where ``out`` has tensors, by these. All others are
        dense and share memory with nothing, so that each can be changed in place and be passed as ``out``.

    Raises:
        TypeError, ValueError: For input that has no answer; the message names the argument, the shapes and the remedy.

    Example:
        >>> from curvfunc import BatchL2, Grad, Loss
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> loss, (grad, norms) = compute(model_fn, params, X, y, (Loss(), (Grad(), BatchL2())))
        >>> grad["weight"].shape, norms["bias"].shape
        (torch.Size([3, 4]), torch.Size([8]))
    """
    if torch.compiler.is_compiling():
        return _compiled(model_fn, params, X, y, specs, loss_fn, subsampling, generator, chunk_size, out)
    if torch.is_inference_mode_enabled():  # it forbids graphs; tensors that were made in it are copied out of it
        with torch.inference_mode(False):
            params = optree.tree_map(_out_of_inference, params)
            X, y = (tree_map(_out_of_inference, tree) for tree in (X, y))
            given: dict[str, Any] = {"loss_fn": loss_fn, "generator": generator, "chunk_size": chunk_size, "out": out}
            return compute(model_fn, params, X, y, specs, subsampling=subsampling, **given)
    leaves, tree = optree.tree_flatten(specs, is_leaf=lambda s: isinstance(s, Quantity))
    outs = None if out is None else read_buffers(tree, out)
    results = _results(model_fn, params, X, y, leaves, losses.normalize(loss_fn), subsampling, generator, chunk_size, outs)
    return optree.tree_unflatten(tree, results)


def _results(
    model_fn: Callable[..., Any],
    params: Any,
    X: Any,
    y: Any,
    specs: Sequence[Any],
    loss: losses.Loss,
    subsampling: Sequence[int] | Tensor | None,
    generator: Generator | None,
    chunk_size: int | None,
    outs: list[Any] | None = None,
    held: Sequence[Tensor] = (),
) -> list[Any]:
    """One result per spec. With a subset, the specs of the whole batch have a forward pass of their own, unless it draws."""
    check_function(model_fn)
    for spec in specs:
        if not isinstance(spec, Quantity):
            raise TypeError(f"specs must hold quantities such as BatchGrad() or DiagGGN(), got {spec!r}.")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a positive int or None, got {chunk_size!r}.")
    check_generator(generator)
    names, leaves, rebuild = flatten_params(params)
    batch = read_batch(X, y, subsampling, may_be_empty=losses.is_sum(loss))
    differentiable = _will_be_differentiated([*leaves, *_tensors(X)])
    if outs is not None and (differentiable or _functorch.peek_interpreter_stack() is not None):
        raise ValueError(
            "out= takes results without a graph, and this call is differentiated or under a torch.func transformation. Leave "
            "out away, or detach params and X."
        )
    if outs is not None:
        _check_outs(specs, outs, {"X": X, "y": y} | {f"parameter {n!r}": p for n, p in zip(names, leaves, strict=True)})
    given = (loss, generator, chunk_size, differentiable, params)
    mixed = batch.index is not None and any(s.whole_batch for s in specs)
    results: list[Any] = [None] * len(specs)
    drawn = entangled = False
    for whole in (True, False) if mixed else (None,):
        mine = [i for i, s in enumerate(specs) if whole is None or s.whole_batch == whole]
        if not mine:
            continue
        samples = batch.whole() if whole else batch
        watched = len(mine) < len(specs) or (not whole and batch.has_repeats())
        buffers = None if outs is None else [outs[i] for i in mine]
        try:
            found = _Run(model_fn, names, rebuild, samples, *given, buffers, watched).evaluate(leaves, [specs[i] for i in mine])
        except (_DrawnError, Entangled) as error:
            drawn, entangled = True, isinstance(error, Entangled)
            break
        for i, result in zip(mine, found, strict=True):
            results[i] = result
    if drawn:  # each sample is to have its own draws, and its company: what is of the subset is chosen from one pass
        samples, places = (batch.whole(), batch.index) if mixed or entangled else batch.distinct()
        results = _Run(model_fn, names, rebuild, samples, *given, outs, chosen=places).evaluate(leaves, list(specs))
    results = _own(results, outs, lambda: [*leaves, *_tensors(X), *_tensors(y), *loss.tensors.values(), *held])
    given_back = outs or [None] * len(specs)
    return [r if out is not None or s.forward else rebuild(r) for s, r, out in zip(specs, results, given_back, strict=True)]


class _DrawnError(Exception):
    """A forward pass drew random numbers, and another one would draw others."""


def _check_outs(specs: Sequence[Any], outs: list[Any], others: dict[str, Any]) -> None:
    """Raise if the caller's memory for a result is that of something else, too."""
    given = [(f"out for {type(s).__name__}", t) for s, out in zip(specs, outs, strict=True) for t in _tensors(out)]
    named = [(name, t) for name, tree in others.items() for t in _tensors(tree)]
    check_apart(given, named)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tensors_of(tree) if isinstance(t, Tensor)]


def _own(results: list[Any], outs: list[Any] | None, given: Callable[[], list[Any]]) -> list[Any]:
    """The results, but for those in the caller's memory, as tensors that share memory with nothing."""
    new = results if outs is None else [r if out is None else () for r, out in zip(results, outs, strict=True)]
    mine = iter(own([t for r in new for t in _flat(r)], given))
    found = [_put(r, mine) for r in new]
    return found if outs is None else [r if out is None else out for r, out in zip(found, outs, strict=True)]


def _flat(result: Any) -> list[Tensor]:
    """The tensors of a result: one, or those of a list of values per parameter."""
    if isinstance(result, Tensor):
        return [result]
    return [t for r in result for t in ((r,) if isinstance(r, Tensor) else optree.tree_leaves(r))]


def _put(result: Any, tensors: Iterator[Tensor]) -> Any:
    """The same result with other tensors."""
    if isinstance(result, Tensor):
        return next(tensors)
    return [next(tensors) if isinstance(r, Tensor) else optree.tree_map(lambda _: next(tensors), r) for r in result]


@dataclass(frozen=True)
class _Run:
    """One forward pass and what is made of it."""

    model_fn: Callable[..., Any]
    names: Sequence[str]
    rebuild: Callable[[Sequence[Any]], Any]
    batch: Batch
    loss: losses.Loss
    generator: Generator | None
    chunk_size: int | None
    differentiable: bool
    params: Any = None
    buffers: list[Any] | None = None
    watched: bool = False  # raises if the forward pass draws random numbers
    chosen: Tensor | None = None  # the samples of the batch that all but the specs of the whole batch are of

    def evaluate(self, params: list[Tensor], specs: list[Quantity]) -> list[Any]:
        """The results: the output or a loss, or a list of one per parameter; where the caller has memory for one, this."""
        try:
            return self._evaluate(params, specs)
        except RuntimeError as error:
            explain_limits(error)
            raise

    def _evaluate(self, params: list[Tensor], specs: list[Quantity]) -> list[Any]:
        """The results, with a graph of its own level where torch.func transforms are active."""
        differentiable = self.differentiable
        if _functorch.peek_interpreter_stack() is None:
            with torch.enable_grad():
                leaves = [p.view_as(p) if p.requires_grad and differentiable else _leaf(p) for p in params]
                return self._results(leaves, specs, differentiable)[1]

        def forward(*leaves: Tensor) -> tuple[Tensor, list[Any]]:
            return self._results(list(leaves), specs, differentiable)

        with scripted.refused() if differentiable else nullcontext():
            found: tuple[Any, ...] = torch.func.vjp(forward, *params, has_aux=True)
        return found[-1]

    def _results(self, leaves: list[Tensor], specs: list[Quantity], differentiable: bool) -> tuple[Tensor, list[Any]]:
        cotangents = common([s.cotangent for s in specs])
        curves = any(isinstance(s.cotangent, FullHessian) for s in specs)
        averaged = any(isinstance(s.cotangent, AveragedHessian) for s in specs)
        layouts = Layouts(COMPOSITES) if curves else Layouts() if averaged else None
        sites = any(s.contractions and (self._picks(s) or s.contractions != ("total",)) for s in specs)
        sites &= bool(self.batch.total)
        chance = Chance([*leaves, *_tensors(self.batch.X)]) if self.watched or (curves and len(specs) > 1) else None
        with chance or nullcontext():
            trace = self._forward(leaves, sites, layouts, faster=layouts is None)
        drawn = chance is not None and chance.drawn
        if chance is not None and drawn and self.watched:
            chance.undo()
            trace.restart()
            raise _DrawnError
        if not trace.out.numel():
            return trace.out, self._of_nothing(leaves, specs, trace.out)
        curved = self._curvature(trace, leaves, layouts) if layouts is not None and curves else None
        if curved is not None and drawn and curved[0] is not trace:
            if any(not FACTORS.isdisjoint(s.contractions) for s in specs):
                raise NotImplementedError(
                    "the diagonal of the Hessian needs a forward pass of its own here, as a parameter is used twice, and this "
                    "model draws random numbers, which Kronecker factors in the same call would not share. Ask for them in "
                    "another call, or switch the randomness off: module.eval()."
                )
            trace = curved[0]
        device = trace.out.device.type
        full_precision = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with nullcontext() if differentiable else torch.no_grad(), full_precision:
            out = trace.out if differentiable else trace.out.detach()
            whole = self.batch.spread(out)
            losses.check(self.loss, whole, self.batch.y)
            parts: dict[tuple[Any, str], list[Any]] = {}
            wanted: dict[Any, dict[str, None]] = {}
            keys = [(cotangent, self._picks(s)) for s, cotangent in zip(specs, cotangents, strict=True)]
            for s, key in zip(specs, keys, strict=True):
                if s.contractions:
                    wanted.setdefault(key, {}).update(dict.fromkeys(s.contractions))
            if curved is not None:  # first, since the graph ends with the last of the others
                key = FullHessian(), self.chosen is not None
                names = wanted.pop(key)
                batched = "sample_squares" in names or self.chosen is not None
                diagonal = self._hessian(*curved, leaves, batched, differentiable)
                if self.chosen is not None:
                    diagonal = [d[self.chosen.to(d.device)] for d in diagonal]
                parts[key, "sample_squares"] = diagonal
                parts[key, "squares"] = [d.sum(0) for d in diagonal] if batched else diagonal
            if layouts is not None and averaged:
                if self.chosen is not None:
                    raise NotImplementedError(
                        "kfra averages over the samples of one forward pass, and this model draws random numbers or lets the "
                        "data of samples meet, so that the subset cannot have one beside that of the whole batch, or with "
                        "repeated indices. Ask for KFRA in a call of its own, with each index once, switch the randomness off "
                        "(module.eval()), or leave subsampling away."
                    )
                key = AveragedHessian(), False
                wanted.pop(key)
                summed = losses.summed_hessian(self.loss, whole, self.batch.y, self.batch.select)
                parts[key, "factors"] = kfra.factors(trace, leaves, self.names, layouts, summed, differentiable)
            columns: dict[Any, losses.Root] = {}
            prepared = Prepared()
            for i, (key, names) in enumerate(wanted.items()):
                cotangent, picks = key
                if cotangent not in columns:
                    columns[cotangent] = cotangent.root(self.loss, whole, self.batch.y, self.generator)
                last = i == len(wanted) - 1
                outs = self._outs(leaves, specs, keys, key, columns[cotangent].num)
                given = (self.chunk_size, differentiable, self.chosen if picks else None)
                backward = BackwardPass(trace, leaves, self.names, self.batch.select, *given, prepared)
                found = backward.run(columns[cotangent], list(names), retain_graph=not last, outs=outs)
                parts.update({(key, name): result for name, result in found.items()})
            results = [self._finish(s, key, out, parts) for s, key in zip(specs, keys, strict=True)]
        return trace.out, self._delivered(specs, results)

    def _of_nothing(self, leaves: list[Tensor], specs: list[Quantity], out: Tensor) -> list[Any]:
        """The results where there are no samples, or no entries of their outputs: sums of nothing."""
        out = out if self.differentiable else out.detach()
        losses.check(self.loss, self.batch.spread(out) if len(out) else out, self.batch.y)
        entries = out.shape[1:].numel()
        results = [
            self._finish(s, None, out, {}) if s.forward else of_nothing(s, leaves, self._samples(s), entries) for s in specs
        ]
        return self._delivered(specs, results)

    def _delivered(self, specs: list[Quantity], results: list[Any]) -> list[Any]:
        """The results, or where the caller has memory for one, this."""
        if self.buffers is None:
            return results
        return [
            r if b is None else deliver(type(s).__name__, r if s.forward else self.rebuild(r), b)
            for s, r, b in zip(specs, results, self.buffers, strict=True)
        ]

    def _outs(
        self, leaves: list[Tensor], specs: list[Quantity], keys: list[Any], wanted: Any, columns: int
    ) -> dict[str, list[Tensor]]:
        """The caller's buffers for the parts of large results, by contraction."""
        found = {}
        for s, key, buffer in zip(specs, keys, self.buffers or (), strict=False):
            if buffer is not None and key == wanted and (lead := s.lead(columns, self._samples(s))) is not None:
                own = parameter_buffers(type(s).__name__, self.params, self.names, leaves, buffer, lead)
                (name,) = s.contractions
                found[name] = [b[None] for b in own] if name == "per_sample" and len(lead) == 1 else own
        return found

    def _forward(
        self,
        leaves: list[Tensor],
        sites: bool,
        layouts: Layouts | None = None,
        generic: Sequence[int] = (),
        faster: bool = False,
    ) -> Trace:
        X, samples = self.batch.inputs(), self.batch.size
        with forward_errors(self.names, leaves, X):
            order = 3 if self.differentiable else 1 if layouts is None else 2
            if sites:  # fused attention has no second derivative
                with sdpa_kernel(SDPBackend.MATH) if self.differentiable or layouts is not None else nullcontext():
                    given: dict[str, Any] = {"generic": generic, "layouts": layouts, "faster": faster, "order": order}
                    trace = capture(self.model_fn, leaves, self.rebuild, X, samples, **given)
                    try:
                        check_subset(self.model_fn, leaves, self.rebuild, self.batch, trace, trace.out)
                    except Entangled:
                        trace.restart()
                        raise
                    return trace
            attributes = Attributes.of(self.model_fn)
            with Instead(INSTEAD[order]), without_recomputation():  # reentrant checkpoints know but one kind of backward pass
                out = self.model_fn(self.rebuild(leaves), X)
            attributes.take_back()
        check_output(out, samples)
        return Trace(out, [], "plain")

    def _curvature(self, trace: Trace, leaves: list[Tensor], layouts: Layouts) -> tuple[Trace, Curvature]:
        """What curves; after another forward pass if some parameters' Hessians need copies of them for each sample."""
        while True:
            found = curvature(trace, leaves, layouts)
            generic = [i for i in range(len(leaves)) if found.split >> i & 1]
            if not generic:
                return trace, found
            generic += [i for i in trace.reasons if i is not None]
            trace.restart()
            trace = self._forward(leaves, True, layouts, generic)

    def _hessian(
        self, trace: Trace, curved: Curvature, leaves: list[Tensor], batched: bool, differentiable: bool
    ) -> list[Tensor]:
        """The Hessian's diagonal per parameter."""
        for site in trace.sites:
            check_unchanged(site)
        whole = self.batch.spread(trace.out if differentiable else trace.out.detach())
        root, weights = losses.signed_root(self.loss, whole, self.batch.y)
        gradient = losses.gradient(self.loss, whole, self.batch.y, create_graph=differentiable)
        if differentiable and curved.curved and self.batch.has_repeats():
            raise NotImplementedError("diag_hessian of this model cannot be differentiated with repeated subsampling indices.")

        def columns(start: int, stop: int) -> Tensor:
            return self.batch.select(root.columns(start, stop)).to(trace.out.dtype)

        return hessian.diagonal(
            trace,
            leaves,
            curved,
            hessian.Columns(root.num, columns, None if weights is None else self.batch.select(weights)),
            self.batch.select(gradient[None])[0],
            batched=batched,
            chunk_size=self.chunk_size,
            differentiable=differentiable,
        )

    def _picks(self, spec: Quantity) -> bool:
        """Whether a spec is of samples chosen from the forward pass."""
        return self.chosen is not None and not spec.whole_batch

    def _samples(self, spec: Quantity) -> int:
        """The number of samples that a spec is of."""
        return len(self.chosen) if self.chosen is not None and not spec.whole_batch else self.batch.size

    def _finish(self, spec: Quantity, key: Any, out: Tensor, parts: dict[tuple[Any, str], list[Any]]) -> Any:
        if spec.forward == "output":  # a detached one is another tensor than the model's own
            return out.clone() if self.differentiable and not torch.compiler.is_compiling() else out
        if spec.forward == "loss":
            return apart(self.loss(out, self.batch.y))
        lists = [parts[key, name] for name in spec.contractions]
        values = [spec.finish(self._samples(spec), *p) for p in zip(*lists, strict=True)]
        # autograd may return what a backward pass of the model's own keeps
        total = spec.contractions == ("total",)
        return [apart(t) if isinstance(t, Tensor) and (total or t._base is not None) else t for t in values]


def of_nothing(spec: Quantity, params: Sequence[Tensor], samples: int, entries: int) -> list[Any]:
    """The results per parameter where the output has no entries: sums of nothing.

    Args:
        spec: The quantity.
        params: The parameters.
        samples: Number of samples, which may be none.
        entries: Number of entries of one sample's output, which may be none.

    Raises:
        ValueError: If it is a mean over samples, and there are none.
    """
    if samples == 0 and spec.averages:
        raise ValueError(f"{type(spec).__name__} takes a mean over samples, and there are none (N = 0). Leave it out.")
    columns = spec.cotangent.mc_samples or entries if isinstance(spec.cotangent, LossRoot) else 1
    return [spec.finish(samples, *[sums_of_nothing(name, p, columns, samples) for name in spec.contractions]) for p in params]


def trace(model_fn: Callable[..., Any], params: Any, X: Any) -> tuple[list[str], Trace]:
    """Names of the parameters and one forward pass, as `compute` makes it."""
    names, leaves, rebuild = flatten_params(params)
    batch = read_batch(X, X, None)
    with forward_errors(names, leaves, X):
        return names, capture(model_fn, [_leaf(p) for p in leaves], rebuild, X, batch.size)


def _out_of_inference(t: Any) -> Any:
    if not isinstance(t, Tensor):
        return t
    return t.clone() if t.is_inference() else t.detach()  # either way results have no graph


def _leaf(p: Tensor) -> Tensor:
    leaf = p.detach().requires_grad_()
    leaf._curvfunc_leaf = True  # type: ignore[attr-defined]  # to be told from others where a model keeps it
    return leaf


def _will_be_differentiated(tensors: list[Tensor]) -> bool:
    """Whether results need a graph: under torch.func's grad and jvp, or with tensors that require grad."""
    stack = _functorch.get_interpreter_stack() or ()
    if any(level.key() in (_functorch.TransformType.Grad, _functorch.TransformType.Jvp) for level in stack):
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# -- torch.compile


def _compiled(
    model_fn: Any, params: Any, X: Any, y: Any, specs: Any, loss_fn: Any, subsampling: Any, generator: Any, chunk: Any, out: Any
) -> Any:
    leaves, tree = pytree.tree_flatten(specs, is_leaf=lambda s: isinstance(s, Quantity))
    keys = tuple([(type(s), s.key()) for s in leaves])
    tensors = {"subsampling": subsampling} if isinstance(subsampling, Tensor) else {}
    constants = (keys, None if subsampling is None or tensors else tuple(subsampling), chunk)
    loss = losses.normalize(loss_fn)
    check_crosses("X", X)
    check_crosses("y", y)
    if compiled is None:
        raise NotImplementedError("compiled calls need torch 2.13; call curvfunc outside of torch.compile.")
    results = compiled.call(_of_constants, model_fn, params, X, y, loss, constants, tensors, generator)
    if out is not None:
        for i, (spec, buffer) in enumerate(zip(leaves, tree.flatten_up_to(out), strict=True)):
            if buffer is not None:
                results[i] = pytree.tree_map(partial(copied, type(spec).__name__), results[i], buffer)
    return pytree.tree_unflatten(results, tree)


def _of_constants(
    model_fn: Callable[..., Any],
    params: Any,
    X: Any,
    y: Any,
    loss: losses.Loss,
    held: Sequence[Tensor],
    keys: tuple[Any, ...],
    indices: tuple[int, ...] | None,
    chunk_size: int | None,
    subsampling: Tensor | None = None,
) -> list[Any]:
    specs = [cls(*key) for cls, key in keys]
    index = indices if subsampling is None else subsampling
    return _results(model_fn, params, X, y, specs, loss, index, None, chunk_size, held=held)
