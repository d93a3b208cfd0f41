"""AMED's files, static tables, refused settings and presets."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from amed_problem import (
    problem,
    run,
    start_noise,
)

from dlms_engine import grids, solvers
from dlms_engine.engine.sampler import Sampler
from dlms_engine.learners import distill
from dlms_engine.learners.amed.objective import Amed
from dlms_engine.learners.amed.settings import AmedSettings
from dlms_engine.learners.dlms.settings import DlmsSettings
from dlms_engine.learners.dlms.teacher import TeacherSettings
from dlms_engine.learners.presets import PRESETS
from dlms_engine.learners.registry import preset
from dlms_engine.learners.settings import split_settings
from dlms_engine.learners.training.trainer import TrainerSettings
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.amed import AmedPolicy
from dlms_engine.policies.amed_formulas import AmedBase
from dlms_engine.policies.amed_predictor import AmedPredictor
from dlms_engine.policies.distilled import load_solver, save_solver
from dlms_engine.processes import EDM


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_solver_file_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    _, denoiser = problem()
    predictor = AmedPredictor(64, 0.01, 0.2).to(dtype)
    base = AmedBase("dpm_solver_pp", 2, "noise", lower_order_final=False, afs=True)
    policy = AmedPolicy(predictor, base, EDM(), grids.logsnr(EDM(), 3))
    x = 80 * start_noise().float()
    loaded = load_solver(save_solver(tmp_path / "amed.safetensors", policy))
    assert isinstance(loaded, AmedPolicy) and loaded.base == base
    assert torch.equal(Sampler(denoiser, loaded)(x), Sampler(denoiser, policy)(x))


def test_damaged_states_are_refused() -> None:
    policy = AmedPolicy(AmedPredictor(64), AmedBase(), EDM(), grids.polynomial(EDM(), 3))
    tensors, settings = policy.state()
    for broken in (
        {k: v for k, v in tensors.items() if k != "fc_r.bias"},
        {k: v for k, v in tensors.items() if k != "grid"},
        {**tensors, "extra": torch.zeros(1)},
        {**tensors, "fc_r.weight": torch.zeros(1, 3)},
        {**tensors, "grid": tensors["grid"].flip(0)},
    ):
        with pytest.raises(ValueError):
            AmedPolicy.from_state(broken, settings)
    with pytest.raises(ValueError, match="solver"):
        AmedPolicy.from_state(tensors, {**settings, "base": {"solver": "euler"}})
    assert AmedPolicy.from_state(tensors, settings).nfe == 6  # the intact one loads


@pytest.mark.parametrize("nfe", [5, 6])
def test_static_table(tmp_path: Path, nfe: int) -> None:
    """Exact when all samples are told the same; close, not equal, when they are not."""
    _, denoiser = problem()
    x = 80 * start_noise()
    alike = distill(
        denoiser,
        "amed",
        nfe=nfe,
        shape=(16,),
        trajectories=64,
        progress=False,
        bottleneck=False,
        solver="ipndm",
        scale_time=0.2,
        output=tmp_path / "amed.safetensors",
        validation_samples=2,
        keep="learned",
    )
    table = alike.table(denoiser, x)
    assert table.nfe == nfe
    end, _ = run(denoiser, alike, x)
    torch.testing.assert_close(run(denoiser, table, x)[0], end, rtol=1e-10, atol=1e-10)
    loaded = load_solver(tmp_path / "amed.safetensors")
    assert torch.equal(run(denoiser, loaded, x)[0], end)
    varied = distill(
        denoiser,
        "amed",
        nfe=nfe,
        shape=(16,),
        trajectories=64,
        progress=False,
        solver="ipndm",
        scale_time=0.2,
        validation_samples=2,
        keep="learned",
    )
    gap = run(denoiser, varied.table(denoiser, x), x)[0] - run(denoiser, varied, x)[0]
    assert gap.abs().max() > 1e-9


def test_any_grid_drives_amed() -> None:
    """Explicit times and another solver's table; the teacher refines each of their steps."""
    process = EDM()
    table = solvers.ipndm(process, grids.logsnr(process, 3))
    for source in (table, table.grid.tolist()):
        settings = AmedSettings(nfe=6, grid=source)
        grid, fine = settings.grids(process)
        assert torch.equal(grid, table.grid) and torch.equal(fine[::2], grid)
    with pytest.raises(ValueError, match="expected"):
        AmedSettings(nfe=6, grid=(80.0, 0.002)).grids(process)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nfe": 5, "afs": False}, "odd nfe"),
        ({"nfe": 4, "afs": True}, "even one"),
        ({"nfe": 0}, "nfe is 0"),
        ({"solver": "unipc"}, "solver is 'unipc'"),
        ({"order": 2}, "fixed order"),
        ({"solver": "ipndm", "order": 5}, "1..4"),
        ({"solver": "dpm_solver_pp", "prediction": "velocity"}, "prediction is"),
        ({"teacher": "unipc"}, "teacher is 'unipc'"),
        ({"interpolation": -1}, "interpolation is -1"),
        ({"restart": "never"}, "restart is"),
        ({"scale_dir": 1.5}, "scale_dir is 1.5"),
        ({"momentum": 0.9}, "unknown setting 'momentum'"),
        ({"grid": "cosine"}, "grid is 'cosine'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    _, denoiser = problem()
    with pytest.raises(ValueError, match=message):
        distill(denoiser, "amed", shape=(16,), progress=False, trajectories=4, **settings)


def test_without_a_tap_every_sample_gets_the_same_choices(caplog: pytest.LogCaptureFixture) -> None:
    network, _ = problem()
    with caplog.at_level(logging.INFO, "dlms_engine"):
        learner = Amed(Denoiser(network, EDM(), "data"), AmedSettings(), (16,))
    assert "amed: the denoiser taps no module" in caplog.text
    assert not learner.policy.needs_features


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if p["method"] == "dlms"])
def test_dlms_presets_are_valid(name: str) -> None:
    settings = preset(name)
    settings.pop("method")
    settings.pop("trajectories")
    nested = {"teacher": TeacherSettings}
    own, shared = split_settings(settings, DlmsSettings, TrainerSettings, nested=nested)
    assert settings.get("order") in (None, DlmsSettings(**own).resolved_order)
    TrainerSettings(**shared)


def build(settings: dict[str, Any]) -> None:
    """What a run makes of a preset's settings before its first step."""
    settings = {k: v for k, v in settings.items() if k not in ("method", "trajectories")}
    own, shared = split_settings(settings, AmedSettings, TrainerSettings)
    made = AmedSettings(nfe=own.pop("nfe", 5), **own)
    made.teacher_table(EDM(), made.grids(EDM())[1])
    TrainerSettings(**shared)


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if p["method"] == "amed"])
def test_presets_are_valid(name: str) -> None:
    build(preset(name))


@pytest.mark.parametrize(
    "fault",
    [
        {"scale_tme": 0.2},
        {"teacher": "hen"},
        {"solver": "heun2"},
        {"grid": "quadratic"},
        {"batch": 0},
    ],
)
def test_a_wrong_preset_is_seen(fault: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(fault))):
        build({**preset("amed-cifar10"), **fault})
