"""What makes an update of a gradient: pure functions of a state, and how they compose."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optree
import torch
from torch import Tensor

from curvfunc.tensors.inputs import is_traced
from curvfunc.tensors.precision import wide

__all__ = [
    "Local",
    "Locally",
    "Transformation",
    "apply_updates",
    "chain",
    "check_state",
    "check_tree",
    "count",
    "is_hidden",
    "labelled",
    "momentum",
    "number",
    "scale",
    "ticks",
    "zeros",
]


def _nothing(*_: Any) -> tuple[()]:
    return ()


@dataclass(frozen=True)
class Transformation:
    """Pure functions that turn gradients into updates; made by `scale_by_kfac` and its like, composed by `chain`.

    Curvature costs, and is not needed at each step. So there are two questions besides the two functions that everyone has:
    *what is due* at a state, an answer of constants, and *which specs* that takes:

    >>> kind = optim.scale_by_diagonal(DiagGGN(mc_samples=1), damping=1e-3)
    >>> model_fn, params = functionalize(nn.Linear(4, 3))
    >>> X, y, state = torch.randn(8, 4), torch.arange(8) % 3, kind.init(params)
    >>> due = kind.due(state)
    >>> loss, grads, curvature = compute(model_fn, params, X, y, (Loss(), Grad(), kind.needs(state, due)))
    >>> updates, state = kind.update(grads, state, params, curvature, due)

    which is what `optim.step` does. Only `due` looks at values (of counters, which are on the CPU), so that the rest
    compiles, once
    for each answer: ``torch.compile(step)(..., due=kind.due(state))``.

    Attributes:
        init: ``params -> state``, a pytree of tensors.
        update: ``(grads, state, params, curvature=(), due=None) -> (updates, state)``, with curvature as asked for by
            ``needs``, and ``due`` that of the state if None.
        due: ``state -> `` what is to be renewed at this step: nested tuples of strings.
        needs: ``(state, due) -> `` a pytree of specs for `curvfunc.compute`, and of `Locally`; ``()`` for none.
        label: What is shown of it.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    due: Callable[[Any], Any] = _nothing
    needs: Callable[[Any, Any], Any] = _nothing
    label: str = field(default="Transformation(...)", compare=False)

    def __repr__(self) -> str:
        return self.label


@dataclass(frozen=True)
class Locally:
    """Asks for products with a matrix at the current parameters and batch, and for losses; `optim.step` gives a `Local`.

    Attributes:
        matrix: "ggn" or "hessian".
        mc_samples: Of the GGN: 0 for the exact loss Hessian, else the number of draws per sample.
    """

    matrix: str = "ggn"
    mc_samples: int = 0


@dataclass(frozen=True)
class Local:
    """What is known around the current parameters, for the current batch.

    Attributes:
        product: ``v -> `` matrix times v, both trees like the parameters.
        loss: ``params -> `` the loss, a scalar.
        value: The loss at the current parameters.
    """

    product: Callable[[Any], Any]
    loss: Callable[[Any], Tensor]
    value: Tensor


