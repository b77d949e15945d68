"""Modules that are extended and called one by one: chains and branches of them, against BackPACK and against autograd."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import backpack_peer
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch.func import functional_call

import curvfunc
from curvfunc import compat
from curvfunc.compat import extensions

pytestmark = pytest.mark.usefixtures("float64")
N = 5
TENSORS = ["DiagGGNExact", "BatchDiagGGNExact", "SqrtGGNExact", "KFLR", "KFRA", "DiagHessian", "BatchDiagHessian"]
PRODUCTS = ["HMP", "GGNMP"]

# Modules in the order of their calls, and the shape of a sample.
CHAINS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "two layers": (lambda: [nn.Linear(4, 5), nn.Linear(5, 3)], (4,)),
    "sigmoid": (lambda: [nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)], (4,)),
    "relu": (lambda: [nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)], (4,)),
    "two activations": (lambda: [nn.Linear(4, 5), nn.Sigmoid(), nn.Tanh(), nn.Linear(5, 3)], (4,)),
    "activation at the end": (lambda: [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Sigmoid()], (4,)),
    "activation at the start": (lambda: [nn.Sigmoid(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)], (4,)),
    "blocks": (lambda: [nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Sequential(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3))], (4,)),
    "three blocks": (
        lambda: [nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Sequential(nn.Sigmoid(), nn.Linear(5, 4)), nn.Linear(4, 3)],
        (4,),
    ),
    "deep": (
        lambda: [nn.Linear(4, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 4), nn.Sigmoid()), nn.Sequential(nn.Dropout(), nn.Linear(4, 3))],
        (4,),
    ),
    "images": (
        lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.Sequential(nn.Sigmoid(), nn.MaxPool2d(2)), nn.Flatten(), nn.Linear(12, 3)],
        (2, 4, 4),
    ),
    "pool": (
        lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.AvgPool2d(2), nn.Tanh(), nn.Sequential(nn.Flatten(), nn.Linear(12, 3))],
        (2, 4, 4),
    ),
}  # fmt: skip


def chain(name: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    build, shape = CHAINS[name]
    return nn.Sequential(*build()).eval(), torch.randn(N, *shape), torch.arange(N) % 3


def run(library: Any, modules: nn.Sequential, X: Tensor, y: Tensor, ext: Any) -> dict[str, Any]:
    """One backward pass through modules that are called one by one; results of an earlier one are there."""
    for m in modules:
        library.extend(m)
    for p in modules.parameters():
        setattr(p, ext.savefield, "of an earlier pass")
    with warnings.catch_warnings(), library.backpack(ext):
        warnings.simplefilter("ignore")
        h = X
        for m in modules:
            h = m(h)
        library.extend(nn.CrossEntropyLoss())(h, y).backward()
    return {name: getattr(p, ext.savefield, None) for name, p in modules.named_parameters()}


def on_units(function: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    return function(torch.eye(like.numel()).reshape(-1, *like.shape)).detach()


@pytest.mark.parametrize("name", CHAINS)
def test_chains_against_backpack(name: str) -> None:
    backpack = backpack_peer.load()
    for extension in TENSORS + PRODUCTS:
        modules, X, y = chain(name)
        shapes = dict(modules.named_parameters())
        want = run(backpack, modules, X, y, getattr(backpack.extensions, extension)())
        if extension in PRODUCTS:  # its functions work while the modules have what they took
            want = {k: on_units(f, shapes[k]) for k, f in want.items()}
        modules, X, y = chain(name)
        got = run(compat, modules, X, y, getattr(extensions, extension)())
        if extension in PRODUCTS:
            got = {k: on_units(f, shapes[k]) for k, f in got.items()}
        assert_close(got, want, rtol=1e-9)


@pytest.mark.parametrize("extension", [*TENSORS, *PRODUCTS, "PCHMP"])
def test_where_a_model_is_cut_makes_no_difference(extension: str) -> None:
    """Cut into any parts that are called one by one, and as a whole."""
    layers = [nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)]
    torch.manual_seed(0)
    X, y = torch.randn(N, 4), torch.arange(N) % 3
    found = []
    for cuts in itertools.product([False, True], repeat=4):
        parts: list[list[nn.Module]] = [[layers[0]]]
        for layer, cut in zip(layers[1:], cuts, strict=True):
            if cut:
                parts.append([])
            parts[-1].append(layer)
        modules = nn.Sequential(*[nn.Sequential(*part) if len(part) > 1 else part[0] for part in parts])
        results = run(compat, modules, X, y, getattr(extensions, extension)())
        values = [results[k] if not callable(results[k]) else on_units(results[k], p) for k, p in modules.named_parameters()]
        found.append(values)
        for m in modules.modules():
            m.__dict__.pop("forward", None)
    for values in found[1:]:
        assert_close(values, found[0], rtol=1e-9)


# -- branches, and functions between modules; against the functions, which know nothing of modules


class Branching(nn.Module):
    """Parts that are called one by one, with plain Python between them."""

    def __init__(self, between: Callable[["Branching", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.act = nn.Tanh()
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, x)


def skip(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.d(h + m.c(m.act(m.b(h))))


def parallel(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.a(x))
    return m.d(m.b(h).sigmoid() + m.act(m.c(h)) * 2)


def product(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.d(m.b(h) * m.c(h).tanh())


def twice(m: Any, x: Tensor) -> Tensor:
    return m.d(m.c(m.b(m.act(m.b(m.a(x)))).exp()))


def normed(m: Any, x: Tensor) -> Tensor:
    return m.d(F.layer_norm(m.c(F.softmax(m.b(m.a(x)), 1)), (5,)))


def squashed(m: Any, x: Tensor) -> Tensor:
    return (m.d(m.c(m.b(m.a(x)).square().clone().add_(1)).view(-1, 5, 1).squeeze(2))).tanh()


def reshaped(m: Any, x: Tensor) -> Tensor:
    h = m.b(m.a(x)).view(1, -1, 5).tanh() + 1  # the samples on another axis
    return m.d(m.c(h.view(-1).view(-1, 5)))


BRANCHES = {f.__name__: f for f in (skip, parallel, product, twice, normed, squashed, reshaped)}
FUNCTIONS: dict[str, Any] = {
    "DiagGGNExact": curvfunc.diag_ggn,
    "BatchDiagGGNExact": curvfunc.batch_diag_ggn,
    "SqrtGGNExact": curvfunc.sqrt_ggn,
    "KFLR": curvfunc.kflr,
    "DiagHessian": curvfunc.diag_hessian,
    "BatchDiagHessian": curvfunc.batch_diag_hessian,
    "HMP": curvfunc.hmp,
    "GGNMP": curvfunc.ggnmp,
}


def branching(name: str) -> tuple[Branching, Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    model = Branching(BRANCHES[name])
    params = {k: p.detach() for k, p in model.named_parameters()}
    for m in model.children():
        compat.extend(m)
    return model, torch.randn(N, 4), torch.arange(N) % 3, params


@pytest.mark.parametrize("extension", FUNCTIONS)
@pytest.mark.parametrize("name", BRANCHES)
def test_branches(name: str, extension: str) -> None:
    model, X, y, params = branching(name)
    want = FUNCTIONS[extension](lambda p, x: functional_call(model, p, x), params, X, y)
    ext = getattr(extensions, extension)()
    for p in model.parameters():
        setattr(p, ext.savefield, "of an earlier pass")
    loss = compat.extend(nn.CrossEntropyLoss())(model(X), y)
    with compat.backpack(ext):
        if name == "twice" and extension in ("DiagHessian", "BatchDiagHessian"):  # a layer on its own output needs a second run
            with pytest.raises(NotImplementedError, match="whole model as one extended module"):
                loss.backward()
            assert not any(hasattr(p, ext.savefield) for p in model.parameters())
            return
        loss.backward()
    got = {k: getattr(p, ext.savefield) for k, p in model.named_parameters()}
    if extension in PRODUCTS:
        got, want = ({k: on_units(r[k], params[k]) for k in params} for r in (got, want))
    if extension == "KFLR":
        want = {k: list(v) for k, v in want.items()}
    assert_close(got, want, rtol=1e-9)


MIXTURES: dict[str, Callable[[Tensor], Tensor]] = {
    "broadcast": lambda h: h + h.view(1, N),
    "through views": lambda h: (h.view(N, 1, 1) * h.view(-1).view(1, 1, N)).view(N, N),
    "maximum": lambda h: torch.maximum(h, h.view(1, N).clone()),
}


@pytest.mark.parametrize("end", [False, True], ids=["between", "before the loss"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_elementwise_functions_that_mix_samples_by_their_shapes(mixture: str, end: bool) -> None:
    """Each operation is elementwise or a view, and none of them is seen; sizes tell where samples meet."""
    torch.manual_seed(0)
    a, b = nn.Linear(4, 1), nn.Linear(N, 3)
    X, y = torch.randn(N, 4), torch.arange(N) % 3
    extended = compat.extend(a), compat.extend(b), compat.extend(nn.CrossEntropyLoss())
    out = MIXTURES[mixture](extended[0](X))
    with compat.backpack(extensions.DiagGGNExact()), pytest.raises(ValueError, match="samples of the batch are mixed"):
        extended[2](out if end else extended[1](out), y).backward()
    assert not any(hasattr(p, "diag_ggn_exact") for p in a.parameters())


def test_views_that_lead_back_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the table knows is not tried by another backward pass."""
    from curvfunc.compat import upstream

    pulled: list[int] = []
    pull = upstream.pull
    monkeypatch.setattr(upstream, "pull", lambda t, columns, **kw: (pulled.append(1), pull(t, columns, **kw))[1])
    torch.manual_seed(0)
    a, b = compat.extend(nn.Conv2d(1, 2, 3)), compat.extend(nn.Linear(8, 3))
    X, y = torch.randn(N, 1, 6, 6), torch.arange(N) % 3
    with compat.backpack(extensions.DiagGGNExact()):
        h = F.max_pool2d(a(X).relu(), 2).view(1, N, -1).squeeze(0)
        compat.extend(nn.CrossEntropyLoss())(b(h), y).backward()
    assert pulled == [1]


