"""The shim against BackPACK: the same training step, every extension, in one rotation.

    python benchmarks/compat.py --out compat.json
    python benchmarks/compat.py --nets mlp 2c2d --extensions BatchGrad KFAC --rounds 5

In each round, a step without any extension, BackPACK's and the shim's run one after the other, in an order that is drawn
anew, so that all meet the same states of the machine; each runs once before it is timed. A step is forward pass and backward
pass; for `HMP`, `GGNMP` and `PCHMP` it includes one product with ten vectors per parameter. Times are medians over the
rounds, in milliseconds.
"""

import argparse
import copy
import json
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from curvfunc import compat

PRODUCTS = ("HMP", "GGNMP", "PCHMP")
VECTORS = 10
TOO_LARGE = {("2c2d", "KFRA"), ("3c3d", "KFRA")}  # both average a matrix over the pixels of all channels, 25088 x 25088 or more
LARGE = {("2c2d", "SqrtGGNExact"): 4, ("3c3d", "SqrtGGNExact"): 4}  # results of gigabytes: a smaller batch, for both

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)),
        (784,),
        128,
    ),
    "2c2d": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2, 2),
            nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2, 2),
            nn.Flatten(), nn.Linear(3136, 1024), nn.ReLU(), nn.Linear(1024, 10),
        ),
        (1, 28, 28),
        32,
    ),
    "3c3d": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 64, 5), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(64, 96, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.ZeroPad2d(1), nn.Conv2d(96, 128, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10),
        ),
        (3, 32, 32),
        32,
    ),
}  # fmt: skip


def load_backpack() -> Any:
    """BackPACK, which imports torchvision for a data set only; a stand-in will do, while it is being imported."""
    missing = {}
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms"):
        if "backpack" not in sys.modules and name not in sys.modules:
            missing[name] = sys.modules[name] = ModuleType(name)
            for attribute in ("MNIST", "Compose", "Normalize", "ToTensor"):
                setattr(missing[name], attribute, None)
    try:
        import backpack
        import backpack.extensions
    finally:
        for name in missing:
            del sys.modules[name]
    return backpack


def make_step(library: Any, extension: str | None, model: nn.Module, X: Tensor, y: Tensor) -> Callable[[], None]:
    """One training step of a copy of the model; ``library`` None is a step without extensions."""
    model, loss_fn = copy.deepcopy(model), nn.CrossEntropyLoss()
    params = list(model.parameters())
    if library is None:
        return lambda: loss_fn(model(X), y).backward()
    library.extend(model)
    library.extend(loss_fn)
    active = getattr(library.extensions, str(extension))()
    vectors = [torch.randn(VECTORS, *p.shape, device=p.device) for p in params] if extension in PRODUCTS else []

    def step() -> None:
        with library.backpack(active):
            loss_fn(model(X), y).backward()
        for p, v in zip(params, vectors, strict=False):
            getattr(p, active.savefield)(v)

    return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """Duration of one step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(net: str, extension: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """Median times of the three steps, in rotation."""
    build, shape, batch = NETS[net]
    batch = LARGE.get((net, extension), batch)
    torch.manual_seed(0)
    model = build().to(device)
    X, y = torch.randn(batch, *shape, device=device), torch.randint(10, (batch,), device=device)
    row: dict[str, Any] = {"net": net, "extension": extension, "batch": batch}
    steps = {
        "gradient": make_step(None, None, model, X, y),
        "backpack": make_step(load_backpack(), extension, model, X, y),
        "curvfunc": make_step(compat, extension, model, X, y),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in list(steps.items()):
        try:
            seconds(step, device)
        except NotImplementedError as error:
            row[f"{name}_error"] = str(error).splitlines()[0] if str(error) else type(error).__name__
            del steps[name]
    for k in range(rounds):
        for name in random.Random(k).sample(list(steps), len(steps)):
            steps[name]()
            times[name].append(seconds(steps[name], device))
    for name in steps:
        row[f"{name}_ms"] = round(1e3 * statistics.median(times[name]), 3)
    if "backpack" in steps and "curvfunc" in steps:
        row["curvfunc_over_backpack"] = round(row["curvfunc_ms"] / row["backpack_ms"], 3)
    return row


def main() -> None:
    """Parse arguments, measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--extensions", nargs="+", default=[e for e in compat.extensions.__all__ if e != "HBP"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    device = torch.device(arguments.device)
    rows = []
    for net in arguments.nets:
        for extension in arguments.extensions:
            if (net, extension) in TOO_LARGE:
                continue
            row = measure(net, extension, arguments.rounds, device)
            rows.append(row)
            shown = [f"{row.get(f'{name}_ms', float('nan')):9.2f}" for name in ("gradient", "backpack", "curvfunc")]
            ratio = row.get("curvfunc_over_backpack", row.get("backpack_error") or row.get("curvfunc_error"))
            print(f"{net:6} {extension:18} {' '.join(shown)}  {ratio}", flush=True)
    if arguments.out:
        environment = {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "rounds": arguments.rounds,
        }
        arguments.out.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
