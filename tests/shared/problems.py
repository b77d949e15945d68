"""Models, data and losses on which every quantity is compared, with tags for the properties that they have.

Tags:
    linear: the output is linear in all parameters together.
    piecewise_linear: around almost every point the output is linear in each parameter entry by itself, so that the
        diagonals of the GGN and of the Hessian are the same.
    shared_weights: a parameter is used at several places.
    branching: the graph is no chain.
    plain: must run on the plain batch, without vmap over samples.
   : at least one parameter is used by an operation without a rule.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from architectures import (
    GPT,
    Frozen,
    Keywords,
    LastState,
    LowRank,
    Odd,
    Pooled,
    PositionsLast,
    Recurrent,
    ResNet,
    Scaled,
    SequenceFirst,
    Tied,
    Transformer,
    TwoInputs,
    nested_mlp,
)
from torch import Tensor, nn

import curvfunc

__all__ = ["PROBLEMS", "Instance", "Problem", "double", "tagged"]

N, C = 4, 3


class Instance(NamedTuple):
    """The first four arguments of every function, and the loss."""

    model_fn: Callable[[Any, Any], Tensor]
    params: Any
    X: Any
    y: Any
    loss_fn: Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """A recipe; ``make`` gives the same numbers at each call."""

    name: str
    model: Callable[[], Any]
    inputs: Callable[[], Any]
    targets: Callable[[], Any]
    loss: Callable[[], Callable[..., Tensor]]
    tags: frozenset[str]

    def make(self) -> Instance:
        """Draw parameters, inputs and targets in float64."""
        with double(), torch.random.fork_rng():
            torch.manual_seed(len(self.name) + sum(map(ord, self.name)))
            model = self.model()
            model_fn, params = curvfunc.functionalize(model) if isinstance(model, nn.Module) else model
            return Instance(model_fn, params, self.inputs(), self.targets(), self.loss())


PROBLEMS: dict[str, Problem] = {}


def tagged(*tags: str) -> list[str]:
    """Names of the problems that have all of ``tags``."""
    return [name for name, problem in PROBLEMS.items() if problem.tags.issuperset(tags)]


@contextmanager
def double() -> Iterator[None]:
    """float64 as the default type of new tensors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def uniform(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(shape)


def classes(*shape: int, num: int = C) -> Callable[[], Tensor]:
    return lambda: torch.randint(num, shape)


def probabilities(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape).softmax(1)


def add(
    name: str,
    model: Callable[[], Any],
    inputs: Callable[[], Any],
    tags: str = "",
    *,
    targets: Callable[[], Any] = classes(N),
    loss: Callable[[], Callable[..., Tensor]] = lambda: F.cross_entropy,
) -> None:
    assert name not in PROBLEMS
    PROBLEMS[name] = Problem(name, model, inputs, targets, loss, frozenset(tags.split()))


# --- linear layers ----------------------------------------------------------------------------------------------------


def mlp(bias: bool = True, outputs: int = C) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4, bias), nn.ReLU(), nn.Linear(4, outputs, bias))


add("linear", lambda: nn.Linear(5, C), normal(N, 5), "linear piecewise_linear plain")
add("linear, one sample", lambda: nn.Linear(5, C), normal(1, 5), "linear piecewise_linear plain", targets=classes(1))
add("mlp, one sample", mlp, normal(1, 5), "piecewise_linear plain", targets=classes(1))
add("mlp without biases", lambda: mlp(bias=False), normal(N, 5), "piecewise_linear plain")
add(
    "mlp, in-place and smooth",
    lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, C)),
    normal(N, 5),
    "plain",
)
add("as many features as samples", lambda: nn.Sequential(nn.Linear(N, N), nn.ReLU(), nn.Linear(N, N)), normal(N, N),
    "piecewise_linear plain", targets=classes(N, num=N))  # fmt: skip
add("shared axis", Pooled, normal(N, 3, 5), "piecewise_linear plain")
add("two shared axes", lambda: Pooled(axes=(1, 2)), normal(N, 2, 3, 5), "piecewise_linear plain")
add("shared axis as long as the batch", Pooled, normal(N, N, 5), "piecewise_linear plain")
add("sequence first", SequenceFirst, normal(N, 3, 5), "piecewise_linear")
add("sequence first, as long as the batch", SequenceFirst, normal(N, N, 5), "piecewise_linear")
add("tied weight", Tied, normal(N, 4), "shared_weights plain")
add("weight tied under two names", lambda: Tied(modules=2), normal(N, 4), "shared_weights plain")
add("recurrence written out", Recurrent, normal(N, 3, 2), "shared_weights branching plain")
add("two inputs of one layer", TwoInputs, lambda: (torch.randn(N, 5), torch.randn(N, 3, 5)),
    "shared_weights branching plain")  # fmt: skip

