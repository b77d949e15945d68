"""How operations use their parameters: one function per family of operations, keyed by the operation."""

from curvfunc.rules import attention, axis_table, conv, embedding, linear, matmul, norm, recurrent, scale
from curvfunc.rules.registry import (
    BUILT_IN,
    DECOMPOSITIONS,
    EXPANSIONS,
    RULES,
    SPLITS,
    TRANSPOSES,
    Rule,
    Use,
    operation,
    rule,
)

__all__ = ["DECOMPOSITIONS", "EXPANSIONS", "RULES", "SPLITS", "TRANSPOSES", "Rule", "Use", "operation", "rule"]

_ = (attention, axis_table, conv, embedding, linear, matmul, norm, recurrent, scale)  # they register themselves
BUILT_IN |= {*RULES, *DECOMPOSITIONS}
