"""Every quantity on every problem against the specification, and what holds between quantities."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from problems import PROBLEMS, Instance, tagged
from quantities import EXACT, QUANTITIES, SAMPLED, seeded
from torch import Tensor, nn
from torch.func import hessian
from written_out import WRITTEN_OUT

import curvfunc
from curvfunc import KFAC, KFLR, BatchDiagGGN, BatchGrad, BatchL2, DiagGGN, Grad, Loss, Output, SqrtGGN, Variance
from curvfunc.engine.capture import capture
from curvfunc.tensors.inputs import flatten_params

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # fused attention runs in a loop under torch.vmap
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

# One problem of each kind, where the full product would take too long.
FEW = [
    "mlp, in-place and smooth",
    "mlp: cross-entropy, weights",
    "mlp: squared error",
    "mlp: bce, weights",
    "mlp: custom, Poisson",
    "classes at pixels",
    "conv2d, groups",
    "tied weight",
    "scales",
    "sequence first, as long as the batch",
    "keyword inputs",
    "nested parameters",
]


def samples(problem: Instance) -> int:
    return int(optree.tree_leaves(problem.X)[0].shape[0])


def evaluate(name: str, problem: Instance, **kwargs: Any) -> Any:
    case = QUANTITIES[name]
    *first, loss_fn = problem
    return case.function(*first, loss_fn=loss_fn, **case.kwargs, **seeded(name), **kwargs)


def specified(name: str, problem: Instance, **kwargs: Any) -> Any:
    case = QUANTITIES[name]
    *first, loss_fn = problem
    return case.reference(*first, loss_fn=loss_fn, **case.kwargs, **seeded(name), **kwargs)


def specified_in_full(name: str, quantity: str, **kwargs: Any) -> Any:
    """Kronecker factors are those of the model written out, where the specification does not see its layers."""
    problem = PROBLEMS[name].make()
    if "kf" not in quantity or name not in WRITTEN_OUT:
        return specified(quantity, problem, **kwargs)
    other = WRITTEN_OUT[name]
    rewritten = problem._replace(model_fn=other.model_fn, params=other.params(problem.params))
    assert_close(rewritten.model_fn(rewritten.params, rewritten.X), problem.model_fn(problem.params, problem.X), 1e-13)
    return other.factors(specified(quantity, rewritten, **kwargs))


def computed(problem: Instance, specs: Any, **kwargs: Any) -> Any:
    *first, loss_fn = problem
    return curvfunc.compute(*first, specs, loss_fn=loss_fn, **kwargs)


# --- against the specification ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_is_what_the_specification_says(name: str, quantity: str) -> None:
    assert_close(evaluate(quantity, PROBLEMS[name].make()), specified_in_full(name, quantity))


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", FEW)
def test_of_a_subset_is_what_the_specification_says(name: str, quantity: str) -> None:
    index = [2, 0, 2]
    got = evaluate(quantity, PROBLEMS[name].make(), subsampling=index)
    assert_close(got, specified_in_full(name, quantity, subsampling=index))


@pytest.mark.parametrize("name", PROBLEMS)
def test_forward_results_and_gradient(name: str) -> None:
    problem = PROBLEMS[name].make()
    model_fn, params, X, y, loss_fn = problem
    loss, output, grad = computed(problem, (Loss(), Output(), Grad()))
    leaves = optree.tree_map(lambda p: p.detach().clone().requires_grad_(), params)
    want_output = model_fn(leaves, X)
    want_loss = loss_fn(want_output, y)
    flat, tree = optree.tree_flatten(leaves)
    if want_loss.requires_grad:
        want = torch.autograd.grad(want_loss, flat, allow_unused=True, materialize_grads=True)
    else:
        want = [torch.zeros_like(p) for p in flat]
    assert_close([loss, output], [want_loss.detach(), want_output.detach()])
    assert_close(grad, optree.tree_unflatten(tree, want))


@pytest.mark.parametrize("name", tagged("plain"))
def test_runs_on_the_plain_batch(name: str) -> None:
    assert trace(PROBLEMS[name].make()).mode == "plain"


def trace(problem: Instance) -> Any:
    _, leaves, rebuild = flatten_params(problem.params)
    leaves = [p.detach().requires_grad_() for p in leaves]
    return capture(problem.model_fn, leaves, rebuild, problem.X, samples(problem))


@pytest.mark.parametrize("mode", ["vmap", "loop"])
@pytest.mark.parametrize("quantity", ["batch_grad", "batch_l2", "diag_ggn", "sqrt_ggn, 2 samples"])
@pytest.mark.parametrize("name", ["conv2d, groups", "tied weight", "sequence first, as long as the batch", "resnet", "gpt"])
def test_fallbacks(name: str, quantity: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any rule samples run under vmap, and where vmap does not run the model one after another."""

    def refuse(*args: Any) -> None:
        raise NotImplementedError("vmap")

    monkeypatch.setattr("curvfunc.engine.observer.RULES", {})
    if mode == "loop":
        monkeypatch.setattr("curvfunc.engine.runs.Runs.vmapped", refuse)
    problem = PROBLEMS[name].make()
    assert trace(problem).mode == mode
    assert_close(evaluate(quantity, problem), specified(quantity, problem))


