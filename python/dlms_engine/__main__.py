"""``python -m dlms_engine``: the command line; under ``torchrun`` every rank takes its share."""

from __future__ import annotations

import signal
from types import FrameType

import torch

from .cli import main
from .support.parallel import finish, initialise


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """``torchrun`` ends its processes with SIGTERM: a checkpoint is saved as for Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    # Tensors on GPUs go through nccl, whatever else is asked for; without one gloo is all there is.
    if initialise("cuda" if torch.cuda.is_available() else "cpu").size > 1:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    finally:
        finish()
