"""Known losses behind moves of the output: found, equal to autodiff, and nothing else taken for one."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from quantities import EXACT
from torch import Tensor, nn

import curvfunc
from curvfunc import losses

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning"),
]
N, T, C = 3, 4, 5
WEIGHT = torch.rand(C, dtype=torch.float64) + 0.5
PADDED = torch.tensor([[1, 2, 0, 4], [3, -100, -100, -100], [0, 2, -100, 1]])
MASK = PADDED != -100
ce = F.cross_entropy


def shifted(out: Tensor, y: Tensor, **options: Any) -> Tensor:
    """As causal language models are trained."""
    logits, labels = out[..., :-1, :].contiguous(), y[..., 1:].contiguous()
    return ce(logits.view(-1, logits.size(-1)).to(torch.float64), labels.view(-1), **options)


def as_transformers(out: Tensor, y: Tensor, num_items: int | None = None) -> Tensor:
    logits, labels = out.to(torch.float64), F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()
    return ce(logits.view(-1, out.shape[-1]), labels.view(-1), ignore_index=-100, reduction="mean")


class Module(nn.Module):
    """A loss that is a module with another inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        value: Tensor = self.inner(out.reshape(-1, out.shape[-1]), y.reshape(-1))
        return value


tokens, sequences = (lambda: PADDED.clone()), (lambda: torch.randn(N, T, C))
KNOWN: dict[str, tuple[Callable[..., Tensor], Callable[[], Tensor], int]] = {
    "flat": (lambda o, y: ce(o.flatten(0, 1), y.flatten()), tokens, T),
    "flat, sum, smoothed": (lambda o, y: ce(o.flatten(0, 1), y.flatten(), None, None, -100, None, "sum", 0.1), tokens, T),
    "view, weights, smoothed": (lambda o, y: ce(o.view(-1, C), y.view(-1), WEIGHT, label_smoothing=0.2), tokens, T),
    "view, ignored": (lambda o, y: ce(o.view(N * T, C), y.view(-1).clamp(min=0), ignore_index=2), tokens, T),
    "transposed": (lambda o, y: ce(o.transpose(1, 2), y), tokens, T),
    "permuted": (lambda o, y: ce(o.permute(0, 2, 1), y, reduction="sum"), tokens, T),
    "samples last": (lambda o, y: ce(o.movedim(0, 2), y.T), tokens, T),
    "time first": (lambda o, y: ce(o.transpose(0, 1).reshape(-1, C), y.T.reshape(-1)), tokens, T),
    "shifted": (shifted, tokens, T - 1),
    "shifted, sum, weights": (partial(shifted, reduction="sum", weight=WEIGHT), tokens, T - 1),
    "as transformers": (as_transformers, tokens, T),
    "a module": (Module(nn.CrossEntropyLoss(label_smoothing=0.1)), tokens, T),
    "mask": (lambda o, y: ce(o[y != -100], y[y != -100]), tokens, T),
    "mask after slices": (lambda o, y: ce(o[:, 1:][MASK[:, 1:]], y[:, 1:][MASK[:, 1:]], WEIGHT), tokens, T - 1),
    "mask of merged axes": (lambda o, y: ce(o.flatten(0, 1)[MASK.flatten()], y[MASK]), tokens, T),
    "masked twice": (lambda o, y: ce(o[MASK][y[MASK] > 0], y[y > 0]), tokens, T),
    "mask of positions": (lambda o, y: ce(o[:, MASK[0]].flatten(0, 1), y.flatten()), tokens, T),
    "mask of samples": (lambda o, y: ce(o[:, 0][MASK[:, 1]], y[:, 0][MASK[:, 1]]), tokens, 1),
    "last token": (lambda o, y: ce(o[:, -1], y[:, 0]), tokens, 1),
    "every other": (lambda o, y: ce(o[:, ::2, None].flatten(0, 2), y[:, ::2].flatten(), reduction="sum"), tokens, 2),
    "classes sliced": (lambda o, y: ce(o[..., :2].transpose(-1, -2), y.clamp(0, 1)), tokens, T),
    "narrowed": (lambda o, y: ce(o.unsqueeze(1).squeeze(1).mT, y), tokens, T),
    "temperature": (lambda o, y: ce((o / 2.5).flatten(0, 1) * 2, y.flatten()), tokens, T),
    "probabilities": (lambda o, y: ce(o.flatten(0, 1), y.flatten(0, 1).softmax(1), label_smoothing=0.1), sequences, T),
    "time as classes": (lambda o, y: ce(o, y.softmax(1)), sequences, C),
    "squared error, flat": (lambda o, y: F.mse_loss(o.flatten(), y.flatten()), sequences, T * C),
    "squared error, slice": (lambda o, y: F.mse_loss(o[:, 1:], y[:, 1:], reduction="sum"), sequences, (T - 1) * C),
    "squared error, zeros": (lambda o, y: F.mse_loss(o[:, 1:], torch.zeros_like(o[:, 1:])), sequences, (T - 1) * C),
    "bce, mask": (lambda o, y: F.binary_cross_entropy_with_logits(o[MASK], y[MASK].sigmoid(), WEIGHT), sequences, T * C),
    "bce": (
        lambda o, y: F.binary_cross_entropy_with_logits(o.view(-1), y.view(-1).sigmoid(), pos_weight=WEIGHT.repeat(N * T)),
        sequences,
        T * C,
    ),
}


