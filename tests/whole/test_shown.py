"""What objects show of themselves: short, with what tells them apart, without the numbers in them; tables in notebooks."""

import re
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import optree
import pytest
import torch
from torch import nn

import curvfunc
from curvfunc import DiagGGN, Grad, Variance, influence, kronecker, laplace, optim


@pytest.fixture(scope="module")
def made() -> SimpleNamespace:
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 3)))
    X, y = torch.randn(8, 4), torch.arange(8) % 3
    structure = kronecker.structure(model_fn, params, X)
    K = kronecker.decompose(curvfunc.kflr(model_fn, params, X, y, joined=True), structure)
    return SimpleNamespace(model_fn=model_fn, params=params, X=X, y=y, structure=structure, K=K)


def test_operators(made: SimpleNamespace) -> None:
    G = curvfunc.ggn_operator(made.model_fn, made.params, made.X, made.y)
    assert repr(G) == "LinearOperator(323 x 323, torch.float32, cpu, of 4 parameters)"
    assert repr(G + 0.1) == repr(G)
    linear_fn, weight = curvfunc.functionalize(nn.Linear(4, 3, bias=False))
    assert repr(curvfunc.ggn_operator(linear_fn, weight, made.X, made.y)).endswith("of 1 parameter)")
    assert repr(curvfunc.spectral_density(G, num_steps=5, num_vectors=2)) == "Spectrum(nodes [2, 5], of 323 eigenvalues)"


def test_kronecker(made: SimpleNamespace) -> None:
    assert repr(made.structure) == "Structure(0.weight [40, 4], 0.bias [40], 2.weight [3, 40], 2.bias [3])"
    assert repr(made.K) == "Decomposition(0.weight + 0.bias: Kronecker 40 x 5, 2.weight + 2.bias: Kronecker 3 x 41)"
    assert repr(made.K.blocks[1]) == "Block(2.weight [3, 40], 2.bias [3])"
    separate = kronecker.decompose(curvfunc.kflr(made.model_fn, made.params, made.X, made.y), made.structure)
    assert "0.weight: Kronecker 40 x 4, 0.bias: exact 40" in repr(separate)
    D = kronecker.of_diagonal(curvfunc.diag_ggn(made.model_fn, made.params, made.X, made.y), made.structure)
    assert "2.bias: diagonal 3" in repr(D)


def test_of_many_parameters_the_first_ones() -> None:
    model_fn, params = curvfunc.functionalize(nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(9)]))
    structure = kronecker.structure(model_fn, params, torch.randn(3, 2))
    assert repr(structure).endswith("5.weight [2, 2], ... 3 more)")
    assert "8.weight" not in repr(kronecker.of_diagonal(params | {n: p.abs() for n, p in params.items()}, structure))


def test_decompositions_are_shown_under_vmap_and_with_anything_in_them(made: SimpleNamespace) -> None:
    told: list[str] = []

    def looked(factor: torch.Tensor) -> torch.Tensor:
        told.append(repr(optree.tree_map(lambda t: t * factor, made.K)))
        return factor

    torch.vmap(looked)(torch.ones(2))
    assert told == [repr(made.K)]
    assert "?" in repr(optree.tree_map(lambda _: None, made.K, none_is_leaf=True))


def test_transformations(made: SimpleNamespace) -> None:
    diagonal = optim.scale_by_diagonal(DiagGGN(), damping=0.1)
    assert repr(diagonal) == "scale_by_diagonal(DiagGGN(mc_samples=0), damping=0.1, exponent=1.0, decay=0.95)"
    assert repr(optim.chain(diagonal, optim.momentum(0.9), optim.scale(-0.5))) == (
        f"chain({diagonal!r}, momentum(0.9, average=False), scale(-0.5))"
    )
    kfac = optim.scale_by_kfac(made.structure, damping=0.2)
    assert repr(kfac).startswith("scale_by_kfac(KFAC(mc_samples=1")
    assert "damping=0.2, split='pi', decay=0.95)" in repr(kfac)
    assert repr(optim.scale_exactly(kfac)) == f"scale_exactly({kfac!r}, damping=1.0, adapt=0.8)"
    assert repr(optim.scale_by_ekfac(made.structure)).startswith("scale_by_ekfac(")
    assert repr(optim.newton_cg()) == "newton_cg('ggn', damping=1.0, iterations=50)"
    own = optim.Transformation(lambda params: (), lambda grads, state, *_: (grads, state))
    assert repr(own) == "Transformation(...)"


def test_what_holds_tensors_shows_none(made: SimpleNamespace) -> None:
    posterior = laplace.fit(made.model_fn, made.params, [(made.X, made.y)])
    assert repr(posterior) == f"Posterior(of 8 samples, curvature={posterior.curvature!r})"
    inverse = laplace.covariance(posterior, 1.0)
    queries = influence.queries(made.model_fn, made.params, made.X[:2], made.y[:2], inverse=inverse)
    for shown in (influence.Influence(inverse=inverse, queries=queries), kronecker.EKFAC(decomposition=made.K)):
        assert "tensor(" not in repr(shown)
        assert "Kronecker 40 x 5" in repr(shown)


def test_accumulation_and_reports(made: SimpleNamespace) -> None:
    acc = curvfunc.accumulation(made.model_fn, made.params, (Grad(), Variance()), decay=0.5)
    assert repr(acc) == "Accumulation(Grad(), Variance(); ModelFunction(Sequential, 4 parameters), cross_entropy, decay=0.5)"
    report = curvfunc.check(made.model_fn, made.params, made.X, made.y)
    assert repr(report) == f"Report(ok=True)\n{report}"


# -- explain


class Cells(HTMLParser):
    """The text of each cell, by rows."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(document)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.rows[-1][-1] += data


def test_explanations_are_tables(made: SimpleNamespace) -> None:
    explained = curvfunc.explain(made.model_fn, made.params, made.X)
    assert repr(explained) == str(explained)
    cells = Cells(explained._repr_html_()).rows
    assert cells == [["parameter", "path", "rule", "why"], *map(list, explained.rows)]


def test_what_a_table_holds_is_text() -> None:
    """Names are the user's, and reasons have signs that HTML has a meaning for."""
    params = {"<b>&'\"": torch.randn(3, 4), "</td>": torch.randn(3)}

    def model_fn(params: Any, X: Any) -> Any:
        return torch.fmax(X @ params["<b>&'\""].T, params["</td>"])

    explained = curvfunc.explain(model_fn, params, torch.randn(5, 4))
    assert any(row.why for row in explained.rows)
    document = explained._repr_html_()
    assert "<b>" not in document
    assert Cells(document).rows[1:] == [list(row) for row in explained.rows]


def test_tables_have_the_colours_of_their_page(made: SimpleNamespace) -> None:
    document = curvfunc.explain(made.model_fn, made.params, made.X)._repr_html_()
    assert set(re.findall(r"(?<![-\w])color: ([^;\"']+)", document)) == {"inherit"}
    assert set(re.findall(r"background: ([^;\"']+)", document)) == {"none"}
    assert "class=" not in document
    assert "<style" not in document
