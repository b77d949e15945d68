"""Losses against torch's own derivatives, options by options."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvfunc import losses

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # torch's forward mode compiles its decompositions with torch.jit.script when it is first used
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning"),
]
RTOL = 1e-12


def close(got: Tensor, want: Tensor, rtol: float = RTOL) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert want.isfinite().all()
    torch.testing.assert_close(got, want, rtol=0.0, atol=rtol * max(want.abs().max().item(), 1e-300))


def blocks_of(root: losses.Root) -> Tensor:
    """Sum_v S S^T, [N, D, D]."""
    columns = root.columns(0, root.num)
    flat = columns.reshape(*columns.shape[:2], -1)
    return torch.einsum("vni,vnj->nij", flat, flat)


def true_blocks(fn: Callable[..., Tensor], out: Tensor, y: Any) -> Tensor:
    """The Hessian of each sample, [N, D, D], from torch.func.hessian; the other blocks must be zero."""
    num, size = out.shape[0], math.prod(out.shape[1:])
    hessian = torch.func.hessian(lambda f: fn(f, y))(out).reshape(num, size, num, size)
    assert not any(hessian[n, :, m].any() for n in range(num) for m in range(num) if n != m)
    return torch.stack([hessian[n, :, n] for n in range(num)])


def check_against_torch(fn: Callable[..., Tensor], out: Tensor, y: Any, rtol: float = RTOL) -> None:
    loss = losses.normalize(fn)
    losses.check(loss, out, y)
    close(loss(out, y), fn(out, y))
    close(losses.gradient(loss, out, y), torch.func.grad(lambda f: fn(f, y))(out), rtol)
    close(blocks_of(losses.exact_root(loss, out, y)), true_blocks(fn, out, y), rtol)
    fewest = losses.exact_root(loss, out, y, fewest=True)
    close(blocks_of(fewest), true_blocks(fn, out, y), rtol)
    if loss.name == "cross_entropy":
        assert fewest.num == max(1, out.shape[1] - 1) * out[0, 0].numel()
    close(losses.summed_hessian(loss, out, y, lambda columns: columns), true_blocks(fn, out, y).sum(0), rtol)


def noise_basis(like: Tensor, mc_samples: int, generator: object) -> Tensor:
    """In place of normal noise: vectors with the second moment of a standard normal, exactly."""
    size = math.prod(like.shape[1:])
    assert mc_samples == size
    basis = torch.eye(size).reshape(size, 1, *like.shape[1:]) * math.sqrt(size)
    return basis.expand(size, *like.shape)


# --- normal form ------------------------------------------------------------------------------------------------------

WEIGHT = torch.tensor([0.3, 1.1, 0.7], dtype=torch.float64)


class Overridden(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


def my_loss(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y)


NORMAL_FORMS: list[tuple[Any, str | None, dict[str, Any], set[str]]] = [
    (F.cross_entropy, "cross_entropy", {"reduction": "mean", "ignore_index": -100, "label_smoothing": 0.0}, set()),
    (F.mse_loss, "mse_loss", {"reduction": "mean"}, set()),
    (F.binary_cross_entropy_with_logits, "bce_with_logits", {"reduction": "mean"}, set()),
    (
        nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1, label_smoothing=0.1, reduction="sum"),
        "cross_entropy",
        {"reduction": "sum", "ignore_index": 1, "label_smoothing": 0.1},
        {"weight"},
    ),
    (nn.MSELoss(reduction="sum"), "mse_loss", {"reduction": "sum"}, set()),
    (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), "bce_with_logits", {"reduction": "mean"}, {"pos_weight"}),
    (
        partial(partial(F.cross_entropy, reduction="sum", ignore_index=2), ignore_index=0, weight=WEIGHT),
        "cross_entropy",
        {"reduction": "sum", "ignore_index": 0, "label_smoothing": 0.0},
        {"weight"},
    ),
    (partial(F.mse_loss, weight=None), "mse_loss", {"reduction": "mean"}, set()),
    (Overridden(), None, {}, set()),
    (my_loss, None, {}, set()),
    (nn.L1Loss(), None, {}, set()),
    (partial(nn.CrossEntropyLoss()), None, {}, set()),
    (partial(F.mse_loss, size_average=False), None, {}, set()),
    (partial(F.cross_entropy, reduce=True), None, {}, set()),
    (partial(F.cross_entropy, torch.zeros(2, 3)), None, {}, set()),
]  # fmt: skip


@pytest.mark.parametrize(("loss_fn", "name", "options", "tensors"), NORMAL_FORMS)
def test_normalize(loss_fn: Any, name: str | None, options: dict[str, Any], tensors: set[str]) -> None:
    loss = losses.normalize(loss_fn)
    assert (loss.name, dict(loss.options), set(loss.tensors)) == (name, options, tensors)
    assert losses.normalize(loss) is loss
    again = losses.rebuild(loss.name, loss.fn, loss.options, loss.tensors)
    assert (again.name, again.fn, again.options, again.tensors) == (loss.name, loss.fn, loss.options, loss.tensors)
    if name is None:
        assert loss.fn is loss_fn


@pytest.mark.parametrize(
    "loss_fn",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="sum"),
        partial(F.cross_entropy, weight=WEIGHT),
        partial(partial(F.cross_entropy, weight=WEIGHT), reduction="sum"),
        lambda out, y: 3 * F.cross_entropy(out, y),
        Overridden(),
    ],
)
def test_normalize_in_a_compiled_region(loss_fn: Callable[..., Tensor]) -> None:
    def region(out: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        loss = losses.normalize(loss_fn)
        loss = losses.rebuild(loss.name, loss.fn, loss.options, loss.tensors)
        return loss(out, y), loss.tensors.get("weight")

    out, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    torch._dynamo.reset()
    value, weight = torch.compile(region, fullgraph=True, backend="aot_eager")(out, y)
    close(value, loss_fn(out, y))
    assert (weight is not None) == ("weight" in losses.normalize(loss_fn).tensors)


# --- closed forms against torch ---------------------------------------------------------------------------------------

CLASS_SHAPES = [(5, 3), (4, 3, 2), (3, 3, 2, 2)]


def class_problem(shape: tuple[int, ...], target: str, ignored: bool) -> tuple[Tensor, Tensor]:
    out = torch.randn(shape)
    if target == "probabilities":
        return out, torch.rand(shape)  # not normalized: torch does not ask for it
    y = torch.arange(math.prod(shape) // shape[1]).remainder(shape[1]).reshape(shape[0], *shape[2:])
    if ignored:
        y.view(-1)[1::4] = -100
    return out, y


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("target", "ignored", "ignore_index"),
    [("indices", False, -100), ("indices", True, -100), ("indices", False, 1), ("probabilities", False, -100)],
)
@pytest.mark.parametrize("shape", CLASS_SHAPES)
def test_cross_entropy(
    shape: tuple[int, ...],
    target: str,
    ignored: bool,
    ignore_index: int,
    weighted: bool,
    smoothing: float,
    reduction: str,
) -> None:
    out, y = class_problem(shape, target, ignored)
    weight = WEIGHT if weighted else None
    fn = nn.CrossEntropyLoss(weight, ignore_index=ignore_index, label_smoothing=smoothing, reduction=reduction)
    check_against_torch(fn, out, y)


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.2}], ids=str)
@pytest.mark.parametrize("mc_samples", [0, 2])
def test_derivatives_by_class_weights_where_targets_are_ignored(mc_samples: int, options: dict[str, Any]) -> None:
    out, y = torch.randn(4, 3), torch.tensor([0, -100, 2, 2])

    def squares(weight: Tensor) -> Tensor:
        loss = losses.normalize(partial(F.cross_entropy, weight=weight, **options))
        if mc_samples:
            root = losses.sampled_root(loss, out, y, mc_samples, torch.Generator().manual_seed(0))
        else:
            root = losses.exact_root(loss, out, y)
        return root.columns(0, root.num).square().sum(0)

    assert torch.autograd.gradcheck(squares, torch.tensor([1.0, 2.0, 0.5], requires_grad=True))


def test_cross_entropy_where_a_label_has_no_weight() -> None:
    out, y = class_problem((5, 3), "indices", True)
    weight = torch.tensor([0.0, 2.0, 1.0])
    check_against_torch(nn.CrossEntropyLoss(weight), out, y)
    check_against_torch(nn.CrossEntropyLoss(weight, label_smoothing=0.3), out, y)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_cross_entropy_with_all_positions_ignored(weight: Tensor | None) -> None:
    out, y = torch.randn(2, 3), torch.full((2,), -100)
    loss = losses.normalize(nn.CrossEntropyLoss(weight))
    assert not torch.func.grad(loss)(out, y).any()
    assert not losses.gradient(loss, out, y).any()
    assert not losses.exact_root(loss, out, y).columns(0, 3).any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3), (3, 2, 2)])
def test_squared_error(shape: tuple[int, ...], weighted: bool, reduction: str) -> None:
    out, y = torch.randn(shape), torch.randn(shape)
    check_against_torch(partial(F.mse_loss, weight=torch.rand(shape) if weighted else None, reduction=reduction), out, y)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("pos_weighted", [False, True])
@pytest.mark.parametrize("weight_shape", [None, (), (3,), (4, 1), (4, 3)])
@pytest.mark.parametrize("shape", [(4, 3), (4,), (2, 4, 3)])
def test_binary_cross_entropy(
    shape: tuple[int, ...], weight_shape: tuple[int, ...] | None, pos_weighted: bool, reduction: str
) -> None:
    if weight_shape is not None and len(weight_shape) > len(shape):
        weight_shape = weight_shape[:1]
    if shape == (4,) and weight_shape == (3,):
        weight_shape = (1,)
    weight = None if weight_shape is None else torch.rand(weight_shape)
    pos_weight = 2 * torch.rand(shape[-1]) if pos_weighted else None
    fn = nn.BCEWithLogitsLoss(weight=weight, pos_weight=pos_weight, reduction=reduction)
    check_against_torch(fn, torch.randn(shape), torch.rand(shape))


@pytest.mark.parametrize(
    ("fn", "y"),
    [
        (nn.CrossEntropyLoss(WEIGHT), torch.tensor([[0, 2], [1, 1], [2, -100], [0, 0]])),
        (nn.MSELoss(), torch.randn(4, 3, 2, dtype=torch.float64)),
        (nn.BCEWithLogitsLoss(), torch.rand(4, 3, 2, dtype=torch.float64)),
        (lambda out, y: F.huber_loss(out, y), torch.randn(4, 3, 2, dtype=torch.float64)),
    ],
)
def test_columns_in_parts_are_the_columns(fn: Callable[..., Tensor], y: Tensor) -> None:
    out, loss = torch.randn(4, 3, 2), losses.normalize(fn)
    exact = losses.exact_root(loss, out, y)
    sampled = losses.sampled_root(loss, out, y, 5, torch.Generator().manual_seed(0))
    assert (exact.num, sampled.num) == (6, 5)
    for root in (exact, sampled):
        parts = [root.columns(0, 2), root.columns(2, 3), root.columns(3, root.num)]
        close(torch.cat(parts), root.columns(0, root.num), 0.0)


def test_columns_take_memory_for_what_is_asked() -> None:
    # all columns together would take 5 TB
    out, y = torch.randn(4, 100_000), torch.zeros(4, dtype=torch.int64)
    binary = F.binary_cross_entropy_with_logits
    for fn, target in ((F.cross_entropy, y), (F.mse_loss, out), (binary, out.sigmoid())):
        root = losses.exact_root(losses.normalize(fn), out, target)
        assert root.columns(99_998, 100_000).shape == (2, 4, 100_000)
        assert root.num == 100_000


def test_large_logits() -> None:
    out = torch.tensor([[1000.0, -1000.0, 0.0], [0.0, -200.0, 3.0]]).requires_grad_()
    y = torch.tensor([1, 0])
    for fn, target in ((F.cross_entropy, y), (F.binary_cross_entropy_with_logits, torch.ones(2, 3))):
        root = losses.exact_root(losses.normalize(fn), out, target)
        columns = root.columns(0, 3)
        assert columns.isfinite().all()
        assert torch.autograd.grad(columns.sum(), out)[0].isfinite().all()
        assert losses.sampled_root(losses.normalize(fn), out, target, 3).columns(0, 3).isfinite().all()
    # exp(-200) has a square root in float32 though it is no float32 itself
    single = losses.exact_root(losses.normalize(F.cross_entropy), out.detach().float(), y).columns(1, 2)
    assert single[0, 1, 1] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fn", [F.cross_entropy, F.mse_loss, lambda out, y: F.smooth_l1_loss(out, y)])
def test_low_precision(fn: Callable[..., Tensor], dtype: torch.dtype) -> None:
    out, loss = torch.randn(4, 3).to(dtype), losses.normalize(fn)
    y = torch.tensor([0, 1, 2, 0]) if fn is F.cross_entropy else torch.randn(4, 3).to(dtype)
    eps = torch.finfo(dtype).eps
    wide = y if fn is F.cross_entropy else y.double()
    for got in (losses.gradient(loss, out, y), losses.exact_root(loss, out, y).columns(0, 3)):
        assert got.dtype == dtype
    close(losses.gradient(loss, out, y).double(), losses.gradient(loss, out.double(), wide), 4 * eps)
    close(blocks_of(losses.exact_root(loss, out, y)).double(), true_blocks(fn, out.double(), wide), 8 * eps)
    sampled = losses.sampled_root(loss, out, y, 2).columns(0, 2)
    assert sampled.dtype == dtype
    assert sampled.isfinite().all()


# --- Monte-Carlo ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2)])
def test_expectation_over_all_classes(
    shape: tuple[int, ...], weight: Tensor | None, smoothing: float, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, y = class_problem(shape, "indices", True)
    fn = nn.CrossEntropyLoss(weight, label_smoothing=smoothing, reduction=reduction)
    positions = math.prod(shape[2:])
    labels = torch.tensor(list(itertools.product(range(3), repeat=positions)))  # [M, positions]
    num = len(labels)
    draws = labels.reshape(num, 1, *shape[2:]).expand(num, shape[0], *shape[2:])
    monkeypatch.setattr(losses.roots, "draw_categories", lambda *_: draws)
    columns = losses.sampled_root(losses.normalize(fn), out, y, num).columns(0, num).flatten(2)
    probs = out.softmax(1).reshape(shape[0], 3, positions)
    chance = torch.stack([probs[:, label, torch.arange(positions)].prod(1) for label in labels])  # [M, N]
    close(torch.einsum("mn,mni,mnj->nij", num * chance, columns, columns), true_blocks(fn, out, y))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("pos_weight", [None, WEIGHT])
@pytest.mark.parametrize("weight", [None, torch.tensor([[0.5], [2.0], [1.5]], dtype=torch.float64)])
def test_expectation_over_all_bits(
    weight: Tensor | None, pos_weight: Tensor | None, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, y = torch.randn(3, 3), torch.rand(3, 3)
    fn = nn.BCEWithLogitsLoss(weight=weight, pos_weight=pos_weight, reduction=reduction)
    bits = torch.tensor(list(itertools.product([False, True], repeat=3)))  # [M, 3]
    monkeypatch.setattr(losses.roots, "draw_bits", lambda *_: bits.unsqueeze(1).expand(8, 3, 3))
    columns = losses.sampled_root(losses.normalize(fn), out, y, 8).columns(0, 8)
    chance = torch.where(bits.unsqueeze(1), out.sigmoid(), (-out).sigmoid()).prod(2)  # [M, N]
    close(torch.einsum("mn,mni,mnj->nij", 8 * chance, columns, columns), true_blocks(fn, out, y))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("fn", [F.mse_loss, lambda out, y, reduction: F.huber_loss(out, y, reduction=reduction)])
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2)])
def test_expectation_over_normal_noise(
    shape: tuple[int, ...], fn: Callable[..., Tensor], reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, y, loss_fn = torch.randn(shape), torch.randn(shape), partial(fn, reduction=reduction)
    monkeypatch.setattr(losses.roots, "draw_normal", noise_basis)
    root = losses.sampled_root(losses.normalize(loss_fn), out, y, math.prod(shape[1:]))
    close(blocks_of(root), true_blocks(loss_fn, out, y))


def test_draws_have_their_distribution() -> None:
    logits, num, generator = torch.tensor([[2.0, -1.0, 0.5, -torch.inf]]), 200_000, torch.Generator().manual_seed(1)
    probs = logits.softmax(1)[0]
    counts = torch.bincount(losses.draw_categories(logits.softmax(1), num, generator)[:, 0], minlength=4)
    assert ((counts - num * probs).abs() <= 4 * (num * probs * (1 - probs)).sqrt()).all()
    ones = losses.draw_bits(logits, num, generator).sum((0, 1))
    chance = logits.sigmoid()[0]
    assert ((ones - num * chance).abs() <= 4 * (num * chance * (1 - chance)).sqrt()).all()
    noise = losses.draw_normal(logits, num, generator)
    assert noise.mean().abs() < 4 / math.sqrt(noise.numel())
    assert (noise.square().mean() - 1).abs() < 4 * math.sqrt(2 / noise.numel())


def test_draws_survive_uniform_noise_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.zeros(shape, dtype=options["dtype"]))
    logits = torch.tensor([[-1e4, 0.0], [-torch.inf, 0.0]])
    assert losses.draw_categories(logits.softmax(1), 1, None).tolist() == [[1, 1]]
    assert losses.draw_categories(logits.float().softmax(1), 1, None).tolist() == [[1, 1]]
    assert not losses.draw_bits(torch.tensor([-1e4]), 1, None).any()


@pytest.mark.parametrize("fn", [F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits, lambda f, y: F.mse_loss(f, y)])
def test_generator(fn: Callable[..., Tensor]) -> None:
    out, y = torch.randn(4, 3), torch.rand(4, 3)
    loss = losses.normalize(fn)

    def sample(seed: int) -> Tensor:
        state = torch.get_rng_state()
        columns = losses.sampled_root(loss, out, y, 6, torch.Generator().manual_seed(seed)).columns(0, 6)
        assert torch.equal(state, torch.get_rng_state())
        return columns

    close(sample(1), sample(1), 0.0)
    assert not torch.equal(sample(1), sample(2))


# --- custom losses ----------------------------------------------------------------------------------------------------


CUSTOM = {
    "cross_entropy": lambda out, y: F.cross_entropy(out, y),
    "huber": lambda out, y: F.huber_loss(out, y, delta=0.5),
    "absolute": lambda out, y: (out - y).abs().sum(),
    "overlapping": lambda out, y: out.flatten(1).sum(1).pow(2).mean() + out.pow(4).sum(),
    "poisson": lambda out, y: F.poisson_nll_loss(out, y.abs(), full=False),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2)])
@pytest.mark.parametrize("name", CUSTOM)
def test_custom(name: str, shape: tuple[int, ...]) -> None:
    out, y = torch.randn(shape), torch.rand(shape)
    if name == "cross_entropy" and len(shape) == 1:
        out, y = torch.randn(4, 1), torch.rand(4, 1)
    loss = losses.normalize(CUSTOM[name])
    assert loss.name is None
    if name == "overlapping" and len(shape) == 1:
        out, y = out.unsqueeze(1), y.unsqueeze(1)
    losses.check(loss, out, y)
    close_or_zero(losses.gradient(loss, out, y), torch.func.grad(loss)(out, y))
    close_or_zero(blocks_of(losses.exact_root(loss, out, y)), true_blocks(loss, out, y))


def close_or_zero(got: Tensor, want: Tensor) -> None:
    if want.any():
        close(got, want)
    else:
        assert not got.any()


def test_custom_gradient_of_a_loss_without_the_output() -> None:
    out = torch.randn(3, 2)
    assert not losses.gradient(losses.normalize(lambda out, y: y.sum()), out, torch.ones(3)).any()


def test_custom_targets_may_be_any_tree() -> None:
    out, y = torch.randn(4, 3), {"label": torch.tensor([0, 1, 2, 0]), "scale": torch.rand(4)}

    def fn(out: Tensor, y: dict[str, Tensor]) -> Tensor:
        return (y["scale"] * F.cross_entropy(out, y["label"], reduction="none")).sum()

    check_against_torch(fn, out, y)


@pytest.mark.parametrize(
    "fn",
    [
        lambda out, y: F.mse_loss(out, y).sqrt(),
        lambda out, y: (out - out.mean(0)).square().sum(),
        lambda out, y: -F.log_softmax(out @ out.T, 1).diagonal().sum(),
    ],
)
@pytest.mark.parametrize("num", [2, 3, 16])
def test_mixing_samples_is_refused(fn: Callable[..., Tensor], num: int) -> None:
    refuses_to_mix(fn, torch.randn(num, 3), torch.randn(num, 3))


@pytest.mark.parametrize(
    "fn",
    [
        lambda out, y: (out - out.mean(0)).abs().sum(),
        lambda out, y: (out[1:] - out[:-1]).abs().sum(),
        lambda out, y: F.mse_loss(F.dropout(out), y),
    ],
)
def test_mixing_samples_without_curvature_or_by_chance_is_refused(fn: Callable[..., Tensor]) -> None:
    refuses_to_mix(fn, torch.randn(16, 3), torch.randn(16, 3))


def refuses_to_mix(fn: Callable[..., Tensor], out: Tensor, y: Tensor) -> None:
    loss = losses.normalize(fn)
    for use in (losses.gradient, losses.exact_root, losses.check_separable):
        with pytest.raises(ValueError, match=r"does not separate over samples.*Move what mixes"):
            use(loss, out, y)
    with pytest.raises(ValueError, match="does not separate"):
        losses.sampled_root(loss, out, y, 1)


def test_mixing_samples_is_found_by_curvature_where_all_outputs_are_zero() -> None:
    loss = losses.normalize(lambda out, y: (out - out.mean(0)).square().sum())
    with pytest.raises(ValueError, match="does not separate over samples"):
        losses.exact_root(loss, torch.zeros(5, 2), torch.zeros(5, 2))


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, y: F.binary_cross_entropy(p, y),
        lambda p, y: -(y * p.log()).sum(1).mean(),
        lambda p, y: F.l1_loss(p, y),
        lambda p, y: F.kl_div(p.log(), y, reduction="batchmean"),
    ],
)
def test_the_separation_check_stays_in_the_domain(fn: Callable[..., Tensor]) -> None:
    probs, y = torch.randn(6, 3).softmax(1), torch.rand(6, 3)
    losses.check_separable(losses.normalize(fn), probs, y)
    losses.check_separable(losses.normalize(fn), probs.float(), y.float())


def test_indefinite_losses_are_refused() -> None:
    out, y = torch.randn(4, 3), torch.randn(4, 3)
    loss = losses.normalize(lambda out, y: (out - y).sin().sum())
    losses.gradient(loss, out, y)
    for use in (losses.exact_root, lambda *a: losses.sampled_root(*a, 1)):
        with pytest.raises(ValueError, match=r"<lambda>.*indefinite.*convex"):
            use(loss, out, y)


def test_indefinite_losses_with_tensors_of_their_own_are_refused() -> None:
    out, scale = torch.randn(4, 3).float(), torch.randn(3, 3).float()
    loss = losses.normalize(lambda out, y: (out @ scale).sin().sum())
    with pytest.raises(ValueError, match="indefinite"):
        losses.exact_root(loss, out, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "fn",
    [
        lambda out, y: F.cross_entropy(out, y.softmax(1)),
        lambda out, y: torch.logsumexp(3 * out, 1).sum() - out[:, 0].sum(),
        lambda out, y: (out - y).norm(dim=1).sum(),
    ],
)
def test_rounding_in_saturated_losses_is_not_refused(fn: Callable[..., Tensor], dtype: torch.dtype) -> None:
    loss = losses.normalize(fn)
    for shape in [(3, 10), (16, 5), (64, 40), (2, 1)] * 5:
        out, y = (30 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
        losses.gradient(loss, out, y)
        assert losses.exact_root(loss, out, y).columns(0, 1).isfinite().all()


def test_infinite_curvature_is_refused() -> None:
    loss = losses.normalize(lambda out, y: (out.abs() ** 1.5).sum())
    with pytest.raises(ValueError, match="infinite or NaN"):
        losses.exact_root(loss, torch.zeros(2, 1), None)


@pytest.mark.parametrize(
    ("weight", "fn", "y"),
    [
        (-WEIGHT, F.cross_entropy, torch.tensor([0, 1])),
        (-WEIGHT, F.binary_cross_entropy_with_logits, torch.rand(2, 3, dtype=torch.float64)),
        (-WEIGHT.expand(2, 3), F.mse_loss, torch.rand(2, 3, dtype=torch.float64)),
    ],
)
def test_negative_weights_are_refused(weight: Tensor, fn: Callable[..., Tensor], y: Tensor) -> None:
    # the mean of cross-entropy and squared error divides by the sum of weights, which is negative too
    mean = losses.normalize(partial(fn, weight=weight))
    loss, out = losses.normalize(partial(fn, weight=weight, reduction="sum")), torch.randn(2, 3)
    close(losses.gradient(loss, out, y), torch.func.grad(loss)(out, y))
    with pytest.raises(ValueError, match=r"negative total weight.*Use non-negative"):
        losses.exact_root(loss, out, y)
    with pytest.raises(ValueError, match="negative total weight"):
        losses.sampled_root(loss, out, y, 1)
    if fn is not F.binary_cross_entropy_with_logits:
        close(blocks_of(losses.exact_root(mean, out, y)), true_blocks(mean, out, y))


# --- transformations --------------------------------------------------------------------------------------------------

CLOSED_AND_CUSTOM = [
    (F.cross_entropy, lambda out, y: F.cross_entropy(out, y)),
    (F.mse_loss, lambda out, y: F.mse_loss(out, y)),
    (F.binary_cross_entropy_with_logits, lambda out, y: F.binary_cross_entropy_with_logits(out, y)),
]


def hessian(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """In reverse mode twice: forward mode fails for some of these losses in torch 2.13."""
    return torch.func.jacrev(torch.func.grad(fn))


def functional(loss: losses.Loss, y: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
    """A number that depends on the roots' S S^T only."""

    def value(out: Tensor) -> Tensor:
        return (weights * blocks_of(losses.exact_root(loss, out, y))).square().sum()

    return value


