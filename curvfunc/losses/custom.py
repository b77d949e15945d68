"""Losses of one's own: gradient, Hessian and root by automatic differentiation, once it is known that samples separate."""

import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from curvfunc.losses.normal_form import Loss, flat, label, tolerance, values_visible
from curvfunc.tensors.ownership import base
from curvfunc.tensors.samples import tree_map

__all__ = ["autodiff_factor", "autodiff_gradient", "autodiff_hessian", "check_separable", "check_sum", "mean_terms"]

LARGE = 1024  # entries of a sample's output beyond which there is a warning of the size of their Hessian


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
    reference = autodiff_gradient(loss, out, y) if reference is None else reference.detach()
    noise, changed = _split(out)
    moved = autodiff_gradient(loss, torch.where(changed, out.roll(1, 0) * (1 + 7 * noise) / 8, out), y)
    _check_unmoved(loss, reference, moved, changed)


def autodiff_gradient(loss: Loss, out: Tensor, y: Any) -> Tensor:
    """Gradient with respect to the output, [N, ...]."""
    if out.requires_grad or torch._C._functorch.peek_interpreter_stack() is not None:
        return cast(Tensor, torch.func.grad(lambda f: loss(f, y))(out))
    # the same, without the overhead of a transformation
    with torch.enable_grad():
        leaf = out.detach().requires_grad_()
        value = loss(leaf, y)
        if not value.requires_grad:
            return torch.zeros_like(out)
        return torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)[0]


def autodiff_hessian(loss: Loss, work: Tensor, y: Any) -> Tensor:
    """Hessian [N, D, D] of each sample: D Hessian-vector products, each with e_c in all samples at once."""
    size = math.prod(work.shape[1:])
    if size > LARGE:
        warnings.warn(
            f"{label(loss)}: the Hessian of each sample has {size} x {size} entries here, which are formed and decomposed. "
            "Cross-entropy, squared error and BCE with logits need neither: pass one as loss_fn, or let one of your own do "
            "nothing but reshape, transpose, slice or mask the output, and return F.cross_entropy(...) of it with reduction "
            "'mean' or 'sum'.",
            stacklevel=2,
        )
    pullback: Callable[[Tensor], tuple[Tensor]]
    _, pullback = torch.func.vjp(lambda f: autodiff_gradient(loss, f, y), work)  # type: ignore[misc]
    if work.shape[0] > 1 and values_visible(work, y):
        noise, changed = _split(work)
        product = pullback(noise)[0].detach()
        moved = pullback(torch.where(changed, 0.0, noise))[0].detach()
        _check_unmoved(loss, product, moved, changed)
    basis = torch.eye(size, dtype=work.dtype, device=work.device).reshape(size, 1, *work.shape[1:])
    rows = torch.vmap(lambda row: pullback(row.expand(work.shape))[0])(basis)
    hessian = rows.reshape(size, *flat(work).shape).permute(1, 0, 2)
    symmetric: Tensor = (hessian + hessian.mT) / 2
    return symmetric


def autodiff_factor(loss: Loss, work: Tensor, y: Any) -> Tensor:
    """S [N, D, D] with S S^T = Hessian of each sample; column v is sqrt(lambda_v) u_v.

    So that derivatives exist although eigenvalues coincide, the eigenvectors U and eigenvalues lambda are constants,
    and with G = U / sqrt(lambda) on the range of H,

        S = H G (G^T H G)^(-T/2)      (Cholesky root)

    has this value, as G^T H G is then the identity, while S S^T = H G (G^T H G)^-1 G^T H = H holds for H nearby too.
    """
    y = _cast(y, work.dtype)
    check_separable(loss, work, y)
    # float64: LAPACK may not converge in float32 on Hessians of saturated losses, whose entries have all sizes
    hessian = autodiff_hessian(loss, work, y).double()
    finite = hessian.detach().isfinite().all(2).all(1)
    if values_visible(finite) and (~finite & flat(work.detach()).isfinite().all(1)).any():
        raise ValueError(f"{label(loss)}: its Hessian has infinite or NaN entries. Check the outputs and targets.")
    finite = finite[:, None, None]
    hessian = torch.where(finite, hessian, 0.0)  # a sample whose output is not finite gets NaN, the others their root
    constant = hessian.detach()
    eigenvalues, vectors = torch.linalg.eigh(constant)
    threshold = tolerance(work.dtype) * eigenvalues.abs().amax()
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


