"""Where learners begin: at the best handcrafted solver or the best of their own untrained forms."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mixture_network import mixture_denoiser

from dlms_engine.learners import LEARNERS, begin, distill
from dlms_engine.learners.begin import BeginAtForm, BeginAtSolver, begun
from dlms_engine.learners.free_table.objective import FreeTable
from dlms_engine.learners.free_table.settings import FreeTableSettings
from dlms_engine.learners.ld3.settings import Ld3Settings
from dlms_engine.learners.start import Candidate, SamplingProblem, handcrafted_candidates
from dlms_engine.learners.training.base_table import base_settings
from dlms_engine.learners.training.start_times import start_times
from dlms_engine.processes import EDM, Process, RectifiedFlow
from dlms_engine.solvers import make_solver
from dlms_engine.solvers.registry import parse_label
from dlms_engine.solvers.table import SolverTable

NFE = 5


def _free_table(process: Process, own: dict[str, Any]) -> SolverTable:
    made = FreeTableSettings(nfe=NFE, **own)
    return made.solver.table(process, start_times(process, made.grid, made.steps).grid)


def _ld3(process: Process, own: dict[str, Any]) -> SolverTable:
    made = Ld3Settings(nfe=NFE, **own)
    return made.base.table(process, start_times(process, made.init, made.steps).grid)


def _dode(process: Process, own: dict[str, Any]) -> SolverTable:
    order = {"order": own["order"]} if "order" in own else {}
    return make_solver(own["solver"], process, start_times(process, own["grid"], NFE).grid, **order)


MADE: dict[str, Callable[[Process, dict[str, Any]], SolverTable]] = {
    "free_table": _free_table,
    "ld3": _ld3,
    "dode": _dode,
}


def differing(method: str, process: Process, candidates: list[Candidate]) -> tuple[int, list[str]]:
    """(how many solvers the learner can begin at, labels of those where it begins elsewhere)."""
    entry = LEARNERS[method].begin
    assert isinstance(entry, BeginAtSolver)
    count, wrong = 0, []
    for candidate in candidates:
        own = entry.of(parse_label(candidate.label))
        if own is None:
            continue
        count += 1
        table, wanted = MADE[method](process, own), candidate.table
        same = all(
            torch.equal(getattr(table, name), getattr(wanted, name)) for name in ("a", "b", "times")
        )
        if not same:
            wrong.append(candidate.label)
    return count, wrong


@pytest.mark.parametrize("process", [EDM(), RectifiedFlow()], ids=["edm", "flow"])
@pytest.mark.parametrize("method", sorted(MADE))
def test_the_settings_of_a_label_make_its_table(method: str, process: Process) -> None:
    count, wrong = differing(method, process, handcrafted_candidates(process, NFE))
    assert wrong == []
    assert count >= 10


def test_the_comparison_sees_a_solver_taken_for_another() -> None:
    swapped = [
        Candidate(one.label, two.table)
        for one, two in zip(
            handcrafted_candidates(EDM(), NFE), handcrafted_candidates(EDM(), NFE)[1:], strict=False
        )
    ]
    count, wrong = differing("free_table", EDM(), swapped)
    assert len(wrong) == count


@pytest.mark.parametrize("method", sorted(name for name, entry in LEARNERS.items() if entry.begin))
def test_where_a_setting_says_the_start_nothing_is_measured(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = LEARNERS[method].begin
    assert entry is not None
    measured: list[str] = []
    monkeypatch.setattr(
        type(entry), "measured", lambda self, *rest: measured.append(method) or {"found": 1}
    )
    problem = SamplingProblem(mixture_denoiser(), (16,))
    for name in entry.settings:
        assert begun(entry, problem, NFE, {name: "given"}) == {name: "given"}
    assert measured == []
    assert begun(entry, problem, NFE, {"lr": 1.0}) == {"lr": 1.0, "found": 1}
    assert measured == [method]


@pytest.mark.parametrize("method", sorted(name for name, entry in LEARNERS.items() if entry.begin))
def test_afs_is_kept_to_by_the_start_that_is_measured(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``afs=False``, which pipelines that cannot rescale their input ask for, measured nothing."""
    entry = LEARNERS[method].begin
    problem = SamplingProblem(mixture_denoiser(), (16,))
    asked: list[bool] = []
    labels = ["ipndm3/logsnr/afs-dockhorn", "ipndm3/time_quadratic", "ipndm4/logsnr/afs-dockhorn"]

    def find_start(*_: Any, afs: bool, **__: Any) -> tuple[Any, None]:
        asked.append(afs)
        ranking = [SimpleNamespace(candidate=Candidate(n, None), rmse=1.0) for n in labels]  # type: ignore[arg-type]
        return SimpleNamespace(ranking=ranking), None

    monkeypatch.setattr(begin, "find_start", find_start)
    monkeypatch.setattr(begin, "_error", lambda *_: 1.0)
    if isinstance(entry, BeginAtSolver):
        best = entry.of(parse_label(labels[0]))
        plain = begun(entry, problem, NFE, {"afs": False})
        assert plain == {"afs": False, **(entry.of(parse_label(labels[1])) or {})}
        if best is not None:  # D-ODE has no such step
            assert begun(entry, problem, NFE, {}) == best
        assert asked[0] is False and all(asked[1:])
    else:
        for afs in (True, False) if method == "dlms" else (True,):  # AMED: NFE says which
            assert begun(entry, problem, NFE, {"afs": afs})["afs"] is afs
            assert "grid" in begun(entry, problem, NFE, {"afs": afs})


