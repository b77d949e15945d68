"""Networks of convolutions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import architecture, classes, noise

Made = tuple[nn.Module, object, Tensor]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside the identity, or a 1x1 convolution where the shape changes (He et al. 2016)."""

    def __init__(self, c: int, o: int, stride: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, o, 3, stride, padding=1, bias=False)
        self.norm1 = norm(o)
        self.conv2 = nn.Conv2d(o, o, 3, padding=1, bias=False)
        self.norm2 = norm(o)
        same = stride == 1 and c == o
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(c, o, 1, stride, bias=False), norm(o))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)), inplace=True)
        h = self.norm2(self.conv2(h))
        h += self.shortcut(x)
        return F.relu(h, inplace=True)


class GroupNorm2(nn.GroupNorm):
    """Group normalization with two groups."""

    def __init__(self, channels: int) -> None:
        super().__init__(2, channels)


def resnet(norm: type[nn.Module]) -> nn.Module:
    stem = (nn.Conv2d(2, 4, 3, padding=1, bias=False), norm(4), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    blocks = (ResidualBlock(4, 4, 1, norm), ResidualBlock(4, 6, 2, norm))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


@architecture("resnet_batchnorm")
def _() -> Made:
    return resnet(nn.BatchNorm2d), noise(4, 2, 8, 8), classes(4, 3)


@architecture("resnet_groupnorm")
def _() -> Made:
    return resnet(GroupNorm2), noise(4, 2, 8, 8), classes(4, 3)


class WideBlock(nn.Module):
    """Norm and activation before each convolution and the shortcut (Zagoruyko & Komodakis 2016)."""

    def __init__(self, c: int, o: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(c), nn.BatchNorm2d(o)
        self.conv1 = nn.Conv2d(c, o, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(o, o, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(c, o, 1, bias=False) if c != o else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.norm1(x).relu()
        skip = x if self.shortcut is None else self.shortcut(a)
        return skip + self.conv2(self.norm2(self.conv1(a)).relu_())


@architecture("wide_resnet")
def _() -> Made:
    body = (nn.Conv2d(2, 3, 3, padding=1, bias=False), WideBlock(3, 6), WideBlock(6, 6), nn.BatchNorm2d(6), nn.ReLU())
    return nn.Sequential(*body, nn.AvgPool2d(6), nn.Flatten(), nn.Linear(6, 4)), noise(3, 2, 6, 6), classes(3, 4)


class DenseLayer(nn.Module):
    """Each layer sees all earlier ones' features (Huang et al. 2017)."""

    def __init__(self, c: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(c), nn.Conv2d(c, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], dim=1)


@architecture("densenet")
def _() -> Made:
    transition = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False), nn.AvgPool2d(2))
    dense = (nn.Conv2d(2, 2, 3, padding=1), DenseLayer(2, 2), DenseLayer(4, 2), transition, DenseLayer(4, 2))
    net = nn.Sequential(*dense, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return net, noise(4, 2, 6, 6), classes(4, 3)


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, project; linear at the end (MobileNetV2, Sandler et al. 2018)."""

    def __init__(self, c: int, o: int, stride: int, expand: int = 2) -> None:
        super().__init__()
        h = c * expand
        self.skip = stride == 1 and c == o
        self.body = nn.Sequential(
            *(nn.Conv2d(c, h, 1, bias=False), nn.BatchNorm2d(h), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(h, h, 3, stride, padding=1, groups=h, bias=False), nn.BatchNorm2d(h), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(h, o, 1, bias=False), nn.BatchNorm2d(o)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skip else self.body(x)


@architecture("mobilenet")
def _() -> Made:
    stem = (nn.Conv2d(2, 3, 3, 2, padding=1, bias=False), nn.BatchNorm2d(3), nn.Hardswish(inplace=True))
    blocks = (InvertedResidual(3, 3, 1), InvertedResidual(3, 4, 2))
    net = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return net, noise(4, 2, 8, 8), classes(4, 3)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 (here 3x3), LayerNorm and MLP with channels last, LayerScale (Liu et al. 2022)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.norm = nn.LayerNorm(c, eps=1e-6)
        self.up, self.down = nn.Linear(c, 2 * c), nn.Linear(2 * c, c)
        self.scale = nn.Parameter(torch.full((c,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.depthwise(x).permute(0, 2, 3, 1)
        h = self.scale * self.down(F.gelu(self.up(self.norm(h))))
        return x + h.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Patches, two blocks, mean over space, norm, head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(2, 4, 2, 2), nn.Sequential(ConvNeXtBlock(4), ConvNeXtBlock(4))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x)).mean([-2, -1])))


@architecture("convnext")
def _() -> Made:
    return ConvNeXt(), noise(4, 2, 8, 8), classes(4, 3)


class UNet(nn.Module):
    """Down, up by a transposed convolution, features of the way down beside (Ronneberger et al. 2015).

    With ``labels``, an embedding of the class scales and shifts the features in the middle (as diffusion models do it).
    """

    def __init__(self, labels: int = 0) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(inplace=True))
        self.middle = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.GroupNorm(2, 4))
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.join = nn.Sequential(nn.Conv2d(4, 2, 3, padding=1), nn.SiLU(), nn.Conv2d(2, 1, 1))
        self.labels = nn.Embedding(labels, 5) if labels else None
        self.modulate = nn.Linear(5, 8) if labels else None

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        skip = self.down(x)
        h = self.middle(F.max_pool2d(skip, 2))
        if self.labels is not None:
            scale, shift = self.modulate(F.silu(self.labels(label)))[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return self.join(torch.cat([self.up(F.silu(h)), skip], dim=1))


@architecture("unet", loss_fn=F.binary_cross_entropy_with_logits)
def _() -> Made:
    return UNet(), noise(3, 1, 4, 4), torch.rand(3, 1, 4, 4).round()


@architecture("unet_conditional", loss_fn=F.mse_loss)
def _() -> Made:
    return UNet(labels=3), {"x": noise(3, 1, 4, 4), "label": torch.tensor([1, 1, 2])}, noise(3, 1, 4, 4)


class SqueezeExcite(nn.Module):
    """Channels are weighted by what they hold on average (Hu et al. 2018)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(c, c, 3, padding=1), nn.Linear(c, 2), nn.Linear(2, c)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        n, c, _, _ = h.shape
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(h, 1).view(n, c)))))
        return x + h * gate.view(n, c, 1, 1)


