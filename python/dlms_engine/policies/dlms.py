"""The policy that a DLMS designer drives (Liang et al., ICLR 2025, section 3)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..processes import Process, from_config
from ..solvers.file import register_policy
from ..solvers.run import Row
from ..support.transfer import to_host
from .designer import Design, Designer, DesignerSettings, TimeCoordinate

__all__ = [
    "Design",
    "Designer",
    "DesignerPolicy",
    "DesignerRun",
    "DesignerSettings",
    "TimeCoordinate",
    "step_coefficients",
]


def step_coefficients(
    process: Process, prediction: str, t: Tensor, t_next: Tensor
) -> tuple[Tensor, Tensor]:
    """(A, C) of x_next = A x + C D: the exponential integrator for constant D (DLMS Eq. 9)."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    alpha_next, sigma_next = process.alpha(t_next), process.sigma(t_next)
    if prediction == "data":
        a = sigma_next / sigma
        return a, alpha_next - alpha * a
    a = alpha_next / alpha
    return a, sigma_next - sigma * a


class DesignerPolicy:
    """A designer as a policy for the sampler (DLMS Algorithm 2)."""

    kind: ClassVar[str] = "designer"

    def __init__(self, designer: Designer) -> None:
        self.designer = designer
        self.process = designer.process
        self.prediction: Literal["data", "noise"] = designer.settings.prediction

    @property
    def nfe(self) -> int:
        return self.designer.settings.nfe

    @property
    def depth(self) -> int:
        return min(self.designer.settings.order, self.nfe)

    @property
    def t_start(self) -> float:
        return self.designer.t_start

    @property
    def grid(self) -> Tensor:
        """The times the designer started from."""
        return self.designer.grid

    @property
    def needs_features(self) -> bool:
        return self.designer.settings.features > 0

    def decide(self, features: Tensor | None, n: int, at: tuple[Tensor, ...]) -> Design:
        """The design of step ``n`` (1-based) that starts at the time ``at[0]`` ``[B]``."""
        design: Design = self.designer(features, at[0], n)
        return design

    def place(self, device: torch.device) -> None:
        """Moves the designer to ``device`` if it lies elsewhere.

        RuntimeError: inside ``torch.compile``, which cannot.
        """
        if self.designer.grid.device == device:
            return
        if torch.compiler.is_dynamo_compiling():
            raise RuntimeError(
                f"the designer is on {self.designer.grid.device}, the state on {device}: move the "
                "sampler there before it is compiled"
            )
        with torch.inference_mode(False):  # kept for runs outside of it
            self.designer.to(device)

    def start(self, batch: int, device: torch.device) -> DesignerRun:
        self.place(device)
        return self.run(batch, device)

    def run(self, batch: int, device: torch.device) -> DesignerRun:
        """As ``start``, without moving the designer."""
        return DesignerRun(self, batch, device)

    # -- as a table, for people and for files ---------------------------------------------------

    def static_table(self) -> None:
        """None: a designer computes its rows while sampling."""

    def mean(self, decision: Design) -> Design:
        """Weights arithmetically, times geometrically; ``[1, ...]``."""
        time, network_time = (_geometric(t) for t in (decision.time, decision.network_time))
        return Design(decision.weights.mean(0, keepdim=True), time, network_time)

    def static_grid(self, decisions: dict[int, Design]) -> Tensor:
        """The designed times between the fixed ends."""
        inner = [decisions[n].time for n in range(1, self.designer.settings.steps)]
        ends = self.designer.grid
        return to_host(torch.cat([ends[:1], *inner, ends[-1:]]))

    def static_options(self) -> dict[str, Any]:
        settings = self.designer.settings
        return {"method": "dlms-static", "order": settings.order, "afs": settings.afs}

    def describe(self) -> dict[str, Any]:
        """Its size and where it starts from: the rows depend on the sample."""
        designer = self.designer
        return {
            "kind": self.kind,
            "name": "dlms",
            "parameters": sum(p.numel() for p in designer.parameters()),
            "initial_grid": designer.grid.tolist(),
            "initial_weights": designer.init_weights.tolist(),
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON settings) for a solver file."""
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.designer.state_dict().items()}
        settings = asdict(self.designer.settings)
        return tensors, {"designer": settings, "process": self.process.config()}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], settings: dict[str, Any]) -> DesignerPolicy:
        """Inverse of ``state``; raises ValueError on anything that does not fit."""
        shape = DesignerSettings(**settings["designer"])
        process = from_config(settings["process"])
        grid, weights = tensors["grid"], tensors["init_weights"]
        designer = Designer(shape, process, grid, weights)
        designer.load_state_dict(tensors)
        return cls(designer)


class DesignerRun:
    """One run: per-sample times and, with AFS in noise form, the trace of the start state."""

    def __init__(self, policy: DesignerPolicy, batch: int, device: torch.device) -> None:
        self._policy = policy
        settings = self._settings = policy.designer.settings
        self._t = policy.designer.grid[0].to(device).expand(batch)
        self._process = policy.process
        self.initial_scale = torch.ones((), dtype=torch.float64, device=device)
        self.time = self._t
        self._eliminate = settings.afs and settings.prediction == "noise"
        self._sigma_start = self._process.sigma(self._t)
        if settings.afs:
            design = policy.decide(None, 1, (self._t,))
            sigma = self._process.sigma(design.time)
            self.initial_scale = sigma / self._sigma_start
            self._t, self.time = design.time, design.network_time
        # x_n = start_weight * noise + sum_j past[:, j] * m_j, newest first
        self._start_weight = self.initial_scale.expand(batch)
        self._past = self._t.new_zeros(batch, 0)

    def row(self, n: int, features: Tensor | None) -> Row:
        """Row of evaluation ``n`` (0-based)."""
        settings = self._settings
        step = n + 1 + int(settings.afs)
        design = self._policy.decide(features, step, (self._t,))
        a, c = step_coefficients(self._process, settings.prediction, self._t, design.time)
        weights = design.weights[:, : n + 1]
        b = c[:, None] * weights
        if self._eliminate:
            a, b = self._fold_start(a, b, c, design.weights, n)
        depth = self._policy.depth
        if b.shape[1] < depth:
            b = torch.nn.functional.pad(b, (0, depth - b.shape[1]))
        self._t = design.time
        last = step == settings.steps
        return Row(a, b[:, :depth], None if last else design.network_time)

    def _fold_start(
        self, a: Tensor, b: Tensor, c: Tensor, weights: Tensor, n: int
    ) -> tuple[Tensor, Tensor]:
        """The AFS output is noise / sigma_0: written through x_n, which holds the noise too."""
        past = torch.nn.functional.pad(self._past, (1, 0))  # the newest output is not in x_n yet
        start = a * self._start_weight
        if weights.shape[1] > n + 1:
            pseudo = c * weights[:, n + 1] / self._sigma_start  # weight of the noise itself
            through = pseudo / self._start_weight
            a = a + through
            b = b - through[:, None] * past[:, : b.shape[1]]
            start = start + pseudo
        grown = a[:, None] * past
        width = b.shape[1]
        self._past = torch.cat([grown[:, :width] + b, grown[:, width:]], dim=1)
        self._start_weight = start
        return a, b


def _geometric(t: Tensor) -> Tensor:
    return t.clamp_min(1e-300).log().mean().exp().reshape(1)


register_policy(DesignerPolicy)
