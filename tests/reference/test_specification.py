"""Products, Gram matrices, Hessians and KFRA against the specification; `test_quantities` has the other quantities."""

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from problems import PROBLEMS, Instance, double
from torch import Tensor, nn
from written_out import WRITTEN_OUT

import curvfunc
from curvfunc import reference

pytestmark = pytest.mark.usefixtures("float64")

N, C = 4, 3

# Of deep networks the dense Hessian takes too long.
DEEP = {"resnet"}
FEW = [
    "mlp, in-place and smooth",
    "mlp: cross-entropy, weights",
    "mlp: squared error",
    "conv2d, groups",
    "scales",
    "nested parameters",
]
NO_LIKELIHOOD = {name for name in PROBLEMS if "custom" in name}


class Rich(nn.Module):
    """LayerNorm, attention, a gate and weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(3), nn.Linear(3, 9)
        self.value, self.gate = nn.Linear(3, 2), nn.Linear(3, 2)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(4, C))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return self.head((self.value(x) * torch.sigmoid(self.gate(x))).flatten(1))


def rich() -> Instance:
    model_fn, params = curvfunc.functionalize(Rich())
    params = {name: p + torch.randn_like(p) / 4 for name, p in params.items()}  # norms start at 1 and 0
    return Instance(model_fn, params, torch.randn(N, 2, 3), torch.arange(N) % C, F.cross_entropy)


def instance(name: str) -> Instance:
    return rich() if name == "rich" else PROBLEMS[name].make()


def both(name: str, problem: Instance, *, seed: bool = False, **options: Any) -> tuple[Any, Any]:
    """What a function and its specification return; functions per parameter are called with two vectors."""
    model_fn, params, X, y, loss_fn = problem
    with double():
        vectors = optree.tree_map(lambda p: torch.randn(2, *p.shape), params)
        if name == "jvp" or name.endswith("_vp"):
            vector = [optree.tree_map(lambda v: v[0], vectors)]
        else:
            vector = [torch.randn_like(options.pop("like"))] if name == "vjp" else []
    data = (X, *vector) if name in ("jvp", "vjp") else (X, y, *vector)
    given = options if name in ("jvp", "vjp") else {"loss_fn": loss_fn, **options}

    def result(module: Any) -> Any:
        draws = {"generator": torch.Generator().manual_seed(3)} if seed else {}
        found = getattr(module, name)(model_fn, params, *data, **given, **draws)
        return optree.tree_map(lambda product, v: product(v), found, vectors) if name.endswith("mp") else found

    return result(curvfunc), result(reference)


@pytest.fixture
def one_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each problem's dense Hessian is formed once."""
    kept: dict[int, tuple[Any, Tensor]] = {}
    hessian = reference.dense.hessian

    def once(model_fn: Any, params: Any, *rest: Any) -> Tensor:
        if id(params) not in kept:
            kept[id(params)] = (params, hessian(model_fn, params, *rest))
        return kept[id(params)][1]

    monkeypatch.setattr("curvfunc.reference.hessian.hessian", once)
    monkeypatch.setattr("curvfunc.reference.products.hessian", once)


# --- the GGN and the Jacobian -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PROBLEMS, "rich"])
def test_gram_matrices_and_products_with_the_jacobian(name: str) -> None:
    problem = instance(name)
    for quantity in ("batch_dot", "batch_dot_total", "ggn_gram", "ggn_gram_total", "ggnmp", "ggn_vp", "jvp"):
        assert_close(*both(quantity, problem))
    assert_close(*both("vjp", problem, like=problem.model_fn(problem.params, problem.X)))
    assert_close(*both("fisher_vp", problem, empirical=True))
    if name not in NO_LIKELIHOOD:
        assert_close(*both("fisher_vp", problem))


