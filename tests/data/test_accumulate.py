"""Results of a whole data set: equal to those of one batch, wherever they are kept and however often the run was stopped."""

import collections
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import interrupted
import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from test_merging import EXACT, mlp, weighted
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvfunc
from curvfunc.data import checkpoints
from curvfunc.data.batches import to_device

accumulate = curvfunc.accumulate
C = 3
PER_SAMPLE = (curvfunc.BatchGrad(), curvfunc.SqrtGGN(), curvfunc.Output(), curvfunc.Grad())


@pytest.fixture(autouse=True)
def _double(float64: None) -> None:
    """All in float64."""


def uneven(targets: Callable[[int], Tensor], batches: int = 29) -> list[tuple[Tensor, Tensor]]:
    """Batches of one to seven samples."""
    sizes = [1 + (5 * k) % 7 for k in range(batches)]
    return [(torch.randn(n, 4), targets(n)) for n in sizes]


def classes(n: int) -> Tensor:
    return torch.randint(C, (n,))


def partly_ignored(n: int) -> Tensor:
    y = torch.randint(C, (n,))
    y[torch.rand(n) < 0.4] = -100
    return y


def whole(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([X for X, _ in batches]), torch.cat([y for _, y in batches])


LOSSES: dict[str, tuple[Callable[[], Any], Callable[[int], Tensor]]] = {
    "cross-entropy": (lambda: F.cross_entropy, classes),
    "cross-entropy, ignored, weights": (weighted, partly_ignored),
    "cross-entropy, sum": (lambda: nn.CrossEntropyLoss(reduction="sum"), partly_ignored),
    "squared error": (lambda: F.mse_loss, lambda n: torch.randn(n, C)),
    "squared error, sum": (lambda: partial(F.mse_loss, reduction="sum"), lambda n: torch.randn(n, C)),
    "bce": (lambda: F.binary_cross_entropy_with_logits, lambda n: torch.rand(n, C)),
    "bce, sum": (lambda: nn.BCEWithLogitsLoss(reduction="sum"), lambda n: torch.rand(n, C)),
    "custom, mean": (lambda: lambda out, y: (out - y).cosh().sum(1).mean(), lambda n: torch.randn(n, C)),
    "custom, sum": (lambda: nn.SmoothL1Loss(reduction="sum"), lambda n: torch.randn(n, C)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_29_uneven_batches_are_one(name: str) -> None:
    make, targets = LOSSES[name]
    loss_fn, batches = make(), uneven(targets)
    model_fn, params = curvfunc.functionalize(mlp())
    got = accumulate(model_fn, params, batches, EXACT, loss_fn=loss_fn)
    assert_close(got, curvfunc.compute(model_fn, params, *whole(batches), EXACT, loss_fn=loss_fn), rtol=1e-12)


def test_sampled_factors_are_unbiased_over_batches() -> None:
    """Each batch has draws of its own, and many of them come close to the exact factors."""
    model_fn, params = curvfunc.functionalize(nn.Linear(4, C))
    batches = uneven(partly_ignored, 5)
    generator = torch.Generator().manual_seed(0)
    B, A = accumulate(model_fn, params, batches, curvfunc.KFAC(20000), generator=generator)["weight"]
    exact_B, exact_A = curvfunc.kflr(model_fn, params, *whole(batches))["weight"]
    assert_close(A, exact_A, rtol=1e-12)
    assert_close(B, exact_B, rtol=0.02)


def test_loaders_generators_and_empty_batches() -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    batches = uneven(classes, 5)
    X, y = whole(batches)
    want = curvfunc.compute(model_fn, params, X, y, PER_SAMPLE)
    loader = DataLoader(TensorDataset(X, y), batch_size=6)
    assert len(X) % 6
    empty = (X[:0], y[:0])
    for data in (loader, iter(batches), (b for b in batches), [list(b) for b in batches], [empty, *batches, empty]):
        assert_close(accumulate(model_fn, params, data, PER_SAMPLE), want, rtol=1e-12)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, C)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embedding(input_ids) * attention_mask.unsqueeze(2)).mean(1)


@pytest.mark.parametrize("kind", [dict, collections.UserDict])
@pytest.mark.parametrize("key", ["labels", "label"])
def test_batches_of_collators(kind: Any, key: str) -> None:
    model_fn, params = curvfunc.functionalize(Masked())
    parts = [(torch.randint(9, (n, 5)), torch.ones(n, 5), classes(n)) for n in (3, 2)]
    batches = [kind(input_ids=ids, attention_mask=mask, **{key: y}) for ids, mask, y in parts]
    ids, mask, y = map(torch.cat, zip(*parts, strict=True))
    want = curvfunc.compute(model_fn, params, {"input_ids": ids, "attention_mask": mask}, y, EXACT)
    assert_close(accumulate(model_fn, params, batches, EXACT), want, rtol=1e-12)


def test_split_takes_batches_apart() -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    batches = uneven(classes, 3)
    other = [{"image": X, "class": y} for X, y in batches]
    got = accumulate(model_fn, params, other, EXACT, split=lambda batch: (batch["image"], batch["class"]))
    assert_close(got, accumulate(model_fn, params, batches, EXACT), rtol=0.0)


def test_results_have_no_graph_and_the_data_is_not_changed() -> None:
    model = mlp()
    params = dict(model.named_parameters())
    model_fn, _ = curvfunc.functionalize(model)
    batches = uneven(classes, 4)
    before = optree.tree_map(torch.clone, batches)
    got = accumulate(model_fn, params, batches, EXACT)
    assert not any(t.requires_grad for t in optree.tree_leaves(got))
    assert all(torch.equal(a, b) for a, b in zip(optree.tree_leaves(batches), optree.tree_leaves(before), strict=True))


def test_devices() -> None:
    """On a device without values, copies and the refusal of mixed devices can be seen anywhere."""
    model_fn, params = curvfunc.functionalize(nn.Linear(4, C))
    batches = [(torch.randn(n, 4), torch.randn(n, C)) for n in (3, 2)]
    given = {"loss_fn": F.mse_loss, "specs": (curvfunc.Grad(), curvfunc.BatchGrad())}
    mixed = [batches[0], tuple(t.to("meta") for t in batches[1])]
    with pytest.raises(ValueError, match="batch 1: it is on meta and the parameters on cpu. Pass device='cpu'"):
        accumulate(model_fn, params, mixed, **given)
    grad, per_sample = accumulate(model_fn, params, batches, store_on="meta", **given)
    assert grad["weight"].device.type == "cpu"
    assert per_sample["weight"].device.type == "meta"
    assert per_sample["weight"].shape == (5, C, 4)
    copied = to_device({"a": batches[0]}, torch.device("meta"))
    assert {t.device.type for t in copied["a"]} == {"meta"}


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    on_gpu = {name: p.cuda() for name, p in params.items()}
    batches = uneven(partly_ignored)
    loader = [(X.pin_memory(), y.pin_memory()) for X, y in batches]
    loss_fn = partial(F.cross_entropy, weight=torch.tensor([0.5, 2.0, 1.0], device="cuda"))
    got = accumulate(model_fn, on_gpu, loader, EXACT, loss_fn=loss_fn, device="cuda", store_on="cpu")
    assert got[3]["0.weight"].device.type == "cpu"
    assert got[2]["0.weight"].device.type == "cuda"
    want = curvfunc.compute(model_fn, params, *whole(batches), EXACT, loss_fn=weighted())
    assert_close(optree.tree_map(Tensor.cpu, got), want, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("every", [1, 5])
def test_files_have_every_bit(dtype: torch.dtype, every: int, tmp_path: Path) -> None:
    """Also the lowest of the first entry, in files that grow."""
    model_fn, params = curvfunc.functionalize(nn.Linear(4, C).to(dtype))
    batches = [(X.to(dtype), y) for X, y in uneven(classes, 5)]
    given = {"loss_fn": nn.CrossEntropyLoss(reduction="sum")}
    files = {"out": tmp_path, "checkpoint": tmp_path / "state", "every": every}
    got = accumulate(model_fn, params, batches, PER_SAMPLE, **given, **files)
    for g, w in zip(*map(optree.tree_leaves, (got, accumulate(model_fn, params, batches, PER_SAMPLE, **given))), strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss(reduction="sum")])
@pytest.mark.parametrize("resumed", [False, True])
def test_results_in_files(loss_fn: Any, resumed: bool, tmp_path: Path) -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    batches = uneven(partly_ignored, 6)
    given: dict[str, Any] = {"loss_fn": loss_fn, "out": tmp_path / "out"}
    if resumed:
        given |= {"checkpoint": tmp_path / "state", "every": 2}
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "0-BatchGrad-0-0.weight.part").write_bytes(b"what another run has left" * 1000)
        with pytest.raises(RuntimeError, match="stop"):
            accumulate(model_fn, params, stopping(batches, 3), PER_SAMPLE, **given)
    got = accumulate(model_fn, params, batches, PER_SAMPLE, **given)
    want = curvfunc.compute(model_fn, params, *whole(batches), PER_SAMPLE, loss_fn=loss_fn)
    assert_close(got, want, rtol=1e-12)
    files = sorted(f.name for f in (tmp_path / "out").iterdir())
    assert files[:2] == ["0-BatchGrad-0-0.weight.bin", "0-BatchGrad-1-0.bias.bin"]
    assert len(files) == 9
    assert all(name.endswith(".bin") for name in files)
    again = torch.from_file(str(tmp_path / "out" / files[0]), size=want[0]["0.weight"].numel(), dtype=torch.float64)
    assert_close(again.view_as(want[0]["0.weight"]), want[0]["0.weight"], rtol=1e-12)
    if resumed:  # finished: files are opened, and no batch is computed
        assert_close(accumulate(model_fn, params, batches, PER_SAMPLE, **given), got, rtol=0.0)
        with pytest.raises(ValueError, match="more batches than when the files in .* were finished"):
            accumulate(model_fn, params, [*batches, batches[0]], PER_SAMPLE, **given)
        (tmp_path / "out" / files[0]).write_bytes(b"short")
        with pytest.raises(ValueError, match="is not what the checkpoint says"):
            accumulate(model_fn, params, batches, PER_SAMPLE, **given)


