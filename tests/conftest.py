"""What all tests share: one thread, a fixed seed, float64 on request, GPU tests only where there is a GPU.

``CURVFUNC_TEST_DEVICE=cuda python -m pytest -n 8`` makes the tensors, modules and generators of all tests on that device.
"""

import contextlib
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Tests run in several processes, and their problems are small: more threads only get into each other's way.
torch.set_num_threads(1)


class _OnDefaultDevice(type):
    """The type of ``torch.Generator``s that are made on the default device unless the test says another."""

    def __call__(cls, device: torch.device | str | None = None) -> torch.Generator:
        return GENERATOR(torch.get_default_device() if device is None else device)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, GENERATOR)


GENERATOR = torch.Generator
if "CURVFUNC_TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["CURVFUNC_TEST_DEVICE"])
    torch.Generator = _OnDefaultDevice("Generator", (), {})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and what is of the CPU alone where tensors are elsewhere."""
    lacking = {"gpu": not torch.cuda.is_available(), "cpu": torch.get_default_device().type != "cpu"}
    for item in items:
        for marker, lacks in lacking.items():
            if lacks and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device" if marker == "gpu" else "tells of CPUs"))


@pytest.fixture(autouse=True)
def _differentiable_recurrence(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keeps cuDNN from recurrent modules, whose backward pass it has for training mode alone, and not under torch.func."""
    recurrent = any(name in request.node.nodeid.lower() for name in ("lstm", "gru", "rnn", "recurrent", "script"))
    with torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext():
        yield


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
