"""The estimate of the Hessian's diagonal by random signs: against z ⊙ H z with autograd's Hessian, and its expectation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch.func import vmap

import curvfunc as cf
from curvfunc import BatchDiagHessian, DiagHessian, Grad, Loss, accumulate, compute, optim

pytestmark = pytest.mark.usefixtures("float64")

N, C = 4, 3


class Gated(nn.Module):
    """A gate, a layer norm, softmax attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.gate, self.out = nn.Linear(4, 12), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.norm(x + torch.softmax(q @ k.mT, -1) @ v)
        return self.out((x * torch.sigmoid(self.gate(x))).mean(1))


class Generic(nn.Module):
    """A parameter whose use has no rule, which takes the model to vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.power = nn.Linear(4, C), nn.Parameter(torch.rand(C) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.pow(self.first(x).square() + 1, self.power)


class Loop(nn.Module):
    """Control flow by values, which no vmap can run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.power = nn.Linear(4, C), nn.Parameter(torch.rand(C) + 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = [F.softplus(self.first(row)) ** (self.power if row.sum().item() > 0 else 2) for row in x]
        return torch.stack(rows)


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, C), nn.Softplus())


MODELS: dict[str, tuple[Any, Any]] = {
    "cnn": (cnn, lambda: torch.randn(N, 2, 6, 6)),
    "gated": (Gated, lambda: torch.randn(N, 3, 4)),
    "generic": (Generic, lambda: torch.randn(N, 4)),
    "loop": (Loop, lambda: torch.randn(N, 4)),
    "linear by pieces": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, C)), lambda: torch.randn(N, 4)),
}


def problem(name: str) -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    build, data = MODELS[name]
    model_fn, params = cf.functionalize(build())
    params = dict(sorted(params.items()))  # the order of draws, whatever that of the dictionary
    return model_fn, params, data(), torch.arange(N) % C


def hessians(model_fn: Any, params: dict[str, Tensor], X: Tensor, y: Tensor, loss_fn: Any = F.cross_entropy) -> Tensor:
    """[n, P, P], one sample and one column at a time; of the mean over all N."""
    found = []
    for n in range(len(X)):
        leaves = {k: p.detach().clone().requires_grad_() for k, p in params.items()}
        loss = loss_fn(model_fn(leaves, X[n : n + 1]), y[n : n + 1]) / len(X)
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True)
        g = torch.cat([t.flatten() for t in grads])
        rows = [
            torch.autograd.grad(e, list(leaves.values()), retain_graph=True, materialize_grads=True) if e.requires_grad else ()
            for e in g
        ]
        found.append(torch.stack([torch.cat([t.flatten() for t in r]) if r else torch.zeros_like(g) for r in rows]))
    return torch.stack(found)