def mean_terms(loss: Loss, out: Tensor, y: Any, g: Tensor) -> Tensor:
    """N for a mean over samples, 1 for a sum: on the batch twice, the gradient is half as large, or the same.

    Args:
        loss: The loss.
        out: Output of the model, [N, ...].
        y: Targets.
        g: The gradient at ``out``.

    Raises:
        ValueError: If the loss is neither. Where values cannot be seen (``values_visible``), the nearer one is taken.
    """
    remedy = (
        "so that its scale is not known, which the empirical Fisher needs. Let it sum or average one term per sample, of the "
        "output and y alone (tensors for each sample belong into y)"
    )
    try:
        twice = autodiff_gradient(loss, torch.cat([out, out]), tree_map(lambda t: torch.cat([t, t]), y))
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"{label(loss)} cannot be evaluated on the batch twice, {remedy}: {error}") from error
    first = twice[: out.shape[0]]
    share = (first * g).sum() / (g * g).sum()
    if values_visible(share, y) and share.isfinite():
        factor = min((0.5, 1.0), key=lambda factor: abs(factor - share.item()))
        if (first - factor * g).abs().max() > tolerance(out.dtype) * g.abs().max():
            raise ValueError(
                f"{label(loss)} is neither a sum nor a mean over samples: on the batch twice, gradients are {share.item():.3g} "
                f"times as large, {remedy}."
            )
    return torch.where(share < 0.75, out.shape[0], 1.0)


def check_sum(loss: Loss, out: Tensor, y: Any, g: Tensor) -> None:
    """Raise unless gradients stay what they are on the batch twice, as those of a sum do; compiled code raises when it runs.

    Args:
        loss: A custom loss.
        out: Output of the model, [N, ...].
        y: Targets.
        g: The gradient at ``out``.
    """
    remedy = "Its terms have to be those of the samples, each by itself: let it sum them, of the output and y alone."
    try:
        twice = autodiff_gradient(loss, torch.cat([out, out]).detach(), tree_map(lambda t: torch.cat([t, t]), y))
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"{label(loss)} cannot be evaluated on the batch twice: {error} {remedy}") from error
    moved = (twice[: out.shape[0]] - g.detach()).abs().amax() > tolerance(out.dtype) * g.detach().abs().amax()
    why = (
        f"{label(loss)} is no sum over samples: its gradients on the batch twice are others. {remedy} What a mean would divide "
        "by is left to you."
    )
    if torch.compiler.is_compiling():
        torch._assert_async(~base(moved).any(), why)
    elif base(moved).any():
        raise ValueError(why)


def _check_indefinite(loss: Loss, work: Tensor, y: Any) -> None:
    """Refuse a negative eigenvalue, unless it is rounding: a saturated loss may have a Hessian of nothing else.

    So the Hessian is computed in float64, where a negative eigenvalue must stand out against terms as large as the
    gradient.
    """
    gradient_size = autodiff_gradient(loss, work, y).nan_to_num(0.0, 0.0, 0.0).abs().max()
    try:
        hessian = autodiff_hessian(loss, work.double(), _cast(y, torch.float64))
    except RuntimeError:  # the loss brings tensors of its own, which fit one dtype only
        hessian = autodiff_hessian(loss, work, y)
    hessian = torch.where(hessian.isfinite().all(2).all(1)[:, None, None], hessian, 0.0)
    eigenvalues = torch.linalg.eigvalsh(hessian.double())
    smallest, eps = eigenvalues.min(), torch.finfo(hessian.dtype).eps
    if smallest < -1000 * eps * gradient_size - tolerance(hessian.dtype) * eigenvalues.abs().max():
        raise ValueError(
            f"{label(loss)}: its Hessian with respect to the output is indefinite (smallest eigenvalue "
            f"{smallest:.3g}). The GGN needs a loss that is convex in the output. Move the rest into the model."
        )


def _cast(y: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors among the targets in this dtype."""
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, y)


def _check_unmoved(loss: Loss, before: Tensor, after: Tensor, changed: Tensor) -> None:
    difference = torch.where(changed, 0.0, after - before).abs().max()
    if not difference > tolerance(before.dtype) * before.abs().max():
        return
    raise ValueError(
        f"{label(loss)} does not separate over samples: the gradient of one sample depends on the output of another "
        "(or on chance). Per-sample and curvature quantities need a sum or mean of one term per sample. Move what "
        "mixes samples out of the loss."
    )


def _split(like: Tensor) -> tuple[Tensor, Tensor]:
    """Fixed pseudo-random numbers in [0, 1) of this shape, and half of the samples, [N, 1, ...]. Uses no generator."""
    noise = (torch.arange(1, like.numel() + 1, dtype=torch.float64).sin() * 43758.5453) % 1
    noise = noise.to(like).reshape(like.shape)
    per_sample = flat(noise)[:, 0]
    return noise, (per_sample <= per_sample.median()).reshape(-1, *[1] * (like.ndim - 1))
