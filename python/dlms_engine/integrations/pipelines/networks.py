"""The network a pipeline denoises with, by the names pipelines use."""

from __future__ import annotations

from typing import Any

from torch import nn

_NAMES = ("unet", "transformer", "prior", "decoder")


def network_of(pipe: Any) -> nn.Module:
    """The pipeline's ``unet`` or ``transformer``, a compiled one included.

    Raises:
        ValueError: it has none.
    """
    for name in _NAMES:
        network = getattr(pipe, name, None)
        if isinstance(network, nn.Module):
            return network
    raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer")
