"""Results of disjoint sets of samples merge into that of their union: for every quantity, loss and order of factors."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc import losses
from curvfunc.losses import roots
from curvfunc.quantities.laws import Refused

pytestmark = pytest.mark.usefixtures("float64")

N, C = 11, 3
PARTS = (slice(0, 4), slice(4, 5), slice(5, 11))
EXACT = (
    curvfunc.Loss(),
    curvfunc.Output(),
    curvfunc.Grad(),
    curvfunc.BatchGrad(),
    curvfunc.BatchL2(),
    curvfunc.SumGradSquared(),
    curvfunc.Variance(),
    curvfunc.DiagGGN(),
    curvfunc.BatchDiagGGN(),
    curvfunc.SqrtGGN(),
    curvfunc.DiagHessian(),
    curvfunc.BatchDiagHessian(),
    curvfunc.KFLR(),
    curvfunc.KFLR("expand"),
    curvfunc.KFLR(joined=True),
    curvfunc.BatchJac(),
    curvfunc.EmpiricalKFAC(),
    curvfunc.EmpiricalKFAC("reduce", joined=True),
    curvfunc.KFLR("reduce"),
)
SAMPLED = (
    curvfunc.DiagGGN(2),
    curvfunc.BatchDiagGGN(2),
    curvfunc.SqrtGGN(2),
    curvfunc.KFAC(),
    curvfunc.KFAC(2, "expand"),
    curvfunc.KFAC(2, "reduce"),
)
WEIGHT = (0.5, 2.0, 1.0)


class Setting(NamedTuple):
    loss_fn: Callable[..., Tensor]
    y: Tensor
    reduction: Any = None


def classes() -> Tensor:
    return torch.arange(N) % C


def ignored() -> Tensor:
    """Other shares of ignored samples in each part; one part has nothing else."""
    y = classes()
    y[[0, 4, 6, 7, 9]] = -100
    return y


def masked_mean(out: Tensor, y: Tensor) -> Tensor:
    kept = y >= 0
    return (kept * F.nll_loss(out.log_softmax(1), y.clamp(min=0), reduction="none")).sum() / kept.sum().clamp(min=1)


def weighted(**options: Any) -> partial[Tensor]:
    return partial(F.cross_entropy, weight=torch.tensor(WEIGHT), **options)


SETTINGS: dict[str, Callable[[], Setting]] = {
    "cross-entropy": lambda: Setting(F.cross_entropy, classes()),
    "cross-entropy, sum": lambda: Setting(nn.CrossEntropyLoss(reduction="sum"), classes()),
    "cross-entropy, ignored": lambda: Setting(F.cross_entropy, ignored()),
    "cross-entropy, weights": lambda: Setting(weighted(), classes()),
    "cross-entropy, weights, ignored": lambda: Setting(weighted(ignore_index=1), classes()),
    "cross-entropy, weights, ignored, smoothed": lambda: Setting(weighted(label_smoothing=0.2), ignored()),
    "cross-entropy, weights, sum": lambda: Setting(weighted(reduction="sum"), ignored()),
    "cross-entropy, probabilities, weights": lambda: Setting(weighted(), torch.randn(N, C).softmax(1)),
    "squared error": lambda: Setting(F.mse_loss, torch.randn(N, C)),
    "squared error, sum": lambda: Setting(nn.MSELoss(reduction="sum"), torch.randn(N, C)),
    "bce": lambda: Setting(nn.BCEWithLogitsLoss(pos_weight=torch.tensor(WEIGHT)), torch.rand(N, C)),
    "bce, weights": lambda: Setting(nn.BCEWithLogitsLoss(weight=torch.tensor(WEIGHT)), torch.rand(N, C)),
    "bce, sum": lambda: Setting(nn.BCEWithLogitsLoss(reduction="sum"), torch.rand(N, C)),
    "custom, mean": lambda: Setting(lambda out, y: (out - y).cosh().sum(1).mean(), torch.randn(N, C), "mean"),
    "custom, sum": lambda: Setting(lambda out, y: (out - y).cosh().sum(), torch.randn(N, C), "sum"),
    "custom, masked mean": lambda: Setting(masked_mean, ignored(), lambda out, y: (y >= 0).sum()),
}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C))


def merged(
    model_fn: Any, params: Any, X: Any, y: Any, specs: Any, parts: Any = PARTS, generator: Any = None, **given: Any
) -> Any:
    acc = curvfunc.accumulation(model_fn, params, specs, **given)
    state = acc.init()
    for part in parts:
        part_X, part_y = (optree.tree_map(lambda t: t[part], tree) for tree in (X, y))  # noqa: B023
        state = acc.update(state, params, part_X, part_y)
    return acc.result(state)


@pytest.mark.parametrize("name", SETTINGS)
def test_parts_merge_into_the_whole(name: str) -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    X, setting = torch.randn(N, 4), SETTINGS[name]()
    specs = EXACT
    if callable(setting.reduction):
        specs = tuple(s for s in EXACT if not isinstance(s, curvfunc.EmpiricalKFAC))
        with pytest.raises(ValueError, match="EmpiricalKFAC takes a loss of one's own for a sum"):
            merged(model_fn, params, X, setting.y, EXACT, loss_fn=setting.loss_fn, reduction=setting.reduction)
    got = merged(model_fn, params, X, setting.y, specs, loss_fn=setting.loss_fn, reduction=setting.reduction)
    want = curvfunc.compute(model_fn, params, X, setting.y, specs, loss_fn=setting.loss_fn)
    for spec, g, w in zip(specs, got, want, strict=True):
        assert_close(g, w, rtol=1e-12), spec


@pytest.mark.parametrize("name", ["cross-entropy, weights, ignored", "cross-entropy, sum", "squared error", "bce"])
def test_sampled_quantities_merge(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With draws that are functions of a sample, as those of a stream of random numbers are not."""
    monkeypatch.setattr(roots, "draw_categories", lambda t, num, _: torch.stack([(t + k).sin().argmax(1) for k in range(num)]))
    monkeypatch.setattr(roots, "draw_bits", lambda t, num, _: torch.stack([(9 * t + k).sin() > 0 for k in range(num)]))
    monkeypatch.setattr(roots, "draw_normal", lambda t, num, _: torch.stack([(9 * t + k).sin() for k in range(num)]))
    model_fn, params = curvfunc.functionalize(mlp())
    X, setting = torch.randn(N, 4), SETTINGS[name]()
    got = merged(model_fn, params, X, setting.y, SAMPLED, loss_fn=setting.loss_fn)
    assert_close(got, curvfunc.compute(model_fn, params, X, setting.y, SAMPLED, loss_fn=setting.loss_fn), rtol=1e-12)