def test_kfra_refuses_branches_and_leaves_nothing() -> None:
    for name in ("skip", "parallel", "product"):
        model, X, y, _ = branching(name)
        for p in model.parameters():
            p.kfra = "of an earlier pass"
        with compat.backpack(extensions.KFRA()), pytest.raises(NotImplementedError, match=r"Use kflr or kfac"):
            compat.extend(nn.CrossEntropyLoss())(model(X), y).backward()
        assert not any(hasattr(p, "kfra") for p in model.parameters())


@pytest.mark.parametrize("between", ["tanh", "by data"])
def test_kfra_with_functions_between_modules(between: str) -> None:
    """Products with what depends on samples look like layers; nothing was recorded that would tell them apart."""
    torch.manual_seed(0)
    a, b = nn.Linear(4, 5), nn.Linear(5, 3)
    X, y = torch.randn(N, 4), torch.arange(N) % 3
    both = {"tanh": torch.tanh, "by data": lambda h: torch.bmm(X[:, :1, None] * torch.eye(5), h[:, :, None])[:, :, 0]}[between]
    whole = nn.ModuleList([a, b])
    model_fn = lambda p, x: F.linear(both(F.linear(x, p["0.weight"], p["0.bias"])), p["1.weight"], p["1.bias"])
    for m in (a, b):
        compat.extend(m)
    with compat.backpack(extensions.KFRA()):
        loss = compat.extend(nn.CrossEntropyLoss())(b(both(a(X))), y)
        if between == "by data":
            with pytest.raises(NotImplementedError, match="kfra has no rule"):
                loss.backward()
            assert not any(hasattr(p, "kfra") for p in whole.parameters())
            return
        loss.backward()
    want = curvfunc.kfra(model_fn, {k: p.detach() for k, p in whole.named_parameters()}, X, y)
    assert_close({k: tuple(p.kfra) for k, p in whole.named_parameters()}, want)


