"""Results of batches, and how they become those of all samples: a state, and pure functions of it.

A state holds sums that do not depend on how the samples are divided: each summed result times W^degree, which takes its R
away, each mean times its number of samples, and results per sample as they are, batch after batch, with the W of each. So
states of disjoint sets of samples add up, in any order but for that of the samples, and only `Accumulation.result` gives R
back, that of the union. See `curvfunc.quantities.laws`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import optree
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils import _pytree as pytree

from curvfunc import losses
from curvfunc.data.scales import Reduction, check_reduction
from curvfunc.data.scales import mass as batch_mass
from curvfunc.engine.model import check_function
from curvfunc.quantities.call import compute
from curvfunc.quantities.laws import Averaged, Joined, Law, Refused, Summed
from curvfunc.quantities.quantity import Quantity
from curvfunc.quantities.specs import EmpiricalKFAC, Output
from curvfunc.tensors.docstrings import documented
from curvfunc.tensors.inputs import flatten_params
from curvfunc.tensors.precision import at_least_float32
from curvfunc.tensors.samples import tensors_of
from curvfunc.uses.second_moments import InputFactor

__all__ = ["Accumulation", "accumulation", "merge"]

State = dict[str, Any]
Join = Callable[[tuple[int, int], list[Tensor], Sequence[int], Sequence[Tensor | None], int], Tensor]

RESULT = "result"  # the only part of most quantities
FIRST = ", first"  # marks a factor of the inputs that comes before that of the outputs


@dataclass(frozen=True)
class Parts(Quantity):
    """The contractions of a quantity with several, by name, before it is made of them."""

    kind: type[Quantity]
    arguments: tuple[Any, ...]

    @property
    def spec(self) -> Quantity:
        """The quantity."""
        return self.kind(*self.arguments)

    @property
    def contractions(self) -> tuple[str, ...]:  # type: ignore[override]
        """As the quantity's."""
        return self.spec.contractions

    @property
    def averages(self) -> bool:  # type: ignore[override]
        """As the quantity's."""
        return self.spec.averages

    @property
    def cotangent(self) -> Any:
        """As the quantity's, so that they share their backward pass and their draws."""
        return self.spec.cotangent

    def finish(self, samples: int, *parts: Any) -> dict[str, Tensor]:
        """The parts themselves, without those that there are none of."""
        found = {}
        for name, part in zip(self.contractions, parts, strict=True):
            if isinstance(part, InputFactor):
                found[name + FIRST * part.first] = part.factor
            elif part is not None:
                found[name] = part
        return found


def _whole(spec: Quantity, samples: Tensor, parts: dict[str, Tensor]) -> Any:
    """The quantity, from its parts for that many samples."""
    if len(spec.laws) == 1:
        return parts[RESULT]
    given: list[Any] = []
    for name, law in zip(spec.contractions, spec.laws, strict=True):
        part: Any = parts.get(name, parts.get(name + FIRST))
        given.append(InputFactor(part, name not in parts) if isinstance(law, Averaged) and part is not None else part)
    return spec.finish(cast(int, samples), *given)


def law_of(spec: Quantity, part: str) -> Law:
    """That of one part of a quantity."""
    return spec.laws[0] if part == RESULT else spec.laws[spec.contractions.index(part.removesuffix(FIRST))]


