"""Losses in normal form: recognized by name where there is a closed form, checked against outputs and targets."""

import functools
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from curvfunc.tensors.samples import leaves

__all__ = [
    "CLOSED_FORMS",
    "ClosedForm",
    "Loss",
    "Root",
    "check",
    "check_classes",
    "check_entries",
    "flat",
    "is_sum",
    "label",
    "no_loss",
    "normalize",
    "rebuild",
    "tolerance",
    "values_visible",
]

Constants = tuple[tuple[str, Any], ...]


@dataclass(eq=False)  # quicker to make than if it were frozen
class Loss:
    """A loss in normal form: what it is called, and its options as constants and as tensors.

    Attributes:
        name: Its key in `CLOSED_FORMS`, such as ``"cross_entropy"``, or None for a custom loss.
        fn: The callable, ``fn(out, y, **options, **tensors)``.
        options: Pairs (key, value) of the options that are no tensors: all of a named loss, for a custom
            one those of a partial.
        tensors: The options that are tensors, without those that are None.
        kept: Whether the targets were seen, and none of them is ignored; `check` says so.
        found: What was made of the targets, for all that needs it; of a loss that `check` gave, for these alone.
    """

    name: str | None
    fn: Callable[..., Tensor]
    options: Constants = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)
    kept: bool = False
    found: dict[Any, Any] | None = None

    def __call__(self, out: Tensor, y: Any) -> Tensor:
        """Evaluate the loss.

        Args:
            out: Output of the model, [N, ...].
            y: Targets.

        Returns:
            The loss, a scalar tensor.

        Raises:
            ValueError: If the result is not a scalar tensor.
        """
        _check_reduction(self)
        value = self.fn(out, y, **dict(self.options), **self.tensors)
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{label(self)} returned {got}, not a scalar tensor. Sum or average it over the samples.")
        return value


@dataclass(eq=False)  # quicker to make than if it were frozen
class Root:
    """A root S of the loss Hessian with respect to the output: for each n, sum_v S[v, n] S[v, n]^T = R Hessian of l_n.

    Attributes:
        num: The number V of columns.
        columns: ``columns(start, stop)`` computes the columns ``start <= v < stop``, [stop - start, N, *out], at
            the cost and in the memory of these columns only.
        only: The only one, [N, *out], where it is there.
        diagonal: Gives the diagonal of the Hessian, sum_v S[v]^2 [N, *out], where it takes less than the columns.
    """

    num: int
    columns: Callable[[int, int], Tensor]
    only: Tensor | None = None
    diagonal: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class ClosedForm:
    """A loss with known derivatives by the output, convex in it unless weights or soft targets are negative.

    In the functions, ``loss`` has the options, ``work`` is the output in float32 at least, and the factor R of the reduction
    is in the results.

    Attributes:
        function: ``(out, y, **options, **tensors) -> scalar``; by this very function the loss is recognized.
        check: Raises unless options, output and target fit, ``(loss, out, y)``; whether no target is ignored, as far as seen.
        gradient: That of the loss: ``(loss, work, y) -> [N, *out]``.
        root: Columns of a root of the Hessian, in a dtype, and with ``fewest`` others if these are fewer:
            ``(loss, work, y, dtype, fewest) -> Root``.
        sampled: Columns that are a root in expectation, from labels that the likelihood gives:
            ``(loss, work, y, mc_samples, generator) -> (start, stop) -> [stop - start, N, *out]``.
        module: The module that does the same, with the options as its attributes.
        options: The options that are no tensors, with their defaults, "reduction" among them; with any other a loss is custom.
        tensors: The names of the options that are tensors.
    """

    function: Callable[..., Tensor]
    check: Callable[[Loss, Tensor, Tensor], bool]
    gradient: Callable[[Loss, Tensor, Tensor], Tensor]
    root: Callable[[Loss, Tensor, Tensor, torch.dtype, bool], Root]
    sampled: Callable[..., Callable[[int, int], Tensor]]
    module: type[nn.Module] | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: {"reduction": "mean"})
    tensors: tuple[str, ...] = ()


FEW = 128  # targets that Python reads sooner than torch finds the largest of them

CLOSED_FORMS: dict[str, ClosedForm] = {}  # filled by curvfunc.losses.roots