def hidden(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same loss, so that it is not found."""
    one = torch.ones(())
    return lambda out, y: fn(out * one, y)


def blocks(root: losses.Root) -> Tensor:
    columns = root.columns(0, root.num).flatten(2)
    return torch.einsum("vni,vnj->nij", columns, columns)


def found(fn: Callable[..., Tensor], out: Tensor, y: Any) -> losses.Disguise | None:
    return losses.unmasked(losses.normalize(fn), out, y)


@pytest.mark.parametrize("name", KNOWN)
def test_gradient_and_roots_are_those_of_autodiff(name: str) -> None:
    fn, targets, positions = KNOWN[name]
    out, y = torch.randn(N, T, C), targets()
    if name == "mask of positions":
        y = y[:, MASK[0]]
    loss, disguise = losses.normalize(fn), found(fn, out, y)
    assert disguise is not None
    assert disguise.positions == positions
    gradient = torch.func.grad(lambda f: fn(f, y))(out)
    assert_close(losses.gradient(loss, out, y), gradient, 1e-12)
    size = out[0].numel()
    full = torch.func.hessian(lambda f: fn(f, y))(out).reshape(N, size, N, size)
    assert not any(full[n, :, m].any() for n in range(N) for m in range(N) if n != m)
    truth = torch.stack([full[n, :, n] for n in range(N)])
    for fewest in (False, True):
        root = losses.exact_root(loss, out, y, fewest=fewest)
        assert_close(blocks(root), truth, 1e-12)
        pieces = torch.cat([root.columns(i, min(i + 3, root.num)) for i in range(0, root.num, 3)])
        assert_close(pieces, root.columns(0, root.num), 1e-12)
    columns, weights = losses.signed_root(loss, out, y)
    assert weights is None
    assert_close(blocks(columns), truth, 1e-12)
    sampled = losses.sampled_root(loss, out, y, 30_000, torch.Generator().manual_seed(0))
    assert (blocks(sampled) - truth).norm() < 0.03 * truth.norm()


STATE = {"calls": 0}


def counting(out: Tensor, y: Tensor) -> Tensor:
    """Another loss at each call."""
    STATE["calls"] += 1
    return ce(out.flatten(0, 1), (y.flatten().clamp(min=0) + STATE["calls"]) % C)


class Double(torch.autograd.Function):
    """Out of sight of what watches calls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return 2 * g


def swallowing(out: Tensor, y: Tensor) -> Tensor:
    try:
        return ce(out.sin().flatten(0, 1), y.flatten())
    except Exception:
        return ce(out.flatten(0, 1), y.flatten())


def in_place(out: Tensor, y: Tensor) -> Tensor:
    out = out.clone()
    out[:, 0] = 0.0
    return ce(out.flatten(0, 1), y.flatten())


OTHER: dict[str, Callable[..., Tensor]] = {
    "other value": lambda o, y: 2 * ce(o.flatten(0, 1), y.flatten()),
    "twice": lambda o, y: ce(o.flatten(0, 1), y.flatten()) + ce(o[:, 0], y[:, 0]),
    "penalty": lambda o, y: ce(o.flatten(0, 1), y.flatten()) + o.square().mean(),
    "penalty inside": lambda o, y: ce(o.flatten(0, 1) + o.mean(), y.flatten()),
    "own targets": lambda o, y: ce(o.flatten(0, 1), o.flatten(0, 1).argmax(1)),
    "own next": lambda o, y: F.mse_loss(o[:, :-1], o[:, 1:]),
    "own weights": lambda o, y: ce(o.flatten(0, 1), y.flatten(), weight=o[0, 0].exp()),
    "samples rolled": lambda o, y: ce(o.roll(1, 0).flatten(0, 1), y.flatten()),
    "samples reversed": lambda o, y: ce(o.flip(0).flatten(0, 1), y.flatten()),
    "samples chosen": lambda o, y: ce(o[:2].flatten(0, 1), y[:2].flatten()),
    "samples as classes": lambda o, y: ce(o.permute(1, 0, 2), y[:1].expand(C, T).T.clamp(0, N - 1)),
    "samples split": lambda o, y: ce(o.reshape(N * 2, T // 2, C).permute(1, 2, 0), y.view(N * 2, 2).T),
    "samples in classes": lambda o, y: ce(o.reshape(2, -1), torch.tensor([3, 4])),
    "depends on values": lambda o, y: ce(o.flatten(0, 1), y.flatten()) if o.sum() > 0 else ce(-o.flatten(0, 1), y.flatten()),
    "depends on chance": lambda o, y: ce(o.flatten(0, 1), torch.randint(C, (N * T,))),
    "detached": lambda o, y: ce(o.detach().flatten(0, 1) + o.flatten(0, 1) * 0, y.flatten()),
    "elementwise": lambda o, y: ce(o.tanh().flatten(0, 1), y.flatten()),
    "unreduced": lambda o, y: ce(o.flatten(0, 1), y.flatten(), reduction="none").sum(),
    "deprecated": lambda o, y: ce(o.flatten(0, 1), y.flatten(), size_average=False),
    "broadcast": lambda o, y: F.mse_loss(
        o[:, :1], torch.zeros(N, 1, C, 1).expand(N, 1, C, 1).squeeze(-1)[:, :, :1] + 0 * o[:, :1]
    ),
    "function": lambda o, y: ce(Double.apply(o).flatten(0, 1), y.flatten()),  # type: ignore[no-untyped-call]
    "counting": counting,
    "swallowing": swallowing,
    "in place": in_place,
    "bits": lambda o, y: ce(o.view(torch.int64).view(torch.float64).flatten(0, 1), y.flatten()),
    "no graph": lambda o, y: torch.zeros(()),
}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.filterwarnings("ignore:size_average")
def test_nothing_else_is_taken_for_a_known_loss(name: str) -> None:
    assert found(OTHER[name], torch.randn(N, T, C), PADDED) is None


def test_axes_are_told_apart_by_what_they_are_and_not_by_their_sizes() -> None:
    out, y = torch.randn(3, 3, 3), torch.randint(3, (3, 3))
    for fn in (lambda o, y: ce(o.transpose(0, 1).flatten(0, 1), y.flatten()), lambda o, y: ce(o.movedim(0, 2), y)):
        loss = losses.normalize(fn)
        assert found(fn, out, y) is not None
        full = torch.func.hessian(lambda f: fn(f, y))(out).reshape(3, 9, 3, 9)  # noqa: B023
        assert_close(blocks(losses.exact_root(loss, out, y)), torch.stack([full[n, :, n] for n in range(3)]), 1e-12)
    assert found(lambda o, y: ce(o.transpose(0, 1), y), out, y) is None  # samples on the axis of classes


@pytest.mark.parametrize("shape", [(1, T, C), (N, 1, C), (1, 1, C), (N, T, 1), (1, T, 1)])
def test_axes_of_one(shape: tuple[int, ...]) -> None:
    fn, y = KNOWN["flat"][0], torch.zeros(shape[:2], dtype=torch.int64)
    out = torch.randn(shape)
    loss = losses.normalize(fn)
    assert found(fn, out, y) is not None
    assert_close(losses.gradient(loss, out, y), torch.func.grad(lambda f: fn(f, y))(out), 1e-12)
    size, n = out[0].numel(), len(out)
    full = torch.func.hessian(lambda f: fn(f, y))(out).reshape(n, size, n, size)
    assert_close(blocks(losses.exact_root(loss, out, y)), torch.stack([full[i, :, i] for i in range(n)]), 1e-12)


def test_low_precision_on_either_side() -> None:
    fn, out, y = KNOWN["shifted"][0], torch.randn(N, T, C), PADDED
    truth = torch.func.grad(lambda o: fn(o, y))(out)
    half = losses.gradient(losses.normalize(fn), out.bfloat16(), y)
    assert half.dtype == torch.bfloat16
    assert_close(half.double(), truth, 2e-2)
    single = lambda o, y: fn(o.float(), y)
    assert found(single, out, y) is not None
    assert_close(losses.gradient(losses.normalize(single), out, y), truth, 1e-6)


def reversed_gradient(vmap: bool) -> Callable[..., Tensor]:
    """With another gradient than its value has."""

    class Reversed(torch.autograd.Function):
        generate_vmap_rule = vmap

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return -g

    return lambda o, y: ce(Reversed.apply(o).flatten(0, 1), y.flatten())  # type: ignore[no-untyped-call]


def constant(out: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        out = out.flatten(0, 1)
    return ce(out, y.flatten())


@pytest.mark.parametrize("fn", [reversed_gradient(False), reversed_gradient(True), constant])
def test_values_that_prove_nothing(fn: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvfunc.losses.disguises.values_visible", lambda *_: False)
    assert found(fn, torch.randn(N, T, C), PADDED) is None
    assert found(fn, torch.randn(N, T, C, requires_grad=True), PADDED) is None
    seen = []
    torch.vmap(lambda o: seen.append(found(fn, o, PADDED)) or o)(torch.randn(2, N, T, C))
    assert seen == [None]


def test_what_a_loss_captures_may_change() -> None:
    out, captured = torch.randn(N, T, C), {"mask": MASK, "scale": 1.0}
    loss = losses.normalize(lambda o, y: ce(o[captured["mask"]] * captured["scale"], y[captured["mask"]]))
    for mask, scale in ((MASK, 1.0), (MASK & MASK.roll(1, 1), 1.0), (MASK, 0.5)):
        captured.update(mask=mask, scale=scale)
        want = torch.func.grad(lambda o: ce(o[mask] * scale, PADDED[mask]))(out)  # noqa: B023
        assert_close(losses.gradient(loss, out, PADDED), want, 1e-12)


def test_negative_weights_are_refused_for_roots_and_signed_for_hessians() -> None:
    fn = lambda o, y: ce(o.flatten(0, 1), y.flatten(), torch.tensor([1.0, 1, 1, 1, -2]), reduction="sum")
    out, y, loss = torch.randn(N, T, C), torch.randint(C, (N, T)), losses.normalize(fn)
    y[0] = 4
    with pytest.raises(ValueError, match="negative total weight"):
        losses.exact_root(loss, out, y)
    root, weights = losses.signed_root(loss, out, y)
    assert weights is not None
    columns = root.columns(0, root.num).flatten(2)
    full = torch.func.hessian(lambda f: fn(f, y))(out).reshape(N, T * C, N, T * C)
    got = torch.einsum("vn,vni,vnj->nij", weights, columns, columns)
    assert_close(got, torch.stack([full[n, :, n] for n in range(N)]), 1e-12)


# --- in quantities ----------------------------------------------------------------------------------------------------


def language_model() -> tuple[Any, Any, Tensor]:
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C))
    return *curvfunc.functionalize(model), torch.randint(7, (N, T))


@pytest.mark.parametrize("name", ["flat", "shifted", "mask", "view, weights, smoothed", "flat, sum, smoothed"])
def test_quantities_are_those_of_the_general_path(name: str) -> None:
    fn = KNOWN[name][0]
    model_fn, params, X = language_model()
    functions = {key: case.function for key, case in EXACT.items() if key != "sqrt_ggn"}
    functions |= {"diag_hessian": curvfunc.diag_hessian, "batch_diag_hessian": curvfunc.batch_diag_hessian}
    for function in functions.values():
        given = {"subsampling": [2, 0]}
        assert_close(
            function(model_fn, params, X, PADDED, loss_fn=fn, **given),
            function(model_fn, params, X, PADDED, loss_fn=hidden(fn), **given),
            1e-9,
        )
    S = curvfunc.sqrt_ggn(model_fn, params, X, PADDED, loss_fn=fn)
    want = curvfunc.batch_diag_ggn(model_fn, params, X, PADDED, loss_fn=hidden(fn))
    assert_close({key: s.square().sum(0) for key, s in S.items()}, want, 1e-9)


def test_as_the_loss_without_moves() -> None:
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C)))
    X = torch.randn(N, T, 3)
    moved = lambda p, x: model_fn(p, x).transpose(1, 2)
    for function in (curvfunc.kfac_empirical, curvfunc.kflr, curvfunc.diag_ggn):
        got = function(model_fn, params, X, PADDED, loss_fn=KNOWN["flat"][0])
        assert_close(got, function(moved, params, X, PADDED), 1e-10)
    got = curvfunc.kfac_empirical(model_fn, params, X, PADDED, loss_fn=KNOWN["flat"][0])
    assert_close(got, curvfunc.reference.kfac_empirical(model_fn, params, X, PADDED, loss_fn=KNOWN["flat"][0]), 1e-9)


