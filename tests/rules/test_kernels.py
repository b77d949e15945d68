"""What runs in place of torch's wrong kernels: the same values and gradients as theirs where these are right, on every path."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from one_by_one import verify
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import curvfunc
from curvfunc import compat, functionalize
from curvfunc.rules.kernels import INSTEAD, Instead

pytestmark = pytest.mark.usefixtures("float64")


def first_order(function: Callable[..., Any], *tensors: Tensor) -> list[Tensor]:
    """The value, and the gradients by a random cotangent."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    out = function(*leaves)
    column = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    inputs = [t for t in leaves if t.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, inputs, column, allow_unused=True, materialize_grads=True)]


def same(function: Any, *tensors: Tensor, order: int = 3, **options: Any) -> None:
    want = first_order(lambda *t: function(*t, **options), *tensors)
    assert_close(first_order(lambda *t: INSTEAD[order][function](*t, **options), *tensors), want, 1e-9)
    with torch.no_grad():
        for first in {tensors[0], tensors[0].mT.contiguous().mT if tensors[0].ndim > 1 else tensors[0]}:
            found, like = (f(first, *tensors[1:], **options) for f in (INSTEAD[order][function], function))
            # draws by an operation that follows are laid out as its input is
            assert found.stride() == like.stride(), f"strides {found.stride()}, torch's are {like.stride()}"


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("shapes", [((4, 3), (2, 3)), ((2, 4, 3), (2, 2, 3)), ((2, 1, 4, 3), (3, 2, 3)), ((30, 3), (2, 3))])
def test_cdist(p: float, shapes: tuple[Any, Any]) -> None:
    a, b = (torch.randn(s) for s in shapes)
    same(torch.cdist, a, b, p=p)
    if len(shapes[0]) == 2 and len(a) < 25:  # the distance of a point to itself has gradient 0
        same(torch.cdist, a, a, p=p)


def test_distances_within_a_set_curve_nowhere_on_the_diagonal() -> None:
    """There both points are one, so that their distance is 0 whatever the parameters."""

    def model_fn(p: Any, x: Tensor) -> Tensor:
        points = (x @ p["w"]).view(-1, 3, 2)
        return torch.cdist(points, points).flatten(1)[:, :6]

    def written_out(p: Any, x: Tensor) -> Tensor:
        points = (x @ p["w"]).view(-1, 3, 2)
        rows = [
            (points[:, i] - points[:, j]).norm(dim=1) if i != j else x.new_zeros(len(x)) for i in range(2) for j in range(3)
        ]
        return torch.stack(rows, 1)

    params, X, y = {"w": torch.randn(2, 6)}, torch.randn(3, 2), torch.randn(3, 6)
    for quantity in (curvfunc.batch_grad, curvfunc.diag_ggn, curvfunc.diag_hessian):
        assert_close(
            quantity(model_fn, params, X, y, loss_fn=F.mse_loss), quantity(written_out, params, X, y, loss_fn=F.mse_loss)
        )


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 1, -1])
def test_embedding_bag(mode: str, padding_idx: int | None) -> None:
    rows = torch.tensor([[0, 1, 2], [1, 1, 0], [1, 1, 1], [3, 3, 3]])
    same(F.embedding_bag, rows, torch.randn(4, 2), mode=mode, padding_idx=padding_idx)
    if mode == "sum":
        function = lambda run: lambda w, s: run(rows, w, mode="sum", per_sample_weights=s, padding_idx=padding_idx)
        tensors = torch.randn(4, 2), torch.randn(4, 3)
        got, want = (first_order(function(run), *tensors) for run in (INSTEAD[2][F.embedding_bag], F.embedding_bag))
        assert_close(got, want)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_weight_norm(dim: int) -> None:
    g = torch.randn([size if d == dim else 1 for d, size in enumerate((2, 3, 4))]) if dim != -1 else torch.randn(())
    same(torch._weight_norm, torch.randn(2, 3, 4), g, dim=dim) if dim != 1 else None
    v = torch.randn(2, 3, 4)
    norms = v.norm() if dim == -1 else torch.linalg.vector_norm(v, dim=[d for d in range(3) if d != dim], keepdim=True)
    assert_close(INSTEAD[2][torch._weight_norm](v, g, dim), v * (g / norms))


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_logcumsumexp(length: int) -> None:
    same(torch.logcumsumexp, 50 * torch.randn(2, length), dim=1)
    same(torch.Tensor.logcumsumexp, torch.randn(length, 3), dim=0)


