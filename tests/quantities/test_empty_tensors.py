"""Tensors of no elements: no input features, no hidden units, no positions. Everything else is as it would be."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from one_by_one import verify
from torch import Tensor, nn
from torch.func import vmap

import curvfunc as cf
from curvfunc.compat import backpack, extend, extensions

pytestmark = pytest.mark.usefixtures("float64")

N, C = 4, 3
Params = dict[str, Tensor]
MODELS: dict[str, tuple[Callable[[Params, Tensor], Tensor], dict[str, tuple[int, ...]]]] = {
    "no_inputs": (lambda p, x: F.linear(x[:, :0], p["w"], p["b"]), {"w": (C, 0), "b": (C,)}),
    "no_units": (
        lambda p, x: F.linear(torch.tanh(F.linear(x, p["w"], p["c"])), p["v"], p["b"]),
        {"w": (0, 4), "c": (0,), "v": (C, 0), "b": (C,)},
    ),
    "no_units_at_positions": (
        lambda p, x: F.linear(torch.tanh(F.linear(x.unflatten(1, (2, 2)), p["w"])), p["v"], p["b"]).mean(1),
        {"w": (0, 2), "v": (C, 0), "b": (C,)},
    ),
    "no_positions": (
        lambda p, x: F.linear(x.unflatten(1, (2, 2))[:, :0], p["w"]).sum(1) + p["b"],
        {"w": (C, 2), "b": (C,)},
    ),
    "product": (lambda p, x: torch.tanh(x @ p["u"]) @ p["w"] + p["b"], {"u": (4, 0), "w": (0, C), "b": (C,)}),
    "einsum": (lambda p, x: torch.einsum("ni,io->no", x[:, :0], p["w"]) + p["b"], {"w": (0, C), "b": (C,)}),
    "embedding": (
        lambda p, x: F.linear(F.embedding((x > 0).long(), p["w"]).flatten(1), p["v"], p["b"]),
        {"w": (2, 0), "v": (C, 0), "b": (C,)},
    ),
    "scale": (lambda p, x: (x[:, :0] * p["w"]).sum(1, keepdim=True) + p["b"], {"w": (0,), "b": (C,)}),
    "norm": (lambda p, x: F.layer_norm(x[:, :0], (0,), p["w"]).sum(1, keepdim=True) + p["b"], {"w": (0,), "b": (C,)}),
    "generic": (lambda p, x: (x[:, :0] ** p["w"]).sum(1, keepdim=True) + p["b"], {"w": (0,), "b": (C,)}),
    "expanded": (lambda p, x: p["w"].expand(len(x), 0).sum(1, keepdim=True) + p["b"], {"w": (0,), "b": (C,)}),
    "part": (lambda p, x: F.linear(x[:, :0], p["w"].split([0, 4], 1)[0]) + F.linear(x, p["w"]), {"w": (C, 4)}),
    "unused": (lambda p, x: F.linear(x, p["w"]), {"w": (C, 4), "z": (0, 5)}),
    "alone": (lambda p, x: F.linear(x[:, :0], p["w"]) + x[:, :C], {"w": (C, 0)}),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_quantity(name: str) -> None:
    model_fn, shapes = MODELS[name]
    params, X, y = {k: torch.randn(s) for k, s in shapes.items()}, torch.randn(N, 4), torch.arange(N) % C
    verify(model_fn, params, X, y)
    stacked = {k: torch.stack([p, p]) for k, p in params.items()}
    for f in (cf.batch_grad, cf.diag_ggn, cf.kflr, cf.diag_hessian):
        vmap(lambda p: f(model_fn, p, X, y))(stacked)  # noqa: B023 (called at once)


# -- no samples, or none of their outputs has an entry

PER_SAMPLE = {"batch_grad": 0, "batch_l2": 0, "batch_diag_ggn": 0, "batch_diag_hessian": 0, "sqrt_ggn": 1}
SUMS = ["sum_grad_squared", "diag_ggn", "diag_hessian"]
MEANS = ["variance", "kfac", "kflr", "kfra"]
LOSSES: dict[str, tuple[nn.Module, Tensor]] = {
    "cross-entropy": (nn.CrossEntropyLoss(reduction="sum"), torch.arange(N) % C),
    "squared error": (nn.MSELoss(reduction="sum"), torch.randn(N, C)),
    "bits": (nn.BCEWithLogitsLoss(reduction="sum"), torch.rand(N, C)),
}


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, C)).eval()


@pytest.mark.parametrize("loss", LOSSES)
def test_no_samples(loss: str) -> None:
    """As Poisson sampling gives them: what is kept per sample is empty, and sums are zero."""
    model_fn, params = cf.functionalize(perceptron())
    loss_fn, y = LOSSES[loss]
    X = torch.randn(N, 4)
    y = y.to(X.dtype) if y.is_floating_point() else y
    for name, axis in PER_SAMPLE.items():
        some = getattr(cf, name)(model_fn, params, X, y, loss_fn=loss_fn)
        none = getattr(cf, name)(model_fn, params, X[:0], y[:0], loss_fn=loss_fn)
        assert {k: (r.shape, r.dtype) for k, r in none.items()} == {
            k: (r.narrow(axis, 0, 0).shape, r.dtype) for k, r in some.items()
        }
    for name in SUMS:
        none = getattr(cf, name)(model_fn, params, X[:0], y[:0], loss_fn=loss_fn)
        assert all(r.shape == params[k].shape and not r.any() for k, r in none.items())
    for name in MEANS:
        with pytest.raises(ValueError, match="takes a mean over samples, and there are none"):
            getattr(cf, name)(model_fn, params, X[:0], y[:0], loss_fn=loss_fn)
    value, out, grad = cf.compute(model_fn, params, X[:0], y[:0], (cf.Loss(), cf.Output(), cf.Grad()), loss_fn=loss_fn)
    assert (value.item(), out.shape) == (0.0, (0, C))
    assert all(g.shape == params[k].shape and not g.any() for k, g in grad.items())
    assert cf.diag_ggn(model_fn, params, X[:0], y[:0], loss_fn=loss_fn, mc_samples=2)["0.weight"].shape == (5, 4)
    v = {k: torch.randn_like(p) for k, p in params.items()}
    for product in (cf.ggn_vp, cf.hessian_vp):
        assert not any(r.any() for r in product(model_fn, params, X[:0], y[:0], v, loss_fn=loss_fn).values())
    assert cf.jvp(model_fn, params, X[:0], v).shape == (0, C)
    assert not any(r.any() for r in cf.vjp(model_fn, params, X[:0], torch.zeros(0, C)).values())
    assert not cf.hmp(model_fn, params, X[:0], y[:0], loss_fn=loss_fn)["0.bias"](torch.randn(2, 5)).any()
    stacked = {k: torch.stack([p, p]) for k, p in params.items()}
    found = vmap(lambda p: cf.batch_grad(model_fn, p, X[:0], y[:0], loss_fn=loss_fn))(stacked)
    assert found["0.weight"].shape == (2, 0, 5, 4)


def test_no_samples_have_no_mean() -> None:
    model_fn, params = cf.functionalize(perceptron())
    X, y = torch.randn(0, 4), torch.zeros(0, dtype=torch.long)
    for loss_fn in (nn.CrossEntropyLoss(), lambda out, y: (out**2).sum()):
        with pytest.raises(ValueError, match=r"no samples \(N = 0\); at least one is needed, unless the loss is a sum"):
            cf.batch_grad(model_fn, params, X, y, loss_fn=loss_fn)


def quartic(out: Tensor, y: Tensor) -> Tensor:
    return (out**4).sum()


@pytest.mark.parametrize("loss_fn", [*(loss for loss, _ in LOSSES.values()), quartic], ids=[*LOSSES, "own"])
def test_outputs_without_entries(loss_fn: Callable[..., Tensor]) -> None:
    """Tokens [N, 0], of which nothing is left."""
    model_fn, params = cf.functionalize(nn.Embedding(5, 3))
    X, y = torch.zeros(N, 0, dtype=torch.long), torch.zeros(N, 0, 3)
    if isinstance(loss_fn, nn.CrossEntropyLoss):
        tokens_first, y = model_fn, torch.zeros(N, 0, dtype=torch.long)
        model_fn = lambda p, x: tokens_first(p, x).mT  # type: ignore[assignment]
    shapes = {"batch_l2": (N,), "sqrt_ggn": (0, N, 5, 3), **dict.fromkeys((*SUMS, "variance"), (5, 3))}
    for name in (*PER_SAMPLE, *SUMS, "variance"):
        (result,) = getattr(cf, name)(model_fn, params, X, y, loss_fn=loss_fn).values()
        assert result.shape == shapes.get(name, (N, 5, 3))
        assert not result.any()
    for name in ("kfac", "kflr", "kfra"):
        assert not any(f.any() for f in getattr(cf, name)(model_fn, params, X, y, loss_fn=loss_fn)["weight"])
    v = {"weight": torch.randn(5, 3)}
    for product in (cf.ggn_vp, cf.hessian_vp):
        assert not product(model_fn, params, X, y, v, loss_fn=loss_fn)["weight"].any()
    if isinstance(loss_fn, nn.Module):
        mean = type(loss_fn)()
        with pytest.raises(ValueError, match="no entries, which have no mean"):
            cf.batch_grad(model_fn, params, X, y, loss_fn=mean)


FIELDS = {"BatchGrad": "batch_grad", "BatchL2Grad": "batch_l2", "SumGradSquared": "sum_grad_squared", "DiagGGNExact": "diag_ggn",
          "BatchDiagGGNExact": "batch_diag_ggn", "SqrtGGNExact": "sqrt_ggn", "DiagHessian": "diag_hessian",
          "BatchDiagHessian": "batch_diag_hessian"}  # fmt: skip


@pytest.mark.parametrize("samples", [0, N])
def test_the_shim(samples: int) -> None:
    model: nn.Module = perceptron() if samples == 0 else nn.Embedding(5, 3)
    X = torch.randn(0, 4) if samples == 0 else torch.zeros(N, 0, dtype=torch.long)
    y = torch.zeros(0, C) if samples == 0 else torch.zeros(N, 0, 3)
    loss_fn = nn.MSELoss(reduction="sum")
    model_fn, params = cf.functionalize(model)
    extend(model)
    extend(loss_fn)
    for name, function in FIELDS.items():
        ext = getattr(extensions, name)()
        with backpack(ext):
            loss_fn(model(X), y).backward()
        want = getattr(cf, function)(model_fn, params, X, y, loss_fn=nn.MSELoss(reduction="sum"))
        assert {k: getattr(p, ext.savefield).shape for k, p in model.named_parameters()} == {
            k: w.shape for k, w in want.items()
        }
        assert not any(getattr(p, ext.savefield).any() for p in model.parameters())
    with backpack(extensions.HMP(), extensions.GGNMP(), extensions.PCHMP()):
        loss_fn(model(X), y).backward()
    for p in model.parameters():
        for product in (p.hmp, p.ggnmp, p.pchmp):
            assert not product(torch.ones(2, *p.shape)).any()
    if samples == 0:
        for name in ("Variance", "KFAC", "KFLR", "KFRA"):
            with backpack(getattr(extensions, name)()), pytest.raises(ValueError, match=f"{name} takes a mean over samples"):
                loss_fn(model(X), y).backward()