def split(flat: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """[*lead, P] by parameter."""
    parts = flat.split([p.numel() for p in params.values()], -1)
    return {k: t.reshape(*t.shape[:-1], *p.shape) for (k, p), t in zip(params.items(), parts, strict=True)}


def signs(params: dict[str, Tensor], draws: int, seed: int) -> Tensor:
    """What the generator gives: all parameters of a draw, then the next draw."""
    generator, numel = seeded(seed), sum(p.numel() for p in params.values())
    return torch.stack([2 * torch.randint(0, 2, (numel,), generator=generator) - 1 for _ in range(draws)]).double()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", MODELS)
def test_is_the_mean_of_products_with_known_signs(name: str) -> None:
    model_fn, params, X, y = problem(name)
    H, z = hessians(model_fn, params, X, y), signs(params, 5, 3)
    each = (z * torch.einsum("npq,mq->nmp", H, z)).mean(1)
    for chunk_size in (None, 1, 2):
        given: dict[str, Any] = {"mc_samples": 5, "chunk_size": chunk_size}
        got = cf.diag_hessian(model_fn, params, X, y, generator=seeded(3), **given)
        assert_close(got, split(each.sum(0), params), rtol=1e-9)
        got = cf.batch_diag_hessian(model_fn, params, X, y, generator=seeded(3), **given)
        assert_close(got, split(each, params), rtol=1e-9)
        index = [2, 0, 2]
        given |= {"subsampling": index}
        assert_close(cf.diag_hessian(model_fn, params, X, y, generator=seeded(3), **given), split(each[index].sum(0), params))
        got = cf.batch_diag_hessian(model_fn, params, X, y, generator=seeded(3), **given)
        assert_close(got, split(each[index], params), rtol=1e-9)


def test_ways_of_running() -> None:
    """The models above take all of them."""
    ways = {name: cf.explain(*problem(name)[:3]) for name in MODELS}
    assert "loop" in str(ways["loop"]) or "sample by sample" in str(ways["loop"])
    assert "vmap" in str(ways["generic"])


@pytest.mark.parametrize("name", ["cnn", "gated", "generic"])
def test_expectation(name: str) -> None:
    """The mean of independent draws is within 5 of its standard errors, which are those that the Hessian says."""
    model_fn, params, X, y = problem(name)
    H, draws = hessians(model_fn, params, X, y), 2000
    variance = H.sum(0).square().sum(1) - H.sum(0).diagonal().square()  # of one draw
    got = torch.cat(
        [t.flatten() for t in cf.diag_hessian(model_fn, params, X, y, mc_samples=draws, generator=seeded(0)).values()]
    )
    error, bound = got - H.sum(0).diagonal(), 5 * (variance / draws).sqrt()
    assert (error.abs() <= bound + 1e-12).all()
    typical = (error[bound > 1e-9] / bound[bound > 1e-9]).square().mean().sqrt()
    assert 0.1 < typical < 0.4  # 1/5 in expectation: the estimate is no better than it should be
    got = cf.batch_diag_hessian(model_fn, params, X, y, mc_samples=draws, generator=seeded(0))
    variance = H.square().sum(2) - H.diagonal(dim1=1, dim2=2).square()
    error = torch.cat([t.flatten(1) for t in got.values()], 1) - H.diagonal(dim1=1, dim2=2)
    assert (error.abs() <= 5.5 * (variance / draws).sqrt() + 1e-12).all()


def test_error_falls_with_the_root_of_the_number_of_draws() -> None:
    model_fn, params, X, y = problem("cnn")
    exact = cf.diag_hessian(model_fn, params, X, y)["0.weight"]
    errors = []
    for draws in (4, 400):
        generator = seeded(1)
        runs = [cf.diag_hessian(model_fn, params, X, y, mc_samples=draws, generator=generator)["0.weight"] for _ in range(20)]
        errors.append(torch.stack([(r - exact).square().sum() for r in runs]).mean().sqrt())
    assert 6 < errors[0] / errors[1] < 16  # 10 in expectation


def test_a_diagonal_hessian_has_no_error() -> None:
    model_fn = lambda p, X: (p["w"] * X).pow(3)
    params, X, y = {"w": torch.randn(5)}, torch.randn(N, 5), torch.randn(N, 5)
    loss = nn.MSELoss()
    got = cf.batch_diag_hessian(model_fn, params, X, y, loss_fn=loss, mc_samples=1)
    assert_close(got, cf.batch_diag_hessian(model_fn, params, X, y, loss_fn=loss))


def test_both_have_the_same_draws_in_one_call() -> None:
    model_fn, params, X, y = problem("gated")
    specs = {"t": DiagHessian(2), "b": BatchDiagHessian(2), "o": DiagHessian(1), "e": DiagHessian(), "g": Grad(), "l": Loss()}
    got = compute(model_fn, params, X, y, specs, generator=seeded(5))
    assert_close({k: v.sum(0) for k, v in got["b"].items()}, got["t"])
    assert_close(got["t"], cf.diag_hessian(model_fn, params, X, y, mc_samples=2, generator=seeded(5)))
    assert_close(got["e"], cf.diag_hessian(model_fn, params, X, y))
    assert_close(got["g"], torch.func.grad(lambda p: F.cross_entropy(model_fn(p, X), y))(params))


def test_scales_with_the_loss() -> None:
    """A mean has 1/N of a sum's; a loss that is doubled has twice its estimate."""
    model_fn, params, X, y = problem("cnn")
    given = lambda loss: cf.diag_hessian(model_fn, params, X, y, loss_fn=loss, mc_samples=2, generator=seeded(2))
    mean, total = given(nn.CrossEntropyLoss()), given(nn.CrossEntropyLoss(reduction="sum"))
    assert_close({k: N * v for k, v in mean.items()}, total)
    assert_close({k: 2 * v for k, v in mean.items()}, given(lambda out, y: 2 * F.cross_entropy(out, y)))


def test_over_a_data_set() -> None:
    """Each batch has draws of its own: a sum of its samples' estimates for the one, all samples' for the other."""
    model_fn, params, X, y = problem("cnn")
    batches = [(X[:3], y[:3]), (X[3:], y[3:])]
    specs = (DiagHessian(2), BatchDiagHessian(2))
    total, each = accumulate(model_fn, params, batches, specs, generator=seeded(4))
    H, z = N * hessians(model_fn, params, X, y), signs(params, 4, 4)
    estimates = torch.cat([(w * torch.einsum("npq,mq->nmp", h, w)).mean(1) for h, w in ((H[:3], z[:2]), (H[3:], z[2:]))]) / N
    assert_close(each, split(estimates, params))
    assert_close(total, split(estimates.sum(0), params))


@pytest.mark.parametrize("name", ["cnn", "gated"])
def test_under_vmap_over_parameters(name: str) -> None:
    model_fn, params, X, y = problem(name)
    ensemble = {k: torch.stack([v, 1.1 * v + 0.01]) for k, v in params.items()}
    for function in (cf.diag_hessian, cf.batch_diag_hessian):
        run = vmap(lambda p: function(model_fn, p, X, y, mc_samples=2), randomness="same")  # noqa: B023
        torch.manual_seed(7)
        got = run(ensemble)
        torch.manual_seed(7)
        first = function(model_fn, {k: v[0] for k, v in ensemble.items()}, X, y, mc_samples=2)
        torch.manual_seed(7)
        second = function(model_fn, {k: v[1] for k, v in ensemble.items()}, X, y, mc_samples=2)
        assert_close(got, {k: torch.stack([first[k], second[k]]) for k in params}, rtol=1e-9)
        other = vmap(lambda p: function(model_fn, p, X, y, mc_samples=2), randomness="different")(ensemble)  # noqa: B023
        assert all(t.shape == got[k].shape for k, t in other.items())


@pytest.mark.parametrize("name", ["cnn", "gated"])
def test_can_be_differentiated(name: str) -> None:
    model_fn, params, X, y = problem(name)
    key = next(iter(params))
    for function in (cf.diag_hessian, cf.batch_diag_hessian):

        def total(q: Tensor) -> Tensor:
            given = function(model_fn, {**params, key: q}, X, y, mc_samples=2, generator=seeded(6))  # noqa: B023
            return sum((d.sin().sum() for d in given.values()), torch.zeros(()))

        direction, step = torch.randn_like(params[key]), 1e-5
        slope = (total(params[key] + step * direction) - total(params[key] - step * direction)) / (2 * step)
        leaf = params[key].clone().requires_grad_()
        gradient = torch.autograd.grad(total(leaf), leaf)[0]
        assert_close((gradient * direction).sum(), slope, rtol=1e-5)
        torch.manual_seed(0)
        assert_close(torch.func.grad(total)(params[key]), gradient)
        assert_close(torch.func.jvp(total, (params[key],), (direction,))[1], (gradient * direction).sum())


@pytest.mark.parametrize("name", ["cnn", "gated"])
def test_under_compile(name: str) -> None:
    torch._dynamo.reset()
    model_fn, params, X, y = problem(name)
    specs = (DiagHessian(2), BatchDiagHessian(2), Grad())
    step = torch.compile(lambda p, X, y: compute(model_fn, p, X, y, specs), fullgraph=True, backend="aot_eager")
    torch.manual_seed(8)
    got = step(params, X, y)
    torch.manual_seed(8)
    assert_close(got, compute(model_fn, params, X, y, specs))


def test_single_precision() -> None:
    model_fn, params, X, y = problem("gated")
    want = cf.batch_diag_hessian(model_fn, params, X, y, mc_samples=2, generator=seeded(9))
    low = {k: p.float() for k, p in params.items()}
    got = cf.batch_diag_hessian(model_fn, low, X.float(), y, mc_samples=2, generator=seeded(9))
    assert all(t.dtype == torch.float32 for t in got.values())
    assert_close({k: t.double() for k, t in got.items()}, want, rtol=1e-4)


def test_the_order_of_parameters_does_not_matter() -> None:
    model_fn, params, X, y = problem("cnn")
    got = cf.diag_hessian(model_fn, dict(reversed(params.items())), X, y, mc_samples=1, generator=seeded(3))
    assert_close(got, cf.diag_hessian(model_fn, params, X, y, mc_samples=1, generator=seeded(3)))


def test_frozen_and_unused_parameters() -> None:
    model_fn, params, X, y = problem("cnn")
    got = cf.batch_diag_hessian(
        lambda p, X: model_fn({k: p[k] for k in params}, X), {**params, "other": torch.ones(2)}, X, y, mc_samples=1
    )
    assert torch.equal(got["other"], torch.zeros(N, 2))


def test_adahessian_asks_for_it() -> None:
    """Yao et al. 2021: one draw at each step, as a spec."""
    model_fn, params, X, y = problem("cnn")
    method = optim.chain(
        optim.momentum(0.9, average=True),
        optim.scale_by_diagonal(DiagHessian(mc_samples=1), squares=True, decay=0.999, damping=1e-8),
        optim.scale(-0.15),
    )
    _, new, _ = optim.step(model_fn, method, params, method.init(params), X, y, generator=seeded(1))
    g = torch.func.grad(lambda p: F.cross_entropy(model_fn(p, X), y))(params)
    d = cf.diag_hessian(model_fn, params, X, y, mc_samples=1, generator=seeded(1))
    assert_close(new, {k: p - 0.15 * g[k] / (d[k].abs() + 1e-8) for k, p in params.items()}, rtol=1e-6)


@pytest.mark.parametrize(("draws", "kind"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_numbers(draws: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="DiagHessian: mc_samples must be"):
        DiagHessian(draws)
