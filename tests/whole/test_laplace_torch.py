"""laplace-torch on curvfunc: what its own back ends give, and models that they refuse. `nox -s laplace` has what it needs."""

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import ROOT, dead_links, run
from helpers import assert_close
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("laplace.curvature")  # "laplace" alone may be a folder of tests
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "laplace_torch"))
import laplace
from laplace.curvature import BackPackGGN, CurvlinopsGGN
from laplace_backend import CurvfuncGGN, Tied, main

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore"),  # of laplace-torch, BackPACK and curvlinops
]

PEERS = [CurvlinopsGGN, BackPackGGN]
STRUCTURES = ["diag", "kron", "full"]


def problem(likelihood: str, num: int = 11) -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    y = torch.randint(3, (num,)) if likelihood == "classification" else torch.randn(num, 3)
    return net, TensorDataset(torch.randn(num, 4), y)


def fitted(likelihood: str, which: str, structure: str, backend: Any, batch_size: int = 4) -> Any:
    net, data = problem(likelihood)
    posterior = laplace.Laplace(net, likelihood, which, structure, backend=backend, prior_precision=0.7)
    posterior.fit(DataLoader(data, batch_size=batch_size))
    return posterior


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("which", ["all", "last_layer"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_the_same_posterior(likelihood: str, which: str, structure: str, peer: Any) -> None:
    got, want = (fitted(likelihood, which, structure, backend) for backend in (CurvfuncGGN, peer))
    for name in ("loss", "log_det_posterior_precision"):
        assert_close(torch.as_tensor(getattr(got, name)), torch.as_tensor(getattr(want, name)), rtol=1e-8)
    H, other = (p.H if structure != "kron" else p.H.to_matrix() for p in (got, want))
    assert_close(H, other, rtol=1e-8)
    assert_close(got.log_marginal_likelihood(), want.log_marginal_likelihood(), rtol=1e-8)
    X = torch.randn(5, 4)
    first, second = (p._glm_predictive_distribution(X) for p in (got, want))
    assert_close(list(first), list(second), rtol=1e-8)


@pytest.mark.parametrize("peer", PEERS)
def test_the_same_jacobians_and_gradients(peer: Any) -> None:
    net, data = problem("classification")
    X, y = data.tensors
    net.output_size = 3  # type: ignore[assignment]
    mine, theirs = CurvfuncGGN(net, "classification"), peer(deepcopy(net), "classification")
    got, want = mine.jacobians(X), theirs.jacobians(X)
    assert_close(got, want, rtol=1e-8)
    assert not any(t.requires_grad for t in got)
    for ours, other in zip(mine.gradients(X, y), peer(deepcopy(net), "classification").gradients(X, y), strict=True):
        assert_close(ours, other.detach(), rtol=1e-8)
    some = torch.tensor([0, 5, 9])
    assert_close(CurvfuncGGN(net, "classification", subnetwork_indices=some).jacobians(X)[0], want[0][:, :, some], rtol=1e-8)
    assert_close(CurvfuncGGN(net, "classification", subnetwork_indices=some).diag(X, y)[1], mine.diag(X, y)[1][some], rtol=1e-8)


def test_jacobians_are_differentiated_by_the_input() -> None:
    net, data = problem("classification")
    X = data.tensors[0].clone().requires_grad_()
    grads = []
    for backend in (CurvfuncGGN, CurvlinopsGGN):
        J, f = backend(net, "classification").jacobians(X, enable_backprop=True)
        grads.append(torch.autograd.grad((J**2).sum() + (f**2).sum(), X)[0])
    assert_close(grads[0], grads[1], rtol=1e-8)


def test_draws() -> None:
    net, data = problem("classification")
    X, y = data.tensors
    exact, drawn = CurvfuncGGN(net, "classification"), CurvfuncGGN(net, "classification", stochastic=True, num_samples=4000)
    assert_close(drawn.diag(X, y)[1], exact.diag(X, y)[1], rtol=0.1)
    assert_close(drawn.kron(X, y, 11)[1].to_matrix(), exact.kron(X, y, 11)[1].to_matrix(), rtol=0.1)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_tied_weights_and_attention(structure: str) -> None:
    torch.manual_seed(0)
    X, y = torch.randint(7, (9, 5)), torch.randint(7, (9,))
    model = Tied().eval()
    with pytest.raises((AttributeError, NotImplementedError), match="extension|grad_batch"):
        other = laplace.Laplace(deepcopy(model), "classification", "all", structure, backend=BackPackGGN)
        other.fit(DataLoader(TensorDataset(X, y), batch_size=4))
    posterior = laplace.Laplace(model, "classification", "all", structure, backend=CurvfuncGGN)
    posterior.fit(DataLoader(TensorDataset(X, y), batch_size=4))
    params = {n: p.detach() for n, p in model.named_parameters()}

    def flat_model(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([p.numel() for p in params.values()])
        named = {n: t.reshape(p.shape) for (n, p), t in zip(params.items(), parts, strict=True)}
        return torch.func.functional_call(model, named, (X,))

    flat = torch.cat([p.flatten() for p in params.values()])
    J = torch.autograd.functional.jacobian(flat_model, flat)  # [N, C, P]
    p = flat_model(flat).softmax(1)
    dense = torch.einsum("ncp,ncd,ndq->pq", J, p.diag_embed() - p[:, :, None] * p[:, None], J)
    if structure == "full":
        assert_close(posterior.H, dense, rtol=1e-8)
    elif structure == "diag":
        assert_close(posterior.H, dense.diagonal(), rtol=1e-8)
    else:  # the tied weight has its exact block
        size = model.embedding.weight.numel()
        assert_close(posterior.H.to_matrix()[:size, :size], dense[:size, :size], rtol=1e-8)
    assert posterior(X, link_approx="probit").sum(1).allclose(torch.ones(9))


def test_what_laplace_torch_takes_for_granted() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(3, 3, 2), nn.Flatten(), nn.Linear(15, 2))
    X, y = torch.randn(4, 3, 4), torch.randint(2, (4,))
    with pytest.raises(NotImplementedError, match=r"the factors of \['0.weight'\] are of other axes than laplace-torch's"):
        CurvfuncGGN(model, "classification").kron(X, y, 4)


def test_the_script_and_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    main()
    assert capsys.readouterr().out.count("log marginal likelihood") == 6
    run(ROOT / "docs" / "laplace.md")
    assert not dead_links(ROOT / "docs" / "laplace.md")
