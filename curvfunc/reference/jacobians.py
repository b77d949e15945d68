"""The Jacobian of the model's output, by plain ``torch.autograd``: one sample and one entry of its output at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

__all__ = ["batch_jac"]

ModelFn = Callable[[Any, Any], Tensor]
Indices = Sequence[int] | Tensor | None


def batch_jac(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    *,
    subsampling: Indices = None,
    chunk_size: int | None = None,
    out: Any = None,
) -> Any:
    """Jacobian of each sample's output, ``J[n, *c, *p] = d f_n[c] / d theta[p]``.

    Args:
        model_fn: ``(params, X) -> output [N, *out]``, each sample's output a function of that sample alone.
        params: Pytree of tensors.
        X: Pytree of tensors with leading axis N, at least 1.
        subsampling: Samples to return results for; None is all of them.
        chunk_size: No effect.
        out: No effect.

    Returns:
        ``[N, *out, *shape]`` per parameter.
    """
    leaves, treespec = optree.tree_flatten(params)
    leaves = [p.detach().requires_grad_() for p in leaves]
    every = torch.arange(len(optree.tree_leaves(X)[0]))
    samples = (every if subsampling is None else every[torch.as_tensor(subsampling, device="cpu")]).tolist()
    rows: list[list[Tensor]] = [[] for _ in leaves]
    for n in samples:
        f = model_fn(optree.tree_unflatten(treespec, leaves), optree.tree_map(lambda x: x[n : n + 1], X))[0]  # noqa: B023
        entries = [_gradient(f_c, leaves) for f_c in f.reshape(-1)]
        for i, p in enumerate(leaves):
            of_p = [gradient[i] for gradient in entries]
            rows[i].append(torch.stack(of_p).reshape(*f.shape, *p.shape) if of_p else p.new_zeros(*f.shape, *p.shape))
    return optree.tree_unflatten(treespec, [torch.stack(of_samples) for of_samples in rows])


def _gradient(entry: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The gradient of one number with respect to each parameter."""
    if not entry.requires_grad:
        return [torch.zeros_like(p) for p in leaves]
    return list(torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True, materialize_grads=True))
