"""The five documents that describe BackPACK's use, as tests that import from the shim only."""

import gzip
import math
import struct
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from curvfunc.compat.core.derivatives.convnd import weight_jac_t_save_memory
from curvfunc.compat.core.layers import Flatten
from curvfunc.compat.utils import examples
from curvfunc.compat.utils.examples import load_one_batch_mnist
from torch import Tensor
from torch.nn import Conv2d, CrossEntropyLoss, Linear, MaxPool2d, Module, ReLU, Sequential
from torch.optim import Optimizer

from curvfunc.compat import backpack, disable, extend
from curvfunc.compat.extensions import (
    GGNMP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    PCHMP,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)

BATCH = 512


@pytest.fixture(scope="module", autouse=True)
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with files as MNIST's, made of blobs whose place is the label; one of them is zipped."""
    folder = tmp_path_factory.mktemp("mnist")
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (1000,), generator=generator)
    images = torch.rand(1000, 28, 28, generator=generator) * 100
    for n, label in enumerate(labels.tolist()):
        row, column = divmod(label, 5)
        images[n, 3 + 13 * row : 11 + 13 * row, 1 + 5 * column : 7 + 5 * column] += 150
    header = struct.pack(">HBBIII", 0, 8, 3, 1000, 28, 28)
    (folder / "train-images-idx3-ubyte").write_bytes(header + images.byte().numpy().tobytes())
    with gzip.open(folder / "train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">HBBI", 0, 8, 1, 1000) + labels.byte().numpy().tobytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MNIST_DIR", str(folder))
        yield folder


def model_and_loss() -> tuple[Module, Module, Tensor, Tensor]:
    X, y = load_one_batch_mnist(batch_size=BATCH)
    assert X.shape == (BATCH, 1, 28, 28)
    assert y.shape == (BATCH,)
    return extend(Sequential(Flatten(), Linear(784, 10))), extend(CrossEntropyLoss()), X.flatten(1), y


FIRST_ORDER = [
    (BatchGrad, "grad_batch", (BATCH, 10, 784), (BATCH, 10)),
    (Variance, "variance", (10, 784), (10,)),
    (SumGradSquared, "sum_grad_squared", (10, 784), (10,)),
    (BatchL2Grad, "batch_l2", (BATCH,), (BATCH,)),
]


def test_first_order() -> None:
    model, loss_fn, X, y = model_and_loss()
    for extension, field, weight, bias in FIRST_ORDER:
        loss = loss_fn(model(X), y)
        with backpack(extension()):
            loss.backward()
        assert getattr(model[1].weight, field).shape == weight
        assert getattr(model[1].bias, field).shape == bias
    model.zero_grad()
    with backpack(*[extension() for extension, *_ in FIRST_ORDER]):
        loss_fn(model(X), y).backward()
    for p in model.parameters():
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad)
        torch.testing.assert_close(p.grad_batch.flatten(1).square().sum(1), p.batch_l2)
        torch.testing.assert_close(p.grad_batch.square().sum(0), p.sum_grad_squared)
        torch.testing.assert_close(p.grad_batch.var(0, unbiased=False), p.variance, rtol=1e-3, atol=1e-9)


SECOND_ORDER = [
    (DiagGGNExact, "diag_ggn_exact", [(10, 784)], [(10,)]),
    (DiagGGNMC, "diag_ggn_mc", [(10, 784)], [(10,)]),
    (BatchDiagGGNExact, "diag_ggn_exact_batch", [(BATCH, 10, 784)], [(BATCH, 10)]),
    (BatchDiagGGNMC, "diag_ggn_mc_batch", [(BATCH, 10, 784)], [(BATCH, 10)]),
    (KFAC, "kfac", [(10, 10), (784, 784)], [(10, 10)]),
    (KFLR, "kflr", [(10, 10), (784, 784)], [(10, 10)]),
    (KFRA, "kfra", [(10, 10), (784, 784)], [(10, 10)]),
    (DiagHessian, "diag_h", [(10, 784)], [(10,)]),
    (BatchDiagHessian, "diag_h_batch", [(BATCH, 10, 784)], [(BATCH, 10)]),
    (SqrtGGNExact, "sqrt_ggn_exact", [(10, BATCH, 10, 784)], [(10, BATCH, 10)]),
    (SqrtGGNMC, "sqrt_ggn_mc", [(1, BATCH, 10, 784)], [(1, BATCH, 10)]),
]


