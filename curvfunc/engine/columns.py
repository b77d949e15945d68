"""A backward pass for several columns at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from curvfunc.engine.symbolic import batched
from curvfunc.tensors.sizes import has_symbols

__all__ = ["over_columns", "without_fallback_warnings"]


def over_columns(backward: Callable[..., Any], *columns: Tensor) -> Any:
    """``torch.vmap`` of a backward pass that keeps its graph; one column after another where an operation has no rule for it.

    Complex numbers have such: the gradient of an imaginary part may be a view that negates.
    """
    if has_symbols() and _functorch.peek_interpreter_stack() is None:
        found = batched(backward, *columns)
        if found is not None:
            return found
    try:
        with without_fallback_warnings():
            # what a checkpoint draws in the backward pass is what it drew in the forward pass
            return torch.vmap(backward, randomness="same")(*columns)
    except RuntimeError as error:
        if "Batching rule not implemented" not in str(error):
            raise
    found = [backward(*column) for column in zip(*columns, strict=True)]
    return torch.stack(found) if isinstance(found[0], Tensor) else tuple(map(torch.stack, zip(*found, strict=True)))


@contextmanager
def without_fallback_warnings() -> Iterator[None]:
    """Silence vmap where it runs an operation sample by sample: that is slower, and right."""
    _functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]  # Python's filters take long
    try:
        yield
    finally:
        _functorch._set_vmap_fallback_warning_enabled(True)  # type: ignore[attr-defined]
