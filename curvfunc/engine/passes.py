"""One backward pass, contracted: columns go back to the sites in chunks, and each chunk is contracted for each parameter."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from curvfunc import losses
from curvfunc.engine.cotangents import chunks, pull, stream
from curvfunc.engine.sites import Site, Trace, biases
from curvfunc.tensors import pages
from curvfunc.tensors.precision import wide
from curvfunc.tensors.sizes import hint
from curvfunc.uses import forms, metrics, projections, rotations, second_moments
from curvfunc.uses import squares as contractions
from curvfunc.uses.forms import Bound, Direct, Form, Outer, Products, Through, bind, direct
from curvfunc.uses.weighted_sums import weighted_total

__all__ = [
    "CONTRACTIONS",
    "BackwardPass",
    "Prepared",
    "check_block",
    "check_unchanged",
    "combine",
    "contracted",
    "keep",
]

# Each contraction, and how its parts from several chunks of columns become one.
CONTRACTIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "total": (forms.total, "sum"),
    "per_sample": (forms.per_sample, "concatenate"),
    "squares": (contractions.squares, "sum"),
    "sample_squares": (contractions.sample_squares, "sum"),
    "sample_norms": (contractions.sample_norms, "sum"),
    "gram": (second_moments.gram, "join"),  # products of columns from different chunks: contracted once all are there
}
SHARED: dict[str, str | None] = {}  # contractions that a bias has in common with its weight, and their approximation
for approximation in (None, "expand", "reduce"):
    suffix = f"_{approximation}" if approximation else ""
    CONTRACTIONS["output_factor" + suffix] = (partial(second_moments.output_factor, approximation=approximation), "sum")
    SHARED["output_factor" + suffix] = approximation
    CONTRACTIONS["input_factor" + suffix] = (partial(second_moments.input_factor, approximation=approximation), "first")

# Contractions that take data of the parameter besides its use; `BackwardPass.operands` has it, or, for the first, the sites.
JOINED: set[str] = set()
for approximation in (None, "expand", "reduce"):
    name = "joined_input_factor" + (f"_{approximation}" if approximation else "")
    CONTRACTIONS[name] = (partial(second_moments.joined_input_factor, approximation=approximation), "first")
    JOINED.add(name)
CONTRACTIONS["rotated_squares"] = (rotations.rotated_squares, "sum")
CONTRACTIONS["weighted_total"] = (weighted_total, "sum")
CONTRACTIONS["measured"] = (metrics.measured, "join")  # the use itself, in the basis of a metric
CONTRACTIONS["metric_norms"] = (metrics.norms, "sum")
CONTRACTIONS["metric_products"] = (metrics.with_query, "sum")
CONTRACTIONS["projected"] = (projections.projected, "concatenate")
MEASURED = frozenset({"rotated_squares", "measured", "metric_norms", "metric_products"})

# Contractions of first order for which gradients are formed where a use has several positions; one pass serves all.
FORMED = frozenset({"total", "squares", "sample_squares", "sample_norms"})

# Contractions that are gradients, in their parameter's type.
GRADIENTS = frozenset({"per_sample", "total", "weighted_total"})

# Contractions that take more of a use than its gradients.
FACTORS = frozenset(n for n in CONTRACTIONS if "factor" in n) | MEASURED

# Contractions for which an operation may give products of its inputs in place of these.
OF_PRODUCTS = frozenset({"output_factor", "input_factor", "output_factor_expand", "input_factor_expand"})
OF_PRODUCTS_AND_SUMS = OF_PRODUCTS | {"joined_input_factor", "joined_input_factor_expand"}

# Where the cotangents of all sites are smaller than this, they may as well be kept until the backward pass is over.
STREAMED_BYTES = 1 << 20

# A block larger than this many rows is refused: 2**15 rows take 4 GiB in float32. From the lower number on there is a warning.
LARGEST_BLOCK = 1 << 15
LARGE_BLOCK = 1 << 12


class Prepared:
    """What forms take from the forward pass, prepared once.

    Attributes:
        whole: Whether inputs are made as a whole at once, since more than one chunk of columns meets them.
    """

    def __init__(self, whole: bool = False) -> None:
        self.whole = whole
        self._inputs: dict[tuple[int, bool], Any] = {}

    def bind(self, form: Form, g: Tensor, names: Sequence[str] = (), alone: bool = True) -> Bound:
        """A form with its tensors.

        Args:
            form: The form.
            g: The cotangent of the operation's output.
            names: The contractions that it is for. They may do with products of inputs, or with gradients.
            alone: Whether it is its parameter's only use, and all samples are wanted.
        """
        if type(form) is Outer:
            if alone and names and form.moment is not None and _do_with_products(form, names):
                key = id(form), True
                if key not in self._inputs:
                    self._inputs[key] = form.moment()
                return forms.bind_products(form, g, self._inputs[key])
            factors = not FACTORS.isdisjoint(names)
            if form.alone is not None and not (factors or self.whole or len(g) > 1) and pages.may_overwrite():
                return bind(form.alone, g, self.of, factors=False)
            return bind(form, g, self.of, factors=factors)
        return bind(form, g, self.of, factors=not FACTORS.isdisjoint(names))

    def forget(self, form: Form) -> None:
        """Let go of what a form took."""
        self._inputs.pop((id(form), True), None)
        self._inputs.pop((id(form), False), None)

    def of(self, form: Any) -> Any:
        """What a form takes."""
        key = id(form), False
        if key not in self._inputs:
            self._inputs[key] = form.inputs() if self.whole else forms.inputs_of(form)
        return self._inputs[key]


@dataclass(eq=False)
class BackwardPass:
    """Contracts columns of the output over one forward pass.

    Attributes:
        trace: The forward pass.
        leaves: The parameters.
        names: Their names.
        select: Takes columns [v, n, ...] of the whole batch to the samples that ``trace`` is of.
        chunk_size: Number of columns that are backpropagated together; by default chosen by memory.
        differentiable: Whether the results will be differentiated.
        chosen: Samples of ``trace`` that the results are of, [B], where they may repeat; None for all.
        operands: Data per parameter of contractions that take some.
    """

    trace: Trace
    leaves: Sequence[Tensor]
    names: Sequence[str]
    select: Callable[[Tensor], Tensor]
    chunk_size: int | None
    differentiable: bool
    chosen: Tensor | None = None
    prepared: Prepared = field(default_factory=Prepared)
    operands: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def run(
        self, root: losses.Root, contracted_as: Sequence[str], retain_graph: bool, outs: dict[str, list[Tensor]]
    ) -> dict[str, list[Any]]:
        """Each named contraction per parameter, over all columns of the root.

        Args:
            root: The columns.
            contracted_as: Keys of `CONTRACTIONS`.
            retain_graph: Whether another pass follows.
            outs: Memory for the results of some contractions.
        """
        trace, leaves, names = self.trace, self.leaves, list(contracted_as)
        uses: list[list[tuple[Site, Form]]] = [[] for _ in leaves]
        for site in trace.sites:
            for i, form in site.forms.items():
                uses[i].append((site, form))
                retain_graph |= type(form) is Through  # what a parameter is made of by has a pullback to come
        retain_graph |= self.differentiable
        per_site = [n for n in names if n != "total"]
        # where gradients of samples are formed anyway, their sum is at hand; else autograd's is faster
        totals_of: Sequence[int] = range(len(leaves)) if "total" in names else ()
        summed = {i for i in totals_of if self.chosen is not None or (per_site and _forms_gradients(uses[i]))}
        others = [i for i in totals_of if i not in summed]
        large = bool(per_site or summed) and root.num == 1 and self._is_large()
        ranges = [(0, 1)] if large else chunks(root.num, trace, self.chunk_size)
        self.prepared.whole |= len(ranges) > 1
        results: dict[str, list[Any]] = {n: [None] * len(leaves) for n in names}
        parts: dict[tuple[str, int], list[Any]] = {}  # of several chunks
        factors: dict[int, dict[Any, Tensor]] = {}  # by chunk
        blocks = any(n.startswith("output_factor") for n in names)
        operands = dict(self.operands)
        if joined := JOINED.intersection(names):
            biased = biases(trace.sites)
            operands |= {n: [i in biased for i in range(len(leaves))] for n in joined}
        single, plain = len(ranges) == 1, not (operands or outs or blocks)

        def contract(i: int, bounds: list[Bound], start: int, stop: int) -> None:
            if bounds:
                bound = forms.merge(bounds)
            else:
                zero = leaves[i].new_zeros((), dtype=wide(leaves[i].dtype))
                samples = trace.out.shape[0] if self.chosen is None else len(self.chosen)
                bound = direct(zero.expand(stop - start, samples, *leaves[i].shape))
            wanted = [*per_site, "total"] if i in summed else per_site
            if plain:
                found = contracted(wanted, bound, start == 0, single)
            else:
                if blocks and type(bound.form) is Direct:
                    check_block(bound, f"parameter {self.names[i]!r}")
                buffers = {n: b[i][start:stop] if n == "per_sample" else b[i] for n, b in outs.items()} if outs else {}
                own = {n: data[i] for n, data in operands.items()} if operands else None
                shared = factors.setdefault(start, {}) if blocks else None
                found = contracted(wanted, bound, start == 0, single, buffers, shared, own)
            for n, part in found.items():
                if single:
                    results[n][i] = part
                else:
                    keep(parts.setdefault((n, i), []), part, CONTRACTIONS[n][1])

        totals: Sequence[Tensor] = ()
        if large:
            column = self._columns(root, 0, 1)[0]
            totals = self._stream(column, uses, [leaves[i] for i in others], contract, per_site, retain_graph)
        for start, stop in () if large else ranges:
            gs, totals = pull(
                trace,
                self._columns(root, start, stop),
                [leaves[i] for i in others],
                sites=bool(per_site or summed),
                create_graph=self.differentiable,
                retain_graph=retain_graph or stop < root.num,
            )
            if not (per_site or summed):
                continue
            at = dict(zip(trace.sites, gs, strict=True))
            for site in trace.sites:
                check_unchanged(site)
            for i, mine in enumerate(uses):
                alone = len(mine) == 1
                contract(i, [self._bind(form, at[site], per_site, alone) for site, form in mine], start, stop)
            factors.clear()
        for i, t in zip(others, totals, strict=True):
            results["total"][i] = t
        for (n, i), p in parts.items():
            results[n][i] = combine(n, p, outs[n][i] if n in outs else None)
        for n in GRADIENTS.intersection(results):  # in low precision, sums of squares stay in single precision
            results[n] = [r if _is_as(r, p) else _as_parameter(r, p) for r, p in zip(results[n], leaves, strict=True)]
        return results

    def _columns(self, root: losses.Root, start: int, stop: int) -> Tensor:
        return self.select(root.columns(start, stop)).to(self.trace.out.dtype)

    def _is_large(self) -> bool:
        """Whether it pays to contract inside of the backward pass, and can be done."""
        if self.differentiable or not pages.may_overwrite() or torch.compiler.is_compiling():
            return False
        return sum(hint(math.prod(site.shape)) for site in self.trace.sites) * self.trace.out.element_size() >= STREAMED_BYTES

    def _stream(
        self,
        column: Tensor,
        uses: list[list[tuple[Site, Form]]],
        leaves: list[Tensor],
        contract: Callable[[int, list[Bound], int, int], None],
        names: Sequence[str],
        retain_graph: bool,
    ) -> list[Tensor]:
        """Contract one column inside of the backward pass, each parameter as soon as all its uses were reached."""
        places = [{site: k for k, (site, _) in enumerate(mine)} for mine in uses]
        arrived: list[dict[int, Bound]] = [{} for _ in uses]
        trace = self.trace
        for i, mine in enumerate(uses):
            if not mine:
                contract(i, [], 0, 1)
        if not retain_graph:  # nothing else refers to what the operations took, so that it goes as soon as it was used
            trace = replace(trace, sites=list(trace.sites))
            self.trace.sites.clear()
            uses.clear()

        def receive(site: Site, g: Tensor) -> None:
            check_unchanged(site)
            for i, form in site.forms.items():
                arrived[i][places[i][site]] = self._bind(form, g, names, len(places[i]) == 1)
                if len(arrived[i]) == len(places[i]):
                    contract(i, [arrived[i][k] for k in sorted(arrived[i])], 0, 1)
                    arrived[i].clear()
            if not retain_graph:
                for form in site.forms.values():
                    self.prepared.forget(form)
                site.forms, site.inputs = {}, []

        return stream(trace, column, leaves, receive, retain_graph=retain_graph)

    def _bind(self, form: Form, g: Tensor, names: Sequence[str], alone: bool) -> Bound:
        """A use with its tensors; inputs are prepared once for all chunks."""
        if self.chosen is None:
            return self.prepared.bind(form, g, names, alone)
        return forms.at_samples(self.prepared.bind(form, g, names, alone=False), self.chosen)


def contracted(
    names: Sequence[str],
    bound: Bound,
    first: bool,
    only: bool,
    buffers: Mapping[str, Tensor] = MappingProxyType({}),
    factors: dict[Any, Tensor] | None = None,
    operands: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The contractions of one chunk of columns for one parameter.

    Args:
        names: Keys of `CONTRACTIONS`.
        bound: The parameter's use.
        first: Whether this is the first chunk.
        only: Whether there is no other.
        buffers: Memory for some of the results.
        factors: Output factors of this chunk so far, for those that share them.
        operands: The parameter's data of contractions that take some.

    Returns:
        ``{name: part}``, where a part is a use if all chunks are to be contracted together.
    """
    plain = only and factors is None and not operands and not buffers
    if plain and len(names) == 1:
        return {names[0]: CONTRACTIONS[names[0]][0](bound)}
    found: dict[str, Any] = {}
    if type(bound.form) is Outer and bound.positions > 1 and len(shared := [n for n in names if n in FORMED]) > 1:
        found = contractions.formed(bound, shared)
    for n in names:
        contract, how = CONTRACTIONS[n]
        if n in found or (how == "first" and not first):
            continue
        if plain and (n != "total" or "per_sample" not in found):
            found[n] = contract(bound)
            continue
        if operands and n in operands:
            found[n] = contract(bound, operands[n])
            continue
        if not only and (how == "join" or (how == "concatenate" and _is_smaller(bound))):
            found[n] = bound
        elif n in ("squares", "sample_squares") and not only and contractions.condenses(bound):
            found[n] = contractions.condensed(bound)
        elif n == "total" and "per_sample" in found:
            found[n] = found["per_sample"][0].sum(0)
        elif n in SHARED and factors is not None and (key := second_moments.shared_factor(bound, SHARED[n])) is not None:
            known = factors.get((key, n))  # a copy, since whoever gets the results may change them
            found[n] = factors[key, n] = contract(bound) if known is None else known.clone()
        elif n in buffers and (first or n == "per_sample"):
            found[n] = _into(contract, bound, buffers[n])
        else:
            found[n] = contract(bound)
    return found