def test_monte_carlo_in_law() -> None:
    model_fn, params, X = language_model()
    fn = KNOWN["view, weights, smoothed"][0]
    got = curvfunc.diag_ggn(model_fn, params, X, PADDED, loss_fn=fn, mc_samples=20_000, generator=torch.Generator())
    assert_close(got, curvfunc.diag_ggn(model_fn, params, X, PADDED, loss_fn=hidden(fn)), 0.05)


def test_large_vocabularies_take_milliseconds() -> None:
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 200))
    model_fn, params = curvfunc.functionalize(model)
    X, y = torch.randint(11, (4, 24)), torch.randint(200, (4, 24))
    times = []
    for _ in range(3):
        start = time.thread_time()
        curvfunc.kfac(model_fn, params, X, y, loss_fn=KNOWN["flat"][0])
        times.append(time.thread_time() - start)
    assert min(times) < 0.25  # a path of its own took minutes


def test_under_vmap_and_grad() -> None:
    model_fn, params, X = language_model()
    fn = KNOWN["shifted"][0]
    several = {key: torch.stack([p, 2 * p]) for key, p in params.items()}
    quantity = lambda p: curvfunc.diag_ggn(model_fn, p, X, PADDED, loss_fn=fn)
    got = torch.vmap(quantity)(several)
    for i in range(2):
        assert_close({k: v[i] for k, v in got.items()}, quantity({k: p[i] for k, p in several.items()}), 1e-10)
    total = lambda p, loss_fn: sum(v.sum() for v in curvfunc.diag_ggn(model_fn, p, X, PADDED, loss_fn=loss_fn).values())
    assert_close(torch.func.grad(total)(params, fn), torch.func.grad(total)(params, hidden(fn)), 1e-8)


