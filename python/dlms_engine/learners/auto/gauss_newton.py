"""Levenberg-Marquardt on the few parameters of a table, without gradients of the network.

The residuals are the endpoint errors of a set of samples, thousands of numbers for some thirty
parameters, and what one parameter changes is measured by running its table: a forward difference.
All these tables differ from the present one in one parameter and share their evaluations up to the
row it acts in; what acts in the last row costs none. One such step does what hundreds of stochastic
gradient steps do (Levenberg 1944; Marquardt 1963), needs no backward pass, and works on any
network that can be called.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...solvers.table import SolverTable
from ...support.transfer import to_host
from ..start import SamplingProblem, SharedRuns
from .budget import Budget
from .counts import SEARCHED, Counts
from .table import GeneralTable
from .targets import Targets

_log = logging.getLogger("dlms_engine")

STEP = 1e-3
"""Forward difference, in the parameters' natural units."""
DAMPINGS = (1e-2, 1e-1, 1.0, 1e1)
"""Tried around the present damping, on the same samples."""
WANTED = 4
"""Iterations on all samples that a budget must pay for: two each on a quarter, a half and all are 3.5."""
LEAST_GAIN = 0.01
"""Relative fall of the error below which an iteration counts as idle."""


@dataclass
class Normal:
    """Normal equations of one linearisation: J^T J, J^T r and r^T r, sums over ``numbers`` residuals."""

    matrix: Tensor
    gradient: Tensor
    square: float
    numbers: int

    def step(self, damping: float) -> Tensor:
        """The damped Gauss-Newton step."""
        diagonal = torch.diag(self.matrix)
        floor = 1e-9 * float(diagonal.max()) + 1e-300
        damped = self.matrix + torch.diag(damping * diagonal + floor)
        solved: Tensor = torch.linalg.solve(damped, self.gradient)
        return solved


