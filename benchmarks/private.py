"""Sums of clipped gradients beside the plain gradient and Opacus: processor time in rotation, peak memory, deviation; as JSON.

python benchmarks/private.py --out private.json

The network is an MLP of four layers. Peak memory is what one step adds to a process of its own, with the results. Opacus runs
in its ghost mode and with hooks that form per-sample gradients, if it is installed; neither adds noise here.
"""

import argparse
import copy
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from ctypes import CDLL
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvfunc

Result = dict[str, Tensor]
Step = Callable[[], Result]
CLASSES, MAX_NORM = 10, 1.0
SUM = partial(F.cross_entropy, reduction="sum")


def problem(width: int, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network of four layers, and a batch."""
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES)), torch.randn(batch, width), torch.randint(CLASSES, (batch,))


def gradient(module: nn.Module, X: Tensor, y: Tensor) -> Step:
    """The sum of the gradients as they are, by autograd alone."""
    params = dict(module.named_parameters())
    return lambda: dict(zip(params, torch.autograd.grad(SUM(module(X), y), list(params.values())), strict=True))


def clipped(module: nn.Module, X: Tensor, y: Tensor, per_layer: bool = False) -> Step:
    """`curvfunc.clipped_grad`."""
    model_fn, params = curvfunc.functionalize(module)
    return lambda: curvfunc.clipped_grad(model_fn, params, X, y, max_norm=MAX_NORM, per_layer=per_layer)


def ghost(module: nn.Module, X: Tensor, y: Tensor) -> Step:
    """Opacus' ghost mode: norms by hooks, and a second backward pass of the weighted losses."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(copy.deepcopy(module), max_grad_norm=MAX_NORM, loss_reduction="sum")

    def step() -> Result:
        wrapped.zero_grad(set_to_none=True)
        losses = F.cross_entropy(wrapped(X), y, reduction="none")
        losses.sum().backward(retain_graph=True)
        weights = wrapped.get_clipping_coef()
        wrapped.zero_grad(set_to_none=True)
        wrapped.disable_hooks()
        (weights * losses).sum().backward()
        wrapped.enable_hooks()
        found = {name.removeprefix("_module."): p.grad for name, p in wrapped.named_parameters()}
        wrapped.zero_grad(set_to_none=True)  # the memory of the next step is its own
        return found

    return step


def hooks(module: nn.Module, X: Tensor, y: Tensor) -> Step:
    """Opacus' hooks, which leave per-sample gradients; these are clipped and summed as its optimizer does."""
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(copy.deepcopy(module), loss_reduction="sum")

    def step() -> Result:
        wrapped.zero_grad(set_to_none=True)
        SUM(wrapped(X), y).backward()
        found = {name.removeprefix("_module."): p for name, p in wrapped.named_parameters()}
        norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in found.values()]).norm(dim=0)
        weights = (MAX_NORM / norms).clamp(max=1)
        result = {name: torch.einsum("n,n...->...", weights, p.grad_sample) for name, p in found.items()}
        for p in found.values():
            p.grad_sample = None
        return result

    return step


CONTENDERS: dict[str, Callable[..., Step]] = {
    "gradient": gradient,
    "curvfunc": clipped,
    "curvfunc, per layer": partial(clipped, per_layer=True),
    "opacus, ghost": ghost,
    "opacus, hooks": hooks,
}


def peak(name: str, width: int, batch: int) -> float:
    """MiB by which one step raises the memory of this process at its peak."""
    step = CONTENDERS[name](*problem(width, batch))
    step()  # what is loaded and allocated once
    gc.collect()
    CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back, to be seen when it is taken again
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def measure(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Medians in milliseconds, all contenders in each round; the first is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            start = time.thread_time()
            step()
            if i:
                times[name].append(1e3 * (time.thread_time() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def report(width: int, batch: int, rounds: int) -> dict[str, object]:
    """What was found."""
    given = problem(width, batch)
    steps = {}
    for name, make in CONTENDERS.items():
        try:
            steps[name] = make(*given)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    ms = measure(steps, rounds)
    alone = [sys.executable, __file__, "--width", str(width), "--batch", str(batch), "--peak"]
    peaks = {name: float(subprocess.check_output([*alone, name], text=True)) for name in steps}
    per_sample = _explicit(*given)
    norms = sum(g.flatten(1).double().square().sum(1) for g in per_sample.values()).sqrt()
    weights = (MAX_NORM / norms).clamp(max=1)
    want = {name: torch.tensordot(weights, g.double(), 1) for name, g in per_sample.items()}
    compared = [name for name in steps if name not in ("gradient", "curvfunc, per layer")]
    deviation = {name: _deviation(steps[name](), want) for name in compared}
    return {
        "environment": {"torch": torch.__version__, "cpu": platform.processor(), "threads": 1, "rounds": rounds},
        "width": width,
        "batch": batch,
        "ms": ms,
        "gradients": {name: found / ms["gradient"] for name, found in ms.items()},
        "peak_mib": peaks,
        "peak_gradients": {name: found / peaks["gradient"] for name, found in peaks.items()},
        "deviation": deviation,
    }


def _explicit(module: nn.Module, X: Tensor, y: Tensor) -> Result:
    """Per-sample gradients of plain autograd, one by one."""
    params = dict(module.named_parameters())
    rows = [torch.autograd.grad(SUM(module(X[n : n + 1]), y[n : n + 1]), list(params.values())) for n in range(len(X))]
    return {name: torch.stack(found) for name, found in zip(params, zip(*rows, strict=True), strict=True)}


def _deviation(found: Result, want: Result) -> float:
    return max(float((found[name].double() - want[name]).norm() / want[name].norm()) for name in want)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", choices=CONTENDERS, help="only the peak memory of one contender, in MiB")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # so that the time of this thread is all there is
    if given.peak:
        print(peak(given.peak, given.width, given.batch))
        return
    text = json.dumps(report(given.width, given.batch, given.rounds), indent=2)
    if given.out:
        given.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
