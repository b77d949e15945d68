"""Tensors of no elements: no input features, no hidden units, no positions. Everything else is as it would be."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from one_by_one import verify
from torch import Tensor
from torch.func import vmap

import curvfunc as cf

pytestmark = pytest.mark.usefixtures("float64")

N, C = 4, 3
Params = dict[str, Tensor]
MODELS: dict[str, tuple[Callable[[Params, Tensor], Tensor], dict[str, tuple[int, ...]]]] = {
    "no_inputs": (lambda p, x: F.linear(x[:, :0], p["w"], p["b"]), {"w": (C, 0), "b": (C,)}),
    "no_units": (
        lambda p, x: F.linear(torch.tanh(F.linear(x, p["w"], p["c"])), p["v"], p["b"]),
        {"w": (0, 4), "c": (0,), "v": (C, 0), "b": (C,)},
    ),
    "no_units_at_positions": (
        lambda p, x: F.linear(torch.tanh(F.linear(x.unflatten(1, (2, 2)), p["w"])), p["v"], p["b"]).mean(1),
        {"w": (0, 2), "v": (C, 0), "b": (C,)},
    ),
    "no_positions": (
        lambda p, x: F.linear(x.unflatten(1, (2, 2))[:, :0], p["w"]).sum(1) + p["b"],
        {"w": (C, 2), "b": (C,)},
    ),
    "product": (lambda p, x: torch.tanh(x @ p["u"]) @ p["w"] + p["b"], {"u": (4, 0), "w": (0, C), "b": (C,)}),
    "einsum": (lambda p, x: torch.einsum("ni,io->no", x[:, :0], p["w"]) + p["b"], {"w": (0, C), "b": (C,)}),
    "embedding": (
        lambda p, x: F.linear(F.embedding((x > 0).long(), p["w"]).flatten(1), p["v"], p["b"]),
        {"w": (2, 0), "v": (C, 0), "b": (C,)},
    ),
    "scale": (lambda p, x: (x[:, :0] * p["w"]).sum(1, keepdim=True) + p["b"], {"w": (0,), "b": (C,)}),
    "norm": (lambda p, x: F.layer_norm(x[:, :0], (0,), p["w"]).sum(1, keepdim=True) + p["b"], {"w": (0,), "b": (C,)}),
    "generic": (lambda p, x: (x[:, :0] ** p["w"]).sum(1, keepdim=True) + p["b"], {"w": (0,), "b": (C,)}),
    "expanded": (lambda p, x: p["w"].expand(len(x), 0).sum(1, keepdim=True) + p["b"], {"w": (0,), "b": (C,)}),
    "part": (lambda p, x: F.linear(x[:, :0], p["w"].split([0, 4], 1)[0]) + F.linear(x, p["w"]), {"w": (C, 4)}),
    "unused": (lambda p, x: F.linear(x, p["w"]), {"w": (C, 4), "z": (0, 5)}),
    "alone": (lambda p, x: F.linear(x[:, :0], p["w"]) + x[:, :C], {"w": (C, 0)}),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_quantity(name: str) -> None:
    model_fn, shapes = MODELS[name]
    params, X, y = {k: torch.randn(s) for k, s in shapes.items()}, torch.randn(N, 4), torch.arange(N) % C
    verify(model_fn, params, X, y)
    stacked = {k: torch.stack([p, p]) for k, p in params.items()}
    for f in (cf.batch_grad, cf.diag_ggn, cf.kflr, cf.diag_hessian):
        vmap(lambda p: f(model_fn, p, X, y))(stacked)  # noqa: B023 (called at once)
