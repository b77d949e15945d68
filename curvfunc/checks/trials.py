"""Operations by themselves: whether their gradients are right, under vmap too, and whether they keep samples apart."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from curvfunc.engine.calls import tensors_in
from curvfunc.engine.columns import without_fallback_warnings
from curvfunc.rules.kernels import INSTEAD

__all__ = ["Calls", "gradient", "inner", "mixes", "name_of", "plain_kernels", "relative_errors", "same_draws", "trial"]

Function = Callable[..., Tensor]


class Calls(TorchFunctionMode):
    """Keeps calls with floating-point tensors, arguments as they were: one of each kind, or ``everything``."""

    def __init__(self, everything: bool = False) -> None:
        super().__init__()
        self.everything = everything
        self.found: dict[Any, tuple[Any, Any, Any]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and keep the call."""
        kwargs = kwargs or {}
        tensors = tensors_in(args, kwargs)
        if getattr(func, "__name__", "") not in ("__get__", "__set__") and any(t.is_floating_point() for t in tensors):
            options = str([a for a in (*args, *kwargs.values()) if not isinstance(a, Tensor)])[:100]
            kind = (func, tuple((t.shape, t.stride(), t.dtype) for t in tensors), options)
            key = len(self.found) if self.everything else kind
            if key not in self.found:
                called: Any = (args, kwargs)
                self.found[key] = (func, *optree.tree_map(_copy, called))
        return func(*args, **kwargs)


def _copy(t: Any) -> Any:
    if not isinstance(t, Tensor):
        return t
    dense = all(t.stride()) or not t.numel()
    copy = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) if dense else torch.empty_like(t)
    return copy.copy_(t.detach()).requires_grad_(t.requires_grad)


def trial(function: Any, args: Any, kwargs: Any) -> str:
    """What is wrong with an operation by itself, in float64; empty if nothing is, or if it does not run by itself."""
    run = INSTEAD[2].get(function, function)
    given: Any = (args, kwargs)
    leaves, tree = optree.tree_flatten(given)
    places = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad]
    leaves = [t.detach().double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in leaves]
    if not places:
        return ""

    def apply(*tensors: Tensor, last: bool = False) -> Tensor:
        used: list[Any] = [t.clone() if isinstance(t, Tensor) else t for t in leaves]
        for i, t in zip(places, tensors, strict=True):
            used[i] = t.clone()
        called: Any = optree.tree_unflatten(tree, used)
        with same_draws():
            out = run(*called[0], **called[1])
        outs = [t for t in tensors_in([out], {}) if t.is_floating_point()]
        return torch.cat([(t.flatten(2).mT if last and t.ndim > 2 else t).reshape(-1) for t in outs])

    padded = function is F.embedding and (kwargs.get("padding_idx") is not None or any(a is not None for a in args[2:3]))
    problems = []
    for what, (test, differences) in TRIALS.items():
        if padded and differences:  # these rows have no gradient on purpose
            continue
        with same_draws(), without_fallback_warnings():
            points = [leaves[i] for i in places]
            beside = [p + 1e-2 * torch.randn_like(p) for p in points]  # away from kinks and ties
            try:
                if all(not test(apply, at) < 1e-4 for at in ((points, beside) if differences else (points,))):
                    problems.append(what)
            except Exception:
                continue
    return f"{name_of(function)}: {', '.join(problems)}" if problems else ""


def _columns(apply: Function, points: list[Tensor]) -> float:
    """Columns together, without a graph, and one by one."""
    leaves = [p.clone().requires_grad_() for p in points]
    out = apply(*leaves)
    columns = torch.randn(2, *out.shape, dtype=out.dtype, device=out.device)
    one_by_one = [torch.stack(g) for g in zip(*[gradient(out, leaves, c) for c in columns], strict=True)]
    with torch.no_grad():
        together = torch.vmap(lambda c: tuple(gradient(out, leaves, c)))(columns)
    return max(relative_errors(together, one_by_one))


def _samples(apply: Function, points: list[Tensor]) -> float:
    """Samples under vmap, and one by one."""
    leaves = [(p + 1e-3 * torch.randn(2, *p.shape, dtype=p.dtype, device=p.device)).requires_grad_() for p in points]
    together = torch.vmap(apply)(*leaves)
    one_by_one = torch.stack([apply(*[p[n] for p in leaves]) for n in range(2)])
    column = torch.randn_like(together)
    got, want = (gradient(out, leaves, column) for out in (together, one_by_one))
    return max(relative_errors([together.detach(), *got], [one_by_one.detach(), *want]))


