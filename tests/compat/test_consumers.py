"""How well-known packages use BackPACK, written anew: the shim has to carry each of these patterns."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import curvfunc
from curvfunc.compat import CTX, backpack, extend, memory_cleanup
from curvfunc.compat.extensions import KFAC, KFLR, BatchGrad, DiagGGNExact, DiagGGNMC, SumGradSquared, Variance

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:Using backward:UserWarning")]


def classifier() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 4))


def batch(samples: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(samples, 1, 6, 6, generator=generator), torch.arange(samples) % 4


# -- Laplace approximations


class LastLayer(nn.Module):
    """Finds the features in front of a model's last layer with a forward hook."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.last_layer = model, model[-1]
        self.last_layer.register_forward_hook(lambda m, args, out: setattr(self, "features", args[0].detach()))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class CurvatureBackend:
    """Diagonal and Kronecker-factored GGN of a model, and the Jacobians of its outputs.

    The model is extended anew for each batch and cleaned up after it, and losses are sums.
    """

    def __init__(self, model: nn.Module, target: nn.Module, stochastic: bool) -> None:
        self.model, self.target, self.stochastic = model, target, stochastic
        self.loss_fn = extend(nn.CrossEntropyLoss(reduction="sum"))

    def diag(self, X: Tensor, y: Tensor) -> Tensor:
        extension = DiagGGNMC() if self.stochastic else DiagGGNExact()
        self._backward(X, y, extension)
        return torch.cat([getattr(p, extension.savefield).data.flatten() for p in self.target.parameters()])

    def kron(self, X: Tensor, y: Tensor, total: int) -> list[list[Tensor]]:
        """Factors of the sum over M samples of N: B grows with M, A is a mean; A is scaled in place."""
        extension = KFAC() if self.stochastic else KFLR()
        self._backward(X, y, extension)
        factors = [getattr(p, extension.savefield) for p in self.target.parameters()]
        for kfac in factors:
            if len(kfac) == 2:
                kfac[1] *= len(y) / total
        return factors

    def jacobians(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """J [N, C, P] from one backward pass per output, without any loss."""
        extend(self.target)
        columns = []
        with torch.no_grad():
            classes = self.model(X).shape[1]
        for i in range(classes):
            self.model.zero_grad()
            out = self.model(X)
            with backpack(BatchGrad()):
                out[:, i].sum().backward()
            columns.append(torch.cat([p.grad_batch.flatten(1) for p in self.target.parameters()], 1))
            for p in self.target.parameters():
                del p.grad_batch
        self._clean(self.target)
        return torch.stack(columns, 1), out.detach()

    def gradients(self, X: Tensor, y: Tensor) -> Tensor:
        self._backward(X, y, BatchGrad())
        return torch.cat([p.grad_batch.data.flatten(1) for p in self.target.parameters()], 1)

    def _backward(self, X: Tensor, y: Tensor, extension: Any) -> None:
        extend(self.target)
        loss = self.loss_fn(self.model(X), y)
        with backpack(extension):
            loss.backward()
        self._clean(self.target)

    def _clean(self, module: nn.Module) -> None:
        for child in module.children():
            self._clean(child)
        module._backpack_extend = False
        memory_cleanup(module)


@pytest.fixture(params=["last layer", "all layers"])
def laplace(request: pytest.FixtureRequest) -> Callable[[bool], CurvatureBackend]:
    torch.manual_seed(0)
    model = LastLayer(classifier())
    target = model.last_layer if request.param == "last layer" else model
    return lambda stochastic: CurvatureBackend(model, target, stochastic)


def functional(backend: CurvatureBackend) -> tuple[Any, dict[str, Tensor]]:
    """The same model as a function of the target's parameters."""
    ids = {id(p) for p in backend.target.parameters()}
    params = {n: p.detach() for n, p in backend.model.named_parameters() if id(p) in ids}
    return lambda p, x: functional_call(backend.model, p, x), params


SUM = nn.CrossEntropyLoss(reduction="sum")


def test_laplace_diagonal(laplace: Callable[[bool], CurvatureBackend]) -> None:
    backend, (X, y) = laplace(False), batch()
    expected = curvfunc.diag_ggn(*functional(backend), X, y, loss_fn=SUM)
    assert_close(backend.diag(X, y), torch.cat([d.flatten() for d in expected.values()]))
    draws = sum(laplace(True).diag(X, y) for _ in range(300)) / 300
    assert (draws - backend.diag(X, y)).norm() < 0.15 * backend.diag(X, y).norm()


def test_laplace_kronecker(laplace: Callable[[bool], CurvatureBackend]) -> None:
    """Factors of two batches, scaled in place and added, are those of the whole data."""
    backend, (X, y) = laplace(False), batch(10)
    parts = [backend.kron(X[i], y[i], 10) for i in (slice(0, 4), slice(4, 10))]
    summed = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(*parts, strict=True)]
    expected = curvfunc.kflr(*functional(backend), X, y, loss_fn=SUM)
    assert_close(summed, [list(f) for f in expected.values()])
    for stochastic, exact in zip(laplace(True).kron(X, y, 10), expected.values(), strict=True):
        assert [f.shape for f in stochastic] == [f.shape for f in exact]


