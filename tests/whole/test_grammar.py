"""Random models against plain autograd: no architecture may give a wrong number silently.

The grammar is in `grammar`, the definitions are in `definition`, and what models are put through in `trials`. Many more
models, of other seeds, run with ``python tests/shared/fuzz.py``.
"""

import random
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from fuzz import defect, label, minimised, paths_of
from grammar import PIECES, Node, Program, Shape, random_program, single, smaller
from helpers import assert_close
from trials import PATHS, Case, outcomes, text, trials

import curvfunc
from curvfunc import reference

pytestmark = pytest.mark.usefixtures("float64")

LAYERS = [name for name, piece in PIECES.items() if piece.group != "frame"]


def defects(program: Program, paths: list[str]) -> list[str]:
    """What should not be, in words."""
    case = Case(program)
    return [
        f"{label(program, trial.path, outcome)}: {trial.path}, {quantity}: {outcome.detail}"
        for trial in trials(program, paths)
        for quantity, outcome in outcomes(case, trial).items()
        if defect(program, trial.path, outcome)
    ]


def assert_right(program: Program, paths: list[str]) -> None:
    found = defects(program, paths)
    assert not found, "\n".join([*found, program.source])


@pytest.mark.parametrize("seed", range(60))
def test_random_models(seed: int) -> None:
    assert_right(random_program(seed), [path for path in paths_of(seed) if path != "compile"])


@pytest.mark.parametrize("name", LAYERS)
def test_each_piece(name: str) -> None:
    others = [path for path in PATHS if path not in ("eager", "compile", "threads")]
    for seed in range(2):
        path = random.Random(f"{name} {seed}").choice(others)
        assert_right(single(name, seed, time=bool(seed)), ["eager", path])


@pytest.mark.parametrize("name", ["linear", "in_place", "complex_linear", "hidden_then_in_place"])
def test_compiled(name: str) -> None:
    assert_right(single(name, 0), ["compile"])


def test_threads() -> None:
    assert_right(single("linear", 0), ["threads"])


# -- the tools themselves


@pytest.mark.parametrize("name", ["linear", "conv", "attention", "recurrent", "in_place", "tied", "part"])
def test_the_definition_is_the_reference(name: str) -> None:
    case = Case(single(name, 3))
    truth, ns = case.truth(), case.namespace
    arguments = ns["model_fn"], ns["params"], ns["X"], ns["y"]
    for quantity in ("batch_grad", "batch_l2", "sum_grad_squared", "variance", "sqrt_ggn", "diag_ggn", "batch_diag_ggn"):
        assert_close(truth.quantity(quantity), getattr(reference, quantity)(*arguments, loss_fn=ns["loss_fn"]))
    assert_close(truth.blocks([0]), {k: f[0] for k, f in blocks(arguments, ns["loss_fn"]).items()})


def blocks(arguments: Any, loss_fn: Any) -> Any:
    """Exact blocks by the reference: every parameter's columns as a use of no known kind."""
    root = reference.sqrt_ggn(*arguments, loss_fn=loss_fn, subsampling=[0])
    return {k: ((m := r.reshape(-1, r[0, 0].numel())).mT @ m,) for k, r in root.items()}


def test_the_definition_of_second_order() -> None:
    case = Case(single("activation", 0))
    ns, truth = case.namespace, case.truth()
    sizes = {k: p.shape for k, p in ns["params"].items()}
    loss = lambda p: ns["loss_fn"](ns["model_fn"](p, ns["X"]), ns["y"])
    hessian = torch.func.hessian(loss)(ns["params"])
    rows = [torch.cat([hessian[a][b].reshape(sizes[a].numel(), -1) for b in sizes], 1) for a in sizes]
    assert_close(truth.hessian, torch.cat(rows))
    v = torch.randn(len(truth.hessian))
    assert_close(truth.each_along(v).sum(0), truth.hessian @ v)


def test_samples_that_influence_each_other_have_a_definition() -> None:
    """The gradients of all samples' terms add up to that of the loss, whatever the model does."""
    for name in (name for name in LAYERS if PIECES[name].group == "mix"):
        case = Case(single(name, 1))
        net = case.namespace["make"]()
        case.namespace["loss_fn"](net(case.X.clone()), case.namespace["y"]).backward()
        truth = case.truth()
        want = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in net.named_parameters()}
        assert_close(truth.flat(want), truth.grads.sum(0), 1e-9)


def test_what_is_wrong_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that needs one piece comes back as a program with that piece alone, which runs as printed."""
    right = curvfunc.batch_grad

    def wrong(model_fn: Any, params: Any, X: Any, y: Any, **options: Any) -> Any:
        result = right(model_fn, params, X, y, **options)
        return {k: 2 * g if g.ndim == 4 else g for k, g in result.items()}

    monkeypatch.setattr(curvfunc, "batch_grad", wrong)
    body = (Node("stem", 1), Node("residual", 2, (Node("conv", 3),)), Node("activation", 4), Node("head", 5))
    program = Program(Shape(3, 3, 4), body, 0, "F.mse_loss", True)
    assert any(found.startswith("wrong: eager, batch_grad") for found in defects(program, ["eager"]))
    short, trial, outcome = minimised(program, "eager", "batch_grad", "wrong")
    assert (short.pieces, short.shape.n, short.function) == (["conv"], 2, False) or short.pieces == ["conv", "head"]
    assert outcome.kind == "wrong"
    monkeypatch.undo()
    namespace: dict[str, Any] = {}
    exec(text(short, trial), namespace)
    got, want = namespace["got"]["batch_grad"], namespace["want"]
    assert_close(got, {k: torch.stack([w[k] for w in want]) for k in got})


def test_smaller_programs_are_smaller() -> None:
    def size(program: Program) -> int:
        count = sum(1 for top in program.body for _ in top)
        return count + sum(program.shape) + program.function + (program.loss != "F.cross_entropy")

    for seed in range(20):
        program = random_program(seed)
        assert all(size(less) < size(program) for less in smaller(program))


def test_programs_are_reproducible() -> None:
    assert random_program(5).source == random_program(5).source
    first, second = (Case(random_program(5)).truth().grads for _ in range(2))
    assert torch.equal(first, second)


def test_the_runner() -> None:
    """In a process of its own: those that it makes have no threads of autograd's then."""
    import fuzz

    command = [sys.executable, fuzz.__file__, "--seeds", "0", "1", "--pieces", "linear", "--paths", "eager"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (right,) = re.findall(r"1 models; (\d+) right, 0 refused, 0 refused although right, 0 crashed, 0 wrong", shown)
    assert int(right) >= 20
