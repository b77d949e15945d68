"""How a call crosses into compiled code; with versions of torch whose dynamo is arranged in another way, not at all."""

from typing import Any, NoReturn

__all__ = ["call"]

try:
    from curvfunc.engine.dynamo import call
except ImportError:

    def call(*given: Any) -> NoReturn:  # type: ignore[misc]
        """Raise, for want of a dynamo that can be looked into."""
        raise NotImplementedError("compiled calls need torch 2.13; call curvfunc outside of torch.compile.")