@pytest.mark.parametrize(("extension", "field", "weight", "bias"), SECOND_ORDER, ids=[row[1] for row in SECOND_ORDER])
def test_second_order(extension: Any, field: str, weight: list[Any], bias: list[Any]) -> None:
    model, loss_fn, X, y = model_and_loss()
    loss = loss_fn(model(X), y)
    with backpack(extension()):
        loss.backward()
    for p, shapes in ((model[1].weight, weight), (model[1].bias, bias)):
        result = getattr(p, field)
        assert isinstance(result, list) == field.startswith("kf")
        assert [tuple(r.shape) for r in (result if isinstance(result, list) else [result])] == shapes


def test_second_order_values_agree() -> None:
    """On a linear model the Hessian is the GGN, and the Kronecker factor of the bias is its GGN block."""
    model, loss_fn, X, y = model_and_loss()
    exts = DiagGGNExact(), DiagHessian(), BatchDiagGGNExact(), BatchDiagHessian(), SqrtGGNExact(), KFLR()
    with backpack(*exts):
        loss_fn(model(X), y).backward()
    for p in model.parameters():
        torch.testing.assert_close(p.diag_h, p.diag_ggn_exact)
        torch.testing.assert_close(p.diag_h_batch, p.diag_ggn_exact_batch)
        torch.testing.assert_close(p.diag_ggn_exact_batch.sum(0), p.diag_ggn_exact)
        torch.testing.assert_close(p.sqrt_ggn_exact.square().sum((0, 1)), p.diag_ggn_exact)
    torch.testing.assert_close(model[1].bias.kflr[0].diag(), model[1].bias.diag_ggn_exact)


@pytest.mark.parametrize("V", [1, 3])
def test_products(V: int) -> None:
    model, loss_fn, X, y = model_and_loss()
    exts = HMP(), GGNMP(), PCHMP(savefield="pchmp_clip", modify="clip"), PCHMP(savefield="pchmp_abs", modify="abs")
    with backpack(*exts):
        loss_fn(model(X), y).backward()
    for p in model.parameters():
        v = torch.randn(V, *p.shape)
        products = [getattr(p, field)(v) for field in ("hmp", "ggnmp", "pchmp_clip", "pchmp_abs")]
        for product in products:  # all the same on a linear model
            assert product.shape == (V, *p.shape)
            torch.testing.assert_close(product, products[0], rtol=1e-4, atol=1e-6)
    unit = torch.eye(10)
    with backpack(KFLR()):
        loss_fn(model(X), y).backward()
    torch.testing.assert_close(model[1].bias.hmp(unit), model[1].bias.kflr[0], rtol=1e-4, atol=1e-6)


class DiagGGNOptimizer(Optimizer):
    """Damped steps with the Monte-Carlo diagonal of the GGN."""

    def __init__(self, parameters: Any, step_size: float, damping: float) -> None:
        super().__init__(parameters, {"step_size": step_size, "damping": damping})

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                direction = p.grad / (p.diag_ggn_mc + group["damping"])
                p.data.add_(direction, alpha=-group["step_size"])


