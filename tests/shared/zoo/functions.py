"""Networks on coordinates, sets and graphs, and networks whose weights are computed."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from zoo.registry import architecture, classes, noise

Made = tuple[nn.Module, object, Tensor]


class DeepSets(nn.Module):
    """A function of the sum over the elements of a set (Zaheer et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.element = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4))
        self.set = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.set(self.element(x).sum(1))


@architecture("deep_sets")
def _() -> Made:
    return DeepSets(), noise(4, 4, 2), classes(4, 3)


class GraphNet(nn.Module):
    """Messages along the edges of each sample's graph, added up at their targets (Gilmer et al. 2017).

    The nodes of all graphs stand one after another, as graph libraries put them: `index_add` runs over the whole batch.
    """

    def __init__(self, d: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(2, d), nn.Linear(d, 3)
        self.message, self.update = nn.Linear(2 * d, d), nn.Linear(2 * d, d)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        n, size = nodes.shape[:2]
        h = self.embed(nodes).flatten(0, 1)
        offset = torch.arange(n)[:, None, None] * size
        source, target = (edges + offset).permute(2, 0, 1).flatten(1)
        for _ in range(2):
            sent = F.relu(self.message(torch.cat([h[source], h[target]], dim=1)))
            received = torch.zeros_like(h).index_add(0, target, sent)
            h = h + torch.tanh(self.update(torch.cat([h, received], dim=1)))
        return self.head(h.view(n, size, -1).mean(1))


@architecture("graph_network_index_add")
def _() -> Made:
    return GraphNet(), {"nodes": noise(3, 4, 2), "edges": classes(3, 4, 5, 2)}, classes(3, 3)


class GraphAttention(nn.Module):
    """Graph attention with dense adjacency (Velickovic et al. 2018): learned scores from source and target."""

    def __init__(self, d: int = 3) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(2, d, bias=False), nn.Linear(d, 3)
        self.source, self.target = nn.Parameter(torch.zeros(d, 1)), nn.Parameter(torch.zeros(d, 1))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = self.project(x)
        scores = F.leaky_relu(h @ self.source + (h @ self.target).mT, 0.2)
        weights = scores.masked_fill(~adjacency, -math.inf).softmax(-1)
        return self.head(F.elu(torch.bmm(weights, h)).mean(1))


@architecture("graph_attention")
def _() -> Made:
    adjacency = (torch.rand(3, 4, 4) < 0.5) | torch.eye(4, dtype=torch.bool)
    return GraphAttention(), (noise(3, 4, 2), adjacency), classes(3, 3)


class FourierFeatures(nn.Module):
    """An MLP on sines and cosines of random projections of the coordinates (Tancik et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", noise(2, 4))
        self.mlp = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        phase = 2 * math.pi * x @ self.frequencies
        return self.mlp(torch.cat([phase.sin(), phase.cos()], dim=-1))


@architecture("fourier_features", loss_fn=F.mse_loss)
def _() -> Made:
    return FourierFeatures(), noise(5, 2), noise(5, 3)


class NeRF(nn.Module):
    """Density and colour of points along a ray: positional encoding, input again half way (Mildenhall et al. 2020)."""

    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(15, d), nn.Linear(d + 15, d)
        self.density, self.color = nn.Linear(d, 1), nn.Linear(d + 3, 3)

    def forward(self, points: Tensor, direction: Tensor) -> Tensor:
        scaled = [points * 2.0**k for k in range(2)]
        x = torch.cat([points, *(f(s) for s in scaled for f in (torch.sin, torch.cos))], dim=-1)
        h = F.relu(self.second(torch.cat([F.relu(self.first(x)), x], dim=-1)))
        alpha = 1 - torch.exp(-F.softplus(self.density(h)).squeeze(-1))
        through = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha], dim=1), dim=1)[:, :-1]
        color = self.color(torch.cat([h, direction[:, None].expand(-1, h.shape[1], -1)], dim=-1)).sigmoid()
        return ((alpha * through)[..., None] * color).sum(1)


@architecture("nerf", loss_fn=F.mse_loss)
def _() -> Made:
    return NeRF(), (noise(3, 4, 3), noise(3, 3)), torch.rand(3, 3)


class PINN(nn.Module):
    """A tanh network with learned frequency; x (1 - x) sets boundary values (Raissi et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.ones(()))
        self.mlp = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        u = self.mlp(torch.stack([x, self.frequency * t], dim=1))
        return u * (x * (1 - x))[:, None]


@architecture("pinn", loss_fn=nn.MSELoss(reduction="sum"))
def _() -> Made:
    return PINN(), {"x": torch.rand(5), "t": torch.rand(5)}, noise(5, 1)


class SoftMixture(nn.Module):
    """All experts answer, the gate weighs them (Jacobs et al. 1991); the experts' weights are one stacked parameter."""

    def __init__(self, experts: int = 3, d: int = 4) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(2, experts), nn.Linear(d, 3)
        self.weight, self.bias = nn.Parameter(torch.randn(experts, 2, d)), nn.Parameter(torch.zeros(experts, d))

    def forward(self, x: Tensor) -> Tensor:
        answers = torch.tanh(torch.einsum("ni,eio->neo", x, self.weight) + self.bias)
        return self.head(torch.einsum("ne,neo->no", self.gate(x).softmax(-1), answers))


@architecture("soft_mixture_of_experts")
def _() -> Made:
    return SoftMixture(), noise(4, 2), classes(4, 3)


class HardMixture(nn.Module):
    """Each token goes to its best expert, chosen by a mask (Switch, Fedus et al. 2022)."""

    def __init__(self, experts: int = 3, d: int = 4) -> None:
        super().__init__()
        self.embed, self.gate, self.head = nn.Linear(2, d), nn.Linear(d, experts, bias=False), nn.Linear(d, 3)
        mlps = [nn.Sequential(nn.Linear(d, 5), nn.ReLU(), nn.Linear(5, d)) for _ in range(experts)]
        self.experts = nn.ModuleList(mlps)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        best, chosen = self.gate(h).softmax(-1).max(dim=-1)
        answers = [expert(h) * (chosen == e).to(h.dtype)[..., None] for e, expert in enumerate(self.experts)]
        return self.head((h + best[..., None] * sum(answers)).mean(1))


@architecture("hard_mixture_of_experts")
def _() -> Made:
    return HardMixture(), noise(4, 5, 2), classes(4, 3)


@architecture("weight_norm")
def _() -> Made:
    conv, linear = weight_norm(nn.Conv1d(2, 3, 2)), weight_norm(nn.Linear(12, 4), dim=None)
    net = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), linear, nn.Tanh(), weight_norm(nn.Linear(4, 3)))
    return net, noise(3, 2, 5), classes(3, 3)


