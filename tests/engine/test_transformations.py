"""Every quantity under vmap, grad, jvp, autograd and torch.compile."""

import functools
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from architectures import Pooled
from helpers import assert_close
from problems import PROBLEMS, Instance
from quantities import EXACT, QUANTITIES, SAMPLED
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, stack_module_state, vmap

import curvfunc
from curvfunc import KFAC, KFLR, BatchGrad, BatchL2, DiagGGN, Grad, Loss, Output, SqrtGGN, Variance, reference

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # fused attention runs in a loop under torch.vmap
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

N, C = 4, 3

# A rule for everything, groups and in-place operations, several sites, no rule, another loss, another type of parameters.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, C)), (5,)),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, C)),
        (2, 3, 3),
    ),
    "shared axis": (Pooled, (2, 5)),
    "norms": (lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.PReLU(), nn.Linear(4, C)), (5,)),
}
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[], Tensor]]] = {
    "cross-entropy": (F.cross_entropy, lambda: torch.tensor([0, 1, 2, 1])),
    "squared error": (nn.MSELoss(reduction="sum"), lambda: torch.randn(N, C)),
    "bce": (F.binary_cross_entropy_with_logits, lambda: torch.rand(N, C)),
    "custom": (lambda out, y: (out.exp() - y * out).mean(), lambda: torch.rand(N, C)),
}


def call(name: str, function: Callable[..., Any], problem: Instance, params: Any, **kwargs: Any) -> Any:
    """One quantity, with draws from the default generator that are the same each time."""
    torch.manual_seed(11)
    model_fn, _, X, y, loss_fn = problem
    return function(model_fn, params, X, y, loss_fn=loss_fn, **QUANTITIES[name].kwargs, **kwargs)


def network(name: str, loss: str = "cross-entropy") -> Instance:
    make, shape = NETWORKS[name]
    model_fn, params = curvfunc.functionalize(make())
    loss_fn, targets = LOSSES[loss]
    return Instance(model_fn, params, torch.randn(N, *shape), targets(), loss_fn)


# --- vmap -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_vmap_over_an_ensemble(name: str, quantity: str) -> None:
    problem = network(name)
    make, _ = NETWORKS[name]
    members = [make() for _ in range(3)]
    stacked, _ = stack_module_state(members)
    stacked = {k: v.detach() for k, v in stacked.items()}
    function = QUANTITIES[quantity].function
    got = vmap(lambda params: call(quantity, function, problem, params), randomness="same")(stacked)
    each = [call(quantity, function, problem, {k: v[i] for k, v in stacked.items()}) for i in range(3)]
    assert_close(got, optree.tree_map(lambda *results: torch.stack(results), *each))


@pytest.mark.parametrize("function", [curvfunc.batch_grad, curvfunc.kflr, curvfunc.diag_hessian])
def test_vmap_of_a_slope_that_is_a_bias_too(function: Callable[..., Any]) -> None:
    """Copies of it for each sample meet torch's own kernel, which warns under nested vmap."""
    model_fn = lambda p, x: F.linear(F.prelu(x, p["a"]), p["w"], p["a"])
    X, y = torch.randn(N, C), torch.tensor([0, 1, 2, 1])
    params = {"a": torch.randn(2, C), "w": torch.randn(2, C, C)}
    got = vmap(lambda p: function(model_fn, p, X, y))(params)
    each = [function(model_fn, {k: v[i] for k, v in params.items()}, X, y) for i in range(2)]
    assert_close(got, optree.tree_map(lambda *results: torch.stack(results), *each))


@pytest.mark.parametrize("loss", LOSSES)
def test_vmap_over_an_ensemble_with_each_loss(loss: str) -> None:
    problem = network("mlp", loss)
    params = {k: torch.stack([v, 1.5 * v]) for k, v in problem.params.items()}
    for quantity in ("batch_grad", "diag_ggn", "sqrt_ggn, 2 samples", "kflr"):
        function = QUANTITIES[quantity].function
        got = vmap(lambda p: call(quantity, function, problem, p), randomness="same")(params)  # noqa: B023
        each = [call(quantity, function, problem, {k: v[i] for k, v in params.items()}) for i in range(2)]
        if quantity == "sqrt_ggn, 2 samples" and loss == "custom":  # a root is unique up to rotations
            continue
        assert_close(got, optree.tree_map(lambda *results: torch.stack(results), *each))


