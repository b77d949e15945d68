"""Sums, multiples, shifts, linear systems and copies of operators: what the dense matrices give."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc import kronecker

pytestmark = pytest.mark.usefixtures("float64")

N, C = 9, 3
P = 43


@dataclass(frozen=True)
class Own:
    """No more than what estimators ask for."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.matrix), len(self.matrix)

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def __matmul__(self, v: Tensor) -> Tensor:
        assert v.ndim == 2
        return self.matrix @ v


def make(dropout: float = 0.0) -> tuple[curvfunc.ModelFunction, dict[str, Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(4, 5), nn.Dropout(dropout), nn.Tanh(), nn.Linear(5, C)))
    return model_fn, params, torch.randn(N, 4), torch.randint(0, C, (N,))


def two() -> tuple[curvfunc.LinearOperator, curvfunc.LinearOperator]:
    problem = make()
    return curvfunc.hessian_operator(*problem), curvfunc.ggn_operator(*problem)


def symmetric() -> Tensor:
    A = torch.randn(P, P, generator=torch.Generator().manual_seed(1))
    return A + A.mT


EXPRESSIONS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "A + B": lambda A, B, eye: A + B,
    "A - B": lambda A, B, eye: A - B,
    "-A": lambda A, B, eye: -A,
    "2 A": lambda A, B, eye: 2 * A,
    "A np.float32": lambda A, B, eye: A * np.float32(0.5),
    "np.float64 A": lambda A, B, eye: np.float64(0.5) * A,
    "tensor A": lambda A, B, eye: torch.tensor(0.5) * A,
    "A / 4": lambda A, B, eye: A / 4,
    "A + 0.1": lambda A, B, eye: A + 0.1 * eye,
    "0.1 + A": lambda A, B, eye: 0.1 * eye + A,
    "A - 0.1": lambda A, B, eye: A - 0.1 * eye,
    "1 - A": lambda A, B, eye: 1 * eye - A,
    "nested": lambda A, B, eye: 3 * (A - 2 * (B + 0.5 * eye) / 7) - (A + A) * 0.25 - 1 * eye,
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions(name: str) -> None:
    A, B = two()
    expression = EXPRESSIONS[name]
    operator = expression(A, B, 1.0)
    want = expression(A.dense(), B.dense(), torch.eye(P))
    assert isinstance(operator, curvfunc.LinearOperator)
    assert_close(operator.dense(), want, rtol=1e-12)
    tree = A.unflatten(torch.randn(P))
    assert_close(operator.flatten(operator @ tree), want @ operator.flatten(tree), rtol=1e-12)
    trees = A.unflatten(torch.randn(P, 3))
    assert_close(operator.flatten(operator @ trees), want @ operator.flatten(trees), rtol=1e-12)
    pytest.importorskip("scipy")
    np.testing.assert_allclose(operator.to_scipy() @ np.ones(P), want.sum(1).cpu().numpy(), rtol=0, atol=1e-12)


def test_matrices_of_other_kinds_are_added() -> None:
    A, T = two()[0], symmetric()
    D = A.dense()
    for operator, want in (
        (A + T, D + T),
        (T + A, D + T),
        (A - T, D - T),
        (T - A, T - D),
        (A + Own(T), D + T),
        (2 * (Own(T) + A) + 1, 2 * (T + D) + torch.eye(P)),
    ):
        assert_close(operator.dense(), want, rtol=1e-12)
    assert not (A + T.requires_grad_()).dense().requires_grad


def test_estimators_take_sums() -> None:
    pytest.importorskip("scipy")
    A, B = two()
    operator = A + 2 * B + 0.3
    dense = operator.dense()
    assert_close(curvfunc.eigsh(operator, 3, which="LA")[0], torch.linalg.eigvalsh(dense)[-3:], rtol=1e-9)
    seeded = lambda: torch.Generator().manual_seed(0)
    for matrix in (dense, Own(dense)):
        for name in ("hutchinson_trace", "hutchpp_trace", "hutchinson_diag", "xdiag"):
            function = getattr(curvfunc, name)
            assert_close(function(operator, 6, generator=seeded()), function(matrix, 6, generator=seeded()), rtol=1e-9)
        nodes = [curvfunc.spectral_density(A, num_steps=4, generator=seeded()).nodes for A in (operator, matrix)]
        assert_close(*nodes, rtol=1e-9)
        assert_close(curvfunc.eigsh(matrix, 3, which="LA")[0], torch.linalg.eigvalsh(dense)[-3:], rtol=1e-9)


