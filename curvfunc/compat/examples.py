"""One batch of MNIST, for examples, and a slow GGN diagonal to compare with.

MNIST is four files in the IDX format. They are looked for in a folder, then fetched; without a network scikit-learn's
handwritten digits take their place.
"""

import gzip
import os
import struct
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvfunc.compat.hessianfree import ggn_vector_product
from curvfunc.compat.kronecker_lists import vector_to_parameter_list

__all__ = ["autograd_diag_ggn_exact", "get_mnist_dataloader", "load_mnist_dataset", "load_one_batch_mnist", "read_idx"]

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's pixels in [0, 1]
TIMEOUT = 10.0  # seconds


def load_mnist_dataset(root: str | Path | None = None) -> TensorDataset:
    """MNIST's training set, pixels normalized: images [60000, 1, 28, 28] and labels.

    Args:
        root: Folder that has, or gets, the IDX files, gzipped or not. Default: the environment variable ``MNIST_DIR``,
            else ``./data/MNIST/raw``, where torchvision keeps them.

    Returns:
        The data set. Where MNIST is not there and cannot be fetched, scikit-learn's 1797 digits, enlarged to 28 x 28, with
        a warning.
    """
    folder = Path(root or os.environ.get("MNIST_DIR") or "data/MNIST/raw")
    found = [_file(folder, name) for name in FILES]
    if None in found:
        images, labels = _digits(folder)
    else:
        images, labels = [read_idx(path) for path in found if path is not None]
        images = images.float() / 255
    return TensorDataset(((images - MEAN) / DEVIATION).unsqueeze(1), labels.long())


def get_mnist_dataloader(batch_size: int = 64, shuffle: bool = True) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of `load_mnist_dataset`."""
    return DataLoader(load_mnist_dataset(), batch_size=batch_size, shuffle=shuffle)


def load_one_batch_mnist(batch_size: int = 64, shuffle: bool = True, flat: bool = False) -> tuple[Tensor, Tensor]:
    """One batch of `load_mnist_dataset`: images [N, 1, 28, 28], or [N, 784] if ``flat``, and labels [N]."""
    X, y = next(iter(get_mnist_dataloader(batch_size, shuffle)))
    return (X.flatten(1) if flat else X), y


def read_idx(path: Path) -> Tensor:
    """An array of bytes in the IDX format, plain or gzipped."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        zero, kind, dims = struct.unpack(">HBB", file.read(4))
        if zero != 0 or kind != 8:
            raise ValueError(f"{path} is not an IDX file of bytes; remove it, so that it is fetched again.")
        shape = struct.unpack(f">{dims}I", file.read(4 * dims))
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).reshape(shape)


def _file(folder: Path, name: str) -> Path | None:
    """The file, fetched if it is not there; None where that fails."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    if plain.exists():
        return plain
    if zipped.exists():
        return zipped
    for mirror in MIRRORS:
        try:
            with urllib.request.urlopen(f"{mirror}{name}.gz", timeout=TIMEOUT) as answer:
                data = answer.read()
        except (urllib.error.URLError, OSError):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        zipped.write_bytes(data)
        return zipped
    return None


def _digits(folder: Path) -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeError(
            f"MNIST is neither in {folder} nor at {' or '.join(MIRRORS)}. Put its files there (or set MNIST_DIR), or install "
            "scikit-learn, whose digits can take its place."
        ) from error
    warnings.warn(
        f"MNIST is neither in {folder} nor can it be fetched: using scikit-learn's digits, enlarged to 28 x 28.", stacklevel=4
    )
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=28, mode="bilinear", align_corners=False)[:, 0]
    return images, torch.as_tensor(digits.target)


def autograd_diag_ggn_exact(
    X: Tensor, y: Tensor, model: nn.Module, loss_function: nn.Module, idx: Sequence[int] | None = None
) -> Tensor:
    """The diagonal of the GGN, entry by entry from GGN-vector products: slow, and obviously right.

    Args:
        X: Input.
        y: Targets.
        model: The model.
        loss_function: The loss module.
        idx: Which entries of the flattened, concatenated parameters; all by default.

    Returns:
        The entries, [len(idx)].
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in parameters)
    out = model(X)
    loss = loss_function(out, y)
    entries = []
    for d in range(size) if idx is None else idx:
        unit = torch.zeros(size, device=loss.device, dtype=loss.dtype)
        unit[d] = 1
        column = ggn_vector_product(loss, out, model, vector_to_parameter_list(unit, parameters))
        entries.append(torch.cat([c.flatten() for c in column])[d])
    return torch.stack(entries)
