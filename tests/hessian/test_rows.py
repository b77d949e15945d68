"""Softmax and norms as weighted squares: exact, one column at a time by autograd, whichever way is taken."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformed import check_transformed

import curvfunc as cf
from curvfunc.engine.capture import capture
from curvfunc.engine.sites import Layouts
from curvfunc.hessian import choice
from curvfunc.hessian.residuals import Curvature, curvature
from curvfunc.rules.kernels import PARTS
from curvfunc.rules.nonlinear import COMPOSITES

pytestmark = pytest.mark.usefixtures("float64")

N, C = 3, 3


class Do(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def after(layer: Callable[[], nn.Module], tokens: bool = True) -> Callable[[], nn.Module]:
    """A layer right before an operation, one and an activation before that, and a layer behind it."""
    width = 8 if tokens else 4
    return lambda: nn.Sequential(
        nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), layer(), nn.Flatten(), nn.Linear(width, C)
    )  # fmt: skip


def do(function: Callable[[Tensor], Tensor], tokens: bool = True) -> Callable[[], nn.Module]:
    return after(lambda: Do(function), tokens=tokens)


class Attention(nn.Module):
    """Two heads of two entries, with a layer before."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attend, self.first, self.qkv, self.out = attend, nn.Linear(4, 4), nn.Linear(4, 12), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, -1))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2)).sum(1)


def fused(**given: Any) -> Callable[[], nn.Module]:
    return lambda: Attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **given))


class Block(nn.Module):
    """A transformer's."""

    def __init__(self, outputs: int = C) -> None:
        super().__init__()
        self.first, self.norm, self.attention = nn.Linear(4, 4), nn.LayerNorm(4), Attention(F.scaled_dot_product_attention)
        self.attention.out, self.norms = nn.Linear(4, 4), nn.LayerNorm(4)
        self.up, self.down, self.out = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.attention(self.norm(x)).unsqueeze(1)
        return self.out((x + self.down(F.gelu(self.up(self.norms(x))))).mean(1))


class Twice(nn.Module):
    """Its output is taken several times."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        p = torch.softmax(self.b(torch.tanh(self.a(x))), -1)
        return self.out(p * p + torch.tanh(p) + F.layer_norm(p, (4,)))


class Tied(nn.Module):
    """A norm whose weight and bias are made of the parameters before it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.layer_norm(self.a(x), (4,), self.a.bias + 1, self.a.weight[0]))


class Alone(nn.Module):
    """Attention of one head, which is no fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))


class Checkpoint(nn.Module):
    """What runs again in a backward pass would not be what ran in the forward pass."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), *layers, nn.Tanh(), nn.Linear(4, 4))
        self.out = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.inner, x, use_reentrant=False)
        return self.out(x if x.ndim == 2 else x.sum(1))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, C),
    )  # fmt: skip


def masked(x: Tensor) -> Tensor:
    return torch.softmax(x.masked_fill(torch.tensor([False, True, False, False]), float("-inf")), -1)


