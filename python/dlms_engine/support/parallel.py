"""Ranks of a torch.distributed run; a single process is a world of one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others before it gives up. A rank that dies is noticed at once."""


@dataclass(frozen=True)
class World:
    """Rank and size: where this process stands among the others."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """The initialised process group, or a world of one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def slice(self, count: int) -> tuple[int, int]:
        """[start, stop) of this rank's share of ``count`` items, contiguous, sizes within one."""
        base, extra = divmod(count, self.size)
        start = self.rank * base + min(self.rank, extra)
        return start, start + base + (1 if self.rank < extra else 0)

    def sum_(self, value: Tensor) -> Tensor:
        """Sums ``value`` over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Tensor) -> list[Tensor]:
        """``value`` of every rank, in rank order, on every rank; all must have the same shape."""
        if self.size == 1:
            return [value]
        found = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(found, value.contiguous())
        return found

    def rounds(self, count: int) -> list[list[int]]:
        """``count`` whole batches dealt out in rounds, one batch a rank: ``[[0, 1], [2]]`` for two.

        Batch ``round[rank]`` is this rank's (none where the last round is short). What a batch gives
        does not depend on the world, so neither does a sum taken in the order of batches.
        """
        return [
            list(range(first, min(first + self.size, count)))
            for first in range(0, count, self.size)
        ]

    def deal(self, batches: Sequence[int]) -> int | None:
        """The batch of one of ``rounds`` that is this rank's."""
        return batches[self.rank] if self.rank < len(batches) else None

    def check_equal(self, value: int, what: str) -> None:
        """Raises ValueError where the ranks hold different values."""
        values = [int(v) for v in self.gather(torch.tensor(value, device="cpu"))]
        if len(set(values)) > 1:
            raise ValueError(
                f"the processes disagree on {what} ({values}, by rank): they must see the same files, "
                "so put the output on a file system that all of them share"
            )

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.size > 1:
            dist.barrier()


def rank_device(device: torch.device | str) -> torch.device:
    """``device``, and for "cuda" under ``torchrun`` the GPU of this rank, which becomes current.

    Raises:
        ValueError: no such device here.
    """
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device {str(device)!r} is unknown, expected cpu, cuda or cuda:N"
        ) from error
    if place.type != "cuda":
        return place
    if ":" not in str(place):
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    count = torch.cuda.device_count()
    if place.index >= count:
        raise ValueError(f"device {str(device)!r} cannot be used: torch sees {count} GPUs here")
    torch.cuda.set_device(place)  # nccl talks through the current one
    return place


def initialise(device: torch.device | str = "cpu") -> World:
    """Joins the group that ``torchrun`` describes in the environment, once; else a world of one.

    Tensors on the CPU go through gloo; with a CUDA ``device``, those on a GPU go through nccl.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return World()
    if not dist.is_initialized():
        cuda = torch.device(device).type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT, **_meeting_point()
        )
    return World.current()


def _meeting_point() -> dict[str, Any]:
    """Arguments of ``init_process_group`` where the default ones do not survive a restart.

    On one node ``torchrun`` serves one store for all attempts, in which those who start again find the
    addresses of the dead and wait for them; a name for each attempt keeps them apart.
    """
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    size = int(os.environ["WORLD_SIZE"])
    if not own or int(os.environ.get("LOCAL_WORLD_SIZE", "0")) != size:
        return {}
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, size, is_master=False, timeout=TIMEOUT)  # type: ignore[attr-defined]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {
        "store": dist.PrefixStore(f"attempt-{attempt}", store),  # type: ignore[attr-defined]
        "rank": int(os.environ["RANK"]),
        "world_size": size,
    }


def restarted() -> bool:
    """Whether ``torchrun`` has started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def finish() -> None:
    """Leaves the process group, if one was joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
