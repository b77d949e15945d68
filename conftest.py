"""What the examples in docstrings take for granted: torch, and the public names of curvfunc."""

from typing import Any

import pytest
import torch

import curvfunc


@pytest.fixture(autouse=True)
def _names_of_examples(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(torch=torch, nn=torch.nn, F=torch.nn.functional, curvfunc=curvfunc)
    doctest_namespace.update({name: getattr(curvfunc, name) for name in curvfunc.__all__})
