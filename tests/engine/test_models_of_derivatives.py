"""Models that differentiate by themselves, as physics-informed networks do."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from one_by_one import verify
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import curvfunc

pytestmark = pytest.mark.usefixtures("float64")

N = 4
Params = dict[str, Tensor]
NET = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


def u(params: Params, x: Tensor) -> Tensor:
    return x.sin().prod(-1) * functional_call(NET, params, (x,)).squeeze(-1)


def units(x: Tensor) -> list[Tensor]:
    return [e.expand_as(x) for e in torch.eye(2).to(x)]


def twice_forward(params: Params, X: Tensor) -> Tensor:
    along = lambda t, z: jvp(lambda w: u(params, w), (z,), (t,))[1]
    return sum(jvp(lambda z, t=t: along(t, z), (X,), (t,))[1] for t in units(X))


def forward_over_reverse(params: Params, X: Tensor) -> Tensor:
    first = grad(lambda z: u(params, z).sum())
    return sum(jvp(first, (X,), (t,))[1][:, i] for i, t in enumerate(units(X)))


def twice_reverse(params: Params, X: Tensor) -> Tensor:
    first = grad(lambda z: u(params, z).sum())
    return sum(grad(lambda z, i=i: first(z)[:, i].sum())(X)[:, i] for i in range(2))


def forward_of_jacobian(params: Params, X: Tensor) -> Tensor:
    return vmap(lambda x: jacfwd(jacrev(lambda z: u(params, z)))(x).trace())(X)


def sample_by_sample(params: Params, X: Tensor) -> Tensor:
    return vmap(lambda x: hessian(lambda z: u(params, z))(x).trace())(X)


def nested_vmap(params: Params, X: Tensor) -> Tensor:
    first = grad(lambda z: u(params, z))
    return vmap(lambda x: vmap(lambda t: (jvp(first, (x,), (t,))[1] * t).sum())(torch.eye(2).to(x)).sum())(X)


LAPLACIANS = [twice_forward, forward_over_reverse, twice_reverse, forward_of_jacobian, sample_by_sample, nested_vmap]


def derivative_and_more(params: Params, X: Tensor) -> Tensor:
    """One use of each parameter inside of a derivative, and one outside."""
    return jvp(lambda z: u(params, z), (X,), (torch.ones_like(X),))[1] + functional_call(NET, params, (X.cos(),)).squeeze(-1)


def in_parameters(params: Params, X: Tensor) -> Tensor:
    """Derivatives with respect to parameters, as in meta-learning: one step on the sample itself."""
    weight = params["2.weight"]
    inner = grad(lambda w: functional_call(NET, params | {"2.weight": w}, (X,)).square().sum())
    one = lambda x: grad(lambda w: functional_call(NET, params | {"2.weight": w}, (x,)).square().sum())(weight)
    return functional_call(NET, params, (X,)).squeeze(-1) + (vmap(one)(X) if len(X) > 1 else inner(weight)[None]).sum((1, 2))


def made() -> tuple[Params, Tensor, Tensor]:
    params = {k: torch.randn_like(p, dtype=torch.get_default_dtype()) for k, p in NET.named_parameters()}
    return params, torch.rand(N, 2), torch.randn(N)


@pytest.mark.parametrize("model", [*LAPLACIANS, derivative_and_more, in_parameters], ids=lambda f: f.__name__)
def test_every_quantity(model: Callable[[Params, Tensor], Tensor]) -> None:
    params, X, y = made()
    assert {row.path for row in curvfunc.explain(model, params, X).rows if row.rule != "unused"} == {"vmap"}
    if model is not twice_reverse and model in LAPLACIANS:
        torch.testing.assert_close(model(params, X), twice_reverse(params, X))
    verify(model, params, X, y, loss_fn=F.mse_loss, hessian=model in (twice_forward, forward_of_jacobian))


@pytest.mark.parametrize("model", [twice_forward, forward_of_jacobian], ids=lambda f: f.__name__)
def test_under_transformations(model: Callable[[Params, Tensor], Tensor]) -> None:
    params, X, y = made()
    ensemble = {k: torch.stack([p, 2 * p]) for k, p in params.items()}
    found = vmap(lambda p: curvfunc.diag_ggn(model, p, X, y, loss_fn=F.mse_loss))(ensemble)
    for i in range(2):
        expected = curvfunc.diag_ggn(model, {k: p[i] for k, p in ensemble.items()}, X, y, loss_fn=F.mse_loss)
        for k in params:
            torch.testing.assert_close(found[k][i], expected[k])


def mixed_inside(params: Params, X: Tensor) -> Tensor:
    return grad(lambda z: u(params, z).sum().square())(X)


def mixed_along(params: Params, X: Tensor) -> Tensor:
    return jvp(lambda z: u(params, z) * u(params, z.flip(0)), (X,), (torch.ones_like(X),))[1]


@pytest.mark.parametrize("model", [mixed_inside, mixed_along], ids=lambda f: f.__name__)
def test_what_mixes_samples_is_refused(model: Callable[[Params, Tensor], Tensor]) -> None:
    params, X, _ = made()
    with pytest.raises(ValueError, match="mixes the samples of a batch"):
        curvfunc.batch_grad(model, params, X, torch.zeros_like(model(params, X)), loss_fn=F.mse_loss)
