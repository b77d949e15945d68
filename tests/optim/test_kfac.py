"""`scale_by_kfac` and `scale_by_ekfac` against dense matrices, block by block."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc import KFLR, KFRA, DiagGGN, EmpiricalKFAC, Grad, compute, kronecker, optim

pytestmark = pytest.mark.usefixtures("float64")
Dense = dict[tuple[str, ...], Tensor]


def problem(N: int = 7) -> Any:
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 3))
    model_fn, params = curvfunc.functionalize(net)
    batches = [(torch.randn(N, 2, 3, 3), torch.arange(N) % 3) for _ in range(6)]
    return model_fn, params, batches, kronecker.structure(model_fn, params, batches[0][0])


def vector(grad: Any, names: tuple[str, ...]) -> Tensor:
    """A block's gradient in the order of kron(B, A): [weight | bias] row by row, or a parameter's own."""
    weight = grad[names[0]]
    return weight.flatten() if len(names) == 1 else torch.cat([weight.flatten(1), grad[names[1]][:, None]], 1).flatten()


def params_of(u: Tensor, names: tuple[str, ...], grad: Any) -> dict[str, Tensor]:
    if len(names) == 1:
        return {names[0]: u.reshape_as(grad[names[0]])}
    M = u.reshape(len(grad[names[1]]), -1)
    return {names[0]: M[:, :-1].reshape_as(grad[names[0]]), names[1]: M[:, -1]}


def blocks(joined: bool) -> list[tuple[str, ...]]:
    if not joined:
        return [("0.weight",), ("0.bias",), ("3.weight",), ("3.bias",), ("5.weight",), ("5.bias",)]
    return [("0.weight", "0.bias"), ("3.weight",), ("3.bias",), ("5.weight", "5.bias")]


def damped(factors: Any, damping: float, split: str) -> Tensor:
    if len(factors) == 1:
        return factors[0] + damping * torch.eye(len(factors[0]))
    B, A = factors
    one, two = torch.eye(len(B)), torch.eye(len(A))
    if split == "exact":
        return torch.kron(B, A) + damping * torch.kron(one, two)
    pi = math.sqrt((B.trace() / len(B)) / (A.trace() / len(A)))
    return torch.kron(B + pi * math.sqrt(damping) * one, A + math.sqrt(damping) / pi * two)


def averaged(seen: list[Any], decay: float) -> Any:
    """Martens and Grosse's averages: at the k-th, the weight of what is new is max(1/k, 1 - decay)."""
    found = seen[0]
    for k, new in enumerate(seen[1:], 2):
        w = max(1 / k, 1 - decay)
        found = {n: tuple((1 - w) * a + w * b for a, b in zip(found[n], new[n], strict=True)) for n in found}
    return found


@pytest.mark.parametrize("split", ["pi", "exact"])
@pytest.mark.parametrize("spec", [KFLR(joined=True), KFLR(), EmpiricalKFAC(joined=True)], ids=repr)
@pytest.mark.parametrize("every", [(1, 1), (2, 4)], ids=str)
def test_kfac_is_the_dense_solve(split: str, spec: Any, every: tuple[int, int]) -> None:
    model_fn, params, batches, structure = problem()
    options: Any = {"damping": 0.02, "decay": 0.7, "factors_every": every[0], "inverses_every": every[1]}
    method = optim.chain(optim.scale_by_kfac(structure, spec, split=split, **options), optim.scale(-0.1))
    got, want, state = params, params, method.init(params)
    seen: list[Any] = []
    for t, (X, y) in enumerate(batches):
        loss, got, state = optim.step(model_fn, method, got, state, X, y)
        assert_close(loss, F.cross_entropy(model_fn(want, X), y))
        grad, factors = compute(model_fn, want, X, y, (Grad(), spec))
        if t % every[0] == 0:
            seen.append(factors)
        if t % every[1] == 0:
            mean = averaged(seen, 0.7)
            matrices = {b: damped(mean[b[0]], 0.02, split) for b in blocks(spec.joined)}
        for names, K in matrices.items():
            u = params_of(torch.linalg.solve(K, vector(grad, names)), names, grad)
            want = want | {n: want[n] - 0.1 * u[n] for n in names}
        assert_close(got, want, rtol=1e-9)