@dataclass(frozen=True)
class Accumulation:
    """What belongs to all batches, and the functions ``init``, ``update``, ``merge`` and ``result``; see `accumulation`.

    Attributes:
        model_fn: ``(params, X) -> output [N, ...]``.
        specs: What is collected.
        loss: The loss, in normal form.
        reduction: What a loss of one's own divides by.
        decay: What a batch counts after one more.
        chunk_size: Number of vectors that are backpropagated together.
        structure: Of the parameters.
        tree: Of the specs.
    """

    model_fn: Callable[[Any, Any], Tensor]
    specs: tuple[Quantity, ...]
    loss: losses.Loss
    reduction: Reduction | None
    decay: float | None
    chunk_size: int | None
    structure: "Structure"
    tree: Any

    def __repr__(self) -> str:
        loss = self.loss.name or getattr(self.loss.fn, "__qualname__", type(self.loss.fn).__name__)
        options = {"reduction": self.reduction, "decay": self.decay, "chunk_size": self.chunk_size}
        given = "".join([f", {name}={value!r}" for name, value in options.items() if value is not None])
        return f"Accumulation({', '.join(map(repr, self.specs))}; {self.model_fn!r}, {loss}{given})"

    def init(self) -> State:
        """The state of no samples."""
        zero = torch.zeros((), dtype=torch.float64)
        return {"batches": zero, "samples": zero.clone(), "mass": zero.clone(), "chunks": [], "results": []}

    def update(self, state: State, params: Any, X: Any, y: Any, *, generator: Generator | None = None) -> State:
        """The state with one more batch, and with a ``decay`` all earlier ones worth less; nothing is changed in place."""
        return self.add(state, self.part(params, X, y, generator=generator))

    def add(self, state: State, part: State, *, donate: bool = False) -> State:
        """The state with that of one more batch, in the memory of both if they are donated."""
        if self.decay is not None and state["results"]:
            state = _discounted(state, self.decay)
        return _merged(state, part, donate)

    def merge(self, a: State, b: State) -> State:
        """The state of the union; see `curvfunc.merge`."""
        return merge(a, b)

    def result(self, state: State, *, join: Join | None = None) -> Any:
        """The tree of specs with the results for all samples; with a ``decay``, for the mean batch."""
        return self.built(self.made(state, join=join))

    def made(self, state: State, *, join: Join | None = None) -> list[list[Any]]:
        """The results for each spec and parameter."""
        if not state["results"]:
            raise ValueError("there are no samples to have results of. Pass at least one batch.")
        samples, mass, batches = state["samples"], state["mass"], state["batches"]
        if self.decay is not None:
            samples, mass = samples / batches, mass / batches
        rate = torch.where(mass == 0, 0.0, 1 / mass)  # gradients are zero where there is nothing to divide by
        found = []
        for i, (spec, values) in enumerate(zip(self.specs, state["results"], strict=True)):
            made = []
            for j, parts in enumerate(values):
                whole = {}
                for name, value in parts.items():
                    law = law_of(spec, name)
                    if isinstance(law, Joined):
                        factors = [self._scale(rate * chunk["mass"], law.degree) for chunk in state["chunks"]]
                        rows = [chunk["samples"] for chunk in state["chunks"]]
                        whole[name] = (join or _cat)((i, j), value, rows, factors, law.axis)
                    elif isinstance(law, Averaged):
                        whole[name] = value / state["samples"].to(value.device)
                    else:
                        assert isinstance(law, Summed)
                        factor = self._scale(1 / mass if spec.forward else rate, law.degree)
                        if self.decay is not None:
                            factor = 1 / batches if factor is None else factor / batches
                        whole[name] = value if factor is None else _times(value, factor)
                made.append(_whole(spec, samples, whole))
            found.append(made)
        return found

    def built(self, found: list[list[Any]]) -> Any:
        """The tree of specs with these results."""
        results = [v[0] if s.forward else self.structure.build(v) for s, v in zip(self.specs, found, strict=True)]
        return pytree.tree_unflatten(results, self.tree)

    def part(
        self, params: Any, X: Any, y: Any, *, generator: Generator | None = None, observe: Any = None, donate: bool = False
    ) -> State:
        """The state of one batch; ``observe`` is told output and targets."""
        asked: list[Quantity] = [s if len(s.laws) == 1 else Parts(type(s), s.key()) for s in self.specs]
        needs_output = observe is not None or self.counts
        if needs_output:
            asked.append(Output())
        given: dict[str, Any] = {"generator": generator, "chunk_size": self.chunk_size}
        results = compute(self.model_fn, params, X, y, asked, loss_fn=self.loss, **given)
        out = results.pop() if needs_output else None
        reduction = observe(out, y) if observe is not None else self.reduction
        samples = _first(y).shape[0]
        mass = batch_mass(self.loss, reduction, samples, out, y, _first(y))
        listed = []
        for spec, tree in zip(self.specs, results, strict=True):
            values = [tree] if spec.forward else self.structure.values(tree)
            listed.append([self._parts(spec, value, samples, mass, donate) for value in values])
        one = torch.ones((), dtype=torch.float64)
        joined = any(isinstance(law, Joined) for spec in self.specs for law in spec.laws)
        chunks = [{"samples": samples, "mass": mass}] if joined else []
        return {"batches": one, "samples": one * samples, "mass": mass, "chunks": chunks, "results": listed}

    @property
    def counts(self) -> bool:
        """Whether what a mean divides by is counted in each batch's output and targets, and may be zero."""
        return callable(self.reduction) or self.reduction == "terms"

    def _parts(self, spec: Quantity, value: Any, samples: int, mass: Tensor, donate: bool) -> dict[str, Any]:
        """What is added up of a result for one parameter."""
        found: dict[str, Any] = {}
        for name, t in ({RESULT: value} if len(spec.laws) == 1 else value).items():
            law = law_of(spec, name)
            if isinstance(law, Joined):
                empty = self.counts and law.degree > 0
                found[name] = [torch.where(mass.to(t.device) == 0, 0.0, t) if empty else t]
                continue
            assert isinstance(law, Averaged | Summed)
            t = at_least_float32(t)
            factor = samples if isinstance(law, Averaged) else self._scale(mass.to(t.device), law.degree)
            if factor is not None:
                t = t.mul_(factor) if donate else _times(t, factor)
                if isinstance(law, Summed) and (spec.forward or self.counts):  # nan where nothing counts
                    t = torch.where(mass.to(t.device) == 0, 0.0, t)
            found[name] = t
        return found

    def _scale(self, mass: Tensor, degree: float) -> Tensor | None:
        """``mass`` to that power, None where R is 1."""
        reduction = self.reduction or ("sum" if losses.is_sum(self.loss) else "mean")
        return None if reduction == "sum" or degree == 0 else mass if degree == 1 else mass**degree


