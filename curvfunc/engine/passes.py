"""One backward pass, contracted: columns go back to the sites in chunks, and each chunk is contracted for each parameter."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from curvfunc import losses
from curvfunc.engine.contractions import (
    CONTRACTIONS,
    FACTORS,
    GRADIENTS,
    JOINED,
    LARGE_BLOCK,
    check_block,
    combine,
    contracted,
    do_with_products,
    keep,
)
from curvfunc.engine.cotangents import chunks, is_at, pull, pull_one, stream
from curvfunc.engine.graph import edge_of
from curvfunc.engine.sites import Site, Trace, biases
from curvfunc.tensors import pages
from curvfunc.tensors.precision import wide
from curvfunc.tensors.sizes import hint
from curvfunc.uses import forms, vectors
from curvfunc.uses.forms import Bound, Direct, Form, Outer, Through, bind, direct

__all__ = ["BackwardPass", "Prepared", "check_unchanged"]

# Where the cotangents of all sites are smaller than this, they may as well be kept until the backward pass is over. On GPUs
# that has them gone later, and takes a quarter of the time off: hooks run in a thread of autograd's.
STREAMED_BYTES = {"cpu": 1 << 20, "cuda": 1 << 27}


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
            if alone and names and form.moment is not None and do_with_products(form, names):
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
        select: Takes columns [v, n, ...] of the whole batch to the samples that ``trace`` is of; None for all.
        chunk_size: Number of columns that are backpropagated together; by default chosen by memory.
        differentiable: Whether the results will be differentiated.
        chosen: Samples of ``trace`` that the results are of, [B], where they may repeat; None for all.
        operands: Data per parameter of contractions that take some.
    """

    trace: Trace
    leaves: Sequence[Tensor]
    names: Sequence[str]
    select: Callable[[Tensor], Tensor] | None
    chunk_size: int | None
    differentiable: bool
    chosen: Tensor | None = None
    prepared: Prepared = field(default_factory=Prepared)
    operands: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def run(
        self,
        root: losses.Root,
        contracted_as: Sequence[str],
        retain_graph: bool,
        outs: dict[str, list[Tensor]],
        bare: bool = False,
    ) -> dict[str, list[Any]]:
        """Each named contraction per parameter, over all columns of the root.

        Args:
            root: The columns.
            contracted_as: Keys of `CONTRACTIONS`.
            retain_graph: Whether another pass follows.
            outs: Memory for the results of some contractions.
            bare: Whether gradients of samples, of one column, may come in a list of one in place of with an axis for it.
        """
        trace, leaves, names = self.trace, self.leaves, list(contracted_as)
        one = type(root.num) is int and root.num == 1
        graphs = {"create_graph": self.differentiable, "retain_graph": retain_graph or self.differentiable}
        if one and names == ["total"] and self.chosen is None:
            _, sums = pull_one(trace, self._column(root), leaves, sites=False, **graphs)
            return {"total": _as_parameters(sums, leaves)}
        uses: list[list[tuple[Site, Form]]] = [[] for _ in leaves]
        # parameters whose gradients of samples take more work than their sum, those of vectors' matrices, and all others
        costly, cheap = set[int](), set[int]()
        for site in trace.sites:
            for i, form in site.forms.items():
                uses[i].append((site, form))
                if type(form) is Direct:
                    cheap.add(i)
                    continue
                retain_graph |= type(form) is Through  # what a parameter is made of by has a pullback to come
                (costly if type(form) is not Outer or len(site.shape) <= 2 else cheap).add(i)
        retain_graph |= self.differentiable
        per_site = [n for n in names if n != "total"]
        # where gradients of samples are formed anyway, their sum is at hand; else autograd's is faster
        totals_of: Sequence[int] = range(len(leaves)) if "total" in names else ()
        summed = {*totals_of} if self.chosen is not None else cheap - costly if totals_of and per_site else set[int]()
        others = [i for i in totals_of if i not in summed]
        large = one and self._is_large()
        ranges = [(0, 1)] if large else chunks(root.num, trace, self.chunk_size)
        self.prepared.whole |= len(ranges) > 1
        results: dict[str, list[Any]] = {n: [None] * len(leaves) for n in names}
        parts: dict[tuple[str, int], list[Any]] = {}  # of several chunks
        factors: dict[int, dict[Any, Tensor]] = {}  # by chunk
        blocks = not vectors.OUTPUTS.isdisjoint(names)
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

        apart = not (operands or outs) and self._maps_vectors(per_site)
        if apart and self._contract_last_layer(root, uses, names, results):
            return results
        totals: Sequence[Tensor] = ()
        if large:
            column = self._column(root)
            totals = self._stream(column, uses, [leaves[i] for i in others], contract, per_site, retain_graph)
        flat = single and one
        for start, stop in () if large else ranges:
            graphs["retain_graph"] = retain_graph or stop < root.num
            of = [leaves[i] for i in others]
            if flat:
                gs, totals = pull_one(trace, self._column(root), of, **graphs)
            else:
                gs, totals = pull(trace, self._columns(root, start, stop), of, **graphs)
            for site in trace.sites:
                check_unchanged(site)
            done: Collection[int] = ()
            if single and apart:
                done = self._contract_vectors(gs, uses, per_site, summed, results, bare if flat else None)
                if len(done) == len(leaves):
                    break
            at = dict(zip(trace.sites, [g.unsqueeze(0) for g in gs] if flat else gs, strict=True))
            for i, mine in enumerate(uses):
                if i not in done:
                    alone = len(mine) == 1
                    contract(i, [self._bind(form, at[site], per_site, alone) for site, form in mine], start, stop)
            factors.clear()
        for i, t in zip(others, totals, strict=True):
            results["total"][i] = t
        for (n, i), p in parts.items():
            results[n][i] = combine(n, p, outs[n][i] if n in outs else None)
        for n in GRADIENTS.intersection(results):  # in low precision, sums of squares stay in single precision
            results[n] = _as_parameters(results[n], leaves)
        return results

    def _columns(self, root: losses.Root, start: int, stop: int) -> Tensor:
        columns = root.columns(start, stop)
        return (columns if self.select is None else self.select(columns)).to(self.trace.out.dtype)

    def _column(self, root: losses.Root) -> Tensor:
        """The only one, [n, ...]."""
        return self._columns(root, 0, 1)[0] if root.only is None else self._at(root.only)

    def _at(self, t: Tensor) -> Tensor:
        """What is there for each output, [N, ...], for those of this forward pass."""
        t = t if self.select is None else self.select(t[None])[0]
        return t if t.dtype is self.trace.out.dtype else t.to(self.trace.out.dtype)

    def _is_of_outputs(self) -> bool:
        """Whether all parameters are used in what gives the output."""
        out = self.trace.out
        if not out.requires_grad:
            return False
        end, sites = edge_of(out), self.trace.sites
        return bool(sites) and all(is_at(s, end) and not s.axis and s.shape == out.shape for s in sites)

    def _maps_vectors(self, names: Sequence[str]) -> bool:
        """Whether what linear maps of vectors need no more for goes by itself."""
        if self.differentiable or self.chosen is not None or not vectors.COVERED.issuperset(names):
            return False
        return bool(names) and pages.may_overwrite() and not torch.compiler.is_compiling()

    def _contract_last_layer(
        self, root: losses.Root, uses: list[list[tuple[Site, Form]]], names: Sequence[str], results: dict[str, list[Any]]
    ) -> bool:
        """Put sums of squares in their places where the sum over all columns is known for each output; whether it is."""
        if root.diagonal is None or not vectors.SQUARES.issuperset(names) or not self._is_of_outputs():
            return False
        for site in self.trace.sites:
            check_unchanged(site)
        squares = [self._at(root.diagonal())] * len(self.trace.sites)
        return len(self._contract_vectors(squares, uses, names, (), results, squares=True)) == len(self.leaves)

    def _contract_vectors(
        self,
        gs: Sequence[Tensor],
        uses: list[list[tuple[Site, Form]]],
        names: Sequence[str],
        summed: Collection[int],
        results: dict[str, list[Any]],
        bare: bool | None = None,
        squares: bool = False,
    ) -> Collection[int]:
        """Put the contractions of linear maps of vectors, each the only use of its parameters, in their places.

        Args:
            gs: The cotangents of the sites.
            uses: Of each parameter.
            names: The contractions.
            summed: Parameters of which the total is wanted.
            results: The places.
            bare: As for `run` where there is one column and cotangents have no axis for it, else None.
            squares: Whether ``gs`` are squares of cotangents, summed over columns, and these not there.

        Returns:
            The parameters that are done.
        """
        maps: list[tuple[int, int | None, Outer, Tensor]] = []
        done: set[int] = set()
        for site, g in zip(self.trace.sites, gs, strict=True):
            (i, form), *others = site.forms.items()
            if type(form) is not Outer or len(uses[i]) > 1 or i in summed or not vectors.fits(form, g):
                continue
            if g.shape[-1] >= LARGE_BLOCK:  # of which a bias's factor is not to go unnoticed
                continue
            done.add(i)
            j = None
            if others and type(beside := others[0][1]) is Direct and beside.sums is form and len(uses[others[0][0]]) == 1:
                j = others[0][0]
                done.add(j)
                if j in summed:
                    results["total"][j] = g.sum(0)
            maps.append((i, j, form, g))
        if not maps:
            return done
        weights, biases, every, cotangents = zip(*maps, strict=True)
        squared = cotangents if squares else () if vectors.SQUARES.isdisjoint(names) else vectors.squares(cotangents)
        for name in names:
            found = vectors.contract(name, every, cotangents, squared)
            if name == "per_sample" and bare is not None:
                found = [([w], [b]) if bare else (w.unsqueeze(0), b.unsqueeze(0)) for w, b in found]
            into = results[name]
            for i, j, (w, b) in zip(weights, biases, found, strict=True):
                into[i] = w
                if j is not None:
                    into[j] = b
        return done

    def _is_large(self) -> bool:
        """Whether it pays to contract inside of the backward pass, and can be done."""
        if self.differentiable or not pages.may_overwrite() or torch.compiler.is_compiling():
            return False
        out = self.trace.out
        least = STREAMED_BYTES.get(out.device.type, STREAMED_BYTES["cuda"])
        return sum([hint(math.prod(site.shape)) for site in self.trace.sites]) * out.element_size() >= least

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