def test_kl_clip() -> None:
    """uᵀ(K + δ)u is what is bounded, and small steps stay as they are."""
    model_fn, params, [(X, y), *_], structure = problem()
    grad, factors = compute(model_fn, params, X, y, (Grad(), KFLR(joined=True)))
    make = partial(optim.scale_by_kfac, structure, KFLR(joined=True), damping=0.02, split="exact")
    full, _ = make().update(grad, make().init(params), params, factors)
    size = 0.0
    for names in blocks(joined=True):
        u = vector(full, names)
        size += float(u @ damped(factors[names[0]], 0.02, "exact") @ u)
    method = make(kl_clip=size / 9)
    clipped, _ = method.update(grad, method.init(params), params, factors)
    assert_close(clipped, {n: u / 3 for n, u in full.items()})
    method = make(kl_clip=1.01 * size)
    assert_close(method.update(grad, method.init(params), params, factors)[0], full)
    zero = {n: torch.zeros_like(g) for n, g in grad.items()}
    method = make(kl_clip=0.1)
    assert all(not u.any() for u in method.update(zero, method.init(params), params, factors)[0].values())


@pytest.mark.parametrize("spec", [KFLR(joined=True), EmpiricalKFAC()], ids=repr)
def test_ekfac_is_the_dense_solve(spec: Any) -> None:
    """In the eigenbasis of averaged factors: K-FAC's eigenvalues when it is new, then averages of second moments."""
    model_fn, params, batches, structure = problem(N=24)  # enough for eigenvalues that differ, and so for one basis
    joined, empirical = spec.joined, isinstance(spec, EmpiricalKFAC)
    method = optim.chain(
        optim.scale_by_ekfac(structure, spec, damping=0.05, decay=0.8, factors_every=2, bases_every=4, moments_every=1),
        optim.scale(-0.1),
    )
    got, want, state = params, params, method.init(params)
    seen: list[Any] = []
    for t, (X, y) in enumerate(batches):
        _, got, state = optim.step(model_fn, method, got, state, X, y)
        grad, factors = compute(model_fn, want, X, y, (Grad(), spec))
        if t % 2 == 0:
            seen.append(factors)
        if t % 4 == 0:
            found = {b: [torch.linalg.eigh(f) for f in averaged(seen, 0.8)[b[0]]] for b in blocks(joined)}
            U = {b: torch.kron(e[0][1], e[1][1]) if len(e) == 2 else e[0][1] for b, e in found.items()}
            values = {b: torch.kron(e[0][0], e[1][0]) if len(e) == 2 else e[0][0] for b, e in found.items()}
        else:
            root = curvfunc.batch_grad(model_fn, want, X, y) if empirical else curvfunc.sqrt_ggn(model_fn, want, X, y)
            columns = {n: s if empirical else s.flatten(0, 1) for n, s in root.items()}
            for b in blocks(joined):
                vectors = torch.stack([vector({n: columns[n][i] for n in b}, b) for i in range(len(columns[b[0]]))])
                values[b] = 0.8 * values[b] + 0.2 * (vectors @ U[b]).square().sum(0)
        for b in blocks(joined):
            u = params_of(U[b] @ ((U[b].T @ vector(grad, b)) / (values[b].clamp_min(0) + 0.05)), b, grad)
            want = want | {n: want[n] - 0.1 * u[n] for n in b}
        assert_close(got, want, rtol=1e-8)


def test_single_precision() -> None:
    """Inverses are kept in the parameters' type, and a step is what it is in double precision."""
    model_fn, params, [(X, y), *_], structure = problem()
    low = {n: p.float() for n, p in params.items()}
    single = kronecker.structure(model_fn, low, X.float())
    method, reference = (optim.scale_by_kfac(s, KFLR(joined=True), damping=1e-3) for s in (single, structure))
    state = method.init(low)
    grad, factors = compute(model_fn, params, X, y, (Grad(), KFLR(joined=True)))
    want, _ = reference.update(grad, reference.init(params), params, factors)
    small = {n: tuple(f.float() for f in fs) for n, fs in factors.items()}
    got, state = method.update({n: g.float() for n, g in grad.items()}, state, low, small)
    assert all(t.dtype == torch.float32 for block in state["inverses"] for t in block)
    assert_close({n: u.double() for n, u in got.items()}, want, rtol=1e-4)