def keep(parts: list[Any], part: Any, how: str) -> None:
    """Add a part to those of earlier chunks; what is summed needs no memory of its own."""
    if how != "sum" or not parts or isinstance(part, Bound):
        parts.append(part)
    elif pages.may_overwrite():
        parts[0] += part
    else:
        parts[0] = parts[0] + part


def combine(name: str, parts: list[Any], buffer: Tensor | None = None) -> Any:
    """The result from the parts of all chunks; in ``buffer`` where it could be formed there."""
    if len(parts) == 1 and not isinstance(parts[0], Bound):
        return parts[0]
    contract, how = CONTRACTIONS[name]
    if isinstance(parts[0], Bound):
        return _into(contract, forms.join(parts), buffer)
    if how != "concatenate":
        return parts[0]
    if buffer is not None and all(_is_part(part, buffer) for part in parts):
        return buffer
    return torch.cat(parts)


def check_block(bound: Bound, parameter: str) -> None:
    """Raise if a parameter without Kronecker structure is so large that nobody can want its exact block; warn before that."""
    if not isinstance(bound.form, Direct):
        return
    if (rows := bound.form.shape.numel()) > LARGEST_BLOCK:
        raise NotImplementedError(
            f"{parameter} of shape {tuple(bound.form.shape)} has no Kronecker structure here, and its exact block would have "
            f"{rows} rows. Leave it out of params (in modules, freeze it), or use a diagonal such as diag_ggn."
        )
    if rows >= LARGE_BLOCK:
        size = rows**2 * bound.g.element_size() / 2**20
        warnings.warn(
            f"{parameter} of shape {tuple(bound.form.shape)} has no Kronecker structure here (as position embeddings have "
            f"none): its one factor is its exact block, {rows} x {rows}, of {size:.0f} MiB. If that is not wanted, leave it "
            "out of params (in modules, freeze it).",
            stacklevel=2,
        )


