"""Kronecker factors of the empirical Fisher: explicit sums over samples, the reference, the scale of `kfac`, and curvlinops."""

import warnings
from functools import partial
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from problems import PROBLEMS
from torch import Tensor, nn
from zoo import ZOO

import curvfunc
from curvfunc import KFAC, BatchGrad, EmpiricalKFAC, compute, reference

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

N, C = 4, 3
APPROXIMATIONS = [None, "expand", "reduce"]


def linear() -> nn.Module:
    return nn.Linear(5, C)


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, C))


def cotangents(module: nn.Module, X: Tensor, y: Tensor, loss_fn: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and, by autograd, the loss gradients at the outputs, of the module's layers."""
    inputs, outputs = [], []

    def keep(_: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
        inputs.append(given[0].detach())
        outputs.append(out)

    hooks = [m.register_forward_hook(keep) for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    loss = loss_fn(module(X), y)
    for hook in hooks:
        hook.remove()
    return inputs, list(torch.autograd.grad(loss, outputs))


# -- explicit sums


@pytest.mark.parametrize("subsampling", [None, [2, 0, 2]])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_layer(reduction: str, subsampling: list[int] | None) -> None:
    module, X, y = linear(), torch.randn(N, 5), torch.randint(C, (N,))
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    _, (g,) = cotangents(module, X, y, loss_fn)
    got = curvfunc.kfac_empirical(*curvfunc.functionalize(module), X, y, loss_fn=loss_fn, subsampling=subsampling)
    R = 1 / N if reduction == "mean" else 1
    index = range(N) if subsampling is None else subsampling
    B = sum(R * torch.outer(g[n] / R, g[n] / R) for n in index)
    A = sum(torch.outer(X[n], X[n]) for n in index) / len(index)
    assert_close(got, {"weight": (B, A), "bias": (B,)})


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_convolutional_net(approximation: str | None) -> None:
    module, X, y = convolution(), torch.randn(N, 2, 3, 3), torch.randint(C, (N,))
    model_fn, params = curvfunc.functionalize(module)
    (x, hidden), (g, last) = cotangents(module, X, y, F.cross_entropy)
    got = curvfunc.kfac_empirical(model_fn, params, X, y, kfac_approx=approximation)
    S = 4
    B, A, bias = torch.zeros(3, 3), torch.zeros(8, 8), torch.zeros(3, 3)
    for n in range(N):
        patches = [x[n, :, i : i + 2, j : j + 2].flatten() for i in range(2) for j in range(2)]
        columns = [N * g[n, :, i, j] for i in range(2) for j in range(2)]  # R = 1/N
        bias += torch.outer(sum(columns), sum(columns)) / N
        if approximation == "reduce":
            A += torch.outer(sum(patches) / S, sum(patches) / S) / N
        else:
            A += sum(torch.outer(p, p) for p in patches) / (N * S if approximation == "expand" else N)
        if approximation == "expand":
            B += sum(torch.outer(c, c) for c in columns) / N
        else:
            B += torch.outer(sum(columns), sum(columns)) / N
    head = N * last.mT @ last
    want = {"0.weight": (B, A), "0.bias": (bias,), "3.weight": (head, hidden.mT @ hidden / N), "3.bias": (head,)}
    assert_close(got, want)


# -- the reference, on everything


def comparable(got: Any, want: Any, params: Any) -> tuple[Any, Any]:
    """Factors where both sides mean the same: weights of linear and convolution layers, exact blocks of vectors."""
    names = {k for k, p in params.items() if p.ndim <= 1 or len(want[k]) == 2}
    assert names
    return {k: got[k] for k in names}, {k: want[k] for k in names}


@pytest.mark.parametrize("name", ZOO)
def test_on_the_zoo(name: str) -> None:
    model_fn, params, X, y, loss_fn, _ = ZOO[name]()
    for options in ({}, {"subsampling": [1, 0, 1]}):
        want = reference.kfac_empirical(model_fn, params, X, y, loss_fn=loss_fn, **options)
        got = curvfunc.kfac_empirical(model_fn, params, X, y, loss_fn=loss_fn, **options)
        assert_close(*comparable(got, want, params))


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("name", [name for name, p in PROBLEMS.items() if "plain" in p.tags])
def test_on_all_problems(name: str, approximation: str | None) -> None:
    model_fn, params, X, y, loss_fn = PROBLEMS[name].make()
    want = reference.kfac_empirical(model_fn, params, X, y, loss_fn=loss_fn, kfac_approx=approximation)
    got = curvfunc.kfac_empirical(model_fn, params, X, y, loss_fn=loss_fn, kfac_approx=approximation)
    if all(isinstance(p, Tensor) for p in params.values()):
        assert_close(*comparable(got, want, params))
    else:
        assert_close(got, want)


# -- the scale


@pytest.mark.parametrize("shape", [(C,), (C, 2), ()])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse_loss", "binary_cross_entropy_with_logits"])
def test_expectation_over_the_models_own_targets_is_kflr(loss: str, reduction: str, shape: tuple[int, ...]) -> None:
    """Exactly: the mean over all targets with their probabilities; for squared error over ± one standard deviation."""
    if loss == "cross_entropy" and not shape:
        pytest.skip("has classes")
    num, size = 2, torch.Size(shape).numel()
    model_fn = lambda p, X: F.linear(X, p["w"]).reshape(num, *shape)
    params, X = {"w": torch.randn(size, 2)}, torch.randn(num, 2)
    out, loss_fn = model_fn(params, X), partial(getattr(F, loss), reduction=reduction)
    positions = num * (2 if len(shape) > 1 else 1) if loss == "cross_entropy" else out.numel()
    choices = C if loss == "cross_entropy" else 2
    B, mass = torch.zeros(size, size), 0.0
    for case in torch.cartesian_prod(*[torch.arange(choices)] * positions).reshape(-1, positions):
        if loss == "cross_entropy":
            y = case.reshape(num, *shape[1:])
            probability = out.softmax(1).gather(1, y.unsqueeze(1)).prod()
        elif loss == "mse_loss":
            y = out + (2 * case.reshape(out.shape) - 1) * 0.5**0.5
            probability = torch.tensor(0.5**positions)
        else:
            y = case.reshape(out.shape).to(out.dtype)
            probability = (y * out.sigmoid() + (1 - y) * (-out).sigmoid()).prod()
        found, _ = curvfunc.kfac_empirical(model_fn, params, X, y, loss_fn=loss_fn)["w"]
        B, mass = B + probability * found, mass + probability
    assert abs(float(mass) - 1) < 1e-12
    assert_close(B, curvfunc.kflr(model_fn, params, X, y, loss_fn=loss_fn)["w"][0])


def test_in_terms_of_gradients_of_samples() -> None:
    model_fn, params = curvfunc.functionalize(convolution())
    X, y = torch.randn(N, 2, 3, 3), torch.randint(C, (N,))
    got, grads, drawn = compute(model_fn, params, X, y, (EmpiricalKFAC(), BatchGrad(), KFAC()))
    for k in ("0.bias", "3.bias"):
        assert_close(got[k], (N * grads[k].mT @ grads[k],))
    assert_close({k: f[1:] for k, f in got.items() if len(f) > 1}, {k: f[1:] for k, f in drawn.items() if len(f) > 1})


IGNORING = torch.tensor([0, -100, 2, 1])
WEIGHT = torch.tensor([0.5, 2.0, 1.0])
SCALES: dict[str, tuple[Any, Tensor, float]] = {
    "ignored": (F.cross_entropy, IGNORING, 3.0),
    "weights": (partial(F.cross_entropy, weight=WEIGHT.double()), torch.tensor([0, 1, 1, 2]), 5.5),
    "weights, ignored": (partial(F.cross_entropy, weight=WEIGHT.double()), IGNORING, 3.5),
    "weights, smoothed": (partial(F.cross_entropy, weight=WEIGHT.double(), label_smoothing=0.2), torch.tensor([0, 1, 1, 2]), 5.5),
    "probabilities": (F.cross_entropy, torch.full((N, C), 1 / 3).double(), 4.0),
    "sum, weights": (partial(F.cross_entropy, weight=WEIGHT.double(), reduction="sum"), torch.tensor([0, 1, 1, 2]), 1.0),
    "squared error": (F.mse_loss, torch.zeros(N, C).double(), 12.0),
    "squared error, weights": (partial(F.mse_loss, weight=torch.arange(12.0).double().reshape(N, C)), torch.ones(N, C).double(), 66.0),
    "bits, weights": (nn.BCEWithLogitsLoss(weight=torch.full((C,), 3.0).double()), torch.ones(N, C).double(), 12.0),
    "own mean": (lambda out, y: (out - y).pow(4).sum(1).mean(), torch.zeros(N, C).double(), 4.0),
    "own sum": (lambda out, y: (out - y).pow(4).sum() / 7, torch.zeros(N, C).double(), 1.0),
    "own, linear by pieces": (lambda out, y: (out - y).abs().sum(1).mean(), torch.zeros(N, C).double(), 4.0),
    "module's mean": (nn.HuberLoss(delta=0.1), torch.zeros(N, C).double(), 4.0),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALES)
def test_number_of_terms_that_a_loss_averages(name: str) -> None:
    loss_fn, y, terms = SCALES[name]
    model_fn, params = curvfunc.functionalize(linear())
    X = torch.randn(N, 5)
    given = {"loss_fn": loss_fn}
    g = curvfunc.batch_grad(model_fn, params, X, y, **given)["bias"]
    want = (terms * g.mT @ g,)
    assert_close(curvfunc.kfac_empirical(model_fn, params, X, y, **given)["bias"], want)
    assert_close(reference.kfac_empirical(model_fn, params, X, y, **given)["bias"], want)
    stacked = {k: p[None] for k, p in params.items()}
    assert_close(torch.vmap(lambda p: curvfunc.kfac_empirical(model_fn, p, X, y, **given)["bias"])(stacked), (want[0][None],))
    picked = g[[1, 1, 0]]
    got = curvfunc.kfac_empirical(model_fn, params, X, y, subsampling=[1, 1, 0], **given)["bias"]
    assert_close(got, (terms * picked.mT @ picked,))


def test_losses_without_a_scale_are_refused() -> None:
    model_fn, params = curvfunc.functionalize(linear())
    X, y, weights = torch.randn(N, 5), torch.randn(N, C), torch.rand(N)
    with pytest.raises(ValueError, match="is neither a sum nor a mean over samples: on the batch twice.*0.707"):
        curvfunc.kfac_empirical(model_fn, params, X, y, loss_fn=lambda out, y: (out - y).square().sum() / len(out) ** 0.5)
    with pytest.raises(ValueError, match=r"cannot be evaluated on the batch twice.*belong into y"):
        curvfunc.kfac_empirical(model_fn, params, X, y, loss_fn=lambda out, y: (weights * (out - y).abs().sum(1)).sum())
    of_y = lambda out, y: (y["weights"] * (out - y["y"]).abs().sum(1)).sum()
    given = {"loss_fn": of_y}
    g = curvfunc.batch_grad(model_fn, params, X, {"weights": weights, "y": y}, **given)["bias"]
    assert_close(curvfunc.kfac_empirical(model_fn, params, X, {"weights": weights, "y": y}, **given)["bias"], (g.mT @ g,))
    with pytest.raises(ValueError, match="negative total weight"):
        negative = partial(F.cross_entropy, weight=-torch.ones(C))
        curvfunc.kfac_empirical(model_fn, params, X, torch.zeros(N, dtype=torch.long), loss_fn=negative)


def test_losses_without_a_gradient_have_no_scale_and_no_factors() -> None:
    """All positions are ignored, or the loss is constant."""
    model_fn, params = curvfunc.functionalize(linear())
    X, y = torch.randn(N, 5), torch.full((N,), -100)
    assert not curvfunc.kfac_empirical(model_fn, params, X, y)["bias"][0].any()
    weighted = partial(F.cross_entropy, weight=torch.ones(C))
    assert not curvfunc.kfac_empirical(model_fn, params, X, y, loss_fn=weighted)["bias"][0].any()
    assert not curvfunc.kfac_empirical(model_fn, params, X, y, loss_fn=lambda out, y: (0 * out).sum())["bias"][0].any()


# -- paths


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("name", ["conv2d, groups", "tied weight", "shared axis", "mlp: custom, Poisson"])
def test_under_vmap(name: str, approximation: str | None) -> None:
    model_fn, params, X, y, loss_fn = PROBLEMS[name].make()
    function = partial(curvfunc.kfac_empirical, loss_fn=loss_fn, kfac_approx=approximation, subsampling=[0, 0, 1])
    other = {k: 1.2 * p for k, p in params.items()}
    got = torch.vmap(lambda p: function(model_fn, p, X, y))({k: torch.stack([p, other[k]]) for k, p in params.items()})
    assert_close(
        got, optree.tree_map(lambda a, b: torch.stack([a, b]), *[function(model_fn, p, X, y) for p in (params, other)])
    )


@pytest.mark.parametrize("subsampling", [None, [2, 0, 2], torch.tensor([2, 0, 2])])
@pytest.mark.parametrize("name", ["conv2d, groups", "mlp: squared error, weights", "mlp: cross-entropy, ignored", "mlp: custom, Poisson"])  # fmt: skip
def test_compiled(name: str, subsampling: Any) -> None:
    torch.compiler.reset()
    model_fn, params, X, y, loss_fn = PROBLEMS[name].make()
    compiled = torch.compile(
        lambda params, X, y, index: curvfunc.kfac_empirical(model_fn, params, X, y, loss_fn=loss_fn, subsampling=index),
        fullgraph=True,
        backend="aot_eager",
    )
    want = reference.kfac_empirical(model_fn, params, X, y, loss_fn=loss_fn, subsampling=subsampling)
    assert_close(*comparable(compiled(params, X, y, subsampling), want, params))


def test_is_differentiable() -> None:
    model_fn, params = curvfunc.functionalize(linear())
    X, y = torch.randn(N, 5), torch.randint(C, (N,))
    weights = torch.randn(C, C)

    def by_torch(p: Any) -> Tensor:
        g = torch.stack([torch.func.grad(lambda p: F.cross_entropy(model_fn(p, X[n : n + 1]), y[n : n + 1]))(p)["bias"]  # noqa: B023
                         for n in range(N)])  # fmt: skip
        return (weights * (g.mT @ g)).sum() / N

    got = torch.func.grad(lambda p: (weights * curvfunc.kfac_empirical(model_fn, p, X, y)["bias"][0]).sum())(params)
    assert_close(got, torch.func.grad(by_torch)(params))


def test_in_the_memory_of_an_earlier_result_and_in_low_precision() -> None:
    model_fn, params = curvfunc.functionalize(convolution())
    X, y = torch.randn(N, 2, 3, 3), torch.randint(C, (N,))
    want = curvfunc.kfac_empirical(model_fn, params, X, y)
    buffers = optree.tree_map(lambda t: torch.full_like(t, torch.nan), want)
    found = compute(model_fn, params, X, y, EmpiricalKFAC(), out=buffers)
    assert all(a is b for a, b in zip(optree.tree_leaves(found), optree.tree_leaves(buffers), strict=True))
    assert_close(found, want)
    low = {k: p.bfloat16() for k, p in params.items()}
    got = curvfunc.kfac_empirical(model_fn, low, X.bfloat16(), y)["3.bias"][0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want["3.bias"][0], rtol=0.1, atol=0.1)


def test_refusals() -> None:
    model_fn, params = curvfunc.functionalize(linear())
    X, y = torch.randn(N, 5), torch.randint(C, (N,))
    with pytest.raises(ValueError, match="kfac_approx must be"):
        EmpiricalKFAC("both")
    summed = nn.CrossEntropyLoss(reduction="sum")
    with pytest.raises(ValueError, match="EmpiricalKFAC takes a mean over samples, and there are none"):
        curvfunc.kfac_empirical(model_fn, params, X[:0], y[:0], loss_fn=summed)
    with pytest.raises(ValueError, match=r"no samples \(N = 0\)"):
        curvfunc.kfac_empirical(model_fn, params, X[:0], y[:0])
    with pytest.raises(TypeError, match=r"output has dtype torch\.complex128"):
        curvfunc.kfac_empirical(lambda p, X: torch.complex(X @ p["weight"].T, X[:, :C]), params, X, y)
    empty = curvfunc.kfac_empirical(
        lambda p, X: model_fn(p, X)[:, :0], params, X, torch.zeros(N, 0), loss_fn=nn.MSELoss(reduction="sum")
    )
    assert not any(f.any() for f in optree.tree_leaves(empty))


# -- a peer


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss])
def test_as_curvlinops(loss: Any, reduction: str, approximation: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curvlinops = pytest.importorskip("curvlinops", exc_type=ImportError)
    module, X, loss_fn = convolution(), torch.randn(N, 2, 3, 3), loss(reduction=reduction)
    y = torch.randint(C, (N,)) if loss is nn.CrossEntropyLoss else torch.rand(N, C)
    model_fn, params = curvfunc.functionalize(module)
    got = curvfunc.kfac_empirical(model_fn, params, X, y, loss_fn=loss_fn, kfac_approx=approximation)
    operator = curvlinops.KFACLinearOperator(
        *(module, loss_fn, list(module.parameters()), [(X, y)]),
        fisher_type=curvlinops.FisherType.EMPIRICAL,
        kfac_approx=approximation,
        check_deterministic=False,
        num_data=N,
        num_per_example_loss_terms=1,
    )
    operator.compute_kronecker_factors()
    for layer in ("0", "3"):
        B, A = operator._gradient_covariances[layer], operator._input_covariances[layer]
        assert_close(got[f"{layer}.weight"], (B, A))
        if layer == "3":
            assert_close(got["3.bias"], (B,))