class Cubed(torch.autograd.Function):
    """An operation that torch.vmap cannot run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x.pow(3) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return grad * 3 * x.square() * scale, (grad * x.pow(3)).sum_to_size(scale.shape)


@pytest.mark.parametrize("quantity", EXACT)
def test_operations_of_ones_own(quantity: str) -> None:
    """Calls that no TorchFunctionMode sees: their parameters are found in the graph."""
    weight, scale = torch.randn(3, 5), torch.rand(3)
    X, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    params = {"weight": weight, "scale": scale}
    own = Instance(lambda p, X: Cubed.apply(F.linear(X, p["weight"]), p["scale"]), params, X, y, F.cross_entropy)
    plain = own._replace(model_fn=lambda p, X: F.linear(X, p["weight"]).pow(3) * p["scale"])
    if quantity == "kflr":  # where samples run one by one nothing is known of the linear layer
        assert_close(evaluate(quantity, own)["scale"], evaluate(quantity, plain)["scale"])
    else:
        assert_close(evaluate(quantity, own), evaluate(quantity, plain))


def test_results_mirror_the_parameters() -> None:
    problem = PROBLEMS["nested parameters"].make()
    for name in ("batch_grad", "diag_ggn"):
        result = evaluate(name, problem)
        assert optree.tree_structure(result) == optree.tree_structure(problem.params)
    assert list(evaluate("batch_l2", PROBLEMS["resnet"].make())) == list(PROBLEMS["resnet"].make().params)


def test_nothing_is_changed() -> None:
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 3)).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    X, y = torch.randn(4, 2, 4), torch.tensor([0, 1, 2, 0])
    given = X.clone()
    model_fn, params = curvfunc.functionalize(net)
    curvfunc.compute(model_fn, params, X, y, (Grad(), BatchGrad(), DiagGGN(), KFAC()))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(X, given)
    assert not X.requires_grad
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(not p.requires_grad and p.grad is None for p in params.values())
    assert not any(hook for module in net.modules() for hook in (module._forward_hooks, module._backward_hooks))


# --- subsampling ------------------------------------------------------------------------------------------------------

PER_SAMPLE_AXIS = {"batch_grad": 0, "batch_l2": 0, "batch_diag_ggn": 0, "sqrt_ggn": 1}
PER_SAMPLE_AXIS |= {"batch_diag_ggn, 3 samples": 0, "sqrt_ggn, 2 samples": 1}
INDICES: dict[str, Callable[[], Any]] = {
    "list": lambda: [3, 1],
    "tuple": lambda: (0, 2),
    "range": lambda: range(1, 4),
    "tensor": lambda: torch.tensor([2, 0]),
    "int32 tensor": lambda: torch.tensor([2, 0], dtype=torch.int32),
    "numpy": lambda: np.array([1, 3]),
    "repeats": lambda: [1, 1, 3, 1],
    "all, permuted": lambda: torch.tensor([2, 0, 3, 1]),
    "one": lambda: [2],
}


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("quantity", PER_SAMPLE_AXIS)
def test_subset_is_the_slice(quantity: str, index: str) -> None:
    problem = PROBLEMS["mlp: cross-entropy, weights"].make()
    chosen = INDICES[index]()
    axis, rows = PER_SAMPLE_AXIS[quantity], torch.tensor(list(map(int, chosen)))
    full = optree.tree_map(lambda t: t.index_select(axis, rows), evaluate(quantity, problem))
    assert_close(evaluate(quantity, problem, subsampling=chosen), full)


@pytest.mark.parametrize(("summed", "per_sample"), [("sum_grad_squared", "batch_grad"), ("diag_ggn", "batch_diag_ggn")])
def test_sums_of_a_subset_run_over_it(summed: str, per_sample: str) -> None:
    problem = PROBLEMS["conv2d, groups"].make()
    index = [1, 3, 1]
    parts = evaluate(per_sample, problem)
    power = 2 if summed == "sum_grad_squared" else 1
    want = optree.tree_map(lambda t: t[index].pow(power).sum(0), parts)
    assert_close(evaluate(summed, problem, subsampling=index), want)


@pytest.mark.parametrize("name", ["mlp: bce, weights", "layer norm", "gru"])
def test_only_the_subset_is_computed(name: str) -> None:
    problem = PROBLEMS[name].make()
    seen: list[int] = []

    def model_fn(params: Any, X: Tensor) -> Tensor:
        seen.append(len(X))
        return problem.model_fn(params, X)

    evaluate("diag_ggn", problem._replace(model_fn=model_fn), subsampling=[3, 0])
    assert max(seen) == 2


def test_forward_results_and_gradient_are_of_the_whole_batch() -> None:
    problem = PROBLEMS["mlp: squared error"].make()
    specs = {"loss": Loss(), "output": Output(), "grad": Grad()}
    result = computed(problem, specs | {"part": BatchGrad()}, subsampling=[1, 1, 2])
    want = computed(problem, specs | {"part": BatchGrad()})
    want["part"] = {k: v[[1, 1, 2]] for k, v in want["part"].items()}
    assert_close(result, want)


# --- chunks, and several quantities at once ---------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 2, 1000])
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", ["classes at positions", "conv1d, same", "scales", "mlp: custom, Poisson", "gru"])
def test_chunks_change_nothing(name: str, quantity: str, chunk_size: int) -> None:
    problem = PROBLEMS[name].make()
    assert_close(evaluate(quantity, problem, chunk_size=chunk_size), evaluate(quantity, problem), rtol=1e-13)


@pytest.mark.parametrize("name", FEW)
def test_together_is_what_each_is_alone(name: str) -> None:
    problem = PROBLEMS[name].make()
    specs = {quantity: case.spec for quantity, case in EXACT.items()}
    together = computed(problem, specs)
    for quantity in EXACT:
        assert_close(together[quantity], evaluate(quantity, problem), rtol=1e-13)


@pytest.mark.parametrize("quantity", SAMPLED)
def test_together_draws_what_it_draws_alone(quantity: str) -> None:
    problem = PROBLEMS["mlp: bce, weights"].make()
    result = computed(problem, [Grad(), SAMPLED[quantity].spec, DiagGGN()], **seeded(quantity))
    assert_close(result[1], evaluate(quantity, problem), rtol=1e-13)


def test_same_number_of_samples_shares_the_draws() -> None:
    problem = PROBLEMS["mlp: squared error"].make()
    generator = torch.Generator().manual_seed(3)
    root, diag, per_sample = computed(problem, (SqrtGGN(2), DiagGGN(2), BatchDiagGGN(2)), generator=generator)
    assert_close(diag, {k: v.square().sum((0, 1)) for k, v in root.items()})
    assert_close(per_sample, {k: v.square().sum(0) for k, v in root.items()})


def test_specs_form_any_tree() -> None:
    problem = PROBLEMS["mlp: squared error"].make()
    grad, diag = evaluate("batch_grad", problem), evaluate("diag_ggn", problem)
    loss = problem.loss_fn(problem.model_fn(problem.params, problem.X), problem.y)
    nested = computed(problem, {"a": [BatchGrad(), (DiagGGN(), Loss())], "b": {"c": BatchGrad()}})
    assert_close(nested, {"a": [grad, (diag, loss)], "b": {"c": grad}}, rtol=1e-13)
    assert isinstance(nested["a"], list)
    assert isinstance(nested["a"][1], tuple)
    assert_close(computed(problem, DiagGGN()), diag, rtol=1e-13)
    assert computed(problem, ()) == ()
    assert computed(problem, {"none": []}) == {"none": []}


class Count:
    """A model function that counts its calls and the backward passes from its output."""

    def __init__(self, model_fn: Callable[[Any, Any], Tensor]) -> None:
        self.model_fn, self.forward, self.backward = model_fn, 0, 0

    def __call__(self, params: Any, X: Any) -> Tensor:
        self.forward += 1
        out = self.model_fn(params, X)
        out.register_hook(self.count)
        return out

    def count(self, grad: Tensor) -> None:
        self.backward += 1


@pytest.mark.parametrize(
    ("specs", "backward"),
    [
        ((Loss(), Output()), 0),
        ((Grad(),), 1),
        ((BatchGrad(), Grad(), BatchL2(), Variance(), Loss()), 1),
        ((DiagGGN(), BatchDiagGGN(), SqrtGGN(), KFLR()), 1),
        ((Grad(), Variance(), DiagGGN(), KFLR(), KFAC(), DiagGGN(1), SqrtGGN(1)), 3),
        ((DiagGGN(2), DiagGGN(1), DiagGGN(2)), 2),
    ],
)
@pytest.mark.parametrize("name", ["mlp, in-place and smooth", "tied weight"])
def test_one_forward_pass_and_one_backward_pass_per_cotangent(name: str, specs: Any, backward: int) -> None:
    problem = PROBLEMS[name].make()
    count = Count(problem.model_fn)
    computed(problem._replace(model_fn=count), specs)
    assert (count.forward, count.backward) == (1, backward)


def test_the_last_layer_needs_no_backward_pass() -> None:
    problem = PROBLEMS["classes at pixels"].make()  # one convolution
    count = Count(problem.model_fn)
    computed(problem._replace(model_fn=count), (DiagGGN(), KFLR(), BatchGrad()))
    assert (count.forward, count.backward) == (1, 0)


def test_one_backward_pass_per_chunk() -> None:
    problem = PROBLEMS["classes at positions"].make()  # 4 columns
    count = Count(problem.model_fn)
    computed(problem._replace(model_fn=count), (DiagGGN(), KFLR()), chunk_size=3)
    assert (count.forward, count.backward) == (1, 2)


# --- what holds between quantities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
def test_identities(name: str) -> None:
    problem = PROBLEMS[name].make()
    N = samples(problem)
    grad, grads, norms, squared, variance, diag, diags, root = computed(
        problem, (Grad(), *[EXACT[q].spec for q in list(EXACT)[:7]])
    )
    maps = optree.tree_map
    assert_close(maps(lambda g: g.sum(0), grads), grad, rtol=1e-9)  # gradients of samples cancel
    assert_close(norms, maps(lambda g: g.flatten(1).square().sum(1) if g.ndim > 1 else g.square(), grads))
    assert_close(squared, maps(lambda g: g.square().sum(0), grads))
    assert_close(maps(lambda g: g + 1, variance), maps(lambda g: g.var(0, correction=0) + 1, grads))
    assert all((v >= -1e-15).all() for v in optree.tree_leaves(variance)) or N == 1
    assert_close(diag, maps(lambda d: d.sum(0), diags))
    assert_close(diags, maps(lambda s: s.square().sum(0), root))


def dense(problem: Instance) -> Any:
    """Diagonal of the Hessian."""
    leaves, tree = optree.tree_flatten(problem.params)

    def objective(*leaves: Tensor) -> Tensor:
        out = problem.model_fn(optree.tree_unflatten(tree, leaves), problem.X)
        return problem.loss_fn(out, problem.y)

    full = hessian(objective, argnums=tuple(range(len(leaves))))(*leaves)
    diagonals = [full[i][i].reshape(p.numel(), -1).diagonal().reshape(p.shape) for i, p in enumerate(leaves)]
    return optree.tree_unflatten(tree, diagonals)


@pytest.mark.parametrize("name", [n for n in tagged("piecewise_linear") if n != "mlp: cross-entropy, ignored -100"])
def test_diagonal_is_the_hessians_where_the_model_is_piecewise_linear(name: str) -> None:
    problem = PROBLEMS[name].make()
    assert_close(evaluate("diag_ggn", problem), dense(problem), rtol=1e-9)


def test_diagonal_is_not_the_hessians_elsewhere() -> None:
    problem = PROBLEMS["mlp, in-place and smooth"].make()
    got, want = evaluate("diag_ggn", problem), dense(problem)
    assert (got["0.weight"] - want["0.weight"]).norm() > 1e-3 * want["0.weight"].norm()


def kron(factors: tuple[Tensor, ...]) -> Tensor:
    return torch.kron(*factors) if len(factors) == 2 else factors[0]


def block(root: Tensor) -> Tensor:
    """The GGN's block [P, P] from its root [V, N, *shape]."""
    rows = root.reshape(len(root) * root.shape[1], -1)
    return rows.mT @ rows


