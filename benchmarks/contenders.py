"""Who computes what: a problem, the quantities, and for each contender one step, the gradient included.

A contender makes a step of a problem and a quantity. Calling the step returns the gradient and the quantity, both by the
parameter's name, in curvfunc's scale and shape; a step keeps neither. What a contender cannot do raises as the step is
made or called.
"""

import copy
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from compat import load_backpack
from nets import LAYERS, NETS
from torch import Tensor, nn

import curvfunc as cf

Result = tuple[dict[str, Tensor], dict[str, Any] | None]
Step = Callable[[], Result]
LARGEST = {"cpu": 2e9, "cuda": 16e9}  # bytes of results: where there are more, the batch is halved
COLUMNS = 1000  # an exact quantity of more outputs per sample than these is not measured
JACOBIAN = 1e9  # bytes up to which the reference may form one, or a Hessian for each sample


class Unsupported(Exception):
    """The contender has no way to compute this; the message says why."""


@dataclass(frozen=True)
class Quantity:
    """What curvfunc is asked for, and what that is for its peers."""

    spec: Any
    extension: str | None = None  # BackPACK's
    of_samples: Callable[[Tensor], Tensor] | None = None  # from per-sample gradients [N, *shape]
    exact: bool = False  # one column per output of a sample
    random: bool = False  # results differ from draw to draw
    reduced: Callable[[Any], Any] = field(default=lambda result: result)  # what is compared


def _sum_of_squares(g: Tensor) -> Tensor:
    return g.square().sum(0)


QUANTITIES = {
    "batch_grad": Quantity(cf.BatchGrad(), "BatchGrad", lambda g: g),
    "batch_l2": Quantity(cf.BatchL2(), "BatchL2Grad", lambda g: g.flatten(1).square().sum(1)),
    "sum_grad_squared": Quantity(cf.SumGradSquared(), "SumGradSquared", _sum_of_squares),
    "variance": Quantity(cf.Variance(), "Variance", lambda g: g.square().mean(0) - g.mean(0).square()),
    "diag_ggn": Quantity(cf.DiagGGN(), "DiagGGNExact", exact=True),
    "diag_ggn_mc": Quantity(cf.DiagGGN(mc_samples=1), "DiagGGNMC", random=True),
    "kfac": Quantity(cf.KFAC(), "KFAC", random=True),
    "kflr": Quantity(cf.KFLR(), "KFLR", exact=True),
    "batch_diag_ggn": Quantity(cf.BatchDiagGGN(), "BatchDiagGGNExact", exact=True),
    "sqrt_ggn": Quantity(cf.SqrtGGN(), "SqrtGGNExact", exact=True, reduced=_sum_of_squares),  # columns may be rotated
    "diag_hessian": Quantity(cf.DiagHessian(), "DiagHessian", exact=True),
    "batch_diag_ggn_mc": Quantity(cf.BatchDiagGGN(mc_samples=1), "BatchDiagGGNMC", random=True),
    "sqrt_ggn_mc": Quantity(cf.SqrtGGN(mc_samples=1), "SqrtGGNMC", random=True),
    "batch_diag_hessian": Quantity(cf.BatchDiagHessian(), "BatchDiagHessian", exact=True),
    "kfra": Quantity(cf.KFRA(), "KFRA", exact=True),
    "batch_dot": Quantity(cf.BatchDot(), of_samples=lambda g: g.flatten(1) @ g.flatten(1).T),
    "ggn_gram": Quantity(cf.GGNGram(), exact=True, reduced=lambda g: torch.einsum("vnvm->nm", g.square())),
}
BACKPACK_QUANTITIES = tuple(QUANTITIES)[:8]
REUSED = ("batch_grad", "sqrt_ggn", "batch_diag_ggn")  # quantities whose buffers are worth keeping


@dataclass(frozen=True)
class Problem:
    """A net in evaluation mode with a batch, on a device and in a precision (float32, tf32 or bfloat16)."""

    net: str
    quantity: str
    device: str
    precision: str
    module: nn.Module
    X: Tensor
    y: Tensor
    outputs: int  # entries of one sample's output

    @property
    def spec(self) -> Any:
        """What curvfunc is asked for."""
        return QUANTITIES[self.quantity].spec

    def params(self) -> dict[str, Tensor]:
        """The parameters by name, without a graph."""
        return {name: p.detach() for name, p in self.module.named_parameters()}

    def loss(self, module: nn.Module) -> Tensor:
        """Cross-entropy of the batch."""
        return F.cross_entropy(module(self.X), self.y)

    def double(self) -> "Problem":
        """The same in float64."""
        X = self.X.double() if self.X.is_floating_point() else self.X
        return replace(self, module=copy.deepcopy(self.module).double(), X=X)


