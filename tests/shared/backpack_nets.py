"""Nets on which BackPACK and curvfunc.compat are compared. Each is built from the classes of either of the two."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

N = 5


class ResNet(nn.Module):
    """A residual net written in plain Python, which BackPACK has to convert."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.shortcut = nn.Conv2d(2, 3, 1, bias=False)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d((2, 2))
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv2(self.relu(self.conv1(x))))
        h = self.relu(h + self.shortcut(x))
        return self.fc(self.pool(h).flatten(1))


def net(name: str, kit: SimpleNamespace) -> nn.Module:
    """A net in evaluation mode, weights drawn from the current seed; ``kit`` has the classes that are not torch's."""
    build: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(6, 3),
        "mlp_relu": lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3)),
        "mlp_sigmoid": lambda: nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
        "mlp_mse": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)),
        "mlp_bce": lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1)),
        "mlp_elu": lambda: nn.Sequential(nn.Linear(6, 5), nn.ELU(), nn.Linear(5, 4), nn.LeakyReLU(), nn.Linear(4, 3), nn.LogSigmoid()),
        "cnn": lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, stride=2), nn.Sigmoid(),
            nn.Flatten(), nn.Linear(16, 3),
        ),
        "cnn_avg": lambda: nn.Sequential(
            nn.ZeroPad2d(1), nn.Conv2d(2, 3, 3, dilation=2), nn.Tanh(), nn.AvgPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(27, 3)
        ),
        "conv_groups": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)),
        "conv1d": lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(12, 3)),
        "conv3d": lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.ReLU(), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(2, 3)),
        "conv_transpose1d": lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(63, 3)),
        "conv_transpose2d": lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(147, 3)),
        "conv_transpose3d": lambda: nn.Sequential(nn.ConvTranspose3d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)),
        "batch_norm1d": lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
        "batch_norm2d": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3)),
        "embedding": lambda: nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3)),
        "rnn": lambda: nn.Sequential(nn.RNN(4, 5, batch_first=True), kit.ReduceTuple(0), nn.Flatten(), nn.Linear(15, 3)),
        "lstm": lambda: nn.Sequential(nn.LSTM(4, 5, batch_first=True), kit.ReduceTuple(0), kit.Permute(0, 2, 1), nn.Flatten(), nn.Linear(15, 3)),
        "parallel": lambda: nn.Sequential(
            nn.Linear(6, 5), kit.Parallel(nn.Linear(5, 5), nn.Sequential(nn.ReLU(), kit.ScaleModule(0.5))), nn.Linear(5, 3)
        ),
        "resnet": ResNet,
    }  # fmt: skip
    torch.manual_seed(1)
    module = build[name]().eval()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
            m.running_mean.normal_()  # type: ignore[union-attr, operator]
            m.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return module


INPUTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("linear", "mlp_relu", "mlp_sigmoid", "mlp_mse", "mlp_bce", "mlp_elu", "batch_norm1d", "parallel"), (6,)),
    **dict.fromkeys(("cnn", "cnn_avg", "conv_groups", "batch_norm2d", "resnet"), (2, 8, 8)),
    "conv1d": (2, 10),
    "conv3d": (1, 4, 4, 4),
    "conv_transpose1d": (2, 10),
    "conv_transpose2d": (2, 8, 8),
    "conv_transpose3d": (1, 3, 3, 3),
    "rnn": (3, 4),
    "lstm": (3, 4),
}  # fmt: skip


def data(name: str) -> tuple[Tensor, Tensor, nn.Module]:
    """Input, targets and loss."""
    torch.manual_seed(2)
    X: Any = torch.randint(7, (N, 3)) if name == "embedding" else torch.randn(N, *INPUTS[name])
    if name == "mlp_mse":
        return X, torch.randn(N, 2), nn.MSELoss()
    if name == "mlp_bce":
        return X, torch.randint(2, (N, 1)).to(X.dtype), nn.BCEWithLogitsLoss()
    return X, torch.arange(N) % 3, nn.CrossEntropyLoss()
