"""Weights normalized by statistics of their own, with `F.batch_norm` in training mode: no sample takes part in it."""

from collections.abc import Callable

import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from one_by_one import truth, verify
from torch import Tensor, nn
from torch.func import vmap

import curvfunc as cf
from curvfunc.compat import backpack, extend, extensions

pytestmark = pytest.mark.usefixtures("float64")

N, C = 4, 3
Params = dict[str, Tensor]


def standardized(w: Tensor, gain: Tensor | None = None) -> Tensor:
    """Mean and variance of each row are 0 and 1."""
    flat = w.reshape(1, len(w), -1)
    return F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-5).reshape_as(w)


CONSTANT = torch.arange(12.0, dtype=torch.float64).sin().view(3, 4)
MODELS: dict[str, tuple[Callable[[Params, Tensor], Tensor], dict[str, tuple[int, ...]]]] = {
    "linear": (lambda p, x: F.linear(x, standardized(p["w"], p["g"]), p["b"]), {"w": (C, 4), "g": (C,), "b": (C,)}),
    "conv": (
        lambda p, x: F.conv1d(x.unflatten(1, (2, 2)), standardized(p["w"], p["g"]), padding=1).tanh().mean(2),
        {"w": (C, 2, 3), "g": (C,)},
    ),
    "constant_gain": (lambda p, x: F.linear(x, standardized(p["w"], CONSTANT[:, 0])), {"w": (C, 4)}),
    "generic": (
        lambda p, x: torch.maximum(F.linear(x, standardized(p["w"], p["g"])), p["t"]),
        {"w": (C, 4), "g": (C,), "t": (C,)},
    ),
    "standardized_per_sample": (
        lambda p, x: torch.where(x[:, :3] > 0, standardized(p["w"], p["g"])[:, 0], x[:, :3]),
        {"w": (C, 4), "g": (C,)},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_quantity(name: str) -> None:
    model_fn, shapes = MODELS[name]
    verify(model_fn, {k: torch.randn(s) for k, s in shapes.items()}, torch.randn(N, 4), torch.arange(N) % C)


def test_constant_weights() -> None:
    model_fn = lambda p, x: F.linear(x, standardized(CONSTANT, p["g"]), p["b"])
    plain = lambda p, x: F.linear(x, standardized(CONSTANT) * p["g"][:, None], p["b"])
    params, X, y = {"g": torch.randn(C), "b": torch.randn(C)}, torch.randn(N, 4), torch.arange(N) % C
    for f in (cf.batch_grad, cf.diag_ggn, cf.diag_hessian):
        assert_close(f(model_fn, params, X[:3], y[:3]), f(plain, params, X[:3], y[:3]))  # as many samples as rows


@pytest.mark.parametrize("name", ["linear", "generic"])
def test_vmapped_and_compiled(name: str) -> None:
    model_fn, shapes = MODELS[name]
    X, y, specs = torch.randn(N, 4), torch.arange(N) % C, (cf.BatchGrad(), cf.DiagGGN())
    stacked = {k: torch.randn(2, *s) for k, s in shapes.items()}
    want = [cf.compute(model_fn, {k: p[i] for k, p in stacked.items()}, X, y, specs) for i in range(2)]
    got = vmap(lambda p: cf.compute(model_fn, p, X, y, specs))(stacked)
    assert_close(got, optree.tree_map(lambda *r: torch.stack(r), *want))
    compiled = torch.compile(lambda p: cf.compute(model_fn, p, X, y, specs), backend="aot_eager", fullgraph=True)
    assert_close(compiled({k: p[0] for k, p in stacked.items()}), want[0])


def test_derivatives_of_quantities() -> None:
    """Σₙ ‖gₙ‖² has the gradient 2 Σₙ Hₙ gₙ; torch's own kernel would give another."""
    model_fn, shapes = MODELS["linear"]
    params, X, y = {k: torch.randn(s, requires_grad=True) for k, s in shapes.items()}, torch.randn(N, 4), torch.arange(N) % C
    total = sum(v.sum() for v in cf.batch_l2(model_fn, params, X, y).values())
    got = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(params.values()))])
    t = truth(model_fn, params, X, y)
    grads = torch.cat([g.flatten(1) for g in t.batch_grad().values()], dim=1)
    assert_close(got, 2 * torch.einsum("npq,nq->p", t.H, grads))


class StandardizedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, standardized(self.weight), self.bias)


def test_the_shim() -> None:
    net = nn.Sequential(StandardizedLinear(4, 3), nn.Tanh(), StandardizedLinear(3, C))
    model_fn, params = cf.functionalize(net)
    X, y = torch.randn(N, 4), torch.arange(N) % C
    t = truth(model_fn, params, X, y)
    net, loss_fn = extend(net), extend(nn.CrossEntropyLoss())
    with backpack(extensions.BatchGrad(), extensions.DiagGGNExact()):
        loss_fn(net(X), y).backward()
    diagonal = t.split(t.ggn().diagonal(dim1=1, dim2=2).sum(0))
    for name, p in net.named_parameters():
        assert_close(p.grad_batch, t.batch_grad()[name])
        assert_close(p.diag_ggn_exact, diagonal[name])


MIXED: dict[str, Callable[[Params, Tensor], Tensor]] = {
    "input": lambda p, x: F.linear(F.batch_norm(x, None, None, training=True), p["w"]),
    "hidden": lambda p, x: F.batch_norm(F.linear(x, p["w"]), None, None, training=True),
    "by_keyword": lambda p, x: F.batch_norm(input=x @ p["w"].t(), running_mean=None, running_var=None, training=True),
    "parameter_first": lambda p, x: F.batch_norm((p["w"] @ x.mT).mT, None, None, training=True),
    "in_place": lambda p, x: F.batch_norm(p["w"].repeat(len(x), 1)[: len(x)].add_(x), None, None, training=True)[:, :C],
    "without_gradient": lambda p, x: (
        F.linear(x, p["w"]) * F.batch_norm(F.linear(x, p["w"]).detach(), None, None, training=True)
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_statistics_of_samples_are_refused(name: str) -> None:
    params, X, y = {"w": torch.randn(C, 4)}, torch.randn(N, 4), torch.arange(N) % C
    functions = [cf.batch_grad, cf.diag_hessian, cf.hmp, lambda *given: cf.ggn_vp(*given, params)]
    for f in functions:
        with pytest.raises(ValueError, match="mixes the samples"):
            f(MIXED[name], params, X, y)
    with pytest.raises(ValueError, match="mixes the samples"):
        vmap(lambda w: cf.batch_grad(MIXED[name], {"w": w}, X, y))(torch.randn(2, C, 4))


class Tracked(nn.Module):
    """Weights normalized by `nn.BatchNorm1d` in training mode, which keeps running statistics of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(C, 4)), nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.norm(self.weight[None]).squeeze(0))


def test_running_statistics_of_weights() -> None:
    model_fn, params = cf.functionalize(Tracked())
    verify(model_fn, params, torch.randn(N, 4), torch.arange(N) % C)


class Clipped(nn.Module):
    """A weight that the forward pass changes in place, and samples that batch normalization mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(4, C)), nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-1, 1)
        return self.norm((x @ self.weight).mT).mean(2)


@pytest.mark.parametrize("function", [cf.batch_grad, cf.diag_ggn, cf.diag_hessian])
def test_samples_mixed_beside_a_parameter_that_is_changed(function: Callable[..., object]) -> None:
    model_fn, params = cf.functionalize(Clipped())
    with pytest.raises(ValueError, match="mixes the samples"):
        function(model_fn, params, torch.randn(N, 2, 4), torch.arange(N) % C)
