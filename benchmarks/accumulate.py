"""What `accumulate` costs over a loop of `compute` that adds up by hand, and its memory over many batches: JSON.

Both run in rotation, each through all batches, so that the machine's drift meets them alike; the ratio is the median over
rounds of each round's own. Memory is that of a process of its own: resident after some batches and after the last one, and
its peak.

    python benchmarks/accumulate.py --batches 30 --rounds 7
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from nets import NETS
from torch import Tensor

from curvfunc import KFAC, DiagGGN, Grad, accumulate, compute, functionalize

SPECS = (Grad(), DiagGGN(mc_samples=1), KFAC())
EARLY = 50  # batches after which memory has to stay where it is


def problem(name: str, size: int) -> tuple[Any, dict[str, Tensor], Callable[[], tuple[Tensor, Tensor]]]:
    """A net, its parameters, and what makes a batch."""
    net = NETS[name]
    torch.manual_seed(0)
    model_fn, params = functionalize(net.make().eval())
    return model_fn, params, lambda: (net.inputs(size), net.targets(size))


def by_hand(model_fn: Any, params: Any, batches: list[tuple[Tensor, Tensor]]) -> Any:
    """The results of all samples of a mean loss."""
    samples = sum(len(y) for _, y in batches)
    total: list[Tensor] = []
    for X, y in batches:
        grad, diag, factors = compute(model_fn, params, X, y, SPECS)
        found = [*grad.values(), *diag.values(), *(f for pair in factors.values() for f in pair)]
        for i, t in enumerate(found):
            t.mul_(len(y) / samples)
            if total:
                total[i].add_(t)
        total = total or found
    return total


def overhead(name: str, size: int, number: int, rounds: int) -> dict[str, Any]:
    """Seconds of both loops, on the clock and of this thread, and their ratios."""
    model_fn, params, make = problem(name, size)
    batches = [make() for _ in range(number)]
    loops = {
        "by_hand": lambda: by_hand(model_fn, params, batches),
        "accumulate": lambda: accumulate(model_fn, params, batches, SPECS, progress=False),
    }
    found: dict[str, dict[str, list[float]]] = {key: {"seconds": [], "thread_seconds": []} for key in loops}
    for i in range(rounds + 1):
        for key in loops if i % 2 else reversed(loops):
            start, of_thread = time.perf_counter(), time.thread_time()
            loops[key]()
            if i:  # the first is for warming up
                found[key]["seconds"].append(time.perf_counter() - start)
                found[key]["thread_seconds"].append(time.thread_time() - of_thread)
    report: dict[str, Any] = {"batches": number, "batch": size, "rounds": rounds}
    for clock in ("seconds", "thread_seconds"):
        for key in loops:
            report[f"{key}_{clock}"] = round(statistics.median(found[key][clock]), 4)
        ratios = [a / b for a, b in zip(found["accumulate"][clock], found["by_hand"][clock], strict=True)]
        report["ratio" if clock == "seconds" else "thread_ratio"] = round(statistics.median(ratios), 4)
    return report


def resident() -> float:
    """MiB of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(name: str, size: int, number: int) -> dict[str, Any]:
    """MiB after `EARLY` batches, after the last one, and at most."""
    model_fn, params, make = problem(name, size)
    report: dict[str, Any] = {"batches": number, "batch": size}

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(number):
            if i == EARLY:
                report[f"resident_mib_after_{EARLY}"] = round(resident(), 1)
            yield make()
        report["resident_mib_at_end"] = round(resident(), 1)

    accumulate(model_fn, params, batches(), SPECS, progress=False)
    report["peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)
    return report


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, default="2C2D")
    parser.add_argument("--size", type=int, help="of a batch; by default that of the net")
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-batches", type=int, default=300, help="0 for none")
    parser.add_argument("--memory-only", action="store_true", help="in this process")
    options = parser.parse_args(arguments)
    size = options.size or NETS[options.net].batch
    if options.memory_only:
        json.dump(memory(options.net, size, options.memory_batches), sys.stdout)
        return
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "net": options.net,
        "specs": [str(spec) for spec in SPECS],
        "overhead": overhead(options.net, size, options.batches, options.rounds),
    }
    if options.memory_batches:
        command = [sys.executable, __file__, "--net", options.net, "--size", str(size), "--memory-only"]
        found = subprocess.run(
            [*command, "--memory-batches", str(options.memory_batches)], check=True, capture_output=True, text=True
        )
        report["memory"] = json.loads(found.stdout)
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
