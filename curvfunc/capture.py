"""One forward pass, and where it uses the parameters.

The model runs once under a ``TorchFunctionMode`` that sees every call with the parameter tensors themselves. For an
operation with a rule it keeps a *site*: the forms of the parameters' use, and the gradient edge of the output, which
stays right when the output is changed in place later. Two ways of running keep samples apart:

- *plain*, on the whole batch. Valid if every use of a parameter has a rule and the sample axis is proven
  (`curvfunc.batch_axis`) from each site to the output.
- *vmapped* over samples, where the sample axis is explicit. A parameter that is used without a rule (*generic*) is
  expanded to one copy per sample, whose gradient is the per-sample gradient: right for every operation.

Where vmap cannot run the model either, samples run one after another, all parameters generic. Nothing is guessed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._C import _functorch

from curvfunc.forms import Direct
from curvfunc.losses import values_visible
from curvfunc.observer import Observer, Opaque, axis_of, calls_may_hide, edge_of, hidden, marked, without_fallback_warnings
from curvfunc.rules.pooling import FASTER
from curvfunc.samples import flatten, tree_map
from curvfunc.sites import Layouts, Site, Trace

__all__ = ["capture", "check_output"]


def capture(
    model_fn: Callable[..., Any],
    leaves: list[Tensor],
    rebuild: Callable[[Sequence[Tensor]], Any],
    X: Any,
    samples: int,
    *,
    generic: Sequence[int] = (),
    layouts: Layouts | None = None,
    faster: bool = False,
) -> Trace:
    """Run ``model_fn(rebuild(leaves), X)`` once and find the sites.

    Args:
        model_fn: The model.
        leaves: The parameters, requiring grad.
        rebuild: Makes the params pytree of a list of tensors.
        X: The input, every tensor [N, ...].
        samples: N.
        generic: Indices of parameters that are to be generic whatever use they have.
        layouts: Filled with the layouts of intermediate tensors if given.
        faster: Whether operations may be replaced by faster ones with the same values, so that the graph is another one.
    """
    try:
        return _attempt(model_fn, leaves, rebuild, X, samples, generic, layouts, faster)
    except Exception as error:
        if not _hides_calls(error):
            raise
    if layouts is not None:
        layouts.clear()
    with _nothing_hidden():
        return _attempt(model_fn, leaves, rebuild, X, samples, generic, layouts, faster)


def _attempt(
    model_fn: Callable[..., Any],
    leaves: list[Tensor],
    rebuild: Callable[[Sequence[Tensor]], Any],
    X: Any,
    samples: int,
    generic: Sequence[int],
    layouts: Layouts | None,
    faster: bool,
) -> Trace:
    """On the whole batch; if that does not hold, under vmap; if that does not run, sample by sample."""
    tracked = dict(enumerate(leaves))
    if generic:
        reasons: dict[int | None, str] = dict.fromkeys(generic, "on request")
        return _capture_batched(model_fn, leaves, rebuild, X, samples, reasons, layouts)
    for guesses in (None, False):
        mode = Observer(tracked, None, samples, layouts, FASTER if faster else {})
        mode.guesses = guesses
        params, X_marked = rebuild(leaves), tree_map(marked, X)
        with mode:
            out = model_fn(params, X_marked)
        check_output(out, samples)
        if not mode.reasons and out.requires_grad and axis_of(out) != 0:
            mode.reasons[None] = "the sample axis could not be followed to the output"
        if not mode.reasons:
            mode.note(hidden(out, mode.sites, tracked), "it is used where calls cannot be seen")
        if not mode.reasons:
            return Trace(out, mode.sites, "plain")
        if not mode.guesses:
            break
    trace = _capture_batched(model_fn, leaves, rebuild, X, samples, mode.reasons, layouts)
    _check_separate(out, trace.out, lambda: model_fn(rebuild(leaves), X))
    return trace


def _check_separate(whole: Tensor, one_by_one: Tensor, again: Callable[[], Tensor]) -> None:
    """Refuse a model whose output for the batch is not that of its samples: it mixes them.

    Nothing is said where values cannot be seen, or where they depend on chance (``again`` gives others).
    """
    if torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is not None or not values_visible(whole):
        return
    with torch.no_grad():
        if whole.shape == one_by_one.shape:
            difference = (whole - one_by_one).abs()
            scale = 16 * torch.finfo(whole.dtype).eps ** 0.5 * whole.abs()
            if whole.numel() == 0 or not difference.max() > scale.max():  # not finite: nothing to compare
                return
        if not torch.equal(again(), whole):
            return
    raise ValueError(
        "the model mixes the samples of a batch: its output for the batch differs from its outputs for the samples one by one, "
        "so per-sample gradients and curvature are not defined. Look for reductions, normalizations or indices over the "
        "first axis."
    )


def _capture_batched(
    model_fn: Callable[..., Any],
    leaves: list[Tensor],
    rebuild: Callable[[Sequence[Tensor]], Any],
    X: Any,
    samples: int,
    reasons: dict[int | None, str],
    layouts: Layouts | None,
) -> Trace:
    try:
        return _capture_vmapped(model_fn, leaves, rebuild, X, samples, reasons, layouts)
    except (RuntimeError, NotImplementedError) as error:
        if _hides_calls(error):
            raise
        if layouts is not None:
            layouts.clear()
        return _capture_loop(model_fn, leaves, rebuild, X, samples, error)


def _hides_calls(error: Exception) -> bool:
    """Whether activation checkpointing or compiled code inside the model made the capture fail."""
    return calls_may_hide() and (
        isinstance(error, (Opaque, torch._dynamo.exc.TorchDynamoException))
        or "saved tensor hooks" in str(error)
        or "autograd.Function with functorch" in str(error)
    )


@contextmanager
def _nothing_hidden() -> Iterator[None]:
    """Run checkpointed parts of a model as they are, and compiled parts eagerly."""

    class Plain:
        @staticmethod
        def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            return function(*args)

    def plain(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    with (
        patch.object(torch.utils.checkpoint, "CheckpointFunction", Plain),
        patch.object(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", plain),
        torch.compiler.set_stance("force_eager") if not torch.compiler.is_compiling() else nullcontext(),
    ):
        yield


def _capture_vmapped(
    model_fn: Callable[..., Any],
    leaves: list[Tensor],
    rebuild: Callable[[Sequence[Tensor]], Any],
    X: Any,
    samples: int,
    reasons: dict[int | None, str],
    layouts: Layouts | None = None,
) -> Trace:
    """Run under vmap over samples, generic parameters expanded; again if more of them turn out to be generic."""
    reasons = dict(reasons)
    while True:
        tracked = {i: p for i, p in enumerate(leaves) if i not in reasons}
        generic = {i: _copies(leaves[i], samples) for i in reasons if i is not None}
        modes: list[Observer] = []
        inputs, rebuild_X = flatten(X)

        def one(xs: list[Tensor], own: dict[int, Tensor]) -> Tensor:
            level = _functorch.maybe_get_level(xs[0])
            modes.append(Observer(tracked, level, samples, layouts))  # noqa: B023 (called at once, below)
            params = rebuild([own.get(i, p) for i, p in enumerate(leaves)])
            x = rebuild_X([t.unsqueeze(0) for t in xs])  # noqa: B023
            with modes[0]:  # noqa: B023
                out = model_fn(params, x)
            check_output(out, 1)
            return out.squeeze(0)

        with without_fallback_warnings():
            out = torch.vmap(one, randomness="different")(inputs, generic)
        mode = modes[0]
        mode.note(hidden(out, mode.sites, tracked), "it is used where calls cannot be seen")
        if not mode.reasons:
            return Trace(out, mode.sites + _generic_sites(generic, leaves), "vmap", reasons)
        reasons |= mode.reasons


def _capture_loop(
    model_fn: Callable[..., Any],
    leaves: list[Tensor],
    rebuild: Callable[[Sequence[Tensor]], Any],
    X: Any,
    samples: int,
    error: Exception,
) -> Trace:
    """Run sample by sample, every parameter with a copy per sample."""
    generic = {i: _copies(p, samples) for i, p in enumerate(leaves)}
    inputs, rebuild_X = flatten(X)
    outs = []
    for n in range(samples):
        x = rebuild_X([t[n : n + 1] for t in inputs])
        with Observer({}, None, 1):
            out = model_fn(rebuild([p[n] for p in generic.values()]), x)
        check_output(out, 1)
        outs.append(out)
    why = f"vmap cannot run the model: {str(error).splitlines()[0]}"
    return Trace(torch.cat(outs), _generic_sites(generic, leaves), "loop", dict.fromkeys(generic, why))


def _copies(p: Tensor, samples: int) -> Tensor:
    """One copy of a parameter per sample, sharing memory, whose gradient is the per-sample gradient."""
    return p.expand(samples, *p.shape)


def _generic_sites(generic: dict[int, Tensor], leaves: list[Tensor]) -> list[Site]:
    return [
        Site("generic", {i: Direct(lambda g: g, leaves[i].shape)}, edge_of(copies), 0, [], copies.shape, [])
        for i, copies in generic.items()
    ]


def check_output(out: Any, samples: int) -> None:
    """Raise if a model's output is not one tensor with the samples first."""
    if not isinstance(out, Tensor):
        what = f"a {type(out).__name__}"
        if isinstance(out, dict):
            what += f" with keys {list(out)}"
        raise TypeError(
            f"the model returned {what}; a single tensor is needed. Choose one: functionalize(module, output_fn=lambda "
            "out: out[0]), or a model_fn that returns it."
        )
    if out.ndim == 0 or out.shape[0] != samples:
        raise ValueError(
            f"the model's output has shape {tuple(out.shape)} for {samples} sample(s); its first axis must be the "
            "sample axis. Permute it in model_fn or output_fn."
        )
    if out.numel() == 0 and out.shape[0]:
        raise ValueError(f"the model's output has shape {tuple(out.shape)}, and so no entries to take derivatives of.")
    if not out.is_floating_point():
        raise TypeError(f"the model's output has dtype {out.dtype}; a real floating-point tensor is needed.")