@pytest.mark.parametrize("loss", ["squared error, sum", "cross-entropy, smoothed", "bce, weights", "custom, Poisson"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_kronecker_factors_are_exact_for_one_sample(layers: int, loss: str) -> None:
    net = nn.Sequential(*[nn.Linear(i, o) for i, o in [(5, 4), (4, 2), (2, 3)][3 - layers :]])
    model_fn, params = curvfunc.functionalize(net)
    problem = PROBLEMS[f"mlp: {loss}"].make()
    X, y = torch.randn(1, net[0].in_features), optree.tree_map(lambda t: t[:1], problem.y)
    loss_fn = problem.loss_fn
    if loss == "bce, weights":
        loss_fn = nn.BCEWithLogitsLoss(pos_weight=problem.loss_fn.pos_weight)
    kflr, root = curvfunc.compute(model_fn, params, X, y, (KFLR(), SqrtGGN()), loss_fn=loss_fn)
    for name, factors in kflr.items():
        assert len(factors) == (2 if name.endswith("weight") else 1)
        assert_close(kron(factors), block(root[name]))


def test_kronecker_factors_are_exact_for_the_last_layer_under_squared_error() -> None:
    """There the loss Hessian is the same for all samples, so that the mean of products is the product of means."""
    problem = PROBLEMS["mlp: squared error"].make()
    kflr, root = computed(problem, (KFLR(), SqrtGGN()))
    assert_close(kron(kflr["2.weight"]), block(root["2.weight"]))


@pytest.mark.parametrize("name", ["linear, one sample", "tied weight", "layer norm", "scales", "gpt"])
def test_biases_and_what_has_no_structure_get_the_exact_block(name: str) -> None:
    problem = PROBLEMS[name].make()
    kflr, root = computed(problem, (KFLR(), SqrtGGN()))
    single = {k: f for k, f in kflr.items() if len(f) == 1}
    assert single
    for key, factors in single.items():
        assert_close(factors[0], block(root[key]))


# --- Monte Carlo ------------------------------------------------------------------------------------------------------

DRAWS = 400


@pytest.mark.parametrize("name", ["mlp: cross-entropy, smoothed", "mlp: squared error", "mlp: bce, weights",
                                  "classes at pixels", "mlp: custom, Poisson"])  # fmt: skip
def test_expectations_are_exact(name: str) -> None:
    """The mean of independent draws is within 5 of its standard errors everywhere, and rarely near 5 of them."""
    problem = PROBLEMS[name].make()
    generator = torch.Generator().manual_seed(0)
    specs = (DiagGGN(1), BatchDiagGGN(1), KFAC(1))
    exact = optree.tree_leaves(computed(problem, (DiagGGN(), BatchDiagGGN(), KFLR())))
    draws = [optree.tree_leaves(computed(problem, specs, generator=generator)) for _ in range(DRAWS)]
    for want, *got in zip(exact, *draws, strict=True):
        stacked = torch.stack(got)
        error, spread = (stacked.mean(0) - want).abs(), stacked.std(0) / math.sqrt(DRAWS)
        rounding = 1e-12 * want.abs().max()
        assert (error <= 5 * spread + rounding).all()
        typical = (error[spread > rounding] / spread[spread > rounding]).square().mean().sqrt()
        assert spread.max() <= rounding or typical < 2


def test_mean_over_samples_of_the_distribution() -> None:
    """With more samples per call the estimate converges to the exact one at the rate of Monte Carlo."""
    problem = PROBLEMS["mlp, in-place and smooth"].make()
    exact = evaluate("diag_ggn", problem)["0.weight"]
    errors = []
    for mc_samples in (10, 1000):
        generator = torch.Generator().manual_seed(1)
        runs = [computed(problem, DiagGGN(mc_samples), generator=generator)["0.weight"] for _ in range(20)]
        errors.append(torch.stack([(r - exact).square().sum() for r in runs]).mean().sqrt())
    assert 6 < errors[0] / errors[1] < 16  # 10 in expectation


def test_draws_come_from_the_generator_alone() -> None:
    problem = PROBLEMS["mlp: squared error"].make()
    before = torch.get_rng_state()
    first = evaluate("kfac", problem)
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(evaluate("kfac", problem), first, rtol=0.0)
    *arguments, loss_fn = problem
    torch.manual_seed(1)
    default = [curvfunc.diag_ggn(*arguments, loss_fn=loss_fn, mc_samples=1) for _ in range(2)]
    assert not torch.equal(default[0]["0.weight"], default[1]["0.weight"])
    torch.manual_seed(1)
    assert_close(curvfunc.diag_ggn(*arguments, loss_fn=loss_fn, mc_samples=1), default[0], rtol=0.0)


def test_a_sample_that_is_listed_twice_has_the_same_draws() -> None:
    problem = PROBLEMS["linear"].make()
    root = curvfunc.sqrt_ggn(*problem[:4], mc_samples=3, subsampling=[1, 0, 1])
    for r in root.values():
        assert torch.equal(r[:, 0], r[:, 2])
        assert not torch.equal(r[:, 0], r[:, 1])


def test_exact_quantities_draw_nothing() -> None:
    problem = PROBLEMS["mlp: custom, Poisson"].make()
    before = torch.get_rng_state()
    computed(problem, [case.spec for case in EXACT.values()])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["two blocks of convolutions", "layer norm"])
def test_lower_precision(name: str, dtype: torch.dtype) -> None:
    """Sums of squares are in single precision at least, and right to the parameters' precision."""
    problem = PROBLEMS[name].make()
    want = evaluate("diag_ggn", problem)
    cast = optree.tree_map(lambda t: t.to(dtype), problem.params)
    got = evaluate("diag_ggn", problem._replace(params=cast, X=problem.X.to(dtype)))
    assert all(g.dtype == torch.float32 for g in got.values())
    rtol = 1e-5 if dtype == torch.float32 else 0.1
    assert_close({k: v.double() for k, v in got.items()}, want, rtol)


def test_default_loss_is_cross_entropy() -> None:
    problem = PROBLEMS["linear"].make()
    arguments = problem[:4]
    assert problem.loss_fn is F.cross_entropy
    for case in EXACT.values():
        assert_close(case.function(*arguments), case.function(*arguments, loss_fn=F.cross_entropy), rtol=0.0)
