"""Curvature of one network on several processes: what they have together is what one process has alone.

    torchrun --nproc-per-node 2 examples/distributed.py
    python examples/distributed.py            # starts two processes itself

Each process has its share of scikit-learn's digits, and a network that `fully_shard` spreads over all of them.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import curvfunc
from curvfunc import KFLR, BatchL2, DiagGGN, Grad, Loss, Variance

SPECS = (Loss(), Grad(), Variance(), DiagGGN(), KFLR(), BatchL2())


def network() -> nn.Sequential:
    """The same for all processes, by its seed."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()


def digits(samples: int) -> tuple[Tensor, Tensor]:
    """Images as vectors, and their classes."""
    data = load_digits()
    return torch.tensor(data.data[:samples] / 16), torch.tensor(data.target[:samples])


def difference(got: object, want: object) -> float:
    """The largest difference of an entry, relative to the largest one; shards are put together first."""
    if isinstance(want, dict):
        return max(difference(got[name], want[name]) for name in want)  # type: ignore[index]
    if isinstance(want, tuple):
        return max(map(difference, got, want))  # type: ignore[call-overload]
    whole = got.full_tensor() if hasattr(got, "full_tensor") else got
    return float((whole - want).abs().max() / want.abs().max())


def work(rank: int, size: int, samples: int, store: str | None = None) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    where = {} if store is None else {"init_method": f"file://{store}", "rank": rank, "world_size": size}
    dist.init_process_group("gloo", **where)
    X, y = digits(samples)

    mine = DataLoader(TensorDataset(X[rank::size], y[rank::size]), batch_size=100)  # uneven shares will do
    net = network()
    fully_shard(net[0])
    fully_shard(net)
    model_fn, params = curvfunc.functionalize(net)
    results = curvfunc.accumulate(model_fn, params, mine, SPECS, group=dist.group.WORLD, gather=True)

    alone_fn, whole = curvfunc.functionalize(network())
    order = torch.cat([torch.arange(len(X))[r::size] for r in range(size)])  # samples are gathered rank by rank
    alone = curvfunc.compute(alone_fn, whole, X[order], y[order], SPECS)

    differences = [difference(got, want) for got, want in zip(results, alone, strict=True)]  # each process takes part in it
    if rank == 0:
        print(f"{len(X)} digits on {size} processes; largest difference from one process:")
        for spec, found, one in zip(SPECS, differences, results, strict=True):
            kind = type(one["0.weight"]).__name__ if isinstance(one, dict) else type(one).__name__
            print(f"  {type(spec).__name__:10} {found:.1e}  {kind}")
        print("equal" if max(differences) < 1e-12 else "NOT EQUAL")
    dist.destroy_process_group()


def main() -> None:
    """Under torchrun be one of its processes, else start two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1797, help="how many digits to take")
    samples = parser.parse_args().samples
    if "RANK" in os.environ:
        work(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), samples)
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (2, samples, str(Path(folder, "store"))), nprocs=2)


if __name__ == "__main__":
    main()