class Mixed(nn.Module):
    """Factors in both orders, shared positions, groups, and a parameter with one factor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv = nn.Embedding(7, 4), nn.Conv1d(4, 4, 2, groups=2)
        self.weight, self.scale = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.rand(5))
        self.head = nn.Linear(5, C)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.conv(self.embedding(tokens).mT).mT
        return self.head((h @ self.weight).tanh() * self.scale).mean(1)


@pytest.mark.parametrize("name", ["cross-entropy", "cross-entropy, sum", "cross-entropy, weights, ignored"])
def test_factors_of_both_orders(name: str) -> None:
    """With a sum or with weights, the factor of the outputs and that of the inputs have different laws."""
    model_fn, params = curvfunc.functionalize(Mixed())
    X, setting = torch.randint(7, (N, 5)), SETTINGS[name]()
    want = curvfunc.compute(model_fn, params, X, setting.y, EXACT, loss_fn=setting.loss_fn)
    shapes = [tuple(f.shape) for f in want[-1]["weight"]]
    assert shapes == [(4, 4), (5, 5)]  # the inputs come first here, and second in layers
    assert [tuple(f.shape) for f in want[-1]["head.weight"]] == [(3, 3), (5, 5)]
    got = merged(model_fn, params, X, setting.y, EXACT, loss_fn=setting.loss_fn)
    assert_close(got, want, rtol=1e-12)


def test_positions_count_where_the_mean_runs_over_them() -> None:
    model_fn, params = curvfunc.functionalize(nn.Conv1d(2, C, 2))
    X, y = torch.randn(N, 2, 4), torch.randint(C, (N, 3))
    y[:5, 1:] = -100
    assert_close(merged(model_fn, params, X, y, EXACT[:-3]), curvfunc.compute(model_fn, params, X, y, EXACT[:-3]), rtol=1e-12)


@pytest.mark.parametrize(
    "params", [[torch.randn(4, 5), (torch.randn(5, C),)], {"b": {"w": torch.randn(4, 5)}, "a": torch.randn(5, C)}]
)
def test_any_tree_of_parameters_and_of_specs(params: Any) -> None:
    params = optree.tree_map(lambda t: t.double(), params)

    def model_fn(params: Any, X: Tensor) -> Tensor:
        first, second = sorted(optree.tree_leaves(params), key=lambda t: -len(t[0]))
        return (X @ first).tanh() @ second

    X, y = torch.randn(N, 4), classes()
    specs = {"z": curvfunc.Variance(), "a": [curvfunc.KFLR(), (curvfunc.Loss(),)]}
    got, want = merged(model_fn, params, X, y, specs), curvfunc.compute(model_fn, params, X, y, specs)
    assert list(got) == list(want)
    assert_close(got, want, rtol=1e-12)
    assert_close(merged(model_fn, params, X, y, curvfunc.Grad()), curvfunc.compute(model_fn, params, X, y, curvfunc.Grad()))


def test_merge_is_associative_and_changes_nothing() -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    X, y = torch.randn(N, 4), ignored()
    acc = curvfunc.accumulation(model_fn, params, EXACT, loss_fn=weighted())
    a, b, c = (acc.update(acc.init(), params, X[part], y[part]) for part in PARTS)
    before = optree.tree_map(torch.clone, acc.result(a))
    left, right = curvfunc.merge(curvfunc.merge(a, b), c), acc.merge(a, acc.merge(b, c))
    want = curvfunc.compute(model_fn, params, X, y, EXACT, loss_fn=weighted())
    for state in (left, right, curvfunc.merge(acc.init(), curvfunc.merge(left, acc.init()))):
        assert_close(acc.result(state), want, rtol=1e-12)
    assert_close(acc.result(a), before, rtol=0.0)


@pytest.mark.parametrize("name", [name for name in SETTINGS if not name.startswith("custom")])
def test_normalizer_is_what_the_mean_divides_by(name: str) -> None:
    setting, out = SETTINGS[name](), torch.randn(N, C)
    loss = losses.normalize(setting.loss_fn)
    options = dict(loss.options)
    total = loss.fn(out, setting.y, **{**options, "reduction": "sum"}, **loss.tensors)
    assert_close(total / losses.normalizer(loss, setting.y), loss(out, setting.y), rtol=1e-14)


def test_squared_errors_with_weights_divide_by_them() -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    X, y, weight = torch.randn(8, 4), torch.randn(8, C), torch.rand(4, C)
    got = merged(model_fn, params, X, y, EXACT, (slice(0, 4), slice(4, 8)), loss_fn=partial(F.mse_loss, weight=weight))
    want = curvfunc.compute(model_fn, params, X, y, EXACT, loss_fn=partial(F.mse_loss, weight=torch.cat([weight, weight])))
    assert_close(got, want, rtol=1e-12)


def test_nothing_but_ignored_samples_is_as_in_one_batch() -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    X, y = torch.randn(N, 4), torch.full((N,), -100)
    got, want = merged(model_fn, params, X, y, EXACT), curvfunc.compute(model_fn, params, X, y, EXACT)
    assert want[0].isnan()
    assert_close(got, want, rtol=1e-12)


def test_a_part_without_weight_counts_for_nothing() -> None:
    """Where a loss of one's own divides by zero, all that it gives is nan."""
    loss_fn = lambda out, y: ((y >= 0) * F.cross_entropy(out, y.clamp(min=0), reduction="none")).sum() / (y >= 0).sum()
    model_fn, params = curvfunc.functionalize(mlp())
    X, y = torch.randn(N, 4), classes()
    y[PARTS[0]] = -100
    given = {"loss_fn": loss_fn, "reduction": lambda out, y: (y >= 0).sum()}
    specs = EXACT[:7]
    assert curvfunc.batch_grad(model_fn, params, X[:4], y[:4], loss_fn=loss_fn)["0.bias"].isnan().any()
    assert_close(merged(model_fn, params, X, y, specs, **given), curvfunc.compute(model_fn, params, X, y, specs), rtol=1e-12)


