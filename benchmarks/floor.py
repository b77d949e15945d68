"""How far curvfunc is from what the machine could do at best.

    python benchmarks/floor.py --nets 2C2D 3C3D --out floor.json --table

The floor of a quantity, its gradient included, is

    max(operations / rate of matrix products, bytes / rate of copies).

Both rates are measured here: of matrix products, with the shape that is the fastest of several. They are measured again in
each round of each quantity, since shared machines change their pace, and the factor is the median of each round's own. The
maximum of the two, not the sum: a kernel may compute while it moves memory, so only the maximum is a bound for whatever
order of work. The sum is at most twice that, so a factor below 2 leaves nothing to be gained but overlap.

Operations (a multiplication and an addition are two) for N samples, with F the forward pass, D one backward pass to the
inputs of all layers, W the weight gradients of all layers, and m columns beside the gradient (0 for first order, the number
of draws, C - 1 for the exact loss Hessian of C outputs, which has that rank for cross-entropy):

- All quantities need F + (1 + m) D, and W for the gradient.
- Squares: layers that see one vector per sample take one more W, for squared cotangents are summed over columns first.
  Layers with shared positions (convolutions, sequences) form per-sample gradients, W for each column; those of first order
  add up to the gradient, which has no W of its own then.
- `batch_grad` has no more than the gradient's W, nor has `batch_l2`. `sqrt_ggn` takes W for each column.
- Factors: the symmetric half of the products of inputs, rows * k^2 (rows over samples and positions), and of cotangents,
  rows * o^2 for each column; convolutions sum those over positions first. A convolution with stride 1 needs less for its
  inputs, since products of rows of the image recur: with h rows of output, i rows of kernel and k = i f, these are
  2 rows * f^2 * (the sum of (h + i - 1 - d) / h over d = 0 ... i - 1, of which half counts for d = 0).

F and F + D + W are counted by torch on the net itself, W and the factors from shapes of the convolutions and linear layers.
Attention is counted as if it had no mask. Bytes: parameters are read and the gradient is written, results are written, and
input and outputs of these layers are written and read, all of it once; cotangents might stay in the cache.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compare import SHORTEST, SKIP, cpu_name, refusal, seconds
from contenders import CONTENDERS, Problem, Step, problem
from nets import NETS
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

QUANTITIES = (
    *("gradient", "batch_grad", "batch_l2", "sum_grad_squared", "variance", "diag_ggn", "diag_ggn_mc"),
    *("kfac", "kflr", "batch_diag_ggn", "sqrt_ggn"),
)
EXACT = ("diag_ggn", "kflr", "batch_diag_ggn", "sqrt_ggn")


@dataclass
class Counts:
    """Operations of a net on a batch, and entries that it moves."""

    forward: int = 0  # F
    backward: int = 0  # D, of one column
    weights_of_vectors: int = 0  # W of the layers with one vector per sample
    weights_of_positions: int = 0  # W of the others
    input_factors: int = 0
    output_factors: int = 0  # of one column
    parameters: int = 0
    activations: int = 0  # inputs and outputs of the layers that are counted, as each is written and read


def count(module: nn.Module, X: Tensor, loss: Callable[[Tensor], Tensor]) -> Counts:
    """Run a gradient and count."""
    counts = Counts(parameters=sum(p.numel() for p in module.parameters()), activations=X.numel())

    def add(layer: Any, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        x, features = inputs[0], layer.weight[0].numel()
        convolution = not isinstance(layer, nn.Linear)
        outputs = layer.weight.shape[0]
        rows, groups = out.numel() // outputs, layer.groups if convolution else 1
        operations = 2 * rows * layer.weight.numel()
        if convolution or rows > len(x):
            counts.weights_of_positions += operations
        else:
            counts.weights_of_vectors += operations
        products = rows * features**2
        if convolution and groups == 1 and layer.stride[0] == layer.dilation[0] == 1:
            height, kernel = out.shape[2], layer.kernel_size[0]
            windows = sum(height + kernel - 1 - d for d in range(kernel)) - (height + kernel - 1) / 2
            products = min(products, round(2 * rows * (features // kernel) ** 2 * windows / height))
        counts.input_factors += groups * products
        counts.output_factors += (len(x) if convolution else rows) * outputs**2
        counts.activations += 2 * out.numel()

    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        value = loss(module(X))
        counts.forward = flops.get_total_flops()
        torch.autograd.grad(value, list(module.parameters()))
    for hook in hooks:
        hook.remove()
    weights = counts.weights_of_vectors + counts.weights_of_positions
    counts.backward = flops.get_total_flops() - counts.forward - weights
    return counts


def operations(quantity: str, counts: Counts, columns: int) -> int:
    """Multiplications and additions of a quantity with its gradient; ``columns`` is m."""
    c, W = counts, counts.weights_of_vectors + counts.weights_of_positions
    passes = c.forward + (1 + columns) * c.backward
    if quantity in ("gradient", "batch_grad", "batch_l2"):
        return passes + W
    if quantity in ("sum_grad_squared", "variance"):
        return passes + W + c.weights_of_vectors
    if quantity in ("diag_ggn", "diag_ggn_mc", "batch_diag_ggn"):
        return passes + W + c.weights_of_vectors + columns * c.weights_of_positions
    if quantity == "sqrt_ggn":
        return passes + W + columns * W
    return passes + W + c.input_factors + columns * c.output_factors


def entries(counts: Counts, results: Any) -> int:
    """Numbers that are read or written at least once."""
    return 2 * counts.parameters + counts.activations + sum(t.numel() for t in pytree.tree_leaves(results or {}))


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------


class Machine:
    """How fast the machine multiplies matrices and copies memory, at the moment when it is asked."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._device = device
        squares = [(n, n, n) for n in ((2048, 4096, 8192) if device == "cuda" else (256, 512, 1024, 2048))]
        thin = [(256, 4096, 256), (4096, 64, 4096), (4096, 4096, 128), (128, 4096, 4096)]
        products = [self._product(*shape, dtype) for shape in squares + thin]
        self._product_step, self._operations = max(products, key=lambda p: p[1] / self._mean(p[0], 0.3))
        source = torch.ones((1 << 30 if device == "cuda" else 1 << 28) // 4, device=device)
        target = source.clone()
        self._copy, self._bytes = partial(target.copy_, source), 2 * source.nbytes  # read, and written to memory in use

    def _product(self, m: int, k: int, n: int, dtype: torch.dtype) -> tuple[Step, int]:
        a, b = torch.rand(m, k, device=self._device, dtype=dtype), torch.rand(k, n, device=self._device, dtype=dtype)
        return partial(torch.mm, a, b, out=a @ b), 2 * m * k * n

    def _mean(self, step: Callable[[], Any], duration: float) -> float:
        step()
        return seconds(step, int(duration / seconds(step, 1, self._device)) + 1, self._device)

    def rates(self, duration: float = 0.05) -> dict[str, float]:
        """Operations per second of the shape that was fastest at first, and bytes per second of copies."""
        return {
            "operations_per_second": self._operations / self._mean(self._product_step, duration),
            "bytes_per_second": self._bytes / self._mean(self._copy, duration),
        }


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def floor(cell: Problem, rates: Callable[[], dict[str, float]], rounds: int) -> dict[str, Any]:
    """A row: the time of a quantity, its floor and their quotient, medians over rounds that each measure the machine too."""
    step = CONTENDERS["gradient" if cell.quantity == "gradient" else "curvfunc"](cell)
    counts = count(cell.module, cell.X, lambda out: nn.functional.cross_entropy(out, cell.y))
    columns = cell.outputs - cell.y[0].numel() if cell.quantity in EXACT else int(cell.quantity in ("diag_ggn_mc", "kfac"))
    work = operations(cell.quantity, counts, columns)
    moved = entries(counts, step()[1]) * next(cell.module.parameters()).element_size()
    repeats = int(SHORTEST / seconds(step, 1, cell.device)) + 1
    times, floors, bounds = [], [], []
    for _ in range(rounds):
        at = rates()
        step()
        times.append(seconds(step, repeats, cell.device))
        limits = {"products": work / at["operations_per_second"], "memory": moved / at["bytes_per_second"]}
        bounds.append(max(limits, key=limits.__getitem__))
        floors.append(limits[bounds[-1]])
    factor = statistics.median(t / f for t, f in zip(times, floors, strict=True))
    return {
        **{"net": cell.net, "quantity": cell.quantity, "batch": len(cell.X), "columns": columns},
        **{"operations": work, "bytes": moved, "bound": statistics.mode(bounds), "counts": asdict(counts)},
        **{"ms": round(1e3 * statistics.median(times), 4), "floor_ms": round(1e3 * statistics.median(floors), 4)},
        "factor": round(factor, 2),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table per net."""
    lines: list[str] = []
    for net, batch in dict.fromkeys((row["net"], row["batch"]) for row in rows):
        lines += ["", f"**{net}**, N = {batch}", "", "| quantity | time | floor | factor |", "|---|---|---|---|"]
        for r in rows:
            if (r["net"], r["batch"]) == (net, batch):
                limit = f"{r['floor_ms']:.2f} ms ({r['bound']})"
                lines.append(f"| `{r['quantity']}` | {r['ms']:.2f} ms | {limit} | {r['factor']:.1f} |")
    return "\n".join(lines[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure, and write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), metavar="NET")
    parser.add_argument("--quantities", nargs="+", choices=QUANTITIES, default=list(QUANTITIES), metavar="QUANTITY")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("float32", "tf32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = options.precision == "tf32"
    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    machine = Machine(options.device, dtype)
    rates = machine.rates(0.3)
    rows = []
    for net in options.nets:
        for quantity in options.quantities:
            cell = problem(net, quantity, options.device, options.precision)
            if quantity == "gradient" or refusal(cell, SKIP) is None:
                rows.append(floor(cell, machine.rates, options.rounds))
    print(f"{rates['operations_per_second'] / 1e9:.1f} G operations/s, {rates['bytes_per_second'] / 1e9:.1f} GB/s")
    if options.out:
        environment = {"torch": torch.__version__, "cpu": cpu_name(), "threads": options.threads, "device": options.device}
        environment |= {"precision": options.precision, "rounds": options.rounds}
        options.out.write_text(json.dumps({"environment": environment, "rates": rates, "rows": rows}, indent=1) + "\n")
    if options.table:
        print(table(rows))


if __name__ == "__main__":
    main()
