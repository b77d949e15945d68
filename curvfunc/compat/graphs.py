"""`HMP`, `GGNMP` and `PCHMP` on the graph of the forward pass, where columns of a root would be too many.

Their functions are called after the backward pass, so that one must leave the graph as it is: `context.retaining` sees to it.
The graph holds the parameters, which hold the functions, and such a cycle would never be collected. So the functions only
point to the graph; the extended module holds it, as long as any of them is left.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from curvfunc.compat.blocks import ParameterProduct
from curvfunc.compat.context import retained
from curvfunc.compat.delivery import Pass
from curvfunc.compat.extensions import GGNMP, HMP, MatrixProduct
from curvfunc.compat.notes import LossCall
from curvfunc.compat.upstream import Upstream
from curvfunc.operators.linearization import Problem, Product, linearized
from curvfunc.operators.products import block
from curvfunc.tensors.inputs import read_batch

__all__ = ["GraphProduct", "put_products"]

# What the functions multiply with, by the module that holds it, and then by the one thing that all the functions share.
HELD: weakref.WeakKeyDictionary[nn.Module, dict[int, tuple[Product, list[Tensor]]]] = weakref.WeakKeyDictionary()


class _Shared:
    """What the functions of one backward pass share, and nobody else has: with it the graph goes."""

    def __init__(self, module: nn.Module, held: tuple[Product, list[Tensor]]) -> None:
        self._module = weakref.ref(module)
        HELD.setdefault(module, {})[id(self)] = held

    def held(self) -> tuple[Product, list[Tensor]]:
        """The product, and the parameters."""
        module = self._module()
        if module is None:
            raise RuntimeError("the extended module of this product is gone, and its graph with it: keep the module.")
        return HELD[module][id(self)]

    def __del__(self) -> None:
        module = self._module()
        if module is not None and module in HELD:
            HELD[module].pop(id(self), None)


class GraphProduct(ParameterProduct):
    """A product on the graph of the forward pass."""

    def __init__(self, p: Tensor, shared: _Shared, i: int, name: str) -> None:
        super().__init__(p)
        self._shared, self._i, self._name = shared, i, name

    def multiply(self, v: Tensor) -> Tensor:
        """The product, [V, *shape]."""
        product, leaves = self._shared.held()
        return block(product, leaves, self._i, self._name)(v)


def put_products(call: LossCall, graph: Upstream, exts: Sequence[MatrixProduct], current: Pass) -> bool:
    """Put functions on the parameters, if the graph stays and its operations can be differentiated twice."""
    if not retained() or not graph.regions or not graph.is_twice_differentiable():
        return False
    for region in graph.regions:
        if region.refusal is not None and not all(isinstance(ext, (GGNMP, HMP)) for ext in exts):
            raise NotImplementedError(region.refusal)
    inputs = graph.regions[0].inputs
    module = None if inputs is None else inputs.module()
    if module is None:
        return False
    leaves, names = list(graph.params.values()), graph.names()
    problem = Problem(_gone, names, list, read_batch(call.out.detach(), call.y, None), call.loss)
    for ext in exts:
        with torch.enable_grad():
            product = linearized(ext.matrix(), problem, leaves, call.out)
        shared = _Shared(module, (product, leaves))
        for i, p in enumerate(leaves):
            current.put_curved(p, ext, GraphProduct(p, shared, i, names[i]))
    return True


def _gone(*_: object) -> Tensor:
    raise AssertionError("the model has run already")
