"""What all tests share: one thread, a fixed seed, float64 on request, GPU tests only where there is a GPU."""

import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Tests run in several processes, and their problems are small: more threads only get into each other's way.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """Makes float64 the default type of new tensors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def compile_backend() -> str:
    """A backend for ``torch.compile``: the default one where a compiler and Python's headers are there."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return "inductor" if compiler and headers else "aot_eager"
