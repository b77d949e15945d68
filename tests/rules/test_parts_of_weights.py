"""Layers whose weight is a part of a parameter: rows or columns, by every spelling that torch has."""

from collections.abc import Callable

import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from one_by_one import verify
from torch import Tensor
from torch.func import vmap

import curvfunc as cf
from curvfunc.rules import RULES
from curvfunc.uses.forms import Direct, Outer

pytestmark = pytest.mark.usefixtures("float64")

N, C = 4, 3
Params = dict[str, Tensor]

# Each takes a [4, 6] matrix.
PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "chunk_rows": lambda w: w.chunk(2)[1],
    "chunk_columns": lambda w: w.chunk(2, 1)[1],
    "chunk_keywords": lambda w: torch.chunk(input=w, chunks=3, dim=-1)[0],
    "chunk_uneven": lambda w: w.chunk(4, 1)[1],
    "chunk_of_one": lambda w: w.chunk(1, 1)[0],
    "chunk_of_transpose": lambda w: w.t().chunk(2, 1)[1],
    "rows_of_transpose": lambda w: w.T.chunk(2)[0],
    "transpose_of_chunk": lambda w: w.chunk(2, 1)[1].t(),
    "chunk_of_chunk": lambda w: w.chunk(2)[1].chunk(2, -1)[0],
    "split": lambda w: w.split(2, dim=-1)[1],
    "split_sizes": lambda w: torch.split(w, [1, 3, 2], 1)[1],
    "split_with_nothing": lambda w: w.split([0, 6], 1)[1],
    "split_with_sizes": lambda w: w.split_with_sizes([1, 3])[1],
    "unsafe": lambda w: w.unsafe_chunk(2, 1)[1],
    "tensor_split": lambda w: w.tensor_split([1, 4], -1)[1],
    "tensor_split_that_overlaps": lambda w: w.tensor_split([4, 2], 1)[2],
    "hsplit": lambda w: w.hsplit(2)[1],
    "vsplit": lambda w: w.vsplit(2)[1],
    "narrow": lambda w: w.narrow(1, 1, 2),
    "slice": lambda w: w[:, 1:4],
    "slice_rows": lambda w: w[1:],
    "strided": lambda w: w[:, ::2],
    "strided_rows": lambda w: w[::2],
    "list": lambda w: w[:, [0, 2]],
    "index_select": lambda w: w.index_select(1, torch.tensor([3, 1])),
    "select": lambda w: w.select(1, 1).unsqueeze(0),
    "unbind": lambda w: w.unbind(1)[1].unsqueeze(1),
    "swapaxes": lambda w: w.swapaxes(0, 1).chunk(2, 1)[0],
    "flip": lambda w: w.chunk(2, 1)[1].flip(1),
    "joined": lambda w: torch.cat(w.chunk(2, 1)[::-1], 1),
}


def uses(part: Callable[[Tensor], Tensor], p: Params, x: Tensor) -> Tensor:
    """A part in a linear layer, in a product from the right, and in one with positions; x [n, 6]."""
    w = part(p["w"])
    linear = torch.tanh(F.linear(x[:, : w.shape[1]], w)).sum(1, keepdim=True)
    product = torch.sigmoid(x[:, : w.shape[0]] @ w).sum(1, keepdim=True)
    positions = F.linear(x.unsqueeze(2).repeat(1, 1, w.shape[1]) * torch.arange(1.0, 1 + w.shape[1]), w).tanh().mean((1, 2))
    return torch.cat([linear, product, positions.unsqueeze(1)], dim=1) @ p["head"]


@pytest.mark.parametrize("name", PARTS)
def test_every_quantity(name: str) -> None:
    params = {"w": torch.randn(4, 6), "head": torch.randn(3, C)}
    verify(lambda p, x: uses(PARTS[name], p, x), params, torch.randn(N, 6), torch.arange(N) % C)


