"""How extended modules behave: when they are recorded, what a backward pass leaves, and what raises."""

import copy
import inspect
import pickle
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import backpack_peer
import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch.func import functional_call

import curvfunc
from curvfunc import compat
from curvfunc.compat import CTX, backpack, extend, extensions, memory_cleanup
from curvfunc.compat.extensions import (
    GGNMP,
    KFAC,
    KFRA,
    PCHMP,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)

# torch says that parameters and gradients with a graph refer to each other, where BackPACK's users ask for just that
pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:Using backward:UserWarning")]
N = 6


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(N, 5, generator=generator), torch.arange(N) % 3


def want(quantity: str, module: nn.Module, X: Any, y: Tensor, **kwargs: Any) -> dict[str, Any]:
    results: dict[str, Any] = getattr(curvfunc, quantity)(*curvfunc.functionalize(module), X, y, **kwargs)
    return results


def got(module: nn.Module, field: str) -> dict[str, Any]:
    return {name: getattr(p, field) for name, p in module.named_parameters() if hasattr(p, field)}


# -- where the forward pass runs, and which scalar is differentiated


@pytest.mark.parametrize("inside", [True, False])
def test_forward_pass_inside_or_before(inside: bool) -> None:
    (X, y), model, loss_fn = batch(), extend(mlp()), extend(nn.CrossEntropyLoss())
    if inside:
        with backpack(BatchGrad(), DiagGGNExact()):
            loss_fn(model(X), y).backward()
    else:
        loss = loss_fn(model(X), y)
        with backpack(BatchGrad(), DiagGGNExact()):
            loss.backward()
    assert_close(got(model, "grad_batch"), want("batch_grad", model, X, y))
    assert_close(got(model, "diag_ggn_exact"), want("diag_ggn", model, X, y))


def test_nothing_is_stored_outside_the_block() -> None:
    (X, y), model, loss_fn = batch(), extend(mlp()), extend(nn.CrossEntropyLoss())
    with backpack(BatchGrad()):
        loss = loss_fn(model(X), y)
    loss.backward()
    assert got(model, "grad_batch") == {}


SCALARS = {
    "column": lambda out, y: out[:, 1].sum(),
    "unreduced": lambda out, y: nn.CrossEntropyLoss(reduction="none")(out, y).sum(),
    "extended, unreduced": lambda out, y: extend(nn.CrossEntropyLoss(reduction="none"))(out, y).sum(),
    "function": lambda out, y: F.cross_entropy(out, y) * 3,
}


@pytest.mark.parametrize("scalar", SCALARS)
def test_first_order_quantities_of_any_scalar(scalar: str) -> None:
    (X, y), model = batch(), extend(mlp())
    fields = {"grad_batch": "batch_grad", "batch_l2": "batch_l2", "sum_grad_squared": "sum_grad_squared"}
    with backpack(BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance()):
        SCALARS[scalar](model(X), y).backward()
    for field, quantity in {**fields, "variance": "variance"}.items():
        assert_close(got(model, field), want(quantity, model, X, y, loss_fn=SCALARS[scalar]))


def test_autograd_grad_delivers_too() -> None:
    (X, y), model = batch(), extend(mlp())
    with backpack(BatchGrad()):
        torch.autograd.grad(F.cross_entropy(model(X), y), list(model.parameters()))
    assert_close(got(model, "grad_batch"), want("batch_grad", model, X, y))


def test_second_order_follows_the_loss_not_what_is_made_of_it() -> None:
    """As in BackPACK, a factor in front of the loss enters gradients but not the curvature of the loss."""
    (X, y), model, loss_fn = batch(), extend(mlp()), extend(nn.CrossEntropyLoss())
    with backpack(DiagGGNExact(), BatchGrad()), pytest.warns(UserWarning, match="value of CrossEntropyLoss was changed"):
        (2 * loss_fn(model(X), y)).backward()
    assert_close(got(model, "diag_ggn_exact"), want("diag_ggn", model, X, y))
    assert_close(got(model, "grad_batch"), want("batch_grad", model, X, y, loss_fn=lambda o, t: 2 * F.cross_entropy(o, t)))


# -- what is extended


