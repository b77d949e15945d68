"""Matrices of a data set: those of one big batch, one fixed matrix in each pass, and what is said where they cannot be."""

import io
import pickle
import random
import runpy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close
from test_accumulate import LOSSES, C, Masked, Terminal, classes, uneven, whole
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvfunc
from curvfunc.tensors import progress

OPERATORS: dict[str, Callable[..., curvfunc.LinearOperator]] = {
    "hessian": curvfunc.hessian_operator,
    "ggn": curvfunc.ggn_operator,
    "empirical fisher": partial(curvfunc.fisher_operator, empirical=True),
}


@pytest.fixture(autouse=True)
def _double(float64: None) -> None:
    """All in float64."""


def small() -> tuple[curvfunc.ModelFunction, dict[str, Tensor]]:
    return curvfunc.functionalize(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)))


def padded_mean(out: Tensor, y: Tensor) -> Tensor:
    """A mean over the entries of y that are not nan."""
    kept = ~y.isnan()
    return torch.where(kept, (out - y.nan_to_num()).cosh(), 0.0).sum() / kept.sum().clamp(min=1)


def partly_padded(n: int) -> Tensor:
    y = torch.randn(n, C)
    return y.masked_fill(torch.rand(n, C) < 0.4, float("nan"))


CASES = {name: (make, targets, None) for name, (make, targets) in LOSSES.items()} | {
    "custom, another mean": (lambda: padded_mean, partly_padded, lambda out, y: (~y.isnan()).sum()),
}


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", CASES)
def test_uneven_batches_are_one(name: str, kind: str) -> None:
    make, targets, reduction = CASES[name]
    loss_fn, batches = make(), uneven(targets, 5)
    model_fn, params = small()
    operator = OPERATORS[kind](model_fn, params, batches, loss_fn=loss_fn, reduction=reduction, chunk_size=7)
    one = OPERATORS[kind](model_fn, params, *whole(batches), loss_fn=loss_fn)
    assert one.dense().norm() > 1e-3
    assert_close(operator.dense(), one.dense(), rtol=1e-12)
    tree = {name: torch.randn_like(p) for name, p in params.items()}
    assert_close(operator @ tree, one @ tree, rtol=1e-12)
    assert (operator.shape, operator.names, operator.dtype) == (one.shape, one.names, one.dtype)


@pytest.mark.parametrize("kind", OPERATORS)
def test_batches_of_dictionaries(kind: str) -> None:
    model_fn, params = curvfunc.functionalize(Masked())
    batches = [
        {"input_ids": torch.randint(9, (n, 5)), "attention_mask": torch.ones(n, 5), "labels": classes(n)} for n in (3, 2, 4)
    ]
    together = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    y = together.pop("labels")
    operator = OPERATORS[kind](model_fn, params, batches)
    assert_close(operator.dense(), OPERATORS[kind](model_fn, params, together, y).dense(), rtol=1e-12)
    other = [({"input": batch}, 0) for batch in batches]
    split = lambda pair: ({k: v for k, v in pair[0]["input"].items() if k != "labels"}, pair[0]["input"]["labels"])
    assert_close(OPERATORS[kind](model_fn, params, other, split=split).dense(), operator.dense(), rtol=0.0)


def test_eigenvalues_over_five_batches() -> None:
    pytest.importorskip("scipy")
    model_fn, params = small()
    batches = uneven(classes, 5)
    for function in (curvfunc.hessian_operator, curvfunc.ggn_operator):
        dense = function(model_fn, params, *whole(batches)).dense()
        values, vectors = curvfunc.eigsh(function(model_fn, params, batches), 5, which="LA")
        assert_close(values, torch.linalg.eigvalsh(dense)[-5:], rtol=1e-10)
        assert_close(dense @ vectors, vectors * values, rtol=1e-8)


def test_loaders_empty_batches_and_estimators() -> None:
    model_fn, params = small()
    batches = uneven(classes, 5)
    X, y = whole(batches)
    one = curvfunc.ggn_operator(model_fn, params, X, y)
    loader = DataLoader(TensorDataset(X, y), batch_size=6)
    assert len(X) % 6
    for data in (loader, [(X[:0], y[:0]), *batches, (X[:0], y[:0])], tuple(batches)):
        operator = curvfunc.ggn_operator(model_fn, params, data)
        assert_close(operator.dense(), one.dense(), rtol=1e-12)
        for name in ("hutchinson_trace", "hutchpp_trace", "hutchinson_diag", "xdiag"):
            function = getattr(curvfunc, name)
            drawn = [function(A, 6, generator=torch.Generator().manual_seed(3)) for A in (operator, one)]
            assert_close(*drawn, rtol=1e-8)
        nodes = [
            curvfunc.spectral_density(A, num_steps=3, generator=torch.Generator().manual_seed(1)).nodes for A in (operator, one)
        ]
        assert_close(*nodes, rtol=1e-8)


