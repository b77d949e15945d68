"""What comes in: parameters, samples and indices, checked once, with errors that name the argument and the remedy."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

__all__ = ["Batch", "check_used", "flatten_params", "forward_errors", "in_order", "not_real", "read_batch"]


@dataclass(frozen=True)
class Batch:
    """Samples, and optionally the indices of a subset.

    Attributes:
        X: Input of the whole batch.
        y: Targets of the whole batch.
        total: Number of samples of the whole batch.
        index: Indices of the subset, [B], or None.
    """

    X: Any
    y: Any
    total: int
    index: Tensor | None

    @property
    def size(self) -> int:
        """Number of samples that are computed."""
        return self.total if self.index is None else len(self.index)

    def whole(self) -> "Batch":
        """The same without a subset."""
        return replace(self, index=None)

    def inputs(self) -> Any:
        """The input of the subset."""
        index = self.index
        return self.X if index is None else optree.tree_map(lambda x: x[index.to(x.device)], self.X)

    def spread(self, out: Tensor) -> Tensor:
        """Outputs of the subset in their places in the whole batch.

        Losses separate over samples, so what stands in the other places has no influence on the subset; it is there
        because the scale of a loss may depend on the whole batch.
        """
        if self.index is None:
            return out
        place = torch.zeros(self.total, dtype=torch.long, device=out.device)
        place = place.index_put((self.index.to(out.device),), torch.arange(self.size, device=out.device))
        return out[place]

    def has_repeats(self) -> bool:
        """Whether the subset has a sample twice."""
        return self.index is not None and len(self.index.unique()) < len(self.index)

    def select(self, columns: Tensor) -> Tensor:
        """Columns [v, N, ...] of the whole batch at the subset."""
        return columns if self.index is None else columns[:, self.index.to(columns.device)]


def flatten_params(params: Any) -> tuple[list[str], list[Tensor], Callable[[Sequence[Any]], Any]]:
    """Names, tensors, and the function that puts values in the tensors' places."""
    if _is_flat(params):
        names, leaves = list(params), list(params.values())
        rebuild: Callable[[Sequence[Any]], Any] = lambda values: dict(zip(names, values, strict=True))
    else:
        paths, leaves, tree = optree.tree_flatten_with_path(params)
        names = [".".join(map(str, path)) for path in paths]
        rebuild = tree.unflatten
    if not leaves:
        raise ValueError("params is empty; pass at least one parameter, e.g. those of functionalize(module).")
    for name, p in zip(names, leaves, strict=True):
        if not isinstance(p, Tensor):
            raise TypeError(f"parameter {name!r} is {p!r} of type {type(p).__name__}; a tensor is needed.")
        if hasattr(p, "full_tensor"):
            raise TypeError(
                f"parameter {name!r} is a DTensor, sharded over processes, which is not supported. Functionalize the model as "
                "it is before fully_shard (a copy, with p.full_tensor() for its parameters)."
            )
        if p.is_complex():
            raise TypeError(not_real(name, p))
        if not p.is_floating_point():
            raise TypeError(
                f"parameter {name!r} has dtype {p.dtype}; parameters must be real floating-point tensors. Keep others "
                "out of params (as buffers of the module, or constants of model_fn)."
            )
    return names, leaves, rebuild


def check_used(out: Tensor, any_used: bool) -> None:
    """Raise if an output depends on no parameter: one that is unused has zeros, but all of them is a mistake."""
    if any_used:
        return
    why = (
        "depends on none of the parameters: model_fn has to compute with its first argument (a module that it calls keeps its "
        "own parameters; see curvfunc.functionalize)"
        if out.requires_grad
        else "has no graph, so nothing depends on the parameters: remove torch.no_grad, inference_mode or .detach() from the "
        "forward pass, and compute with the parameters that model_fn gets"
    )
    raise ValueError(f"the model's output {why}.")


def not_real(name: str, p: Tensor) -> str:
    """What to say of a complex parameter."""
    return (
        f"parameter {name!r} has dtype {p.dtype}; parameters must be real. Write it as pairs of reals: keep "
        "torch.view_as_real(p) as the parameter, and use torch.view_as_complex of it in the model."
    )


