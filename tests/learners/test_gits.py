"""GITS: the dynamic programme against brute force, its costs, AFS, and the table it returns."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from amed_problem import problem
from torch import Tensor

from dlms_engine import grids, solvers
from dlms_engine.engine.sampler import Sampler
from dlms_engine.learners import distill
from dlms_engine.learners.gits.choice import JUDGED, standard_students
from dlms_engine.learners.gits.objective import Chord, Gits, shortest_path
from dlms_engine.learners.gits.settings import GitsSettings
from dlms_engine.learners.presets import PRESETS
from dlms_engine.learners.registry import preset
from dlms_engine.learners.settings import split_settings
from dlms_engine.learners.start import ExactSolution, SamplingProblem, rmse, run_tables
from dlms_engine.learners.training.noise import unit_noise
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.distilled import load_solver
from dlms_engine.processes import EDM, VP, Process, RectifiedFlow
from dlms_engine.solvers.table import SolverTable
from dlms_engine.support.parallel import World

SHAPE = (16,)


def make(process: Process | None = None, *, samples: int = 24, **settings: Any) -> Gits:
    _, denoiser = problem(process)
    return Gits(denoiser, GitsSettings(**{"points": 13, **settings}), SHAPE, samples)


# -- the dynamic programme ----------------------------------------------------------------------


def path_cost(cost: Tensor, path: list[int], gamma: float) -> float:
    jumps = itertools.pairwise(path)
    return sum(gamma**k * float(cost[i, j]) for k, (i, j) in enumerate(jumps))


def brute_force(cost: Tensor, jumps: int, gamma: float, first: int) -> float:
    n = len(cost)
    inner = itertools.combinations(range(1, n - 1), jumps - 1)
    paths = [[0, *middle, n - 1] for middle in inner]
    return min(path_cost(cost, p, gamma) for p in paths if p[1] >= first)


def random_cost(n: int, seed: int) -> Tensor:
    """Signed, as the "dev" cost is."""
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("gamma", [0.8, 1.0, 1.15])
@pytest.mark.parametrize("seed", range(5))
def test_programme_equals_brute_force(seed: int, gamma: float, first: int) -> None:
    cost = random_cost(8, seed)
    for jumps in range(1, 8 - first + 1):
        path = shortest_path(cost, jumps, gamma, first=first)
        assert path[0] == 0 and path[-1] == 7 and len(path) == jumps + 1
        assert path[1] >= first and all(a < b for a, b in itertools.pairwise(path))
        best = brute_force(cost, jumps, gamma, first)
        assert path_cost(cost, path, gamma) == pytest.approx(best, abs=1e-12)


def test_the_brute_force_check_can_fail() -> None:
    """The fault: gamma weighs the early jumps and not the late ones."""
    worse = 0
    for seed in range(5):
        cost = random_cost(8, seed)
        path = shortest_path(cost, 4, 1 / 1.5)
        worse += path_cost(cost, path, 1.5) > brute_force(cost, 4, 1.5, 1) + 1e-6
    assert worse > 0


def test_first_of_equal_paths() -> None:
    assert shortest_path(torch.zeros(6, 6), 3, 1.15) == [0, 1, 2, 5]


@pytest.mark.parametrize(("jumps", "first"), [(0, 1), (8, 1), (7, 2)])
def test_impossible_paths(jumps: int, first: int) -> None:
    with pytest.raises(ValueError, match="jumps is"):
        shortest_path(torch.zeros(8, 8), jumps, 1.0, first=first)


# -- costs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l1", "l2", "dev"])
@pytest.mark.parametrize("process", [EDM(), VP(), RectifiedFlow()], ids=lambda p: p.name)
def test_first_euler_step_of_the_teacher_is_free(process: Process, metric: Any) -> None:
    """iPNDM begins with Euler, so the jump 0 -> 1 lands on the teacher; Heun does not."""
    grid = grids.time_uniform(process, 12).tolist()
    cost = make(process, metric=metric, grid=grid).cost()
    scale = cost[torch.isfinite(cost)].abs().max()
    assert abs(float(cost[0, 1])) < 1e-5 * scale
    other = make(process, metric=metric, grid=grid, teacher="heun").cost()
    assert abs(float(other[0, 1])) > 1e-4 * scale
    assert bool(torch.isinf(cost.tril()[torch.ones(13, 13).tril().bool()]).all())
    if metric == "dev":
        assert bool((cost[torch.isfinite(cost)] < 0).any())  # signed
    else:
        assert bool((cost >= 0).all())


def test_straight_trajectories_cost_nothing() -> None:
    """All data at one point: every trajectory is straight and Euler is exact from anywhere."""
    point = Denoiser(lambda x, t: torch.full_like(x, 0.7), EDM(), "data")
    for metric in ("l1", "l2", "dev"):
        cost = Gits(point, GitsSettings(points=13, metric=metric), SHAPE, 8).cost()
        bent = make(metric=metric).cost()
        largest = [float(c[torch.isfinite(c)].abs().max()) for c in (cost, bent)]
        assert largest[0] < 1e-3 < 0.1 < largest[1]


def test_distance_from_the_chord() -> None:
    chord = Chord(torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    points = torch.tensor([[[2.0, 3.0]], [[-1.0, -2.0]], [[0.0, 0.0]], [[4.0, 0.0]]])
    assert torch.allclose(chord.deviation(points), torch.tensor([[3.0], [2.0], [0.0], [0.0]]))


def test_l2_cost_is_the_euler_error() -> None:
    """Entry (i, j) by hand, in the process's own state for a flow."""
    process = RectifiedFlow()
    search = make(process, metric="l2", grid=grids.time_uniform(process, 12).tolist(), samples=4)
    cost = search.cost()
    noise = next(search._batches())
    t = search.grid
    _, states = Sampler(search.denoiser, search.teacher)(noise, return_trajectory=True)
    x, i, j = states[3], 3, 7
    velocity = (x - search.denoiser(x, t[i])) / t[i]
    jumped = x + (t[j] - t[i]) * velocity
    assert float(cost[i, j]) == pytest.approx(float((jumped - states[j]).norm(dim=1).mean()), 1e-4)