@pytest.mark.parametrize(("closed", "custom"), CLOSED_AND_CUSTOM)
def test_roots_can_be_differentiated(closed: Callable[..., Tensor], custom: Callable[..., Tensor]) -> None:
    out, y, direction = torch.randn(4, 3), torch.rand(4, 3), torch.randn(4, 3)
    weights = torch.randn(4, 3, 3)

    def direct(out: Tensor) -> Tensor:
        per_sample = torch.vmap(hessian(lambda f, t: closed(f[None], t[None], reduction="sum")))
        normalizer = 4 if closed is F.cross_entropy else 12
        return (weights * per_sample(out, y) / normalizer).square().sum()

    for fn in (closed, custom):
        value = functional(losses.normalize(fn), y, weights)
        close(value(out), direct(out), 1e-11)
        if closed is F.mse_loss:  # its Hessian is constant
            assert torch.func.grad(value)(out).abs().max() < 1e-14
            continue
        close(torch.func.grad(value)(out), torch.func.grad(direct)(out), 1e-10)
        close(torch.func.jvp(value, (out,), (direction,))[1], torch.func.jvp(direct, (out,), (direction,))[1], 1e-10)
        close(hessian(value)(out), hessian(direct)(out), 1e-9)
        leaf = out.clone().requires_grad_()
        close(torch.autograd.grad(value(leaf), leaf)[0], torch.func.grad(direct)(out), 1e-10)