@dataclass(frozen=True)
class Structure:
    """That of the parameters: a tree like them from a value for each, and back, in one order whether compiled or not."""

    tree: Any

    @classmethod
    def of(cls, params: Any) -> "Structure":
        """As compiled code sees it, or where torch does not know the containers, as optree does."""
        leaves, spec = pytree.tree_flatten(params)
        return cls(spec if all(isinstance(p, Tensor) for p in leaves) else optree.tree_structure(params))

    def values(self, tree: Any) -> list[Any]:
        """The values of a tree like the parameters."""
        return list(self.tree.flatten_up_to(tree))

    def build(self, values: list[Any]) -> Any:
        """The tree of these values."""
        return (
            pytree.tree_unflatten(values, self.tree) if isinstance(self.tree, pytree.TreeSpec) else self.tree.unflatten(values)
        )


@documented()
def accumulation(
    model_fn: Callable[[Any, Any], Tensor],
    params: Any,
    specs: Any,
    *,
    loss_fn: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    reduction: Reduction | None = None,
    decay: float | None = None,
    chunk_size: int | None = None,
) -> Accumulation:
    """Pure functions that collect batches: ``init``, ``update``, ``merge`` and ``result``; `accumulate` is a loop over them.

    - ``init()`` is the state of no samples, a dictionary of tensors;
    - ``update(state, params, X, y, generator=None)`` the state with one more batch, at parameters that may be others each time;
    - ``merge(a, b)`` that of the union of two disjoint sets of samples, those of ``a`` first;
    - ``result(state)`` the tree of ``specs`` for all samples, with the scale that one batch of them would have.

    With a ``decay`` d, a batch counts d^k after k more, and the results are those of the mean of all batches with these
    weights: they have the scale of one batch. With batches of one size, each sum over samples is Σ_k d^k part_k / Σ_k d^k, the
    moments of which a variance is formed, and each Kronecker factor by itself.

    ``update`` and ``result`` can be compiled, with results per sample anew at each number of batches. In low precision sums are
    collected, and returned, in float32.

    Args:
        params: Pytree of real floating-point tensors [*shape], usually ``{name: tensor}``. Only its structure counts.
        specs: Any pytree of specs such as ``(Loss(), Grad(), DiagGGN(mc_samples=1))``.
        reduction: For losses other than cross-entropy, squared error and BCE with logits: "sum", "mean" over samples, "terms"
            for the mean of one of these behind moves of the output (`lambda out, y: F.cross_entropy(out.flatten(0, 1),
            y.flatten())`), or, for any other mean, a function ``(output, y) -> W`` of a batch that returns what it divides by.
        decay: Between 0 and 1; None for all batches alike.

    Returns:
        An `Accumulation`, whose ``result`` has the tree of ``specs`` with the shapes that `compute` gives for one batch of all
        samples.

    Raises:
        ValueError: For what has no answer: a quantity that cannot be merged, results per sample with a decay, a loss of one's
            own without reduction.

    Example:
        >>> from curvfunc import Grad, Variance
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> moving = accumulation(model_fn, params, (Grad(), Variance()), decay=0.9)
        >>> state = moving.init()
        >>> for _ in range(3):
        ...     state = moving.update(state, params, torch.randn(8, 4), torch.arange(8) % 3)
        >>> grad, variance = moving.result(state)
        >>> variance["weight"].shape
        torch.Size([3, 4])
    """
    loss = losses.normalize(loss_fn)
    if reduction is None and not losses.has_normalizer(loss):
        raise ValueError(
            f"{_UNKNOWN}reduction='sum', 'mean' (over samples), 'terms' (of "
            "a known loss behind moves of the output), or a function (output, y) -> total weight."
        )
    return make(model_fn, params, specs, loss, reduction, decay, chunk_size)


