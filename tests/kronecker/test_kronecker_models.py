"""Kronecker factors of models: what they belong to, joined weights and biases, eigenvalues from second moments."""

from functools import partial
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from problems import PROBLEMS, double
from torch import Tensor, nn
from zoo import ZOO

import curvfunc
from curvfunc import KFAC, KFLR, DiagGGN, Grad, compute, kronecker

pytestmark = pytest.mark.usefixtures("float64")

LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear at positions": (lambda: nn.Linear(4, 3), (2, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2, padding=1), (2, 4)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (2, 1), stride=2), (2, 2, 3)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 4, 2, groups=2), (4, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 2)), (2, 1, 2, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 3, 2), (3, 2)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(2, 3, (2, 1), stride=2), (2, 1, 1)),
    "transposed 2d, groups": (lambda: nn.ConvTranspose2d(4, 4, 2, groups=2, padding=1), (4, 2, 2)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 2, (1, 2, 2)), (2, 1, 2, 2)),
}
layers = pytest.mark.parametrize("name", LAYERS)


def layer(name: str, samples: int = 3, bias: bool = True) -> Any:
    """A model function of one layer, a squared error, and a class that it is of."""
    make, shape = LAYERS[name]
    module = make()
    if not bias:
        module.bias = None
    model_fn, params = curvfunc.functionalize(nn.Sequential(module, nn.Tanh(), nn.Flatten()))
    X = torch.randn(samples, *shape)
    y = torch.randn_like(model_fn(params, X))
    return model_fn, params, X, y, module


def as_matrix(name: str, t: Tensor, groups: int) -> Tensor:
    """A weight [..., *shape] as the matrix of its factors, written out."""
    lead = t.shape[:2]
    if not name.startswith("transposed"):
        return t.reshape(*lead, t.shape[2], -1)
    t = t.unflatten(2, (groups, -1))  # [v, n, q, c, o, *kernel]
    return t.transpose(3, 4).reshape(*lead, groups * t.shape[4], -1)


# --- what factors belong to -------------------------------------------------------------------------------------------


@layers
@pytest.mark.parametrize("joined", [False, True])
def test_layers(name: str, joined: bool) -> None:
    """The matrix of a gradient lies in the ranges of both factors, which are deficient for a single sample."""
    model_fn, params, X, y, module = layer(name, samples=1)
    structure = kronecker.structure(model_fn, params, X)
    assert [layout.bias for layout in structure.layouts] == ["0.bias", None]
    factors = curvfunc.kflr(model_fn, params, X, y, loss_fn=F.mse_loss, joined=joined)
    K = kronecker.decompose(factors, structure)
    assert [block.names for block in K.blocks] == ([("0.weight", "0.bias")] if joined else [("0.weight",), ("0.bias",)])
    G = as_matrix(
        name, compute(model_fn, params, X, y, Grad(), loss_fn=F.mse_loss)["0.weight"][None, None], getattr(module, "groups", 1)
    )
    assert_close(structure.layouts[0].matrix(params["0.weight"], len(factors["0.weight"][0])),
                 as_matrix(name, params["0.weight"][None, None], getattr(module, "groups", 1))[0, 0], rtol=0.0)  # fmt: skip
    if not joined and getattr(module, "groups", 1) == 1:  # with groups, the input factor is the mean of several
        ranges = [(U[:, v > 1e-12 * v.max()]) for U, v in zip(K.bases[0], K.spectra[0], strict=True)]
        P, Q = [U @ U.mT for U in ranges]
        if "conv" not in name and "transposed" not in name:  # else the outputs' factor sums the positions
            assert_close(P @ G[0, 0], G[0, 0])
        assert_close(G[0, 0] @ Q, G[0, 0])
        assert Q.trace() < len(Q) - 0.5 or name in ("linear at positions", "conv1d"), "a factor of full rank tells nothing"