class NoRule(nn.Module):
    """Has to run a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(5, 5), nn.Parameter(torch.rand(5) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.atan2(self.layer(x), self.scale)


@pytest.mark.parametrize("extension", ["KFRA", "DiagHessian", "BatchDiagHessian"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_cannot_be_delivered_leaves_nothing(place: int, extension: str) -> None:
    """A chain with a part for which the functions would have to run, on a model that nobody has as a whole."""
    torch.manual_seed(0)
    modules: list[nn.Module] = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)]
    modules.insert(place, NoRule())
    if place == 0:
        modules[0] = nn.Sequential(nn.Linear(4, 5), NoRule(), nn.Linear(5, 4))
    if place == 2:
        modules[3], modules[2] = nn.Sequential(NoRule(), nn.Linear(5, 3)), nn.Linear(5, 5)
    ext = getattr(extensions, extension)()
    chained = nn.Sequential(*modules)
    with pytest.raises(NotImplementedError, match=f"{extension} needs the whole model as one extended module"):
        run(compat, chained, torch.randn(N, 4), torch.arange(N) % 3, ext)
    assert not any(hasattr(p, ext.savefield) for p in chained.parameters())


@pytest.mark.parametrize("extension", ["DiagHessian", "KFRA"])
def test_chains_under_create_graph(extension: str) -> None:
    """Results can be differentiated, as those of one module."""
    modules, X, y = chain("two activations")
    params = list(modules.parameters())
    for m in modules:
        compat.extend(m)
    with warnings.catch_warnings(), compat.backpack(getattr(extensions, extension)()):
        warnings.simplefilter("ignore")  # torch says that parameters and gradients with a graph refer to each other
        compat.extend(nn.CrossEntropyLoss())(modules[3](modules[2](modules[1](modules[0](X)))), y).backward(create_graph=True)
    field = getattr(extensions, extension)().savefield
    results = [r for p in params for r in (getattr(p, field) if extension == "KFRA" else [getattr(p, field)])]
    found = torch.autograd.grad(sum(r.square().sum() for r in results), params, allow_unused=True)
    for p in params:
        p.grad = None
    model_fn, tensors = curvfunc.functionalize(nn.Sequential(*chain("two activations")[0]))
    function = curvfunc.kfra if extension == "KFRA" else curvfunc.diag_hessian

    def penalty(values: dict[str, Tensor]) -> Tensor:
        leaves = [r for v in function(model_fn, values, X, y).values() for r in (v if extension == "KFRA" else [v])]
        return sum(r.square().sum() for r in leaves)

    want = torch.func.grad(penalty)(tensors)
    got = {k: torch.zeros_like(p) if g is None else g for k, p, g in zip(tensors, params, found, strict=True)}
    assert_close(got, want, rtol=1e-8)