def test_a_batch_without_weight_counts_for_nothing() -> None:
    model_fn, params = small()
    batches = uneven(classes, 2)
    ignored = (torch.randn(3, 4), torch.full((3,), -100))
    operator = curvfunc.ggn_operator(model_fn, params, [batches[0], ignored, batches[1]])
    assert_close(operator.dense(), curvfunc.ggn_operator(model_fn, params, batches).dense(), rtol=1e-12)
    nothing = curvfunc.ggn_operator(model_fn, params, [ignored, ignored])
    assert_close(nothing.dense(), curvfunc.ggn_operator(model_fn, params, *ignored).dense(), rtol=0.0)


def test_low_precision_is_summed_in_float32() -> None:
    model_fn, params = small()
    params = {name: p.bfloat16() for name, p in params.items()}
    X, y = torch.randn(1, 4).bfloat16(), torch.tensor([1])
    v = {name: torch.randn_like(p) for name, p in params.items()}
    times = 600
    loss_fn = nn.CrossEntropyLoss(reduction="sum")
    got = curvfunc.ggn_operator(model_fn, params, [(X, y)] * times, loss_fn=loss_fn) @ v
    one = curvfunc.ggn_operator(model_fn, params, X, y, loss_fn=loss_fn) @ v
    assert got["2.bias"].dtype == torch.bfloat16  # added up in bfloat16, a sum stands still at 256 times its terms
    assert_close(got["2.bias"].double(), times * one["2.bias"].double(), rtol=0.01)


# -- one fixed matrix


def test_draws_are_the_same_in_each_pass_and_others_for_each_operator() -> None:
    model_fn, params = small()
    batches = uneven(classes, 4)
    exact = curvfunc.ggn_operator(model_fn, params, batches).dense()
    for function in (curvfunc.ggn_operator, curvfunc.fisher_operator):
        first, same, other = (
            function(model_fn, params, batches, mc_samples=2, generator=torch.Generator().manual_seed(seed))
            for seed in (1, 1, 2)
        )
        A = first.dense()
        assert_close(first.dense(), A, rtol=0.0)
        assert_close(A, A.mT, rtol=1e-12)
        assert_close(same.dense(), A, rtol=0.0)
        assert (other.dense() - A).norm() > 0.01 * A.norm()
        many = function(model_fn, params, batches, mc_samples=20000)
        assert_close(many.dense(), exact, rtol=0.03)
    (X, y), *_ = batches
    alike = curvfunc.ggn_operator(model_fn, params, [(X[:1], y[:1])] * 20, mc_samples=1)
    assert torch.linalg.matrix_rank(alike.dense()) == C - 1  # a draw has rank one: there are different ones


class Restless(nn.Module):
    """Dropout of all kinds, a buffer and a counter that each call changes, and on which it depends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.dropout = nn.Linear(4, 5), nn.Linear(5, C), nn.Dropout(0.4)
        self.register_buffer("scale", torch.ones(()))
        self.calls = 0

    def forward(self, X: Tensor) -> Tensor:
        self.calls += 1
        self.scale.mul_(1.5)
        h = self.dropout(self.first(X).tanh()) * (random.random() + 0.5)
        return self.last(h) * self.scale * self.calls


def test_models_that_draw_and_keep_something() -> None:
    model = Restless()
    model_fn, params = curvfunc.functionalize(model)
    batches = uneven(classes, 3)
    operator = curvfunc.hessian_operator(model_fn, params, batches)
    before = torch.get_rng_state(), random.getstate()
    A = operator.dense()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert_close(operator.dense(), A, rtol=0.0)
    assert_close(A, A.mT, rtol=1e-12)
    assert (model.calls, float(model.scale)) == (0, 1.0)
    assert (curvfunc.hessian_operator(model_fn, params, batches).dense() - A).norm() > 0.01 * A.norm()


def test_buffers_that_are_read_are_those_of_each_pass() -> None:
    """The operator's own passes change none, and a change from outside is noticed and not taken back."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, C)).eval()
    model_fn, params = curvfunc.functionalize(model)
    batches = uneven(classes, 3)
    operator = curvfunc.ggn_operator(model_fn, params, batches)
    assert_close(operator.dense(), curvfunc.ggn_operator(model_fn, params, *whole(batches)).dense(), rtol=1e-12)
    model[1].running_var.fill_(2.0)
    with pytest.raises(ValueError, match="the model has other outputs than in an earlier product.*a buffer"):
        operator.dense()
    assert torch.equal(model[1].running_var, torch.full((5,), 2.0))


