"""How a call crosses into compiled code; with versions of torch whose dynamo is arranged in another way, not at all."""

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch

__all__ = ["call", "refuse_export", "uncompiled"]

try:
    from curvfunc.engine.dynamo import call
except ImportError:

    def call(*given: Any) -> NoReturn:  # type: ignore[misc]
        """Raise, for want of a dynamo that can be looked into."""
        raise NotImplementedError("compiled calls need torch 2.13; call curvfunc outside of torch.compile.")


def refuse_export() -> None:
    """Raise inside of ``torch.export``, which looks into no backward pass, neither torch's own nor ours."""
    if getattr(torch.compiler, "_is_exporting_flag", False):  # dynamo of torch 2.11 takes is_exporting() for true throughout
        raise NotImplementedError(
            "torch.export cannot trace backward passes. Trace the call into operations first, graph = "
            "torch.fx.experimental.proxy_tensor.make_fx(call, tracing_mode='symbolic')(params, X, y), and export the graph: "
            "torch.export.export(graph, (params, X, y), dynamic_shapes=...)."
        )


_Function = TypeVar("_Function", bound=Callable[..., Any])
_callback: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)  # no public name


def uncompiled(function: _Function) -> _Function:
    """The function, hidden from dynamo, which would compile the engine frame by frame where it gave up the caller's."""
    if _callback() is None:
        return function
    hidden: _Function = torch.compiler.disable(function)
    return hidden