def chain(*transformations: Transformation) -> Transformation:
    """One transformation after the other: the updates of each are the gradients of the next.

    States, what is due, and curvature are tuples with an entry per transformation.

    Args:
        transformations: In the order in which they are applied.

    Returns:
        A `Transformation`.

    Raises:
        TypeError: If one of them is no `Transformation`.
        ValueError: When it is called with a state, or curvature, of another chain.

    Example:
        >>> both = optim.chain(optim.scale_by_diagonal(DiagGGN(), damping=0.1), optim.momentum(0.9), optim.scale(-0.01))
        >>> [type(part).__name__ for part in both.init({"w": torch.ones(2)})]
        ['dict', 'dict', 'tuple']
    """
    for t in transformations:
        if not isinstance(t, Transformation):
            raise TypeError(f"chain takes transformations such as curvfunc.optim.scale_by_kfac(...), got {type(t).__name__}.")

    def parts(what: str, tree: Any) -> tuple[Any, ...]:
        if not isinstance(tree, (tuple, list)) or len(tree) != len(transformations):
            found = f"{len(tree)} entries" if isinstance(tree, (tuple, list)) else f"a {type(tree).__name__}"
            raise ValueError(
                f"{what} of a chain of {len(transformations)} transformations is a tuple with an entry for each, got {found}. "
                "A state comes from the init, or an earlier update, of the same chain."
            )
        return tuple(tree)

    def init(params: Any) -> tuple[Any, ...]:
        return tuple([t.init(params) for t in transformations])

    def due(state: Any) -> tuple[Any, ...]:
        return tuple([t.due(s) for t, s in zip(transformations, parts("the state", state), strict=True)])

    def needs(state: Any, now: Any) -> tuple[Any, ...]:
        states, what = parts("the state", state), parts("due", now)
        return tuple([t.needs(s, d) for t, s, d in zip(transformations, states, what, strict=True)])

    def update(grads: Any, state: Any, params: Any, curvature: Any = None, due: Any = None) -> tuple[Any, tuple[Any, ...]]:
        states = parts("the state", state)
        given = [()] * len(transformations) if curvature is None else parts("the curvature", curvature)
        whats = [None] * len(transformations) if due is None else parts("due", due)
        news = []
        for t, s, c, d in zip(transformations, states, given, whats, strict=True):
            grads, new = t.update(grads, s, params, c, d)
            news.append(new)
        return grads, tuple(news)

    return Transformation(init, update, due, needs, labelled("chain", *transformations))


def scale(factor: float) -> Transformation:
    """Updates times a number: minus the learning rate, at the end of a chain.

    Args:
        factor: The number.

    Returns:
        A `Transformation` with the state ``()``.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not finite.

    Example:
        >>> down = optim.scale(-0.5)
        >>> down.update({"w": torch.ones(2)}, down.init(None), None)
        ({'w': tensor([-0.5000, -0.5000])}, ())
    """
    number("scale", "factor", factor, least=-math.inf)

    def update(grads: Any, state: Any, params: Any, curvature: Any = (), due: Any = None) -> tuple[Any, Any]:
        return optree.tree_map(lambda g: factor * g, grads), state

    return Transformation(_nothing, update, label=labelled("scale", factor))


def momentum(decay: float, *, average: bool = False) -> Transformation:
    """Momentum m ← β m + g; or as an average, m ← β m + (1 − β) g, divided by 1 − βᵗ at step t.

    Args:
        decay: β, from 0 to less than 1.
        average: Whether it is an average with bias correction, as Adam's first moment.

    Returns:
        A `Transformation` with the state ``{"mass": a scalar, "momentum": [*shape] per parameter}``.

    Raises:
        TypeError: If β is no number.
        ValueError: If it is not from 0 to less than 1; for gradients or states of other parameters.

    References:
        Kingma and Ba 2015, "Adam", sec. 3 (bias correction).

    Example:
        >>> params, heavy = {"w": torch.zeros(2)}, optim.momentum(0.9)
        >>> state = heavy.init(params)
        >>> for _ in range(2):
        ...     updates, state = heavy.update({"w": torch.ones(2)}, state, params)
        >>> updates
        {'w': tensor([1.9000, 1.9000])}
    """
    number("momentum", "decay", decay, below=1.0)
    share = 1 - decay if average else 1.0

    def init(params: Any) -> dict[str, Any]:
        return {"mass": torch.zeros((), dtype=torch.float64), "momentum": zeros(params)}

    def update(grads: Any, state: Any, params: Any, curvature: Any = (), due: Any = None) -> tuple[Any, Any]:
        old = check_state("momentum", state, ("mass", "momentum"))["momentum"]
        check_tree("momentum: grads", grads, params)
        check_tree("the state of momentum", old, params)
        new = optree.tree_map(lambda m, g: decay * m + share * g, old, grads)
        mass = decay * state["mass"] + share
        updates = optree.tree_map(lambda m: m / mass.to(m), new) if average else new
        return updates, {"mass": mass, "momentum": new}

    return Transformation(init, update, label=labelled("momentum", decay, average=average))


