"""Products of two tensors that both depend on parameters: exact, one column at a time by autograd, whichever way is taken."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from transformed import check_transformed

import curvfunc as cf
from curvfunc.engine.capture import capture
from curvfunc.engine.sites import Layouts
from curvfunc.hessian import choice
from curvfunc.hessian.residuals import Curvature, curvature
from curvfunc.rules.nonlinear import COMPOSITES

pytestmark = pytest.mark.usefixtures("float64")

N, C = 3, 3


class Gate(nn.Module):
    """Before the gate and the gated there is a layer that both take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.h, self.g, self.out = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.out(torch.sigmoid(self.g(x)) * self.h(x))


class Excite(nn.Module):
    """Squeeze and excitation, [n, c, 1, 1] times [n, c, h, w], or with the factors turned."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned, self.down, self.up = turned, nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return x * scale if self.turned else scale * x


def squeeze(turned: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), Excite(turned), nn.Conv2d(4, 4, 2, groups=2), nn.ReLU(inplace=True),
        Excite(turned), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, C),
    )  # fmt: skip


class Scores(nn.Module):
    """Linear attention: products of matrices, for one head or several, whose columns are of queries, keys or values."""

    def __init__(self, heads: int, width: int = 4) -> None:
        super().__init__()
        self.heads, self.qk, self.v, self.out = heads, nn.Linear(4, 2 * width), nn.Linear(4, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, -1)
        v = self.v(x)
        if self.heads > 1:
            q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = (q @ k.mT) @ v
        return self.out((x.transpose(1, 2).flatten(2) if self.heads > 1 else x).mean(1))


class Attention(Scores):
    """With the softmax."""

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, -1)
        return self.out((torch.softmax(q @ k.mT, -1) @ self.v(x)).mean(1))


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(4, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.out(x * x + x * torch.tanh(x) + x * x.detach())


class Inplace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.out((x + 0).mul_(torch.sigmoid(self.b(x))).tanh_())


class SamplesSecond(nn.Module):
    """Sequence first, and a gate for each sample, [1, n, 4] times [t, n, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).transpose(0, 1)
        return self.out((x * torch.sigmoid(self.g(x.mean(0, keepdim=True)))).sum(0))


class Outer(nn.Module):
    """Each operand is the smaller one along an axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(6, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.out((x.unsqueeze(2) * self.b(x).unsqueeze(1)).flatten(1))


class Rms(nn.Module):
    """A norm by hand: a factor for each row, and its square."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(4, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.out((x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt()).mean(1))


class Generic(nn.Module):
    """A use without a rule, for which samples run under vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.out = nn.Linear(4, 4), nn.Parameter(torch.rand(4) + 1), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.pow(self.a(x).square() + 1, self.g)
        return self.out(x * torch.sigmoid(x.sum(-1, keepdim=True) / 9))


def norms() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, C))


vectors = lambda: torch.randn(N, 4)
images = lambda: torch.randn(N, 2, 4, 4)
tokens = lambda: torch.randn(N, 2, 4)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "gate": (Gate, vectors),
    "gate of tokens": (lambda: nn.Sequential(Gate(), nn.Flatten(), nn.Linear(2 * C, C)), tokens),
    "squeeze and excitation": (squeeze, images),
    "squeeze and excitation, turned": (lambda: squeeze(True), images),
    "scores": (lambda: Scores(1), tokens),
    "scores of two heads": (lambda: Scores(2), tokens),
    "scores, many tokens": (lambda: Scores(2), lambda: torch.randn(N, 6, 4)),
    "square": (Square, vectors),
    "in place": (Inplace, vectors),
    "samples second": (SamplesSecond, tokens),
    "outer product": (Outer, vectors),
    "norm by hand": (Rms, tokens),
    "generic": (Generic, vectors),
    "attention": (lambda: Attention(1), tokens),
    "layer norm": (norms, vectors),
    "softmax": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Softmax(1), nn.Linear(5, C)), vectors),
    "softmax of a gate": (lambda: nn.Sequential(Gate(), nn.Softmax(1), nn.Linear(C, C)), vectors),
}
NOT_RESOLVED = {"generic"}


def everything(found: Curvature) -> Curvature:
    return found.resolved(found.resolvable)


def problem(name: str) -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    build, data = MODELS[name]
    return (*cf.functionalize(build()), data(), torch.arange(N) % C)


def diagonals(model_fn: Any, params: dict[str, Tensor], X: Tensor, y: Tensor) -> dict[str, Tensor]:
    """[n, *shape], by autograd, one sample and one column at a time."""
    found: dict[str, list[Tensor]] = {k: [] for k in params}
    for n in range(N):
        leaves = {k: p.detach().clone().requires_grad_() for k, p in params.items()}
        loss = F.cross_entropy(model_fn(leaves, X[n : n + 1]), y[n : n + 1]) / N
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        for (k, leaf), g in zip(leaves.items(), grads, strict=True):
            entries = [
                torch.autograd.grad(e, leaf, retain_graph=True, materialize_grads=True)[0].flatten()[i]
                for i, e in enumerate(g.flatten())
            ]
            found[k].append(torch.stack(entries).reshape(leaf.shape))
    return {k: torch.stack(v) for k, v in found.items()}


@pytest.fixture(params=["chosen", "all resolved", "none resolved"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is chosen, columns of squares wherever there are such, or products with the Hessian."""
    way: str = request.param
    if way != "chosen":
        chosen = everything if way == "all resolved" else (lambda found: found)
        monkeypatch.setattr("curvfunc.quantities.run.resolve", lambda trace, found: chosen(found))
    return way