def test_results_have_the_type_that_one_batch_gives() -> None:
    """Scalars, too, beside numbers of samples in float64."""
    model_fn = lambda p, X: (p["scale"] * X @ p["w"]).tanh()
    params = {"scale": torch.tensor(2.0, dtype=torch.float32), "w": torch.randn(4, C, dtype=torch.float32)}
    X, y = torch.randn(N, 4, dtype=torch.float32), ignored()
    got = merged(model_fn, params, X, y, EXACT)
    assert_close(got, curvfunc.compute(model_fn, params, X, y, EXACT), rtol=1e-5)
    moving = merged(model_fn, params, X, y, (curvfunc.Loss(), curvfunc.Variance()), decay=0.9)
    assert all(t.dtype == torch.float32 for t in optree.tree_leaves(moving))


def test_low_precision_is_summed_in_float32() -> None:
    model_fn, params = curvfunc.functionalize(mlp().bfloat16())
    X, y = torch.randn(N, 4).bfloat16(), classes()
    grad, per_sample = merged(model_fn, params, X, y, (curvfunc.Grad(), curvfunc.BatchGrad()))
    assert grad["0.weight"].dtype == torch.float32
    assert per_sample["0.weight"].dtype == torch.bfloat16


# -- moving averages


def test_moving_averages_of_equal_batches() -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    specs = (
        curvfunc.Loss(),
        curvfunc.Grad(),
        curvfunc.SumGradSquared(),
        curvfunc.Variance(),
        curvfunc.KFLR(),
        curvfunc.DiagGGN(),
    )
    acc = curvfunc.accumulation(model_fn, params, specs, decay=0.8)
    state, results, moments = acc.init(), [], []
    for _ in range(4):
        X, y = torch.randn(5, 4), torch.randint(C, (5,))
        params = {name: p + 0.1 * torch.randn_like(p) for name, p in params.items()}
        state = acc.update(state, params, X, y)
        results.append(curvfunc.compute(model_fn, params, X, y, specs))
        grads = curvfunc.batch_grad(model_fn, params, X, y)
        moments.append((optree.tree_map(lambda g: g.mean(0), grads), optree.tree_map(lambda g: g.square().mean(0), grads)))
    share = torch.tensor([0.8**3, 0.8**2, 0.8, 1.0])
    share = share / share.sum()
    mean = lambda *values: sum(s * v for s, v in zip(share, values, strict=True))
    want = list(optree.tree_map(mean, *results))
    first, second = optree.tree_map(mean, *moments)
    want[3] = optree.tree_map(lambda m, s: s - m**2, first, second)
    assert_close(list(acc.result(state)), want, rtol=1e-12)