def test_only_the_head_is_extended() -> None:
    (X, y), model, loss_fn = batch(), mlp(), extend(nn.CrossEntropyLoss())
    extend(model[4])
    with backpack(BatchGrad(), DiagGGNExact(), KFAC()):
        loss_fn(model(X), y).backward()
    for field, quantity in (("grad_batch", "batch_grad"), ("diag_ggn_exact", "diag_ggn")):
        expected = {k: v for k, v in want(quantity, model, X, y).items() if k.startswith("4.")}
        assert_close(got(model, field), expected)
    assert [tuple(f.shape) for f in model[4].weight.kfac] == [(3, 3), (4, 4)]


def test_nested_and_repeated_extension_changes_nothing() -> None:
    (X, y), model, loss_fn = batch(), mlp(), extend(nn.CrossEntropyLoss())
    extend(model[2])
    extend(extend(model))
    for m in model.modules():
        m._backpack_extend = False
    extend(model)
    with backpack(BatchGrad(), DiagGGNExact()):
        loss_fn(model(X), y).backward()
    assert_close(got(model, "grad_batch"), want("batch_grad", model, X, y))
    assert_close(got(model, "diag_ggn_exact"), want("diag_ggn", model, X, y))


class Parts(nn.Module):
    """Not extended itself; its parts are, and are called one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = extend(nn.Linear(5, 4)), extend(mlp()[2]), extend(nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        return self.head(self.b(h) + h).squeeze()


def test_parts_that_are_called_one_by_one() -> None:
    (X, y), model, loss_fn = batch(), Parts(), extend(nn.CrossEntropyLoss())
    with backpack(BatchGrad(), DiagGGNExact()):
        loss_fn(model(X), y).backward()
    assert_close(got(model, "grad_batch"), want("batch_grad", model, X, y))
    assert_close(got(model, "diag_ggn_exact"), want("diag_ggn", model, X, y))
    with backpack(DiagHessian()):
        loss_fn(model(X), y).backward()
    assert_close(got(model, "diag_h"), want("diag_hessian", model, X, y))


class Twins(nn.Module):
    """The same module on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) - self.net(x.flip(1))


@pytest.mark.parametrize("part", [True, False])
def test_one_module_called_twice(part: bool) -> None:
    (X, y), model, loss_fn = batch(), Twins(), extend(nn.CrossEntropyLoss())
    extend(model.net if part else model)
    with backpack(BatchGrad(), Variance(), DiagGGNExact()):
        loss_fn(model(X), y).backward()
    for field, quantity in (("grad_batch", "batch_grad"), ("variance", "variance"), ("diag_ggn_exact", "diag_ggn")):
        assert_close(got(model, field), want(quantity, model, X, y))


def test_calls_with_different_numbers_of_samples_raise() -> None:
    (X, _), model = batch(), extend(mlp())
    with backpack(BatchGrad()), pytest.raises(ValueError, match=r"\[4, 6\] samples"):
        (model(X).sum() + model(X[:4]).sum()).backward()
    with backpack(BatchGrad()):  # and leave no trace
        model(X).sum().backward()
    assert model[0].bias.grad_batch.shape == (N, 4)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.embed(tokens).mean(1).tanh())


def test_tied_weights_add_up_before_they_are_squared() -> None:
    X, y = torch.arange(18).reshape(N, 3) % 7, torch.arange(N)
    model, loss_fn = extend(Tied()), extend(nn.CrossEntropyLoss())
    with backpack(BatchGrad(), Variance(), SumGradSquared(), DiagGGNExact()):
        loss_fn(model(X), y).backward()
    fields = {"grad_batch": "batch_grad", "variance": "variance", "diag_ggn_exact": "diag_ggn"}
    for field, quantity in fields.items():
        assert_close(got(model, field), want(quantity, model, X, y))