def test_norms() -> None:
    x, w, b = torch.randn(2, 4, 3, 2), torch.randn(4), torch.randn(4)
    mean, var = torch.randn(4), torch.rand(4) + 0.5
    same(F.layer_norm, torch.randn(2, 3, 4), normalized_shape=(3, 4))
    same(torch.layer_norm, torch.randn(2, 4), normalized_shape=(4,))
    same(F.rms_norm, torch.randn(2, 4), normalized_shape=(4,))
    rest = (0.1, 1e-5, False)
    runs: dict[Any, Callable[..., Tensor]] = {
        F.group_norm: lambda f, x, w, b: f(x, 2, w, b),
        torch.group_norm: lambda f, x, w, b: f(x, 2, w, b),
        F.batch_norm: lambda f, x, w, b: f(x, mean, var, w, b),
        torch.batch_norm: lambda f, x, w, b: f(x, w, b, mean, var, False, *rest),
        F.instance_norm: lambda f, x, w, b: f(x, mean, var, w, b, False) + f(x, weight=w, bias=b),
        torch.instance_norm: lambda f, x, w, b: f(x, w, b, mean, var, False, *rest) + f(x, w, b, None, None, True, *rest),
    }
    for function, run in runs.items():
        want = first_order(partial(run, function), x, w, b)
        for order in (1, 2, 3):
            assert_close(first_order(partial(run, INSTEAD[order].get(function, function)), x, w, b), want)


