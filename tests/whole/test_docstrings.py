"""`help` suffices: each public function tells its arguments and results with their shapes, what it raises, and an example."""

import ast
import dataclasses
import functools
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import curvfunc
from curvfunc.tensors.docstrings import ARGUMENTS, SECTIONS, completed, documented, entries, split, told

PLACES = (
    curvfunc,
    curvfunc.diagnostics,
    curvfunc.influence,
    curvfunc.kronecker,
    curvfunc.laplace,
    curvfunc.optim,
    curvfunc.private,
)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{place.__name__}.{name}": value
    for place in PLACES
    for name in place.__all__
    if callable(value := getattr(place, name)) and not inspect.isclass(value)
}
CLASSES: dict[str, type] = {
    f"{place.__name__}.{name}": value
    for place in PLACES
    for name in place.__all__
    if inspect.isclass(value := getattr(place, name))
}

# Arguments that hold no tensors, or tensors that the function does not look at, whatever their annotation says
NO_TENSORS = {
    "data",
    "due",
    "group",
    "model_fn",
    "reduction",
    "specs",
    "structure",
    "functions",
    "function",
    "operation",
    "module",
}
SHAPE = re.compile(r"\[[^\]\n]*\]|\bscalars?\b|without axes|\bshapes?\b")
KINDS = r"ValueError|TypeError|NotImplementedError|RuntimeError|ArithmeticError|ImportError"


def sections(function: Any) -> dict[str, str]:
    return split(function.__doc__)[1]


def holds_tensors(name: str, parameter: inspect.Parameter) -> bool:
    told = str(parameter.annotation)
    if name in NO_TENSORS or "Callable" in told or "Sequence[int]" in told:
        return name == "subsampling"
    return parameter.annotation is Any or bool(re.search(r"\bTensor\b|torch\.Tensor", told))


def test_all_of_them_are_looked_at() -> None:
    assert {"curvfunc.kfac", "curvfunc.optim.step", "curvfunc.kronecker.decompose"} <= FUNCTIONS.keys()
    assert len(FUNCTIONS) > 90
    assert not any(isinstance(f, ModuleType) for f in FUNCTIONS.values())


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_argument_is_told_with_its_shape(function: Any) -> None:
    told = entries(sections(function).get("Args:", ""))
    parameters = inspect.signature(function).parameters
    assert list(told) == list(parameters)
    without = [name for name, p in parameters.items() if holds_tensors(name, p) and not SHAPE.search(told[name])]
    assert not without


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_results_are_told_with_their_shapes(function: Any) -> None:
    result = inspect.signature(function).return_annotation
    if result in (None, "None"):
        return
    told = sections(function).get("Returns:", "")
    public = [name.rpartition(".")[2] for name in CLASSES] + ["Callable", "function", "tree", "bool"]
    named = any(re.search(rf"`+{name}`+", told) for name in public)
    assert SHAPE.search(told) or named or "as given" in told
    if result is Any or "Tensor" in str(result):
        assert SHAPE.search(told)


@functools.cache
def functions_of(module: str) -> dict[str, ast.FunctionDef]:
    source = inspect.getsource(sys.modules[module])
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def raised(function: Any) -> set[str]:
    """The errors that a function, and those of its file that it calls, raise."""
    function = inspect.unwrap(function)
    nodes, seen, found = functions_of(function.__module__), set[str](), set[str]()
    todo = [function.__name__]
    while todo:
        name = todo.pop()
        if name in seen or name not in nodes:
            continue
        seen.add(name)
        for node in ast.walk(nodes[name]):
            if isinstance(node, ast.Name):
                todo.append(node.id)
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                found |= {node.exc.func.id} & set(KINDS.split("|"))
    return found


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_errors_are_told(function: Any) -> None:
    told = set(re.findall(KINDS, sections(function).get("Raises:", "")))
    assert raised(function) <= told
    if "model_fn" in inspect.signature(function).parameters:
        assert told >= {"TypeError", "ValueError"}


def test_errors_of_helpers_are_seen() -> None:
    assert raised(curvfunc.kronecker.power) == {"TypeError", "ValueError"}
    assert raised(curvfunc.fisher_vp) >= {"NotImplementedError"}


# Functions that check nothing, and those that no paper is about and no peer has
RAISE_NOTHING = {"empty_cache", "operation", "kronecker.dense", "kronecker.diagonal", "kronecker.trace"}
WITHOUT_SOURCE = {
    *("accumulate", "accumulation", "check", "check_rule", "compute", "empty_cache", "explain", "functionalize", "merge"),
    *("operation", "rule", "diagnostics.inner_products", "influence.queries", "laplace.covariance", "laplace.sample"),
    *(f"kronecker.{name}" for name in ("dense", "diagonal", "logdet", "matmul", "of_diagonal", "solve", "structure", "trace")),
    *("optim.apply_updates", "optim.chain", "optim.scale", "optim.step"),
}


