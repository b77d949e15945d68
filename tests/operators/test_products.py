"""Products with blocks and with whole matrices, against matrices that torch.func forms entry by entry."""

import copy
import gc
import sys
import types
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc.operators import positive_curvature

pytestmark = pytest.mark.usefixtures("float64")

N, C = 4, 3


class Norm(nn.LayerNorm):
    """LayerNorm written out: torch.func.hessian of F.layer_norm is not symmetric on torch 2.13."""

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(C, 4), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(self.embed(tokens)).tanh().mean(1), self.embed.weight)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, C)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(F.silu(h + self.second(h).sigmoid(), inplace=True) / (1 + x.square()))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, C))


def relu_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(12, C),
    )  # fmt: skip


def smooth_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Sigmoid(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, C),
    )  # fmt: skip


def normed(norm: type[nn.LayerNorm] = nn.LayerNorm) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), norm(4), nn.Sigmoid(), nn.Linear(4, C))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (3,)),
    "relu_cnn": (relu_cnn, (2, 7, 7)),
    "smooth_cnn": (smooth_cnn, (2, 6, 6)),
    "normed": (normed, (3,)),
    "skip": (Skip, (3,)),
    "tied": (Tied, ()),
}
LOSSES = {
    "cross_entropy": F.cross_entropy,
    "mse": nn.MSELoss(reduction="sum"),
    "bce": F.binary_cross_entropy_with_logits,
}


def make(net: str, loss: str = "cross_entropy") -> tuple[Any, dict[str, Tensor], Tensor, Tensor, Callable[..., Tensor]]:
    torch.manual_seed(0)
    build, shape = NETS[net]
    model_fn, params = curvfunc.functionalize(build())
    params = {name: p + torch.randn_like(p) / 3 for name, p in params.items()}  # norms start at 1 and 0
    X = torch.randint(0, C, (N, 5)) if net == "tied" else torch.randn(N, *shape)
    y = torch.randint(0, C, (N,)) if loss == "cross_entropy" else torch.rand(N, C)
    return model_fn, params, X, y, LOSSES[loss]


