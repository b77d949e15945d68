"""From one batch to a data set: how results of batches merge, the loop over them, and how it goes on after a stop.

Imports quantities, operators, and what is below them. `curvfunc.data.merging` has the laws' arithmetic as pure functions of a
state, `curvfunc.data.loop` the loop; batches, stores and checkpoints are what the loop meets outside, processes and shards what
others have. `curvfunc.data.operators` has the matrices of batches and of data sets, `curvfunc.data.passes` the loop of their
products.
"""

from curvfunc.data.call import compute
from curvfunc.data.loop import accumulate
from curvfunc.data.merging import Accumulation, accumulation, merge
from curvfunc.data.operators import fisher_operator, ggn_operator, hessian_operator

__all__ = [
    "Accumulation",
    "accumulate",
    "accumulation",
    "compute",
    "fisher_operator",
    "ggn_operator",
    "hessian_operator",
    "merge",
]
