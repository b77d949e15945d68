"""Columns of backward passes where sizes are symbols: the same as one by one, and no symbol is bound."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import curvfunc
from curvfunc import functionalize
from curvfunc.engine import symbolic
from curvfunc.engine.columns import over_columns

pytestmark = pytest.mark.usefixtures("float64")

N, V = 4, 3
ROWS, SEQUENCE, IMAGE, VOLUME = (N, 6), (N, 6, 8), (N, 4, 8, 8), (N, 2, 6, 6, 6)
WEIGHT = torch.linspace(-1, 1, 4 * 4 * 3 * 3, dtype=torch.float64).reshape(4, 4, 3, 3)
PLACES = torch.tensor([0, 2, 2])
up = lambda **options: lambda x: F.interpolate(x, scale_factor=2, **options)
pad = lambda mode, *by: lambda x: F.pad(x, by, mode)
norm = lambda x: F.batch_norm(x, torch.zeros(4), torch.full((4,), 2.0), torch.full((4,), 3.0), torch.ones(4))

# what has a rule, or is made of what has
WITH_RULES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "slice": (lambda x: x[:, 1:4], ROWS),
    "steps": (lambda x: x[:, ::2], ROWS),
    "select": (lambda x: x[:, 0] * x[:, -1], SEQUENCE),
    "chunks": (lambda x: torch.cat([t.sin() for t in x.chunk(3, 1)], 1), ROWS),
    "splits": (lambda x: torch.stack([t.sum(1).sin() for t in x.split([2, 4], 1)], -1), ROWS),
    "unbind": (lambda x: x.unbind(1)[1], SEQUENCE),
    "stack": (lambda x: torch.stack([x, x.sin()], -2), ROWS),
    "index": (lambda x: x[:, PLACES], SEQUENCE),
    "indices": (lambda x: x[:, PLACES, PLACES], SEQUENCE),
    "index_select": (lambda x: x.index_select(-1, PLACES), SEQUENCE),
    "gather": (lambda x: x.gather(1, PLACES.expand(len(x), 3)), ROWS),
    "scatter": (lambda x: torch.zeros(len(x), 9).scatter(1, torch.arange(6).flip(0).expand(len(x), 6), x), ROWS),
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), SEQUENCE),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), IMAGE),
    "max_pool3d": (lambda x: F.max_pool3d(x, 2), VOLUME),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 2), SEQUENCE),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), IMAGE),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2), VOLUME),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 3), SEQUENCE),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (3, 1)), IMAGE),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 3), IMAGE),
    "adaptive_max_pool3d": (lambda x: F.adaptive_max_pool3d(x, 2), VOLUME),
    "bilinear": (up(mode="bilinear"), IMAGE),
    "nearest": (up(), IMAGE),
    "bicubic": (up(mode="bicubic", align_corners=True), IMAGE),
    "linear": (up(mode="linear"), SEQUENCE),
    "reflect": (pad("reflect", 1, 2, 1, 0), IMAGE),
    "replicate": (pad("replicate", 1, 2), SEQUENCE),
    "zeros": (pad("constant", 1, 2), IMAGE),
    "batch_norm": (norm, IMAGE),
    "group_norm": (lambda x: F.group_norm(x, 2, torch.ones(4), torch.ones(4)), IMAGE),
    "layer_norm": (lambda x: F.layer_norm(x, (6,)), ROWS),
    "conv2d": (lambda x: F.conv2d(x, WEIGHT, stride=2, padding=1), IMAGE),
    "groups": (lambda x: F.conv2d(x, WEIGHT[:, :2], groups=2), IMAGE),
    "conv_transpose2d": (lambda x: F.conv_transpose2d(x, WEIGHT, stride=2), IMAGE),
    "unfold": (lambda x: F.fold(F.unfold(x, 3) * 2, (8, 8), 3), IMAGE),
    "windows": (lambda x: x.unfold(2, 3, 2), SEQUENCE),
    "matmul": (lambda x: x @ x.mT @ WEIGHT[0, 0, :2].new_ones(6, 2), SEQUENCE),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), SEQUENCE),
    "softmax": (lambda x: x.softmax(-1) + x.log_softmax(0), ROWS),
    "logsumexp": (lambda x: x.logsumexp(1), ROWS),
    "gelu": (lambda x: F.gelu(x) + F.silu(x) + F.mish(x), ROWS),
    "elu": (lambda x: F.elu(x) + F.softplus(x) + F.logsigmoid(x), ROWS),
    "kinks": (lambda x: F.leaky_relu(x) + F.relu(x) + F.hardtanh(x) + F.softshrink(x) + F.hardswish(x), ROWS),
    "prelu": (lambda x: F.prelu(x, torch.full((6,), 0.3)), SEQUENCE),
    "glu": (lambda x: F.glu(x, -1), SEQUENCE),
    "statistics": (lambda x: x.mean((0, 2)) + x.var(2).sum(0) + x.norm() + x.amax((0, -1)), SEQUENCE),
    "sorted": (lambda x: x.sort(1).values + x.max(1, keepdim=True).values, SEQUENCE),
    "cumsum": (lambda x: x.cumsum(-1), SEQUENCE),
    "axes": (lambda x: x.permute(2, 0, 1).flip(0).transpose(0, -1).unsqueeze(1).expand(-1, 2, -1, -1), SEQUENCE),
    "reshaped": (lambda x: x.flatten(1).unflatten(1, (3, -1)).squeeze(0).repeat(1, 2, 1), SEQUENCE),
    "rolled": (lambda x: x.roll(1, -1).tril() + x.roll((1, 2), (0, 1)), SEQUENCE),
    "diagonal": (lambda x: x.diagonal(1, -2, -1), SEQUENCE),
    "shuffled": (lambda x: F.pixel_shuffle(x, 2).repeat(1, 4, 1, 1) + F.pixel_shuffle(F.channel_shuffle(x, 2), 2), IMAGE),
    "chosen": (lambda x: torch.where(x > 0, x.square(), 1 / (x - 9)).clamp(-1, 1), ROWS),
    "broadcast": (lambda x: x[:, :, 0] * x[0, 0, 1] + torch.ones(2, 1, 1) * x[:, :, 1], SEQUENCE),
}
# what is taken column by column
WITHOUT: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "cdist": (lambda x: torch.cdist(x, x.detach() + 1), SEQUENCE),
    "bilinear form": (lambda x: F.bilinear(x, x, torch.ones(2, 6, 6)), ROWS),
    "grid_sample": (lambda x: F.grid_sample(x, torch.full((len(x), 3, 3, 2), 0.3), align_corners=False), IMAGE),
    "solve": (lambda x: torch.linalg.solve(9 * torch.eye(6) + x[:, :, :6], x), SEQUENCE),
}


def backward_of(function: Callable[[Tensor], Tensor], x: Tensor, twice: bool) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    x = x.detach().requires_grad_()
    out = function(1.5 * x)
    if twice:
        (out,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
    columns = torch.stack([((v + 1) * out.detach() + v).cos() for v in range(V)])
    return lambda c: torch.autograd.grad(out, x, c, retain_graph=True, materialize_grads=True)[0], columns


@pytest.fixture
def looped(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The operations that are taken column by column."""
    found: list[Any] = []
    plain = symbolic._one_by_one
    monkeypatch.setattr(symbolic, "_one_by_one", lambda func, *given: found.append(func) or plain(func, *given))
    return found


