"""The Hessian's diagonal against dense Hessians of torch.func, and against BackPACK where it supports the net."""

import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import backpack_peer
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import grad, hessian, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvfunc as cf
from curvfunc import compute
from curvfunc.engine.capture import capture
from curvfunc.engine.sites import Layouts
from curvfunc.hessian.residuals import curvature
from curvfunc.rules.nonlinear import COMPOSITES, curve

pytestmark = pytest.mark.usefixtures("float64")

N, C = 3, 3
Case = tuple[Callable[[], nn.Module], Callable[[], Any]]


# ----------------------------------------------------------------------------------------------------------------- truth


def dense(
    model_fn: Any, params: dict[str, Tensor], X: Any, y: Any, loss_fn: Any = F.cross_entropy, forward: bool = False
) -> dict[str, Tensor]:
    """The diagonal of each parameter's dense Hessian, by reverse over reverse mode; forward over reverse on request.

    Some operations (hardsigmoid, weight norm, fused attention) lack one of the modes.
    """
    second = hessian if forward else lambda f: jacrev(jacrev(f))

    def diagonal(name: str, p: Tensor) -> Tensor:
        full = second(lambda q: loss_fn(model_fn({**params, name: q}, X), y))(p)
        return full.reshape(p.numel(), p.numel()).diagonal().reshape(p.shape)

    # torch's own derivative of its weight norm's backward pass is wrong
    written_out = patch.object(torch, "_weight_norm", lambda v, g, dim: v * (g / v.norm(dim=1 - dim, keepdim=True)))
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), written_out:
        warnings.filterwarnings("ignore", "There is a performance drop")
        return {name: diagonal(name, p) for name, p in params.items()}


def verify(net: nn.Module, X: Any, y: Any = None, loss_fn: Any = F.cross_entropy, forward: bool = False) -> None:
    """Both quantities on the whole batch, and on a subset with a repeated sample."""
    y = torch.arange(N) % C if y is None else y
    model_fn, params = cf.functionalize(net)
    total = cf.diag_hessian(model_fn, params, X, y, loss_fn=loss_fn)
    assert_close(total, dense(model_fn, params, X, y, loss_fn, forward), rtol=1e-9)
    batched = cf.batch_diag_hessian(model_fn, params, X, y, loss_fn=loss_fn)
    assert_close({k: v.sum(0) for k, v in batched.items()}, total, rtol=1e-9)
    index = [1, 0, 1]
    chosen = cf.batch_diag_hessian(model_fn, params, X, y, loss_fn=loss_fn, subsampling=index, chunk_size=2)
    assert_close(chosen, {k: v[index] for k, v in batched.items()}, rtol=1e-9)
    summed = cf.diag_hessian(model_fn, params, X, y, loss_fn=loss_fn, subsampling=index)
    assert_close(summed, {k: v[index].sum(0) for k, v in batched.items()}, rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------------- models


ACTIVATIONS = [
    nn.CELU, nn.ELU, nn.GELU, lambda: nn.GELU("tanh"), nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus,
    nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, lambda: nn.Softmax(1), lambda: nn.LogSoftmax(1), lambda: nn.Softmin(1),
]  # fmt: skip


class Glu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.glu(torch.cat([x, x.flip(1)], 1), 1)


class Hardsigmoid(nn.Module):
    """As nn.Hardsigmoid, which torch.func cannot differentiate twice."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6


class ResNet(nn.Module):
    """Tanh, two skip connections, batch norm, an input shared by two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1)
        self.shortcut = nn.Conv2d(3, 3, 1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, C)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = torch.tanh(self.shortcut(x) + self.norm(self.conv2(F.softplus(self.conv1(x)))))
        x = x + torch.sin(x)
        return self.fc(x.mean((2, 3)))


class Arithmetic(nn.Module):
    """Elementwise arithmetic, with constants and with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, C)
        self.scale = nn.Parameter(torch.rand(5) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        h = torch.exp(z / 4) + 0.3 * z**2 + torch.sin(z) - 1 / (3 + z.cos())
        z = self.b(h) * self.scale
        h = torch.log1p(z.abs()) + z.pow(3) / 9 + torch.erf(z) + (z.square() + 1).sqrt() + 2.0 / (1 + z.exp())
        return self.out(h / (1 + torch.exp(self.scale)))


class Products(nn.Module):
    """Products and quotients of tensors that depend on the same parameters, and in part on different ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.out = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.a(x))
        gate = torch.sigmoid(self.gate(x))  # a and the gate do not share parameters, a and a / (1 + |a|) do
        return self.out(a * gate + a / (1 + a.abs()) + a * a)