@pytest.mark.parametrize("name", [*FEW, "rich"])
def test_subsets(name: str, one_hessian: None) -> None:
    problem, index = instance(name), [2, 0, 2]
    out = problem.model_fn(problem.params, problem.X)
    assert_close(*both("vjp", problem, like=out[index], subsampling=index))
    assert_close(*both("fisher_vp", problem, empirical=True, subsampling=index))
    for quantity in ("batch_dot", "batch_dot_total", "ggn_gram", "ggn_gram_total", "ggnmp", "ggn_vp", "fisher_vp", "jvp"):
        assert_close(*both(quantity, problem, subsampling=index))
    for quantity in ("diag_hessian", "batch_diag_hessian", "hmp", "hessian_vp"):
        assert_close(*both(quantity, problem, subsampling=index))
    for quantity in () if name == "rich" else ("pchmp", "kfra"):
        assert_close(*both(quantity, problem, subsampling=index))


@pytest.mark.parametrize("name", [*FEW, "rich"])
def test_draws(name: str) -> None:
    problem = instance(name)
    for quantity in ("ggn_gram", "ggn_gram_total", "ggnmp", "ggn_vp", "fisher_vp"):
        for options in ({}, {"subsampling": [3, 1, 1]}):
            assert_close(*both(quantity, problem, mc_samples=2, seed=True, **options))


# --- Hessians ---------------------------------------------------------------------------------------------------------

# Norms, products of activations, shared weights: the positive-curvature Hessian is not defined.
NOT_ELEMENTWISE = {
    "tied weight", "weight tied under two names", "recurrence written out", "two inputs of one layer", "layer norm",
    "group norm and transposed convolution", "matrix products without modules", "gpt", "lstm",
    "lstm, sequence first, as long as the batch", "gru", "transformer, sequence first, as long as the batch",
    "transformer, batch first", "rich",
}  # fmt: skip


@pytest.mark.parametrize("name", [*sorted(PROBLEMS.keys() - DEEP), "rich"])
def test_hessians(name: str, one_hessian: None) -> None:
    problem = instance(name)
    for quantity in ("diag_hessian", "batch_diag_hessian", "hmp", "hessian_vp"):
        assert_close(*both(quantity, problem))
    if name not in NOT_ELEMENTWISE:
        assert_close(*both("pchmp", problem))


def test_the_hessian_is_how_the_gradient_changes() -> None:
    """Where torch's kernels are wrong or lack a derivative: by central differences of first derivatives."""
    model_fn, params, X, y, loss_fn = rich()
    v, step = optree.tree_map(torch.randn_like, params), 1e-5

    def gradients(sign: int) -> Any:
        return reference.batch_grad(model_fn, {k: p + sign * step * v[k] for k, p in params.items()}, X, y, loss_fn=loss_fn)

    difference = optree.tree_map(lambda a, b: ((a - b) / (2 * step)).sum(0), gradients(1), gradients(-1))
    assert_close(reference.hessian_vp(model_fn, params, X, y, v, loss_fn=loss_fn), difference, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(NOT_ELEMENTWISE))
def test_where_the_positive_curvature_hessian_is_not_defined(name: str, one_hessian: None) -> None:
    model_fn, params, X, y, loss_fn = instance(name)
    for module in (curvfunc, reference):
        with pytest.raises(NotImplementedError, match="pchmp"):
            module.pchmp(model_fn, params, X, y, loss_fn=loss_fn)