@pytest.mark.parametrize("name", MODELS)
def test_is_exact(name: str, way: str) -> None:
    model_fn, params, X, y = problem(name)
    want = diagonals(model_fn, params, X, y)
    assert_close(cf.batch_diag_hessian(model_fn, params, X, y), want, rtol=1e-9)
    assert_close(cf.diag_hessian(model_fn, params, X, y), {k: v.sum(0) for k, v in want.items()}, rtol=1e-9)
    index = [2, 0, 2]
    got = cf.batch_diag_hessian(model_fn, params, X, y, subsampling=index, chunk_size=3)
    assert_close(got, {k: v[index] for k, v in want.items()}, rtol=1e-9)


def analysis(name: str) -> tuple[Any, Curvature]:
    model_fn, params, X, _ = problem(name)
    leaves, layouts = [p.detach().requires_grad_() for p in params.values()], Layouts(COMPOSITES)
    rebuild = lambda values: dict(zip(params, values, strict=True))
    trace = capture(model_fn, leaves, rebuild, X, N, layouts=layouts, order=2)
    return trace, curvature(trace, leaves, layouts)


@pytest.mark.parametrize("name", MODELS)
def test_what_can_be_resolved(name: str) -> None:
    """The test above goes both ways: all can be resolved but samples under vmap."""
    _, found = analysis(name)
    assert found.curved
    if name in NOT_RESOLVED:
        assert not found.resolvable
    else:
        assert everything(found).curved == 0


def test_as_many_columns_as_the_smaller_operand_has() -> None:
    _, found = analysis("squeeze and excitation")
    assert [pair.columns for pair in found.pairs] == [8, 8]  # 4 channels, not 4 of 16 pixels each
    _, found = analysis("scores, many tokens")
    assert [pair.columns for pair in found.pairs] == [48]  # 6 x 4 entries of queries or keys; values are of other parameters
    _, found = analysis("square")
    assert sorted(pair.columns for pair in found.pairs) == [5, 10]  # of a square, half as many


def test_the_choice_is_by_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, found = analysis("squeeze and excitation")
    assert choice.resolve(trace, found).curved == 0  # columns for images go with a gate for each channel
    monkeypatch.setattr(choice, "PRODUCT", 0.001)
    monkeypatch.setattr(choice, "CALL", 0.0)
    assert choice.resolve(trace, found).curved == found.curved


def test_a_warning_counts_columns_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvfunc.quantities.run.resolve", lambda trace, found: everything(found))
    monkeypatch.setattr("curvfunc.hessian.diagonal.MANY_COLUMNS", 15)
    with pytest.warns(UserWarning, match="takes 16 columns"):
        cf.diag_hessian(*problem("squeeze and excitation"))


def test_operands_of_very_different_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference of squares loses nothing: in single precision, with a loss that is scaled down."""
    monkeypatch.setattr("curvfunc.quantities.run.resolve", lambda trace, found: everything(found))
    model_fn, params, X, y = problem("squeeze and excitation")
    loss = lambda out, y: 1e-8 * F.cross_entropy(out, y)
    want = cf.diag_hessian(model_fn, params, X, y, loss_fn=loss)
    got = cf.diag_hessian(model_fn, {k: p.float() for k, p in params.items()}, X.float(), y, loss_fn=loss)
    assert_close({k: v.double() for k, v in got.items()}, want, rtol=1e-4)


TRANSFORMED = ["gate", "squeeze and excitation", "scores of two heads"]


@pytest.mark.parametrize("name", TRANSFORMED)
def test_under_transformations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvfunc.quantities.run.resolve", lambda trace, found: everything(found))
    model_fn, params, X, y = problem(name)
    check_transformed(model_fn, params, X, y)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_under_compile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvfunc.quantities.run.resolve", lambda trace, found: everything(found))
    torch._dynamo.reset()
    model_fn, params, X, y = problem(name)
    step = torch.compile(lambda p, X, y: cf.diag_hessian(model_fn, p, X, y), fullgraph=True, backend="aot_eager")
    assert_close(step(params, X, y), cf.diag_hessian(model_fn, params, X, y))


def test_batch_norm_of_single_pixels_leaves_activations_in_place_visible() -> None:
    """Its kernel takes such images as sequences; of a view of them, the graph would not tell what changes it."""
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3, C)).eval()
    model_fn, params = cf.functionalize(net)
    X, y = torch.randn(N, 2, 2, 2), torch.arange(N) % C
    leaves, layouts = [p.detach().requires_grad_() for p in params.values()], Layouts(COMPOSITES)
    trace = capture(model_fn, leaves, lambda v: dict(zip(params, v, strict=True)), X, N, layouts=layouts, order=2)
    assert curvature(trace, leaves, layouts).curved == 0
    assert_close(cf.batch_diag_hessian(model_fn, params, X, y), diagonals(model_fn, params, X, y), rtol=1e-9)
