"""Parameters without axes, and outputs with the sample axis alone: learned temperatures, gates, curves of one variable."""

from collections.abc import Callable

import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from one_by_one import truth, verify
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.utils.parametrizations import weight_norm

import curvfunc as cf
from curvfunc.compat import backpack, extend, extensions

pytestmark = pytest.mark.usefixtures("float64")

N, C = 4, 3
Params = dict[str, Tensor]
Model = Callable[[Params, Tensor], Tensor]


def layer(p: Params, x: Tensor) -> Tensor:
    return F.linear(x, p["w"])


# Each has a weight "w" [3, 4], heads "h" [3, 3], and scalars "t", "s" and "unused".
MODELS: dict[str, Model] = {
    "divided": lambda p, x: layer(p, x) / p["t"],
    "multiplied": lambda p, x: torch.tanh(layer(p, x)) * p["t"],
    "exponential": lambda p, x: torch.tanh(layer(p, x)) * p["t"].exp(),
    "inside": lambda p, x: torch.tanh(p["t"] * layer(p, x) + p["s"]) @ p["h"],
    "subtracted": lambda p, x: torch.tanh(p["t"] - layer(p, x)),
    "numerator": lambda p, x: p["t"] / (1 + layer(p, x).square()),
    "softmax": lambda p, x: (layer(p, x) / p["t"]).softmax(1) @ p["h"],
    "twice": lambda p, x: (lambda h: h * torch.sigmoid(p["t"] * h) + p["t"])(layer(p, x)),
    "power": lambda p, x: (layer(p, x).square() + 1) ** p["t"],
    "base": lambda p, x: p["t"].square() ** torch.tanh(layer(p, x)),
    "prelu": lambda p, x: F.prelu(layer(p, x), p["t"]) @ p["h"],
    "of_the_weight": lambda p, x: F.linear(x, p["w"] * p["t"]).tanh(),
    "normed_weight": lambda p, x: F.linear(x, p["t"] * p["w"] / p["w"].norm()).tanh(),
    "between": lambda p, x: torch.lerp(layer(p, x), torch.tanh(x[:, :3] @ p["h"]), p["t"]),
    "residual": lambda p, x: x[:, :3] + p["t"] * torch.tanh(layer(p, x)),
    "norm": lambda p, x: F.layer_norm(layer(p, x), (3,)) * p["t"],
    "chosen": lambda p, x: torch.where(layer(p, x) > 0, p["t"], p["s"]) * x[:, :3],
    "expanded": lambda p, x: layer(p, x).tanh() * p["t"].expand(len(x), 3),
    "repeated": lambda p, x: layer(p, x).tanh() * p["t"].repeat(len(x), 1),
    "attention": lambda p, x: (lambda z: (z @ z.mT / p["t"]).softmax(-1) @ z)(x.unflatten(1, (2, 2))).mean(1) @ p["h"][:2],
    "cosine": lambda p, x: p["t"].exp() * F.normalize(layer(p, x), dim=1) @ F.normalize(p["h"], dim=0),
}


def parameters() -> Params:
    t, s = 1.2 + 0.1 * torch.randn(()), 0.3 * torch.randn(())
    return {"w": torch.randn(3, 4), "h": torch.randn(3, C), "t": t, "s": s, "unused": torch.ones(())}


@pytest.mark.parametrize("name", MODELS)
def test_every_quantity(name: str) -> None:
    verify(MODELS[name], parameters(), torch.randn(N, 4), torch.arange(N) % C)