def test_frozen_parameters_get_nothing() -> None:
    (X, y), model, loss_fn = batch(), extend(mlp()), extend(nn.CrossEntropyLoss())
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    with backpack(BatchGrad(), DiagGGNExact()):
        loss_fn(model(X), y).backward()
    for field in ("grad_batch", "diag_ggn_exact"):
        assert list(got(model, field)) == ["2.weight", "4.weight", "4.bias"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_extended_modules(duplicate: Any) -> None:
    (X, y), model, loss_fn = batch(), extend(mlp()), extend(nn.CrossEntropyLoss())
    twin, twin_loss = duplicate(model), duplicate(loss_fn)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    with backpack(BatchGrad(), DiagGGNExact()):
        twin_loss(twin(X), y).backward()
    assert got(model, "grad_batch") == {}
    assert_close(got(twin, "grad_batch"), want("batch_grad", twin, X, y))
    del twin, twin_loss
    with backpack(BatchGrad(), DiagGGNExact()):
        loss_fn(model(X), y).backward()
    assert_close(got(model, "diag_ggn_exact"), want("diag_ggn", model, X, y))


def test_extended_modules_stay_what_they_are() -> None:
    (X, y), model = batch(), mlp()
    state, signature, expected = list(model.state_dict()), inspect.signature(model[0].forward), model(X)
    extend(model)
    assert torch.equal(model(X), expected)
    assert list(model.state_dict()) == state
    assert inspect.signature(model[0].forward) == signature
    assert not any(vars(p) for p in model.parameters())
    params = dict(model.named_parameters())
    assert_close(torch.func.grad(lambda p: F.cross_entropy(functional_call(model, p, X), y))(params)["4.bias"],
                 torch.autograd.grad(F.cross_entropy(model(X), y), model[4].bias)[0])  # fmt: skip
    assert_close(torch.vmap(lambda x: model(x))(X), expected)
    with torch.no_grad():
        assert model(X).grad_fn is None


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_a_forward_pass_that_fails_leaves_no_trace(kind: type[BaseException]) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise kind

    (X, y), model, failing = batch(), extend(mlp()), extend(nn.Sequential(nn.Linear(5, 5), Fails()))
    with pytest.raises(kind):
        failing(X)
    assert torch._C._len_torch_function_stack() == 0
    with backpack(BatchGrad()):
        F.cross_entropy(model(X), y).backward()
    assert_close(got(model, "grad_batch"), want("batch_grad", model, X, y))


# -- the backward pass


def test_no_second_forward_and_no_second_backward_pass() -> None:
    forwards, backwards = [], []

    class Probe(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            forwards.append(1)
            out = x * 1
            out.register_hook(lambda g: backwards.append(1))
            return out

    X, y = batch()
    model, loss_fn = extend(nn.Sequential(nn.Linear(5, 4), Probe(), nn.Linear(4, 3))), extend(nn.CrossEntropyLoss())
    with backpack(BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance()):
        loss_fn(model(X), y).backward()
    assert (len(forwards), len(backwards)) == (1, 1)
    with backpack(DiagGGNExact(), KFAC()):
        loss_fn(model(X), y).backward()
    assert len(forwards) == 2
    with backpack(KFRA()):
        loss_fn(model(X), y).backward()
    assert len(forwards) == 3


def test_several_backward_passes_with_retain_graph() -> None:
    (X, y), model, loss_fn = batch(), extend(mlp()), extend(nn.CrossEntropyLoss())
    loss = loss_fn(model(X), y)
    for scale in (1, 2):
        said = pytest.warns(UserWarning, match="value of CrossEntropyLoss was changed") if scale > 1 else nullcontext()
        with backpack(BatchGrad(), DiagGGNExact(), retain_graph=True), said:
            (scale * loss).backward(retain_graph=True)
        expected = want("batch_grad", model, X, y, loss_fn=lambda o, t, s=scale: s * F.cross_entropy(o, t))
        assert_close(got(model, "grad_batch"), expected)
        assert_close(got(model, "diag_ggn_exact"), want("diag_ggn", model, X, y))
        for p in model.parameters():
            del p.grad_batch, p.diag_ggn_exact
    loss.backward()
    memory_cleanup(model)
    with backpack(BatchGrad()), pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("field", ["grad_batch", "variance", "batch_l2", "diag_ggn_exact"])
def test_results_can_be_differentiated(field: str) -> None:
    (X, y), model, loss_fn = batch(), extend(mlp()), extend(nn.CrossEntropyLoss())
    quantity = {"grad_batch": "batch_grad", "diag_ggn_exact": "diag_ggn"}.get(field, field)
    params = list(model.parameters())
    with backpack(BatchGrad(), Variance(), BatchL2Grad(), DiagGGNExact()):
        loss = loss_fn(model(X), y)
        loss.backward(inputs=params, retain_graph=True, create_graph=True)
    penalty = sum((getattr(p, field) ** 2).sum() for p in params)
    for p in params:
        p.grad = None
    found = torch.autograd.grad(penalty, params)
    model_fn, tensors = curvfunc.functionalize(model)

    def functional(values: dict[str, Tensor]) -> Tensor:
        results = getattr(curvfunc, quantity)(model_fn, values, X, y)
        return sum((r**2).sum() for r in results.values())

    assert_close(dict(zip(tensors, found, strict=True)), torch.func.grad(functional)(tensors), rtol=1e-9)


def test_results_have_no_graph_otherwise() -> None:
    (X, y), model, loss_fn = batch(), extend(mlp()), extend(nn.CrossEntropyLoss())
    with backpack(BatchGrad(), Variance(), DiagGGNExact(), SqrtGGNExact(), KFAC(), DiagHessian()):
        loss_fn(model(X), y).backward()
    for p in model.parameters():
        results = [p.grad_batch, p.variance, p.diag_ggn_exact, p.sqrt_ggn_exact, p.diag_h, *p.kfac]
        assert not any(r.requires_grad for r in results)


def test_inputs_choose_the_parameters() -> None:
    (X, y), model = batch(), extend(mlp())
    with backpack(BatchGrad()):
        F.cross_entropy(model(X), y).backward(inputs=list(model[4].parameters()))
    assert {"4.weight", "4.bias"} <= got(model, "grad_batch").keys()
    assert "0.weight" not in got(model, "grad_batch")


def test_results_are_plain_tensors_of_their_own() -> None:
    """They may be changed in place, during the backward pass too, and take attributes."""
    (X, y), model, loss_fn = batch(), extend(mlp()), extend(nn.CrossEntropyLoss())
    expected = torch.autograd.grad(F.cross_entropy(model(X), y), list(model.parameters()))

    def spoil(module: nn.Module) -> None:
        for p in module.parameters():
            for r in (p.grad_batch, p.variance, p.diag_ggn_exact, p.sqrt_ggn_exact, *p.kfac, *p.kflr):
                r.mul_(2)
                r.note = "mine"

    exts = BatchGrad(), Variance(), DiagGGNExact(), SqrtGGNExact(), KFAC(), extensions.KFLR()
    with backpack(*exts, extension_hook=spoil):
        loss_fn(model(X), y).backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        assert_close(p.grad, g)
        assert_close(p.grad_batch.sum(0), 2 * g)
        assert p.kflr[0].note == "mine"
    for name, diagonal in want("diag_ggn", model, X, y).items():
        p = model.get_parameter(name)
        assert_close(p.diag_ggn_exact, 2 * diagonal)
        assert_close(p.sqrt_ggn_exact.square().sum((0, 1)), 4 * diagonal)
    for name, factors in want("kflr", model, X, y).items():
        assert_close(model.get_parameter(name).kflr, [2 * f for f in factors])


def test_extension_hook_runs_module_by_module() -> None:
    (X, y), model, loss_fn = batch(), extend(mlp()), extend(nn.CrossEntropyLoss())
    seen, alive = [], []

    def hook(module: nn.Module) -> None:
        alive.append(len(got(model, "grad_batch")))
        seen.append((module, {name: p.grad_batch for name, p in module.named_parameters()}))
        for p in module.parameters():
            del p.grad_batch

    with backpack(BatchGrad(), extension_hook=hook):
        loss_fn(model(X), y).backward()
    assert [m for m, _ in seen] == [loss_fn, *[model[k] for k in (4, 3, 2, 1, 0)]]
    assert max(alive) == 2  # one layer's results at a time
    found = {f"{k}.{name}": r for k, (_, rs) in zip((4, 3, 2, 1, 0), seen[1:], strict=True) for name, r in rs.items()}
    expected = want("batch_grad", model, X, y)
    assert_close({k: found[k] for k in expected}, expected)


def test_debug_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (X, y), model = batch(), extend(nn.Linear(5, 3), debug=True)
    with backpack(BatchGrad(), debug=True):
        F.cross_entropy(model(X), y).backward()
    text = capsys.readouterr().out
    assert "Extending Linear" in text
    assert "BatchGrad" in text


# -- where the plain path does not hold


class Distances(nn.Module):
    """Uses its parameter in an operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.centers = nn.Linear(5, 4), nn.Parameter(torch.randn(3, 4))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return -((self.drop(self.first(x)).unsqueeze(1) - self.centers) ** 2).cumsum(2).logsumexp(2)


class Noisy(Distances):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) * self.calls


@pytest.fixture
def no_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has a rule, so every parameter is generic."""
    monkeypatch.setattr("curvfunc.engine.observer.RULES", {})


@pytest.mark.usefixtures("no_rules")
@pytest.mark.parametrize("head", [True, False])
def test_models_without_rules(head: bool) -> None:
    (X, y), loss_fn = batch(), extend(nn.CrossEntropyLoss())
    model: nn.Module = Distances().eval()
    model = nn.Sequential(nn.Linear(5, 5), extend(model)) if head else extend(model)
    calls: list[nn.Module] = []
    with backpack(BatchGrad(), Variance(), DiagGGNExact(), KFAC(), extension_hook=calls.append):
        loss_fn(model(X), y).backward()
    for field, quantity in (("grad_batch", "batch_grad"), ("variance", "variance"), ("diag_ggn_exact", "diag_ggn")):
        expected = {k: v for k, v in want(quantity, model, X, y).items() if not head or k.startswith("1.")}
        assert_close(got(model, field), expected)
    module = model[1] if head else model
    assert calls[0] is loss_fn
    assert {id(module), id(module.first)} <= {id(m) for m in calls}
    assert len(module.centers.kfac) == 1


@pytest.mark.usefixtures("no_rules")
def test_models_without_rules_can_be_differentiated() -> None:
    (X, y), model = batch(), extend(Distances().eval())
    params = list(model.parameters())
    with backpack(BatchGrad()):
        F.cross_entropy(model(X), y).backward(inputs=params, create_graph=True)
    found = torch.autograd.grad(sum((p.grad_batch**3).sum() for p in params), params)
    for p in params:
        p.grad = None
    model_fn, tensors = curvfunc.functionalize(model)
    expected = torch.func.grad(lambda q: sum((r**3).sum() for r in curvfunc.batch_grad(model_fn, q, X, y).values()))(tensors)
    assert_close(dict(zip((n for n, _ in model.named_parameters()), found, strict=True)), expected)


@pytest.mark.usefixtures("no_rules")
def test_dropout_is_repeated_with_the_same_draws() -> None:
    (X, y), model = batch(), extend(Distances().train())
    state = torch.get_rng_state()
    loss = F.cross_entropy(model(X), y)
    after = torch.get_rng_state()
    with backpack(BatchGrad()):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), after)
    for p in model.parameters():
        assert_close(p.grad_batch.sum(0), p.grad)
    torch.set_rng_state(state)


