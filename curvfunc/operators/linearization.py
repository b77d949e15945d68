"""A model at fixed parameters and data, and products with the matrices that belong to it.

One forward pass and one backward pass make a graph that is kept; a product is then linear work on that graph:

- Hessian: with the gradient g(θ) as a graph, H v is the derivative of ⟨g, v⟩.
- GGN and Fisher, Jᵀ M J: with the pullback u ↦ Jᵀ u as a graph, J v is the derivative of ⟨Jᵀ u, v⟩ by u, M acts on the
  outputs of each sample, and Jᵀ is an ordinary backward pass.

Both need no more of an operation than that its backward pass can be differentiated; forward-mode derivatives are not
used.

A *matrix* (`Hessian`, `GaussNewton`, ...) says which product; ``matrix.linearize(problem, leaves, out)`` returns a
function ``(which, v, create_graph)`` that multiplies the block of the parameters ``which`` (indices) with v, one tensor
per such parameter. All of them give the product with the whole matrix, one of them the product with a diagonal block.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import optree
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch._C import _functorch
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvfunc import losses
from curvfunc.engine.calls import BATCH_NORMS, BATCH_STATISTICS, takes_batch_statistics, tensors_in
from curvfunc.engine.chance import Chance
from curvfunc.engine.columns import over_columns
from curvfunc.engine.company import Entangled, check_subset
from curvfunc.engine.cotangents import together
from curvfunc.engine.effects import Attributes, Effects
from curvfunc.engine.graph import check_twice_differentiable, reached
from curvfunc.engine.leaves import leaf
from curvfunc.engine.model import ModelFunction, check_function, without_recomputation
from curvfunc.engine.observer import Observer
from curvfunc.engine.outputs import check_leaves, check_output
from curvfunc.engine.runs import hides_calls, nothing_hidden
from curvfunc.rules.batch_axis import mutates
from curvfunc.rules.kernels import INSTEAD, Instead, standardized
from curvfunc.tensors.inputs import Batch, check_generator, check_used, flatten_params, forward_errors, read_batch
from curvfunc.tensors.ownership import own
from curvfunc.tensors.samples import leaves as tensors_of
from curvfunc.tensors.samples import tree_map

__all__ = [
    "EmpiricalFisher",
    "GaussNewton",
    "Hessian",
    "Jacobian",
    "Linearization",
    "Matrix",
    "Problem",
    "Product",
    "batched",
    "check_chunk_size",
    "check_eager",
    "check_vector",
    "differentiate",
    "eager",
    "linearization",
    "linearize",
    "linearized",
    "pullback_graph",
    "read_vector",
]

Function = TypeVar("Function", bound=Callable[..., Any])

Product = Callable[[Sequence[int], Sequence[Tensor], bool], list[Tensor]]


@dataclass(frozen=True)
class Problem:
    """What is linearized, but for the values of the parameters.

    Attributes:
        model_fn: The model.
        names: Of the parameters.
        rebuild: Makes the params pytree of a list of tensors.
        batch: The samples and the subset of them.
        loss: The loss.
        generator: Source of Monte-Carlo draws.
        differentiable: Whether products will be differentiated.
    """

    model_fn: Callable[..., Any]
    names: Sequence[str]
    rebuild: Callable[[Sequence[Any]], Any]
    batch: Batch
    loss: losses.Loss
    generator: Generator | None = None
    differentiable: bool = False

    def forward(self, leaves: Sequence[Tensor]) -> Tensor:
        """The output of the subset, [B, ...].

        A sample that is in it twice has one output, also if the model draws; where samples cannot run without the others,
        the whole batch runs.
        """
        check_function(self.model_fn)
        with Chance([*leaves, *tensors_of(self.batch.X)]) if self.batch.has_repeats() else nullcontext() as chance:
            try:
                out = self._visible(leaves, self.batch)
            except Entangled:
                out = self._visible(leaves, self.batch.whole())
                assert self.batch.index is not None
                return out[self.batch.index.to(out.device)]
        if chance is None or not chance.drawn:
            return out
        chance.undo()
        batch, places = self.batch.distinct()
        out = self._visible(leaves, batch)
        return out[places.to(out.device)]

    def _visible(self, leaves: Sequence[Tensor], batch: Batch) -> Tensor:
        held = _held(self.model_fn)
        before = [t._version for t in held]
        try:
            with without_recomputation():  # in the derivatives of backward passes
                return self._forward(leaves, batch)
        except Exception as error:  # compiled parts, which have no second derivatives
            if not hides_calls(error):
                raise
            if [t._version for t in held] != before:
                raise NotImplementedError(
                    "the model has compiled parts, which have no second derivatives, and changes buffers, so that it cannot "
                    "run a second time without them. Call model.eval(), or make the product where nothing is compiled: "
                    'with torch.compiler.set_stance("force_eager").'
                ) from error
        with nothing_hidden():
            return self._forward(leaves, batch)

    def _forward(self, leaves: Sequence[Tensor], batch: Batch) -> Tensor:
        X, size = batch.inputs(), batch.size
        # second derivatives of norms' kernels do not run under every vmap of the caller's
        instead = INSTEAD[3 if self.differentiable or _functorch.peek_interpreter_stack() is not None else 2]
        subset = None if batch.index is None else Observer(dict(enumerate(leaves)), None, size, None, instead)
        if subset is not None:
            subset.effects = Effects(())
        given = X if subset is None else tree_map(subset.marked, X)
        attributes = Attributes.of(self.model_fn)
        # the fused kernels of attention have no second derivative
        mode = _NoBatchStatistics(instead, leaves) if subset is None else subset
        with forward_errors(self.names, leaves, X), sdpa_kernel(SDPBackend.MATH), mode:
            out: Tensor = self.model_fn(self.rebuild(leaves), given)
            attributes.take_back()
        check_output(out, size)
        found = reached([out], [], dict(enumerate(leaves)))
        check_used(out, bool(found.params))
        check_leaves(self.model_fn, found.leaves, leaves)
        check_twice_differentiable(out)
        if subset is not None and subset.effects is not None:
            try:
                if None in subset.reasons or subset.axis_of(out) != 0:  # not followed, so that derivatives may mix
                    raise Entangled("the samples could not be followed to the output")
                check_subset(self.model_fn, leaves, self.rebuild, batch, subset, out, order=2)
            except Entangled:
                subset.effects.rewind()
                attributes.restore()
                raise
        return out

    def gradient(self, out: Tensor) -> Tensor:
        """Gradient of the loss with respect to the outputs of the subset, [B, ...], as a function of them."""
        return self.batch.select(losses.gradient(*self._checked(out), create_graph=True)[None])[0]

    def exact_root(self, out: Tensor) -> losses.Root:
        """Root of the loss Hessian; raises where the loss is not convex."""
        return losses.exact_root(*self._checked(out))

    def sampled_columns(self, out: Tensor, mc_samples: int) -> Tensor:
        """Monte-Carlo columns of the loss Hessian, [M, B, ...]."""
        root = losses.sampled_root(*self._checked(out), mc_samples, self.generator)
        return self.batch.select(root.columns(0, mc_samples)).to(out.dtype)

    def _checked(self, out: Tensor) -> tuple[losses.Loss, Tensor, Any]:
        whole = self.batch.spread(out)
        return losses.check(self.loss, whole, self.batch.y), whole, self.batch.y


class _NoBatchStatistics(Instead):
    """Refuses batch statistics, except of tensors that are made of parameters alone: weights that are standardized."""

    def __init__(self, functions: Mapping[Any, Callable[..., Any]], leaves: Sequence[Tensor]) -> None:
        super().__init__(functions)
        self._leaves = {id(p): p for p in leaves}
        self._made = dict(self._leaves)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, or what stands for it, unless it mixes samples."""
        kwargs = kwargs or {}
        if func in BATCH_NORMS and takes_batch_statistics(args, kwargs):
            if func is not F.batch_norm or id(args[0] if args else kwargs["input"]) not in self._made:
                raise ValueError(BATCH_STATISTICS)
            func = standardized
        out = super().__torch_function__(func, types, args, kwargs)
        if args and id(args[0]) in self._made:
            if not all(id(t) in self._made for t in tensors_in(args, kwargs)):
                self._made = dict(self._leaves) if mutates(func) else self._made  # views may have changed too
            elif isinstance(out, Tensor):
                self._made[id(out)] = out
        return out