def in_order(params: Any, tree: Any) -> list[Any]:
    """The leaves of a tree like ``params``, in the order in which `flatten_params` has the parameters."""
    return [tree[name] for name in params] if _is_flat(params) else optree.tree_leaves(tree)


def _is_flat(params: Any) -> bool:
    return type(params) is dict and all(type(k) is str and isinstance(v, Tensor) for k, v in params.items())


def read_batch(X: Any, y: Any, subsampling: Sequence[int] | Tensor | None, *, may_be_empty: bool = False) -> Batch:
    """Check that all of X and y have the same samples, at least one unless there may be none, and read the indices."""
    total = _samples("X", X)
    targets = _samples("y", y)
    if total != targets:
        raise ValueError(f"X has {total} samples and y has {targets}; both need the same leading sample axis.")
    if total == 0 and not may_be_empty:
        raise ValueError("X and y have no samples (N = 0); at least one is needed, unless the loss is a sum (reduction='sum').")
    return Batch(X, y, total, None if subsampling is None else _read_index(subsampling, total))


def _samples(argument: str, value: Any) -> int:
    leaves = optree.tree_leaves(value)
    if not leaves:
        raise ValueError(f"{argument} holds no tensor.")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{argument} must hold tensors, got {type(leaf).__name__}; use torch.as_tensor.")
        if leaf.ndim == 0:
            raise ValueError(f"{argument} holds a tensor without axes; its first axis must be the sample axis.")
    sizes = [leaf.shape[0] for leaf in leaves]  # in compiled code symbols, which have no hash
    if any(size != sizes[0] for size in sizes):
        found = sorted(set(map(int, sizes)))
        raise ValueError(f"the tensors in {argument} have {found} samples; all need the same leading sample axis.")
    return sizes[0]


def _read_index(subsampling: Sequence[int] | Tensor, total: int) -> Tensor:
    try:
        index = torch.as_tensor(subsampling)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"subsampling must be a sequence or tensor of sample indices, got {subsampling!r}.") from error
    if index.numel() == 0:
        raise ValueError("subsampling is empty; pass at least one index, or None for all samples.")
    if index.ndim != 1 or index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise TypeError(
            f"subsampling must be a 1-dimensional sequence of integer indices, got dtype {index.dtype} and shape "
            f"{tuple(index.shape)}. For a mask use mask.nonzero().flatten()."
        )
    if not torch.compiler.is_compiling() and index.device.type == "cpu" and not is_traced(index):
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= total:
            bad = low if low < 0 else high
            raise ValueError(f"subsampling has index {bad}, out of range for {total} samples (0 to {total - 1}).")
    return index.long()


def is_traced(t: Tensor) -> bool:
    """Whether the values of a tensor cannot be read, because it is traced or batched."""
    return (
        isinstance(t, torch._subclasses.FakeTensor)
        or torch._is_functional_tensor(t)
        or torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


@contextmanager
def forward_errors(names: Sequence[str], params: Sequence[Tensor], X: Any) -> Iterator[None]:
    """Say which parameter is at fault when the forward pass fails."""
    try:
        yield
    except KeyError as error:
        if error.args and isinstance(error.args[0], str) and error.args[0] not in names:
            raise ValueError(
                f"the model asks for parameter {error.args[0]!r}, which params lacks; it has {list(names)}."
            ) from error
        raise
    except RuntimeError as error:
        inputs = [x for x in optree.tree_leaves(X) if x.is_floating_point()]
        for kind, mine in (("device", lambda t: t.device), ("dtype", lambda t: t.dtype)):
            expected = {mine(x) for x in (inputs if kind == "dtype" else optree.tree_leaves(X))}
            wrong = [n for n, p in zip(names, params, strict=True) if expected and mine(p) not in expected]
            if wrong:
                raise ValueError(
                    f"parameter {wrong[0]!r} has {kind} {mine(params[names.index(wrong[0])])} and X has "
                    f"{', '.join(map(str, expected))}, and the model fails: {error} Move both to the same {kind}."
                ) from error
        raise
