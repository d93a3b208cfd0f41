"""What distillation returns: a policy with its history, ready for ``Sampler`` and for a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..denoiser import Denoiser
from ..support.versioned import Versioned
from ..tables.policy import Policy
from ..tables.table import SolverTable
from .amed import AmedPolicy
from .dlms import DesignerPolicy


@dataclass
class DistilledSolver(Versioned):
    """A learned solver; ``Sampler(denoiser, solver)`` runs it.

    Attributes:
        policy: a table, or a policy that computes its rows while sampling.
        method: "dlms", "amed", "ld3", "dode", "gits" or "free_table".
        settings: JSON-able settings of the run.
        history: logged numbers, one dict per update.
        best: which parameter set was kept and its validation score.
    """

    policy: SolverTable | Policy
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)

    @property
    def nfe(self) -> int:
        return int(self.policy.nfe)

    @property
    def kind(self) -> str:
        return "table" if isinstance(self.policy, SolverTable) else str(self.policy.kind)  # type: ignore[attr-defined]

    def table(
        self, denoiser: Denoiser | None = None, noise: Tensor | None = None, **cond: Any
    ) -> SolverTable:
        """The solver as a plain table; a designer's mean rows over ``noise`` ``[B, ...]``."""
        if isinstance(self.policy, SolverTable):
            return self.policy
        if not isinstance(self.policy, (AmedPolicy, DesignerPolicy)):
            raise ValueError(f"{self.method} solvers have no static table")
        if denoiser is None or noise is None:
            raise ValueError(
                "a per-sample solver becomes a table by averaging: pass the denoiser and some start "
                "noise, solver.table(denoiser, noise)"
            )
        if isinstance(self.policy, AmedPolicy):
            return self.policy.static_table(denoiser, noise, **cond)
        from ..engine.static_table import static_table

        return static_table(self.policy, denoiser, noise, **cond)

    def save(self, path: str | Path) -> Path:
        """Writes a solver file: safetensors and checked JSON, at most 1 MiB, never code."""
        from ..tables.file import save_solver

        return save_solver(path, self)
