"""The command line on a tiny model: what it writes, what it prints, how it fails."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from commands import answer, complaint, run
from marks import slow
from PIL import Image
from safetensors.torch import load_file, save_file

from dlms_engine import grids, processes, solvers
from dlms_engine.cli import OLD_NAMES, main
from dlms_engine.cli.model import load_model
from dlms_engine.engine.sampler import Sampler
from dlms_engine.lab.comparison.record import RecordSettings
from dlms_engine.policies.distilled import load_solver, save_solver
from dlms_engine.solvers import registry

TINY = ("--model", "cli_model:tiny")
QUICK = (
    "--method=dlms",
    "--trajectories=32",
    *(
        f"--set={pair}"
        for pair in (
            "batch=16",
            "validation_samples=4",
            "validation_steps=8",
            "teacher_interpolation=1",
        )
    ),
)


@pytest.fixture(scope="module")
def solver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("solver") / "tiny.safetensors"
    assert run("distill", *TINY, "--nfe", 3, "--output", path, *QUICK, "--json") == 0
    return path


def test_sample_writes_the_picture_of_the_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "grid.png"
    facts = answer(capsys, "sample", *TINY, "--seeds", "0-5", "--columns", 3, "--output", path)
    assert (facts["nfe"], facts["images"]) == (5, 6)
    with Image.open(path) as picture:  # 3 x 2 images of 8 x 8, four times enlarged, 1 pixel apart
        assert picture.size == (3 * 32 + 2, 2 * 32 + 1)


def test_sample_options_choose_the_solver_they_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "raw.safetensors"
    options = ("--method", "dpm_solver_pp", "--order", 2, "--grid", "logsnr", "--afs", "dockhorn")
    more = ("--set", "lower_order_final=false", "--nfe", 4, "--seeds", "3,7-8", "--batch", 2)
    answer(capsys, "sample", *TINY, *options, *more, "--output", path)
    held = load_model("cli_model:tiny")
    grid = grids.logsnr(processes.EDM(), 5)
    table = solvers.dpm_solver_pp(
        processes.EDM(), grid, order=2, lower_order_final=False, afs="dockhorn"
    )
    expected = Sampler(held.denoiser, table).sample([3, 7, 8], held.shape)
    found = load_file(path)["samples"]
    assert torch.equal(found, expected)
    other = solvers.dpm_solver_pp(processes.EDM(), grid, order=2, afs="dockhorn")
    planted = Sampler(held.denoiser, other).sample([3, 7, 8], held.shape)
    assert not torch.equal(found, planted)


@pytest.mark.parametrize("method", sorted(solvers.SOLVERS))
@pytest.mark.parametrize("afs", ["off", "dockhorn"])
def test_handcrafted_table_costs_what_was_asked(method: str, afs: str) -> None:
    costs = []
    for nfe in range(1, 7):
        try:
            table = registry.handcrafted_table(processes.EDM(), method, nfe, afs=afs)
        except ValueError as refusal:
            assert f"exactly {nfe} evaluations" in str(refusal)
            continue
        assert table.nfe == nfe
        costs.append(nfe)
    step = solvers.SOLVERS[method].evaluations_per_step
    assert len(costs) >= 6 // step - 1


def test_distil_sample_inspect_evaluate_agree(
    solver: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspected = answer(capsys, "inspect", solver)
    assert (inspected["method"], inspected["nfe"]) == ("dlms", 3)
    assert len(str(inspected["sha256"])) == 64
    assert run("inspect", solver) == 0
    assert str(inspected["sha256"]) in capsys.readouterr().out
    picture = tmp_path / "s.png"
    assert answer(capsys, "sample", *TINY, "--solver", solver, "--output", picture)["nfe"] == 3
    sizes = ("--samples", 12, "--exact-nfe", 12, "--accurate-nfe", 8, "--folder", tmp_path)
    found = answer(capsys, "evaluate", *TINY, "--solver", solver, *sizes)
    held = load_model("cli_model:tiny")
    fine = solvers.dpm_solver_pp(processes.EDM(), grids.polynomial(processes.EDM(), 12), order=3)
    first = RecordSettings().first_seed
    seeds = range(first, first + 12)
    ends = [
        Sampler(held.denoiser, policy).sample(seeds, held.shape)
        for policy in (fine, load_solver(solver))
    ]
    rmse = (ends[0].double() - ends[1].double()).square().mean().sqrt()
    assert found["rmse"] == pytest.approx(float(rmse), rel=1e-6)


def test_the_command_that_is_shown_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path with a space was two words in it, and ``--conditions`` was missing."""
    monkeypatch.chdir(tmp_path)
    save_file({"label": torch.arange(2.0)}, "two labels.safetensors")
    model = ("--model", "cli_model:unlabelled", "--conditions", "two labels.safetensors")
    arguments = ("distill", *model, "--nfe", 3, *QUICK, "--output", "my solver.safetensors")
    assert run(*arguments) == 0
    shown = capsys.readouterr().out.partition("try it: ")[2].splitlines()[0]
    words = shlex.split(shown)
    assert words[:2] == ["dlms", "sample"] and run(*words[1:], "--seeds", "0-1") == 0
    # planted: what was shown before
    planted = shown.replace("'my solver.safetensors'", "my solver.safetensors")
    assert run(*shlex.split(planted)[1:], "--seeds", "0-1") == 2
    assert run(*[word for word in words[1:] if word not in model[2:]], "--seeds", "0-1") == 1


