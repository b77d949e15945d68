"""``python -m curvfunc`` tells what a report needs: versions, devices, threads, and what is available."""

import importlib.metadata
import platform
import shutil
import sys

import torch

import curvfunc

OPTIONAL = {"scipy": "to_scipy, eigsh", "tqdm": "progress bars", "numpy": "to_scipy, eigsh"}  # what each one is for


def report() -> str:
    """A line for each subject."""
    lines = {
        "curvfunc": curvfunc.__version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} ({sys.implementation.name})",
        "platform": platform.platform(),
        "devices": ", ".join(_devices()),
        "threads": f"{torch.get_num_threads()} in an operation, {torch.get_num_interop_threads()} beside each other",
        "default dtype": str(torch.get_default_dtype()),
        "CUDA": _cuda(),
        "compiler": _compiler(),
        "optree": _version("optree") or "not installed",
        **{name: _version(name) or f"not installed ({use})" for name, use in OPTIONAL.items()},
    }
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines.items())


def _devices() -> list[str]:
    found = ["cpu"]
    found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return found + (["mps"] if torch.backends.mps.is_available() else [])


def _cuda() -> str:
    if torch.version.cuda is None:
        return f"ROCm {torch.version.hip}" if torch.version.hip else "not in this build of torch"
    return torch.version.cuda if torch.cuda.is_available() else f"{torch.version.cuda}, and no device that works"


def _compiler() -> str:
    """What torch.compile would call for the CPU; it asks for this at the first compilation only."""
    from torch._inductor import config, exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return shutil.which(get_cpp_compiler()) or get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        cxx = config.cpp.cxx
        tried = cxx if isinstance(cxx, (list, tuple)) else (cxx,)
        return f"none of {', '.join(name for name in tried if name)} (torch.compile needs one)"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(report())