@layers
def test_products_are_those_of_the_factors(name: str) -> None:
    model_fn, params, X, y, module = layer(name)
    groups = getattr(module, "groups", 1)
    factors = curvfunc.kflr(model_fn, params, X, y, loss_fn=F.mse_loss)
    K = kronecker.decompose(factors, kronecker.structure(model_fn, params, X))
    B, A = factors["0.weight"]
    v = {n: torch.randn(2, 1, *p.shape) for n, p in params.items()}
    got = kronecker.matmul(K, v)
    assert_close(as_matrix(name, got["0.weight"], groups), B @ as_matrix(name, v["0.weight"], groups) @ A)
    assert_close(got["0.bias"], v["0.bias"] @ factors["0.bias"][0])


def test_exact_where_kfac_is() -> None:
    """For one sample and one position, a weight and its bias together have B ⊗ Ā as their block of the GGN."""
    model_fn, params, X, y, _ = layer("linear", samples=1)
    structure = kronecker.structure(model_fn, params, X)
    s = curvfunc.sqrt_ggn(model_fn, params, X, y, loss_fn=F.mse_loss)
    for joined in (False, True):
        K = kronecker.decompose(curvfunc.kflr(model_fn, params, X, y, loss_fn=F.mse_loss, joined=joined), structure)
        for names, block in kronecker.dense(K).items():
            root = torch.cat([s[n].flatten(2) for n in names], 2).flatten(0, 1)
            assert_close(block, root.mT @ root)


def test_embeddings_and_products() -> None:
    """Tables and matrices on the right have the factor of the inputs first."""

    def model_fn(p: Any, X: Tensor) -> Tensor:
        h = F.embedding(X, p["table"]) @ p["matrix"]
        return torch.einsum("nsk,kq,nsq->nq", h, p["paired"], h.tanh())

    params = {"table": torch.randn(4, 4), "matrix": torch.randn(4, 4), "paired": torch.randn(4, 4)}
    X, y = torch.randint(4, (3, 2)), torch.randint(4, (3,))
    structure = kronecker.structure(model_fn, params, X)
    factors = curvfunc.kflr(model_fn, params, X, y)
    v = {n: torch.randn(4, 4) for n in params}
    got = kronecker.matmul(kronecker.decompose(factors, structure), v)
    for name in ("table", "matrix"):
        first, second = factors[name]
        assert_close(got[name], first @ v[name] @ second)
    counts = F.one_hot(X, 4).to(v["table"]).mean((0, 1))
    assert_close(factors["table"][0], counts.diag())
    if len(factors["paired"]) == 2:  # [k, q], with the factor of the groups q first
        assert_close(got["paired"].mT, factors["paired"][0] @ v["paired"].mT @ factors["paired"][1])


def test_groups_in_columns() -> None:
    """A parameter whose axes are the other way round from those of its factors, which have the same sizes."""
    model_fn = lambda p, X: torch.einsum("nqk,kq->nq", X, p["w"])
    params, X, y = {"w": torch.randn(3, 3)}, torch.randn(4, 3, 3), torch.randint(3, (4,))
    structure = kronecker.structure(model_fn, params, X)
    factors = curvfunc.kflr(model_fn, params, X, y)
    B, A = factors["w"]
    assert_close(A, torch.einsum("nqk,nql->kl", X, X) / 12)
    v = {"w": torch.randn(3, 3)}
    got = kronecker.matmul(kronecker.decompose(factors, structure), v)
    assert_close(got["w"], (B @ v["w"].mT @ A).mT)