@dataclass(frozen=True)
class Hessian:
    """∇²L."""

    def linearize(self, problem: Problem, leaves: Sequence[Tensor], out: Tensor) -> Product:
        """H v = ∂⟨g(θ), v⟩ / ∂θ."""
        gradient = differentiate([out], leaves, [problem.gradient(out)], create_graph=True)

        def product(which: Sequence[int], v: Sequence[Tensor], create_graph: bool) -> list[Tensor]:
            return differentiate([gradient[i] for i in which], [leaves[i] for i in which], v, create_graph=create_graph)

        return product


@dataclass(frozen=True)
class GaussNewton:
    """Jᵀ M J with M the loss Hessian of each sample, or ``mc_samples`` draws that are equal to it in expectation."""

    mc_samples: int = 0

    def linearize(self, problem: Problem, leaves: Sequence[Tensor], out: Tensor) -> Product:
        """Draws are made here, once."""
        return _sandwich(leaves, out, self.middle(problem, out))

    def middle(self, problem: Problem, out: Tensor) -> Callable[[Tensor, bool], Tensor]:
        """w ↦ M w on the outputs [B, ...]."""
        if self.mc_samples:
            return _outer_products(problem.sampled_columns(out, self.mc_samples))
        gradient = problem.gradient(out)
        return lambda w, create_graph: differentiate([gradient], [out], [w], create_graph=create_graph)[0]


