"""The script on Poisson's equation, in a short setting."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from torch.func import hessian, vmap

import curvfunc

pytest.importorskip("matplotlib").use("Agg")
SCRIPT = Path(__file__).parents[2] / "examples/physics.py"


@pytest.fixture(scope="module")
def physics():
    """What the script defines."""
    return runpy.run_path(str(SCRIPT))


def parameters(seed: int = 0) -> dict[str, torch.Tensor]:
    """Those of a small network."""
    torch.manual_seed(seed)
    return {"0": torch.randn(5, 3, dtype=torch.float64), "1": torch.randn(1, 6, dtype=torch.float64)}


def test_laplacian(physics) -> None:
    """Against second derivatives by autodiff."""
    params, X = parameters(), torch.rand(7, 2, dtype=torch.float64)
    u, laplacian = physics["ansatz"](params, X)
    alone = lambda x: physics["ansatz"](params, x[None])[0][0]
    assert_close(laplacian, vmap(lambda x: hessian(alone)(x).trace())(X), rtol=1e-10)
    assert_close(u, vmap(alone)(X), rtol=1e-12)


def test_factors_are_those_of_the_layers(physics) -> None:
    """Four rows for each point are shared positions: two factors for each layer, and the diagonal of one-by-one autograd."""
    params, X = parameters(), torch.rand(6, 2, dtype=torch.float64)
    factors = curvfunc.kflr(physics["residual"], params, X, X.new_zeros(6), loss_fn=torch.nn.functional.mse_loss)
    assert [tuple(f.shape for f in pair) for pair in factors.values()] == [((5, 5), (3, 3)), ((1, 1), (6, 6))]
    got = curvfunc.diag_ggn(physics["residual"], params, X, X.new_zeros(6), loss_fn=torch.nn.functional.mse_loss)
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    rows = [torch.autograd.grad(r, list(leaves.values()), retain_graph=True) for r in physics["residual"](leaves, X)]
    want = {k: sum(2 / 6 * row[i] ** 2 for row in rows) for i, k in enumerate(params)}
    assert_close(got, want, rtol=1e-10)


@pytest.mark.parametrize("method", ["Adam", "K-FAC", "Gauss-Newton"])
def test_training(physics, method: str) -> None:
    steps = 25 if method == "Gauss-Newton" else 12  # its first ones are too long, and not taken
    _, history = physics["train"](method, 0, float("inf"), steps=steps)
    assert history[-1][1] == steps
    assert history[-1][2] < (0.98 if method == "Adam" else 0.5) * history[0][2]


def test_table_and_picture(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--seconds", "0.2", "--picture", str(tmp_path / "p.png")])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    assert "| Gauss-Newton |" in capsys.readouterr().out
    assert (tmp_path / "p.png").stat().st_size > 10_000
