"""A run of `accumulate` in a process of its own, which kills itself after some batches: ``python interrupted.py FOLDER BATCHES``."""

import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvfunc

SPECS = (curvfunc.Loss(), curvfunc.Variance(), curvfunc.KFAC(), curvfunc.DiagGGN(2), curvfunc.BatchGrad(), curvfunc.SqrtGGN(1))
BATCHES = 29


def problem() -> tuple[Any, Any, DataLoader[Any]]:
    """A network that draws random numbers, in single precision, and a shuffled loader whose last batch is smaller."""
    torch.manual_seed(3)
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)))
    X, y = torch.randn(8 * BATCHES - 5, 4), torch.randint(3, (8 * BATCHES - 5,))
    y[::7] = -100
    return model_fn, params, DataLoader(TensorDataset(X, y), batch_size=8, shuffle=True)


class Deadly:
    """Kills the process when more batches than ``after`` are asked for."""

    def __init__(self, loader: Any, after: int) -> None:
        self.loader, self.after = loader, after

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.loader):
            if number == self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def run(folder: Path, after: int, out: bool = False, every: int = 4, own: bool = True) -> Any:
    """The results; some draws are from a generator of the caller's, others from the default ones."""
    model_fn, params, loader = problem()
    torch.manual_seed(os.getpid() if after < BATCHES else 11)  # another process stands elsewhere
    torch.manual_seed(11) if not (folder / "state.pt").exists() else random.seed(os.getpid())
    return curvfunc.accumulate(
        model_fn,
        params,
        Deadly(loader, after),
        SPECS,
        loss_fn=F.cross_entropy,
        generator=torch.Generator().manual_seed(5) if own else None,
        checkpoint=folder / "state.pt",
        every=every,
        out=folder / "results" if out else None,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]), out=sys.argv[3] == "out", own=sys.argv[4] == "own")
