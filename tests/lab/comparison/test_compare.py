"""The comparison: counted calls, budgets, resuming, and a page that stands alone."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

import cli_model
import pytest
import torch

from dlms_engine import grids, solvers
from dlms_engine.engine.sampler import Sampler
from dlms_engine.lab.comparison import CONTESTANTS, STUDIES, CompareSettings, choose, compare
from dlms_engine.lab.comparison import distilled as workshop
from dlms_engine.lab.comparison.budget import affordable, countable, counted, fewer_for
from dlms_engine.lab.comparison.contestants import BuildsOn, Contestant
from dlms_engine.lab.comparison.measure import Entry, Measurer
from dlms_engine.lab.comparison.page import (
    _curves,
    _lowest,
    draw,
    markdown,
    over_seeds,
    publish,
)
from dlms_engine.lab.comparison.result import Result
from dlms_engine.lab.comparison.session import measuring
from dlms_engine.lab.comparison.store import Store
from dlms_engine.lab.evaluation.own_features import PixelFeatures
from dlms_engine.lab.pages import number
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.models.wrapping import check_keywords
from dlms_engine.policies.distilled import DistilledSolver, load_solver
from dlms_engine.processes import EDM, RectifiedFlow
from dlms_engine.support.files import only_one

pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")
SIZES: dict[str, Any] = {"samples": 8, "exact_samples": 6, "exact_nfe": 12, "accurate_nfe": 8}
SIZES |= {"screen_samples": 2, "shown": 4, "batch": 4, "budget": 6_000}
IPNDM = BuildsOn("ipndm", order=4, afs="dockhorn")
FREE = Contestant("free", "free_table", {"validation_samples": 4, "batch": 8}, IPNDM, batch=8)
DODE = Contestant("dode", "dode", {"scale": 3}, BuildsOn("ddim"), scales=False, trajectories=16)
HEUN_LIKE = Contestant(
    "amed",
    "amed",
    {"solver": "amed", "afs": False, "validation_samples": 4},
    BuildsOn("dpm_solver_2"),
)


def run(
    folder: Path, who: list[Contestant], nfes: tuple[int, ...] = (3,), **changes: Any
) -> Result:
    held = cli_model.tiny()
    assert held.features is not None and held.reference is not None
    settings = CompareSettings(nfes=nfes, **SIZES | changes)
    return compare(
        held.denoiser, held.features, held.reference, held.shape, who, folder, settings,
        progress=False,
    )  # fmt: skip


def test_several_seeds_are_one_line_with_an_error(tmp_path: Path) -> None:
    keen = dataclasses.replace(FREE, settings={**FREE.settings, "weights_lr": 2.0})
    result = run(tmp_path, [keen], training_seeds=(0, 3), trajectories=128, screen_samples=0)
    first, second = [row for row in result["rows"] if row["learned"]]
    assert (first["seed"], second["seed"]) == (0, 3) and first["trajectories"] == 128
    assert first["rmse"] != second["rmse"], "both were trained on the same noise"
    half = abs(first["rmse"] - second["rmse"]) / 2  # the standard error of two
    (merged,) = [row for row in over_seeds(result["rows"]) if row["learned"]]
    assert merged["rmse"] == pytest.approx((first["rmse"] + second["rmse"]) / 2)
    assert merged["errors"]["rmse"] == pytest.approx(half)
    text = markdown(result)
    assert text.count("**free**") == 1 and f"± {number(half)}" in text
    assert "128 start noises" in text and "error of 2 distillations" in text
    again = run(tmp_path, [keen], training_seeds=(0, 3), trajectories=128, screen_samples=0)
    assert again == result, "finished solvers were made again"
    with pytest.raises(ValueError, match=r"training_seeds is \(1, 1\)"):
        CompareSettings(training_seeds=(1, 1))


@pytest.mark.slow
def test_auto_is_given_the_budget(tmp_path: Path) -> None:
    who = dataclasses.replace(CONTESTANTS["auto"], settings={"budget": "1h", "effort": "lean"})
    found = run(tmp_path, [who])
    (row,) = [row for row in found["rows"] if row["solver"] == "auto"]
    report = load_solver(tmp_path / "solvers" / "auto-3.safetensors").report
    assert 0 < report["calls"] <= 3 * SIZES["budget"]  # planted: an hour would be more
    assert row["forward"] >= report["calls"] / 2


def test_calls_are_those_of_the_network() -> None:
    held = cli_model.tiny()
    table = solvers.ddim(held.denoiser.process, grids.polynomial(held.denoiser.process, 5))
    with counted(held.denoiser.network) as calls:
        Sampler(held.denoiser, table).sample([0, 1, 2], held.shape)
        assert (calls.forward, calls.backward) == (15, 0)
        x = torch.zeros(4, *held.shape, requires_grad=True)
        held.denoiser.predict(x, torch.tensor(1.0), "data").sum().backward()
    assert (calls.forward, calls.backward, calls.total) == (19, 4, 23)
    Sampler(held.denoiser, table).sample([0], held.shape)
    assert calls.forward == 19, "counting goes on after the block"
    with pytest.raises(TypeError, match="expected a torch.nn.Module"), counted(lambda x, _: x):
        pass


def test_calls_are_counted_whatever_form_the_output_has() -> None:
    class Held(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"sample": 2 * x}

    network = Held()
    with counted(network) as calls:
        network(torch.zeros(3, 2))
        network(torch.zeros(2, 2, requires_grad=True))
    assert (calls.forward, calls.backward) == (5, 2)


def test_a_network_that_is_a_function_is_compared(tmp_path: Path) -> None:
    """It ended in a TypeError after the exact solutions and the accurate samples."""
    held = cli_model.tiny()
    network = held.denoiser.network

    def function(x: torch.Tensor, c_noise: torch.Tensor) -> Any:
        return network(x, c_noise)

    denoiser, features = Denoiser(function, EDM(), "edm"), PixelFeatures(held.shape)
    settings = CompareSettings(nfes=(3,), **SIZES)
    result = compare(
        denoiser, features, None, held.shape, [DODE], tmp_path, settings, progress=False
    )
    (row,) = (row for row in result["rows"] if row["learned"])
    assert row["forward"] > 0 and row["rmse"] > 0
    assert denoiser.network is function and "network" not in denoiser._modules
    # the names of its parameters stay known; planted: another keyword is refused
    check_keywords(countable(denoiser).network, ())
    with pytest.raises(ValueError, match="does not take"):
        check_keywords(countable(denoiser).network, ("label",))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("torchmetrics.image.fid", "computed by torchmetrics"),
        ("matplotlib.backends.backend_agg", "plots need matplotlib"),
    ],
)
def test_what_the_end_needs_is_looked_for_before_the_work(
    module: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was found missing after the accurate samples, or after the first distillations."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=said):
        run(tmp_path / "out", [DODE])
    assert not (tmp_path / "out").exists()


def test_the_curves_are_those_of_the_figures() -> None:
    """An RMSE below 1e-3 was drawn at 1e-3."""
    row: Any = {"nfe": 5, "solver": "s", "learned": True, "size": "full", "rmse": 2e-5}
    rows = [row | {"excess_accurate": value} for value in (-1.0, 3e-7, 2e-4)]
    curves = [_curves([("s", row)], "rmse", _lowest(rows, "rmse")) for row in rows]
    assert all(curve == {"s": {5: 2e-5}} for curve in curves)
    by = "excess_accurate"
    drawn = [_curves([("s", row)], by, _lowest(rows, by))["s"][5] for row in rows]
    assert drawn == pytest.approx([2e-7, 3e-7, 2e-4])
    large = [*rows, row | {by: 40.0}]
    assert _curves([("s", rows[0])], by, _lowest(large, by))["s"][5] == 1e-3


def test_samples_that_are_no_images_are_compared_without_pictures(tmp_path: Path) -> None:
    class Plane(torch.nn.Module):
        def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x / (1 + sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2))

    denoiser, shape = Denoiser(Plane(), EDM(), "data"), (2,)
    features = PixelFeatures(shape)
    settings = CompareSettings(nfes=(3,), **SIZES)
    result = compare(denoiser, features, None, shape, [DODE], tmp_path, settings, progress=False)
    assert {row["solver"] for row in result["rows"]} >= {"dode"}
    assert not list(tmp_path.glob("samples-*.png"))
    # nor are their values cut to those of images; planted: those of images are
    far, farther = torch.full((2, *shape), 3.0), torch.full((2, *shape), 4.0)
    for drawn, cut in ((shape, False), ((1, 1, 2), True)):
        with measuring(
            denoiser, features, drawn, tmp_path, None, batch=2, total=1, progress=False
        ) as (measurer, _):
            one, two = (measurer.sums(x).total for x in (far, farther))
        assert torch.equal(one, two) == cut


def test_affordable_spends_the_budget_and_not_more() -> None:
    def cost(trajectories: int) -> int:
        return 500 + 7 * trajectories

    found = affordable(cost, 10_000, 32)
    assert found % 32 == 0
    assert cost(found) <= 10_000 < cost(found + 32)
    with pytest.raises(ValueError, match=r"budget is 600 .* give at least 724"):
        affordable(cost, 600, 32)


def test_settings_chosen_on_an_edm_model_are_for_edm_models() -> None:
    """On a flow DLMS's base was refused, and AMED's and LD3's were ten times worse than the best."""
    edm, flow = (choose(None, None, process) for process in (EDM(), RectifiedFlow()))
    assert edm == choose(None, None) and "amed-plugin" in {c.label for c in edm}
    assert {c.label for c in flow} == {c.label for c in edm} - {"amed-plugin"}
    assert all(not c.settings and c.base is None for c in flow)
    (auto,) = choose(["auto"], None, RectifiedFlow())
    assert auto.budgeted
    (named,) = choose(["amed-plugin"], None, RectifiedFlow())
    assert named.settings  # planted: a variant by name keeps its settings


