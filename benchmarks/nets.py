"""The networks that the benchmarks run: name -> (module, input shape, batch size)."""

from collections.abc import Callable

from torch import nn


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


def tiny() -> nn.Module:
    """4-16-16-2: overhead is all there is."""
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "logistic": (logistic, (1, 28, 28), 128),
    "784-256-256-10": (mlp, (1, 28, 28), 128),
    "2C2D": (cnn_2c2d, (1, 28, 28), 32),
    "3C3D": (cnn_3c3d, (3, 32, 32), 32),
    "tiny": (tiny, (4,), 8),
}
