"""Each extension, run by BackPACK and by the shim on the same weights."""

import importlib
import warnings
from typing import Any

import backpack_nets as nets
import backpack_peer
import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn

from curvfunc import compat
from curvfunc.compat import modules, names

FIRST = ["BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"]
GGN = ["DiagGGNExact", "BatchDiagGGNExact"]
HESSIAN = ["DiagHessian", "BatchDiagHessian"]
PRODUCTS = ["HMP", "GGNMP"]
ALL = FIRST + GGN + ["SqrtGGNExact", "KFLR", "KFRA"] + HESSIAN

# Per net, what BackPACK supports.
SUPPORTED = {
    "linear": ALL + PRODUCTS,
    "mlp_relu": ALL + PRODUCTS,
    "mlp_sigmoid": ALL + PRODUCTS,
    "mlp_mse": ALL + PRODUCTS,
    "mlp_bce": [e for e in ALL if e != "KFRA"],
    "mlp_elu": FIRST + GGN + ["SqrtGGNExact"] + HESSIAN,
    "cnn": ALL + PRODUCTS,
    "cnn_avg": ALL + PRODUCTS,
    # BackPACK's squared norms of grouped convolutions differ from its own individual gradients; the shim's do not
    "conv_groups": [e for e in FIRST if e != "BatchL2Grad"] + GGN + ["SqrtGGNExact"] + HESSIAN,
    "conv1d": FIRST + GGN + ["SqrtGGNExact"] + HESSIAN,
    "conv3d": FIRST + GGN + ["SqrtGGNExact"] + HESSIAN,
    "conv_transpose1d": ALL,
    "conv_transpose2d": ALL,
    "conv_transpose3d": ALL,
    "batch_norm1d": FIRST + GGN + ["SqrtGGNExact"] + PRODUCTS,
    "batch_norm2d": FIRST + GGN + ["SqrtGGNExact"],
    "embedding": FIRST + GGN + ["SqrtGGNExact"],
    "rnn": FIRST + GGN,
    "lstm": FIRST + GGN,
    "parallel": FIRST + GGN + ["SqrtGGNExact"],
    "resnet": FIRST + GGN,
}


def run(library: Any, kit: Any, name: str, extensions: list[Any]) -> tuple[dict[str, dict[str, Any]], nn.Module]:
    """Each extension's results by parameter, from one backward pass per extension, and the model, which products need."""
    X, y, loss_fn = nets.data(name)
    found: dict[str, dict[str, Any]] = {}
    model = library.extend(nets.net(name, kit), use_converter=name == "resnet")
    loss_fn = library.extend(loss_fn)
    for extension in extensions:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with library.backpack(extension):
                loss_fn(model(X), y).backward()
        found[type(extension).__name__] = {
            n.replace("_0", ""): getattr(p, extension.savefield) for n, p in model.named_parameters()
        }
    return found, model


def on_vectors(function: Any, like: Tensor) -> Tensor:
    return function(torch.randn(3, *like.shape, generator=torch.Generator().manual_seed(3)))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", SUPPORTED)
def test_parity(name: str) -> None:
    backpack, names = backpack_peer.load(), SUPPORTED[name]
    want, _ = run(backpack, backpack_peer.kit(), name, [getattr(backpack.extensions, e)() for e in names])
    got, _model = run(compat, modules, name, [getattr(compat.extensions, e)() for e in names])
    shapes = dict(nets.net(name, modules).named_parameters())
    for extension in names:
        assert got[extension].keys() == want[extension].keys() == shapes.keys()
        for p, like in shapes.items():
            g, w = got[extension][p], want[extension][p]
            if extension in PRODUCTS:
                g, w = on_vectors(g, like), on_vectors(w, like)
            assert type(g) is type(w)
            assert_close(g, w, rtol=1e-10)


def test_all_nets_are_compared() -> None:
    assert len(SUPPORTED) >= 12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["mlp_sigmoid", "mlp_mse", "mlp_bce", "cnn"])
