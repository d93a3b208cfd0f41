"""The network a pipeline denoises with, by the names pipelines use."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..scheduler.origin import find_network


def network_of(pipe: Any) -> nn.Module:
    """The pipeline's ``unet`` or ``transformer``, a compiled one included.

    Raises:
        ValueError: it has none.
    """
    network = find_network(pipe)
    if network is None:
        raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer")
    return network
