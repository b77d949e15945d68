"""Comparisons of results with one clear message, and graphs whose end shows."""

from typing import Any

import optree
import torch
from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """The norm of the difference over the norm of what is expected; the norm of ``got`` where that is zero."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"dtype {got.dtype}, expected {want.dtype}"
    scale = want.norm().item()
    return (got - want).norm().item() / (scale or 1.0)


def assert_close(got: Any, want: Any, rtol: float = 1e-10) -> None:
    """Same tree, same shapes, and each leaf equal to ``rtol`` in norm (not finite: equal entry by entry)."""
    got_paths, got_leaves, _ = optree.tree_flatten_with_path(got)
    want_paths, want_leaves, _ = optree.tree_flatten_with_path(want)
    assert got_paths == want_paths, f"leaves {got_paths}, expected {want_paths}"
    assert want_leaves, "nothing to compare"
    for path, g, w in zip(got_paths, got_leaves, want_leaves, strict=True):
        if not w.isfinite().all():
            torch.testing.assert_close(g, w, rtol=rtol, atol=0.0, equal_nan=True)
            continue
        error = relative_error(g, w)
        assert error <= rtol, f"{'.'.join(map(str, path))}: relative error {error:.2e} > {rtol:.0e}"


class Mark:
    """Something to refer to weakly."""


class Marked(torch.autograd.Function):
    """The identity; its graph holds a mark."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mark: Any) -> Tensor:
        ctx.mark = mark
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, None