def test_monte_carlo_in_expectation(name: str) -> None:
    """Many draws come close to BackPACK's exact quantity, and have the shape of BackPACK's draws."""
    backpack = backpack_peer.load()
    exact = {"DiagGGNMC": "DiagGGNExact", "BatchDiagGGNMC": "BatchDiagGGNExact", "KFAC": "KFLR"}
    want, _ = run(backpack, backpack_peer.kit(), name, [getattr(backpack.extensions, e)() for e in exact.values()])
    one, _ = run(backpack, backpack_peer.kit(), name, [getattr(backpack.extensions, e)() for e in (*exact, "SqrtGGNMC")])
    got, _model = run(compat, modules, name, [getattr(compat.extensions, e)(4000) for e in exact])
    ours, _ = run(compat, modules, name, [getattr(compat.extensions, e)() for e in (*exact, "SqrtGGNMC")])
    for sampled, extension in exact.items():
        for p, w in want[extension].items():
            g = got[sampled][p]
            for a, b in zip(g, w, strict=True) if isinstance(w, list) else [(g, w)]:
                assert (a - b).norm() < 0.15 * b.norm()
    for extension, results in one.items():
        for p, r in results.items():
            mine = ours[extension][p]
            shapes = [[t.shape for t in x] if isinstance(x, list) else x.shape for x in (mine, r)]
            assert shapes[0] == shapes[1]


@pytest.mark.usefixtures("float64")
def test_norms_of_grouped_convolutions_are_those_of_the_gradients() -> None:
    X, y, loss_fn = nets.data("conv_groups")
    model, loss_fn = compat.extend(nets.net("conv_groups", modules)), compat.extend(loss_fn)
    with compat.backpack(compat.extensions.BatchGrad(), compat.extensions.BatchL2Grad()):
        loss_fn(model(X), y).backward()
    for p in model.parameters():
        assert_close(p.batch_l2, p.grad_batch.flatten(1).square().sum(1))


def test_names_are_where_they_were() -> None:
    """Whatever BackPACK defines in a module that has a counterpart, but for what only its own derivatives need."""
    backpack_peer.load()
    older = {"branching", "core.layers"}  # names of earlier versions
    for name, mine in names.LAYOUT.items():
        if name in older or name == "utils.examples":  # which imports torchvision
            continue
        theirs = importlib.import_module(f"backpack.{name}")
        defined = {k for k, v in vars(theirs).items() if getattr(v, "__module__", "") == theirs.__name__ and k[0] != "_"}
        assert defined - mine.keys() <= INTERNAL.get(name, set()), name


INTERNAL = {
    "core.derivatives.convnd": {"ConvNDDerivatives"},
    "extensions.curvature": {"ResidualModifications"},
    "utils.kroneckers": {"get_letters", "kfac_mat_prod_einsum_equation"},
}


@pytest.mark.usefixtures("float64")
def test_utilities_agree() -> None:
    backpack_peer.load()
    from backpack.hessianfree import ggnvp, hvp
    from backpack.utils import convert_parameters, kroneckers, module_classification

    from curvfunc.compat import hessianfree, kronecker_lists

    factors = [torch.randn(k, k) for k in (2, 3, 4)]
    symmetric = [f @ f.T + torch.eye(len(f)) for f in factors]
    M = torch.randn(24, 5)
    assert_close(kronecker_lists.kfacs_to_mat(factors), kroneckers.kfacs_to_mat(factors))
    for v in (M, M[:, 0]):
        assert_close(kronecker_lists.apply_kfac_mat_prod(factors, v), kroneckers.apply_kfac_mat_prod(factors, v))
        for shift in (None, 0.5, [0.1, 0.2, 0.3]):
            mine = kronecker_lists.apply_inv_kfac_mat_prod(symmetric, v, shift)
            assert_close(mine, kroneckers.apply_inv_kfac_mat_prod(symmetric, v, shift))
        for shape in (kronecker_lists.is_matrix, kronecker_lists.is_vector):
            assert shape(v) == getattr(kroneckers, shape.__name__)(v)
    for module in (nn.MSELoss(), nn.NLLLoss(), nn.Sequential(), nn.Linear(1, 1), nn.Flatten()):
        for kind in (modules.is_loss, modules.is_nll, modules.is_no_op):
            assert kind(module) == getattr(module_classification, kind.__name__)(module)
    X, y, loss_fn = nets.data("mlp_sigmoid")
    model = nets.net("mlp_sigmoid", modules)
    params = list(model.parameters())
    vector = torch.randn(sum(p.numel() for p in params) + 3)
    v = kronecker_lists.vector_to_parameter_list(vector, params)
    assert_close(v, convert_parameters.vector_to_parameter_list(vector, params))
    out = model(X)
    loss = loss_fn(out, y)
    assert_close(list(hessianfree.hessian_vector_product(loss, params, v)), list(hvp.hessian_vector_product(loss, params, v)))
    assert_close(list(hessianfree.ggn_vector_product(loss, out, model, v)), list(ggnvp.ggn_vector_product(loss, out, model, v)))