def test_convergence() -> None:
    """To the minimum of a convex problem, within few steps."""
    model_fn, params = curvfunc.functionalize(nn.Linear(4, 3))
    X, y = torch.randn(60, 4) * torch.tensor([1.0, 10.0, 0.1, 3.0]), torch.randint(3, (60,))
    structure = kronecker.structure(model_fn, params, X)
    for kind in (optim.scale_by_kfac, optim.scale_by_ekfac):
        method = optim.chain(kind(structure, KFLR(joined=True), damping=1e-5), optim.scale(-1.0))
        found, state = params, method.init(params)
        for _ in range(40):
            _, found, state = optim.step(model_fn, method, found, state, X, y)
        assert max(g.abs().max() for g in compute(model_fn, found, X, y, Grad()).values()) < 1e-3
    assert max(g.abs().max() for g in compute(model_fn, params, X, y, Grad()).values()) > 0.1


# -- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"damping": -1.0}, ValueError, "damping must be finite, at least 0"),
        ({"damping": math.inf}, ValueError, "damping must be finite"),
        ({"decay": 1.0}, ValueError, "decay must be"),
        ({"kl_clip": 0.0}, ValueError, "kl_clip must be positive"),
        ({"factors_every": 0}, ValueError, "number of steps between renewals must be positive"),
        ({"factors_every": 1.5}, TypeError, "number of steps between renewals must be an int"),
        ({"spec": DiagGGN()}, TypeError, "spec must be KFAC"),
    ],
)
def test_options(options: Any, error: Any, message: str) -> None:
    for kind in (optim.scale_by_kfac, optim.scale_by_ekfac):
        with pytest.raises(error, match=message):
            kind(kronecker.Structure(()), **options)


def test_options_of_one_kind() -> None:
    with pytest.raises(ValueError, match='split must be "pi" or "exact"'):
        optim.scale_by_kfac(kronecker.Structure(()), split="both")
    with pytest.raises(ValueError, match="which KFRA has none of"):
        optim.scale_by_ekfac(kronecker.Structure(()), KFRA())
    with pytest.raises(TypeError, match="structure must come from"):
        optim.scale_by_kfac({})  # type: ignore[arg-type]


def test_factors_and_states_of_other_parameters() -> None:
    model_fn, params, [(X, y), *_], structure = problem()
    grad, factors = compute(model_fn, params, X, y, (Grad(), KFLR(joined=True)))
    method = optim.scale_by_kfac(structure, KFLR(joined=True))
    state = method.init(params)
    few = {n: f for n, f in factors.items() if n != "5.bias"}
    with pytest.raises(ValueError, match=r"factors is of other parameters than the structure: it lacks \['5.bias'\]"):
        method.update(grad, state, params, few)
    wrong = factors | {"5.weight": factors["0.weight"]}
    with pytest.raises(ValueError, match="the factors of parameter '5.weight' have the shapes"):
        method.update(grad, state, params, wrong)
    with pytest.raises(ValueError, match=r"grads is of other parameters than params: it lacks \['5.bias'\]"):
        method.update({n: g for n, g in grad.items() if n != "5.bias"}, state, params, factors)
    with pytest.raises(ValueError, match="params is of other parameters than the structure"):
        method.init({"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"parameter '5.bias' has shape \(2,\), and the structure is of one with \(3,\)"):
        method.init(params | {"5.bias": torch.ones(2)})
    _, state = method.update(grad, state, params, factors)
    with pytest.raises(ValueError, match="old and new have different trees"):
        method.update(grad, state | {"factors": few}, params, factors)
    with pytest.raises(ValueError, match="has no factors yet"):
        method.update(grad, method.init(params), params, (), ())
    with pytest.raises(ValueError, match="the state of scale_by_kfac is a dictionary with"):
        method.update(grad, optim.momentum(0.5).init(params), params, factors)
    with pytest.raises(ValueError, match=r"the state of scale_by_kfac is of other parameters"):
        method.update(grad, state | {"factors": few}, params, (), ())


@pytest.mark.parametrize("split", ["pi", "exact"])
def test_singular_factors_without_damping(split: str) -> None:
    model_fn, params = curvfunc.functionalize(nn.Linear(4, 3))
    X, y = torch.randn(2, 4), torch.arange(2)
    method = optim.scale_by_kfac(kronecker.structure(model_fn, params, X), KFLR(joined=True), damping=0.0, split=split)
    with pytest.raises(ValueError, match="the block of parameter 'weight' and 'bias' .*damping of at least"):
        optim.step(model_fn, method, params, method.init(params), X, y)