def test_vmap_draws_for_each_member() -> None:
    problem = network("mlp", "squared error")
    same = {k: torch.stack([v, v]) for k, v in problem.params.items()}

    def diagonal(params: Any) -> Any:
        return call("diag_ggn, 2 samples", curvfunc.diag_ggn, problem, params)

    different = vmap(diagonal, randomness="different")(same)
    assert not torch.allclose(different["0.weight"][0], different["0.weight"][1])


def test_vmap_over_data() -> None:
    problem = network("cnn")
    X, y = torch.randn(2, *problem.X.shape), torch.tensor([[0, 1, 2, 1], [2, 2, 0, 0]])
    specs = (BatchGrad(), DiagGGN(), KFLR())

    def results(X: Tensor, y: Tensor) -> Any:
        return curvfunc.compute(problem.model_fn, problem.params, X, y, specs)

    assert_close(vmap(results)(X, y), optree.tree_map(lambda *r: torch.stack(r), *map(results, X, y)))


def test_vmap_over_subsets_in_lists() -> None:
    problem = network("mlp")
    params = {k: torch.stack([v, 1.5 * v]) for k, v in problem.params.items()}
    got = vmap(lambda p: curvfunc.batch_grad(problem.model_fn, p, problem.X, problem.y, subsampling=[2, 0]))(params)
    assert_close(got, {k: v[:, [2, 0]] for k, v in vmap(lambda p: curvfunc.batch_grad(problem.model_fn, p, problem.X,
                                                                                      problem.y))(params).items()})  # fmt: skip


# --- grad and jvp -----------------------------------------------------------------------------------------------------


def weighted_sum(tree: Any) -> Tensor:
    """A scalar that depends on every entry in its own way."""
    leaves = optree.tree_leaves(tree)
    return sum(((leaf * torch.linspace(1, 2, leaf.numel()).reshape(leaf.shape)).sum() for leaf in leaves), torch.zeros(()))


def slope(quantity: str, problem: Instance, tangents: dict[str, Tensor]) -> Any:
    """The derivative along ``tangents``, by the specification.

    Its factors and Hessians are made sample by sample from graphs of their own, which cannot be differentiated: for them it
    is a central difference.
    """
    case = QUANTITIES[quantity]
    value = lambda params: call(quantity, case.reference, problem, params)
    if not rounded(quantity):
        return jvp(value, (problem.params,), (tangents,))[1]
    ahead, behind = (value({k: v + h * tangents[k] for k, v in problem.params.items()}) for h in (1e-5, -1e-5))
    return optree.tree_map(lambda a, b: (a - b) / 2e-5, ahead, behind)


def rounded(quantity: str) -> bool:
    return "kf" in quantity or "hessian" in quantity


def tolerance(quantity: str) -> float:
    return 1e-6 if rounded(quantity) else 1e-8


def directions(problem: Instance) -> dict[str, Tensor]:
    return {k: torch.randn_like(v) for k, v in problem.params.items()}


def along(gradient: dict[str, Tensor], tangents: dict[str, Tensor]) -> Tensor:
    return torch.stack([(gradient[k] * t).sum() for k, t in tangents.items()]).sum()


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_grad(name: str, quantity: str) -> None:
    problem = network(name)
    tangents, function = directions(problem), QUANTITIES[quantity].function
    gradient = grad(lambda p: weighted_sum(call(quantity, function, problem, p)))(problem.params)
    want = weighted_sum(slope(quantity, problem, tangents))
    assert_close(along(gradient, tangents), want, tolerance(quantity))


@pytest.mark.parametrize("quantity", ["batch_grad", "diag_ggn", "batch_diag_ggn", "kflr"])
@pytest.mark.parametrize("loss", LOSSES)
def test_grad_with_each_loss(loss: str, quantity: str) -> None:
    problem = network("mlp", loss)
    tangents, function = directions(problem), QUANTITIES[quantity].function
    gradient = grad(lambda p: weighted_sum(call(quantity, function, problem, p)))(problem.params)
    want = weighted_sum(slope(quantity, problem, tangents))
    assert_close(along(gradient, tangents), want, tolerance(quantity))


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_jvp(name: str, quantity: str) -> None:
    problem = network(name)
    tangents, function = directions(problem), QUANTITIES[quantity].function
    out, change = jvp(lambda p: call(quantity, function, problem, p), (problem.params,), (tangents,))
    assert_close(out, call(quantity, function, problem, problem.params))
    want = slope(quantity, problem, tangents)
    if rounded(quantity):  # factors may be constant, those of the first layer's inputs for one
        scale = max(leaf.norm() for leaf in optree.tree_leaves(want))
        for got, expected in zip(optree.tree_leaves(change), optree.tree_leaves(want), strict=True):
            assert (got - expected).norm() <= 1e-6 * scale
    else:
        assert_close(change, want, tolerance(quantity))


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_autograd(name: str, quantity: str) -> None:
    """Parameters that require grad give results with a graph, without torch.func."""
    problem = network(name)
    function = QUANTITIES[quantity].function
    objective = lambda params: weighted_sum(call(quantity, function, problem, params))
    leaves = {k: v.clone().requires_grad_() for k, v in problem.params.items()}
    value = objective(leaves)
    assert value.requires_grad
    got = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    assert_close(dict(zip(leaves, got, strict=True)), grad(objective)(problem.params), rtol=1e-8)