MODELS: dict[str, tuple[Callable[[Params, Tensor], Tensor], dict[str, tuple[int, ...]]]] = {
    "all_columns": (lambda p, x: torch.tanh(sum(F.linear(x[:, :2], w) for w in p["w"].chunk(2, 1))), {"w": (C, 4)}),
    "whole_and_part": (
        lambda p, x: torch.tanh(F.linear(x, p["w"])) + F.linear(x[:, :2], p["w"].chunk(2, 1)[1]),
        {"w": (C, 4)},
    ),
    "attention": (
        lambda p, x: (
            (lambda q, k, v: (q @ k.mT).softmax(-1) @ v)(*[x.unflatten(1, (2, 2)) @ w for w in p["w"].chunk(3, 1)]).mean(1)
            @ p["h"].chunk(2, 1)[0]
        ),
        {"w": (2, 6), "h": (2, 2 * C)},
    ),
    "softmax": (
        lambda p, x: F.linear(x.softmax(1)[:, :2], p["w"].chunk(2, 1)[1], p["b"].chunk(2)[1]),
        {"w": (C, 4), "b": (2 * C,)},
    ),
    "whole_bias": (lambda p, x: F.linear(x, p["w"].chunk(2)[1], p["b"]).softmax(1)[:, :C], {"w": (12, 4), "b": (6,)}),
    "two_layers": (
        lambda p, x: F.linear(torch.tanh(F.linear(x, p["w"].chunk(2, 1)[0])), p["v"].tensor_split([1, 5], 1)[1]),
        {"w": (4, 8), "v": (C, 6)},
    ),
    "left": (lambda p, x: (p["w"].chunk(2, 1)[1] @ x.unsqueeze(2)).squeeze(2), {"w": (C, 8)}),
    "einsum": (lambda p, x: torch.einsum("ni,oi->no", x, p["w"].chunk(2, 1)[1]).tanh(), {"w": (C, 8)}),
    "conv": (lambda p, x: F.conv1d(x.unflatten(1, (2, 2)), p["w"].chunk(2, 1)[1], padding=1).tanh().mean(2), {"w": (C, 4, 3)}),
    "embedding": (lambda p, x: F.embedding((x > 0).long(), p["w"].chunk(2, 1)[1]).mean(1).tanh(), {"w": (2, 2 * C)}),
    "unbound": (lambda p, x: F.linear(x, p["w"].unbind(2)[1]).tanh(), {"w": (C, 4, 2)}),
}


@pytest.mark.parametrize("name", MODELS)
def test_in_models(name: str) -> None:
    model_fn, shapes = MODELS[name]
    verify(model_fn, {k: torch.randn(s) for k, s in shapes.items()}, torch.randn(N, 4), torch.arange(N) % C)


@pytest.mark.parametrize("name", ["all_columns", "attention"])
def test_vmapped_and_compiled(name: str) -> None:
    model_fn, shapes = MODELS[name]
    X, y = torch.randn(N, 4), torch.arange(N) % C
    specs = (cf.BatchGrad(), cf.BatchL2(), cf.KFLR(), cf.DiagHessian())
    stacked = {k: torch.randn(2, *s) for k, s in shapes.items()}
    want = [cf.compute(model_fn, {k: p[i] for k, p in stacked.items()}, X, y, specs) for i in range(2)]
    got = vmap(lambda p: cf.compute(model_fn, p, X, y, specs))(stacked)
    assert_close(got, optree.tree_map(lambda *r: torch.stack(r), *want))
    compiled = torch.compile(lambda p: cf.compute(model_fn, p, X, y, specs), backend="aot_eager", fullgraph=True)
    assert_close(compiled({k: p[0] for k, p in stacked.items()}), want[0])


