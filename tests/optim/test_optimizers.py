"""Transformations as `torch.optim` optimizers: schedulers, groups, states, closures, and torch's own optimizers after them."""

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc import KFLR, DiagGGN, kronecker, optim

pytestmark = pytest.mark.usefixtures("float64")

KINDS: dict[str, Any] = {
    "kfac": lambda model, *params, **o: optim.KFAC(
        model, *params, spec=KFLR(joined=True), damping=0.1, factors_every=2, inverses_every=4, **o
    ),
    "ekfac": lambda model, *params, **o: optim.EKFAC(
        model, *params, spec=KFLR(joined=True), damping=0.1, factors_every=2, bases_every=4, moments_every=1, **o
    ),
    "diagonal": lambda model, *params, **o: optim.Diagonal(model, *params, spec=DiagGGN(), damping=0.1, **o),
    "newton": lambda model, *params, **o: optim.NewtonCG(model, *params, iterations=5, **o),
}


def make() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def batches(num: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(6, 3, generator=generator), torch.randint(3, (6,), generator=generator)) for _ in range(num)]


def closure(model: nn.Module, optimizer: Any, X: Tensor, y: Tensor, loss_fn: Any = None) -> Any:
    def run() -> Tensor:
        optimizer.zero_grad()
        loss = (loss_fn or nn.CrossEntropyLoss())(model(X), y)
        loss.backward()
        return loss

    return run


def transformation(name: str, structure: Any) -> optim.Transformation:
    return {
        "kfac": optim.scale_by_kfac(structure, KFLR(joined=True), damping=0.1, factors_every=2, inverses_every=4),
        "ekfac": optim.scale_by_ekfac(structure, KFLR(joined=True), damping=0.1, factors_every=2, bases_every=4),
        "diagonal": optim.scale_by_diagonal(DiagGGN(), damping=0.1),
        "newton": optim.newton_cg(iterations=5),
    }[name]


@pytest.mark.parametrize("by", ["batch", "closure"])
@pytest.mark.parametrize("name", KINDS)
def test_what_the_pure_form_gives(name: str, by: str) -> None:
    model = make()
    optimizer = KINDS[name](model, lr=0.05, momentum=0.9)
    model_fn, params = curvfunc.functionalize(copy.deepcopy(model))
    chain = optim.chain(
        transformation(name, kronecker.structure(model_fn, params, batches(1)[0][0])), optim.momentum(0.9), optim.scale(-0.05)
    )
    state = chain.init(params)
    for X, y in batches(6):
        got = optimizer.step(X, y) if by == "batch" else optimizer.step(closure(model, optimizer, X, y))
        loss, params, state = optim.step(model_fn, chain, params, state, X, y)
        assert_close(got, loss)
        assert_close(dict(model.state_dict()), params, rtol=1e-9)
    fresh = make()
    fresh.load_state_dict(params)  # and back into a module
    assert torch.equal(fresh[0].weight, params["0.weight"])


@pytest.mark.parametrize("name", KINDS)
def test_state_dict_continues_bit_for_bit(name: str) -> None:
    model = make()
    optimizer = KINDS[name](model, lr=0.05, momentum=0.9)
    data = batches(9)
    for X, y in data[:3]:
        optimizer.step(X, y)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    for X, y in data[3:]:
        optimizer.step(X, y)
    other = make()
    other.load_state_dict(saved["model"])
    resumed = KINDS[name](other, lr=1.0, momentum=0.0)
    resumed.load_state_dict(saved["optimizer"])
    for X, y in data[3:]:
        resumed.step(X, y)
    for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), n


