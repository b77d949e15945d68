"""Models that draw random numbers: in one call, each sample has its draws once."""

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc import (
    KFLR,
    KFRA,
    BatchDiagGGN,
    BatchDiagHessian,
    BatchDot,
    BatchGrad,
    BatchL2,
    DiagGGN,
    DiagHessian,
    Grad,
    Loss,
    Output,
    SqrtGGN,
    SumGradSquared,
    Variance,
    compute,
    functionalize,
)

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

N, C = 5, 3
INDEX = [3, 0, 3, 4]
SPECS = {
    "batch_grad": BatchGrad(),
    "batch_l2": BatchL2(),
    "sum_grad_squared": SumGradSquared(),
    "variance": Variance(),
    "batch_dot": BatchDot(),
    "diag_ggn": DiagGGN(),
    "batch_diag_ggn": BatchDiagGGN(),
    "sqrt_ggn": SqrtGGN(),
    "kflr": KFLR(),
    "kflr, reduce": KFLR(kfac_approx="reduce"),
    "diag_hessian": DiagHessian(),
    "batch_diag_hessian": BatchDiagHessian(),
}


class Masked:
    """A network with a mask for each sample that ``draw`` makes, and that can be set to what it was."""

    def __init__(self, draw: Callable[[int], Tensor], rules: bool = True) -> None:
        self.draw, self.rules = draw, rules
        self.params = {"w": torch.randn(C, 4), "b": torch.randn(C), "v": torch.randn(C, C), "unused": torch.randn(2)}

    def __call__(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        return self.given(p, x, self.draw(len(x)))

    def given(self, p: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        h = F.linear(x, p["w"], p["b"]) * mask
        h = torch.tanh(h)
        return F.linear(h, p["v"]) if self.rules else h @ torch.sinc(p["v"]).flip(0)


def numbers(n: int) -> Tensor:
    return torch.rand(n, C)


OWN = torch.Generator()
DRAWS: dict[str, Callable[[int], Tensor]] = {
    "torch": numbers,
    "dropout": lambda n: F.dropout(torch.ones(n, C)),
    "in place": lambda n: torch.empty(n, C).uniform_(),
    "own generator": lambda n: torch.rand(n, C, generator=OWN),
    "python": lambda n: torch.tensor([[random.random() for _ in range(C)] for _ in range(n)]),
    "numpy": lambda n: torch.from_numpy(np.random.rand(n, C)),
}


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 4), torch.arange(N) % C


def with_masks(model: Masked) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The model, with the masks that it drew for the whole batch."""
    seen: list[Tensor] = []

    def model_fn(p: Any, x: Tensor) -> Tensor:
        mask = model.draw(len(x))
        copied = type(p["w"].grad_fn).__name__ == "CloneBackward0"
        if torch.is_grad_enabled() and not copied:  # else it is looked for seeds, or for data of other samples
            seen.append(mask)
        return model.given(p, x, mask)

    return model_fn, seen


def expected(model: Masked, mask: Tensor, X: Tensor, y: Tensor, specs: Any, index: Any, **kwargs: Any) -> Any:
    """Of the same network with that mask as a part of its input."""
    fixed = lambda p, x: model.given(p, x[0], x[1])
    return compute(fixed, model.params, (X, mask), y, specs, subsampling=index, **kwargs)


@pytest.mark.parametrize("index", [INDEX, [1], torch.tensor([4, 2])])
@pytest.mark.parametrize("spec", SPECS)
def test_whole_batch_and_subset(spec: str, index: Any) -> None:
    model, (X, y) = Masked(numbers), data()
    model_fn, seen = with_masks(model)
    specs = [Loss(), Output(), Grad(), SPECS[spec], SPECS[spec]]
    got = compute(model_fn, model.params, X, y, specs, subsampling=index)
    assert_close(got, expected(model, seen[-1], X, y, specs, index))


@pytest.mark.parametrize("draw", DRAWS)
def test_each_source_of_chance(draw: str) -> None:
    model, (X, y) = Masked(DRAWS[draw]), data()
    model_fn, seen = with_masks(model)
    specs = [Grad(), BatchGrad(), Variance()]
    got = compute(model_fn, model.params, X, y, specs, subsampling=INDEX)
    assert_close(got, expected(model, seen[-1], X, y, specs, INDEX))
    each = compute(model_fn, model.params, X, y, specs, subsampling=range(N))
    assert_close(optree.tree_map(lambda g: g.sum(0), each[1]), each[0])


def test_all_at_once_in_chunks_and_in_memory() -> None:
    model, (X, y) = Masked(numbers), data()
    model_fn, seen = with_masks(model)
    specs = [*SPECS.values(), Loss(), Output(), Grad()]
    got = compute(model_fn, model.params, X, y, specs, subsampling=INDEX, chunk_size=2)
    assert_close(got, expected(model, seen[-1], X, y, specs, INDEX))
    memory = optree.tree_map(lambda t: torch.full_like(t, torch.nan), got)
    again = compute(model_fn, model.params, X, y, specs, subsampling=INDEX, out=memory)
    assert_close(again, expected(model, seen[-1], X, y, specs, INDEX))
    assert all(a is b for a, b in zip(optree.tree_leaves(again), optree.tree_leaves(memory), strict=True))


def test_large_results_inside_of_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvfunc.engine.passes, "STREAMED_BYTES", {"cpu": 1, "cuda": 1})
    model, (X, y) = Masked(numbers), data()
    model_fn, seen = with_masks(model)
    specs = [Grad(), BatchGrad(), Variance(), BatchL2()]
    got = compute(model_fn, model.params, X, y, specs, subsampling=INDEX)
    assert_close(got, expected(model, seen[-1], X, y, specs, INDEX))


@pytest.mark.parametrize("spec", SPECS)
def test_repeated_indices_alone(spec: str) -> None:
    """A subset with a sample twice is the sum, or the list, of what each of its samples gives with its one mask."""
    model, (X, y) = Masked(numbers), data()
    model_fn, seen = with_masks(model)
    got = compute(model_fn, model.params, X, y, SPECS[spec], subsampling=INDEX)
    mask = torch.zeros(N, C)
    mask[sorted(set(INDEX))] = seen[-1]
    assert_close(got, expected(model, mask, X, y, SPECS[spec], INDEX))


@pytest.mark.parametrize("spec", SPECS)
def test_models_without_rules(spec: str) -> None:
    """Under vmap, where the forward pass runs several times, and the masks of the last one cannot be seen."""
    model, (X, y) = Masked(numbers, rules=False), data()
    specs = [Grad(), BatchGrad(), SPECS[spec], SPECS[spec]]
    grad, each, got, _ = compute(model, model.params, X, y, specs, subsampling=[*range(N), 3])
    assert_close(optree.tree_map(lambda g: g[:N].sum(0), each), grad)
    if spec == "sum_grad_squared":
        assert_close(got, optree.tree_map(lambda g: g.square().sum(0), each))
    if spec == "variance":
        assert_close(got, optree.tree_map(lambda g: g.square().sum(0) / (N + 1) - (g.sum(0) / (N + 1)).square(), each))
    if spec == "batch_l2":
        assert_close(got, optree.tree_map(lambda g: g.flatten(1).square().sum(1), each))


def test_differentiable_calls() -> None:
    model, (X, y) = Masked(numbers), data()
    model_fn, seen = with_masks(model)
    model.params = {k: p.requires_grad_() for k, p in model.params.items()}
    specs = [Grad(), BatchGrad(), Variance(), BatchDiagGGN()]
    total = lambda results: sum(t.square().sum() for t in optree.tree_leaves(results))
    leaves = [p for k, p in model.params.items() if k != "unused"]
    got = torch.autograd.grad(total(compute(model_fn, model.params, X, y, specs, subsampling=INDEX)), leaves)
    want = torch.autograd.grad(total(expected(model, seen[-1], X, y, specs, INDEX)), leaves)
    assert_close(got, want)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_transformations(randomness: str) -> None:
    model, (X, y) = Masked(numbers), data()
    stacked = {k: torch.randn(2, *p.shape) for k, p in model.params.items()}
    call = lambda p: compute(model, p, X, y, [Grad(), BatchGrad(), Variance()], subsampling=range(N))
    grad, each, variance = torch.vmap(call, randomness=randomness)(stacked)
    assert_close(optree.tree_map(lambda g: g.sum(1), each), grad)
    assert_close(optree.tree_map(lambda g: g.var(1, correction=0), each), variance)
    _, (grad, each, variance) = torch.func.vjp(lambda p: (p["w"].sum(), call(p)), model.params, has_aux=True)[::2]
    assert_close(optree.tree_map(lambda g: g.sum(0), each), grad)


def test_compiled() -> None:
    """Dropout that is only traced."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, C))
    model_fn, params = functionalize(module)
    X, y = data()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(params: Any, index: Tensor) -> Any:
        return compute(model_fn, params, X, y, [Grad(), BatchGrad(), Variance()], subsampling=index)

    grad, each, variance = step(params, torch.arange(N))
    assert_close(optree.tree_map(lambda g: g.sum(0), each), grad)
    assert_close(optree.tree_map(lambda g: g.var(0, correction=0), each), variance)
    _, each, _ = step(params, torch.tensor([2, 1, 2]))
    assert_close(optree.tree_map(lambda g: g[0], each), optree.tree_map(lambda g: g[2], each))


def test_draws_are_those_of_the_model_alone() -> None:
    """After a seed, the output is what the model gives after it; also for the pass that had to be repeated."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, C))
    model_fn, params = functionalize(module)
    X, y = data()
    torch.manual_seed(3)
    want = model_fn(params, X)
    torch.manual_seed(3)
    out, _ = compute(model_fn, params, X, y, (Output(), BatchGrad()), subsampling=[1, 2])
    assert torch.equal(out, want)


@pytest.mark.parametrize(("specs", "passes"), [
    ([Grad(), BatchGrad()], [N, 2]),
    ([BatchGrad()], [2]),
    ([Grad(), Loss()], [N]),
])  # fmt: skip
def test_models_without_chance_run_on_the_subset(specs: Any, passes: list[int]) -> None:
    calls: list[int] = []

    def model_fn(p: Any, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # a model that looks at the size of its batch has one sample run again
            calls.append(len(x))
        return x @ p["w"]

    X, y = data()
    compute(model_fn, {"w": torch.randn(4, C)}, X, y, specs, subsampling=[1, 3])
    assert calls == passes


def unwrapped(t: Tensor) -> Tensor:
    return torch._C._functorch.get_unwrapped(t)


def test_the_diagonal_of_the_hessian_with_other_quantities() -> None:
    """A parameter that is used twice has a forward pass with copies for each sample; what else is asked for is of that one."""
    seen: list[Tensor] = []

    def fixed(p: Any, x: tuple[Tensor, Tensor]) -> Tensor:
        h = torch.tanh(x[0] @ p["w"]) * x[1]
        return torch.tanh(h @ p["w"]) @ p["w"]

    def model_fn(p: Any, x: Tensor) -> Tensor:
        seen.append(torch.rand(len(x), 4))
        return fixed(p, (x, seen[-1]))

    X, y, params = torch.randn(N, 4), torch.arange(N) % C, {"w": torch.randn(4, 4)}
    specs = [DiagHessian(), Loss(), Output(), BatchGrad(), DiagGGN()]
    got = compute(model_fn, params, X, y, specs)
    batched = [t for t in seen if torch._C._functorch.is_functorch_wrapped_tensor(t)]  # with a batch of one for each sample
    drawn = next(t for t in map(unwrapped, batched) if t.unique().numel() > 1).squeeze(1)  # comparisons draw constants
    assert_close(got, compute(fixed, params, (X, drawn), y, specs))
    with pytest.raises(NotImplementedError, match=r"random numbers.*another call"):
        compute(model_fn, params, X, y, [DiagHessian(), KFLR()])


def test_averaged_factors_are_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, C))
    model_fn, params = functionalize(module)
    X, y = data()
    with pytest.raises(NotImplementedError, match=r"random numbers.*call of its own.*module\.eval\(\)"):
        compute(model_fn, params, X, y, (Grad(), KFRA()), subsampling=[1, 2])
    compute(model_fn, params, X, y, KFRA(), subsampling=[1, 2])


@pytest.mark.parametrize("name", ["hessian_vp", "ggn_vp", "jvp", "operator"])
def test_products_with_repeated_indices(name: str) -> None:
    model, (X, y) = Masked(numbers), data()
    model_fn, seen = with_masks(model)
    v = {k: torch.randn_like(p) for k, p in model.params.items()}

    def product(f: Any, X: Any) -> Any:
        if name == "jvp":
            return curvfunc.jvp(f, model.params, X, v, subsampling=INDEX)
        if name == "operator":
            return curvfunc.hessian_operator(f, model.params, X, y, subsampling=INDEX) @ v
        return getattr(curvfunc, name)(f, model.params, X, y, v, subsampling=INDEX)

    got = product(model_fn, X)
    mask = torch.zeros(N, C)
    mask[sorted(set(INDEX))] = seen[-1]
    assert_close(got, product(lambda p, x: model.given(p, x[0], x[1]), (X, mask)))


PATHS = {  # the way that a model of two samples' axes takes
    "plain": lambda p, x: torch.tanh(x @ p["w"]) @ p["v"],
    "vmap": lambda p, x: (torch.tanh(x[:, None].flatten(0, 1) @ p["w"]).view(len(x), 4) @ p["v"]).roll(0, 0),
    "loop": lambda p, x: torch.stack([float(t.sum() > 0) * torch.tanh(t @ p["w"]) for t in x]) @ p["v"],
}


@pytest.mark.parametrize("spec", [*SPECS.values(), KFRA()], ids=str)
@pytest.mark.parametrize("index", [None, INDEX])
@pytest.mark.parametrize("path", PATHS)
def test_python_and_numpy_draw_on_where_they_were(path: str, index: Any, spec: Any) -> None:
    X, y = torch.randn(N, 3), torch.arange(N) % C
    params = {"w": torch.randn(3, 4), "v": torch.randn(4, C)}
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    want = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with contextlib.suppress(NotImplementedError, ValueError):
        compute(PATHS[path], params, X, y, spec, subsampling=index)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == want[:2]
    assert torch.equal(torch.get_rng_state(), want[2])
