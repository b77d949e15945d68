"""Beside where the samples are, the layouts of the tensors with a gradient that a forward pass goes through, on request."""

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from curvfunc.engine.following import Follower
from curvfunc.engine.graph import edge_of
from curvfunc.engine.sites import Layouts

__all__ = ["Surveyor"]


class Surveyor(Follower):
    """Runs operations, and notes the layouts of what they take; ``level`` is the vmap level, None on the plain path."""

    def __init__(self, level: int | None, layouts: Layouts | None) -> None:
        super().__init__()
        self.level = level
        self.layouts = layouts
        if layouts is not None:
            layouts.clear()

    def _raw(self, t: Tensor) -> Tensor:
        if self.level is not None and _functorch.is_batchedtensor(t) and _functorch.maybe_get_level(t) == self.level:
            return _functorch.get_unwrapped(t)
        return t

    def _laid_out(
        self, layouts: Layouts, func: Any, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        """Run an operation; note before it, since it may change them in place, the layouts of the tensors with a gradient."""
        source, sampled, graphed = None, set(), torch.is_grad_enabled()
        for t in tensors:
            raw = t if self.level is None else self._raw(t)
            axis = self.axis_or_none(t) if self.level is None else _functorch.maybe_get_bdim(t) if raw is not t else None
            if axis is not None:
                sampled.add(id(t))
            if graphed and t.requires_grad:
                if axis is not None:
                    layouts.note(edge_of(raw), axis, raw.shape)
                if source is None and func in layouts.functions:
                    source = edge_of(raw)
        out = run(*args, **kwargs)
        if isinstance(out, Tensor) and (source is not None or len(sampled) > 1) and (raw := self._raw(out)).grad_fn is not None:
            if source is not None and not out.is_complex():
                layouts.note_composite(edge_of(raw).node, source)
            if len(sampled) > 1:
                layouts.note_several(edge_of(raw).node)
        return out