def apply_updates(params: Any, updates: Any) -> Any:
    """New parameters, p + u.

    Args:
        params: Pytree of tensors [*shape].
        updates: A tree like it, [*shape] per parameter; with the sign that goes downhill, so mostly from a chain that ends with
            ``scale(-lr)``.

    Returns:
        A tree like ``params``, [*shape] per parameter, in its types.

    Raises:
        ValueError: If they are of other parameters.

    Example:
        >>> optim.apply_updates({"w": torch.ones(2)}, {"w": torch.tensor([-0.5, 0.5])})
        {'w': tensor([0.5000, 1.5000])}
    """
    check_tree("updates", updates, params)
    return optree.tree_map(lambda p, u: p + u.to(p.dtype), params, updates)


def labelled(name: str, *arguments: Any, **options: Any) -> str:
    """A call as it is shown."""
    return f"{name}({', '.join([*map(repr, arguments), *[f'{key}={value!r}' for key, value in options.items()]])})"


def zeros(params: Any) -> Any:
    """Where averages begin; low precision would lose them."""
    return optree.tree_map(lambda p: torch.zeros_like(p, dtype=wide(p.dtype), requires_grad=False), params)


# -- what transformations check


def number(caller: str, what: str, value: Any, least: float = 0.0, below: float = math.inf) -> float:
    """A finite number in [least, below).

    Raises:
        TypeError, ValueError: If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{caller}: {what} must be a number, got {value!r} of type {type(value).__name__}.")
    if not (least <= value < below and math.isfinite(value)):
        upper = f" and less than {below:g}" if below < math.inf else ""
        lower = f", at least {least:g}" if least > -math.inf else ""
        raise ValueError(f"{caller}: {what} must be finite{lower}{upper}, got {value}.")
    return float(value)


def count(caller: str, what: str, value: Any) -> int:
    """A positive int.

    Raises:
        TypeError, ValueError: If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{caller}: {what} must be an int, got {value!r} of type {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"{caller}: {what} must be positive, got {value}.")
    return value


def check_state(caller: str, state: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    """The state, if it is a dictionary with these keys.

    Raises:
        ValueError: If it is the state of something else.
    """
    if not isinstance(state, dict) or set(state) != set(keys):
        found = f"a dictionary with {sorted(map(str, state))}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ValueError(
            f"the state of {caller} is a dictionary with {list(keys)}, got {found}. Take it from the init, or an "
            f"earlier update, "
            "of the same transformation."
        )
    return state


def check_tree(what: str, tree: Any, params: Any) -> None:
    """Raise unless a tree has the parameters' structure and shapes."""
    wanted = optree.tree_structure(params)
    found = optree.tree_structure(tree)
    if wanted != found:
        more = ""
        if isinstance(tree, dict) and isinstance(params, dict):
            lacks, excess = sorted(set(params) - set(tree), key=str), sorted(set(tree) - set(params), key=str)
            more = f": it lacks {lacks} and has {excess} in excess"
        raise ValueError(f"{what} is of other parameters than params{more}. Make all of them with the same params.")
    if is_hidden():  # shapes that do not fit fail by themselves, mostly; who compiles has had an eager step
        return
    paths, leaves, _ = optree.tree_flatten_with_path(params)
    for path, p, t in zip(paths, leaves, optree.tree_leaves(tree), strict=True):
        shape = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
        if shape != tuple(p.shape):
            name = ".".join(map(str, path))
            raise ValueError(f"{what} has {shape} for parameter {name!r}, which has shape {tuple(p.shape)}.")


def is_hidden(*tensors: Tensor) -> bool:
    """Whether values cannot be looked at."""
    return torch.compiler.is_compiling() or any(is_traced(t) for t in tensors)


def ticks(counter: Tensor, every: int) -> bool:
    """Whether something is to happen at this step, which happens at the first one, and each so many later."""
    return int(counter) % every == 0