def strided(t: Tensor) -> Tensor:
    return torch.stack([t, t], 1)[:, 0]


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("what", ["gradient", "statistics", "weights"])
@pytest.mark.parametrize("width", [2, 3])
def test_batch_norm_with_strides(samples: int, what: str, width: int) -> None:
    """Convolutions, batch norms in evaluation mode, then tokens of channels: vision transformers with a stem."""
    mean, var = torch.randn(3), torch.rand(3) + 0.5

    def model(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def model_fn(p: Any, x: Tensor) -> Tensor:
            vectors = (mean, var, p["scale"], p["shift"])
            vectors = [
                strided(t) if (what == "statistics") == (k < 2) and what != "gradient" else t for k, t in enumerate(vectors)
            ]
            h = norm(F.conv2d(x, p["w"]), *vectors)
            tokens = h.flatten(2).transpose(1, 2) if what == "gradient" else h.flatten(2).mT.contiguous()
            return torch.tanh((tokens * p["position"]) @ p["head"]).mean(1)

        return model_fn

    def written_out(h: Tensor, mean: Tensor, var: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        mean, var, scale, shift = (t[:, None, None] for t in (mean, var, scale, shift))
        return (h - mean) / (var + 1e-5).sqrt() * scale + shift

    params = {"w": torch.randn(3, 2, 2, 2), "scale": torch.randn(3), "shift": torch.randn(3), "head": torch.randn(3, 2)}
    params["position"] = torch.randn(3 * (width - 1), 3)
    X, y = torch.randn(samples, 2, 4, width), torch.arange(samples)
    specs = (curvfunc.Grad(), curvfunc.BatchGrad(), curvfunc.DiagGGN(), curvfunc.DiagHessian())
    want = curvfunc.compute(model(written_out), params, X, y, specs)
    assert_close(curvfunc.compute(model(F.batch_norm), params, X, y, specs), want)
    assert_close(curvfunc.compute(model(F.batch_norm), params, X, y, curvfunc.Grad()), want[0])
    vectors = [curvfunc.hessian_vp(model(norm), params, X, y, params) for norm in (F.batch_norm, written_out)]
    assert_close(*vectors)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("adjoint", [True, False])
def test_lu_solve(left: bool, adjoint: bool) -> None:
    """Where matrices and right-hand sides meet with axes of their own, torch takes the wrong factors."""
    A, B = torch.randn(4, 3, 3), torch.randn(4, 5, 3, 3)
    lu, pivots = torch.linalg.lu_factor(A)
    run = INSTEAD[1][torch.linalg.lu_solve]
    got = run(lu[:, None], pivots[:, None], B, left=left, adjoint=adjoint)
    inverse = torch.linalg.inv(A.mT if adjoint else A)[:, None]
    assert_close(got, inverse @ B if left else B @ inverse)
    assert_close(INSTEAD[1][torch.lu_solve](B[:, 0], lu, pivots), torch.linalg.inv(A) @ B[:, 0])


FACTORED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "det": lambda a, b: torch.linalg.det(A=a) * b,
    "torch.det": lambda a, b: torch.det(input=a) * b,
    "slogdet": lambda a, b: torch.linalg.slogdet(a).logabsdet * b,
    "logdet": lambda a, b: torch.logdet(a @ a.mT) * b,
    "solve": lambda a, b: torch.linalg.solve(a, b.mT).mT,
    "solve from the right": lambda a, b: torch.linalg.solve(a, b, left=False),
    "solve vectors": lambda a, b: torch.linalg.solve(a.expand(len(b), 3, 3), b),
    "solve_ex": lambda a, b: torch.linalg.solve_ex(a, b.mT).result.mT,
    "tensorsolve": lambda a, b: torch.linalg.tensorsolve(a, b[0]).expand_as(b) * b,
}


@pytest.mark.parametrize("name", FACTORED)
def test_factorizations_under_vmap(name: str) -> None:
    """Each member of an ensemble has its own factors, in backward passes over several columns too."""

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return FACTORED[name](p["a"], x @ p["w"])

    stacked, X, y = {"a": torch.randn(4, 3, 3), "w": torch.randn(4, 2, 3)}, torch.randn(5, 2), torch.randn(5, 3)
    if name == "tensorsolve":  # of a right-hand side that no sample has
        model_fn = lambda p, x: (x @ p["w"]) * torch.linalg.tensorsolve(p["a"], p["w"][0])
    specs = (curvfunc.BatchGrad(), curvfunc.DiagGGN())
    run = lambda p: curvfunc.compute(model_fn, p, X, y, specs, loss_fn=F.mse_loss)
    each = [run({k: t[i] for k, t in stacked.items()}) for i in range(4)]
    want = torch.utils._pytree.tree_map(lambda *t: torch.stack(t), *each)
    assert_close(torch.vmap(run)(stacked), want, 1e-8)


def test_scalars_under_vmap() -> None:
    """Rolling and filling a scalar leaves the other samples alone."""

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return (
            x * torch.roll(p["a"], 1, ())
            if x.ndim == 0
            else x * p["a"].roll(1) + p["b"].index_fill(0, torch.tensor([0]), p["a"])
        )

    stacked, X, y = {"a": torch.randn(3), "b": torch.randn(3)}, torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    run = lambda p: curvfunc.batch_grad(model_fn, p, X, y)
    each = [run({k: t[i] for k, t in stacked.items()}) for i in range(3)]
    want = {k: torch.stack([e[k] for e in each]) for k in stacked}
    assert want["a"].norm() > 0
    assert want["b"].norm() == 0
    assert_close(torch.vmap(run)(stacked), want)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has none")
def test_linear_cross_entropy_in_chunks() -> None:
    options = nn.modules.linear_cross_entropy_options.LinearCrossEntropyOptions(batch_chunk_size=1, allow_retain_graph=True)

    def model(options: Any) -> Any:
        def model_fn(p: Any, x: Tensor) -> Tensor:
            h = torch.tanh(x @ p["w"])
            values = [
                F.linear_cross_entropy(h[:, k], p["v"], torch.full((len(x),), k), reduction="none", options=options)
                for k in range(2)
            ]
            return torch.stack(values, 1)

        return model_fn

    params, X, y = {"w": torch.randn(2, 3), "v": torch.randn(4, 3)}, torch.randn(3, 2, 2), torch.tensor([0, 1, 1])
    specs = (curvfunc.BatchGrad(), curvfunc.DiagGGN(), curvfunc.DiagHessian())
    assert_close(curvfunc.compute(model(options), params, X, y, specs), curvfunc.compute(model(None), params, X, y, specs))
    assert_close(*[curvfunc.hessian_vp(model(o), params, X, y, params) for o in (options, None)])


# -- the other paths: compiled, the shim, linearized products


class Mixed(nn.Module):
    """Weight normalization, hardsigmoid, distances to learned centers, and a scan, all wrong or refused in torch alone."""

    def __init__(self, written_out: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.v, self.g = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3, 1))
            self.centers = nn.Parameter(torch.randn(4, 3))
        self.written_out = written_out

    def forward(self, x: Tensor) -> Tensor:
        if self.written_out:
            h = F.linear(x, self.v * (self.g / self.v.norm(dim=1, keepdim=True)))
            h = F.relu6(h + 3) / 6
            d = (h.unsqueeze(-2) - self.centers).square().sum(-1).sqrt()
            return torch.stack([d[..., : k + 1].logsumexp(-1) for k in range(4)], -1)
        h = F.hardsigmoid(F.linear(x, torch._weight_norm(self.v, self.g, 0)))
        return torch.cdist(h, self.centers).logcumsumexp(-1)


