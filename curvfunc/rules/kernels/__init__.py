"""Functions of torch (2.13) whose kernels give wrong derivatives without a word, or none, and what runs in their place.

A kernel may be right in a forward pass, and wrong in one of three other places: in a backward pass (of first order: under
vmap over columns or samples, or with certain strides), when its backward pass is differentiated, and when that is
differentiated again. `INSTEAD` has a table for each number of derivatives, ``{function: function with the same values}``;
whoever watches a forward pass asks it once per call (`Instead`, `curvfunc.engine.observer`). What runs in place of a kernel is
written out in operations that are right, or is the same kernel on tensors that it treats right.

`PARTS` has functions that are right, but that are watched in their parts where it matters how they curve.

One file per subject, and the tables. `curvfunc.check` finds kernels that are not listed here.
"""

from curvfunc.rules.kernels.norms import standardized
from curvfunc.rules.kernels.table import INSTEAD, PARTS, Instead

__all__ = ["INSTEAD", "PARTS", "Instead", "standardized"]