def test_a_decay_of_one_is_the_mean_batch() -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    X, y = torch.randn(N, 4), ignored()
    specs = (curvfunc.Loss(), curvfunc.Grad(), curvfunc.Variance())
    loss, grad, variance = merged(model_fn, params, X, y, specs, loss_fn=weighted(), decay=1.0)
    whole = curvfunc.compute(model_fn, params, X, y, specs, loss_fn=weighted())
    assert_close([loss, grad], list(whole[:2]), rtol=1e-12)
    # the scale of per-sample gradients is that of a batch: a third of the samples and of their weight
    assert_close(variance, optree.tree_map(lambda v: 9 * v, whole[2]), rtol=1e-12)


@pytest.mark.parametrize("name", ["cross-entropy, weights, ignored"])
def test_update_and_result_compile(name: str) -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    setting = SETTINGS[name]()
    specs = (curvfunc.Grad(), [curvfunc.Variance(), curvfunc.KFLR()], curvfunc.Loss())
    acc = curvfunc.accumulation(model_fn, params, specs, loss_fn=setting.loss_fn, decay=0.9)
    update, result = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (acc.update, acc.result))
    state = compiled = acc.init()
    for seed in range(3):
        X, y = torch.randn(4, 4), setting.y[seed : seed + 4]
        params = {name: p * (1 + seed / 10) for name, p in params.items()}
        state, compiled = acc.update(state, params, X, y), update(compiled, params, X, y)
    assert_close(result(compiled), acc.result(state), rtol=1e-12)