def both() -> list[Any]:
    return [functionalize(Mixed(written_out)) for written_out in (False, True)]


def test_products() -> None:
    X, y = torch.randn(5, 2), torch.tensor([0, 1, 2, 3, 0])
    results = []
    for model_fn, params in both():
        v = {k: p.cos() for k, p in params.items()}
        blocks = curvfunc.hmp(model_fn, params, X, y)
        results.append(
            [
                curvfunc.hessian_vp(model_fn, params, X, y, v),
                curvfunc.ggn_vp(model_fn, params, X, y, v),
                curvfunc.jvp(model_fn, params, X, v),
                {k: b(v[k][None]) for k, b in blocks.items()},
                curvfunc.hessian_operator(model_fn, params, X, y).dense(),
                torch.vmap(lambda p, m=model_fn, v=v: curvfunc.hessian_vp(m, p, X, y, v))(
                    {k: torch.stack([p, p + 1]) for k, p in params.items()}
                ),
            ]
        )
    assert_close(*results, 1e-9)


def test_compiled() -> None:
    X, y = torch.randn(5, 2), torch.tensor([0, 1, 2, 3, 0])
    specs = (curvfunc.BatchGrad(), curvfunc.DiagGGN(), curvfunc.DiagHessian())
    (model_fn, params), (written_fn, _) = both()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(params: Any, X: Tensor, y: Tensor) -> Any:
        return curvfunc.compute(model_fn, params, X, y, specs), curvfunc.hessian_vp(model_fn, params, X, y, params)

    want = curvfunc.compute(written_fn, params, X, y, specs), curvfunc.hessian_vp(written_fn, params, X, y, params)
    assert_close(step(params, X, y), want, 1e-9)


