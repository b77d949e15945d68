"""Jacobians of the output and their inner products, against plain autograd: one sample and one entry at a time."""

from collections import UserDict
from collections.abc import Callable
from functools import cache
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
from curvfunc import NTK, BatchDot, BatchGrad, BatchJac, Output, SqrtGGN, compute, reference
from curvfunc.uses import second_moments

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

Model = tuple[Callable[[Any, Any], Tensor], Any, Any]
SAMPLE = [f"zoo: {name}" for name in ZOO] + list(PROBLEMS)


@cache
def problem(name: str) -> Model:
    """Model, parameters and inputs."""
    made = ZOO[name[5:]]() if name.startswith("zoo: ") else PROBLEMS[name].make()
    return made[0], made[1], made[2]


@cache
def truth(name: str) -> Any:
    return reference.batch_jac(*problem(name))


def network() -> Model:
    """Its outputs have axes."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 6), nn.Unflatten(1, (2, 3)))
    return *curvfunc.functionalize(net), torch.randn(4, 1, 4, 4)


def spoiled(results: Any) -> Any:
    """Tensors like the results, full of NaN."""
    return optree.tree_map(lambda t: torch.full_like(t, torch.nan), results)


# -- batch_jac


@pytest.mark.parametrize("name", SAMPLE)
def test_batch_jac(name: str) -> None:
    assert_close(curvfunc.batch_jac(*problem(name)), truth(name))


@pytest.mark.parametrize("name", SAMPLE)
def test_batch_jac_of_some_samples(name: str) -> None:
    picked = [1, 0, 1] if len(optree.tree_leaves(problem(name)[2])[0]) > 1 else [0, 0]
    got = curvfunc.batch_jac(*problem(name), subsampling=picked, chunk_size=2)
    assert_close(got, optree.tree_map(lambda J: J[picked], truth(name)))


@pytest.mark.parametrize("name", ["mlp, one sample", "conv2d, groups", "tied weight", "lstm", "output without features"])
def test_batch_jac_under_vmap(name: str) -> None:
    model_fn, params, X = problem(name)
    other = optree.tree_map(lambda p: 1.2 * p, params)
    stacked = optree.tree_map(lambda p, q: torch.stack([p, q]), params, other)
    want = optree.tree_map(lambda a, b: torch.stack([a, b]), truth(name), reference.batch_jac(model_fn, other, X))
    assert_close(torch.vmap(lambda p: curvfunc.batch_jac(model_fn, p, X), randomness="same")(stacked), want)
    got = torch.vmap(lambda p: curvfunc.batch_jac(model_fn, p, X, subsampling=[0, 0]), randomness="same")(stacked)
    assert_close(got, optree.tree_map(lambda J: J[:, [0, 0]], want))


@pytest.mark.parametrize("subsampling", [None, [2, 0, 2], torch.tensor([2, 0, 2])])
@pytest.mark.parametrize("name", ["conv2d, groups", "mlp, in-place and smooth", "two inputs of one layer", "scales"])
def test_batch_jac_compiled(name: str, subsampling: Any) -> None:
    torch.compiler.reset()
    model_fn, params, X = problem(name)
    compiled = torch.compile(
        lambda params, X, index: curvfunc.batch_jac(model_fn, params, X, subsampling=index), fullgraph=True, backend="aot_eager"
    )
    want = truth(name) if subsampling is None else optree.tree_map(lambda J: J[torch.as_tensor(subsampling)], truth(name))
    assert_close(compiled(params, X, subsampling), want)


def test_batch_jac_compiled_into_buffers() -> None:
    model_fn, params, X = network()
    buffers = spoiled(curvfunc.batch_jac(model_fn, params, X))
    compiled = torch.compile(
        lambda params, out: curvfunc.batch_jac(model_fn, params, X, out=out), fullgraph=True, backend="aot_eager"
    )
    compiled(params, buffers)
    assert_close(buffers, reference.batch_jac(model_fn, params, X))


def test_batch_jac_is_differentiable() -> None:
    model_fn, params, X = network()
    weights = {k: torch.randn(4, 2, 3, *p.shape) for k, p in params.items()}

    def scalar(params: Any, of: Any) -> Tensor:
        return sum((weights[k] * J).sum() for k, J in of(params).items())

    def by_torch(params: Any) -> Any:
        return torch.func.jacrev(lambda p: model_fn(p, X))(params)

    got = torch.func.grad(scalar)(params, lambda p: curvfunc.batch_jac(model_fn, p, X))
    assert_close(got, torch.func.grad(scalar)(params, by_torch))
    leaves = {k: p.detach().requires_grad_() for k, p in params.items()}
    assert_close(dict(zip(leaves, torch.autograd.grad(scalar(leaves, lambda p: curvfunc.batch_jac(model_fn, p, X)),
                                                      [*leaves.values()], materialize_grads=True, allow_unused=True),
                          strict=True)), got)  # fmt: skip
    tangent = {k: torch.randn_like(p) for k, p in params.items()}
    got = torch.func.jvp(lambda p: curvfunc.batch_jac(model_fn, p, X), (params,), (tangent,))[1]
    assert_close(got, torch.func.jvp(by_torch, (params,), (tangent,))[1])


def test_batch_jac_among_other_quantities() -> None:
    """One forward pass, and what the others are made of."""
    model_fn, params, X = network()
    calls = []
    y = torch.randn(4, 2, 3)

    def counted(params: Any, X: Tensor) -> Tensor:
        calls.append(1)
        return model_fn(params, X)

    specs = {"jac": BatchJac(), "again": BatchJac(), "grad": BatchGrad(), "root": SqrtGGN(), "out": Output()}
    got = compute(counted, params, X, y, specs, loss_fn=F.mse_loss)
    assert len(calls) == 1
    want = reference.batch_jac(model_fn, params, X)
    assert_close(got["jac"], want)
    assert_close(got["again"], want)
    residual = 2 * (got["out"] - y) / y.numel()
    assert_close(got["grad"], {k: torch.einsum("nab...,nab->n...", J, residual) for k, J in want.items()})
    assert_close(got["root"], {k: J.flatten(1, 2).transpose(0, 1) * (2 / y.numel()) ** 0.5 for k, J in want.items()})
    for k, J in got["jac"].items():  # each has memory of its own
        J.zero_()
        assert_close(got["again"][k], want[k])


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_batch_jac_in_the_memory_of_an_earlier_result(chunk_size: int | None) -> None:
    model_fn, params, X = network()
    want = reference.batch_jac(model_fn, params, X)
    for buffers in (spoiled(curvfunc.batch_jac(model_fn, params, X)), spoiled(want)):
        got = curvfunc.batch_jac(model_fn, params, X, chunk_size=chunk_size, out=buffers)
        assert all(got[k] is buffers[k] for k in buffers)
        assert_close(buffers, want)
    y = torch.randn(4, 2, 3)
    _, got = compute(model_fn, params, X, y, (Output(), BatchJac()), loss_fn=F.mse_loss, out=(None, buffers))
    assert got is buffers
    picked = {k: torch.full_like(J[[3, 3]], torch.nan) for k, J in want.items()}
    curvfunc.batch_jac(model_fn, params, X, subsampling=[3, 3], out=picked)
    assert_close(picked, {k: J[[3, 3]] for k, J in want.items()})


@pytest.mark.parametrize("features", [(), (1,), (3,)])
def test_batch_jac_in_memory_where_axes_are_short(features: tuple[int, ...]) -> None:
    """One sample, one entry, or no axis at all."""
    size = torch.Size(features).numel()
    model_fn = lambda p, X: F.linear(X, p["w"], p["b"]).reshape(len(X), *features)
    params = {"w": torch.randn(size, 2), "b": torch.randn(size)}
    for samples in (1, 5):
        X = torch.randn(samples, 2)
        want = reference.batch_jac(model_fn, params, X)
        assert want["w"].shape == (samples, *features, size, 2)
        assert_close(curvfunc.batch_jac(model_fn, params, X), want)
        for buffers in (spoiled(curvfunc.batch_jac(model_fn, params, X)), spoiled(want)):
            assert_close(curvfunc.batch_jac(model_fn, params, X, out=buffers), want)
            assert_close(buffers, want)


def test_batch_jac_is_formed_in_the_memory_of_an_earlier_result() -> None:
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 3)))
    X = torch.randn(20, 200)
    buffers = curvfunc.batch_jac(model_fn, params, X)
    with torch.profiler.profile(profile_memory=True) as profile:
        curvfunc.batch_jac(model_fn, params, X, out=buffers)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < buffers["0.weight"].numel() * 8 / 10


def test_batch_jac_refuses_memory_that_does_not_fit() -> None:
    model_fn, params, X = network()
    right = curvfunc.batch_jac(model_fn, params, X)
    wrong = {**right, "0.bias": right["0.bias"].flatten(1, 2)}
    with pytest.raises(ValueError, match=r"BatchJac, parameter '0\.bias' has shape \(4, 6, 2\).*\(4, 2, 3, 2\)"):
        curvfunc.batch_jac(model_fn, params, X, out=wrong)


def test_batch_jac_of_no_samples_and_no_entries() -> None:
    model_fn, params, X = network()
    none = curvfunc.batch_jac(model_fn, params, X[:0])
    assert {k: J.shape for k, J in none.items()} == {k: (0, 2, 3, *p.shape) for k, p in params.items()}
    empty = curvfunc.batch_jac(lambda p, X: model_fn(p, X)[:, :, :0], params, X)
    assert {k: J.shape for k, J in empty.items()} == {k: (4, 2, 0, *p.shape) for k, p in params.items()}
    stacked = {k: torch.stack([p, p]) for k, p in params.items()}
    assert torch.vmap(lambda p: curvfunc.batch_jac(model_fn, p, X[:0]))(stacked)["0.bias"].shape == (2, 0, 2, 3, 2)


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 40), nn.Linear(40, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.first(x), 0.5))


def test_batch_jac_of_random_models_has_one_draw_per_sample() -> None:
    model_fn, params = curvfunc.functionalize(Dropout())
    J = curvfunc.batch_jac(model_fn, params, torch.randn(4, 3), subsampling=[2, 1, 2])["first.bias"]
    assert torch.equal(J[0], J[2])
    assert not torch.equal(J[0], J[1])


def test_batch_jac_in_low_precision() -> None:
    model_fn, params = curvfunc.functionalize(nn.Linear(4, 3, dtype=torch.bfloat16))
    X = torch.randn(5, 4, dtype=torch.bfloat16)
    got = curvfunc.batch_jac(model_fn, params, X)
    assert torch.equal(got["weight"], torch.einsum("oc,nk->nock", torch.eye(3, dtype=torch.bfloat16), X))
    assert got["bias"].dtype == torch.bfloat16


@pytest.mark.cpu
def test_what_has_no_jacobian_is_refused() -> None:
    w = {"w": torch.randn(3, 2)}
    X = torch.randn(4, 3)
    with pytest.raises(TypeError, match=r"output has dtype torch\.complex128; a real floating-point tensor is needed"):
        curvfunc.batch_jac(lambda p, X: torch.complex(X @ p["w"], X @ p["w"]), w, X)
    with pytest.raises(TypeError, match=r"output has dtype torch\.int64"):
        curvfunc.batch_jac(lambda p, X: (X @ p["w"]).long(), w, X)
    with pytest.raises(TypeError, match="the model returned a tuple"):
        curvfunc.batch_jac(lambda p, X: (X @ p["w"], X), w, X)
    with pytest.raises(ValueError, match="its first axis must be the sample axis"):
        curvfunc.batch_jac(lambda p, X: (X @ p["w"]).sum(0), w, X)
    with pytest.raises(ValueError, match="subsampling has index 4"):
        curvfunc.batch_jac(lambda p, X: X @ p["w"], w, X, subsampling=[4])
    with pytest.raises(ValueError, match="chunk_size must be a positive int"):
        curvfunc.batch_jac(lambda p, X: X @ p["w"], w, X, chunk_size=0)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"(?i)batch"):
        curvfunc.batch_jac(*curvfunc.functionalize(net), X)


# -- ntk


def products(J: Any, K: Any, params: Any) -> Any:
    """Inner products of Jacobians, [N, C, M, C]."""

    def kernel(p: Tensor, j: Tensor, k: Tensor) -> Tensor:
        j, k = (t.reshape(len(t), t.shape[1 : t.ndim - p.ndim].numel(), p.numel()) for t in (j, k))
        return torch.einsum("ncp,mdp->ncmd", j, k)

    return optree.tree_map(kernel, params, J, K)


def total(tree: Any) -> Tensor:
    return sum(optree.tree_leaves(tree))


def halves(X: Any, at: int = 1) -> tuple[Any, Any]:
    """The first samples, and the others."""
    return optree.tree_map(lambda x: x[:at], X), optree.tree_map(lambda x: x[at:], X)


@pytest.mark.parametrize("name", SAMPLE)
def test_ntk(name: str) -> None:
    model_fn, params, X = problem(name)
    J = truth(name)
    want = products(J, J, params)
    assert_close(curvfunc.ntk(model_fn, params, X), want)
    assert_close(curvfunc.ntk(model_fn, params, X, chunk_size=1), want)
    assert_close(curvfunc.ntk_total(model_fn, params, X), total(want))
    some = optree.tree_map(lambda j: j[[0, 0]], J)
    assert_close(curvfunc.ntk(model_fn, params, X, subsampling=[0, 0]), products(some, some, params))


@pytest.mark.parametrize("name", SAMPLE)
def test_ntk_of_two_batches(name: str) -> None:
    model_fn, params, X = problem(name)
    first, second = halves(X)
    J, K = halves(truth(name))
    want = products(J, K, params)
    assert_close(curvfunc.ntk(model_fn, params, first, second), want)
    assert_close(curvfunc.ntk(model_fn, params, second, first, chunk_size=1), products(K, J, params))
    assert_close(curvfunc.ntk_total(model_fn, params, first, second), total(want))
    twice = optree.tree_map(lambda j: j[[0, 0]], J)
    assert_close(curvfunc.ntk(model_fn, params, first, X, subsampling=[0, 0]), products(twice, truth(name), params))


@pytest.mark.parametrize("name", ["conv2d, groups", "tied weight", "low-rank update", "keyword inputs", "classes at positions"])
def test_ntk_is_that_of_the_reference(name: str) -> None:
    model_fn, params, X = problem(name)
    first, second = halves(X, 2)
    for of in ("ntk", "ntk_total"):
        ours, theirs = getattr(curvfunc, of), getattr(reference, of)
        assert_close(ours(model_fn, params, X, subsampling=[1, 1]), theirs(model_fn, params, X, subsampling=[1, 1]))
        given = (model_fn, params, first, second)
        assert_close(ours(*given, subsampling=[1, 0, 1]), theirs(*given, subsampling=[1, 0, 1]))


@pytest.mark.parametrize("block", [1 << 22, 64])
@pytest.mark.parametrize("name", ["mlp: squared error", "classes at pixels", "conv2d, groups", "shared axis", "gpt"])
def test_ntk_in_blocks_and_by_either_way(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moments, "BLOCK_BYTES", block)
    model_fn, params, X = problem(name)
    first, second = halves(X)
    want = products(*halves(truth(name)), params)
    for way in ("_gram_of_positions", "_gram_of_gradients"):
        with monkeypatch.context() as patch:
            for other in ("_gram_of_positions", "_gram_of_gradients"):
                patch.setattr(second_moments, other, getattr(second_moments, way))
            assert_close(curvfunc.ntk(model_fn, params, first, second), want)


@pytest.mark.parametrize("name", ["conv2d, groups", "tied weight", "lstm", "keyword inputs"])
def test_ntk_under_vmap(name: str) -> None:
    model_fn, params, X = problem(name)
    other = optree.tree_map(lambda p: 1.2 * p, params)
    stacked = optree.tree_map(lambda p, q: torch.stack([p, q]), params, other)
    first, second = halves(X)
    for given in ((X,), (first, second)):
        want = [reference.ntk(model_fn, p, *given) for p in (params, other)]
        got = torch.vmap(lambda p: curvfunc.ntk(model_fn, p, *given), randomness="same")(stacked)  # noqa: B023
        assert_close(got, optree.tree_map(lambda a, b: torch.stack([a, b]), *want))


@pytest.mark.parametrize("subsampling", [None, [1, 0, 1], torch.tensor([1, 0, 1])])
@pytest.mark.parametrize("name", ["conv2d, groups", "two inputs of one layer", "keyword inputs", "scales"])
def test_ntk_compiled(name: str, subsampling: Any) -> None:
    torch.compiler.reset()
    model_fn, params, X = problem(name)
    first, second = halves(X, 2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(params: Any, first: Any, second: Any, index: Any) -> Any:
        one = curvfunc.ntk(model_fn, params, first, subsampling=index)
        return one, curvfunc.ntk(model_fn, params, first, second, subsampling=index)

    J, K = halves(truth(name), 2)
    J = J if subsampling is None else optree.tree_map(lambda j: j[torch.as_tensor(subsampling)], J)
    assert_close(compiled(params, first, second, subsampling), (products(J, J, params), products(J, K, params)))


def test_ntk_is_differentiable() -> None:
    model_fn, params, X = network()
    first, second = X[:1], X[1:]

    def by_torch(p: Any) -> Tensor:
        jacobian = torch.func.jacrev(lambda p: model_fn(p, X))(p)
        return total(products(*halves(jacobian), p))

    weights = torch.randn(1, 6, 3, 6)
    got = torch.func.grad(lambda p: (weights * curvfunc.ntk_total(model_fn, p, first, second)).sum())(params)
    assert_close(got, torch.func.grad(lambda p: (weights * by_torch(p)).sum())(params))


def test_ntk_among_other_quantities() -> None:
    model_fn, params, X = network()
    y = torch.randn(4, 2, 3)
    specs = {"ntk": NTK(), "jac": BatchJac(), "dot": BatchDot(), "out": Output()}
    got = compute(model_fn, params, X, y, specs, loss_fn=F.mse_loss, chunk_size=4)
    assert_close(got["ntk"], products(got["jac"], got["jac"], params))
    residual = (2 * (got["out"] - y) / y.numel()).flatten(1)
    assert_close(got["dot"], {k: torch.einsum("nc,ncmd,md->nm", residual, K, residual) for k, K in got["ntk"].items()})
    buffers = spoiled(got["ntk"])
    assert compute(model_fn, params, X, y, NTK(), loss_fn=F.mse_loss, out=buffers) is buffers
    assert_close(buffers, got["ntk"])


@pytest.mark.cpu
def test_ntk_of_two_batches_makes_no_other_products() -> None:
    """One sample against many takes no memory for the products of the many with each other, and no Jacobian."""
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(50, 60), nn.ReLU(), nn.Linear(60, 2)))
    X = torch.randn(300, 50)
    with torch.profiler.profile(profile_memory=True) as profile:
        curvfunc.ntk(model_fn, params, X[:1], X[1:])
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 8 * (2 * 300) ** 2 / 4  # a quarter of the products of all with all
    assert largest < 8 * 300 * 2 * 50 * 60 / 4  # a quarter of the Jacobian of the first layer


def test_ntk_of_no_samples_and_no_entries() -> None:
    model_fn, params, X = network()
    ntk = lambda *given: {t.shape for t in curvfunc.ntk(model_fn, params, *given).values()}
    assert ntk(X[:0]) == {(0, 6, 0, 6)}
    assert ntk(X[:0], X[:0]) == {(0, 6, 0, 6)}
    assert ntk(X[:0], X) == {(0, 6, 4, 6)}
    assert ntk(X, X[:0]) == {(4, 6, 0, 6)}
    without = lambda *given: {t.shape for t in curvfunc.ntk(lambda p, X: model_fn(p, X)[:, :, :0], params, *given).values()}
    assert without(X) == {(4, 0, 4, 0)}
    assert without(X[:1], X[1:]) == {(1, 0, 3, 0)}


def test_two_batches_must_be_alike() -> None:
    model_fn, params, X = network()
    for other in (X.float(), X[..., :3], {"x": X}, [X, X], 3, X[0, 0, 0, 0]):
        with pytest.raises(ValueError, match=r"X2 must be like X .* X has torch\.float64 \(4, 1, 4, 4\) on cpu and X2 has"):
            curvfunc.ntk(model_fn, params, X, other)
    with pytest.raises(ValueError, match="subsampling has index 2"):
        curvfunc.ntk(model_fn, params, X[:2], X, subsampling=[2])


@pytest.mark.parametrize("mapping", [dict, UserDict])
def test_two_batches_in_dictionaries_of_another_order(mapping: Any) -> None:
    """What has the same name goes together, or nothing does."""
    model_fn = lambda p, X: F.linear(X["a"], p["w"]) + F.linear(X["b"], p["w"]).tanh()
    params, X = {"w": torch.randn(3, 2)}, {"a": torch.randn(4, 2), "b": torch.randn(4, 2)}
    first = mapping({k: x[:1] for k, x in X.items()})
    second = mapping({k: X[k][1:] for k in ("b", "a")})
    want = curvfunc.reference.ntk(model_fn, params, {k: x[:1] for k, x in X.items()}, {k: x[1:] for k, x in X.items()})
    if mapping is dict:
        assert_close(curvfunc.ntk(model_fn, params, first, second), want)
    else:
        with pytest.raises(ValueError, match="X2 must be like X"):
            curvfunc.ntk(model_fn, params, first, second)
    again = mapping({k: x[1:] for k, x in X.items()})
    assert_close(curvfunc.ntk(model_fn, params, first, again), want)


def test_ntk_of_random_models_has_one_draw_per_sample() -> None:
    model_fn, params = curvfunc.functionalize(Dropout())
    X = torch.randn(4, 3)
    K = curvfunc.ntk_total(model_fn, params, X[:2], X[2:], subsampling=[0, 1, 0])
    assert torch.equal(K[0], K[2])
    assert not torch.equal(K[0], K[1])


AS_DATA: dict[str, Any] = {
    "mean": lambda p, x: (x - x.mean(0)) @ p["w"],
    "detached": lambda p, x: (lambda h: h - h.mean(0).detach())(x @ p["w"]),
    "count": lambda p, x: x @ p["w"] / len(x),
    "roll": lambda p, x: (x + x.roll(1, 0)) @ p["w"],
    "place": lambda p, x: x @ p["w"] * (1 + torch.arange(len(x)))[:, None],
    "python": lambda p, x: x @ p["w"] * (2.0 if len(x) < 5 else 3.0),
    "apart": lambda p, x: x @ p["w"] + p["c"],
}


@pytest.mark.parametrize("name", AS_DATA)
def test_kernels_of_batches_that_are_data(name: str) -> None:
    """Samples of two batches do not meet: each has the company of its own."""
    params, X, X2 = {"w": torch.randn(3, 2), "c": torch.randn(2)}, torch.randn(4, 3), torch.randn(2, 3)
    J, J2 = (curvfunc.batch_jac(AS_DATA[name], params, x) for x in (X, X2))
    want = {k: torch.einsum("ncp,mdp->ncmd", J[k].flatten(2), J2[k].flatten(2)) for k in params}
    assert_close(curvfunc.ntk(AS_DATA[name], params, X, X2), want)
    picked = curvfunc.ntk(AS_DATA[name], params, X, X2, subsampling=[3, 0, 3])
    assert_close(picked, {k: t[[3, 0, 3]] for k, t in want.items()})
    assert_close(curvfunc.ntk_total(AS_DATA[name], params, X, X2), sum(want.values()))