@architecture("squeeze_excite")
def _() -> Made:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), SqueezeExcite(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    return net, noise(3, 1, 6, 6), classes(3, 3)


class Pyramid(nn.Module):
    """One convolution reads several resolutions of the image (the shared heads of Lin et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.lateral, self.head, self.out = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.lateral(x)
        coarse = F.avg_pool2d(fine, 2)
        merged = fine + F.interpolate(coarse, scale_factor=2, mode="nearest")
        levels = [F.relu(self.head(level)).amax((2, 3)) for level in (merged, coarse, F.avg_pool2d(coarse, 2))]
        return self.out(torch.stack(levels).sum(0))


@architecture("conv_at_several_resolutions")
def _() -> Made:
    return Pyramid(), noise(4, 1, 8, 8), classes(4, 3)


@architecture("prelu_net")
def _() -> Made:
    convs = (nn.Conv2d(1, 3, 3, stride=2), nn.PReLU(3), nn.Conv2d(3, 2, 2), nn.PReLU(), nn.Flatten())
    return nn.Sequential(*convs, nn.Linear(8, 4), nn.PReLU(4), nn.Linear(4, 3)), noise(4, 1, 8, 8), classes(4, 3)


@architecture("instance_norm_1d")
def _() -> Made:
    norm = nn.InstanceNorm1d(4, affine=True)
    first = (nn.Conv1d(2, 4, 3, padding="same", padding_mode="circular"), nn.GELU(), norm)
    body = (*first, nn.Tanh(), nn.Conv1d(4, 3, 2, dilation=2))
    return nn.Sequential(*body, nn.AdaptiveMaxPool1d(1), nn.Flatten()), noise(5, 2, 5), classes(5, 3)


@architecture("autoencoder", loss_fn=F.mse_loss)
def _() -> Made:
    encoder = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
    decoder = nn.Sequential(nn.Linear(3, 18), nn.ReLU(), nn.Unflatten(1, (2, 3, 3)))
    up = nn.ConvTranspose2d(2, 1, 3, stride=2, padding=1)
    X = noise(3, 1, 5, 5)
    return nn.Sequential(encoder, decoder, up), X, X.clone()


class Video(nn.Module):
    """3d convolution over space and time, frames then read one by one: time goes into the batch and back."""

    def __init__(self) -> None:
        super().__init__()
        self.cube, self.frame, self.out = nn.Conv3d(1, 2, 3, padding=1), nn.Conv2d(2, 3, 2), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.cube(x)).transpose(1, 2)
        n, t = h.shape[:2]
        frames = F.relu(self.frame(h.flatten(0, 1))).mean((2, 3)).view(n, t, 3)
        return self.out(frames.amax(1))


@architecture("video_frames_in_the_batch")
def _() -> Made:
    return Video(), noise(3, 1, 3, 4, 4), classes(3, 3)
