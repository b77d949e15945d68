"""What an architecture of the zoo is, and the dictionary that lists them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvfunc import functionalize

__all__ = ["ZOO", "Problem", "architecture", "classes", "noise"]


class Problem(NamedTuple):
    """A model in float64 with data and a loss.

    Attributes:
        model_fn: ``(params, X) -> output``.
        params: ``{name: tensor}``.
        X: Input.
        y: Targets.
        loss_fn: ``(output, y) -> scalar``.
        fast: Names of the parameters of linear, convolution, norm, embedding, scale and recurrent layers: every one of
            them must have a rule.
    """

    model_fn: Callable[[Any, Any], Tensor]
    params: dict[str, Tensor]
    X: Any
    y: Tensor
    loss_fn: Callable[[Tensor, Any], Tensor]
    fast: frozenset[str]


ZOO: dict[str, Callable[[], Problem]] = {}


def architecture(
    name: str,
    *,
    loss_fn: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    output_fn: Callable[[Any], Tensor] | None = None,
    train: bool = False,
    without_rule: tuple[str, ...] = (),
) -> Callable[[Callable[[], tuple[nn.Module, Any, Tensor]]], Any]:
    """Register a function that makes a module, its input and targets, as ``ZOO[name]``.

    The module is put into evaluation mode unless ``train``, and all parameters and statistics are moved by a little
    noise: none is left at zero or one, where errors could hide. ``without_rule`` names parameters not in ``fast``.
    """

    def register(make: Callable[[], tuple[nn.Module, Any, Tensor]]) -> Callable[[], tuple[nn.Module, Any, Tensor]]:
        def problem() -> Problem:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                before = torch.get_default_dtype()
                torch.set_default_dtype(torch.float64)
                try:
                    module, X, y = make()
                    _perturb(module.train(train))
                finally:
                    torch.set_default_dtype(before)
            model_fn, params = functionalize(module, output_fn)
            return Problem(model_fn, params, X, y, loss_fn, frozenset(params.keys() - set(without_rule)))

        assert name not in ZOO
        ZOO[name] = problem
        return make

    return register


def _perturb(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn_like(p)
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                norm.running_mean += 0.3 * torch.randn_like(norm.running_mean)
                norm.running_var *= 0.5 + torch.rand_like(norm.running_var)


def noise(*shape: int) -> Tensor:
    """Input from a normal distribution."""
    return torch.randn(*shape, dtype=torch.float64)


def classes(samples: int, number: int, *positions: int) -> Tensor:
    """Labels 0 ... number - 1, random."""
    return torch.randint(number, (samples, *positions))
