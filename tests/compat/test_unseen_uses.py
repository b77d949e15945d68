"""Parameters that a forward pass uses where recording cannot see it, changes, keeps, or does not use: right, or said."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvfunc.compat import backpack, extend
from curvfunc.compat.extensions import GGNMP, HMP, KFLR, KFRA, BatchGrad, BatchL2Grad, DiagGGNExact, DiagHessian, SqrtGGNExact

pytestmark = pytest.mark.usefixtures("float64")
N = 4


class Net(nn.Module):
    """Two parameters, and a forward pass of one's own."""

    def __init__(self, function: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.b, self.function = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 3), torch.arange(N) % 3


def one_by_one(model: nn.Module, X: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Per-sample gradients of the mean, by autograd alone; parameters without gradient are left out."""
    params = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(
            F.cross_entropy(model(X[n : n + 1]), y[n : n + 1]) / len(X), list(params.values()), allow_unused=True
        )
        for n in range(len(X))
    ]
    return {k: torch.stack(g) for k, g in zip(params, zip(*rows, strict=True), strict=True) if g[0] is not None}


def got(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad_batch for name, p in model.named_parameters() if hasattr(p, "grad_batch")}


def run(model: nn.Module, X: Tensor, y: Tensor, *exts: Any) -> None:
    with backpack(BatchGrad(), *exts):
        extend(nn.CrossEntropyLoss())(model(X), y).backward()


# -- what recording cannot see


class Product(torch.autograd.Function):
    """x @ w; in its forward pass, gradients are off, and the product looks like any other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.mT, x.mT @ g


def without_torch_functions(x: Tensor, w: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return x @ w


def looked_at(self: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.seen = x @ self.w  # type: ignore[assignment]
    return x @ self.w + self.b


UNSEEN: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "function": lambda self, x: Product.apply(x, self.w) + self.b,
    "disabled": lambda self, x: without_torch_functions(x, self.w) + self.b,
    "seen and unseen": lambda self, x: x @ self.w + Product.apply(x, self.w) + self.b,
    "without gradient": looked_at,
    "reentrant checkpoint": lambda self, x: checkpoint(lambda h: (h @ self.w).tanh(), x * 1, use_reentrant=True) + self.b,
    "checkpoint": lambda self, x: checkpoint(lambda h: (h @ self.w).tanh(), x, use_reentrant=False) + self.b,
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", UNSEEN)
def test_uses_that_are_not_seen(name: str, inside: bool) -> None:
    X, y = batch()
    X.requires_grad_()  # reentrant checkpoints need it
    model, plain = extend(Net(UNSEEN[name])), Net(UNSEEN["checkpoint" if "checkpoint" in name else name])
    plain.load_state_dict(model.state_dict())
    want = one_by_one(plain, X, y)
    if inside:
        run(model, X, y, DiagGGNExact(), BatchL2Grad())
    else:
        loss = extend(nn.CrossEntropyLoss())(model(X), y)
        with backpack(BatchGrad(), DiagGGNExact(), BatchL2Grad()):
            loss.backward()
    assert_close(got(model), want)
    for p in model.parameters():
        assert_close(p.grad_batch.sum(0), p.grad)
        assert_close(p.batch_l2, p.grad_batch.flatten(1).square().sum(1))


HIDDEN: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "function": lambda self, x: Product.apply(x, self.w).add_(self.b),
    "disabled": lambda self, x: without_torch_functions(x, self.w).add_(self.b),
    "twice": lambda self, x: Product.apply(x, self.w).mul_(2).add_(self.b),
    "by a product": lambda self, x: without_torch_functions(x, self.w).addmm_(x, self.w.T.mul(2)).add_(self.b),
    "seen later": lambda self, x: (x @ self.w).add_(Product.apply(x, self.w)) + self.b,
}


@pytest.mark.parametrize("name", HIDDEN)
def test_uses_that_are_not_seen_before_a_change_in_place(name: str) -> None:
    X, y = batch()
    model = extend(Net(HIDDEN[name]))
    for p in model.parameters():
        p.grad_batch = "of an earlier pass"
    plain = Net(HIDDEN[name])
    plain.load_state_dict(model.state_dict())
    want = one_by_one(plain, X, y)
    run(model, X, y)
    assert_close(got(model), want)


class Outer(nn.Module):
    """A reentrant checkpoint with extended modules in it, which autograd runs again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(lambda h: self.a(h).tanh(), x, use_reentrant=True))


def test_extended_modules_in_a_checkpoint() -> None:
    X, y = batch()
    X.requires_grad_()
    model = extend(Outer())
    model_plain = Outer()
    model_plain.load_state_dict(model.state_dict())
    model_plain.forward = lambda x: model_plain.b(model_plain.a(x).tanh())  # type: ignore[method-assign]
    run(model, X, y)
    assert_close(got(model), one_by_one(model_plain, X, y))


def test_nothing_is_said_outside_of_blocks() -> None:
    """No error of ours reaches code that trains as usual."""
    X, y = batch()
    X.requires_grad_()
    for function in (*UNSEEN.values(), *HIDDEN.values()):
        model = extend(Net(function))
        F.cross_entropy(model(X), y).backward()
        assert model.w.grad is not None


# -- what the forward pass changes


def scaled(self: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.w.div_(self.w.norm())
    return x @ self.w + self.b


def replaced(self: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.w.copy_(self.w.sign())
        self.b[:2] = 1
    return F.linear(x, self.w, self.b)


def scaled_and_unseen(self: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.w.div_(self.w.norm())
    return Product.apply(x, self.w) + self.b


def halved(self: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.w.mul_(0.5)
    return Product.apply(x, self.w) + self.b


@pytest.mark.parametrize("function", [scaled, replaced])
def test_parameters_that_the_forward_pass_changes(function: Any) -> None:
    X, y = batch()
    model = extend(Net(function))
    run(model, X, y, DiagGGNExact())
    assert_close(got(model), one_by_one(model, X, y))  # what is done a second time changes nothing
    for p in model.parameters():
        assert_close(p.grad_batch.sum(0), p.grad)


def test_parameters_that_are_changed_and_not_seen() -> None:
    X, y = batch()
    model = extend(Net(scaled_and_unseen))
    run(model, X, y, DiagGGNExact())
    assert_close(got(model), one_by_one(model, X, y))


def test_parameters_that_change_more_each_time() -> None:
    X, y = batch()
    model = extend(Net(halved))
    with pytest.raises(RuntimeError, match="Net has to run a second time .* what the first run changed"):
        run(model, X, y)
    assert got(model) == {}


def test_parameters_that_are_changed_before_the_backward_pass() -> None:
    X, y = batch()
    loss = F.cross_entropy(extend(model := Net(UNSEEN["function"]))(X), y)
    with torch.no_grad():
        model.b.add_(1)
    with (
        backpack(BatchGrad()),
        pytest.raises(RuntimeError, match="parameter 'b' of Net was changed in place after its forward"),
    ):
        loss.backward()


TABLES: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: nn.Sequential(nn.Embedding(5, 3, max_norm=0.5), nn.Flatten(), nn.Linear(6, 3)),
    "other norm": lambda: nn.Sequential(nn.Embedding(5, 3, max_norm=0.5, norm_type=1.0, padding_idx=1), nn.Flatten()),
    "bag": lambda: nn.Sequential(nn.EmbeddingBag(5, 3, max_norm=0.5), nn.Linear(3, 3)),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_with_a_largest_norm(name: str) -> None:
    X, y = torch.tensor([[0, 1], [1, 2], [3, 3], [4, 0]]), torch.arange(N) % 3
    model, plain = TABLES[name](), TABLES[name]()
    plain.load_state_dict(model.state_dict())
    run(extend(model), X, y, DiagGGNExact())
    want = one_by_one(plain, X, y)
    assert_close(dict(model.named_parameters()), dict(plain.named_parameters()))
    table = next(model.parameters())
    assert table.abs().pow(model[0].norm_type).sum(1).max() <= 0.5 ** model[0].norm_type + 1e-6
    assert_close(got(model), want)


# -- what the module keeps


class Keeps(nn.Module):
    """As models that make attention biases once."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.w, self.b, self.where = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(6)), where
        self.cache: dict[str, Tensor] = {}
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None and not self.cache:
            made = self.b[torch.tensor([0, 2, 4])]
            if self.where == "attribute":
                self.kept = made
            elif self.where == "list":
                self.kept = [made]
            else:
                self.cache["b"] = made
        kept = self.cache["b"] if self.cache else self.kept[0] if self.where == "list" else self.kept
        return x @ self.w + kept


@pytest.mark.parametrize("ext", [BatchGrad(), DiagGGNExact(), DiagHessian(), KFLR()], ids=lambda e: e.savefield)
@pytest.mark.parametrize(("where", "attribute"), [("attribute", "kept"), ("list", "kept"), ("dict", "cache")])
def test_tensors_that_the_module_keeps(where: str, attribute: str, ext: Any) -> None:
    """The first call makes them; later ones have the gradients of that one's parameters."""
    X, y = batch()
    model, plain = nn.Sequential(nn.Linear(3, 3), Keeps(where)), nn.Sequential(nn.Linear(3, 3), Keeps(where))
    plain.load_state_dict(model.state_dict())
    extend(model)
    with backpack(BatchGrad(), ext):
        extend(nn.CrossEntropyLoss())(model(X), y).backward(retain_graph=True)
    model[1].b.grad = None
    found = got(model)
    want = one_by_one(Fresh(plain), X, y)
    assert_close(found, {k.removeprefix("inner."): v for k, v in want.items()})
    with backpack(ext), pytest.raises(ValueError, match=f"tensor in attribute '{attribute}' of module '1' .*earlier call"):
        extend(nn.CrossEntropyLoss())(model(X), y).backward()
    assert not any(hasattr(p, ext.savefield) for p in model.parameters())


class Fresh(nn.Module):
    """Forgets what the module keeps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        self.inner[1].kept, self.inner[1].cache = None, {}
        return self.inner(x)


# -- what is not used


def forgotten(self: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        return x @ self.w + self.b


UNUSED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "no_grad": forgotten,
    "detach": lambda self, x: (x @ self.w + self.b).detach(),
    "data": lambda self, x: x @ self.w.data + self.b.data,
    "detached parameters": lambda self, x: F.linear(x, self.w.detach(), self.b.detach()),
    "other tensors": lambda self, x: x * 2,
}


@pytest.mark.parametrize("name", UNUSED)
def test_no_parameter_is_used(name: str) -> None:
    X, y = batch()
    model = extend(Net(UNUSED[name]))
    head = extend(nn.Linear(3, 3))
    with backpack(BatchGrad()), pytest.warns(UserWarning, match="Net has parameters that require grad, but its output"):
        F.cross_entropy(head(model(X.requires_grad_())), y).backward()
    assert got(model) == {}
    assert "weight" in got(head)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.cross_entropy(head(model(X)), y).backward()  # outside of blocks this is nobody's business


@pytest.mark.parametrize("ext", [BatchGrad(), DiagGGNExact(), DiagHessian()], ids=lambda e: e.savefield)
def test_nothing_lies_before_the_loss(ext: Any) -> None:
    X, y = batch()
    out = extend(nn.Linear(3, 3))(X).detach().requires_grad_()
    with backpack(ext), pytest.warns(UserWarning, match="no parameter of an extended module lies before CrossEntropyLoss"):
        extend(nn.CrossEntropyLoss())(out, y).backward()


def test_a_gradient_of_the_loss_alone() -> None:
    X, y = batch()
    out = extend(nn.Linear(3, 3))(X)
    with backpack(BatchGrad()):
        torch.autograd.grad(extend(nn.CrossEntropyLoss())(out, y), out)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(3, 4), nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x: Tensor, k: int) -> Tensor:
        return self.heads[k](self.body(x).tanh())


def test_a_parameter_that_is_not_reached_keeps_what_it_has() -> None:
    """As its gradient does: passes through different heads of a model do not undo each other."""
    X, y = batch()
    model, loss_fn = extend(Heads()), extend(nn.CrossEntropyLoss())
    exts = BatchGrad(), DiagGGNExact(), KFLR(), KFRA(), DiagHessian(), HMP(), GGNMP()
    with backpack(*exts):
        for k in (0, 1):
            loss_fn(model(X, k), y).backward()
            for head in model.heads[k + 1 :]:
                assert not any(hasattr(p, ext.savefield) for p in head.parameters() for ext in exts)
    for p in model.parameters():
        unit = torch.eye(p.numel()).reshape(-1, *p.shape)
        assert_close(p.hmp(unit).flatten(1).diag().reshape(p.shape), p.diag_h)
        assert_close(p.ggnmp(unit).flatten(1).diag().reshape(p.shape), p.diag_ggn_exact)
        assert p.diag_h.abs().max() > 0
        assert len(p.kfra) == len(p.kflr)


# -- results are tensors of their own


def shared(self: Net, x: Tensor) -> Tensor:
    return torch.cat([x @ self.w[:, :1] + self.b[:1], x @ self.w[:, 1:] + self.b[1:]], 1) + self.c + self.d + self.b


@pytest.mark.parametrize("rules", [True, False])
def test_results_share_no_memory(rules: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not rules:
        monkeypatch.setattr("curvfunc.engine.observer.RULES", {})
    X, y = batch()
    model = Net(shared)
    model.c, model.d, model.e = (nn.Parameter(torch.randn(3)) for _ in range(3))
    extend(model)
    exts = BatchGrad(), SqrtGGNExact(), DiagGGNExact(), KFLR(), BatchL2Grad()
    run(model, X, y, *exts[1:])
    results = [
        r
        for p in model.parameters()
        for e in exts
        for found in [getattr(p, e.savefield, [])]
        for r in (found if isinstance(found, list) else [found])
    ]
    assert len(results) >= 20
    copies = [r.clone() for r in results]
    for k, r in enumerate(results):
        r.zero_()
        for other, copy in zip(results[k + 1 :], copies[k + 1 :], strict=True):
            assert torch.equal(other, copy)
        assert r.untyped_storage().nbytes() >= r.numel() * r.element_size()


def test_hooks_may_change_results_while_the_pass_goes_on() -> None:
    """They are no part of the gradients that travel on."""
    X, y = batch()
    model, plain = (nn.Sequential(nn.Linear(3, 3), Net(shared)) for _ in range(2))
    for m in (model, plain):
        m[1].c, m[1].d = (nn.Parameter(torch.randn(3)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    F.cross_entropy(plain(X), y).backward()

    def spoil(module: nn.Module) -> None:
        for p in module.parameters(recurse=False):
            if hasattr(p, "grad_batch"):
                p.grad_batch.fill_(float("nan"))

    extend(model)
    with backpack(BatchGrad(), extension_hook=spoil):
        F.cross_entropy(model(X), y).backward()
    assert_close({k: p.grad for k, p in model.named_parameters()}, {k: p.grad for k, p in plain.named_parameters()})