def test_a_probe_that_ended_early_does_not_stretch_the_budget() -> None:
    """LD3 on a flow stopped sooner on three batches than on one: 80,000 batches looked affordable."""

    def concluded(trajectories: int) -> int:
        return 24_400 if trajectories == 32 else 10_400 + 63 * trajectories

    found = affordable(concluded, 80_000, 32)
    assert concluded(found) <= 80_000 < concluded(found + 32)

    def ended(trajectories: int) -> int:
        return {32: 4_000, 96: 3_900, 384: 3_800}[trajectories]

    assert affordable(ended, 80_000, 32) == 20 * 32
    straight = affordable(lambda count: 100 * count, 80_000, 32)
    assert straight == 25 * 32  # planted: a line as it should be


def test_a_training_that_overspends_is_made_again_with_fewer() -> None:
    assert fewer_for(640, 144_000, 80_000, 32) == 352
    assert fewer_for(640, 90_000, 80_000, 32) is None  # planted: within a fifth
    assert fewer_for(32, 144_000, 80_000, 32) is None and fewer_for(None, 10**6, 1, 1) is None


def test_comparison_spends_equal_budgets_and_measures_the_same_seeds(tmp_path: Path) -> None:
    result = run(tmp_path, [FREE, DODE])
    assert json.loads((tmp_path / "compare.json").read_text()) == result
    rows = {row["solver"]: row for row in result["rows"]}
    free, dode = rows["free"], rows["dode"]
    total = free["forward"] + free["backward"]
    assert 0.5 * SIZES["budget"] < total <= 1.1 * SIZES["budget"]
    assert dode["backward"] == 0 and dode["forward"] < SIZES["budget"]
    assert rows[dode["base"]]["rmse"] > dode["rmse"], "D-DDIM gained nothing on DDIM"
    assert not rows[dode["base"]]["learned"]
    # the figures are those of the solver file, measured apart
    held = cli_model.tiny()
    assert held.features is not None
    from dlms_engine.policies.distilled import load_solver

    policy = load_solver(tmp_path / "solvers" / "free-3.safetensors").policy
    meter = Measurer(held.denoiser, held.features, held.shape, Store(tmp_path / "other"), batch=4)
    first = CompareSettings().first_seed
    exact = meter.endpoints(12, range(first, first + 6))
    again = meter.measure("m", [Entry("free", policy)], range(first, first + 8), exact)[0]
    assert again.rmse == pytest.approx(free["rmse"], rel=1e-6)
    planted = meter.measure("p", [Entry("f", policy)], range(first + 1, first + 9), exact)[0]
    assert planted.rmse != pytest.approx(free["rmse"], rel=1e-3)