STEP = 1e-6


def _first(apply: Function, points: list[Tensor]) -> float:
    """The gradient and the slope."""
    leaves = [p.clone().requires_grad_() for p in points]
    out = apply(*leaves)
    if not out.requires_grad:  # cut off from its inputs on purpose
        return 0.0
    column, v = torch.randn_like(out), [torch.randn_like(p) for p in points]
    ends = [apply(*[p + h * w for p, w in zip(points, v, strict=True)]) for h in (STEP, -STEP)]
    return relative_errors([inner(gradient(out, leaves, column), v)], [((ends[0] - ends[1]) * column).sum() / (2 * STEP)])[0]


def _strided(apply: Function, points: list[Tensor]) -> float:
    """The gradient and the slope, where the cotangent has its axes in another order, as tokens made of images have."""
    return _first(partial(apply, last=True), points)


def _second(apply: Function, points: list[Tensor]) -> float:
    """The derivative of the gradient and its differences."""
    v, column = [torch.randn_like(p) for p in points], torch.randn_like(apply(*points))

    def first(at: list[Tensor], create_graph: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [p.clone().requires_grad_() for p in at]
        return leaves, gradient(apply(*leaves), leaves, column, create_graph=create_graph)

    leaves, grads = first(points, create_graph=True)
    ends = [first([p + h * w for p, w in zip(points, v, strict=True)])[1] for h in (STEP, -STEP)]
    want = [(a - b) / (2 * STEP) for a, b in zip(*ends, strict=True)]
    return max(relative_errors(gradient(inner(grads, v), leaves), want))


# What is tried, and whether it is compared with finite differences.
TRIALS: dict[str, tuple[Callable[[Function, list[Tensor]], float], bool]] = {
    "its gradient": (_first, True),
    "its gradient, if the cotangent is strided": (_strided, True),
    "its backward pass under vmap over columns": (_columns, False),
    "it, or its backward pass, under vmap over samples": (_samples, False),
    "its second derivative": (_second, True),
}


def mixes(function: Any, args: Any, kwargs: Any, n: int, total: int) -> bool:
    """Whether an operation on all samples gives sample n other values than on it alone."""

    def cut(t: Any) -> Any:
        return t[n : n + 1] if isinstance(t, Tensor) and t.ndim and len(t) == total else t

    given: Any = (args, kwargs)
    alone: Any = optree.tree_map(cut, given)
    try:
        whole, one = (function(*a, **k) for a, k in (given, alone))
        pairs = [(cut(a), b) for a, b in zip(tensors_in([whole], {}), tensors_in([one], {}), strict=True)]
        return any(a.is_floating_point() and (a.shape != b.shape or relative_errors([b], [a])[0] > 1e-4) for a, b in pairs)
    except Exception:  # it has no sense for a sample alone, which says nothing
        return False


# -- small things


def gradient(out: Tensor, leaves: Sequence[Tensor], column: Tensor | None = None, create_graph: bool = False) -> list[Tensor]:
    """By an ordinary backward pass; zeros where there is none."""
    if not out.requires_grad:
        return [torch.zeros_like(p) for p in leaves]
    given: Any = {"retain_graph": True, "create_graph": create_graph, "materialize_grads": True}
    return list(torch.autograd.grad(out, leaves, column, **given))


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """⟨a, b⟩."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def relative_errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
    """Of each tensor, by norm; small ones count by the size of the largest."""
    norms = [w.double().norm().item() for w in want]
    floor = 1e-3 * max(norms, default=0.0) + 1e-30
    differences = [(a.double() - b.double()).norm().item() for a, b in zip(got, want, strict=True)]
    return [d / max(norm, floor) if d == d else float("inf") for d, norm in zip(differences, norms, strict=True)]


@contextmanager
def same_draws(seed: int = 0) -> Iterator[None]:
    """The same random numbers at each run."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Kernels that can be differentiated twice, and in evaluation mode: not all of vendors' libraries can."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


def name_of(function: Any) -> str:
    """As it is called."""
    return getattr(function, "__name__", str(function))
