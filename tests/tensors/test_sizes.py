"""Parts of sizes, symbols or not."""

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from curvfunc.tensors.sizes import hint, ranges


@pytest.mark.parametrize(("total", "size", "parts"), [(7, 3, 3), (6, 3, 2), (2, 5, 1), (0, 5, 0), (4, 0, 4)])
def test_ranges(total: int, size: int, parts: int) -> None:
    found = ranges(total, size)
    assert len(found) == parts
    assert [i for start, stop in found for i in range(start, stop)] == list(range(total))
    assert all(stop - start <= max(1, size) for start, stop in found)


def symbol(value: int) -> torch.SymInt:
    from torch._dynamo.source import ConstantSource

    env = ShapeEnv()
    source = ConstantSource("n")
    found = env.create_symintnode(env.create_symbol(value, source), hint=value, source=source)
    assert isinstance(found, torch.SymInt)
    return found


def test_symbols_stay_symbols() -> None:
    n = symbol(7)
    assert hint(n) == 7
    found = ranges(n, 3)
    assert [(hint(a), hint(b)) for a, b in found] == [(0, 2), (2, 4), (4, 7)]
    assert n.node.shape_env.guards == []
    assert hint(4) == 4