def test_pickling() -> None:
    model_fn, params = small()
    batches = uneven(classes, 3)
    loader = DataLoader(TensorDataset(*whole(batches)), batch_size=4)
    for data in (batches, loader):
        for options in ({}, {"mc_samples": 2}):
            operator = 2 * curvfunc.ggn_operator(model_fn, params, data, **options) + 0.5
            A = operator.dense()
            again = pickle.loads(pickle.dumps(operator))
            assert_close(again.dense(), A, rtol=0.0)
            assert again.names == operator.names
    params["0.bias"].add_(1.0)
    with pytest.raises(ValueError, match="ggn_operator: a parameter was changed in place"):
        pickle.dumps(operator)


# -- what is refused


class Again:
    """An iterable of another list in each pass; the last one stays."""

    def __init__(self, *passes: list[Any]) -> None:
        self.passes = list(passes)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.passes.pop(0) if len(self.passes) > 1 else self.passes[0])


def test_other_batches_at_the_second_pass() -> None:
    model_fn, params = small()
    batches = uneven(classes, 4)
    X, y = whole(batches)
    v = torch.randn(curvfunc.ggn_operator(model_fn, params, batches).shape[0])
    loader = DataLoader(TensorDataset(X, y), batch_size=4, shuffle=True)
    noisy = [(X + 1e-9, y) for X, y in batches]
    relabelled = [(X, (y + 1) % C) for X, y in batches]
    for data in (loader, Again(batches, noisy), Again(batches, relabelled), Again(batches, batches[1:])):
        operator = curvfunc.ggn_operator(model_fn, params, data)
        with pytest.raises(ValueError, match=r"batch 0 of the data is not what it was at first.*shuffle=False"):
            operator @ v
    with pytest.raises(ValueError, match="gave 4 batches at first, and now 3.*shuffle=False"):
        curvfunc.ggn_operator(model_fn, params, Again(batches, batches[:-1])) @ v
    with pytest.raises(ValueError, match="gave 3 batches at first, and has more now"):
        curvfunc.ggn_operator(model_fn, params, Again(batches[:-1], batches)) @ v


def test_what_changes_later() -> None:
    model_fn, params = small()
    batches = uneven(classes, 4)
    later = [(X + 0.1, y) for X, y in batches]
    operator = curvfunc.ggn_operator(model_fn, params, Again(batches, batches, later))
    v = torch.randn(operator.shape[0])
    operator @ v
    with pytest.raises(ValueError, match="other outputs than in an earlier product"):
        operator @ v
    operator = curvfunc.ggn_operator(model_fn, params, batches)
    params["0.bias"].add_(1.0)
    with pytest.raises(RuntimeError, match=r"a parameter was changed in place.*optimizer.step\(\)"):
        operator @ v

    own = torch.Generator()
    drawing = lambda p, X: model_fn(p, X + torch.randn(X.shape, generator=own))
    operator = curvfunc.ggn_operator(drawing, params, batches)
    operator @ v
    with pytest.raises(ValueError, match="draws from a generator of its own"):
        operator @ v


ONE = [(torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2]))]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (lambda: iter(ONE), TypeError, r"data is a list_iterator, which gives its batches once.*DataLoader.*list\(data\)"),
        (lambda: (b for b in ONE), TypeError, "data is a generator"),
        (lambda: [], ValueError, "gave no batches"),
        (lambda: [(X[:0], y[:0]) for X, y in ONE], ValueError, "1 batches without samples"),
        (lambda: ONE[0][0], TypeError, "y is missing, and X is a Tensor"),
        (lambda: {"input": ONE[0][0]}, TypeError, "y is missing, and X is a dict"),
        (lambda: 3, TypeError, "y is missing, and X is a int"),
        (lambda: [ONE[0][0]], TypeError, "batch 0 is a Tensor; data must give pairs"),
        (lambda: [*ONE, (ONE[0][0].float(), ONE[0][1])], ValueError, "batch 1 has another structure than the first one"),
        (lambda: [*ONE, ({"a": ONE[0][0]}, ONE[0][1])], ValueError, "batch 1 has another structure than the first one"),
        (lambda: [*ONE, (ONE[0][0], ONE[0][1][:2])], ValueError, "X has 3 samples and y has 2"),
        (lambda: [*ONE, tuple(t.to("meta") for t in ONE[0])], ValueError, "batch 1: it is on meta and the parameters on cpu. Pass device='cpu'"),
    ],
)  # fmt: skip
def test_bad_data(data: Any, error: type[Exception], message: str) -> None:
    model_fn, params = small()
    for function in OPERATORS.values():
        with pytest.raises(error, match=message):
            function(model_fn, params, data())


