"""BackPACK itself, to compare with. It imports torchvision for a data set only, which a stand-in can provide."""

import sys
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


def load() -> Any:
    """The package, or skip the tests."""
    if "backpack" not in sys.modules:
        standins = {name: ModuleType(name) for name in ("torchvision", "torchvision.datasets", "torchvision.transforms")}
        for name in ("MNIST", "Compose", "Normalize", "ToTensor"):
            setattr(standins["torchvision.datasets"], name, None)
            setattr(standins["torchvision.transforms"], name, None)
        missing = {name: m for name, m in standins.items() if name not in sys.modules}
        sys.modules.update(missing)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pytest.importorskip("backpack")
        finally:
            for name in missing:
                del sys.modules[name]
    return sys.modules["backpack"]


def kit() -> SimpleNamespace:
    """BackPACK's own modules."""
    load()
    from backpack.custom_module.branching import Parallel
    from backpack.custom_module.permute import Permute
    from backpack.custom_module.reduce_tuple import ReduceTuple
    from backpack.custom_module.scale_module import ScaleModule

    return SimpleNamespace(Parallel=Parallel, Permute=Permute, ReduceTuple=ReduceTuple, ScaleModule=ScaleModule)