def test_files_are_called_by_their_parameters(tmp_path: Path) -> None:
    """Of nested parameters, whose order torch and optree see differently."""
    params = {"b": {"w": torch.randn(4, 2)}, "a": [torch.randn(2, C)]}
    model_fn = lambda p, X: (X @ p["b"]["w"]).tanh() @ p["a"][0]
    got = accumulate(model_fn, params, uneven(classes, 3), curvfunc.BatchGrad(), out=tmp_path)
    for name, result in (("b.w", got["b"]["w"]), ("a.0", got["a"][0])):
        (file,) = tmp_path.glob(f"0-BatchGrad-*-{name}.bin")
        assert torch.equal(torch.from_file(str(file), size=result.numel(), dtype=result.dtype), result.flatten())


def test_files_of_parameters_without_entries_and_of_other_types(tmp_path: Path) -> None:
    params = {"w": torch.randn(4, C, dtype=torch.bfloat16), "nothing": torch.zeros(0, dtype=torch.bfloat16)}
    model_fn = lambda p, X: X @ p["w"] + p["nothing"].sum()
    batches = [(X.bfloat16(), y) for X, y in uneven(classes, 3)]
    got = accumulate(model_fn, params, batches, PER_SAMPLE[:3], out=tmp_path)
    assert_close(got, accumulate(model_fn, params, batches, PER_SAMPLE[:3]), rtol=0.0)
    assert got[0]["nothing"].shape == (len(got[2]), 0)


