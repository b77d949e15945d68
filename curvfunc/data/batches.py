"""Batches as data sets give them: input and targets apart, on the right device, all of one structure."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from curvfunc.tensors.samples import leaves, tensors_of, tree_map

__all__ = ["outline", "split_batch", "to_device", "wrong_device"]

LABELS = ("labels", "label")


def split_batch(batch: Any, split: Callable[[Any], Any] | None, number: int) -> tuple[Any, Any]:
    """X and y of a batch: a pair, a mapping with labels in it, or whatever ``split`` takes apart."""
    if split is not None:
        pair = split(batch)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"split must return the pair (X, y) of a batch, got {type(pair).__name__} for batch {number}.")
        return pair
    if isinstance(batch, Mapping):
        found = [key for key in LABELS if key in batch]
        if len(found) != 1:
            raise ValueError(
                f"batch {number} is a mapping with {list(batch)}; its targets are taken from 'labels' or 'label', one of which "
                "is needed. Pass split=, a function from a batch to (X, y)."
            )
        return {key: value for key, value in batch.items() if key != found[0]}, batch[found[0]]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    what = f"{type(batch).__name__} of length {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
    raise TypeError(
        f"batch {number} is a {what}; data must give pairs (X, y), or mappings with 'labels' (a single batch goes into a "
        "list: [(X, y)]). Pass split=, a function from a batch to (X, y)."
    )


def to_device(tree: Any, device: torch.device) -> Any:
    """The same samples on a device; copies from pinned memory do not wait."""
    return tree_map(lambda t: t.to(device, non_blocking=True) if isinstance(t, Tensor) else t, tree)


def outline(X: Any, y: Any) -> list[str]:
    """What batches of one data set have in common: kinds of containers, keys, and type and number of axes of each tensor."""
    found = []
    for name, tree in (("X", X), ("y", y)):
        keys = f" with {list(tree)}" if isinstance(tree, Mapping) else ""
        kinds = [f"{t.dtype} with {t.ndim} axes" if isinstance(t, Tensor) else type(t).__name__ for t in leaves(tree)]
        found.append(f"{name}: {type(tree).__name__}{keys} ({', '.join(kinds)})")
    return found


def wrong_device(params: list[Tensor], X: Any, y: Any) -> str | None:
    """What to say where a batch is not where the parameters are."""
    expected = {str(p.device) for p in params}
    found = {str(t.device) for t in [*tensors_of(X), *tensors_of(y)]}
    if found <= expected:
        return None
    return (
        f"it is on {', '.join(sorted(found))} and the parameters on {', '.join(sorted(expected))}. Pass "
        f"device={next(iter(expected))!r}, to which batches are copied then."
    )
