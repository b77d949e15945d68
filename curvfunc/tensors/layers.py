"""Layers, as the names of parameters tell them."""

from collections.abc import Sequence

__all__ = ["by_layer", "layer_of"]


def layer_of(name: str) -> str:
    """The layer of a parameter: its name up to the last dot, or where there is none, the name itself."""
    return name.rpartition(".")[0] or name


def by_layer(names: Sequence[str]) -> dict[str, list[int]]:
    """The parameters of each layer, by their places among the names, in the order in which layers come first."""
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        found.setdefault(layer_of(name), []).append(i)
    return found