# One number for each sample.
CURVES: dict[str, tuple[Model, dict[str, tuple[int, ...]]]] = {
    "logistic": (lambda p, x: p["k"] * torch.sigmoid((x[:, 0] - p["m"]) * p["s"]), {"k": (), "m": (), "s": ()}),
    "gaussian": (lambda p, x: torch.exp(-((x[:, 0] - p["m"]) ** 2) / (2 + p["s"] ** 2)), {"m": (), "s": ()}),
    "divided": (lambda p, x: torch.sin(x[:, 0] / (2 + p["t"])), {"t": ()}),
    "power": (lambda p, x: x[:, 0].abs() ** p["t"], {"t": ()}),
    "vector": (lambda p, x: torch.tanh(x @ p["w"]) * p["t"] + p["b"], {"w": (4,), "t": (), "b": ()}),
    "vector_divided": (lambda p, x: torch.tanh(x @ p["w"]) / (2 + p["t"]), {"w": (4,), "t": ()}),
    "layer": (lambda p, x: torch.tanh(F.linear(x, p["w"], p["b"]).squeeze(1)), {"w": (1, 4), "b": (1,)}),
    "einsum_with_a_scalar": (lambda p, x: torch.einsum("ni,->n", x, p["t"]).sin(), {"t": ()}),
    "form": (lambda p, x: torch.einsum("ni,ij,nj->n", x, p["w"], x).sin(), {"w": (4, 4)}),
    "expanded": (lambda p, x: (p["t"].expand(len(x)) * x[:, 0]).sin(), {"t": ()}),
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared_error": F.mse_loss,
    "bce": F.binary_cross_entropy_with_logits,
    "custom": lambda out, y: (out.exp() - y * out).sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", CURVES)
def test_one_output_per_sample(name: str, loss: str) -> None:
    model_fn, shapes = CURVES[name]
    params = {k: torch.randn(s) for k, s in shapes.items()}
    verify(model_fn, params, torch.randn(N, 4), torch.rand(N), loss_fn=LOSSES[loss])


FUNCTIONS = [cf.batch_grad, cf.batch_l2, cf.diag_ggn, cf.sqrt_ggn, cf.kflr, cf.batch_dot, cf.ggn_gram, cf.diag_hessian]


@pytest.mark.parametrize("name", ["divided", "multiplied", "softmax", "prelu", "norm", "expanded"])
def test_vmapped_over_parameters(name: str) -> None:
    X, y, several = torch.randn(N, 4), torch.arange(N) % C, [parameters() for _ in range(2)]
    stacked = {k: torch.stack([p[k] for p in several]) for k in several[0]}
    for f in FUNCTIONS:
        want = [f(MODELS[name], p, X, y) for p in several]
        got = vmap(lambda p: f(MODELS[name], p, X, y))(stacked)  # noqa: B023 (called at once)
        assert_close(got, optree.tree_map(lambda *r: torch.stack(r), *want))


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        return x / self.t


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.t


def mlp(*ends: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Gate(), nn.Linear(3, C), *ends)


NETS: dict[str, Callable[[], nn.Module]] = {
    "gate": mlp,
    "temperature": lambda: mlp(Temperature()),
    "weight_norm": lambda: nn.Sequential(weight_norm(nn.Linear(4, 3), dim=None), nn.Tanh(), nn.Linear(3, C)),
    "weight_norm_of_rows": lambda: nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, C)),
}


@pytest.mark.parametrize("name", NETS)
def test_modules_and_the_shim(name: str) -> None:
    net = NETS[name]()
    model_fn, params = cf.functionalize(net)
    X, y = torch.randn(N, 4), torch.arange(N) % C
    hessian = not name.startswith("weight_norm")  # torch's own second derivative of that kernel is wrong
    verify(model_fn, params, X, y, hessian=hessian)
    t = truth(model_fn, params, X, y)
    net, loss_fn = extend(net), extend(nn.CrossEntropyLoss())
    exts = [extensions.BatchGrad(), extensions.BatchL2Grad(), extensions.DiagGGNExact(), extensions.KFLR()]
    with backpack(*exts, *([extensions.BatchDiagHessian()] if hessian else [])):
        loss_fn(net(X), y).backward()
    diagonal, curvature = t.split(t.ggn().diagonal(dim1=1, dim2=2).sum(0)), t.split(t.H.diagonal(dim1=1, dim2=2))
    for k, p in net.named_parameters():
        g = t.batch_grad()[k]
        assert_close(p.grad_batch, g)
        assert_close(p.batch_l2, g.reshape(N, -1).square().sum(1))
        assert_close(p.diag_ggn_exact, diagonal[k])
        if p.ndim == 0:
            assert_close(p.kflr, [diagonal[k].reshape(1, 1)])
        if hessian:
            assert_close(p.diag_h_batch, curvature[k])


def test_outputs_without_axes_of_their_own_between_modules() -> None:
    """The shim looks for samples that are mixed there."""

    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    first, loss_fn = extend(Vector()), extend(nn.MSELoss())
    X, y = torch.randn(N, 4), torch.randn(N)
    with backpack(extensions.DiagGGNExact()):
        loss_fn(first(X).cumsum(0).diff(dim=0, prepend=torch.zeros(1)), y).backward()
    assert_close(first.w.diag_ggn_exact, 2 / N * X.square().sum(0))