def matrices(
    net: str, model_fn: Any, params: dict[str, Tensor], X: Tensor, y: Tensor, loss_fn: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Hessian [P, P], Gauss-Newton matrix [P, P] and Jacobian [N C, P]."""
    if net == "normed":
        model_fn = curvfunc.functionalize(normed(Norm))[0]
    flat, unravel = ravel(params)
    out = model_fn(params, X)
    H = torch.func.hessian(lambda t: loss_fn(model_fn(unravel(t), X), y))(flat)
    J = torch.func.jacrev(lambda t: model_fn(unravel(t), X).flatten())(flat)
    M = torch.func.hessian(lambda f: loss_fn(f.view_as(out), y))(out.flatten())
    torch.testing.assert_close(H, H.T, rtol=1e-10, atol=1e-12)
    return H, J.T @ M @ J, J


def ravel(tree: dict[str, Tensor]) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    sizes = [t.numel() for t in tree.values()]

    def unravel(flat: Tensor) -> dict[str, Tensor]:
        return {k: s.view_as(t) for (k, t), s in zip(tree.items(), torch.split(flat, sizes), strict=True)}

    return torch.cat([t.flatten() for t in tree.values()]), unravel


def dense(products: dict[str, Callable[[Tensor], Tensor]], params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The blocks, by the products with all unit vectors."""
    return {
        k: product(torch.eye(p.numel()).view(-1, *p.shape)).flatten(1)
        for (k, product), p in zip(products.items(), params.values(), strict=True)
    }


def blocks(matrix: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor]:
    sizes = [p.numel() for p in params.values()]
    rows = torch.split(matrix, sizes)
    return {k: torch.split(r, sizes, 1)[i] for i, (k, r) in enumerate(zip(params, rows, strict=True))}


def like(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.randn_like(p) for k, p in params.items()}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("net", NETS)
def test_blocks_and_products_equal_dense_matrices(net: str, loss: str) -> None:
    model_fn, params, X, y, loss_fn = make(net, loss)
    H, G, J = matrices(net, model_fn, params, X, y, loss_fn)
    assert_close(dense(curvfunc.hmp(model_fn, params, X, y, loss_fn=loss_fn), params), blocks(H, params))
    assert_close(dense(curvfunc.ggnmp(model_fn, params, X, y, loss_fn=loss_fn), params), blocks(G, params))
    v = like(params)
    flat, unravel = ravel(v)
    assert_close(curvfunc.hessian_vp(model_fn, params, X, y, v, loss_fn=loss_fn), unravel(H @ flat))
    assert_close(curvfunc.ggn_vp(model_fn, params, X, y, v, loss_fn=loss_fn), unravel(G @ flat))
    assert_close(curvfunc.fisher_vp(model_fn, params, X, y, v, loss_fn=loss_fn), unravel(G @ flat))
    assert_close(curvfunc.jvp(model_fn, params, X, v), (J @ flat).view(N, C))
    u = torch.randn(N, C)
    assert_close(curvfunc.vjp(model_fn, params, X, u), unravel(J.T @ u.flatten()))


@pytest.mark.parametrize("subsampling", [[2], torch.tensor([3, 0, 3])])
def test_subsampling_is_the_sum_over_the_listed_samples(subsampling: Any) -> None:
    model_fn, params, X, y, _ = make("mlp")
    index = torch.as_tensor(subsampling)
    partial_loss = lambda out, y: F.cross_entropy(out, y, reduction="sum") / N
    H, G, J = matrices("mlp", model_fn, params, X[index], y[index], partial_loss)
    options = {"subsampling": subsampling}
    assert_close(dense(curvfunc.hmp(model_fn, params, X, y, **options), params), blocks(H, params))
    assert_close(dense(curvfunc.ggnmp(model_fn, params, X, y, **options), params), blocks(G, params))
    v = like(params)
    flat, unravel = ravel(v)
    assert_close(curvfunc.hessian_vp(model_fn, params, X, y, v, **options), unravel(H @ flat))
    assert_close(curvfunc.ggn_vp(model_fn, params, X, y, v, **options), unravel(G @ flat))
    assert_close(curvfunc.jvp(model_fn, params, X, v, **options), (J @ flat).view(len(index), C))
    u = torch.randn(len(index), C)
    assert_close(curvfunc.vjp(model_fn, params, X, u, **options), unravel(J.T @ u.flatten()))
    clipped = curvfunc.pchmp(model_fn, params, X, y, **options)
    by_sample = [curvfunc.pchmp(model_fn, params, X, y, subsampling=[int(i)]) for i in index]
    for name, p in params.items():
        vs = torch.randn(2, *p.shape)
        assert_close(clipped[name](vs), sum(part[name](vs) for part in by_sample))


def test_monte_carlo_and_empirical_products_equal_their_roots() -> None:
    model_fn, params, X, y, _ = make("mlp")
    v = like(params)
    flat, unravel = ravel(v)

    def product(root: Any) -> dict[str, Tensor]:
        S = torch.cat([t.reshape(-1, p.numel()) for t, p in zip(root.values(), params.values(), strict=True)], 1)
        return unravel(S.T @ (S @ flat))

    draws = {"mc_samples": 3, "subsampling": [0, 2, 2]}
    seeded = lambda: torch.Generator().manual_seed(5)
    root = curvfunc.sqrt_ggn(model_fn, params, X, y, generator=seeded(), **draws)
    expected = product(root)
    assert_close(curvfunc.ggn_vp(model_fn, params, X, y, v, generator=seeded(), **draws), expected)
    assert_close(curvfunc.fisher_vp(model_fn, params, X, y, v, generator=seeded(), **draws), expected)
    block = curvfunc.ggnmp(model_fn, params, X, y, generator=seeded(), **draws)
    for name, p in params.items():
        S = root[name].reshape(-1, p.numel())
        first, again = block[name](v[name][None]), block[name](v[name][None])
        assert_close(first, (S.T @ (S @ v[name].flatten())).view(1, *p.shape))
        assert_close(again, first, rtol=0.0)  # the draws are fixed
    gradients = curvfunc.batch_grad(model_fn, params, X, y, subsampling=[1, 3])
    got = curvfunc.fisher_vp(model_fn, params, X, y, v, empirical=True, subsampling=[1, 3])
    assert_close(got, product(gradients))


def test_losses_that_are_not_convex() -> None:
    model_fn, params, X, _, _ = make("mlp")
    y, loss_fn = torch.randn(N, C), lambda out, y: (out - y).sin().sum()
    H, G, _ = matrices("mlp", model_fn, params, X, y, loss_fn)
    assert torch.linalg.eigvalsh(G)[0] < -1e-3
    assert_close(dense(curvfunc.hmp(model_fn, params, X, y, loss_fn=loss_fn), params), blocks(H, params))
    assert_close(dense(curvfunc.ggnmp(model_fn, params, X, y, loss_fn=loss_fn), params), blocks(G, params))
    with pytest.raises(ValueError, match="convex"):
        curvfunc.pchmp(model_fn, params, X, y, loss_fn=loss_fn)
    with pytest.raises(NotImplementedError, match="no likelihood"):
        curvfunc.fisher_vp(model_fn, params, X, y, params, loss_fn=loss_fn)


def test_attention_and_recurrence_have_second_derivatives() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True)
            self.lstm, self.last = nn.LSTM(4, 2, batch_first=True), nn.Linear(2, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.lstm(self.encoder(x))[0][:, -1])

    model_fn, params = curvfunc.functionalize(Attention())
    X, y = torch.randn(2, 3, 4), torch.tensor([0, 2])
    v, step = like(params), 1e-5

    def gradient(sign: float) -> dict[str, Tensor]:
        moved = {k: p + sign * step * v[k] for k, p in params.items()}
        return curvfunc.compute(model_fn, moved, X, y, curvfunc.Grad())

    difference = optree.tree_map(lambda a, b: (a - b) / (2 * step), gradient(1), gradient(-1))
    assert_close(curvfunc.hessian_vp(model_fn, params, X, y, v), difference, rtol=1e-6)
    ahead, behind = (model_fn({k: p + s * step * v[k] for k, p in params.items()}, X) for s in (1, -1))
    assert_close(curvfunc.jvp(model_fn, params, X, v), (ahead - behind) / (2 * step), rtol=1e-6)


