"""Where results per sample are kept until all are there: in memory, on some device, or in files."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Files", "Memory", "Place"]

Place = tuple[int, int]  # number of the spec, and of the parameter


class Memory:
    """Results in memory, on the device where they are made or on another one."""

    def __init__(self, device: torch.device | None) -> None:
        """Keep them on ``device``; None is where they are made."""
        self.device = device

    def keep(self, place: Place, chunk: Tensor, start: int, axis: int) -> list[Tensor]:
        """What the state holds of the results from sample ``start`` on."""
        return [chunk if self.device is None else chunk.to(self.device)]

    def join(
        self, place: Place, chunks: list[Tensor], rows: Sequence[int], factors: Sequence[Tensor | None], axis: int
    ) -> Tensor:
        """All results, each chunk times its factor. Chunks are given up one by one, so that they need no memory twice."""
        shape = list(chunks[0].shape)
        shape[axis] = sum(rows)
        whole, start = chunks[0].new_empty(shape), 0
        for k, factor in enumerate(factors):
            part = whole.narrow(axis, start, rows[k]).copy_(chunks[k])
            if factor is not None:
                part.mul_(factor.to(part.device))
            start += rows[k]
            chunks[k] = whole.new_empty(0)
        return whole

    def sync(self) -> None:
        """Nothing to write."""


class Files:
    """Results in files of a folder, samples first, which the results are mapped to.

    A part file has the results as they come. Their common scale is known at the end only, when they are copied, in it, into
    files of their own; part files are not changed before, so that a run can be stopped and resumed at any time.
    """

    device = torch.device("cpu")

    def __init__(self, folder: str | os.PathLike[str], names: Sequence[Sequence[str]], finished: bool) -> None:
        """Use ``folder``, with files called by ``names``; whether an earlier run has written all of them."""
        self.folder, self.names, self.finished = Path(folder), names, finished
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parts: set[Path] = set()

    def _file(self, place: Place, suffix: str) -> Path:
        return self.folder / f"{self.names[place[0]][place[1]]}.{suffix}"

    def keep(self, place: Place, chunk: Tensor, start: int, axis: int) -> list[Tensor]:
        """Write the results from sample ``start`` on; the state holds their type and shape."""
        if self.finished:
            raise ValueError(
                f"the data has more batches than when the files in {self.folder} were finished. Take another folder."
            )
        rows = chunk.movedim(axis, 0)
        path = self._file(place, "part")
        size, self.parts = start * rows[0].numel(), self.parts | {path}
        if size and (not path.exists() or path.stat().st_size < size * chunk.element_size()):
            raise ValueError(f"{path} lacks results that the checkpoint counts on. Remove the checkpoint to start anew.")
        if rows.numel():
            _mapped(path, size + rows.numel(), chunk.dtype)[size:].view(rows.shape).copy_(rows)
        return [] if start else [chunk.new_empty([0 if k == axis else n for k, n in enumerate(chunk.shape)], device="cpu")]

    def join(
        self, place: Place, chunks: list[Tensor], rows: Sequence[int], factors: Sequence[Tensor | None], axis: int
    ) -> Tensor:
        """All results, mapped from a file."""
        like = chunks[0].movedim(axis, 0)
        shape = (sum(rows), *like.shape[1:])
        size, final = torch.Size(shape).numel(), self._file(place, "bin")
        if not size:
            return like.new_empty(shape).movedim(0, axis)
        if self.finished:
            if not final.exists() or final.stat().st_size != size * like.element_size():
                raise ValueError(f"{final} is not what the checkpoint says. Remove the checkpoint to start anew.")
            return _mapped(final, size, like.dtype).view(shape).movedim(0, axis)
        source, path = _mapped(self._file(place, "part"), size, like.dtype).view(shape), self._file(place, "bin.tmp")
        path.unlink(missing_ok=True)
        whole, start = _mapped(path, size, like.dtype).view(shape), 0
        for count, factor in zip(rows, factors, strict=True):
            part = whole[start : start + count].copy_(source[start : start + count])
            if factor is not None:
                part.mul_(factor.to("cpu"))
            start += count
        _flush(path)
        os.replace(path, final)
        return whole.movedim(0, axis)

    def sync(self) -> None:
        """Have the system write what is in part files."""
        for path in self.parts:
            if path.exists():
                _flush(path)

    def tidy(self) -> None:
        """Remove part files; the results are in others."""
        for i, names in enumerate(self.names):
            for j in range(len(names)):
                self._file((i, j), "part").unlink(missing_ok=True)


def _mapped(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    """The file's memory; it grows to that size, before torch would let it grow and set its first byte to zero."""
    with open(path, "ab") as file:
        if file.tell() < size * dtype.itemsize:
            file.truncate(size * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
