"""What the quantities cost in gradients: JSON on standard output.

One rotation per net: in each round the plain gradient and every quantity (the gradient included) run once, so that the
machine's drift meets all of them alike; ratios are medians over rounds of each round's own ratio.

    python benchmarks/engine.py --nets 2C2D 3C3D --rounds 11
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from nets import NETS

from curvfunc import (
    KFAC,
    KFLR,
    BatchGrad,
    BatchL2,
    DiagGGN,
    Grad,
    SumGradSquared,
    Variance,
    compute,
    functionalize,
)

QUANTITIES = {
    "grad": None,
    "batch_grad": BatchGrad(),
    "batch_l2": BatchL2(),
    "sum_grad_squared": SumGradSquared(),
    "variance": Variance(),
    "diag_ggn_mc": DiagGGN(mc_samples=1),
    "diag_ggn": DiagGGN(),
    "kfac": KFAC(),
    "kflr": KFLR(),
}


def runs(net: str, quantities: list[str]) -> dict[str, Callable[[], object]]:
    """The plain gradient, and each quantity with the gradient."""
    chosen = NETS[net]
    torch.manual_seed(0)
    module = chosen.make().eval()
    X, y = chosen.inputs(chosen.batch), chosen.targets(chosen.batch)
    model_fn, params = functionalize(module)
    found: dict[str, Callable[[], object]] = {
        "plain": lambda: torch.autograd.grad(F.cross_entropy(module(X), y), list(module.parameters()))
    }
    for name in quantities:
        spec = QUANTITIES[name]
        specs = (Grad(),) if spec is None else (Grad(), spec)
        found[name] = lambda specs=specs: compute(model_fn, params, X, y, specs)
    return found


def measure(functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds per function and round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + warmup):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["784-256-256-10", "2C2D", "3C3D"])
    parser.add_argument("--quantities", nargs="+", choices=QUANTITIES, default=list(QUANTITIES))
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    report: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
    }
    for net in options.nets:
        seconds = measure(runs(net, options.quantities), options.rounds)
        plain = seconds.pop("plain")
        report[net] = {
            "batch": NETS[net].batch,
            "plain_seconds": statistics.median(plain),
            "ratio": {
                name: round(statistics.median(s / p for s, p in zip(values, plain, strict=True)), 3)
                for name, values in seconds.items()
            },
        }
        print(net, report[net], file=sys.stderr)
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