def normalize(loss_fn: Callable[..., Tensor]) -> Loss:
    """Recognize the losses that have a closed form.

    These are the functions of `CLOSED_FORMS`, a ``functools.partial`` of them with keyword arguments only, and their modules.
    Everything else is custom, among it subclasses of these modules and the deprecated ``size_average`` and ``reduce``.

    Args:
        loss_fn: A callable ``(out, y) -> scalar`` that sums or averages over samples.

    Returns:
        The loss in normal form. Can be traced by ``torch.compile``.
    """
    if isinstance(loss_fn, Loss):
        return loss_fn
    remembers = isinstance(loss_fn, types.FunctionType) and not torch.compiler.is_compiling()
    if remembers and (known := _BY_FUNCTION.get(loss_fn)) is not None:
        return known
    if isinstance(loss_fn, type) or not callable(loss_fn):
        what = f"the class {loss_fn.__name__}" if isinstance(loss_fn, type) else repr(loss_fn)
        example = f"{loss_fn.__name__}()" if isinstance(loss_fn, type) else "nn.CrossEntropyLoss() or F.cross_entropy"
        raise TypeError(f"loss_fn is {what}; a function (output, y) -> scalar is needed, such as {example}.")
    fn: Any = loss_fn
    keywords: dict[str, Any] = {}
    while isinstance(fn, functools.partial) and not fn.args:
        fn, keywords = fn.func, {**fn.keywords, **keywords}
    name = None
    for key, form in CLOSED_FORMS.items():
        if form.module is not None and type(loss_fn) is form.module:
            fn = form.function
            keywords = {k: getattr(loss_fn, k) for k in (*form.options, *form.tensors) if hasattr(loss_fn, k)}
        if fn is form.function:
            name = key
            break
    given = {key: value for key, value in keywords.items() if value is not None or name is None}
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    options = {key: value for key, value in given.items() if not isinstance(value, Tensor)}
    if name is None:
        plain = isinstance(fn, types.FunctionType)
        return Loss(None, fn, tuple(options.items()), tensors) if plain else Loss(None, loss_fn)
    form = CLOSED_FORMS[name]
    if any(key not in form.tensors for key in tensors) or any(key not in form.options for key in options):
        return Loss(None, loss_fn)
    loss = Loss(name, fn, tuple({**form.options, **options}.items()), tensors)
    if remembers and loss_fn is form.function:
        _BY_FUNCTION[loss_fn] = loss
    return loss


_BY_FUNCTION: dict[Any, Loss] = {}  # the functions of closed forms themselves, as they are by default


def rebuild(name: str | None, fn: Callable[..., Tensor], options: Constants, tensors: dict[str, Tensor]) -> Loss:
    """The loss from its parts, the inverse of reading off its attributes.

    Across a compile boundary the first three travel as constants and the last as tensors.
    """
    return Loss(name, fn, options, tensors)


def no_loss(out: Tensor, y: Any) -> Tensor:
    """What stands in the place of a loss where there is none."""
    raise AssertionError("the Jacobian, and products with it, have no loss")


def is_sum(loss: Loss) -> bool:
    """Whether a loss is known to be a sum over samples, which is zero where there are none; no loss is one of no terms."""
    return loss.fn is no_loss or (loss.name is not None and dict(loss.options)["reduction"] == "sum")


def values_visible(*tensors: Any) -> bool:
    """Whether Python may look at the values of these tensors: none is traced, and none is batched by ``vmap``."""
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return False
    found = [t for tree in tensors for t in leaves(tree)]
    return all(_has_value(t) for t in found if isinstance(t, Tensor))


def check(loss: Loss, out: Tensor, y: Any) -> Loss:
    """Validate output and targets against the loss.

    Shapes and dtypes are always checked. Class indices are checked on the CPU and outside of tracing only, since
    reading them would make a GPU wait (where torch's own kernels assert on them).

    Args:
        loss: The loss.
        out: Output of the model, [N, ...].
        y: Targets.

    Returns:
        The loss, for these targets alone: with what was seen of them.

    Raises:
        TypeError: If the output, or the target of a named loss, is not a tensor.
        ValueError: If shapes, dtypes or class indices do not fit, or the reduction leaves no scalar.
    """
    _check_reduction(loss)
    what = label(loss)
    if not isinstance(out, Tensor):
        raise TypeError(f"{what} needs one output tensor and got {type(out).__name__}. Select it with output_fn.")
    if not out.is_floating_point() or out.ndim == 0 or (out.shape[0] == 0 and not is_sum(loss)):
        raise ValueError(
            f"{what}: the output has shape {tuple(out.shape)} and dtype {out.dtype}; it must be floating point with "
            "a leading axis of at least one sample. Select such an output with output_fn."
        )
    if loss.name is None:
        return loss
    if out.numel() == 0 and not is_sum(loss):
        raise ValueError(
            f"{what}: the output has shape {tuple(out.shape)}, and so no entries, which have no mean. Use reduction='sum', "
            "which is zero then."
        )
    if not isinstance(y, Tensor):
        raise TypeError(f"{what} needs a tensor of targets and got {type(y).__name__}. Pass y as a tensor.")
    kept = CLOSED_FORMS[loss.name].check(loss, out, y)
    return Loss(loss.name, loss.fn, loss.options, loss.tensors, kept, {})


