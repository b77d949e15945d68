"""Quantities of a data set: a loop over its batches that shows how far it is, and goes on where it was stopped."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch._C import _functorch

from curvfunc import losses
from curvfunc.data.batches import outline, split_batch, to_device, wrong_device
from curvfunc.data.checkpoints import Digest, RandomState, check_same, described, description, load, save
from curvfunc.data.merging import Accumulation, State, make
from curvfunc.data.scales import Reduction, observed
from curvfunc.data.shards import Shards
from curvfunc.data.stores import Files, Memory
from curvfunc.data.unions import about, apart, remedy, union
from curvfunc.quantities.laws import Joined
from curvfunc.quantities.quantity import Quantity
from curvfunc.tensors.docstrings import documented
from curvfunc.tensors.inputs import check_generator
from curvfunc.tensors.processes import Processes
from curvfunc.tensors.progress import bar
from curvfunc.tensors.samples import leaves as flat
from curvfunc.tensors.samples import tensors_of

__all__ = ["accumulate"]


@documented()
@torch.no_grad()
def accumulate(
    model_fn: Callable[[Any, Any], Tensor],
    params: Any,
    data: Iterable[Any],
    specs: Any,
    *,
    loss_fn: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    reduction: Reduction | None = None,
    decay: float | None = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
    split: Callable[[Any], tuple[Any, Any]] | None = None,
    device: torch.device | str | None = None,
    store_on: torch.device | str | None = None,
    out: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 100,
    progress: bool = True,
    group: Any = None,
    gather: bool = False,
) -> Any:
    """Several quantities of all samples of a data set, batch by batch: what `compute` returns for one batch of them all.

    How results of batches merge is told by each quantity: sums and per-sample results are brought to the scale that the loss
    has for all samples (its mean may run over entries or over the weights of labels), variances are put together from
    moments, and Kronecker factors each by itself. `KFRA`, `BatchDot`, `GGNGram` and `NTK` are no functions of the batches'
    results, and refused. A model that is not deterministic draws anew for each batch.

    Args:
        data: Iterable of batches, gone through once, each a pair (X [N, ...], y [N, ...]), or a mapping whose targets are at
            "labels" or "label" and whose other entries are the input. The batches may be of different sizes N.
        specs: Any pytree of specs such as ``(Loss(), Grad(), DiagGGN(mc_samples=1))``.
        reduction: For losses other than cross-entropy, squared error and BCE with logits: "sum", "mean" over samples, or, for
            any other mean, a function ``(output, y) -> W`` of a batch that returns what it divides by. By default sums and
            means over samples are told from each other by the gradients of each batch, known losses behind moves of the
            output are looked through, and anything else is refused.
        decay: If given, a batch counts ``decay**k`` after k more, and results are those of the mean batch.
        split: ``batch -> (X, y)`` for batches of another kind.
        device: Where batches are copied to.
        store_on: Where per-sample results are kept; by default where they are made.
        out: A folder for per-sample results, which are then tensors mapped from files ``0-BatchGrad-0-weight.bin`` there,
            numbered by spec and parameter.
        checkpoint: A file for the state, written after each ``every`` batches, and at the end. If it is there already, the run
            goes on where it was, and the results are bit for bit those of a run that was never stopped. The data is read anew
            up to that place, and has to be the same; the default generators (torch's, Python's, numpy's) and ``generator`` are
            set as they were at the first start for that, which gives a shuffled loader its order again, and then as they were
            at that place. Per-sample results are in the file, unless they are in ``out``. Buffers that the model changes in its
            forward pass are not.
        every: Number of batches from one checkpoint to the next.
        progress: Whether to show a bar, where there are a terminal and tqdm; in a group, that of its first process.
        group: A process group of torch.distributed: the results are those of the samples of all its processes, each of which
            calls with data of its own, which may be none. See `compute`. Files are then each process's own: ``checkpoint`` gets
            the rank as a suffix, and ``out`` as a folder in it. There is no ``decay``.
        gather: In a group, whether all processes get the results of all samples; else each has those of its own.

    Returns:
        The tree of ``specs`` with each spec replaced by its result, without graph: what `compute` returns for one batch of all
        samples, [*shape] per parameter for `Grad`, [N, *shape] with all N samples for `BatchGrad`, and so on. In low precision,
        sums are in float32.

    Raises:
        ValueError: For data, specs or a checkpoint that have no answer; the message names the batch or the argument.
        RuntimeError: If another process of the group has failed or is gone.

    Example:
        >>> from curvfunc import KFLR, Loss, Variance
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> batches = [(torch.randn(n, 4), torch.arange(n) % 3) for n in (8, 8, 5)]
        >>> loss, variance, factors = accumulate(model_fn, params, batches, (Loss(), Variance(), KFLR()))
        >>> variance["weight"].shape, [tuple(factor.shape) for factor in factors["weight"]]
        (torch.Size([3, 4]), [(3, 3), (4, 4)])
    """
    if torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is not None:
        raise ValueError("accumulate is a loop around compute, for no transformation; use curvfunc.accumulation inside of one.")
    processes = Processes(group)
    with processes.phase():
        _check_options(data, store_on, out, every)
        check_generator(generator)
        acc = make(model_fn, params, specs, losses.normalize(loss_fn), reduction, decay, chunk_size)
        shards, same = Shards(model_fn, params, processes), {}
        if group is not None:
            _check_group(acc, gather, out)
            options = {"reduction": reduction, "gather": gather, "store_on": store_on and str(store_on)}
            asked = {"specs": f"{acc.specs} as {acc.tree}"}
            same = about(asked, acc.loss, model_fn, params, shards.names, shards.leaves, options)
            checkpoint = checkpoint and f"{os.fspath(checkpoint)}.{processes.rank}"
            out = out and os.path.join(out, str(processes.rank))
        elif gather:
            raise ValueError("gather is for results of several processes. Pass group=, or leave it out.")
    processes.agree(same, remedy)
    kept = None if store_on is None else torch.device(store_on)
    with shards.whole() as whole:
        with processes.phase():
            names = acc.structure.values(shards.rebuild(shards.names))
            run = _Run(acc, whole, names, generator, split, None if device is None else torch.device(device), out is not None)
            before = None if checkpoint is None else load(checkpoint)
            if out is None:
                run.store = Memory(kept)
            else:
                files = [_file_names(i, spec, names) for i, spec in enumerate(acc.specs)]
                run.store = Files(out, files, before is not None and bool(before["finished"]))
            if checkpoint is not None:
                run.start(checkpoint, before)
            run.loop(data, before, checkpoint, every, progress and processes.rank == 0)
            if not run.state["results"] and group is None:
                what = f"{run.done} batches without samples" if run.done else "no batches (an iterator gives them only once)"
                raise ValueError(f"data gave {what}; at least one sample is needed.")
            if checkpoint is not None and run.new:
                run.save(checkpoint, finished=False)
        if group is None:
            results = run.acc.result(run.state, join=run.store.join)
        else:
            where, state = run.store.device, run.state if checkpoint is None else apart(run.state)
            results = union(run.acc, state, processes, shards, run.store.join, rows=run.rows, gather=gather, device=where)
    if isinstance(run.store, Files):
        if checkpoint is not None and not run.store.finished:
            run.save(checkpoint, finished=True)
        run.store.tidy()
    return results


class _Run:
    """One pass over the data."""

    store: Memory | Files

    def __init__(
        self,
        acc: Accumulation,
        params: Any,
        names: list[str],
        generator: Generator | None,
        split: Callable[[Any], Any] | None,
        device: torch.device | None,
        in_files: bool,
    ) -> None:
        self.acc, self.params, self.leaves = acc, params, acc.structure.values(params)
        self.named = dict(zip(names, self.leaves, strict=True))
        self.generator, self.split, self.device, self.in_files = generator, split, device, in_files
        self.state: State = acc.init()
        self.done = self.rows = 0
        self.new = False  # whether there is anything that a checkpoint does not have
        self.outline: list[str] | None = None
        self.shapes: dict[Any, tuple[int, ...]] = {}
        self.observes = acc.reduction is None and not losses.has_normalizer(acc.loss)
        self.reference: Any = None  # a sample of the first batch, which the scale of other batches is compared with
        self.random: RandomState | None = None
        self.first: dict[str, Any] = {}
        self.digest = Digest()
        self.about: dict[str, str] = {}

    def loop(self, data: Iterable[Any], before: dict[str, Any] | None, checkpoint: Any, every: int, progress: bool) -> None:
        """Take all batches, from where the checkpoint stands."""
        length = len(data) if isinstance(data, Sized) else None
        with bar("accumulate", "batch", length, progress) as advance:
            batches = self.skip(iter(data), before, checkpoint, advance)
            for batch in batches:
                self.take(batch)
                advance()
                if checkpoint is not None and self.done % every == 0:
                    self.save(checkpoint, finished=False)

    # -- one batch

    def take(self, batch: Any) -> None:
        """Add a batch to the state."""
        X, y = self.read(batch)
        number, self.done, self.new = self.done, self.done + 1, True
        samples = [len(t) for t in tensors_of(y)[:1] if t.ndim]
        if samples == [0]:  # it adds nothing, and a mean of it is not defined
            return
        if self.device is not None:
            X, y = to_device(X, self.device), to_device(y, self.device)
        try:
            observe = self.observe if self.observes else None
            part = self.acc.part(self.params, X, y, generator=self.generator, observe=observe, donate=True)
        except (RuntimeError, TypeError, ValueError) as error:
            if (why := wrong_device(self.leaves, X, y)) is not None:
                raise ValueError(f"batch {number}: {why}") from error
            error.add_note(f"This was batch {number} of the data, counted from 0.")
            raise
        self.keep(part, number)
        try:
            self.state = self.acc.add(self.state, part, donate=True)
        except ValueError as error:
            raise ValueError(f"batch {number} has other results than the ones before: {error}") from error

    def read(self, batch: Any) -> tuple[Any, Any]:
        """Input and targets of the next batch."""
        X, y = split_batch(batch, self.split, self.done)
        found = outline(X, y)
        if self.outline is None:
            self.outline = found
        for before, now in zip(self.outline, found, strict=True):
            if before != now:
                raise ValueError(
                    f"batch {self.done} has another structure than the first one: {now}, and there {before}. All batches need "
                    "the same containers, keys, types and numbers of axes; pass split= to make them alike."
                )
        if self.random is not None:
            self.digest.add([*tensors_of(X), *tensors_of(y)])
        return X, y

    def observe(self, out: Tensor, y: Any) -> str:
        """Whether the loss is a sum or a mean."""
        kind, self.reference = observed(self.acc.loss, out, y, self.reference, self.acc.reduction)
        self.acc = dataclasses.replace(self.acc, reduction=kind)
        return kind

    def keep(self, part: State, number: int) -> None:
        """Bring per-sample results to where they are kept."""
        for i, (spec, values) in enumerate(zip(self.acc.specs, part["results"], strict=True)):
            law = spec.laws[0]
            if not isinstance(law, Joined):
                continue
            for j, parts in enumerate(values):
                for name, (chunk,) in parts.items():
                    shape = (*chunk.shape[: law.axis], *chunk.shape[law.axis + 1 :])
                    if self.shapes.setdefault((i, j), shape) != shape:
                        raise ValueError(
                            f"batch {number} has other results than the first one: {type(spec).__name__} has shape {shape} for "
                            f"a sample, and there {self.shapes[i, j]}. Bring all batches to one shape, or ask for sums."
                        )
                    parts[name] = self.store.keep((i, j), chunk, self.rows, law.axis)
        self.rows += sum(chunk["samples"] for chunk in part["chunks"])

    # -- interruption

    def start(self, checkpoint: Any, before: dict[str, Any] | None) -> None:
        """Take the state from a checkpoint, if there is one."""
        acc, given = self.acc, {"decay": self.acc.decay, "reduction": self.acc.reduction, "files": self.in_files}
        specs = f"{acc.specs} as {acc.tree}"
        held = [(s.key(), s.tensors()) for s in acc.specs if s.tensors() is not None]  # which are not shown by `repr`
        specs += f" {described(held)}" if held else ""
        given |= {"generator": self.generator is not None}
        self.about = description(acc.model_fn, self.params, self.named, specs, acc.loss, given)
        self.random = RandomState(self.generator, {p.device for p in self.leaves})
        self.first = self.random.read()
        if before is None:
            return
        check_same(checkpoint, before["about"], self.about)
        self.state, self.first, self.rows = before["state"], before["first"], before["rows"]
        self.shapes = {tuple(place): tuple(shape) for *place, shape in before["shapes"]}
        if before["reduction"]:
            self.acc = dataclasses.replace(acc, reduction=before["reduction"])
            self.reference = tuple(before["reference"]) or None
        self.random.write(self.first)

    def skip(
        self, batches: Iterator[Any], before: dict[str, Any] | None, checkpoint: Any, advance: Callable[[], Any]
    ) -> Iterator[Any]:
        """The batches that are left, after those that the checkpoint has."""
        if before is None:
            return batches
        assert self.random is not None
        for _ in range(before["done"]):
            try:
                batch = next(batches)
            except StopIteration:
                raise ValueError(
                    f"the data has {self.done} batches, and the checkpoint {os.fspath(checkpoint)} is from after batch "
                    f"{before['done']}. {_OTHER_DATA}"
                ) from None
            self.read(batch)
            self.done += 1
            advance()
        if self.digest.text() != before["digest"]:
            raise ValueError(
                f"the first {self.done} batches are not those that checkpoint {os.fspath(checkpoint)} has seen. {_OTHER_DATA}"
            )
        self.random.write(before["now"])
        return batches

    def save(self, checkpoint: Any, *, finished: bool) -> None:
        """Write everything that another process needs to go on."""
        assert self.random is not None
        self.store.sync()
        content = {"state": self.state, "about": self.about, "done": self.done, "rows": self.rows, "finished": int(finished)}
        shapes = [[*place, list(shape)] for place, shape in self.shapes.items()]
        observed: dict[str, Any] = {"reduction": ""}
        if self.observes and self.acc.reduction is not None:
            reference = [] if self.reference is None else [self.reference[0], list(flat(self.reference[1]))]
            observed = {"reduction": self.acc.reduction, "reference": reference}
        drawn = {"first": self.first, "now": self.random.read(), "digest": self.digest.text()}
        save(checkpoint, {**content, "shapes": shapes, **observed, **drawn})


_OTHER_DATA = (
    "It has to give the same batches in the same order (a seed for its generator; random changes in worker processes, or from "
    "a generator of their own). Remove the checkpoint to start anew."
)


def _check_options(data: Any, store_on: Any, out: Any, every: int) -> None:
    if not isinstance(data, Iterable) or isinstance(data, Tensor):
        raise TypeError(
            f"data is a {type(data).__name__}; an iterable of batches is needed, such as a DataLoader or a list [(X, y), ...]."
        )
    if store_on is not None and out is not None:
        raise ValueError("store_on keeps per-sample results in memory, and out in files. Pass one of them.")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a positive int, got {every!r}.")


def _check_group(acc: Accumulation, gather: bool, out: Any) -> None:
    if acc.decay is not None:
        raise ValueError(
            "decay weighs batches in their order, which those of several processes have not. Leave out one of them."
        )
    if gather and out is not None:
        raise ValueError("gather gives all processes all results, and out puts those of each into files. Pass one of them.")
    for spec in acc.specs if gather else ():
        if len(spec.laws) > 1 and any(isinstance(law, Joined) for law in spec.laws):
            raise ValueError(f"{type(spec).__name__} has parts for each sample, which cannot be gathered. Leave out gather.")


def _file_names(number: int, spec: Quantity, names: list[str]) -> list[str]:
    kind = f"{number}-{type(spec).__name__}"
    return [kind] if spec.forward else [f"{kind}-{j}-{name.replace(os.sep, '_')}" for j, name in enumerate(names)]
