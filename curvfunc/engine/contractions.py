"""What a parameter's use is contracted to, by name, and how the parts from several chunks of columns become one."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from curvfunc.tensors import pages
from curvfunc.uses import forms, metrics, projections, rotations, second_moments, squares
from curvfunc.uses.forms import Bound, Direct, Outer, Products
from curvfunc.uses.weighted_sums import weighted_total

__all__ = [
    "CONTRACTIONS",
    "FACTORS",
    "GRADIENTS",
    "JOINED",
    "LARGE_BLOCK",
    "MEASURED",
    "check_block",
    "combine",
    "contracted",
    "do_with_products",
    "keep",
]

# Each contraction, and how its parts from several chunks of columns become one.
CONTRACTIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "total": (forms.total, "sum"),
    "per_sample": (forms.per_sample, "concatenate"),
    "squares": (squares.squares, "sum"),
    "sample_squares": (squares.sample_squares, "sum"),
    "sample_norms": (squares.sample_norms, "sum"),
    "gram": (second_moments.gram, "join"),  # products of columns from different chunks: contracted once all are there
}
SHARED: dict[str, str | None] = {}  # contractions that a bias has in common with its weight, and their approximation
for approximation in (None, "expand", "reduce"):
    suffix = f"_{approximation}" if approximation else ""
    CONTRACTIONS["output_factor" + suffix] = (partial(second_moments.output_factor, approximation=approximation), "sum")
    SHARED["output_factor" + suffix] = approximation
    CONTRACTIONS["input_factor" + suffix] = (partial(second_moments.input_factor, approximation=approximation), "first")

# Contractions that take data of the parameter besides its use; `BackwardPass.operands` has it, or, for the first, the sites.
JOINED: set[str] = set()
for approximation in (None, "expand", "reduce"):
    name = "joined_input_factor" + (f"_{approximation}" if approximation else "")
    CONTRACTIONS[name] = (partial(second_moments.joined_input_factor, approximation=approximation), "first")
    JOINED.add(name)
CONTRACTIONS["rotated_squares"] = (rotations.rotated_squares, "sum")
CONTRACTIONS["weighted_total"] = (weighted_total, "sum")
CONTRACTIONS["measured"] = (metrics.measured, "join")  # the use itself, in the basis of a metric
CONTRACTIONS["metric_norms"] = (metrics.norms, "sum")
CONTRACTIONS["metric_products"] = (metrics.with_query, "sum")
CONTRACTIONS["projected"] = (projections.projected, "concatenate")
MEASURED = frozenset({"rotated_squares", "measured", "metric_norms", "metric_products"})

# Contractions of first order for which gradients are formed where a use has several positions; one pass serves all.
FORMED = frozenset({"total", "squares", "sample_squares", "sample_norms"})

# Contractions that are gradients, in their parameter's type.
GRADIENTS = frozenset({"per_sample", "total", "weighted_total"})

# Contractions that take more of a use than its gradients.
FACTORS = frozenset(n for n in CONTRACTIONS if "factor" in n) | MEASURED

# Contractions for which an operation may give products of its inputs in place of these.
OF_PRODUCTS = frozenset({"output_factor", "input_factor", "output_factor_expand", "input_factor_expand"})
OF_PRODUCTS_AND_SUMS = OF_PRODUCTS | {"joined_input_factor", "joined_input_factor_expand"}

# A block larger than this many rows is refused: 2**15 rows take 4 GiB in float32. From the lower number on there is a warning.
LARGEST_BLOCK = 1 << 15
LARGE_BLOCK = 1 << 12


def contracted(
    names: Sequence[str],
    bound: Bound,
    first: bool,
    only: bool,
    buffers: Mapping[str, Tensor] = MappingProxyType({}),
    factors: dict[Any, Tensor] | None = None,
    operands: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The contractions of one chunk of columns for one parameter.

    Args:
        names: Keys of `CONTRACTIONS`.
        bound: The parameter's use.
        first: Whether this is the first chunk.
        only: Whether there is no other.
        buffers: Memory for some of the results.
        factors: Output factors of this chunk so far, for those that share them.
        operands: The parameter's data of contractions that take some.

    Returns:
        ``{name: part}``, where a part is a use if all chunks are to be contracted together.
    """
    plain = only and factors is None and not operands and not buffers
    if plain and len(names) == 1:
        return {names[0]: CONTRACTIONS[names[0]][0](bound)}
    found: dict[str, Any] = {}
    if type(bound.form) is Outer and bound.positions > 1 and len(shared := [n for n in names if n in FORMED]) > 1:
        found = squares.formed(bound, shared)
    for n in names:
        contract, how = CONTRACTIONS[n]
        if n in found or (how == "first" and not first):
            continue
        if plain and (n != "total" or "per_sample" not in found):
            found[n] = contract(bound)
            continue
        if operands and n in operands:
            found[n] = contract(bound, operands[n])
            continue
        if not only and (how == "join" or (how == "concatenate" and _is_smaller(bound))):
            found[n] = bound
        elif n in ("squares", "sample_squares") and not only and squares.condenses(bound):
            found[n] = squares.condensed(bound)
        elif n == "total" and "per_sample" in found:
            found[n] = found["per_sample"][0].sum(0)
        elif n in SHARED and factors is not None and (key := second_moments.shared_factor(bound, SHARED[n])) is not None:
            known = factors.get((key, n))  # a copy, since whoever gets the results may change them
            found[n] = factors[key, n] = contract(bound) if known is None else known.clone()
        elif n in buffers and (first or n == "per_sample"):
            found[n] = _into(contract, bound, buffers[n])
        else:
            found[n] = contract(bound)
    return found