def test_files_that_the_checkpoint_counts_on(tmp_path: Path) -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    batches, given = uneven(classes, 6), {"out": tmp_path / "out", "checkpoint": tmp_path / "state", "every": 2}
    with pytest.raises(RuntimeError, match="stop"):
        accumulate(model_fn, params, stopping(batches, 4), PER_SAMPLE, **given)
    next((tmp_path / "out").iterdir()).unlink()
    with pytest.raises(ValueError, match="lacks results that the checkpoint counts on"):
        accumulate(model_fn, params, batches, PER_SAMPLE, **given)


def test_decay() -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    batches = uneven(classes, 4)
    specs = (curvfunc.KFLR(), curvfunc.Variance())
    acc = curvfunc.accumulation(model_fn, params, specs, decay=0.7)
    state = acc.init()
    for X, y in batches:
        state = acc.update(state, params, X, y)
    assert_close(accumulate(model_fn, params, batches, specs, decay=0.7), acc.result(state), rtol=1e-12)


def test_memory_stays_flat() -> None:
    """Over 300 batches of sums, not even a hundredth of what one of them adds to memory may stay."""
    model_fn, params = curvfunc.functionalize(nn.Linear(1000, 100))

    def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        for k in range(count):
            yield torch.full((2, 1000), k / 300), torch.zeros(2, 100)

    def largest(count: int) -> int:
        accumulate(model_fn, params, batches(count), (curvfunc.Grad(), curvfunc.Variance()), loss_fn=F.mse_loss)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = largest(30)
    result_kilobytes = 8 * 1000 * 100 // 1024
    assert largest(300) - before < 10 * result_kilobytes  # 300 of each of three sums would be 900 times as much


