"""Specs in, results out: one forward pass, one backward pass per kind of cotangent, shared by all specs."""

from collections.abc import Callable, Sequence
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

from curvfunc import compiled, hessian, kfra, losses
from curvfunc.buffers import copied, deliver, parameter_buffers, read_buffers
from curvfunc.capture import capture, check_output
from curvfunc.cotangents import AveragedHessian, FullHessian, LossGradient, LossRoot, common
from curvfunc.inputs import Batch, flatten_params, forward_errors, read_batch
from curvfunc.model import check_function
from curvfunc.passes import BackwardPass, check_unchanged
from curvfunc.residuals import Curvature, curvature
from curvfunc.rules.nonlinear import COMPOSITES, SUBSTITUTES, THIRD_ORDER_SUBSTITUTES
from curvfunc.sites import Layouts, Trace

__all__ = ["Quantity", "compute"]


@dataclass(frozen=True)
class Quantity:
    """What `compute` can be asked for; results are one per parameter unless ``forward`` is set."""

    contractions: ClassVar[tuple[str, ...]] = ()
    forward: ClassVar[str | None] = None
    whole_batch: ClassVar[bool] = False

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
        subsampling: Indices of samples for everything but `Loss`, `Output` and `Grad`, which are of the whole batch.
        generator: Source of Monte-Carlo draws. Specs with the same ``mc_samples`` share their draws.
        chunk_size: Number of vectors that are backpropagated together; by default chosen by memory.
        out: Tensors for the results to be written to, as an earlier call with the same specs returned them; None in place
            of a result, or of all, means new memory. Large results (`BatchGrad`, `SqrtGGN`, `BatchDiagGGN`) are formed
            there, without a copy: memory that is new at each step costs more than the arithmetic. Not for calls that
            are differentiated.

    Returns:
        The tree of ``specs`` with each spec replaced by its result; where ``out`` has tensors, by these.

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
            params, X, y = (optree.tree_map(_out_of_inference, tree) for tree in (params, X, y))
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
) -> list[Any]:
    """One result per spec. With a subset, the specs of the whole batch have a forward pass of their own."""
    check_function(model_fn)
    for spec in specs:
        if not isinstance(spec, Quantity):
            raise TypeError(f"specs must hold quantities such as BatchGrad() or DiagGGN(), got {spec!r}.")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a positive int or None, got {chunk_size!r}.")
    names, leaves, rebuild = flatten_params(params)
    batch = read_batch(X, y, subsampling)
    differentiable = _will_be_differentiated([*leaves, *optree.tree_leaves(X)])
    if outs is not None and (differentiable or _functorch.peek_interpreter_stack() is not None):
        raise ValueError(
            "out= takes results without a graph, and this call is differentiated or under a torch.func transformation. Leave "
            "out away, or detach params and X."
        )
    results: list[Any] = [None] * len(specs)
    for whole in (True, False) if batch.index is not None else (None,):
        chosen = [i for i, s in enumerate(specs) if whole is None or s.whole_batch == whole]
        if chosen:
            samples = batch.whole() if whole else batch
            buffers = None if outs is None else [outs[i] for i in chosen]
            run = _Run(model_fn, names, rebuild, samples, loss, generator, chunk_size, differentiable, params, buffers)
            for i, result in zip(chosen, run.evaluate(leaves, [specs[i] for i in chosen]), strict=True):
                results[i] = result
    return results


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

    def evaluate(self, params: list[Tensor], specs: list[Quantity]) -> list[Any]:
        """The results, with a graph of its own level where torch.func transforms are active."""
        differentiable = self.differentiable
        if _functorch.peek_interpreter_stack() is None:
            with torch.enable_grad():
                leaves = [p.view_as(p) if p.requires_grad and differentiable else _leaf(p) for p in params]
                return self._results(leaves, specs, differentiable)[1]

        def forward(*leaves: Tensor) -> tuple[Tensor, list[Any]]:
            return self._results(list(leaves), specs, differentiable)

        found: tuple[Any, ...] = torch.func.vjp(forward, *params, has_aux=True)
        return found[-1]

    def _results(self, leaves: list[Tensor], specs: list[Quantity], differentiable: bool) -> tuple[Tensor, list[Any]]:
        cotangents = common([s.cotangent for s in specs])
        substitutes = SUBSTITUTES | (THIRD_ORDER_SUBSTITUTES if differentiable else {})
        curves = any(isinstance(s.cotangent, FullHessian) for s in specs)
        averaged = any(isinstance(s.cotangent, AveragedHessian) for s in specs)
        layouts = Layouts(COMPOSITES, substitutes) if curves else Layouts() if averaged else None
        sites = any(s.contractions not in ((), ("total",)) for s in specs)
        trace = self._forward(leaves, sites, layouts, faster=layouts is None)
        curved = self._curvature(trace, leaves, layouts) if layouts is not None and curves else None
        device = trace.out.device.type
        full_precision = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with nullcontext() if differentiable else torch.no_grad(), full_precision:
            out = trace.out if differentiable else trace.out.detach()
            whole = self.batch.spread(out)
            losses.check(self.loss, whole, self.batch.y)
            parts: dict[tuple[Any, str], list[Any]] = {}
            wanted: dict[Any, dict[str, None]] = {}
            for s, cotangent in zip(specs, cotangents, strict=True):
                if s.contractions:
                    wanted.setdefault(cotangent, {}).update(dict.fromkeys(s.contractions))
            if curved is not None:  # first, since the graph ends with the last of the others
                names = wanted.pop(FullHessian())
                diagonal = self._hessian(*curved, leaves, "sample_squares" in names, differentiable)
                parts[FullHessian(), "sample_squares"] = diagonal
                parts[FullHessian(), "squares"] = [d.sum(0) for d in diagonal] if len(names) > 1 else diagonal
            if layouts is not None and averaged:
                wanted.pop(AveragedHessian())
                summed = losses.summed_hessian(self.loss, whole, self.batch.y, self.batch.select)
                factors = kfra.factors(trace, leaves, self.names, layouts, summed, differentiable)
                parts[AveragedHessian(), "factors"] = factors
            backward = BackwardPass(trace, leaves, self.names, self.batch.select, self.chunk_size, differentiable)
            for i, (cotangent, names) in enumerate(wanted.items()):
                root = cotangent.root(self.loss, whole, self.batch.y, self.generator)
                last = i == len(wanted) - 1
                outs = self._outs(leaves, specs, cotangents, cotangent, root.num)
                found = backward.run(root, list(names), retain_graph=not last, outs=outs)
                parts.update({(cotangent, name): result for name, result in found.items()})
            results = [self._finish(s, c, out, parts) for s, c in zip(specs, cotangents, strict=True)]
            if self.buffers is not None:
                results = [deliver(type(s).__name__, r, b) for s, r, b in zip(specs, results, self.buffers, strict=True)]
        return trace.out, results

    def _outs(
        self, leaves: list[Tensor], specs: list[Quantity], cotangents: list[Any], cotangent: Any, columns: int
    ) -> dict[str, list[Tensor]]:
        """The caller's buffers for the parts of large results, by contraction."""
        found = {}
        for s, c, buffer in zip(specs, cotangents, self.buffers or (), strict=False):
            if buffer is not None and c == cotangent and (lead := s.lead(columns, self.batch.size)) is not None:
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
            if sites:  # fused attention has no second derivative
                with sdpa_kernel(SDPBackend.MATH) if self.differentiable or layouts is not None else nullcontext():
                    given: dict[str, Any] = {"generic": generic, "layouts": layouts, "faster": faster}
                    return capture(self.model_fn, leaves, self.rebuild, X, samples, **given)
            out = self.model_fn(self.rebuild(leaves), X)
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

    def _finish(self, spec: Quantity, cotangent: Any, out: Tensor, parts: dict[tuple[Any, str], list[Any]]) -> Any:
        if spec.forward == "output":
            return out
        if spec.forward == "loss":
            return self.loss(out, self.batch.y)
        lists = [parts[cotangent, name] for name in spec.contractions]
        return self.rebuild([spec.finish(self.batch.size, *p) for p in zip(*lists, strict=True)])


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
    return p.detach().requires_grad_()


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
    keys: tuple[Any, ...],
    indices: tuple[int, ...] | None,
    chunk_size: int | None,
    subsampling: Tensor | None = None,
) -> list[Any]:
    specs = [cls(*key) for cls, key in keys]
    return _results(model_fn, params, X, y, specs, loss, indices if subsampling is None else subsampling, None, chunk_size)
