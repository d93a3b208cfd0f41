"""What distillation returns: a policy with its history, ready for ``Sampler`` and for a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.denoiser import Denoiser
from ..solvers.file import (
    DISTILLED_KEYS,
    SolverFileError,
    read_solver,
    rebuild_policy,
    record_of,
    write_record,
)
from ..solvers.policy import Policy, Solved
from ..solvers.table import SolverTable
from ..support.versioned import Versioned
from . import coordinates, corrector  # noqa: F401  (a file may hold their policies)
from .static_table import Deciding, average_table


@dataclass
class DistilledSolver(Versioned):
    """A learned solver; ``Sampler(denoiser, solver)`` runs it.

    Attributes:
        policy: a table, or a policy that computes its rows while sampling.
        method: "auto", "dlms", "amed", "ld3", "dode", "gits" or "free_table".
        settings: JSON-able settings of the run.
        history: logged numbers, one dict per update.
        best: which parameter set was kept and its validation score.
    """

    policy: Policy
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)

    @property
    def nfe(self) -> int:
        return int(self.policy.nfe)

    @property
    def report(self) -> dict[str, Any]:
        """What the run measured, with ``method="auto"``; empty for other methods."""
        found: dict[str, Any] = self.best.get("report", {})
        return found

    @property
    def baseline(self) -> str | None:
        """Label of the handcrafted solver it was measured beside; None where there is none.

        Of ``auto`` the best of all, of the other methods the best of their base's on standard grids.
        """
        compared = self.best.get("compared")
        found = compared.get("base") if isinstance(compared, dict) else self.report.get("base")
        return found if isinstance(found, str) else None

    @property
    def kind(self) -> str:
        return str(self.policy.describe()["kind"])

    def table(
        self, denoiser: Denoiser | None = None, noise: Tensor | None = None, **conditions: Any
    ) -> SolverTable:
        """The solver as a plain table; a per-sample solver's mean decisions over ``noise``.

        Args:
            noise: ``[B, ...]`` the state at the start.

        Raises:
            ValueError: a per-sample solver, and no denoiser or noise to average over.
        """
        static = self.policy.static_table()
        if static is not None:
            return static
        if not isinstance(self.policy, Deciding):
            raise ValueError(f"{self.method} solvers have no static table")
        if denoiser is None or noise is None:
            raise ValueError(
                "a per-sample solver becomes a table by averaging: pass the denoiser and some start "
                "noise, solver.table(denoiser, noise)"
            )
        return average_table(self.policy, denoiser, noise, **conditions)

    def save(self, path: str | Path) -> Path:
        """Writes a solver file: safetensors and checked JSON, at most 1 MiB, never code."""
        return save_solver(path, self)


def save_solver(
    path: str | os.PathLike[str], solver: Any, *, training: Mapping[str, Any] | None = None
) -> Path:
    """Writes ``solver`` to ``path`` atomically (a temporary file in the folder, then a rename).

    Args:
        solver: a ``SolverTable``, a policy with ``kind`` and ``state()``, a ``SolverRecord``, or a
            ``DistilledSolver`` around a table or policy (its ``history`` is not kept).
        training: JSON values documenting how the solver was made (kept, never interpreted).

    Raises:
        SolverFileError: the solver cannot be described (not JSON, not finite, over 1 MiB, unknown
            kind or method); nothing is written then.
    """
    target = Path(path)
    distilled, policy = None, solver
    try:
        if isinstance(solver, Solved):
            distilled = {key: getattr(solver, key) for key in sorted(DISTILLED_KEYS)}
            policy = solver.policy
        record = record_of(policy, distilled, training)
        return write_record(target, record)
    except SolverFileError:
        raise
    except (TypeError, ValueError, AttributeError) as exc:
        raise SolverFileError(f"{target}: {type(solver).__name__} cannot be saved: {exc}") from exc


save = save_solver


def load_solver(path: str | os.PathLike[str]) -> Any:
    """The solver in ``path``: what was saved, a table, a policy or a ``DistilledSolver``.

    Raises:
        SolverFileError: not an intact, known, valid solver file.
        OSError: the file cannot be read.
    """
    record = read_solver(path)
    policy = rebuild_policy(Path(path), record)
    return policy if record.distilled is None else DistilledSolver(policy, **record.distilled)
