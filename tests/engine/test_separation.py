"""A sample's gradient is that of its own term of the loss, everything else held as it is; on all paths, or a refusal.

The judge is one ordinary backward pass per sample, of its own term, through a forward pass of the whole batch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import curvfunc
from curvfunc import BatchGrad, DiagGGN, Grad, Output

pytestmark = pytest.mark.usefixtures("float64")

N, D = 4, 3
Model = Callable[[Any, Tensor], Tensor]


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, D), torch.tensor([0, 1, 2, 0])


def weights() -> dict[str, Tensor]:
    return {"w": torch.randn(D, D), "v": torch.randn(D, D), "b": torch.randn(D), "a": torch.zeros(D)}


def one_by_one(model: Model, params: dict[str, Tensor], X: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The definition, by plain autograd."""
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    out, found = model(leaves, X), []
    for n in range(len(out)):
        term = F.cross_entropy(out[n : n + 1], y[n : n + 1]) / len(out)
        found.append(torch.autograd.grad(term, list(leaves.values()), retain_graph=True, materialize_grads=True))
    return {k: torch.stack(gs) for k, gs in zip(leaves, zip(*found, strict=True), strict=True)}


class CenterByFunction(torch.autograd.Function):
    """Mixes samples, in a way that runs under no mode and no transformation."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h - h.mean(0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g - g.mean(0)


def overwrite(p: Any, x: Tensor) -> Tensor:
    h = x @ p["w"]
    h[0] = h[1]
    return h


def overwrite_view(p: Any, x: Tensor) -> Tensor:
    h = x @ p["w"]
    h[0].copy_(h[1])
    return h


MIXING: dict[str, Model] = {
    "mean": lambda p, x: (lambda h: h - h.mean(0))(x @ p["w"]),
    "function": lambda p, x: CenterByFunction.apply(x @ p["w"]) @ p["v"],
    "cumsum": lambda p, x: (x @ p["w"]).cumsum(0),
    "roll": lambda p, x: (x @ p["w"]).roll(1, 0) + x,
    "flip": lambda p, x: (x @ p["w"]).flip(0),
    "softmax": lambda p, x: (x @ p["w"]).softmax(0),
    "gram": lambda p, x: (lambda h: (h @ h.T) @ x)(x @ p["w"]),
    "not yet": lambda p, x: (lambda h: h + p["a"] * h.mean(0))(x @ p["w"]),
    "overwritten": overwrite,
    "overwritten view": overwrite_view,
    "by hand": lambda p, x: (lambda h: (h - h.mean(0)) / h.norm(dim=0) * p["b"])(x @ p["w"]),
    "after dropout": lambda p, x: (lambda h: h - h.mean(0))(F.dropout(x @ p["w"])),
    "shuffled": lambda p, x: (x @ p["w"])[torch.randperm(len(x))],
    "one for all": lambda p, x: (x @ p["w"])[torch.randint(len(x), (len(x),))],
}


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("quantity", ["batch_grad", "batch_l2", "diag_ggn", "kfac", "diag_hessian"])
def test_mixing_is_refused(name: str, quantity: str) -> None:
    (X, y), params = batch(), weights()
    for model in (MIXING[name], lambda p, x: torch.maximum(MIXING[name](p, x), p["b"])):  # one without a rule, too
        with pytest.raises(ValueError, match="mixes the samples"):
            getattr(curvfunc, quantity)(model, params, X, y)


@pytest.mark.parametrize("name", sorted(MIXING.keys() - {"function"}))  # which torch.func refuses itself
def test_mixing_is_refused_under_transformations(name: str) -> None:
    (X, y), params = batch(), weights()
    norms = lambda p: sum(t.sum() for t in curvfunc.batch_l2(MIXING[name], p, X, y).values())
    with pytest.raises(ValueError, match="mixes the samples"):
        torch.func.grad(norms)(params)
    with pytest.raises(ValueError, match="mixes the samples"):
        torch.func.jvp(norms, (params,), (params,))
    several = {k: torch.stack([p, p + 0.1]) for k, p in params.items()}
    with pytest.raises(ValueError, match="mixes the samples"):
        torch.vmap(norms, randomness="different")(several)


@pytest.mark.parametrize("name", ["mean", "not yet", "after dropout", "roll"])
def test_mixing_is_refused_when_compiled_code_runs(name: str) -> None:
    (X, y), params = batch(), weights()
    compiled = torch.compile(
        lambda p, x: curvfunc.batch_grad(MIXING[name], p, x, y), backend="aot_eager", fullgraph=True, dynamic=False
    )
    with pytest.raises(RuntimeError, match="mixes the samples"):
        compiled(params, X)


SEPARATE: dict[str, Model] = {
    "generic": lambda p, x: torch.maximum(x @ p["w"], p["b"]),
    "dropout": lambda p, x: torch.maximum(F.dropout(x @ p["w"]), p["b"]),
    "noise": lambda p, x: torch.maximum(x @ p["w"] + torch.randn(D), p["b"]),
    "numpy": lambda p, x: torch.maximum(x @ p["w"] * np.random.rand(), p["b"]),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_chance_is_not_taken_for_mixing(name: str) -> None:
    (X, y), params = batch(), weights()
    found = curvfunc.batch_grad(SEPARATE[name], params, X, y)
    assert all(t.isfinite().all() for t in found.values())
    torch.func.grad(lambda p: sum(t.sum() for t in curvfunc.batch_l2(SEPARATE[name], p, X, y).values()))(params)
    if name in ("generic", "dropout"):
        compiled = torch.compile(lambda p: curvfunc.batch_grad(SEPARATE[name], p, X, y), backend="aot_eager", fullgraph=True)
        assert found["w"].shape == compiled(params)["w"].shape


def centered_unseen(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return x - x.mean(0)


AS_DATA: dict[str, Model] = {
    "unseen": lambda p, x: centered_unseen(x) @ p["w"],
    "unseen factor": lambda p, x: (x @ p["w"]) * centered_unseen(x),
    "data": lambda p, x: (x - x.mean(0)) @ p["w"],
    "detached": lambda p, x: (lambda h: h - h.mean(0).detach())(x @ p["w"]),
    "python": lambda p, x: (x - float(x.mean())) @ p["w"],
    "count": lambda p, x: x @ p["w"] / len(x),
    "largest": lambda p, x: x @ p["w"] * x.max(),
    "place": lambda p, x: x @ p["w"] + torch.arange(len(x))[:, None],
}


@pytest.mark.parametrize("name", AS_DATA)
def test_other_samples_as_data(name: str) -> None:
    """What is not differentiated may come from all samples; then no subset can run without the others."""
    (X, y), params, model = batch(), weights(), AS_DATA[name]
    want = one_by_one(model, params, X, y)
    assert_close(curvfunc.batch_grad(model, params, X, y), want)
    several = {k: p[None] for k, p in params.items()}
    assert_close(
        torch.vmap(lambda p: curvfunc.batch_grad(model, p, X, y))(several) if name != "python" else want,
        {k: t[None] for k, t in want.items()} if name != "python" else want,
    )
    dense = curvfunc.ggn_operator(model, params, X, y).dense()
    for subset in ([0], [1, 1], [3, 0], [1, 0, 3, 2]):
        chosen = {k: t[subset] for k, t in want.items()}
        assert_close(curvfunc.batch_grad(model, params, X, y, subsampling=subset), chosen)
        assert_close(
            curvfunc.sum_grad_squared(model, params, X, y, subsampling=subset), {k: (t**2).sum(0) for k, t in chosen.items()}
        )
        if sorted(subset) == [*range(N)]:
            assert_close(curvfunc.ggn_operator(model, params, X, y, subsampling=subset).dense(), dense)
    v = {k: torch.randn_like(p) for k, p in params.items()}
    each = [curvfunc.hessian_vp(model, params, X, y, v, subsampling=[n]) for n in range(N)]
    summed = {k: sum(h[k] for h in each) for k in params}
    assert_close(summed, curvfunc.hessian_vp(model, params, X, y, v))


@pytest.mark.parametrize("subset", [[0], [1], [1, 0, 0], [0, 1]])
def test_an_order_that_the_batch_decides(subset: list[int]) -> None:
    """A subset that is in order already looks as if the model left the order alone."""
    X, params = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -2.0]]), {"w": torch.eye(3)}
    model = lambda p, x: (lambda h: h[h.detach().sum(1).argsort()])(x @ p["w"])
    with pytest.raises(ValueError, match="mixes the samples"):
        curvfunc.batch_grad(model, params, X, torch.tensor([0, 1]), subsampling=subset)


def test_constants_of_the_model_are_no_doubt() -> None:
    """A subset runs without the whole batch beside it, wherever the model has its constants from."""
    (X, y), params, rows = batch(), weights(), torch.randn(D)
    module = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, D)).eval()
    module[0].requires_grad_(False)
    held: Any = {"list": [rows, {"inner": rows + 1}]}
    models: list[Any] = [
        (lambda p, x: x @ p["w"] * rows + held["list"][1]["inner"], params),
        (partial(lambda p, x, *, c: x @ p["w"] * c, c=rows), params),
        curvfunc.functionalize(module),
    ]
    sizes: list[int] = []
    for model, values in models:

        def counting(p: Any, x: Tensor, model: Any = model) -> Tensor:
            with torch._C.DisableTorchFunction():  # who asks for it is compared
                sizes.append(len(x))
            out: Tensor = model(p, x)
            return out

        curvfunc.batch_grad(counting, values, X, y, subsampling=[2, 1])
    assert set(sizes) == {2}


AT_ZERO: dict[str, Model] = {
    "data": lambda p, x: x @ p["w"] + p["c"] * x.flip(0),
    "hidden": lambda p, x: (lambda h: h + p["c"] * h.flip(0))(x @ p["w"]),
    "count": lambda p, x: x @ p["w"] + p["c"] * len(x),
    "place": lambda p, x: x @ p["w"] + p["c"] * torch.arange(len(x))[:, None],
    "square of data": lambda p, x: x @ p["w"] + p["c"] ** 2 * x.flip(0),
    "square of hidden": lambda p, x: (lambda h: h + p["c"] ** 2 * h.flip(0))(x @ p["w"]),
    "square of count": lambda p, x: x @ p["w"] + p["c"] ** 2 * len(x),
}


@pytest.mark.parametrize("subset", [None, [1], [1, 0, 0], [3, 2, 1, 0]], ids=str)
@pytest.mark.parametrize("name", AT_ZERO)
def test_coefficients_that_are_zero_as_yet(name: str, subset: list[int] | None) -> None:
    """What others do to a sample's output shows in derivatives alone, of first or second order: right, or refused."""
    (X, y), params, model = batch(), {"w": torch.randn(D, D), "c": torch.zeros(())}, AT_ZERO[name]
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    out = model(leaves, X)
    total = sum(F.cross_entropy(out[n : n + 1], y[n : n + 1]) / N for n in subset or range(N))
    flat = torch.cat([g.flatten() for g in torch.autograd.grad(total, [*leaves.values()], create_graph=True)])
    rows = [torch.autograd.grad(g, [*leaves.values()], retain_graph=True, materialize_grads=True) for g in flat]
    H = torch.stack([torch.cat([t.flatten() for t in row]) for row in rows])
    v = {k: torch.randn_like(p) for k, p in params.items()}
    wanted = {
        "batch_grad": flat.detach(),
        "hessian_vp": H @ torch.cat([t.flatten() for t in v.values()]),
        "diag_hessian": H.diagonal(),
    }
    refused = []
    for quantity, want in wanted.items():
        given = (v,) if quantity == "hessian_vp" else ()
        try:
            found = getattr(curvfunc, quantity)(model, params, X, y, *given, subsampling=subset)
        except ValueError as error:
            refused.append(str(error))
            continue
        if quantity == "batch_grad":
            found = {k: t.sum(0) for k, t in found.items()}
        assert_close(torch.cat([t.flatten() for t in found.values()]), want)
    assert all("mixes the samples" in message for message in refused)
    assert len(refused) < 3  # the product is always that of the batch