def test_compiled_states_are_those_of_eager_calls() -> None:
    """Of nested parameters, whose order torch and optree see differently."""
    params = {"b": {"w": torch.randn(4, 4)}, "a": [torch.randn(4, 4)]}
    model_fn = lambda p, X: (X @ p["b"]["w"]).tanh() @ p["a"][0]
    acc = curvfunc.accumulation(model_fn, params, curvfunc.Variance())
    X, y = torch.randn(N, 4), classes()
    update = torch.compile(acc.update, fullgraph=True, backend="aot_eager")
    state = acc.update(update(acc.init(), params, X[:4], y[:4]), dict(reversed(params.items())), X[4:], y[4:])
    assert_close(acc.result(state), curvfunc.variance(model_fn, params, X, y), rtol=1e-12)
    assert_close(torch.compile(acc.result, fullgraph=True, backend="aot_eager")(state), acc.result(state), rtol=1e-12)


def test_under_vmap_over_parameters() -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    several = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
    X, y = torch.randn(N, 4), ignored()
    specs = (curvfunc.Variance(), curvfunc.BatchGrad(), curvfunc.Loss())
    got = torch.vmap(lambda p: merged(model_fn, p, X, y, specs))(several)
    want = [curvfunc.compute(model_fn, {n: p[k] for n, p in several.items()}, X, y, specs) for k in range(2)]
    assert_close(got, optree.tree_map(lambda *t: torch.stack(t), *want), rtol=1e-12)


# -- what is refused


def test_every_quantity_says_how_it_merges() -> None:
    kinds = [k for k in (getattr(curvfunc, name) for name in curvfunc.__all__) if isinstance(k, type)]
    kinds = [k for k in kinds if issubclass(k, curvfunc.Quantity) and k is not curvfunc.Quantity]
    assert len(kinds) >= 17
    tested = {type(spec) for spec in EXACT + SAMPLED} | {curvfunc.ClippedGrad}  # of sums alone; it has a file of its own
    for kind in kinds:
        assert kind.laws, kind
        assert len(kind.laws) in (1, len((kind(1.0) if kind is curvfunc.ClippedGrad else kind()).contractions)), kind
        assert kind in tested or isinstance(kind.laws[0], Refused), f"{kind} is not among the quantities that are merged here"


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (curvfunc.KFRA(), "products of their means. Use KFLR"),
        (curvfunc.BatchDot(), "between two batches"),
        (curvfunc.GGNGram(), "between two batches"),
    ],
)
def test_what_is_no_function_of_the_parts_is_refused(spec: Any, why: str) -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    with pytest.raises(ValueError, match=f"{type(spec).__name__} of several batches .*{why}"):
        curvfunc.accumulation(model_fn, params, spec)


def test_kfra_of_a_union_is_none_of_its_parts() -> None:
    """Why it is refused: no weights of the parts' factors give those of the union."""
    model_fn, params = curvfunc.functionalize(mlp())
    X, y = torch.randn(N, 4), classes()
    whole = curvfunc.kfra(model_fn, params, X, y)["0.weight"][0]
    parts = [curvfunc.kfra(model_fn, params, X[part], y[part])["0.weight"][0].flatten() for part in (slice(0, 6), slice(6, N))]
    columns = torch.stack(parts, 1)
    best = columns @ torch.linalg.lstsq(columns, whole.flatten()).solution
    assert (best - whole.flatten()).norm() > 1e-3 * whole.norm()


class Silent(curvfunc.Quantity):
    contractions = ("squares",)