def test_bad_options() -> None:
    model_fn, params = small()
    for option, message in (
        ({"subsampling": [0]}, "subsampling is of one batch"),
        ({"chunk_size": 0}, "chunk_size must be a positive int"),
        ({"reduction": "mean"}, "reduction is for losses of one's own"),
        ({"reduction": "max", "loss_fn": padded_mean}, "reduction must be 'sum', 'mean' or a function"),
        ({"loss_fn": lambda out, y: out.sum() * 0}, "all gradients of loss_fn are zero"),
    ):
        with pytest.raises(ValueError, match=message):
            curvfunc.ggn_operator(model_fn, params, ONE, **option)
    for option in ({"split": lambda b: b}, {"device": "cpu"}, {"reduction": "sum"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is for data sets"):
            curvfunc.ggn_operator(model_fn, params, *ONE[0], **option)
    with pytest.raises(ValueError, match="neither a sum nor a mean"):
        curvfunc.hessian_operator(model_fn, params, uneven(partly_padded, 3), loss_fn=padded_mean)
    with pytest.raises(TypeError, match="generator must be"):
        curvfunc.ggn_operator(model_fn, params, ONE, mc_samples=1, generator=0)


def test_errors_of_a_batch_say_which() -> None:
    model_fn, params = small()
    batches = [*ONE, (torch.randn(2, 3), torch.tensor([0, 1]))]
    operator = curvfunc.ggn_operator(model_fn, params, batches)
    with pytest.raises(RuntimeError) as caught:
        operator @ params
    assert "This was batch 1 of the data, counted from 0." in caught.value.__notes__


def test_inside_of_transformations() -> None:
    model_fn, params = small()
    operator = curvfunc.ggn_operator(model_fn, params, ONE)
    with pytest.raises(NotImplementedError, match=r"torch.func cannot transform.*operator @ matrix \[P, K\]"):
        torch.func.vmap(lambda v: operator @ v)(torch.randn(2, operator.shape[0]))
    with pytest.raises(NotImplementedError, match="cannot leave torch.func"):
        torch.func.grad(lambda p: curvfunc.ggn_operator(model_fn, p, ONE).dense().sum())(params)


# -- progress, and the example


@pytest.mark.parametrize(
    ("stream", "asked", "shown"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_progress(stream: Any, asked: bool, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if shown:
        pytest.importorskip("tqdm")
    model_fn, params = small()
    screen = stream()
    operator = curvfunc.ggn_operator(model_fn, params, uneven(classes, 3), progress=False)
    monkeypatch.setattr(sys, "stderr", screen)
    curvfunc.spectral_density(operator, num_steps=4, progress=asked)
    assert ("4/4" in screen.getvalue()) == shown
    curvfunc.hutchpp_trace(operator, 3, progress=asked)
    assert ("hutchpp_trace" in screen.getvalue()) == shown
    (operator + 1.0).solve(torch.ones(operator.shape[0]), progress=asked)
    assert ("solve" in screen.getvalue()) == shown


def test_progress_of_a_slow_product(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    model_fn, params = small()
    operator = curvfunc.ggn_operator(model_fn, params, uneven(classes, 3))
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    operator @ params
    assert not screen.getvalue()
    monkeypatch.setattr("curvfunc.data.passes.bar", lambda *args, **options: progress.bar(*args))
    operator @ params
    assert "ggn_operator: 100%" in screen.getvalue()
    assert "3/3" in screen.getvalue()


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("matplotlib", "sklearn", "scipy", "tqdm"):
        pytest.importorskip(module)
    torch.set_default_dtype(torch.float32)
    folder = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", ["dataset_spectrum.py", "--quick", "--out", str(tmp_path)])
    runpy.run_path(str(folder / "dataset_spectrum.py"), run_name="__main__")
    assert (tmp_path / "spectrum.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("largest eigenvalues: ") == 2
