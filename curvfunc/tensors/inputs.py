"""What comes in: parameters, samples and indices, checked once, with errors that name the argument and the remedy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from itertools import repeat
from typing import Any

import optree
import torch
from torch import Tensor
from torch._C import _functorch
from torch.nn import Parameter

from curvfunc.tensors.samples import hidden_tensors, leaves, tree_map

__all__ = [
    "Batch",
    "check_generator",
    "check_used",
    "explain_limits",
    "flatten_params",
    "forward_errors",
    "in_order",
    "not_real",
    "read_batch",
]


_PLAIN = frozenset({Tensor, Parameter})


@dataclass(eq=False)  # quicker to make than if it were frozen
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
        return self.total if self.index is None else self.index.shape[0]

    def whole(self) -> "Batch":
        """The same without a subset."""
        return replace(self, index=None)

    def inputs(self) -> Any:
        """The input of the subset."""
        index = self.index
        return self.X if index is None else tree_map(lambda x: x[index.to(x.device)], self.X)

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
        """Whether the subset has a sample twice; where indices cannot be read, whether it may."""
        return self.index is not None and (_is_hidden(self.index) or len(self.index.unique()) < len(self.index))

    def distinct(self) -> "tuple[Batch, Tensor]":
        """A subset with each sample once, all of them where indices cannot be read, and the places of this subset's in it."""
        assert self.index is not None
        if _is_hidden(self.index):
            return self.whole(), self.index
        index, places = self.index.unique(return_inverse=True)
        return replace(self, index=index), places

    def select(self, columns: Tensor) -> Tensor:
        """Columns [v, N, ...] of the whole batch at the subset."""
        return columns if self.index is None else columns[:, self.index.to(columns.device)]


def flatten_params(params: Any, *, sharded: bool = False) -> tuple[list[str], list[Tensor], Callable[[Sequence[Any]], Any]]:
    """Names, tensors (DTensors too if they may be sharded), and the function that puts values in the tensors' places."""
    if isinstance(params, (Iterator, torch.nn.Module)):
        raise TypeError(
            f"params is a {type(params).__name__}, such as module.parameters(); a dictionary by name, or another pytree of "
            "tensors, is needed: model_fn, params = curvfunc.functionalize(module)."
        )
    if _is_flat(params):
        names, leaves = list(params), list(params.values())
        rebuild: Callable[[Sequence[Any]], Any] = lambda values: dict(zip(names, values, strict=True))
    else:
        paths, leaves, tree = optree.tree_flatten_with_path(params)
        names = [".".join(map(str, path)) for path in paths]
        rebuild = tree.unflatten
    if not leaves:
        raise ValueError(
            "params is empty; pass at least one parameter, e.g. those of functionalize(module). It takes the parameters with "
            "requires_grad=True: if all of a module's are frozen, call module.requires_grad_() before, or set requires_grad on "
            "those that are asked for."
        )
    plain = _PLAIN.issuperset(map(type, leaves)) and all(map(Tensor.is_floating_point, leaves))
    for name, p in () if plain else zip(names, leaves, strict=True):
        if not isinstance(p, Tensor):
            raise TypeError(f"parameter {name!r} is {p!r} of type {type(p).__name__}; a tensor is needed.")
        if type(p) not in _PLAIN and hasattr(p, "full_tensor") and not sharded:
            raise TypeError(
                f"parameter {name!r} is a DTensor, sharded over processes. curvfunc.compute and curvfunc.accumulate take such "
                "parameters with group=, the processes that they are sharded over. For anything else pass whole ones "
                "(p.full_tensor(), and a model as it is before fully_shard)."
            )
        if not p.is_floating_point():
            raise TypeError(
                not_real(name, p)
                if p.is_complex()
                else f"parameter {name!r} has dtype {p.dtype}; parameters must be real floating-point tensors. Keep others out "
                "of params (as buffers of the module, or constants of model_fn)."
            )
    if leaves[0].is_meta and all(p.is_meta for p in leaves):
        raise ValueError(
            "all parameters are on the meta device, which has shapes and no values. Give them some: call "
            "module.to_empty(device=...) and load_state_dict, or make the module on a device."
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


def check_generator(generator: Any) -> None:
    """Raise unless it is a generator, or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {generator!r} of type {type(generator).__name__}. For a seed "
            "pass torch.Generator(device).manual_seed(seed)."
        )


def in_order(params: Any, tree: Any) -> list[Any]:
    """The leaves of a tree like ``params``, in the order in which `flatten_params` has the parameters."""
    return [tree[name] for name in params] if _is_flat(params) else optree.tree_leaves(tree)


def _is_flat(params: Any) -> bool:
    return type(params) is dict and {*map(type, params)} <= {str} and all(map(isinstance, params.values(), repeat(Tensor)))


def read_batch(X: Any, y: Any, subsampling: Sequence[int] | Tensor | None, *, may_be_empty: bool = False) -> Batch:
    """Check that all of X and y have the same samples, at least one unless there may be none, and read the indices."""
    total = _samples("X", X)
    targets = _samples("y", y)
    if total != targets:
        message = f"X has {total} samples and y has {targets}; both need the same leading sample axis."
        lists = [name for name, tree in (("X", X), ("y", y)) if isinstance(tree, list)]
        if lists:
            message += (
                f" {lists[0]} is a list, and so one input with several tensors, each with all samples. For a list of samples "
                f"pass torch.stack({lists[0]}), or torch.cat({lists[0]}) if they are batches."
            )
        raise ValueError(message)
    if total == 0 and not may_be_empty:
        raise ValueError("X and y have no samples (N = 0); at least one is needed, unless the loss is a sum (reduction='sum').")
    return Batch(X, y, total, None if subsampling is None else _read_index(subsampling, total))


def _samples(argument: str, value: Any) -> int:
    found = leaves(value)
    if not found:
        raise ValueError(f"{argument} holds no tensor.")
    for leaf in found:
        if not isinstance(leaf, Tensor):
            kind = type(leaf).__name__
            if isinstance(leaf, Mapping) or is_dataclass(leaf):
                raise TypeError(
                    f"{argument} holds a {kind} with tensors {hidden_tensors(leaf)} besides its items or fields, of which no "
                    "subset can be taken. Make them fields, or pass a dictionary of tensors."
                )
            raise TypeError(
                f"{argument} must hold tensors, got {kind}; use torch.as_tensor. Several tensors go into a tuple, a dictionary "
                "or a dataclass."
            )
        if leaf.ndim == 0:
            remedy = f" For a list of samples pass torch.stack({argument})." if isinstance(value, list) else ""
            raise ValueError(f"{argument} holds a tensor without axes; its first axis must be the sample axis.{remedy}")
    sizes = [leaf.shape[0] for leaf in found]  # in compiled code symbols, which have no hash
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


def _is_hidden(index: Tensor) -> bool:
    return torch.compiler.is_compiling() or is_traced(index)


def is_traced(t: Tensor) -> bool:
    """Whether the values of a tensor cannot be read, because it is traced or batched."""
    return (
        isinstance(t, torch._subclasses.FakeTensor)
        or torch._is_functional_tensor(t)
        or torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


def explain_limits(error: RuntimeError) -> None:
    """Say what to do where torch.vmap of the caller's cannot run the model."""
    limits = ["Batching rule not implemented", "vmap: inplace arithmetic", "attempted to call in-place operation"]
    limits += ["slow_conv2d: grad_weight must be contiguous", "Trying to use forward AD with"]
    if _functorch.peek_interpreter_stack() is not None and any(limit in str(error) for limit in limits):
        raise NotImplementedError(
            "torch.func cannot run the model under the transformations around this call (an operation that they do not "
            f"know in this form, or a buffer that is changed in place): {error} Loop over the parameter sets, or leave the "
            "operation out."
        ) from error


class forward_errors:
    """Say which parameter is at fault when the forward pass fails."""

    def __init__(self, names: Sequence[str], params: Sequence[Tensor], X: Any) -> None:
        self._given = names, params, X

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, (KeyError, RuntimeError)):
            _explain_forward(error, *self._given)


def _explain_forward(error: KeyError | RuntimeError, names: Sequence[str], params: Sequence[Tensor], X: Any) -> None:
    """Raise in place of an error of the forward pass, if it is known what is at fault."""
    if isinstance(error, KeyError):
        if error.args and isinstance(error.args[0], str) and error.args[0] not in names:
            raise ValueError(
                f"the model asks for parameter {error.args[0]!r}, which params lacks; it has {list(names)}."
            ) from error
        return
    found = leaves(X)
    inputs = [x for x in found if x.is_floating_point()]
    for kind, mine in (("device", lambda t: t.device), ("dtype", lambda t: t.dtype)):
        expected = {mine(x) for x in (inputs if kind == "dtype" else found)}
        wrong = [n for n, p in zip(names, params, strict=True) if expected and mine(p) not in expected]
        if wrong:
            raise ValueError(
                f"parameter {wrong[0]!r} has {kind} {mine(params[names.index(wrong[0])])} and X has "
                f"{', '.join(map(str, expected))}, and the model fails: {error} Move both to the same {kind}."
            ) from error
    kinds = {x.dtype for x in found if not x.is_complex()}
    needed = sorted({str(p.dtype) for p in params})
    if not inputs and kinds and len(needed) == 1 and "dtype" in str(error):
        raise ValueError(
            f"X has {', '.join(map(str, kinds))} and the parameters {needed[0]}, and the model fails: {error}. Convert X, "
            f"for instance X.to({needed[0]})."
        ) from error
    named = {"X": found} | {f"parameter {n!r}": [p] for n, p in zip(names, params, strict=True)}
    empty = [f"{name} of shape {tuple(t.shape)}" for name, tensors in named.items() for t in tensors if t.numel() == 0]
    if empty:
        raise ValueError(f"the model fails: {error}. Without entries: {', '.join(empty)}. Leave such tensors out.") from error