vectors = lambda: torch.randn(N, 4)
tokens = lambda: torch.randn(N, 2, 4)
MASK = torch.tensor([[0.3, float("-inf")], [-0.2, 0.1]], dtype=torch.float64)
NOTHING_LEFT = torch.tensor([[True, True], [False, False]])
RESOLVED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "softmax": (do(lambda x: x.softmax(-1), False), vectors),
    "softmax of tokens": (do(lambda x: F.softmax(x, -1)), tokens),
    "softmax over tokens": (do(lambda x: torch.softmax(x, 1) + x), tokens),
    "softmax over channels": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.Softmax2d(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(18, C)),
        lambda: torch.randn(N, 2, 4, 4),
    ),
    "softmax behind samples": (do(lambda x: x.transpose(0, 1).softmax(2).transpose(0, 1)), tokens),
    "log_softmax": (do(lambda x: F.log_softmax(x, -1), False), vectors),
    "log_softmax over tokens": (do(lambda x: x.log_softmax(1) + x), tokens),
    "softmax after a reshape": (do(lambda x: x.flatten(1).softmax(1)), tokens),
    "extreme logits": (do(lambda x: torch.softmax(300 * x, -1) + x), tokens),
    "equal logits": (do(lambda x: torch.softmax(0 * x, -1) + x), tokens),
    "softmax of one entry": (do(lambda x: torch.softmax(x.unsqueeze(-1), -1).squeeze(-1) + x), tokens),
    "masked": (do(masked, False), vectors),
    "layer norm": (after(lambda: nn.LayerNorm(4), tokens=False), vectors),
    "layer norm of tokens": (after(lambda: nn.LayerNorm(4)), tokens),
    "layer norm without weights": (after(lambda: nn.LayerNorm(4, elementwise_affine=False)), tokens),
    "layer norm of two axes": (after(lambda: nn.LayerNorm((2, 4))), tokens),
    "layer norm behind samples": (do(lambda x: F.layer_norm(x.transpose(0, 1), (4,)).transpose(0, 1)), tokens),
    "layer norm of one entry": (do(lambda x: F.layer_norm(x.unsqueeze(-1), (1,)).squeeze(-1) + x), tokens),
    "layer norm of equal entries": (do(lambda x: F.layer_norm(0 * x, (4,)) + x), tokens),
    "group norm": (after(lambda: nn.GroupNorm(2, 4), tokens=False), vectors),
    "group norm of images": (images, lambda: torch.randn(N, 2, 4, 4)),
    "group norm of one channel": (after(lambda: nn.GroupNorm(2, 2)), tokens),
    "group norm without weights": (after(lambda: nn.GroupNorm(1, 2, affine=False)), tokens),
    "rms norm": (after(lambda: nn.RMSNorm(4)), tokens),
    "rms norm of two axes": (after(lambda: nn.RMSNorm((2, 4), eps=0.1)), tokens),
    "twice": (Twice, vectors),
    "checkpoint": (lambda: Checkpoint(nn.LayerNorm(4), nn.Softmax(-1)), tokens),
    "checkpoint of parts": (lambda: Checkpoint(nn.RMSNorm(4), Alone()), tokens),
    "checkpoint of fused attention": (lambda: Checkpoint(Block(4)), tokens),
    "attention": (lambda: Attention(lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v), tokens),
    "fused attention": (fused(), tokens),
    "causal attention": (fused(is_causal=True, scale=0.3), lambda: torch.randn(N, 3, 4)),
    "masked attention": (fused(attn_mask=MASK), tokens),
    "attention to nothing": (fused(attn_mask=NOTHING_LEFT), tokens),
    "multi-head attention": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=True), nn.Flatten(), nn.Linear(8, C)),
        tokens,
    ),
    "block": (Block, tokens),
}
MODELS = RESOLVED | {
    "tied": (Tied, vectors),
    "shared keys": (fused(enable_gqa=True), tokens),
    "samples in the rows": (do(lambda x: torch.stack([torch.softmax(r, 0) + r for r in x])), tokens),
}


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
        with sdpa_kernel(SDPBackend.MATH):
            loss = F.cross_entropy(model_fn(leaves, X[n : n + 1]), y[n : n + 1]) / N
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        for (k, leaf), g in zip(leaves.items(), grads, strict=True):
            entries = [
                torch.autograd.grad(e, leaf, retain_graph=True, materialize_grads=True)[0].flatten()[i]
                for i, e in enumerate(g.flatten())
            ]
            found[k].append(torch.stack(entries).reshape(leaf.shape))
    return {k: torch.stack(v) for k, v in found.items()}


