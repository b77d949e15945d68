"""Bad input: the type of the error, and a message that names what is wrong and what to do."""

import functools
import pkgutil
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optree
import pytest
import torch
import torch.nn.functional as F
from quantities import EXACT, QUANTITIES
from torch import Tensor, nn
from torch.func import stack_module_state

import curvfunc
from curvfunc import (
    KFAC,
    KFLR,
    BatchDiagGGN,
    BatchGrad,
    BatchL2,
    DiagGGN,
    Grad,
    Loss,
    Output,
    SqrtGGN,
    compute,
    functionalize,
)

N, C = 4, 3


def problem() -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    model_fn, params = functionalize(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, C)))
    return model_fn, params, torch.randn(N, 5), torch.tensor([0, 1, 2, 1])


def refused(error: type[Exception], *fragments: str) -> Any:
    """The error, with each of the fragments in this order in its message."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, fragments)))


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_different_numbers_of_samples(quantity: str) -> None:
    model_fn, params, X, y = problem()
    case = QUANTITIES[quantity]
    with refused(ValueError, "X has 4 samples and y has 3", "same"):
        case.function(model_fn, params, X, y[:3], **case.kwargs)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_no_samples(quantity: str) -> None:
    model_fn, params, X, y = problem()
    case = QUANTITIES[quantity]
    with refused(ValueError, "no samples", "N = 0"):
        case.function(model_fn, params, X[:0], y[:0], **case.kwargs)


def test_inputs_with_different_numbers_of_samples() -> None:
    _, params, X, y = problem()
    with refused(ValueError, "tensors in X", "[3, 4] samples"):
        curvfunc.batch_grad(lambda p, X: X["a"], params, {"a": X, "b": X[:3]}, y)


@pytest.mark.parametrize(("X", "error", "fragments"), [
    ({}, ValueError, ("X holds no tensor",)),
    (torch.tensor(1.0), ValueError, ("X", "without axes", "sample axis")),
    (np.zeros((N, 5)), TypeError, ("X", "ndarray", "torch.as_tensor")),
    ([[1.0, 2.0]] * N, TypeError, ("X", "float", "torch.as_tensor")),
])  # fmt: skip
def test_inputs_that_are_no_samples(X: Any, error: type[Exception], fragments: tuple[str, ...]) -> None:
    model_fn, params, _, y = problem()
    with refused(error, *fragments):
        curvfunc.batch_grad(model_fn, params, X, y)


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (torch.ones(4, 5, dtype=torch.long), "torch.int64"),
        (torch.ones(4, 5, dtype=torch.bool), "torch.bool"),
        (torch.ones(4, 5, dtype=torch.complex64), "torch.complex64"),
        (np.ones((4, 5)), "ndarray"),
        (1.5, "float"),
    ],
)
def test_parameters_of_other_types(value: Any, what: str) -> None:
    model_fn, params, X, y = problem()
    with refused(TypeError, "'0.weight'", what):
        curvfunc.batch_grad(model_fn, params | {"0.weight": value}, X, y)


def test_nested_parameters_are_named_by_their_path() -> None:
    _, _, X, y = problem()
    with refused(TypeError, "'layers.1.w'", "torch.int32"):
        params = {"layers": [{"w": torch.ones(2)}, {"w": torch.ones(2, dtype=torch.int32)}]}
        curvfunc.batch_grad(lambda p, X: X, params, X, y)


@pytest.mark.parametrize("params", [{}, [], ()])
def test_no_parameters(params: Any) -> None:
    _, _, X, y = problem()
    with refused(ValueError, "params is empty"):
        curvfunc.batch_grad(lambda p, X: X, params, X, y)


def test_parameters_missing_from_a_function() -> None:
    _, _, X, y = problem()
    with refused(ValueError, "'bias'", "params lacks", "['weight']"):
        curvfunc.batch_grad(lambda p, X: F.linear(X, p["weight"], p["bias"]), {"weight": torch.randn(C, 5)}, X, y)


def test_parameters_unknown_to_a_module() -> None:
    model_fn, params, X, y = problem()
    with refused(ValueError, "['0.wieght']", "Sequential does not have", "'0.weight'", "functionalize"):
        curvfunc.batch_grad(model_fn, params | {"0.wieght": torch.randn(4, 5)}, X, y)


def test_parameters_of_a_module_in_another_container() -> None:
    model_fn, params, X, y = problem()
    with refused(TypeError, "dict", "list"):
        curvfunc.batch_grad(model_fn, list(params.values()), X, y)


def test_parameters_missing_from_a_module_stay_fixed() -> None:
    model_fn, params, X, y = problem()
    some = {"2.bias": params["2.bias"]}
    got, want = (curvfunc.batch_grad(model_fn, p, X, y) for p in (some, params))
    assert list(got) == ["2.bias"]
    assert torch.equal(got["2.bias"], want["2.bias"])


def test_one_parameter_under_two_names() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    model_fn, params = functionalize(net)
    twice = params | {"1.weight": params["0.weight"]}
    with refused(ValueError, "'0.weight' and '1.weight'", "one parameter"):
        curvfunc.batch_grad(model_fn, twice, torch.randn(N, 3), torch.tensor([0, 1, 2, 1]))
    other = {k.replace("0.weight", "1.weight"): v for k, v in params.items()}
    X, y = torch.randn(N, 3), torch.tensor([0, 1, 2, 1])
    got, want = curvfunc.batch_grad(model_fn, other, X, y), curvfunc.batch_grad(model_fn, params, X, y)
    assert torch.equal(got["1.weight"], want["0.weight"])


def test_modules_are_as_before_also_under_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    net = Twice().eval()
    before = {name: id(t) for name, t in [*net.named_parameters(), *net.named_buffers()]}
    model_fn, params = functionalize(net)
    X, y = torch.randn(N, 3), torch.tensor([0, 1, 2, 1])
    curvfunc.batch_grad(model_fn, params, X, y)
    torch.compile(lambda p: curvfunc.batch_grad(model_fn, p, X, y), fullgraph=True, backend="aot_eager")(params)
    with refused(RuntimeError, "shape"):
        curvfunc.batch_grad(model_fn, params, torch.randn(N, 7), y)
    assert {name: id(t) for name, t in [*net.named_parameters(), *net.named_buffers()]} == before


@pytest.mark.parametrize("quantity", EXACT)
def test_a_parameter_that_the_output_does_not_depend_on_gets_zeros(quantity: str) -> None:
    model_fn, params, X, y = problem()
    unused = torch.randn(2, 3)
    own = lambda p, X: model_fn({k: v for k, v in p.items() if k != "unused"}, X)
    result = EXACT[quantity].function(own, params | {"unused": unused}, X, y)
    leaves = optree.tree_leaves(result["unused"])
    assert all(torch.equal(leaf, torch.zeros_like(leaf)) for leaf in leaves)
    shapes = {
        "batch_grad": (N, 2, 3),
        "batch_l2": (N,),
        "batch_diag_ggn": (N, 2, 3),
        "sqrt_ggn": (C, N, 2, 3),
        "kflr": (6, 6),
    }
    assert [leaf.shape for leaf in leaves] == [shapes.get(quantity, (2, 3))]
    assert torch.equal(compute(own, params | {"unused": unused}, X, y, Grad())["unused"], torch.zeros(2, 3))


def test_parameters_of_another_dtype() -> None:
    model_fn, params, X, y = problem()
    mixed = params | {"2.weight": params["2.weight"].double()}
    with refused(ValueError, "'2.weight'", "dtype torch.float64", "X has torch.float32", "Move both"):
        curvfunc.batch_grad(model_fn, mixed, X, y)
    with refused(ValueError, "'0.weight'", "torch.float32", "X has torch.float64"):
        curvfunc.diag_ggn(model_fn, params, X.double(), y)


def test_parameters_on_another_device() -> None:
    model_fn, params, X, y = problem()
    moved = params | {"0.bias": params["0.bias"].to("meta")}
    with refused(ValueError, "'0.bias'", "device meta", "X has cpu", "Move both"):
        curvfunc.batch_grad(model_fn, moved, X, y)


@pytest.mark.gpu
def test_parameters_on_the_gpu_and_inputs_not() -> None:
    model_fn, params, X, y = problem()
    with refused(ValueError, "'0.weight'", "device cuda:0", "X has cpu", "Move both"):
        curvfunc.batch_grad(model_fn, {k: v.cuda() for k, v in params.items()}, X, y)


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [BatchGrad(), DiagGGN(1), KFLR(), BatchL2()])
def test_batch_norm_in_training_mode(spec: Any) -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, C))
    model_fn, params = functionalize(net)
    _, _, X, y = problem()
    mean = net[1].running_mean.clone()
    with refused(ValueError, "training mode", "mixes the samples", "eval()"):
        compute(model_fn, params, X, y, spec)
    assert torch.equal(net[1].running_mean, mean)
    net.eval()
    compute(model_fn, params, X, y, spec)


@pytest.mark.parametrize(
    "mix",
    [
        lambda h: h - h.mean(0),
        lambda h: h.flip(0),
        lambda h: h / h.norm(),
        lambda h: torch.softmax(h @ h.mT, 1) @ h,  # attention over the batch
        lambda h: h @ h.mT,  # as many outputs as samples
    ],
)
@pytest.mark.parametrize("spec", [BatchGrad(), DiagGGN()])
def test_models_that_mix_samples(mix: Callable[[Tensor], Tensor], spec: Any) -> None:
    params, X, y = {"w": torch.randn(5, C)}, torch.randn(N, 5), torch.arange(N) % C
    with refused(ValueError, "mixes the samples of a batch", "over the first axis"):
        compute(lambda p, x: mix(x @ p["w"]), params, X, y, spec)


def test_models_that_only_look_as_if_they_mixed_samples() -> None:
    params, X, y = {"w": torch.randn(5, C)}, torch.randn(N, 5), torch.arange(N) % C
    whole = curvfunc.batch_grad(lambda p, x: x @ p["w"], params, X, y)
    apart = curvfunc.batch_grad(lambda p, x: torch.stack([row @ p["w"] for row in x]), params, X, y)
    torch.testing.assert_close(apart, whole)
    curvfunc.batch_grad(lambda p, x: torch.stack([F.dropout(row) @ p["w"] for row in x]), params, X, y)  # chance


@pytest.mark.parametrize("spec", [BatchGrad(), Grad(), Output()])
@pytest.mark.parametrize(
    ("output", "what"),
    [
        (lambda out: (out, out), "tuple"),
        (lambda out: [out], "list"),
        (lambda out: {"logits": out}, "dict with keys ['logits']"),
        (lambda out: None, "NoneType"),
    ],
)
def test_models_that_return_no_tensor(output: Callable[[Tensor], Any], what: str, spec: Any) -> None:
    model_fn, params, X, y = problem()
    with refused(TypeError, "returned", what, "output_fn"):
        compute(lambda p, X: output(model_fn(p, X)), params, X, y, spec)


def test_output_fn_chooses() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, C)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.linear(x)}

    model_fn, params = functionalize(Wrapped(), output_fn=lambda out: out["logits"])
    _, _, X, y = problem()
    assert curvfunc.batch_grad(model_fn, params, X, y)["linear.bias"].shape == (N, C)


@pytest.mark.parametrize(
    ("output", "error", "fragments"),
    [
        (lambda out: out.T, ValueError, ("shape (3, 4)", "4 sample(s)", "sample axis", "Permute")),
        (lambda out: out.mean(), ValueError, ("shape ()", "sample axis")),
        (lambda out: out.long(), TypeError, ("torch.int64", "floating-point")),
        (lambda out: out.to(torch.complex64), TypeError, ("torch.complex64", "floating-point")),
    ],
)
def test_outputs_that_do_not_fit(output: Callable[[Tensor], Any], error: type[Exception], fragments: tuple[str, ...]) -> None:
    model_fn, params, X, y = problem()
    with refused(error, *fragments):
        curvfunc.batch_grad(lambda p, X: output(model_fn(p, X)), params, X, y)


def test_functionalize_takes_modules() -> None:
    with refused(TypeError, "torch.nn.Module", "function", "pass it as model_fn"):
        functionalize(lambda params, X: X)


def test_errors_of_the_model_itself_stay() -> None:
    _, params, X, y = problem()

    def broken(params: Any, X: Tensor) -> Tensor:
        raise KeyError("0.weight")

    with pytest.raises(KeyError, match=re.escape("0.weight")):
        curvfunc.batch_grad(broken, params, X, y)


def test_inputs_changed_in_place_after_their_use() -> None:
    def model_fn(params: Any, X: Tensor) -> Tensor:
        hidden = F.linear(X, params["first"])
        out = F.linear(hidden, params["second"])
        hidden.mul_(2)
        return out

    _, _, X, y = problem()
    params = {"first": torch.randn(4, 5), "second": torch.randn(C, 4)}
    for spec in (BatchGrad(), DiagGGN(), KFLR()):
        with refused(RuntimeError, "place"):  # autograd's own words, or the engine's
            compute(model_fn, params, X, y, spec)


# --- specs and options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [DiagGGN, BatchDiagGGN, SqrtGGN, KFAC])
@pytest.mark.parametrize(
    ("mc_samples", "error", "what"),
    [(-1, ValueError, "-1"), (1.0, TypeError, "float"), ("2", TypeError, "str"), (None, TypeError, "NoneType"),
     (True, TypeError, "bool")],
)  # fmt: skip
def test_mc_samples(spec: Any, mc_samples: Any, error: type[Exception], what: str) -> None:
    with refused(error, spec.__name__, "mc_samples", what):
        spec(mc_samples)


@pytest.mark.parametrize("function", ["diag_ggn", "batch_diag_ggn", "sqrt_ggn", "kfac"])
def test_mc_samples_of_functions(function: str) -> None:
    with refused(ValueError, "mc_samples", "-2"):
        getattr(curvfunc, function)(*problem(), mc_samples=-2)
    with refused(TypeError, "mc_samples", "1.5"):
        getattr(curvfunc, function)(*problem(), mc_samples=1.5)


@pytest.mark.parametrize("quantity", ["batch_grad", "variance", "diag_ggn", "kfac"])
@pytest.mark.parametrize(
    ("index", "error", "fragments"),
    [
        ([0, 4], ValueError, ("index 4", "out of range for 4 samples")),
        ([-1], ValueError, ("index -1", "out of range")),
        (torch.tensor([7, 0]), ValueError, ("index 7", "out of range")),
        (np.array([0, -3]), ValueError, ("index -3", "out of range")),
        ([], ValueError, ("subsampling is empty", "None")),
        (torch.empty(0, dtype=torch.long), ValueError, ("subsampling is empty",)),
        (range(0), ValueError, ("subsampling is empty",)),
        ([True, False, True, False], TypeError, ("subsampling", "torch.bool", "nonzero")),
        ([0.0, 1.0], TypeError, ("subsampling", "torch.float32")),
        ([[0, 1]], TypeError, ("subsampling", "1-dimensional", "(1, 2)")),
        (2, TypeError, ("subsampling", "1-dimensional")),
        ("01", TypeError, ("subsampling", "'01'")),
    ],
)
def test_subsampling(index: Any, error: type[Exception], fragments: tuple[str, ...], quantity: str) -> None:
    case = QUANTITIES[quantity]
    with refused(error, *fragments):
        case.function(*problem(), subsampling=index, **case.kwargs)


@pytest.mark.parametrize("chunk_size", [0, -1, 1.5, "2"])
def test_chunk_size(chunk_size: Any) -> None:
    with refused(ValueError, "chunk_size", repr(chunk_size)):
        curvfunc.diag_ggn(*problem(), chunk_size=chunk_size)


@pytest.mark.parametrize("specs", ["BatchGrad", [BatchGrad(), 1.5], {"a": BatchGrad}])
def test_specs(specs: Any) -> None:
    with refused(TypeError, "specs", "BatchGrad()"):
        compute(*problem(), specs)


def test_generator_in_compiled_code() -> None:
    model_fn, params, X, y = problem()
    generator = torch.Generator()
    compiled = torch.compile(lambda p: curvfunc.kfac(model_fn, p, X, y, generator=generator), backend="eager", fullgraph=True)
    with refused(Exception, "Generator"):
        compiled(params)


def test_blocks_that_would_not_fit_into_memory() -> None:
    X, y = torch.randn(2, 200), torch.tensor([0, 1])
    params = {"scale": torch.ones(200, 200)}
    with refused(NotImplementedError, "'scale'", "(200, 200)", "40000", "diag_ggn"):
        curvfunc.kflr(lambda p, X: (X.unsqueeze(1) * p["scale"]).sin().sum(2), params, X, y)


# --- targets and losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [Loss(), Grad(), BatchGrad(), DiagGGN(), KFAC()])
@pytest.mark.parametrize("wrong", [3, -1])
def test_targets_out_of_range(wrong: int, spec: Any) -> None:
    model_fn, params, X, y = problem()
    with refused(ValueError, "cross_entropy", f"target {wrong} is out of range for C = 3", "(4, 3)", "ignore_index"):
        compute(model_fn, params, X, y.index_fill(0, torch.tensor(2), wrong), spec)


@pytest.mark.parametrize(
    ("y", "loss_fn", "fragments"),
    [
        (torch.zeros(N), F.cross_entropy, ("(4, 3)", "(4,)", "torch.float32", "y.long()")),
        (torch.zeros(N, 2), F.cross_entropy, ("(4, 3)", "(4, 2)", "probabilities")),
        (torch.zeros(N, 1, dtype=torch.long), F.cross_entropy, ("(4, 3)", "(4, 1)", "class indices of shape (4,)")),
        (torch.zeros(N, 1), F.mse_loss, ("(4, 3)", "(4, 1)", "same shape")),
        (torch.zeros(N), nn.MSELoss(), ("mse_loss", "(4, 3)", "(4,)", "same shape")),
        (torch.zeros(N, 2), nn.BCEWithLogitsLoss(), ("binary_cross_entropy_with_logits", "(4, 3)", "(4, 2)")),
        (torch.zeros(N, C, dtype=torch.long), F.binary_cross_entropy_with_logits, ("torch.int64", "floating point")),
        (torch.zeros(N, dtype=torch.long), nn.CrossEntropyLoss(torch.ones(4)), ("weight of shape (4,)", "C = 3")),
    ],
)
def test_targets_that_do_not_fit(y: Tensor, loss_fn: Any, fragments: tuple[str, ...]) -> None:
    model_fn, params, X, _ = problem()
    for spec in (BatchGrad(), DiagGGN()):
        with refused(ValueError, *fragments):
            compute(model_fn, params, X, y, spec, loss_fn=loss_fn)


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(reduction="none"),
        functools.partial(F.cross_entropy, reduction="none"),
    ],
)
@pytest.mark.parametrize("spec", [Loss(), BatchGrad(), DiagGGN(), KFAC()])
def test_no_reduction(loss_fn: Any, spec: Any) -> None:
    with refused(ValueError, "reduction='none'", "'mean' or 'sum'"):
        compute(*problem(), spec, loss_fn=loss_fn)


def per_sample_loss(out: Tensor, y: Tensor) -> Tensor:
    return (out.sum(1) - y).square()


def no_tensor(out: Tensor, y: Tensor) -> float:
    return 1.0


@pytest.mark.parametrize("spec", [Loss(), Grad(), BatchGrad(), DiagGGN(), SqrtGGN(1)])
@pytest.mark.parametrize(("loss_fn", "what"), [(per_sample_loss, "shape (4,)"), (no_tensor, "float")])
def test_losses_that_are_no_scalar(loss_fn: Any, what: str, spec: Any) -> None:
    with refused(ValueError, loss_fn.__name__, what, "scalar", "Sum or average"):
        compute(*problem(), spec, loss_fn=loss_fn)


def contrastive(out: Tensor, y: Tensor) -> Tensor:
    return (out @ out.T).log_softmax(1).diagonal().mean()


@pytest.mark.parametrize("spec", [BatchGrad(), BatchL2(), DiagGGN(), KFAC()])
def test_losses_that_mix_samples(spec: Any) -> None:
    with refused(ValueError, "contrastive", "does not separate over samples"):
        compute(*problem(), spec, loss_fn=contrastive)


def saddle(out: Tensor, y: Tensor) -> Tensor:
    return (out[:, 0] * out[:, 1]).sum()


@pytest.mark.parametrize("spec", [DiagGGN(), BatchDiagGGN(), SqrtGGN(), KFLR(), DiagGGN(1), KFAC()])
def test_losses_that_are_not_convex(spec: Any) -> None:
    model_fn, params, X, y = problem()
    with refused(ValueError, "saddle", "indefinite", "convex"):
        compute(model_fn, params, X, y, spec, loss_fn=saddle)
    compute(model_fn, params, X, y, (Loss(), Grad(), BatchGrad()), loss_fn=saddle)


# --- numbers that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse_loss", "binary_cross_entropy_with_logits"])
def test_outputs_that_are_not_finite(loss: str, value: float) -> None:
    """They give results that are not finite for their sample, and right ones for the others."""
    model_fn, params, X, y = problem()
    if loss != "cross_entropy":
        y = torch.rand(N, C)
    spoiled = X.clone()
    spoiled[1, 0] = value
    loss_fn = getattr(F, loss)
    torch.manual_seed(0)
    specs = {name: case.spec for name, case in QUANTITIES.items()}
    results = compute(model_fn, params, spoiled, y, specs | {"loss": Loss(), "grad": Grad()}, loss_fn=loss_fn)
    clean = compute(model_fn, params, X, y, specs, loss_fn=loss_fn)
    others = [0, 2, 3]
    for name in ("batch_grad", "batch_l2", "batch_diag_ggn"):
        for key in params:
            torch.testing.assert_close(results[name][key][others], clean[name][key][others])
    if value != value:
        assert results["loss"].isnan()
        assert results["batch_grad"]["0.weight"][1].isnan().any()
        assert results["diag_ggn"]["0.weight"].isnan().any()
        assert results["kflr"]["0.weight"][1].isnan().any()


def saddle_of_all(out: Tensor, y: Tensor) -> Tensor:
    return (out.square().sum(1) - 2 * out.exp().sum(1)).sum()


def test_indefinite_besides_an_output_that_is_not_finite() -> None:
    model_fn, params, X, y = problem()
    X[1, 0] = float("nan")
    with refused(ValueError, "saddle", "indefinite"):
        curvfunc.diag_ggn(model_fn, params, X, y, loss_fn=saddle_of_all)


def exponential(out: Tensor, y: Tensor) -> Tensor:
    return (out.exp() - out * y.unsqueeze(1)).sum()


@pytest.mark.parametrize("spec", [BatchGrad(), DiagGGN(), SqrtGGN(), KFLR(), KFAC(), DiagGGN(2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_with_a_loss_of_ones_own(value: float, spec: Any) -> None:
    """The eigendecomposition of a matrix with NaN does not end the run, and other samples keep their results."""
    model_fn, params, X, y = problem()
    spoiled = X.clone()
    spoiled[1, 0] = value
    result = optree.tree_leaves(compute(model_fn, params, spoiled, y, spec, loss_fn=exponential))
    assert not all(leaf.isfinite().all() for leaf in result)
    if isinstance(spec, BatchGrad):
        clean = optree.tree_leaves(compute(model_fn, params, X, y, spec, loss_fn=exponential))
        for got, want in zip(result, clean, strict=True):
            torch.testing.assert_close(got[[0, 2, 3]], want[[0, 2, 3]])


def test_stacked_parameters_without_vmap() -> None:
    """An ensemble passed without torch.vmap fails in the model, not silently."""
    nets = [nn.Linear(5, C) for _ in range(2)]
    params, _ = stack_module_state(nets)
    model_fn, _ = functionalize(nets[0])
    _, _, X, y = problem()
    with pytest.raises((RuntimeError, ValueError)):
        curvfunc.batch_grad(model_fn, {k: v.detach() for k, v in params.items()}, X, y)


# --- what is easily mistaken --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [curvfunc.batch_grad, curvfunc.ggn_operator, curvfunc.hmp])
def test_parameters_that_are_a_generator_or_a_module(function: Any) -> None:
    model_fn, _, X, y = problem()
    net = nn.Linear(5, C)
    for params in (net.parameters(), net.named_parameters(), net):
        with refused(TypeError, "params is a", "module.parameters()", "functionalize(module)"):
            function(model_fn, params, X, y)
    with refused(TypeError, "params is a generator", "functionalize(module)"):
        curvfunc.jvp(model_fn, net.parameters(), X, {})


def test_samples_in_a_list() -> None:
    model_fn, params, X, y = problem()
    for samples in (list(X), list(X[:, None])):
        with refused(ValueError, "y has 4", "X is a list", "torch.stack(X)", "torch.cat(X)"):
            curvfunc.batch_grad(model_fn, params, samples, y)
    with refused(ValueError, "y holds a tensor without axes", "torch.stack(y)"):
        curvfunc.batch_grad(model_fn, params, X, list(y))
    pair = lambda p, x: model_fn(p, x[0] + x[1])  # a list of inputs
    got = curvfunc.batch_grad(pair, params, [X, X], y)
    assert torch.equal(got["2.bias"], curvfunc.batch_grad(model_fn, params, 2 * X, y)["2.bias"])


@pytest.mark.parametrize(("loss_fn", "fragments"), [
    (nn.CrossEntropyLoss, ("the class CrossEntropyLoss", "CrossEntropyLoss()")),
    (nn.MSELoss, ("the class MSELoss", "MSELoss()")),
    ("cross_entropy", ("'cross_entropy'", "F.cross_entropy")),
    (None, ("None", "nn.CrossEntropyLoss()")),
])  # fmt: skip
def test_losses_that_are_no_functions(loss_fn: Any, fragments: tuple[str, ...]) -> None:
    model_fn, params, X, y = problem()
    with refused(TypeError, "loss_fn is", *fragments):
        curvfunc.batch_grad(model_fn, params, X, y, loss_fn=loss_fn)
    with refused(TypeError, "loss_fn is", *fragments):
        curvfunc.ggn_operator(model_fn, params, X, y, loss_fn=loss_fn)


def test_integers_into_a_linear_layer() -> None:
    model_fn, params, X, y = problem()
    v = {k: torch.randn_like(p) for k, p in params.items()}
    for call in (curvfunc.batch_grad, curvfunc.ggn_operator, lambda *args: curvfunc.ggn_vp(*args, v)):
        with refused(ValueError, "X has torch.int64", "torch.float32", "X.to(torch.float32)"):
            call(model_fn, params, X.long(), y)


def test_everything_on_the_meta_device() -> None:
    model_fn, params, X, y = problem()
    meta = lambda t: t.to("meta")
    for function in (curvfunc.batch_grad, curvfunc.diag_ggn, curvfunc.ggn_operator):
        with refused(ValueError, "meta device", "no values", "to_empty"):
            function(model_fn, {k: meta(p) for k, p in params.items()}, meta(X), meta(y))


def test_generators_that_are_seeds() -> None:
    model_fn, params, X, y = problem()
    v = {k: torch.randn_like(p) for k, p in params.items()}
    operator = curvfunc.ggn_operator(model_fn, params, X, y)
    for call in (
        lambda g: curvfunc.kfac(model_fn, params, X, y, generator=g),
        lambda g: curvfunc.batch_grad(model_fn, params, X, y) and compute(model_fn, params, X, y, Loss(), generator=g),
        lambda g: curvfunc.ggn_vp(model_fn, params, X, y, v, mc_samples=1, generator=g),
        lambda g: curvfunc.ggn_operator(model_fn, params, X, y, mc_samples=1, generator=g),
        lambda g: curvfunc.hutchinson_trace(operator, 3, generator=g),
        lambda g: curvfunc.hutchpp_trace(operator, 3, generator=g),
        lambda g: curvfunc.hutchinson_diag(operator, 3, generator=g),
        lambda g: curvfunc.xdiag(operator, 4, generator=g),
        lambda g: curvfunc.spectral_density(operator, generator=g),
        lambda g: curvfunc.eigsh(operator, 2, generator=g),
    ):
        with refused(TypeError, "generator", "got 0 of type int", "manual_seed(seed)"):
            call(0)


def test_frozen_modules() -> None:
    model_fn, params = functionalize(nn.Linear(5, C).requires_grad_(False))
    _, _, X, y = problem()
    with refused(ValueError, "params is empty", "requires_grad=True", "module.requires_grad_()"):
        curvfunc.batch_grad(model_fn, params, X, y)


@pytest.mark.parametrize(("other", "fragments"), [
    (np.zeros(35), ("got ndarray", "torch.as_tensor(v)", "to_scipy()")),
    ([1.0, 2.0], ("got float", "torch.as_tensor(v)")),
    (2, ("got int", "torch.as_tensor(v)")),
    ("operator", ("operator @ operator", "A @ (B @ v)")),
])  # fmt: skip
def test_products_of_operators_with_what_is_no_tensor(other: Any, fragments: tuple[str, ...]) -> None:
    operator = curvfunc.ggn_operator(*problem())
    with refused(TypeError, *fragments):
        operator @ (operator if isinstance(other, str) else other)


@pytest.mark.parametrize("other", [np.zeros(35), torch.zeros(35), [1.0]])
def test_operators_on_the_right(other: Any) -> None:
    with refused(TypeError, type(other).__name__, "@ operator", "symmetric", "operator @ v"):
        other @ curvfunc.ggn_operator(*problem())


@pytest.mark.parametrize(("shape", "remedy"), [((6, 7), "output.transpose(1, 2)"), ((2, 3, 7), "output.movedim(-1, 1)")])
def test_classes_on_the_last_axis(shape: tuple[int, ...], remedy: str) -> None:
    params, X, y = {"w": torch.randn(shape[-1], 5)}, torch.randn(N, *shape[:-1], 5), torch.zeros(N, *shape[:-1]).long()
    model_fn = lambda p, x: F.linear(x, p["w"])
    for spec in (BatchGrad(), DiagGGN(), Loss()):
        with refused(ValueError, "cross_entropy", f"{(N, *shape)}", "last axis", "axis 1", remedy, "output_fn"):
            compute(model_fn, params, X, y, spec)
    compute(lambda p, x: model_fn(p, x).movedim(-1, 1), params, X, y, BatchGrad())


class Diagonal:
    """An operator of one's own."""

    shape, dtype, device = (5, 5), torch.float64, torch.device("cpu")

    def __matmul__(self, v: Tensor) -> Tensor:
        return torch.arange(1.0, 6.0, dtype=torch.float64)[:, None] * v