# --- losses -----------------------------------------------------------------------------------------------------------

CROSS_ENTROPIES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "cross-entropy, sum": (lambda: partial(F.cross_entropy, reduction="sum"), classes(N)),
    "cross-entropy, module": (nn.CrossEntropyLoss, classes(N)),
    "cross-entropy, weights": (lambda: nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0])), classes(N)),
    "cross-entropy, ignored": (
        lambda: nn.CrossEntropyLoss(ignore_index=1, weight=torch.tensor([0.5, 2.0, 1.0])),
        lambda: torch.tensor([0, 1, 2, 0]),
    ),
    "cross-entropy, ignored -100": (lambda: F.cross_entropy, lambda: torch.tensor([0, -100, 2, 1])),
    "cross-entropy, smoothed": (
        lambda: partial(F.cross_entropy, weight=torch.tensor([0.5, 2.0, 1.0]), label_smoothing=0.2),
        classes(N),
    ),
    "cross-entropy, probabilities": (lambda: F.cross_entropy, probabilities(N, C)),
    "cross-entropy, probabilities weighted, smoothed, sum": (
        lambda: nn.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.0]), reduction="sum", label_smoothing=0.1),
        probabilities(N, C),
    ),
}
OTHERS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "squared error": (lambda: F.mse_loss, normal(N, C)),
    "squared error, sum": (lambda: nn.MSELoss(reduction="sum"), normal(N, C)),
    "squared error, weights": (lambda: partial(F.mse_loss, weight=torch.arange(1.0, 13).reshape(N, C)), normal(N, C)),
    "bce": (lambda: F.binary_cross_entropy_with_logits, lambda: torch.randint(2, (N, C)).to(torch.get_default_dtype())),
    "bce, soft labels, sum": (lambda: nn.BCEWithLogitsLoss(reduction="sum"), uniform(N, C)),
    "bce, weights": (
        lambda: nn.BCEWithLogitsLoss(weight=torch.rand(N, 1), pos_weight=torch.tensor([0.5, 2.0, 1.0])),
        uniform(N, C),
    ),
    "custom, Poisson": (nn.PoissonNLLLoss, lambda: torch.poisson(torch.ones(N, C))),
    "custom, partial": (lambda: partial(_huber, weight=torch.rand(C), delta=2.0), normal(N, C)),
    "custom, deficient rank": (lambda: _square_of_sum, normal(N)),
    "custom, targets in a dict": (
        lambda: _weighted_error,
        lambda: {"target": torch.randn(N, C), "weight": torch.rand(N)},
    ),
}


def _square_of_sum(out: Tensor, y: Tensor) -> Tensor:
    """Its Hessian has rank one."""
    return (out.sum(1) - y).pow(4).mean()


def _huber(out: Tensor, y: Tensor, weight: Tensor, delta: float = 1.0) -> Tensor:
    return (weight * ((out - y) / delta).cosh().log()).sum() * delta


def _weighted_error(out: Tensor, y: dict[str, Tensor]) -> Tensor:
    return ((out - y["target"]).square().sum(1) * y["weight"]).sum() / 3


for _name, (_loss, _targets) in (CROSS_ENTROPIES | OTHERS).items():
    add(f"mlp: {_name}", mlp, normal(N, 5), "piecewise_linear plain", targets=_targets, loss=_loss)

add("output without features", lambda: nn.Sequential(mlp(outputs=1), nn.Flatten(0)), normal(N, 5),
    "piecewise_linear plain", targets=normal(N), loss=lambda: F.mse_loss)  # fmt: skip
add("output without features: bce", lambda: nn.Sequential(mlp(outputs=1), nn.Flatten(0)), normal(N, 5),
    "piecewise_linear plain", targets=uniform(N), loss=lambda: nn.BCEWithLogitsLoss(reduction="sum"))  # fmt: skip
add("output with axes", lambda: nn.Sequential(mlp(outputs=6), nn.Unflatten(1, (2, 3))), normal(N, 5),
    "piecewise_linear plain", targets=normal(N, 2, 3), loss=lambda: F.mse_loss)  # fmt: skip
add("classes at positions", lambda: PositionsLast(5, C), normal(N, 2, 5), "linear piecewise_linear plain",
    targets=classes(N, 2))  # fmt: skip
add("classes at pixels", lambda: nn.Conv2d(2, C, 2), normal(N, 2, 3, 3), "linear piecewise_linear plain",
    targets=lambda: torch.randint(C, (N, 2, 2)).index_fill(0, torch.tensor(1), -100),
    loss=lambda: nn.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.0]), label_smoothing=0.1))  # fmt: skip

# --- convolutions -----------------------------------------------------------------------------------------------------