@pytest.mark.usefixtures("no_rules")
def test_what_cannot_be_repeated_raises() -> None:
    (X, y), model = batch(), extend(Noisy().eval())
    with backpack(BatchGrad()), pytest.raises(RuntimeError, match="Noisy has to run a second time"):
        F.cross_entropy(model(X), y).backward()


def test_dropout_on_the_plain_path() -> None:
    X, y = batch()
    model, loss_fn = extend(nn.Sequential(nn.Linear(5, 8), nn.Dropout(), nn.Linear(8, 3))), extend(nn.CrossEntropyLoss())
    with backpack(BatchGrad(), DiagGGNExact(), DiagHessian(), GGNMP()):
        loss_fn(model(X), y).backward()
    for p in model.parameters():
        assert_close(p.grad_batch.sum(0), p.grad)
        assert_close(p.diag_h, p.diag_ggn_exact)  # piecewise linear, with one and the same mask
        unit = torch.eye(p.numel()).reshape(-1, *p.shape)
        assert_close(p.ggnmp(unit).flatten(1).diag().reshape(p.shape), p.diag_ggn_exact)


def test_several_outputs() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> dict[str, Any]:
            h = self.body(x).relu()
            return {"a": self.a(h), "rest": [self.b(h)]}

    (X, y), model = batch(), extend(Heads())
    with backpack(BatchGrad()):
        F.cross_entropy(model(X)["a"], y).backward()
    expected = curvfunc.batch_grad(*curvfunc.functionalize(model, lambda out: out["a"]), X, y)
    assert_close(got(model, "grad_batch"), {k: v for k, v in expected.items() if not k.startswith("b.")})