def test_eigenvalues_of_operators_of_ones_own_and_of_tensors() -> None:
    for operator in (Diagonal(), torch.diag(torch.arange(1.0, 6.0))):
        values, vectors = curvfunc.eigsh(operator, 2)
        torch.testing.assert_close(values, torch.tensor([4.0, 5.0], dtype=operator.dtype))
        assert vectors.shape == (5, 2)
    for estimate in (lambda a: curvfunc.eigsh(a, 2), lambda a: curvfunc.hutchinson_trace(a, 2), curvfunc.spectral_density):
        for wrong in (np.eye(5), [[1.0]], 3.0):
            with refused(TypeError, type(wrong).__name__, "curvfunc.LinearOperator", "torch.as_tensor"):
                estimate(wrong)
        with refused(ValueError, "(5,)", "square"):
            estimate(torch.ones(5))


@pytest.mark.parametrize("spec", [KFAC(), KFLR()])
def test_blocks_of_position_parameters(spec: Any) -> None:
    params, X, y = {"position": torch.randn(64, 64), "w": torch.randn(2, 64)}, torch.randn(2, 64), torch.tensor([0, 1])
    model_fn = lambda p, x: F.linear(torch.tanh(x.unsqueeze(1) + p["position"]).sum(1), p["w"])
    with pytest.warns(UserWarning, match=r"'position' of shape \(64, 64\).*4096 x 4096, of 64 MiB.*freeze it"):
        compute(model_fn, params, X, y, spec)
    compute(model_fn, params | {"position": params["position"][:63]}, X, y, spec)


