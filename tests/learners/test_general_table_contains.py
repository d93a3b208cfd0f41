"""The general table holds the other learners' tables: parameters are solved for that give their rows.

In two steps, as its parts act: the grid and the network's times first, then what is left of the rows
and of the start's scale, which is linear in the corrections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch
from amed_problem import problem, start_noise
from analytic import GaussianMixture, run_table
from torch import Tensor

from dlms_engine import grids
from dlms_engine.checkpoints.published.dyweight import weighted_table
from dlms_engine.checkpoints.published.epd import Points, parallel_table
from dlms_engine.checkpoints.published.gas import generalized_table, stick_times
from dlms_engine.learners.auto.table import FULL_HISTORY, GeneralTable
from dlms_engine.learners.dode.fit import Replay
from dlms_engine.learners.dode.programs import multistep_program
from dlms_engine.learners.dode.settings import DodeSettings
from dlms_engine.learners.free_table.module import FreeTableModule
from dlms_engine.learners.free_table.settings import FreeTableSettings
from dlms_engine.learners.ld3.grid import LearnedGrid
from dlms_engine.learners.start.contest import Candidate
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.amed import AmedPolicy
from dlms_engine.policies.amed_formulas import AmedBase
from dlms_engine.policies.amed_predictor import AmedPredictor
from dlms_engine.policies.dlms import Designer, DesignerPolicy, DesignerSettings
from dlms_engine.policies.static_table import average_table
from dlms_engine.processes import EDM, VP, Process, RectifiedFlow
from dlms_engine.solvers import make_solver
from dlms_engine.solvers.table import Prediction, SolverTable
from dlms_engine.solvers.trace import Form, Trace

EXACT = 1e-12


def values(*shape: int, seed: int = 0, scale: float = 0.05) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def base(
    name: str, process: Process, steps: int, grid: Tensor | None = None, **options
) -> Candidate:
    times = grids.named_grid(process, grids.default_grid(process), steps) if grid is None else grid
    return Candidate(f"{name}/test", make_solver(name, process, times, **options))


def solve(general: GeneralTable, target: SolverTable) -> Tensor:
    """Parameters at which ``general`` has the target's times, and then its rows.

    Where the base's grid may move it is the target's; otherwise the network's times alone are.
    """
    found, process, start = general.zero(), target.process, general.base.table
    finite = bool(process.lambda_(start.grid[[0, -1]]).isfinite().all())

    def coordinate(t: Tensor) -> Tensor:
        return process.lambda_(t) if finite else -t

    u, skipped = coordinate(start.grid), len(start.grid) - 1 - general.nfe
    rows = slice(skipped, skipped + general.nfe)
    where = general.groups
    if general.base.stages == 1:
        if len(target.grid) == len(start.grid):
            moved = coordinate(target.grid)
            gaps = torch.minimum(u.diff()[:-1], u.diff()[1:])
            found[where["grid"]] = (moved - u)[1:-1] / gaps
            u = moved
        gaps = u.diff()
        near = torch.cat([gaps[:1], torch.minimum(gaps[:-1], gaps[1:])])[rows]
        found[where["times"]] = (coordinate(target.times) - u[rows]) / near
    else:
        half = u.diff().abs().min() / 2
        found[where["times"]] = (coordinate(target.times) - coordinate(start.times)) / half
    plain = made(general, found)
    units = found.clone()
    units[where["outputs"]], units[where["state"]] = 1, 1
    ones = made(general, units)
    depth = max(general.depth, target.depth)
    missing = padded(target.b, depth) - padded(plain.b, depth)
    weights = missing[..., : general.depth] / (ones.b - plain.b).where(
        ones.b != plain.b, torch.ones(())
    )
    found[where["outputs"]] = torch.stack([weights[n, k] for n, k in general._places])
    found[where["state"]] = (target.a - plain.a) / (ones.a - plain.a)
    found[where["scale"]] = torch.log(target.initial_scale / plain.initial_scale)
    return found


def made(general: GeneralTable, parameters: Tensor) -> SolverTable:
    table = general.table(parameters)
    assert table is not None
    return table


def padded(b: Tensor, depth: int) -> Tensor:
    return torch.nn.functional.pad(b, (0, depth - b.shape[-1]))


def distance(one: SolverTable, other: SolverTable) -> float:
    """Largest difference of rows, times and scale, each in units of its largest number."""
    depth = max(one.depth, other.depth)
    pairs = [
        (one.a, other.a),
        (padded(one.b, depth), padded(other.b, depth)),
        (one.times, other.times),
        (one.initial_scale, other.initial_scale),
    ]
    assert one.prediction == other.prediction
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


def used(general: GeneralTable, parameters: Tensor) -> set[str]:
    """Groups that are not zero."""
    return {
        g for g, where in general.groups.items() if bool((parameters[where].abs() > 1e-9).any())
    }


def reach(general: GeneralTable, target: SolverTable, groups: Iterable[str]) -> None:
    """The target is reached with these groups, gives the same samples, and is not the base."""
    parameters = solve(general, target)
    found = made(general, parameters)
    assert distance(found, target) < EXACT
    assert used(general, parameters) == set(groups)
    x = target.process.sigma(target.t_start) * values(3, 16, scale=1.0)
    mixture = GaussianMixture(target.process)
    torch.testing.assert_close(run_table(found, mixture, x), run_table(target, mixture, x))
    assert distance(general.base.table, target) > 1e-3


def in_form(table: SolverTable, store: Prediction) -> SolverTable:
    """The same sampler with another history: its rows, replayed."""
    trace = Trace(table.process, store)
    x, history = trace.start() * table.initial_scale, list[Form]()
    for n, t in enumerate(table.times):
        out = trace.evaluate(x, t)
        history = [out.data if table.prediction == "data" else out.noise, *history]
        x = out.x * table.a[n]
        for w, m in zip(table.b[n], history, strict=False):
            x = x + m * w
    return trace.table(x, table.grid, name=table.name)


# -- LD3, GITS: times alone ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "name", "options"),
    [
        (EDM(), "unipc", {"order": 3, "variant": "bh1"}),
        (EDM(), "ipndm", {"order": 4, "afs": True}),
        (VP(), "dpm_solver_pp", {"order": 3}),
        (RectifiedFlow(), "unipc", {"order": 2}),
    ],
)
def test_ld3_is_the_grid_and_the_networks_times(process, name, options) -> None:
    start = base(name, process, 6, **options)
    learned = LearnedGrid(process, start.table.grid)
    with torch.no_grad():
        learned.logits += values(6, seed=1, scale=0.2)
        learned.offsets += values(5, seed=2, scale=0.02)
        times = learned()
    target = make_solver(name, process, times.grid, network_times=times.network, **options)
    reach(GeneralTable(start), target, {"grid", "times"})
    one_grid = make_solver(name, process, times.grid, **options)  # as GITS gives it
    reach(GeneralTable(start), one_grid, {"grid"})


# -- free table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [EDM(), VP(), RectifiedFlow()])
@pytest.mark.parametrize("nfe", [4, 8])
def test_a_free_table_is_reached(process, nfe) -> None:
    denoiser = Denoiser(GaussianMixture(process), process, "data")
    module = FreeTableModule(denoiser, FreeTableSettings(nfe=nfe, depth=None))
    start = Candidate("base/test", module.base_table().detach())
    with torch.no_grad():
        module.times.logits += values(module.settings.steps, seed=1, scale=0.2)
        module.times.offsets += values(module.settings.steps - 1, seed=2, scale=0.01)
        module.outputs += values(*module.outputs.shape, seed=3)
        module.state += values(nfe, seed=4)
        target = module().detach()
    groups = {"grid", "times", "outputs", "state"}
    newest = GeneralTable(start)
    four = distance(made(newest, solve(newest, target)), target)
    assert (four > 1e6 * EXACT) == (nfe > FULL_HISTORY)  # older outputs want the setting ``depth``
    reach(GeneralTable(start, depth=nfe), target, groups)


# -- GS ------------------------------------------------------------------------------------------

LATE = VP(t_min=1e-3)


def gs(steps: int, corrections: float, offsets: float) -> SolverTable:
    state, output = (values(steps, steps, seed=s, scale=corrections) for s in (1, 2))
    grid = stick_times(1 + values(steps - 1, seed=3, scale=0.3), LATE.t_min)
    shifts = values(steps, seed=4, scale=offsets)
    shifts[0] = -abs(shifts[0])  # the first call cannot be later than the process begins
    made_ = generalized_table(LATE, LATE, grid, shifts, state, output)
    return in_form(made_, "data")


def test_gs_is_reached() -> None:
    start = base("dpm_solver_pp", LATE, 5, order=3, lower_order_final=False)
    reach(GeneralTable(start), gs(5, 0.02, 2e-4), {"grid", "times", "outputs", "state", "scale"})
    # its start is the general table's: without corrections the closed form at the learned grid
    reach(GeneralTable(start), gs(5, 0.0, 0.0), {"grid", "scale"})


# -- DyWeight, EPD -------------------------------------------------------------------------------


@pytest.mark.parametrize("afs", [False, True])
def test_dyweights_coupling_is_reached(afs: bool) -> None:
    """Its times follow its weights; here they are parameters of their own."""
    start = base("ipndm", EDM(), 6, order=3, afs=afs)
    weights = torch.tril(values(6, 6, scale=0.1))
    weights += torch.diag(0.94 - weights.sum(1))  # below one, so that no time falls under the last
    scales = 0.98 + values(6, seed=1, scale=0.005)
    target = weighted_table(EDM(), start.table.grid, weights, scales, afs=afs)
    # AFS is in the start's scale and in the first rows' state; without it the state's weight is one
    groups = {"times", "outputs", *({"state", "scale"} if afs else ())}
    reach(GeneralTable(start), target, groups)


def test_epd_is_reached_as_rows() -> None:
    shape = (2, 2)
    points = Points(
        torch.sigmoid(values(*shape, scale=1.0)),
        torch.softmax(values(*shape, seed=1, scale=1.0), 1),
        1 + values(*shape, seed=2),
        0.95 + values(*shape, seed=3),
    )
    target = parallel_table(EDM(), grids.polynomial(EDM(), 2), points)
    start = base("ipndm", EDM(), target.nfe, order=4)
    reach(GeneralTable(start), target, {"times", "outputs"})


# -- D-ODE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "ipndm"])
def test_d_ode_is_the_outputs(name: str) -> None:
    start = base(name, EDM(), 5)
    lambdas = [(), *((float(v),) for v in values(4, scale=0.3))]
    recorder = Replay(EDM(), start.table.prediction, lambdas)
    end = multistep_program(recorder, start.table, DodeSettings(nfe=5), with_first=False)
    target = recorder.trace.table(end, start.table.grid, name="dode")
    reach(GeneralTable(start), target, {"outputs"})


# -- DLMS and AMED with the same numbers for every sample ----------------------------------------


@pytest.mark.parametrize("afs", [False, True])
def test_dlms_with_constant_outputs_is_reached(afs: bool) -> None:
    _, denoiser = problem()
    process, steps, order = denoiser.process, 5 + int(afs), 3
    start = base("dpm_solver_pp", process, steps, order=2, afs="zero" if afs else False)
    settings = DesignerSettings(steps, order, afs, features=0)
    rows = torch.arange(steps)[:, None] >= torch.arange(order)
    weights = rows / rows.sum(1, keepdim=True)
    designer = Designer(settings, process, start.table.grid, weights.double()).double()
    with torch.no_grad():
        designer.bias += values(steps, order + 2, seed=1, scale=0.2)
        designer.head.weight += values(order + 2, 20, seed=2, scale=0.02)
    target = average_table(DesignerPolicy(designer), denoiser, 80 * start_noise())
    general = GeneralTable(start)
    assert distance(made(general, solve(general, target)), target) < EXACT


@pytest.mark.parametrize("solver", ["amed", "dpm_solver_2"])
def test_amed_without_the_bottleneck_is_reached(solver) -> None:
    _, denoiser = problem()
    grid = grids.polynomial(denoiser.process, 3)
    predictor = AmedPredictor(64, 0.01, 0.2, bottleneck=False).double()
    policy = AmedPolicy(predictor, AmedBase(solver), denoiser.process, grid)
    target = average_table(policy, denoiser, 80 * start_noise())
    start = base("dpm_solver_2", denoiser.process, 3, grid)
    general = GeneralTable(
        dataclasses.replace(start, table=in_form(start.table, target.prediction))
    )
    assert distance(made(general, solve(general, target)), target) < EXACT


# -- any table -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "prediction"),
    [
        (RectifiedFlow(), "data"),
        *((process, form) for process in (EDM(), VP()) for form in ("data", "noise")),
    ],
)
@pytest.mark.parametrize("nfe", [1, 2, 6, 9])
def test_every_table_of_that_many_rows_is_reached(process, prediction, nfe) -> None:
    """Whatever its learner: this is what makes the general table general."""
    start = base("ddim" if prediction == "data" else "ipndm", process, nfe)
    plain = start.table
    b = torch.tril(values(nfe, nfe, seed=1, scale=1.0))
    b = torch.stack([torch.cat([row[: n + 1].flip(0), row[n + 1 :]]) for n, row in enumerate(b)])
    low, high = float(plain.grid[-1]), float(plain.grid[0])
    target = dataclasses.replace(
        plain,
        a=plain.a + values(nfe, seed=2, scale=1.0),
        b=b,
        times=low + (high - low) * torch.sigmoid(values(nfe, seed=3, scale=1.0)),
        initial_scale=plain.initial_scale * 1.3,
    )
    target.validate()
    general = GeneralTable(start, depth=nfe)
    assert distance(made(general, solve(general, target)), target) < EXACT


def test_the_check_can_fail() -> None:
    """The fault: a target that reads further back than the rows may."""
    start = base("ddim", EDM(), 8)
    target = dataclasses.replace(start.table, b=padded(start.table.b, 6), a=start.table.a.clone())
    target.b[7, 5] = 0.5
    general = GeneralTable(start)
    assert distance(made(general, solve(general, target)), target) > 1e-3