def check_unchanged(site: Site) -> None:
    """Raise if what a form takes from the forward pass was overwritten since."""
    for t, version in site.inputs:
        if t._version != version:
            raise RuntimeError(
                f"the input of {site.name} was changed in place after the call, so its gradient is lost (autograd would "
                "refuse it too). Use the out-of-place operation instead."
            )


def _is_as(result: Any, p: Tensor) -> bool:
    return result.dtype is p.dtype and result.layout is torch.strided


def _as_parameter(result: Tensor, p: Tensor) -> Tensor:
    """A gradient, dense where that of an embedding is sparse, in the parameter's own type."""
    result = result if result.layout is torch.strided else result.to_dense()
    return result if result.dtype == p.dtype else result.to(p.dtype)


def _do_with_products(form: Outer, names: Sequence[str]) -> bool:
    """Whether contractions take no more of a use than products of its inputs, and maybe their sums."""
    return (OF_PRODUCTS if form.sums is None else OF_PRODUCTS_AND_SUMS).issuperset(names)


def _forms_gradients(uses: list[tuple[Site, Form]]) -> bool:
    """Whether a parameter's gradients of samples take as much work as their sum: all but those of vectors' matrices."""
    for site, form in uses:
        if type(form) is not Direct and (type(form) is not Outer or len(site.shape) <= 2):
            return False
    return bool(uses)


def _into(contract: Callable[..., Any], b: Bound, buffer: Tensor | None) -> Any:
    """Contract, in the memory given if the result has its layout."""
    if buffer is None or buffer.dtype != b.g.dtype or not buffer.is_contiguous():
        return contract(b)
    return contract(b, out=buffer)


def _is_smaller(b: Bound) -> bool:
    """Whether a use takes less memory than the gradients that it stands for."""
    return not isinstance(b.form, Products) and b.g.shape[2:].numel() < b.form.shape.numel()


def _is_part(part: Tensor, buffer: Tensor) -> bool:
    return part.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
