"""Sums of clipped gradients: equal to clipping explicit gradients, sample by sample, wherever these have a meaning."""

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
from curvfunc import BatchL2, ClippedGrad, Grad, accumulate, compute, reference

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

N, C = 7, 3
SUM = partial(F.cross_entropy, reduction="sum")


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, C))


def images(num: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(num, 1, 5, 5), torch.arange(num) % C


def cosh(out: Tensor, y: Any) -> Tensor:
    return out.cosh().sum()


def explicit(model_fn: Any, params: Any, X: Any, max_norm: float | None, per_layer: bool = False) -> tuple[Any, float]:
    """The clipped sum of the gradients of `cosh`, one sample after another by plain autograd; and the bound."""
    paths, leaves, tree = optree.tree_flatten_with_path(params)
    names = [".".join(map(str, path)) for path in paths]
    leaves = [p.detach().requires_grad_() for p in leaves]
    samples = []
    for n in range(len(optree.tree_leaves(X)[0])):
        out = model_fn(tree.unflatten(leaves), optree.tree_map(lambda x: x[n : n + 1], X))  # noqa: B023
        samples.append(torch.autograd.grad(out.cosh().sum(), leaves, allow_unused=True, materialize_grads=True))
    groups = {name: name.rpartition(".")[0] or name for name in names} if per_layer else dict.fromkeys(names, "")
    norms = {
        group: [
            sum(g.square().sum() for name, g in zip(names, gs, strict=True) if groups[name] == group).sqrt() for gs in samples
        ]
        for group in groups.values()
    }
    if max_norm is None:  # so that about half of the samples are clipped
        max_norm = max(torch.stack(found).median().item() for found in norms.values()) * len(norms) ** 0.5 + 1e-12
    bound = max_norm / len(norms) ** 0.5
    total = [torch.zeros_like(p) for p in leaves]
    for n, gs in enumerate(samples):
        for i, (name, g) in enumerate(zip(names, gs, strict=True)):
            norm = norms[groups[name]][n]
            total[i] += g * min(1.0, bound / norm.item() if norm else 1.0)
    return tree.unflatten(total), max_norm


@pytest.mark.parametrize("per_layer", [False, True], ids=["together", "per layer"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_on_all_problems(name: str, per_layer: bool) -> None:
    model_fn, params, X, _, _ = PROBLEMS[name].make()
    want, bound = explicit(model_fn, params, X, None, per_layer)
    y = torch.zeros(len(optree.tree_leaves(X)[0]))
    got = curvfunc.clipped_grad(model_fn, params, X, y, max_norm=bound, per_layer=per_layer, loss_fn=cosh)
    assert_close(got, want, rtol=1e-12)


@pytest.mark.parametrize("name", ZOO)
def test_on_the_zoo(name: str) -> None:
    model_fn, params, X, *_ = ZOO[name]()
    want, bound = explicit(model_fn, params, X, None)
    y = torch.zeros(len(optree.tree_leaves(X)[0]))
    assert_close(curvfunc.clipped_grad(model_fn, params, X, y, max_norm=bound, loss_fn=cosh), want, rtol=1e-11)


@pytest.mark.parametrize("per_layer", [False, True])
def test_single_precision(per_layer: bool) -> None:
    module = net().float()
    model_fn, params = curvfunc.functionalize(module)
    X, y = (images(64)[0].float(), images(64)[1])
    got = curvfunc.clipped_grad(model_fn, params, X, y, max_norm=1.0, per_layer=per_layer)
    double = {name: p.double() for name, p in params.items()}
    want = reference.clipped_grad(model_fn, double, X.double(), y, max_norm=1.0, per_layer=per_layer)
    assert_close({name: g.double() for name, g in got.items()}, want, rtol=1e-6)


@pytest.mark.parametrize("subsampling", [None, [2], [5, 0, 5], torch.tensor([1, 1, 1, 4])], ids=str)
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("draws", [False, True], ids=["plain", "one pass for all"])
def test_subsets(draws: bool, per_layer: bool, subsampling: Any) -> None:
    module, (X, y) = net(), images()
    model_fn, params = curvfunc.functionalize(module)

    def moving(params: Any, X: Any) -> Tensor:
        return model_fn(params, X) + 0 * torch.rand(len(X), 1)

    fn = moving if draws else model_fn
    given = {"max_norm": 0.7, "per_layer": per_layer}
    grad, got = compute(fn, params, X, y, (Grad(), ClippedGrad(**given)), loss_fn=SUM, subsampling=subsampling)
    assert_close(got, reference.clipped_grad(model_fn, params, X, y, subsampling=subsampling, **given))
    assert_close(grad, compute(model_fn, params, X, y, Grad(), loss_fn=SUM))


def test_beside_norms_and_other_bounds() -> None:
    """In one call, whatever the order; norms are taken from `BatchL2` where it is there."""
    model_fn, params = curvfunc.functionalize(net())
    X, y = images()
    specs = (ClippedGrad(0.5), BatchL2(), ClippedGrad(2), Grad(), ClippedGrad(0.5, per_layer=True), ClippedGrad(1e9))
    found = compute(model_fn, params, X, y, specs, loss_fn=SUM)
    for i, options in {0: {"max_norm": 0.5}, 2: {"max_norm": 2}, 4: {"max_norm": 0.5, "per_layer": True}}.items():
        assert_close(found[i], reference.clipped_grad(model_fn, params, X, y, **options))
    assert_close(found[1], reference.batch_l2(model_fn, params, X, y, loss_fn=SUM))
    assert_close(found[5], found[3])


def test_bounds_by_name() -> None:
    model_fn, params = curvfunc.functionalize(net())
    X, y = images()
    bounds = {"0": 0.3, "3": 0.2, "3.bias": 0.1, "5": 1e9}
    got = curvfunc.clipped_grad(model_fn, params, X, y, max_norm=bounds)
    grads = reference.batch_grad(model_fn, params, X, y, loss_fn=SUM)
    groups = [(0.3, ["0.weight", "0.bias"]), (0.2, ["3.weight"]), (0.1, ["3.bias"]), (1e9, ["5.weight", "5.bias"])]
    for bound, names in groups:
        norms = sum(grads[name].flatten(1).square().sum(1) for name in names).sqrt()
        for name in names:
            assert_close(got[name], torch.tensordot((bound / norms).clamp(max=1), grads[name], 1))
    assert ClippedGrad({"a": 3, "b": 4}).sensitivity == 5
    assert ClippedGrad(0.5, per_layer=True).sensitivity == ClippedGrad(0.5).sensitivity == 0.5


@pytest.mark.parametrize("per_layer", [False, True])
def test_unevenly_accumulated(per_layer: bool) -> None:
    model_fn, params = curvfunc.functionalize(net())
    X, y = images(13)
    batches = [(X[a:b], y[a:b]) for a, b in ((0, 1), (1, 7), (7, 7), (7, 13))]
    spec = ClippedGrad(0.7, per_layer)
    for loss_fn in (SUM, lambda out, y: F.cross_entropy(out, y, reduction="sum")):
        got = accumulate(model_fn, params, batches, spec, loss_fn=loss_fn)
        assert_close(got, reference.clipped_grad(model_fn, params, X, y, max_norm=0.7, per_layer=per_layer))


@pytest.mark.parametrize("per_layer", [False, True])
def test_transformations(per_layer: bool, compile_backend: str) -> None:
    """Compiled, under vmap over parameters, and differentiated."""
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C))
    model_fn, params = curvfunc.functionalize(module)
    X, y = torch.randn(N, 4), torch.arange(N) % C
    call = lambda p: curvfunc.clipped_grad(model_fn, p, X, y, max_norm=0.7, per_layer=per_layer)
    want = reference.clipped_grad(model_fn, params, X, y, max_norm=0.7, per_layer=per_layer)
    assert_close(torch.compile(call, fullgraph=True, backend=compile_backend)(params), want)
    both = optree.tree_map(lambda p: torch.stack([p, p / 2]), params)
    mapped = torch.vmap(call)(both)
    assert_close({name: g[0] for name, g in mapped.items()}, want)
    size = lambda clipped: sum(g.pow(3).sum() for g in clipped.values())
    other = lambda p: reference.clipped_grad(model_fn, p, X, y, max_norm=0.7, per_layer=per_layer)
    assert_close(torch.func.grad(lambda p: size(call(p)))(params), torch.func.grad(lambda p: size(other(p)))(params))


def test_gradients_of_zero() -> None:
    """Their norm is no divisor, and their derivatives are no NaN."""
    model_fn = lambda p, X: X * p["w"]
    X = torch.tensor([[0.0], [2.0]])
    params = {"w": torch.tensor([3.0], requires_grad=True)}
    loss_fn = lambda out, y: out.square().sum()
    got = curvfunc.clipped_grad(model_fn, params, X, torch.zeros(2), max_norm=0.5, loss_fn=loss_fn)
    assert got["w"].item() == 0.5
    assert torch.autograd.grad(got["w"].sum(), params["w"])[0].item() == 0


def test_no_samples() -> None:
    model_fn, params = curvfunc.functionalize(net())
    X, y = images(0)
    assert_close(curvfunc.clipped_grad(model_fn, params, X, y, max_norm=1.0), optree.tree_map(torch.zeros_like, params))


def test_norms_beyond_all_numbers_show() -> None:
    """In float32 the square of 1e20 is infinite: nobody is left out, or gets away unclipped, without a sign."""
    params = {"w": torch.ones(1, dtype=torch.float32)}
    X = torch.tensor([[1e20], [1.0]], dtype=torch.float32)
    got = curvfunc.clipped_grad(lambda p, X: X * p["w"], params, X, torch.zeros(2), max_norm=1.0, loss_fn=lambda o, y: o.sum())
    assert got["w"].isnan().all()


# -- what has no answer


@pytest.mark.parametrize("bound", [0, -1.0, float("nan"), float("inf")])
def test_bounds_that_are_not_positive(bound: float) -> None:
    with pytest.raises(ValueError, match="max_norm must be positive and finite"):
        ClippedGrad(bound)
    with pytest.raises(ValueError, match=r"max_norm\['b'\] must be positive"):
        ClippedGrad({"a": 1.0, "b": bound})


def test_other_bounds() -> None:
    for bound in ("1", None, True, torch.ones(())):
        with pytest.raises(TypeError, match="max_norm must be a number"):
            ClippedGrad(bound)
    with pytest.raises(TypeError, match="per_layer must be True or False"):
        ClippedGrad(1.0, per_layer=2)
    with pytest.raises(ValueError, match="leave out per_layer"):
        ClippedGrad({"a": 1.0}, per_layer=True)
    model_fn, params = curvfunc.functionalize(net())
    with pytest.raises(ValueError, match=r"no bound for parameter '3.weight', only for \['0', '5'\]"):
        curvfunc.clipped_grad(model_fn, params, *images(), max_norm={"0": 1.0, "5": 1.0})
    with pytest.raises(ValueError, match="bound for '7', which is left no parameter"):
        curvfunc.clipped_grad(model_fn, params, *images(), max_norm={"0": 1, "3": 1, "5": 1, "7": 1})


LOSSES = {
    "cross_entropy averages": F.cross_entropy,
    "mse_loss averages": lambda: F.mse_loss,
    "is no sum over samples": lambda out, y: F.cross_entropy(out, y),
    "cannot be evaluated on the batch twice": lambda out, y: F.nll_loss(
        out.log_softmax(1), torch.arange(N) % C, reduction="sum"
    ),
}


@pytest.mark.parametrize("message", LOSSES)
def test_losses_that_are_no_sum(message: str) -> None:
    model_fn, params = curvfunc.functionalize(net())
    X, y = images()
    loss_fn = LOSSES[message]
    if message.startswith("mse"):
        loss_fn, y = nn.MSELoss(), torch.randn(N, C)
    with pytest.raises(ValueError, match=message):
        curvfunc.clipped_grad(model_fn, params, X, y, max_norm=1.0, loss_fn=loss_fn)


def test_a_mean_shows_where_values_cannot_be_seen() -> None:
    model_fn, params = curvfunc.functionalize(nn.Linear(4, C))
    X, y = torch.randn(N, 4), torch.arange(N) % C
    mean = lambda out, y: (out.sum(1) - y).square().mean()
    call = lambda p: curvfunc.clipped_grad(model_fn, p, X, y, max_norm=1.0, loss_fn=mean)
    with pytest.raises(ValueError, match="is no sum"):
        torch.vmap(call)(optree.tree_map(lambda p: p[None], params))
    with pytest.raises(RuntimeError, match="is no sum"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(params)


@pytest.mark.parametrize("mix", ["detached mean", "number", "neighbour", "normalization"])
def test_models_whose_samples_depend_on_each_other(mix: str) -> None:
    """Although no gradient flows between them: a sample would change the terms of the others."""
    model_fn, params = curvfunc.functionalize(net())
    X, y = images()
    models = {
        "detached mean": lambda p, X: model_fn(p, X) * (1 + X.detach().mean()),
        "number": lambda p, X: model_fn(p, X) / len(X),
        "neighbour": lambda p, X: model_fn(p, X + X.roll(1, 0).detach()),
        "normalization": lambda p, X: model_fn(p, X - X.mean(0)),
    }
    for subsampling in (None, [3, 1]):
        with pytest.raises(ValueError, match="depends on which others are in the batch"):
            curvfunc.clipped_grad(models[mix], params, X, y, max_norm=1.0, subsampling=subsampling)


def test_models_that_ask_for_the_size_of_the_batch_may() -> None:
    model_fn, params = curvfunc.functionalize(net())
    X, y = images()
    reshaping = lambda p, X: model_fn(p, X.reshape(len(X), 1, 5, 5))
    got = curvfunc.clipped_grad(reshaping, params, X.flatten(1), y, max_norm=0.7)
    assert_close(got, reference.clipped_grad(model_fn, params, X, y, max_norm=0.7))
