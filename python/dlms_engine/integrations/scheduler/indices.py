"""Where in a schedule a time stands."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

_log = logging.getLogger("dlms_engine")


def index_of(timestep: Any, base: Tensor, known: Sequence[float] | None) -> int:
    """Index of ``timestep`` in the schedule ``base``, whose values on the host are ``known``.

    A view into ``base`` is found without reading its value, and another tensor on an accelerator is the
    first step: reading it would wait for the device.
    """
    if isinstance(timestep, Tensor):
        if timestep.numel() == 1 and _shares_memory(timestep, base):
            return int(timestep.storage_offset() - base.storage_offset())
        if timestep.device.type != "cpu":
            return 0
        timestep = float(timestep.reshape(-1)[0])
    known = base.tolist() if known is None else known
    if timestep in known:
        return known.index(timestep)
    _log.warning(
        "timestep %s is none of this run's %d (%s ... %s): taken for the first step; call "
        "set_begin_index where it is another",
        *(timestep, len(known), known[0], known[-1]),
    )
    return 0


def _shares_memory(timestep: Tensor, base: Tensor) -> bool:
    own, other = timestep.untyped_storage(), base.untyped_storage()
    return (
        own.data_ptr() == other.data_ptr() and own.nbytes() == other.nbytes() and own.nbytes() > 0
    )