class OnlyTheBatch(torch.autograd.Function):
    """As kernels of torch's do, it runs forwards under vmap, and not backwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        if torch._C._functorch.is_functorch_wrapped_tensor(g):
            raise RuntimeError("grad_weight must be contiguous")
        x, w = ctx.saved_tensors
        return g @ w.T, x.flatten(0, -2).T @ g.flatten(0, -2)


def test_a_kernel_that_vmap_cannot_run_backwards() -> None:
    (X, y), params = batch(), {"w": torch.randn(D, D)}
    model = lambda p, x: OnlyTheBatch.apply(x, p["w"]).tanh()
    assert_close(curvfunc.batch_grad(model, params, X, y), one_by_one(model, params, X, y))
    assert "loop" in str(curvfunc.explain(model, params, X))


def test_a_constant_row_for_each_sample() -> None:
    (X, y), params, rows = batch(), weights(), torch.randn(N, D)
    model = lambda p, x: x @ p["w"] + rows
    want = one_by_one(model, params, X, y)
    assert_close(curvfunc.batch_grad(model, params, X, y), want)
    found = curvfunc.batch_grad(model, params, X, y, subsampling=[1, 0, 3, 2])
    assert_close(found, {k: t[[1, 0, 3, 2]] for k, t in want.items()})
    compiled = torch.compile(lambda p: curvfunc.batch_grad(model, p, X, y, subsampling=[1, 0, 3, 2]), backend="aot_eager")
    with pytest.raises(RuntimeError, match="depends on which others"):
        compiled(params)
    with pytest.raises(NotImplementedError, match="lets the data of samples meet"):
        curvfunc.kfra(model, params, X, y, subsampling=[1, 0, 3, 2])


def test_a_seed_in_the_forward_pass() -> None:
    """Draws that are the same each time belong to the place in the batch."""

    def model(p: Any, x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return F.dropout(x @ p["w"])

    (X, y), params = batch(), {"w": torch.randn(D, D)}
    want = one_by_one(model, params, X, y)
    assert_close(curvfunc.batch_grad(model, params, X, y), want)
    assert_close(curvfunc.batch_grad(model, params, X, y, subsampling=[2, 0]), {"w": want["w"][[2, 0]]})


# -- what the mode cannot see


class Scale(torch.autograd.Function):
    """X w, known to autograd alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