def check_entries(loss: Loss, out: Tensor, y: Tensor) -> bool:
    """A target for each entry of the output, and weights that fit these."""
    what = label(loss)
    if y.shape != out.shape or not y.is_floating_point():
        raise ValueError(
            f"{what}: the output has shape {tuple(out.shape)} and the target {tuple(y.shape)} of {y.dtype}; the target "
            "needs floating point of the same shape (broadcasting would mix samples). Reshape or convert the target."
        )
    for key, weight in loss.tensors.items():
        fits = weight.shape == out.shape if loss.name == "mse_loss" else _broadcasts(weight, out)
        if not fits:
            raise ValueError(
                f"{what}: {key} of shape {tuple(weight.shape)} does not fit the output's shape {tuple(out.shape)}. "
                f"Pass {key} with the output's shape."
            )
    return True


def check_classes(loss: Loss, out: Tensor, y: Tensor) -> bool:
    """Targets of cross-entropy: indices [N, *d] in [0, C) or ``ignore_index``, or probabilities [N, C, *d]."""
    what = label(loss)
    if out.ndim < 2:
        raise ValueError(
            f"{what}: {_shapes(out, y)}; the output needs a class axis after the batch axis. Add it to the output."
        )
    num_classes, indices = out.shape[1], (out.shape[0], *out.shape[2:])
    weight = loss.tensors.get("weight")
    if weight is not None and weight.shape != (num_classes,):
        raise ValueError(f"{what}: weight of shape {tuple(weight.shape)} for C = {num_classes} classes. Pass shape (C,).")
    if y.shape == out.shape and y.is_floating_point():
        if dict(loss.options)["ignore_index"] >= 0:
            raise ValueError(f"{what}: class probabilities have no ignore_index. Leave it out, or pass class indices.")
        return True
    if y.shape == out.shape[:-1] and y.shape != indices and not y.is_floating_point():
        swap = "output.transpose(1, 2)" if out.ndim == 3 else "output.movedim(-1, 1)"
        raise ValueError(
            f"{what}: {_shapes(out, y)}; it looks as if the classes were on the last axis, and they have to be on axis 1. Pass "
            f"{swap}: in output_fn, at the end of model_fn, or in a loss_fn of your own."
        )
    if y.shape != indices or y.dtype not in (torch.int64, torch.uint8):
        raise ValueError(
            f"{what}: {_shapes(out, y)}; the target must hold class indices of shape {tuple(indices)} and dtype int64 "
            "(y.long()), or class probabilities of the output's shape in floating point."
        )
    if y.device.type != "cpu" or not values_visible(y) or y.numel() == 0:
        return False
    if y.numel() <= FEW:
        values = y.flatten().tolist()
        low, high = min(values), max(values)
    else:
        low, high = (t.item() for t in y.aminmax())
    ignored = dict(loss.options)["ignore_index"]
    if low >= 0 and high < num_classes:
        return not low <= ignored <= high
    wrong = y[((y < 0) | (y >= num_classes)) & (y != dict(loss.options)["ignore_index"])]
    if wrong.numel():
        raise ValueError(
            f"{what}: target {wrong[0].item()} is out of range for C = {num_classes} classes (output of shape "
            f"{tuple(out.shape)}). Classes are 0 to {num_classes - 1}; mark positions to leave out with ignore_index."
        )
    return False


def label(loss: Loss) -> str:
    """The loss as error messages call it."""
    fn = loss.fn.func if isinstance(loss.fn, functools.partial) else loss.fn
    return str(getattr(fn, "__name__", type(fn).__name__))


def _check_reduction(loss: Loss) -> None:
    if ("reduction", "mean") in loss.options:
        return
    reduction = dict(loss.options).get("reduction", "mean")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{label(loss)} with reduction={reduction!r} gives no scalar. Use reduction='mean' or 'sum'.")


def _shapes(out: Tensor, y: Tensor) -> str:
    return f"the output has shape {tuple(out.shape)} and the target {tuple(y.shape)} of {y.dtype}"


def _has_value(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if not functorch.is_gradtrackingtensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
    # subclasses (fake tensors first of all) may hold no values
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"


def _broadcasts(weight: Tensor, out: Tensor) -> bool:
    """Whether ``weight`` can be expanded to the shape of ``out``."""
    return weight.ndim <= out.ndim and all(
        w in (1, o) for w, o in zip(reversed(weight.shape), reversed(out.shape), strict=False)
    )


def tolerance(dtype: torch.dtype) -> float:
    """Relative size of what counts as rounding: between eps and sqrt(eps)."""
    return float(torch.finfo(dtype).eps ** 0.75)


def flat(tensor: Tensor) -> Tensor:
    """[N, *out] -> [N, D], also for [N]."""
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