def test_ranks_sum_to_the_whole() -> None:
    whole = make(samples=21, batch=8).cost()
    parts = torch.zeros_like(whole)
    for rank in range(2):
        search = make(samples=21, batch=8)
        search.world = SilentWorld(rank, 2)
        parts += search.cost().masked_fill(torch.isinf(whole), 0)
    torch.testing.assert_close(
        parts, whole.masked_fill(torch.isinf(whole), 0), rtol=1e-6, atol=1e-6
    )


class SilentWorld(World):
    """A rank whose sums stay its own."""

    def sum_(self, value: Tensor) -> Tensor:
        return value


# -- AFS ----------------------------------------------------------------------------------------


def test_the_teacher_never_uses_afs() -> None:
    with_afs, without = make(nfe=4, afs=True), make(nfe=4)
    assert with_afs.teacher.options["afs"] is False and with_afs.teacher.nfe == 12
    assert torch.equal(with_afs.cost(), without.cost())
    # the fault: a teacher that began with AFS has other states, and other costs
    noise = next(with_afs._batches())
    wrong = solvers.ipndm(with_afs.denoiser.process, with_afs.grid, afs=True)
    ends = [Sampler(with_afs.denoiser, t)(noise) for t in (wrong, with_afs.teacher)]
    assert (ends[0] - ends[1]).abs().max() > 1e-3