# -- reuse


@pytest.mark.parametrize("name", ["hmp", "ggnmp", "pchmp"])
def test_the_model_runs_once(name: str) -> None:
    model_fn, params, X, y, _ = make("mlp")
    calls = []

    def counted(p: Any, X: Any) -> Tensor:
        calls.append(1)
        return model_fn(p, X)

    products = getattr(curvfunc, name)(counted, params, X, y)
    vs = {k: torch.randn(5, *p.shape) for k, p in params.items()}
    first = {k: products[k](v) for k, v in vs.items()}
    assert_close({k: products[k](v) for k, v in vs.items()}, first, rtol=0.0)
    assert len(calls) == 1
    chunked = getattr(curvfunc, name)(model_fn, params, X, y, chunk_size=2)
    assert_close({k: chunked[k](v) for k, v in vs.items()}, first)
    assert_close({k: torch.cat([products[k](v[i : i + 1]) for i in range(5)]) for k, v in vs.items()}, first)
    assert products["0.weight"](vs["0.weight"][:0]).shape == (0, 4, 3)
    assert not any(t.requires_grad for t in first.values())


@pytest.mark.parametrize("name", ["hmp", "ggnmp", "pchmp"])
def test_memory_is_released_with_the_last_product(name: str) -> None:
    _, params, X, y, _ = make("mlp")
    watched: list[weakref.ref[Any]] = []

    class Mark:
        """Lives as long as the node of the graph that it is put on."""

    def watching(p: Any, X: Any) -> Tensor:
        hidden = torch.tanh(F.linear(X, p["0.weight"], p["0.bias"]))
        mark = hidden.grad_fn.metadata["mark"] = Mark()  # type: ignore[union-attr]
        watched.append(weakref.ref(mark))
        return F.linear(hidden, p["2.weight"], p["2.bias"])

    products = getattr(curvfunc, name)(watching, {k: params[k] for k in list(params)[:4]}, X, y)
    last = products["2.bias"]
    del products
    gc.collect()
    assert last(torch.randn(2, 3)).shape == (2, 3)
    assert watched[0]() is not None
    del last
    gc.collect()
    assert watched[0]() is None


