"""A check that needs no list: curvfunc's results for a model against ordinary backward passes, and both against differences.

Kernels of torch can be wrong in places where nobody looks: under vmap, with strides, when they are differentiated twice. So can
rules, and a `torch.autograd.Function`. `check` compares what depends on these things with what does not.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import optree
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd.graph import Node

from curvfunc import losses
from curvfunc.checks.trials import Calls, gradient, inner, mixes, name_of, plain_kernels, relative_errors, same_draws, trial
from curvfunc.engine.capture import capture
from curvfunc.engine.model import check_function, recomputation
from curvfunc.engine.outputs import check_output
from curvfunc.engine.passes import BackwardPass
from curvfunc.engine.sites import Trace
from curvfunc.operators.products import hessian_vp
from curvfunc.quantities.call import compute
from curvfunc.quantities.specs import BatchGrad
from curvfunc.rules.kernels import INSTEAD, Instead
from curvfunc.tensors.docstrings import documented
from curvfunc.tensors.inputs import flatten_params, forward_errors, read_batch

__all__ = ["Comparison", "Report", "check"]

# Where finite differences alone disagree, the model may mean it so.
ON_PURPOSE = "torch agrees, but finite differences do not (kinks, or parts that are detached)"


class Comparison(NamedTuple):
    """One parameter in one comparison.

    Attributes:
        parameter: Its name.
        what: What is compared.
        error: The norm of the difference, relative to that of the result; nan where there was nothing to compare.
        ok: Whether curvfunc's result holds.
        why: What is known of a difference: the operation that it comes from, or why it does not count.
    """

    parameter: str
    what: str
    error: float
    ok: bool
    why: str = ""


@dataclass(frozen=True)
class Report:
    """A row per parameter and comparison; true if all results hold, and a table of what differs when printed or shown.

    Attributes:
        rows: All comparisons.
    """

    rows: tuple[Comparison, ...]

    def __repr__(self) -> str:
        return f"Report(ok={self.ok})\n{self}"

    @property
    def ok(self) -> bool:
        """Whether all results hold."""
        return all(row.ok for row in self.rows)

    def __bool__(self) -> bool:
        """Whether all results hold."""
        return self.ok

    def raise_if_wrong(self) -> None:
        """Raise an `ArithmeticError` with the table unless all results hold."""
        if not self.ok:
            raise ArithmeticError(f"curvfunc's results for this model do not hold:\n{self}")

    def __str__(self) -> str:
        """The rows with a difference, as a table."""
        said = [row for row in self.rows if not row.ok or row.why]
        if not said:
            return f"{len(self.rows)} comparisons, largest error {max([row.error for row in self.rows], default=0.0):.0e}"
        cells = [(r.parameter, r.what, f"{r.error:.0e}", "" if r.ok else "WRONG", r.why) for r in said]
        table = [("parameter", "comparison", "error", "", "why"), *cells]
        widths = [max(len(row[i]) for row in table) for i in range(4)] + [0]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


@documented()
def check(
    model_fn: Callable[[Any, Any], Tensor],
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    samples: int = 3,
    generator: Generator | None = None,
) -> Report:
    """Whether results for this model can be trusted: compares them with ordinary backward passes.

    For each parameter, compared are

    - the sum of the gradients of samples, with the gradient of the loss;
    - gradients of some samples, with backward passes from their outputs, and these with those of the samples run alone;
    - columns that go through the model together, as those of the Gauss-Newton matrix do, with a backward pass each, and
      the sums of their squares;
    - a product with the Hessian, with a derivative of the gradient.

    Where two of them differ, finite differences say which is right. Then each operation of the model is tried by itself, so
    that the report can name the one that is wrong; an operation hidden in a `torch.autograd.Function` cannot be tried.

    The cost is that of some thirty gradients and the memory of two `batch_grad`. In float64 (``module.double()``) finite
    differences are looked at in any case, and find what curvfunc and torch have wrong in the same way.

    Args:
        samples: How many samples are looked at one by one.
        generator: Source of columns and of the choice of samples; the default generator if None.

    Returns:
        A `Report`: true if all results hold, a table when printed; ``.rows``, ``.raise_if_wrong()``.

    Raises:
        ValueError: If two runs of the model differ, so that there is nothing to compare.

    Example:
        >>> model_fn, params = functionalize(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double())
        >>> X, y = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
        >>> bool(check(model_fn, params, X, y))
        True
    """
    check_function(model_fn)
    names, tensors, rebuild = flatten_params(params)
    batch = read_batch(X, y, None)

    def model(leaves: Sequence[Tensor], X: Any = X) -> Tensor:
        with same_draws(), forward_errors(names, list(leaves), X), plain_kernels(), recomputation(model_fn):
            out = model_fn(rebuild(leaves), X)
        check_output(out, len(optree.tree_leaves(X)[0]))
        return out

    device = "cpu" if generator is None else generator.device
    picked = sorted(torch.randperm(batch.size, generator=generator, device=device)[:samples].tolist())
    with torch.enable_grad():
        run = _Check(model_fn, params, X, y, losses.normalize(loss_fn), names, [p.detach() for p in tensors], model, generator)
        run.compare(rebuild, picked)
    return Report(tuple(run.rows))


@dataclass
class _Check:
    """The comparisons so far, and what they are made of.

    Attributes:
        model_fn: As given, and so params, X, y and loss.
        names: Of the parameters.
        tensors: The parameters.
        model: ``(tensors, X) -> output``, always with the same random numbers, and with no help of curvfunc.
        generator: Source of directions.
        rows: Comparisons.
    """

    model_fn: Callable[..., Any]
    params: Any
    X: Any
    y: Any
    loss: losses.Loss
    names: list[str]
    tensors: list[Tensor]
    model: Callable[..., Tensor]
    generator: Generator | None
    rows: list[Comparison] = field(default_factory=list)
    _wrong: list[str] | None = None
    _hidden: str = ""

    def __post_init__(self) -> None:
        eps = max(torch.finfo(p.dtype).eps for p in self.tensors)
        self.chance = False
        self.exact = eps < 1e-12
        self.tolerance = 1e-7 if self.exact else 10 * eps**0.5

    def compare(self, rebuild: Callable[..., Any], picked: list[int]) -> None:
        """All comparisons."""
        leaves = self._leaves(self.tensors)
        out = self.model(leaves)
        with same_draws():
            trace = capture(self.model_fn, self._leaves(self.tensors), rebuild, self.X, len(out))
        with same_draws():
            per_sample = self._results(compute(self.model_fn, self.params, self.X, self.y, BatchGrad(), loss_fn=self.loss))
        self._refuse_chance(out.detach(), trace, rebuild)
        c = losses.gradient(self.loss, out.detach(), self.y, create_graph=False)
        self._first_order("sum of batch_grad", [g.sum(0) for g in per_sample], trace, out, leaves, c)
        for n in picked:
            column = _row(c, n)
            self._first_order(f"batch_grad, sample {n}", [g[n] for g in per_sample], trace, out, leaves, column)
            self._alone(n, leaves, column)
        self._columns(trace, out, leaves, picked)
        self._second_order(rebuild, leaves)

    def _refuse_chance(self, out: Tensor, trace: Trace, rebuild: Callable[..., Any]) -> None:
        with torch.no_grad():
            again = self.model(self.tensors)
            with same_draws(1):
                other = self.model_fn(rebuild(self.tensors), self.X)
        self.chance = self._differ(other, again)
        if self._differ(out, again):
            raise ValueError(
                "check: two runs of the model with the same random numbers differ, so that there is nothing to compare. Look "
                "for state that the model changes, and for other sources of chance."
            )
        if trace.mode != "plain" and self.chance:
            raise ValueError(
                "check: the output depends on chance, and here samples run apart, with random numbers of their own. Call "
                "module.eval(), or check the model without dropout."
            )

    # -- comparisons

    def _first_order(
        self, what: str, got: list[Tensor], trace: Trace, out: Tensor, leaves: list[Tensor], column: Tensor
    ) -> None:
        """``got`` should be the gradient of ⟨column, out⟩."""
        want = gradient(out, leaves, column)
        errors = relative_errors(got, want)
        v = self._noise(self.tensors)
        off = self.exact and self._off(got, v, range(len(v)), column) > 1e-4
        for i, (name, error) in enumerate(zip(self.names, errors, strict=True)):
            ok, why = error <= self.tolerance, ""
            if not ok:
                ours, torchs = (self._off(g, v, [i], column) for g in (got, want))
                ok = ours < torchs
                why = "torch's own backward pass is wrong" if ok else self._cause(trace, i)
            elif off and (difference := self._off(got, v, [i], column)) > 1e-4:
                ok, error, why = not self._operations(), difference, self._cause() or ON_PURPOSE
            self.rows.append(Comparison(name, what, error, ok, why))

    def _alone(self, n: int, leaves: list[Tensor], column: Tensor) -> None:
        """A sample alone should have the output and the gradient that it has in the batch, unless they depend on chance."""
        if self.chance:
            return
        with Instead(INSTEAD[1]):  # for one sample, torch may have other kernels
            batch = self.model(leaves)
            alone = self.model(leaves, optree.tree_map(lambda t: t[n : n + 1], self.X))
        (error,) = relative_errors([alone[0].detach()], [batch[n].detach()])
        errors = relative_errors(gradient(alone, leaves, column[n : n + 1]), gradient(batch, leaves, column))
        for name, e in zip(self.names, errors, strict=True):
            ok = max(e, error) <= self.tolerance
            why = "" if ok else self._mixing(n, len(batch))
            self.rows.append(Comparison(name, f"sample {n} alone", max(e, error), ok, why))

    def _columns(self, trace: Trace, out: Tensor, leaves: list[Tensor], picked: list[int]) -> None:
        """Columns that go back together should be what each of them is, and their squares should be squares."""
        columns = torch.stack(self._noise([out, out]))
        root = losses.Root(2, lambda start, stop: columns[start:stop])
        backward = BackwardPass(trace, self.tensors, self.names, lambda t: t, 2, False)
        with torch.no_grad():
            found = backward.run(root, ["per_sample", "squares"], retain_graph=True, outs={})
        for v, column in enumerate(columns):
            self._first_order(f"column {v}", [g[v].sum(0) for g in found["per_sample"]], trace, out, leaves, column)
        for n in picked[:1]:
            got = [g[0, n] for g in found["per_sample"]]
            self._first_order(f"column 0, sample {n}", got, trace, out, leaves, _row(columns[0], n))
        want = [g.square().sum((0, 1)) for g in found["per_sample"]]
        for i, error in enumerate(relative_errors(found["squares"], want)):
            ok = error <= self.tolerance
            self.rows.append(Comparison(self.names[i], "squares of columns", error, ok, "" if ok else _rules(trace, i)))

    def _second_order(self, rebuild: Callable[..., Any], leaves: list[Tensor]) -> None:
        """A product with the Hessian should be a derivative of the gradient, and what its differences say."""
        v = self._noise(self.tensors)
        try:
            with same_draws():
                got = self._results(hessian_vp(self.model_fn, self.params, self.X, self.y, rebuild(v), loss_fn=self.loss))
        except (RuntimeError, NotImplementedError) as error:
            why = f"refused: {(str(error).splitlines() or [''])[0]}"
            self.rows += [Comparison(name, "hessian_vp", float("nan"), True, why) for name in self.names]
            return
        want = self._derivative(v, leaves)
        errors = relative_errors(got, got if want is None else want)
        ours, torchs = errors, errors
        if self.exact or want is None or max(errors) > self.tolerance:  # the better of two steps: kinks are rarely in both
            steps = [self._differences(v, h) for h in ((1e-6, 1e-7) if self.exact else (1e-2, 1e-3))]
            by_step = [[relative_errors(result, d) for d in steps] for result in (got, want or got)]
            ours, torchs = ([min(e) for e in zip(*each, strict=True)] for each in by_step)
        for i, (name, difference) in enumerate(zip(self.names, errors, strict=True)):
            ok, why = difference <= self.tolerance, ""
            if not ok:
                ok = ours[i] < torchs[i]
                why = "torch's own second derivative is wrong" if ok else self._cause()
            elif ours[i] > (1e-3 if self.exact else 0.2):
                ok, difference, why = not self._operations(), ours[i], self._cause() or ON_PURPOSE
            self.rows.append(Comparison(name, "hessian_vp", difference, ok, why))

    # -- other ways to the same numbers

    def _derivative(self, v: list[Tensor], leaves: list[Tensor]) -> list[Tensor] | None:
        """Of the gradient along v; None where torch has no second derivative of an operation."""
        try:
            first = gradient(self.loss(self.model(leaves), self.y), leaves, create_graph=True)
            return gradient(inner(first, v), leaves)
        except (RuntimeError, NotImplementedError):
            return None

    def _differences(self, v: list[Tensor], h: float) -> list[Tensor]:
        """Of the gradient along v."""
        ends = []
        for step in (h, -h):
            leaves = self._leaves([p + step * w for p, w in zip(self.tensors, v, strict=True)])
            with Instead(INSTEAD[1]):  # so that it is the gradient
                out = self.model(leaves)
            ends.append(gradient(self.loss(out, self.y), leaves))
        return [(a - b) / (2 * h) for a, b in zip(*ends, strict=True)]

    def _off(self, grads: list[Tensor], v: list[Tensor], moved: Sequence[int], column: Tensor) -> float:
        """How far ⟨grads, v⟩ is from the slope of ⟨column, out⟩ along v, where some parameters move."""
        h = 1e-6 if self.exact else 1e-3
        with torch.no_grad():
            ends = [
                self.model([p + step * w if i in moved else p for i, (p, w) in enumerate(zip(self.tensors, v, strict=True))])
                for step in (h, -h)
            ]
        slope = ((ends[0].double() - ends[1].double()) * column.double()).sum().item() / (2 * h)
        mine = sum([(grads[i].double() * v[i].double()).sum().item() for i in moved])
        return abs(mine - slope) / (max([g.double().norm().item() for g in grads]) + abs(slope) + 1e-30)

    # -- causes

    def _operations(self) -> list[str]:
        """Those that are wrong by themselves, and in which way."""
        if self._wrong is None:
            calls, leaves = Calls(), self._leaves(self.tensors)
            with calls:
                out = self.model(leaves)
            self._wrong = [*dict.fromkeys(found for call in calls.found.values() if (found := trial(*call)))]
            functions = sorted({node.name() for node in _nodes(out) if isinstance(node, torch._C._FunctionBase)})
            self._hidden = f"perhaps {', '.join(functions)}, which cannot be tried by itself" if functions else ""
        return self._wrong

    def _cause(self, trace: Trace | None = None, i: int = 0) -> str:
        """Wrong operations; else, of what cannot be tried: functions that hide theirs, and the parameter's rules."""
        wrong = "; ".join(self._operations())
        return wrong or self._hidden or ("" if trace is None else _rules(trace, i))

    def _mixing(self, n: int, total: int) -> str:
        calls = Calls(everything=True)
        with calls, torch.no_grad():
            self.model(self.tensors)
        found = [name_of(f) for f, args, kwargs in calls.found.values() if mixes(f, args, kwargs, n, total)]
        return f"{found[0]} mixes samples" if found else "samples are mixed by no operation that can be seen"

    # -- small things

    def _differ(self, a: Tensor, b: Tensor) -> bool:
        return bool(a.isfinite().all()) and relative_errors([a], [b])[0] > self.tolerance

    def _results(self, tree: Any) -> list[Tensor]:
        return flatten_params(tree)[1]

    def _leaves(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [p.detach().clone().requires_grad_() for p in tensors]

    def _noise(self, like: Sequence[Tensor]) -> list[Tensor]:
        device = None if self.generator is None else self.generator.device
        draws = [torch.randn(t.shape, generator=self.generator, device=device or t.device, dtype=t.dtype) for t in like]
        return [d.to(t.device) for d, t in zip(draws, like, strict=True)]


def _row(columns: Tensor, n: int) -> Tensor:
    """Zero but for one sample."""
    out = torch.zeros_like(columns)
    out[n] = columns[n]
    return out


def _rules(trace: Trace, i: int) -> str:
    names = sorted({site.name for site in trace.sites if i in site.forms} - {"generic"})
    return f"perhaps the rule of {', '.join(names)}" if names else ""


def _nodes(out: Tensor) -> Iterator[Node]:
    """The graph."""
    seen: set[Node] = set()
    stack = [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend([n for n, _ in node.next_functions])