@pytest.mark.parametrize("name", ["flat", "shifted", "squared error, slice"])
def test_compiled(name: str) -> None:
    model_fn, params, X = language_model()
    fn, targets, _ = KNOWN[name]
    y = targets()
    step = torch.compile(
        lambda p, x, t: curvfunc.compute(model_fn, p, x, t, (curvfunc.DiagGGN(), curvfunc.BatchGrad()), loss_fn=fn),
        fullgraph=True,
        backend="aot_eager",
    )
    want = curvfunc.compute(model_fn, params, X, y, (curvfunc.DiagGGN(), curvfunc.BatchGrad()), loss_fn=hidden(fn))
    assert_close(step(params, X, y), want, 1e-9)
    torch._dynamo.reset()


def test_accumulated_over_batches_of_other_lengths() -> None:
    model_fn, params, X = language_model()
    X, y = torch.randint(7, (6, T)), torch.cat([PADDED, PADDED.flip(0)])
    y[4, :] = -100
    fn, specs = KNOWN["flat"][0], (curvfunc.Loss(), curvfunc.Grad(), curvfunc.BatchGrad(), curvfunc.DiagGGN(), curvfunc.KFLR())
    want = curvfunc.compute(model_fn, params, X, y, specs, loss_fn=fn)
    batches = [(X[:1], y[:1]), (X[1:4], y[1:4]), (X[4:5], y[4:5]), (X[5:], y[5:])]
    assert_close(curvfunc.accumulate(model_fn, params, batches, specs, loss_fn=fn), want, 1e-9)
    acc = curvfunc.accumulation(model_fn, params, specs, loss_fn=fn, reduction="terms")
    state = acc.init()
    for batch in batches:
        state = acc.update(state, params, *batch)
    assert_close(acc.result(state), want, 1e-9)
    other = curvfunc.accumulation(model_fn, params, specs, loss_fn=hidden(fn), reduction="terms")
    with pytest.raises(ValueError, match="this one is not known to"):
        other.update(other.init(), params, X, y)


def test_large_hessians_of_unknown_losses_warn() -> None:
    size = losses.custom.LARGE + 1
    out, y = torch.randn(1, size), torch.zeros(1, dtype=torch.int64)
    with pytest.warns(UserWarning, match=f"{size} x {size}"):
        losses.exact_root(losses.normalize(hidden(ce)), out, y)
    assert losses.exact_root(losses.normalize(lambda o, y: ce(o, y)), out, y).num == size
