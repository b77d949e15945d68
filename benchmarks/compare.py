"""curvfunc and its peers on every net and quantity: time, memory and agreement of results, the gradient always included.

    python benchmarks/compare.py --out results.json --picture results.png --table
    python benchmarks/compare.py --nets 2C2D --quantities kfac kflr --rounds 15 --memory
    python benchmarks/compare.py --nets layers --quantities batch_grad kfac --table
    python benchmarks/compare.py --device cuda --precision float32 tf32 bfloat16 --out gpu.json
    python benchmarks/compare.py --from results.json gpu.json --picture all.png --table

A cell is a net with a quantity. In each of its rounds every contender runs once (many times where a step is short), in an
order that is drawn anew each round, so that drifts of the machine meet all alike and nobody has the same predecessor. Steps
of less than 2 s run once more before they are timed: eager and compiled code have threads of their own, which wait for
each other where one follows the other, and in a training loop a step follows its like. Times are medians over rounds, ratios
medians of each round's own ratio to the plain gradient. Steps let go of their results.

- The first call of a contender is not counted (on CUDA the first five). Where it takes more than ``--patience`` seconds,
  it is all there is: ``"once"`` in the row. The compilation of ``curvfunc_compiled`` comes before it: ``"compile_s"``.
- ``deviation`` compares with curvfunc's result: the largest difference over the largest entry, by parameter, and the worst
  of gradient and quantity. Monte-Carlo quantities and Curvlinops' factors, which follow another convention for convolutions,
  have their gradients compared only. Where it exceeds the tolerance, it is taken again in float64 (what it was before is
  ``rounding`` in the row: a ReLU near zero that rounding switches on is enough to make one). Where it still does, a warning
  is printed, and the peer is not counted as the best one.
- A contender that is not installed or that does not support a cell has the reason in place of numbers: ``"skipped"``.
- A cell is skipped as a whole where a rule of ``--skip`` matches ``net:quantity``, or where an exact quantity would have
  more than 1000 columns per sample (language models: one per token and class). The default rules leave out second
  derivatives through norms and attention, one Hessian-vector product for each entry of the activations before them, and
  KFRA on large images, whose matrices have a row for each entry of an activation.
- ``sqrt_ggn`` has its batch halved until the result takes at most 2 GB (16 GB on CUDA).
- ``--memory`` starts a process for each contender of a cell: how far one step, after one to warm up, raises the memory of
  the process at its peak (Linux), or that of the GPU. What a contender keeps between steps (buffers) is not in it.
"""

import argparse
import fnmatch
import gc
import json
import math
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from ctypes import CDLL
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from contenders import BACKPACK_QUANTITIES, COLUMNS, CONTENDERS, QUANTITIES, Problem, Step, deviation, problem, reason
from nets import LAYERS, NETS
from report import picture, table

TOLERANCE = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 1e-1}
SKIP = ("*GN:*hessian", "GPT:*hessian", "[23]C[23]D:kfra", "All-CNN-C:kfra", "ResNet*:kfra", "GPT:kfra")
SHORTEST = 0.01  # seconds: shorter steps are repeated within a measurement
WARM = 2.0  # seconds: shorter steps run once before they are timed


def seconds(step: Step, repeats: int, device: str) -> float:
    """Duration of one step, the mean over repeats."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - begin) / repeats


def refusal(cell: Problem, skip: Sequence[str]) -> str | None:
    """Why no contender runs a cell."""
    for pattern in skip:
        if fnmatch.fnmatch(f"{cell.net}:{cell.quantity}", pattern):
            return f"--skip {pattern}"
    if QUANTITIES[cell.quantity].exact and cell.outputs > COLUMNS:
        return f"V = {cell.outputs} columns per sample"
    return None


def prepare(cell: Problem, names: Sequence[str], patience: float) -> tuple[dict[str, Step], dict[str, Any]]:
    """The steps to measure, and an entry per contender: its first call's seconds and its deviation, or why it has none."""
    steps: dict[str, Step] = {}
    entries: dict[str, Any] = {}
    expected = None
    for name in sorted(names, key=lambda name: name != "curvfunc"):  # what the others are compared with comes first
        try:
            step = CONTENDERS[name](cell)
            begin = time.perf_counter()
            compilation = {}
            if name == "curvfunc_compiled":
                step()
                compilation["compile_s"] = round(time.perf_counter() - begin, 2)
                begin = time.perf_counter()
            found = step()
            if cell.device == "cuda":
                torch.cuda.synchronize()
            entry = {"first": time.perf_counter() - begin, **compilation}
            if name == "curvfunc":
                expected = found
            elif expected is not None:
                entry["deviation"] = deviation(cell, found, expected)
                if entry["deviation"] > TOLERANCE[cell.precision]:
                    double, entry["rounding"] = cell.double(), entry["deviation"]
                    entry["deviation"] = deviation(double, CONTENDERS[name](double)(), CONTENDERS["curvfunc"](double)())
            if entry["first"] <= patience or name == "gradient":
                steps[name] = step
            entries[name] = entry
        except Exception as error:  # whatever a contender raises is the reason why it has no numbers
            entries[name] = {"skipped": reason(error)}
        found = None
    return steps, entries


