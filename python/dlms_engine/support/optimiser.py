"""One step of an optimiser, whatever torch's defaults are."""

from __future__ import annotations

import torch


def optimiser_step(optimiser: torch.optim.Optimizer) -> None:
    """``optimiser.step()`` with the CPU as default device.

    Before torch 2.12 Adam makes its counter on the default device and reads it back at every step: a
    host read an update where that is a GPU.
    """
    with torch.device("cpu"):
        optimiser.step()