class Tied(nn.Module):
    """A layer that is applied to its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.sigmoid(self.a(torch.tanh(self.a(x)))))


class Twice(nn.Module):
    """A layer that is applied to two inputs, neither of which depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.sigmoid(self.a(x)) + torch.tanh(self.a(2 * x)))


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(C, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(self.embed(x)).sum(1)), self.embed.weight)


class Transformer(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layer = nn.TransformerEncoderLayer(
            4, 2, 5, dropout=0.0, batch_first=True, activation="gelu", norm_first=norm_first
        )
        self.out = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.embed(x)).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell, self.out = kind(2, 2, batch_first=True), nn.Linear(2, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0][:, -1])


class Hidden(torch.autograd.Function):
    """x² by a function that only autograd sees."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g

    generate_vmap_rule = True


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(Hidden.apply(self.a(x)))


class Slices(nn.Module):
    """An activation in place on a slice, and on a transposed layout."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(3, 2), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1
        h[:, :3].sigmoid_()
        h = h.unflatten(1, (2, 3)).transpose(0, 1)  # samples second
        return self.out(torch.tanh(self.b(h)).transpose(0, 1).flatten(1))


def mlp(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


MODELS: dict[str, Case] = {
    "cnn": (
        lambda: mlp(
            nn.Conv2d(2, 3, 3), nn.Sigmoid(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, padding=1), nn.Sigmoid(),
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, C),
        ),
        lambda: torch.randn(N, 2, 6, 6),
    ),
    "resnet": (ResNet, lambda: torch.randn(N, 2, 4, 4)),
    "batch norm before activation": (
        lambda: mlp(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.Linear(9, C)),
        lambda: torch.randn(N, 2, 4),
    ),
    "groups": (
        lambda: mlp(
            nn.Conv2d(2, 4, 2, groups=2), nn.SiLU(), nn.Conv2d(4, 4, 2, groups=2, dilation=2), nn.Tanh(), nn.Flatten(),
            nn.Linear(4, C),
        ),
        lambda: torch.randn(N, 2, 4, 4),
    ),
    "transposed": (
        lambda: mlp(
            nn.ConvTranspose1d(2, 3, 2, stride=2), nn.Sigmoid(), nn.ConvTranspose1d(3, 2, 2), nn.Tanh(), nn.Flatten(),
            nn.Linear(14, C),
        ),
        lambda: torch.randn(N, 2, 3),
    ),
    "shared positions": (
        lambda: mlp(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, C)),
        lambda: torch.randn(N, 2, 4),
    ),
    "deep": (
        lambda: mlp(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 4),
                    nn.ELU(inplace=True), nn.Linear(4, 3), nn.Sigmoid(), nn.Tanh(), nn.Linear(3, C)),
        lambda: torch.randn(N, 4),
    ),
    "norms": (
        lambda: mlp(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, C)),
        lambda: torch.randn(N, 4),
    ),
    "group norm": (
        lambda: mlp(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv1d(4, 2, 2, bias=False),
                    nn.InstanceNorm1d(2, affine=True), nn.Flatten(), nn.Linear(8, C)),
        lambda: torch.randn(N, 2, 6),
    ),
    "glu": (lambda: mlp(nn.Linear(4, 4), Glu(), nn.Linear(4, C)), lambda: torch.randn(N, 4)),
    "arithmetic": (Arithmetic, lambda: torch.randn(N, 4)),
    "products": (Products, lambda: torch.randn(N, 4)),
    "tied": (Tied, lambda: torch.randn(N, 4)),
    "twice": (Twice, lambda: torch.randn(N, 4)),
    "tied embedding": (TiedEmbedding, lambda: torch.randint(0, C, (N, 2))),
    "post-norm transformer": (lambda: Transformer(False), lambda: torch.randint(0, 5, (N, 2))),
    "pre-norm transformer": (lambda: Transformer(True), lambda: torch.randint(0, 5, (N, 2))),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: torch.randn(N, 3, 2)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: torch.randn(N, 3, 2)),
    "weight norm": (
        lambda: mlp(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, C)),
        lambda: torch.randn(N, 4),
    ),
    "custom function": (Custom, lambda: torch.randn(N, 4)),
    "slices": (Slices, lambda: torch.randn(N, 4)),
}  # fmt: skip