@pytest.mark.parametrize("solver", ["ipndm", "dpm_solver_pp", "unipc", "ddim"])
def test_afs_inserts_the_best_point(solver: str) -> None:
    """One point more for the same evaluations, before the first jump, where it helps most."""
    search = make(nfe=4, afs=True, solver=solver)
    indices, report = search.search()
    plain = shortest_path(search.cost(), 4, 1.15, first=2)
    assert [0, *indices[2:]] == plain and 0 < indices[1] < plain[1]
    table = search.student(indices)
    assert (table.nfe, table.grid.shape) == (4, (6,))
    by_hand = solvers.make_solver(solver, search.denoiser.process, search.grid[indices], afs=True)
    assert torch.equal(table.a, by_hand.a) and torch.equal(table.b, by_hand.b)
    errors = {k: end_rmse(search, [0, k, *plain[1:]]) for k in range(1, plain[1])}
    assert report["rmse"] == pytest.approx(min(errors.values()), rel=1e-4)
    assert errors[indices[1]] == pytest.approx(min(errors.values()), rel=1e-4)
    assert max(errors.values()) > 1.001 * min(errors.values())  # it matters which


def end_rmse(search: Gits, indices: list[int]) -> float:
    noise = torch.cat(list(search._batches()))
    ends = [
        Sampler(search.denoiser, table)(noise)
        for table in (search.student(indices), search.teacher)
    ]
    return float((ends[0] - ends[1]).square().mean().sqrt())


def test_afs_always_has_room() -> None:
    """Even where the cheapest first jump is the shortest one."""
    search = make(nfe=10, afs=True, metric="l2")
    cost = search.cost()
    assert shortest_path(cost, 10, 1.15)[1] == 1
    indices, _ = search.search()
    assert len(indices) == 12 and search.student(indices).nfe == 10


# -- the result ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nfe", "settings"),
    [
        (5, {"solver": "ipndm", "order": 3}),
        (4, {"solver": "heun"}),
        (5, {"solver": "dpm_solver_2", "afs": True}),
        (5, {"solver": "deis", "afs": True}),
        (4, {"solver": "dpm_solver_pp", "options": {"prediction": "noise"}}),
    ],
)
def test_distilled_table(tmp_path: Path, nfe: int, settings: dict[str, Any]) -> None:
    network, denoiser = problem()
    path = tmp_path / "gits.safetensors"
    solver = distill(
        denoiser, "gits", nfe=nfe, shape=SHAPE, trajectories=8, points=15, output=path, **settings
    )
    assert isinstance(solver.policy, SolverTable) and solver.nfe == nfe
    noise = 80 * torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    network.calls = 0
    end = Sampler(denoiser, solver.policy)(noise)
    assert network.calls == nfe
    assert torch.equal(Sampler(denoiser, load_solver(path))(noise), end)
    assert solver.best["indices"][0] == 0 and solver.best["indices"][-1] == 14


def test_several_gammas_keep_the_best() -> None:
    search = make(nfe=5, gamma=(0.8, 1.0, 1.15, 1.5), points=31)
    _, report = search.search()
    assert report["rmse"] == min(entry["rmse"] for entry in report["tried"])
    single = [make(nfe=5, gamma=g, points=31).search()[1]["rmse"] for g in (0.8, 1.0, 1.15, 1.5)]
    assert report["rmse"] == pytest.approx(min(single)) and max(single) > min(single)


def test_searched_grid_beats_the_handcrafted_one() -> None:
    """DDIM, whose Euler jumps the cost measures, on the l2 cost."""
    search = make(nfe=6, solver="ddim", metric="l2", gamma=1.0, points=61, samples=64)
    _, report = search.search()
    noise = torch.cat(list(search._batches()))
    process = search.denoiser.process
    exact = Sampler(search.denoiser, search.teacher)(noise)
    base = Sampler(search.denoiser, solvers.ddim(process, grids.polynomial(process, 6)))(noise)
    assert report["rmse"] < 0.9 * float((base - exact).square().mean().sqrt())


