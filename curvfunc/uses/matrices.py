"""The form of a matrix's use from that of its transpose, or of a block of it."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from curvfunc.uses.forms import Form, Outer, adapted

__all__ = ["block_of", "transposed"]


def transposed(form: Form) -> Form | None:
    """The form of the use of a matrix's transpose; None if it has to be formed."""
    if not isinstance(form, Outer) or form.arrange is not None or len(form.shape) != 2:
        return None
    shape, cotangent = torch.Size(form.shape[::-1]), partial(_of_one_group, form.cotangent)
    found: Form = adapted(form, cotangent=cotangent, inputs_first=not form.inputs_first, shape=shape)
    return found


def block_of(form: Form, dim: int, start: int, shape: torch.Size) -> Form | None:
    """The form of a matrix of that shape, of which rows (``dim`` 0) or columns (1) are used; None if it has to be formed.

    The features that are not used are zero.

    Args:
        form: Of the use of the block.
        dim: The axis along which it is a part.
        start: Where it starts.
        shape: Of the whole.
    """
    if not isinstance(form, Outer) or form.arrange is not None or len(form.shape) != 2:
        return None
    around = (start, shape[dim] - start - form.shape[dim])
    cotangent = partial(_of_one_group, form.cotangent)
    found: Form
    if (dim == 0) != form.inputs_first:
        found = adapted(form, cotangent=lambda g: F.pad(cotangent(g), around), shape=shape)
    else:
        inputs: Callable[[], Tensor] = lambda: F.pad(form.inputs(), around)
        found = adapted(form, inputs=inputs, cotangent=cotangent, shape=shape, moment=None, sums=None, part=None)
    return found


def _of_one_group(cotangent: Callable[[Tensor], Tensor], g: Tensor) -> Tensor:
    """g [v, n, 1, s, o] of a matrix of which a part, or the transpose, is used."""
    g = cotangent(g)
    if g.shape[2] != 1:
        raise NotImplementedError(
            f"a rule gives an Outer form with {g.shape[2]} groups, and the operation takes a part or the transpose of a "
            "parameter. Pass it the whole parameter, or let the rule return NotImplemented or a Direct form."
        )
    return g
