"""Two processes with parts of each batch do what one process does with all of it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import nn

import curvfunc
from curvfunc import KFLR, DiagGGN, EmpiricalKFAC, kronecker, optim

STEPS = 4
CUT = 5  # unequal parts, 5 and 7 samples
LOSSES: dict[str, Callable[..., Any]] = {
    "mean": F.cross_entropy,
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "own": lambda out, y: (out.logsumexp(1) + out.square().sum(1) - out.gather(1, y[:, None])[:, 0]).mean(),
}


def methods(structure: Any) -> dict[str, optim.Transformation]:
    return {
        "diagonal": optim.scale_by_diagonal(DiagGGN(), damping=0.1, every=2),
        "kfac": optim.scale_by_kfac(structure, KFLR(joined=True), damping=0.1, factors_every=2, inverses_every=4),
        "ekfac": optim.scale_by_ekfac(structure, KFLR(joined=True), damping=0.1, factors_every=2, bases_every=4),
        "ekfac, empirical": optim.scale_by_ekfac(structure, EmpiricalKFAC(), damping=0.1, bases_every=4),
        "newton": optim.newton_cg(iterations=5),
    }


def make() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def train(part: slice, group: Any = None) -> dict[str, Any]:
    """What all methods leave, both pure and as an optimizer."""
    generator = torch.Generator().manual_seed(5)
    data = [(torch.randn(12, 3, generator=generator), torch.randint(3, (12,), generator=generator)) for _ in range(STEPS)]
    found: dict[str, Any] = {}
    for reduction, loss_fn in LOSSES.items():
        model_fn, start = curvfunc.functionalize(make())
        for name, kind in methods(kronecker.structure(model_fn, start, data[0][0])).items():
            params, method = start, optim.chain(kind, optim.scale(-0.1))
            state = method.init(params)
            for X, y in data:
                loss, params, state = optim.step(
                    model_fn, method, params, state, X[part], y[part], loss_fn=loss_fn, group=group
                )
            found[f"{name}, {reduction}"] = {"loss": loss, "params": params}
        model = make()
        optimizer = optim.KFAC(model, lr=0.1, spec=KFLR(joined=True), factors_every=2, loss_fn=loss_fn, group=group)
        for X, y in data:
            loss = optimizer.step(X[part], y[part])
        found[f"KFAC, {reduction}"] = {"loss": loss, "params": dict(model.state_dict())}
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    store = torch.distributed.FileStore(os.path.join(folder, "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    part = slice(0, CUT) if rank == 0 else slice(CUT, None)
    torch.save(train(part, torch.distributed.group.WORLD), os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes(tmp_path: Path, float64: None) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    want = train(slice(None))
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert want.keys() == both[0].keys()
    for name in want:
        assert_close(both[0][name], want[name], rtol=1e-9)
        for n, p in both[1][name]["params"].items():
            assert torch.equal(p, both[0][name]["params"][n])  # or else they would drift apart


def test_closures_have_no_processes() -> None:
    model = make()
    optimizer = optim.KFAC(model, group="any")
    with pytest.raises(ValueError, match="gradients of a closure are those of one process"):
        optimizer.step(lambda: model(torch.zeros(1, 3)).sum())
