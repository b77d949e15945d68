"""The networks that the benchmarks run, each with its input, its targets and the size of its batches."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, LENGTH = 65, 64  # of the language model


@dataclass(frozen=True)
class Net:
    """How to make a module and, for N samples, its input and its targets; the batch is smaller on CPU."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    targets: Callable[[int], Tensor]
    batch: int
    cuda_batch: int


def mlp() -> nn.Module:
    """784-256-256-10 with ReLU."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def logistic() -> nn.Module:
    """Logistic regression on 784 features."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def cnn_2c2d() -> nn.Module:
    """Two convolutions and two linear layers, as DeepOBS has it for Fashion-MNIST."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2, 2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2, 2)),
        *(nn.Flatten(), nn.Linear(3136, 1024), nn.ReLU(), nn.Linear(1024, 10)),
    )


def cnn_3c3d() -> nn.Module:
    """Three convolutions and three linear layers, as DeepOBS has it for CIFAR-10."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 5), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.Conv2d(64, 96, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.Conv2d(96, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)),
        *(nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


def all_cnn_c() -> nn.Module:
    """All-CNN-C for CIFAR-100 (Springenberg et al. 2015), without dropout."""
    return nn.Sequential(
        *(nn.Conv2d(3, 96, 3, padding=1), nn.ReLU(), nn.Conv2d(96, 96, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(96, 96, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(96, 192, 3, padding=1), nn.ReLU(), nn.Conv2d(192, 192, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(192, 192, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(192, 192, 3), nn.ReLU(), nn.Conv2d(192, 192, 1), nn.ReLU(), nn.Conv2d(192, 100, 1), nn.ReLU()),
        *(nn.AvgPool2d(6), nn.Flatten()),
    )


class Residual(nn.Module):
    """Two convolutions with normalization, added to a shortcut."""

    def __init__(self, channels: int, out: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), norm(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), norm(out)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), norm(out))

    def forward(self, x: Tensor) -> Tensor:
        """Add the block to its input."""
        return self.relu2(self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x))))) + self.shortcut(x))


def resnet18(norm: Callable[[int], nn.Module]) -> nn.Module:
    """ResNet-18 for inputs of 32x32: a stem of one 3x3 convolution, no pooling after it."""
    sizes = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
    blocks = [block for a, b, s in sizes for block in (Residual(a, b, s, norm), Residual(b, b, 1, norm))]
    stem = (nn.Conv2d(3, 64, 3, padding=1, bias=False), norm(64), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(512, 10))


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.mix = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] to the same."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.mix(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(width), nn.LayerNorm(width), Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A character-level language model; its head is not tied to the embedding."""

    def __init__(self, layers: int = 6, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [N, V, T] of the next token, from tokens [N, T]."""
        # positions once per sample, not once for all: hooks of layers, as Opacus has them, need a batch axis
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(positions)))).transpose(1, 2)


def tiny() -> nn.Module:
    """4-16-16-2: overhead is all there is."""
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def _uniform(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.rand(n, *shape)


def _below(limit: int, *shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(limit, (n, *shape))


NETS: dict[str, Net] = {
    "logistic": Net(logistic, _uniform(1, 28, 28), _below(10), 512, 128),
    "784-256-256-10": Net(mlp, _uniform(1, 28, 28), _below(10), 128, 128),
    "2C2D": Net(cnn_2c2d, _uniform(1, 28, 28), _below(10), 32, 128),
    "3C3D": Net(cnn_3c3d, _uniform(3, 32, 32), _below(10), 32, 128),
    "All-CNN-C": Net(all_cnn_c, _uniform(3, 32, 32), _below(100), 4, 64),
    "ResNet-18-GN": Net(lambda: resnet18(lambda c: nn.GroupNorm(32, c)), _uniform(3, 32, 32), _below(10), 8, 128),
    "ResNet-18-BN": Net(lambda: resnet18(nn.BatchNorm2d), _uniform(3, 32, 32), _below(10), 8, 128),  # evaluation mode
    "GPT": Net(GPT, _below(VOCABULARY, LENGTH), _below(VOCABULARY, LENGTH), 8, 64),
    "tiny": Net(tiny, _uniform(4), _below(2), 8, 8),
}


class Last(nn.Module):
    """A recurrent layer, of which the output at the last position goes on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] to [N, width]."""
        return self.layer(x)[0][:, -1]


class SelfAttention(nn.Module):
    """Torch's own layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] to the same."""
        return self.layer(x, x, x, need_weights=False)[0]


def _layer(make: Callable[[], nn.Module], *shape: int, tokens: int = 0) -> Net:
    """One layer, with an activation, pooling and a linear layer after it."""

    def net() -> nn.Module:
        pool = nn.AvgPool2d(4) if len(shape) == 3 else nn.Identity()
        model = nn.Sequential(make(), nn.ReLU(), pool, nn.Flatten(), nn.LazyLinear(10))
        with torch.no_grad():
            model(inputs(1))
        return model

    inputs = _below(tokens, *shape) if tokens else _uniform(*shape)
    return Net(net, inputs, _below(10), 32, 128)


# Single layers, to find those that take longer than they should: ``--nets layers``.
LAYERS: dict[str, Net] = {
    "linear over positions": _layer(lambda: nn.Linear(64, 256), 32, 64),
    "convolution 1x1": _layer(lambda: nn.Conv2d(64, 64, 1), 64, 16, 16),
    "convolution 3x3": _layer(lambda: nn.Conv2d(64, 64, 3, padding=1), 64, 16, 16),
    "convolution, stride 2": _layer(lambda: nn.Conv2d(64, 64, 3, 2, 1), 64, 16, 16),
    "convolution, dilation 2": _layer(lambda: nn.Conv2d(64, 64, 3, padding=2, dilation=2), 64, 16, 16),
    "convolution, 8 groups": _layer(lambda: nn.Conv2d(64, 64, 3, padding=1, groups=8), 64, 16, 16),
    "convolution, 32 groups": _layer(lambda: nn.Conv2d(64, 64, 3, padding=1, groups=32), 64, 16, 16),
    "convolution, depthwise": _layer(lambda: nn.Conv2d(64, 64, 3, padding=1, groups=64), 64, 16, 16),
    "convolution 1d": _layer(lambda: nn.Conv1d(32, 64, 5, padding=2), 32, 64),
    "convolution 3d": _layer(lambda: nn.Conv3d(8, 16, 3, padding=1), 8, 8, 8, 8),
    "transposed 2x2": _layer(lambda: nn.ConvTranspose2d(64, 32, 2, 2), 64, 16, 16),
    "transposed 4x4": _layer(lambda: nn.ConvTranspose2d(64, 32, 4, 2, 1), 64, 16, 16),
    "batch norm": _layer(lambda: nn.BatchNorm2d(64), 64, 16, 16),  # evaluation mode
    "group norm": _layer(lambda: nn.GroupNorm(8, 64), 64, 16, 16),
    "layer norm": _layer(lambda: nn.LayerNorm(64), 32, 64),
    "PReLU": _layer(lambda: nn.PReLU(64), 64, 16, 16),
    "embedding": _layer(lambda: nn.Embedding(1000, 64), 32, tokens=1000),
    "RNN": _layer(lambda: Last(nn.RNN(64, 64, batch_first=True)), 32, 64),
    "LSTM": _layer(lambda: Last(nn.LSTM(64, 64, batch_first=True)), 32, 64),
    "GRU": _layer(lambda: Last(nn.GRU(64, 64, batch_first=True)), 32, 64),
    "attention": _layer(lambda: SelfAttention(64, 4), 32, 64),
}