_UNKNOWN = "the scale of a batch in a larger one depends on what the loss divides by, which is not known of this one. Pass "


def make(
    model_fn: Any, params: Any, specs: Any, loss: losses.Loss, reduction: Any, decay: float | None, chunk_size: int | None
) -> Accumulation:
    """As `accumulation`, of a loss whose reduction may still be unknown."""
    check_function(model_fn)
    leaves, tree = pytree.tree_flatten(specs, is_leaf=lambda s: isinstance(s, Quantity))
    for spec in leaves:
        if not isinstance(spec, Quantity):
            raise TypeError(f"specs must hold quantities such as Grad() or DiagGGN(), got {spec!r}.")
        _check_merges(spec, decay)
        if isinstance(spec, EmpiricalKFAC) and callable(reduction):
            raise ValueError(
                "EmpiricalKFAC takes a loss of one's own for a sum, or for a mean of one term per sample. Of other means it "
                "has no scale that several batches could share."
            )
    if not leaves:
        raise ValueError("specs holds no quantity. Pass at least one, such as Grad().")
    if decay is not None and not 0 <= decay <= 1:
        raise ValueError(f"decay must be between 0 and 1, or None, got {decay!r}.")
    check_reduction(loss, reduction)
    flatten_params(params, sharded=True)  # for its errors; compute is handed whole ones
    return Accumulation(model_fn, tuple(leaves), loss, reduction, decay, chunk_size, Structure.of(params), tree)


