"""The script on Poisson's equation, in a short setting."""

import runpy
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from documents import ROOT
from one_by_one import verify
from torch.func import hessian, vmap

import curvfunc

pytest.importorskip("matplotlib")

SCRIPT = ROOT / "examples" / "physics.py"


def load(name: str = "example") -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT), run_name=name)


def start(widths: tuple[int, ...] = (2, 4, 3, 1)) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    pairs = enumerate(pairwise(widths))
    return {str(i): torch.randn(outs, ins + 1, dtype=torch.float64) for i, (ins, outs) in pairs}


def test_laplacian_is_that_of_the_ansatz() -> None:
    script, params = load(), start()
    X = torch.rand(5, 2, dtype=torch.float64)
    value, laplacian = script["ansatz"](params, X)

    def network(x: torch.Tensor) -> torch.Tensor:
        h = x
        for i, weight in enumerate(params.values()):
            h = F.linear(h.tanh() if i else h, weight[:, :-1], weight[:, -1])
        return 16 * (x * (1 - x)).prod() * h.sum()

    torch.testing.assert_close(value, vmap(network)(X))
    torch.testing.assert_close(laplacian, vmap(lambda x: hessian(network)(x).trace())(X))
    exact = vmap(lambda x: hessian(lambda z: script["solution"](z[None])[0])(x).trace())(X)
    torch.testing.assert_close(script["residual"](params, X), laplacian - exact)


def test_residual_has_kronecker_factors_and_right_numbers() -> None:
    script, params = load(), start()
    X = torch.rand(4, 2, dtype=torch.float64)
    rows = curvfunc.explain(script["residual"], params, X).rows
    assert {(row.path, row.rule, row.why) for row in rows} == {("plain", "linear", "")}
    verify(script["residual"], params, X, torch.zeros(4, dtype=torch.float64), loss_fn=F.mse_loss)


def test_curvature_needs_fewer_steps_than_adam() -> None:
    script = load()
    found = {m: script["train"](m, 0, float("inf"), steps)[1][-1][2] for m, steps in (("Adam", 300), ("K-FAC", 60))}
    assert found["K-FAC"] < found["Adam"]


def test_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "physics.png"
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(sys, "argv", ["physics.py", "--seconds", "0.1", "--picture", str(picture)])
    threads = torch.get_num_threads()
    try:
        names = load("__main__")
    finally:
        torch.set_num_threads(threads)
    assert picture.stat().st_size > 10_000
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(names["COLORS"])
    assert len({line.count("|") for line in (head, rule, *rows)}) == 1