@pytest.mark.parametrize(("X", "w", "fragments"), [
    (torch.randn(N, 0), torch.randn(C, 5), ("X of shape (4, 0)", "Leave such tensors out")),
    (torch.randn(N, 5), torch.randn(C, 0), ("parameter 'w' of shape (3, 0)", "Leave such tensors out")),
    (torch.randn(N, 5), torch.randn(0, 5), ("output has shape (4, 0)", "no entries")),
])  # fmt: skip
def test_tensors_without_entries(X: Tensor, w: Tensor, fragments: tuple[str, ...]) -> None:
    with refused(ValueError, *fragments):
        curvfunc.batch_grad(lambda p, x: F.linear(x, p["w"]), {"w": w}, X, torch.zeros(N, dtype=torch.long))


# --- names --------------------------------------------------------------------------------------------------------------


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", curvfunc.__version__)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "curvfunc/__init__.py"


def test_quantities_have_a_public_base() -> None:
    assert callable(curvfunc.compute)
    assert issubclass(BatchGrad, curvfunc.Quantity)
    assert "Quantity" in curvfunc.__all__
    documents = Path(__file__).parents[2].joinpath("docs").glob("*.md")
    for name in {name for text in documents for name in re.findall(r"`curvfunc\.([\w.]+)`", text.read_text(encoding="utf-8"))}:
        assert pkgutil.resolve_name(f"curvfunc.{name}") is not None