class Skip(nn.Module):
    """Several elementwise operations in a row, one in place, and branches that add up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, C)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(F.silu(h + self.second(h).sigmoid().square(), inplace=True) / (1 + x.square()))


@pytest.mark.parametrize("modify", ["clip", "abs"])
@pytest.mark.parametrize("loss", [F.cross_entropy, nn.MSELoss(reduction="sum")], ids=["cross-entropy", "squared error"])
def test_positive_curvature(loss: Callable[..., Tensor], modify: str) -> None:
    model_fn, params = curvfunc.functionalize(Skip())
    y = torch.arange(N) % C if loss is F.cross_entropy else torch.randn(N, C)
    problem = Instance(model_fn, params, torch.randn(N, 3), y, loss)
    got, want = both("pchmp", problem, modify=modify)
    assert_close(got, want)
    torch.manual_seed(0)
    vectors = optree.tree_map(lambda p: torch.randn(2, *p.shape), params)
    plain = reference.hmp(*problem[:4], loss_fn=loss)
    positive = reference.pchmp(*problem[:4], loss_fn=loss, modify=modify)
    changed = {k: (positive[k](v) - plain[k](v)).norm() > 1e-3 * plain[k](v).norm() for k, v in vectors.items()}
    assert changed["first.weight"]
    assert changed["second.weight"]
    assert not changed["last.weight"]


# --- Kronecker factors, otherwise than BackPACK's ----------------------------------------------------------------

SHARED = ["linear", "shared axis", "two shared axes", "sequence first", "tied weight", "conv1d, stride, padding, dilation",
    "conv2d, groups", "conv2d, depthwise, no bias", "conv3d, same, groups", "recurrence written out", "layer norm"]  # fmt: skip


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("name", SHARED)
def test_kfac_approximations(name: str, approximation: str) -> None:
    problem = PROBLEMS[name].make()
    assert_close(*both("kflr", problem, kfac_approx=approximation))
    assert_close(*both("kflr", problem, kfac_approx=approximation, subsampling=[2, 0, 2]))
    assert_close(*both("kfac", problem, kfac_approx=approximation, mc_samples=2, seed=True))


# --- KFRA -------------------------------------------------------------------------------------------------------------

# The engine has no rule for what is in them, or the graph branches; the specification may still have an answer.
NO_CHAINS = NOT_ELEMENTWISE - {"rich"} | {
    "sequence first", "sequence first, as long as the batch", "low-rank update", "a parameter that is not used", "resnet",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name not in NO_CHAINS])
def test_kfra(name: str) -> None:
    problem = PROBLEMS[name].make()
    got, want = both("kfra", problem)
    if name in WRITTEN_OUT:  # an embedding by one-hot inputs
        other = WRITTEN_OUT[name]
        want = other.factors(both("kfra", problem._replace(model_fn=other.model_fn, params=other.params(problem.params)))[1])
    assert_close(got, want)


@pytest.mark.parametrize("name", sorted(NO_CHAINS))
def test_kfra_refuses(name: str) -> None:
    model_fn, params, X, y, loss_fn = PROBLEMS[name].make()
    with pytest.raises(NotImplementedError, match="kfra"):
        curvfunc.kfra(model_fn, params, X, y, loss_fn=loss_fn)


def test_what_the_output_does_not_depend_on_has_factors_of_zero() -> None:
    params, X, y = {"w": torch.randn(2), "b": torch.randn(C)}, torch.randn(N, C), torch.arange(N) % C
    for model_fn in (lambda p, x: p["b"].expand(len(x), C), lambda p, x: x + p["b"]):
        got, want = (module.kfra(model_fn, params, X, y) for module in (curvfunc, reference))
        assert_close(got, want)
        assert_close(want["w"], (torch.zeros(2, 2),))


class Twice(torch.autograd.Function):
    """An operation that no call of torch shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


MODELS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "used twice": (lambda p, x: F.linear(F.linear(x, p["w"]).tanh(), p["w"]), "more than once"),
    "used again later": (lambda p, x: F.linear(x, p["w"]).tanh() * p["w"].sum(), "more than once"),
    "hidden": (lambda p, x: Twice.apply(F.linear(x, p["w"])).tanh(), "comes from TwiceBackward"),
    "hidden in place": (lambda p, x: hidden(F.linear(x, p["w"]) * 1).tanh(), "comes from .*CopySlices"),
}


def hidden(z: Tensor) -> Tensor:
    z[:, 0].sigmoid_()
    return z


@pytest.mark.parametrize("name", MODELS)
def test_the_specification_of_kfra_refuses_what_it_cannot_see(name: str) -> None:
    model_fn, message = MODELS[name]
    with pytest.raises(NotImplementedError, match=message):
        reference.kfra(model_fn, {"w": torch.randn(C, C)}, torch.randn(N, C), torch.arange(N) % C)
