"""Which parameters are resolved, where there is a choice: by the number of columns that go back through the model.

Parameters that are curved by products of pairs alone have their Hessian's second term either from columns of these and of
residuals, which all parameters before an operation share, or from Hessian-vector products of their own.
"""

import math

from curvfunc.engine.sites import Site, Trace
from curvfunc.hessian.products import num_columns
from curvfunc.hessian.residuals import Curvature
from curvfunc.rules.graph_axis import shape_of
from curvfunc.tensors.sizes import hint
from curvfunc.uses.forms import Outer

__all__ = ["resolve", "uses_of"]

# What columns cost, in backward passes of one; measured on gated MLPs and networks with squeeze and excitation.
PRODUCT = 3.0  # a Hessian-vector product
FORMED = 1.5  # forming the gradients of samples in all layers that have shared positions


def resolve(trace: Trace, found: Curvature) -> Curvature:
    """Resolve those of the resolvable parameters with which the columns cost least.

    Operations behind a parameter are behind those before it, too. So parameters are added in the order of the columns that each
    of them would need by itself, and where to stop is what is chosen.
    """
    if not found.resolvable:
        return found
    behind = _columns_behind(found)
    mine = [1 << i for i in range(found.resolvable.bit_length()) if found.resolvable >> i & 1]
    alone = {mask: _needed(behind, mask) for mask in mine}
    column = 1 + FORMED * _share(trace, found)
    best, least = 0, None
    for bound in (-1, *sorted(set(alone.values()))):
        chosen = sum(mask for mask in mine if alone[mask] <= bound)
        curved = found.curved & ~chosen
        cost = PRODUCT * num_columns(trace, uses_of(trace, curved)) + column * _needed(behind, ~curved)
        if least is None or cost < least:
            best, least = chosen, cost
    return found.resolved(best)


def uses_of(trace: Trace, targets: int) -> dict[int, list[int]]:
    """``{parameter: its sites}`` for the parameters in a mask."""
    found: dict[int, list[int]] = {}
    for j, site in enumerate(trace.sites):
        for i in site.forms:
            if targets >> i & 1:
                found.setdefault(i, []).append(j)
    return found


def _columns_behind(found: Curvature) -> list[tuple[int, int]]:
    """For each residual, pair and softmax or norm, the parameters that take columns of it, and how many these are."""
    columns = [(pair.targets, hint(pair.columns)) for pair in found.pairs]
    for r in found.smooth:
        own = found.meeting(r.input, math.prod(r.shape))
        columns.append((r.reached & own.rest, hint(math.prod(r.shape)) // max(1, hint(r.shape[r.axis]))))
    for row in found.rows:
        own = found.meeting(row.input, math.prod(row.shape))
        entries = hint(row.rows) * hint(row.width)
        if row.centers and not row.spared(own.own):
            columns.append((row.reached, entries))
        else:
            columns += [(row.reached & own.rest, entries), (row.reached, hint(row.columns))]
    return columns


def _share(trace: Trace, found: Curvature) -> float:
    """What part of the layers, by the entries of their outputs, has resolvable parameters, and their gradients to be formed."""
    sizes = [hint(math.prod(shape_of(edge) or ())) for edge in found.layers()]
    formed = sum(hint(math.prod(s.shape)) for s in trace.sites if _has_positions(s, found.resolvable))
    return min(1.0, formed / max(1, sum(sizes)))


def _has_positions(site: Site, targets: int) -> bool:
    entries = math.prod(site.shape) // max(1, site.shape[site.axis])
    return any(targets >> i & 1 and isinstance(f, Outer) and entries > f.shape[0] for i, f in site.forms.items())


def _needed(behind: list[tuple[int, int]], resolved: int) -> int:
    """The number of columns with which these parameters are resolved."""
    return sum(number for targets, number in behind if targets & resolved)
