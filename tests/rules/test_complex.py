"""Complex numbers inside of models: every quantity against plain autograd, one sample and one entry at a time.

Parameters and outputs are real. As maps of pairs of reals, complex products have conjugates in their gradients, and
elementwise functions have no diagonal Jacobians.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from one_by_one import truth, verify
from torch import Tensor, nn, view_as_complex, view_as_real
from torch.func import vmap

import curvfunc as cf
from curvfunc.compat import backpack, extend, extensions

pytestmark = pytest.mark.usefixtures("float64")

N, C = 4, 3
Shapes = dict[str, tuple[int, ...]]


class Case(NamedTuple):
    """A model with the shapes of its parameters, and of its input."""

    model_fn: Callable[[dict[str, Tensor], Tensor], Tensor]
    params: Shapes
    X: tuple[int, ...]
    complex_data: bool = True

    def problem(self) -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
        dtype = torch.complex128 if self.complex_data else torch.float64
        params = {k: torch.randn(shape) for k, shape in self.params.items()}
        return self.model_fn, params, torch.randn(self.X, dtype=dtype), torch.arange(N) % C


def pairs(p: Tensor) -> Tensor:
    """A parameter [..., 2] as complex numbers."""
    return view_as_complex(p)


def modulus_relu(z: Tensor, bias: Tensor) -> Tensor:
    """The modulus less a threshold, the angle unchanged."""
    return F.relu(z.abs() + bias) * z / (z.abs() + 1e-3)


def fourier_layer(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """A spectral convolution between two real layers, x [n, t, i]."""
    spectrum = torch.fft.rfft(F.linear(x, p["first"]).mT)
    mixed = torch.einsum("nit,iot->not", spectrum, pairs(p["weight"]))
    return F.linear(torch.fft.irfft(mixed, n=x.shape[1]).mean(2), p["head"])


# Complex numbers meet parameters.
USES = {
    "elementwise": Case(lambda p, x: (x * pairs(p["w"])).abs(), {"w": (3, 2)}, (N, 3)),
    "real_parameters": Case(lambda p, x: (x * p["w"]).abs() + (x + p["b"]).abs(), {"w": (3,), "b": (3,)}, (N, 3)),
    "real_input": Case(lambda p, x: (pairs(x) * pairs(p["w"])).abs(), {"w": (3, 2)}, (N, 3, 2), False),
    "reversed": Case(lambda p, x: (p["a"] - x).abs() + (p["a"] / x).real, {"a": (3,)}, (N, 3)),
    "divided": Case(lambda p, x: (x / pairs(p["w"])).real, {"w": (3, 2)}, (N, 3)),
    "conjugate": Case(lambda p, x: (x.conj() * pairs(p["w"]).conj() + x * pairs(p["w"])).real, {"w": (3, 2)}, (N, 3)),
    "linear": Case(lambda p, x: F.linear(x, pairs(p["w"]), pairs(p["b"])).abs(), {"w": (3, 3, 2), "b": (3, 2)}, (N, 3)),
    "two_parts": Case(lambda p, x: F.linear(x, torch.complex(p["a"], p["b"])).abs(), {"a": (3, 3), "b": (3, 3)}, (N, 3)),
    "positions": Case(lambda p, x: F.linear(x, pairs(p["w"])).abs().mean(1), {"w": (3, 3, 2)}, (N, 5, 3)),
    "matmul": Case(lambda p, x: (x @ pairs(p["w"]).mH).abs(), {"w": (3, 3, 2)}, (N, 3)),
    "real_matrix": Case(lambda p, x: (x @ p["w"].to(x.dtype)).abs(), {"w": (3, 3)}, (N, 3)),
    "addmm": Case(lambda p, x: torch.addmm(pairs(p["b"]), x, pairs(p["w"])).abs(), {"w": (3, 3, 2), "b": (3, 2)}, (N, 3)),
    "einsum": Case(lambda p, x: torch.einsum("ni,oij,nj->no", x.conj(), pairs(p["w"]), x).abs(), {"w": (3, 2, 2, 2)}, (N, 2)),
    "conv1d": Case(lambda p, x: F.conv1d(x, pairs(p["w"]), padding=1).abs().mean(2), {"w": (3, 2, 3, 2)}, (N, 2, 4)),
    "conv2d_real": Case(lambda p, x: F.conv2d(x, p["w"].to(x.dtype)).abs().mean((2, 3)), {"w": (3, 2, 2, 2)}, (N, 2, 3, 3)),
    "conv_transpose": Case(lambda p, x: F.conv_transpose1d(x, pairs(p["w"])).abs().mean(2), {"w": (2, 3, 2, 2)}, (N, 2, 3)),
    "polar": Case(lambda p, x: (torch.polar(p["r"].square(), p["t"]) * x).real, {"r": (3,), "t": (3,)}, (N, 3)),
    "expanded": Case(lambda p, x: (pairs(p["w"]).expand(len(x), 3) * x).abs(), {"w": (3, 2)}, (N, 3)),
    "in_place": Case(lambda p, x: x.clone().mul_(pairs(p["w"])).add_(p["b"]).abs(), {"w": (3, 2), "b": (3,)}, (N, 3)),
    "tied": Case(lambda p, x: x.real @ p["w"] + (x @ p["w"].to(x.dtype)).imag, {"w": (3, 3)}, (N, 3)),
    "threshold": Case(lambda p, x: modulus_relu(F.linear(x, pairs(p["w"])), p["b"]).real, {"w": (3, 3, 2), "b": (3,)}, (N, 3)),
    "tanh": Case(lambda p, x: torch.tanh(F.linear(x, pairs(p["w"]))).real, {"w": (3, 3, 2)}, (N, 3)),
    "softsign": Case(lambda p, x: F.softsign(F.linear(x, pairs(p["w"]))).real, {"w": (3, 3, 2)}, (N, 3)),
    "density": Case(lambda p, x: (lambda z: z.conj() * z)(F.linear(x, pairs(p["w"]))).real, {"w": (3, 3, 2)}, (N, 3)),
    "two_parts_of_features": Case(  # its second derivative has views that cannot be batched
        lambda p, x: (lambda h: torch.complex(h, h.tanh()) @ torch.complex(p["a"], p["b"]))(torch.tanh(x @ p["w"])).real,
        {"w": (3, 3), "a": (3, 3), "b": (3, 3)},
        (N, 3),
        False,
    ),
    "spectral": Case(fourier_layer, {"first": (2, 3), "weight": (2, 2, 3, 2), "head": (3, 2)}, (N, 4, 3), False),
}
# Complex numbers lie between real layers, which keep their rules.
BETWEEN = {
    "modulus": Case(lambda p, x: (torch.tanh(x @ p["w"]) * (1 + 2j)).abs() @ p["h"], {"w": (3, 4), "h": (4, 3)}, (N, 3), False),
    "complex_tanh": Case(
        lambda p, x: torch.tanh((x @ p["w"]) * (1 + 2j)).abs() @ p["h"], {"w": (3, 4), "h": (4, 3)}, (N, 3), False
    ),
    "root": Case(
        lambda p, x: torch.tanh(x @ p["w"]).to(torch.complex128).sqrt().real @ p["h"], {"w": (3, 4), "h": (4, 3)}, (N, 3), False
    ),
    "spectrum": Case(
        lambda p, x: F.linear(torch.fft.rfft(torch.tanh(F.linear(x, p["w"]))).abs().square(), p["h"]),
        {"w": (4, 3), "h": (3, 3)},
        (N, 3),
        False,
    ),
    "mixing": Case(
        lambda p, x: torch.fft.fft2(torch.tanh(x @ p["w"])).real.mean(1) @ p["h"], {"w": (3, 3), "h": (3, 3)}, (N, 4, 3), False
    ),
    "exponential": Case(
        lambda p, x: torch.exp(torch.complex(x @ p["w"], x @ p["b"])).real, {"w": (3, 3), "b": (3, 3)}, (N, 3), False
    ),
    "angle": Case(lambda p, x: torch.complex(x @ p["w"], x @ p["b"]).angle(), {"w": (3, 3), "b": (3, 3)}, (N, 3), False),
    "rotated": Case(
        lambda p, x: (
            view_as_real(pairs((x @ p["w"]).unflatten(1, (2, 2))) * torch.polar(torch.ones(2), torch.arange(2.0))).flatten(1)
            @ p["h"]
        ),
        {"w": (3, 4), "h": (4, 3)},
        (N, 3),
        False,
    ),
    "weight_by_its_spectrum": Case(
        lambda p, x: F.linear(x, torch.fft.irfft(pairs(p["w"]), n=3)), {"w": (3, 2, 2)}, (N, 3), False
    ),
}
CASES = USES | BETWEEN


@pytest.mark.parametrize("name", CASES)
def test_every_quantity(name: str) -> None:
    verify(*CASES[name].problem())


@pytest.mark.parametrize("name", BETWEEN)
def test_real_layers_keep_their_rules(name: str) -> None:
    model_fn, params, X, _ = BETWEEN[name].problem()
    assert {row.path for row in cf.explain(model_fn, params, X).rows} == {"plain"}


def test_explain_says_why_complex_uses_are_generic() -> None:
    model_fn, params, X, _ = USES["linear"].problem()
    assert [row[1:] for row in cf.explain(model_fn, params, X).rows] == [
        ("vmap", "generic", "linear takes complex numbers")
    ] * 2


FUNCTIONS = [cf.batch_grad, cf.batch_l2, cf.variance, cf.diag_ggn, cf.sqrt_ggn, cf.kflr, cf.batch_dot, cf.diag_hessian]


@pytest.mark.parametrize("name", [*BETWEEN, "linear", "conv1d", "polar", "spectral", "threshold"])
def test_vmapped_over_parameters(name: str) -> None:
    model_fn, params, X, y = CASES[name].problem()
    stacked = {k: torch.stack([p, p + 0.3 * torch.randn_like(p)]) for k, p in params.items()}
    v = {k: torch.randn_like(p) for k, p in stacked.items()}
    members = [{k: p[i] for k, p in stacked.items()} for i in range(2)]
    for f in FUNCTIONS:
        got = vmap(lambda p: f(model_fn, p, X, y))(stacked)  # noqa: B023 (called at once)
        want = [f(model_fn, p, X, y) for p in members]
        assert_close(got, optree.tree_map(lambda *r: torch.stack(r), *want), rtol=1e-9)
    for product in (cf.hessian_vp, cf.ggn_vp):
        got = vmap(lambda p, u: product(model_fn, p, X, y, u))(stacked, v)  # noqa: B023
        want = [product(model_fn, p, X, y, {k: u[i] for k, u in v.items()}) for i, p in enumerate(members)]
        assert_close(got, optree.tree_map(lambda *r: torch.stack(r), *want), rtol=1e-9)


@pytest.mark.parametrize("name", ["linear", "spectrum", "polar"])
def test_compiled(name: str) -> None:
    model_fn, params, X, y = CASES[name].problem()
    specs = (cf.BatchGrad(), cf.DiagGGN(), cf.KFLR(), cf.DiagHessian())
    compiled = torch.compile(lambda p, x: cf.compute(model_fn, p, x, y, specs), backend="aot_eager", fullgraph=True)
    assert_close(compiled(params, X), cf.compute(model_fn, params, X, y, specs), rtol=1e-9)


def test_kfra_counts_complex_tensors_to_a_step() -> None:
    """Against the same models in real numbers."""
    y, X = torch.arange(N) % C, torch.randn(N, 3)
    params = {"w": torch.randn(4, 3), "h": torch.randn(3, 4)}

    def model(step: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        return lambda p, x: F.linear(step(torch.tanh(F.linear(x, p["w"]))), p["h"])

    angles = 2 * torch.pi * torch.outer(torch.arange(4.0), torch.arange(4.0)) / 4
    for step, real in (
        (lambda h: torch.fft.fft(h).real, lambda h: h @ angles.cos()),
        (lambda h: (h * (3 + 4j)).abs(), lambda h: 5 * h.abs()),
        (lambda h: torch.fft.irfft(torch.fft.rfft(h), n=4), lambda h: h * 1),
    ):
        assert_close(cf.kfra(model(step), params, X, y), cf.kfra(model(real), params, X, y))
    with pytest.raises(NotImplementedError, match="no rule for Abs"):
        cf.kfra(model(lambda h: torch.fft.fft(h).abs()), params, X, y)


def test_positive_curvature_is_refused_for_complex_functions() -> None:
    model_fn, params, X, y = BETWEEN["complex_tanh"].problem()
    with pytest.raises(NotImplementedError, match="Tanh is neither"):
        cf.pchmp(model_fn, params, X, y)


# -- complex parameters and outputs


def test_complex_parameters_are_refused_with_the_remedy() -> None:
    params = {"w": torch.randn(3, 3, dtype=torch.complex128)}
    model_fn = lambda p, x: F.linear(x, p["w"]).abs()
    X, y = torch.randn(N, 3, dtype=torch.complex128), torch.arange(N) % C
    for f in (cf.batch_grad, cf.diag_ggn, cf.kfac, cf.diag_hessian, cf.hmp):
        with pytest.raises(TypeError, match=r"'w' has dtype torch.complex128.*pairs of reals.*view_as_complex"):
            f(model_fn, params, X, y)
    with pytest.raises(TypeError, match="a real floating-point tensor is needed"):
        cf.batch_grad(lambda p, x: F.linear(x, p["w"].to(x.dtype)), {"w": torch.randn(3, 3)}, X, y)


# -- the shim


class ComplexLinear(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 2) if dtype.is_floating_point else torch.randn(3, 3, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight.is_complex() else view_as_complex(self.weight)
        return F.linear(x.to(weight.dtype), weight).abs()


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x, n=4).abs()


@pytest.mark.parametrize("make", [Spectrum, lambda: ComplexLinear(torch.float64)])
def test_the_shim(make: Callable[[], nn.Module]) -> None:
    net = nn.Sequential(nn.Linear(3, 3), make(), nn.Linear(3, C))
    model_fn, params = cf.functionalize(net)
    X, y = torch.randn(N, 3), torch.arange(N) % C
    t = truth(model_fn, params, X, y)
    net, loss_fn = extend(net), extend(nn.CrossEntropyLoss())
    with backpack(extensions.BatchGrad(), extensions.DiagGGNExact(), extensions.DiagHessian(), extensions.KFLR()):
        loss_fn(net(X), y).backward()
    diagonals = [t.split(m.diagonal(dim1=1, dim2=2).sum(0)) for m in (t.ggn(), t.H)]
    for name, p in net.named_parameters():
        assert_close(p.grad_batch, t.batch_grad()[name], rtol=1e-9)
        assert_close(p.diag_ggn_exact, diagonals[0][name], rtol=1e-9)
        assert_close(p.diag_h, diagonals[1][name], rtol=1e-9)


def test_the_shim_refuses_complex_parameters() -> None:
    net = extend(nn.Sequential(nn.Linear(3, 3), ComplexLinear(torch.complex128)))
    loss_fn = extend(nn.CrossEntropyLoss())
    for extension in (extensions.BatchGrad(), extensions.DiagGGNExact(), extensions.DiagHessian()):
        loss = loss_fn(net(torch.randn(N, 3)), torch.arange(N) % C)
        with backpack(extension), pytest.raises(NotImplementedError, match=r"'1.weight' has dtype torch.complex128"):
            loss.backward()


def test_convolutions_whose_kernel_does_not_run_backwards_under_vmap() -> None:
    """Of weights as vmap lays them out; then samples run one by one."""
    X, y = torch.randn(2, 1, 3), torch.tensor([0, 1])
    params = {"a": 0.5 * torch.randn(3, 3, 3), "b": 0.5 * torch.randn(3, 3, 3)}

    def model(p: Any, x: Tensor) -> Tensor:
        z = torch.fft.fft(x, dim=-1)
        return F.conv1d(z.mT, torch.polar(p["a"].exp(), p["b"]), padding=1).mT.abs().mean(1)

    got = cf.diag_hessian(model, params, X, y)
    step = 1e-5 * torch.eye(27)
    for k, p in params.items():

        def slope(e: Tensor, k: str = k, p: Tensor = p) -> Tensor:
            leaf = (p + e.view_as(p)).requires_grad_()
            return torch.autograd.grad(F.cross_entropy(model({**params, k: leaf}, X), y), leaf)[0].flatten()

        want = torch.stack([(slope(e)[i] - slope(-e)[i]) / 2e-5 for i, e in enumerate(step)])
        assert_close(got[k].flatten(), want, 1e-6)
    stacked = {k: torch.stack([p, 2 * p]) for k, p in params.items()}
    together = torch.vmap(lambda p: cf.batch_grad(model, p, X, y))(stacked)
    for i in range(2):
        alone = cf.batch_grad(model, {k: t[i] for k, t in stacked.items()}, X, y)
        assert_close({k: t[i] for k, t in together.items()}, alone)
