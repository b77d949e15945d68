"""Steps of `curvfunc.optim` beside a plain SGD step: processor time in rotation, as JSON.

python benchmarks/optim.py --net 3C3D --batch 128 --out optim.json

K-FAC renews its factors at every 10th step and its inverses at every 100th. Each of the three kinds of steps is measured on
its own,
and the mean step is that of 100: 90 plain ones, 9 with factors, 1 with both.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import torch
import torch.nn.functional as F

from curvfunc import optim

Step = Callable[[], Any]


def make(net: Any, batch: int) -> dict[str, Step]:
    """Every kind of step, of networks of their own."""
    torch.manual_seed(0)
    module, X, y = net.make(), net.inputs(batch), net.targets(batch)
    plain = copy.deepcopy(module)
    sgd = torch.optim.SGD(plain.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        sgd.zero_grad()
        F.cross_entropy(plain(X), y).backward()
        sgd.step()

    steps: dict[str, Step] = {"sgd": step}
    kfac = optim.KFAC(copy.deepcopy(module), lr=1e-3, damping=0.1, factors_every=10, inverses_every=100)
    for name, count in {"kfac, inverses": 0, "kfac, factors": 10, "kfac, neither": 1}.items():
        steps[name] = _at(kfac, count, X, y)
    diagonal = optim.Diagonal(copy.deepcopy(module), lr=1e-3, damping=1.0)
    steps["diagonal"] = lambda: diagonal.step(X, y)
    return steps


def _at(optimizer: optim.Preconditioned, count: int, X: Any, y: Any) -> Step:
    """A step as if it was that one of a hundred."""

    def step() -> None:
        if "curvature" in optimizer.state:
            state: Any = optimizer.state["curvature"]  # type: ignore[index]
            optimizer.state["curvature"] = state | {"count": torch.tensor(count)}  # type: ignore[index]
        optimizer.step(X, y)

    return step


def measure(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Medians in milliseconds, all kinds in each round; the first is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            start = time.thread_time()
            step()
            if i:
                times[name].append(1e3 * (time.thread_time() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="3C3D", choices=nets.NETS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # so that the time of this thread is all there is
    ms = measure(make(nets.NETS[given.net], given.batch), given.rounds)
    kfac = 0.9 * ms["kfac, neither"] + 0.09 * ms["kfac, factors"] + 0.01 * ms["kfac, inverses"]
    report = {
        "environment": {"torch": torch.__version__, "cpu": platform.processor(), "threads": 1, "rounds": given.rounds},
        "net": given.net,
        "batch": given.batch,
        "ms": ms | {"kfac": kfac},
        "ratio": {"kfac": kfac / ms["sgd"], "diagonal": ms["diagonal"] / ms["sgd"]},
    }
    text = json.dumps(report, indent=2)
    if given.out:
        given.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
