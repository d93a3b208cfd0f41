"""A policy made in EDM's coordinates, run on the process that its model is trained in.

In EDM's coordinates, which the papers of AMED and DLMS use for every model, the state is x / alpha and
its time the level sigma / alpha; a network that is called at another level than the state's sees the
same x / alpha through its own scaling. On a process with alpha below 1 this is x alpha(t') / alpha(t)
at t': the input is rescaled with the level it is told.

Between evaluations the state kept here is just that, alpha(t') x / alpha(t) with t' the time of the
next evaluation. So rows need no further column, and whatever runs rows runs these.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..processes import Process, edm_coordinates, from_config
from ..solvers.file import register_policy
from ..solvers.run import PolicyRun, Row
from ..support.versioned import Versioned
from .amed import AmedPolicy
from .dlms import DesignerPolicy

Inner = AmedPolicy | DesignerPolicy
_KINDS: dict[str, type[Inner]] = {kind.kind: kind for kind in (AmedPolicy, DesignerPolicy)}


class EdmCoordinates(Versioned):
    """``inner``, made for ``processes.edm_coordinates(process)``, as a policy for ``process``.

    The networks of ``inner`` are attributes here, too.

    Raises:
        ValueError: ``inner`` was made for another process.
    """

    kind: ClassVar[str] = "edm_coordinates"

    def __init__(self, inner: Inner, process: Process) -> None:
        wanted = edm_coordinates(process)
        if inner.process != wanted:
            raise ValueError(f"the policy was made for {inner.process!r}, expected {wanted!r}")
        self.inner = inner
        self.process = process
        for name, value in vars(inner).items():
            if isinstance(value, nn.Module):
                setattr(self, name, value)
        self.grid = self._times(inner.grid.cpu())
        self._ends = [float(process.alpha(t)) for t in (self.grid[0], self.grid[-1])]

    def _times(self, levels: Tensor) -> Tensor:
        process = self.process
        return process.inverse_sigma(levels).clamp(process.t_min, process.t_max)

    @property
    def prediction(self) -> Literal["data", "noise"]:
        return self.inner.prediction

    @property
    def nfe(self) -> int:
        return self.inner.nfe

    @property
    def depth(self) -> int:
        return self.inner.depth

    @property
    def needs_features(self) -> bool:
        return self.inner.needs_features

    @property
    def t_start(self) -> float:
        return float(self.grid[0])

    def place(self, device: torch.device) -> None:
        """Moves the inner networks to ``device``."""
        self.inner.place(device)

    def start(self, batch: int, device: torch.device) -> PolicyRun:
        self.place(device)
        return self.run(batch, device)

    def run(self, batch: int, device: torch.device) -> PolicyRun:
        """As ``start``, without moving the networks."""
        inner = self.inner
        if "decide" in vars(self):  # ``static_table.deciding``
            inner = copy.copy(inner)
            vars(inner)["decide"] = self.decide
        return _Run(self, inner.run(batch, device))

    # -- decisions are the inner policy's -------------------------------------------------------

    def decide(self, features: Tensor | None, n: int, at: tuple[Tensor, ...]) -> Any:
        return self.inner.decide(features, n, at)

    def mean(self, decision: Any) -> Any:
        return self.inner.mean(decision)

    def static_grid(self, decisions: dict[int, Any]) -> Tensor:
        grid = self._times(self.inner.static_grid(decisions))
        return torch.cat([self.grid[:1], grid[1:-1], self.grid[-1:]])

    def static_options(self) -> dict[str, Any]:
        return {**self.inner.static_options(), "coordinates": "edm"}

    def static_table(self) -> None:
        """None: rows are computed while sampling."""

    def describe(self) -> dict[str, Any]:
        """What the inner policy says, of which times are levels sigma / alpha."""
        return {**self.inner.describe(), "coordinates": "edm"}

    # -- files ----------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON settings) for a solver file."""
        tensors, settings = self.inner.state()
        own = {"policy": self.inner.kind, "settings": settings, "process": self.process.config()}
        return tensors, own

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], settings: dict[str, Any]) -> EdmCoordinates:
        """Inverse of ``state``; raises ValueError on anything that does not fit."""
        kind = settings["policy"]
        if kind not in _KINDS:
            raise ValueError(f"policy is {kind!r}, expected one of {sorted(_KINDS)}")
        inner = _KINDS[kind].from_state(tensors, settings["settings"])
        return cls(inner, from_config(settings["process"]))


class _Run:
    """A run of the inner policy; its levels become times, its states are multiplied by alpha."""

    def __init__(self, policy: EdmCoordinates, inner: PolicyRun) -> None:
        self._policy, self._inner = policy, inner
        self.time = policy._times(inner.time)
        self._alpha = policy.process.alpha(self.time)
        self.initial_scale = inner.initial_scale * self._alpha / policy._ends[0]

    def row(self, n: int, features: Tensor | None) -> Row:
        """Row of evaluation ``n`` (0-based)."""
        a, b, level = self._inner.row(n, features)
        time = None if level is None else self._policy._times(level)
        if time is None:
            following = torch.full_like(self._alpha, self._policy._ends[1])
        else:
            following = self._policy.process.alpha(time)
        row = Row(a * following / self._alpha, b * following[..., None], time)
        self._alpha = following
        return row


register_policy(EdmCoordinates)