def test_inspect_shows_the_rows_of_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = registry.handcrafted_table(processes.EDM(), "ipndm", 3, order=2)
    path = save_solver(tmp_path / "table.safetensors", table)
    rows = answer(capsys, "inspect", path)["rows"]
    assert isinstance(rows, list)
    assert [row["a"] for row in rows] == table.a.tolist()
    assert [row["b"] for row in rows] == table.b.tolist()


def test_distill_protects_finished_work(
    solver: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = solver.read_bytes()
    assert "--overwrite" in complaint(capsys, "distill", *TINY, "--output", solver)
    assert solver.read_bytes() == before
    nowhere = tmp_path / "missing" / "s.safetensors"
    assert "no folder" in complaint(capsys, "distill", *TINY, "--output", nowhere)


def test_distill_draws_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "loss.png"
    target = ("--output", tmp_path / "s.safetensors", "--plot", plot)
    facts = answer(capsys, "distill", *TINY, "--nfe", 2, *target, *QUICK)
    assert facts["plot"] == str(plot) and plot.stat().st_size > 1000


def test_a_curve_that_cannot_be_drawn_does_not_end_a_distillation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A short run of auto has no history: its outcome was not said, and the exit code was 1."""
    pytest.importorskip("matplotlib")
    from dlms_engine.cli.outcome import curve_drawn

    plot, output = tmp_path / "loss.png", tmp_path / "s.safetensors"
    assert curve_drawn([], plot, "auto", output) is None and "nothing to draw" in caplog.text
    assert curve_drawn([{"loss": 1.0}], None, "auto", output) is None and not plot.exists()
    assert curve_drawn([{"loss": 1.0}], plot, "auto", output) == plot and plot.exists()


def test_the_demo_refuses_what_it_cannot_draw_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    said = complaint(capsys, "demo", "--model", "cli_model:plane", "--folder", tmp_path / "out")
    assert "cannot draw" in said and "'cli_model:plane'" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sample", "--seeds", "4-1"), "runs backwards"),
        (("sample", "--seeds", "x"), "expected numbers and ranges"),
        (("sample", "--output", "picture.bmp"), ".png"),
        (("sample", "--nfe", "many"), "--nfe"),
        (("sample", "--nfe", "0"), "--nfe"),
        (("sample", "--method", "magic", *TINY), "magic"),
        (("sample", "--method", "heun", "--nfe", "5", *TINY), "[4, 6]"),
        (("sample", "--grid", "magic", *TINY), "polynomial"),
        (("sample", "--afs", "magic", *TINY), "dockhorn"),
        (("sample", "--set", "order=3", *TINY), "use --order"),
        (("sample", "--set", "colour=3", *TINY), "colour"),
        (("sample", "--backend", "magic", *TINY), "magic"),
        (("sample", "--solver", "a", "--method", "b", *TINY), "not both"),
        (("sample", "--solver", "absent.safetensors", *TINY), "absent.safetensors"),
        (("sample", "--model", "nowhere"), "module:function"),
        (("sample", "--model", "cli_model:absent"), "absent"),
        (("sample", "--model", "cli_model:wrong"), "expected (denoiser, shape)"),
        (("distill", "--output", "s.safetensors", "--set", "lr", *TINY), "key=value"),
        (("distill", "--output", "s.safetensors", "--set", "colour=1", *TINY), "known settings"),
        (("distill", "--output", "s.safetensors", "--method", "magic", *TINY), "magic"),
        (("distill", *TINY), "--output"),
        (("evaluate", "--record", "--method", "ddim", *TINY), "--method"),
        (("inspect", "absent.safetensors"), "absent.safetensors"),
        (("inspect", __file__), "not a safetensors"),
        (("bench", "magic"), "magic"),
        (("magic",), "magic"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_clear_line(
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in complaint(capsys, *arguments)
    assert not list(tmp_path.iterdir()), "a refused command left something behind"


@pytest.mark.parametrize(
    "place", ["dlms_engine.cli._renamed", "dlms_engine.cli.doctor.installation"]
)
def test_an_interrupt_is_one_line(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the seconds of the imports it was a traceback; with a newer typer later ones said nothing."""
    kept = importlib.import_module(place.rpartition(".")[0]), place.rpartition(".")[2]
    genuine = getattr(*kept)

    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*kept, interrupt)
    assert run("doctor") == 130
    assert capsys.readouterr().err.strip() == "dlms: interrupted"
    monkeypatch.setattr(*kept, genuine)  # planted: no interrupt
    assert run("doctor") != 130 and "interrupted" not in capsys.readouterr().err


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="runs backwards"):
        main(["sample", "--seeds", "4-1", "--debug"])


