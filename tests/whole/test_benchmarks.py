"""The benchmark scripts: what they write, that wrong numbers show, and that operations are counted as by hand."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import backpack_peer
import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The scripts as modules; they import each other as siblings."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return SimpleNamespace(
        **{name: importlib.import_module(name) for name in ("nets", "contenders", "compare", "floor", "accumulate")}
    )


def run(scripts: SimpleNamespace, path: Path, *options: str) -> dict[str, Any]:
    scripts.compare.main(["--rounds", "1", "--threads", "1", "--out", str(path), *options])
    return json.loads(path.read_text())


def test_report(scripts, tmp_path):
    own = ("gradient", "curvfunc", "curvfunc_out", "vmap", "reference")
    quantities = ("batch_grad", "diag_ggn", "kflr", "sqrt_ggn")
    report = run(scripts, tmp_path / "r.json", "--nets", "tiny", "--quantities", *quantities, "--contenders", *own)
    assert report["environment"].keys() >= {"date", "torch", "cpu", "threads", "device", "rounds", "command"}
    assert [row["quantity"] for row in report["rows"]] == list(quantities)
    for row in report["rows"]:
        assert (row["net"], row["batch"], row["device"], row["precision"]) == ("tiny", 8, "cpu", "float32")
        assert list(row["contenders"]) == list(own)
        measured = {name: entry for name, entry in row["contenders"].items() if "skipped" not in entry}
        assert measured.keys() >= {"gradient", "curvfunc", "reference"}
        for entry in measured.values():
            assert entry["ms"] > 0
            assert entry["ratio"] > 0
            assert entry.get("deviation", 0.0) < 1e-4
        assert ("skipped" in row["contenders"]["vmap"]) == (row["quantity"] != "batch_grad")
    assert report["rows"][0]["contenders"]["gradient"]["ratio"] == 1


def test_layers(scripts, tmp_path):
    """Each runs, on a small part of its batch, and vmap agrees."""
    for net, layer in scripts.nets.LAYERS.items():
        module = layer.make().eval()
        X = layer.inputs(2)
        assert module(X).shape == (2, 10), net
    options = ("--quantities", "batch_l2", "--contenders", "curvfunc", "vmap")
    some = ["transposed 4x4", "convolution, depthwise"]
    rows = run(scripts, tmp_path / "r.json", "--nets", *some, *options)["rows"]
    assert [row["net"] for row in rows] == some
    assert all(row["contenders"]["vmap"]["deviation"] < 1e-4 for row in rows)


@pytest.mark.parametrize(
    ("peer", "quantities", "skipped"),
    [
        ("backpack", ("batch_l2", "diag_ggn_mc", "kflr", "sqrt_ggn", "diag_hessian", "batch_dot"), {"batch_dot"}),
        ("opacus", ("batch_grad", "batch_l2", "variance", "kfac"), {"kfac"}),
        ("curvlinops", ("kfac", "kflr", "variance"), {"variance"}),
    ],
)
def test_peers_agree(scripts, tmp_path, peer, quantities, skipped):
    backpack_peer.load() if peer == "backpack" else pytest.importorskip(peer, exc_type=ImportError)
    options = ("--nets", "tiny", "--quantities", *quantities, "--contenders", "curvfunc", peer)
    for row in run(scripts, tmp_path / "r.json", *options)["rows"]:
        entry = row["contenders"][peer]
        assert ("skipped" in entry) == (row["quantity"] in skipped), entry
        assert entry.get("deviation", 0.0) < 1e-4


def test_wrong_numbers_show(scripts, tmp_path, capsys, monkeypatch):
    def wrong(problem: Any) -> Any:
        step = scripts.contenders.curvfunc(problem)
        return lambda: (step()[0], {name: 2 * g for name, g in step()[1].items()})

    monkeypatch.setitem(scripts.contenders.CONTENDERS, "vmap", wrong)
    options = ("--nets", "tiny", "--quantities", "batch_grad", "--contenders", "curvfunc", "vmap", "--table")
    [row] = run(scripts, tmp_path / "r.json", *options)["rows"]
    out, err = capsys.readouterr()
    assert row["contenders"]["vmap"]["deviation"] == pytest.approx(1)
    assert "WARNING: tiny batch_grad float32: vmap deviates" in err
    assert "(no peer)" in out


def test_what_is_skipped_says_why(scripts, tmp_path):
    options = ("--nets", "tiny", "GPT", "--quantities", "diag_ggn", "--contenders", "curvfunc", "--skip", "ti*:diag*")
    rows = run(scripts, tmp_path / "r.json", *options)["rows"]
    assert [row["skipped"] for row in rows] == ["--skip ti*:diag*", "V = 4160 columns per sample"]


def test_a_slow_contender_is_measured_once(scripts, tmp_path):
    options = ("--nets", "tiny", "--quantities", "variance", "--contenders", "curvfunc", "vmap", "--patience", "0")
    [row] = run(scripts, tmp_path / "r.json", *options)["rows"]
    assert ["once" in row["contenders"][name] for name in ("gradient", "curvfunc", "vmap")] == [False, True, True]


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_precisions(scripts, tmp_path, precision):
    options = ("--nets", "tiny", "--quantities", "variance", "--contenders", "curvfunc", "vmap", "--precision", precision)
    [row] = run(scripts, tmp_path / "r.json", *options)["rows"]
    assert row["precision"] == precision
    assert row["contenders"]["vmap"]["deviation"] < scripts.compare.TOLERANCE[precision]


def test_files_are_merged(scripts, tmp_path, capsys):
    files = [tmp_path / f"{net}.json" for net in ("tiny", "logistic")]
    for file in files:
        run(scripts, file, "--nets", file.stem, "--quantities", "batch_l2", "variance", "--contenders", "curvfunc", "vmap")
    capsys.readouterr()
    scripts.compare.main(["--table", "--from", *map(str, files)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[:4]] == ["cpu, float32", "---", "tiny", "logistic"]
    assert all(line.count("×)") == 2 for line in lines[2:4])
    assert "eager or compiled, 4 cells" in lines[-1]


def test_picture(scripts, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "r.png"
    options = ("--quantities", "batch_l2", "diag_ggn", "--contenders", "curvfunc", "vmap", "--picture", str(path))
    run(scripts, tmp_path / "r.json", "--nets", "tiny", *options)
    assert path.stat().st_size > 1000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the memory of a process from /proc")
def test_peak_memory_holds_the_result(scripts):
    result = 128 * 7850 * 4 / 2**20
    assert 0.8 * result < scripts.compare.peak("logistic", "batch_grad", "curvfunc", "cpu", "float32") < 6 * result


def test_operations_of_linear_layers(scripts):
    N, module = 7, nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    y = torch.arange(N) % 3
    counts = scripts.floor.count(module, torch.randn(N, 5), lambda out: nn.functional.cross_entropy(out, y))
    F, D, W, A, B = 2 * N * 32, 2 * N * 12, 2 * N * 32, N * (25 + 16), N * (16 + 9)
    assert counts == scripts.floor.Counts(F, D, W, 0, A, B, 32 + 7, N * (5 + 2 * 4 + 2 * 3))
    expected = {
        "gradient": F + D + W,
        "batch_grad": F + D + W,
        "variance": F + D + 2 * W,
        "diag_ggn": F + 3 * D + 2 * W,
        "kflr": F + 3 * D + W + A + 2 * B,
        "sqrt_ggn": F + 3 * D + 3 * W,
    }
    assert {q: scripts.floor.operations(q, counts, 2 * (q in scripts.floor.EXACT)) for q in expected} == expected
    assert scripts.floor.entries(counts, {"g": torch.zeros(6)}) == 2 * 39 + counts.activations + 6


def test_operations_of_convolutions(scripts):
    N, module = 4, nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 5))
    y = torch.arange(N)
    counts = scripts.floor.count(module, torch.randn(N, 2, 6, 6), lambda out: nn.functional.cross_entropy(out, y))
    conv, linear = 2 * N * 16 * 54, 2 * N * 240
    pairs_of_rows = 6 / 2 + 5 + 4  # of six rows of the image, no more than two rows apart
    A, B = N * (round(pairs_of_rows) * 2 * 4 * 6**2 + 48**2), N * (3**2 + 5**2)
    assert counts == scripts.floor.Counts(conv + linear, linear, linear, conv, A, B, 302, N * (72 + 2 * 48 + 2 * 5))
    passes = conv + linear + 5 * linear
    assert scripts.floor.operations("diag_ggn", counts, 4) == passes + (conv + linear) + linear + 4 * conv
    strided = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.Flatten(), nn.Linear(12, 5))
    counts = scripts.floor.count(strided, torch.randn(N, 2, 6, 6), lambda out: nn.functional.cross_entropy(out, y))
    assert counts.input_factors == N * (4 * 18**2 + 12**2)


def test_floor_and_its_table(scripts):
    rates = {"operations_per_second": 1e9, "bytes_per_second": 1e12}
    cell = scripts.contenders.problem("tiny", "diag_ggn_mc", "cpu", "float32")
    row = scripts.floor.floor(cell, lambda: rates, rounds=1)
    assert row["columns"] == 1
    assert row["bound"] == "products"
    assert row["floor_ms"] == pytest.approx(row["operations"] / 1e6, abs=1e-4)
    assert row["factor"] > 1
    assert "| `diag_ggn_mc` |" in scripts.floor.table([row])


def test_accumulate(scripts, capsys):
    """The loop by hand has the results of `accumulate`, and the report what is compared."""
    model_fn, params, make = scripts.accumulate.problem("tiny", 4)
    batches = [make() for _ in range(3)]
    torch.manual_seed(1)
    by_hand = scripts.accumulate.by_hand(model_fn, params, batches)
    torch.manual_seed(1)
    grad, diag, factors = scripts.accumulate.accumulate(model_fn, params, batches, scripts.accumulate.SPECS)
    got = [*grad.values(), *diag.values(), *(f for pair in factors.values() for f in pair)]
    for a, b in zip(by_hand, got, strict=True):
        torch.testing.assert_close(a, b)
    scripts.accumulate.main(["--net", "tiny", "--batches", "2", "--rounds", "2", "--memory-batches", "60"])
    report = json.loads(capsys.readouterr().out)
    assert report["overhead"]["batches"] == 2
    assert report["overhead"]["ratio"] > 0
    assert report["memory"]["peak_mib"] >= report["memory"]["resident_mib_at_end"] > 0
    assert report["memory"]["resident_mib_after_50"] > 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the memory of a process from /proc")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed")
def test_clipped_sums_in_little_memory(scripts, tmp_path, monkeypatch):
    """No per-sample gradient: these would be 64 times what the plain gradient takes."""
    script = importlib.import_module("private")
    own = {name: make for name, make in script.CONTENDERS.items() if "opacus" not in name}
    monkeypatch.setattr(script, "CONTENDERS", own)
    script.main(["--width", "512", "--batch", "64", "--rounds", "1", "--out", str(tmp_path / "r.json")])
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["ms"].keys() == report["peak_mib"].keys() == own.keys()
    assert report["deviation"]["curvfunc"] < 1e-6
    assert max(report["peak_mib"].values()) < 16  # with 64 gradients of single samples: 200
    assert report["peak_mib"]["gradient"] > 2
