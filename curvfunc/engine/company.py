"""Whether the samples of a subset may run without the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from curvfunc.engine.chance import Chance
from curvfunc.engine.effects import Attributes, all_held
from curvfunc.engine.model import recomputation
from curvfunc.engine.observer import Observer
from curvfunc.engine.outputs import check_output, visible
from curvfunc.engine.separation import Outcome, differ, holds, moved, outcome, require, same_chance
from curvfunc.engine.sites import Trace
from curvfunc.tensors.inputs import Batch
from curvfunc.tensors.ownership import base
from curvfunc.tensors.samples import tree_map

__all__ = ["Entangled", "are_apart", "check_apart", "check_subset"]


class Entangled(ValueError):
    """Samples of a subset have other outputs by themselves than in the whole batch."""


def check_subset(
    model_fn: Callable[..., Any],
    leaves: Sequence[Tensor],
    rebuild: Callable[[Sequence[Tensor]], Any],
    batch: Batch,
    found: Trace | Observer,
    out: Tensor,
    order: int = 1,
) -> None:
    """Raise unless samples of a subset have the outputs and gradients that they have in the whole batch.

    Nothing is compared where the samples could be followed all the way. Otherwise one of them runs in other company, and
    where their data may have met, the whole batch.

    Args:
        model_fn: The model.
        leaves: The parameters.
        rebuild: Makes the params pytree of a list of tensors.
        batch: The subset.
        found: What is known of the forward pass of the subset.
        out: Its output, with its graph.
        order: The number of derivatives that will be taken.

    Raises:
        Entangled: Then the whole batch has to run.
    """
    if batch.index is None:
        return
    foreign = found.foreign if isinstance(found, Trace) else found.foreign.values()
    whole = found.entangled is not None or batch.size == batch.total or not all_held(model_fn, foreign)
    if not (whole or found.counts or found.random or found.rows):
        return
    why = (
        f"subsampling: the output for a sample depends on which others are in the batch "
        f"({found.entangled or 'for instance on their number'}), so a subset cannot run by itself. Leave subsampling away, and "
        "choose from the results for the whole batch."
    )
    compiling = torch.compiler.is_compiling() or not visible(out)
    if any(any(t is f for f in foreign) or compiling or not _is_uniform(t) for t in found.rows):
        raise Entangled(why)  # constants, one for each sample, belong to the whole batch
    company = _Company(model_fn, rebuild, batch)
    chance, seeded = Chance(leaves), False
    try:
        if found.random and not compiling:
            with chance:
                passes = [company.subset(leaves) for _ in range(2)]
            chance.undo()
            seeded = torch.equal(*map(base, passes))  # draws that come out the same belong to their place in the batch
        if not (whole or seeded or found.counts):
            return
        pair = company.beside_all if whole or seeded else company.beside_one
        with chance:
            for at, mine in [(leaves, out)] if order == 1 else [(leaves, out), (moved(leaves), None)]:
                if (found.random and compiling) or not holds(differ(*pair(at, mine)), compiling, why):
                    if seeded:
                        raise Entangled(why)
                    require(partial(pair, at, None), compiling, why)
    except (RuntimeError, IndexError, ValueError) as error:
        raise Entangled(why) from error
    finally:
        chance.undo()


def are_apart(model_fn: Callable[..., Any], found: Trace) -> bool:
    """Whether a sample's output was seen to be the same in any company, so that there is nothing to compare."""
    doubts = found.mode != "plain" or found.entangled or found.counts or found.random or found.rows
    return not doubts and all_held(model_fn, found.foreign)


def check_apart(
    model_fn: Callable[..., Any],
    leaves: Sequence[Tensor],
    rebuild: Callable[[Sequence[Tensor]], Any],
    batch: Batch,
    found: Trace,
) -> None:
    """Raise unless a sample's output does not depend on which others are in the batch, not even on their number.

    Where that was not seen, the last sample is compared with itself in other company; in the vmap and loop modes all were.

    Args:
        model_fn: The model.
        leaves: The parameters.
        rebuild: Makes the params pytree of a list of tensors.
        batch: The samples.
        found: Their forward pass.

    Raises:
        ValueError: If it does.
    """
    if found.mode != "plain" or not batch.size or are_apart(model_fn, found):
        return
    index = torch.arange(batch.total)[-1:] if batch.index is None else batch.index[-1:]
    last = replace(batch, index=index)
    try:
        out = _Company(model_fn, rebuild, last).subset(leaves, graph=True)
        check_subset(model_fn, leaves, rebuild, last, found, out)
    except (Entangled, RuntimeError, IndexError) as error:
        raise ValueError(
            "the output for a sample depends on which others are in the batch "
            f"({found.entangled or 'for instance on their number'}), so that clipping gradients does not bound what a sample "
            "changes. Take what mixes samples out of the model, even if no gradient flows through it."
        ) from error


def _is_uniform(rows: Tensor) -> bool:
    """Whether all samples have the same, as the states in which recurrent networks begin."""
    return bool((base(rows) == base(rows)[:1]).all())


@dataclass(frozen=True)
class _Company:
    """Forward passes of the samples of a subset, among others."""

    model_fn: Callable[..., Any]
    rebuild: Callable[[Sequence[Tensor]], Any]
    batch: Batch

    def subset(self, leaves: Sequence[Tensor], graph: bool = False) -> Tensor:
        """The output of the subset."""
        return self._run(leaves, self.batch.inputs(), self.batch.size, graph)

    def beside_all(self, leaves: Sequence[Tensor], mine: Tensor | None) -> tuple[Outcome, Outcome]:
        """The subset in the whole batch, and by itself, which is ``mine`` unless it has to run again."""
        assert self.batch.index is not None
        same_chance()
        theirs = self._run(leaves, self.batch.X, self.batch.total)[self.batch.index.to(leaves[0].device)]
        same_chance()
        again = self.subset(leaves, graph=True) if mine is None else mine
        return outcome(theirs, leaves, retain_graph=False), outcome(again, leaves, retain_graph=True)

    def beside_one(self, leaves: Sequence[Tensor], mine: Tensor | None) -> tuple[Outcome, Outcome]:
        """The subset's last sample by itself, and beside another one; its output in the subset is that, too."""
        assert self.batch.index is not None
        last = self.batch.index[-1:]
        found = []
        for index in (last, torch.cat([(last + 1) % self.batch.total, last])):
            same_chance()
            out = self._run(leaves, tree_map(lambda x: x[index.to(x.device)], self.batch.X), len(index))  # noqa: B023
            found.append(outcome(out[-1:], leaves, retain_graph=False))
        same_chance()
        again = (self.subset(leaves) if mine is None else mine).detach()[-1:]
        alone, beside = found
        return Outcome(torch.cat([alone.out] * 2), alone.gradients), Outcome(torch.cat([beside.out, again]), beside.gradients)

    def _run(self, leaves: Sequence[Tensor], X: Any, samples: int, graph: bool = True) -> Tensor:
        mode = Observer({}, None, samples)  # for what it writes
        attributes = Attributes.of(self.model_fn).now()
        try:
            with torch.set_grad_enabled(graph), mode, recomputation(self.model_fn):
                result: Tensor = self.model_fn(self.rebuild([p.clone() for p in leaves]), X)
            check_output(result, samples)
        finally:
            mode.undo()
            attributes.restore()
        return result
