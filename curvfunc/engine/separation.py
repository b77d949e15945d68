"""Proof by comparison that a model keeps the samples of a batch apart, where it cannot be followed operation by operation.

The gradient of sample n is that of its own term of the loss with everything else held as it is, gₙ = ∂ℓₙ(f(θ, X)ₙ)/∂θ. A
model that runs on one sample at a time gives it if f(θ, X)ₙ = h(θ, xₙ) for all θ. So two forward passes are compared, that of
the whole batch and that of the samples by themselves: outputs, and gradients of one and the same combination of all outputs,
for what is equal here may differ in a neighbourhood (a coefficient that is zero as yet). Where second derivatives are wanted,
both run at other parameters too, for gradients may be equal where these are not (the square of a coefficient that is zero).
Where they differ, it may be by chance: both run again without it, all random operations replaced by constants.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from curvfunc.engine.chance import numpy_random
from curvfunc.tensors.ownership import base

__all__ = [
    "ALONE",
    "FINE",
    "MIXES",
    "SEEDED",
    "Outcome",
    "chance_put_back",
    "differ",
    "holds",
    "moved",
    "outcome",
    "require",
    "same_chance",
]

ALONE = (
    "the model mixes the samples of a batch, or cannot run on one sample: they cannot be followed through it ({why}), and for "
    "a sample by itself it fails: {error}"
)
SEEDED = (
    "the model draws the same random numbers each time, as after torch.manual_seed, and the samples cannot be followed through "
    "it: one by one they would have other numbers than in the batch. Draw from generators that move on, or not at all."
)
MIXES = (
    "the model mixes the samples of a batch: its output for the batch, or its gradient, differs from that for the samples one "
    "by one, so per-sample gradients and curvature are not defined. Look for reductions, normalizations or indices over the "
    "first axis."
)


FINE = 0.75


@dataclass(frozen=True)
class Outcome:
    """A forward pass as it is compared: the output, and the gradient of a fixed combination of it per parameter."""

    out: Tensor
    gradients: list[Tensor | None]


def outcome(out: Tensor, leaves: Sequence[Tensor], *, retain_graph: bool) -> Outcome:
    """What is compared of a forward pass.

    Args:
        out: Its output, with its graph.
        leaves: The parameters.
        retain_graph: Whether the graph is needed again.
    """
    if not out.requires_grad:
        return Outcome(out.detach(), [None] * len(leaves))
    numbers = torch.arange(1, out.numel() + 1, device=out.device).to(out.dtype if out.element_size() > 2 else torch.float32)
    combination = (0.5 + numbers.cos()).to(out.dtype).view(out.shape)  # no draws: nobody's random state moves on
    gradients = torch.autograd.grad(out, leaves, combination, retain_graph=retain_graph, allow_unused=True)
    return Outcome(out.detach(), [None if g is None else g.detach() for g in gradients])


def moved(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Other parameters: entries changed by up to a fifth, or by half where all are the same, as after initialization."""
    found = []
    for p in leaves:
        if not p.numel():
            found.append(p)
            continue
        values, numbers = p.detach(), torch.arange(1, p.numel() + 1, device=p.device)
        low, high, size = values.amin(), values.amax(), values.abs().mean()
        step = torch.where(low == high, 0.5 * torch.where(size == 0, 1.0, size), 0.2 * size)
        found.append(p + step * (1.7 * numbers).cos().to(p.dtype).view(p.shape))
    return found


def differ(whole: Outcome, apart: Outcome, digits: float = 0.5) -> Tensor:
    """Whether two forward passes differ by more than rounding, a boolean scalar below all transformations.

    Args:
        whole: One of them.
        apart: The other one.
        digits: The share of digits that have to be the same: half of them in general; `FINE` may be rounding, or not.
    """
    if whole.out.shape != apart.out.shape:
        return torch.ones((), dtype=torch.bool, device=whole.out.device)
    eps = torch.finfo(whole.out.dtype).eps
    pairs: list[tuple[Tensor, Tensor]] = []
    for a, b in zip(whole.gradients, apart.gradients, strict=True):
        if a is not None:
            pairs.append((a, torch.zeros_like(a) if b is None else b))
        elif b is not None:
            pairs.append((torch.zeros_like(b), b))
    with torch.no_grad():
        largest = [_largest(a) for a, _ in pairs if a.numel()]
        noise = 2.0**10 * eps * torch.stack(largest).max() if largest else 0.0  # gradients that are zero but for rounding
        found = [_exceeds(whole.out, apart.out, eps**digits, 0.0)] if whole.out.numel() else []
        found += [_exceeds(a, b, eps**digits, noise) for a, b in pairs if a.numel()]
        if not found:
            return torch.zeros((), dtype=torch.bool, device=whole.out.device)
        return torch.stack([base(t).any() for t in found]).any()


