"""HMP, GGNMP and PCHMP as BackPACK has them: where they may be called, with which vectors, and batch normalization."""

from collections.abc import Callable
from typing import Any

import backpack_peer
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch.func import functional_call, hessian

from curvfunc import compat
from curvfunc.compat import blocks, extensions
from curvfunc.compat.extensions import GGNMP, HMP, KFAC, KFLR, KFRA, PCHMP, BatchGrad, DiagGGNExact

# torch says so of BackPACK's hooks
pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")]
N, C = 6, 3


class NoRule(nn.Module):
    """Runs once more, for its own functions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), 1, 4)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


# Model, and the products that there are for it: of columns, of the graph, and of another forward pass.
ROUTES: dict[str, tuple[Callable[[], nn.Module], list[Any]]] = {
    "columns": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)), [HMP(), GGNMP(), PCHMP()]),
    "graph": (lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, C)), [HMP(), GGNMP()]),
    "wide": (lambda: nn.Sequential(nn.Linear(4, 80), nn.Tanh(), nn.Linear(80, C)), [HMP(), PCHMP(), PCHMP("abs", "abs")]),
    "rerun": (NoRule, [HMP()]),
}


def problem(build: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return build(), torch.randn(N, 4), torch.arange(N) % C


def vectors(p: Tensor) -> Tensor:
    return torch.randn(2, *p.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ROUTES)
def test_products_inside_of_the_block_and_after_it(name: str) -> None:
    """Inside, their own backward passes are nothing to the extensions that are active."""
    model, X, y = problem(ROUTES[name][0])
    loss_fn = compat.extend(nn.CrossEntropyLoss())
    loss = loss_fn(compat.extend(model)(X), y)  # before the block, so that fused attention has run
    exts = ROUTES[name][1]
    inside: dict[str, Tensor] = {}
    with compat.backpack(*exts, BatchGrad()):
        loss.backward()
        before = {k: p.grad_batch for k, p in model.named_parameters()}
        for _ in range(2):
            for k, p in model.named_parameters():
                for ext in exts:
                    inside[f"{k} {ext.savefield}"] = getattr(p, ext.savefield)(vectors(p))
    for k, p in model.named_parameters():
        assert p.grad_batch is before[k]
        for ext in exts:
            product = getattr(p, ext.savefield)
            assert isinstance(product, blocks.ParameterProduct)
            assert_close(product(vectors(p)), inside[f"{k} {ext.savefield}"])
            assert_close(product(vectors(p)[0]), inside[f"{k} {ext.savefield}"][0])
            assert product(torch.ones(0, *p.shape)).shape == (0, *p.shape)


def test_vectors_of_the_parameters_own_shape() -> None:
    """As in BackPACK, inside of the block and after it."""
    backpack = backpack_peer.load()
    found = []
    for library, exts in ((backpack, backpack.extensions), (compat, extensions)):
        model, X, y = problem(lambda: nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, C)))
        library.extend(model)
        loss_fn = library.extend(nn.CrossEntropyLoss())
        results: dict[str, Tensor] = {}
        with library.backpack(exts.HMP(), exts.GGNMP()):
            loss_fn(model(X), y).backward()
            for k, p in model.named_parameters():
                v = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
                results |= {f"{k} in": p.hmp(v).detach(), f"{k} ggn in": p.ggnmp(v).detach()}
        for k, p in model.named_parameters():
            v = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
            results |= {k: p.hmp(v).detach(), f"{k} ggn": p.ggnmp(v).detach()}
            assert results[k].shape == p.shape
        found.append(results)
    assert_close(found[1], found[0])


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, C)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.sigmoid(self.norm(self.a(x))))


@pytest.mark.parametrize("layers", ["one module", "one by one"])
def test_batch_normalization_in_training_mode(layers: str) -> None:
    """Products are those of the whole batch, so that mixed samples are no obstacle; against autograd, and BackPACK."""
    model, X, y = problem(Normed)
    params = {k: p.detach().clone() for k, p in model.named_parameters()}
    plain = Normed()

    def loss(p: dict[str, Tensor]) -> Tensor:
        h = F.batch_norm(F.linear(X, p["a.weight"], p["a.bias"]), None, None, p["norm.weight"], p["norm.bias"], training=True)
        return F.cross_entropy(F.linear(torch.sigmoid(h), p["b.weight"], p["b.bias"]), y)

    def ggn(name: str) -> Tensor:
        def out(q: Tensor) -> Tensor:
            return functional_call(plain, ({**params, name: q}, {}), X)

        plain.norm.track_running_stats, plain.norm.running_mean, plain.norm.running_var = False, None, None
        J = torch.func.jacrev(out)(params[name]).reshape(N * C, -1)
        H = hessian(lambda f: F.cross_entropy(f, y))(out(params[name])).reshape(N * C, N * C)
        return J.T @ H @ J

    if layers == "one module":
        compat.extend(model)
    for m in (model.a, model.norm, model.b):
        compat.extend(m)
    with compat.backpack(HMP(), GGNMP()):
        compat.extend(nn.CrossEntropyLoss())(model(X), y).backward()
    assert model.norm.num_batches_tracked == 1
    units = {k: torch.eye(p.numel()).reshape(-1, *p.shape) for k, p in params.items()}
    scale = hessian(loss)(params)["a.weight"]["a.weight"].norm()
    for name, p in model.named_parameters():
        want = hessian(lambda q, name=name: loss({**params, name: q}))(params[name]).reshape(p.numel(), -1)
        assert (p.hmp(units[name]).flatten(1) - want).norm() <= 1e-10 * scale  # of a bias before the norm it is zero
        assert (p.ggnmp(units[name]).flatten(1) - ggn(name)).norm() <= 1e-10 * scale
    for ext in (PCHMP(), DiagGGNExact(), BatchGrad()):
        with compat.backpack(ext), pytest.raises(NotImplementedError, match="BatchNorm module in training mode"):
            compat.extend(nn.CrossEntropyLoss())(model(X), y).backward()


def test_batch_normalization_as_in_backpack() -> None:
    backpack = backpack_peer.load()
    found = []
    for library, exts in ((backpack, backpack.extensions), (compat, extensions)):
        model, X, y = problem(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Sigmoid(), nn.Linear(5, C)))
        library.extend(model)
        with library.backpack(exts.HMP(), exts.GGNMP()):
            library.extend(nn.CrossEntropyLoss())(model(X), y).backward()
        units = {k: torch.eye(p.numel()).reshape(-1, *p.shape) for k, p in model.named_parameters()}
        hmp = {k: p.hmp(units[k]).detach() for k, p in model.named_parameters() if k in ("0.weight", "1.weight", "3.weight")}
        ggn = {k: p.ggnmp(units[k]).detach() for k, p in model.named_parameters() if k in ("0.weight", "1.weight", "3.weight")}
        found.append((hmp, ggn))
    assert_close(found[1], found[0], rtol=1e-9)


# -- HBP, by its options


OPTIONS = [("exact", "sqrt", KFLR), ("sampling", "sqrt", KFAC), ("sum", "average", KFRA)]


@pytest.mark.parametrize(("strategy", "back", "same"), OPTIONS)
def test_factors_by_options(strategy: str, back: str, same: Any) -> None:
    from curvfunc.compat.extensions.curvature import Curvature
    from curvfunc.compat.extensions.secondorder.hbp.hbp_options import ExpectationApproximation

    model, X, y = problem(lambda: nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, C)))
    ext = extensions.HBP(
        curv_type=Curvature.GGN,
        loss_hessian_strategy=strategy,
        backprop_strategy=back,
        ea_strategy=ExpectationApproximation.BOTEV_MARTENS,
    )
    assert (ext.get_curv_type(), ext.get_loss_hessian_strategy(), ext.get_backprop_strategy()) == ("ggn", strategy, back)
    assert ext.get_ea_strategy() == same().get_ea_strategy()
    assert isinstance(same(), extensions.HBP)
    with compat.backpack(ext, same()):
        compat.extend(nn.CrossEntropyLoss())(compat.extend(model)(X), y).backward()
    for p in model.parameters():
        assert_close(p.hbp, getattr(p, same().savefield))


def test_factors_by_options_as_in_backpack() -> None:
    backpack = backpack_peer.load()
    found = []
    for library, HBP in ((backpack, backpack.extensions.secondorder.hbp.HBP), (compat, extensions.HBP)):
        for strategy, back in (("exact", "sqrt"), ("sum", "average")):
            model, X, y = problem(lambda: nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, C)))
            ext = HBP("ggn", strategy, back, "E[J^T E(H) J]", "factors")
            with library.backpack(ext):
                library.extend(nn.CrossEntropyLoss())(library.extend(model)(X), y).backward()
            found.append({k: p.factors for k, p in model.named_parameters()})
    assert_close(found[2:], found[:2])


def test_options_that_are_not_there() -> None:
    model, X, y = problem(lambda: nn.Linear(4, C))
    loss = compat.extend(nn.CrossEntropyLoss())(compat.extend(model)(X), y)
    for options in ({"curv_type": "hessian"}, {"ea_strategy": "E(J^T) E(H) E(J)"}, {"backprop_strategy": "average"}):
        with compat.backpack(extensions.HBP(**options)), pytest.raises(NotImplementedError, match="do not go together here"):
            loss.backward(retain_graph=True)


# -- losses that are not what was differentiated


def test_changed_losses_as_in_backpack() -> None:
    backpack = backpack_peer.load()
    found = []
    for library, ext in ((backpack, backpack.extensions.DiagGGNExact()), (compat, extensions.DiagGGNExact())):
        model, X, y = problem(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, C)))
        library.extend(model)
        with library.backpack(ext), pytest.warns(UserWarning, match=r"CrossEntropyLoss.* (was changed|modified)"):
            (2 * library.extend(nn.CrossEntropyLoss())(model(X), y)).backward()
        found.append({k: p.diag_ggn_exact for k, p in model.named_parameters()})
    assert_close(found[1], found[0])


@pytest.mark.filterwarnings("ignore:no parameter of an extended module lies before:UserWarning")
@pytest.mark.parametrize("extension", ["KFRA", "KFLR", "DiagHessian", "HMP", "DiagGGNExact", "BatchGrad"])
def test_nothing_but_the_loss_is_extended(extension: str) -> None:
    backpack = backpack_peer.load()
    for library, exts in ((backpack, backpack.extensions), (compat, extensions)):
        model, X, y = problem(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, C)))
        ext = getattr(exts, extension)()
        with library.backpack(ext):
            library.extend(nn.CrossEntropyLoss())(model(X), y).backward()
        assert not any(hasattr(p, ext.savefield) for p in model.parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_statistics_without_parameters(frozen: bool) -> None:
    """A norm that has none, or none that require grad, mixes samples all the same, as a module that is called by itself."""
    torch.manual_seed(0)
    a, norm, b = nn.Linear(4, 5), nn.BatchNorm1d(5, affine=frozen).requires_grad_(False), nn.Linear(5, C)
    X, y = torch.randn(N, 4), torch.arange(N) % C
    for m in (a, norm, b):
        compat.extend(m)

    def loss(weight: Tensor) -> Tensor:
        return F.cross_entropy(b(F.batch_norm(F.linear(X, weight, a.bias), None, None, training=True)), y)

    with compat.backpack(HMP()):
        compat.extend(nn.CrossEntropyLoss())(b(norm(a(X))), y).backward()
    unit = torch.eye(a.weight.numel()).reshape(-1, *a.weight.shape)
    assert_close(a.weight.hmp(unit).flatten(1), hessian(loss)(a.weight.detach()).reshape(20, 20), rtol=1e-9)
    with compat.backpack(DiagGGNExact()), pytest.raises(ValueError, match="samples of the batch are mixed"):
        compat.extend(nn.CrossEntropyLoss())(b(norm(a(X))), y).backward()