def test_grad_with_respect_to_inputs_and_scale() -> None:
    """The loss may close over what is differentiated, and inputs have derivatives too."""
    problem = network("cnn")

    def penalty(function: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        return lambda X: weighted_sum(function(problem.model_fn, problem.params, X, problem.y))

    assert_close(grad(penalty(curvfunc.batch_l2))(problem.X), grad(penalty(reference.batch_l2))(problem.X), 1e-8)
    X = problem.X.clone().requires_grad_()
    got = torch.autograd.grad(penalty(curvfunc.diag_ggn)(X), X)[0]
    assert_close(got, grad(penalty(reference.diag_ggn))(problem.X), rtol=1e-8)


def test_second_derivative() -> None:
    problem = network("mlp")
    objective = lambda function: lambda p: weighted_sum(call("batch_l2", function, problem, p))
    twice = lambda f: grad(lambda p: weighted_sum(grad(f)(p)))(problem.params)
    assert_close(twice(objective(curvfunc.batch_l2)), twice(objective(reference.batch_l2)), rtol=1e-8)


def test_no_graph_without_need() -> None:
    problem = network("mlp")
    leaves = {k: v.clone().requires_grad_() for k, v in problem.params.items()}
    specs = (Loss(), Output(), Grad(), BatchGrad(), DiagGGN(), KFAC())
    arguments = (problem.X, problem.y, specs)
    assert not any(t.requires_grad for t in optree.tree_leaves(curvfunc.compute(problem.model_fn, problem.params, *arguments)))
    with torch.no_grad():
        inside = curvfunc.compute(problem.model_fn, leaves, *arguments)
    assert not any(t.requires_grad for t in optree.tree_leaves(inside))
    outside = curvfunc.compute(problem.model_fn, leaves, *arguments)
    factors = outside[5]
    assert all(t.requires_grad for t in optree.tree_leaves(outside[:5]))
    assert {k: [t.requires_grad for t in f] for k, f in factors.items() if k == "0.weight"} == {"0.weight": [True, False]}


@pytest.mark.parametrize("name", ["mlp", "norms"])
def test_inference_mode(name: str) -> None:
    problem = network(name)
    arguments = (problem.model_fn, problem.params, problem.X, problem.y, (Loss(), Grad(), BatchL2(), DiagGGN(), KFLR()))
    want = curvfunc.compute(*arguments)
    leaves = {k: v.clone().requires_grad_() for k, v in problem.params.items()}
    with torch.inference_mode():
        got = curvfunc.compute(*arguments)
        made_inside = curvfunc.compute(problem.model_fn, problem.params, problem.X.clone(), *arguments[3:])
        required = curvfunc.compute(problem.model_fn, leaves, *arguments[2:])
    for results in (got, made_inside, required):
        assert not any(t.requires_grad for t in optree.tree_leaves(results))
        assert_close(results, want)


def test_grad_of_a_vmapped_ensemble() -> None:
    problem = network("shared axis")
    stacked = {k: torch.stack([v, 1.1 * v]) for k, v in problem.params.items()}
    objective = lambda function: lambda p: weighted_sum(vmap(lambda q: call("batch_l2", function, problem, q))(p))
    assert_close(grad(objective(curvfunc.batch_l2))(stacked), grad(objective(reference.batch_l2))(stacked), rtol=1e-8)


# --- torch.compile ----------------------------------------------------------------------------------------------------


def step(problem: Instance, specs: Any, **kwargs: Any) -> Callable[..., Any]:
    """A training step that uses everything asked for; ``problem`` gives model and loss, data comes in."""
    model_fn, loss_fn = problem.model_fn, problem.loss_fn

    def train(params: Any, X: Any, y: Any) -> Any:
        results = curvfunc.compute(model_fn, params, X, y, {"grad": Grad(), "asked": specs}, loss_fn=loss_fn, **kwargs)
        new = {k: p - 0.1 * results["grad"][k] for k, p in params.items()}
        return new, results["asked"]

    return train


def check_compiled(problem: Instance, specs: Any, backend: str = "aot_eager", rtol: float = 1e-10, **kwargs: Any) -> None:
    """Three steps with new data give what the same steps give in eager mode, compiled once, without a graph break."""
    torch._dynamo.reset()
    plain = step(problem, specs, **kwargs)
    compiled = torch.compile(plain, fullgraph=True, backend=backend, dynamic=False)
    mine = theirs = dict(problem.params)
    for i in range(3):
        X = optree.tree_map(lambda t: t if i == 0 or not t.is_floating_point() else torch.randn_like(t), problem.X)  # noqa: B023
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            theirs, got = compiled(theirs, X, problem.y)
        mine, want = plain(mine, X, problem.y)
        assert_close(got, want, rtol)
        assert_close(theirs, mine, rtol)


@pytest.mark.parametrize("quantity", EXACT)
def test_compiled_training_step(quantity: str) -> None:
    check_compiled(network("mlp"), EXACT[quantity].spec)


@pytest.mark.parametrize("name", ["cnn", "shared axis", "norms"])
def test_compiled_training_step_with_everything(name: str) -> None:
    check_compiled(network(name), [case.spec for case in EXACT.values()])


@pytest.mark.parametrize("name", ["tied weight", "sequence first, as long as the batch", "keyword inputs", "gpt", "lstm"])
def test_compiled_architectures(name: str) -> None:
    check_compiled(PROBLEMS[name].make(), (Loss(), BatchGrad(), DiagGGN()))


@pytest.mark.parametrize(
    "loss",
    [
        "mlp: cross-entropy, smoothed",
        "mlp: cross-entropy, ignored",
        "mlp: cross-entropy, probabilities weighted, smoothed, sum",
        "mlp: squared error, sum",
        "mlp: bce, weights",
        "mlp: custom, partial",
        "mlp: custom, targets in a dict",
    ],
)
def test_compiled_losses(loss: str) -> None:
    """Functions, partials and modules, whose tensors are no constants of the compiled code."""
    check_compiled(PROBLEMS[loss].make(), (Loss(), BatchGrad(), DiagGGN()))


def test_compiled_losses_that_are_no_functions() -> None:
    """A module of one's own."""
    problem = PROBLEMS["mlp: custom, Poisson"].make()
    poisson = problem.loss_fn
    check_compiled(problem, DiagGGN())
    check_compiled(problem._replace(loss_fn=lambda out, y: poisson(out, y)), DiagGGN())


def test_compiled_loss_from_inside() -> None:
    """A loss made in the compiled region from tensors that come in."""
    problem = network("mlp")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(params: Any, X: Tensor, y: Tensor, weight: Tensor) -> Any:
        loss = functools.partial(F.cross_entropy, weight=weight, label_smoothing=0.1)
        return curvfunc.diag_ggn(problem.model_fn, params, X, y, loss_fn=loss)

    for i in range(3):
        weight = torch.rand(C)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = compiled(problem.params, problem.X, problem.y, weight)
        loss = nn.CrossEntropyLoss(weight, label_smoothing=0.1)
        assert_close(got, curvfunc.diag_ggn(*problem[:4], loss_fn=loss))


@pytest.mark.parametrize("quantity", SAMPLED)
def test_compiled_draws_are_fresh(quantity: str) -> None:
    problem = network("mlp", "squared error")
    torch._dynamo.reset()
    model_fn, _, X, y, loss_fn = problem
    function, kwargs = SAMPLED[quantity].function, SAMPLED[quantity].kwargs

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(params: Any, X: Tensor, y: Tensor) -> Any:
        return function(model_fn, params, X, y, loss_fn=loss_fn, **kwargs)

    torch.manual_seed(5)
    draws = [compiled(problem.params, X, y)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        draws.append(compiled(problem.params, X, y))
        torch.manual_seed(5)
        again = compiled(problem.params, X, y)
    first, second = (optree.tree_leaves(d)[1] for d in draws)
    assert not torch.allclose(first, second)
    assert_close(again, draws[0], rtol=0.0)
    torch.manual_seed(5)  # and they are the draws of eager mode
    assert_close(again, function(model_fn, problem.params, X, y, loss_fn=loss_fn, **kwargs))


def test_compiled_draws_have_the_right_expectation() -> None:
    problem = network("mlp")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(params: Any, X: Tensor, y: Tensor) -> Any:
        return curvfunc.diag_ggn(problem.model_fn, params, X, y, mc_samples=1)

    draws = torch.stack([compiled(*problem[1:4])["0.weight"] for _ in range(400)])
    error = (draws.mean(0) - curvfunc.diag_ggn(*problem[:4])["0.weight"]).abs()
    assert (error <= 5 * draws.std(0) / 20 + 1e-12).all()


def test_compiled_with_a_plain_function() -> None:
    def model_fn(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return F.linear(F.linear(X, params["first"]).tanh(), params["second"]) * params["scale"]

    params = {"first": torch.randn(4, 5), "second": torch.randn(C, 4), "scale": torch.rand(C)}
    check_compiled(network("mlp")._replace(model_fn=model_fn, params=params), (BatchGrad(), DiagGGN(), KFLR()))


def test_compiled_with_subsets_and_chunks() -> None:
    problem = network("cnn")
    check_compiled(problem, (BatchGrad(), DiagGGN(), Loss()), subsampling=[2, 0, 2], chunk_size=2)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(params: Any, X: Tensor, y: Tensor, index: Tensor) -> Any:
        return curvfunc.batch_grad(problem.model_fn, params, X, y, subsampling=index)

    for index in ([0, 3], [1, 1]):
        got = compiled(*problem[1:4], torch.tensor(index))
        assert_close(got, curvfunc.batch_grad(*problem[:4], subsampling=index))


def test_compiled_with_buffers_that_change() -> None:
    """Statistics and frozen parameters are read at each call, changed in place or not, without compiling anew."""
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(9, C)).eval()
    net[4].requires_grad_(False)
    model_fn, params = curvfunc.functionalize(net)
    X, y = torch.randn(N, 2, 4), torch.tensor([0, 1, 2, 1])
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(params: Any, X: Tensor, y: Tensor) -> Any:
        return curvfunc.compute(model_fn, params, X, y, (Output(), BatchGrad(), DiagGGN()))

    results = []
    for i in range(3):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = compiled(params, X, y)
        assert_close(got, curvfunc.compute(model_fn, params, X, y, (Output(), BatchGrad(), DiagGGN())))
        results.append(got[0])
        with torch.no_grad():
            net[1].running_mean.add_(0.5)
            net[4].weight.mul_(1.5)
    assert not torch.allclose(results[0], results[1])
    assert not torch.allclose(results[1], results[2])


def test_compiled_under_grad() -> None:
    problem = network("mlp")
    torch._dynamo.reset()
    objective = lambda p, X, y: weighted_sum(curvfunc.batch_l2(problem.model_fn, p, X, y))
    compiled = torch.compile(grad(objective), fullgraph=True, backend="aot_eager")
    arguments = problem[1:4]
    assert_close(compiled(*arguments), grad(objective)(*arguments), rtol=1e-8)


def test_compiled_under_vmap() -> None:
    problem = network("mlp")
    torch._dynamo.reset()
    stacked = {k: torch.stack([v, 1.1 * v]) for k, v in problem.params.items()}
    ensemble = vmap(lambda p, X, y: curvfunc.diag_ggn(problem.model_fn, p, X, y), in_dims=(0, None, None))
    compiled = torch.compile(ensemble, fullgraph=True, backend="aot_eager")
    assert_close(compiled(stacked, problem.X, problem.y), ensemble(stacked, problem.X, problem.y))


def test_compiled_by_the_default_backend(compile_backend: str) -> None:
    """Code generation included; a preconditioned step as in the example, sampled and exact."""
    problem = network("cnn")
    check_compiled(problem, (Loss(), BatchL2(), Variance(), DiagGGN(), SqrtGGN(), KFLR()), compile_backend, rtol=1e-9)


@pytest.mark.parametrize("where", ["params", "X"])
def test_tangents_without_jvp_are_refused(where: str) -> None:
    """Results would lack them, without a word."""
    model_fn, params = curvfunc.functionalize(nn.Linear(3, 2))
    X, y = torch.randn(4, 3), torch.arange(4) % 2
    with forward_ad.dual_level():
        if where == "X":
            X = forward_ad.make_dual(X, torch.ones_like(X))
        else:
            params["bias"] = forward_ad.make_dual(params["bias"], torch.ones(2))
        for call in (
            lambda: curvfunc.batch_grad(model_fn, params, X, y),
            lambda: curvfunc.ggn_vp(model_fn, params, X, y, {k: torch.ones_like(p) for k, p in params.items()}),
        ):
            with pytest.raises(NotImplementedError, match=r"torch\.func\.jvp"):
                call()
        curvfunc.batch_grad(model_fn, curvfunc.functionalize(nn.Linear(3, 2))[1], torch.randn(4, 3), y)
