"""What contractions give where there is nothing to contract: no samples, or outputs without entries."""

from typing import Any

import torch
from torch import Tensor

from curvfunc.engine.contractions import MEASURED, check_block
from curvfunc.tensors.precision import wide
from curvfunc.uses.forms import direct

__all__ = ["sums_of_nothing"]


def sums_of_nothing(name: str, p: Tensor, columns: int, samples: int) -> Any:
    """The part of a contraction for one parameter where no entry of the output contributes to anything."""
    lead: dict[str, tuple[int, ...]] = {
        "per_sample": (columns, samples),
        "sample_squares": (samples,),
        "sample_norms": (samples,),
        "gram": (columns, samples, columns, samples),
    }
    if "input_factor" in name:
        return None
    kinds = dict.fromkeys(MEASURED, "products with an inverse")
    kinds |= {"rotated_squares": "second moments in an eigenbasis", "projected": "projections"}
    if name in kinds:
        leave = "EKFAC" if name == "rotated_squares" else "them"
        raise ValueError(f"{kinds[name]} need samples and outputs, and there are none. Leave {leave} out.")
    dtype = p.dtype if name in ("total", "per_sample", "weighted_total") else wide(p.dtype)
    if name == "factors" or name.startswith("output_factor"):
        check_block(direct(p.new_zeros(()).expand(1, samples, *p.shape)), "a parameter")
        block = p.new_zeros(p.numel(), p.numel(), dtype=dtype)
        return (block,) if name == "factors" else block
    own = torch.Size(()) if name in ("sample_norms", "gram") else p.shape
    return p.new_zeros(torch.Size(lead.get(name, ())) + own, dtype=dtype)