@pytest.fixture(params=["all resolved", "none resolved"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Columns of squares wherever there are such, or products with the Hessian."""
    chosen = everything if request.param == "all resolved" else (lambda found: found)
    monkeypatch.setattr("curvfunc.quantities.run.resolve", lambda trace, found: chosen(found))
    return str(request.param)


@pytest.mark.parametrize("name", MODELS)
def test_is_exact(name: str, way: str) -> None:
    model_fn, params, X, y = problem(name)
    want = diagonals(model_fn, params, X, y)
    total = {k: v.sum(0) for k, v in want.items()}
    assert_close(cf.batch_diag_hessian(model_fn, params, X, y), want, rtol=1e-9)
    assert_close(cf.diag_hessian(model_fn, params, X, y), total, rtol=1e-9)
    got = cf.batch_diag_hessian(model_fn, params, X, y, subsampling=[2, 0, 2], chunk_size=3)
    assert_close(got, {k: v[[2, 0, 2]] for k, v in want.items()}, rtol=1e-9)
    leaves = {k: p.requires_grad_() for k, p in params.items()}  # another path: the result has a graph
    assert_close(cf.diag_hessian(model_fn, leaves, X, y), total, rtol=1e-9)


def analysis(name: str, order: int) -> tuple[Any, Curvature]:
    model_fn, params, X, _ = problem(name)
    leaves, layouts = [p.detach().requires_grad_() for p in params.values()], Layouts(COMPOSITES, PARTS[order])
    rebuild = lambda values: dict(zip(params, values, strict=True))
    trace = capture(model_fn, leaves, rebuild, X, N, layouts=layouts, order=order)
    return trace, curvature(trace, leaves, layouts)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_what_can_be_resolved(name: str, order: int) -> None:
    """The test above goes both ways: all can be resolved but what normalizes by itself and what has no rows."""
    _, found = analysis(name, order)
    assert found.curved
    assert (everything(found).curved == 0) == (name in RESOLVED)


def test_columns_are_few() -> None:
    columns = lambda name: [(row.rows, row.width, row.columns) for row in analysis(name, 2)[1].rows]
    assert columns("softmax over tokens") == [(4, 2, 8)]
    assert columns("layer norm of two axes") == [(1, 8, 3)]
    assert columns("group norm of images") == [(2, 32, 6), (2, 18, 6)]
    assert columns("causal attention") == [(6, 3, 12)]
    _, found = analysis("layer norm", 2)
    assert choice.columns_beside(everything(found)) == 7  # 4 entries for what is before the norm's own layer, 3 squares
    _, found = analysis("causal attention", 2)
    softmax = choice.columns_beside(everything(found)) - sum(pair.columns for pair in found.pairs)
    assert softmax == 18  # centered, and nothing beside these


def test_the_choice_is_by_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, found = analysis("group norm of images", 2)
    assert choice.resolve(trace, found).curved == 0
    monkeypatch.setattr(choice, "PRODUCT", 0.001)
    monkeypatch.setattr(choice, "CALL", 0.0)
    assert choice.resolve(trace, found).curved == found.curved


def test_what_shifts_all_logits_alike_does_not_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The diagonal and the squares beside it would cancel up to rounding; centered columns vanish by themselves."""
    monkeypatch.setattr("curvfunc.quantities.run.resolve", lambda trace, found: everything(found))
    X, params = torch.randn(N, 4), {"w": torch.randn(6, 4), "b": torch.ones(1), "v": torch.randn(C, 3)}

    def model_fn(p: dict[str, Tensor], X: Tensor) -> Tensor:
        logits = F.linear(X, p["w"]).unflatten(1, (3, 2)).sum(2) + 1e4 * p["b"]
        return F.linear(torch.softmax(logits, -1), p["v"])

    got = cf.diag_hessian(model_fn, params, X, torch.arange(N) % C)
    assert got["w"].abs().max() > 1e-3
    assert got["b"].abs() < 1e-15  # 1e8 times what rounding leaves


@pytest.mark.parametrize("name", ["layer norm", "group norm of images", "softmax over tokens", "masked attention", "block"])
def test_under_transformations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvfunc.quantities.run.resolve", lambda trace, found: everything(found))
    model_fn, params, X, y = problem(name)
    check_transformed(model_fn, params, X, y)


@pytest.mark.parametrize("name", ["group norm of images", "rms norm of two axes", "masked attention"])
def test_under_compile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvfunc.quantities.run.resolve", lambda trace, found: everything(found))
    torch._dynamo.reset()
    model_fn, params, X, y = problem(name)
    step = torch.compile(lambda p, X, y: cf.batch_diag_hessian(model_fn, p, X, y), fullgraph=True, backend="aot_eager")
    assert_close(step(params, X, y), cf.batch_diag_hessian(model_fn, params, X, y))


@pytest.mark.parametrize("name", ["group norm"])
def test_compiled_for_all_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvfunc.quantities.run.resolve", lambda trace, found: everything(found))
    torch._dynamo.reset()
    model_fn, params, X, _ = problem(name)
    step = torch.compile(lambda p, X, y: cf.diag_hessian(model_fn, p, X, y), fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (4, 7):
        more, y = torch.cat([X, X + 1, X])[:n], torch.arange(n) % C
        assert_close(step(params, more, y), cf.diag_hessian(model_fn, params, more, y))


def test_in_single_and_half_precision(way: str) -> None:
    model_fn, params, X, y = problem("block")
    want = cf.diag_hessian(model_fn, params, X, y)
    single = cf.diag_hessian(model_fn, {k: p.float() for k, p in params.items()}, X.float(), y)
    assert_close({k: v.double() for k, v in single.items()}, want, rtol=1e-4)
    half = cf.diag_hessian(model_fn, {k: p.bfloat16() for k, p in params.items()}, X.bfloat16(), y)
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in half.values())


@pytest.mark.parametrize("name", ["rms norm", "layer norm of tokens", "fused attention", "multi-head attention"])
def test_other_quantities_of_the_same_call(name: str) -> None:
    """Functions that run in parts for the Hessian leave Kronecker factors and gradients what they are."""
    model_fn, params, X, y = problem(name)
    specs = {"h": cf.DiagHessian(), "k": cf.KFLR(), "b": cf.BatchGrad(), "v": cf.Variance()}
    together = cf.compute(model_fn, params, X, y, specs)
    for key, spec in specs.items():
        assert_close(together[key], cf.compute(model_fn, params, X, y, {key: spec})[key], rtol=1e-9)


def test_a_plan_of_the_whole_does_not_hide_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Curvature] = []
    monkeypatch.setattr("curvfunc.quantities.run.resolve", lambda trace, f: found.append(f) or f)
    model_fn, params, X, y = problem("fused attention")
    for _ in range(2):
        cf.batch_grad(model_fn, params, X, y)
    cf.diag_hessian(model_fn, params, X, y)
    assert found[-1].rows
    assert found[-1].resolvable == found[-1].curved
