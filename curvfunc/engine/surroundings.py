"""What around a model may have its operations, or their backward passes, do something else than their rules say."""

from collections.abc import Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

__all__ = ["ALTERED", "PACKING", "altered", "altering_mode"]

ALTERED = "a tensor class, mode or hooks of saved tensors may change what operations do"

_OWN = ("torch.", "curvfunc.")
# The hooks that meet what operations save, which may come back as something else; None without.
PACKING: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)


def altered(kinds: Collection[type]) -> bool:
    """Whether the classes of an operation's tensors, or hooks of users that meet what it saves, may change what it does."""
    hooks = PACKING(False) or ()
    return any(map(_alters, kinds)) or not all((getattr(h, "__module__", None) or "").startswith(_OWN) for h in hooks)


@cache
def _alters(kind: type) -> bool:
    """Whether a class of tensors may change what functions do with them."""
    own: Any = getattr(kind, "__torch_function__", None)
    plain = own is torch._C._disabled_torch_function_impl or getattr(own, "__func__", own) is _DEFAULT
    return not (plain or kind.__module__.startswith(_OWN))


_DEFAULT = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]


def altering_mode() -> bool:
    """Whether a mode around the call sees what the model's functions do, and may change it."""
    return torch._C._len_torch_function_stack() > 0 and any(
        not type(mode).__module__.startswith(_OWN) for mode in _get_current_function_mode_stack()
    )