@pytest.mark.parametrize("make", ACTIVATIONS, ids=lambda make: getattr(make, "__name__", "lambda"))
def test_activations(make: Callable[[], nn.Module]) -> None:
    build = Hardsigmoid if make is nn.Hardsigmoid else make
    state = mlp(nn.Linear(4, 5), build(), nn.Linear(5, 4), build(), nn.Linear(4, 4), build(), nn.Linear(4, C))
    X, y = torch.randn(N, 4), torch.arange(N) % C
    verify(state, X, y)
    if build is not make:  # the operation itself gives what its replacement gives
        net = mlp(nn.Linear(4, 5), make(), nn.Linear(5, 4), make(), nn.Linear(4, 4), make(), nn.Linear(4, C))
        net.load_state_dict(state.state_dict())
        assert_close(_diagonal(net, X, y), _diagonal(state, X, y))
        attending = mlp(net, nn.Softmax(1))  # where Hessian-vector products go through it
        assert_close(_diagonal(attending, X, y), _diagonal(mlp(state, nn.Softmax(1)), X, y))


def _diagonal(net: nn.Module, X: Any, y: Any) -> dict[str, Tensor]:
    return cf.diag_hessian(*cf.functionalize(net), X, y)


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    build, data = MODELS[name]
    net = build().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_()
    verify(net, data(), forward=name in ("cnn", "tied", "lstm"))


# ---------------------------------------------------------------------------------------------------------------- losses


def non_convex(out: Tensor, y: Tensor) -> Tensor:
    return (torch.sin(out) * y + out.prod(1, keepdim=True)).sum()


LOSSES: dict[str, tuple[Any, Callable[[], Tensor]]] = {
    "cross-entropy": (nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum"), lambda: torch.arange(N) % C),
    "squared error": (F.mse_loss, lambda: torch.randn(N, C)),
    "bce": (F.binary_cross_entropy_with_logits, lambda: torch.rand(N, C)),
    "non-convex": (non_convex, lambda: torch.randn(N, C)),
    "negative weight": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, -0.5, 2.0]).double()), lambda: torch.arange(N) % C),
    "convex, custom": (lambda out, y: F.cross_entropy(out, y) + out.square().sum(), lambda: torch.arange(N) % C),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    loss_fn, targets = LOSSES[name]
    verify(mlp(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, C)), torch.randn(N, 4), targets(), loss_fn)


# ------------------------------------------------------------------------------------------------------------- structure


def test_is_the_ggn_where_the_model_is_linear_by_pieces() -> None:
    net = mlp(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4), nn.LeakyReLU(), nn.Linear(4, C))
    model_fn, params = cf.functionalize(net)
    X, y = torch.randn(N, 2, 5, 5), torch.arange(N) % C
    hessian, ggn = compute(model_fn, params, X, y, (cf.DiagHessian(), cf.DiagGGN()))
    assert_close(hessian, ggn)
    assert not analysis(net, X).residuals


def analysis(net: nn.Module, X: Any) -> Any:
    """The analysis of a model's graph."""
    model_fn, params = cf.functionalize(net)
    leaves = [p.detach().requires_grad_() for p in params.values()]
    layouts = Layouts(COMPOSITES)
    trace = capture(model_fn, leaves, lambda values: dict(zip(params, values, strict=True)), X, len(X), layouts=layouts)
    return curvature(trace, leaves, layouts)


def test_smooth_activations_need_no_products() -> None:
    build, data = MODELS["resnet"]
    found = analysis(build().eval(), data())
    assert found.curved == 0
    assert len(found.residuals) == 4


def test_first_activation_needs_no_columns() -> None:
    """The layer before it has its term in closed form, and before that there are no parameters."""
    net = mlp(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C))
    found = analysis(net, torch.randn(N, 4))
    (residual,) = found.residuals
    meeting = found.meeting(residual.input, residual.shape.numel())
    assert meeting.rest == 0
    assert list(meeting.own.values()) == [0b11]