def test_laplace_jacobians(laplace: Callable[[bool], CurvatureBackend]) -> None:
    backend, (X, y) = laplace(False), batch()
    model_fn, params = functional(backend)
    J, out = backend.jacobians(X)
    expected = vmap(jacrev(lambda p, x: model_fn(p, x[None])[0]), (None, 0))(params, X)
    assert_close(J, torch.cat([j.flatten(2) for j in expected.values()], 2))
    assert_close(out, model_fn(params, X))
    grads = curvfunc.batch_grad(model_fn, params, X, y, loss_fn=SUM)
    assert_close(backend.gradients(X, y), torch.cat([g.flatten(1) for g in grads.values()], 1))


# -- a training monitor


class GradientMonitor:
    """Watches training: norms and mutual angles of individual gradients, reduced layer by layer in the backward pass."""

    def __init__(self) -> None:
        self.norms: list[Tensor] = []
        self.products: list[Tensor] = []
        self.most = 0

    def hook(self, module: nn.Module) -> None:
        for p in module.parameters(recurse=False):
            if not hasattr(p, "grad_batch"):
                continue
            g = p.grad_batch.detach().flatten(1)
            self.norms.append(g.square().sum(1))
            self.products.append(g @ g.T)
            del p.grad_batch

    def track(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        self.norms, self.products = [], []
        with backpack(BatchGrad(), SumGradSquared(), extension_hook=self.hook):
            loss.backward()
        return sum(self.norms).sqrt(), sum(self.products)


def test_monitor_reads_and_deletes_in_the_backward_pass() -> None:
    model, loss_fn, (X, y) = extend(classifier()), extend(nn.CrossEntropyLoss()), batch()
    optimizer, monitor = torch.optim.SGD(model.parameters(), 0.1), GradientMonitor()
    for _ in range(3):
        optimizer.zero_grad()
        norms, gram = monitor.track(loss_fn(model(X), y))
        grads = curvfunc.batch_grad(*curvfunc.functionalize(model), X, y)
        flat = torch.cat([g.flatten(1) for g in grads.values()], 1)
        assert_close(norms, flat.norm(dim=1))
        assert_close(gram, flat @ flat.T)
        assert not any(hasattr(p, "grad_batch") for p in model.parameters())
        assert all(hasattr(p, "sum_grad_squared") for p in model.parameters())
        optimizer.step()


# -- Fishr: domains should have the same variance of gradients


def fishr_penalty(head: nn.Module, loss_fn: nn.Module, features: Tensor, y: Tensor, domains: list[slice]) -> Tensor:
    """Squared distance of each domain's gradient variance to the mean over domains, differentiable."""
    loss = loss_fn(head(features), y).sum()
    with backpack(BatchGrad()):
        loss.backward(inputs=list(head.parameters()), retain_graph=True, create_graph=True)
    grads = torch.cat([p.grad_batch.clone().flatten(1) for p in head.parameters()], 1)
    variances = torch.stack([(grads[d] - grads[d].mean(0)).square().mean(0) for d in domains])
    return (variances - variances.mean(0)).square().mean()


def test_fishr() -> None:
    featurizer, head = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU()), extend(nn.Linear(8, 4))
    loss_fn, (X, y) = extend(nn.CrossEntropyLoss(reduction="none")), batch(10)
    domains = [slice(0, 4), slice(4, 10)]
    params = [*featurizer.parameters(), *head.parameters()]
    penalty = fishr_penalty(head, loss_fn, featurizer(X), y, domains)
    for p in params:
        p.grad = None
    (loss_fn(head(featurizer(X)), y).mean() + penalty).backward()

    model = nn.Sequential(featurizer, copy.deepcopy(head))
    CTX.remove_hooks()

    def objective(values: dict[str, Tensor]) -> Tensor:
        out = functional_call(model, values, X)
        inner = lambda q, x, t: F.cross_entropy(functional_call(model, {**values, **q}, x[None]), t[None])
        own = {k: v for k, v in values.items() if k.startswith("1.")}
        grads = vmap(torch.func.grad(inner), (None, 0, 0))(own, X, y)
        flat = torch.cat([g.flatten(1) for g in grads.values()], 1)
        variances = torch.stack([flat[d].var(0, unbiased=False) for d in domains])
        return F.cross_entropy(out, y) + (variances - variances.mean(0)).square().mean()

    expected = torch.func.grad(objective)({n: p.detach() for n, p in model.named_parameters()})
    assert_close([p.grad for p in params], list(expected.values()))