def without_torch_functions(x: Tensor, w: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return x @ w


def added_to_view(p: Any, h: Tensor) -> Tensor:
    h[:, :2].add_(p["b"][:2])
    return h


IN_PLACE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "add_": lambda p, h: h.add_(p["b"]),
    "iadd": lambda p, h: h.__iadd__(p["b"]),
    "sub_": lambda p, h: h.sub_(p["b"]),
    "view": added_to_view,
    "twice": lambda p, h: h.add_(p["b"]).add_(p["a"]),
    "not in place": lambda p, h: h + p["b"],
}


@pytest.mark.parametrize("hide", [Scale.apply, without_torch_functions], ids=["function", "disabled"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_hidden_use_before_an_operation_in_place(hide: Any, name: str) -> None:
    (X, y), params = batch(), weights()
    model = lambda p, x: IN_PLACE[name](p, hide(x, p["w"])).tanh() @ p["v"]
    assert_close(curvfunc.batch_grad(model, params, X, y), one_by_one(model, params, X, y))
    for _, path, rule, _ in curvfunc.explain(model, params, X).rows:
        assert path != "plain" or rule != "unused"


def then_relu(p: Any, x: Tensor) -> Tensor:
    h = x @ p["w"]
    h += p["b"]
    return F.relu_(h) @ p["v"]


def two_biases(p: Any, x: Tensor) -> Tensor:
    h = x @ p["w"]
    h += p["b"]
    h += p["a"]
    return h


def kept_sum(p: Any, x: Tensor) -> Tensor:
    h = x @ p["w"]
    g = h + p["b"]
    h += 1
    return g


@pytest.mark.parametrize("model", [then_relu, two_biases, kept_sum])
def test_inputs_that_no_form_reads_may_change(model: Model) -> None:
    (X, y), params = batch(), weights()
    assert_close(curvfunc.batch_grad(model, params, X, y), one_by_one(model, params, X, y))
    assert {row.path for row in curvfunc.explain(model, params, X).rows} == {"plain"}


def test_inputs_that_a_form_reads_may_not() -> None:
    (X, y), params = batch(), weights()

    def model(p: Any, x: Tensor) -> Tensor:
        h = x @ p["w"]
        out = h * p["b"]
        h.detach().add_(1)
        return out

    with pytest.raises(RuntimeError, match="changed in place after the call|modified by an inplace"):
        curvfunc.batch_grad(model, params, X, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        one_by_one(model, params, X, y)


# -- what a forward pass changes


def test_parameter_changed_in_place() -> None:
    """A table with max_norm rewrites its rows, and clipping its weight: gradients are those at the new values."""
    tokens, y = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 1]]), torch.tensor([0, 1, 2, 0])
    module = nn.Sequential(nn.Embedding(5, D, max_norm=0.5), nn.Flatten(), nn.Linear(2 * D, D))

    def clipped(p: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            p["w"].clamp_(-0.5, 0.5)
        return (x @ p["w"]).tanh()

    for model, params, X in (
        (*curvfunc.functionalize(module), tokens),
        (clipped, {"w": torch.randn(D, D)}, torch.randn(N, D)),
    ):
        params = {k: p.clone() for k, p in params.items()}
        before = {k: p.clone() for k, p in params.items()}
        for quantity in ("batch_grad", "sqrt_ggn", "diag_ggn"):
            found = getattr(curvfunc, quantity)(model, params, X, y)
            assert_close(params, before)  # the caller's stay as they were
            if quantity == "batch_grad":
                assert_close(found, one_by_one(model, params, X, y))
        assert "in place" in str(curvfunc.explain(model, before, X))


class Counts(nn.Module):
    """Keeps a running sum and a counter, and goes without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.floor = nn.Linear(D, D), nn.Parameter(torch.zeros(D))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(D))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        self.last = self.last + 1
        self.calls += 1
        return torch.maximum(self.linear(x), self.floor) * self.seen * self.calls


def test_effects_happen_once() -> None:
    (X, y), module = batch(), Counts()
    model_fn, params = curvfunc.functionalize(module)
    for calls in (1, 2):
        curvfunc.batch_grad(model_fn, params, X, y)
        assert (module.seen.item(), module.last.tolist(), module.calls) == (calls, [calls] * D, calls)
    assert not [key for t in (module.seen, *module.parameters()) for key in vars(t)]  # nothing of ours stays


class Draws(nn.Module):
    """Writes by keyword, and draws, inside of a function of torch.nn.init."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.register_buffer("noise", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        nn.init.uniform_(tensor=self.noise)
        return self.linear(x + self.noise)


def test_initialization_in_the_forward_pass() -> None:
    (X, y), module = batch(), Draws()
    model_fn, params = curvfunc.functionalize(module)
    torch.manual_seed(1)
    found = curvfunc.batch_grad(model_fn, params, X, y)
    noise = module.noise.clone()
    torch.manual_seed(1)
    want = one_by_one(lambda p, x: torch.func.functional_call(module, p, (x,)), params, X, y)
    assert_close(found, want)
    assert torch.equal(noise, module.noise)


def test_statistics_are_updated_as_by_the_module() -> None:
    (X, y), module = batch(), nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)).train()
    model_fn, params = curvfunc.functionalize(module)
    curvfunc.compute(model_fn, params, X, y, Grad())
    twin = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)).train()
    twin[0].load_state_dict(module[0].state_dict())
    twin(X)
    assert_close([*module[1].buffers()][:2], [*twin[1].buffers()][:2])