def test_keyword_arguments_and_masks() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.fc = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
            return self.fc(self.attention(x, x, x, attn_mask=mask, need_weights=False)[0].mean(1))

    X, y, mask = torch.randn(N, 3, 4), torch.arange(N) % 3, torch.triu(torch.ones(3, 3), 1).bool()
    model, loss_fn = extend(Masked()), extend(nn.CrossEntropyLoss())
    with backpack(BatchGrad(), DiagGGNExact()):
        loss_fn(model(X, mask=mask), y).backward()
    model_fn, params = curvfunc.functionalize(model)
    closed = lambda p, x: functional_call(model, p, (x,), {"mask": mask})
    assert_close(got(model, "grad_batch"), curvfunc.batch_grad(closed, params, X, y))
    assert_close(got(model, "diag_ggn_exact"), curvfunc.diag_ggn(closed, params, X, y))
    assert model_fn is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    """All results are in the parameter's type, as BackPACK's; the functions' sums of squares are in single precision."""
    X, y = torch.randn(N, 5, dtype=dtype), torch.arange(N) % 3
    model, loss_fn = extend(mlp().to(dtype)), extend(nn.CrossEntropyLoss())
    functions = {
        BatchGrad(): "batch_grad",
        BatchL2Grad(): "batch_l2",
        SumGradSquared(): "sum_grad_squared",
        Variance(): "variance",
        DiagGGNExact(): "diag_ggn",
        SqrtGGNExact(): "sqrt_ggn",
        extensions.BatchDiagGGNExact(): "batch_diag_ggn",
        extensions.KFLR(): "kflr",
        KFRA(): "kfra",
        DiagHessian(): "diag_hessian",
        extensions.BatchDiagHessian(): "batch_diag_hessian",
    }
    with backpack(*functions):
        loss_fn(model(X), y).backward()
    for ext, quantity in functions.items():
        wanted = {k: list(v) if isinstance(v, tuple) else v for k, v in want(quantity, model, X, y).items()}
        found = got(model, ext.savefield)
        assert {t.dtype for t in optree.tree_leaves(found)} == {dtype}
        as_wanted = optree.tree_map(lambda t, w: t.to(w.dtype), found, wanted)
        assert_close(as_wanted, wanted, rtol=3 * torch.finfo(dtype).eps)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_low_precision_as_in_backpack() -> None:
    backpack = backpack_peer.load()
    X, y = torch.randn(N, 5, dtype=torch.bfloat16), torch.arange(N) % 3
    for name in (
        "BatchGrad",
        "SumGradSquared",
        "Variance",
        "BatchL2Grad",
        "DiagGGNExact",
        "KFLR",
        "KFAC",
        "KFRA",
        "DiagHessian",
    ):
        types = []
        for library, exts in ((backpack, backpack.extensions), (compat, extensions)):
            torch.manual_seed(0)
            model, ext = library.extend(mlp().bfloat16()), getattr(exts, name)()
            with library.backpack(ext):
                library.extend(nn.CrossEntropyLoss())(model(X), y).backward()
            types.append([t.dtype for p in model.parameters() for t in optree.tree_leaves(getattr(p, ext.savefield))])
        assert types[0] == types[1]