# A part of a weight, and the same with the whole weight and other inputs or outputs.
SAME: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor], tuple[int, int]]] = {
    "rows": (lambda w, x: F.linear(x, w.chunk(2)[1]), lambda w, x: F.linear(x, w)[..., 4:], (8, 4)),
    "columns": (
        lambda w, x: F.linear(x[..., :2], w.chunk(2, 1)[1]),
        lambda w, x: F.linear(F.pad(x[..., :2], (2, 0)), w),
        (4, 4),
    ),
    "right_rows": (lambda w, x: x[..., :2] @ w.split([1, 2, 1])[1], lambda w, x: F.pad(x[..., :2], (1, 1)) @ w, (4, 4)),
    "right_columns": (lambda w, x: x @ w.tensor_split([1, 5], 1)[1], lambda w, x: (x @ w)[..., 1:5], (4, 6)),
    "transposed": (lambda w, x: F.linear(x, w.t().chunk(2)[0]), lambda w, x: (x @ w)[..., :4], (4, 8)),
}


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("name", SAME)
def test_kronecker_factors_are_those_of_the_whole_weight(name: str, positions: bool) -> None:
    part, whole, shape = SAME[name]
    X, y = torch.randn(N, 4), torch.arange(N) % C
    X = X.unsqueeze(1) * torch.randn(N, 3, 1) if positions else X
    params = {"w": torch.randn(shape), "h": torch.randn(C, 4)}

    def model(use: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Params, Tensor], Tensor]:
        def model_fn(p: Params, x: Tensor) -> Tensor:
            h = torch.tanh(use(p["w"], x))
            return F.linear(h.mean(1) if positions else h, p["h"])

        return model_fn

    for f in (cf.kflr, cf.kfac):
        for approximation in (None, "expand", "reduce"):
            results = [
                f(model(use), params, X, y, kfac_approx=approximation)
                if f is cf.kflr
                else f(model(use), params, X, y, kfac_approx=approximation, generator=torch.Generator().manual_seed(0))
                for use in (part, whole)
            ]
            assert_close(*results)


@pytest.mark.parametrize("name", SAME)
def test_averaged_factors_are_exact_for_one_sample(name: str) -> None:
    """Without shared positions; the output's factor has the size of the whole weight."""
    part, _, shape = SAME[name]
    params = {"w": torch.randn(shape), "h": torch.randn(C, 4)}
    model_fn = lambda p, x: F.linear(torch.tanh(part(p["w"], x)), p["h"])
    problem = (model_fn, params, torch.randn(1, 4), torch.zeros(1, dtype=torch.long))
    assert_close(cf.kfra(*problem), cf.kflr(*problem))


def test_groups_of_ones_own_take_the_whole_weight() -> None:
    """Rows of the matrix of a grouped operation are not features of one group."""

    @cf.operation
    def grouped(x: Tensor, w: Tensor) -> Tensor:
        return (x.unflatten(1, (2, -1)).unsqueeze(2) * w.unflatten(0, (2, -1))).sum(-1).flatten(1)

    @cf.rule(grouped, parameters="w", samples_first=True)
    def _(x: Tensor, w: Tensor) -> dict[str, Outer | Direct]:
        inputs = lambda: x.unflatten(1, (2, -1)).unsqueeze(2)
        return {"w": Outer(inputs, lambda g: g.unflatten(2, (2, -1)).unsqueeze(3), w.shape)}

    try:
        X, y = torch.randn(N, 4), torch.arange(N) % C
        verify(lambda p, x: grouped(x, p["w"])[:, :C], {"w": torch.randn(4, 2)}, X, y)
        for part, shape in ((lambda w: w.chunk(2)[0], (8, 2)), (Tensor.t, (2, 4)), (lambda w: w.chunk(2, 1)[0], (4, 4))):
            model_fn = lambda p, x: grouped(x, part(p["w"]))[:, :C]  # noqa: B023 (called at once)
            with pytest.raises(NotImplementedError, match="2 groups"):
                cf.batch_grad(model_fn, {"w": torch.randn(shape)}, X, y)
    finally:
        RULES.pop(grouped)
