"""Closed forms of the losses that have a name: their gradients, and roots of their Hessians. See `curvfunc.losses`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from curvfunc.losses.normal_form import Loss, Root, flat, label, values_visible
from curvfunc.tensors.pages import may_overwrite

__all__ = [
    "along_classes",
    "binary_gradient",
    "binary_root",
    "binary_weights",
    "check_mass",
    "class_mass",
    "class_root",
    "cross_entropy_gradient",
    "cross_entropy_root",
    "diagonal_root",
    "squared_error_gradient",
    "squared_error_mass",
    "squared_error_root",
    "uniform_mass",
]


def _labels(loss: Loss, work: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of class indices y [N, *d]: a valid index, R (0 if ignored), and R times the weight of the label; [N, 1, *d]."""
    if (uniform := uniform_mass(loss, y)) is not None:
        index = y.unsqueeze(1).long()
        mass = work.new_full((), uniform).expand(index.shape)
        return index, mass, mass
    if loss.found is None:
        return _read_labels(loss, work, y)
    key = id(y), work.dtype
    if key not in loss.found:
        loss.found[key] = (*_read_labels(loss, work, y), y)  # held, so that its identity stays its own
    index, scale, mass, _ = loss.found[key]
    return index, scale, mass


def _read_labels(loss: Loss, work: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    options, weight = dict(loss.options), loss.tensors.get("weight")
    kept = (y != options["ignore_index"]).unsqueeze(1)
    index = torch.where(kept, y.unsqueeze(1).long(), 0)
    mean = options["reduction"] == "mean"
    if weight is None:
        # where all positions are ignored, torch's loss is nan, but its gradient is zero
        scale = kept / kept.sum(dtype=work.dtype).clamp(min=1) if mean else kept.to(work.dtype)
        return index, scale, scale
    scale, label_weight = kept.to(work.dtype), weight.to(work.dtype)[index]
    if mean:  # torch divides by the weights of the labels, also when it smooths them
        total = (scale * label_weight).sum()
        scale = torch.where(total == 0, 0.0, scale / total)
    return index, scale, scale * label_weight


def uniform_mass(loss: Loss, y: Tensor) -> float | None:
    """The mass of each position of class indices, where all are known to have the same."""
    if not loss.kept or loss.tensors or y.is_floating_point():
        return None
    return 1 / y.numel() if dict(loss.options)["reduction"] == "mean" else 1.0


def _class_weights(loss: Loss, work: Tensor, y: Tensor) -> Tensor:
    """T [N, C, *d] of L = - sum T log softmax(out), for smoothed labels and for class probabilities."""
    options, num_classes, weight = dict(loss.options), work.shape[1], loss.tensors.get("weight")
    smoothing: float = options["label_smoothing"]
    per_class = work.new_ones(()) if weight is None else along_classes(weight.to(work.dtype), work)
    if y.is_floating_point():
        scale = num_classes / work.numel() if options["reduction"] == "mean" else 1.0
        return (y.to(work.dtype) * (1 - smoothing) + smoothing / num_classes) * (per_class * scale)
    index, kept, mass = _labels(loss, work, y)
    hard = torch.zeros_like(work).scatter(1, index, mass)
    return hard * (1 - smoothing) + kept * per_class * (smoothing / num_classes)


def _has_hard_labels(loss: Loss, y: Tensor) -> bool:
    return not y.is_floating_point() and dict(loss.options)["label_smoothing"] == 0


def class_mass(loss: Loss, work: Tensor, y: Tensor) -> Tensor:
    """Mass [N, 1, *d] of each position: the total weight of its target."""
    if _has_hard_labels(loss, y):
        _, _, mass = _labels(loss, work, y)
    else:
        mass = _class_weights(loss, work.detach(), y).sum(1, keepdim=True)
    check_mass(loss, mass, y.is_floating_point())
    return mass


def class_root(loss: Loss, mass: Tensor, y: Tensor) -> Tensor:
    """The root of a mass; zero whatever the class weights where targets are ignored, so that its derivative is none of 0."""
    if may_overwrite() or y.is_floating_point() or "weight" not in loss.tensors:
        return mass.sqrt()
    kept = (y != dict(loss.options)["ignore_index"]).unsqueeze(1)
    return torch.where(kept, torch.where(kept, mass, 1.0).sqrt(), 0.0)


def cross_entropy_gradient(loss: Loss, work: Tensor, y: Tensor) -> Tensor:
    """Gradient m p - T, [N, C, *d]."""
    probs = work.softmax(1)
    if _has_hard_labels(loss, y):  # T has one entry per position: no need to build it
        if (mass_of_all := uniform_mass(loss, y)) is not None and may_overwrite():
            # rounded as autograd does it, where p is nearly 1
            return probs.mul_(mass_of_all).scatter_(1, y.unsqueeze(1).long(), -mass_of_all, reduce="add")
        index, _, mass = _labels(loss, work, y)
        if may_overwrite():
            return probs.mul_(mass).scatter_add_(1, index, -mass)
        return (mass * probs).scatter_add(1, index, -mass)
    target = _class_weights(loss, work, y)
    return target.sum(1, keepdim=True) * probs - target


def cross_entropy_root(loss: Loss, work: Tensor, y: Tensor, dtype: torch.dtype, fewest: bool) -> Root:
    """Columns sqrt(m p_c) (e_c - p) at each position, or C - 1 others."""
    uniform = uniform_mass(loss, y) if _has_hard_labels(loss, y) else None
    root_mass = class_root(loss, class_mass(loss, work, y), y) if uniform is None else math.sqrt(uniform)
    return _softmax_root(work, root_mass, dtype, fewest and work.shape[1] > 1)


def squared_error_gradient(loss: Loss, work: Tensor, y: Tensor) -> Tensor:
    """Gradient m (f - y)."""
    residual: Tensor = work - y.to(work.dtype)
    return squared_error_mass(loss, work) * residual


def squared_error_root(loss: Loss, work: Tensor, y: Tensor, dtype: torch.dtype, fewest: bool) -> Root:
    """Columns sqrt(m) e_v."""
    mass = squared_error_mass(loss, work)
    check_mass(loss, mass)
    return diagonal_root(mass.sqrt().expand(work.shape), dtype)


def squared_error_mass(loss: Loss, work: Tensor) -> Tensor:
    """Twice the weight of each squared error, of the output's shape or a scalar."""
    weight = loss.tensors.get("weight")
    mean = dict(loss.options)["reduction"] == "mean"
    if weight is None:
        return torch.full((), 2.0 / work.numel() if mean else 2.0, dtype=work.dtype, device=work.device)
    weight = weight.to(work.dtype)
    return 2 * weight / weight.sum() if mean else 2 * weight


def binary_gradient(loss: Loss, work: Tensor, y: Tensor) -> Tensor:
    """Gradient m s - T1."""
    positive, mass = binary_weights(loss, work, y)
    return mass * work.sigmoid() - positive


def binary_root(loss: Loss, work: Tensor, y: Tensor, dtype: torch.dtype, fewest: bool) -> Root:
    """Columns sqrt(m s (1 - s)) e_v."""
    _, mass = binary_weights(loss, work, y)
    check_mass(loss, mass)
    # sqrt(s (1 - s)) in log space: neither factor underflows first, and the derivative stays finite
    deviation = ((F.logsigmoid(work) + F.logsigmoid(-work)) / 2).exp()
    return diagonal_root(mass.sqrt() * deviation, dtype)


def binary_weights(loss: Loss, work: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weight T1 of the label 1 and mass T1 + T0, of the output's shape, with R in them."""
    y = y.to(work.dtype)
    weight, pos_weight = loss.tensors.get("weight"), loss.tensors.get("pos_weight")
    positive = y if pos_weight is None else y * pos_weight.to(work.dtype)
    mass = torch.ones_like(y) if pos_weight is None else positive + (1 - y)
    scale = 1.0 / work.numel() if dict(loss.options)["reduction"] == "mean" else 1.0
    if weight is None:
        return positive * scale, mass * scale
    return positive * weight.to(work.dtype) * scale, mass * weight.to(work.dtype) * scale


def _softmax_root(work: Tensor, root_mass: Tensor | float, dtype: torch.dtype, fewest: bool = False) -> Root:
    """Columns sqrt(m p_c) (e_c - p) at d, for v = (c, d); or the fewest. work [N, C, *d], sqrt(m) [N, 1, *d] or one."""
    num, num_classes, positions = work.shape[0], work.shape[1], math.prod(work.shape[2:])
    shape, device = work.shape, work.device
    skipped = positions if fewest else 0
    parts: list[Tensor] = []  # once they are asked for

    def made() -> list[Tensor]:
        if not parts:
            log_probs = work.log_softmax(1).reshape(num, num_classes, positions)
            probs = log_probs.exp()
            # sqrt(p) in log space: it survives where p underflows, and its derivative stays finite
            roots = (log_probs / 2).exp()
            scale = root_mass.reshape(num, 1, positions) if isinstance(root_mass, Tensor) else root_mass
            if fewest:
                probs = torch.cat([roots[:, :1], probs[:, 1:] / (1 + roots[:, :1])], dim=1)
            parts.extend([(scale * roots).flatten(1), probs])
        return parts

    def columns(start: int, stop: int) -> Tensor:
        scale, probs = made()
        start, stop = start + skipped, stop + skipped
        scaled = scale[:, start:stop].T.unsqueeze(2)
        if positions == 1:
            units = torch.eye(stop - start, num_classes - start, dtype=probs.dtype, device=device)
            column = scaled * (F.pad(units, (start, 0)).unsqueeze(1) - probs.squeeze(2))
        else:
            entry = torch.arange(start, stop, device=device)
            position = entry % positions
            own = _one_hot(entry // positions, num_classes, probs.dtype).unsqueeze(1)  # [v, 1, C]
            column = scaled * (own - probs[:, :, position].permute(2, 0, 1))  # [v, N, C]
            column = column.unsqueeze(3) * _one_hot(position, positions, probs.dtype)[:, None, None]
        return column.reshape(stop - start, *shape).to(dtype)

    def diagonal() -> Tensor:
        probs = work.softmax(1)
        return (probs * (1 - probs) * (root_mass * root_mass)).to(dtype)

    return Root(num_classes * positions - skipped, columns, diagonal=diagonal)


def diagonal_root(scale: Tensor, dtype: torch.dtype) -> Root:
    """Columns scale_v e_v. scale [N, *out]."""
    shape, entries = scale.shape, flat(scale)

    def columns(start: int, stop: int) -> Tensor:
        own = _one_hot(torch.arange(start, stop, device=entries.device), entries.shape[1], entries.dtype)
        return (own.unsqueeze(1) * entries).reshape(stop - start, *shape).to(dtype)

    return Root(entries.shape[1], columns, diagonal=lambda: scale.square().to(dtype))


def check_mass(loss: Loss, mass: Tensor, soft: bool = False) -> None:
    """Refuse negative masses, which only weights and soft targets can cause."""
    if not (loss.tensors or soft):
        return
    if values_visible(mass) and not (mass.is_cuda and torch.cuda.is_current_stream_capturing()) and (mass < 0).any():
        raise ValueError(
            f"{label(loss)}: a target has negative total weight {mass.min():.3g}, so the loss is not convex in the "
            "output and its Hessian has no real root. Use non-negative weights and targets."
        )


def along_classes(per_class: Tensor, out: Tensor) -> Tensor:
    """[C] -> [C, 1, ...], to broadcast against [N, C, *d]."""
    return per_class.reshape(-1, *[1] * (out.ndim - 2))


def _one_hot(index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """[v] -> [v, size]. A comparison: unlike F.one_hot it looks at no values."""
    return (index.unsqueeze(1) == torch.arange(size, device=index.device)).to(dtype)
