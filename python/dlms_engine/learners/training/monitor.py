"""What watches a training run: nothing, or TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ...support.files import require_writable, written


class Monitor(Protocol):
    """Receives the numbers of every update."""

    def log(self, update: int, numbers: Mapping[str, Any]) -> None:
        """``numbers``: scalars, lists of them, or mappings of these."""
        ...

    def close(self) -> None: ...


class Silent:
    """Watches nothing."""

    def log(self, update: int, numbers: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard:
    """Scalars of every update and validation as TensorBoard events in ``folder``.

    A list becomes one curve per entry (``grid/01``). A run that goes on from a checkpoint replaces
    what an interrupted one had logged beyond it.

    Raises:
        ImportError: the ``tensorboard`` package is missing.
        OSError: ``folder`` cannot be written; a disk that fills up later is a warning.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoard logs need the tensorboard package: pip install "
                "'dlms_engine[tensorboard]'"
            ) from error
        self._make = SummaryWriter
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        require_writable(self._folder / "events")
        self._writer: Any = None
        self._whole = True

    def log(self, update: int, numbers: Mapping[str, Any]) -> None:
        if self._whole:
            self._whole = written(
                lambda: self._add(update, numbers), f"{self._folder} is not whole"
            )

    def _add(self, update: int, numbers: Mapping[str, Any]) -> None:
        if self._writer is None:
            self._writer = self._make(str(self._folder), purge_step=update)
        for name, value in scalars(numbers).items():
            self._writer.add_scalar(name, value, update)

    def close(self) -> None:
        if self._writer is not None:
            written(self._writer.close, f"{self._folder} is not whole")


def scalars(numbers: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """``{"loss": 1, "grid": [80, 1]}`` -> ``{"loss": 1.0, "grid/00": 80.0, "grid/01": 1.0}``.

    Text and None are left out, so is ``update``; a mapping's name is not repeated in front.
    """
    found: dict[str, float] = {}
    for name, value in numbers.items():
        if isinstance(value, bool | int | float) and name != "update":
            found[prefix + name] = float(value)
        elif isinstance(value, Mapping):
            found |= scalars(value, prefix)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            inner = {f"{name}/{i:02d}": item for i, item in enumerate(value)}
            found |= scalars(inner, prefix)
    return found
