"""Linear operators in all formats, and scipy's view of them."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn

import curvfunc

pytestmark = pytest.mark.usefixtures("float64")

N, C = 5, 3


def make() -> tuple[curvfunc.ModelFunction, dict[str, Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, C)))
    return model_fn, params, torch.randn(N, 4), torch.randint(0, C, (N,))


def rows(tree: dict[str, Tensor], params: dict[str, Tensor]) -> Tensor:
    """Tensors [..., *shape] as rows of a matrix."""
    return torch.cat([t.reshape(-1, p.numel()) for t, p in zip(tree.values(), params.values(), strict=True)], 1)


def test_dense() -> None:
    model_fn, params, X, y = make()
    names, sizes = list(params), [p.numel() for p in params.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, sizes)
        return F.cross_entropy(model_fn({k: t.view_as(params[k]) for k, t in zip(names, parts, strict=True)}, X), y)

    hessian = torch.func.hessian(loss)(torch.cat([p.flatten() for p in params.values()]))
    assert_close(curvfunc.hessian_operator(model_fn, params, X, y).dense(), hessian)
    S = rows(curvfunc.sqrt_ggn(model_fn, params, X, y), params)
    assert_close(curvfunc.ggn_operator(model_fn, params, X, y).dense(), S.T @ S)
    assert_close(curvfunc.fisher_operator(model_fn, params, X, y).dense(), S.T @ S)
    draws = {"mc_samples": 2, "subsampling": [1, 1, 4]}
    S = rows(curvfunc.sqrt_ggn(model_fn, params, X, y, generator=torch.Generator().manual_seed(3), **draws), params)
    for make_operator in (curvfunc.ggn_operator, curvfunc.fisher_operator):
        operator = make_operator(model_fn, params, X, y, generator=torch.Generator().manual_seed(3), **draws)
        assert_close(operator.dense(), S.T @ S)
        assert_close(operator.dense(), S.T @ S)  # the draws are fixed
    S = rows(curvfunc.batch_grad(model_fn, params, X, y), params)
    assert_close(curvfunc.fisher_operator(model_fn, params, X, y, empirical=True).dense(), S.T @ S)


def test_formats() -> None:
    model_fn, params, X, y = make()
    calls = []

    def counted(p: dict[str, Tensor], X: Tensor) -> Tensor:
        calls.append(1)
        return model_fn(p, X)

    operator = curvfunc.hessian_operator(counted, params, X, y, chunk_size=3)
    matrix, size = operator.dense(), sum(p.numel() for p in params.values())
    assert operator.shape == (size, size)
    assert operator.dtype == torch.float64
    assert operator.device == torch.device("cpu")
    assert operator.names == tuple(params)
    v, V = torch.randn(size), torch.randn(size, 7)
    assert_close(operator @ v, matrix @ v)
    assert_close(operator @ V, matrix @ V)
    assert_close(operator @ V[:, :1], matrix @ V[:, :1])
    tree, trees = operator.unflatten(v), operator.unflatten(V)
    assert {k: t.shape for k, t in tree.items()} == {k: p.shape for k, p in params.items()}
    assert {k: t.shape for k, t in trees.items()} == {k: (7, *p.shape) for k, p in params.items()}
    assert_close(tree["0.weight"].flatten(), v[:12])  # the order of params, as parameters_to_vector has it
    assert_close(operator.flatten(tree), v, rtol=0.0)
    assert_close(operator.flatten(trees), V, rtol=0.0)
    assert_close(operator @ tree, operator.unflatten(matrix @ v))
    assert_close(operator @ trees, operator.unflatten(matrix @ V))
    assert len(calls) == 1


def test_nested_parameters() -> None:
    params = {"b": [torch.randn(3, C)], "a": (torch.randn(()), torch.randn(C))}
    X, y = torch.randn(N, 3), torch.randint(0, C, (N,))
    model_fn = lambda p, X: (X @ p["b"][0]).tanh() * p["a"][0] + p["a"][1]
    operator = curvfunc.ggn_operator(model_fn, params, X, y)
    assert_close(operator @ params, curvfunc.ggn_vp(model_fn, params, X, y, params))
    assert_close(operator.flatten(operator @ params), operator.dense() @ operator.flatten(params))
    assert_close(operator.unflatten(operator.flatten(params)), params)


def test_bad_vectors() -> None:
    model_fn, params, X, y = make()
    operator = curvfunc.hessian_operator(model_fn, params, X, y)
    for wrong in (torch.zeros(3), torch.zeros(operator.shape[0], 2, 2), torch.zeros(())):
        with pytest.raises(ValueError, match=r"\[P\] or \[P, K\] with P = 27 is needed"):
            operator @ wrong
        with pytest.raises(ValueError, match=r"\[P\] or \[P, K\] with P = 27 is needed"):
            operator.unflatten(wrong)
    with pytest.raises(ValueError, match=r"v at '0.weight'.* is torch.float32"):
        operator @ torch.zeros(operator.shape[0], dtype=torch.float32)
    with pytest.raises(ValueError, match=r"v has entries \['0.bias'\]"):
        operator @ {"0.bias": params["0.bias"]}
    with pytest.raises(ValueError, match=r"v at '2.bias' has shape"):
        operator @ {**params, "2.bias": torch.zeros(2)}
    with pytest.raises(TypeError, match=r"v at '0.bias' must be a tensor"):
        operator @ {**params, "0.bias": 1.0}
    both = {"a": torch.zeros(3), "b": torch.zeros(3, dtype=torch.float32)}
    with pytest.raises(ValueError, match="one dtype and one device"):
        curvfunc.hessian_operator(lambda p, X: X * p["a"] + p["b"], both, torch.randn(N, 3), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scipy(dtype: torch.dtype) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    model_fn, params, X, y = make()
    params = {k: p.to(dtype) for k, p in params.items()}
    operator = curvfunc.ggn_operator(model_fn, params, X.to(dtype), y)
    exported, matrix = operator.to_scipy(), operator.dense().cpu().numpy()
    assert exported.dtype == matrix.dtype
    assert exported.shape == matrix.shape
    rng = np.random.default_rng(0)
    v, V = rng.standard_normal(27).astype(matrix.dtype), rng.standard_normal((27, 4)).astype(matrix.dtype)
    V.flags.writeable = False  # of which torch would warn
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for got, expected in (
        (exported @ v, matrix @ v),
        (exported @ v[:, None], matrix @ v[:, None]),
        (exported @ V, matrix @ V),
        (exported.T @ V[:, ::-1], matrix @ V[:, ::-1]),
        (exported.H @ v, matrix @ v),
    ):
        assert got.dtype == matrix.dtype
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)
    damped = exported + linalg.aslinearoperator(np.eye(27, dtype=matrix.dtype))
    solution, code = linalg.cg(damped, v, rtol=tolerance)
    assert code == 0
    np.testing.assert_allclose(solution, np.linalg.solve(matrix + np.eye(27), v), rtol=0, atol=10 * tolerance)


def test_scipy_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    model_fn, params, X, y = make()
    operator = curvfunc.hessian_operator(model_fn, params, X, y)
    for name in ("scipy", "scipy.sparse", "scipy.sparse.linalg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install scipy"):
        operator.to_scipy()
    with pytest.raises(ImportError, match="pip install scipy"):
        curvfunc.eigsh(operator, 2)
    assert curvfunc.hutchinson_trace(operator, 3).shape == ()
