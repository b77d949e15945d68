"""Random networks, composed from a grammar, against the reference: no architecture may give a wrong number silently.

What flows is a sequence [N, T, D] per sample. Each piece of the grammar takes one and returns one of the same shape, so
pieces nest and follow each other in any order; N, T and D are often equal, so that sizes do not tell the axes apart.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvfunc import BatchGrad, BatchL2, DiagGGN, compute, functionalize, reference

pytestmark = pytest.mark.usefixtures("float64")


class Shape(NamedTuple):
    """T positions of D features."""

    t: int
    d: int


class Map(nn.Module):
    """A function of a sequence and of modules."""

    def __init__(self, apply: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.apply_to, self.inner = apply, nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_to(x, *self.inner)


class Scale(nn.Module):
    """A learned factor and summand of each feature, or of each position and feature."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(1 + 0.3 * torch.randn(shape)), nn.Parameter(0.3 * torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Heads(nn.Module):
    """Self-attention with two heads over the second axis."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 6, bias=False), nn.Linear(2, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Token(nn.Module):
    """A learned token in front, expanded to the batch, a mixing layer over positions, and the token off again."""

    def __init__(self, t: int, d: int, batch_axis: bool) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, d) if batch_axis else torch.randn(d))
        self.mix = nn.Linear(t + 1, t)

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.expand(len(x), 1, -1)
        return self.mix(torch.cat([token, x], dim=1).mT).mT


class Latents(nn.Module):
    """Learned queries, one per position, pass a layer before they meet the samples in attention."""

    def __init__(self, t: int, d: int) -> None:
        super().__init__()
        self.queries, self.project = nn.Parameter(torch.randn(t, d)), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.project(self.queries) @ x.mT
        return scores.softmax(-1) @ x


class Made(nn.Module):
    """A linear layer whose weight comes from other parameters: low rank added, halves, a transpose, a norm."""

    def __init__(self, d: int, how: str) -> None:
        super().__init__()
        self.weight, self.other, self.how = nn.Parameter(torch.randn(2 * d, d)), nn.Parameter(torch.randn(d, 1)), how

    def forward(self, x: Tensor) -> Tensor:
        upper, lower = self.weight.chunk(2)
        if self.how == "low_rank":
            return F.linear(x, upper + self.other @ self.other.t())
        if self.how == "normalized":
            return F.linear(x, F.normalize(lower, dim=1) * self.other, upper.sum(1))
        return F.linear(torch.tanh(x @ self.weight.t()), self.weight.t())


class Hyper(nn.Module):
    """The mean over time makes each sample a matrix of its own, added to a shared one."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.make, self.base = nn.Linear(d, d * d), nn.Parameter(torch.randn(d, d))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.base + torch.tanh(self.make(x.mean(1))).unflatten(1, self.base.shape))


