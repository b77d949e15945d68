"""Curvature of losses with respect to the model's output: gradients and square roots of the Hessian.

The loss is L(f, y) = R sum_n l(f_n, y_n), with R = 1 for a sum. Three losses have closed forms: cross-entropy, squared
error and binary cross-entropy with logits, with all their options. They share one shape: with a target weight T >= 0,

    cross-entropy    L = - sum_nd sum_c T_ncd log p_ncd,            gradient m p - T,     Hessian m (diag p - p p^T)
    BCE with logits  L = - sum T1 log s + T0 log(1 - s),            gradient m s - T1,    Hessian m s (1 - s)
    squared error    L = sum (m / 2) (f - y)^2,                     gradient m (f - y),   Hessian m

where m, the *mass* of a position, is the total weight of its target. Class weights, ``ignore_index``, label smoothing,
soft labels, ``pos_weight`` and the factor R of the reduction all end up in T and m, and nowhere else.
Any other loss is *custom*: its per-sample Hessian comes from autodiff and its root from an eigendecomposition.

Axes: ``n`` samples (N), ``c`` classes (C), ``d`` further axes of the output, ``v`` columns of the root (V); Monte-Carlo
roots have M columns. An exact root has V = numel(out[n]) columns, and with a closed form column v belongs to entry v of
the flattened output of a sample (for cross-entropy, v = (c, d) with d fastest). Everything is computed in float32 at
least and returned in the output's dtype.
"""

import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Constants = tuple[tuple[str, Any], ...]

