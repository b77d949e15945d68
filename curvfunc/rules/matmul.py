"""Products with a parameter, all as one: an einsum of data with the parameter, linear in it."""

import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvfunc.rules.registry import Use, rule
from curvfunc.uses.forms import Direct, Form, Outer, sum_to_shape


def einsum_form(inputs: Sequence[str], output: str, operands: Sequence[Tensor], p: int, use: Use) -> Form | None:
    """The form of operand ``p``, one letter per axis; None where it has none.

    Letters of p are q if data and output have them too (groups), k if only data (contracted), o if only the output.
    Letters of data and output alone are shared positions s. Data is [n, *letters without the sample letter].
    """
    n = "" if use.axis is None else output[use.axis]
    own = inputs[p]
    data = [i.replace(n, "") if n else i for j, i in enumerate(inputs) if j != p]
    out = output.replace(n, "") if n else output
    tensors = [t for j, t in enumerate(operands) if j != p]
    if any(len(set(i)) != len(i) for i in (*inputs, output)) or (n and n in own):
        return None
    seen = set("".join(data))
    if any(c not in seen and c not in out for c in own) or any(c not in seen and c not in own for c in out):
        return None
    q = [c for c in own if c in seen and c in out]
    k = [c for c in own if c in seen and c not in out]
    o = [c for c in own if c not in seen]
    s = [c for c in out if c not in own]
    sizes: dict[str, int] = dict(zip(own, operands[p].shape, strict=True))
    for letters, t in zip(data, tensors, strict=True):
        for c, size in zip(letters, t.shape[1:], strict=True):
            if sizes.setdefault(c, size) != size:
                return None
    star = _free_letters("".join(inputs) + output)[0]
    equation = ",".join(star + i for i in data) + "->" + star + "".join(q + s + k)
    count = [math.prod([sizes[c] for c in group]) for group in (q, s, o, k)]

    def x() -> Tensor:
        return torch.einsum(equation, *tensors).reshape(-1, count[0], count[1], count[3])

    def cotangent(g: Tensor) -> Tensor:
        g = g.permute(0, 1, *[2 + out.index(c) for c in q + s + o])
        return g.reshape(*g.shape[:2], count[0], count[1], count[2])

    shape = operands[p].shape
    if not q and list(own) in (o + k, k + o):
        of_vectors = len(tensors) == len(o) == len(k) == 1 and list(data[0]) == k and list(out) == o
        vectors = tensors[0] if of_vectors else None
        return Outer(x, cotangent, shape, inputs_first=list(own) != o + k, vectors=vectors)

    def arrange(result: Tensor) -> Tensor:
        lead = result.shape[:-3]
        result = result.reshape((*lead, *[sizes[c] for c in q + o + k]))
        return result.permute((*range(len(lead)), *[len(lead) + (q + o + k).index(c) for c in own]))

    return Outer(x, cotangent, shape, arrange)


def _free_letters(used: str) -> list[str]:
    return [c for c in string.ascii_letters if c not in used]


def _product(inputs: Sequence[str], output: str, names: Sequence[str], operands: Sequence[Any], use: Use) -> Any:
    """Forms of the one operand that is a parameter; all others have samples."""
    mine = [j for j, name in enumerate(names) if name in use.parameters]
    if len(mine) != 1 or any(name not in use.sampled for j, name in enumerate(names) if j != mine[0]):
        return NotImplemented
    form = einsum_form(inputs, output, operands, mine[0], use)
    return NotImplemented if form is None else {names[mine[0]]: form}


def _own_ndim(t: Tensor, name: str, use: Use) -> int:
    """Number of the operand's own axes, among them the sample axis if the whole batch runs at once."""
    return t.ndim - (name in use.sampled and use.axis is None)