def test_record_is_complete_and_resumes(
    solver: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "record"
    sizes = ("--samples", 8, "--screen-samples", 4, "--exact-samples", 6)
    sizes = (*sizes, "--exact-nfe", 8, "--accurate-nfe", 6, "--full-nfe", "3")
    arguments = ("evaluate", "--record", *TINY, *sizes, "--nfe", "3", "--batch", 4)
    first = answer(capsys, *arguments, "--solver", solver, "--folder", folder)
    rows = first["rows"]
    assert isinstance(rows, list)
    labels = [label for label, _ in solvers.handcrafted(processes.EDM(), 3)]
    assert [row["solver"] for row in rows if not row["learned"]] == labels
    assert [row["method"] for row in rows if row["learned"]] == ["dlms"]
    assert "**dlms" in (folder / "record.md").read_text(encoding="utf-8")
    assert json.loads((folder / "record.json").read_text(encoding="utf-8")) == first

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the network ran again")

    import cli_model

    monkeypatch.setattr(cli_model.TinyNetwork, "forward", refuse)
    again = answer(capsys, *arguments, "--solver", solver, "--folder", folder)
    assert again == first
    # planted: with a part of the cache gone it must run
    (folder / "cache" / "screen-3.safetensors").unlink()
    last = (*arguments, "--solver", solver, "--folder", folder, "--json")
    assert "the network ran again" in complaint(capsys, *last)


@pytest.mark.parametrize("model", ["cli_model:tiny", slow("cli_model:labelled")])
def test_demo_runs_resumes_and_draws(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from dlms_engine.cli import demo

    monkeypatch.setattr(demo, "SLOW_SECONDS", 0.0)
    sizes = ("--budget", "600calls", "--samples", 8, "--seeds", "0-3", "--nfe", 3)
    arguments = ("demo", "--model", model, "--folder", tmp_path / "out", *sizes)
    first = answer(capsys, *arguments)
    rows = first["rows"]
    assert isinstance(rows, list)
    assert [row["nfe"] for row in rows] == [3, 3, 6]
    assert first["times_closer"] == pytest.approx(rows[1]["rmse"] / rows[0]["rmse"])
    assert (tmp_path / "out" / "samples.png").is_file()
    # --fresh removes these and nothing else: the folder may be one that holds other work
    made = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert made <= {path.name for path in demo._written(tmp_path, model, 3)}
    again = answer(capsys, *arguments)
    assert again["rows"] == rows
    assert run(*arguments) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    nothing = first["times_closer"] == 1.0
    assert ("Within 600calls nothing was learned" in said) == nothing
    assert ("times closer to the accurate picture" in said) != nothing


def test_the_demo_takes_no_solver_of_another_model(tmp_path: Path) -> None:
    """A model that was changed under the same name was shown with the solver of the one before."""
    from dlms_engine.cli import demo
    from dlms_engine.learners.start import SamplingProblem
    from dlms_engine.learners.start.store import keep_start
    from dlms_engine.models.denoiser import Denoiser

    model = load_model("cli_model:tiny")
    problem = SamplingProblem(model.denoiser, model.shape, None)
    start = demo._recommended(model, tmp_path, "mine:model", 3, "lean", progress=False)
    path = demo._path(tmp_path, "mine:model", 3)
    save_solver(path, start.best.table)
    assert demo._kept(problem, tmp_path, "mine:model", 3) is not None
    turned = Denoiser(lambda x, c: -model.denoiser.network(x, c), processes.EDM(), "edm")
    other = SamplingProblem(turned, model.shape, None)
    assert demo._kept(other, tmp_path, "mine:model", 3) is None
    keep_start(path.with_suffix(".start.json"), other, start)  # planted: a ranking of the other
    assert demo._kept(other, tmp_path, "mine:model", 3) is not None


def test_demo_draws_what_was_learned(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from dlms_engine.cli.demo import learning_errors
    from dlms_engine.lab.demo_pictures import learning_curve

    rounds = [{"rmse_before": 0.4, "rmse": 0.2}, {"rmse_before": 0.2, "rmse": 0.1}]
    errors = learning_errors([*rounds, {"before": 0.1, "after": 0.05}])
    assert errors == [0.4, 0.2, 0.1, 0.05] and learning_errors([]) == []
    path = learning_curve(errors, {"untrained": 0.4}, tmp_path / "loss.png", title="Learning")
    assert path.stat().st_size > 1000


def test_demo_samples_every_seed_under_its_own_condition() -> None:
    from dlms_engine.cli import demo

    model = load_model("cli_model:labelled")
    table = registry.handcrafted_table(processes.EDM(), "ipndm", 3)
    together = demo.sampled(model, table, [0, 1, 2])
    assert torch.equal(together[2], demo.sampled(model, table, [2])[0])
    plain = dataclasses.replace(model, conditions={"label": torch.zeros(3)})
    assert not torch.equal(together[2], demo.sampled(plain, table, [2])[0])


def test_demo_gives_the_emoji_model_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    from dlms_engine import models
    from dlms_engine.cli import demo

    tiny = load_model("cli_model:tiny")
    assert tiny.features is not None and tiny.reference is not None
    found = models.PretrainedModel(
        tiny.denoiser, tiny.shape, tiny.features, tiny.reference, ("face", "heart")
    )
    monkeypatch.setattr(models, "load", lambda _name, _device: found)
    name, model = demo.demo_model("emoji")
    assert name == "emoji"
    assert model.conditions["class_labels"].tolist() == [0, 1]


def test_documented_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/cli.md and README.md name only commands and options that there are."""
    import typer

    from dlms_engine.cli.app import app

    group = typer.main.get_command(app)
    known = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    root = Path(__file__).parents[2]
    checked = 0
    pages = ("docs/cli.md", "README.md", "docs/your_model.md", "docs/production.md")
    for text in ((root / page).read_text() for page in (*pages, "docs/benchmarks.md")):
        for line in re.findall(r"^    dlms (.+)$", text, flags=re.MULTILINE):
            command, *words = line.split("#")[0].split()
            used = {word.partition("=")[0] for word in words if word.startswith("--")}
            if command == "bench":  # a parser of its own for each benchmark
                capsys.readouterr()
                assert run("bench", words[0], "--", "--help") == 0
                known["bench"] = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
            assert used <= known[command] | {"--help", "--json", "--debug"}, line
            checked += 1
    assert checked > 20


def test_export_names_the_solver_and_hands_over_what_was_asked(tmp_path, capsys, monkeypatch):
    """Compilation is left out here; tests/test_export.py runs a package."""
    from dlms_engine.engine import export

    asked: dict[str, object] = {}

    def package(program: torch.export.ExportedProgram, **options: object) -> None:
        asked.update(options, targets={str(n.target) for n in program.graph.nodes})
        options["package_path"].write(b"12")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", package)
    output = tmp_path / "sampler.pt2"
    facts = answer(
        capsys, "export", *TINY, "--method=ddim", "--nfe=2", "--output", output, "--max-batch=8"
    )
    assert (facts["nfe"], facts["bytes"], facts["solver"]) == (2, 2, "ddim/polynomial")
    configs = asked["inductor_configs"]
    assert isinstance(configs, dict)
    about = json.loads(configs["aot_inductor.metadata"][export.METADATA])
    assert about["noise"]["batch"] == [1, 8] and about["noise"]["shape"] == ["B", 3, 8, 8]
    assert "aten.convolution.default" in str(asked["targets"]) or "aten.conv2d" in str(asked)
    assert "pt2" in complaint(capsys, "export", *TINY, "--output", tmp_path / "sampler.onnx")
    again = ("export", *TINY, "--method=ddim", "--nfe=1", "--output", output)
    assert "--overwrite" in complaint(capsys, *again)
    assert answer(capsys, *again, "--overwrite")["nfe"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compare", "--nfes", "two"), "nfe is 'two'"),
        (("compare", "--nfes=two"), "nfe is 'two'"),
        (("evaluate", "--record", "--nfes", "two"), "nfe is 'two'"),
        (("evaluate", "--record", "--full-nfes", "two"), "full_nfe is 'two'"),
        (("evaluate", "--record", "--compared-samples", "9", "--samples=8"), "exact_samples is 9"),
        (("reproduce", "amed-table2", "--rmse-samples", "x"), "--exact-samples"),
        (("recommend", "--keep"), "--store"),
    ],
)
def test_old_names_of_options_are_understood(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = () if arguments[0] in ("reproduce", "recommend") else TINY
    assert words in complaint(capsys, *arguments, *model)


@pytest.mark.parametrize("command", OLD_NAMES)
def test_old_names_of_options_are_not_offered(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, "--help") == 0
    offered = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    for old, new in OLD_NAMES[command].items():
        assert new in offered and old not in offered


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sample", "--solver", "a.safetensors", "--nfe", "4"), "--nfe 4"),
        (("sample", "--solver", "a.safetensors", "--set", "x=1"), "--set x=1"),
        (("sample", "--output", "raw.safetensors", "--columns", "3"), "--columns 3"),
        (("sample", "--seeds", "18446744073709551616"), "18446744073709551616"),
        (("evaluate", "--solver", "a.safetensors", "--grid", "logsnr"), "--grid logsnr"),
        (("evaluate", "--shortlist", "3"), "without --record"),
        (("evaluate", "--record", "--order", "2"), "--order 2"),
        (("export", "a.safetensors", "--output", "x.pt2", "--nfe", "4"), "--nfe 4"),
        (("distill", "--output", "a.pt"), "a.safetensors"),
        (("distill", "--output", "a.pt", "--pipeline", "."), "a folder for the scheduler"),
        (("distill", "--output", "a.safetensors", "--dtype", "float16"), "--dtype float16"),
        (("distill", "--output", "a.safetensors", "--dtype", "float16"), "--dtype float16"),
        (("distill", "--output", "a", "--pipeline", ".", *TINY), "--model cli_model:tiny"),
        (("distill", "--output", "a.safetensors", "--seed", "-1"), "-1"),
        (("distill", "--output", "a.safetensors", "--seed", "18446744073709551616"), "1844674407"),
        (("reproduce", "--data", "cifar10"), "--data cifar10"),
        (("reproduce", "--estimate"), "without the name of a table"),
        (
            ("reproduce", "dlms-table1", "--model", "a:b", "--dtype", "float16"),
            "--dtype float16 has no effect beside --model",
        ),
        (("export", "--output", "x.pt2", "--device", "cuda:x"), "device 'cuda:x' is unknown"),
        (("compare", "--seed", "-1"), "seed is '-1'"),
        (("compare", "--nfe", "three"), "nfe is 'three'"),
        (("evaluate", "--nfe", "3-4"), "nfe is 3-4, expected one number"),
        (("evaluate", "--nfe", "0"), "nfe is 0, expected one number >= 1"),
    ],
    ids=lambda value: " ".join(map(str, value))[:60] if isinstance(value, tuple) else "",
)
def test_no_option_is_ignored(
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What would have no effect is refused with its value, before a model is loaded."""
    monkeypatch.chdir(tmp_path)

    def refuse(*_args: object) -> None:
        raise AssertionError("a model was loaded")

    for module in ("sample", "evaluate", "export", "distill", "compare", "reproduce"):
        monkeypatch.setattr(f"dlms_engine.cli.{module}.load_model", refuse)
    assert words in complaint(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_result_is_said_with_its_measure_and_its_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.safetensors"
    assert run("distill", *TINY, "--method", "dlms", "--nfe", 2, "--output", path, *QUICK) == 0
    said = capsys.readouterr().out
    assert "endpoint RMSE to the exact solution (lower is better)" in said
    assert re.search(r"before training [\d.e-]+, [\d.]+ times as much", said)
    assert "dlms sample --model cli_model:tiny --solver" in said


def test_long_lists_of_a_process_are_shortened_but_told_apart() -> None:
    from dlms_engine.processes.base import config_summary

    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    first = processes.VPDiscrete(alphas_cumprod=(1 - betas).cumprod(0))
    betas[500] *= 1.1
    other = processes.VPDiscrete(alphas_cumprod=(1 - betas).cumprod(0))
    said = [config_summary(process.config()) for process in (first, other)]
    assert all(len(text) < 250 and "1000 numbers" in text for text in said)
    assert said[0] != said[1]


def test_seeds_outside_64_bits_are_refused_by_value() -> None:
    from dlms_engine.engine.sampler import seeded_noise

    assert seeded_noise([0, 2**64 - 1], (2,)).shape == (2, 2)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"seed is {seed}"):
            seeded_noise([seed], (2,))


def test_a_model_without_features_is_evaluated_on_its_own(
    solver: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`cli_model:pair` is the same model as `cli_model:tiny`: the same RMSE, another distance."""
    sizes = ("--solver", solver, "--samples", 12, "--exact-nfe", 12, "--accurate-nfe", 8)
    pair = ("evaluate", "--model", "cli_model:pair", *sizes)
    found = answer(capsys, *pair, "--folder", tmp_path / "pair")
    known = answer(capsys, "evaluate", *TINY, *sizes, "--folder", tmp_path / "tiny")
    assert found["rmse"] == known["rmse"]
    assert found["distance"] == "Frechet distance (the model's own bottleneck)"
    assert known["distance"] == "Frechet distance (the model's own features)"
    assert "to_accurate" in found and "to_data" not in found and "to_data" in known
    find = importlib.util.find_spec
    without = lambda name, *rest: None if name == "torchmetrics" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    alone = answer(capsys, *pair, "--folder", tmp_path / "alone")
    assert alone["rmse"] == known["rmse"] and alone["distance"] is None


def test_values_serve_where_there_is_no_bottleneck() -> None:
    from dlms_engine import Denoiser
    from dlms_engine.lab.evaluation.own_features import own_features

    denoiser = Denoiser(lambda x, _t: x, processes.EDM(), "data")
    images = own_features(denoiser, (3, 16, 16))
    assert "averaged to 8 x 8" in images.label
    assert images(torch.ones(2, 3, 16, 16)).shape == (2, images.num_features)
    vectors = own_features(denoiser, (2000,))
    assert vectors(torch.ones(2, 2000)).shape == (2, 256) == (2, vectors.num_features)
