"""KFRA against BackPACK, against the recursion with dense Jacobians, and where it is exact."""

import warnings
from collections.abc import Callable
from typing import Any

import backpack_peer
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch.func import hessian, jacrev, vmap

import curvfunc as cf
from curvfunc import reference

pytestmark = pytest.mark.usefixtures("float64")

N, C = 4, 3


def mlp(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


# -------------------------------------------------------------------------------------------------------------- BackPACK

CHAINS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (
        lambda: mlp(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3), nn.Tanh(),
                    nn.Linear(3, C)),
        (5,),
    ),
    "cnn": (
        lambda: mlp(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=False), nn.MaxPool2d(3, 2), nn.Conv2d(4, 5, 2, stride=2,
                    padding=1), nn.Sigmoid(), nn.ZeroPad2d(1), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.0), nn.Linear(20, C)),
        (2, 8, 8),
    ),
    "conv1d": (
        lambda: mlp(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Conv1d(4, 3, 2, dilation=2), nn.ReLU(), nn.Flatten(), nn.Linear(12, C)),
        (2, 8),
    ),
    "conv3d": (
        lambda: mlp(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Conv3d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, C)),
        (1, 4, 4, 4),
    ),
    "conv_transpose1d": (
        lambda: mlp(nn.ConvTranspose1d(2, 3, 2, stride=2), nn.Sigmoid(), nn.ConvTranspose1d(3, 2, 3), nn.Flatten(),
                    nn.Linear(16, C)),
        (2, 3),
    ),
    "conv_transpose2d": (
        lambda: mlp(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Sigmoid(), nn.ConvTranspose2d(3, 2, 3, padding=1, stride=2),
                    nn.Flatten(), nn.Linear(242, C)),
        (2, 3, 3),
    ),
    "conv_transpose3d": (
        lambda: mlp(nn.ConvTranspose3d(1, 2, 2), nn.Sigmoid(), nn.ConvTranspose3d(2, 1, 2), nn.Flatten(), nn.Linear(64, C)),
        (1, 2, 2, 2),
    ),
}  # fmt: skip


def backpack_factors(net: nn.Module, X: Tensor, y: Tensor, loss: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    backpack_peer.load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from backpack import backpack, extend
        from backpack.extensions import KFRA

        net, loss = extend(net), extend(loss)
        with backpack(KFRA()):
            loss(net(X), y).backward()
    return {name: tuple(p.kfra) for name, p in net.named_parameters()}


@pytest.mark.parametrize("name", CHAINS)
def test_backpack(name: str) -> None:
    torch.set_default_dtype(torch.float32)  # BackPACK's max pooling knows no other
    build, shape = CHAINS[name]
    net, X, y = build(), torch.randn(N, *shape), torch.arange(N) % C
    got = cf.kfra(*cf.functionalize(net), X, y)
    assert_close(got, backpack_factors(net, X, y, nn.CrossEntropyLoss()), rtol=1e-4)


@pytest.mark.parametrize("name", CHAINS)
def test_is_what_the_specification_says(name: str) -> None:
    build, shape = CHAINS[name]
    model_fn, params = cf.functionalize(build())
    X, y = torch.randn(N, *shape), torch.arange(N) % C
    assert_close(cf.kfra(model_fn, params, X, y), reference.kfra(model_fn, params, X, y))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [nn.MSELoss, nn.CrossEntropyLoss])
def test_backpack_losses(loss: type[nn.Module], reduction: str) -> None:
    net, X = mlp(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, C)), torch.randn(N, 5)
    y = torch.randn(N, C) if loss is nn.MSELoss else torch.arange(N) % C
    got = cf.kfra(*cf.functionalize(net), X, y, loss_fn=loss(reduction=reduction))
    # BackPACK's identity matrix for squared errors is in single precision: here it is exact
    assert_close(got, backpack_factors(net, X, y, loss(reduction=reduction)), rtol=1e-10)


# --------------------------------------------------------------------------------------------------------- the recursion


def averaged(net: nn.Sequential, X: Tensor, y: Tensor) -> list[Tensor]:
    """G [out, out] at the output of each layer, from dense Jacobians of every sample."""
    inputs = [X]
    for layer in net:
        inputs.append(layer(inputs[-1]).detach())
    at_output = hessian(lambda out: F.cross_entropy(out, y))(inputs[-1])
    G = torch.einsum("ncnd->cd", at_output)
    found = []
    for layer, x in zip(reversed(net), reversed(inputs[:-1]), strict=True):
        found.insert(0, G)
        jacobians = [jacrev(lambda t, layer=layer: layer(t[None]).flatten())(x[n]).flatten(1) for n in range(len(x))]
        G = sum(J.mT @ G @ J for J in jacobians) / len(x)
    return found


