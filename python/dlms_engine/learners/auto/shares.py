"""What each part of a run may take of its budget."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..start import Effort
from ..start.rounds import AGAIN
from .budget import Budget, parse_budget
from .every_row import BACKWARD, LEAST_BATCH, LEAST_UPDATES, WANTED_UPDATES
from .settings import AutoSettings

STAGES = ("base", "table", "corrector", "correctors")
TABLE_SHARE, CORRECTOR_SHARE, ROWS_SHARE = 0.35, 0.55, 0.9
"""Of what the search for the start leaves of the budget, by the end of the table's fit and of the
corrector's; of the budget, by the end of all rows' correctors'."""
WITHOUT_ROWS = 0.5
"""The table's in place of that where all rows' correctors would have too few updates; the last row's
has the rest. (Of a 64x64 network that ten minutes call 246,000 times, 111 updates were worth nothing.)"""
CHOICE_SHARE = 0.25
"""Of the budget, at most, for the choice: where it is small, the rows' correctors leave it that much."""
SEARCH_SHARE = 0.4
"""Of a budget, that the search for the start may take; a full one that takes more gives way to a smaller
one. On few samples a solver that ends in another mode for one start in fifty looks like the best."""
FINER_PROOF = 500
"""Evaluations, about, of a proof with twice the steps, which errors below the start's may ask for."""
KEPT_SHARE = 0.75
"""Of a budget in evaluations, at most, that a start counts for which an earlier run with a larger budget
kept."""
MORE, OTHERS, SOLVED = 4, 2, 16
"""New samples that base and choice are run on for every held-out one, with how many other solvers, and of
how many of them one, where these differ most, is solved exactly."""

FINALISTS = 6
"""Handcrafted solvers that the held-out samples choose among as well."""
PILOT = 16
"""Held-out samples at least, and as many as say first how small the errors are."""
NOMINAL = 48
"""Evaluations of an exact end before its proof is there."""


def effort_of(settings: AutoSettings) -> Effort | None:
    """Of the search for the start; None leaves it to the network's speed."""
    return None if settings.effort == "auto" else settings.effort


def search_limit(settings: AutoSettings, seconds: Callable[[], float]) -> float:
    """Evaluations of one sample that the search for the start may take.

    Args:
        seconds: measures what one takes; called where the budget is one of time.
    """
    limit = parse_budget(settings.budget)
    if settings.effort != "auto":
        return math.inf
    if math.isfinite(limit.seconds):
        return SEARCH_SHARE * limit.seconds / max(seconds(), 1e-9)
    return SEARCH_SHARE * limit.calls


def search_again(settings: AutoSettings, most: float) -> float | None:
    """Evaluations of one sample that the search may take where a few samples hold the error: what the
    smallest choice does not need. None leaves it to ``most``, and where the effort is given.
    """
    calls = parse_budget(settings.budget).calls
    if settings.effort != "auto" or not math.isfinite(calls):
        return None
    choice = PILOT * sample_cost(settings.nfe, 1)
    return max(most, min(AGAIN * most, calls - choice - FINER_PROOF))


def search_time(budget: Budget) -> float:
    """Evaluations that the time for the search still pays for, at the speed so far; infinitely many
    where time is not limited.
    """
    if not math.isfinite(budget.limit.seconds):
        return math.inf
    return budget.left_until(AGAIN * SEARCH_SHARE)


def sample_cost(nfe: int, stages: int, solving: int = NOMINAL) -> int:
    """Evaluations of one held-out sample with ``stages`` and finalists, its exact end in ``solving``, and
    of the new ones it brings.
    """
    new = (2 + OTHERS) * nfe + math.ceil(solving / SOLVED)
    return solving + (stages + FINALISTS) * (nfe + 1) + MORE * new


def too_few_updates(budget: Budget, nfe: int, share: float) -> bool:
    """Whether ``share`` of the budget pays for all rows' correctors, but for too few updates."""
    updates = share * budget.whole() / (LEAST_BATCH * (1 + BACKWARD) * nfe)
    return nfe > 1 and LEAST_UPDATES <= updates < WANTED_UPDATES


def training_share(budget: Budget, choice: float) -> float:
    """Of the budget, by the end of all training: what is left pays for ``choice`` evaluations."""
    return min(ROWS_SHARE, 1 - min(choice / max(budget.whole(), 1e-9), CHOICE_SHARE))
