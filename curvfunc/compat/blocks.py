"""`HMP`, `GGNMP` and `PCHMP`, read off the graph before an extended loss.

Their functions are called after the backward pass has freed that graph, and must not keep any part of it alive: it holds
the parameters, which hold the functions. So columns of a root of the matrix go back to the uses of each parameter at once,
and nothing else is kept. They are those of the loss Hessian, and for `HMP` and `PCHMP` one for each entry of a smooth
activation. Where that is too much, or an operation curves otherwise, there is `curvfunc.compat.graphs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvfunc import losses
from curvfunc.compat.context import paused
from curvfunc.compat.delivery import Pass
from curvfunc.compat.extensions import GGNMP, HMP, PCHMP, MatrixProduct
from curvfunc.compat.notes import LossCall
from curvfunc.compat.upstream import Curved, Upstream
from curvfunc.engine.cotangents import chunks
from curvfunc.engine.passes import Prepared
from curvfunc.hessian import diagonal as hessian
from curvfunc.operators.linearization import check_vector
from curvfunc.operators.positive_curvature import MODIFICATIONS
from curvfunc.uses.block_products import Block, condensed
from curvfunc.uses.forms import Bound, Outer, Rows, join, merge

__all__ = ["BlockProduct", "FunctionProduct", "ParameterProduct", "put_products"]

LARGEST_BYTES = 1 << 28  # what the functions may keep
MOST_ENTRIES = 64  # of smooth activations per sample; for more, another forward pass is the faster way


class ParameterProduct:
    """What the extensions put on a parameter: a function that multiplies [V, *shape], or [*shape], with its block."""

    def __init__(self, p: Tensor) -> None:
        self._like = p.detach().new_empty(()).expand(p.shape)

    def __call__(self, v: Tensor) -> Tensor:
        """The product, of the shape of ``v``. Backward passes that it takes are nothing to active extensions."""
        with paused():
            if isinstance(v, Tensor) and v.shape == self._like.shape:
                return self.multiply(v[None])[0]
            return self.multiply(v)

    def multiply(self, v: Tensor) -> Tensor:
        """The product, [V, *shape]."""
        raise NotImplementedError


class FunctionProduct(ParameterProduct):
    """A product by one of curvfunc's functions."""

    def __init__(self, p: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(p)
        self._function = function

    def multiply(self, v: Tensor) -> Tensor:
        """The product, [V, *shape]."""
        return self._function(v)


class BlockProduct(ParameterProduct):
    """A product with nothing but what the uses of the parameter took."""

    def __init__(self, p: Tensor, blocks: Sequence[Block]) -> None:
        super().__init__(p)
        self._blocks = [(block, block.root.x._version) for block in blocks]

    def multiply(self, v: Tensor) -> Tensor:
        """The product, [V, *shape]."""
        check_vector("v", v, self._like, batched=True)
        result = None if self._blocks and v.numel() else torch.zeros_like(v)
        with torch.no_grad():
            for block, version in self._blocks if v.numel() else ():
                if block.root.x._version != version:
                    raise RuntimeError(
                        f"the input of the operation that uses the parameter of shape {tuple(self._like.shape)} was changed "
                        "in place after the backward pass, so products are lost. Multiply before the change, or use new "
                        "memory."
                    )
                part = block(v.to(block.root.g.dtype)).to(v.dtype)
                result = part if result is None else result.add_(part)
        assert result is not None
        return result


def put_products(
    call: LossCall, graph: Upstream, curved: Curved | None, exts: Sequence[MatrixProduct], current: Pass
) -> list[MatrixProduct]:
    """Put functions on the parameters for those extensions whose matrix has a small root, and return the others."""
    outputs = call.out[:1].numel()
    if graph.outputs or not exts or _kept_bytes(call, graph, outputs) > LARGEST_BYTES:
        return list(exts)
    root, weights = losses.signed_root(call.loss, call.out.detach(), call.y)
    residuals = curved.curvature.residuals if curved is not None else []
    entries = sum(r.shape.numel() for r in residuals) // max(1, len(call.out))
    resolved = curved is not None and curved.is_resolved() and (not residuals or curved.suffices(current.create_graph))
    resolved = resolved and entries <= MOST_ENTRIES and _kept_bytes(call, graph, outputs + entries) <= LARGEST_BYTES
    definite = resolved and weights is None and not any(r.composite for r in residuals)
    products = [
        ext
        for ext in exts
        if isinstance(ext, GGNMP) or (isinstance(ext, HMP) and resolved) or (isinstance(ext, PCHMP) and definite)
    ]
    if not products:
        return list(exts)
    with torch.no_grad():
        plain = [ext for ext in products if isinstance(ext, GGNMP) or not residuals]
        if plain:
            for i, b in _ggn_parts(call, graph, root).items():
                product = BlockProduct(graph.params[i], [Block.of(join(b), weights)] if b else [])
                for ext in plain:
                    current.put_curved(graph.params[i], ext, product)
        if curved is not None and len(plain) < len(products):
            bent = [ext for ext in products if ext not in plain]
            for p, parts in zip(curved.leaves, _hessian_parts(call, curved, root, weights), strict=True):
                for ext in bent:
                    modify = MODIFICATIONS[ext.get_modification_mode()] if isinstance(ext, PCHMP) else None
                    current.put_curved(p, ext, BlockProduct(p, [part.block(modify) for part in parts]))
    return [ext for ext in exts if ext not in products]


def _ggn_parts(call: LossCall, graph: Upstream, root: losses.Root) -> dict[int, list[Bound]]:
    """Columns of the loss Hessian's root at the uses of each parameter."""
    found: dict[int, list[Bound]] = {i: [] for i in graph.params}
    ranges = chunks(root.num, graph.trace, None)
    prepared = Prepared(whole=len(ranges) > 1)
    for start, stop in ranges:
        uses: dict[int, list[Bound]] = {}
        for i, form, g in graph.pull(root.columns(start, stop).to(call.out.dtype), False):
            uses.setdefault(i, []).append(prepared.bind(form, g))
        for i, mine in uses.items():
            found[i].append(condensed(merge(mine), root.num))
    return found


@dataclass
class _Part:
    """Columns at the same uses, their weights, and whether these are modified."""

    uses: list[Bound] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    modified: list[bool] = field(default_factory=list)

    def block(self, modify: Callable[[Tensor], Tensor] | None) -> Block:
        """Their sum."""
        ws = [modify(w) if modify and bent else w for w, bent in zip(self.weights, self.modified, strict=True)]
        return Block.of(join(self.uses), torch.cat(ws))


def _hessian_parts(call: LossCall, curved: Curved, root: losses.Root, weights: Tensor | None) -> list[Iterable[_Part]]:
    """Columns of the Hessian's root at the uses of each parameter."""
    out = call.out.detach()
    columns = hessian.Columns(root.num, lambda start, stop: root.columns(start, stop).to(out.dtype), weights)
    gradient = losses.gradient(call.loss, out, call.y)
    found: list[dict[int | None, _Part]] = [{} for _ in curved.leaves]
    for i, b, w, bent in hessian.root_columns(curved.trace, curved.curvature.residuals, columns, gradient):
        b = condensed(b, len(w))
        part = found[i].setdefault(id(b.x) if isinstance(b.form, (Outer, Rows)) else None, _Part())
        part.uses.append(b)
        part.weights.append(w.to(b.g.dtype))
        part.modified.append(bent)
    return [parts.values() for parts in found]


def _kept_bytes(call: LossCall, graph: Upstream, columns: int) -> int:
    """About what that many columns take at all uses."""
    numel = 0
    for site in graph.trace.sites:
        formed = [f for f in site.forms.values() if not isinstance(f, (Outer, Rows) if len(site.shape) == 2 else Rows)]
        whole = len(formed) == len(site.forms)
        numel += len(call.out) * sum(f.shape.numel() for f in formed) + (0 if whole else site.shape.numel())
    return numel * columns * call.out.element_size()