def test_mnist_example() -> None:
    model = extend(
        Sequential(
            Conv2d(1, 20, 5, 1), ReLU(), MaxPool2d(2, 2),
            Conv2d(20, 50, 5, 1), ReLU(), MaxPool2d(2, 2),
            Flatten(), Linear(4 * 4 * 50, 500), ReLU(), Linear(500, 10),
        )
    )  # fmt: skip
    loss_fn = extend(CrossEntropyLoss())
    optimizer = DiagGGNOptimizer(model.parameters(), step_size=0.05, damping=1.0)
    batches = iter(())
    losses = []
    for _ in range(100):
        batch = next(batches, None)
        if batch is None:
            batches = iter(examples.get_mnist_dataloader(batch_size=16))
            batch = next(batches)
        X, y = batch
        optimizer.zero_grad()
        loss = loss_fn(model(X), y)
        with backpack(DiagGGNMC()), weight_jac_t_save_memory(save_memory=True):
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(10), abs=0.3)
    assert sum(losses[-10:]) / 10 < losses[0] / 2


SUBSETS = [[0, 1, 13, 42]]


@pytest.mark.parametrize("samples", SUBSETS)
def test_subsampling(samples: list[int]) -> None:
    model, loss_fn, X, y = model_and_loss()
    with backpack(BatchGrad(), SqrtGGNExact()):
        loss_fn(model(X), y).backward()
    naive = [(p.grad_batch[samples], p.sqrt_ggn_exact[:, samples]) for p in model.parameters()]
    with backpack(BatchGrad(subsampling=samples), SqrtGGNExact(subsampling=samples), SqrtGGNMC(2, subsampling=samples)):
        loss_fn(model(X), y).backward()
    for p, (grads, roots) in zip(model.parameters(), naive, strict=True):
        assert p.grad_batch.shape == (4, *p.shape)
        assert torch.equal(p.grad_batch, grads)
        assert torch.equal(p.sqrt_ggn_exact, roots)
        assert p.sqrt_ggn_mc.shape == (2, 4, *p.shape)


# -- the data


def test_one_batch(mnist: Path) -> None:
    X, _ = load_one_batch_mnist(64, flat=True)
    assert X.shape == (64, 784)
    whole, labels = examples.load_mnist_dataset().tensors
    assert (whole.shape, labels.shape) == ((1000, 1, 28, 28), (1000,))
    assert whole.min() >= -0.1307 / 0.3081 - 1e-6
    first, _ = load_one_batch_mnist(8, shuffle=False)
    assert torch.equal(first, whole[:8])


def test_digits_take_the_place_of_mnist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("MNIST_DIR", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.warns(UserWarning, match="using scikit-learn's digits"):
        X, y = load_one_batch_mnist(32)
    assert X.shape == (32, 1, 28, 28)
    assert set(y.tolist()) <= set(range(10))


def test_mnist_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mnist: Path) -> None:
    def mirror(url: str, timeout: float) -> Any:
        name = url.rsplit("/", 1)[1]
        path = mnist / name.removesuffix(".gz")
        data = path.read_bytes() if path.exists() else gzip.decompress((mnist / name).read_bytes())
        return gzip_answer(gzip.compress(data))

    monkeypatch.setenv("MNIST_DIR", str(tmp_path / "new"))
    monkeypatch.setattr("urllib.request.urlopen", mirror)
    X, _ = load_one_batch_mnist(32)
    assert X.shape == (32, 1, 28, 28)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [f"{name}.gz" for name in examples_files()]


def gzip_answer(data: bytes) -> Any:
    import io

    return io.BytesIO(data)


def examples_files() -> list[str]:
    from curvfunc.compat.examples import FILES

    return sorted(FILES)


def test_idx_file_of_another_kind_raises(tmp_path: Path) -> None:
    from curvfunc.compat.examples import read_idx

    path = tmp_path / "wrong"
    path.write_bytes(struct.pack(">HBBI", 0, 13, 1, 2) + b"12345678")
    with pytest.raises(ValueError, match="not an IDX file of bytes"):
        read_idx(path)


def test_disable_records_nothing() -> None:
    model, loss_fn, X, y = model_and_loss()
    with disable():
        loss = loss_fn(model(X), y)
    loss.backward()
    assert model[1].weight.grad is not None
    with disable():
        loss = loss_fn(model(X), y)
    with backpack(BatchGrad()), pytest.raises(RuntimeError, match="disable"):
        loss.backward()