def test_parameters_after_the_last_curved_operation_are_resolved() -> None:
    found = analysis(mlp(nn.Linear(4, 5), nn.Softmax(1), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, C)), torch.randn(N, 4))
    assert found.curved == 0b000011
    assert found.split == 0


def test_an_unknown_operation_is_not_taken_for_linear() -> None:
    x = torch.randn(3, requires_grad=True)
    for out in (torch.cumprod(x, 0), x.softmax(0), torch.logaddexp(x, 2 * x), x.norm(), Hidden.apply(x)):
        node = get_gradient_edge(out).node
        assert curve(node).unknown is None, node.name()


def test_frozen_and_unused_parameters() -> None:
    net = Products()
    net.gate.requires_grad_(False)
    net.unused = nn.Parameter(torch.randn(2))
    model_fn, params = cf.functionalize(net)
    X, y = torch.randn(N, 4), torch.arange(N) % C
    got = cf.diag_hessian(model_fn, params, X, y)
    assert "gate.weight" not in got
    assert_close(got, dense(model_fn, params, X, y))
    assert got["unused"].eq(0).all()
    assert cf.batch_diag_hessian(model_fn, params, X, y)["unused"].shape == (N, 2)


def test_with_other_quantities_in_one_call() -> None:
    """A tied layer, which the Hessian treats by a forward pass of its own: the others keep theirs."""
    model_fn, params = cf.functionalize(Tied())
    X, y = torch.randn(N, 4), torch.arange(N) % C
    specs = {"h": cf.DiagHessian(), "b": cf.BatchDiagHessian(), "k": cf.KFLR(), "g": cf.Grad(), "l": cf.Loss()}
    got = compute(model_fn, params, X, y, specs)
    assert_close(got["h"], cf.diag_hessian(model_fn, params, X, y))
    assert_close(got["b"], cf.batch_diag_hessian(model_fn, params, X, y))
    assert_close(got["k"], cf.kflr(model_fn, params, X, y))
    assert_close(got["g"], grad(lambda p: F.cross_entropy(model_fn(p, X), y))(params))


def test_single_precision() -> None:
    torch.set_default_dtype(torch.float32)
    net = mlp(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Softmax(1), nn.Linear(4, C))
    X, y = torch.randn(N, 4), torch.arange(N) % C
    got = _diagonal(net, X, y)
    want = {k: v.float() for k, v in _diagonal(net.double(), X.double(), y).items()}
    assert_close(got, want, rtol=1e-4)