class GaussNewton:
    """Fits the general table to the exact ends of samples 0, 1, ...

    Args:
        problem: the model.
        form: maps parameters to tables.
        targets: exact ends.
        most: samples it may use; None for ``Counts.of`` its parameters.
        effective: see ``Counts.of``.
        left: evaluations that it may take.
    """

    def __init__(
        self,
        problem: SamplingProblem,
        form: GeneralTable,
        targets: Targets,
        most: int | None = None,
        effective: float = 1.0,
        left: float = 0.0,
    ) -> None:
        self.problem, self.form, self.targets = problem, form, targets
        self._cost = SharedRuns(self._tables(form.zero())[0]).evaluations
        each = self._cost + (len(DAMPINGS) + 1) * form.nfe
        pays = min(left / (WANTED * each + targets.cost), 1e9)
        numbers = math.prod(problem.shape)
        self.counts = Counts.of(form.size, numbers, most, effective, pays)
        self.damping = 1e-1
        self._used = self._idle = 0
        self.parameters = form.zero()
        self._earlier = form.zero()  # where the iterations on as many samples as now began
        self.done = 0  # iterations
        self.history: list[dict[str, float]] = []

    def fit(
        self,
        budget: Budget,
        share: float,
        *,
        iterations: int = 14,
        say: Callable[[str], None] = lambda line: None,
        after: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Goes on until ``iterations`` are done or ``share`` of the budget is used.

        Args:
            after: called after every iteration.

        Returns:
            the parameters, also kept in ``parameters``.
        """
        most = self.counts.most
        while self.done < iterations and not (self._idle >= 2 and self._used >= most):
            used = self._used
            count = self._samples(self.done, most, budget, share)
            if count == 0 or budget.share() >= share:
                say(f"  stopped by the budget after {self.done} iterations")
                break
            if self.done and count > used:
                self._look_back(count, say)
            before, reached, self.parameters = self._iterate(self.parameters, count)
            self.done += 1
            self.history.append({"samples": count, "rmse_before": before, "rmse": reached})
            say(f"  iteration {self.done}: {count} samples, RMSE {before:.5f} -> {reached:.5f}")
            self._idle = self._idle + 1 if reached > before * (1 - LEAST_GAIN) else 0
            after()
        return self.parameters

    def state(self) -> dict[str, Any]:
        """JSON values that with ``parameters`` make this fit go on."""
        return {
            "damping": self.damping,
            "used": self._used,
            "idle": self._idle,
            "done": self.done,
            "history": self.history,
            "counts": self.counts.state(),
            "earlier": self._earlier.tolist(),
        }

    def restore(self, parameters: Tensor, state: dict[str, Any]) -> None:
        """Inverse of ``state``."""
        if "counts" in state:  # checkpoints of before have none: its own then
            self.counts = Counts(**state["counts"])
            self._earlier = torch.tensor(state["earlier"], dtype=torch.float64, device="cpu")
        self.parameters, self.damping, self.done = parameters, state["damping"], state["done"]
        self._used, self._idle = state["used"], state["idle"]
        self.history = list(state["history"])

    def _look_back(self, count: int, say: Callable[[str], None]) -> None:
        """Goes on from the best of here, the last time there were more samples, and the base, on
        ``count`` of them, half of them new: what fitted a few samples only has lost there.
        """
        places = [self.parameters, self._earlier, self.form.zero()]
        made = [(place, self.form.table(place)) for place in places]
        tables = [(place, table) for place, table in made if table is not None]
        errors = self.errors([table for _, table in tables], count)
        best = min(range(len(errors)), key=errors.__getitem__)
        if not torch.equal(tables[best][0], self.parameters):
            say(
                f"  on {count} samples the RMSE is {errors[0]:.5f}, and {errors[best]:.5f} before "
                "those iterations: from there again"
            )
            self.parameters, self.damping = tables[best][0], 1e-1
        self._earlier = self.parameters

    def _samples(self, iteration: int, most: int, budget: Budget, share: float) -> int:
        """Few at first, when any step helps; what the budget allows in the end."""
        least, first = self.counts.least, self.counts.first
        wanted = min(most, max(least, first * 2 ** (iteration // 2)))
        most_so_far = max((int(entry["samples"]) for entry in self.history), default=0)
        least = max(least, most_so_far // 2)  # fewer than before would fit their noise
        left = budget.left_until(share)
        while wanted > least and self._price(wanted) > left:
            wanted = max(least, wanted // 2)
        self._used = wanted if self._price(wanted) <= left else 0
        return self._used

    def _price(self, count: int) -> int:
        """Evaluations of the next iteration, on ``count`` samples; the few of a small one's dampings
        are not counted.
        """
        nfe = self.form.nfe
        fresh = self.targets.cost * max(0, count - self.targets.count)
        tried = (len(DAMPINGS) + 1) * nfe * max(0, min(count, self.counts.searched) - SEARCHED)
        back = 3 * nfe * count if self.done and count > self._used else 0
        return self.cost() * count + fresh + tried + back

    def cost(self) -> int:
        """Network evaluations of one sample in an iteration."""
        return self._cost

    def _iterate(self, theta: Tensor, count: int) -> tuple[float, float, Tensor]:
        normal = self.linearise(theta, count)
        before = math.sqrt(normal.square / normal.numbers)
        trials = []
        for factor in DAMPINGS:
            damping = min(max(factor * self.damping, 1e-7), 1e7)
            moved = theta + normal.step(damping)
            table = self.form.table(moved)
            if table is not None and bool(moved.isfinite().all()):
                trials.append((damping, moved, table))
        present = self.form.table(theta)
        assert present is not None
        errors = self.errors(
            [present, *(table for _, _, table in trials)], min(count, self.counts.searched)
        )
        base, errors = errors[0], errors[1:]
        best = min(range(len(trials)), key=errors.__getitem__, default=None)
        if best is None or not errors[best] < base:
            self.damping = min(self.damping * 100, 1e6)
            return before, before, theta
        self.damping = trials[best][0]
        return before, before * errors[best] / base, trials[best][1]

    def _tables(self, theta: Tensor) -> tuple[list[SolverTable], list[int], list[float]]:
        """The present table and one moved in each parameter, with its number and step."""
        present = self.form.table(theta)
        assert present is not None
        tables, parameters, steps = [present], [], []
        for i in range(self.form.size):
            for step in (STEP, -STEP):
                moved = theta.clone()
                moved[i] += step
                table = self.form.table(moved)
                if table is not None and not _equal(table, present):
                    tables.append(table)
                    parameters.append(i)
                    steps.append(step)
                    break
        return tables, parameters, steps

    def linearise(self, theta: Tensor, count: int) -> Normal:
        """Normal equations at ``theta`` over the first ``count`` samples."""
        tables, parameters, steps = self._tables(theta)
        device = self.problem.device
        size = len(parameters)
        matrix = torch.zeros(size, size, dtype=torch.float64, device=device)
        gradient = torch.zeros(size, dtype=torch.float64, device=device)
        square = torch.zeros((), dtype=torch.float64, device=device)
        broken = torch.zeros(size, dtype=torch.bool, device=device)
        scale = torch.tensor(steps, dtype=torch.float64, device=device)[:, None]
        targets = self.targets(count)
        for numbers, ends in chunks(self.problem, SharedRuns(tables), range(count)):
            ends = ends.flatten(1).double()
            residual = targets[numbers.start : numbers.stop].flatten().double() - ends[0]
            jacobian = (ends[1:] - ends[0]) / scale
            finite = jacobian.isfinite().all(1, keepdim=True)
            jacobian = torch.where(finite, jacobian, 0.0)  # a parameter that breaks the run stays
            broken |= ~finite[:, 0]
            matrix += jacobian @ jacobian.T
            gradient += jacobian @ residual
            square += residual @ residual
        matrix *= ~(broken[:, None] | broken)
        gradient *= ~broken
        whole = torch.zeros(self.form.size, self.form.size, dtype=torch.float64, device="cpu")
        at = torch.tensor(parameters, device="cpu")
        *entries, square = to_host(torch.cat([matrix.flatten(), gradient, square[None]])).split(
            [size * size, size, 1]
        )
        whole[at[:, None], at] = entries[0].reshape(size, size)
        side = torch.zeros(self.form.size, dtype=torch.float64, device="cpu")
        side[at] = entries[1]
        return Normal(whole, side, float(square), targets.numel())

    def errors(self, tables: list[SolverTable], count: int) -> list[float]:
        """Endpoint RMSE of each table over the first ``count`` samples."""
        targets = self.targets(count)
        total = torch.zeros(len(tables), dtype=torch.float64, device=self.problem.device)
        for numbers, ends in chunks(self.problem, SharedRuns(tables), range(count)):
            wanted = targets[numbers.start : numbers.stop]
            total += (ends - wanted).double().square().flatten(1).sum(1)
        values = (total / targets.numel()).sqrt()
        return [value if math.isfinite(value) else math.inf for value in to_host(values).tolist()]


def chunks(
    problem: SamplingProblem, runs: SharedRuns, numbers: range
) -> Iterator[tuple[range, Tensor]]:
    """(numbers, end states ``[tables, b, ...]``), a part of the samples at a time."""
    step = runs.chunk(problem.shape)
    for low in range(numbers.start, numbers.stop, step):
        part = range(low, min(low + step, numbers.stop))
        yield from runs.ends(problem.predict, problem.noise(part), part.start)


def _equal(one: SolverTable, two: SolverTable) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(two, name))
        for name in ("a", "b", "times", "initial_scale")
    )