class TwoBiases(nn.Module):
    """One weight with two biases, and a bias that is used alone, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.first, self.second, self.alone = (nn.Parameter(torch.randn(3)) for _ in range(3))
        self.last = nn.Linear(3, 3)
        self.twice = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(F.linear(x, self.weight, self.first).tanh(), self.weight, self.second)
        x = self.twice(self.twice(x).tanh())
        return self.last(x) + self.last.bias + F.linear(x, self.weight.t(), self.alone)


def test_only_what_is_always_together_is_joined() -> None:
    model_fn, params = curvfunc.functionalize(TwoBiases())
    X, y = torch.randn(4, 3), torch.arange(4) % 3
    structure = kronecker.structure(model_fn, params, X)
    assert {layout.name: layout.bias for layout in structure.layouts if layout.bias} == {"twice.weight": "twice.bias"}
    factors = curvfunc.kflr(model_fn, params, X, y, joined=True)
    plain = curvfunc.kflr(model_fn, params, X, y)
    assert {n: [len(f) for f in own] for n, own in factors.items() if n != "twice.weight"} == {
        n: [len(f) for f in own] for n, own in plain.items() if n != "twice.weight"
    }
    assert [len(f) for f in factors["twice.weight"]] == [3, 4]
    frozen = {n: p for n, p in params.items() if n != "twice.weight"}
    assert all(layout.bias is None for layout in kronecker.structure(partial(_with, model_fn, params), frozen, X).layouts)


def _with(model_fn: Any, params: Any, some: Any, X: Tensor) -> Tensor:
    return model_fn({**params, **some}, X)


def test_nested_parameters() -> None:
    instance = PROBLEMS["nested parameters"].make()
    model_fn, params, X, y, loss_fn = instance
    factors = curvfunc.kflr(model_fn, params, X, y, loss_fn=loss_fn)
    grad = compute(model_fn, params, X, y, Grad(), loss_fn=loss_fn)
    K = kronecker.decompose(factors, kronecker.structure(model_fn, params, X))
    step = kronecker.solve(K, grad, damping=0.1)
    assert optree.tree_structure(step) == optree.tree_structure(params)
    with pytest.raises(ValueError, match="vectors has another tree than the parameters"):
        kronecker.matmul(K, list(optree.tree_leaves(grad)))


# --- joined -----------------------------------------------------------------------------------------------------------


@layers
@pytest.mark.parametrize("approx", [None, "expand", "reduce"])
def test_joined_factors_are_those_of_inputs_with_a_one(name: str, approx: str | None) -> None:
    model_fn, params, X, y, _ = layer(name)
    given = {"loss_fn": F.mse_loss, "kfac_approx": approx}
    plain, joined = (curvfunc.kflr(model_fn, params, X, y, joined=j, **given) for j in (False, True))
    B, A = joined["0.weight"]
    k = len(A) - 1
    assert_close(B, plain["0.weight"][0])
    assert_close(joined["0.bias"], plain["0.bias"])
    assert_close(A[:k, :k], plain["0.weight"][1])
    positions = model_fn(params, X).shape[1] // len(B)
    assert_close(A[k, k], torch.tensor(float(positions if approx is None and "linear" not in name else 1)))
    if name.startswith("linear") or name in ("conv1d", "conv3d"):  # where another channel is one everywhere
        wide = torch.cat([X, torch.ones_like(X[..., :1])], -1) if name.startswith("linear") else None
        if wide is not None:
            weight = torch.cat([params["0.weight"], params["0.bias"][:, None]], 1)
            other = lambda p, X: F.linear(X, p["w"]).tanh().flatten(1)
            assert_close(curvfunc.kflr(other, {"w": weight}, wide, y, **given)["w"], (B, A))
    mean = A[:k, k] / A[k, k]
    patches = {"conv2d": lambda: X.unfold(2, 2, 2).permute(0, 1, 5 - 1, 2, 3)}.get(name)
    if patches is not None:  # kernel (2, 1) with stride 2: [n, c, 2, rows, columns]
        assert_close(mean, patches()[..., ::2].mean((0, 3, 4)).flatten())


def test_joined_with_other_quantities_and_draws() -> None:
    model_fn, params, X, y, _ = layer("conv2d")
    specs = (Grad(), KFAC(2, joined=True), KFAC(2), KFLR(joined=True), DiagGGN())
    found = compute(model_fn, params, X, y, specs, loss_fn=F.mse_loss, generator=torch.Generator().manual_seed(0))
    assert_close(found[1]["0.weight"][0], found[2]["0.weight"][0])
    for spec, got in zip(specs[1:], found[1:], strict=True):
        alone = compute(model_fn, params, X, y, spec, loss_fn=F.mse_loss, generator=torch.Generator().manual_seed(0))
        assert_close(got, alone)
    some = curvfunc.kflr(model_fn, params, X, y, loss_fn=partial(F.mse_loss, reduction="sum"), joined=True, subsampling=[0, 2])
    want = curvfunc.kflr(model_fn, params, X[[0, 2]], y[[0, 2]], loss_fn=partial(F.mse_loss, reduction="sum"), joined=True)
    assert_close(some, want)


# --- corrected eigenvalues --------------------------------------------------------------------------------------------


def explicit(K: kronecker.Decomposition, s: Any) -> Any:
    """Σ (Uᵀ G V)² from the columns of a root [v, n, *shape]."""
    names = K.structure.names
    given = dict(zip(names, K.structure.flatten("s", s), strict=True))
    found = {name: torch.zeros(0) for name in names}
    for block, bases in zip(K.blocks, K.bases, strict=True):
        G = block.matrix(given, len(bases), len(bases[0]))
        G = G @ bases[0] if len(bases) == 1 else bases[0].mT @ G @ bases[1]
        found[block.names[0]] = G.square().sum((0, 1))
    return K.structure.unflatten([found[name] for name in names])


@layers
@pytest.mark.parametrize("joined", [False, True])
def test_eigenvalues_of_layers(name: str, joined: bool) -> None:
    model_fn, params, X, y, module = layer(name)
    groups = getattr(module, "groups", 1)
    K = kronecker.decompose(
        curvfunc.kflr(model_fn, params, X, y, loss_fn=F.mse_loss, joined=joined), kronecker.structure(model_fn, params, X)
    )
    s = curvfunc.sqrt_ggn(model_fn, params, X, y, loss_fn=F.mse_loss)
    got = kronecker.ekfac(model_fn, params, X, y, K, loss_fn=F.mse_loss, mc_samples=0)
    G = as_matrix(name, s["0.weight"], groups)
    if joined:
        G = torch.cat([G, s["0.bias"][..., None]], -1)
    assert_close(got["0.weight"], (K.bases[0][0].mT @ G @ K.bases[0][1]).square().sum((0, 1)))
    assert got["0.bias"].shape == ((0,) if joined else (len(params["0.bias"]),))
    corrected = kronecker.correct(K, got)
    total = sum(d.sum() for d in curvfunc.diag_ggn(model_fn, params, X, y, loss_fn=F.mse_loss).values())
    assert_close(sum(kronecker.trace(corrected).values()), total)
    # of all matrices that are diagonal in this basis, it is the closest to the GGN
    for names, block in kronecker.dense(corrected).items():
        root = torch.cat([s[n].flatten(2) for n in names], 2).flatten(0, 1)
        GGN = root.mT @ root
        assert (block - GGN).norm() <= (kronecker.dense(K)[names] - GGN).norm() + 1e-12 * GGN.norm()


@pytest.mark.parametrize("name", [n for n in PROBLEMS if "cross-entropy" not in n and "custom" not in n])
@pytest.mark.parametrize("joined", [False, True])
def test_eigenvalues_of_problems(name: str, joined: bool) -> None:
    model_fn, params, X, y, loss_fn = PROBLEMS[name].make()
    given = {"loss_fn": loss_fn}
    structure = kronecker.structure(model_fn, params, X)
    K = kronecker.decompose(curvfunc.kflr(model_fn, params, X, y, joined=joined, **given), structure)
    s = curvfunc.sqrt_ggn(model_fn, params, X, y, **given)
    assert_close(kronecker.ekfac(model_fn, params, X, y, K, mc_samples=0, chunk_size=2, **given), explicit(K, s))
    grads = optree.tree_map(lambda g: g[None], curvfunc.batch_grad(model_fn, params, X, y, **given))
    assert_close(kronecker.ekfac(model_fn, params, X, y, K, empirical=True, **given), explicit(K, grads))


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name: str) -> None:
    with double():
        model_fn, params, X, y, loss_fn, _ = ZOO[name]()
    structure = kronecker.structure(model_fn, params, X)
    generator = lambda: torch.Generator().manual_seed(0)
    given = {"loss_fn": loss_fn, "mc_samples": 2}
    K = kronecker.decompose(curvfunc.kfac(model_fn, params, X, y, joined=True, generator=generator(), **given), structure)
    s = curvfunc.sqrt_ggn(model_fn, params, X, y, generator=generator(), **given)
    moments = kronecker.ekfac(model_fn, params, X, y, K, generator=generator(), **given)
    assert_close(moments, explicit(K, s))
    grad = compute(model_fn, params, X, y, Grad(), loss_fn=loss_fn)
    step = kronecker.solve(kronecker.correct(K, moments), grad, damping=0.1)
    slope = sum((step[n] * grad[n]).sum() for n in grad)
    size = sum(g.square().sum() for g in grad.values())
    assert 0 < slope <= size / 0.1 * (1 + 1e-12)  # (K + δ)⁻¹ is between 0 and 1/δ


@pytest.mark.parametrize("name", ["linear", "linear at positions", "transposed 2d, groups"])
def test_ensembles(name: str) -> None:
    """Under vmap over parameters, and differentiated."""
    model_fn, params, X, y, _ = layer(name)
    structure = kronecker.structure(model_fn, params, X)

    def moments(params: Any, X: Tensor) -> Any:
        K = kronecker.decompose(curvfunc.kflr(model_fn, params, X, y, loss_fn=F.mse_loss, joined=True), structure)
        return kronecker.ekfac(model_fn, params, X, y, K, loss_fn=F.mse_loss, mc_samples=0)

    both = {n: torch.stack([p, 2 * p]) for n, p in params.items()}
    got = torch.func.vmap(moments, in_dims=(0, None))(both, X)
    for i in range(2):
        assert_close({n: g[i] for n, g in got.items()}, moments({n: p[i] for n, p in both.items()}, X))
    K = kronecker.decompose(curvfunc.kflr(model_fn, params, X, y, loss_fn=F.mse_loss, joined=True), structure)
    given = {"loss_fn": F.mse_loss, "mc_samples": 0}
    by_moments = lambda p: kronecker.ekfac(model_fn, p, X, y, K, **given)["0.weight"].sum()
    by_diagonal = lambda p: sum(d.sum() for d in curvfunc.diag_ggn(model_fn, p, X, y, loss_fn=F.mse_loss).values())
    assert_close(torch.func.grad(by_moments)(params), torch.func.grad(by_diagonal)(params))


def test_moments_beside_other_quantities() -> None:
    model_fn, params, X, y, _ = layer("conv2d")
    K = kronecker.decompose(curvfunc.kflr(model_fn, params, X, y, loss_fn=F.mse_loss), kronecker.structure(model_fn, params, X))
    spec = kronecker.EKFAC(2, decomposition=K)
    generator = lambda: torch.Generator().manual_seed(0)
    grad, moments, factors = compute(model_fn, params, X, y, (Grad(), spec, KFAC(2)), loss_fn=F.mse_loss, generator=generator())
    given = {"loss_fn": F.mse_loss, "mc_samples": 2, "generator": generator()}
    assert_close(moments, kronecker.ekfac(model_fn, params, X, y, K, **given))
    assert_close(factors, curvfunc.kfac(model_fn, params, X, y, **(given | {"generator": generator()})))
    assert_close(grad, compute(model_fn, params, X, y, Grad(), loss_fn=F.mse_loss))
    sub = kronecker.ekfac(model_fn, params, X, y, K, loss_fn=F.mse_loss, mc_samples=0, subsampling=[1, 1, 2])
    assert_close(sub, explicit(K, curvfunc.sqrt_ggn(model_fn, params, X, y, loss_fn=F.mse_loss, subsampling=[1, 1, 2])))
    with pytest.raises(ValueError, match="EKFAC twice"):
        compute(model_fn, params, X, y, (spec, kronecker.EKFAC(2, decomposition=K)), loss_fn=F.mse_loss)


# --- a whole step -----------------------------------------------------------------------------------------------------


def test_a_compiled_step() -> None:
    """Quantities, decomposition, correction and update, without other code for other values."""
    torch._dynamo.reset()
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    X, y = torch.randn(6, 3), torch.arange(6) % 3
    structure = kronecker.structure(model_fn, params, X)

    def step(params: Any, X: Tensor, y: Tensor) -> Any:
        grad, factors = compute(model_fn, params, X, y, (Grad(), KFLR(joined=True)))
        K = kronecker.decompose(factors, structure)
        moments = kronecker.ekfac(model_fn, params, X, y, K, mc_samples=0)
        update = kronecker.solve(kronecker.correct(K, moments), grad, damping=0.1)
        return {name: p - update[name] for name, p in params.items()}

    compiled, want, got = torch.compile(step, fullgraph=True, backend="aot_eager"), params, params
    got = compiled(got, X, y)
    want = step(want, X, y)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert_close(got, want)
            got, want = compiled(got, X, y), step(want, X, y)
    assert F.cross_entropy(model_fn(got, X), y) < F.cross_entropy(model_fn(params, X), y)


def test_natural_gradient_of_a_linear_model() -> None:
    """With a squared error and one output, K-FAC's joined block is the Hessian: one step without damping is least squares."""
    model_fn, params = curvfunc.functionalize(nn.Linear(4, 1))
    X, y = torch.randn(20, 4), torch.randn(20, 1)
    grad, factors = compute(model_fn, params, X, y, (Grad(), KFLR(joined=True)), loss_fn=F.mse_loss)
    step = kronecker.solve(kronecker.decompose(factors, kronecker.structure(model_fn, params, X)), grad)
    best = torch.linalg.lstsq(torch.cat([X, torch.ones(20, 1)], 1), y).solution.mT
    assert_close(params["weight"] - step["weight"], best[:, :4])
    assert_close(params["bias"] - step["bias"], best[:, 4])


