"""Diagonals by Hessian-vector products with respect to the outputs of sites.

With z the outputs of all sites of a parameter p, and J = dz/dp at fixed inputs, the Hessian of p is Jᵀ H_zz J. Samples do not
interact, so that one product serves all of them at once. Two families of columns give the diagonal:

- one for each entry i of p: hᵢᵢ = (J eᵢ)ᵀ H_zz (J eᵢ);
- for a single site with z[s,o] = Σ_k W[o,k] x[s,k], one for each entry of z, where these are fewer:
  h[o,k] = Σ_st x[s,k] H[(s,o),(t,o)] x[t,k]. They serve its bias as well.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from curvfunc.engine.columns import over_columns
from curvfunc.engine.sites import Trace
from curvfunc.hessian.residuals import is_affine
from curvfunc.tensors.precision import wide
from curvfunc.tensors.sizes import hint
from curvfunc.uses.forms import Outer, Parts, Through, arranged, bind, flat_vectors, per_sample

__all__ = ["HessianProducts", "columns_of", "num_columns"]


@dataclass
class HessianProducts:
    """Products with the Hessian of Σₙ δₙᵀ fₙ(z), where fₙ is the model's output and δ the loss gradient.

    Attributes:
        trace: The forward pass.
        gradient: δ, [n, ...]. If it has a graph, the Hessian is that of the loss.
        inputs: What a form takes from the forward pass.
        chunks: Ranges of columns that go together.
        differentiable: Whether the results will be differentiated.
    """

    trace: Trace
    gradient: Tensor
    inputs: Callable[[Any], Tensor | Parts]
    chunks: Callable[[int, int], list[tuple[int, int]]]
    differentiable: bool
    _cotangents: dict[int, Tensor] = field(default_factory=dict)

    def diagonals(self, uses: dict[int, list[int]]) -> Iterator[tuple[int, Tensor]]:
        """The diagonals [n, *shape] for ``{parameter: its sites}``."""
        self._prepare(sorted({j for sites in uses.values() for j in sites}))
        by_output, by_entry = _families(self.trace, uses)
        for j, (i, *biases), _ in by_output:
            yield from self._by_output(j, i, biases)
        for i, sites in by_entry.items():
            yield i, self._by_entry(i, sites)

    def _prepare(self, sites: Sequence[int]) -> None:
        """The gradient at each site's output, with a graph."""
        with torch.enable_grad():
            grads = torch.autograd.grad(
                [self.trace.out],
                [self.trace.sites[j].edge for j in sites],
                [self.gradient],
                create_graph=True,
                allow_unused=True,
            )
        self._cotangents = {j: g for j, g in zip(sites, grads, strict=True) if g is not None and g.requires_grad}

    def _product(self, sites: Sequence[int], vectors: Sequence[Tensor]) -> list[Tensor]:
        """H v for v [v, n, ...] at each site's output."""
        used = [j for j in sites if j in self._cotangents]
        if not used:
            return [torch.zeros_like(v) for v in vectors]
        edges = [self.trace.sites[j].edge for j in sites]
        none: list[bool] = []

        def backward(*raw: Tensor) -> tuple[Tensor, ...]:
            grads = torch.autograd.grad(
                [self._cotangents[j] for j in used],
                edges,
                raw,
                retain_graph=True,
                create_graph=self.differentiable,
                allow_unused=True,
            )
            none[:] = [g is None for g in grads]
            return tuple(g for g in grads if g is not None)

        given = [(j, v) for j, v in zip(sites, vectors, strict=True) if j in self._cotangents]
        raw = [self._to_edge(j, v).to(self._cotangents[j].dtype) for j, v in given]
        if _functorch.peek_interpreter_stack() is not None:
            # backward passes that work in place need columns that are batched wherever the cotangents are
            raw = [v + torch.zeros_like(self._cotangents[j]) for j, v in zip(used, raw, strict=True)]
        found = iter(over_columns(backward, *raw))
        return [
            torch.zeros_like(v) if missing else self._from_edge(j, next(found)).to(v.dtype)
            for j, v, missing in zip(sites, vectors, none, strict=True)
        ]

    def _to_edge(self, j: int, v: Tensor) -> Tensor:
        return v.movedim(1, self.trace.sites[j].axis + 1).reshape(len(v), *self._cotangents[j].shape)

    def _from_edge(self, j: int, g: Tensor) -> Tensor:
        site = self.trace.sites[j]
        return g.reshape(len(g), *site.shape).movedim(site.axis + 1, 1)

    def _zeros(self, j: int, columns: int) -> Tensor:
        """[v, n, ...] of the shape of a site's output, in single precision at least."""
        shape = list(self.trace.sites[j].shape)
        shape.insert(0, shape.pop(self.trace.sites[j].axis))
        return self.trace.out.new_zeros(columns, *shape, dtype=wide(self.trace.out.dtype))

    def _by_entry(self, i: int, sites: list[int]) -> Tensor:
        """One column for each entry of the parameter."""
        shape = self.trace.sites[sites[0]].forms[i].shape
        numel, samples = math.prod(shape), self.trace.out.shape[0]
        parts = [self.trace.out.new_zeros(0, samples)]
        for start, stop in self.chunks(numel, 1):
            entries = _units(start, stop, numel, self._zeros(sites[0], 1)).reshape(-1, 1, *shape)
            entries = entries.expand(-1, samples, *shape)
            moves = [self._transpose(j, partial(self._gradient, j, i), entries) for j in sites]
            products = self._product(sites, moves)
            diagonals = [flat_vectors(m * h).sum(2) for m, h in zip(moves, products, strict=True)]
            parts.append(sum(diagonals[1:], diagonals[0]))
        return torch.cat(parts).mT.reshape(samples, *shape)

    def _gradient(self, j: int, i: int, g: Tensor) -> Tensor:
        return per_sample(self._bind(j, i, g))

    def _by_output(self, j: int, i: int, biases: list[int]) -> Iterator[tuple[int, Tensor]]:
        """One column for each entry of one sample's z, for a weight and biases at a single site."""
        form = self.trace.sites[j].forms[i]
        assert not isinstance(form, Through)
        b = self._bind(j, i, self._zeros(j, 1))
        _, n, q, s, o = b.g.shape
        weight, bias = b.g.new_zeros(q * o, n, b.x.shape[3]), b.g.new_zeros(q * o, n)
        for start, stop in self.chunks(q * o * s, 1):
            place = torch.arange(start, stop, device=b.g.device)
            feature, position = place // s, place % s  # features count through groups
            units = _units(start, stop, q * o * s, b.g).reshape(-1, q, o, s).mT
            units = units.unsqueeze(1).expand(-1, n, -1, -1, -1)
            moves = self._transpose(j, form.cotangent, units)
            h = form.cotangent(self._product([j], [moves])[0]).movedim(3, 4).flatten(2, 3)  # [v, n, q o, s]
            rows = h[torch.arange(len(h), device=h.device), :, feature]  # H[(s,o),(t,o)] as [v, n, t]
            x = b.x[:, feature // o].movedim(1, 0)  # [v, n, t, k]
            here = b.x[:, feature // o, position].movedim(1, 0)  # [v, n, k]
            weight = weight.index_add(0, feature, (rows.unsqueeze(2) @ x).squeeze(2) * here)
            bias = bias.index_add(0, feature, rows.sum(2))
        yield i, arranged(b, weight.movedim(0, 1).reshape(n, q, o, -1))
        for k in biases:
            shape = self.trace.sites[j].forms[k].shape
            if math.prod(shape) == q * o:
                yield k, bias.mT.reshape(n, *shape)
            else:  # the weight is a part of a parameter, which has features that the bias does not have
                yield k, self._by_entry(k, [j])

    def _bind(self, j: int, i: int, g: Tensor) -> Any:
        return bind(self.trace.sites[j].forms[i], g, self.inputs)

    def _transpose(self, j: int, linear: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """The transpose of a linear map of cotangents [v, n, ...] of site j, applied to v."""
        _, pullback = torch.func.vjp(linear, self._zeros(j, len(v)))  # type: ignore[misc]
        moved: Tensor = pullback(v)[0]
        return moved


def num_columns(trace: Trace, uses: dict[int, list[int]]) -> int:
    """The number of products that `HessianProducts.diagonals` makes, hint for symbolic sizes."""
    return sum(number for _, number in columns_of(trace, uses))


def columns_of(trace: Trace, uses: dict[int, list[int]]) -> list[tuple[int, int]]:
    """The products that `HessianProducts.diagonals` makes: masks of parameters, and their numbers."""
    by_output, by_entry = _families(trace, uses)
    entries = [(1 << i, trace.sites[sites[0]].forms[i].shape.numel()) for i, sites in by_entry.items()]
    return [(sum(1 << i for i in mine), hint(numel)) for _, mine, numel in by_output] + entries


def _families(trace: Trace, uses: dict[int, list[int]]) -> tuple[list[tuple[int, list[int], Any]], dict[int, list[int]]]:
    """Sites with a column for each entry of one sample's output, their parameters, the number; and ``uses`` of the others."""
    by_output, rest = [], dict(uses)
    for j, site in enumerate(trace.sites):
        mine = [i for i in site.forms if uses.get(i) == [j]]
        weights = [i for i in mine if isinstance(site.forms[i], Outer)]
        if len(weights) == 1 and is_affine(site):
            numel = math.prod(site.shape) // site.shape[site.axis]
            if numel <= sum(site.forms[k].shape.numel() for k in mine):
                by_output.append((j, [*weights, *[k for k in mine if k != weights[0]]], numel))
                for k in mine:
                    del rest[k]
    return by_output, rest


def _units(start: int, stop: int, total: int, like: Tensor) -> Tensor:
    """Unit vectors, [stop - start, total]."""
    places = torch.arange(start, stop, device=like.device)
    return (places.unsqueeze(1) == torch.arange(total, device=like.device)).to(like.dtype)