def test_the_bar_moves_while_the_cost_of_a_training_is_measured(tmp_path: Path) -> None:
    held = cli_model.tiny()
    assert held.features is not None
    moved: list[int] = []
    shop = workshop.Workshop(
        held.denoiser, held.features, held.shape, tmp_path, SIZES["budget"], moved.append
    )
    made = shop.distilled(FREE, 3)
    training = made.forward + made.backward
    assert sum(moved) > training, "the probes were not counted"
    moved.clear()
    shop.distilled(FREE, 3)
    assert not moved  # planted: what is read back takes no call


def test_second_call_trains_nothing_and_changed_settings_train_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path, [DODE])
    trained: list[str] = []
    whole = workshop.distill

    def watched(*given: Any, **named: Any) -> Any:
        trained.append(given[1])
        return whole(*given, **named)

    monkeypatch.setattr(workshop, "distill", watched)
    assert run(tmp_path, [DODE]) == first
    assert trained == []
    run(tmp_path, [dataclasses.replace(DODE, settings={"scale": 4})])
    assert trained == ["dode"]


def test_a_count_a_method_cannot_make_is_said_not_hidden(tmp_path: Path) -> None:
    result = run(tmp_path, [HEUN_LIKE])
    row = next(row for row in result["rows"] if row["solver"] == "amed")
    assert "two evaluations a step" in row["refused"]
    assert "two evaluations a step" in markdown(result)