def test_a_warning_names_the_number_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 entries of the softmax, for what is before its own layer, and 2 squares beside them: 6 columns."""
    net = mlp(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 4), nn.Softmax(1), nn.Linear(4, C)).requires_grad_(False)
    net[2].requires_grad_()
    net[1].bias.requires_grad_()
    X, y = torch.randn(N, 2), torch.arange(N) % C
    monkeypatch.setattr("curvfunc.hessian.diagonal.MANY_COLUMNS", 6)
    want = _diagonal(net, X, y)
    monkeypatch.setattr("curvfunc.hessian.diagonal.MANY_COLUMNS", 5)
    with pytest.warns(UserWarning, match=r"Hessian takes 6 columns.*mc_samples=k"):
        assert_close(_diagonal(net, X, y), want)
    cf.diag_hessian(*cf.functionalize(net), X, y, mc_samples=1)  # no warning


# ------------------------------------------------------------------------------------------------------- transformations


TRANSFORMED = ["resnet", "norms", "deep"]


@pytest.mark.parametrize("name", TRANSFORMED)
def test_under_vmap_over_parameters(name: str) -> None:
    build, data = MODELS[name]
    model_fn, params = cf.functionalize(build().eval())
    X, y = data(), torch.arange(N) % C
    ensemble = {k: torch.stack([v, 1.1 * v + 0.01]) for k, v in params.items()}
    got = vmap(lambda p: cf.diag_hessian(model_fn, p, X, y))(ensemble)
    each = [cf.diag_hessian(model_fn, {k: v[i] for k, v in ensemble.items()}, X, y) for i in range(2)]
    assert_close(got, {k: torch.stack([e[k] for e in each]) for k in params}, rtol=1e-9)


@pytest.mark.parametrize("name", [*TRANSFORMED, "products", "group norm", "tied", "pre-norm transformer", "lstm"])
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, lambda out, y: F.cross_entropy(out, y) - out.sin().sum()])
def test_can_be_differentiated(name: str, loss_fn: Any) -> None:
    build, data = MODELS[name]
    model_fn, params = cf.functionalize(build().eval())
    X, y = data(), torch.arange(N) % C
    name = next(iter(params))

    def total(q: Tensor) -> Tensor:
        diagonal = cf.diag_hessian(model_fn, {**params, name: q}, X, y, loss_fn=loss_fn)
        return sum(d.sum() for d in diagonal.values())

    direction, step = torch.randn_like(params[name]), 1e-5
    slope = (total(params[name] + step * direction) - total(params[name] - step * direction)) / (2 * step)
    gradient = grad(total)(params[name])
    assert_close((gradient * direction).sum(), slope, rtol=1e-5)
    leaf = params[name].clone().requires_grad_()
    total(leaf).backward()
    assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("name", ["norms", "cnn"])
def test_under_compile(name: str) -> None:
    torch._dynamo.reset()
    build, data = MODELS[name]
    model_fn, params = cf.functionalize(build().eval())
    X, y = data(), torch.arange(N) % C
    step = torch.compile(lambda p, X, y: cf.diag_hessian(model_fn, p, X, y), fullgraph=True, backend="aot_eager")
    assert_close(step(params, X, y), cf.diag_hessian(model_fn, params, X, y))


def named(name: str, saves: bool) -> Any:
    """An autograd function x -> x^2 of this name; without ``setup_context``, samples run one by one."""

    def squared(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]

    kept: dict[str, Any] = {"backward": staticmethod(backward)}
    if saves:
        kept["forward"] = staticmethod(squared)
    else:
        kept["forward"] = staticmethod(lambda x: x**2)
        kept["setup_context"] = staticmethod(lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    return type(name, (torch.autograd.Function,), kept)


@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("name", ["Square", "Relu", "Linear", "View", "Add", "Mul", "Exp", "Max", "NativeBatchNormBackward0"])
def test_functions_of_users_with_names_of_torch(name: str, saves: bool) -> None:
    torch.manual_seed(0)
    square = named(name, saves)
    params, X, y = {"a": torch.randn(C, 4), "b": torch.randn(C)}, torch.randn(N, 4), torch.arange(N) % C
    of_samples = lambda f: lambda p, x: f(x @ p["a"].t()) + p["b"]
    of_parameters = lambda f: lambda p, x: x @ f(p["a"]).t() + p["b"]
    for model in (of_samples, of_parameters):
        expected = dense(model(torch.square), params, X, y)
        assert_close(cf.diag_hessian(model(square.apply), params, X, y), expected, rtol=1e-9)


# -------------------------------------------------------------------------------------------------------------- BackPACK


def backpack_diagonal(net: nn.Module, X: Tensor, y: Tensor, loss: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    backpack_peer.load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from backpack import backpack, extend
        from backpack.extensions import BatchDiagHessian, DiagHessian

        net, loss = extend(net), extend(loss)
        with backpack(DiagHessian(), BatchDiagHessian()):
            loss(net(X), y).backward()
    named = dict(net.named_parameters())
    return {k: p.diag_h for k, p in named.items()}, {k: p.diag_h_batch for k, p in named.items()}


@pytest.mark.parametrize("act", [nn.ReLU, nn.Sigmoid, nn.Tanh, nn.LogSigmoid, nn.ELU, nn.SELU])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()], ids=["ce", "mse"])
def test_backpack(act: type[nn.Module], loss: nn.Module) -> None:
    net = mlp(nn.Conv2d(2, 3, 3), act(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4), act(), nn.Linear(4, C))
    X = torch.randn(N, 2, 6, 6)
    y = torch.arange(N) % C if isinstance(loss, nn.CrossEntropyLoss) else torch.rand(N, C).round()
    model_fn, params = cf.functionalize(net)
    total = cf.diag_hessian(model_fn, params, X, y, loss_fn=loss)
    batched = cf.batch_diag_hessian(model_fn, params, X, y, loss_fn=loss)
    peer_total, peer_batched = backpack_diagonal(net, X, y, loss)
    assert_close(total, peer_total, rtol=1e-9)
    assert_close(batched, peer_batched, rtol=1e-9)