def test_terms_that_do_not_fit() -> None:
    A = two()[0]
    X, y = torch.randn(N, 4), torch.randint(0, C, (N,))
    other = lambda params: curvfunc.ggn_operator(lambda p, x: x @ p["a"] + p["b"], params, X, y)
    small = other({"a": torch.randn(4, C), "b": torch.zeros(C)})
    with pytest.raises(ValueError, match=r"shapes \(43, 43\) and \(15, 15\) cannot be added"):
        A + small
    with pytest.raises(ValueError, match=r"shapes \(43, 43\) and \(3, 3\) cannot be added"):
        A - torch.eye(3)
    with pytest.raises(ValueError, match=r"\(43,\); a square one"):
        A + torch.ones(P)
    with pytest.raises(ValueError, match=r"\['a', 'b'\] and \['b', 'a'\]"):
        small + other({"b": torch.zeros(C), "a": torch.randn(4, C)})
    turned = curvfunc.ggn_operator(lambda p, x: x @ p["a"].mT + p["b"], {"a": torch.randn(C, 4), "b": torch.zeros(C)}, X, y)
    with pytest.raises(ValueError, match=r"parameter 'a' of shapes \(4, 3\) and \(3, 4\)"):
        small + turned
    listed = curvfunc.ggn_operator(lambda p, x: x @ p[0] + p[1], [torch.randn(4, C), torch.zeros(C)], X, y)
    paired = curvfunc.ggn_operator(lambda p, x: x @ p[0] + p[1], (torch.randn(4, C), torch.zeros(C)), X, y)
    with pytest.raises(ValueError, match="cannot be added; they have parameters in"):
        listed + paired
    with pytest.raises(ValueError, match=r"in torch.float64 on cpu, and in torch.float32 on cpu cannot be added"):
        A + torch.eye(P, dtype=torch.float32)
    with pytest.raises(ValueError, match="in torch.float64 on cpu, and in torch.float64 on meta"):
        A + torch.eye(P, device="meta")
    with pytest.raises(ValueError, match=r"not symmetric.*\(A \+ A.mT\) / 2"):
        A + torch.ones(P, P).triu()
    for wrong in (np.eye(P), "1", None, [1.0], True, 1j):
        with pytest.raises(TypeError, match="cannot be added to an operator.*Numbers are shifts"):
            A + wrong
    for wrong in (torch.ones(P), A, np.ones(2), "2", True):
        with pytest.raises(TypeError, match="multiplied by a number"):
            A * wrong
    with pytest.raises(TypeError, match="divided by a number"):
        A / torch.ones(P)


# -- linear systems


def test_solve_is_that_of_the_dense_matrix() -> None:
    G = two()[1]
    dense = G.dense() + 0.1 * torch.eye(P)
    b, B = torch.randn(P), torch.randn(P, 4)
    B[:, 2] = 0.0  # which rests from the start
    for operator, damping in ((G, 0.1), (G + 0.06, 0.04), (G + 0.1, 0.0), (G, torch.tensor(0.1))):
        assert_close(operator.solve(b, damping=damping, tol=1e-13), torch.linalg.solve(dense, b), rtol=1e-10)
        assert_close(operator.solve(B, damping=damping, tol=1e-13), torch.linalg.solve(dense, B), rtol=1e-10)
    tree, trees = G.unflatten(b), G.unflatten(B)
    assert_close(G.solve(tree, damping=0.1, tol=1e-13), G.unflatten(torch.linalg.solve(dense, b)), rtol=1e-10)
    assert_close(G.solve(trees, damping=0.1, tol=1e-13), G.unflatten(torch.linalg.solve(dense, B)), rtol=1e-10)
    assert G.solve(tree, damping=0.1)["0.bias"].shape == (5,)


def test_the_residual_is_what_is_asked_for() -> None:
    G = two()[1]
    B = torch.randn(P, 5) * 10.0 ** torch.arange(-6, 4, 2.0)
    for tol in (1e-2, 1e-6, 1e-10):
        X = G.solve(B, damping=1e-3, tol=tol)
        assert (((G + 1e-3) @ X - B).norm(dim=0) <= tol * B.norm(dim=0)).all()
        assert not torch.allclose(X, torch.linalg.solve(G.dense() + 1e-3 * torch.eye(P), B), rtol=0.0, atol=1e-14)