def squared_gradient(loss: losses.Loss, y: Tensor, out: Tensor) -> Tensor:
    return losses.gradient(loss, out, y, create_graph=True).square().sum()


@pytest.mark.parametrize(("closed", "custom"), CLOSED_AND_CUSTOM)
def test_gradients_can_be_differentiated(closed: Callable[..., Tensor], custom: Callable[..., Tensor]) -> None:
    out, y = torch.randn(4, 3).requires_grad_(), torch.rand(4, 3)
    want = torch.func.grad(lambda f: torch.func.grad(closed)(f, y).square().sum())(out.detach())
    for fn in (closed, custom):
        loss = losses.normalize(fn)
        assert not losses.gradient(loss, out, y).requires_grad
        result = losses.gradient(loss, out, y, create_graph=True)
        close(torch.autograd.grad(result.square().sum(), out)[0], want)
        close(torch.func.grad(partial(squared_gradient, loss, y))(out), want)
        with torch.no_grad():
            close(losses.gradient(loss, out, y), result.detach())


@pytest.mark.parametrize("fn", [fn for pair in CLOSED_AND_CUSTOM for fn in pair])
def test_vmap_over_an_ensemble(fn: Callable[..., Tensor]) -> None:
    outs, y, loss = torch.randn(2, 4, 3), torch.rand(4, 3), losses.normalize(fn)

    def exact(out: Tensor) -> Tensor:
        losses.check(loss, out, y)
        return blocks_of(losses.exact_root(loss, out, y))

    close(torch.vmap(exact)(outs), torch.stack([exact(out) for out in outs]))
    gradients = torch.stack([losses.gradient(loss, out, y) for out in outs])
    close(torch.vmap(lambda out: losses.gradient(loss, out, y))(outs), gradients)
    level = torch.vmap(lambda out: torch.func.vjp(lambda f: (f.sum(), losses.gradient(loss, f, y)), out, has_aux=True)[2])
    close(level(outs), gradients)

    def sample(out: Tensor) -> Tensor:
        return losses.sampled_root(loss, out, y, 3).columns(0, 3)

    drawn = torch.vmap(sample, randomness="different")(outs[:1].expand(2, 4, 3))
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("fn", [F.cross_entropy, nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)])
def test_vmap_with_class_indices(fn: Callable[..., Tensor]) -> None:
    outs, ys, loss = torch.randn(2, 4, 3), torch.randint(0, 3, (2, 4)), losses.normalize(fn)

    def both(out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        losses.check(loss, out, y)
        return losses.gradient(loss, out, y), blocks_of(losses.exact_root(loss, out, y))

    for axis, targets in ((0, ys), (None, ys[0])):
        got = torch.vmap(both, in_dims=(0, axis))(outs, targets)
        want = [both(out, ys[i] if axis == 0 else targets) for i, out in enumerate(outs)]
        close(got[0], torch.stack([w[0] for w in want]))
        close(got[1], torch.stack([w[1] for w in want]))


@pytest.mark.parametrize("fn", [F.cross_entropy, F.mse_loss, lambda out, y: F.huber_loss(out, y)])
def test_compiled(fn: Callable[..., Tensor]) -> None:
    loss, out = losses.normalize(fn), torch.randn(4, 3)
    y = torch.tensor([0, 1, 2, 0]) if fn is F.cross_entropy else torch.randn(4, 3)

    @torch._dynamo.nonstrict_trace
    def implementation(out: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        losses.check(loss, out, y)
        sampled = losses.sampled_root(loss, out, y, 2)
        return losses.gradient(loss, out, y), blocks_of(losses.exact_root(loss, out, y)), sampled.columns(0, 2)

    torch._dynamo.reset()
    compiled = torch.compile(lambda out, y: implementation(out, y), fullgraph=True, backend="aot_eager")
    gradient, blocks, drawn = compiled(out, y)
    close(gradient, losses.gradient(loss, out, y))
    close(blocks, blocks_of(losses.exact_root(loss, out, y)))
    assert not torch.equal(drawn, compiled(out, y)[2])


def test_values_visible() -> None:
    x, seen = torch.randn(3, 2), {}

    def look(name: str) -> Callable[[Tensor], Tensor]:
        def function(t: Tensor) -> Tensor:
            seen[name] = (losses.values_visible(t), losses.values_visible(x), losses.values_visible(t, x, "no tensor"))
            return t.sum()

        return function

    look("plain")(x)
    torch.func.grad(look("grad"))(x)
    torch.func.jvp(look("jvp"), (x,), (x,))
    torch.vmap(look("vmap"))(x)
    torch.vmap(torch.func.grad(look("grad in vmap")))(x)
    torch.func.grad(lambda t: torch.vmap(look("vmap in grad"))(t).sum())(x)
    visible = {name: result[0] for name, result in seen.items()}
    assert visible == {
        "plain": True, "grad": True, "jvp": True, "vmap": False, "grad in vmap": False, "vmap in grad": False
    }  # fmt: skip
    assert all(other and both == own for own, other, both in seen.values())
    with torch._subclasses.FakeTensorMode():
        assert not losses.values_visible(torch.randn(2))
    assert not losses.values_visible(torch.randn(2, device="meta"))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", [F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits])
def test_no_reduction(fn: Callable[..., Tensor]) -> None:
    loss = losses.normalize(partial(fn, reduction="none"))
    out, y = torch.randn(4, 3), torch.rand(4, 3)
    for use in (loss, partial(losses.check, loss)):
        with pytest.raises(ValueError, match=rf"{fn.__name__} with reduction='none' gives no scalar. Use reduction='mean'"):
            use(out, y)


@pytest.mark.parametrize(("result", "text"), [(torch.ones(1), r"shape \(1,\)"), (3.0, "float"), (None, "NoneType")])
def test_custom_loss_without_a_scalar(result: Any, text: str) -> None:
    loss = losses.normalize(lambda out, y: result)
    for use in (loss, partial(losses.gradient, loss), partial(losses.exact_root, loss)):
        with pytest.raises(ValueError, match=f"<lambda> returned {text}, not a scalar tensor. Sum or average"):
            use(torch.randn(4, 3), torch.rand(4, 3))


INDEX, SOFT = torch.tensor([0, 1, 2, 0]), torch.rand(4, 3)
BINARY = F.binary_cross_entropy_with_logits
BAD = [
    (F.cross_entropy, torch.randn(4), INDEX, "class axis"),
    (F.cross_entropy, torch.randn(4, 3), INDEX[:3], r"output has shape \(4, 3\) and the target \(3,\)"),
    (F.cross_entropy, torch.randn(5, 3), INDEX, r"class indices of shape \(5,\)"),
    (F.cross_entropy, torch.randn(4, 3), INDEX.unsqueeze(1), r"\(4, 1\)"),
    (F.cross_entropy, torch.randn(4, 3), INDEX.int(), r"int32.*y\.long\(\)"),
    (F.cross_entropy, torch.randn(4, 3), INDEX.float(), r"float32.*class probabilities"),
    (F.cross_entropy, torch.randn(4, 3), SOFT.long(), "class indices"),
    (F.cross_entropy, torch.randn(4, 3, 2), INDEX, r"class indices of shape \(4, 2\)"),
    (F.cross_entropy, torch.randn(4, 2), INDEX, r"target 2 is out of range for C = 2.*0 to 1"),
    (F.cross_entropy, torch.randn(4, 3), INDEX - 1, "target -1 is out of range for C = 3"),
    (partial(F.cross_entropy, ignore_index=-1), torch.randn(4, 3), INDEX - 2, "target -2 is out of range"),
    (partial(F.cross_entropy, weight=torch.ones(2)), torch.randn(4, 3), INDEX, r"weight of shape \(2,\) for C = 3"),
    (partial(F.cross_entropy, ignore_index=0), torch.randn(4, 3), SOFT, "no ignore_index"),
    (F.mse_loss, torch.randn(4, 1), torch.randn(4), r"\(4, 1\) and the target \(4,\).*mix samples"),
    (F.mse_loss, torch.randn(4, 3), torch.randn(1, 3), "mix samples"),
    (F.mse_loss, torch.randn(4), INDEX, "floating point"),
    (partial(F.mse_loss, weight=torch.ones(3)), torch.randn(4, 3), SOFT, r"weight of shape \(3,\)"),
    (BINARY, torch.randn(4), torch.rand(5), r"\(4,\) and the target \(5,\)"),
    (BINARY, torch.randn(4), INDEX, "floating point"),
    (partial(BINARY, weight=torch.ones(2)), torch.randn(4, 3), SOFT, r"weight of shape \(2,\)"),
    (partial(BINARY, pos_weight=torch.ones(2, 4, 3)), torch.randn(4, 3), SOFT, r"pos_weight of shape \(2, 4, 3\)"),
    (F.mse_loss, torch.randn(()), torch.randn(()), "leading axis"),
    (F.mse_loss, torch.randn(0, 2), torch.randn(0, 2), "at least one sample"),
    (my_loss, INDEX, INDEX, "floating point"),
]


@pytest.mark.cpu
@pytest.mark.parametrize(("fn", "out", "y", "message"), BAD)
def test_bad_targets(fn: Any, out: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.check(losses.normalize(fn), out, y)


def test_bad_types() -> None:
    with pytest.raises(TypeError, match=r"one output tensor and got tuple.*output_fn"):
        losses.check(losses.normalize(my_loss), (SOFT, SOFT), INDEX)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tensor of targets and got list"):
        losses.check(losses.normalize(F.cross_entropy), SOFT, [0, 1, 2, 0])


def test_good_targets() -> None:
    loss = losses.normalize(F.cross_entropy)
    losses.check(loss, torch.randn(4, 3), torch.tensor([0, 2, -100, 1]))
    losses.check(loss, torch.randn(4, 3), INDEX.to(torch.uint8))
    close(losses.gradient(loss, SOFT.double(), INDEX.to(torch.uint8)), losses.gradient(loss, SOFT.double(), INDEX))


@pytest.mark.parametrize("mc_samples", [0, -1])
def test_bad_number_of_samples(mc_samples: int) -> None:
    with pytest.raises(ValueError, match=f"mc_samples is {mc_samples}"):
        losses.sampled_root(losses.normalize(F.mse_loss), SOFT, SOFT, mc_samples)


# --- BackPACK ---------------------------------------------------------------------------------------------------------


def backpack_derivatives(name: str) -> Any:
    pytest.importorskip("backpack")
    from backpack.core.derivatives.bcewithlogitsloss import BCELossWithLogitsDerivatives
    from backpack.core.derivatives.crossentropyloss import CrossEntropyLossDerivatives
    from backpack.core.derivatives.mseloss import MSELossDerivatives

    return {"ce": CrossEntropyLossDerivatives, "mse": MSELossDerivatives, "bce": BCELossWithLogitsDerivatives}[name]()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("name", "fn", "shape"),
    [
        ("ce", F.cross_entropy, (4, 3)),
        ("ce", F.cross_entropy, (4, 3, 2, 2)),
        ("mse", F.mse_loss, (4, 3)),
        ("bce", BINARY, (4, 1)),
    ],
)
def test_roots_of_backpack(
    name: str, fn: Callable[..., Tensor], shape: tuple[int, ...], reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    derivatives = backpack_derivatives(name)
    out = torch.randn(shape)
    y = torch.zeros(shape[0], *shape[2:], dtype=torch.int64) if name == "ce" else torch.rand(shape).round()
    module = SimpleNamespace(input0=out, input1=y, reduction=reduction, weight=None, pos_weight=None, ignore_index=-100)
    loss = losses.normalize(partial(fn, reduction=reduction))
    root = losses.exact_root(loss, out, y)
    close(root.columns(0, root.num), derivatives._sqrt_hessian(module, None, None, subsampling=None))

    torch.manual_seed(3)
    want = derivatives._sqrt_hessian_sampled(module, None, None, mc_samples=5)
    torch.manual_seed(3)
    drawn = derivatives._make_distribution(out).sample(torch.Size([5]))
    monkeypatch.setattr(losses.roots, "draw_categories", lambda *_: drawn)
    monkeypatch.setattr(losses.roots, "draw_bits", lambda *_: drawn)
    monkeypatch.setattr(losses.roots, "draw_normal", lambda *_: (drawn - out) / math.sqrt(0.5))
    close(losses.sampled_root(loss, out, y, 5).columns(0, 5), want)