def test_every_kind_of_operation() -> None:
    """Including what BackPACK does not have: batch norm, PReLU, adaptive pooling, other padding, linear layers over channels."""
    net = mlp(
        nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Softplus(), nn.AdaptiveMaxPool2d(3), nn.ReflectionPad2d(1),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.PReLU(), nn.Unflatten(1, (4, 4)), nn.MaxPool1d(2), nn.AvgPool1d(2),
        nn.Unflatten(1, (2, 2)), nn.Flatten(2), nn.Linear(2, 3), nn.Softsign(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(6, C),
    ).eval()  # fmt: skip
    net[1].running_var.uniform_(0.5, 2)
    nn.init.uniform_(net[1].weight, 0.5, 2)
    X, y = torch.randn(N, 2, 8, 8), torch.arange(N) % C
    got = cf.kfra(*cf.functionalize(net), X, y)
    G = averaged(net, X, y)
    x = [X]
    for layer in net:
        x.append(layer(x[-1]).detach())
    normalized = (x[1] - net[1].running_mean[:, None, None]) / (net[1].running_var[:, None, None] + net[1].eps).sqrt()
    normalized = normalized.flatten(2)
    pixels = G[0].reshape(4, 36, 4, 36)
    scaled = G[1].reshape(4, 36, 4, 36)
    negative = x[7].clamp_max(0)
    want = {
        "0.weight": (pixels.sum((1, 3)), _grouped_patches(x[0])),
        "0.bias": (pixels.sum((1, 3)),),
        "1.weight": (torch.einsum("ncs,csdt,ndt->cd", normalized, scaled, normalized) / N,),
        "1.bias": (scaled.sum((1, 3)),),
        "7.weight": (torch.einsum("ni,ij,nj->", negative, G[7], negative).reshape(1, 1) / N,),
        "13.weight": (torch.einsum("sosp->op", G[13].reshape(2, 3, 2, 3)), torch.einsum("nsk,nsl->kl", x[13], x[13]) / (2 * N)),
        "13.bias": (G[13].reshape(2, 3, 2, 3).sum((0, 2)),),
        "17.weight": (G[17], x[17].mT @ x[17] / N),
        "17.bias": (G[17],),
    }
    assert_close(got, want)
    assert_close(got, reference.kfra(*cf.functionalize(net), X, y))


def _grouped_patches(x: Tensor) -> Tensor:
    """The second moment of 3 x 3 patches, averaged over two groups of one channel."""
    patches = F.unfold(x.reshape(2 * N, 1, 8, 8), 3)
    return torch.einsum("nks,nls->kl", patches, patches) / (2 * N)


class Lambda(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "square": lambda h: torch.mul(h, h),
    "silu": lambda h: h * torch.sigmoid(h),
    "softsign": lambda h: h / (1 + h.abs()),
    "where": lambda h: torch.where(h > 0, h, h.exp() - 1),
    "two linear branches": lambda h: h.flip(1) + h.cumsum(1),
    "permuted": lambda h: h[:, [2, 0, 1, 3]] + 1,
    "repeated matrix": lambda h: torch.bmm(torch.arange(16.0).reshape(1, 4, 4).expand(len(h), 4, 4), h.unsqueeze(2)).squeeze(2),
    "repeated matrix, from the right": lambda h: torch.bmm(
        h.unsqueeze(1), torch.arange(16.0).reshape(1, 4, 4).expand(len(h), 4, 4)
    ).flatten(1),
    "a matrix for each head": lambda h: torch.matmul(h.reshape(-1, 2, 1, 2), torch.arange(8.0).reshape(2, 2, 2)).flatten(1),
    "chosen by constants": lambda h: h.gather(1, torch.tensor([[2, 0, 0, 3]]).expand(len(h), 4)),
    "scaled product": lambda h: torch.addmm(torch.ones(4), h, torch.arange(16.0).reshape(4, 4), alpha=0.5),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_several_parts(name: str) -> None:
    """As one step, where all paths meet again: elementwise, or with the same Jacobian for all samples."""
    net = mlp(nn.Linear(5, 4), Lambda(OPERATIONS[name]), nn.Linear(4, C))
    X, y = torch.randn(N, 5), torch.arange(N) % C
    G = averaged(net, X, y)
    want = {"0.weight": (G[0], X.mT @ X / N), "0.bias": (G[0],)}
    got = cf.kfra(*cf.functionalize(net), X, y)
    assert_close({name: got[name] for name in want}, want)
    assert_close(got, reference.kfra(*cf.functionalize(net), X, y))


def test_two_first_layers() -> None:
    """Branches that end in parameters of their own."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.a(x) + self.b(x).sigmoid()))

    net = Sum()
    X, y = torch.randn(N, 5), torch.arange(N) % C
    got = cf.kfra(*cf.functionalize(net), X, y)
    for name, constant, f in (("a", net.b(X).sigmoid().detach(), lambda h: h), ("b", net.a(X).detach(), torch.sigmoid)):
        rows = iter(constant)  # averaged() takes the samples one by one, in order, for the Jacobians

        def add(h: Tensor, constant: Tensor = constant, rows: Any = rows) -> Tensor:
            return h + (constant if len(h) == N else next(rows))

        chain = mlp(getattr(net, name), Lambda(f), Lambda(add), nn.Tanh(), net.out)
        assert_close(got[f"{name}.weight"], (averaged(chain, X, y)[0], X.mT @ X / N))
    assert_close(got, reference.kfra(*cf.functionalize(net), X, y))


def test_chunks_of_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    build, shape = CHAINS["cnn"]
    model_fn, params = cf.functionalize(build())
    X, y = torch.randn(N, *shape), torch.arange(N) % C
    whole = cf.kfra(model_fn, params, X, y)
    monkeypatch.setattr("curvfunc.engine.cotangents.CHUNK_BYTES", {"cpu": 1})
    monkeypatch.setitem(__import__("sys").modules["curvfunc.hessian.kfra"].CHUNK_BYTES, "cpu", 2000)
    assert_close(cf.kfra(model_fn, params, X, y), whole)


def test_is_the_exact_block_for_one_sample() -> None:
    """Without shared positions the GGN of one sample is a Kronecker product, whatever the depth."""
    net = mlp(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.3), nn.Linear(4, C))
    model_fn, params = cf.functionalize(net.eval())
    X, y = torch.randn(1, 5), torch.tensor([1])
    got, root = cf.compute(model_fn, params, X, y, (cf.KFRA(), cf.SqrtGGN()))
    for name, factors in got.items():
        columns = root[name].flatten(2).flatten(0, 1)
        block = torch.kron(*factors) if len(factors) == 2 else factors[0]
        assert_close(block, columns.mT @ columns)


def test_convolution_over_one_position_is_exact_for_one_sample() -> None:
    net = mlp(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(3, C))
    model_fn, params = cf.functionalize(net)
    X, y = torch.randn(1, 2, 2, 2), torch.tensor([1])
    got, root = cf.compute(model_fn, params, X, y, (cf.KFRA(), cf.SqrtGGN()))
    columns = root["0.weight"].flatten(2).flatten(0, 1)
    assert_close(torch.kron(*got["0.weight"]), columns.mT @ columns)


def test_subsampling() -> None:
    """Sums and averages run over the subset, and the loss keeps the scale of the whole batch."""
    model_fn, params = cf.functionalize(mlp(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, C)))
    X, y, index = torch.randn(6, 5), torch.arange(6) % C, [4, 1, 1]
    got = cf.kfra(model_fn, params, X, y, subsampling=index)
    want = cf.kfra(model_fn, params, X[index], y[index], loss_fn=lambda f, t: F.cross_entropy(f, t, reduction="sum") / 6)
    assert_close(got, want)


def test_frozen_and_unused_parameters() -> None:
    net = mlp(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, C))
    net.unused = nn.Parameter(torch.randn(2))
    net[2].weight.requires_grad_(False)
    net.forward = lambda x: net[2](net[1](net[0](x)))
    model_fn, params = cf.functionalize(net)
    X, y = torch.randn(N, 5), torch.arange(N) % C
    got = cf.kfra(model_fn, params, X, y)
    assert "2.weight" not in got
    assert_close(got["unused"], (torch.zeros(2, 2),))
    thawed = cf.kfra(model_fn, {**params, "2.weight": net[2].weight.detach()}, X, y)
    assert_close({k: thawed[k] for k in got}, got)


def test_embedding_as_first_layer() -> None:
    net = mlp(nn.Embedding(5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, C))
    X, y = torch.randint(0, 5, (N, 2)), torch.arange(N) % C
    model_fn, params = cf.functionalize(net)
    A, B = cf.kfra(model_fn, params, X, y)["0.weight"]
    assert_close(A, F.one_hot(X, 5).sum((0, 1)).double().diag() / (2 * N))
    inner = mlp(nn.Identity(), *list(net)[1:])
    G = averaged(inner, net[0](X).detach(), y)[0].reshape(2, 3, 2, 3)
    assert_close(B, torch.einsum("sdse->de", G))


# ------------------------------------------------------------------------------------------------------------- refusals


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.out(torch.add(h, torch.tanh(self.b(h))))


class Residual(Branching):
    """Both branches are known, but not as one operation."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.out(h + h.cumsum(1).tanh())


class Shared(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(torch.tanh(self.b(self.a(x)))))


class Chosen(Branching):
    """Entries that the data choose."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x).gather(1, x[:, :4].argsort(1)))


class Data(Branching):
    """A product with data: linear, but with another Jacobian for each sample."""

    def forward(self, x: Tensor) -> Tensor:
        mixer = x[:, :, None] * x[:, None, :]
        return self.out(torch.bmm(mixer[:, :4, :4], self.a(x).unsqueeze(2)).squeeze(2))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Branching(), "Add takes 2 tensors .* branches"),
        (Residual(), "Add takes 2 tensors .* branches"),
        (Shared(), "'b.weight' is used more than once"),
        (Data(), "no rule for Bmm"),
        (Chosen(), "no rule for Gather"),
        (mlp(nn.Linear(5, 4), nn.Softmax(1), nn.Linear(4, C)), "no rule for Softmax"),
        (mlp(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, C)), "no rule for NativeLayerNorm"),
        (mlp(nn.Linear(5, 4), nn.Unflatten(1, (2, 2)), nn.GRU(2, 3, batch_first=True)), "no rule|more than once|branches"),
    ],
)
def test_refusals(net: nn.Module, message: str) -> None:
    output = (lambda out: out[0][:, -1]) if isinstance(net, nn.Sequential) and isinstance(net[-1], nn.GRU) else None
    model_fn, params = cf.functionalize(net.double(), output)
    with pytest.raises(NotImplementedError, match=message):
        cf.kfra(model_fn, params, torch.randn(N, 5), torch.arange(N) % C)


def test_refuses_an_indefinite_loss() -> None:
    model_fn, params = cf.functionalize(nn.Linear(5, C))
    with pytest.raises(ValueError, match="indefinite"):
        cf.kfra(model_fn, params, torch.randn(N, 5), torch.randn(N, C), loss_fn=lambda out, y: (out.sin() * y).sum())


# ------------------------------------------------------------------------------------------------------- transformations


def _problem() -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    net = mlp(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(6, C))
    return *cf.functionalize(net), torch.randn(N, 2, 5), torch.arange(N) % C


def test_under_vmap_over_parameters() -> None:
    model_fn, params, X, y = _problem()
    ensemble = {k: torch.stack([v, 1.1 * v]) for k, v in params.items()}
    got = vmap(lambda p: cf.kfra(model_fn, p, X, y))(ensemble)
    each = [cf.kfra(model_fn, {k: v[i] for k, v in ensemble.items()}, X, y) for i in range(2)]
    assert_close(got, {k: tuple(map(torch.stack, zip(each[0][k], each[1][k], strict=True))) for k in params})


def test_can_be_differentiated() -> None:
    model_fn, params, X, y = _problem()

    def total(w: Tensor) -> Tensor:
        factors = cf.kfra(model_fn, {**params, "0.weight": w}, X, y)
        return sum(f.sin().sum() for fs in factors.values() for f in fs)

    w, direction, step = params["0.weight"], torch.randn_like(params["0.weight"]), 1e-5
    slope = (total(w + step * direction) - total(w - step * direction)) / (2 * step)
    assert_close((torch.func.grad(total)(w) * direction).sum(), slope, rtol=1e-6)


def test_under_compile() -> None:
    torch._dynamo.reset()
    model_fn, params, X, y = _problem()
    step = torch.compile(lambda p, X, y: cf.kfra(model_fn, p, X, y), fullgraph=True, backend="aot_eager")
    assert_close(step(params, X, y), cf.kfra(model_fn, params, X, y))