def test_singular_systems_with_a_solution() -> None:
    G = two()[1]
    b = G @ torch.randn(P)
    assert_close(G @ G.solve(b, tol=1e-9), b, rtol=1e-8)


@dataclass(frozen=True)
class Counted:
    operator: Any
    calls: list[int]
    shape: tuple[int, int] = (P, P)

    dtype, device = torch.float64, torch.device("cpu")

    def __matmul__(self, v: Tensor) -> Tensor:
        self.calls.append(v.shape[1])
        return self.operator @ v


def test_preconditioners() -> None:
    """A Kronecker product is the GGN itself for a linear layer and squared errors."""
    model_fn, params = curvfunc.functionalize(nn.Linear(10, 3))
    X, y = torch.randn(50, 10) * torch.arange(1, 11), torch.randn(50, 3)
    G = curvfunc.ggn_operator(model_fn, params, X, y, loss_fn=F.mse_loss)
    b = torch.randn(33)
    dense = G.dense() + 1e-3 * torch.eye(33)
    want = torch.linalg.solve(dense, b)
    structure = kronecker.structure(model_fn, params, X)
    factors = curvfunc.compute(model_fn, params, X, y, curvfunc.KFLR(joined=True), loss_fn=F.mse_loss)
    inverse = kronecker.inverse(kronecker.decompose(factors, structure), damping=1e-3)
    diagonal = curvfunc.diag_ggn(model_fn, params, X, y, loss_fn=F.mse_loss)
    steps = {}
    for name, preconditioner in {
        "none": None,
        "inverse": torch.linalg.inv(dense),
        "own": Own(torch.linalg.inv(dense)),
        "kronecker": lambda r: kronecker.matmul(inverse, r),
        "diagonal": lambda r: {k: r[k] / (diagonal[k] + 1e-3) for k in r},
    }.items():
        calls: list[int] = []
        counted = 0 * G + Counted(G, calls, (33, 33))
        assert_close(counted.solve(b, damping=1e-3, tol=1e-12, preconditioner=preconditioner), want, rtol=1e-7)
        steps[name] = len(calls)
    assert max(steps["inverse"], steps["own"], steps["kronecker"]) <= 4
    assert steps["diagonal"] < steps["none"]


def test_columns_rest_on_their_own() -> None:
    calls: list[int] = []
    G = two()[1]
    values, vectors = torch.linalg.eigh(G.dense())
    B = torch.stack([vectors[:, -1], torch.randn(P)], dim=1)  # one step, and many
    (0 * G + Counted(G, calls)).solve(B, damping=1e-3, tol=1e-8)
    assert calls[:2] == [2, 1]
    assert calls[-1] == 2  # both residuals, at the end
    assert values[-1] > 0


def test_what_does_not_converge() -> None:
    H, G = two()
    b = torch.randn(P)
    with pytest.raises(ArithmeticError, match="not positive definite.*curvature is -.*larger damping.*strict=False"):
        H.solve(b)
    with pytest.raises(ArithmeticError, match="not positive definite: along a direction its curvature is 0"):
        (0 * G).solve(b)
    with pytest.raises(ArithmeticError, match=r"did not converge in 3 iterations. Raise max_iterations.*the residual is \d"):
        G.solve(b, damping=1e-4, max_iterations=3)
    with pytest.raises(ArithmeticError, match="to tol=1e-30, which rounding in torch.float64 does not allow"):
        G.solve(b, damping=0.1, tol=1e-30)
    with pytest.raises(ArithmeticError, match="preconditioner is not positive definite"):
        G.solve(b, damping=0.1, preconditioner=-torch.eye(P))
    with pytest.raises(ArithmeticError, match="right-hand side is not finite"):
        G.solve(b * float("nan"), damping=0.1)
    with pytest.raises(ArithmeticError, match="product with the matrix is not finite"):
        (G + Own(float("nan") * torch.eye(P))).solve(b)


