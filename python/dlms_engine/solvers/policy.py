"""What the sampler runs: anything that answers row n from the features of evaluation n."""

from __future__ import annotations

from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..processes import Process
from .run import PolicyRun, Row
from .table import SolverTable

__all__ = ["Policy", "PolicyRun", "Row", "Solved", "policy_of"]


@runtime_checkable
class Policy(Protocol):
    """A sampler that may decide its rows while it runs; a ``SolverTable`` is the static case."""

    @property
    def process(self) -> Process:
        """The noise process it was made for."""
        ...

    @property
    def prediction(self) -> Literal["data", "noise"]:
        """What the ring keeps."""
        ...

    @property
    def nfe(self) -> int:
        """Network evaluations of one run."""
        ...

    @property
    def depth(self) -> int:
        """How many of the newest outputs a row may read."""
        ...

    @property
    def t_start(self) -> Tensor | float:
        """Time of the state the sampler is given; ``[*batch]``."""
        ...

    @property
    def grid(self) -> Tensor:
        """float64 ``[*batch, steps + 1]``: the solver's times, or those it starts from; decreasing."""
        ...

    @property
    def needs_features(self) -> bool:
        """Whether rows depend on the network's bottleneck, and so on the sample."""
        ...

    def start(self, batch: int, device: torch.device) -> PolicyRun:
        """A run over ``batch`` samples on ``device``."""
        ...

    def static_table(self) -> SolverTable | None:
        """The policy itself where it is a table; None where rows are computed while sampling."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON values for people: ``kind``, ``name``, and what else defines the solver."""
        ...


@runtime_checkable
class Solved(Protocol):
    """Something that holds a policy, such as a ``DistilledSolver``."""

    @property
    def policy(self) -> Policy:
        """What ``Sampler`` runs."""
        ...


def policy_of(solver: Policy | Solved) -> Policy:
    """The policy that ``solver`` is, or holds.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(solver, Solved):
        solver = solver.policy
    if not isinstance(solver, Policy):
        raise TypeError(
            f"solver is {type(solver).__name__}, expected a table, a policy or a distilled solver: "
            "dlms.load_solver(path) reads a file, dlms.recommend(...).best.table is a handcrafted one"
        )
    return solver
