"""Estimators: exact where theory says so, unbiased and of the right variance elsewhere."""

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn

import curvfunc

pytestmark = pytest.mark.usefixtures("float64")

P = 12


def matrix(spectrum: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with that spectrum."""
    Q = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=torch.Generator().manual_seed(seed))).Q
    return (Q * spectrum) @ Q.T


def indefinite() -> Tensor:
    return matrix(torch.linspace(-1, 2, P))


def low_rank(rank: int = 2) -> Tensor:
    spectrum = torch.zeros(P)
    spectrum[:rank] = torch.arange(1.0, rank + 1) * torch.tensor([1.0, -1.0]).repeat(rank)[:rank]
    return matrix(spectrum)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def repeated(estimate: Callable[[torch.Generator], Tensor], times: int) -> Tensor:
    generator = seeded(1)
    return torch.stack([estimate(generator) for _ in range(times)])


def test_estimators_are_unbiased() -> None:
    """The mean of many estimates is within 4.5 standard errors in every entry."""
    A = indefinite()
    estimators = {
        "hutchinson_trace": (A.trace(), 2),
        "hutchpp_trace": (A.trace(), 6),
        "hutchinson_diag": (A.diagonal(), 2),
        "xdiag": (A.diagonal(), 6),
    }
    for name, (expected, products) in estimators.items():
        function = getattr(curvfunc, name)
        estimates = repeated(lambda g: function(A, products, generator=g), 4000)  # noqa: B023
        error = (estimates.mean(0) - expected).abs() / (estimates.std(0) / 4000**0.5)
        assert error.max() < 4.5, name


def test_variance_of_hutchinson() -> None:
    A, K = indefinite(), 4
    off = A - A.diag().diag()
    diagonals = repeated(lambda g: curvfunc.hutchinson_diag(A, K, generator=g), 4000)
    torch.testing.assert_close(diagonals.var(0), off.square().sum(1) / K, rtol=0.15, atol=0)
    traces = repeated(lambda g: curvfunc.hutchinson_trace(A, K, generator=g), 4000)
    torch.testing.assert_close(traces.var(0), 2 * off.square().sum() / K, rtol=0.15, atol=0)


def test_estimators_are_exact_where_they_must_be() -> None:
    diagonal = torch.randn(P).diag()
    assert_close(curvfunc.hutchinson_trace(diagonal, 1), diagonal.trace())
    assert_close(curvfunc.hutchinson_diag(diagonal, 1), diagonal.diagonal())
    for A in (indefinite(), low_rank()):
        assert_close(curvfunc.hutchpp_trace(A, 3 * P, generator=seeded(1)), A.trace())  # seed 1: P independent vectors
    assert_close(curvfunc.xdiag(low_rank(5), 2 * P), low_rank(5).diagonal())
    for rank, seed in itertools.product((1, 2, 3), range(5)):  # of rank + 1 vectors, any one can be left out
        A = low_rank(rank)
        assert_close(curvfunc.hutchpp_trace(A, 3 * rank, generator=seeded(seed)), A.trace())
        assert_close(curvfunc.xdiag(A, 2 * (rank + 1), generator=seeded(seed)), A.diagonal())


def test_low_rank_estimators_beat_hutchinson() -> None:
    A = matrix(0.3 ** torch.arange(float(P)))
    errors = {
        name: repeated(lambda g: getattr(curvfunc, name)(A, 12, generator=g) - exact, 200).norm()  # noqa: B023
        for name, exact in (
            ("hutchinson_trace", A.trace()),
            ("hutchpp_trace", A.trace()),
            ("hutchinson_diag", A.diagonal()),
            ("xdiag", A.diagonal()),
        )
    }
    assert errors["hutchpp_trace"] < errors["hutchinson_trace"] / 10
    assert errors["xdiag"] < errors["hutchinson_diag"] / 10


@pytest.mark.parametrize("steps", [P, 50])
def test_spectral_density_with_all_steps_has_the_eigenvalues(steps: int) -> None:
    A = indefinite()
    spectrum = curvfunc.spectral_density(A, num_steps=steps, num_vectors=3, generator=seeded(0))
    assert spectrum.nodes.shape == spectrum.weights.shape == (3, P)
    assert_close(spectrum.nodes, torch.linalg.eigvalsh(A).expand(3, P), rtol=1e-9)
    assert_close(spectrum.weights.sum(1), torch.ones(3))


def test_spectral_density_of_degenerate_matrices() -> None:
    """Lanczos ends early: what comes after has no weight."""
    for A, values in ((low_rank(2), [-2.0, 0.0, 1.0]), (3 * torch.eye(P), [3.0]), (torch.zeros(P, P), [0.0])):
        spectrum = curvfunc.spectral_density(A, num_steps=8, num_vectors=4)
        assert spectrum.nodes.isfinite().all()
        kept = spectrum.nodes[spectrum.weights > 1e-12]
        distance = (kept[:, None] - torch.tensor(values)).abs().min(1).values
        assert distance.max() < 1e-9
        assert_close(spectrum.weights.sum(1), torch.ones(4))


def test_spectral_density_integrates_functions() -> None:
    A = matrix(torch.linspace(0.5, 2, P))
    spectrum = curvfunc.spectral_density(A, num_steps=10, num_vectors=400, generator=seeded(2))
    assert_close(spectrum.trace(torch.ones_like), torch.tensor(float(P)))
    for function, expected in ((torch.log, torch.logdet(A)), (lambda x: x, A.trace())):
        by_vector = P * (spectrum.weights * function(spectrum.nodes)).sum(1)
        assert_close(spectrum.trace(function), by_vector.mean())
        assert (by_vector.mean() - expected).abs() < 4.5 * by_vector.std() / 400**0.5
    x = torch.linspace(-1, 4, 501)
    density = spectrum.density(x, width=0.1)
    assert_close(torch.trapezoid(density, x), torch.tensor(1.0), rtol=1e-6)
    gaussians = torch.distributions.Normal(torch.linalg.eigvalsh(A), 0.1).log_prob(x[:, None]).exp().mean(1)
    assert_close(density, gaussians, rtol=0.05)
    assert spectrum.density(x.view(3, -1), width=0.1).shape == (3, 167)


def test_eigsh() -> None:
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)))
    operator = curvfunc.hessian_operator(model_fn, params, torch.randn(9, 4), torch.randint(0, 3, (9,)))
    A = operator.dense()
    values = torch.linalg.eigvalsh(A)
    for which, expected in (
        ("LA", values[-3:]),
        ("SA", values[:3]),
        ("LM", values[values.abs().argsort()[-3:]].sort().values),
        ("BE", torch.cat([values[:1], values[-2:]])),
    ):
        found, vectors = curvfunc.eigsh(operator, 3, which=which, generator=seeded(0))
        assert_close(found, expected, rtol=1e-9)
        assert_close(A @ vectors, vectors * found, rtol=1e-9)
    again = curvfunc.eigsh(operator, 2, generator=seeded(4))
    assert_close(curvfunc.eigsh(operator, 2, generator=seeded(4)), again, rtol=0.0)


def test_operators_and_dense_matrices_give_the_same() -> None:
    model_fn, params = curvfunc.functionalize(nn.Linear(4, 3))
    operator = curvfunc.ggn_operator(model_fn, params, torch.randn(9, 4), torch.randint(0, 3, (9,)), chunk_size=2)
    A = operator.dense()
    for name in ("hutchinson_trace", "hutchpp_trace", "hutchinson_diag", "xdiag"):
        function = getattr(curvfunc, name)
        assert_close(function(operator, 6, generator=seeded(3)), function(A, 6, generator=seeded(3)), rtol=1e-8)
    diagonal = operator.unflatten(curvfunc.xdiag(operator, 2 * len(A)))
    X, y = torch.randn(9, 4), torch.randint(0, 3, (9,))
    operator = curvfunc.ggn_operator(model_fn, params, X, y)
    diagonal = operator.unflatten(curvfunc.xdiag(operator, 2 * len(A)))
    assert_close(diagonal, curvfunc.diag_ggn(model_fn, params, X, y), rtol=1e-8)
    nodes = curvfunc.spectral_density(operator, num_steps=3, generator=seeded(3)).nodes
    assert_close(nodes, curvfunc.spectral_density(operator.dense(), num_steps=3, generator=seeded(3)).nodes)


def test_bad_numbers() -> None:
    A = torch.eye(P)
    for call, match in (
        (lambda: curvfunc.hutchinson_trace(A, 0), "positive ints, got 0"),
        (lambda: curvfunc.hutchinson_diag(A, 1.5), "positive ints, got 1.5"),
        (lambda: curvfunc.hutchpp_trace(A, 2), "at least 3, got 2"),
        (lambda: curvfunc.xdiag(A, 3), "from 4 to 2 P = 24, got 3"),
        (lambda: curvfunc.xdiag(A, 25), "from 4 to 2 P = 24, got 25"),
        (lambda: curvfunc.spectral_density(A, num_steps=0), "positive ints, got 0"),
        (lambda: curvfunc.spectral_density(A, num_vectors=-1), "positive ints, got -1"),
        (lambda: curvfunc.hutchinson_trace(torch.zeros(2, 3), 1), r"\(2, 3\); a square one"),
        (lambda: curvfunc.eigsh(A, 0), "from 1 to P - 1 = 11, got 0"),
        (lambda: curvfunc.eigsh(A, P), "from 1 to P - 1 = 11, got 12"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
