"""BackPACK's modules for what its models could not write in plain Python. Here they are ordinary modules."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.loss import _Loss

__all__ = [
    "Flatten",
    "Pad",
    "Parallel",
    "Permute",
    "ReduceTuple",
    "ScaleModule",
    "Slicing",
    "SumModule",
    "is_loss",
    "is_nll",
    "is_no_op",
]

Flatten = nn.Flatten


class SumModule(nn.Module):
    """Add tensors of the same shape."""

    def forward(self, *input: Tensor) -> Tensor:
        """The sum; shapes must agree (nothing is broadcast)."""
        shapes = [tuple(t.shape) for t in input]
        if len(set(shapes)) != 1:
            raise AssertionError(f"SumModule adds tensors of one shape, got {shapes}.")
        return sum(input[1:], input[0])


class _Branch(nn.Module):
    """Several modules on the same input."""

    def __init__(self, *args: Any) -> None:
        super().__init__()
        named = args[0].items() if len(args) == 1 and isinstance(args[0], OrderedDict) else enumerate(args)
        for name, module in named:
            self.add_module(str(name), module)

    def forward(self, input: Tensor) -> tuple[Any, ...]:
        """One output per module."""
        return tuple([module(input) for module in self.children()])


class Parallel(nn.Module):
    """Modules side by side on the same input, their outputs merged (added, unless ``merge_module`` says otherwise)."""

    def __init__(self, *args: Any, merge_module: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = _Branch(*args)
        self.merge = SumModule() if merge_module is None else merge_module

    def forward(self, input: Tensor) -> Tensor:
        """The merged outputs."""
        merged: Tensor = self.merge(*self.branch(input))
        return merged


class ScaleModule(nn.Module):
    """Multiply by a fixed number."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if not isinstance(weight, float):
            raise ValueError(f"weight must be a float, got {weight!r} of type {type(weight).__name__}.")
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        """The product."""
        return input * self.weight


class Pad(nn.Module):
    """``torch.nn.functional.pad`` as a module."""

    def __init__(self, pad: Sequence[int], mode: str = "constant", value: float = 0.0) -> None:
        super().__init__()
        self.pad, self.mode, self.value = pad, mode, value

    def forward(self, input: Tensor) -> Tensor:
        """The padded input."""
        return F.pad(input, list(self.pad), mode=self.mode, value=self.value)


class Slicing(nn.Module):
    """Index with fixed slices."""

    def __init__(self, slice_info: tuple[slice | int, ...]) -> None:
        super().__init__()
        self.slice_info = slice_info

    def forward(self, input: Tensor) -> Tensor:
        """The slice."""
        return input[self.slice_info]


class Permute(nn.Module):
    """Permute the axes after the first; with ``init_transpose`` the two ``dims`` are exchanged."""

    def __init__(self, *dims: int, init_transpose: bool = False) -> None:
        super().__init__()
        if (0 in dims) if init_transpose else (dims[0] != 0):
            raise ValueError(f"Permute keeps the sample axis 0 in its place, got dims {dims}.")
        self.dims = dims
        self.init_transpose = init_transpose

    def forward(self, input: Tensor) -> Tensor:
        """The permuted view."""
        return input.transpose(*self.dims) if self.init_transpose else input.permute(self.dims)


class ReduceTuple(nn.Module):
    """Choose one element of a tuple, such as the output of a recurrent layer."""

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.index = index

    def forward(self, input: tuple[Any, ...]) -> Any:
        """The element."""
        return input[self.index]


def is_loss(module: nn.Module) -> bool:
    """Whether a module is one of torch's losses."""
    return isinstance(module, _Loss)


def is_nll(module: nn.Module) -> bool:
    """Whether a module is a loss that is a negative log-likelihood."""
    return isinstance(module, (nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss))


def is_no_op(module: nn.Module) -> bool:
    """Whether a module does nothing but call others, or choose from what it gets."""
    return isinstance(module, (nn.Sequential, _Branch, Parallel, ReduceTuple, GraphModule))
