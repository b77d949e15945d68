"""The site without building it: its code runs as printed, every public name has a page, no link is dead, scripts are there.

`nox -s docs` builds it, with warnings as errors: names in docstrings that do not exist, and references that lead nowhere.
"""

import functools
import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from documents import BLOCK, ROOT, dead_anchors, dead_links, run

import curvfunc

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.glob("**/*.md") if not {"_build", "auto_gallery"} & {*path.parts})
WRITTEN = [path for path in PAGES if path.parent.name != "quantities" or path.stem == "index"]
ENTRIES = tomllib.loads((DOCS / "quantities.toml").read_text(encoding="utf-8"))
SCRIPTS = sorted((DOCS / "gallery").glob("plot_*.py"))
# These have tests of their own, since they leave something behind or need a peer
ELSEWHERE = {"architecture", "laplace"}
WITH_CODE = [path for path in WRITTEN if BLOCK.search(path.read_text(encoding="utf-8")) and path.stem not in ELSEWHERE]


def forget_backpack() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "backpack"]:
        del sys.modules[name]


@pytest.fixture
def _as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compile_backend: str) -> Iterator[None]:
    """Pictures go to a folder of their own, and modules that a page registers go again."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compile_backend))
    rules, modules, device = dict(curvfunc.rules.RULES), dict(sys.modules), torch.get_default_device()
    if device.type != "cpu":  # pages are printed, and drawn, from the CPU
        torch.set_default_device("cpu")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    forget_backpack()  # another test may have imported it in this process
    yield
    if device.type != "cpu":
        torch.set_default_device(device)
    curvfunc.rules.RULES.clear()
    curvfunc.rules.RULES.update(rules)
    forget_backpack()
    sys.modules.update({name: module for name, module in modules.items() if name.partition(".")[0] == "backpack"})


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_code_of_pages_runs_and_prints_what_is_shown(page: Path) -> None:
    for needed in {"sklearn", "matplotlib"} & {*re.findall(r"^(?:from|import) (\w+)", page.read_text("utf-8"), re.MULTILINE)}:
        pytest.importorskip(needed)
    run(page)


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if "example" in entry])
def test_examples_of_quantities_run(name: str) -> None:
    exec(ENTRIES[name]["example"], {})


# -- names


def documented() -> set[str]:
    """Names that a page of the reference or a quantity's page is about."""
    found = {f"curvfunc.{name}" for entry in ENTRIES.values() for name in entry["names"]}
    for path in (DOCS / "api").glob("*.md"):
        text = path.read_text(encoding="utf-8")
        found |= {*re.findall(r"^\.\. auto(?:function|class):: ([\w.]+)$", text, re.MULTILINE)}
        for name in re.findall(r"^\.\. automodule:: curvfunc\.(\w+)\n   :members:\n", text, re.MULTILINE):
            found |= {f"curvfunc.{name}"} | {f"curvfunc.{name}.{part}" for part in getattr(curvfunc, name).__all__}
    return found


def test_every_public_name_has_a_page() -> None:
    public = {f"curvfunc.{name}" for name in curvfunc.__all__}
    for name in curvfunc.__all__:
        if inspect.ismodule(module := getattr(curvfunc, name)):
            public |= {f"curvfunc.{name}.{part}" for part in module.__all__}
    assert len(public) > 100
    assert not sorted(public - documented())
    assert not sorted(documented() - public)


def test_every_function_of_a_quantity_is_in_the_table() -> None:
    told = {name for entry in ENTRIES.values() for name in entry["names"]}
    assert {*curvfunc.quantities.functions.__all__} | {*curvfunc.quantities.gram.__all__} <= told
    assert set(curvfunc.quantities.specs.__all__) - {"Loss", "Output", "Grad"} <= told
    for entry in ENTRIES.values():
        asked = {part.partition("(")[0] for parts in entry["shapes"] for part in parts.split(" or ")}
        assert asked <= {*entry["names"]}


def test_pages_of_quantities_are_listed_and_measured() -> None:
    listed = re.findall(r"^(\w+)$", (DOCS / "quantities" / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(ENTRIES)
    columns = re.search(r"^\|  \|(.*)\|$", (DOCS / "performance.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert columns
    for entry in ENTRIES.values():
        assert {*entry.get("measured", ())} <= {name.strip() for name in columns[1].split("|")}
        assert {*entry.get("pictures", ())} <= {path.stem.removeprefix("plot_") for path in SCRIPTS}


# -- links


def is_made(target: Path) -> bool:
    """Whether the build makes it: a quantity's page, or a page or picture of the gallery."""
    if target.parent == DOCS / "quantities":
        return target.stem in ENTRIES and target.suffix == ".md"
    script = re.fullmatch(r"(?:sphx_glr_)?(plot_\w+?)(?:_\d{3}(?:_2_00x)?\.png|\.rst|\.html)", target.name)
    if DOCS / "auto_gallery" in target.parents:
        return target.name == "index.rst" or bool(script and (DOCS / "gallery" / f"{script[1]}.py") in SCRIPTS)
    return False


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *WRITTEN], ids=lambda page: page.stem)
def test_no_link_is_dead(page: Path) -> None:
    assert [target for target in dead_links(page) if not is_made((page.parent / target).resolve())] == []
    assert dead_anchors(page) == []


def test_dead_anchors_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# `One` thing\n\n[a](#one-thing) [b](#two) [c](page.md#one-thing) [d](page.md#three)\n", encoding="utf-8")
    assert dead_anchors(page) == ["#two", "page.md#three"]


def test_every_page_is_in_a_table_of_contents() -> None:
    told = {DOCS / "index"}
    for page in PAGES:
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            told |= {(page.parent / line).resolve() for line in tree.splitlines() if line and not line.startswith(":")}
    assert not [page for page in WRITTEN if page.with_suffix("") not in told]
    assert not [page for page in told if not page.with_suffix(".md").exists() and not is_made(page.with_suffix(".md"))
                and page != DOCS / "auto_gallery" / "index"]  # fmt: skip


# -- formulas


def test_bars_of_norms_are_as_tall_as_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in ("latex2mathml", "sphinx"):
        pytest.importorskip(needed)
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    convert = importlib.import_module("mathml").convert
    assert convert(r"\lVert g \rVert^2 + |x|").count('<mo stretchy="false">') == 4
    assert '<mo stretchy="false">' not in convert(r"\left\lVert \frac{a}{b} \right\rVert")


# -- the gallery


def test_gallery_has_its_order() -> None:
    look = (DOCS / "_ext" / "gallery_look.py").read_text(encoding="utf-8")
    order = re.findall(r'"(\w+)"', look[look.index("ORDER = [") : look.index("class InOrder")])
    assert sorted(order) == [path.stem.removeprefix("plot_") for path in SCRIPTS]
    for page in (ROOT / "README.md", DOCS / "index.md", DOCS / "start.md"):
        assert ("sixteen" in page.read_text(encoding="utf-8")) == (len(SCRIPTS) == 16)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_have_a_title_and_a_picture(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    title, line = text.splitlines()[1:3]
    assert len(title) == len(line)
    assert text.count("# %%") >= 1
    assert "plt." in text.rpartition("# %%")[2]
    compile(text, str(script), "exec")


def test_readme_measures_what_the_page_does() -> None:
    def cells(path: Path) -> dict[tuple[str, str], str]:
        text = path.read_text(encoding="utf-8")
        table = re.search(r"^\|  \| batch_grad .*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
        assert table
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()]
        return {(row[0], head[i]): row[i] for row in rows for i in range(1, len(head))}

    assert cells(ROOT / "README.md").items() <= cells(DOCS / "performance.md").items()