def test_extended_modules_can_be_compiled() -> None:
    """Compiled code is not recorded; it runs."""
    (X, y), model = batch(), extend(mlp())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(X), model(X))
    F.cross_entropy(compiled(X), y).backward()
    assert model[0].weight.grad is not None


# -- errors


BATCH_NORM = [BatchGrad, BatchL2Grad, SumGradSquared, Variance, DiagGGNExact, DiagGGNMC, SqrtGGNExact, KFAC, DiagHessian, PCHMP]


@pytest.mark.parametrize("extension", BATCH_NORM)
def test_batch_norm_in_training_mode_raises(extension: Any) -> None:
    X, y = batch()
    model, loss_fn = extend(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))), extend(nn.CrossEntropyLoss())
    loss_fn(model(X), y).backward()  # ordinary training goes on
    assert model[1].num_batches_tracked == 1
    with backpack(extension()), pytest.raises(NotImplementedError, match="Encountered BatchNorm module in training mode"):
        loss_fn(model(X), y).backward()
    model.eval()
    with backpack(extension()):
        loss_fn(model(X), y).backward()


def test_second_order_needs_an_extended_loss() -> None:
    (X, y), model = batch(), extend(mlp())
    with backpack(BatchGrad(), DiagGGNExact()), pytest.raises(ValueError, match=r"DiagGGNExact needs the loss Hessian"):
        nn.CrossEntropyLoss()(model(X), y).backward()