@pytest.mark.parametrize("outside", [False, True])
def test_shim(outside: bool) -> None:
    X, y = torch.randn(5, 2), torch.tensor([0, 1, 2, 3, 0])
    found = []
    for written_out in (False, True):
        model, loss = compat.extend(Mixed(written_out)), compat.extend(nn.CrossEntropyLoss())
        names = compat.extensions
        extensions = (names.BatchGrad(), names.DiagGGNExact(), names.DiagHessian(), names.HMP())
        value = loss(model(X), y) if outside else None  # without knowing that a Hessian is wanted
        with compat.backpack(*extensions):
            (loss(model(X), y) if value is None else value).backward()
        found.append(
            {k: (p.grad_batch, p.diag_ggn_exact, p.diag_h, p.hmp(p.detach()[None])) for k, p in model.named_parameters()}
        )
    assert_close(*found, 1e-9)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("function", [torch.angle, torch.sgn, Tensor.angle, Tensor.sgn])
def test_complex_zeros(function: Any, order: int) -> None:
    """Derivatives by the cotangent are those of the function, which torch has as zero there."""
    pairs = torch.tensor([[0.0, 0.0], [1.0, -2.0], [-0.5, 0.0]])
    substitute = INSTEAD[order][function]

    def real(t: Tensor, f: Any = substitute) -> Tensor:
        out = f(torch.view_as_complex(t))
        return torch.view_as_real(out) if out.is_complex() else out

    assert_close(first_order(real, pairs), first_order(partial(real, f=function), pairs))
    out, pull = torch.func.vjp(real, pairs)
    again = torch.func.vjp(lambda u: pull(u)[0], torch.ones_like(out))[1](torch.ones_like(pairs))[0]
    rows = torch.autograd.functional.jacobian(partial(real, f=function), pairs)
    assert_close(again, rows.flatten(-2).sum(-1))


SPECIAL = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, 0.05, -0.3, 3.0, -3.0, 7.7, 1e-9, math.inf, -math.inf, math.nan], dtype=torch.float64
)
ELEMENTWISE = [torch.angle, torch.sgn, torch.sinc, torch.special.i1, torch.logcumsumexp, F.hardsigmoid]


REAL = (torch.special.i1, F.hardsigmoid)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("function", "is_complex"), [(f, z) for f in ELEMENTWISE for z in (False, True) if not z or f not in REAL]
)
def test_values_at_special_numbers(function: Any, is_complex: bool) -> None:
    """Zeros have their signs, which what follows may tell apart: an angle of pi, or of minus pi."""
    t = torch.complex(*torch.cartesian_prod(SPECIAL, SPECIAL).unbind(1)) if is_complex else SPECIAL
    rows = torch.complex(*torch.cartesian_prod(t.real, t.imag).unbind(1)) if is_complex else torch.cartesian_prod(t, t)
    t, options = (rows, {"dim": -1}) if function is torch.logcumsumexp else (t, {})
    for order in (1, 2, 3):
        want, got = (f(t, **options) for f in (function, INSTEAD[order].get(function, function)))
        parts = [torch.view_as_real(z) if z.is_complex() else z for z in (want, got)]
        torch.testing.assert_close(*parts[::-1], rtol=1e-12, atol=0, equal_nan=True)
        signs = [torch.signbit(z) & ~parts[0].isnan() for z in parts]
        assert torch.equal(*signs), t[(signs[0] != signs[1]).nonzero()[0][0]]


def test_models_on_a_branch_cut() -> None:
    """A ReLU gives zeros, a Fourier transform of them zeros of all signs, and a division other signs: angles of 0, π and -π."""
    X, y = torch.tensor([[0.2, 0.5, 0.0], [0.0, 0.0, 0.0], [-0.0, 0.0, -0.0]]), torch.tensor([0, 1, 2])
    params = {"s": torch.tensor([0.2, -0.2, -0.3]), "w": torch.randn(3, 3)}
    model = lambda p, x: (torch.fft.fft(x) / p["s"]).angle() @ p["w"]
    assert (torch.fft.fft(X) / params["s"]).angle()[1:].abs().max() > 3
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    out = model(leaves, X)
    J = torch.stack([torch.autograd.grad(o, leaves["w"], retain_graph=True)[0] for o in out.flatten()]).view(3, 3, 9)
    S = F.softmax(out.detach(), 1)
    H = (torch.diag_embed(S) - S[:, :, None] * S[:, None]) / 3
    want = torch.einsum("ncp,ncd,ndq->pq", J, H, J)
    v = torch.randn(9)
    got = curvfunc.ggn_vp(model, params, X, y, {"s": torch.zeros(3), "w": v.view(3, 3)})
    assert_close(got["w"].flatten(), want @ v)
    assert_close(curvfunc.diag_ggn(model, params, X, y)["w"].flatten(), want.diagonal())
    assert_close(curvfunc.diag_hessian(model, params, X, y)["w"].flatten(), want.diagonal())


