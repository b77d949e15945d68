"""The specification against pen and paper, loops over samples with autograd, and dense Hessians."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvfunc
from curvfunc import reference
from curvfunc.reference.layers import _conv_inputs, layers

pytestmark = pytest.mark.usefixtures("float64")

N, C = 4, 3


def functional(module: nn.Module) -> tuple[Callable[[Any, Any], Tensor], dict[str, Tensor]]:
    """The module as a function of its parameters, without the package's own means."""
    params = {name: p.detach() for name, p in module.named_parameters()}
    return lambda params, X: functional_call(module, params, (X,)), params


class Tied(nn.Module):
    """One weight at two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(5, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(x).relu()))


class Sequence(nn.Module):
    """Linear layers on shared positions, outputs averaged over time."""

    def __init__(self, time_first: bool = False) -> None:
        super().__init__()
        self.time_first, self.inner, self.head = time_first, nn.Linear(2, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        if not self.time_first:
            return self.head(self.inner(x).relu().mean(1))
        return self.head(self.inner(x.transpose(0, 1)).relu().mean(0))


class Odd(nn.Module):
    """A weight used outside of layers, a scale, and a parameter that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.weight, self.unused = (nn.Parameter(torch.randn(s)) for s in [(5,), (5, C), (2, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).relu() @ self.weight


# Around almost every point linear in each parameter by itself: the blocks of the GGN are those of the Hessian.
PIECEWISE_LINEAR: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, C), (5,)),
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, C)), (5,)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(9, C)), (2, 6)),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2, padding=1, groups=2), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, C)
        ),
        (2, 4, 3),
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, (1, 2, 1)), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, C)),
        (1, 2, 2, 2),
    ),
    "sequence": (Sequence, (6, 2)),
    "sequence, time first": (lambda: Sequence(time_first=True), (N, 2)),
}
SMOOTH: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tanh": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, C)), (5,)),
    "tied": (Tied, (5,)),
    "odd": (Odd, (5,)),
    "norms": (lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Linear(4, C)), (5,)),
    "attention": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), nn.Flatten(), nn.Linear(12, C)),
        (3, 4),
    ),
}
LOSSES: dict[str, tuple[Callable[[Tensor, Any], Tensor], Callable[[], Tensor]]] = {
    "cross-entropy": (F.cross_entropy, lambda: torch.randint(C, (N,))),
    "weighted cross-entropy": (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)),
        lambda: torch.tensor([0, 1, 2, 1]),
    ),
    "squared error": (nn.MSELoss(reduction="sum"), lambda: torch.randn(N, C)),
    "binary cross-entropy": (F.binary_cross_entropy_with_logits, lambda: torch.rand(N, C)),
    "Poisson": (lambda out, y: (out.exp() - y * out).sum() / 7, lambda: torch.rand(N, C)),
}


def problem(models: dict, model: str, loss: str) -> tuple[Any, dict[str, Tensor], Tensor, Tensor, Any]:
    make, shape = models[model]
    loss_fn, targets = LOSSES[loss]
    return *functional(make()), torch.randn(N, *shape), targets(), loss_fn


def term(loss_fn: Any, outs: Tensor, y: Tensor, n: int) -> Callable[[Tensor], Tensor]:
    """Sample n's term of the loss as a function of its output: the loss, everything else held fixed."""
    return lambda f: loss_fn(torch.cat([outs[:n].detach(), f, outs[n + 1 :].detach()]), y)


def hessian_blocks(model_fn: Any, params: dict[str, Tensor], X: Tensor, objective: Any) -> dict[str, Tensor]:
    """Diagonal block [P, P] of the Hessian of the objective for each parameter."""
    full = hessian(lambda params: objective(model_fn(params, X)))(params)
    return {name: full[name][name].reshape(p.numel(), p.numel()) for name, p in params.items()}


def kron(B: Tensor, A: Tensor) -> Tensor:
    """The Kronecker product: block (o, p) is B[o, p] A."""
    return torch.einsum("op,kl->okpl", B, A).reshape(len(B) * len(A), -1)