def test_unreduced_loss_has_no_curvature() -> None:
    (X, y), model, loss_fn = batch(), extend(mlp()), extend(nn.CrossEntropyLoss(reduction="none"))
    with backpack(DiagGGNExact()), pytest.raises(ValueError, match="reduction"):
        loss_fn(model(X), y).sum().backward()


def test_extensions_must_be_instances() -> None:
    with pytest.raises(ValueError, match=r"got the class BatchGrad: write BatchGrad\(\)"):
        backpack(BatchGrad)
    with pytest.raises(ValueError, match="got 3 of type int"):
        backpack(3)
    with pytest.raises(TypeError, match="extend takes a torch.nn.Module, got function"):
        extend(F.cross_entropy)


def test_what_is_out_of_scope_names_the_functional_way() -> None:
    with pytest.raises(NotImplementedError, match=r"curvfunc\.rule"):
        BatchGrad().set_module_extension(nn.Linear, object())

    class Mine(extensions.FirstOrderBackpropExtension):
        def __init__(self, module_exts: Any = None) -> None:
            super().__init__("mine", module_exts)

    with pytest.raises(NotImplementedError, match=r"curvfunc\.rule"):
        Mine({nn.Linear: object()})
    with pytest.raises(NotImplementedError, match=r"curvfunc\.rule"):
        type("MyModuleExtension", (extensions.ModuleExtension,), {})
    (X, y), model = batch(), extend(mlp())
    with backpack(Mine()), pytest.raises(NotImplementedError, match=r"curvfunc\.compute"):
        F.cross_entropy(model(X), y).backward()
    with pytest.raises(AssertionError, match="no valid fail mode"):
        extensions.BackpropExtension("field", fail_mode="LOUD")
    with pytest.raises(ModuleNotFoundError, match=r"curvfunc\.rule"):
        import curvfunc.compat.core.derivatives.linear  # noqa: F401


def test_extensions_are_extensions() -> None:
    from curvfunc.compat.extensions.backprop_extension import BackpropExtension

    names = [e for e in extensions.__all__ if e != "HBP"]
    assert len(names) == 18
    fields = [getattr(extensions, e)().savefield for e in names]
    assert len(set(fields)) == 18
    assert all(isinstance(getattr(extensions, e)(), BackpropExtension) for e in names)
    assert DiagGGNMC(7).get_num_mc_samples() == 7
    assert BatchGrad([0, 2]).get_subsampling() == [0, 2]
    assert extensions.PCHMP(modify="abs").get_modification_mode() == "abs"


# -- the context


def test_context_is_restored() -> None:
    assert not CTX.is_active()
    outer = BatchGrad()
    with backpack(outer, debug=True, retain_graph=True):
        with pytest.raises(RuntimeError, match="inner"), backpack(KFAC()):
            assert CTX.is_extension_active(KFAC)
            assert not CTX.is_extension_active(BatchGrad, DiagGGNExact)
            raise RuntimeError("inner")
        assert CTX.get_active_exts() == (outer,)
        assert CTX.get_debug()
        assert CTX.get_retain_graph()
    assert CTX.get_active_exts() == ()
    assert not CTX.get_debug()


