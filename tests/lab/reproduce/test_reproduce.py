"""The papers' tables: their figures, the files they need, and runs on tiny random checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import cli_model
import commands
import paper_files
import pytest
import torch
from edm_files import writers  # noqa: F401
from torch import nn

from dlms_engine.engine.sampler import Sampler
from dlms_engine.lab.comparison.budget import counted
from dlms_engine.lab.reproduce import tables
from dlms_engine.lab.reproduce.data_sets import DATA_SETS
from dlms_engine.lab.reproduce.estimate import training_calls
from dlms_engine.lab.reproduce.models import PaperModel, drawn_labels, load_paper_model
from dlms_engine.lab.reproduce.page import reproduction_markdown
from dlms_engine.lab.reproduce.run import Reproduction, with_thresholding
from dlms_engine.lab.reproduce.settings import ReproduceSettings
from dlms_engine.learners import distill
from dlms_engine.learners.start.problem import rows_of
from dlms_engine.processes import EDM

pytest.importorskip("torchmetrics")
SMALL = {"trajectories": 4, "batch": 2, "validation_samples": 2, "validation_steps": 6}
SETTINGS = ReproduceSettings(
    samples=4, nfes=(4,), rows=("DEIS", "DLMS"), exact_samples=2, exact_nfe=6, accurate_nfe=4,
    batch=2, changes=SMALL,
)  # fmt: skip


@pytest.fixture
def cifar10() -> PaperModel:
    """A network that takes no time, where the file does not matter."""
    held = cli_model.tiny()
    return PaperModel(held.denoiser, held.shape)


def reproduction(
    model: PaperModel, folder: Path, name: str = "dlms-table5", **changes: Any
) -> Reproduction:
    table = tables.published_table(name)
    settings = dataclasses.replace(SETTINGS, **changes)
    return Reproduction(table, table.panel("cifar10"), model, folder, settings)


# -- what was published --------------------------------------------------------------------------


def test_every_row_can_be_made_or_is_published_only() -> None:
    for table in tables.published_tables().values():
        for data, panel in table.panels.items():
            assert data in DATA_SETS
            for row in panel.rows:
                assert row.figures and set(row.figures) <= set(panel.nfes)
                if row.preset is not None:
                    assert row.learner["method"] in ("dlms", "amed", "ld3", "dode", "gits")
                elif row.solver is not None and DATA_SETS[data].kind == "snapshot":
                    few = min(row.figures)
                    assert row.table(EDM(), few).nfe == few


def test_figures_that_stand_in_several_tables_agree() -> None:
    known: dict[Any, Any] = {}
    for table in tables.published_tables().values():
        for data, panel in table.panels.items():
            for row in panel.rows:
                if not row.runs_here or table.name.startswith("dode"):  # whose runs differ by 0.5
                    continue
                key = (data, row.solver, row.power, row.preset, json.dumps(row.settings))
                for nfe, figure in row.figures.items():
                    if row.solver is not None and table.name.startswith("ld3"):
                        continue  # its own measurements of the same solvers
                    assert known.setdefault((*key, nfe), figure) == figure, (table.name, row.name)
    best = tables.published_table("dlms-table1").panel(None).rows[-1].figures
    assert [figure.value for figure in best.values()] == [4.52, 3.23, 2.81, 2.53, 2.43, 2.37, 2.24]
    spread = tables.published_table("ld3-table6").panel(None).rows[4].figures[4]
    assert str(spread) == "25.78 ± 1.46"


def test_a_row_with_a_figure_too_few_is_seen() -> None:
    with pytest.raises(ValueError, match="shorter|longer"):
        tables._row({"row": "planted", "fid": "1 2"}, (4, 5, 6))


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="'dlms-table9', expected one of dlms-table1"):
        tables.published_table("dlms-table9")
    several = tables.published_table("dlms-table5")
    with pytest.raises(ValueError, match=r"data is None, dlms-table5 has cifar10, .* --data"):
        several.panel(None)


# -- models --------------------------------------------------------------------------------------


def test_every_sample_has_its_own_class(tmp_path: Path, writers: None) -> None:  # noqa: F811
    files = {"checkpoint": paper_files.snapshot(tmp_path / "adm.pkl", classes=paper_files.CLASSES)}
    model = load_paper_model(DATA_SETS["imagenet64"], files)
    labels = drawn_labels(paper_files.CLASSES)
    assert set(labels[:64].tolist()) == set(range(paper_files.CLASSES))
    assert torch.equal(rows_of(model.conditions, range(5, 9))["class_labels"], labels[5:9])
    with pytest.raises(ValueError, match="takes no class labels"):
        files = {"checkpoint": paper_files.snapshot(tmp_path / "song.pkl")}
        load_paper_model(DATA_SETS["imagenet64"], files)


def test_every_sample_has_its_own_prompt_and_guidance(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\nred sea\na dog\n")
    files = {"checkpoint": paper_files.stable_diffusion(tmp_path / "sd"), "prompts": prompts}
    model = load_paper_model(DATA_SETS["sd15"], files)
    assert model.denoiser.guidance_scale == 7.5 and model.shape == (4, 8, 8)
    table = tables.published_table("dlms-table5").panel("sd15").rows[1].table
    sampler = Sampler(model.denoiser, table(model.denoiser.process, 5))
    rows = rows_of(model.conditions, range(3))
    together = sampler.sample(range(3), model.shape, **rows)
    alone = sampler.sample([1], model.shape, **rows_of(model.conditions, [1]))
    assert torch.allclose(together[1:2], alone, atol=1e-4)
    other = sampler.sample([1], model.shape, **rows_of(model.conditions, [2]))
    assert not torch.allclose(together[1:2], other, atol=1e-3)  # planted: another prompt
    assert model.decode is not None and model.decode(together).shape == (3, 3, 16, 16)


def test_latent_and_pixel_pipelines_load(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    latent = load_paper_model(
        DATA_SETS["bedroom-ldm"], {"checkpoint": paper_files.ldm(tmp_path / "ldm")}
    )
    assert latent.decode is not None and latent.decode(torch.zeros(2, 3, 8, 8)).shape[1] == 3
    pixels = load_paper_model(
        DATA_SETS["ddpm-cifar10"], {"checkpoint": paper_files.ddpm(tmp_path / "ddpm")}
    )
    assert pixels.decode is None and pixels.shape == (3, 8, 8)


def test_guided_networks_load_with_the_classifier_s_gradient(tmp_path: Path) -> None:
    bedroom = {"checkpoint": paper_files.guided_edm(tmp_path / "edm_bedroom256_ema.pt")}
    model = load_paper_model(DATA_SETS["bedroom-pixel"], bedroom, side=8)
    assert isinstance(model.denoiser.process, EDM) and model.conditions is None
    paths = paper_files.guided(tmp_path / "256x256_diffusion.pt", tmp_path / "classifier.pt")
    files = dict(zip(("checkpoint", "classifier"), paths, strict=True))
    model = load_paper_model(DATA_SETS["imagenet256-adm"], files, side=8)
    x, t = torch.zeros(2, *model.shape), torch.tensor(0.5, dtype=torch.float64)
    rows = rows_of(model.conditions, range(2))
    guided = model.denoiser.predict(x, t, **rows)
    assert model.denoiser.last_features.shape == (2, 64)
    model.denoiser.network.scale = 0.0  # planted: no gradient
    assert not torch.allclose(model.denoiser.predict(x, t, **rows), guided, atol=1e-6)


def test_thresholding_is_the_rows_own(cifar10: PaperModel) -> None:
    variant = with_thresholding(cifar10.denoiser, 0.995)
    assert variant.dynamic_thresholding == 0.995
    assert cifar10.denoiser.dynamic_thresholding is None
    x = 80 * torch.randn(2, *cifar10.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(5.0, dtype=torch.float64)
    assert not torch.equal(variant.predict(x, t), cifar10.denoiser.predict(x, t))


# -- runs ----------------------------------------------------------------------------------------


def test_calls_are_counted_as_they_are_made(cifar10: PaperModel) -> None:
    work = reproduction(cifar10, Path(), "dlms-table1", rows=("GITS", "DLMS"))
    arguments = work.arguments(work.rows[-1])
    expected = training_calls(arguments, (4,), cifar10.denoiser.process)[4]
    assert isinstance(cifar10.denoiser.network, nn.Module)
    with counted(cifar10.denoiser.network) as calls:
        distill(cifar10.denoiser, nfe=4, shape=cifar10.shape, progress=False, **arguments)
    assert (expected.forward, expected.backward) == pytest.approx(
        (calls.forward, calls.backward), abs=4
    )


def test_a_killed_run_goes_on_to_the_same_table(
    cifar10: PaperModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(cifar10.denoiser.network, nn.Module)
    with counted(cifar10.denoiser.network) as whole:
        first = reproduction(cifar10, tmp_path / "whole")
        expected = first.run(progress=False)["rows"]
    made = 0

    def kill(*_: object) -> None:
        nonlocal made
        made += 1
        if made in (20, 50, 90):
            raise KeyboardInterrupt

    hook = cifar10.denoiser.network.register_forward_pre_hook(kill)
    again = 0
    with counted(cifar10.denoiser.network) as calls:
        while True:
            try:
                work = reproduction(cifar10, tmp_path / "killed")
                work.__dict__["estimate"] = first.estimate  # which takes most of a tiny run
                found = work.run(progress=False)["rows"]
                break
            except KeyboardInterrupt:
                again += 1
    hook.remove()
    assert again >= 2 and found == expected
    # a batch and the training's last updates are repeated, finished samples are not
    assert calls.forward < whole.forward + again * 60
    planted = reproduction(cifar10, tmp_path / "killed", first_seed=1, rows=("DEIS",))
    planted.__dict__["estimate"] = first.estimate
    assert planted.run(progress=False)["rows"][0] != expected[0]


def test_without_fid_the_page_says_so(cifar10: PaperModel, tmp_path: Path) -> None:
    work = reproduction(cifar10, tmp_path, rows=("UniPC",))
    result = work.run(progress=False)
    text = reproduction_markdown(result)
    assert "No FID was measured" in text and "45.20" in text
    assert "4 samples in place of 50,000" in text
    assert any("without the Inception distance" in note for note in work.notes(work.panel.rows[-1]))
    assert json.loads((tmp_path / "dlms-table5-cifar10.json").read_text())["rows"] == result["rows"]


@pytest.mark.parametrize("model", ["plane", "pair"])
def test_only_images_are_cut_to_their_values(model: str, tmp_path: Path) -> None:
    """Features of points beyond 1 were those of points at 1; planted: the second model's are images.

    The first one's network is a function, whose calls are counted, too.
    """
    denoiser, shape = getattr(cli_model, model)()
    meter = reproduction(PaperModel(denoiser, shape), tmp_path)._measurer(None)
    far, farther = torch.full((2, *shape), 3.0), torch.full((2, *shape), 4.0)
    same = torch.equal(meter.sums(far).total, meter.sums(farther).total)
    assert same == (model == "pair")
    with counted(meter.denoiser.network) as calls:
        meter.denoiser.predict(far, 1.0)
    assert calls.forward == 2


def test_a_refusal_leaves_the_other_rows(cifar10: PaperModel, tmp_path: Path) -> None:
    changes = {**SMALL, "nonsense": 1}
    result = reproduction(cifar10, tmp_path, changes=changes).run(progress=False)
    first, last = result["rows"]
    assert "distance" in first and "nonsense" in last["refused"]
    with pytest.raises(ValueError, match="rows has 'absent', which is part of none of: DEIS"):
        reproduction(cifar10, tmp_path, rows=("absent",))
    with pytest.raises(ValueError, match="nfe has 3, the table has 4, 5"):
        reproduction(cifar10, tmp_path, nfes=(3,))


# -- the command ---------------------------------------------------------------------------------


def test_the_list_and_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    listed = commands.answer(capsys, "reproduce")
    names = {entry["table"] for entry in listed["tables"]}  # type: ignore[attr-defined]
    assert names == set(tables.published_tables())
    said = commands.complaint(capsys, "reproduce", "dlms-table1")
    assert "edm-cifar10-32x32-uncond-vp.pkl (https://nvlabs-fi-cdn.nvidia.com" in said
    said = commands.complaint(capsys, "reproduce", "dlms-table5", "--data", "sd15")
    assert "6ce0161689b3853acaa0" in said and "--prompts" in said
    said = commands.complaint(capsys, "reproduce", "dlms-table1", "--fid-weights", "x.pth")
    assert "cifar10-32x32.npz" in said and "is missing" in said


def test_the_command_makes_a_page(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    writers: None,  # noqa: F811
) -> None:
    path = paper_files.snapshot(tmp_path / "edm-cifar10-32x32-uncond-vp.pkl")
    result = commands.answer(
        capsys, "reproduce", "amed-table2", "--data", "cifar10", "--checkpoint", path, "--nfe", 3,
        "--rows", "DDIM,EDM", "--samples", 4, "--batch", 2, "--exact-samples", 2, "--exact-nfe", 8,
        "--accurate-nfe", 4, "--folder", tmp_path / "out",
    )  # fmt: skip
    assert [row["row"] for row in result["rows"]] == ["DDIM", "EDM"]  # type: ignore[attr-defined]
    (held,) = result["files"]  # type: ignore[misc]
    assert len(held["sha256"]) == 64
    page = (tmp_path / "out" / "amed-table2-cifar10.html").read_text()
    assert "93.36" in page and "cannot be compared" in page