# -- interruption


def stopping(batches: Any, after: int) -> Iterator[Any]:
    for number, batch in enumerate(batches):
        if number == after:
            raise RuntimeError("stop")
        yield batch


def killed(folder: Path, after: int, *words: str) -> None:
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root / "tests" / "shared"), str(root)])}
    command = [sys.executable, interrupted.__file__, str(folder), str(after), *words]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert found.returncode == -signal.SIGKILL, found.stderr


@pytest.mark.parametrize(("words", "every"), [(("memory", "own"), 4), (("out", "default"), 4)])
def test_killed_and_resumed_is_bit_for_bit_the_same(words: tuple[str, str], every: int, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    given: dict[str, Any] = {"out": words[0] == "out", "own": words[1] == "own", "every": every}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    want = interrupted.run(tmp_path / "whole", interrupted.BATCHES, **given)
    killed(tmp_path / "killed", 11, *words)
    state = torch.load(tmp_path / "killed" / "state.pt", weights_only=True)
    assert state["done"] == 8
    got = interrupted.run(tmp_path / "killed", interrupted.BATCHES, **given)
    assert_close(got, want, rtol=0.0)
    finished = interrupted.run(tmp_path / "killed", interrupted.BATCHES, **given)
    assert_close(finished, want, rtol=0.0)


def test_the_state_holds_tensors_numbers_and_text(tmp_path: Path) -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    accumulate(model_fn, params, uneven(classes, 3), EXACT, checkpoint=tmp_path / "state")
    content = torch.load(tmp_path / "state", weights_only=True)
    leaves = optree.tree_leaves(content, none_is_leaf=True)
    assert all(t is None or isinstance(t, Tensor | int | float | str) for t in leaves)
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_the_state_goes_through_distributed_checkpoints(tmp_path: Path) -> None:
    checkpoints = pytest.importorskip("torch.distributed.checkpoint")
    model_fn, params = curvfunc.functionalize(mlp())
    *batches, last = uneven(classes, 3)
    acc = curvfunc.accumulation(model_fn, params, PER_SAMPLE)
    state, other = acc.init(), acc.init()
    for X, y in batches:
        state, other = acc.update(state, params, X, y), acc.update(other, params, 2 * X, y)
    checkpoints.save({"state": state}, checkpoint_id=tmp_path)
    loaded = {"state": other}
    checkpoints.load(loaded, checkpoint_id=tmp_path)
    want, got = (acc.result(acc.update(s, params, *last)) for s in (state, loaded["state"]))
    assert_close(got, want, rtol=0.0)


def test_a_kill_while_writing_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    batches, given = uneven(classes, 6), {"checkpoint": tmp_path / "state", "every": 2}
    write, calls = torch.save, []

    def half(content: Any, file: io.BufferedWriter) -> None:
        calls.append(content["done"])
        write(content, file)
        if len(calls) == 2:
            file.truncate(100)
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        accumulate(model_fn, params, batches, EXACT, **given)
    assert torch.load(tmp_path / "state", weights_only=True)["done"] == 2
    got = accumulate(model_fn, params, batches, EXACT, **given)
    assert_close(got, accumulate(model_fn, params, batches, EXACT), rtol=0.0)
    assert calls == [2, 4, 4, 6, 6]


class Changes:
    """A first run, and the arguments of a second one."""

    def __init__(self, folder: Path) -> None:
        self.model = mlp()
        self.model_fn, self.params = curvfunc.functionalize(self.model)
        self.batches = uneven(classes, 6)
        self.path = folder / "state"
        self.run(stopping(self.batches, 4), every=2)

    def run(self, data: Any = None, **changed: Any) -> Any:
        given = {"specs": (curvfunc.Grad(), curvfunc.Loss()), "checkpoint": self.path, "params": self.params} | changed
        try:
            return accumulate(self.model_fn, data=self.batches if data is None else data, **given)
        except RuntimeError as error:
            assert str(error) == "stop"  # noqa: PT017


def test_a_quantity_in_another_basis_is_another_run(tmp_path: Path) -> None:
    """What is shown of it is the same."""
    model_fn, params = curvfunc.functionalize(mlp())
    batches = uneven(classes, 6)
    structure = curvfunc.kronecker.structure(model_fn, params, batches[0][0])
    bases = [curvfunc.kronecker.decompose(curvfunc.kflr(model_fn, params, *batch), structure) for batch in batches[:2]]
    specs = [curvfunc.kronecker.EKFAC(decomposition=K) for K in bases]
    assert repr(specs[0]) == repr(specs[1])
    given = {"checkpoint": tmp_path / "state", "every": 2}
    with pytest.raises(RuntimeError, match="stop"):
        accumulate(model_fn, params, stopping(batches, 4), specs[0], **given)
    with pytest.raises(ValueError, match="is of another run: specs differ"):
        accumulate(model_fn, params, batches, specs[1], **given)
    torch.manual_seed(0)
    assert accumulate(model_fn, params, batches, specs[0], **given).keys() == params.keys()


@pytest.fixture
def run(tmp_path: Path) -> Changes:
    return Changes(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"specs": (curvfunc.Grad(), curvfunc.DiagGGN())}, "is of another run: specs differ"),
        ({"specs": [curvfunc.Grad(), curvfunc.Loss()]}, "is of another run: specs differ"),
        ({"loss_fn": nn.CrossEntropyLoss(reduction="sum")}, "is of another run: loss differ"),
        ({"loss_fn": nn.CrossEntropyLoss(weight=torch.ones(3).double())}, "is of another run: loss differ"),
        ({"decay": 0.9}, "is of another run: decay differ"),
        ({"generator": torch.Generator()}, "is of another run: generator differ"),
    ],
)
def test_a_checkpoint_of_another_run(run: Changes, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run.run(**changed)


def test_a_checkpoint_at_other_parameters_or_of_another_model(run: Changes) -> None:
    with pytest.raises(ValueError, match="parameters differ.*or remove the file to start anew"):
        run.run(params={name: p + 1e-12 for name, p in run.params.items()})
    run.model.eval()
    with pytest.raises(ValueError, match="model differ"):
        run.run()


def test_a_checkpoint_of_other_data(run: Changes) -> None:
    with pytest.raises(ValueError, match="the first 4 batches are not those that checkpoint .* has seen"):
        run.run([run.batches[1], run.batches[0], *run.batches[2:]])
    with pytest.raises(ValueError, match="has 3 batches, and the checkpoint .* from after batch 4"):
        run.run(run.batches[:3])
    assert_close(run.run(), run.run(checkpoint=None), rtol=0.0)


def test_a_file_that_is_no_checkpoint(run: Changes) -> None:
    for content in (b"text", b""):
        run.path.write_bytes(content)
        with pytest.raises(ValueError, match="is no checkpoint of accumulate"):
            run.run()
    torch.save({"version": 0}, run.path)
    with pytest.raises(ValueError, match="another version"):
        run.run()


def test_losses_of_ones_own_are_told_apart() -> None:
    def power(k: float) -> Callable[..., Tensor]:
        return lambda out, y: ((out - y).abs() ** k).sum()

    scale = torch.ones(3)
    described = [
        checkpoints.described(f)
        for f in (
            power(2.0),
            power(3.0),
            lambda out, y: (out - y).sum(),
            lambda out, y: (out - y).mean(),
            lambda out, y: ((out - y) * scale).mean(),
            nn.HuberLoss(delta=1.0),
            nn.HuberLoss(delta=2.0),
            partial(F.l1_loss, reduction="sum"),
            partial(F.l1_loss, reduction="mean"),
        )
    ]
    assert len(set(described)) == len(described)
    assert checkpoints.described(power(2.0)) == described[0]


# -- bad input


@pytest.mark.parametrize("data", [[], iter([]), (b for b in [])])
def test_no_batches(data: Any) -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    with pytest.raises(ValueError, match="data gave no batches"):
        accumulate(model_fn, params, data, curvfunc.Grad())


def test_no_samples() -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    with pytest.raises(ValueError, match="data gave 2 batches without samples"):
        accumulate(model_fn, params, 2 * [(torch.randn(0, 4), classes(0))], curvfunc.Grad())


X0, Y0 = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("second", "error", "message"),
    [
        ((X0.double(), Y0.float()), ValueError, "batch 1 has another structure than the first one: y.*float32.*there.*int64"),
        (({"input": X0.double()}, Y0), ValueError, "batch 1 has another structure than the first one: X: dict with"),
        ((X0.double()[0], Y0), ValueError, "batch 1 has another structure .* with 1 axes"),
        ((X0.double(), Y0, Y0), TypeError, "batch 1 is a tuple of length 3; data must give pairs"),
        (X0, TypeError, "batch 1 is a Tensor; data must give pairs"),
        ({"input_ids": X0}, ValueError, "batch 1 is a mapping .* one of which is needed. Pass split="),
        ({"labels": X0, "label": X0}, ValueError, "batch 1 is a mapping"),
    ],
)
def test_batches_of_other_structure(second: Any, error: type[Exception], message: str) -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    with pytest.raises(error, match=message):
        accumulate(model_fn, params, [(X0.double(), Y0), second], curvfunc.Grad())