@pytest.mark.slow
def test_page_stands_alone(tmp_path: Path) -> None:
    result = run(tmp_path, [DODE], (3, 4))
    paths = publish(result, tmp_path, "compare", command="dlms compare <now>")
    assert all(path.exists() for path in paths)
    text = (tmp_path / "compare.html").read_text()
    assert "dlms compare &lt;now&gt;" in text
    sources = re.findall(r'src="([^"]{0,30})', text)
    assert len(sources) == len(draw(result, tmp_path, "compare")) + 2, "a picture is missing"
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in text
    assert text.count("<tr class=") == len(result["rows"])
    lines = [line for line in markdown(result).splitlines() if line.startswith("| ")]
    assert len(lines) == len(result["rows"]) + 1


def test_names_and_mistakes(tmp_path: Path) -> None:
    assert {c.method for c in choose(None, None)} == {
        "auto", "dlms", "amed", "ld3", "dode", "gits", "free_table",
    }  # fmt: skip
    assert [c.label for c in choose(["ld3", "dode"], None)] == ["ld3", "dode"]
    for study in STUDIES:
        found = choose(None, study)
        assert len({c.label for c in found}) == len(found) >= 4
        settings = [json.dumps(dict(c.settings), sort_keys=True) for c in found]
        assert len(set(settings)) == len(found), "two contestants of a study are the same"
    with pytest.raises(ValueError, match="method is 'magic', expected one of"):
        choose(["magic"], None)
    with pytest.raises(ValueError, match="study is 'magic', expected one of"):
        choose(None, "magic")
    with pytest.raises(ValueError, match="expected different names"):
        run(tmp_path, [DODE, DODE])
    with pytest.raises(ValueError, match="exact_samples is 9, expected 2 to samples"):
        CompareSettings(samples=8, exact_samples=9)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_contestants_have_the_settings_of_their_method(name: str) -> None:
    from dlms_engine.learners.registry import resolved

    contestant = CONTESTANTS[name]
    resolved(contestant.method, 5, dict(contestant.settings), trajectories=contestant.trajectories)
    held = cli_model.tiny()
    if contestant.base is not None:
        table = contestant.base.table(held.denoiser.process, 5)
        assert table.nfe == 5


def test_command_writes_table_page_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dlms_engine.cli import main

    sizes = ("--samples=8", "--exact-samples=4", "--exact-nfe=8", "--accurate-nfe=6", "--batch=4")
    words = ["compare", "--model=cli_model:tiny", "--methods=dode", "--nfe=3-4", *sizes]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--screen-samples=0", f"--folder={tmp_path / 'out'}"])
        raise SystemExit(0)
    assert not stop.value.code
    table = capsys.readouterr().out
    assert "| 3 | **dode** |" in table and "| 4 | **dode** |" in table
    made = {path.name for path in (tmp_path / "out").iterdir()}
    wanted = {"compare.json", "compare.md", "compare.html", "samples-3.png", "samples-4.png"}
    assert made >= wanted
    with pytest.raises(SystemExit) as stop:
        main([*words, "--study=ablation"])
    assert stop.value.code
    assert "not both" in capsys.readouterr().err


def test_a_solver_that_another_comparison_is_making_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = cli_model.tiny()
    assert held.features is not None
    shop = workshop.Workshop(
        held.denoiser, held.features, held.shape, tmp_path, 6_000, 0, lambda _done: None
    )
    table = solvers.ddim(held.denoiser.process, grids.polynomial(held.denoiser.process, 3))
    made: list[Path] = []

    def make(_self: object, _who: Contestant, _nfe: int, _seed: int, path: Path) -> Any:
        made.append(path)
        DistilledSolver(table, "dode").save(path)
        return workshop.Distilled(table, 16, 1, 0, 0.5)

    monkeypatch.setattr(workshop.Workshop, "_make", make)
    second = threading.Thread(target=shop.distilled, args=(DODE, 3))
    with only_one(tmp_path / "dode-3.json", wait=True):
        second.start()
        second.join(timeout=0.5)
        assert second.is_alive() and not made, "it did not wait"
    second.join(timeout=60)
    shop.distilled(DODE, 3)
    assert len(made) == 1
