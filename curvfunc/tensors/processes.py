"""The processes of a group: what they tell each other, few large messages, and how one that fails takes the others with it.

Work goes in phases. At the end of each, all processes exchange what they have to say, and one that has failed says this. So
nobody waits for a message that never comes, but for that of a process that is gone, and for this not longer than the group's
timeout.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["GroupError", "Processes", "checksum", "hashed"]

LARGEST = 2**26  # bytes of a message that is put together of several tensors
CHUNK, ODD = 2**20, -7046029254386353131  # entries that are hashed at once, and what tells their places apart
PATIENCE = 1.0  # seconds in which those that are only slower may still come, before who is missing is said
ARRIVALS: dict[str, int] = {}  # how often this process has come to an exchange, by group


class GroupError(RuntimeError):
    """Another process has failed, or is gone."""


class Processes:
    """The processes of a group; without one, this process alone."""

    def __init__(self, group: Any) -> None:
        """Of this group.

        Raises:
            TypeError, ValueError: If it is no group, or this process is not in it.
        """
        self.group, self.rank, self.size = group, 0, 1
        if group is None:
            return
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            if dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER:
                raise ValueError("this process is not in the group. Call on the processes of the group only.")
            raise TypeError(
                f"group must be a process group of torch.distributed or None, got {type(group).__name__}. For all processes "
                "pass torch.distributed.group.WORLD (after init_process_group), for one axis of a mesh mesh.get_group()."
            )
        self.rank, self.size = group.rank(), group.size()

    # -- what is said

    @contextmanager
    def phase(self) -> Iterator[None]:
        """What raises here also raises in the others, at the end of their phase."""
        try:
            yield
        except GroupError:
            raise
        except Exception as error:
            if self.group is not None:
                with contextlib.suppress(GroupError):
                    self._all({"failed": f"{type(error).__name__}: {error}"})
            raise

    def exchange(self, said: dict[str, Any]) -> list[dict[str, Any]]:
        """What all of them have to say, in the order of ranks.

        Raises:
            GroupError: In each of them, if one has failed, or is gone.
        """
        if self.group is None:
            return [said]
        found = self._all(said)
        failed = [(rank, answer["failed"]) for rank, answer in enumerate(found) if "failed" in answer]
        if failed:
            which = " ".join(f"Rank {rank} of the group has failed: {what}" for rank, what in failed)
            raise GroupError(f"there is no result. {which}")
        return found

    def agree(self, about: dict[str, str], remedy: Callable[[str], str] = lambda name: "All have to ask for the same.") -> None:
        """Raise in all of them unless all are about the same.

        Raises:
            ValueError: If not; the message names what differs, and which rank has something else than rank 0.
        """
        hashes = {name: hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for name, text in about.items()}
        said = [answer["about"] for answer in self.exchange({"about": hashes})]
        for name in dict.fromkeys(name for answer in said for name in answer):
            others = [rank for rank, answer in enumerate(said) if answer.get(name) != said[0].get(name)]
            if others:
                own = about.get(name, "nothing")
                raise ValueError(
                    f"the processes of the group differ in {name}: {_ranks(others)} not what rank 0 has, and rank {self.rank} "
                    f"here has {own if len(own) < 300 else own[:300] + '...'}. {remedy(name)}"
                )

    def _all(self, said: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[Any] = [None] * self.size
        self._arrive()
        with self.others():
            dist.all_gather_object(found, said, group=self.group)
        return found

    @contextmanager
    def others(self) -> Iterator[None]:
        """Name who is gone when a message fails."""
        try:
            yield
        except RuntimeError as error:
            missing = self._missing()
            which = f"{_ranks(missing)} not come in time, or died" if missing else "a process has died, or does not answer"
            raise GroupError(f"there is no result, since of the group {which}: {error}") from error

    # -- who is there, by the store of the group, which may itself be gone

    def _arrive(self) -> None:
        ARRIVALS[self.group.group_name] = ARRIVALS.get(self.group.group_name, 0) + 1
        with contextlib.suppress(Exception):
            store = dist.distributed_c10d._get_process_group_store(self.group)
            store.set(f"curvfunc/{self.rank}", str(ARRIVALS[self.group.group_name]))

    def _missing(self) -> list[int]:
        """Who has not come to where this process is; none where nobody can tell."""
        try:
            store = dist.distributed_c10d._get_process_group_store(self.group)
            until = time.monotonic() + PATIENCE
            while True:
                keys = [f"curvfunc/{rank}" for rank in range(self.size)]
                arrived = [int(store.get(key)) if store.check([key]) else 0 for key in keys]
                missing = [rank for rank, count in enumerate(arrived) if count < ARRIVALS[self.group.group_name]]
                if not missing or time.monotonic() > until:
                    return missing
                time.sleep(0.05)
        except Exception:
            return []

    # -- tensors

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all processes into each of the tensors."""
        for places in buckets(tensors):
            part = [tensors[i] for i in places]
            whole = part[0].view(-1) if len(part) == 1 and part[0].is_contiguous() else flat(part)
            with self.others():
                dist.all_reduce(whole, group=self.group)
            if len(part) > 1 or not part[0].is_contiguous():
                put(whole, part)

    def scatter(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of the sum over all processes, this one's share of the first axis; shares are those of ``torch.chunk``."""
        found = [share(t, self.rank, self.size).clone() for t in tensors]
        for places in buckets(tensors):
            pieces = []
            for rank in range(self.size):
                for i in places:
                    t, own = tensors[i], share(tensors[i], rank, self.size)
                    pieces += [own, t.new_zeros((most(t, self.size) - len(own), *t.shape[1:]))]
            whole = flat(pieces)
            mine = whole.new_empty(whole.numel() // self.size)
            with self.others():
                REDUCE_SCATTER(mine, whole, group=self.group)
            start = 0
            for i in places:
                put(mine[start : start + found[i].numel()], [found[i]])
                start += most(tensors[i], self.size) * tensors[i][:1].numel()
        return found

    def gather(self, tensors: Sequence[Tensor], rows: Sequence[int], device: torch.device) -> list[Tensor]:
        """The tensors of all processes, one behind the other; each has as many ``rows`` by rank. Sent from ``device``."""
        wholes = [t.new_empty((sum(rows), *t.shape[1:])) for t in tensors]
        start = 0
        for rank, count in enumerate(rows):
            targets = [whole[start : start + count] for whole in wholes]
            start += count
            for places in buckets(targets):
                part = [targets[i] for i in places]
                message = flat([tensors[i] for i in places] if rank == self.rank else part).to(device)
                with self.others():
                    dist.broadcast(message, group=self.group, group_src=rank)
                put(message, part)
        return wholes


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"


REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Numbers of the tensors that go in one message: of one kind, and not too large together. Empty ones go in none."""
    for kind in dict.fromkeys((t.dtype, t.device) for t in tensors):
        part: list[int] = []
        size = 0
        for i, t in enumerate(tensors):
            if (t.dtype, t.device) != kind or not t.numel():
                continue
            if part and size + t.nbytes > LARGEST:
                yield part
                part, size = [], 0
            part.append(i)
            size += t.nbytes
        if part:
            yield part


def checksum(t: Tensor) -> int:
    """The sum of the bits as integers, which is the same on every machine."""
    return int(_bits(t).sum(dtype=torch.int64))


def hashed(t: Tensor) -> int:
    """As `checksum`, and another one where entries have changed places or signs, as in vectors of signs."""
    bits = _bits(t).flatten()
    total = bits.new_zeros((), dtype=torch.int64)
    for start in range(0, len(bits), CHUNK):
        x = bits[start : start + CHUNK].to(torch.int64)
        x = x + torch.arange(start, start + len(x), device=x.device).mul_(ODD)
        total += x.bitwise_xor_(x >> 31).sum()  # a sum alone would not tell in which of them a bit differs
    return int(total)


def _bits(t: Tensor) -> Tensor:
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.detach().contiguous().view(kinds[t.element_size()])


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries, one tensor after the other."""
    return torch.cat([t.reshape(-1) for t in tensors])


def put(entries: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write entries back into the tensors that they are of."""
    for t, piece in zip(tensors, entries.split([t.numel() for t in tensors]), strict=True):
        t.copy_(piece.view(t.shape))


def most(t: Tensor, size: int) -> int:
    """The length of all shares but the last ones."""
    return -(-len(t) // size)


def share(t: Tensor, rank: int, size: int) -> Tensor:
    """A process's share of the first axis."""
    length = most(t, size)
    return t[rank * length : (rank + 1) * length]