@rule(
    torch.einsum,
    torch.functional.einsum,
    arguments="equation a b c d",
    parameters="a b c d",
)
def einsum(equation: str, a: Any, b: Any = None, c: Any = None, d: Any = None, *, use: Use) -> Any:
    """Any equation with one parameter, which it uses once."""
    names = [name for name, t in zip("abcd", (a, b, c, d), strict=True) if t is not None]
    operands = [t for t in (a, b, c, d) if t is not None]
    equation = equation.replace(" ", "")
    if "->" not in equation or any(not isinstance(t, Tensor) for t in operands):
        return NotImplemented
    left, output = equation.split("->")
    inputs = left.split(",")
    if "..." in equation:
        free = _free_letters(equation)
        ranks = [
            _own_ndim(t, name, use) - len(i.replace("...", "")) if "..." in i else 0
            for i, t, name in zip(inputs, operands, names, strict=True)
        ]
        rank = max(ranks)
        inputs = [i.replace("...", "".join(free[rank - r : rank])) for i, r in zip(inputs, ranks, strict=True)]
        output = output.replace("...", "".join(free[:rank]))
    return _product(inputs, output, names, operands, use)


@rule(
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.mm,
    Tensor.mm,
    torch.bmm,
    Tensor.bmm,
    torch.mv,
    Tensor.mv,
    arguments="input other",
    parameters="input other",
)
def matmul(input: Tensor, other: Tensor, *, use: Use) -> Any:
    """Z[.., i, k] = Σ_j a[.., i, j] b[.., j, k] with torch's broadcasting."""
    left, right = _own_ndim(input, "input", use), _own_ndim(other, "other", use)
    batch = string.ascii_uppercase[: max(left, right, 2) - 2]
    a = "j" if left == 1 else batch[len(batch) - left + 2 :] + "ij"
    b = "j" if right == 1 else batch[len(batch) - right + 2 :] + "jk"
    out = batch + ("i" if left > 1 else "") + ("k" if right > 1 else "")
    return _product([a, b], out, ["input", "other"], [input, other], use)


@rule(Tensor.__rmatmul__, arguments="other input", parameters="input other")
def rmatmul(other: Tensor, input: Tensor, *, use: Use) -> Any:
    """As `matmul`, arguments in reverse."""
    return matmul(input, other, use=use)


@rule(
    torch.addmm,
    Tensor.addmm,
    torch.baddbmm,
    Tensor.baddbmm,
    arguments="input a b",
    parameters="input a b",
)
def addmm(input: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1, *, use: Use) -> Any:
    """Z = c + a b: the product's parameter, or c broadcast; not both factors at once."""
    if beta != 1 or alpha != 1:
        return NotImplemented
    forms: dict[str, Form] = {}
    if factors := use.parameters - {"input"}:
        product = matmul(a, b, use=Use(use.axis, _renamed(factors), _renamed(use.sampled)))
        if product is NotImplemented:
            return NotImplemented
        forms = {{"input": "a", "other": "b"}[name]: form for name, form in product.items()}
    if "input" in use.parameters:
        data, name = (a, "a") if "a" in use.sampled else (b, "b")
        shape = [1] * (_own_ndim(data, name, use) - input.ndim) + list(input.shape)
        if use.axis is not None and shape.pop(use.axis) != 1:
            return NotImplemented
        lead = torch.Size(shape)
        gradient: Callable[[Tensor], Tensor] = lambda g: sum_to_shape(g, lead).reshape(*g.shape[:2], *input.shape)
        forms["input"] = Direct(gradient, input.shape, reads=False)
    return forms


def _renamed(names: frozenset[str]) -> frozenset[str]:
    return frozenset({"a": "input", "b": "other"}[name] for name in names if name != "input")


@rule(F.bilinear, torch.bilinear, arguments="input1 input2 weight bias", parameters="weight bias input1 input2")
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None, *, use: Use) -> Any:
    """Z[.., o] = Σ_ij x[.., i] W[o, i, j] y[.., j] + b[o]."""
    if use.parameters & {"input1", "input2"}:
        return NotImplemented
    lead = string.ascii_uppercase[: _own_ndim(input1, "input1", use) - 1]
    names, operands = ["input1", "input2", "weight"], [input1, input2, weight]
    forms: dict[str, Form] = {}
    if "weight" in use.parameters:
        product = _product([lead + "i", lead + "j", "oij"], lead + "o", names, operands, use)
        if product is NotImplemented:
            return NotImplemented
        forms |= product
    if bias is not None:
        forms["bias"] = Direct(lambda g: sum_to_shape(g, bias.shape), bias.shape, reads=False)
    return forms