@pytest.mark.parametrize("name", [*WITH_RULES, *WITHOUT])
def test_columns_are_those_of_plain_autograd(name: str, looped: list[Any]) -> None:
    function, shape = (WITH_RULES | WITHOUT)[name]
    backward, columns = backward_of(function, torch.randn(shape), twice=False)
    assert_close(symbolic.batched(backward, columns), torch.stack([backward(c) for c in columns]))
    assert bool(looped) == (name in WITHOUT)
    nested = columns[:, None] * torch.linspace(1, 2, 2).reshape(2, *[1] * (columns.ndim - 1))
    got = symbolic.batched(lambda c: symbolic.batched(backward, c), nested)
    assert_close(got, torch.stack([torch.stack([backward(c) for c in outer]) for outer in nested]))


@pytest.mark.parametrize("name", [name for name in WITH_RULES if name != "group_norm"] + ["bilinear form", "solve"])
def test_columns_of_second_derivatives(name: str) -> None:
    function, shape = (WITH_RULES | WITHOUT)[name]
    backward, columns = backward_of(function, torch.randn(shape), twice=True)
    assert_close(symbolic.batched(backward, columns), torch.stack([backward(c) for c in columns]))


def test_several_columns_and_what_does_not_depend_on_them() -> None:
    x = torch.randn(N, 2, requires_grad=True)
    a, b = torch.randn(V, N, 2), torch.randn(V, N)

    def backward(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad([x.sin(), x.prod(1)], x, [a, b])
        return *grads, x.detach() * 2

    want = [torch.stack(parts) for parts in zip(*map(backward, a, b), strict=True)]
    assert_close(symbolic.batched(backward, a, b), tuple(want))


def test_where_vmap_has_to_do_it() -> None:
    """Graphs of the columns, and changes of what is no column."""
    x = torch.randn(N, 2, requires_grad=True)
    columns = torch.randn(V, N, 2)
    kept = lambda c: torch.autograd.grad(x.sin(), x, c, create_graph=True)[0]
    assert symbolic.batched(kept, columns) is None
    in_place = lambda c: torch.zeros(N, 2).add_(c)
    assert symbolic.batched(in_place, columns) is None
    assert_close(over_columns(lambda c: c * 2, columns), columns * 2)


def test_what_vmap_gets_is_unchanged() -> None:
    columns = torch.randn(V, N, 6)
    before = columns.clone()

    def backward(c: Tensor) -> Tensor:
        c.mul_(2.0)
        return torch.zeros(N, 6).add_(c)

    assert symbolic.batched(backward, columns) is None
    assert torch.equal(columns, before)


@pytest.mark.parametrize("name", ["max_pool2d", "conv2d", "slice", "layer_norm", "gelu", "index_select"])
def test_no_symbol_is_bound(name: str) -> None:
    function, shape = WITH_RULES[name]

    def call(x: Tensor) -> Tensor:
        return over_columns(*backward_of(function, x, twice=False))  # type: ignore[no-any-return]

    graph = make_fx(call, tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.randn(5, *shape[1:]))
    x = torch.randn(7, *shape[1:])
    backward, columns = backward_of(function, x, twice=False)
    assert_close(graph(x), torch.stack([backward(c) for c in columns]))


# --- whole calls ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _anew() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Gated(nn.Module):
    """Positions with a gate each, all of them scaled by what they are in the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.last = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.a(x[:, 0])) * self.b(x[:, 0])
        x = x * self.c(x.mean(1)).sigmoid().unsqueeze(1)
        return self.last(x).mean(1)


class Recurrent(nn.Module):
    """Words in an order."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.gru, self.last = nn.Embedding(7, 2), nn.GRU(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gru(self.words(x))[0][:, -1])


def pooled() -> nn.Module:
    first = nn.Conv2d(1, 2, 2), nn.GroupNorm(1, 2), nn.GELU(), nn.MaxPool2d(2)
    second = nn.ReflectionPad2d(1), nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2), nn.AvgPool2d(2, 1)
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(4, 3)).eval()


