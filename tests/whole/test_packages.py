"""The plan of the house: no circle of files, no file in which subjects meet, few doors. `lint-imports` has the rest."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import curvfunc

HOUSE = Path(curvfunc.__file__).parent
MOST_LINES = 450
MOST_ENTRIES = 12
FOR_JOBS = {
    "data",
    "diagnostics",
    "influence",
    "kronecker",
    "laplace",
    "optim",
    "private",
}  # what users do with results: rooms above the house's own, which know nothing of them

# Files of docstrings or tables may be longer; why they are.
LONGER = {
    "quantities/functions.py": "docstrings of the functions, and a line of code for each",
    "operators/products.py": "docstrings of the functions, and few lines of code for each",
}


def module_name(path: Path) -> str:
    parts = ("curvfunc", *path.relative_to(HOUSE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(HOUSE.rglob("*.py"))}


def imported(module: str, path: Path, source: str) -> Iterator[str]:
    """The files that a file names in its imports, wherever these stand."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            for alias in node.names:  # a file of the package, or else a name that its __init__ has
                inner = f"{node.module}.{alias.name}"
                if (found := inner if inner in FILES else node.module or "") in FILES:
                    yield found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Files that import each other in a circle, if there are any."""
    done: set[str] = set()
    for start in graph:
        way: list[str] = []
        stack: list[tuple[str, bool]] = [(start, False)]
        while stack:
            name, left = stack.pop()
            if left:
                way.pop()
                done.add(name)
            elif name in way:
                return [*way[way.index(name) :], name]
            elif name not in done:
                way.append(name)
                stack.append((name, True))
                stack.extend((other, False) for other in sorted(graph.get(name, ())))
    return []


def test_no_circle_of_files() -> None:
    graph = {name: set(imported(name, path, path.read_text(encoding="utf-8"))) for name, path in FILES.items()}
    assert sum(map(len, graph.values())) > len(FILES)  # they are seen
    assert circle(graph) == []


def test_circles_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []  # two ways are no circle
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"a"}}) == ["a", "a"]
    source = "def f():\n    from curvfunc.engine import graph\n    from curvfunc.rules import RULES\n"
    assert list(imported("x", HOUSE, source)) == ["curvfunc.engine.graph", "curvfunc.rules"]


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_one_subject_per_file(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES or path.relative_to(HOUSE).as_posix() in LONGER


def test_exceptions_are_files() -> None:
    assert all((HOUSE / name).is_file() for name in LONGER)


def test_few_entries_at_the_top() -> None:
    entries = {p.name for p in HOUSE.iterdir()} - {"__init__.py", "__main__.py", "py.typed", "__pycache__"}
    assert len(entries - FOR_JOBS) <= MOST_ENTRIES
    assert all((HOUSE / name / "__init__.py").is_file() for name in entries)  # packages, no loose files