def problem(net: str, quantity: str, device: str, precision: str) -> Problem:
    """A net and a batch for a quantity, from a fixed seed."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.manual_seed(0)
    chosen = (NETS | LAYERS)[net]
    module = chosen.make().eval()
    with torch.no_grad():
        outputs = module(chosen.inputs(1)).numel()
    batch = chosen.cuda_batch if device == "cuda" else chosen.batch
    if quantity == "sqrt_ggn":
        while 4 * outputs * batch * sum(p.numel() for p in module.parameters()) > LARGEST[device] and batch > 1:
            batch //= 2
    X, y = chosen.inputs(batch).to(device), chosen.targets(batch).to(device)
    if precision == "bfloat16":
        module, X = module.bfloat16(), X.bfloat16() if X.is_floating_point() else X
    return Problem(net, quantity, device, precision, module.to(device), X, y, outputs)


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch and curvfunc
# ---------------------------------------------------------------------------------------------------------------------


def gradient(problem: Problem) -> Step:
    """The yardstick: the gradient alone."""
    names, params = zip(*problem.module.named_parameters(), strict=True)
    return lambda: (dict(zip(names, torch.autograd.grad(problem.loss(problem.module), params), strict=True)), None)


def curvfunc(problem: Problem) -> Step:
    """`curvfunc.compute` as it is."""
    model_fn, params = cf.functionalize(problem.module)
    specs = (cf.Grad(), problem.spec)
    return lambda: cf.compute(model_fn, params, problem.X, problem.y, specs)


def curvfunc_compiled(problem: Problem) -> Step:
    """The same under ``torch.compile``."""
    model_fn, params = cf.functionalize(problem.module)
    specs = (cf.Grad(), problem.spec)
    compiled = torch.compile(lambda params, X, y: cf.compute(model_fn, params, X, y, specs), fullgraph=True)
    return lambda: compiled(params, problem.X, problem.y)


def curvfunc_out(problem: Problem) -> Step:
    """The same, written into the results of an earlier step."""
    if problem.quantity not in REUSED:
        raise Unsupported("its results are small")
    if "out" not in inspect.signature(cf.compute).parameters:
        raise Unsupported("compute has no argument out")
    model_fn, params = cf.functionalize(problem.module)
    specs = (cf.Grad(), problem.spec)
    _, buffers = cf.compute(model_fn, params, problem.X, problem.y, specs)
    return lambda: cf.compute(model_fn, params, problem.X, problem.y, specs, out=(None, buffers))


def reference(problem: Problem) -> Step:
    """The definition, by the Jacobian of each sample's output, and the plain gradient."""
    function = getattr(cf.reference, problem.quantity.removesuffix("_mc"), None)
    if function is None:
        raise Unsupported(f"curvfunc.reference has no {problem.quantity}")
    size = 4 * len(problem.X) * problem.outputs * sum(p.numel() for p in problem.module.parameters())
    if "hessian" in problem.quantity or problem.quantity == "kfra":
        size = 4 * len(problem.X) * sum(p.numel() for p in problem.module.parameters()) ** 2
    if size > JACOBIAN:
        raise Unsupported(f"its dense matrices take {size / 1e9:.1f} GB")
    arguments = {"mc_samples": 1} if problem.quantity.endswith("_mc") else {}
    model_fn, params = cf.functionalize(problem.module)
    plain = gradient(problem)
    return lambda: (plain()[0], function(model_fn, params, problem.X, problem.y, **arguments))


def vmap(problem: Problem) -> Step:
    """``vmap(grad)``; the gradient is the sum over samples."""
    of_samples = _of_samples(problem)
    module, params, samples = problem.module, problem.params(), len(problem.X)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(module, params, (x[None],)), y[None]) / samples

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

    def step() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        grads = per_sample(params, problem.X, problem.y)
        return {name: g.sum(0) for name, g in grads.items()}, {name: of_samples(g) for name, g in grads.items()}

    return step


def _of_samples(problem: Problem) -> Callable[[Tensor], Tensor]:
    of_samples = QUANTITIES[problem.quantity].of_samples
    if of_samples is None:
        raise Unsupported("it has first-order quantities only")
    return of_samples


# ---------------------------------------------------------------------------------------------------------------------
# Other libraries
# ---------------------------------------------------------------------------------------------------------------------


