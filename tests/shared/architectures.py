"""The modules of the test problems: small, and each with something that makes per-sample quantities difficult."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C = 3  # classes


class Pooled(nn.Module):
    """Linear layers on shared positions, averaged before the last layer."""

    def __init__(self, axes: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.axes, self.inner, self.middle, self.head = axes, nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.inner(x).relu()).mean(self.axes))


class SequenceFirst(nn.Module):
    """The same with time in front of the samples inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.middle, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.inner(x.transpose(0, 1)).relu()).mean(0))


class PositionsLast(nn.Module):
    """One linear layer with classes for each position, in cross-entropy's order of axes."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).transpose(1, 2)


class Tied(nn.Module):
    """One weight at two layers, in one module or in two."""

    def __init__(self, modules: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first if modules == 1 else nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class Recurrent(nn.Module):
    """A recurrent network, one step after another."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.again, self.head = nn.Linear(2, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, C)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 3)
        for step in x.unbind(1):
            state = torch.tanh(self.into(step) + self.again(state))
        return self.head(state)


class TwoInputs(nn.Module):
    """One layer on inputs with and without a shared axis."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(5, 4), nn.Linear(4, C)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.head(self.shared(x).tanh() * self.shared(z).mean(1))


class Scaled(nn.Module):
    """Parameters as scales, shifts and temperatures, one of them without axes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.temperature = nn.Parameter(torch.rand(5) + 0.5), nn.Parameter(torch.tensor(0.7))
        self.shift, self.linear = nn.Parameter(torch.randn(C)), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.scale) * self.temperature + self.shift * x[:, :1]


class LowRank(nn.Module):
    """A linear layer whose weight is W + B A, with A and B used a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, C)
        self.a, self.b = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(C, 2))

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(x, self.linear.weight + self.b @ self.a, self.linear.bias)
        return z + F.linear(F.linear(x, self.a).tanh(), self.b)


class Odd(nn.Module):
    """A weight outside of layers, and parameters that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.weight = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5, C))
        self.unused, self.dead = nn.Parameter(torch.randn(2, 2)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.dead(x)
        return (x * self.scale).relu() @ self.weight


class Frozen(nn.Module):
    """One layer of three is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fixed, self.last = nn.Linear(5, 4), nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fixed(self.first(x).relu()).relu())


class Keywords(nn.Module):
    """Named inputs, one of them integer indices."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, C)

    def forward(self, *, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head((self.embedding(ids) * mask.unsqueeze(-1)).tanh().sum(1))


def nested_mlp() -> tuple[Callable[[Any, Tensor], Tensor], Any]:
    """A function of parameters in lists, tuples and dictionaries."""

    def model_fn(params: Any, X: Tensor) -> Tensor:
        for weight, bias in params["layers"]:
            X = F.linear(X, weight, bias).relu()
        return F.linear(X, params["head"]["weight"])

    sizes = [(4, 5), (4, 4)]
    layers = [(torch.randn(size), torch.randn(size[0])) for size in sizes]
    return model_fn, {"layers": layers, "head": {"weight": torch.randn(C, 4)}}


class Block(nn.Module):
    """A residual block with in-place activations, and a projection where the shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2, self.act = nn.GroupNorm(1, outputs), nn.GroupNorm(1, outputs), nn.ReLU(inplace=True)
        self.down = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        out += self.down(x)
        return self.act(out)


class ResNet(nn.Module):
    """Stem, four stages of two residual blocks, mean over pixels, linear layer: a narrow ResNet-18."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.GroupNorm(1, 2), nn.ReLU(inplace=True))
        stages = [(Block(2, 2, stride), Block(2, 2, 1)) for stride in (1, 2, 1, 2)]
        self.stages = nn.Sequential(*[block for stage in stages for block in stage])
        self.head = nn.Linear(2, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class GPT(nn.Module):
    """Embedding, positions, a block with causal attention and a feed-forward layer, and a head tied to the embedding."""

    def __init__(self, vocabulary: int = 6, width: int = 4, length: int = 3, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(length, width))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.mix(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm3(x)).transpose(1, 2)  # [N, vocabulary, T], as cross-entropy wants it


class LastState(nn.Module):
    """The output of a recurrent layer at the last step, and a linear layer."""

    def __init__(self, recurrent: nn.Module, transpose: bool = False) -> None:
        super().__init__()
        self.recurrent, self.transpose, self.head = recurrent, transpose, nn.Linear(2, C)

    def forward(self, x: Tensor) -> Tensor:
        if self.transpose:
            return self.head(self.recurrent(x.transpose(0, 1))[0][-1])
        return self.head(self.recurrent(x)[0][:, -1])


class Transformer(nn.Module):
    """nn.TransformerEncoder, which takes the sequence first by default."""

    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=batch_first)
        self.batch_first = batch_first
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_first:
            return self.head(self.encoder(x).mean(1))
        return self.head(self.encoder(x.transpose(0, 1)).mean(0))