def test_truncated() -> None:
    """The k-th iterate minimizes xᵀ A x / 2 - bᵀ x over the Krylov space of k vectors."""
    H, G = two()
    b = torch.randn(P)
    A = G.dense() + 0.01 * torch.eye(P)
    for k in (1, 2, 4):
        K = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(A, i) @ b for i in range(k)], dim=1)).Q
        want = K @ torch.linalg.solve(K.mT @ A @ K, K.mT @ b)
        assert_close(G.solve(b, damping=0.01, tol=0.0, max_iterations=k, strict=False), want, rtol=1e-9)
    values, vectors = torch.linalg.eigh(H.dense())
    assert values[0] < 0
    assert_close(H.solve(vectors[:, 0], strict=False), torch.zeros(P))
    B = torch.stack([vectors[:, 0], vectors[:, -1]], dim=1)
    assert_close(H.solve(B, strict=False), torch.stack([torch.zeros(P), vectors[:, -1] / values[-1]], dim=1), rtol=1e-9)


def test_bad_arguments_of_solve() -> None:
    G = two()[1]
    b = torch.randn(P)
    for given, message in (
        ({"damping": -0.1}, "damping must be a number that is not negative, got -0.1"),
        ({"damping": torch.ones(P)}, "damping must be a number"),
        ({"tol": -1.0}, "tol must be a number"),
        ({"tol": float("nan")}, "tol must be a number"),
        ({"max_iterations": 0}, "max_iterations must be a positive int, got 0"),
        ({"max_iterations": 2.0}, "max_iterations must be a positive int"),
        ({"preconditioner": torch.eye(3)}, r"preconditioner has shape \(3, 3\), and the operator \(43, 43\)"),
        ({"preconditioner": lambda r: {"0.weight": r["0.weight"]}}, "v has entries"),
    ):
        with pytest.raises(ValueError, match=message):
            G.solve(b, **given)
    with pytest.raises(TypeError, match="the preconditioner is a str; a matrix or a function"):
        G.solve(b, preconditioner="jacobi")
    with pytest.raises(TypeError, match="torch.as_tensor"):
        G.solve(b, preconditioner=np.eye(P))
    with pytest.raises(ValueError, match="P = 43 is needed"):
        G.solve(torch.ones(2))
    with pytest.raises(TypeError, match="torch.as_tensor"):
        G.solve(np.ones(P))


# -- copies


@pytest.mark.parametrize(
    "options", [{}, {"mc_samples": 2}, {"mc_samples": 1, "generator": 3, "subsampling": [0, 0, 5]}], ids=str
)
def test_pickling(options: dict[str, Any]) -> None:
    if "generator" in options:
        options = options | {"generator": torch.Generator().manual_seed(options["generator"])}
    operator = curvfunc.ggn_operator(*make(dropout=0.3), **options)
    expression = 2 * operator - 0.3 + symmetric()
    content = pickle.dumps((operator, expression))
    torch.rand(3)
    state = torch.get_rng_state()
    again, expression_again = pickle.loads(content)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(again.dense(), operator.dense(), rtol=0.0)
    assert_close(expression_again.dense(), expression.dense(), rtol=0.0)
    tree = operator.unflatten(torch.randn(P))
    assert_close(again @ tree, operator @ tree, rtol=0.0)


def linear(params: Any, X: Tensor) -> Tensor:
    return (X @ params["b"][0]).tanh() * params["a"][0] + params["a"][1]


def test_pickling_of_nested_parameters() -> None:
    params = {"b": [torch.randn(3, C)], "a": (torch.randn(()), torch.randn(C))}
    operator = curvfunc.hessian_operator(linear, params, torch.randn(N, 3), torch.randn(N, C), loss_fn=nn.MSELoss())
    again = pickle.loads(pickle.dumps(operator))
    assert optree.tree_structure(again @ params) == optree.tree_structure(params)
    assert_close(again @ params, operator @ params, rtol=0.0)


class Drawing:
    """A model that draws from where nobody looks."""

    generator = torch.Generator()

    def __call__(self, params: Any, X: Tensor) -> Tensor:
        return X @ params["w"] * torch.rand((), generator=self.generator)


def test_what_cannot_be_pickled() -> None:
    model_fn, params, X, y = make()
    operator = curvfunc.ggn_operator(model_fn, params, X, y)
    params["0.bias"].add_(1.0)
    with pytest.raises(ValueError, match="a parameter was changed in place.*Make a new operator"):
        pickle.dumps(operator)
    content = pickle.dumps(curvfunc.ggn_operator(Drawing(), {"w": torch.randn(4, C)}, X, y))
    with pytest.raises(ValueError, match="the model has another output than when the operator was made"):
        pickle.loads(content)
    closure = curvfunc.ggn_operator(lambda p, x: x @ p["w"], {"w": torch.randn(4, C)}, X, y, loss_fn=F.cross_entropy)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(closure)