def check_unchanged(site: Site) -> None:
    """Raise if what a form takes from the forward pass was overwritten since."""
    for t, version in site.inputs:
        if t._version != version:
            raise RuntimeError(
                f"the input of {site.name} was changed in place after the call, so its gradient is lost (autograd would "
                "refuse it too). Use the out-of-place operation instead."
            )


_DTYPE, _LAYOUT, _TENSORS = attrgetter("dtype"), attrgetter("layout"), frozenset({Tensor})


def _as_parameters(results: Sequence[Any], leaves: Sequence[Tensor]) -> list[Any]:
    """Gradients in the types of their parameters, which those in a list have."""
    strided = torch.strided
    plain = _TENSORS.issuperset(map(type, results)) and {*map(_LAYOUT, results)} == {strided}
    if plain and [*map(_DTYPE, results)] == [*map(_DTYPE, leaves)]:
        return [*results]
    return [
        r if type(r) is list or (r.dtype is p.dtype and r.layout is strided) else _as_parameter(r, p)
        for r, p in zip(results, leaves, strict=True)
    ]


def _as_parameter(result: Tensor, p: Tensor) -> Tensor:
    """A gradient, dense where that of an embedding is sparse, in the parameter's own type."""
    result = result if result.layout is torch.strided else result.to_dense()
    return result if result.dtype == p.dtype else result.to(p.dtype)