def smooth() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.ConvTranspose2d(2, 2, 2), nn.Flatten(), nn.Linear(72, 3)
    ).eval()


def normalized() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(36, 3)))


def looked_up() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 2, padding_idx=1), nn.Flatten(), nn.Linear(4, 3))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3))


images = lambda n: torch.randn(n, 1, 6, 6)
words = lambda n: torch.randint(7, (n, 2))
products = lambda *args: (curvfunc.hessian_vp(*args, args[1]), curvfunc.ggn_vp(*args, args[1]))
of = lambda *specs: lambda *args: curvfunc.compute(*args, specs)
total = lambda out, y: (out.exp() - out * y[:, None]).sum()
estimate = lambda *args: curvfunc.diag_hessian(*args, mc_samples=2)

CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], Callable[..., Any]]] = {
    "pools": (pooled, images, of(curvfunc.DiagGGN(), curvfunc.KFLR(), curvfunc.SqrtGGN())),
    "second derivatives of convolutions": (smooth, images, products),
    "estimates": (smooth, images, estimate),
    "gates": (Gated, images, curvfunc.diag_hessian),
    "normalized weights": (normalized, images, curvfunc.batch_l2),
    "recurrent": (Recurrent, words, of(curvfunc.BatchL2(), curvfunc.DiagGGN())),
    "embeddings": (looked_up, words, lambda *args: curvfunc.ggn_vp(*args, args[1])),
    "Jacobians": (mlp, images, lambda model_fn, params, X, y: curvfunc.batch_jac(model_fn, params, X)),
    "sums": (mlp, images, lambda *args: curvfunc.clipped_grad(*args, max_norm=0.1, loss_fn=total)),
}


def check_compiled_once(name: str, graphs: int, **options: Any) -> None:
    make, inputs, function = CALLS[name]
    model_fn, params = functionalize(make())
    compiled = torch.compile(lambda p, X, y: function(model_fn, p, X, y), fullgraph=True, **options)
    for n in (5, 7, 9):
        X, y = inputs(n), torch.arange(n) % 3
        torch.manual_seed(1)
        want = function(model_fn, params, X, y)
        torch.manual_seed(1)
        assert_close(compiled(params, X, y), want, 1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.usefixtures("_anew")
@pytest.mark.parametrize("name", CALLS)
def test_no_size_after_the_second_is_compiled(name: str) -> None:
    check_compiled_once(name, 2, backend="aot_eager")


@pytest.mark.usefixtures("_anew")
def test_no_size_after_the_first_is_compiled_where_sizes_are_symbols_from_the_first() -> None:
    check_compiled_once("pools", 1, backend="eager", dynamic=True)
