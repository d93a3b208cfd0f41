"""What each part of a run may take of its budget."""

from __future__ import annotations

import math

from ...processes import Process
from ..start import Effort, cost
from .budget import Budget, parse_budget
from .settings import AutoSettings

STAGES = ("base", "table", "corrector", "correctors")
TABLE_SHARE, CORRECTOR_SHARE, ROWS_SHARE = 0.35, 0.55, 0.9
"""Of what the search for the start leaves of the budget, by the end of the table's fit and of the
corrector's; of the budget, by the end of all rows' correctors'."""
CHOICE_SHARE = 0.2
"""Of the budget, at most, for the choice: where it is small, the rows' correctors leave it that much."""
SEARCH_SHARE = 1 / 3
"""Of a budget in evaluations, that a full search for the start may take; else it is lean. On its
eight samples a solver that ends in another mode for one start in fifty looks like the best."""


def effort_of(settings: AutoSettings, process: Process) -> Effort | None:
    """Of the search for the start; None leaves it to the network's speed."""
    if settings.effort != "auto":
        return settings.effort
    calls = parse_budget(settings.budget).calls
    full = cost(process, settings.nfe, "full") if math.isfinite(calls) else 0
    return None if full <= SEARCH_SHARE * calls else "lean"


def choice_cost(exact: int, stages: int, nfe: int) -> int:
    """Evaluations of one held-out sample, whose exact solution takes ``exact``."""
    return exact + stages * (nfe + 1)


def training_share(budget: Budget, choice: float) -> float:
    """Of the budget, by the end of all training: what is left pays for ``choice`` evaluations."""
    whole = budget.left() / max(1 - budget.share(), 1e-9)
    return min(ROWS_SHARE, 1 - min(choice / max(whole, 1e-9), CHOICE_SHARE))