# --- explain ------------------------------------------------------------------------------------------------------------


def test_reasons_end_with_a_remedy_and_do_not_widen_the_table() -> None:
    params = {"w": torch.randn(5, C), "b": torch.randn(C), "c": torch.randn(C)}
    X = torch.randn(N, 5)
    cases: list[tuple[Callable[..., Tensor], str]] = [
        (lambda p, x: torch.fmax(x @ p["w"], p["b"]) + p["c"], "curvfunc.rule"),
        (lambda p, x: (x @ p["w"]).flip(0).flip(0) * p["b"] + p["c"], "samples on an axis"),
        (lambda p, x: torch.fmax(x @ p["w"], p["b"]) * (1 if x.sum().item() else 2) + p["c"], ".item()"),
    ]
    for model_fn, remedy in cases:
        explanation = curvfunc.explain(model_fn, params, X)
        reasons = {row.why for row in explanation.rows if row.why}
        assert reasons
        assert all("; " in why for why in reasons)
        assert any(remedy in why for why in reasons)
        lines = str(explanation).splitlines()
        assert max(map(len, lines)) <= 120
        words = " ".join(lines).split()
        assert all(word in words for why in reasons for word in why.split())


def test_a_module_in_place_of_a_function_of_parameters() -> None:
    module, X, y = nn.Linear(4, 3), torch.randn(5, 4), torch.arange(5) % 3
    params = dict(module.named_parameters())
    v = {name: torch.randn_like(p) for name, p in params.items()}
    for call in (
        lambda: curvfunc.batch_grad(module, params, X, y),
        lambda: curvfunc.hmp(module, params, X, y)["weight"](v["weight"][None]),
        lambda: curvfunc.ggn_vp(module, params, X, y, v),
        lambda: curvfunc.hessian_operator(module, params, X, y) @ v,
        lambda: curvfunc.explain(module, params, X),
        lambda: curvfunc.check(module, params, X, y),
        lambda: curvfunc.kronecker.structure(module, params, X),
    ):
        with refused(TypeError, "model_fn is the module Linear", "curvfunc.functionalize(module)"):
            call()