@dataclass(frozen=True)
class EmpiricalFisher:
    """Σₙ gₙ gₙᵀ = Jᵀ M J with M the outer product of the loss gradient of each sample with itself."""

    def linearize(self, problem: Problem, leaves: Sequence[Tensor], out: Tensor) -> Product:
        """Jᵀ M J with M of rank one per sample."""
        return _sandwich(leaves, out, _outer_products(problem.gradient(out)[None]))


@dataclass(frozen=True)
class Jacobian:
    """J, [B·C, P]; not square, so ``which`` means columns for J v, and Jᵀ u is `differentiate` itself."""

    def linearize(self, problem: Problem, leaves: Sequence[Tensor], out: Tensor) -> Product:
        """J v = ∂⟨Jᵀ u, v⟩ / ∂u."""
        (u,), pulled = pullback_graph(leaves, [out], [out])
        return lambda which, v, create_graph: differentiate([pulled[i] for i in which], [u], v, create_graph=create_graph)


Matrix = Hessian | GaussNewton | EmpiricalFisher | Jacobian


def pullback_graph(
    leaves: Sequence[Tensor], outputs: Sequence[Any], like: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """(u, Jᵀ u) with a graph from u to Jᵀ u, for outputs (tensors or gradient edges) of the shapes of ``like``."""
    # The value does not matter, but it must belong to a graph. Inside torch.func transforms no leaf can be made.
    us = [torch.where(torch.zeros_like(t, dtype=torch.bool), t, torch.zeros_like(t)) for t in like]
    return us, differentiate(outputs, leaves, us, create_graph=True)


def differentiate(
    outputs: Sequence[Any], inputs: Sequence[Any], vectors: Sequence[Tensor], *, create_graph: bool
) -> list[Tensor]:
    """For each input Σ over outputs of (∂output/∂input)ᵀ vector, zeros where there is none; keeps the graph."""
    used = [(o, v) for o, v in zip(outputs, vectors, strict=True) if not isinstance(o, Tensor) or o.requires_grad]
    if not used:
        return [torch.zeros_like(t) for t in inputs]
    return list(
        torch.autograd.grad(
            [o for o, _ in used],
            inputs,
            [v for _, v in used],
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )
    )


def _sandwich(leaves: Sequence[Tensor], out: Tensor, middle: Callable[[Tensor, bool], Tensor]) -> Product:
    (u,), pulled = pullback_graph(leaves, [out], [out])

    def product(which: Sequence[int], v: Sequence[Tensor], create_graph: bool) -> list[Tensor]:
        tangent = differentiate([pulled[i] for i in which], [u], v, create_graph=create_graph)[0]
        w = middle(tangent, create_graph)
        return differentiate([out], [leaves[i] for i in which], [w], create_graph=create_graph)

    return product


def _held(model_fn: Any) -> list[Tensor]:
    """The tensors that a model may change in a forward pass."""
    if torch.compiler.is_compiling():
        return []
    buffers = model_fn.module.buffers() if isinstance(model_fn, ModelFunction) else ()
    return [t for t in (*buffers, *Attributes.of(model_fn).tensors()) if not t.is_inference()]


def _outer_products(columns: Tensor) -> Callable[[Tensor, bool], Tensor]:
    """w ↦ Σ_m s[m,n] ⟨s[m,n], w[n]⟩ for columns s [M, B, ...]."""
    flat = columns.flatten(2) if columns.ndim > 2 else columns[..., None]

    def middle(w: Tensor, create_graph: bool) -> Tensor:
        inner = torch.einsum("mbc,bc->mb", flat, w.reshape(flat.shape[1:]))
        return torch.einsum("mbc,mb->bc", flat, inner).reshape(w.shape)

    return middle


def eager(function: Function) -> Function:
    """Where dynamo cannot follow autograd's graph, it would compile the engine piece by piece."""
    reason = "operators and functions of products keep a graph. Use hessian_vp, ggn_vp or fisher_vp"
    disabled: Function = torch.compiler.disable(function, reason=reason)
    return disabled


class Linearization(NamedTuple):
    """A model at one batch, ready for products.

    Attributes:
        names: Of the parameters.
        leaves: The parameters, as leaves of the graph.
        rebuild: Makes the params pytree of a list.
        product: With the matrix.
        out: Output of the model.
    """

    names: list[str]
    leaves: list[Tensor]
    rebuild: Callable[[Sequence[Any]], Any]
    product: Product
    out: Tensor


def check_eager(caller: str) -> None:
    """Refuse transformations and compilation, which no graph can leave."""
    if _functorch.peek_interpreter_stack() is not None or torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{caller} returns what keeps a graph, which cannot leave torch.func transforms or torch.compile. Use "
            "hessian_vp, ggn_vp or fisher_vp there."
        )