@pytest.mark.parametrize(
    ("specs", "given", "error", "message"),
    [
        (Silent(), {}, ValueError, "Silent does not say how results of two batches merge"),
        (3, {}, TypeError, "specs must hold quantities"),
        ((), {}, ValueError, "no quantity"),
        (curvfunc.BatchGrad(), {"decay": 0.9}, ValueError, "BatchGrad has a result for each sample"),
        (curvfunc.Grad(), {"decay": 1.5}, ValueError, "decay must be between 0 and 1"),
        (curvfunc.Grad(), {"reduction": "mean"}, ValueError, "reduction is for losses of one's own"),
        (curvfunc.Grad(), {"loss_fn": masked_mean}, ValueError, "not known of this one. Pass reduction="),
        (curvfunc.Grad(), {"loss_fn": masked_mean, "reduction": "none"}, ValueError, "reduction must be 'sum', 'mean' or a"),
    ],
)
def test_bad_arguments(specs: Any, given: Any, error: type[Exception], message: str) -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    with pytest.raises(error, match=message):
        curvfunc.accumulation(model_fn, params, specs, **given)


def test_states_that_do_not_fit() -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    X, y = torch.randn(N, 4), classes()
    states = []
    for specs in (curvfunc.Grad(), curvfunc.Variance(), (curvfunc.Grad(), curvfunc.Loss()), curvfunc.DiagGGN()):
        acc = curvfunc.accumulation(model_fn, params, specs)
        states.append(acc.update(acc.init(), params, X, y))
    other, its = curvfunc.functionalize(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)))
    acc = curvfunc.accumulation(other, its, curvfunc.Grad())
    with pytest.raises(ValueError, match="other specs or parameters"):
        curvfunc.merge(states[0], states[1])
    with pytest.raises(ValueError, match="states of 1 and 2 specs"):
        curvfunc.merge(states[0], states[2])
    with pytest.raises(ValueError, match=r"do not fit.*\(5, 4\).*\(6, 4\)"):
        curvfunc.merge(states[0], acc.update(acc.init(), its, X, y))
    with pytest.raises(ValueError, match="no samples"):
        acc.result(acc.init())


# -- what a loss of one's own divides by


@pytest.mark.parametrize(
    ("loss_fn", "kind"),
    [
        (lambda out, y: (out - y).abs().sum(), "sum"),
        (lambda out, y: (out - y).abs().mean(), "mean"),
        (lambda out, y: ((out - y) ** 4).sum(1).mean(), "mean"),
        (nn.HuberLoss(reduction="sum"), "sum"),
        (nn.GaussianNLLLoss, "mean"),
    ],
)
@pytest.mark.parametrize("samples", [1, 2, 7])
def test_reduction_is_observed(loss_fn: Any, kind: str, samples: int) -> None:
    y: Any = torch.randn(samples, C)
    if loss_fn is nn.GaussianNLLLoss:
        loss_fn, y = lambda out, y: F.gaussian_nll_loss(out, y["mean"], y["var"]), {"mean": y, "var": torch.rand(samples, C)}
    loss, out = losses.normalize(loss_fn), torch.randn(samples, C)
    reference = losses.reference_sample(loss, out, y)
    assert reference is not None
    for rows in (slice(None), slice(0, 1)):
        part = optree.tree_map(lambda t: t[rows], y)  # noqa: B023
        assert losses.observed_reduction(loss, out[rows], part, reference) == kind


def test_a_loss_without_gradients_tells_nothing() -> None:
    assert losses.reference_sample(losses.normalize(lambda out, y: 0 * out.sum()), torch.randn(2, C), torch.randn(2, C)) is None


@pytest.mark.parametrize("rows", [slice(0, N), slice(5, 8), slice(4, 5)])
def test_another_mean_is_noticed(rows: slice) -> None:
    """Also in a batch where all samples count as much, or nothing, but not as much as those of the first batch."""

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        kept = y >= 0
        return (kept * out.square()).sum() / kept.sum().clamp(min=1)

    y = torch.ones(N, C)
    y[4], y[5:8, :2], y[8:] = -1, -1, -1
    loss, out = losses.normalize(loss_fn), torch.randn(N, C)
    reference = losses.reference_sample(loss, out[:3], y[:3])
    assert reference is not None
    assert losses.observed_reduction(loss, out[:3], y[:3], reference) == "mean"
    with pytest.raises(ValueError, match="loss_fn is neither a sum nor a mean over samples|other"):
        kind = losses.observed_reduction(loss, out[rows], y[rows], reference)
        raise ValueError(f"other: {kind}" if kind != "mean" else kind)
