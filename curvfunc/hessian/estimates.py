"""Unbiased estimates of the Hessian's diagonal from Hessian-vector products with random signs.

For z with independent signs, E[z zᵀ] = I, so that E[z ⊙ H z] = diag H. One draw is of all parameters, and the same for all
samples: H z = Σₙ Hₙ z is the derivative of the gradient, and the Hₙ z those of the per-sample gradients, in direction z.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import _functorch

from curvfunc.engine.columns import over_columns
from curvfunc.engine.cotangents import together
from curvfunc.engine.sites import Trace
from curvfunc.tensors.precision import wide
from curvfunc.tensors.sizes import ranges

__all__ = ["estimate"]


def estimate(
    trace: Trace,
    leaves: Sequence[Tensor],
    gradients: Sequence[Tensor],
    order: Sequence[int],
    signs: Callable[[int], Tensor],
    draws: int,
    *,
    batched: bool,
    chunk_size: int | None,
    differentiable: bool,
) -> list[Tensor]:
    """Means over draws of z ⊙ H z.

    Args:
        trace: The forward pass.
        leaves: The parameters.
        gradients: Of the loss with respect to the parameters, with their graphs: [*shape], or [n, *shape] if ``batched``.
        order: That of the parameters in a draw.
        signs: Draws that many numbers.
        draws: Number of draws.
        batched: Whether to keep the samples apart.
        chunk_size: Number of draws that are multiplied together; by default chosen by memory.
        differentiable: Whether the results will be differentiated.

    Returns:
        [*shape] or [n, *shape] for each parameter.

    References:
        Bekas, Kokiopoulou, Saad 2007, "An estimator for the diagonal of a matrix"; Hutchinson 1989, for the trace.
    """
    dtypes = [wide(p.dtype) for p in leaves]
    sums = [torch.zeros_like(g, dtype=dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
    curved = [i for i, g in enumerate(gradients) if g.requires_grad]
    if not curved:
        return sums
    multiply = _products([gradients[i] for i in curved], curved, leaves, batched, differentiable)
    numel = [p.numel() for p in leaves]
    if chunk_size is None:
        chunk_size = together(trace.out, [sum(g.numel() for g in gradients)], *[s.shape for s in trace.sites])
    for start, stop in ranges(draws, chunk_size):
        z = torch.stack([signs(sum(numel)) for _ in range(start, stop)])  # one by one, whatever goes together
        drawn = dict(zip(order, z.split([numel[i] for i in order], 1), strict=True))
        parts = [drawn[i].reshape(len(z), *p.shape).to(p) for i, p in enumerate(leaves)]
        for i, product in zip(curved, multiply([parts[i] for i in curved]), strict=True):
            own = parts[i].unsqueeze(1) if batched else parts[i]
            sums[i] = sums[i] + (own * product).to(dtypes[i]).sum(0)
    return [total / draws for total in sums]


def _products(
    gradients: list[Tensor], curved: list[int], leaves: Sequence[Tensor], batched: bool, differentiable: bool
) -> Callable[[list[Tensor]], list[Tensor]]:
    """H z [v, *shape], or Hₙ z [v, n, *shape], of the parameters whose gradients are no constants, from their z [v, *shape].

    Hessians are symmetric, so that the backward pass of the gradients multiplies by H. That of the per-sample gradients
    maps u to Σₙ Hₙ uₙ, and its own, with respect to u, z to all Hₙ z.
    """
    if not batched:
        return _pulled(gradients, [leaves[i] for i in curved], differentiable)
    with torch.enable_grad():
        u = [g * 0 for g in gradients]  # requires grad; that it has a graph of its own does not matter
        moved = torch.autograd.grad(
            gradients, [leaves[i] for i in curved], u, create_graph=True, retain_graph=True, materialize_grads=True
        )
    return _pulled(list(moved), u, differentiable)


def _pulled(outputs: list[Tensor], inputs: list[Tensor], differentiable: bool) -> Callable[[list[Tensor]], list[Tensor]]:
    """Takes cotangents [v, ...] of the outputs to those of the inputs."""
    used = [i for i, t in enumerate(outputs) if t.requires_grad]
    reached: list[bool] = []

    def backward(*columns: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(
            [outputs[i] for i in used],
            inputs,
            columns,
            retain_graph=True,
            create_graph=differentiable,
            allow_unused=True,
        )
        reached[:] = [g is not None for g in grads]
        return tuple(g for g in grads if g is not None)

    def pull(columns: list[Tensor]) -> list[Tensor]:
        own = [columns[i].to(outputs[i].dtype) for i in used]
        if _functorch.peek_interpreter_stack() is not None:
            # backward passes that work in place need columns that are batched wherever the outputs are
            own = [c + torch.zeros_like(outputs[i]) for i, c in zip(used, own, strict=True)]
        found = iter(over_columns(backward, *own)) if used else iter(())
        return [
            next(found) if r else t.new_zeros(len(columns[0]), *t.shape)
            for r, t in zip(reached or [False] * len(inputs), inputs, strict=True)
        ]

    return pull