def test_parameters_that_change_in_place_are_noticed() -> None:
    model_fn, params, X, y, _ = make("mlp")
    products = curvfunc.hmp(model_fn, params, X, y)
    params["2.weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        products["0.weight"](torch.randn(1, 4, 3))


# -- the positive-curvature Hessian


@pytest.mark.parametrize("modify", ["clip", "abs"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("net", ["mlp", "smooth_cnn", "skip"])
def test_pchmp_is_the_hessian_with_modified_residuals(
    net: str, loss: str, modify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_fn, params, X, y, loss_fn = make(net, loss)
    H, G, _ = matrices(net, model_fn, params, X, y, loss_fn)
    got = dense(curvfunc.pchmp(model_fn, params, X, y, loss_fn=loss_fn, modify=modify), params)
    above = {"clip": blocks(H, params), "abs": blocks(G, params)}[modify]
    changed = 0.0
    for name, block in got.items():
        torch.testing.assert_close(block, block.T, rtol=1e-10, atol=1e-12)
        assert torch.linalg.eigvalsh(block)[0] > -1e-12
        assert torch.linalg.eigvalsh(block - above[name])[0] > -1e-12  # r⁺ ≥ r, |r| ≥ 0
        changed = max(changed, (block - blocks(H, params)[name]).norm().item())
    assert changed > 1e-4
    monkeypatch.setitem(positive_curvature.MODIFICATIONS, modify, lambda r: r)
    unmodified = dense(curvfunc.pchmp(model_fn, params, X, y, loss_fn=loss_fn, modify=modify), params)
    assert_close(unmodified, blocks(H, params))


@pytest.mark.parametrize("modify", ["clip", "abs"])
def test_pchmp_is_hmp_where_nothing_curves(modify: Any) -> None:
    model_fn, params, X, y, _ = make("relu_cnn")
    got = dense(curvfunc.pchmp(model_fn, params, X, y, modify=modify), params)
    assert_close(got, dense(curvfunc.hmp(model_fn, params, X, y), params))


def test_pchmp_refuses_what_it_is_not_defined_for() -> None:
    def refused(net: nn.Module, X: Tensor, match: str) -> None:
        model_fn, params = curvfunc.functionalize(net)
        with pytest.raises(NotImplementedError, match=match):
            curvfunc.pchmp(model_fn, params, X, torch.zeros(len(X), dtype=torch.long))

    x = torch.randn(N, 3)
    refused(normed(), x, "operation NativeLayerNorm")
    refused(nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, C)), x, "operation Softmax")
    refused(nn.Sequential(nn.Linear(3, 4), nn.GLU(), nn.Linear(2, C)), x, "operation Glu")
    refused(Tied(), torch.randint(0, C, (N, 5)), r"multiplies.*'embed.weight'")
    shared = nn.Linear(3, 3)
    refused(nn.Sequential(shared, nn.Tanh(), shared), x, r"multiplies.*'0.weight'")
    # a norm of the data alone is linear in its own parameters
    first = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, C))
    model_fn, params = curvfunc.functionalize(first)
    y = torch.tensor([0, 1, 2, 0])
    got = dense(curvfunc.pchmp(model_fn, params, x, y), params)
    assert_close(got, dense(curvfunc.hmp(model_fn, params, x, y), params))


# -- BackPACK


@pytest.fixture
def backpack_fields(fake_torchvision: None) -> Callable[..., dict[str, dict[str, Any]]]:
    pytest.importorskip("backpack")
    from backpack import backpack, extend
    from backpack.extensions import GGNMP, HMP, PCHMP

    def fields(net: nn.Module, X: Tensor, y: Tensor, loss: nn.Module, modify: str) -> dict[str, dict[str, Any]]:
        extended, loss = extend(copy.deepcopy(net)), extend(loss)
        with backpack(HMP(), GGNMP(), PCHMP(modify=modify)):
            loss(extended(X), y).backward()
        return {field: {k: getattr(p, field) for k, p in extended.named_parameters()} for field in ("hmp", "ggnmp", "pchmp")}

    return fields


@pytest.fixture
def fake_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    if "torchvision" not in sys.modules:
        monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("modify", ["clip", "abs"])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()], ids=["cross_entropy", "mse"])