def keep(parts: list[Any], part: Any, how: str) -> None:
    """Add a part to those of earlier chunks; what is summed needs no memory of its own."""
    if how != "sum" or not parts or isinstance(part, Bound):
        parts.append(part)
    elif pages.may_overwrite():
        parts[0] += part
    else:
        parts[0] = parts[0] + part


def combine(name: str, parts: list[Any], buffer: Tensor | None = None) -> Any:
    """The result from the parts of all chunks; in ``buffer`` where it could be formed there."""
    if len(parts) == 1 and not isinstance(parts[0], Bound):
        return parts[0]
    contract, how = CONTRACTIONS[name]
    if isinstance(parts[0], Bound):
        return _into(contract, forms.join(parts), buffer)
    if how != "concatenate":
        return parts[0]
    if buffer is not None and all(_is_part(part, buffer) for part in parts):
        return buffer
    return torch.cat(parts)


def check_block(bound: Bound, parameter: str) -> None:
    """Raise if a parameter without Kronecker structure is so large that nobody can want its exact block; warn before that."""
    if not isinstance(bound.form, Direct):
        return
    if (rows := bound.form.shape.numel()) > LARGEST_BLOCK:
        raise NotImplementedError(
            f"{parameter} of shape {tuple(bound.form.shape)} has no Kronecker structure here, and its exact block would have "
            f"{rows} rows. Leave it out of params (in modules, freeze it), or use a diagonal such as diag_ggn."
        )
    if rows >= LARGE_BLOCK:
        size = rows**2 * bound.g.element_size() / 2**20
        warnings.warn(
            f"{parameter} of shape {tuple(bound.form.shape)} has no Kronecker structure here (as position embeddings have "
            f"none): its one factor is its exact block, {rows} x {rows}, of {size:.0f} MiB. If that is not wanted, leave it "
            "out of params (in modules, freeze it).",
            stacklevel=2,
        )


def do_with_products(form: Outer, names: Sequence[str]) -> bool:
    """Whether contractions take no more of a use than products of its inputs, and maybe their sums."""
    return (OF_PRODUCTS if form.sums is None else OF_PRODUCTS_AND_SUMS).issuperset(names)


def _into(contract: Callable[..., Any], b: Bound, buffer: Tensor | None) -> Any:
    """Contract, in the memory given if the result has its layout."""
    if buffer is None or buffer.dtype != b.g.dtype or not buffer.is_contiguous():
        return contract(b)
    return contract(b, out=buffer)


def _is_smaller(b: Bound) -> bool:
    """Whether a use takes less memory than the gradients that it stands for."""
    return not isinstance(b.form, Products) and b.g.shape[2:].numel() < b.form.shape.numel()


def _is_part(part: Tensor, buffer: Tensor) -> bool:
    return part.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