def test_grids_are_judged_on_samples_that_the_search_has_not_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: dict[str, set[int]] = {"search": set(), "choice": set()}

    def searched(seed: int, indices: range, *rest: Any) -> torch.Tensor:
        drawn["search"] |= set(indices)
        return unit_noise(seed, indices, *rest)

    def judged(problem: Any, tables: Any, numbers: range) -> torch.Tensor:
        drawn["choice"] |= set(numbers)
        return run_tables(problem, tables, numbers)

    monkeypatch.setattr("dlms_engine.learners.gits.objective.unit_noise", searched)
    monkeypatch.setattr("dlms_engine.learners.gits.choice.run_tables", judged)
    monkeypatch.setattr("dlms_engine.learners.gits.choice.JUDGED", JUDGED[:8])
    monkeypatch.setattr("dlms_engine.learners.gits.choice.FIRST_JUDGED", 4)
    _, denoiser = problem(EDM())
    distill(
        denoiser, "gits", nfe=3, shape=SHAPE, solver="ipndm", trajectories=16, points=9, batch=16
    )
    assert len(drawn["search"]) == 16
    assert len(drawn["choice"]) in (4, 8)  # as many more where some are tied
    assert not drawn["search"] & drawn["choice"]


@pytest.mark.parametrize("process", [RectifiedFlow(), VP()], ids=lambda p: p.name)
def test_never_worse_than_its_solver_on_a_standard_grid(process: Process) -> None:
    """On flows and VP the searched grid was up to ten times worse than the uniform one."""
    _, denoiser = problem(process)
    ends = {}
    for candidates in ("all", "searched"):
        solver = distill(
            denoiser, "gits", nfe=4, shape=SHAPE, trajectories=16, points=21, batch=16,
            candidates=candidates, grid="polynomial",
        )  # fmt: skip
        ends[candidates] = solver.policy
    p = SamplingProblem(denoiser, SHAPE)
    exact = ExactSolution(p)
    exact.prove(0.01)
    standard = standard_students(process, GitsSettings(nfe=4))
    assert {name.partition("/")[0] for name in standard} >= {"time_uniform"}
    fresh = range(1 << 24, (1 << 24) + 256)
    for numbers, slack in ((JUDGED, 1.01), (fresh, 1.25)):  # an error has its own error
        found = run_tables(p, [*ends.values(), *standard.values()], numbers)
        every, searched, *others = (rmse(end, exact.solve(numbers)) for end in found)
        assert every <= slack * min(others)
        assert every <= searched
        if process.name == "vp":
            assert every < searched  # planted: the search alone is worse here


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": "some"}, "candidates is 'some'"),
        ({"solver": "euler"}, "solver is 'euler'"),
        ({"teacher": "none"}, "teacher is 'none'"),
        ({"metric": "bdev"}, "metric is 'bdev'"),
        ({"gamma": 0.0}, "gamma is 0.0"),
        ({"gamma": ()}, "gamma is"),
        ({"solver": "heun"}, "2 evaluations a step"),
        ({"points": 4}, "points is 4"),
        ({"batch": 0}, "batch 0"),
        ({"options": {"momentum": 1}}, "momentum"),
        ({"num_steps": 6}, "unknown setting 'num_steps'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    _, denoiser = problem()
    with pytest.raises(ValueError, match=message):
        distill(denoiser, "gits", nfe=5, shape=SHAPE, trajectories=4, **settings)


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if p["method"] == "gits"])
def test_presets_are_valid(name: str) -> None:
    settings = preset(name, points=21)
    settings.pop("method")
    settings.pop("trajectories")
    (own,) = split_settings(settings, GitsSettings)
    assert GitsSettings(**own).points == 21


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="amed-cifar10"):
        preset("cifar10")


def test_start_is_pure_noise_of_a_flow() -> None:
    """alpha = 0 at t = 1: costs are finite, in x and not in x / alpha."""
    process = RectifiedFlow()
    _, denoiser = problem(process)
    assert isinstance(denoiser, Denoiser)
    settings = GitsSettings(nfe=4, points=9, grid="time_uniform", solver="ddim", teacher="ddim")
    indices, report = Gits(denoiser, settings, SHAPE, 8).search()
    assert len(indices) == 5 and 0 < report["rmse"] < 10