def test_fishr_with_the_variance_extension() -> None:
    """The penalty on ``p.variance`` itself, domain by domain."""
    model, loss_fn, (X, y) = extend(classifier()), extend(nn.CrossEntropyLoss()), batch(10)
    variances = []
    for d in (slice(0, 4), slice(4, 10)):
        with backpack(Variance()):
            loss_fn(model(X[d]), y[d]).backward(create_graph=True)
        variances.append({n: p.variance for n, p in model.named_parameters()})
    penalty = sum((variances[0][n] - variances[1][n]).square().sum() for n in variances[0])
    params = dict(model.named_parameters())
    found = torch.autograd.grad(penalty, list(params.values()))
    model_fn, tensors = curvfunc.functionalize(model)

    def expected(values: dict[str, Tensor]) -> Tensor:
        a, b = [curvfunc.variance(model_fn, values, X[d], y[d]) for d in (slice(0, 4), slice(4, 10))]
        return sum((a[n] - b[n]).square().sum() for n in a)

    assert_close(dict(zip(params, found, strict=True)), torch.func.grad(expected)(tensors))


# -- a neural bandit


def test_neural_bandit() -> None:
    """Upper confidence bounds from the gradient of each arm's score, all arms in one backward pass of the summed score."""
    net = extend(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 1, bias=False)))
    size = sum(p.numel() for p in net.parameters())
    U, regularization, width = torch.full((size,), 0.1), 0.1, 10
    for _ in range(5):
        arms = torch.randn(4, 6)
        scores = net(arms)
        with backpack(BatchGrad()):
            scores.sum().backward()
        g = torch.cat([p.grad_batch.flatten(1) for p in net.parameters()], 1)
        bonus = (regularization * g.square() / U / width).sum(1).sqrt()
        one_by_one = torch.stack(
            [torch.cat([t.flatten() for t in torch.autograd.grad(net(a), list(net.parameters()))]) for a in arms]
        )
        assert_close(g, one_by_one)
        arm = int((scores.flatten() + bonus).argmax())
        U += g[arm].square()
    assert (U > 0.1).any()


# -- backward passes within backward passes


def test_quantities_in_a_backward_pass_that_starts_another() -> None:
    """Some trainers call ``torch.autograd.grad`` in hooks; the outer pass has the last word."""
    model, loss_fn, (X, y) = extend(classifier()), extend(nn.CrossEntropyLoss()), batch()
    inner: list[Tensor] = []

    def another(g: Tensor) -> None:
        with torch.enable_grad():
            loss = 3 * F.cross_entropy(model(X), y)
        inner.append(torch.autograd.grad(loss, model[5].bias)[0])

    out = model(X)
    out.register_hook(another)
    with backpack(BatchGrad()):
        loss_fn(out, y).backward()
    assert_close(inner[0], 3 * model[5].bias.grad)
    grads = curvfunc.batch_grad(*curvfunc.functionalize(model), X, y)
    assert_close({n: p.grad_batch for n, p in model.named_parameters()}, grads)
