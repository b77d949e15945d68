"""What a forward pass may return: one tensor with the samples first, which depends on this call's parameters alone."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from curvfunc.engine.effects import kept_tensors, shares_memory
from curvfunc.engine.graph import reached
from curvfunc.tensors.ownership import base

__all__ = ["check_leaves", "check_output", "visible"]


def check_leaves(model_fn: Any, others: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Raise if the output's graph ends in a parameter that is not this call's."""
    if not others:
        return
    module = getattr(model_fn, "module", None)  # of a functionalized one all parameters are replaced
    replaced = {id(p) for p in module.parameters()} if isinstance(module, torch.nn.Module) else set()
    for t in others:
        if getattr(t, "_curvfunc_leaf", False) or id(t) in replaced or any(t is p or shares_memory(t, p) for p in leaves):
            where = _holder(model_fn, t)
            raise ValueError(
                f"the output depends on a tensor{where} that was made from parameters in an earlier call, and that the model "
                "kept: its values are old, and its gradient is lost. Clear it before the call (modules that keep it in eval "
                "mode often do so in module.train(), followed by module.eval()), or compute it anew in each forward pass."
            )


def _holder(model_fn: Any, leaf: Tensor) -> str:
    """Where a module keeps a tensor whose graph ends in ``leaf``, for messages."""
    module = getattr(model_fn, "module", None)
    for prefix, m in module.named_modules() if isinstance(module, torch.nn.Module) else ():
        for key, value in vars(m).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            for t in kept_tensors(value):
                if t is leaf or (t.requires_grad and any(v is leaf for v in reached([t], [], {}).leaves)):
                    return f" in attribute {key!r} of {f'module {prefix!r}' if prefix else 'the module'} ({type(m).__name__})"
    return ""


def visible(t: Tensor) -> bool:
    """Whether a tensor has values, and is not only traced."""
    t = base(t)
    return not isinstance(t, torch._subclasses.FakeTensor) and not torch._is_functional_tensor(t)


def check_output(out: Any, samples: int) -> None:
    """Raise if a model's output is not one tensor with the samples first."""
    if not isinstance(out, Tensor):
        what = f"a {type(out).__name__}"
        if isinstance(out, dict):
            what += f" with keys {list(out)}"
        raise TypeError(
            f"the model returned {what}; a single tensor is needed. Choose one: functionalize(module, output_fn=lambda "
            "out: out[0]), or a model_fn that returns it."
        )
    if out.ndim == 0 or out.shape[0] != samples:
        raise ValueError(
            f"the model's output has shape {tuple(out.shape)} for {samples} sample(s); its first axis must be the "
            "sample axis. Permute it in model_fn or output_fn."
        )
    if not out.is_floating_point():
        raise TypeError(f"the model's output has dtype {out.dtype}; a real floating-point tensor is needed.")