def test_hooks_can_be_removed_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CTX, "hook_handles", [])
    (X, y), model = batch(), extend(mlp())
    CTX.remove_hooks()
    assert "forward" not in vars(model[0])
    assert CTX.hook_handles == []
    with backpack(BatchGrad()):
        F.cross_entropy(model(X), y).backward()
    assert got(model, "grad_batch") == {}
    extend(model)
    with backpack(BatchGrad()):
        F.cross_entropy(model(X), y).backward()
    assert_close(got(model, "grad_batch"), want("batch_grad", model, X, y))


LEGACY = """
import curvfunc.compat
curvfunc.compat.install()
curvfunc.compat.install()
import torch
import backpack
from backpack import backpack as bp, extend, extensions, memory_cleanup, disable
from backpack.context import CTX
from backpack.core.derivatives.convnd import weight_jac_t_save_memory
from backpack.core.layers import Flatten
from backpack.custom_module.branching import Parallel, SumModule
from backpack.custom_module.permute import Permute
from backpack.custom_module.reduce_tuple import ReduceTuple
from backpack.custom_module.scale_module import ScaleModule
from backpack.custom_module.slicing import Slicing
from backpack.custom_module.pad import Pad
from backpack.extensions import BatchGrad, KFAC
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.firstorder.batch_grad import BatchGrad as Same
from backpack.extensions.secondorder.hbp import KFAC as SameKFAC
from backpack.hessianfree.ggnvp import ggn_vector_product
from backpack.hessianfree.hvp import hessian_vector_product
from backpack.hessianfree.lop import transposed_jacobian_vector_product
from backpack.hessianfree.rop import jacobian_vector_product
from backpack.utils.convert_parameters import vector_to_parameter_list
from backpack.utils.examples import load_one_batch_mnist
from backpack.utils.kroneckers import kfacs_to_mat
from backpack.utils.subsampling import subsample
import backpack.utils.kroneckers as kroneckers
assert Same is BatchGrad is extensions.BatchGrad and SameKFAC is KFAC and isinstance(KFAC(), BackpropExtension)
model = extend(torch.nn.Sequential(
    Pad((0, 2)), Slicing((slice(None), slice(0, 4))), ScaleModule(2.0), Parallel(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)),
), use_converter=True)
loss = extend(torch.nn.CrossEntropyLoss())
with bp(BatchGrad(), KFAC()):
    loss(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1])).backward()
for p in model.parameters():
    assert p.grad_batch.shape == (5, *p.shape) and kfacs_to_mat(p.kfac).shape == (p.numel(), p.numel())
try:
    from backpack.core.derivatives.linear import LinearDerivatives
except ModuleNotFoundError as error:
    assert "curvfunc.rule" in str(error)
else:
    raise AssertionError
print("fine")
"""


def test_unchanged_code_runs_after_install() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", LEGACY], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


def test_install_refuses_to_replace_backpack() -> None:
    code = (
        "import sys, types; sys.modules['backpack'] = types.ModuleType('backpack')\n"
        "import curvfunc.compat\n"
        "try:\n    curvfunc.compat.install()\nexcept RuntimeError as e:\n    print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Call curvfunc.compat.install() before" in done.stdout, done.stderr


# -- the migration guide

GUIDE = Path(__file__).parents[2] / "docs" / "backpack.md"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_guide_runs_and_prints_what_is_shown() -> None:
    blocks = BLOCK.findall(GUIDE.read_text(encoding="utf-8"))
    code = "\n".join(text for kind, text in blocks if kind == "python")
    printed = "".join(text for kind, text in blocks if kind == "text")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.stdout == printed, done.stderr


def test_guide_names_everything() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    functions = set(re.findall(r"`(\w+)\(f[,)]", text))
    assert len(functions) == 16
    assert all(hasattr(curvfunc, name) for name in functions)
    for name in extensions.__all__:
        if name != "HBP":
            assert f"`{name}(" in text
            assert f"`{getattr(extensions, name)().savefield}`" in text
