"""The scripts on scikit-learn's digits, in a short setting."""

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import ROOT

for needed in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(needed)


@pytest.fixture(autouse=True)
def _as_many_threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> dict[str, Any]:
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    return runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")


def load(script: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / script), run_name="example")


def test_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(monkeypatch, "digits.py", "--iterations", "2", "--batch-size", "16", "--out", str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kronecker.png", "layers.png", "training.png"]
    printed = capsys.readouterr().out
    for method in ("K-FAC", "DiagGGN", "SGD", "Adam"):
        assert f"{method} not reached" in printed


def test_caption_of_the_demo_says_who_wins() -> None:
    demo = load("digits.py")

    def ran(loss: list[float], pace: float) -> Any:
        return demo["Run"]({}, loss, [pace * (i + 1) for i in range(len(loss))])

    few, soon, never = ran([0.3, 0.05, 0.01], 5.0), ran([0.3, 0.2, 0.0, 0.0, 0.0], 0.5), ran([0.3] * 5, 0.1)
    text = demo["caption"]({"never": never, "soon": soon, "few": few})
    # running means of few: 0.3, 0.175, 0.12, which never gets to 0.1; of soon: 0.3, 0.25, 0.17, 0.125, 0.1
    assert "soon 5 steps, 2.5 s; " in text
    assert text.count("not reached") == 2
    few.loss[0] = 0.1
    text = demo["caption"]({"never": never, "soon": soon, "few": few})
    assert "few 1 steps, 5 s; soon 5 steps, 2.5 s; never not reached." in text
    assert "Fewest steps: few. Fewest seconds: soon." in text


def test_race(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "race.png"
    names = run(monkeypatch, "kfac_digits.py", "--steps", "2", "--picture", str(picture))
    assert picture.stat().st_size > 10_000
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(names["METHODS"])
    assert len({line.count("|") for line in (head, rule, *rows)}) == 1


def test_race_counts_steps_and_search_takes_the_best() -> None:
    race = load("kfac_digits.py")
    assert race["to_goal"]([(0.5, 0.9, 1.0), (0.7, 0.97, 0.5), (0.9, 0.99, 0.4)]) == (2, 0.7)
    assert race["to_goal"]([(0.5, 0.9, 1.0)])[0] == float("inf")
    needed = {0.011: 40, 0.017: 30, 0.0054: 35}  # which are among Adam's sixteen points; others need 90

    def train(method: str, rates: tuple[float, ...], seed: int, steps: int, stop: bool) -> list[tuple[float, float, float]]:
        assert stop
        n = needed.get(rates[0], 90) + seed % 2
        return [(0.0, 1.0 if i == n else 0.0, 0.0) for i in range(1, min(n, steps) + 1)]

    search = race["search"]
    search.__globals__["train"] = train
    assert search("Adam", 100) == ((0.017, None), 30.5)


def test_the_table_is_of_what_the_script_takes() -> None:
    rows = re.findall(
        r"^\| (\S+) \| (\S+) \| (\S+) \| \d", (ROOT / "docs/optimizers.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    shown = {method: tuple(None if rate == "–" else float(rate) for rate in rates) for method, *rates in rows}
    assert shown == {method: row[1] for method, row in load("kfac_digits.py")["METHODS"].items()}