# --- bad input --------------------------------------------------------------------------------------------------------


def test_decompositions_of_other_parameters() -> None:
    model_fn, params, X, y, _ = layer("linear")
    structure = kronecker.structure(model_fn, params, X)
    K = kronecker.decompose(curvfunc.kflr(model_fn, params, X, y, loss_fn=F.mse_loss, joined=True), structure)
    frozen = {"0.weight": params["0.weight"]}
    with pytest.raises(
        ValueError, match=r"decomposition is of the parameters \['0.weight', '0.bias'\], and params has \['0.weight'\]"
    ):
        kronecker.ekfac(partial(_with, model_fn, params), frozen, X, y, K, loss_fn=F.mse_loss)
    moments = kronecker.ekfac(model_fn, params, X, y, K, loss_fn=F.mse_loss)
    separate = kronecker.decompose(curvfunc.kflr(model_fn, params, X, y, loss_fn=F.mse_loss), structure)
    with pytest.raises(
        ValueError, match=r"moments has shape \(3, 5\) for parameter '0.weight', and its eigenvalues have \(3, 4\)"
    ):
        kronecker.correct(separate, moments)
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="moments of parameter '0.weight' have entries that are negative or not finite"):
            kronecker.correct(K, moments | {"0.weight": torch.full((3, 5), bad)})
    with pytest.raises(ValueError, match='split="pi" damps the factors.*corrected'):
        kronecker.inverse(kronecker.correct(K, moments), damping=1.0, split="pi")
    with pytest.raises(ValueError, match="mc_samples must be 0"):
        kronecker.EKFAC(-1, decomposition=K)

    def otherwise(p: Any, X: Tensor) -> Tensor:  # another use of the same parameters
        return (X.unsqueeze(1) * p["0.weight"]).sum(2).tanh() + p["0.bias"]

    with pytest.raises(ValueError, match="'0.weight' was joined with its bias.*used in another way"):
        kronecker.ekfac(otherwise, params, X, y, K, loss_fn=F.mse_loss)
    none = {"loss_fn": partial(F.mse_loss, reduction="sum"), "mc_samples": 0}
    with pytest.raises(ValueError, match="need samples and outputs, and there are none. Leave EKFAC out"):
        kronecker.ekfac(model_fn, params, X[:0], y[:0], K, **none)
    got = kronecker.ekfac(otherwise, params, X, y, separate, loss_fn=F.mse_loss, mc_samples=0)
    assert_close(got, explicit(separate, curvfunc.sqrt_ggn(otherwise, params, X, y, loss_fn=F.mse_loss)))
