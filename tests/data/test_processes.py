"""Several processes have what one would have; when one of them fails, all do."""

import importlib
import os
import subprocess
import sys
from typing import Any

import pytest
import several
import torch
import torch.distributed as dist
from documents import ROOT
from helpers import assert_close
from several import EXACT, LOSSES, OPERATORS, SAMPLED, SHARDED, SIZES, WEIGHED, problem, share
from torch import nn

import curvfunc
from curvfunc.quantities.laws import Joined

PAIR = (3, 9)  # samples of two processes


@pytest.fixture(autouse=True)
def _double(float64: None) -> None:
    """All in float64."""


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Run once, also where tests are divided among workers, each of which may need it."""
    folder = several.shared_folder(tmp_path_factory, "three")
    others = ("sampled", "alone", "wrapped", "fully_sharded", "placements", "operators", "drawn", "products", "refused")
    others += ("differing", "late", "killed")
    calls: list[tuple[Any, ...]] = [("equal", name) for name in LOSSES]
    calls += [("pair", PAIR), ("pairs_of_operators", PAIR), ("loops", folder), *[(name,) for name in others]]
    names = [*LOSSES, "pair", "pairs_of_operators", "loops", *others]
    found = several.run_once(3, folder, *calls)
    return {rank: dict(zip(names, results, strict=rank != 1)) for rank, results in found.items()}


def of_all(specs: Any, targets: str = "classes", **given: Any) -> Any:
    """What one process has for all samples."""
    net, X, y = problem(targets)
    return curvfunc.compute(*curvfunc.functionalize(net), X, y, specs, **given)


def check_equal(found: Any, name: str, rank: int, sizes: Any) -> None:
    make, targets, _ = LOSSES[name]
    want = of_all(EXACT, targets, loss_fn=make())
    everything, (own_grads, own_roots) = found
    assert_close(everything, want, rtol=1e-12)
    grads, roots = (want[EXACT.index(s)] for s in (curvfunc.BatchGrad(), curvfunc.SqrtGGN()))
    for key in grads:
        assert len(own_grads[key]) == sizes[rank]
        (grad,), (root,) = share(rank, grads[key], sizes=sizes), share(rank, roots[key].transpose(0, 1), sizes=sizes)
        if sizes[rank]:
            assert_close(own_grads[key], grad, rtol=1e-12)
            assert_close(own_roots[key], root.transpose(0, 1), rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_three_processes_are_one(three: dict[int, dict[str, Any]], name: str) -> None:
    """Also where one of them has no samples."""
    for rank, found in three.items():
        check_equal(found[name], name, rank, SIZES)


@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_are_one(three: dict[int, dict[str, Any]], name: str) -> None:
    for rank in (0, 1):
        check_equal(three[rank]["pair"][name], name, rank, PAIR)


def test_loops_over_batches_files_and_checkpoints(three: dict[int, dict[str, Any]]) -> None:
    want = of_all(EXACT, "ignored")
    joined = [isinstance(spec.laws[0], Joined) for spec in EXACT]
    for rank, found in three.items():
        first, again, gathered = found["loops"]
        assert_close(gathered, want, rtol=1e-12)
        for results in (first, again):
            sums = [r for r, per_sample in zip(results, joined, strict=True) if not per_sample]
            assert_close(sums, [r for r, per_sample in zip(want, joined, strict=True) if not per_sample], rtol=1e-12)
            own = EXACT.index(curvfunc.BatchGrad())
            assert len(results[own]["0.weight"]) == SIZES[rank]
            torch.testing.assert_close(results[own]["0.weight"], share(rank, want[own]["0.weight"])[0], rtol=1e-12, atol=0)


def test_draws_are_those_of_the_processes(three: dict[int, dict[str, Any]]) -> None:
    net, X, y = problem()
    model_fn, params = curvfunc.functionalize(net)
    parts = curvfunc.accumulation(model_fn, params, SAMPLED)
    state = parts.init()
    for rank in (0, 2):
        state = parts.update(state, params, *share(rank, X, y), generator=torch.Generator().manual_seed(rank))
    for found in three.values():
        assert_close(found["sampled"], parts.result(state), rtol=1e-12)


def test_a_group_of_one(three: dict[int, dict[str, Any]]) -> None:
    assert_close(three[2]["alone"], of_all(EXACT), rtol=1e-12)
    for rank in (0, 1):
        kind, message = three[rank]["alone"]
        assert kind == "ValueError"
        assert "not in the group" in message


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", WEIGHED)
def test_operators_of_three_processes_and_of_two(three: dict[int, dict[str, Any]], name: str, kind: str) -> None:
    """Of a batch each, and of data sets."""
    make, targets, _ = WEIGHED[name]
    net, X, y = problem(targets)
    if not several.applies(kind, name):
        assert not any((name, kind) in found["operators"] for found in three.values())
        return
    want = OPERATORS[kind](*curvfunc.functionalize(net), X, y, loss_fn=make()).dense()
    assert want.norm() > 1e-3
    for found in [found["operators"] for found in three.values()] + [three[rank]["pairs_of_operators"] for rank in (0, 1)]:
        assert len(found[name, kind]) == 3
        for dense in found[name, kind]:
            assert_close(dense, want, rtol=1e-12)


def test_draws_of_operators_are_those_of_the_processes(three: dict[int, dict[str, Any]]) -> None:
    for i in (0, 1):
        first, _, last = (three[rank]["drawn"][i][1] for rank in range(3))
        for found in three.values():
            assert_close(found["drawn"][i][0], (SIZES[0] * first + SIZES[2] * last) / sum(SIZES), rtol=1e-12)


def test_products_estimators_and_linear_systems(three: dict[int, dict[str, Any]]) -> None:
    net, X, y = problem("ignored")
    model_fn, params = curvfunc.functionalize(net)
    want = curvfunc.ggn_operator(model_fn, params, X, y)
    sampled = curvfunc.hutchinson_trace(want, 5, generator=torch.Generator().manual_seed(3))
    for found in three.values():
        for product, values, trace, solution in found["products"]:
            assert_close(product, want @ params, rtol=1e-12)
            assert_close(values, torch.linalg.eigvalsh(want.dense())[-len(values) :], rtol=1e-9)
            assert_close(trace, sampled, rtol=1e-12)
            assert_close((2 * want + 0.1) @ solution, params, rtol=1e-4)


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("vectors", "ValueError", ("differ in the vector that is multiplied: rank 1 has", "Seed")),
        ("places", "ValueError", ("differ in the vector that is multiplied: rank 1 has",)),
        ("numbers of vectors", "ValueError", ("differ in the vector that is multiplied: rank 1 has",)),
        ("vmap", "NotImplementedError", ("sends messages", "operator @ matrix")),
        ("pickled", "TypeError", ("cannot be pickled",)),
        ("copied", "TypeError", ("cannot be pickled or copied",)),
        ("matrix", "ValueError", ("differ in the matrix: ranks 1, 2 have",)),
        ("draws", "ValueError", ("differ in the matrix: ranks 1, 2 have",)),
        ("loss", "ValueError", ("differ in loss_fn",)),
        ("losses", "ValueError", ("a sum in some processes, and a mean in others", "reduction=")),
        ("values", "ValueError", ("the values of parameter '0.weight'", "Broadcast")),
        ("containers", "ValueError", ("differ in parameters",)),
        ("no samples", "ValueError", ("no samples in any process",)),
        ("no batches", "ValueError", ("no samples in any process",)),
        ("subsampling", "ValueError", ("subsampling is of one batch",)),
        ("split", "ValueError", ("split is for data sets",)),
        ("reduction", "ValueError", ("reduction is for losses of one's own",)),
        ("unknown mean", "ValueError", ("neither a sum nor a mean", "reduction=")),
    ],
)
def test_operators_refuse_alike(three: dict[int, dict[str, Any]], case: str, kind: str, words: tuple[str, ...]) -> None:
    for found in three.values():
        raised, message = found["refused"][case]
        assert raised == kind, message
        assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("case", "words"),
    {
        "one asks for what is not": "mc_samples must be 0",
        "one has bad targets": "",
        "one has an iterator": "gives its batches once",
        "one has no targets": "y is missing",
        "changing": "batch 0 of the data is not what it was at first",
    }.items(),
)
def test_an_operator_that_raises_takes_the_others_with_it(three: dict[int, dict[str, Any]], case: str, words: str) -> None:
    kind, own = three[0]["refused"][case]
    assert kind in ("ValueError", "TypeError", "IndexError")
    assert words in own
    for rank in (1, 2):
        assert three[rank]["refused"][case] == (
            "GroupError",
            f"there is no result. Rank 0 of the group has failed: {kind}: {own}",
        )


def test_models_in_distributed_data_parallel(three: dict[int, dict[str, Any]]) -> None:
    want = of_all(SHARDED)
    net, X, y = problem()
    operator = curvfunc.ggn_operator(*curvfunc.functionalize(net), X, y)
    for rank, found in three.items():
        names, (results, ggn), _, inside, trains = found["wrapped"]
        assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]  # without "module."
        assert_close(results, want, rtol=1e-12)
        assert_close(ggn, operator.dense(), rtol=1e-12)
        assert trains
        assert not rank or "0.module.0.weight" in inside


def test_fully_sharded_models(three: dict[int, dict[str, Any]]) -> None:
    """Twice: from a function made before it was sharded, and after a forward pass of its own; one parameter is fixed."""
    want = [{k: t for k, t in r.items() if k != "2.bias"} if isinstance(r, dict) else r for r in of_all(SHARDED)]
    for rank, found in three.items():
        steps, trains, *errors, others, operator = found["fully_sharded"]
        assert rank == 2 or (
            others[0] == "ValueError" and "sharded over ranks [0, 1, 2], and the group has [0, 1]" in others[1]
        )
        for kinds, results in steps:
            assert kinds == ["Tensor", *4 * ["DTensor"], "tuple", "DTensor", "Tensor"]
            assert_close(results, want, rtol=1e-12)
        assert len(steps) == 2
        assert trains
        for kind, message in (*errors, operator):
            assert kind == "TypeError"
            assert "'0.weight' is a DTensor" in message
            assert "group=" in message
            assert "full_tensor" in message


def test_other_placements(three: dict[int, dict[str, Any]]) -> None:
    for found in three.values():
        kinds, results = found["placements"]
        assert kinds == ["Tensor", *4 * ["DTensor"], "tuple", "DTensor", "Tensor"]
        assert_close(results, list(of_all(SHARDED)), rtol=1e-12)


@pytest.mark.parametrize(
    ("case", "words"),
    {
        "specs": ("differ in specs", "ranks 1, 2 have not what rank 0 has"),
        "loss": ("differ in loss_fn",),
        "shapes": ("differ in parameters", "2.bias"),
        "values": ("the values of parameter '0.weight'", "Broadcast"),
        "buffers": ("the values of buffer or fixed parameter '1.running_mean'", "Broadcast"),
        "gather": ("differ in gather",),
        "mode": ("differ in training mode",),
        "no samples": ("no samples in any process",),
        "gram": ("BatchDot of several batches", "inner products of samples with each other"),
        "kfra": ("KFRA of several batches",),
        "out": ("out is for the results of one process",),
        "own mean": ("neither a sum nor a mean", "reduction="),
        "shapes of samples": ("Output has other results in rank", "same shapes"),
        "decay": ("decay", "several processes"),
        "files": ("gather", "out"),
    }.items(),
)
def test_all_refuse_alike(three: dict[int, dict[str, Any]], case: str, words: tuple[str, ...]) -> None:
    for found in three.values():
        kind, message = found["differing"][case]
        assert kind == "ValueError", message
        assert all(word in message for word in words), message


@pytest.mark.parametrize("case", ["one raises", "one raises at once", "one subsamples", "in the loop", "devices"])
def test_one_that_raises_takes_the_others_with_it(three: dict[int, dict[str, Any]], case: str) -> None:
    kind, own = three[0]["differing"][case]
    assert kind in ("ValueError", "TypeError")
    for rank in (1, 2):
        kind, message = three[rank]["differing"][case]
        assert kind == "GroupError"
        assert message == f"there is no result. Rank 0 of the group has failed: {three[0]['differing'][case][0]}: {own}"


def test_the_group_works_after_errors(three: dict[int, dict[str, Any]]) -> None:
    assert all(found["differing"]["as before"] == ("", "no error") for found in three.values())


@pytest.mark.parametrize("how", ["late", "killed"])
def test_one_that_is_gone(three: dict[int, dict[str, Any]], how: str) -> None:
    for rank in (0, 2):
        (kind, message), seconds, *product = three[rank][how]
        assert kind == "GroupError"
        assert "rank 1 has not come in time, or died" in message
        assert seconds < several.TIMEOUT + 3
        for kind, message in product:  # of an operator that was made before
            assert kind == "GroupError"
            assert "rank 1 has not come in time, or died" in message
    assert "killed" not in three[1]


def test_what_is_no_group() -> None:
    net, X, y = problem()
    model_fn, params = curvfunc.functionalize(net)
    with pytest.raises(TypeError, match="group must be a process group of torch.distributed or None, got str"):
        curvfunc.compute(model_fn, params, X, y, curvfunc.Grad(), group="gloo")
    for given in ({"gather": True}, {"reduction": "sum"}):
        with pytest.raises(ValueError, match="Pass group="):
            curvfunc.compute(model_fn, params, X, y, curvfunc.Grad(), **given)
    with pytest.raises(ValueError, match="Pass group="):
        curvfunc.accumulate(model_fn, params, [(X, y)], curvfunc.Grad(), gather=True)
    assert_close(curvfunc.compute(model_fn, params, X, y, curvfunc.Grad(), group=dist.group.WORLD), of_all(curvfunc.Grad()))


def test_the_example_runs() -> None:
    """Without torchrun it starts two processes."""
    pytest.importorskip("sklearn")
    command = [sys.executable, str(ROOT / "examples" / "distributed.py"), "--samples", "101"]
    found = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    lines = found.stdout.splitlines()
    assert lines[0] == "101 digits on 2 processes; largest difference from one process:"
    assert len(lines) == 8
    assert lines[-1] == "equal"


def test_flattened_parameters_are_refused() -> None:
    kind = type("FullyShardedDataParallel", (nn.Linear,), {"__module__": "torch.distributed.fsdp.fully_sharded_data_parallel"})
    importlib.import_module("torch.distributed.fsdp")
    with pytest.raises(TypeError, match=r"1 is wrapped in FullyShardedDataParallel.*Use torch.distributed.fsdp.fully_shard"):
        curvfunc.functionalize(nn.Sequential(nn.Linear(2, 2), kind(2, 2)))