def _exceeds(a: Tensor, b: Tensor, share: float, least: Tensor | float) -> Tensor:
    near = (a - b).abs() <= 16 * share * _largest(a) + least
    return (a.isfinite() & ~near).any()  # where the batch has no finite value, there is nothing to compare


def _largest(t: Tensor) -> Tensor:
    return t.abs().nan_to_num(0.0, 0.0, 0.0).max()


def holds(difference: Tensor, compiling: bool, why: str = MIXES) -> bool:
    """Whether there is no difference; in compiled code this is asserted when it runs."""
    if compiling:
        torch._assert_async(~difference, why)
        return True
    return not bool(difference)


def require(run: Callable[[], tuple[Outcome, Outcome]], compiling: bool, why: str = MIXES) -> None:
    """Raise unless two forward passes are equal when nothing is drawn at random.

    Args:
        run: Makes both.
        compiling: Whether values cannot be seen yet.
        why: What to say.
    """
    with without_chance():
        difference = differ(*run())
    if not holds(difference, compiling, why):
        raise ValueError(why)


def without_chance() -> AbstractContextManager[None]:
    """Random operations give constants, which are the same for each sample; Python's own draws are put back."""
    return chance_put_back(_Constants())


@contextmanager
def chance_put_back(inside: AbstractContextManager[Any] | None = None) -> Iterator[None]:
    """Afterwards Python's generators, which ``same_chance`` sets, are where they were."""
    numpy = numpy_random()
    states = random.getstate(), None if numpy is None else numpy.get_state()
    try:
        with inside or nullcontext():
            yield
    finally:
        random.setstate(states[0])
        if numpy is not None:
            numpy.set_state(states[1])


def same_chance() -> None:
    """Start Python's own draws at the same place in each forward pass, where ``chance_put_back`` sees to them."""
    random.seed(0)
    if (numpy := numpy_random()) is not None:
        numpy.seed(0)


class _Constants(TorchDispatchMode):
    """Replaces operations that draw at random; what is drawn depends on no sample's place in the batch."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name == "native_dropout":
            x, p, train = args[0], args[1], args[2]
            return (x / (1 - p) if train and p < 1 else x.clone()), torch.ones_like(x, dtype=torch.bool)
        if name.startswith("rrelu_with_noise"):
            return func(*args[:4], False, **{k: v for k, v in kwargs.items() if k not in ("training", "generator")})
        if any(a.name == "dropout_p" for a in func._schema.arguments):
            return _call(func, args, kwargs, dropout_p=0.0)
        out = func(*args, **kwargs)
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if name.startswith("randperm"):  # no identity, which would hide that samples are exchanged
                t.copy_(torch.arange(len(t) - 1, -1, -1, device=t.device))
            elif name.startswith(("randint", "random", "multinomial")):
                t.zero_() if _low(func, args, kwargs) <= 0 else t.fill_(_low(func, args, kwargs))
            elif t.is_floating_point() or t.dtype == torch.bool or name.startswith(("bernoulli", "poisson")):
                t.fill_(1.0 if name.startswith(("bernoulli", "poisson")) else 0.5)
        return out


def _bound(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**{a.name: v for a, v in zip(func._schema.arguments, args, strict=False)}, **kwargs}


def _low(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _bound(func, args, kwargs).get("low", _bound(func, args, kwargs).get("from", 0)) or 0


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], **changed: Any) -> Any:
    names = [a.name for a in func._schema.arguments if not a.kwarg_only]
    positional = [changed.pop(n, v) for n, v in zip(names, args, strict=False)]
    return func(*positional, **{k: changed.pop(k, v) for k, v in kwargs.items()}, **changed)