def test_results_of_other_shapes() -> None:
    model_fn, params = curvfunc.functionalize(nn.Conv1d(2, C, 2))
    batches = [(torch.randn(2, 2, length), torch.randint(C, (2, length - 1))) for length in (4, 5)]
    with pytest.raises(
        ValueError, match=r"batch 1 has other results .* Output has shape \(3, 4\) for a sample, and there \(3, 3\)"
    ):
        accumulate(model_fn, params, batches, curvfunc.Output())
    loss = accumulate(model_fn, params, batches, curvfunc.Loss())
    total = [F.cross_entropy(model_fn(params, X), y, reduction="sum") for X, y in batches]
    assert_close(loss, sum(total) / (2 * 3 + 2 * 4), rtol=1e-12)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"store_on": "cpu", "out": "somewhere"}, ValueError, "store_on keeps .* in files. Pass one of them"),
        ({"every": 0}, ValueError, "every must be a positive int"),
        ({"data": X0}, TypeError, "data is a Tensor; an iterable of batches"),
        ({"data": 3}, TypeError, "data is a int; an iterable of batches"),
        ({"split": lambda batch: batch[0]}, TypeError, "split must return the pair"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator"),
        ({"specs": curvfunc.KFRA()}, ValueError, "KFRA of several batches"),
    ],
)
def test_bad_arguments(given: Any, error: type[Exception], message: str) -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    arguments = {"data": [(X0.double(), Y0)], "specs": curvfunc.Grad()} | given
    with pytest.raises(error, match=message):
        accumulate(model_fn, params, **arguments)