class Caches(nn.Module):
    """Keeps what it made of its parameter, in eval mode."""

    def __init__(self, rule: bool) -> None:
        super().__init__()
        self.bias, self.linear, self.rule = nn.Parameter(torch.randn(5)), nn.Linear(D, D), rule
        self.floor, self.cache = nn.Parameter(torch.zeros(D)), dict[str, Tensor]()
        self.kept: Tensor | None = None
        self.register_buffer("index", torch.tensor([0, 4, 2]))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.linear(x) + self.bias[self.index]
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias[self.index]
        if self.kept is None:
            self.kept = self.cache["bias"] * 2
        h = self.linear(x) + self.cache["bias"] + self.kept
        return h if self.rule else torch.maximum(h, self.floor)


@pytest.mark.parametrize("rule", [True, False])
def test_caches_of_a_module(rule: bool) -> None:
    (X, y), module = batch(), Caches(rule).eval()
    model_fn, params = curvfunc.functionalize(module)
    for _ in range(3):
        params = {k: p + torch.randn_like(p) for k, p in params.items()}
        found = curvfunc.batch_grad(model_fn, params, X, y)
        curvfunc.hessian_vp(model_fn, params, X, y, params)
        curvfunc.compute(model_fn, params, X, y, Grad())
        assert not module.cache
        assert module.kept is None
        want = one_by_one(model_fn, params, X, y)
        module.cache.clear()
        module.kept = None
        assert_close(found, want)
    module(X)  # the user's own call keeps the module's own
    for call in (curvfunc.batch_grad, lambda *args: curvfunc.hessian_vp(*args, params)):
        with pytest.raises(ValueError, match="in attribute '(cache|kept)' of the module .Caches.*earlier call"):
            call(model_fn, params, X, y)
    module.cache.clear()
    module.kept = None
    with torch.no_grad():
        module(X)
    with pytest.raises(ValueError, match=r"kept in attribute 'cache' of Caches"):
        curvfunc.batch_grad(model_fn, params, X, y)