def convnet(conv: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(conv(), nn.LeakyReLU(inplace=True), nn.Flatten(), nn.LazyLinear(C))


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 2), (2, 5)),
    "conv1d, stride, padding, dilation": (lambda: nn.Conv1d(2, 3, 2, stride=2, padding=1, dilation=2), (2, 6)),
    "conv1d, same": (lambda: nn.Conv1d(2, 3, 4, padding="same"), (2, 5)),
    "conv1d, circular": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4)),
    "conv1d, as many channels and positions as samples": (lambda: nn.Conv1d(N, N, 1), (N, N)),
    "conv1d, kernel 1, stride": (lambda: nn.Conv1d(2, 3, 1, stride=2, bias=False), (2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 2), (2, 3, 4)),
    "conv2d, stride, padding, dilation": (
        lambda: nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        (2, 4, 4),
    ),
    "conv2d, valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (2, 3, 3)),
    "conv2d, same, even kernel": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(1, 2)), (2, 3, 4)),
    "conv2d, reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 3, 3)),
    "conv2d, replicate, same": (lambda: nn.Conv2d(2, 3, 2, padding="same", padding_mode="replicate"), (2, 3, 3)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 2, groups=2), (4, 3, 3)),
    "conv2d, depthwise, no bias": (lambda: nn.Conv2d(3, 6, 2, groups=3, bias=False), (3, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 3)),
    "conv3d, stride, padding, dilation": (
        lambda: nn.Conv3d(1, 2, (2, 1, 2), stride=(1, 2, 1), padding=(1, 0, 1), dilation=(1, 1, 2)),
        (1, 2, 3, 3),
    ),
    "conv3d, same, groups": (lambda: nn.Conv3d(2, 4, (1, 2, 2), padding="same", groups=2), (2, 1, 2, 3)),
}
for _name, (_conv, _shape) in CONVOLUTIONS.items():
    add(_name, lambda make=convnet(_conv), shape=_shape: _initialized(make(), shape), normal(N, *_shape),
        "piecewise_linear plain")  # fmt: skip


def _initialized(net: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """With the sizes of its lazy layers."""
    net(torch.zeros(1, *shape))
    return net


add(
    "two blocks of convolutions",
    lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(2, 3, 2), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, C),
    ),
    normal(N, 1, 6, 6),
    "piecewise_linear plain",
)  # fmt: skip

# --- other layers, and architectures ----------------------------------------------------------------------------------

add("layer norm", lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, C)), normal(N, 5))
add("group norm and transposed convolution",
    lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 2), nn.GroupNorm(2, 4), nn.PReLU(), nn.Flatten(), nn.Linear(36, C)),
    normal(N, 2, 2, 2))  # fmt: skip


def batch_norm() -> nn.Module:
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(9, C))
    net(torch.randn(8, 2, 4) * 2 + 1)  # statistics other than 0 and 1
    return net.eval()


add("batch norm in evaluation", batch_norm, normal(N, 2, 4))
add("dropout in evaluation", lambda: nn.Sequential(nn.Linear(5, 4), nn.Dropout(), nn.Linear(4, C)).eval(),
    normal(N, 5), "piecewise_linear plain")  # fmt: skip
add("scales", Scaled, normal(N, 5), "branching")
add("low-rank update", LowRank, normal(N, 5), "shared_weights branching")
add("a parameter that is not used", Odd, normal(N, 5))
add("frozen parameters", Frozen, normal(N, 5), "piecewise_linear plain")
add("nested parameters", nested_mlp, normal(N, 5), "piecewise_linear plain")
add("matrix products without modules",
    lambda: ((lambda p, X: (X @ p["w"]).tanh() @ p["w"].T[:, :C]), {"w": torch.randn(5, 4)}), normal(N, 5),
    "shared_weights")  # fmt: skip
add("keyword inputs", Keywords, lambda: {"ids": torch.randint(6, (N, 3)), "mask": torch.tensor([[1, 1, 0]]).repeat(N, 1)},
)  # fmt: skip
add("resnet", ResNet, normal(2, 1, 6, 6), "branching", targets=classes(2))
add("gpt", GPT, lambda: torch.randint(6, (2, 3)), "shared_weights branching", targets=classes(2, 3, num=6))
add("lstm", lambda: LastState(nn.LSTM(2, 2, batch_first=True)), normal(N, 3, 2), "shared_weights")
add("lstm, sequence first, as long as the batch", lambda: LastState(nn.LSTM(2, 2), transpose=True), normal(N, N, 2),
    "shared_weights")  # fmt: skip
add("gru", lambda: LastState(nn.GRU(2, 2, batch_first=True)), normal(N, 3, 2), "shared_weights")
add("transformer, sequence first, as long as the batch", Transformer, normal(3, 3, 4), "branching",
    targets=classes(3))  # fmt: skip
add("transformer, batch first", lambda: Transformer(batch_first=True), normal(2, 3, 4), "branching",
    targets=classes(2))  # fmt: skip