@architecture("spectral_norm")
def _() -> Made:
    conv, linear = spectral_norm(nn.Conv2d(1, 2, 2, stride=2)), spectral_norm(nn.Linear(8, 4))
    net = nn.Sequential(conv, nn.LeakyReLU(0.1), nn.Flatten(), linear, nn.Tanh(), nn.Linear(4, 3))
    return net, noise(4, 1, 4, 4), classes(4, 3)


@architecture("orthogonal")
def _() -> Made:
    square = orthogonal(nn.Linear(4, 4), orthogonal_map="cayley", use_trivialization=False)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), square, nn.Tanh(), nn.Linear(4, 3)), noise(4, 3), classes(4, 3)


class HyperNetwork(nn.Module):
    """One network makes, for each sample, the weight of a layer of another (Ha et al. 2017)."""

    def __init__(self, d: int = 3) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(2, d), nn.Linear(d, 3)
        self.base, self.hyper = nn.Parameter(torch.randn(d, d)), nn.Linear(2, d * d)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        weight = self.base + self.hyper(task).view(len(x), *self.base.shape)
        return self.head(torch.tanh(torch.bmm(weight, h.unsqueeze(2)).squeeze(2)))


@architecture("hypernetwork")
def _() -> Made:
    return HyperNetwork(), (noise(3, 2), noise(3, 2)), classes(3, 3)


class Siamese(nn.Module):
    """One encoder reads both inputs (Bromley et al. 1993); their distance and product are classified."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4))
        self.head, self.temperature = nn.Linear(8, 2), nn.Parameter(torch.zeros(()))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.encoder(a), self.encoder(b)
        return self.head(torch.cat([(a - b).abs(), a * b], dim=1)) * self.temperature.exp()


@architecture("siamese")
def _() -> Made:
    return Siamese(), (noise(4, 3), noise(4, 3)), classes(4, 2)


class LoRALinear(nn.Module):
    """A frozen layer and a low-rank update, beside it or merged: W x + B A x = (W + B A) x (Hu et al. 2022)."""

    def __init__(self, i: int, o: int, merged: bool, rank: int = 2) -> None:
        super().__init__()
        self.base, self.merged = nn.Linear(i, o).requires_grad_(False), merged
        self.A, self.B = nn.Parameter(torch.randn(rank, i)), nn.Parameter(torch.zeros(o, rank))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight + self.B @ self.A, self.base.bias)
        return self.base(x) + 0.5 * (x @ self.A.T @ self.B.T)


@architecture("lora")
def _() -> Made:
    net = nn.Sequential(LoRALinear(3, 5, merged=False), nn.Tanh(), LoRALinear(5, 4, merged=True), nn.Linear(4, 3))
    return net, noise(4, 3), classes(4, 3)


class BilinearNet(nn.Module):
    """Two inputs meet in a bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.meet, self.head = nn.Linear(2, 3), nn.Bilinear(3, 2, 4), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(F.relu(self.meet(torch.tanh(self.left(a)), b)))


@architecture("bilinear")
def _() -> Made:
    return BilinearNet(), (noise(4, 2), noise(4, 2)), classes(4, 3)


class TiedAutoencoder(nn.Module):
    """The decoder's weight is the encoder's transposed (Vincent et al. 2010)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))
        self.hidden, self.visible = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(F.linear(x, self.weight, self.hidden))
        return F.linear(h, self.weight.t(), self.visible)


@architecture("tied_autoencoder", loss_fn=F.mse_loss)
def _() -> Made:
    X = noise(4, 5)
    return TiedAutoencoder(), X, X.clone()


class NormalizedMLP(nn.Module):
    """BatchNorm in evaluation mode on features, channels packed in one weight and split (a "merged" layer)."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(8, 3))
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.packed.chunk(2)
        return self.head(self.norm(x @ value.t()) * torch.sigmoid(x @ gate.t()))


@architecture("packed_gated_mlp")
def _() -> Made:
    return NormalizedMLP(), noise(4, 3), classes(4, 3)