def test_errors_of_a_batch_say_which() -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    with pytest.raises(ValueError, match="out of range") as caught:
        accumulate(model_fn, params, [(X0.double(), Y0), (X0.double(), Y0 + 7)], curvfunc.Grad())
    assert "This was batch 1 of the data" in caught.value.__notes__[0]


def test_losses_whose_scale_is_not_known() -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    batches = uneven(partly_ignored, 6)

    def masked(out: Tensor, y: Tensor) -> Tensor:
        kept = y >= 0
        return (kept * F.cross_entropy(out, y, reduction="none")).sum() / kept.sum().clamp(min=1)

    with pytest.raises(ValueError, match=r"masked is neither a sum nor a mean over samples.*Pass reduction='sum', 'mean'"):
        accumulate(model_fn, params, batches, curvfunc.Grad(), loss_fn=masked)
    got = accumulate(model_fn, params, batches, EXACT[:9], loss_fn=masked, reduction=lambda out, y: (y >= 0).sum())
    assert_close(got, curvfunc.compute(model_fn, params, *whole(batches), EXACT[:9]), rtol=1e-11)
    with pytest.raises(ValueError, match="all gradients of loss_fn are zero"):
        accumulate(model_fn, params, batches, curvfunc.Grad(), loss_fn=lambda out, y: 0 * out.sum())
    X, y = torch.randn(3, 4), classes(3)
    with pytest.raises(ValueError, match="loss_fn is a mean for the first batch, and a sum for this one"):
        accumulate(model_fn, params, [(X, y), (X, torch.full_like(y, -100))], curvfunc.Grad(), loss_fn=masked)


