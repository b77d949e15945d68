"""The matrix of a data set: each product goes through all batches, and adds up the products with theirs."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor
from torch._C import _functorch

from curvfunc import losses
from curvfunc.data.batches import outline, split_batch, to_device, wrong_device
from curvfunc.data.checkpoints import Digest, RandomState
from curvfunc.data.scales import Reduction, check_reduction, mass, observed
from curvfunc.engine.effects import Attributes
from curvfunc.engine.leaves import leaf
from curvfunc.engine.model import ModelFunction
from curvfunc.operators.linear_operators import LinearOperator
from curvfunc.operators.linearization import (
    EmpiricalFisher,
    Problem,
    batched,
    check_chunk_size,
    check_eager,
    eager,
    linearized,
)
from curvfunc.operators.matrices import Space
from curvfunc.operators.one_batch import changed, close, fingerprint, versions
from curvfunc.tensors.inputs import check_generator, flatten_params, read_batch
from curvfunc.tensors.precision import at_least_float32
from curvfunc.tensors.progress import bar
from curvfunc.tensors.samples import tensors_of

__all__ = ["data_operator", "passes"]

_FIXED = (
    "Every product is one with the same batches, or there would be no matrix: pass shuffle=False to a DataLoader, leave out "
    "random changes of the samples, or keep the batches in a list."
)


@eager
def data_operator(*given: Any) -> LinearOperator:
    """The operator of a matrix at a data set; arguments are those of `passes`."""
    source = passes(*given)
    if not source.samples:
        what = f"{len(source.digests)} batches without samples" if source.digests else "no batches"
        raise ValueError(f"{source.caller}: data gave {what}. At least one sample is needed.")
    return LinearOperator.of(source.space, source)


@eager
def passes(
    caller: str,
    matrix: Any,
    model_fn: Callable[[Any, Any], Tensor],
    params: Any,
    data: Any,
    loss_fn: Any,
    reduction: Reduction | None,
    generator: Generator | None,
    chunk_size: int | None,
    split: Callable[[Any], Any] | None,
    device: torch.device | str | None,
    progress: bool,
) -> "Passes":
    """The matrix of a data set, which is read once here: what it is a matrix of, and how its batches weigh."""
    check_eager(caller)
    check_chunk_size(chunk_size)
    check_generator(generator)
    _check_data(caller, data)
    loss = losses.normalize(loss_fn)
    check_reduction(loss, reduction)
    space = Space.of(caller, params)
    place = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**31, (), generator=generator, device=place))
    source = Passes(
        caller=caller,
        matrix=matrix,
        model_fn=model_fn,
        space=space,
        params=flatten_params(params)[1],
        data=data,
        loss=loss,
        reduction=reduction,
        chunk_size=chunk_size,
        split=split,
        device=None if device is None else torch.device(device),
        progress=progress,
        seed=seed,
    )
    source.survey()
    return source


def _check_data(caller: str, data: Any) -> None:
    if isinstance(data, Tensor) or not isinstance(data, Iterable) or hasattr(data, "keys"):
        raise TypeError(
            f"{caller}: y is missing, and X is a {type(data).__name__}. Pass the targets of the batch; or for a data set, in "
            "place of X alone, an iterable of batches such as a DataLoader or a list [(X, y), ...]."
        )
    if isinstance(data, Iterator):
        raise TypeError(
            f"{caller}: data is a {type(data).__name__}, which gives its batches once, and every product goes through all of "
            "them. Pass a DataLoader, a list of batches (list(data), if they fit into memory), or an object whose __iter__ "
            "begins anew."
        )


@dataclass(eq=False)
class Passes:
    """What is needed to go through the batches, and what was seen of them.

    Attributes:
        caller: Function that made the operator.
        matrix: Which matrix, see `curvfunc.operators.linearization`.
        model_fn: The model.
        space: The vectors.
        params: The parameters' tensors.
        data: The batches.
        loss: The loss.
        reduction: How it reduces, if that is not known of it.
        chunk_size: Number of vectors that are multiplied together.
        split: Takes a batch apart.
        device: Where batches are copied to.
        progress: Whether to show a bar.
        seed: Of the random numbers.
        masses: What the loss divides by, for each batch; a batch without weight or samples has 0, and is left out.
        samples: How many there are.
        digests: Of the batches.
        outputs: Fingerprint of the model's output for each batch that a pass has met.
        compared: Whether a second pass has given the same batches.
    """

    caller: str
    matrix: Any
    model_fn: Callable[[Any, Any], Tensor]
    space: Space
    params: list[Tensor]
    data: Any
    loss: losses.Loss
    reduction: Reduction | None
    chunk_size: int | None
    split: Callable[[Any], Any] | None
    device: torch.device | None
    progress: bool
    seed: int
    masses: list[float] = field(default_factory=list)
    samples: int = 0
    digests: list[str] = field(default_factory=list)
    outputs: Tensor | None = None
    compared: bool = False

    def __post_init__(self) -> None:
        """Note which parameters they are."""
        self._versions = versions(self.params)

    def __getstate__(self) -> dict[str, Any]:
        """All but the notes of this process; another one compares again."""
        if changed(self.params, self._versions):
            raise ValueError(f"{self.caller}: {_CHANGED}")
        return {k: v for k, v in vars(self).items() if not k.startswith("_")} | {"compared": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As it was."""
        vars(self).update(state)
        self.__post_init__()

    # -- the first pass

    def survey(self) -> None:
        """Read the data once: its structure, its scale and its digest. The model runs only if the scale depends on it."""
        first: list[str] | None = None
        reference: Any = None
        observes = self.reduction is None and not losses.has_normalizer(self.loss)
        masses: list[Tensor | float] = []
        state = _State(self.model_fn)
        for number, X, y in self._batches():
            found = outline(X, y)
            first = found if first is None else first
            for before, now in zip(first, found, strict=True):
                if before != now:
                    raise ValueError(
                        f"batch {number} has another structure than the first one: {now}, and there {before}. All batches "
                        "need the same containers, keys, types and numbers of axes; pass split= to make them alike."
                    )
            with self._errors(number, X, y):
                self.digests.append(Digest().add([*tensors_of(X), *tensors_of(y)]).text())
                samples = read_batch(X, y, None, may_be_empty=True).total
                self.samples += samples
                if not samples:
                    masses.append(0.0)
                    continue
                X, y = self._moved(X), self._moved(y)
                out = None
                if observes or callable(self.reduction) or self.reduction == "terms":
                    with torch.no_grad(), self._as_it_was(number, state):
                        out = self.model_fn(self.space.build(self.params), X).detach()
                if observes:
                    assert out is not None
                    self.reduction, reference = observed(self.loss, out, y, reference, self.reduction)
                masses.append(mass(self.loss, self.reduction, samples, out, y, tensors_of(y)[0]))
        self.masses = [float(m) for m in masses]

    # -- products

    @eager
    def multiply(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The product with vectors [K, *shape]: with R = 1 / W for the W of all samples, Σ_b (W_b / W)^d A_b v.

        The degree d is 1, and 2 for the empirical Fisher, which has the R of its gradients twice.
        """
        if _functorch.peek_interpreter_stack() is not None:
            raise NotImplementedError(
                "an operator over a data set goes through it in a loop, which torch.func cannot transform. Multiply with all "
                "vectors at once: operator @ matrix [P, K]."
            )
        if changed(self.params, self._versions):
            raise RuntimeError(f"{self.caller}: {_CHANGED}")
        total, outputs = [torch.zeros_like(at_least_float32(v)) for v in vectors], []
        degree = 2 if isinstance(self.matrix, EmpiricalFisher) else 1
        whole, seen = sum(self.masses) if not losses.is_sum(self.loss) and self.reduction != "sum" else 1.0, 0
        state = _State(self.model_fn)
        options = {"leave": False, "delay": 1.0}  # what is quick shows nothing
        with bar(self.caller, "batch", len(self.masses), self.progress, **options) as advance:
            for number, X, y in self._batches():
                self._compare(number, X, y)
                if self.masses[number]:
                    with self._errors(number, X, y), self._as_it_was(number, state):
                        out, parts = self._part(self._moved(X), self._moved(y), vectors)
                    outputs.append(fingerprint(out))
                    for t, part in zip(total, parts, strict=True):
                        t.add_(part, alpha=(self.masses[number] / whole) ** degree)
                seen = number + 1
                advance()
        if seen < len(self.masses):
            raise ValueError(f"{self.caller}: the data gave {len(self.masses)} batches at first, and now {seen}. {_FIXED}")
        self._compare_outputs(outputs)
        return [t.to(v.dtype) for t, v in zip(total, vectors, strict=True)]

    def _part(self, X: Any, y: Any, vectors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Output of the model for a batch, and the product with its matrix."""
        batch = read_batch(X, y, None, may_be_empty=losses.is_sum(self.loss))
        problem = Problem(self.model_fn, self.space.names, self.space.build, batch, self.loss)
        with torch.enable_grad():
            leaves = [leaf(p) for p in self.params]
            out = problem.forward(leaves)
            product = linearized(self.matrix, problem, leaves, out)
        return out.detach(), batched(product, leaves, range(len(leaves)), vectors, self.chunk_size)

    # -- batches

    def _batches(self) -> Iterator[tuple[int, Any, Any]]:
        for number, batch in enumerate(self.data):
            yield number, *split_batch(batch, self.split, number)

    def _moved(self, tree: Any) -> Any:
        return tree if self.device is None else to_device(tree, self.device)

    @contextmanager
    def _errors(self, number: int, X: Any, y: Any) -> Iterator[None]:
        """Say which batch it was."""
        try:
            yield
        except (RuntimeError, TypeError, ValueError) as error:
            if self.device is None and (why := wrong_device(self.params, X, y)) is not None:
                raise ValueError(f"batch {number}: {why}") from error
            error.add_note(f"This was batch {number} of the data, counted from 0.")
            raise

    def _compare(self, number: int, X: Any, y: Any) -> None:
        """Raise unless it is the batch that the first pass has met; until they were compared once, what comes later is not."""
        if number >= len(self.masses):
            raise ValueError(f"{self.caller}: the data gave {number} batches at first, and has more now. {_FIXED}")
        if not self.compared and Digest().add([*tensors_of(X), *tensors_of(y)]).text() != self.digests[number]:
            raise ValueError(f"{self.caller}: batch {number} of the data is not what it was at first. {_FIXED}")

    def _compare_outputs(self, found: list[Tensor]) -> None:
        """Raise where the model had other outputs at an earlier pass, which covers the data that it saw, too."""
        self.compared = True
        if not found:
            return
        outputs = torch.stack(found).cpu()
        if self.outputs is None:
            self.outputs = outputs
        elif outputs.shape != self.outputs.shape or not close(outputs, self.outputs, self.params[0].dtype):
            raise ValueError(
                f"{self.caller}: the model has other outputs than in an earlier product: the data, a buffer, or the mode of "
                f"the model (train, eval) has changed, or it draws from a generator of its own. {_FIXED}"
            )

    # -- one map, whatever the model draws and keeps

    @contextmanager
    def _as_it_was(self, number: int, state: "_State") -> Iterator[None]:
        """The same random numbers for a batch at each pass, and buffers and attributes of the model put back at the end."""
        generators = RandomState(None, {p.device for p in self.params})
        before, seed = generators.read(), (self.seed + number) % 2**32
        try:
            torch.default_generator.manual_seed(seed)
            for index in generators.cuda:
                torch.cuda.default_generators[index].manual_seed(seed)
            random.seed(seed)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(seed)
            yield
        finally:
            generators.write(before)
            state.restore()


_CHANGED = (
    "a parameter was changed in place since the operator was made, such as by optimizer.step(). Make a new operator, or pass "
    "copies of the parameters."
)


class _State:
    """What a model keeps from one call to the next."""

    def __init__(self, model_fn: Any) -> None:
        """As it is now."""
        self._attributes = Attributes.of(model_fn)
        found = {id(t): t for t in self._attributes.tensors()}
        if isinstance(model_fn, ModelFunction):
            found |= {id(t): t for t in model_fn.module.buffers()}
        self._tensors = [(t, t.detach().clone()) for t in found.values() if not t.is_inference()]
        self._versions = versions([t for t, _ in self._tensors])

    def restore(self) -> None:
        """Put back what was changed."""
        self._attributes.restore()
        tensors = [t for t, _ in self._tensors]
        if changed(tensors, self._versions):
            with torch.no_grad():
                for (t, value), before in zip(self._tensors, self._versions, strict=True):
                    if t._version != before:
                        t.copy_(value)
            self._versions = versions(tensors)