def measure(cell: Problem, names: Sequence[str], rounds: int, patience: float) -> dict[str, Any]:
    """The entry of each contender: milliseconds, ratio to the gradient and deviation, or the reason why it is skipped."""
    steps, entries = prepare(cell, names, patience)
    repeats = {}
    for name, step in steps.items():
        for _ in range(4 if cell.device == "cuda" else 0):
            step()
        repeats[name] = math.ceil(SHORTEST / seconds(step, 1, cell.device))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(rounds):
        for name in random.Random(k).sample(list(steps), len(steps)):
            if entries[name]["first"] < WARM:
                steps[name]()
            times[name].append(seconds(steps[name], repeats[name], cell.device))
    for name in names:
        entry = entries[name]
        if "first" in entry:
            first = entry.pop("first")
            taken = times.get(name) or [first] * rounds
            entry["ms"] = round(1e3 * statistics.median(taken), 4)
            entry["ratio"] = round(statistics.median(t / g for t, g in zip(taken, times["gradient"], strict=True)), 4)
            if name not in steps:
                entry["once"] = True
    torch.compiler.reset()
    return {name: entries[name] for name in names}


def warn(row: dict[str, Any]) -> None:
    """Print what the numbers of a row do not agree on."""
    for name, entry in row["contenders"].items():
        if entry.get("deviation", 0.0) > TOLERANCE[row["precision"]]:
            where = f"{row['net']} {row['quantity']} {row['precision']}"
            print(f"WARNING: {where}: {name} deviates from curvfunc by {entry['deviation']:.1e}", file=sys.stderr, flush=True)


def show(row: dict[str, Any]) -> None:
    """Print a row, a line per contender."""
    print(f"{row['net']} {row['quantity']} {row['precision']} N={row['batch']} {row.get('skipped', '')}")
    for name, entry in row["contenders"].items():
        if "skipped" in entry:
            print(f"  {name:18} {entry['skipped'][:100]}")
            continue
        shown = [f"{entry['ms']:10.3f} ms {entry['ratio']:9.2f}"]
        shown += [f"deviation {entry['deviation']:.0e}"] if "deviation" in entry else []
        shown += [f"{entry['peak_mib']:.0f} MiB"] if "peak_mib" in entry else []
        shown += [f"compiled in {entry['compile_s']:.1f} s"] if "compile_s" in entry else []
        print(f"  {name:18} {'  '.join(shown)}{'  once' if 'once' in entry else ''}")
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def memory(row: dict[str, Any], threads: int) -> None:
    """Write the peak of each contender that was measured into the row."""
    for name, entry in row["contenders"].items():
        if "ms" in entry:
            cell = [row["net"], row["quantity"], name]
            command = [sys.executable, __file__, "--peak", *cell, "--device", row["device"], "--precision", row["precision"]]
            run = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True)
            if run.returncode == 0:
                entry["peak_mib"] = round(float(run.stdout.splitlines()[-1]), 2)
            else:
                entry["peak_skipped"] = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]


def peak(net: str, quantity: str, contender: str, device: str, precision: str) -> float:
    """MiB by which one step raises the memory of this process, or of the GPU, at its peak."""
    step = CONTENDERS[contender](problem(net, quantity, device, precision))
    step()  # what is loaded and allocated once
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back, to be seen when it is taken again
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    resident = _status("VmRSS")
    step()
    return (_status("VmHWM") - resident) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Where and how the numbers were made."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "rounds": options.rounds,
        "command": " ".join(sys.argv),
    }


def cpu_name() -> str:
    """The model of the processor."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all cells, one row each."""
    rows = []
    names = ["gradient", *(name for name in options.contenders if name != "gradient")]
    for precision in options.precision:
        for net in options.nets:
            for quantity in options.quantities:
                row = {"net": net, "quantity": quantity, "precision": precision, "device": options.device, "contenders": {}}
                cell = problem(net, quantity, options.device, precision)
                row["batch"] = len(cell.X)
                if (refused := refusal(cell, options.skip)) is not None:
                    row["skipped"] = refused
                else:
                    row["contenders"] = measure(cell, names, options.rounds, options.patience)
                    if options.memory:
                        memory(row, options.threads)
                del cell
                gc.collect()
                if options.device == "cuda":
                    torch.cuda.empty_cache()
                show(row)
                warn(row)
                rows.append(row)
                if options.out:  # what is there, should the run be interrupted
                    report = {"environment": environment(options), "rows": rows}
                    options.out.write_text(json.dumps(report, indent=1) + "\n")
    return rows


def merged(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of several files; of two rows for one cell the later one."""
    rows = {}
    for path in paths:
        for row in json.loads(path.read_text())["rows"]:
            rows[row["net"], row["quantity"], row["precision"], row["device"]] = row
    return list(rows.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments; measure or read; write JSON, picture and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    nets = [*NETS, *LAYERS, "layers"]
    told = f"{', '.join(NETS)}; layers for all of {', '.join(LAYERS)}"
    parser.add_argument("--nets", nargs="+", choices=nets, default=list(NETS), metavar="NET", help=told)
    standard = [*BACKPACK_QUANTITIES, "batch_diag_ggn", "sqrt_ggn", "diag_hessian"]
    known = ", ".join(QUANTITIES)
    parser.add_argument("--quantities", nargs="+", choices=QUANTITIES, default=standard, metavar="QUANTITY", help=known)
    contenders = list(CONTENDERS)
    parser.add_argument("--contenders", nargs="+", choices=contenders, default=contenders, metavar="NAME", help="default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--patience", type=float, default=20.0, help="seconds above which a contender is measured once")
    parser.add_argument("--skip", nargs="*", default=SKIP, metavar="NET:QUANTITY", help=f"patterns (default: {SKIP})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", nargs="+", choices=TOLERANCE, default=["float32"])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--from", dest="files", nargs="+", type=Path, metavar="JSON", help="read results, measure nothing")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.nets = [net for name in options.nets for net in (LAYERS if name == "layers" else [name])]
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(*options.peak, options.device, options.precision[0]))
        return
    rows = merged(options.files) if options.files else cells(options)
    if options.picture:
        picture(rows, options.picture)
    if options.table:
        print(table(rows, BACKPACK_QUANTITIES, TOLERANCE))


if __name__ == "__main__":
    main()