def _check_merges(spec: Quantity, decay: float | None) -> None:
    name = type(spec).__name__
    if not spec.laws:
        raise ValueError(f"{name} does not say how results of two batches merge. Set its laws, see curvfunc.quantities.laws.")
    for law in spec.laws:
        if isinstance(law, Refused):
            raise ValueError(f"{name} of several batches cannot be had from those of each: {law.why}.")
        if isinstance(law, Joined) and decay is not None:
            raise ValueError(
                f"{name} has a result for each sample, of which there is no moving average. Leave out decay, or it."
            )


def merge(a: State, b: State) -> State:
    """The state of the union of two disjoint sets of samples, each from an `accumulation` of the same specs and loss.

    Sums add up, means count by their samples, results per sample come one behind the other, a's first, and everything is
    brought to the scale that one batch of all samples has. Variances are put together from moments, Kronecker factors each
    by itself.

    Args:
        a: State of one set, a dictionary of scalars and of tensors of any shapes.
        b: State of the other, with tensors of the same shapes but for axes of samples.

    Returns:
        A new state, with tensors of the shapes that they have in ``a`` but for axes of samples; what the arguments hold is not
        changed.

    Raises:
        ValueError: If the states are of other specs or other parameters.

    Example:
        >>> from curvfunc import Variance
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> parts = accumulation(model_fn, params, Variance())
        >>> a, b = (parts.update(parts.init(), params, X[half], y[half]) for half in (slice(0, 3), slice(3, 8)))
        >>> torch.allclose(parts.result(merge(a, b))["bias"], curvfunc.variance(model_fn, params, X, y)["bias"])
        True
    """
    return _merged(a, b, donate=False)


def _merged(a: State, b: State, donate: bool) -> State:
    if not a["results"] or not b["results"]:
        return dict(a if a["results"] else b)
    found = {name: a[name] + b[name] for name in ("batches", "samples", "mass", "chunks")}
    if len(a["results"]) != len(b["results"]):
        raise ValueError(f"states of {len(a['results'])} and {len(b['results'])} specs cannot be merged.")
    values = []
    for i, (first, second) in enumerate(zip(a["results"], b["results"], strict=True)):
        if [list(parts) for parts in first] != [list(parts) for parts in second]:
            raise ValueError(f"states of other specs or parameters cannot be merged; their result {i} has other parts.")
        values.append([{k: _together(p[k], q[k], donate) for k in p} for p, q in zip(first, second, strict=True)])
    return {**found, "results": values}


def _together(a: Any, b: Any, donate: bool) -> Any:
    if isinstance(a, list):
        if donate:
            a.extend(b)
            return a
        return a + b
    if a.shape != b.shape or a.device != b.device or a.dtype != b.dtype:
        first, second = (f"shape {tuple(t.shape)}, dtype {t.dtype} on {t.device}" for t in (a, b))
        raise ValueError(f"results that do not fit cannot be merged: {first}, and {second}.")
    return a.add_(b) if donate else a + b


def _discounted(state: State, decay: float) -> State:
    """The state with all batches worth less."""
    found = {name: state[name] * decay for name in ("batches", "samples", "mass")}
    values = [[{k: t * decay for k, t in parts.items()} for parts in per] for per in state["results"]]
    return {**found, "chunks": state["chunks"], "results": values}


def _times(t: Tensor, factor: Tensor | int) -> Tensor:
    """The product in the type of ``t``, also where both are scalars."""
    return (t * (factor.to(t.device) if isinstance(factor, Tensor) else factor)).to(t.dtype)


def _cat(
    place: tuple[int, int], chunks: list[Tensor], rows: Sequence[int], factors: Sequence[Tensor | None], axis: int
) -> Tensor:
    scaled = [t if f is None else _times(t, f) for t, f in zip(chunks, factors, strict=True)]
    return torch.cat(scaled, axis)


def _first(tree: Any) -> Tensor:
    """The first tensor of a tree."""
    found = pytree.tree_leaves(tree) if torch.compiler.is_compiling() else tensors_of(tree)
    return cast(Tensor, found[0])
