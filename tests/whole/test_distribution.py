"""What belongs to the package beside its code: `python -m curvfunc`, one version, the papers of the project."""

import re
import subprocess
import sys
import tomllib

import pytest
import torch
from documents import ROOT
from torch._inductor import config as inductor

import curvfunc
from curvfunc import __main__ as module

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def lines() -> dict[str, str]:
    """What is told, by subject."""
    return dict(re.split(r" {2,}", line, maxsplit=1) for line in module.report().splitlines())


def test_the_module_runs_and_tells_what_a_report_needs() -> None:
    done = subprocess.run([sys.executable, "-m", "curvfunc"], capture_output=True, text=True, check=True, timeout=120)
    told = dict(re.split(r" {2,}", line, maxsplit=1) for line in done.stdout.splitlines())
    assert told["curvfunc"] == curvfunc.__version__
    assert told["torch"] == torch.__version__
    assert told["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert {"platform", "devices", "threads", "default dtype", "CUDA", "compiler", "optree", "scipy", "tqdm"} <= set(told)


def test_it_follows_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert lines()["threads"].startswith(f"{threads + 1} in an operation")
    finally:
        torch.set_num_threads(threads)
    assert not lines()["optree"].startswith("not")
    monkeypatch.setattr(module, "OPTIONAL", {"no-such-package": "nothing"})
    assert lines()["no-such-package"] == "not installed (nothing)"
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert lines()["compiler"] == "none of no-such-compiler (torch.compile needs one)"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"Card {i}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert lines()["devices"].startswith("cpu, cuda:0 (Card 0), cuda:1 (Card 1)")
    assert lines()["CUDA"] == "13.0"


def test_the_version_is_in_one_place() -> None:
    """Where it has to stand once more, it is the same."""
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1] == curvfunc.__version__  # type: ignore[index]
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", log, re.MULTILINE)
    assert released[0] == curvfunc.__version__ if released else f"this is to be {curvfunc.__version__}" in log


@pytest.mark.skipif(not (ROOT / ".github").exists(), reason="not in the source distribution")
def test_a_bug_report_asks_for_what_helps() -> None:
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.md").read_text(encoding="utf-8")
    assert form.startswith("---\nname:")
    for asked in ("python -m curvfunc", "curvfunc.explain(model_fn, params, X)", "curvfunc.check(model_fn, params, X, y)"):
        assert asked in form


def test_names_in_the_changelog_are_there() -> None:
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for name in re.findall(r"`curvfunc\.(\w+)`", log):
        assert name == "compat" or hasattr(curvfunc, name)


def test_the_source_distribution_has_the_papers() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {"CHANGELOG.md", "CITATION.cff", "SECURITY.md", "LICENSE", "README.md"} <= set(included)
    assert all((ROOT / name).exists() for name in included)