def test_caches_of_a_function() -> None:
    (X, y), params, cache = batch(), weights(), {}
    model = lambda p, x: x @ p["w"] + cache.setdefault("b", p["b"] * 2)
    curvfunc.batch_grad(model, params, X, y)
    with pytest.raises(ValueError, match="made from parameters in an earlier call"):
        curvfunc.batch_grad(model, params, X, y)
    cache.clear()
    hidden = lambda p, x: torch.maximum(x @ p["w"] + cache.setdefault("a", p["a"] * 2), p["b"])
    with pytest.raises(ValueError, match="made from parameters in an earlier call"):
        curvfunc.batch_grad(hidden, params, X, y)  # its second forward pass meets what the first left


class KeepsAConstant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.kept = nn.Linear(D, D), None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.linspace(0, 1, D)
        return self.linear(x + self.kept).detach()


@pytest.mark.parametrize("hidden", [True, False])
def test_unused_parameters_beside_a_kept_constant(hidden: bool) -> None:
    """What a module keeps need not be why parameters are unused."""
    (X, y), module = batch(), nn.Sequential(KeepsAConstant(), nn.Softplus() if hidden else nn.Identity(), nn.Linear(D, D))
    inner, params = curvfunc.functionalize(module)
    model_fn = (lambda p, x: torch.maximum(inner(p, x), p["2.bias"] - 9)) if hidden else inner
    want = one_by_one(model_fn, params, X, y)
    for _ in range(2):
        assert_close(curvfunc.batch_grad(model_fn, params, X, y), want)


