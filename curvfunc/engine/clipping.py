"""Sums of clipped gradients: norms first, then one backward pass with the samples' columns weighted.

No per-sample gradient is in memory for that: the squared norms are a contraction of a first pass, and Σₙ wₙ gₙ is what a column
brings back whose entries for sample n are wₙ times those of the loss gradient. Where each layer is clipped by itself, the
weights enter at the sites instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from curvfunc import losses
from curvfunc.engine.passes import BackwardPass
from curvfunc.tensors.layers import by_layer

__all__ = ["Bounds", "ClippedLossGradient", "clipped_sum"]

Bounds = float | tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class ClippedLossGradient:
    """The gradient of a loss that is a sum, where that of each sample is scaled to a norm of at most ``max_norm``.

    Attributes:
        max_norm: The bound, or pairs of a layer or parameter and its own bound.
        per_layer: Whether the norm is that of each layer by itself, bounded by ``max_norm`` / sqrt(number of layers).
    """

    max_norm: Bounds
    per_layer: bool

    def root(self, loss: losses.Loss, out: Tensor, y: object, generator: Generator | None) -> losses.Root:
        """The column of the loss gradient, before anything is clipped."""
        g = losses.summed_gradient(loss, out, y, create_graph=out.requires_grad)[None]
        return losses.Root(1, lambda start, stop: g[start:stop])

    def groups(self, names: Sequence[str]) -> list[tuple[float, list[int]]]:
        """Bounds, and the places of the parameters whose common norm each is for.

        Raises:
            ValueError: If a parameter has no bound, or a bound no parameter.
        """
        if not isinstance(self.max_norm, tuple):
            layers = list(by_layer(names).values()) if self.per_layer else [list(range(len(names)))]
            return [(self.max_norm / len(layers) ** 0.5, layer) for layer in layers]
        found: dict[str, list[int]] = {key: [] for key, _ in self.max_norm}
        for i, name in enumerate(names):
            mine = [key for key in found if name == key or name.startswith(f"{key}.")]
            if not mine:
                raise ValueError(
                    f"max_norm has no bound for parameter {name!r}, only for {list(found)}. Give one for it or for its layer."
                )
            found[max(mine, key=len)].append(i)
        if empty := [key for key, members in found.items() if not members]:
            raise ValueError(f"max_norm has a bound for {empty[0]!r}, which is left no parameter; there are {list(names)}.")
        return [(bound, found[key]) for key, bound in self.max_norm]

    def weights(self, names: Sequence[str], norms: Sequence[Tensor]) -> list[Tensor]:
        """min(1, C / ‖gₙ‖) for each parameter, [N], from its squared norms; NaN where these are not finite."""
        found = list(norms)
        for bound, members in self.groups(names):
            squared = sum([norms[i].to(norms[0].device) for i in members[1:]], norms[members[0]].to(norms[0].device))
            over = squared > bound**2
            weights = torch.where(over, bound * torch.where(over, squared, 1.0).rsqrt(), 1.0).clamp(max=1.0)
            weights = torch.where(squared.isfinite(), weights, torch.nan)  # nobody gets away unclipped by an overflow
            for i in members:
                found[i] = weights
        return found


def clipped_sum(
    backward: BackwardPass,
    cotangent: ClippedLossGradient,
    root: losses.Root,
    retain_graph: bool,
    norms: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Σₙ wₙ gₙ per parameter.

    Args:
        backward: The passes over the forward pass.
        cotangent: Which norms are bounded, and by what.
        root: The column of the loss gradient.
        retain_graph: Whether another pass follows.
        norms: The squared norms of all samples per parameter, where they are known.
    """
    chosen, backward = backward.chosen, replace(backward, chosen=None)
    if norms is None:
        norms = backward.run(root, ["sample_norms"], retain_graph=True, outs={})["sample_norms"]
    weights = cotangent.weights(backward.names, norms)
    if chosen is not None:  # a sample counts as often as it is listed
        index = chosen.to(weights[0].device)
        times = torch.zeros_like(weights[0].detach()).index_add(0, index, torch.ones_like(index, dtype=weights[0].dtype))
        weights = [w * times for w in weights]
    if len(cotangent.groups(backward.names)) > 1:
        backward = replace(backward, operands={"weighted_total": weights})
        return backward.run(root, ["weighted_total"], retain_graph, {})["weighted_total"]
    select = backward.select

    def weighted(columns: Tensor) -> Tensor:
        g = columns if select is None else select(columns)
        return g * weights[0].to(g.device).reshape(1, -1, *[1] * (g.ndim - 2))

    return replace(backward, select=weighted).run(root, ["total"], retain_graph, {})["total"]