@pytest.mark.parametrize(("section", "without"), [("Raises:", RAISE_NOTHING), ("References:", WITHOUT_SOURCE)])
def test_errors_and_references_are_told_by_all_that_have_some(section: str, without: set[str]) -> None:
    lacking = {name.removeprefix("curvfunc.") for name, function in FUNCTIONS.items() if section not in sections(function)}
    assert lacking == without


def test_papers_stand_under_references() -> None:
    cited = re.compile(r"\b(?:19|20)\d\d\b|\bet al\.")
    for name, value in {**FUNCTIONS, **CLASSES}.items():
        doc = inspect.getdoc(value) or ""
        assert not cited.search(doc.partition("\nReferences:")[0].partition("\nExample:")[0]), name


@pytest.mark.parametrize("name", ["Diagonal", "EKFAC", "KFAC", "NewtonCG"])
def test_optimizers_need_no_other_page(name: str) -> None:
    parts = split(getattr(curvfunc.optim, name).__doc__)
    assert "u = " in parts[0] or "u solves" in parts[0]
    assert parts[1].keys() == {"References:", "Example:"}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_there_is_an_example(function: Any) -> None:
    assert ">>> " in sections(function).get("Example:", "")


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_nothing_is_left_to_be_looked_up(function: Any) -> None:
    """References to other functions are for more about a subject, not for what an argument or an error is."""
    doc = inspect.getdoc(function) or ""
    assert not re.search(r"[Aa]rguments: see|see `curvfunc\.(quantities|data|operators)", doc)
    assert not re.search(r"^ *[\w, ]+: As (for |in )?`[\w.]+`\.$", doc, re.MULTILINE)
    assert all(len(line) <= 128 for line in doc.splitlines())


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_sections_have_one_order(function: Any) -> None:
    doc = inspect.getdoc(function) or ""
    summary, _, rest = doc.partition("\n")
    assert summary.endswith(".")
    assert not rest or rest.startswith("\n")
    found = [line for line in doc.splitlines() if line in SECTIONS]
    assert found == [name for name in SECTIONS if name in found]


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_classes_tell_their_fields(cls: type) -> None:
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}(")  # what dataclasses and named tuples make up
    fields = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else getattr(cls, "_fields", ())
    attributes = (inspect.getdoc(cls) or "").partition("Attributes:")[2]
    assert [name for name in fields if name[0] != "_" and f"\n    {name}: " not in attributes] == []


@pytest.mark.parametrize("name", ["Diagonal", "EKFAC", "KFAC", "NewtonCG", "Preconditioned"])
def test_optimizers_tell_their_arguments(name: str) -> None:
    """Those of the transformation and of the base class among them."""
    make = getattr(curvfunc.optim, name).__init__
    assert list(told(make)) == list(inspect.signature(make).parameters)[1:]


# -- what is pasted


def test_what_is_shared_is_pasted_in_the_order_of_the_arguments() -> None:
    shared = entries("x: An input [N].\ny: Targets [N],\n    of the input."), entries("ValueError: If it is not.")

    @documented(*shared)
    def function(x: int, own: int, *, y: int) -> int:
        """One line.

        More.

        Args:
            own: A thing
                of two lines [M].

        Returns:
            [N].

        Raises:
            TypeError: Too.
            ValueError: If it is
                something else.

        Example:
            >>> 1 + 1
            2
        """
        return x

    assert function.__doc__ == (
        "One line.\n\nMore.\n\nArgs:\n    x: An input [N].\n    own: A thing\n        of two lines [M].\n    y: Targets [N],\n"
        "        of the input.\n\nReturns:\n    [N].\n\nRaises:\n    ValueError: If it is not.\n        If it is\n        something else.\n"
        "    TypeError: Too.\n\n"
        "Example:\n    >>> 1 + 1\n    2\n"
    )
    assert function(3, 4, y=5) == 3


def test_the_function_itself_is_returned_and_one_without_docstring_stays_so() -> None:
    def function() -> None: ...

    assert documented()(function) is function
    assert function.__doc__ is None


def test_indentation_of_the_source_does_not_matter() -> None:
    """Newer versions of Python take it away themselves."""
    doc = "One line.\n\n    Returns:\n        [N].\n    "
    assert completed(doc, ("X",), ARGUMENTS, {}) == completed(inspect.cleandoc(doc), ("X",), ARGUMENTS, {})


def test_help_on_kfac_has_the_shapes_of_all_arguments_and_results() -> None:
    shown = re.sub(r"\s+", " ", inspect.getdoc(curvfunc.kfac) or "")
    for text in (
        "model_fn: ``(params, X) -> output [N, ...]``",
        "params: Pytree of real floating-point tensors [*shape]",
        "X: Input, a tensor [N, ...]",
        "y: Targets, a tensor [N, ...]",
        "subsampling: Indices [M] of samples",
        "(B [o, o], A [k, k]) for a weight",
        "(B [numel, numel],)",
        "ValueError: ",
        ">>> ",
    ):
        assert text in shown


def test_without_docstrings_all_works() -> None:
    code = "import torch, curvfunc; assert False; f = curvfunc.kfac; print(f.__doc__, curvfunc.batch_l2.__name__)"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["None", "batch_l2"]