def test_a_parameter_that_cannot_be_replaced() -> None:
    """A list that refers to a parameter under no name."""

    class Refers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)
            self.tied = [self.linear.weight]

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) @ self.tied[0]

    (X, y), (model_fn, params) = batch(), curvfunc.functionalize(Refers())
    with pytest.raises(ValueError, match="attribute 'tied'"):
        curvfunc.batch_grad(model_fn, params, X, y)


# -- nothing is used


def under_no_grad(p: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return x @ p["w"]


UNUSED: dict[str, Model] = {
    "no_grad": under_no_grad,
    "detach": lambda p, x: (x @ p["w"]).detach(),
    "generic": lambda p, x: torch.maximum(x @ p["w"], p["w"][0]).detach(),
    "constant": lambda p, x: x,
}


@pytest.mark.parametrize("name", UNUSED)
def test_all_parameters_unused(name: str) -> None:
    (X, y), params, model = batch(), {"w": torch.randn(D, D)}, UNUSED[name]
    for specs in (BatchGrad(), Grad(), DiagGGN(), (Grad(), curvfunc.Variance()), curvfunc.DiagHessian(), curvfunc.KFRA()):
        with pytest.raises(ValueError, match="has no graph, so nothing depends on the parameters"):
            curvfunc.compute(model, params, X, y, specs)
    for product in (curvfunc.hessian_vp, curvfunc.ggn_vp):
        with pytest.raises(ValueError, match="has no graph"):
            product(model, params, X, y, params)
    assert_close(curvfunc.compute(model, params, X, y, Output()), model(params, X))
    module = nn.Linear(D, D)
    for specs in (BatchGrad(), Grad()):
        with pytest.raises(ValueError, match="depends on none of the parameters"):
            curvfunc.compute(lambda p, x: module(x), params, X, y, specs)


# -- checkpoints


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("path", ["plain", "vmap", "loop"])
def test_checkpoints_on_all_paths(reentrant: bool, path: str) -> None:
    (X, y), params = batch(), weights()
    ends: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "plain": lambda p, h: h,
        "vmap": lambda p, h: torch.maximum(h, p["b"]),
        "loop": lambda p, h: torch.maximum(h * float(h.detach().isfinite().all()), p["b"]),
    }

    def model(p: Any, x: Tensor, keep: bool = True) -> Tensor:
        part = lambda h: torch.tanh(h @ p["v"])
        h = x @ p["w"]
        return ends[path](p, checkpoint(part, h, use_reentrant=reentrant) if keep else part(h))

    plain = lambda p, x: model(p, x, keep=False)
    want = one_by_one(plain, params, X, y)
    assert_close(curvfunc.batch_grad(model, params, X, y), want)
    assert {row.path for row in curvfunc.explain(plain, params, X).rows} == {path}
    assert_close(curvfunc.diag_hessian(model, params, X, y), curvfunc.diag_hessian(plain, params, X, y))
    assert_close(curvfunc.hessian_vp(model, params, X, y, params), curvfunc.hessian_vp(plain, params, X, y, params))


