"""Where learning starts: the exact solution, proved, and the best handcrafted solver, measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ...models.denoiser import Denoiser
from ...support.allocator import freed_memory_kept
from .contest import Candidate, Contest, Effort, cost, handcrafted_candidates
from .exact import MOST_STEPS, ExactSolution, Proof, rmse, run_tables
from .finite import require_finite_solution
from .problem import Conditions, SamplingProblem
from .repeatable import require_repeatable
from .search import MeasuredCandidate, Report, Search, Start, rmse_with_error
from .shared_runs import SharedRuns
from .store import keep_start, kept_start

__all__ = [
    "Candidate",
    "Conditions",
    "Contest",
    "Effort",
    "ExactSolution",
    "MeasuredCandidate",
    "Proof",
    "SamplingProblem",
    "SharedRuns",
    "Start",
    "cost",
    "find_start",
    "handcrafted_candidates",
    "recommend",
    "rmse",
    "rmse_with_error",
    "run_tables",
    "seconds_of_one",
    "start_effort",
]

LEAN_ABOVE = 0.05
"""Seconds of one evaluation of one sample above which the search is lean."""
AGAIN_SECONDS = 60.0
"""What `recommend` may add to a search whose errors are imprecise, at the speed of two samples."""
MOST_NFE = MOST_STEPS // 4
"""Evaluations above which no exact solution is much more exact than the solvers."""


def find_start(
    problem: SamplingProblem,
    nfe: int,
    *,
    effort: Effort | None = None,
    store: Path | None = None,
    say: Report = lambda line: None,
    afs: bool = True,
    most: float = math.inf,
    again: float | None = None,
    paid: Callable[[], float] = lambda: math.inf,
    resumed: bool = False,
) -> tuple[Start, ExactSolution]:
    """The best handcrafted solver of ``nfe`` evaluations and the exact solution it was measured by.

    Args:
        effort: ``"full"``, ``"lean"`` (at most 1,500 evaluations of one sample) or None, which is
            lean where one evaluation of one sample takes more than 50 ms.
        store: file that keeps the result; one that is there, fits the model and measured at least as much
            as this search would is used.
        say: is called with a line of text as the search goes on.
        afs: whether solvers with an analytical first step are among the candidates.
        most: evaluations of one sample that the search may take, at least a lean one's.
        again: evaluations of one sample that it may take with those on more samples, which show whether
            a few of them hold the error; None is half as many again as a finite ``most``.
        paid: evaluations that the time left pays for, counted anew before each of these.
        resumed: the run goes on from a start that it kept, whatever that measured.

    Raises:
        ValueError: more evaluations than ``MOST_NFE``, or none that a solver makes exactly.
        FloatingPointError: the network's outputs are not finite.
    """
    if nfe > MOST_NFE:
        raise ValueError(
            f"nfe is {nfe}, expected 1 to {MOST_NFE}: solvers are measured against an exact solution of "
            f"at most {MOST_STEPS} evaluations"
        )
    if effort is None:
        effort = start_effort(seconds_of_one(problem))
    contest = Contest(problem.process, nfe, effort, afs=afs, most=most, again=again)
    plan = contest.plan
    exact = ExactSolution(problem, samples=plan.proof_samples, first_steps=plan.first_steps)
    found = kept_start(store, problem, nfe, afs)
    measured = (0, 0) if found is None else (len(found.ranking), found.ranking[0].samples)
    if found is not None and not (resumed or contest.as_thorough(*measured)):
        say(
            f"start: {store} keeps a search of {measured[0]} solvers, the best on {measured[1]} samples, "
            f"and this one measures {len(contest.candidates)} on {plan.samples[-1]} or more: once more"
        )
        found = None
    if found is not None:
        exact.restore(found.proof)
        say(f"start: {found.best.label}, kept in {store}")
        return found, exact
    started, calls = time.perf_counter(), problem.calls
    say(
        f"start: {len(contest.candidates)} handcrafted solvers of {nfe} evaluations, about "
        f"{contest.cost:,} evaluations of one sample"
    )
    difference = exact.prove().disagreement
    require_finite_solution(problem, difference, "the difference of two accurate solvers")
    ranking = Search(problem, exact, contest, say, paid).run()
    best = ranking[0]
    require_finite_solution(problem, best.rmse, f"the error of {best.candidate.label}")
    proof = exact.prove(ranking[0].rmse)
    start = Start(nfe, tuple(ranking), proof, problem.calls - calls, time.perf_counter() - started)
    say(proof.line())
    keep_start(store, problem, start, afs)
    return start, exact


@freed_memory_kept()
def recommend(
    denoiser: Denoiser,
    nfe: int = 5,
    shape: tuple[int, ...] = (3, 32, 32),
    *,
    conditions: Conditions = None,
    effort: Effort | Literal["auto"] | None = "auto",
    store: str | Path | None = None,
    progress: bool = True,
) -> Start:
    """The best handcrafted solver for this model, found by measuring; nothing is trained.

    Every solver of the registry with every grid, with and without an analytical first step, against
    the model's exact solution, by successive halving over 8, 32 and 64 start noises. Where a few of them
    hold the error (those that end in another mode), on up to 1,024, if a minute pays for it.

    Args:
        denoiser: the model.
        nfe: network evaluations of the solver.
        shape: of one sample.
        conditions: keyword arguments of the network, see ``Conditions``.
        effort: ``"full"``, ``"lean"``, or ``"auto"`` (also None): by the network's speed.
        store: file that keeps the result for later calls.
        progress: print what happens and the table.

    Returns:
        the ranking, ``start.best.table`` ready for ``Sampler``, and the exact solution's proof.

    Raises:
        ValueError: another ``effort``, sizes or evaluations that are no integers of at least 1, or a
            network that does not answer the same twice, or not the same in another batch.
        FloatingPointError: the network's outputs are not finite.
    """

    def say(line: str) -> None:
        if progress:
            print(line, flush=True)

    if effort not in (None, "auto", "full", "lean"):
        raise ValueError(f"effort is {effort!r}, expected 'full', 'lean' or 'auto'")
    problem = SamplingProblem(denoiser, shape, conditions)
    require_repeatable(problem)
    path = None if store is None else Path(store)
    seconds = seconds_of_one(problem)
    wanted = start_effort(seconds) if effort is None or effort == "auto" else effort
    again = AGAIN_SECONDS / max(seconds, 1e-9)
    if nfe <= MOST_NFE:
        again += cost(problem.process, nfe, wanted)
    start, _ = find_start(problem, nfe, effort=wanted, store=path, say=say, again=again)
    for line in start.lines():
        say(line)
    say(f"{start.calls:,} evaluations of one sample, {start.seconds:.0f} s")
    return start


def start_effort(seconds: float) -> Effort:
    """The effort of the search where one evaluation of one sample takes ``seconds``."""
    return "lean" if seconds > LEAN_ABOVE else "full"


def seconds_of_one(problem: SamplingProblem, samples: int = 2) -> float:
    """Of one evaluation of one sample, in a batch of ``samples``, after one to warm up."""
    evaluate = problem.evaluation(samples)
    evaluate()
    started = time.perf_counter()
    evaluate()
    return (time.perf_counter() - started) / samples