def test_schedulers_groups_and_zero_grad() -> None:
    model = make()
    start = copy.deepcopy(model)
    groups = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "lr": 0.5, "momentum": 0.0, "weight_decay": 0.1},
    ]
    optimizer = KINDS["kfac"](model, groups, lr=0.2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("step"))
    torch.optim.SGD(start.parameters(), lr=0.1).step()  # whose hooks are not ours
    (X, y), *_ = batches(1)
    optimizer.step(X, y)
    u = {n: p.grad.clone() for n, p in model.named_parameters()}
    for (n, p), q in zip(start.named_parameters(), model.parameters(), strict=True):
        assert_close(q.detach(), (p - (0.2 * u[n] if n[0] == "0" else 0.5 * (u[n] + 0.1 * p))).detach())
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02, 0.05])
    before = model[2].bias.detach().clone()
    optimizer.step(X, y)
    assert_close(model[2].bias.detach(), before - 0.05 * (model[2].bias.grad + 0.1 * before))
    assert calls == ["step", "step"]
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_some_parameters() -> None:
    model = make()
    frozen = model[0].weight.detach().clone()
    optimizer = KINDS["kfac"](model, model[2].parameters(), lr=0.1)
    (X, y), *_ = batches(1)
    loss = optimizer.step(X, y)
    assert torch.equal(model[0].weight, frozen)
    assert F.cross_entropy(model(X), y) < loss


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop])
def test_stepped_by_others(kind: Any) -> None:
    model, other = make(), make()
    kfac, optimizer = KINDS["kfac"](model), kind(model.parameters(), lr=0.01)
    reference = kind(other.parameters(), lr=0.01)
    model_fn, params = curvfunc.functionalize(other)
    method = transformation("kfac", kronecker.structure(model_fn, params, batches(1)[0][0]))
    state = method.init(params)
    for i, (X, y) in enumerate(batches(4)):
        kfac.precondition(X, y) if i % 2 else kfac.precondition(closure(model, kfac, X, y))
        optimizer.step()
        due = method.due(state)
        grad, curvature = curvfunc.compute(model_fn, params, X, y, (curvfunc.Grad(), method.needs(state, due)))
        u, state = method.update(grad, state, params, curvature, due)
        for n, p in other.named_parameters():
            p.grad = u[n]
        reference.step()
        assert_close(dict(model.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize("loss_fn", [nn.MSELoss(reduction="sum"), lambda out, y: F.mse_loss(out, target=y) + 0 * out.sum()])
def test_closures_with_other_losses(loss_fn: Any) -> None:
    model, other = make(), make()
    X, y = batches(1)[0][0], torch.randn(6, 3)
    one, two = KINDS["kfac"](model), KINDS["kfac"](other, loss_fn=loss_fn if isinstance(loss_fn, nn.Module) else F.mse_loss)
    one.step(closure(model, one, X, y, loss_fn))
    two.step(X, y)
    assert_close(dict(model.state_dict()), dict(other.state_dict()))


def test_a_regularizer_in_the_closure_is_in_the_gradient() -> None:
    model, other = make(), make()
    (X, y), *_ = batches(1)
    one, two = KINDS["diagonal"](model), KINDS["diagonal"](other)
    one.precondition(closure(model, one, X, y, lambda out, y: F.cross_entropy(out, y) + model[0].weight.square().sum()))
    two.precondition(X, y)
    d = curvfunc.diag_ggn(*curvfunc.functionalize(other), X, y)["0.weight"]
    assert_close(model[0].weight.grad - other[0].weight.grad, 2 * model[0].weight.detach() / (d + 0.1))


# -- bad input


class Spare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("name", KINDS)
def test_parameters_that_the_model_does_not_use(name: str) -> None:
    model = Spare()
    (X, y), *_ = batches(1)
    optimizer = KINDS[name](model)
    with pytest.raises(ValueError, match=r"does not depend on the parameters \['spare.weight', 'spare.bias'\]"):
        optimizer.step(X, y)
    KINDS[name](model, model.used.parameters()).step(X, y)
    with pytest.raises(ValueError, match=r"parameters of shapes \[\(2,\)\] are none of the model's"):
        KINDS[name](model, [nn.Parameter(torch.zeros(2))])


def test_learning_rates() -> None:
    for lr in (math.nan, math.inf):
        with pytest.raises(ValueError, match="the learning rate of group 0 is"):
            optim.KFAC(make(), lr=lr)
    optimizer = optim.KFAC(make())
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="the learning rate of group 0 is nan; it must be finite"):
        optimizer.step(*batches(1)[0])


def test_options_are_checked_at_once() -> None:
    for kind in (optim.KFAC, optim.EKFAC, optim.Diagonal, optim.NewtonCG):
        with pytest.raises(ValueError, match="damping must be finite, at least 0"):
            kind(make(), damping=-1.0)


def test_states_of_another_model() -> None:
    X, y = batches(1)[0]
    one = KINDS["kfac"](make())
    one.step(X, y)
    other = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, bias=False), nn.Linear(4, 3, bias=False))
    two = KINDS["kfac"](other)
    two.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="of other parameters"):
        two.step(X, y)


def test_closures_that_cannot_be_seen() -> None:
    model = make()
    optimizer = KINDS["kfac"](model)
    X, y = batches(1)[0]
    with pytest.raises(ValueError, match="a known loss of its output 0 times.*Use step"):
        optimizer.step(closure(model, optimizer, X, y, lambda out, y: out.square().mean()))
    with pytest.raises(ValueError, match="calls the model 2 times"):
        optimizer.step(closure(model, optimizer, X, y, lambda out, y: F.cross_entropy(out, y) + model(X).mean()))
    with pytest.raises(ValueError, match="the closure left no gradient in parameter '0.weight'"):
        optimizer.zero_grad()
        optimizer.step(lambda: F.cross_entropy(model(X), y))
    with pytest.raises(TypeError, match="pass a batch"):
        optimizer.step()
    with pytest.raises(TypeError, match="pass a batch"):
        optimizer.step(X)