@pytest.mark.parametrize("name", ["custom, mean", "custom, sum"])
def test_losses_of_ones_own_go_on_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    make, targets = LOSSES[name]
    model_fn, params = curvfunc.functionalize(mlp())
    batches, given = uneven(targets, 7), {"loss_fn": make(), "checkpoint": tmp_path / "state", "every": 2}
    with pytest.raises(RuntimeError, match="stop"):
        accumulate(model_fn, params, stopping(batches, 4), EXACT, **given)
    got = accumulate(model_fn, params, batches, EXACT, **given)
    assert_close(got, curvfunc.compute(model_fn, params, *whole(batches), EXACT, loss_fn=given["loss_fn"]), rtol=1e-12)


def test_inside_of_transformations() -> None:
    model_fn, params = curvfunc.functionalize(mlp())
    with pytest.raises(ValueError, match=r"use curvfunc\.accumulation inside"):
        torch.func.grad(lambda p: accumulate(model_fn, p, [(X0.double(), Y0)], curvfunc.Loss()))(params)


# -- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "shown"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_progress(stream: Any, progress: bool, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if shown:
        pytest.importorskip("tqdm")
    model_fn, params = curvfunc.functionalize(mlp())
    screen = stream()
    monkeypatch.setattr(sys, "stderr", screen)
    accumulate(model_fn, params, uneven(classes, 3), curvfunc.Loss(), progress=progress)
    assert ("3/3" in screen.getvalue()) == shown


def test_progress_of_a_run_that_goes_on(run: Changes, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    run.run()
    assert "6/6" in screen.getvalue()


def test_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    model_fn, params = curvfunc.functionalize(mlp())
    accumulate(model_fn, params, uneven(classes, 3), curvfunc.Loss())
    assert not screen.getvalue()