def test_addresses_tell_what_is_the_same_under_transformations() -> None:
    """A module that looks whether its weights are tied must not find that all are."""
    asked, found = INSTEAD[1][Tensor.data_ptr], []
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    for transform in (lambda f: torch.func.grad(f), lambda f: torch.vmap(f), lambda f: f):
        transform(lambda t: (found.append([asked(t), asked(t.view_as(t)), asked(b)]), t.sum())[1])(a)
    assert found == [[a.data_ptr(), a.data_ptr(), b.data_ptr()]] * 3


class OnGPU(TorchFunctionMode):
    """Has recurrent modules think that their weights are on a GPU, where they lay them out for cuDNN."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func == Tensor.is_cuda.__get__ else func(*args, **kwargs or {})


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_recurrent_modules_on_a_gpu(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.head = make(3, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.recurrent(x)[0][:, -1])

    model_fn, params = functionalize(Net().eval())
    X, y = torch.randn(4, 5, 3), torch.arange(4) % 3
    v = {name: torch.randn_like(p) for name, p in params.items()}
    calls = (
        lambda p: curvfunc.batch_grad(model_fn, p, X, y),
        lambda p: curvfunc.diag_hessian(model_fn, p, X, y),
        lambda p: curvfunc.ggn_vp(model_fn, p, X, y, v),
        lambda p: curvfunc.compute(model_fn, p, X, y, curvfunc.Grad()),
    )
    ensemble = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
    want = [[call(params), torch.vmap(call)(ensemble)] for call in calls]
    before = {name: p.data_ptr() for name, p in params.items()}
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda t: True)
    monkeypatch.setattr(torch, "_use_cudnn_rnn_flatten_weight", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "get_cudnn_mode", lambda mode: 2)
    with OnGPU():
        got = [[call(params), torch.vmap(call)(ensemble)] for call in calls]
    assert_close(got, want)
    assert {name: p.data_ptr() for name, p in params.items()} == before


@pytest.mark.parametrize("channels", [1, 4])
def test_prelu_at_zeros(channels: int) -> None:
    """Rounding gives many of them; torch's second derivatives there are those of the other side."""
    x, w = torch.tensor([[0.0, -0.0, 0.5, -0.5], [1.0, 0.0, -2.0, 0.0]]), torch.linspace(0.3, 0.6, channels)
    for function in (F.prelu, torch.prelu, torch.Tensor.prelu):
        same(function, x, w)
        with torch.no_grad():
            assert torch.equal(torch.signbit(INSTEAD[2][function](x, w)), torch.signbit(function(x, w)))
    X, y = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1, 2])
    params = {"w": torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.5, -0.5]]), "b": torch.randn(3, 3)}
    slope = torch.tensor([0.3])  # no parameter of the call

    def model(activation: Any) -> Any:
        return lambda p, x: F.linear(activation(F.linear(x, p["w"])), p["b"])

    written_out = model(lambda h: torch.where(h > 0, h, slope * h))
    verify(written_out, params, X, y)
    v = {k: torch.randn_like(p) for k, p in params.items()}
    for ask in (
        lambda f: curvfunc.compute(f, params, X, y, (curvfunc.BatchGrad(), curvfunc.DiagGGN(), curvfunc.DiagHessian())),
        lambda f: curvfunc.diag_hessian(f, params, X, y, mc_samples=2, generator=torch.Generator().manual_seed(0)),
        lambda f: curvfunc.ggn_vp(f, params, X, y, v),
        lambda f: curvfunc.hessian_vp(f, params, X, y, v),
        lambda f: curvfunc.jvp(f, params, X, v),
    ):
        assert_close(ask(model(lambda h: F.prelu(h, slope))), ask(written_out), 1e-12)