@pytest.mark.parametrize("net", ["mlp", "smooth_cnn"])
def test_products_of_backpack(
    net: str, loss: nn.Module, modify: Any, backpack_fields: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, shape = NETS[net]
    module, X = build(), torch.randn(N, *shape)
    y = torch.randint(0, C, (N,)) if isinstance(loss, nn.CrossEntropyLoss) else torch.randn(N, C)
    model_fn, params = curvfunc.functionalize(module)
    vs = {k: torch.randn(3, *p.shape) for k, p in params.items()}
    theirs = backpack_fields(module, X, y, loss, modify)
    ours = partial(getattr, curvfunc)

    def values(products: dict[str, Callable[[Tensor], Tensor]]) -> dict[str, Tensor]:
        return {k: products[k](v).detach() for k, v in vs.items()}

    for field in ("hmp", "ggnmp"):
        assert_close(values(ours(field)(model_fn, params, X, y, loss_fn=loss)), values(theirs[field]))
    # BackPACK's residual is φ''(z) δ², since its ``hessian_diagonal`` already has the factor δ which pchmp brings in.
    # With the same residual all values agree ...
    right = values(curvfunc.pchmp(model_fn, params, X, y, loss_fn=loss, modify=modify))
    residual = positive_curvature._residual
    with monkeypatch.context() as patch:
        patch.setattr(positive_curvature, "_residual", lambda node, k, delta: residual(node, k, delta) * delta)
        squared = values(curvfunc.pchmp(model_fn, params, X, y, loss_fn=loss, modify=modify))
    assert_close(squared, values(theirs["pchmp"]))
    # ... and so they do without the second factor on BackPACK's side
    from backpack.core.derivatives.elementwise import ElementwiseDerivatives

    monkeypatch.setattr(ElementwiseDerivatives, "hessian_diagonal", lambda self, *args: self.d2f(*args))
    assert_close(right, values(backpack_fields(module, X, y, loss, modify)["pchmp"]))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("modify", ["clip", "abs"])
def test_pchmp_of_backpack_where_nothing_curves(modify: Any, backpack_fields: Any) -> None:
    module = nn.Sequential(nn.Conv2d(2, 4, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, C))
    X, y = torch.randn(N, 2, 7, 7), torch.randint(0, C, (N,))
    theirs = backpack_fields(module, X, y, nn.CrossEntropyLoss(), modify)["pchmp"]
    model_fn, params = curvfunc.functionalize(module)
    ours = curvfunc.pchmp(model_fn, params, X, y, modify=modify)
    for name, p in params.items():
        v = torch.randn(3, *p.shape)
        assert_close(ours[name](v), theirs[name](v).detach())


# -- transformations


@pytest.mark.parametrize("net", ["mlp", "normed"])
def test_ensembles_of_parameters(net: str) -> None:
    model_fn, params, X, y, _ = make(net)
    ensemble = {k: torch.stack([p, p + torch.randn_like(p)]) for k, p in params.items()}
    vectors = {k: torch.randn_like(p) for k, p in ensemble.items()}
    for function in (curvfunc.hessian_vp, curvfunc.ggn_vp, partial(curvfunc.fisher_vp, empirical=True)):
        got = torch.vmap(lambda p, v: function(model_fn, p, X, y, v))(ensemble, vectors)  # noqa: B023
        for i in range(2):
            member, v = ({k: t[i] for k, t in tree.items()} for tree in (ensemble, vectors))
            assert_close({k: t[i] for k, t in got.items()}, function(model_fn, member, X, y, v))
    got = torch.vmap(lambda p, v: curvfunc.jvp(model_fn, p, X, v))(ensemble, vectors)
    first = ({k: t[0] for k, t in tree.items()} for tree in (ensemble, vectors))
    assert_close(got[0], curvfunc.jvp(model_fn, next(first), X, next(first)))


@pytest.mark.parametrize("name", ["hessian_vp", "ggn_vp", "fisher_vp"])
def test_derivatives_of_products(name: str) -> None:
    """By func.grad, func.jvp and autograd's graph, against differences."""
    model_fn, params, X, y, _ = make("mlp")
    v, w, d = like(params), like(params), like(params)

    def value(p: Any) -> Tensor:
        product = getattr(curvfunc, name)(model_fn, p, X, y, v)
        return sum((product[k] * w[k]).sum() for k in w)

    step = 1e-5
    ahead, behind = (value({k: p + s * step * d[k] for k, p in params.items()}) for s in (1, -1))
    expected = (ahead - behind) / (2 * step)
    gradient = torch.func.grad(value)(params)
    torch.testing.assert_close(sum((gradient[k] * d[k]).sum() for k in d), expected, rtol=1e-6, atol=0)
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    assert_close(dict(zip(leaves, torch.autograd.grad(value(leaves), list(leaves.values())), strict=True)), gradient)
    tangent = torch.func.jvp(value, (params,), (d,))[1]
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=0)
    by_vector = torch.func.grad(
        lambda v: sum((t * w[k]).sum() for k, t in getattr(curvfunc, name)(model_fn, params, X, y, v).items())
    )(v)
    assert_close(by_vector, getattr(curvfunc, name)(model_fn, params, X, y, w))  # symmetric


