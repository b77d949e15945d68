"""The processes of a group: what they tell each other, few large messages, and how one that fails takes the others with it.

Work goes in phases. At the end of each, all processes exchange what they have to say, and one that has failed says this. So
nobody waits for a message that never comes, but for that of a process that is gone, and for this not longer than the group's
timeout.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["GroupError", "Processes"]

LARGEST = 2**26  # bytes of a message that is put together of several tensors
ROLL_CALL = timedelta(seconds=3)
EXCHANGES: dict[str, int] = {}  # so far, by group


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

    def agree(self, about: dict[str, str], remedies: dict[str, str]) -> None:
        """Raise in all of them unless all are about the same.

        Raises:
            ValueError: If not; the message names what differs, and which rank has something else than rank 0.
        """
        hashes = {name: hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for name, text in about.items()}
        said = self.exchange({"about": hashes})
        names = [name for answer in said for name in answer["about"]]
        for name in dict.fromkeys(names):
            others = [r for r, answer in enumerate(said) if answer["about"].get(name) != said[0]["about"].get(name)]
            if others:
                own = about.get(name, "none")
                here = own if len(own) < 300 else own[:300] + "..."
                raise ValueError(
                    f"the processes of the group differ in {name}: rank {', '.join(map(str, others))} has not what rank 0 has; "
                    f"here, rank {self.rank} has {here}. {remedies.get(name, 'All have to ask for the same.')}"
                )

    def _all(self, said: dict[str, Any]) -> list[dict[str, Any]]:
        EXCHANGES[self.group.group_name] = EXCHANGES.get(self.group.group_name, 0) + 1
        found: list[Any] = [None] * self.size
        with self.others():
            dist.all_gather_object(found, said, group=self.group)
        return found

    @contextmanager
    def others(self) -> Iterator[None]:
        """Name who is gone when a message fails."""
        try:
            yield
        except RuntimeError as error:
            gone = self._gone()
            which = (
                f"rank {', '.join(map(str, gone))} of the group is gone, or has not come in time"
                if gone
                else "a process is gone"
            )
            raise GroupError(f"there is no result, for {which}: {error}") from error

    def _gone(self) -> list[int]:
        """Who does not answer any more, as far as the store of the group tells; it may itself be gone."""
        try:
            store = dist.distributed_c10d._get_process_group_store(self.group)
            key = f"curvfunc/{EXCHANGES[self.group.group_name]}"
            store.set(f"{key}/{self.rank}", "here")
            gone = []
            for rank in range(self.size):
                try:
                    store.wait([f"{key}/{rank}"], ROLL_CALL)
                except RuntimeError:
                    gone.append(rank)
        except Exception:
            return []
        return [] if len(gone) == self.size else gone

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
