"""Rules of one's own against autodiff: everything that rests on a rule, on each path that takes it.

The truth is plain autograd, one sample and one entry of the output at a time; no vmap, and nothing of the engine. The loss is
a sum of squared errors, so that the GGN is 2 Jᵀ J and every column of its root is a row of the Jacobian.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from curvfunc.engine.cotangents import pull
from curvfunc.engine.sites import Trace
from curvfunc.quantities.call import compute
from curvfunc.quantities.gram import BatchDot, GGNGram
from curvfunc.quantities.run import trace
from curvfunc.quantities.specs import (
    KFLR,
    BatchDiagGGN,
    BatchDiagHessian,
    BatchGrad,
    BatchL2,
    DiagGGN,
    DiagHessian,
    Grad,
    SqrtGGN,
    SumGradSquared,
)
from curvfunc.rules import RULES
from curvfunc.rules.checks import comparing_parts, name_of
from curvfunc.uses.forms import Form, Outer, Rows, Through

__all__ = ["RuleReport", "check_rule"]

LOSS = functools.partial(F.mse_loss, reduction="sum")
Model = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]


class Checked(NamedTuple):
    """One comparison.

    Attributes:
        argument: The parameter.
        path: "plain" or "vmap".
        form: What the rule gave for it.
        quantity: What was compared.
        error: The norm of the difference, relative to that of the truth.
    """

    argument: str
    path: str
    form: str
    quantity: str
    error: float


@dataclass(frozen=True)
class RuleReport:
    """What `check_rule` compared.

    Attributes:
        operation: Its name.
        rows: All comparisons.
    """

    operation: str
    rows: tuple[Checked, ...]

    def __str__(self) -> str:
        """One line."""
        arguments = dict.fromkeys(f"{row.argument} by {row.form}" for row in self.rows)
        paths = dict.fromkeys(row.path for row in self.rows)
        return f"{self.operation}: {', '.join(arguments)}, right on the {' and the '.join(paths)} path"


def check_rule(operation: Any, *example: Any, parameters: str | None = None, rtol: float = 1e-7, **keywords: Any) -> RuleReport:
    """Compare all that rests on a rule with autodiff: gradients, curvature and Kronecker factors, on each path.

    Args:
        operation: An operation with a `rule`.
        example: Arguments that it can be called with, as for a batch: all tensors that are not parameters have the samples
            as their first axis, [N, ...], at least two. Floating-point tensors are taken to float64.
        parameters: Names of the arguments that are parameters here; by default all tensors among those of the rule.
        rtol: How far results may be off, relative to their norm.
        keywords: Further arguments of the operation, by name; tensors as in ``example``, [N, ...] unless they are parameters.

    Returns:
        The comparisons, a `RuleReport`; prints as a line.

    Raises:
        ValueError: If anything is off: the message names argument, path and quantity. If the rule was used on no path.
        TypeError: If there is no rule, or an argument does not fit.

    Example:
        >>> @operation
        ... def shift(x, b):
        ...     return x + 2 * b
        >>> @rule(shift, parameters="b", samples_first=True)
        ... def _(x, b):
        ...     return {"b": Direct(lambda g: g, b.shape)}
        >>> check_rule(shift, torch.randn(4, 3), torch.randn(3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: check_rule: the rule of shift is wrong for 'b' on the plain path: batch_grad is off by 5.0e-01...
    """
    found = RULES.get(operation)
    if found is None:
        raise TypeError(f"check_rule: {name_of(operation)} has no rule; register one with curvfunc.rule.")
    given = pytree.tree_map(_double, {**dict(zip(found.arguments, example, strict=False)), **keywords})
    if len(example) > len(found.arguments) or not given.keys() <= set(found.arguments) | keywords.keys():
        raise TypeError(f"check_rule: {len(example)} arguments were given; the rule names {list(found.arguments)}.")
    names = [k for k in found.parameters if isinstance(given.get(k), Tensor)] if parameters is None else parameters.split()
    if not names or any(not isinstance(given.get(k), Tensor) for k in names):
        raise TypeError(f"check_rule: parameters among the arguments {names} need a tensor each in the example.")
    data = {k: v for k, v in given.items() if isinstance(v, Tensor) and k not in names}
    sizes = {len(v) if v.ndim else 0 for v in data.values()}
    if len(sizes) != 1 or sizes.pop() < 2:
        shapes = {k: tuple(v.shape) for k, v in data.items()}
        raise TypeError(
            f"check_rule: tensors that are no parameters need the same leading axis of at least two samples: {shapes}."
        )
    rest = {k: v for k, v in given.items() if k not in data and k not in names}
    name = name_of(operation)

    def plain(params: dict[str, Tensor], x: dict[str, Tensor]) -> Tensor:
        arguments = {**rest, **x, **params}
        positional = [arguments.pop(k) for k in found.arguments[: len(example)]]
        out: Tensor = operation(*positional, **arguments)
        return out

    def apart(params: dict[str, Tensor], x: dict[str, Tensor]) -> Tensor:
        return plain(params, x).flip(0).flip(0)  # which keeps the samples where they are, but that is not known

    everything = {k: given[k] for k in names}
    _check_output(name, plain(everything, data), data)
    rows: list[Checked] = []
    reasons: dict[str, None] = {}
    subsets = [names, *([[k] for k in names] if len(names) > 1 else [])]
    for subset in subsets:
        params, fixed = {k: given[k] for k in subset}, {k: given[k] for k in names if k not in subset}
        truth = _Truth.of(functools.partial(_with, plain, fixed), params, data)
        for path, model in (("plain", plain), ("vmap", apart)):
            with comparing_parts():
                used, why = _compare(functools.partial(_with, model, fixed), path, operation, params, data, truth)
            rows += used
            reasons |= dict.fromkeys(why)
    if wrong := [row for row in rows if not row.error <= rtol]:
        first = wrong[0]
        others = f" {len(wrong) - 1} other comparisons fail too." if len(wrong) > 1 else ""
        raise ValueError(
            f"check_rule: the rule of {name} is wrong for {first.argument!r} on the {first.path} path: {first.quantity} is off "
            f"by {first.error:.1e}.{others}"
        )
    missing = [k for k in names if all(row.argument != k for row in rows)]
    if missing:
        raise ValueError(f"check_rule: the rule of {name} was not used for {missing}: {'; '.join(reasons)}.")
    return RuleReport(name, tuple(dict.fromkeys(rows)))


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value.detach()
    return value


def _with(model: Model, fixed: dict[str, Tensor], params: dict[str, Tensor], x: dict[str, Tensor]) -> Tensor:
    return model({**fixed, **params}, x)


def _check_output(name: str, out: Any, data: dict[str, Tensor]) -> None:
    samples = len(next(iter(data.values())))
    if not isinstance(out, Tensor) or not out.is_floating_point() or out.ndim == 0 or len(out) != samples:
        what = f"{tuple(out.shape)} of {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"check_rule: {name} gave {what}; a floating-point tensor with {samples} samples first is needed.")


# -- the truth


@dataclass(frozen=True)
class _Truth:
    """By plain autograd: the Jacobian J [N, C, numel], the gradient of the loss r [N, C], and the Hessian's diagonal.

    The latter is None where the operation cannot be differentiated twice.
    """

    J: dict[str, Tensor]
    r: Tensor
    H: dict[str, Tensor] | None
    y: Tensor

    @classmethod
    def of(cls, model: Model, params: dict[str, Tensor], data: dict[str, Tensor]) -> "_Truth":
        """One sample and one entry at a time."""
        runs = []
        for n in range(len(next(iter(data.values())))):
            leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
            out = model(leaves, {k: v[n : n + 1] for k, v in data.items()})
            y = torch.cos(1.0 + n + torch.arange(out.numel(), dtype=out.dtype, device=out.device)).reshape(out.shape)
            runs.append((leaves, out, y))
        rows = [[_gradients(o, leaves) for o in out.flatten()] for leaves, out, _ in runs]
        J = {k: torch.stack([torch.stack([row[k] for row in of_sample]) for of_sample in rows]) for k in params}
        r = torch.stack([2 * (out - y).detach().flatten() for _, out, y in runs])
        try:
            diagonals = [_diagonal(LOSS(out, y), leaves) for leaves, out, y in runs]
        except (RuntimeError, NotImplementedError):
            return cls(J, r, None, torch.cat([y for *_, y in runs]))
        H = {k: torch.stack([d[k] for d in diagonals]) for k in params}
        return cls(J, r, H, torch.cat([y for *_, y in runs]))

    def of_parameter(self, k: str) -> list[tuple[str, Any, Tensor]]:
        """Name, spec and truth, up to the shape, of what is compared for each parameter."""
        J = self.J[k]
        g, root = torch.einsum("ncp,nc->np", J, self.r), 2**0.5 * J.transpose(0, 1)
        second: list[tuple[str, Any, Tensor]] = []
        if self.H is not None:
            second = [("diag_hessian", DiagHessian(), self.H[k].sum(0)), ("batch_diag_hessian", BatchDiagHessian(), self.H[k])]
        return [
            ("batch_grad", BatchGrad(), g),
            ("the gradient", Grad(), g.sum(0)),
            ("batch_l2", BatchL2(), g.square().sum(1)),
            ("sum_grad_squared", SumGradSquared(), g.square().sum(0)),
            ("batch_dot", BatchDot(), g @ g.mT),
            ("sqrt_ggn", SqrtGGN(), root),
            ("diag_ggn", DiagGGN(), root.square().sum((0, 1))),
            ("batch_diag_ggn", BatchDiagGGN(), root.square().sum(0)),
            ("ggn_gram", GGNGram(), torch.einsum("vnp,wmp->vnwm", root, root)),
            *second,
        ]


def _gradients(value: Tensor, leaves: dict[str, Tensor], create_graph: bool = False) -> dict[str, Tensor]:
    if not value.requires_grad:
        return {k: p.new_zeros(p.numel()) for k, p in leaves.items()}
    given: dict[str, Any] = {
        "retain_graph": True,
        "allow_unused": True,
        "materialize_grads": True,
        "create_graph": create_graph,
    }
    found = torch.autograd.grad(value, list(leaves.values()), **given)
    return {k: g.reshape(g.numel()) for k, g in zip(leaves, found, strict=True)}


def _diagonal(value: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    first = _gradients(value, leaves, create_graph=True)
    return {k: torch.stack([_gradients(g, leaves)[k][i] for i, g in enumerate(first[k])]) for k in leaves}


# -- what the engine makes of the rule


def _compare(
    model: Model, path: str, operation: Any, params: dict[str, Tensor], data: dict[str, Tensor], truth: _Truth
) -> tuple[list[Checked], list[str]]:
    """The comparisons for the parameters that meet the rule on a path; else why they do not."""
    names, found = trace(model, params, data)
    if found.mode != path:
        return [], list(found.reasons.values())
    forms: dict[str, Form] = {}
    for site in found.sites:
        if site.name == name_of(operation):
            forms |= {names[i]: form for i, form in site.forms.items() if not isinstance(form, Through)}
    why = [reason for i, reason in found.reasons.items() if i is not None and names[i] not in forms]
    given = (model, params, data, truth.y)
    rows: list[Checked] = []

    def compared(k: str, quantity: str, got: Tensor, want: Tensor) -> None:
        scale = want.norm().item()
        same = got.numel() == want.numel()
        error = (got.reshape(want.shape) - want).norm().item() / (scale or 1.0) if same else float("inf")
        rows.append(Checked(k, path, type(forms[k]).__name__, quantity, error))

    of_all = {k: truth.of_parameter(k) for k in forms}
    for j, (quantity, spec, _) in enumerate(next(iter(of_all.values()), [])):
        result = compute(*given, spec, loss_fn=LOSS)
        for k in forms:
            compared(k, quantity, result[k], of_all[k][j][2])
    together = [spec for _, spec, _ in next(iter(of_all.values()), [])]
    for j, result in enumerate(compute(*given, together, loss_fn=LOSS) if together else []):
        for k in forms:
            compared(k, f"{of_all[k][j][0]} with others", result[k], of_all[k][j][2])
    for approximation in (None, "expand", "reduce"):
        factors = compute(*given, KFLR(approximation), loss_fn=LOSS) if forms else {}
        for k, form in forms.items():
            label = "kflr" if approximation is None else f"kflr ({approximation})"
            for got, want in zip(factors[k], _factors(found, names.index(k), form, truth.J[k], approximation), strict=True):
                compared(k, label, got, want)
            if len(truth.r) > 1 and isinstance(form, Outer):
                _one_sample(model, params, data, truth, k, approximation, label, compared)
    return rows, why


def _one_sample(
    model: Model,
    params: dict[str, Tensor],
    data: dict[str, Tensor],
    truth: _Truth,
    k: str,
    approximation: str | None,
    label: str,
    compared: Callable[[str, str, Tensor, Tensor], None],
) -> None:
    """For one sample without shared positions and groups, the factors' product is the exact block."""
    alone = {name: v[:1] for name, v in data.items()}
    names, found = trace(model, params, alone)
    forms = [form for site in found.sites for i, form in site.forms.items() if names[i] == k]
    if (
        len(forms) != 1
        or not isinstance(forms[0], Outer)
        or forms[0].arrange is not None
        or forms[0].inputs().shape[1:3] != (1, 1)
    ):
        return
    factors = compute(model, params, alone, truth.y[:1], KFLR(approximation), loss_fn=LOSS)[k]
    compared(k, f"{label} of one sample", torch.kron(*factors), 2 * truth.J[k][0].mT @ truth.J[k][0])


def _factors(found: Trace, i: int, form: Form, J: Tensor, approximation: str | None) -> Sequence[Tensor]:
    """Factors by explicit sums over columns, samples and positions; the exact block where the form has none."""
    if not isinstance(form, (Outer, Rows)):
        return (2 * torch.einsum("ncp,ncq->pq", J, J),)
    (j,) = [j for j, site in enumerate(found.sites) if i in site.forms]
    C = found.out[0].numel()
    unit = torch.eye(C, dtype=found.out.dtype, device=found.out.device).reshape(C, 1, *found.out.shape[1:])
    columns = (2**0.5 * unit).expand(C, *found.out.shape)
    cotangents, _ = pull(found, columns, create_graph=False, retain_graph=True)
    g, x = form.cotangent(cotangents[j]).detach(), form.inputs().detach()
    summed = isinstance(form, Outer) and form.sum_positions
    if isinstance(form, Rows):  # one-hot inputs, of one group
        g, x = g.unsqueeze(2), F.one_hot(x.clamp(min=-1) + 1, form.shape[0] + 1)[:, None, :, 1:].to(g.dtype)
    g = g.movedim(3, 2).flatten(3)  # [v, n, s, q o]; x [n, q, s, k]
    B = g.new_zeros(g.shape[3], g.shape[3])
    for row in g.flatten(0, 1):  # [s, q o]
        positions = [row.sum(0)] if approximation == "reduce" or (approximation is None and summed) else list(row)
        for position in positions:
            B += torch.outer(position, position)
    A = x.new_zeros(x.shape[3], x.shape[3])
    for row in x.flatten(0, 1):  # [s, k]
        for position in [row.mean(0)] if approximation == "reduce" else list(row):
            A += torch.outer(position, position)
    averaged = x.shape[0] * x.shape[1]
    if approximation == "expand" or (approximation is None and not summed):
        averaged *= x.shape[2]
    first = isinstance(form, Rows) or form.inputs_first
    return (A / averaged, B) if first else (B, A / averaged)
