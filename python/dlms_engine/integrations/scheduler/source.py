"""Where a scheduler's solver comes from: a name, a file, or an object."""

from __future__ import annotations

import os
from typing import Any

from ...solvers import SOLVERS
from ...solvers.policy import policy_of
from ...support.files import SOLVER_FILE

SolverLike = Any  # Policy | DistilledSolver
Source = str | SolverLike


def load_source(solver: Any) -> Source:
    """A solver's name as it is, a path as the solver in that file, an object as it is.

    Raises:
        ValueError: neither a known name nor an existing file.
        TypeError: not a solver.
    """
    if isinstance(solver, (str, os.PathLike)):
        name = os.fspath(solver)
        if name in SOLVERS:
            return name
        if not os.path.isfile(name) and not os.path.isfile(os.path.join(name, SOLVER_FILE)):
            raise ValueError(
                f"solver is {name!r}, expected one of {sorted(SOLVERS)}, a solver file's path, or a "
                f"directory with {SOLVER_FILE}"
            )
        from ...policies.distilled import load_solver

        return load_solver(name)
    try:
        policy_of(solver)
    except TypeError as exc:
        raise TypeError(
            f"solver is {type(solver).__name__}, expected a name, path, table or policy"
        ) from exc
    return solver
