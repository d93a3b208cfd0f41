"""EPD's parallel directions (Zhu et al. 2025, arXiv:2507.14797), one evaluation after the other.

A step from level t to t' evaluates at t, and then at K levels between the two:

    y_k = x + (m_k - t) d,   m_k = t'^r_k t^(1 - r_k),   d_k = (y_k - D(y_k; a_k m_k)) / m_k
    x'  = x + (t' - t) sum_k w_k c_k d_k,   sum_k w_k = 1

d is the direction at t, or with the iPNDM plugin the Adams-Bashforth sum of it and those before.
The K evaluations do not depend on one another and ran as one batch of K times the size; as rows they
are K rows, so that a step costs 1 + K evaluations.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...policies.distilled import DistilledSolver
from ...processes import Process
from ...solvers.ipndm import ADAMS_BASHFORTH
from ...solvers.table import SolverTable
from ...solvers.trace import Form
from ..restricted import Record, state_dict
from .contents import Predictor, no_more, numbers, take
from .levels import LevelTrace, schedule, shifted_flow, unit_steps


class Points(NamedTuple):
    """The evaluations between the times of every step; float64 ``[steps, K]``."""

    place: Tensor  # r
    weight: Tensor  # w
    direction: Tensor  # c
    time: Tensor  # a


def is_epd(held: Any) -> bool:
    """A snapshot of the predictor."""
    module = held.get("model") if isinstance(held, dict) else None
    return isinstance(module, Record) and module.kind == "EPD_predictor"


def from_epd(held: Any, process: Process | None, options: dict[str, Any]) -> DistilledSolver:
    """The table of EPD's steps.

    Args:
        options: ``shift`` of the grid of a flow, where the file does not hold it.
    """
    predictor = Predictor(held["model"], held.get("loss_fn"))
    process = predictor.process(process)
    times = _times(predictor, process, options)
    no_more(options)
    student, afs = predictor.get("sampler_stu", str), predictor.get("afs", bool)
    if student not in ("epd", "ipndm"):
        raise ValueError(f"its student is {student!r}, expected 'epd' or 'ipndm'")
    order = predictor.get("max_order", int, 4) if student == "ipndm" else 1
    if order not in ADAMS_BASHFORTH:
        raise ValueError(f"its max_order is {order}, expected 1..4")
    table = parallel_table(process, times, _points(predictor), order=order, afs=afs)
    return DistilledSolver(table, "epd", {"method": "epd", "student": student, **predictor.notes()})


def _points(predictor: Predictor) -> Points:
    steps, count = predictor.points - 1, predictor.get("num_points", int)
    if not 1 <= count <= 16:
        raise ValueError(f"its num_points is {count}, expected 1..16")
    tensors = state_dict(predictor.module)

    def found(name: str) -> Tensor:
        return numbers(name, tensors.get(name), (steps, count))

    def scale(name: str) -> Tensor:
        bound = predictor.get(name, float, 0.0)
        if not bound:
            return torch.ones(steps, count, dtype=torch.float64, device="cpu")
        return 1 - bound + 2 * bound * torch.sigmoid(found(f"{name}_params") / 2)

    direction = scale("scale_dir")
    if predictor.get("fcn", bool, False):
        direction[-1] = 1
    place, weight = torch.sigmoid(found("r_params")), torch.softmax(found("weight_s"), 1)
    return Points(place, weight, direction, scale("scale_time"))


def _times(predictor: Predictor, process: Process, options: dict[str, Any]) -> Tensor:
    kind, points = predictor.get("schedule_type", str), predictor.points
    if kind != "flowmatch":
        return schedule(process, kind, predictor.get("schedule_rho", float, 7.0), points)
    held = predictor.get("backend_config", dict)
    shift = take(options, "shift", held.get("flowmatch_shift"))
    if held.get("flowmatch_mu") is not None:
        shift = math.exp(float(held["flowmatch_mu"]))
    if shift is None:
        raise ValueError(
            "the shift of its grid is not in the file: --set shift=3 is that of Stable Diffusion 3"
        )
    high, low = float(held.get("sigma_max", 1.0)), float(held.get("sigma_min", 0.0))
    return shifted_flow(process, low + (high - low) * unit_steps(points), float(shift))


def parallel_table(
    process: Process, grid: Tensor, points: Points, *, order: int = 1, afs: bool = False
) -> SolverTable:
    """The steps above as a table of 1 + K rows a step, one less with ``afs``.

    Args:
        grid: float64 ``[steps + 1]`` in the process's time.
        order: of the Adams-Bashforth sum that leads to the points, 1..4.
        afs: the first direction is x / sqrt(1 + t_0^2).
    """
    trace = LevelTrace(process)
    levels, x = trace.level(grid), trace.start(grid[0])
    past = list[Form]()
    for i, (t, following) in enumerate(itertools.pairwise(levels)):
        if afs and i == 0:
            direction = x / torch.sqrt(1 + t**2)
        else:
            x, direction = trace.direction(x, t, t)
        past = [direction, *past][:order]
        terms = zip(ADAMS_BASHFORTH[len(past)], past, strict=True)
        mean = sum((d * w for w, d in terms), Form({}, {}))
        end = x
        for r, w, c, a in zip(*(part[i] for part in points), strict=True):
            middle = following**r * t ** (1 - r)
            _, at_point = trace.direction(x + mean * (middle - t), middle, a * middle)
            end = end + at_point * (w * c * (following - t))
        x = end
    return trace.table(x, grid, "epd", order=order, afs="dockhorn" if afs else False)
