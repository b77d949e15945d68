"""From one batch to a data set: how results of batches merge, the loop over them, and how it goes on after a stop.

Imports quantities, and what is below them. `curvfunc.data.merging` has the laws' arithmetic as pure functions of a state,
`curvfunc.data.loop` the loop; batches, stores and checkpoints are what the loop meets outside, processes and shards what others
have.
"""

from curvfunc.data.call import compute
from curvfunc.data.loop import accumulate
from curvfunc.data.merging import Accumulation, accumulation, merge

__all__ = ["Accumulation", "accumulate", "accumulation", "compute", "merge"]
