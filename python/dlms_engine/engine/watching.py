"""What may watch a run: a callback, a progress bar, and whoever wants all its states."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .steps import AfterRow


class Step(NamedTuple):
    """What a callback is given after each row."""

    index: int  # type: ignore[assignment]  # 0 .. nfe - 1; hides tuple.index
    nfe: int
    # [B, ...] the state after the row; the live buffer: clone it to keep it. Values written into it
    # count from the next evaluation on.
    x: Tensor


Callback = Callable[[Step], None]


class Watchers:
    """Those who watch one run of ``nfe`` rows."""

    def __init__(self, nfe: int, callback: Callback | None, progress: bool, states: bool) -> None:
        self._nfe = nfe
        self._callback = callback
        self._states: list[Tensor] | None = [] if states else None
        self._bar = None
        if progress:
            self._bar = tqdm(total=nfe, desc="sampling", unit="eval", leave=False)

    @property
    def present(self) -> bool:
        """Whether anybody watches."""
        return any(one is not None for one in (self._states, self._callback, self._bar))

    def begin(self, x: Tensor) -> AfterRow | None:
        """What a run from ``x`` calls after each row; None where nobody watches."""
        if self._states is not None:
            self._states.append(x.clone())
        return self._after if self.present else None

    def _after(self, n: int, x: Tensor) -> None:
        if self._states is not None:
            self._states.append(x.clone())
        if self._callback is not None:
            self._callback(Step(n, self._nfe, x))
        if self._bar is not None:
            self._bar.update()

    def end(self) -> None:
        """Takes the bar away, also after a run that failed."""
        if self._bar is not None:
            self._bar.close()

    def trajectory(self) -> Tensor:
        """``[nfe + 1, B, ...]`` the states so far, of a run whose states were asked for."""
        assert self._states is not None
        return torch.stack(self._states)
