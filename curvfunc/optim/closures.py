"""What a closure of `torch.optim` does: on which batch, and with which loss."""

import inspect
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from curvfunc.engine.model import ModelFunction

__all__ = ["Look"]

SEEN = (F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits)  # losses that a closure may call


class Look(TorchFunctionMode):
    """Sees the model's input and the loss function in a closure."""

    def __init__(self, model_fn: ModelFunction) -> None:
        super().__init__()
        self.output_fn = model_fn.output_fn
        self.inputs: list[Any] = []
        self.outputs: list[Tensor] = []
        self.losses: list[tuple[Any, Any]] = []

    def called(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """A forward hook."""
        if args and kwargs:
            raise ValueError("the closure calls the model with arguments by position and by name. Use step(X, y).")
        self.inputs.append(kwargs or (args[0] if len(args) == 1 else args))
        self.outputs.append(out if self.output_fn is None else self.output_fn(out))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note losses of the model's output."""
        kwargs = kwargs or {}
        if func in SEEN:
            bound = inspect.signature(func).bind(*args, **kwargs).arguments
            if any(bound["input"] is out for out in self.outputs):
                options = {name: value for name, value in bound.items() if name not in ("input", "target")}
                self.losses.append((partial(func, **options), bound["target"]))
        return func(*args, **kwargs)

    def batch(self) -> tuple[Any, Any, Any]:
        """Input, targets and loss function, of which there has to be one."""
        if len(self.inputs) != 1 or len(self.losses) != 1:
            names = ", ".join(f.__name__ for f in SEEN)
            raise ValueError(
                f"the closure calls the model {len(self.inputs)} times, and a known loss of its output "
                f"{len(self.losses)} times; "
                f"curvature needs one of each ({names}). Use step(X, y) with loss_fn."
            )
        [(loss_fn, y)] = self.losses
        return self.inputs[0], y, loss_fn
