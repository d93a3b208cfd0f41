"""What passes between the host and the network's device while a solver is learned.

A table is made on the host in float64, the run happens on the device. An update sends its rows up and
their gradients down, one tensor each, and reads the numbers it logs at once. Whatever else would make the
host wait belongs here too, so that one look finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def rows_up(rows: Tensor, device: torch.device) -> Tensor:
    """``rows`` on ``device``; their gradient comes back to where they were, as one tensor."""
    if rows.device == device:
        return rows
    moved: Tensor = _Up.apply(rows, device)  # type: ignore[no-untyped-call]
    return moved


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, device: torch.device) -> Tensor:
        ctx.home = rows.device
        return rows.to(device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return rows_down(grads[0], ctx.home), None


def rows_down(gradient: Tensor, home: torch.device) -> Tensor:
    """The gradient of the rows where the table is made: the host waits for the backward pass."""
    return gradient.to(home)


def host_numbers(values: Sequence[Tensor | float]) -> list[float]:
    """``values`` (numbers or tensors of one element) as floats: one wait for the device."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    kinds = {t.device for t in tensors}
    read: dict[int, float] = {}
    for device in kinds:
        here = [t for t in tensors if t.device == device]
        flat = torch.stack([t.detach().reshape(()).to(torch.float64) for t in here])
        read |= {id(t): n for t, n in zip(here, flat.cpu().tolist(), strict=True)}
    return [read[id(v)] if isinstance(v, Tensor) else float(v) for v in values]


def to_host(value: Tensor) -> Tensor:
    """A result on the CPU, for a report or a file; not for use inside an update."""
    return value.detach().cpu()
