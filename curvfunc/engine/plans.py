"""What a forward pass expects of the next call, since an earlier one of the same model had it there.

What the mode decides of a call (which use of which parameter it is, where the sample axis of the result is) depends on the
function, on its constants, and on what is known of its tensors: shape, whether they are parameters, where their samples are.
A *step* is such a decision with all that it depends on. A forward pass goes through the steps of the one before, and takes
a decision over where all of that is the same again; at the first difference it decides itself, and goes on from there.
So a plan is never trusted: it says where to look first.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import is_
from types import EllipsisType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C import _functorch

from curvfunc.engine.sites import Parameter
from curvfunc.rules.registry import Rule, Use
from curvfunc.uses.forms import Form

__all__ = ["Plan", "SiteStep", "Step", "expected", "keep", "step"]

LARGEST = 1 << 12  # calls of one forward pass that are remembered
MANY = 64  # plans
ALL = 1 << 14  # calls of all of them together, of about 1 kB each

PLAIN = (Tensor, nn.Parameter, nn.Buffer)
SIMPLE = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, EllipsisType)


class Watching(Protocol):
    """What is known in a forward pass: the parameters by index, what they are by identity, and the marks of other tensors."""

    tracked: dict[int, Tensor]
    index: dict[int, Parameter]
    marks: dict[int, tuple[Any, int | None, bool]]

    def axis_of(self, t: Tensor) -> int | None: ...

    def doubt(self, t: Tensor) -> None: ...


@dataclass(slots=True)
class SiteStep:
    """The use of parameters in a call.

    Attributes:
        rule: It, which gives the forms.
        name: Of the operation.
        arguments: The names of the call's arguments, None for those that the rule does not take.
        moved: Those whose sample axis is not the first, and where it is.
        use: What the rule takes besides.
        leaves: The indices of the parameters.
        names: The arguments that they are.
    """

    rule: Rule
    name: str
    arguments: tuple[str | None, ...]
    moved: dict[str, int]
    use: Use | None
    leaves: list[int]
    names: tuple[str, ...]

    def forms(self, values: Sequence[Any]) -> dict[int, Form] | None:
        """Those of another call with these arguments, if the rule covers it."""
        bound: dict[Any, Any] = dict(zip(self.arguments, values, strict=True))
        bound.pop(None, None)
        for name, axis in self.moved.items():
            bound[name] = bound[name].movedim(axis, 0)
        if self.use is not None:
            bound["use"] = self.use
        forms = self.rule.forms(**bound)
        if type(forms) is not dict:
            return None
        if tuple(forms) == self.names:
            return dict(zip(self.leaves, forms.values(), strict=True))
        return (
            {i: forms[name] for i, name in zip(self.leaves, self.names, strict=True)} if {*self.names} <= forms.keys() else None
        )


@dataclass(slots=True)
class Step:
    """A call and what was decided of it.

    Attributes:
        func: The function.
        count: Number of its arguments.
        keys: Names of its keyword arguments.
        params: Places of the arguments that are parameters, and the indices of these.
        data: Places of all other tensors, and what is known of them: mark, shape, type, whether they have a gradient, class.
        constants: Places of the arguments that are no tensors, and these.
        axis: The mark of its result.
        shape: The result's shape.
        requires_grad: Whether it has a gradient.
        site: The use of parameters in it.
    """

    func: Any
    count: int
    keys: tuple[str, ...]
    params: list[tuple[int, int, torch.Size]]
    data: list[tuple[int, int | None, torch.Size, torch.dtype, bool, type[Tensor]]]
    constants: list[tuple[int, Any]]
    axis: int | None = None
    shape: torch.Size | None = None
    requires_grad: bool = False
    site: SiteStep | None = None

    def meets(self, mode: Watching, values: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor] | None:
        """The tensors of a call but for the parameters, if all that was decided depends on is the same again."""
        if len(values) != self.count or (tuple(kwargs) if kwargs else ()) != self.keys:
            return None
        if _functorch.peek_interpreter_stack() is not None:
            return None
        index, marks = mode.index, mode.marks
        tracked = mode.tracked
        for place, leaf, shape in self.params:
            p = tracked.get(leaf)
            if p is None or values[place] is not p or p.shape != shape:
                return None
        found: list[Tensor] = []
        for place, axis, shape, dtype, requires_grad, kind in self.data:
            t = values[place]
            if type(t) is not kind or t.shape != shape or t.dtype is not dtype or t.requires_grad is not requires_grad:
                return None
            key = id(t)
            mark = marks.get(key)
            if mark is not None and mark[0]() is t:
                if mark[1] != axis or mark[2] is not requires_grad or key in index:
                    return None
            elif axis is not None or t.grad_fn is not None or _functorch.is_functorch_wrapped_tensor(t):
                return None
            else:
                mode.doubt(t)
            found.append(t)
        for place, constant in self.constants:
            value = values[place]
            if value is not constant and (type(value) is not type(constant) or not _is_same(value, constant)):
                return None
        return found

    def gave(self, out: Any, data: list[Tensor]) -> bool:
        """Whether the result is as it was, and none of the tensors that the call took."""
        if type(out) is not Tensor or out.shape != self.shape or out.requires_grad is not self.requires_grad:
            return False
        return not any(map(is_, data, repeat(out)))


def step(mode: Watching, func: Any, values: Sequence[Any], kwargs: dict[str, Any]) -> Step | None:
    """A call, before it, on its way to be a step; None where decisions may depend on more than a step has."""
    if _functorch.peek_interpreter_stack() is not None:
        return None
    found = Step(func, len(values), tuple(kwargs), [], [], [])
    for place, value in enumerate(values):
        if not isinstance(value, Tensor):
            if not _is_constant(value):
                return None
            found.constants.append((place, [*value] if type(value) is list else value))  # lists may change until then
        elif type(value) not in PLAIN:
            return None
        elif (p := mode.index.get(id(value))) is None:
            known = mode.axis_of(value), value.shape, value.dtype, value.requires_grad, type(value)
            found.data.append((place, *known))
        elif p.leaf is None:
            return None
        else:
            found.params.append((place, p.leaf, value.shape))
    return found


def _is_constant(value: Any) -> bool:
    """Whether an argument is a constant that can be compared."""
    if type(value) is slice:
        value = (value.start, value.stop, value.step)
    if type(value) in (tuple, list, torch.Size):
        return all(type(v) in SIMPLE for v in value)
    return type(value) in SIMPLE


def _is_same(a: Any, b: Any) -> bool:
    """Whether a constant, of the same class, is the same again."""
    if type(a) is slice:
        a, b = (a.start, a.stop, a.step), (b.start, b.stop, b.step)
    if type(a) in (tuple, list, torch.Size):
        return len(a) == len(b) and all(type(u) is type(v) and u == v for u, v in zip(a, b, strict=True))
    return bool(a == b)


class Plan:
    """The steps of a forward pass: of an earlier one as far as this one is the same, then its own."""

    def __init__(self, steps: "list[Step | None] | None" = None) -> None:
        self._steps: list[Step | None] = [] if steps is None else steps
        self._at = 0
        self._own = steps is None

    def next(self, func: Any) -> Step | None:
        """The step that may come now."""
        if self._at < len(self._steps):
            step = self._steps[self._at]
            if step is not None and step.func is func:
                return step
        return None

    def taken(self) -> None:
        """It was that one."""
        self._at += 1

    def decided(self, step: Step | None) -> None:
        """It was another one; None for a call of which nothing can be taken over."""
        at = self._at
        self._at += 1
        if at < len(self._steps):
            if step is None and self._steps[at] is None:
                return
            self._steps, self._own = self._steps[:at], True
        if len(self._steps) < LARGEST:
            if not self._own:
                self._steps, self._own = self._steps[:], True
            self._steps.append(step)

    @property
    def steps(self) -> "list[Step | None] | None":
        """Those to remember; None if they are as they were."""
        return self._steps if self._own else None


_LOCK, _PLANS = threading.Lock(), dict[tuple[int, int], "list[Step | None]"]()


def _key(model_fn: Any, samples: int) -> tuple[int, int]:
    """Where to look; an address that another model has by now does no harm."""
    if (what := getattr(model_fn, "module", None)) is None:  # modules may have a truth value, or none
        what = getattr(model_fn, "__code__", model_fn)
    return id(what), samples


def expected(model_fn: Any, samples: int) -> Plan | None:
    """What to expect of a model's forward pass; None where code is traced, which is to have no guards of this."""
    if torch.compiler.is_compiling() or type(samples) is not int:
        return None
    return Plan(_PLANS.get(_key(model_fn, samples)))


def keep(model_fn: Any, samples: int, plan: Plan | None) -> None:
    """Remember what a forward pass did."""
    if plan is None or (steps := plan.steps) is None:
        return
    key = _key(model_fn, samples)
    with _LOCK:
        _PLANS.pop(key, None)
        while _PLANS and (len(_PLANS) >= MANY or sum(map(len, _PLANS.values())) + len(steps) > ALL):
            _PLANS.pop(next(iter(_PLANS)))
        _PLANS[key] = steps
