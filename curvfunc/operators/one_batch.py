"""The matrix of one batch: the model runs once, and every product is linear work on the graph that it left behind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from curvfunc.operators.linear_operators import LinearOperator
from curvfunc.operators.linearization import Linearization, batched, eager, linearization
from curvfunc.operators.matrices import Space

__all__ = ["batch_operator", "changed", "close", "fingerprint", "versions"]


@eager
def batch_operator(
    caller: str,
    matrix: Any,
    model_fn: Callable[[Any, Any], Tensor],
    params: Any,
    X: Any,
    y: Any,
    loss_fn: Callable[[Tensor, Any], Tensor],
    subsampling: Sequence[int] | Tensor | None,
    generator: Generator | None,
    chunk_size: int | None,
) -> LinearOperator:
    """The operator of a matrix at one batch."""
    given = (caller, matrix, model_fn, params, X, y, loss_fn, subsampling, chunk_size)
    return LinearOperator.of(Space.of(caller, params), OneBatch.of(given, generator))


@dataclass(frozen=True, eq=False)
class OneBatch:
    """A linearized model. It is pickled as what it was made of, and linearized again with the same random numbers.

    Attributes:
        given: Arguments of `linearization`, but for the generator.
        kept: The graph.
        drawn: Where the random numbers began.
        before: `versions` of the parameters.
    """

    given: tuple[Any, ...]
    kept: Linearization
    drawn: "Drawn"
    before: list[int | None]

    @classmethod
    def of(cls, given: tuple[Any, ...], generator: Generator | None) -> "OneBatch":
        """Run the model."""
        drawn = Drawn.now(generator)
        arguments = (*given[:-1], generator, given[-1])
        kept = linearization(*arguments)
        return cls(given, kept, drawn, versions(kept.leaves))

    def multiply(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The product with vectors [K, *shape]."""
        return batched(self.kept.product, self.kept.leaves, range(len(self.kept.leaves)), vectors, self.given[-1])

    def __reduce__(self) -> Any:
        if changed(self.kept.leaves, self.before):
            raise ValueError(f"{self.given[0]}: a parameter was changed in place since, so that it cannot be pickled. {_NEW}")
        return _again, (self.given, self.drawn, fingerprint(self.kept.out))


def _again(given: tuple[Any, ...], drawn: "Drawn", expected: Tensor) -> OneBatch:
    """What was pickled."""
    with torch.random.fork_rng(drawn.cuda.keys()):
        made = OneBatch.of(given, drawn.generator())
    if not close(fingerprint(made.kept.out), expected, made.kept.out.dtype):
        raise ValueError(
            f"{given[0]}: the model has another output than when the operator was made, so that it cannot be loaded. It may "
            "draw from generators of its own, or have other buffers by now."
        )
    return made


_NEW = "Make a new operator, or pass copies of the parameters."


@dataclass(frozen=True, eq=False)
class Drawn:
    """Where torch's random numbers stand.

    Attributes:
        cpu: State of the default generator.
        cuda: Of those of GPUs, by index.
        own: Device and state of the caller's generator, if there is one.
    """

    cpu: Tensor
    cuda: dict[int, Tensor]
    own: tuple[str, Tensor] | None

    @classmethod
    def now(cls, generator: Generator | None) -> "Drawn":
        """The present states."""
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        cuda = {torch.cuda.current_device(): torch.cuda.get_rng_state()} if on_gpu else {}
        own = (str(generator.device), generator.get_state()) if isinstance(generator, Generator) else None
        return cls(torch.get_rng_state(), cuda, own)

    def generator(self) -> Generator | None:
        """Set the default generators, and return one that draws as the caller's did."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)
        if self.own is None:
            return None
        generator = Generator(self.own[0])
        generator.set_state(self.own[1])
        return generator


# -- whether something is as it was


def versions(tensors: Sequence[Tensor]) -> list[int | None]:
    """How often each was changed in place; None where torch does not count."""
    return [None if t.is_inference() else t._version for t in tensors]


def changed(tensors: Sequence[Tensor], before: Sequence[int | None]) -> bool:
    """Whether a tensor was changed in place since."""
    return versions(tensors) != list(before)


def fingerprint(out: Tensor) -> Tensor:
    """A weighted sum of an output, its norm and the number of its entries; other outputs have others, but for accidents."""
    wide = torch.float32 if out.device.type == "mps" else torch.float64
    values = out.detach().to(wide).flatten()
    waves = torch.arange(1, len(values) + 1, dtype=wide, device=out.device).sin_()  # rows that change places count
    return torch.stack([values @ waves, values.norm(), values.new_full((), len(values))])


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether two fingerprints are equal up to the rounding of a type."""
    a, b = a.cpu(), b.cpu()
    size = torch.maximum(a[..., 1:2], b[..., 1:2])
    near = (a - b).abs()[..., :2] <= torch.finfo(dtype).eps ** 0.5 * size
    finite = a.isfinite().all(-1) & b.isfinite().all(-1)  # of what is not, nothing can be said
    return bool((near.all(-1) | ~finite).all() and (a[..., 2] == b[..., 2]).all())