def test_compiled_products() -> None:
    model_fn, params, X, y, _ = make("mlp")
    v, u, loss_fn = like(params), torch.randn(N, C), nn.CrossEntropyLoss(label_smoothing=0.1)

    def everything(params: Any, X: Tensor, y: Tensor, v: Any, u: Tensor) -> Any:
        index = torch.tensor([0, 2])
        return (
            curvfunc.hessian_vp(model_fn, params, X, y, v),
            curvfunc.ggn_vp(model_fn, params, X, y, v, loss_fn=loss_fn, subsampling=index),
            curvfunc.fisher_vp(model_fn, params, X, y, v, empirical=True, subsampling=[1]),
            curvfunc.jvp(model_fn, params, X, v),
            curvfunc.vjp(model_fn, params, X, u),
        )

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    assert_close(compiled(params, X, y, v, u), everything(params, X, y, v, u))


def test_functions_cannot_leave_a_transformation() -> None:
    model_fn, params, X, y, _ = make("mlp")
    with pytest.raises(NotImplementedError, match=r"hmp returns what keeps a graph.*hessian_vp"):
        torch.func.grad(lambda p: curvfunc.hmp(model_fn, p, X, y)["0.bias"](p["0.bias"][None]).sum())(params)


# -- bad input


def test_bad_vectors_and_options() -> None:
    model_fn, params, X, y, _ = make("mlp")
    block = curvfunc.hmp(model_fn, params, X, y)["0.weight"]
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(4, 3\); \[V, \*\(4, 3\)\] is needed"):
        block(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"torch.float32 on cpu, the parameter torch.float64"):
        block(torch.randn(1, 4, 3, dtype=torch.float32))
    with pytest.raises(TypeError, match="must be a tensor, got list"):
        block([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"v has entries \['0.weight'\]"):
        curvfunc.hessian_vp(model_fn, params, X, y, {"0.weight": params["0.weight"]})
    with pytest.raises(ValueError, match=r"v at '0.bias' has shape \(1, 4\)"):
        curvfunc.hessian_vp(model_fn, params, X, y, {**params, "0.bias": params["0.bias"][None]})
    with pytest.raises(ValueError, match=r"u has shape \(2, 3\)"):
        curvfunc.vjp(model_fn, params, X, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="modify must be"):
        curvfunc.pchmp(model_fn, params, X, y, modify="square")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mc_samples must be 0"):
        curvfunc.ggnmp(model_fn, params, X, y, mc_samples=-1)
    with pytest.raises(TypeError, match="mc_samples must be an int"):
        curvfunc.ggn_vp(model_fn, params, X, y, params, mc_samples=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empirical Fisher has no draws"):
        curvfunc.fisher_vp(model_fn, params, X, y, params, empirical=True, mc_samples=1)
    with pytest.raises(ValueError, match="chunk_size"):
        curvfunc.hmp(model_fn, params, X, y, chunk_size=0)
    training = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, C))
    with pytest.raises(ValueError, match="batch normalization in training mode"):
        curvfunc.hmp(*curvfunc.functionalize(training), X, y)
    training.eval()
    model_fn, params = curvfunc.functionalize(training)
    H, _, _ = matrices("batch norm", model_fn, params, X, y, F.cross_entropy)
    assert_close(dense(curvfunc.hmp(model_fn, params, X, y), params), blocks(H, params))


def test_parameters_without_influence_get_zeros() -> None:
    params = {"used": torch.randn(3, C), "unused": torch.randn(2)}
    X, y = torch.randn(N, 3), torch.tensor([0, 1, 2, 0])
    model_fn = lambda p, X: (X @ p["used"]).tanh()
    for name in ("hmp", "ggnmp", "pchmp"):
        products = getattr(curvfunc, name)(model_fn, params, X, y)
        assert_close(products["unused"](torch.ones(2, 2)), torch.zeros(2, 2))
        assert products["used"](torch.ones(2, 3, C)).norm() > 0
    linear = lambda p, X: X @ p["used"]
    assert_close(curvfunc.hessian_vp(linear, params, X, y, params)["unused"], torch.zeros(2))
    assert_close(curvfunc.ggn_vp(linear, params, X, y, params)["unused"], torch.zeros(2))