# --- the list ---------------------------------------------------------------------------------------------------------

# What is public, in lower case, and no quantity.
NO_QUANTITIES = {
    "accumulate", "accumulation", "check", "check_rule", "compute", "diagnostics", "eigsh", "empty_cache", "explain", "fisher_operator",
    "functionalize", "ggn_operator", "hessian_operator", "hutchinson_diag", "hutchinson_trace", "hutchpp_trace", "influence", "kronecker",
    "laplace", "merge", "operation", "optim", "private", "reference", "rule", "spectral_density", "xdiag",
}  # fmt: skip
PUBLIC = sorted(name for name in curvfunc.__all__ if name.islower() and name not in NO_QUANTITIES)


def parameters(function: Callable[..., Any]) -> inspect.Signature:
    """Names, kinds and defaults, without types, and without where results are put; whatever the order of keywords."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values() if p.name != "out"]
    return inspect.Signature(bare)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_quantity_is_specified_with_its_signature(name: str) -> None:
    assert name in reference.__all__, f"{name} has no definition in curvfunc.reference; if it is none, list it above"
    definition = getattr(reference, name)
    assert parameters(definition) == parameters(getattr(curvfunc, name))
    assert "``" in (definition.__doc__ or ""), "its docstring has no formula"


def test_nothing_else_is_specified() -> None:
    assert sorted(reference.__all__) == PUBLIC
    assert set(curvfunc.__all__) >= NO_QUANTITIES


# The quantities that are pytrees of tensors like the parameters, each of its own parameter alone.
TREES = [
    name
    for name in reference.__all__
    if {"y", "v"} & set(inspect.signature(getattr(reference, name)).parameters) == {"y"}
    and not name.endswith(("_total", "_gram", "mp"))
    and name != "clipped_grad"  # by the norm over all parameters
]


# --- first order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", [*PIECEWISE_LINEAR, *SMOOTH])
def test_first_order_against_a_loop_over_samples(model: str, loss: str) -> None:
    model_fn, params, X, y, loss_fn = problem(PIECEWISE_LINEAR | SMOOTH, model, loss)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    outs = model_fn(leaves, X)
    rows = []
    for n in range(N):
        objective = term(loss_fn, outs, y, n)(model_fn(leaves, X[n : n + 1]))
        rows.append(torch.autograd.grad(objective, list(leaves.values()), materialize_grads=True, allow_unused=True))
    grads = {name: torch.stack(g) for name, g in zip(leaves, zip(*rows, strict=True), strict=True)}
    total = torch.autograd.grad(loss_fn(outs, y), list(leaves.values()), materialize_grads=True, allow_unused=True)
    mean = {name: g / N for name, g in zip(leaves, total, strict=True)}

    arguments = (model_fn, params, X, y)
    assert_close(reference.batch_grad(*arguments, loss_fn=loss_fn), grads)
    assert_close(
        reference.batch_l2(*arguments, loss_fn=loss_fn),
        {name: torch.stack([row.square().sum() for row in g]) for name, g in grads.items()},
    )
    assert_close(
        reference.sum_grad_squared(*arguments, loss_fn=loss_fn),
        {name: sum(row**2 for row in g) for name, g in grads.items()},
    )
    assert_close(
        reference.variance(*arguments, loss_fn=loss_fn),
        {name: sum((row - mean[name]) ** 2 for row in g) / N for name, g in grads.items()},
    )


def test_least_squares_by_hand() -> None:
    model_fn, params = functional(nn.Linear(5, C))
    X, y = torch.randn(N, 5), torch.randn(N, C)
    R = 1 / (N * C)  # F.mse_loss averages over samples and outputs: l_n = |f_n - y_n|^2, Hessian 2
    residual = 2 * R * (X @ params["weight"].T + params["bias"] - y)
    arguments = {"model_fn": model_fn, "params": params, "X": X, "y": y, "loss_fn": F.mse_loss}
    want = {"weight": residual[:, :, None] * X[:, None, :], "bias": residual}
    assert_close(reference.batch_grad(**arguments), want)
    want = {"weight": (residual**2).sum(1) * (X**2).sum(1), "bias": (residual**2).sum(1)}
    assert_close(reference.batch_l2(**arguments), want)
    ones = torch.ones(C)
    want = {"weight": 2 * R * torch.outer(ones, (X**2).sum(0)), "bias": 2 * R * N * ones}
    assert_close(reference.diag_ggn(**arguments), want)
    curvature = 2 * R * N * torch.eye(C)
    assert_close(reference.kflr(**arguments), {"weight": (curvature, X.T @ X / N), "bias": (curvature,)})


def test_logistic_regression_by_hand() -> None:
    model_fn, params = functional(nn.Linear(5, C))
    X, y = torch.randn(N, 5), torch.randint(C, (N,))
    p = model_fn(params, X).softmax(1)
    want = {
        "weight": (p * (1 - p) / N)[:, :, None] * (X**2)[:, None, :],
        "bias": p * (1 - p) / N,
    }
    assert_close(reference.batch_diag_ggn(model_fn, params, X, y), want)
    root = reference.sqrt_ggn(model_fn, params, X, y)["bias"]
    assert_close(torch.einsum("vnp,vnq->npq", root, root), (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / N)


# --- generalized Gauss-Newton -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", PIECEWISE_LINEAR)
def test_ggn_is_the_hessian_of_piecewise_linear_nets(model: str, loss: str) -> None:
    model_fn, params, X, y, loss_fn = problem(PIECEWISE_LINEAR, model, loss)
    blocks = hessian_blocks(model_fn, params, X, lambda out: loss_fn(out, y))
    shapes = {name: p.shape for name, p in params.items()}
    diagonal = {name: block.diag().reshape(shapes[name]) for name, block in blocks.items()}
    assert_close(reference.diag_ggn(model_fn, params, X, y, loss_fn=loss_fn), diagonal)
    roots = reference.sqrt_ggn(model_fn, params, X, y, loss_fn=loss_fn)
    assert_close({name: torch.einsum("vnp,vnq->pq", r.flatten(2), r.flatten(2)) for name, r in roots.items()}, blocks)

    outs = model_fn(params, X)
    per_sample = reference.batch_diag_ggn(model_fn, params, X, y, loss_fn=loss_fn)
    for n in range(N):
        blocks = hessian_blocks(model_fn, params, X[n : n + 1], term(loss_fn, outs, y, n))
        want = {name: block.diag().reshape(shapes[name]) for name, block in blocks.items()}
        assert_close({name: d[n] for name, d in per_sample.items()}, want)


@pytest.mark.parametrize("model", SMOOTH)
def test_ggn_is_the_hessian_with_the_model_linearized(model: str) -> None:
    model_fn, params, X, y, loss_fn = problem(SMOOTH, model, "cross-entropy")

    def linearized(moved: dict[str, Tensor], X: Tensor) -> Tensor:
        step = {name: moved[name] - p for name, p in params.items()}
        out, change = torch.func.jvp(lambda p: model_fn(p, X), (params,), (step,))
        return out + change

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
        blocks = hessian_blocks(linearized, params, X, lambda out: loss_fn(out, y))
    want = {name: block.diag().reshape(params[name].shape) for name, block in blocks.items()}
    assert_close(reference.diag_ggn(model_fn, params, X, y), want)


@pytest.mark.parametrize("loss", ["cross-entropy", "squared error", "binary cross-entropy", "Poisson"])
def test_monte_carlo_curvature_is_right_in_expectation(loss: str) -> None:
    model_fn, params, X, y, loss_fn = problem(SMOOTH, "tanh", loss)
    generator = torch.Generator().manual_seed(0)
    sampled = reference.diag_ggn(model_fn, params, X, y, loss_fn=loss_fn, mc_samples=100_000, generator=generator)
    assert_close(sampled, reference.diag_ggn(model_fn, params, X, y, loss_fn=loss_fn), rtol=0.01)  # ~ 1 / sqrt(samples)


def test_monte_carlo_quantities_agree_on_one_draw() -> None:
    model_fn, params, X, y, _ = problem(SMOOTH, "tanh", "cross-entropy")

    def sampled(quantity: Callable[..., Any]) -> Any:
        generator = torch.Generator().manual_seed(0)
        return quantity(model_fn, params, X, y, mc_samples=2, generator=generator)

    roots = sampled(reference.sqrt_ggn)
    assert {r.shape[0] for r in roots.values()} == {2}
    assert_close(sampled(reference.batch_diag_ggn), {name: r.square().sum(0) for name, r in roots.items()})
    assert_close(sampled(reference.diag_ggn), {name: r.square().sum((0, 1)) for name, r in roots.items()})
    blocks = {name: torch.einsum("vnp,vnq->pq", r, r) for name, r in roots.items() if r.ndim == 3}
    assert_close({name: sampled(reference.kfac)[name][0] for name in blocks}, blocks)


# --- Kronecker factors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_kflr_is_exact_for_one_sample(loss: str) -> None:
    loss_fn, targets = LOSSES[loss]
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 4), nn.Flatten(), nn.Linear(2, C))
    model_fn, params = functional(net)
    X, y = torch.randn(1, 5), targets()[:1]
    blocks = hessian_blocks(model_fn, params, X, lambda out: loss_fn(out, y))
    factors = reference.kflr(model_fn, params, X, y, loss_fn=loss_fn)
    assert [len(factors[name]) for name in params] == [2, 1, 2, 1, 2, 1]
    assert_close({name: kron(*f) if len(f) == 2 else f[0] for name, f in factors.items()}, blocks)


def test_kflr_of_groups_is_exact_where_groups_see_the_same() -> None:
    model_fn, params = functional(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, C)))
    X, y = torch.randn(1, 2, 3).repeat(1, 2, 1), torch.tensor([1])
    want = hessian_blocks(model_fn, params, X, lambda out: F.cross_entropy(out, y))["0.weight"]
    assert_close(kron(*reference.kflr(model_fn, params, X, y)["0.weight"]), want)


@pytest.mark.parametrize("model", [*PIECEWISE_LINEAR, "odd"])
def test_what_has_no_kronecker_structure_gets_its_exact_block(model: str) -> None:
    model_fn, params, X, y, loss_fn = problem(PIECEWISE_LINEAR | SMOOTH, model, "cross-entropy")
    blocks = hessian_blocks(model_fn, params, X, lambda out: loss_fn(out, y))
    factors = reference.kflr(model_fn, params, X, y)
    single = {name: f[0] for name, f in factors.items() if len(f) == 1}
    assert set(single) == {name for name, p in params.items() if p.ndim == 1} | (set(params) if model == "odd" else set())
    assert_close(single, {name: blocks[name] for name in single})


def test_conventions_for_shared_positions() -> None:
    """Linear layers: every position is a sample of its own. Convolutions: cotangents add up over positions first."""
    X, y = torch.randn(N, 2, 6), torch.randint(C, (N,))
    conv = nn.Sequential(nn.Conv1d(2, 3, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(9, C))
    model_fn, params = functional(conv)
    patches = X.unflatten(2, (3, 2)).movedim(2, 1).flatten(2)  # [n, s, (c kernel)]: the windows do not overlap
    z = F.conv1d(X, params["0.weight"], params["0.bias"], stride=2).requires_grad_()
    out = F.linear(z.relu().flatten(1), params["3.weight"], params["3.bias"])
    p = out.softmax(1)
    H = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / N
    D = torch.stack([torch.autograd.grad(out[:, c].sum(), z, retain_graph=True)[0] for c in range(C)]).mT  # [c, n, s, o]

    A = sum(x.T @ x for x in patches) / N
    total = D.sum(2)
    B = torch.einsum("cno,ncd,dnp->op", total, H, total)
    assert_close(reference.kflr(model_fn, params, X, y)["0.weight"], (B, A))

    as_linear = {**params, "0.weight": params["0.weight"].flatten(1)}

    def linear_fn(params: dict[str, Tensor], X: Tensor) -> Tensor:
        z = F.linear(X, params["0.weight"], params["0.bias"])
        return F.linear(z.relu().mT.flatten(1), params["3.weight"], params["3.bias"])

    B = torch.einsum("cnso,ncd,dnsp->op", D, H, D)
    assert_close(reference.kflr(linear_fn, as_linear, patches, y)["0.weight"], (B, A / 3))


def test_calls_of_one_weight_are_positions() -> None:
    twice, params = functional(Tied())
    X, y = torch.randn(N, 5), torch.randint(C, (N,))
    once = {"first": params["shared.weight"], "second": params["shared.weight"]}

    def untied(weights: dict[str, Tensor], X: Tensor) -> Tensor:
        z = F.linear(F.linear(X, weights["first"], params["shared.bias"]).relu(), weights["second"], params["shared.bias"])
        return F.linear(z, params["head.weight"], params["head.bias"])

    factors = reference.kflr(untied, once, X, y)
    want = tuple((a + b) / scale for a, b, scale in zip(factors["first"], factors["second"], (1, 2), strict=True))
    assert_close(reference.kflr(twice, params, X, y)["shared.weight"], want)


def test_a_weight_with_another_use_is_no_layer() -> None:
    X, y = torch.randn(N, 5), torch.randint(C, (N,))
    params = {"weight": torch.randn(C, 5)}

    def penalized(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return F.linear(X, params["weight"]) + params["weight"].sum(1)

    want = hessian_blocks(penalized, params, X, lambda out: F.cross_entropy(out, y))
    assert_close(reference.kflr(penalized, params, X, y), {"weight": (want["weight"],)})


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_patches_make_convolution_a_matrix_product(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(dims))

    groups, kernel, dilation = data.draw(st.integers(1, 2)), per_axis(1, 3), per_axis(1, 2)
    padding = data.draw(st.sampled_from(["same", "valid", None])) or per_axis(0, 2)
    stride: Any = 1 if padding == "same" else data.draw(st.sampled_from([2, per_axis(1, 3)]))
    size = [d * (k - 1) + data.draw(st.integers(1, 4)) for d, k in zip(dilation, kernel, strict=True)]
    x, weight = torch.randn(2, 2 * groups, *size), torch.randn(3 * groups, 2, *kernel)
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    patches = _conv_inputs(x, weight, None, stride, padding, dilation, groups)
    got = torch.einsum("gsk,gok->sgo", patches, weight.reshape(groups, 3, -1)).flatten(1)
    assert_close(got, conv(x, weight, None, stride, padding, dilation, groups).movedim(1, -1).flatten(0, -2), rtol=1e-12)


def test_in_place_activations_do_not_disturb_the_layers() -> None:
    x = torch.randn(1, 5)
    for inplace in (False, True):
        torch.manual_seed(1)
        model_fn, params = functional(nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace), nn.Linear(4, C)))
        layer = layers(model_fn, params, x)[sorted(params).index("0.weight")]  # leaves of a dict are sorted
        assert layer is not None
        assert_close(layer.x, x[None])
        active = (F.linear(x, params["0.weight"], params["0.bias"]) > 0).double()
        assert_close(layer.D, (params["2.weight"] * active)[:, None, :])


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("picked", [[2], [3, 0], [1, 1, 2], torch.tensor([-1, 0])], ids=str)
def test_subsampling(picked: Any) -> None:
    model_fn, params, X, y, _ = problem(PIECEWISE_LINEAR, "conv1d", "cross-entropy")
    full = {name: getattr(reference, name)(model_fn, params, X, y) for name in ("batch_grad", "batch_l2", "batch_diag_ggn")}
    some = {name: getattr(reference, name)(model_fn, params, X, y, subsampling=picked) for name in full}
    assert_close(some, {q: {name: t[picked] for name, t in result.items()} for q, result in full.items()})
    g, d = some["batch_grad"], some["batch_diag_ggn"]
    want = {
        "sum_grad_squared": {name: (t**2).sum(0) for name, t in g.items()},
        "variance": {name: t.var(0, correction=0) for name, t in g.items()},
        "diag_ggn": {name: t.sum(0) for name, t in d.items()},
        "sqrt_ggn": {name: t[:, picked] for name, t in reference.sqrt_ggn(model_fn, params, X, y).items()},
    }
    assert_close({q: getattr(reference, q)(model_fn, params, X, y, subsampling=picked) for q in want}, want)
    # R stays that of the full batch, so the factors are those of the summed loss over the picked samples, with 1 / N
    alone = reference.kflr(model_fn, params, X[picked], y[picked], loss_fn=nn.CrossEntropyLoss(reduction="sum"))
    factors = reference.kflr(model_fn, params, X, y, subsampling=picked)
    assert_close(factors, {name: (f[0] / N, *f[1:]) for name, f in alone.items()})


def test_trees_of_parameters_inputs_and_targets() -> None:
    params = {"outer": [torch.randn(C, 5), (torch.randn(C),)], "scale": torch.randn(())}
    X, y = {"left": torch.randn(N, 5), "right": (torch.randn(N, 5),)}, {"target": torch.randn(N, C)}

    def tree_fn(params: Any, X: Any) -> Tensor:
        weight, (bias,) = params["outer"]
        return params["scale"] * F.linear(X["left"] * X["right"][0], weight, bias)

    flat = {"weight": params["outer"][0], "bias": params["outer"][1][0], "scale": params["scale"]}

    def flat_fn(params: Any, X: Tensor) -> Tensor:
        return params["scale"] * F.linear(X, params["weight"], params["bias"])

    for name in TREES:
        quantity = getattr(reference, name)
        exact = {"mc_samples": 0} if name == "kfac" else {}
        # the terms of a mean that nobody knows are its samples, those of the squared error its entries
        mse = partial(F.mse_loss, reduction="sum" if name == "kfac_empirical" else "mean")
        want = quantity(flat_fn, flat, X["left"] * X["right"][0], y["target"], loss_fn=mse, **exact)
        got = quantity(tree_fn, params, X, y, loss_fn=lambda out, y: mse(out, y["target"]), **exact)  # noqa: B023
        if name == "sqrt_ggn":  # the columns of another loss are rotated: compare what they are a root of
            want, got = ({**r, "outer": None, "scale": r["scale"].square().sum(0)} for r in (want, got))
            assert_close(got["scale"], want["scale"])
            continue
        assert_close(got, {"outer": [want["weight"], (want["bias"],)], "scale": want["scale"]})


def test_chunk_size_has_no_effect() -> None:
    model_fn, params, X, y, _ = problem(SMOOTH, "tanh", "cross-entropy")
    for name in set(TREES) - {"kfac"}:
        quantity = getattr(reference, name)
        assert_close(quantity(model_fn, params, X, y, chunk_size=1), quantity(model_fn, params, X, y), rtol=0.0)


@pytest.mark.parametrize("name", TREES)
def test_outputs_without_and_with_further_axes(name: str) -> None:
    """Two outputs of one entry each, [N], side by side as [N, 1, 2]; the loss is a sum over all entries."""
    rows, X, y = torch.randn(2, 5), torch.randn(N, 5), torch.rand(N, 2)
    arguments: dict[str, Any] = {"loss_fn": nn.BCEWithLogitsLoss(reduction="sum")}
    if name == "kfac":
        arguments["mc_samples"] = 0
    quantity = getattr(reference, name)
    alone = [quantity(lambda p, x: x @ p, rows[i], X, y[:, i], **arguments) for i in range(2)]
    params = {"a": rows[0], "b": rows[1]}
    both = quantity(lambda p, x: torch.stack([x @ p["a"], x @ p["b"]], -1)[:, None], params, X, y[:, None], **arguments)
    if name == "sqrt_ggn":  # a column for each of the two outputs, of which a parameter reaches one
        both = {"a": both["a"][:1], "b": both["b"][1:]}
    assert_close(both, {"a": alone[0], "b": alone[1]})