def backpack(problem: Problem) -> Step:
    """BackPACK; for second-order quantities, a module that is not a sequence of layers goes through its converter."""
    library = load_backpack()
    extension = QUANTITIES[problem.quantity].extension
    if extension is None:
        raise Unsupported(f"it has no {problem.quantity}")
    active = getattr(library.extensions, extension)(**({"mc_samples": 1} if extension.endswith("MC") else {}))
    module = copy.deepcopy(problem.module)
    names = {id(p): name for name, p in module.named_parameters()}
    sequence = isinstance(module, nn.Sequential) and not any(list(layer.children()) for layer in module)
    first_order = isinstance(active, library.extensions.firstorder.base.FirstOrderBackpropExtension)
    module = library.extend(module, use_converter=not (sequence or first_order))
    params = {names[id(p)]: p for p in module.parameters()}
    loss = library.extend(nn.CrossEntropyLoss())

    def step() -> tuple[dict[str, Tensor], dict[str, Any]]:
        with library.backpack(active):
            loss(module(problem.X), problem.y).backward()
        results = _taken(params, active.savefield)
        return _taken(params, "grad"), {k: tuple(r) if isinstance(r, list) else r for k, r in results.items()}

    return step


def opacus(problem: Problem) -> Step:
    """Opacus's hooks, told that the loss is a sum: its per-sample gradients then have the scale of the loss."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

    of_samples = _of_samples(problem)
    norms = problem.quantity == "batch_l2"
    wrap = GradSampleModuleFastGradientClipping if norms else GradSampleModule
    module = wrap(copy.deepcopy(problem.module).train(), loss_reduction="sum")
    params = {name.removeprefix("_module."): p for name, p in module.named_parameters()}

    def step() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        problem.loss(module).backward()
        if norms:  # ghost norms, where the layer has them
            results = {name: norm.square() for name, norm in _taken(params, "_norm_sample").items()}
        else:
            results = {name: of_samples(g) for name, g in _taken(params, "grad_sample").items()}
        return _taken(params, "grad"), results

    return step


def curvlinops(problem: Problem) -> Step:
    """Curvlinops' Kronecker factors and the plain gradient; its factors of convolutions follow another convention."""
    from curvlinops import FisherType, KFACLinearOperator

    types = {"kfac": FisherType.MC, "kflr": FisherType.TYPE2}
    if problem.quantity not in types:
        raise Unsupported("it has KFAC and KFLR only")
    module, loss = copy.deepcopy(problem.module), nn.CrossEntropyLoss()
    params, data = list(module.parameters()), [(problem.X, problem.y)]
    plain = gradient(problem)

    def step() -> tuple[dict[str, Tensor], None]:
        operator = KFACLinearOperator(
            *(module, loss, params, data),
            check_deterministic=False,
            fisher_type=types[problem.quantity],
            num_per_example_loss_terms=problem.y[0].numel(),
            separate_weight_and_bias=True,
            num_data=len(problem.X),
        )
        operator.compute_kronecker_factors()
        return plain()[0], None

    return step


def _taken(params: dict[str, Tensor], attribute: str) -> dict[str, Any]:
    """An attribute of each parameter, which it then no longer has: the next step starts without it."""
    found = {name: getattr(p, attribute, None) for name, p in params.items()}
    if missing := [name for name, result in found.items() if result is None]:
        raise Unsupported(f"{len(missing)} of {len(params)} parameters get no {attribute}, {missing[0]} among them")
    for p in params.values():
        setattr(p, attribute, None)
    return found


CONTENDERS: dict[str, Callable[[Problem], Step]] = {
    "gradient": gradient,
    "curvfunc": curvfunc,
    "curvfunc_compiled": curvfunc_compiled,
    "curvfunc_out": curvfunc_out,
    "backpack": backpack,
    "opacus": opacus,
    "curvlinops": curvlinops,
    "vmap": vmap,
    "reference": reference,
}
PEERS = ("backpack", "opacus", "curvlinops", "vmap")


def reason(error: Exception) -> str:
    """Type and first line of an exception."""
    message = re.sub(r"\s+", " ", str(error).strip().split("\n")[0])
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def deviation(problem: Problem, found: Result, expected: Result) -> float:
    """The largest deviation of what two contenders found, by parameter, in units of the parameter's largest entry.

    Of the gradient alone, where the quantity is random or not in curvfunc's convention.
    """
    quantity = QUANTITIES[problem.quantity]
    pairs = [(found[0], expected[0], lambda result: result)]
    if not quantity.random and found[1] is not None and expected[1] is not None:
        pairs.append((found[1], expected[1], quantity.reduced))
    if any(a.keys() != b.keys() for a, b, _ in pairs):
        return float("inf")
    return max(_deviation(reduced(a[name]), reduced(b[name])) for a, b, reduced in pairs for name in b)


def _deviation(a: Any, b: Any) -> float:
    if isinstance(b, tuple):
        return max(map(_deviation, a, b)) if len(a) == len(b) else float("inf")
    if a.shape != b.shape:
        return float("inf")
    a, b = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in (a, b))
    relative = ((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny)).item()
    return relative if math.isfinite(relative) else float("inf")