class OwnKernel(nn.Module):
    """Each sample has a convolution of its own, by groups; the bias is shared."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.make, self.bias = nn.Linear(d, 3 * d), nn.Parameter(torch.randn(d))

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        kernels = self.make(x.mean(1)).view(n * d, 1, 3)
        h = F.conv1d(x.mT.reshape(1, n * d, t), kernels, self.bias.repeat(n), padding=1, groups=n * d)
        return h.view(n, d, t).mT


# -- pieces: functions of the shape and of inner networks


def fold(x: Tensor, inner: nn.Module) -> Tensor:
    """Positions become samples of an inner network over features alone, [N T, 1, D]."""
    n, t, d = x.shape
    return inner(x.reshape(n * t, 1, d)).view(n, t, d)


def windows(x: Tensor, inner: nn.Module, size: int) -> Tensor:
    """Windows of the sequence become samples."""
    n, t, d = x.shape
    return inner(x.reshape(n * t // size, size, d)).reshape(n, t, d)


def sequence_first(x: Tensor, inner: nn.Module) -> Tensor:
    """The inner network, which acts on each entry of the first two axes alone, sees [T, N, D]."""
    return inner(x.transpose(0, 1)).transpose(0, 1)


def centered(x: Tensor, inner: nn.Module) -> Tensor:
    """What the inner network says of the mean over time goes to all positions."""
    return x + inner(x.mean(1, keepdim=True).expand(-1, x.shape[1], -1))


LEAVES: dict[str, Callable[[Shape], nn.Module]] = {
    "linear": lambda s: nn.Linear(s.d, s.d),
    "bottleneck": lambda s: nn.Sequential(nn.Linear(s.d, 2, bias=False), nn.Tanh(), nn.Linear(2, s.d)),
    "conv": lambda s: Map(lambda x, conv: conv(x.mT).mT, nn.Conv1d(s.d, s.d, 3, padding=1)),
    "tanh": lambda s: nn.Tanh(),
    "silu_in_place": lambda s: Map(lambda x: F.silu(x.clone(), inplace=True)),
    "layer_norm": lambda s: nn.LayerNorm(s.d),
    "scale": lambda s: Scale(s.d),
    "positions": lambda s: Scale(s.t, s.d),
    "attention": lambda s: Heads(s.d),
    "token": lambda s: Token(s.t, s.d, batch_axis=True),
    "token_without_batch_axis": lambda s: Token(s.t, s.d, batch_axis=False),
    "latents": lambda s: Latents(s.t, s.d),
    "low_rank": lambda s: Made(s.d, "low_rank"),
    "normalized": lambda s: Made(s.d, "normalized"),
    "tied": lambda s: Made(s.d, "tied"),
    "hyper": lambda s: Hyper(s.d),
    "own_kernel": lambda s: OwnKernel(s.d),
    "mix_time": lambda s: Map(lambda x, linear: linear(x.mT).mT, nn.Linear(s.t, s.t)),
    "gru": lambda s: Map(lambda x, gru: gru(x)[0], nn.GRU(s.d, s.d, batch_first=True)),
}
# What acts on each position alone, and may stand where other axes than the samples' come first.
POINTWISE = ("linear", "bottleneck", "tanh", "layer_norm", "scale")

UNARY: dict[str, Callable[[Shape, nn.Module], nn.Module]] = {
    "skip": lambda s, f: Map(lambda x, f: x + f(x), f),
    "skip_in_place": lambda s, f: Map(lambda x, f: f(x).clone().add_(x), f),
    "share": lambda s, f: Map(lambda x, f: f(torch.tanh(f(x))), f),
    "center": lambda s, f: Map(centered, f),
    "flip": lambda s, f: Map(lambda x, f: f(x.flip(1)), f),
}
BINARY: dict[str, Callable[[Shape, nn.Module, nn.Module], nn.Module]] = {
    "follow": lambda s, f, g: nn.Sequential(f, g),
    "concatenate": lambda s, f, g: Map(
        lambda x, f, g, join: join(torch.cat([f(x), g(x)], dim=2)), f, g, nn.Linear(2 * s.d, s.d)
    ),
    "multiply": lambda s, f, g: Map(lambda x, f, g: f(x) * torch.sigmoid(g(x)), f, g),
    "half_each": lambda s, f, g: Map(lambda x, f, g: torch.where(torch.arange(x.shape[1])[:, None] % 2 == 0, f(x), g(x)), f, g),
}


@st.composite
def networks(draw: st.DrawFn, shape: Shape, depth: int, leaves: tuple[str, ...] = tuple(LEAVES)) -> nn.Module:
    """A network on sequences of that shape."""
    kind = draw(st.sampled_from(["leaf", "unary", "binary", "fold", "transposed"])) if depth else "leaf"
    if kind == "leaf":
        return LEAVES[draw(st.sampled_from(leaves))](shape)
    if kind == "unary":
        return UNARY[draw(st.sampled_from(list(UNARY)))](shape, draw(networks(shape, depth - 1, leaves)))
    if kind == "binary":
        parts = draw(networks(shape, depth - 1, leaves)), draw(networks(shape, depth - 1, leaves))
        return BINARY[draw(st.sampled_from(list(BINARY)))](shape, *parts)
    if kind == "transposed":
        return Map(sequence_first, LEAVES[draw(st.sampled_from(POINTWISE))](shape))
    size = draw(st.sampled_from([k for k in range(1, shape.t + 1) if shape.t % k == 0]))
    inner = draw(networks(Shape(size, shape.d), depth - 1, leaves))
    return Map(fold, inner) if size == 1 else Map(lambda x, f: windows(x, f, size), inner)


@st.composite
def problems(draw: st.DrawFn) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with a head, input and labels."""
    n, t, d = (draw(st.sampled_from(sizes)) for sizes in ([3, 2, 1], [3, 4, 2], [3, 4]))
    torch.manual_seed(draw(st.integers(0, 3)))
    body = nn.Sequential(draw(networks(Shape(t, d), 2)), draw(networks(Shape(t, d), 1)))
    pool = draw(st.sampled_from([lambda x: x.mean(1), lambda x: x[:, -1], lambda x: x.flatten(1)]))
    features = pool(torch.zeros(1, t, d)).shape[1]
    net = nn.Sequential(nn.Linear(2, d), body, Map(lambda x, head: head(pool(x)), nn.Linear(features, 3)))
    return net, torch.randn(n, t, 2), torch.randint(3, (n,))


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems())
def test_any_composition_is_right(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, X, y = problem
    model_fn, params = functionalize(net)
    grads, norms, diagonal = compute(model_fn, params, X, y, (BatchGrad(), BatchL2(), DiagGGN()))
    want = reference.batch_grad(model_fn, params, X, y)
    close(grads, want)
    close(norms, {k: g.reshape(len(g), -1).square().sum(1) for k, g in want.items()})
    close(diagonal, reference.diag_ggn(model_fn, params, X, y))


def close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Equal to 1e-10 of each leaf's norm, or to rounding of the largest leaf.

    A bias in front of a norm has no influence: its gradient is rounding, and that is no yardstick.
    """
    rounding = 1e-14 * max(w.norm() for w in want.values())
    for name, w in want.items():
        assert got[name].shape == w.shape
        error = (got[name] - w).norm()
        assert error <= 1e-10 * w.norm() + rounding, f"{name}: error {error:.1e} of {w.norm():.1e}"
