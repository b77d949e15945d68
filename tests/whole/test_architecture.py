"""docs/architecture.md is true: its code runs and prints what it shows, its drawing is that of the imports, its recipes hold."""

import ast
import functools
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from documents import ROOT, run
from helpers import assert_close
from torch import nn
from torch.func import hessian

import curvfunc
from curvfunc import losses, reference
from curvfunc.rules import RULES, batch_axis

PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = {path.parent.name for path in (ROOT / "curvfunc").glob("*/__init__.py")}
Arrows = dict[str, set[str]]


@pytest.fixture(scope="module")
def page() -> Iterator[SimpleNamespace]:
    """The names that the page's code leaves; the rule and the loss that it registers go with the module."""
    registries: tuple[dict[Any, Any], ...] = (RULES, batch_axis.RULES, losses.CLOSED_FORMS)
    before, dtype = [dict(r) for r in registries], torch.get_default_dtype()
    yield SimpleNamespace(**run(PAGE))
    torch.set_default_dtype(dtype)
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


# -- the table


def test_every_cell_is_its_cotangent_and_its_contraction() -> None:
    lines = [line.strip("|").split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    columns, _, *rows = [[re.findall(r"`(\w+)`", cell) for cell in line] for line in lines]
    specs = {name.lower(): spec for name in curvfunc.__all__ if is_spec(spec := getattr(curvfunc, name))}
    specs["kfacempirical"] = curvfunc.EmpiricalKFAC
    told = 0
    for (cotangent,), *cells in rows:
        for contractions, functions in zip(columns[1:], cells, strict=True):
            for function in functions:
                spec = specs[function.replace("_", "")]()
                assert type(spec.cotangent).__name__ == cotangent
                assert {*contractions} <= {*spec.contractions}
                told += 1
    assert told > 10


def is_spec(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, curvfunc.Quantity)


# -- the drawing


def drawn() -> Arrows:
    """What each package may import: along all paths of arrows, and where the dotted ones end."""
    arrows = re.findall(r"^    (\w+) (-->|-\.->) (\w+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    solid: Arrows = {name: set() for name in PACKAGES}
    for start, _, end in [a for a in arrows if a[1] == "-->"]:
        solid[start].add(end)

    def along(name: str) -> set[str]:
        return solid[name].union(*(along(end) for end in solid[name]))

    allowed = {name: along(name) for name in solid}
    for start, _, end in [a for a in arrows if a[1] == "-.->"]:
        allowed[start].add(end)
    return allowed


def imported() -> Arrows:
    """What each package imports, inside of functions too."""
    found: Arrows = {name: set() for name in PACKAGES}
    for name in PACKAGES:
        for path in (ROOT / "curvfunc" / name).glob("**/*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    assert node.level == 0
                    modules = [f"{node.module}.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                else:
                    continue
                parts = [m.split(".") for m in modules]
                found[name] |= {p[1] if len(p) > 1 else "the public names" for p in parts if p[0] == "curvfunc"}
    return {name: found[name] - {name} for name in found}


def test_imports_follow_the_arrows() -> None:
    allowed = drawn()
    against = {name: sorted(found - allowed[name]) for name, found in imported().items() if found - allowed[name]}
    assert not against


def test_no_arrow_leads_back() -> None:
    assert all(name not in reachable for name, reachable in drawn().items())


def test_every_package_is_told() -> None:
    told = re.findall(r"^- \*\*(\w+)\*\*: \*[A-Z].*\?\*", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(told) == sorted(PACKAGES)


# -- the recipes


def test_the_page_runs_as_printed(page: SimpleNamespace) -> None:
    assert page.result.keys() == page.params.keys()


@pytest.mark.parametrize("shape", [(4, 3), (4, 6, 3)])
def test_the_new_layer_has_every_quantity(page: SimpleNamespace, float64: None, shape: tuple[int, ...]) -> None:
    X, y = torch.randn(shape), torch.randint(5, (4,))
    entries = 2 * X[0, ..., 0].numel()
    params = {"weight": torch.randn(2, 3), "bias": torch.randn(2), "head": torch.randn(5, entries)}

    def model_fn(params: Any, X: Any) -> Any:
        return F.linear(page.cosine_layer(X, params["weight"], params["bias"]).flatten(1).tanh(), params["head"])

    assert {(row.path, row.rule) for row in curvfunc.explain(model_fn, params, X).rows} == {
        ("plain", "cosine_layer"),
        ("plain", "linear"),
    }
    for name in ("batch_grad", "batch_l2", "variance", "sqrt_ggn", "diag_ggn"):
        assert_close(getattr(curvfunc, name)(model_fn, params, X, y), getattr(reference, name)(model_fn, params, X, y))


@pytest.mark.parametrize("options", [{}, {"mc_samples": 3}, {"subsampling": [4, 0, 4]}, {"chunk_size": 1}], ids=str)
def test_the_new_quantity_is_its_definition(page: SimpleNamespace, float64: None, options: dict[str, Any]) -> None:
    def drawn_alike() -> dict[str, Any]:
        return options | ({"generator": torch.Generator().manual_seed(7)} if "mc_samples" in options else {})

    arguments = page.model_fn, page.params, page.X, page.y
    got = page.batch_trace_ggn(*arguments, **drawn_alike())
    assert_close(got, page.reference_batch_trace_ggn(*arguments, **drawn_alike()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_new_loss_is_its_derivatives(page: SimpleNamespace, float64: None, reduction: str) -> None:
    out, y = torch.randn(6, 5), torch.poisson(torch.ones(6, 5))
    fn = functools.partial(F.poisson_nll_loss, reduction=reduction)
    loss = losses.normalize(fn)
    assert loss.name == "poisson_nll_loss"
    assert_close(losses.gradient(loss, out, y), torch.func.grad(fn)(out, y))
    dense = hessian(fn)(out, y)
    blocks = torch.stack([dense[n, :, n] for n in range(len(out))])
    root = losses.exact_root(loss, out, y)
    columns = root.columns(0, root.num)
    assert_close(torch.einsum("vnc,vnd->ncd", columns, columns), blocks)
    drawn = losses.sampled_root(loss, out, y, 20_000).columns(0, 20_000)
    assert_close(torch.einsum("vnc,vnd->ncd", drawn, drawn), blocks, rtol=0.05)


def test_the_new_loss_refuses_what_does_not_fit(page: SimpleNamespace) -> None:
    model_fn, params = curvfunc.functionalize(nn.Linear(3, 5))
    with pytest.raises(ValueError, match="poisson_nll_loss: the output has shape"):
        curvfunc.diag_ggn(model_fn, params, torch.randn(4, 3), torch.ones(4, 1), loss_fn=F.poisson_nll_loss)
