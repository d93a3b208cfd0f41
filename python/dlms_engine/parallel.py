"""Ranks of a torch.distributed run; a single process is a world of one."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


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

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.size > 1:
            dist.barrier()

    def broadcast_(self, value: Tensor) -> Tensor:
        """Copies rank 0's ``value`` to every rank, in place."""
        if self.size > 1:
            dist.broadcast(value, 0)
        return value


def initialise(device: torch.device | str = "cpu") -> World:
    """Joins the group that ``torchrun`` describes in the environment, once; else a world of one."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return World()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
    return World.current()


def finish() -> None:
    """Leaves the process group, if one was joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