def check_chunk_size(chunk_size: Any) -> None:
    """Raise unless it is a number of vectors, or None."""
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a positive int or None, got {chunk_size!r}.")


def linearization(
    caller: str,
    matrix: Any,
    model_fn: Callable[[Any, Any], Tensor],
    params: Any,
    X: Any,
    y: Any,
    loss_fn: Callable[[Tensor, Any], Tensor],
    subsampling: Sequence[int] | Tensor | None,
    generator: Generator | None,
    chunk_size: int | None,
) -> Linearization:
    """Check what is given, run the model, and keep its graph for products."""
    check_eager(caller)
    check_chunk_size(chunk_size)
    check_generator(generator)
    names, tensors, rebuild = flatten_params(params)
    loss = losses.normalize(loss_fn)
    batch = read_batch(X, y, subsampling, may_be_empty=losses.is_sum(loss))
    problem = Problem(model_fn, names, rebuild, batch, loss, generator)
    with torch.enable_grad():
        leaves = [leaf(p) for p in tensors]
        out = problem.forward(leaves)
        return Linearization(names, leaves, rebuild, linearized(matrix, problem, leaves, out), out)


@eager
def linearize(*given: Any) -> tuple[list[str], list[Tensor], Callable[[Sequence[Any]], Any], Product]:
    """As `linearization`, without the output, at which dynamo would look where code goes on after this."""
    return linearization(*given)[:-1]


def linearized(matrix: Any, problem: Problem, leaves: Sequence[Tensor], out: Tensor) -> Product:
    """The product; with zeros where the output has no entries."""
    if out.numel() or isinstance(matrix, Jacobian):
        product: Product = matrix.linearize(problem, leaves, out)
        return product
    losses.check(problem.loss, problem.batch.spread(out) if len(out) else out, problem.batch.y)
    return lambda which, v, create_graph: [torch.zeros_like(t) for t in v]


@eager
def batched(
    product: Product, leaves: Sequence[Tensor], which: Sequence[int], v: Sequence[Tensor], chunk_size: int | None
) -> list[Tensor]:
    """The product with vectors [V, *shape], in chunks."""
    num = len(v[0])
    if num == 0:
        return [torch.zeros_like(t) for t in v]
    if chunk_size is None:
        chunk_size = together(leaves[0], *[leaves[i].shape for i in which])
    parts = [_together(product, which, [t[i : i + chunk_size] for t in v]) for i in range(0, num, chunk_size)]
    return own(parts[0]) if len(parts) == 1 else [torch.cat(columns) for columns in zip(*parts, strict=True)]


def _together(product: Product, which: Sequence[int], v: Sequence[Tensor]) -> list[Tensor]:
    if len(v[0]) == 1:
        return [t[None] for t in product(which, [t[0] for t in v], False)]
    return list(over_columns(lambda *v: tuple(product(which, v, False)), *v))


def check_vector(what: str, v: Any, p: Tensor, *, batched: bool) -> None:
    """Raise unless v fits the parameter p, up to a leading axis if ``batched``."""
    if not isinstance(v, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(v).__name__}.")
    if v.shape[batched:] != p.shape or v.ndim != p.ndim + batched:
        wanted = f"[V, *{tuple(p.shape)}]" if batched else f"{tuple(p.shape)}"
        raise ValueError(f"{what} has shape {tuple(v.shape)}; {wanted} is needed.")
    if v.dtype != p.dtype or v.device != p.device:
        raise ValueError(f"{what} is {v.dtype} on {v.device}, the parameter {p.dtype} on {p.device}. Convert it.")


def read_vector(what: str, v: Any, names: Sequence[str], leaves: Sequence[Tensor], *, batched: bool) -> list[Tensor]:
    """The tensors of a pytree like params, in the order of the parameters."""
    paths, values, _ = optree.tree_flatten_with_path(v)
    given = dict(zip([".".join(map(str, path)) for path in paths], values, strict=True))
    if set(given) != set(names):
        raise ValueError(f"{what} has entries {sorted(given)} and params has {sorted(names)}; both need the same.")
    for name, p in zip(names, leaves, strict=True):
        check_vector(f"{what} at {name!r}", given[name], p, batched=batched)
    return [given[name] for name in names]
