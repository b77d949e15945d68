"""
A transformer's curvature, layer by layer
=========================================

A small language model with tied embeddings, and no layer of it wrapped or converted. The
diagonal of the Gauss-Newton matrix says how much each parameter matters to the loss: sums per
layer, before and after training, and the map of one attention's projection.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import curvfunc

text = "the cat sat on the mat and the dog sat on the log while the cow ran to the barn "
text = (text + "and the hen sat on an egg ") * 8
letters = sorted(set(text))
codes = torch.tensor([letters.index(letter) for letter in text])
T, D = 24, 32


class Block(nn.Module):
    """Attention to the past, and a network for each letter."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, h):
        q, k, v = self.qkv(self.norm1(h)).unflatten(2, (3, 4, D // 4)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm2(h))


class Model(nn.Module):
    """Letters in, the next letters out; the embedding is the head, too."""

    def __init__(self):
        super().__init__()
        self.letters, self.places = (
            nn.Embedding(len(letters), D),
            nn.Parameter(0.1 * torch.randn(T, D)),
        )
        self.blocks, self.norm = nn.Sequential(Block(), Block(), Block()), nn.LayerNorm(D)

    def forward(self, tokens):
        h = self.norm(self.blocks(self.letters(tokens) + self.places))
        return (h @ self.letters.weight.T / D**0.5).transpose(1, 2)  # [N, classes, T]


model_fn, params = curvfunc.functionalize(Model())
X = torch.stack([codes[i : i + T] for i in range(0, len(codes) - T - 1, 3)])
y = torch.stack([codes[i + 1 : i + T + 1] for i in range(0, len(codes) - T - 1, 3)])

# %%
# The diagonal, estimated by one drawn label per letter, before training and after.


def diagonal(params):
    """Of 64 sequences; what is drawn is the same each time."""
    return curvfunc.diag_ggn(
        model_fn,
        params,
        X[:64],
        y[:64],
        mc_samples=8,
        generator=torch.Generator().manual_seed(0),
    )


moments = {"at the start": diagonal(params)}
adam = torch.optim.Adam(params.values(), lr=3e-3)
for _ in range(120):
    batch = torch.randperm(len(X))[:32]
    for name, grad in curvfunc.compute(
        model_fn, params, X[batch], y[batch], curvfunc.Grad()
    ).items():
        params[name].grad = grad
    adam.step()
params = {name: p.detach() for name, p in params.items()}
moments["after training"] = diagonal(params)

# %%
# Sums of the diagonal per layer; and the second block's projection to queries, keys and values.

parts = ("norm1", "qkv", "out", "norm2", "mlp")
layers = [
    "letters",
    "places",
    *[f"blocks.{i}.{part}" for i in range(3) for part in parts],
    "norm",
]
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.8), width_ratios=(1.4, 1))
for i, (moment, found) in enumerate(moments.items()):
    of = {layer: [d for name, d in found.items() if name.startswith(layer)] for layer in layers}
    sums = [float(sum(d.sum() for d in of[layer])) for layer in layers]
    left.barh([row + 0.4 * i for row in range(len(layers))], sums, height=0.38, label=moment)
left.set_yticks([row + 0.2 for row in range(len(layers))], layers, fontsize=8)
left.invert_yaxis()
left.set(xscale="log", xlim=(None, 2e3), title="Trace of the GGN, per layer")
left.legend(loc="lower right")
found = moments["after training"]["blocks.1.qkv.weight"]
right.imshow(found.clamp(min=1e-7).log10(), aspect="auto", interpolation="nearest")
for row, label in ((16, "queries"), (48, "keys"), (80, "values")):
    right.text(-1, row, label, rotation=90, ha="right", va="center", fontsize=9)
right.hlines((31.5, 63.5), -0.5, 31.5, color="white", linewidth=1.5)
right.set(title="log₁₀ of it, blocks.1.qkv.weight", xlabel="input", yticks=[])