class Checkpointed(nn.Module):
    """Runs a part again in the backward pass, with whatever parameters the module has then."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(D, D), nn.Linear(D, D), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + checkpoint(lambda h: self.second(h).tanh(), self.first(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_at_other_parameters_than_the_modules(reentrant: bool) -> None:
    (X, y), module = batch(), Checkpointed(reentrant)
    model_fn, params = curvfunc.functionalize(module)
    params = {k: p + torch.randn_like(p) for k, p in params.items()}

    def plain(p: Any, x: Tensor) -> Tensor:
        h = F.linear(x, p["first.weight"], p["first.bias"])
        return h + F.linear(h, p["second.weight"], p["second.bias"]).tanh()

    want = one_by_one(plain, params, X, y)
    assert_close(curvfunc.batch_grad(model_fn, params, X, y), want)
    assert_close(curvfunc.compute(model_fn, params, X, y, Grad()), {k: t.sum(0) for k, t in want.items()})
    assert_close(curvfunc.hessian_vp(model_fn, params, X, y, params), curvfunc.hessian_vp(plain, params, X, y, params))
    assert torch.utils.checkpoint.CheckpointFunction.__module__ == "torch.utils.checkpoint"
    compiled = torch.compile(lambda p: curvfunc.batch_grad(model_fn, p, X, y), backend="aot_eager")
    assert_close(compiled(params), want)


def test_copies_of_each_sample_see_the_batch() -> None:
    """Hessians of parameters that are used twice run on one sample at a time, which then is not alone."""
    (X, y), params = batch(), {"w": torch.randn(D, D)}
    model = lambda p, x: torch.tanh(x @ p["w"]) @ p["w"] / len(x)
    with pytest.raises(ValueError, match="mixes the samples"):
        curvfunc.diag_hessian(model, params, X, y)
    assert_close(curvfunc.batch_grad(model, params, X, y), one_by_one(model, params, X, y))


def test_mixing_beside_a_change_in_place() -> None:
    params = {"e": torch.randn(5, D), "w": torch.randn(D, D)}
    X, y = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0])
    model = lambda p, x: (F.embedding(x, p["e"], max_norm=0.5) @ p["w"]).cumsum(0)
    with pytest.raises(ValueError, match="mixes the samples"):
        curvfunc.batch_grad(model, params, X, y)


def test_options_that_a_rule_does_not_know() -> None:
    (X, y), params = batch(), weights()
    model = lambda p, x: torch.add(x @ p["w"], p["b"], out=None)
    assert_close(curvfunc.batch_grad(model, params, X, y), one_by_one(model, params, X, y))


def test_state_that_curvature_meets_twice() -> None:
    """A Hessian may need a second forward pass, which starts where the first one did."""

    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(D, D))
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            self.scale.mul_(0.5)
            return (x @ self.weight).tanh() @ self.weight * self.scale

    (X, y), module = batch(), Moves()
    model_fn, params = curvfunc.functionalize(module)
    model = lambda p, x: (x @ p["weight"]).tanh() @ p["weight"] * 0.5
    want = curvfunc.diag_hessian(model, params, X, y)
    assert_close(curvfunc.diag_hessian(model_fn, params, X, y), want)
    assert module.scale.item() == 0.5


def test_a_second_attempt_starts_where_the_first_did() -> None:
    """Reentrant checkpoints are found when a buffer has moved on already."""

    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.last = nn.Linear(D, D), nn.Linear(D, D)
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            self.scale.mul_(0.5)
            return checkpoint(self.last, self.linear(x * self.scale.clone()), use_reentrant=True)

    (X, y), module = batch(), Moves()
    model_fn, params = curvfunc.functionalize(module)

    def plain(p: Any, x: Tensor) -> Tensor:
        return F.linear(F.linear(0.5 * x, p["linear.weight"], p["linear.bias"]), p["last.weight"], p["last.bias"])

    assert_close(curvfunc.batch_grad(model_fn, params, X, y), one_by_one(plain, params, X, y))
    assert module.scale.item() == 0.5
