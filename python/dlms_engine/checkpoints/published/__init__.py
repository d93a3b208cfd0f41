"""Learned solvers that others have published, read without executing pickled code.

    from dlms_engine.checkpoints.published import load_published

    solver = load_published("network-snapshot-000010.pkl")

On the command line: ``dlms convert IN OUT.safetensors``. docs/integrations/published.md says what is
kept of each format.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ...policies.distilled import DistilledSolver
from ...processes import Process
from .amed import from_amed, is_amed
from .contents import read_small
from .dyweight import from_dyweight, is_dyweight
from .epd import from_epd, is_epd
from .gas import from_gas, is_gas
from .ld3 import from_ld3, is_ld3


class _Format(NamedTuple):
    fits: Callable[[Any], bool]
    convert: Callable[[Any, Process | None, dict[str, Any]], DistilledSolver]


FORMATS = {
    "AMED": _Format(is_amed, from_amed),
    "DyWeight": _Format(is_dyweight, from_dyweight),
    "EPD": _Format(is_epd, from_epd),
    "GAS": _Format(is_gas, from_gas),
    "LD3": _Format(is_ld3, from_ld3),
}


def published_format(path: str | Path) -> str | None:
    """The name in ``FORMATS`` of a learned solver's file; None for anything else.

    Raises:
        UnsafeCheckpointError: a small file that asks for more than tensors and plain data.
    """
    held = read_small(Path(path))
    return next((name for name, known in FORMATS.items() if known.fits(held)), None)


def load_published(
    path: str | Path, process: Process | None = None, **options: Any
) -> DistilledSolver:
    """The solver in a file of ``FORMATS``; ``save`` writes it as a solver file.

    Args:
        process: of the denoiser it will run; None where the file says what it was made for.
        options: what the format does not hold: ``mu`` (DyWeight on flows), ``shift`` (EPD on flows),
            ``solver``, ``order`` and ``variant`` (LD3), ``t_eps`` (GAS).

    Raises:
        UnsafeCheckpointError: the file asks for more than tensors and plain data.
        ValueError: another file, or a solver that does not fit the rows; names the reason.
    """
    path = Path(path)
    held = read_small(path)
    for name, known in FORMATS.items():
        if known.fits(held):
            try:
                return known.convert(held, process, dict(options))
            except (ValueError, TypeError, KeyError, ArithmeticError) as error:
                raise ValueError(f"{path} ({name}): {error}") from error
    raise ValueError(f"{path} holds no learned solver of {', '.join(sorted(FORMATS))}")
