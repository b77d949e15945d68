"""Speed and memory of the Hessian's diagonal and of KFRA, in one rotation with BackPACK.

Every round runs each contender once, so that slow drifts of the machine reach all of them alike; what is reported is the
median over rounds. The gradient is included. Prints one JSON object.

    OMP_NUM_THREADS=2 python benchmarks/hessian.py --rounds 20
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import curvfunc as cf

Step = Callable[[], object]


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A net, its input and targets."""
    torch.manual_seed(0)
    if name.startswith("mlp"):
        net = nn.Sequential(
            nn.Linear(784, 256), nn.Sigmoid(), nn.Linear(256, 256), nn.Sigmoid(), nn.Linear(256, 10)
        )  # fmt: skip
        X = torch.randn(128 if name == "mlp128" else 32, 784)
    else:
        net = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=2), nn.Sigmoid(), nn.Conv2d(8, 12, 3, stride=2), nn.Sigmoid(),
            nn.Flatten(), nn.Linear(432, 64), nn.Sigmoid(), nn.Linear(64, 10),
        )  # fmt: skip
        X = torch.randn(16, 3, 32, 32)
    return net, X, torch.randint(0, 10, (len(X),))


CASES = {"diag_hessian/mlp": "mlp", "diag_hessian/cnn": "cnn", "kfra/mlp": "mlp", "kfra/mlp128": "mlp128"}


def contenders(case: str) -> dict[str, Step]:
    """What is compared: the plain gradient, curvfunc, the same compiled, and BackPACK where it is installed."""
    net, X, y = problem(CASES[case])
    loss = nn.CrossEntropyLoss()
    model_fn, params = cf.functionalize(net)
    spec = cf.DiagHessian() if case.startswith("diag") else cf.KFRA()

    def gradient() -> None:
        net.zero_grad()
        loss(net(X), y).backward()

    def curvfunc() -> object:
        return cf.compute(model_fn, params, X, y, (cf.Grad(), spec), loss_fn=loss)

    compiled = torch.compile(lambda params, X, y: cf.compute(model_fn, params, X, y, (cf.Grad(), spec), loss_fn=loss))
    found: dict[str, Step] = {"gradient": gradient, "curvfunc": curvfunc}
    if not case.startswith("diag"):  # where compilation takes seconds, not minutes
        found["curvfunc_compiled"] = lambda: compiled(params, X, y)
    if (backpack := _backpack(case)) is not None:
        found["backpack"] = backpack
    return found


def _backpack(case: str) -> Step | None:
    sys.modules.setdefault("torchvision", types.ModuleType("torchvision"))
    try:
        from backpack import backpack, extend
        from backpack.extensions import KFRA, DiagHessian
    except ImportError:
        return None
    net, X, y = problem(CASES[case])
    net, loss = extend(net), extend(nn.CrossEntropyLoss())
    extension = DiagHessian() if case.startswith("diag") else KFRA()

    def step() -> None:
        net.zero_grad()
        with backpack(extension):
            loss(net(X), y).backward()

    return step


def times(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of each."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in taken.items()}


def peak(case: str, name: str) -> float:
    """MiB by which one step of a contender, alone in a process, raises resident memory at its peak (Linux)."""
    command = [sys.executable, os.path.abspath(__file__), "--peak", case, name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _peak(case: str, name: str) -> float:
    step = contenders(case)[name]
    step()  # what is loaded and allocated once
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def main() -> None:
    """Parse the arguments and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "NAME"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.peak:
        print(_peak(*arguments.peak))
        return
    results = {}
    for case in CASES:
        steps = contenders(case)
        seconds = times(steps, arguments.rounds)
        memory = {name: peak(case, name) for name in ("curvfunc", "backpack") if name in steps}
        results[case] = {"median_s": seconds, "peak_mib": memory}
        if "backpack" in seconds:
            results[case]["speedup"] = {
                name: seconds["backpack"] / taken for name, taken in seconds.items() if name.startswith("curvfunc")
            }
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "results": results}, indent=2))


if __name__ == "__main__":
    main()