@pytest.mark.parametrize("method", sorted(MADE | {"gits": None}))
def test_who_may_begin_with_an_analytical_first_step_says_so(method: str) -> None:
    """LD3 and GITS began at such solvers for pipelines that cannot run them."""
    entry = LEARNERS[method]
    assert isinstance(entry.begin, BeginAtSolver)
    every = [entry.begin.of(parse_label(c.label)) for c in handcrafted_candidates(EDM(), NFE)]
    assert entry.afs == any(own and own.get("afs") for own in every)


def test_the_form_with_the_smallest_error_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two forms, whichever comes first; with the errors turned round, the other."""
    entry = LEARNERS["dlms"].begin
    assert isinstance(entry, BeginAtForm)
    one = {"prediction": "noise", "init": "ipndm", "order": 4, "grid": "polynomial", "afs": True}
    two = {"prediction": "data", "init": "ddim", "grid": "time_uniform", "afs": False}
    problem = SamplingProblem(mixture_denoiser(), (16,))

    def taken(*forms: dict[str, Any]) -> dict[str, Any]:
        small = BeginAtForm(entry.settings, lambda process, nfe: forms, entry.learner, entry.own)
        return begun(small, problem, NFE, {})

    best = taken(one, two)
    assert best == taken(two, one)
    error = begin._error
    monkeypatch.setattr(begin, "_error", lambda *given: -error(*given))
    assert taken(one, two) == (two if best == one else one)


def test_forms_are_held_to_one_exact_solution_a_round_and_the_cost_is_said_ahead() -> None:
    """It was solved again for every form, which was most of a DLMS run's time."""
    problem, said = SamplingProblem(mixture_denoiser(), (16,)), list[str]()
    spent: list[int] = []

    def say(line: str) -> None:
        said.append(line)
        spent.append(problem.calls)

    begun(LEARNERS["dlms"].begin, problem, NFE, {}, say=say)
    promised = int(said[0].split("about ")[1].split(" ")[0].replace(",", ""))
    assert spent[-1] - spent[0] == pytest.approx(promised, rel=0.05)


@pytest.mark.measured_start
def test_distill_begins_at_the_measured_solver_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A free table began at iPNDM-4 on the polynomial grid, whatever the model."""
    solver = distill(
        mixture_denoiser(), "free_table", nfe=3, shape=(16,), trajectories=32, batch=16
    )
    said = next(line for line in capsys.readouterr().out.splitlines() if "begins at" in line)
    base, rmse = said.removeprefix("begins at ").split(", RMSE ")
    assert base.startswith(solver.settings["base"])
    assert solver.settings["grid"] in base
    assert float(rmse) > 0
    own = base_settings(parse_label(base)) or {}
    begins = FreeTableSettings(nfe=3, **own, grid=solver.settings["grid"])
    untrained = FreeTable(mixture_denoiser(), begins, (16,)).validate()
    assert solver.history[0]["validation/raw"] == untrained["score"]
