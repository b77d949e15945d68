"""Curvature of losses with respect to the model's output: gradients and square roots of the Hessian.

The loss is L(f, y) = R sum_n l(f_n, y_n), with R = 1 for a sum. Three losses have closed forms: cross-entropy, squared
error and binary cross-entropy with logits, with all their options. They share one shape: with a target weight T >= 0,

    cross-entropy    L = - sum_nd sum_c T_ncd log p_ncd,            gradient m p - T,     Hessian m (diag p - p p^T)
    BCE with logits  L = - sum T1 log s + T0 log(1 - s),            gradient m s - T1,    Hessian m s (1 - s)
    squared error    L = sum (m / 2) (f - y)^2,                     gradient m (f - y),   Hessian m

where m, the *mass* of a position, is the total weight of its target. Class weights, ``ignore_index``, label smoothing,
soft labels, ``pos_weight`` and the factor R of the reduction all end up in T and m, and nowhere else.
Losses of one's own that only move entries of the output before one of these have its closed form (see `disguises`).
Any other loss is *custom*: its per-sample Hessian comes from autodiff and its root from an eigendecomposition.

Axes: ``n`` samples (N), ``c`` classes (C), ``d`` further axes of the output, ``v`` columns of the root (V); Monte-Carlo
roots have M columns. An exact root has V = numel(out[n]) columns, and with a closed form column v belongs to entry v of
the flattened output of a sample (for cross-entropy, v = (c, d) with d fastest). Everything is computed in float32 at
least and returned in the output's dtype.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvfunc.losses.closed_forms import (
    along_classes,
    binary_gradient,
    binary_root,
    binary_weights,
    check_mass,
    class_mass,
    class_root,
    cross_entropy_gradient,
    cross_entropy_root,
    squared_error_gradient,
    squared_error_mass,
    squared_error_root,
    uniform_mass,
)
from curvfunc.losses.custom import autodiff_factor, autodiff_gradient, autodiff_hessian, check_separable, check_sum, mean_terms
from curvfunc.losses.disguises import unmasked
from curvfunc.losses.draws import draw_bits, draw_categories, draw_normal
from curvfunc.losses.normal_form import (
    CLOSED_FORMS,
    ClosedForm,
    Loss,
    Root,
    check,
    check_classes,
    check_entries,
    flat,
    is_sum,
    label,
    no_loss,
    normalize,
    rebuild,
    values_visible,
)
from curvfunc.tensors.pages import may_overwrite
from curvfunc.tensors.precision import at_least_float32
from curvfunc.tensors.sizes import hint, room

__all__ = [
    "SUMMED",
    "Loss",
    "Root",
    "check",
    "check_separable",
    "empirical_root",
    "exact_root",
    "gradient",
    "is_sum",
    "no_loss",
    "normalize",
    "rebuild",
    "refuse_means",
    "sampled_root",
    "signed_root",
    "summed_gradient",
    "summed_hessian",
    "values_visible",
]

SUMMED = functools.partial(F.cross_entropy, reduction="sum")  # the default where a mean has no answer

COLUMNS_BYTES = 1 << 24  # columns that are made together where only their products are kept


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
        if (known := unmasked(loss, out, y)) is not None:
            return known.gradient(at_least_float32(out)).to(out.dtype)
        custom = autodiff_gradient(loss, out, y)
        check_separable(loss, out, y, custom)
        return custom
    work = at_least_float32(out)
    return CLOSED_FORMS[loss.name].gradient(loss, work, y).to(out.dtype)


def summed_gradient(loss: Loss, out: Tensor, y: Any, *, create_graph: bool = False) -> Tensor:
    """`gradient` of a loss that has to be a sum over samples, so that each has its own gradient whatever the batch.

    Raises:
        ValueError: If it is none.
    """
    refuse_means(loss)
    g = gradient(loss, out, y, create_graph=create_graph)
    if loss.name is None and out.shape[0]:
        check_sum(loss, out, y, g)
    return g


def refuse_means(loss: Loss) -> None:
    """Raise for a loss that is known to be no sum."""
    if loss.name is not None and not is_sum(loss):
        raise ValueError(
            f"{label(loss)} averages, so that the gradient of a sample would shrink with the batch that it is in, and be "
            f"clipped by its size. Pass a sum, as functools.partial(F.{label(loss)}, reduction='sum') is, and divide the "
            "result by a number of your own."
        )


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
    work = at_least_float32(out)
    if loss.name is not None:
        return CLOSED_FORMS[loss.name].root(loss, work, y, out.dtype, fewest)
    if (known := unmasked(loss, out, y)) is not None:
        return known.root(work, out.dtype, fewest)
    factor = autodiff_factor(loss, work, y)
    shape = out.shape

    def columns(start: int, stop: int) -> Tensor:
        return factor[:, :, start:stop].permute(2, 0, 1).reshape(stop - start, *shape).to(out.dtype)

    return Root(factor.shape[-1], columns)


def summed_hessian(loss: Loss, out: Tensor, y: Any, select: Callable[[Tensor], Tensor]) -> Tensor:
    """The Hessians of all samples added up, R sum_n Hessian of l_n [D, D]; of those samples that ``select`` leaves.

    It is in float32 at least.

    Args:
        loss: The loss; ``check`` has passed.
        out: Output of the model, [N, *out].
        y: Targets.
        select: Takes [v, N, ...] to the samples of a subset.

    Raises:
        ValueError: As ``exact_root``.
    """
    if loss.name == "cross_entropy" and out.ndim == 2:
        work = at_least_float32(out)
        probs = work.softmax(1)
        weighted, probs = select(torch.stack([class_mass(loss, work, y) * probs, probs]))
        return weighted.sum(0).diag() - weighted.mT @ probs
    root = exact_root(loss, out, y, fewest=True)
    size = max(1, room(COLUMNS_BYTES, out) // max(1, hint(out.numel()) * out.element_size()))
    parts = []
    for start in range(0, root.num, size):
        columns = select(root.columns(start, min(start + size, root.num))).reshape(-1, math.prod(out.shape[1:]))
        columns = at_least_float32(columns)
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
    work = at_least_float32(out)
    known = unmasked(loss, out, y)
    try:
        if loss.name is not None:
            return exact_root(loss, out, y, fewest=True), None
        if known is not None:
            return known.root(work, out.dtype, True), None
    except ValueError:  # negative weights
        if loss.name is not None:
            loss = Loss(None, functools.partial(loss.fn, **dict(loss.options), **loss.tensors))
    check_separable(loss, work, y)
    hessian = autodiff_hessian(loss, work, y)
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
    work = at_least_float32(out)
    if (known := unmasked(loss, out, y)) is not None:
        columns = known.sampled(work, mc_samples, generator)
    else:
        sampled = _sampled_custom if loss.name is None else CLOSED_FORMS[loss.name].sampled
        columns = sampled(loss, work, y, mc_samples, generator)
    return Root(mc_samples, lambda start, stop: columns(start, stop).to(out.dtype))


def _sampled_cross_entropy(
    loss: Loss, work: Tensor, y: Tensor, mc_samples: int, generator: torch.Generator | None
) -> Callable[[int, int], Tensor]:
    uniform = uniform_mass(loss, y)
    if uniform is None:
        scale: Tensor | float = class_root(loss, class_mass(loss, work, y) / mc_samples, y)
    else:
        scale = math.sqrt(uniform / mc_samples)
    probs = work.softmax(1)
    drawn = draw_categories(probs, mc_samples, generator)
    if mc_samples == 1 and may_overwrite() and not torch.compiler.is_compiling():
        column = probs.scatter_(1, drawn[0].unsqueeze(1), -1.0, reduce="add").mul_(scale)[None]
        return lambda start, stop: column[start:stop]
    classes = along_classes(torch.arange(work.shape[1], device=work.device), work)
    return lambda start, stop: scale * (probs - (drawn[start:stop].unsqueeze(2) == classes).to(probs.dtype))


def _sampled_bits(
    loss: Loss, work: Tensor, y: Tensor, mc_samples: int, generator: torch.Generator | None
) -> Callable[[int, int], Tensor]:
    _, mass = binary_weights(loss, work, y)
    check_mass(loss, mass)
    scale, probs = (mass / mc_samples).sqrt(), work.sigmoid()
    drawn = draw_bits(work, mc_samples, generator)
    return lambda start, stop: scale * (probs - drawn[start:stop].to(probs.dtype))


def _sampled_squared_error(
    loss: Loss, work: Tensor, y: Tensor, mc_samples: int, generator: torch.Generator | None
) -> Callable[[int, int], Tensor]:
    mass = squared_error_mass(loss, work)
    check_mass(loss, mass)
    scale = (mass / mc_samples).sqrt()
    drawn = draw_normal(work, mc_samples, generator)
    return lambda start, stop: scale * drawn[start:stop]


def _sampled_custom(
    loss: Loss, work: Tensor, y: Any, mc_samples: int, generator: torch.Generator | None
) -> Callable[[int, int], Tensor]:
    factor = autodiff_factor(loss, work, y) / math.sqrt(mc_samples)
    drawn = draw_normal(flat(work), mc_samples, generator)
    return lambda start, stop: torch.einsum("ncd,vnd->vnc", factor, drawn[start:stop]).reshape(stop - start, *work.shape)


def empirical_root(loss: Loss, out: Tensor, y: Any) -> Root:
    """As ``sampled_root`` with the targets themselves in the place of a draw: one column, (dL / d out) / sqrt(R).

    R is one over the number of terms that the loss averages, and 1 for a sum. Then its outer product is R g g^T with g the
    gradient of a sample's terms, added up, and if targets are drawn as the loss implies, its expectation is the Hessian. The
    terms are

        cross-entropy    the positions that are not ignored, or the sum of the weights of their labels
        BCE with logits  the output's entries
        squared error    the output's entries, or the sum of their weights
        in disguise      those of the known loss
        custom           the samples: how the loss scales is read off its gradient on the batch twice

    Args:
        loss: The loss; ``check`` has passed.
        out: Output of the model, [N, *out].
        y: Targets.

    Returns:
        Root with one column, which can be differentiated with respect to ``out``.

    Raises:
        ValueError: If a custom loss is neither a sum nor a mean over samples, or does not separate over them.
    """
    g = gradient(loss, out, y, create_graph=out.requires_grad)
    column = (at_least_float32(g) * _terms(loss, out.detach(), y, g.detach()) ** 0.5).to(out.dtype)[None]
    return Root(1, lambda start, stop: column[start:stop])


def _terms(loss: Loss, out: Tensor, y: Any, g: Tensor) -> Tensor | float:
    """The number of terms that a loss averages, or their total weight; 1 for a sum."""
    if (known := unmasked(loss, out, y)) is not None:
        return _terms(known.loss, known.moved(out), known.y, g)
    if loss.name is None:
        return mean_terms(loss, out, y, g)
    if is_sum(loss):
        return 1.0
    weight = loss.tensors.get("weight")
    if loss.name == "bce_with_logits" or (loss.name == "mse_loss" and weight is None):
        return out.numel()
    if loss.name == "cross_entropy" and y.is_floating_point():
        return out.numel() // out.shape[1]
    if loss.name == "cross_entropy":
        kept = (y != dict(loss.options)["ignore_index"]).to(at_least_float32(out).dtype)
        terms = kept.sum() if weight is None else (kept * weight[torch.where(kept > 0, y.long(), 0)]).sum()
    else:
        assert weight is not None
        terms = weight.sum()
    check_mass(loss, terms)
    return terms


CLOSED_FORMS.update(
    cross_entropy=ClosedForm(
        function=F.cross_entropy,
        module=nn.CrossEntropyLoss,
        options={"reduction": "mean", "ignore_index": -100, "label_smoothing": 0.0},
        tensors=("weight",),
        check=check_classes,
        gradient=cross_entropy_gradient,
        root=cross_entropy_root,
        sampled=_sampled_cross_entropy,
    ),
    mse_loss=ClosedForm(
        function=F.mse_loss,
        module=nn.MSELoss,
        tensors=("weight",),
        check=check_entries,
        gradient=squared_error_gradient,
        root=squared_error_root,
        sampled=_sampled_squared_error,
    ),
    bce_with_logits=ClosedForm(
        function=F.binary_cross_entropy_with_logits,
        module=nn.BCEWithLogitsLoss,
        tensors=("weight", "pos_weight"),
        check=check_entries,
        gradient=binary_gradient,
        root=binary_root,
        sampled=_sampled_bits,
    ),
)