DEFAULTS: dict[str, dict[str, Any]] = {
    "cross_entropy": {"reduction": "mean", "ignore_index": -100, "label_smoothing": 0.0},
    "mse_loss": {"reduction": "mean"},
    "bce_with_logits": {"reduction": "mean"},
}
COLUMNS_BYTES = 1 << 24  # columns that are made together where only their products are kept
TENSORS: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("weight",),
    "mse_loss": ("weight",),
    "bce_with_logits": ("weight", "pos_weight"),
}


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss in normal form: what it is called, and its options as constants and as tensors.

    Attributes:
        name: ``"cross_entropy"``, ``"mse_loss"``, ``"bce_with_logits"``, or None for a custom loss.
        fn: The callable, ``fn(out, y, **options, **tensors)``.
        options: Pairs (key, value) of the options that are no tensors: all of a named loss, for a custom
            one those of a partial.
        tensors: The options that are tensors, without those that are None.
    """

    name: str | None
    fn: Callable[..., Tensor]
    options: Constants = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)

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
            raise ValueError(f"{_label(self)} returned {got}, not a scalar tensor. Sum or average it over the samples.")
        return value


@dataclass(frozen=True)
class Root:
    """A root S of the loss Hessian with respect to the output: for each n, sum_v S[v, n] S[v, n]^T = R Hessian of l_n.

    Attributes:
        num: The number V of columns.
        columns: ``columns(start, stop)`` computes the columns ``start <= v < stop``, [stop - start, N, *out], at
            the cost and in the memory of these columns only.
    """

    num: int
    columns: Callable[[int, int], Tensor]


def normalize(loss_fn: Callable[..., Tensor]) -> Loss:
    """Recognize the losses that have a closed form.

    These are ``F.cross_entropy``, ``F.mse_loss`` and ``F.binary_cross_entropy_with_logits``, a ``functools.partial`` of
    them with keyword arguments only, and ``nn.CrossEntropyLoss``, ``nn.MSELoss`` and ``nn.BCEWithLogitsLoss``.
    Everything else is custom, among it subclasses of these modules and the deprecated ``size_average`` and ``reduce``.

    Args:
        loss_fn: A callable ``(out, y) -> scalar`` that sums or averages over samples.

    Returns:
        The loss in normal form. Can be traced by ``torch.compile``.
    """
    if isinstance(loss_fn, Loss):
        return loss_fn
    fn: Any = loss_fn
    keywords: dict[str, Any] = {}
    while isinstance(fn, functools.partial) and not fn.args:
        fn, keywords = fn.func, {**fn.keywords, **keywords}
    if type(loss_fn) is nn.CrossEntropyLoss:
        fn, keywords = F.cross_entropy, {
            "weight": loss_fn.weight,
            "reduction": loss_fn.reduction,
            "ignore_index": loss_fn.ignore_index,
            "label_smoothing": loss_fn.label_smoothing,
        }  # fmt: skip
    elif type(loss_fn) is nn.MSELoss:
        fn, keywords = F.mse_loss, {"reduction": loss_fn.reduction}
    elif type(loss_fn) is nn.BCEWithLogitsLoss:
        fn, keywords = F.binary_cross_entropy_with_logits, {
            "weight": loss_fn.weight,
            "pos_weight": loss_fn.pos_weight,
            "reduction": loss_fn.reduction,
        }  # fmt: skip
    name = _name(fn)
    given = {key: value for key, value in keywords.items() if value is not None or name is None}
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    options = {key: value for key, value in given.items() if not isinstance(value, Tensor)}
    if name is None:
        plain = isinstance(fn, types.FunctionType)
        return Loss(None, fn, tuple(options.items()), tensors) if plain else Loss(None, loss_fn)
    if any(key not in TENSORS[name] for key in tensors) or any(key not in DEFAULTS[name] for key in options):
        return Loss(None, loss_fn)
    return Loss(name, fn, tuple({**DEFAULTS[name], **options}.items()), tensors)


def rebuild(name: str | None, fn: Callable[..., Tensor], options: Constants, tensors: dict[str, Tensor]) -> Loss:
    """The loss from its parts, the inverse of reading off its attributes.

    Across a compile boundary the first three travel as constants and the last as tensors.
    """
    return Loss(name, fn, options, tensors)


def check_traceable(loss: Loss) -> None:
    """Refuse what ``torch.compile`` cannot take for a constant: a custom loss that is a module or another object."""
    if isinstance(loss.fn, types.FunctionType | types.BuiltinFunctionType):
        return
    raise TypeError(
        f"the loss {_label(loss)} cannot enter torch.compile: a loss of one's own must be a function there. Outside of "
        "the compiled code define one that calls it, and pass tensors it needs by functools.partial(function, name=tensor)."
    )


def values_visible(*tensors: Any) -> bool:
    """Whether Python may look at the values of these tensors: none is traced, and none is batched by ``vmap``."""
    return not torch.compiler.is_compiling() and all(_has_value(t) for t in tensors if isinstance(t, Tensor))


def gradient(loss: Loss, out: Tensor, y: Any, *, create_graph: bool = False) -> Tensor:
    """Gradient of the loss with respect to the output.

    Closed forms need no backward pass: they work under every transformation, and cost less than ``torch.func.grad``.

    Args:
        loss: The loss; ``check`` has passed.
        out: Output of the model, [N, ...], attached to a graph or not.
        y: Targets.
        create_graph: Whether the result can be differentiated with respect to ``out``.

    Returns:
        dL / d out, with the factor R of the reduction, [N, ...].

    Raises:
        ValueError: If a custom loss does not separate over samples (see ``check_separable``).
    """
    out = out if create_graph else out.detach()
    if loss.name is None:
        custom = _autodiff_gradient(loss, out, y)
        check_separable(loss, out, y, custom)
        return custom
    work = _at_least_float32(out)
    if loss.name == "cross_entropy":
        return _cross_entropy_gradient(loss, work, y).to(out.dtype)
    if loss.name == "mse_loss":
        residual: Tensor = work - y.to(work.dtype)
        return (_squared_error_mass(loss, work) * residual).to(out.dtype)
    positive, mass = _binary_weights(loss, work, y)
    return (mass * work.sigmoid() - positive).to(out.dtype)


def exact_root(loss: Loss, out: Tensor, y: Any, *, fewest: bool = False) -> Root:
    """Root of the loss Hessian of each sample.

    With m the mass of a position (see the module), column v = (c, d) is zero but at position d, where it is

        cross-entropy    sqrt(m p_c) (e_c - p)
        BCE with logits  sqrt(m s (1 - s))
        squared error    sqrt(m)
        custom           sqrt(lambda_v) u_v, eigenpairs of the symmetrized Hessian (all positions together)

    The columns can be differentiated with respect to ``out``. For a custom loss this holds for what depends on S S^T
    only, and where the rank of the Hessian stays the same: eigenvectors have no derivative where eigenvalues coincide.

    Args:
        loss: The loss; ``check`` has passed.
        out: Output of the model, [N, *out].
        y: Targets.
        fewest: Whether other columns may take their place if they are fewer. For cross-entropy these are C - 1 at each
            position: a Householder reflection H that maps sqrt(p) to the first axis, applied to the columns, makes the
            first one zero. With u = sqrt(p) the others are, for c = 1 ... C - 1,

                sqrt(m) u_c (e_c - a),   a_0 = u_0,   a_i = p_i / (1 + u_0) for i > 0.

    Returns:
        Root with V = numel(out[n]) columns, or less.

    Raises:
        ValueError: If the loss is not convex in its output (a negative weight, an indefinite Hessian), or if a custom
            loss does not separate over samples. Not raised where values cannot be seen (``values_visible``).

    References:
        Dangel, Kunstner, Hennig, BackPACK: Packing more into backprop, ICLR 2020, arXiv:1912.10985. The order of
        columns is that of BackPACK.
    """
    work = _at_least_float32(out)
    if loss.name == "cross_entropy":
        return _softmax_root(work, _class_mass(loss, work, y), out.dtype, fewest and work.shape[1] > 1)
    if loss.name == "mse_loss":
        mass = _squared_error_mass(loss, work)
        _check_mass(loss, mass)
        return _diagonal_root(mass.sqrt().expand(out.shape), out.dtype)
    if loss.name == "bce_with_logits":
        _, mass = _binary_weights(loss, work, y)
        _check_mass(loss, mass)
        # sqrt(s (1 - s)) in log space: neither factor underflows first, and the derivative stays finite
        deviation = ((F.logsigmoid(work) + F.logsigmoid(-work)) / 2).exp()
        return _diagonal_root(mass.sqrt() * deviation, out.dtype)
    factor = _autodiff_factor(loss, work, y)
    shape = out.shape

    def columns(start: int, stop: int) -> Tensor:
        return factor[:, :, start:stop].permute(2, 0, 1).reshape(stop - start, *shape).to(out.dtype)

    return Root(factor.shape[-1], columns)


def summed_hessian(loss: Loss, out: Tensor, y: Any, select: Callable[[Tensor], Tensor]) -> Tensor:
    """The Hessians of all samples added up, R sum_n Hessian of l_n [D, D]; of those samples that ``select`` leaves.

    Args:
        loss: The loss; ``check`` has passed.
        out: Output of the model, [N, *out].
        y: Targets.
        select: Takes [v, N, ...] to the samples of a subset.

    Raises:
        ValueError: As ``exact_root``.
    """
    if loss.name == "cross_entropy" and out.ndim == 2:
        work = _at_least_float32(out)
        probs = work.softmax(1)
        weighted, probs = select(torch.stack([_class_mass(loss, work, y) * probs, probs]))
        return (weighted.sum(0).diag() - weighted.mT @ probs).to(out.dtype)
    root = exact_root(loss, out, y, fewest=True)
    size = max(1, COLUMNS_BYTES // max(1, out.numel() * out.element_size()))
    parts = []
    for start in range(0, root.num, size):
        columns = select(root.columns(start, min(start + size, root.num))).reshape(-1, math.prod(out.shape[1:]))
        parts.append(columns.mT @ columns)
    return sum(parts[1:], parts[0])


def signed_root(loss: Loss, out: Tensor, y: Any) -> tuple[Root, Tensor | None]:
    """As ``exact_root``, for losses that need not be convex: columns with weights of any sign.

    For a custom loss they are the eigenvectors and eigenvalues of each sample's Hessian H. Where these have to be
    differentiated, which coinciding eigenvalues prevent, they are the 2D columns (a e_c + H e_c / a) / 2 and
    (a e_c - H e_c / a) / 2 with weights 1 and -1, for any a: their squares differ by the product of e_c and H e_c.

    Args:
        loss: The loss; ``check`` has passed.
        out: Output of the model, [N, *out].
        y: Targets.

    Returns:
        The columns and their weights w [V, N]; None stands for ones. For each n, sum_v w[v, n] S[v, n] S[v, n]^T is
        the Hessian, with R in it.

    Raises:
        ValueError: If a custom loss does not separate over samples.
    """
    if loss.name is not None:
        try:
            return exact_root(loss, out, y, fewest=True), None
        except ValueError:  # negative weights
            loss = Loss(None, functools.partial(loss.fn, **dict(loss.options), **loss.tensors))
    work = _at_least_float32(out)
    check_separable(loss, work, y)
    hessian = _autodiff_hessian(loss, work, y)
    if out.requires_grad:
        largest = hessian.detach().abs().amax()
        scale = torch.where(largest > 0, largest, 1.0).sqrt()
        unit = scale * torch.eye(hessian.shape[-1], dtype=work.dtype, device=work.device)
        vectors = torch.cat([unit + hessian / scale, unit - hessian / scale], dim=-1) / 2
        weights = torch.ones_like(vectors[:, 0])
        weights = torch.cat([weights[:, : unit.shape[0]], -weights[:, unit.shape[0] :]], dim=1)
    else:
        weights, vectors = torch.linalg.eigh(hessian)
    shape = out.shape

    def columns(start: int, stop: int) -> Tensor:
        return vectors[:, :, start:stop].permute(2, 0, 1).reshape(stop - start, *shape).to(out.dtype)

    return Root(vectors.shape[-1], columns), weights.mT.to(out.dtype)


def sampled_root(loss: Loss, out: Tensor, y: Any, mc_samples: int, generator: torch.Generator | None = None) -> Root:
    """Monte-Carlo root of the loss Hessian: gradients at labels drawn from the likelihood that the loss implies.

    With mass m of a position (see the module) and M = ``mc_samples``, the columns are

        cross-entropy    sqrt(m / M) (p - e_c),   c ~ Categorical(p), for each position
        BCE with logits  sqrt(m / M) (s - b),     b ~ Bernoulli(s)
        squared error    sqrt(m / M) eps,         eps ~ N(0, 1)
        custom           S eps / sqrt(M),         eps ~ N(0, I), S the exact root

    so that E[sum_v S[v, n] S[v, n]^T] is the Hessian, for every option of the loss. All labels are drawn here, at once:
    the result does not depend on how the columns are asked for.

    Args:
        loss: The loss; ``check`` has passed.
        out: Output of the model, [N, *out].
        y: Targets (only their weights and ignored positions matter).
        mc_samples: The number M of draws.
        generator: Source of randomness on the device of ``out``; None is torch's default generator.

    Returns:
        Root with V = M columns.

    Raises:
        ValueError: If ``mc_samples`` is not positive, or as in ``exact_root``.

    References:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML 2015,
        arXiv:1503.05671, Section 2.2.
    """
    if mc_samples < 1:
        raise ValueError(f"mc_samples is {mc_samples}; a Monte-Carlo root needs at least 1 (an exact root needs none).")
    work = _at_least_float32(out)
    shape, dtype = out.shape, out.dtype
    if loss.name == "cross_entropy":
        scale = (_class_mass(loss, work, y) / mc_samples).sqrt()
        probs = work.softmax(1)
        drawn = draw_categories(work, mc_samples, generator)
        classes = _along_classes(torch.arange(work.shape[1], device=work.device), work)

        def columns(start: int, stop: int) -> Tensor:
            return (scale * (probs - (drawn[start:stop].unsqueeze(2) == classes).to(probs.dtype))).to(dtype)

    elif loss.name == "bce_with_logits":
        _, mass = _binary_weights(loss, work, y)
        _check_mass(loss, mass)
        scale, probs = (mass / mc_samples).sqrt(), work.sigmoid()
        drawn = draw_bits(work, mc_samples, generator)

        def columns(start: int, stop: int) -> Tensor:
            return (scale * (probs - drawn[start:stop].to(probs.dtype))).to(dtype)

    elif loss.name == "mse_loss":
        mass = _squared_error_mass(loss, work)
        _check_mass(loss, mass)
        scale = (mass / mc_samples).sqrt()
        drawn = draw_normal(work, mc_samples, generator)

        def columns(start: int, stop: int) -> Tensor:
            return (scale * drawn[start:stop]).to(dtype)

    else:
        factor = _autodiff_factor(loss, work, y) / math.sqrt(mc_samples)
        drawn = draw_normal(_flat(work), mc_samples, generator)

        def columns(start: int, stop: int) -> Tensor:
            return torch.einsum("ncd,vnd->vnc", factor, drawn[start:stop]).reshape(stop - start, *shape).to(dtype)

    return Root(mc_samples, columns)


def draw_categories(logits: Tensor, mc_samples: int, generator: torch.Generator | None) -> Tensor:
    """Draw classes from softmax(logits) for logits [N, C, *d]: [M, N, *d], an exponential race (argmin_c E_c / p_c).

    Out of place, so it runs under ``vmap(randomness="different")`` and compiled. E = -log u with 0 < u < 1 is positive
    and finite, so no class can win because of its noise alone: u = 0, which ``torch.rand`` may draw, is moved up.
    """
    u = torch.rand((mc_samples, *logits.shape), generator=generator, device=logits.device, dtype=logits.dtype)
    exponential = -u.clamp(min=torch.finfo(u.dtype).tiny).log()
    return (logits.log_softmax(1) - exponential.log()).argmax(2)


def draw_bits(logits: Tensor, mc_samples: int, generator: torch.Generator | None) -> Tensor:
    """Draw from Bernoulli(sigmoid(logits)) for logits of any shape: boolean [M, *shape]."""
    u = torch.rand((mc_samples, *logits.shape), generator=generator, device=logits.device, dtype=logits.dtype)
    return u < logits.sigmoid()


def draw_normal(like: Tensor, mc_samples: int, generator: torch.Generator | None) -> Tensor:
    """Draw standard normal noise [M, *shape] of the shape, device and dtype of ``like``."""
    return torch.randn((mc_samples, *like.shape), generator=generator, device=like.device, dtype=like.dtype)


def check(loss: Loss, out: Tensor, y: Any) -> None:
    """Validate output and targets against the loss.

    Shapes and dtypes are always checked. Class indices are checked on the CPU and outside of tracing only, since
    reading them would make a GPU wait (where torch's own kernels assert on them).

    Args:
        loss: The loss.
        out: Output of the model, [N, ...].
        y: Targets.

    Raises:
        TypeError: If the output, or the target of a named loss, is not a tensor.
        ValueError: If shapes, dtypes or class indices do not fit, or the reduction leaves no scalar.
    """
    _check_reduction(loss)
    what = _label(loss)
    if not isinstance(out, Tensor):
        raise TypeError(f"{what} needs one output tensor and got {type(out).__name__}. Select it with output_fn.")
    if not out.is_floating_point() or out.ndim == 0 or out.shape[0] == 0:
        raise ValueError(
            f"{what}: the output has shape {tuple(out.shape)} and dtype {out.dtype}; it must be floating point with "
            "a leading axis of at least one sample. Select such an output with output_fn."
        )
    if loss.name is None:
        return
    if not isinstance(y, Tensor):
        raise TypeError(f"{what} needs a tensor of targets and got {type(y).__name__}. Pass y as a tensor.")
    if loss.name == "cross_entropy":
        _check_classes(loss, out, y)
        return
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


def check_separable(loss: Loss, out: Tensor, y: Any, reference: Tensor | None = None) -> None:
    """Check that the gradient of one sample does not depend on the output of another, as in R sum_n l(f_n, y_n).

    In a fixed pseudo-random half of the batch, the outputs are replaced by those of other samples, each entry shrunk a
    little (so outputs that are probabilities, logarithms of them or scales stay in their domain); the gradients of the
    other half must not move. This costs one more gradient of the loss and also finds losses that are linear by pieces.
    It cannot find samples that only interact inside one half, an interaction that is the same at these two points (in a
    loss that is linear by pieces, likely for few entries only), or any where all outputs are zero. (There,
    ``exact_root`` still finds smooth ones: it does the same to a Hessian-vector product.)
    Named losses pass by definition. Nothing is checked where values cannot be seen (``values_visible``).

    Args:
        loss: The loss.
        out: Output of the model, [N, ...].
        y: Targets.
        reference: The gradient at ``out``, if it is known.

    Raises:
        ValueError: If samples interact.
    """
    if loss.name is not None or out.shape[0] < 2 or not values_visible(out, y):
        return
    out = out.detach()
    reference = _autodiff_gradient(loss, out, y) if reference is None else reference.detach()
    noise, changed = _split(out)
    moved = _autodiff_gradient(loss, torch.where(changed, out.roll(1, 0) * (1 + 7 * noise) / 8, out), y)
    _check_unmoved(loss, reference, moved, changed)


# --- closed forms: the weights of the targets -------------------------------------------------------------------------


def _labels(loss: Loss, work: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of class indices y [N, *d]: a valid index, R (0 if ignored), and R times the weight of the label; [N, 1, *d]."""
    options, weight = dict(loss.options), loss.tensors.get("weight")
    ignored = y == options["ignore_index"]
    if weight is None and y.device.type == "cpu" and values_visible(y) and not ignored.any():  # fewer steps to the same
        index = y.unsqueeze(1).long()
        mass = work.new_full((), 1 / y.numel() if options["reduction"] == "mean" else 1.0).expand(index.shape)
        return index, mass, mass
    kept = ~ignored.unsqueeze(1)
    index = torch.where(kept, y.unsqueeze(1).long(), 0)
    scale = kept.to(work.dtype)
    if weight is None:
        if options["reduction"] == "mean":
            # where all positions are ignored, torch's loss is nan, but its gradient is zero
            scale = scale / scale.sum().clamp(min=1)
        return index, scale, scale
    label_weight = weight.to(work.dtype)[index]
    if options["reduction"] == "mean":  # torch divides by the weights of the labels, also when it smooths them
        total = (scale * label_weight).sum()
        scale = torch.where(total == 0, 0.0, scale / total)
    return index, scale, scale * label_weight


def _class_weights(loss: Loss, work: Tensor, y: Tensor) -> Tensor:
    """T [N, C, *d] of L = - sum T log softmax(out), for smoothed labels and for class probabilities."""
    options, num_classes, weight = dict(loss.options), work.shape[1], loss.tensors.get("weight")
    smoothing: float = options["label_smoothing"]
    per_class = work.new_ones(()) if weight is None else _along_classes(weight.to(work.dtype), work)
    if y.is_floating_point():
        scale = num_classes / work.numel() if options["reduction"] == "mean" else 1.0
        return (y.to(work.dtype) * (1 - smoothing) + smoothing / num_classes) * (per_class * scale)
    index, kept, mass = _labels(loss, work, y)
    hard = torch.zeros_like(work).scatter(1, index, mass)
    return hard * (1 - smoothing) + kept * per_class * (smoothing / num_classes)


def _has_hard_labels(loss: Loss, y: Tensor) -> bool:
    return not y.is_floating_point() and dict(loss.options)["label_smoothing"] == 0


def _class_mass(loss: Loss, work: Tensor, y: Tensor) -> Tensor:
    """Mass [N, 1, *d] of each position: the total weight of its target."""
    if _has_hard_labels(loss, y):
        _, _, mass = _labels(loss, work, y)
    else:
        mass = _class_weights(loss, work.detach(), y).sum(1, keepdim=True)
    _check_mass(loss, mass, y.is_floating_point())
    return mass


def _cross_entropy_gradient(loss: Loss, work: Tensor, y: Tensor) -> Tensor:
    """Gradient m p - T, [N, C, *d]."""
    probs = work.softmax(1)
    if _has_hard_labels(loss, y):  # T has one entry per position: no need to build it
        index, _, mass = _labels(loss, work, y)
        return (mass * probs).scatter_add(1, index, -mass)
    target = _class_weights(loss, work, y)
    return target.sum(1, keepdim=True) * probs - target


def _squared_error_mass(loss: Loss, work: Tensor) -> Tensor:
    """Twice the weight of each squared error, of the output's shape or a scalar."""
    weight = loss.tensors.get("weight")
    mean = dict(loss.options)["reduction"] == "mean"
    if weight is None:
        return torch.full((), 2.0 / work.numel() if mean else 2.0, dtype=work.dtype, device=work.device)
    weight = weight.to(work.dtype)
    return 2 * weight / weight.sum() if mean else 2 * weight


def _binary_weights(loss: Loss, work: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weight T1 of the label 1 and mass T1 + T0, of the output's shape, with R in them."""
    y = y.to(work.dtype)
    weight, pos_weight = loss.tensors.get("weight"), loss.tensors.get("pos_weight")
    positive = y if pos_weight is None else y * pos_weight.to(work.dtype)
    mass = torch.ones_like(y) if pos_weight is None else positive + (1 - y)
    scale = 1.0 / work.numel() if dict(loss.options)["reduction"] == "mean" else 1.0
    if weight is None:
        return positive * scale, mass * scale
    return positive * weight.to(work.dtype) * scale, mass * weight.to(work.dtype) * scale


# --- closed forms: the columns ----------------------------------------------------------------------------------------


def _softmax_root(work: Tensor, mass: Tensor, dtype: torch.dtype, fewest: bool = False) -> Root:
    """Columns sqrt(m p_c) (e_c - p) at position d, for v = (c, d); or the fewest. work [N, C, *d], mass [N, 1, *d]."""
    num, num_classes, positions = work.shape[0], work.shape[1], math.prod(work.shape[2:])
    shape, device = work.shape, work.device
    log_probs = work.log_softmax(1).reshape(num, num_classes, positions)
    probs = log_probs.exp()
    # sqrt(p) in log space: it survives where p underflows, and its derivative stays finite
    roots = (log_probs / 2).exp()
    scale = (mass.reshape(num, 1, positions).sqrt() * roots).flatten(1)
    skipped = positions if fewest else 0
    if fewest:
        probs = torch.cat([roots[:, :1], probs[:, 1:] / (1 + roots[:, :1])], dim=1)

    def columns(start: int, stop: int) -> Tensor:
        start, stop = start + skipped, stop + skipped
        entry = torch.arange(start, stop, device=device)
        position = entry if positions == 1 else entry % positions
        own = _one_hot(entry if positions == 1 else entry // positions, num_classes, probs.dtype).unsqueeze(1)  # [v, 1, C]
        at = probs.squeeze(2) if positions == 1 else probs[:, :, position].permute(2, 0, 1)
        column = scale[:, start:stop].T.unsqueeze(2) * (own - at)  # [v, N, C]
        if positions > 1:
            column = column.unsqueeze(3) * _one_hot(position, positions, probs.dtype)[:, None, None]
        return column.reshape(stop - start, *shape).to(dtype)

    return Root(num_classes * positions - skipped, columns)


def _diagonal_root(scale: Tensor, dtype: torch.dtype) -> Root:
    """Columns scale_v e_v. scale [N, *out]."""
    shape, flat = scale.shape, _flat(scale)

    def columns(start: int, stop: int) -> Tensor:
        own = _one_hot(torch.arange(start, stop, device=flat.device), flat.shape[1], flat.dtype)
        return (own.unsqueeze(1) * flat).reshape(stop - start, *shape).to(dtype)

    return Root(flat.shape[1], columns)


# --- custom losses: autodiff ------------------------------------------------------------------------------------------


def _autodiff_gradient(loss: Loss, out: Tensor, y: Any) -> Tensor:
    if out.requires_grad or torch._C._functorch.peek_interpreter_stack() is not None:
        return cast(Tensor, torch.func.grad(lambda f: loss(f, y))(out))
    # the same, without the overhead of a transformation
    with torch.enable_grad():
        leaf = out.detach().requires_grad_()
        value = loss(leaf, y)
        if not value.requires_grad:
            return torch.zeros_like(out)
        return torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)[0]


def _autodiff_hessian(loss: Loss, work: Tensor, y: Any) -> Tensor:
    """Hessian [N, D, D] of each sample: D Hessian-vector products, each with e_c in all samples at once."""
    size = math.prod(work.shape[1:])
    pullback: Callable[[Tensor], tuple[Tensor]]
    _, pullback = torch.func.vjp(lambda f: _autodiff_gradient(loss, f, y), work)  # type: ignore[misc]
    if work.shape[0] > 1 and values_visible(work, y):
        noise, changed = _split(work)
        product = pullback(noise)[0].detach()
        moved = pullback(torch.where(changed, 0.0, noise))[0].detach()
        _check_unmoved(loss, product, moved, changed)
    basis = torch.eye(size, dtype=work.dtype, device=work.device).reshape(size, 1, *work.shape[1:])
    rows = torch.vmap(lambda row: pullback(row.expand(work.shape))[0])(basis)
    hessian = rows.reshape(size, *_flat(work).shape).permute(1, 0, 2)
    symmetric: Tensor = (hessian + hessian.mT) / 2
    return symmetric


def _autodiff_factor(loss: Loss, work: Tensor, y: Any) -> Tensor:
    """S [N, D, D] with S S^T = Hessian of each sample; column v is sqrt(lambda_v) u_v.

    So that derivatives exist although eigenvalues coincide, the eigenvectors U and eigenvalues lambda are constants,
    and with G = U / sqrt(lambda) on the range of H,

        S = H G (G^T H G)^(-T/2)      (Cholesky root)

    has this value, as G^T H G is then the identity, while S S^T = H G (G^T H G)^-1 G^T H = H holds for H nearby too.
    """
    y = _cast(y, work.dtype)
    check_separable(loss, work, y)
    # float64: LAPACK may not converge in float32 on Hessians of saturated losses, whose entries have all sizes
    hessian = _autodiff_hessian(loss, work, y).double()
    finite = hessian.detach().isfinite().all(2).all(1)
    if values_visible(finite) and (~finite & _flat(work.detach()).isfinite().all(1)).any():
        raise ValueError(f"{_label(loss)}: its Hessian has infinite or NaN entries. Check the outputs and targets.")
    finite = finite[:, None, None]
    hessian = torch.where(finite, hessian, 0.0)  # a sample whose output is not finite gets NaN, the others their root
    constant = hessian.detach()
    eigenvalues, vectors = torch.linalg.eigh(constant)
    threshold = _tolerance(work.dtype) * eigenvalues.abs().amax()
    if values_visible(eigenvalues) and eigenvalues.min() < -threshold:
        _check_indefinite(loss, work.detach(), y)
    inside = eigenvalues > threshold
    scaled = vectors * torch.where(inside, eigenvalues, torch.inf).rsqrt().unsqueeze(-2)
    inner = scaled.mT @ hessian @ scaled + torch.diag_embed((~inside).double())
    lower = torch.linalg.cholesky(inner)
    factor: Tensor = torch.linalg.solve_triangular(lower, scaled.mT @ hessian, upper=False).mT
    # below the threshold: rounding noise and tiny eigenvalues, kept without a derivative
    rest: Tensor = vectors * torch.where(inside, 0.0, eigenvalues.clamp(min=0)).sqrt().unsqueeze(-2)
    return torch.where(finite, factor + rest, torch.nan).to(work.dtype)


def _check_indefinite(loss: Loss, work: Tensor, y: Any) -> None:
    """Refuse a negative eigenvalue, unless it is rounding: a saturated loss may have a Hessian of nothing else.

    So the Hessian is computed in float64, where a negative eigenvalue must stand out against terms as large as the
    gradient.
    """
    gradient_size = _autodiff_gradient(loss, work, y).nan_to_num(0.0, 0.0, 0.0).abs().max()
    try:
        hessian = _autodiff_hessian(loss, work.double(), _cast(y, torch.float64))
    except RuntimeError:  # the loss brings tensors of its own, which fit one dtype only
        hessian = _autodiff_hessian(loss, work, y)
    hessian = torch.where(hessian.isfinite().all(2).all(1)[:, None, None], hessian, 0.0)
    eigenvalues = torch.linalg.eigvalsh(hessian.double())
    smallest, eps = eigenvalues.min(), torch.finfo(hessian.dtype).eps
    if smallest < -1000 * eps * gradient_size - _tolerance(hessian.dtype) * eigenvalues.abs().max():
        raise ValueError(
            f"{_label(loss)}: its Hessian with respect to the output is indefinite (smallest eigenvalue "
            f"{smallest:.3g}). The GGN needs a loss that is convex in the output. Move the rest into the model."
        )


def _cast(y: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors among the targets in this dtype."""
    return pytree.tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, y)


# --- checks and small helpers -----------------------------------------------------------------------------------------


def _name(fn: Any) -> str | None:
    if fn is F.cross_entropy:
        return "cross_entropy"
    if fn is F.mse_loss:
        return "mse_loss"
    if fn is F.binary_cross_entropy_with_logits:
        return "bce_with_logits"
    return None


def _label(loss: Loss) -> str:
    """The loss as error messages call it."""
    fn = loss.fn.func if isinstance(loss.fn, functools.partial) else loss.fn
    return str(getattr(fn, "__name__", type(fn).__name__))


def _check_reduction(loss: Loss) -> None:
    reduction = dict(loss.options).get("reduction", "mean")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{_label(loss)} with reduction={reduction!r} gives no scalar. Use reduction='mean' or 'sum'.")


def _check_classes(loss: Loss, out: Tensor, y: Tensor) -> None:
    """Targets of cross-entropy: indices [N, *d] in [0, C) or ``ignore_index``, or probabilities [N, C, *d]."""
    what = _label(loss)
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
        return
    if y.shape != indices or y.dtype not in (torch.int64, torch.uint8):
        raise ValueError(
            f"{what}: {_shapes(out, y)}; the target must hold class indices of shape {tuple(indices)} and dtype int64 "
            "(y.long()), or class probabilities of the output's shape in floating point."
        )
    if y.device.type != "cpu" or not values_visible(y) or y.numel() == 0:
        return
    low, high = y.aminmax()
    if low.item() >= 0 and high.item() < num_classes:
        return
    wrong = y[((y < 0) | (y >= num_classes)) & (y != dict(loss.options)["ignore_index"])]
    if wrong.numel():
        raise ValueError(
            f"{what}: target {wrong[0].item()} is out of range for C = {num_classes} classes (output of shape "
            f"{tuple(out.shape)}). Classes are 0 to {num_classes - 1}; mark positions to leave out with ignore_index."
        )


def _shapes(out: Tensor, y: Tensor) -> str:
    return f"the output has shape {tuple(out.shape)} and the target {tuple(y.shape)} of {y.dtype}"


def _check_mass(loss: Loss, mass: Tensor, soft: bool = False) -> None:
    """Refuse negative masses, which only weights and soft targets can cause."""
    if not (loss.tensors or soft):
        return
    if mass.device.type == "cpu" and values_visible(mass) and (mass < 0).any():
        raise ValueError(
            f"{_label(loss)}: a target has negative total weight {mass.min():.3g}, so the loss is not convex in the "
            "output and its Hessian has no real root. Use non-negative weights and targets."
        )


def _check_unmoved(loss: Loss, before: Tensor, after: Tensor, changed: Tensor) -> None:
    difference = torch.where(changed, 0.0, after - before).abs().max()
    if not difference > _tolerance(before.dtype) * before.abs().max():
        return
    raise ValueError(
        f"{_label(loss)} does not separate over samples: the gradient of one sample depends on the output of another "
        "(or on chance). Per-sample and curvature quantities need a sum or mean of one term per sample. Move what "
        "mixes samples out of the loss."
    )


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


def _tolerance(dtype: torch.dtype) -> float:
    """Relative size of what counts as rounding: between eps and sqrt(eps)."""
    return float(torch.finfo(dtype).eps ** 0.75)


def _split(like: Tensor) -> tuple[Tensor, Tensor]:
    """Fixed pseudo-random numbers in [0, 1) of this shape, and half of the samples, [N, 1, ...]. Uses no generator."""
    noise = (torch.arange(1, like.numel() + 1, dtype=torch.float64).sin() * 43758.5453) % 1
    noise = noise.to(like).reshape(like.shape)
    per_sample = _flat(noise)[:, 0]
    return noise, (per_sample <= per_sample.median()).reshape(-1, *[1] * (like.ndim - 1))


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _flat(tensor: Tensor) -> Tensor:
    """[N, *out] -> [N, D], also for [N]."""
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))


def _along_classes(per_class: Tensor, out: Tensor) -> Tensor:
    """[C] -> [C, 1, ...], to broadcast against [N, C, *d]."""
    return per_class.reshape(-1, *[1] * (out.ndim - 2))


def _one_hot(index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """[v] -> [v, size]. A comparison: unlike F.one_hot it looks at no values."""
    return (index.unsqueeze(1) == torch.arange(size, device=index.device)).to(dtype)
