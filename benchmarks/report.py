"""Rows of `compare.py` as a table and as a picture."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, PEERS

# Okabe and Ito's colours, which colour-blind readers tell apart; one per contender but the gradient, which is the line at 1
COLOURS = ("#000000", "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#F0E442", "#CC79A7", "#999999")


def best_peer(row: dict[str, Any], tolerance: dict[str, float]) -> tuple[str, float] | None:
    """The fastest peer whose numbers are right, and its ratio to the gradient."""
    entries = {name: entry for name in PEERS if "ratio" in (entry := row["contenders"].get(name, {}))}
    right = {name: e["ratio"] for name, e in entries.items() if e.get("deviation", 0.0) <= tolerance[row["precision"]]}
    return min(right.items(), key=lambda item: item[1]) if right else None


def table(rows: list[dict[str, Any]], quantities: Sequence[str], tolerance: dict[str, float]) -> str:
    """Markdown, per device and precision: curvfunc's time in gradients, eager / compiled, and the speed-up over the best peer.

    The speed-up, in brackets, is that of the faster of the two. Below are its mean, and how long compiling took.
    """
    parts = []
    for setting, of_setting in _grouped(rows, ("device", "precision")).items():
        lines = [f"| {', '.join(setting)} | {' | '.join(quantities)} |", "|---" * (len(quantities) + 1) + "|"]
        speedups: dict[str, dict[tuple[str, str, str], float]] = {"eager": {}, "eager or compiled": {}}
        for (net,), of_net in _grouped(of_setting, ("net",)).items():
            cells = {row["quantity"]: row for row in of_net}
            shown = []
            for quantity in quantities:
                row = cells.get(quantity, {"contenders": {}})
                entries = [row["contenders"].get(name, {}) for name in ("curvfunc", "curvfunc_compiled")]
                ratios = [entry["ratio"] for entry in entries if "ratio" in entry]
                if not ratios:
                    shown.append("–")
                    continue
                speedup = "no peer"
                if (peer := best_peer(row, tolerance)) is not None:
                    cell = (net, quantity, peer[0])
                    speedups["eager"][cell] = peer[1] / ratios[0]
                    speedups["eager or compiled"][cell] = peer[1] / min(ratios)
                    speedup = f"{peer[1] / min(ratios):.2f}×"
                shown.append(f"{' / '.join(f'{r:.2f}' for r in ratios)} ({speedup})")
            lines.append(f"| {net} | {' | '.join(shown)} |")
        for mode, of_mode in speedups.items():
            if of_mode:
                mean = math.exp(sum(map(math.log, of_mode.values())) / len(of_mode))
                net, quantity, peer = least = min(of_mode, key=of_mode.__getitem__)
                smallest = f"{of_mode[least]:.2f}× ({quantity} on {net}, over {peer})"
                cells = f"{len(of_mode)} cells"
                lines += ["", f"Speed-up over the best peer, {mode}, {cells}: {mean:.2f}× (geometric mean); least: {smallest}."]
        entries = [row["contenders"].get("curvfunc_compiled", {}) for row in of_setting]
        if seconds := [entry["compile_s"] for entry in entries if "compile_s" in entry]:
            median, most = statistics.median(seconds), max(seconds)
            lines += ["", f"Compiling a step took {median:.1f} s (median of {len(seconds)} cells), at most {most:.1f} s."]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel per net, a group of bars per quantity, a bar per contender: time in gradients, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    measured = [row for row in rows if row["contenders"]]
    panels = _grouped(measured, ("net", "device", "precision"))
    names = [n for n in CONTENDERS if n != "gradient" and any("ratio" in row["contenders"].get(n, {}) for row in measured)]
    colours = dict(zip([n for n in CONTENDERS if n != "gradient"], COLOURS, strict=True))
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(8 * columns, 3 * lines + 0.8), squeeze=False, layout="constrained")
    width = 0.84 / len(names)
    for ax, ((net, *setting), of_net) in zip(axes.flat, panels.items(), strict=False):
        for x, row in enumerate(of_net):
            ratios = {n: e["ratio"] for n in names if "ratio" in (e := row["contenders"].get(n, {}))}
            for i, (name, ratio) in enumerate(ratios.items()):
                ax.bar(x + (i - (len(ratios) - 1) / 2) * width, ratio - 1, width, bottom=1, color=colours[name])
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set_yscale("log")
        batch = max(row["batch"] for row in of_net)
        labels = [row["quantity"] + (f" (N = {row['batch']})" if row["batch"] < batch else "") for row in of_net]
        ax.set_xticks(range(len(of_net)), labels, rotation=25, ha="right", fontsize=8)
        ax.set_title(f"{net}, N = {batch} ({', '.join(setting)})", fontsize=10)
        ax.set_ylabel("time in gradients")
        ax.grid(axis="y", linewidth=0.3)
        ax.set_axisbelow(True)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _grouped(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups
