"""The results of all processes' samples: each has the state of its own, and the laws that merge batches merge these."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvfunc.data.checkpoints import described
from curvfunc.data.merging import Accumulation, Join, State, law_of
from curvfunc.data.shards import Shards, is_sharded
from curvfunc.engine.model import ModelFunction
from curvfunc.losses import Loss
from curvfunc.quantities.laws import Joined, Summed
from curvfunc.quantities.quantity import Quantity
from curvfunc.tensors.processes import Processes, checksum

__all__ = ["about", "apart", "remedy", "union"]

VALUES = "the values of "


def remedy(name: str) -> str:
    """What to do where processes differ in something of that name."""
    if name.startswith(VALUES):
        return "Broadcast them from one process (torch.distributed.broadcast), or make models from one seed."
    return "All have to ask for the same."


def about(
    what: dict[str, str],
    loss: Loss,
    model_fn: Any,
    params: Any,
    names: Sequence[str],
    leaves: Sequence[Tensor],
    options: dict[str, Any],
) -> dict[str, str]:
    """What has to be the same in all processes, as text.

    Args:
        what: What is computed, as text.
        loss: The loss.
        model_fn: The model.
        params: Its parameters.
        names: Their names.
        leaves: Their tensors.
        options: More that has to be the same.
    """
    found = {
        **what,
        "loss_fn": described(loss),
        "parameters": ", ".join(f"{name} {_kind(p)}" for name, p in zip(names, leaves, strict=True)),
        **{name: described(value) for name, value in options.items()},
    }
    values = {f"parameter {name!r}": p for name, p in zip(names, leaves, strict=True)}
    if isinstance(model_fn, ModelFunction) and isinstance(params, dict):
        found["training mode"] = "".join(str(int(m.training)) for m in model_fn.module.modules())
        state = model_fn.state(params)
        values |= {f"buffer or fixed parameter {name!r}": t for name, t in state.items() if t.is_floating_point()}
    return found | {VALUES + name: _told(t) for name, t in values.items()}


def _kind(p: Any) -> str:
    where = f" in {p.placements} over {p.device_mesh.mesh.tolist()}" if is_sharded(p) else ""
    return f"{p.dtype} {tuple(p.shape)} on {p.device.type}{where}"


def _told(t: Tensor) -> str:
    """A tensor by its values; shards have nothing that could be compared."""
    return "shards" if is_sharded(t) or t.layout is not torch.strided else f"a checksum of {checksum(t)}"


Layout = list[list[dict[str, tuple[tuple[int, ...], torch.dtype]]]]


def union(
    acc: Accumulation, state: State, processes: Processes, shards: Shards, join: Join, *, rows: int, gather: bool, device: Any
) -> Any:
    """The tree of specs with the results for the samples of all processes.

    Args:
        acc: What is computed.
        state: That of this process's samples, which may be none; its tensors are given up.
        processes: Who has the others.
        shards: Of the parameters.
        join: Makes one tensor of the results per sample.
        rows: Number of this process's samples.
        gather: Whether all processes get all results per sample.
        device: Where results per sample are kept, None for where they are made.

    Raises:
        ValueError: In all processes, if their results do not fit, or none has samples.
        GroupError: In all processes, if one has failed.
    """
    leaves = acc.structure.values(shards.params)
    with processes.phase():
        own = {name: float(state[name]) for name in ("batches", "samples", "mass")}
        kind = acc.reduction if isinstance(acc.reduction, str) else ""
        layout = _layout(acc, state)
    said = processes.exchange({**own, "rows": rows, "kind": kind, "layout": layout})
    laid = [(rank, answer["layout"]) for rank, answer in enumerate(said) if answer["layout"]]
    if not laid:
        raise ValueError("data gave no samples in any process of the group; at least one is needed.")
    rank, layout = laid[0]
    kinds = {answer["kind"] for answer in said if answer["layout"]}
    if len(kinds) > 1:
        raise ValueError("loss_fn is a sum for the samples of some processes, and a mean for those of others. Pass reduction=.")
    for other, theirs in laid[1:]:
        _check_fits(acc, layout, theirs, gather, f"rank {rank}", f"rank {other}")
    if kinds != {""}:
        acc = dataclasses.replace(acc, reduction=kinds.pop())
    if not state["results"]:
        state = {**state, "results": _nothing(acc, layout, leaves, device)}
        state["chunks"] = [{"samples": 0, "mass": torch.zeros((), dtype=torch.float64)}]
    _reduce(acc, state["results"], layout, processes, shards, leaves)
    total = {name: torch.tensor(sum(answer[name] for answer in said), dtype=torch.float64) for name in own}
    made = acc.made({**state, **total}, join=join)
    if gather:
        _gather(acc, made, processes, [answer["rows"] for answer in said], leaves[0].device)
    for i, spec in enumerate(acc.specs):
        for j, p in enumerate(leaves):
            if is_sharded(p) and _in_shards(spec) and all(shape == tuple(p.shape) for shape, _ in layout[i][j].values()):
                made[i][j] = shards.placed(p, made[i][j])
    return acc.built(made)


def apart(state: State) -> State:
    """The state with sums in memory of their own, so that it itself stays what it was."""
    values = [[{k: t if isinstance(t, list) else t.clone() for k, t in p.items()} for p in per] for per in state["results"]]
    return {**state, "results": values}


def _layout(acc: Accumulation, state: State) -> Layout:
    """Shapes and types of all parts; of results per sample the shape for one."""
    found: Layout = []
    for spec, values in zip(acc.specs, state["results"], strict=bool(state["results"])):
        listed = []
        for parts in values:
            kinds = {}
            for name, value in parts.items():
                law = law_of(spec, name)
                t = value[0] if isinstance(law, Joined) else value
                axis = law.axis if isinstance(law, Joined) else t.ndim
                kinds[name] = ((*t.shape[:axis], *t.shape[axis + 1 :]), t.dtype)
            listed.append(kinds)
        found.append(listed)
    return found


def _check_fits(acc: Accumulation, first: Layout, second: Layout, gather: bool, here: str, there: str) -> None:
    for spec, mine, theirs in zip(acc.specs, first, second, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            own = {k: v for k, v in one.items() if gather or not isinstance(law_of(spec, k), Joined)}
            if list(one) != list(other) or any(other[k] != v for k, v in own.items()):
                raise ValueError(
                    f"{type(spec).__name__} has other results in {there} than in {here}: {other}, and {one}. All processes "
                    "need inputs that give the same types, and the same shapes but for the number of samples."
                )


def _nothing(acc: Accumulation, layout: Layout, leaves: Sequence[Tensor], device: Any) -> list[Any]:
    """The parts for no samples."""
    found = []
    for spec, values in zip(acc.specs, layout, strict=True):
        listed = []
        for p, kinds in zip(leaves, values, strict=False):  # of the forward pass there is one
            parts: dict[str, Any] = {}
            for name, (shape, dtype) in kinds.items():
                law = law_of(spec, name)
                if isinstance(law, Joined):
                    shape = (*shape[: law.axis], 0, *shape[law.axis :])
                    parts[name] = [torch.zeros(shape, dtype=dtype, device=device or p.device)]
                else:
                    parts[name] = torch.zeros(shape, dtype=dtype, device=p.device)
            listed.append(parts)
        found.append(listed)
    return found


def _in_shards(spec: Quantity) -> bool:
    """Whether results can be in shards like the parameters': an entry for each of theirs, made of it alone."""
    return not spec.forward and all(isinstance(law, Summed) for law in spec.laws) and (len(spec.laws) == 1 or spec.entrywise)


def _reduce(
    acc: Accumulation, results: list[Any], layout: Layout, processes: Processes, shards: Shards, leaves: Sequence[Any]
) -> None:
    """Put the sums over all processes into the state, or this one's share of them."""
    summed: list[Tensor] = []
    scattered: list[tuple[dict[str, Any], str]] = []
    for spec, values, kinds in zip(acc.specs, results, layout, strict=True):
        for p, parts, shapes in zip(leaves, values, kinds, strict=False):
            shared = _in_shards(spec) and all(shards.plain(p, shape) for shape, _ in shapes.values())
            for name in shapes:  # in one order for all processes
                if shared:
                    scattered.append((parts, name))
                elif not isinstance(law_of(spec, name), Joined):
                    summed.append(parts[name])
    processes.sum(summed)
    for (parts, name), own in zip(scattered, processes.scatter([parts[name] for parts, name in scattered]), strict=True):
        parts[name] = own


def _gather(acc: Accumulation, made: list[list[Any]], processes: Processes, rows: list[int], device: torch.device) -> None:
    """Put the results for all samples in the place of this process's."""
    places = [(i, j) for i, s in enumerate(acc.specs) if isinstance(s.laws[0], Joined) for j in range(len(made[i]))]
    axes = [law.axis for i, _ in places if isinstance(law := acc.specs[i].laws[0], Joined)]
    own = [made[i][j].movedim(axis, 0) for (i, j), axis in zip(places, axes, strict=True)]
    for (i, j), axis, whole in zip(places, axes, processes.gather(own, rows, device), strict=True):
        made[i][j] = whole.movedim(0, axis)