KINKS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        f.__name__: f
        for f in (F.relu, F.elu, F.celu, F.selu, F.relu6, F.hardtanh, F.hardsigmoid, F.hardswish, F.hardshrink, F.softshrink)
    },
    **{f.__name__: f for f in (torch.abs, torch.frac, torch.sinc, F.logsigmoid, F.mish, F.silu, F.gelu, F.softsign)},
    "leaky_relu": lambda x: F.leaky_relu(x, 0.3),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.3])),
    "rrelu": lambda x: F.rrelu(x, 0.1, 0.3, training=False),
    "threshold": lambda x: F.threshold(x, 0.5, 0.0),
    "softplus": lambda x: F.softplus(x, threshold=1.0),
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp from below": lambda x: x.clamp(min=0),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "minimum": lambda x: torch.minimum(x, torch.ones_like(x)),
    "fmax": lambda x: torch.fmax(x, torch.zeros_like(x)),
    "largest": lambda x: x.clamp(-1, 1).amax(1, keepdim=True),
    "largest so far": lambda x: x.clamp(0, 1).cummax(1)[0],
    "pooled": lambda x: F.max_pool1d(x.clamp(0, 1)[None], 3),
    "huber": lambda x: F.huber_loss(x, torch.zeros_like(x), reduction="none"),
    "smooth_l1": lambda x: F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none"),
    "l1": lambda x: F.l1_loss(x, torch.zeros_like(x), reduction="none"),
    "norm": lambda x: x.norm(dim=1),
    "where": lambda x: torch.where(x > 0, x, 0.3 * x),
}


@pytest.mark.parametrize("name", KINKS)
def test_directional_derivatives_at_kinks(name: str) -> None:
    """J v from the derivative of Jᵀu by u is J v from the rows of J: both backward passes are of the same side."""
    x = torch.tensor([[-6.0, -3.0, -2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0, 3.0, 6.0]]).requires_grad_()
    v = torch.linspace(0.3, 1.7, x.numel()).view_as(x)
    with Instead(INSTEAD[2]):
        out = KINKS[name](x)
        rows = [torch.autograd.grad(o, x, retain_graph=True)[0] for o in out.flatten()]
        u = torch.zeros_like(out, requires_grad=True)
        (pulled,) = torch.autograd.grad(out, x, u, create_graph=True)
        (got,) = torch.autograd.grad(pulled, u, v)
    assert_close(got, torch.stack([(row * v).sum() for row in rows]).view_as(got), 1e-12)


@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize("several", [2, 3])
def test_prelu_at_two_levels_of_vmap(samples: int, several: int) -> None:
    """Columns go back by a vmap inside of that over parameters; with as many of both, the kernel was wrong without an error."""
    X, y = torch.randn(samples, 3, dtype=torch.float64), torch.arange(samples) % 3
    weights = {"a": torch.rand(several, 1), "w": torch.randn(several, 3, 3), "e": torch.randn(several, 3)}
    weights = {k: w.double() for k, w in weights.items()}

    def model(p: Any, x: Tensor) -> Tensor:
        p["e"].mul_(1.5)  # so that no parameter is followed
        return F.prelu(x + p["e"], p["a"]) @ p["w"]

    def found(p: Any) -> Any:
        return curvfunc.diag_ggn(model, {k: t.clone() for k, t in p.items()}, X, y)

    got = torch.vmap(found, randomness="same")(weights)
    want = [found({k: w[i] for k, w in weights.items()}) for i in range(several)]
    assert_close(got, {k: torch.stack([w[k] for w in want]) for k in weights}, 1e-10)
