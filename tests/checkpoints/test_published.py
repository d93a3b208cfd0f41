"""Learned solvers of others: each file gives the published rule's samples, or is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

import published_rules as rules
from amed_problem import CASES, SUFFIX, problem, reference, reference_predictor, start_noise
from analytic import GaussianMixture
from published_cases import (
    EPD_HEUN,
    IPNDM,
    agree,
    dyweight_weights,
    epd_parameters,
    ld3_times,
    noise,
    sample,
    values,
)
from published_files import (
    amed_file,
    dyweight_file,
    dyweight_flow_file,
    epd_file,
    gas_file,
    ld3_file,
    persistent,
    sampler_modules,
    write,
)
from test_edm import Call, writers  # noqa: F401

from dlms_engine.checkpoints.published import load_published, published_format
from dlms_engine.engine.sampler import Sampler
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.amed import AmedPolicy
from dlms_engine.policies.coordinates import EdmCoordinates
from dlms_engine.policies.distilled import load_solver
from dlms_engine.processes import EDM, Process, RectifiedFlow, VPDiscrete

LDM = VPDiscrete(betas=torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2)


@pytest.fixture(autouse=True)
def modules(writers: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    sampler_modules(monkeypatch)


def at_level(process: Process) -> rules.Denoise:
    return GaussianMixture(process)


# -- DyWeight ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_dyweight(rows: int, afs: bool, scaled: bool, tmp_path: Path) -> None:
    if rows == int(afs):
        return
    weights, count = dyweight_weights(rows), rows - int(afs)
    scales = 1 + values(count, seed=1, scale=0.05)
    path = dyweight_file(tmp_path / "s.pkl", weights, scales if scaled else None, afs=afs)
    solver = load_published(path)
    assert (solver.method, solver.nfe, published_format(path)) == ("dyweight", count, "DyWeight")
    wanted = rules.dyweight(
        at_level(EDM()),
        rules.powers(rows + 1),
        weights.double(),
        scales.double() if scaled else torch.ones(count).double(),
        noise(),
        afs=afs,
    )
    assert agree(sample(solver), wanted)
    assert load_solver(solver.save(tmp_path / "s.safetensors")).settings == solver.settings


def test_dyweight_of_a_latent_model_runs_on_the_models_levels(tmp_path: Path) -> None:
    weights, scales = dyweight_weights(4), 1 + values(4, seed=1, scale=0.05)
    settings = {"dataset_name": "ms_coco", "schedule_type": "discrete", "schedule_rho": 1.0}
    path = dyweight_file(tmp_path / "s.pkl", weights, scales, **settings, guidance_rate=7.5)
    with pytest.raises(
        ValueError, match="made for ms_coco, whose noise levels are not in the file"
    ):
        load_published(path)
    solver = load_published(path, LDM)
    times = torch.linspace(1, 0.001, 5, dtype=torch.float64)
    levels = LDM.sigma_over_alpha(times)
    wanted = rules.dyweight(
        at_level(EDM()), levels, weights.double(), scales.double(), noise(), afs=False
    )
    assert agree(sample(solver, LDM), wanted)
    assert solver.settings["guidance_rate"] == 7.5


def test_dyweight_of_a_flow(tmp_path: Path) -> None:
    weights, scales = dyweight_weights(5) * 0.95, 1 + values(5, seed=1, scale=0.01)
    scales[0] = 1.012  # published files call the network above t = 1
    path = dyweight_flow_file(tmp_path / "s.pt", weights, scales)
    args = (weights.double(), scales.double(), noise())
    wanted = rules.dyweight_flow(at_level(RectifiedFlow()), *args, 1.15)
    assert agree(sample(load_published(path), RectifiedFlow()), wanted)
    other = rules.dyweight_flow(at_level(RectifiedFlow()), *args, 0.5)
    assert agree(sample(load_published(path, mu=0.5)), other)
    assert not agree(other, wanted)
    denoiser = Denoiser(Velocity(), RectifiedFlow(), "flow")
    found = Sampler(denoiser, load_published(path), dtype=torch.float64)(noise())
    assert agree(found, wanted)


class Velocity(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        data = GaussianMixture(RectifiedFlow())(x, t.double())
        return (x - data) / t[:, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.ones(3, 3)[:, :2]}, "hybrid_weights has shape"),
        ({"weights": torch.full((3, 3), float("nan"))}, "not finite"),
        ({"weights": torch.eye(3, dtype=torch.int64)}, "not floating|expected floating"),
        ({"scales": torch.ones(2)}, "t_scale has shape"),
        ({"scales": torch.zeros(3)}, "calls the network at level 0"),
        ({"num_steps": 1 << 40}, "num_steps is"),
        ({"num_steps": "4"}, "num_steps is '4'"),
        ({"afs": 1}, "afs is 1, expected bool"),
        ({"schedule_type": "cosine"}, "grid is 'cosine'"),
        ({"schedule_type": "discrete"}, "expected VPDiscrete"),
        ({"dataset_name": "lsun_bedroom"}, "made for lsun_bedroom"),
    ],
)
def test_a_wrong_dyweight_file_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given = {"weights": torch.tril(torch.ones(3, 3)), "scales": torch.ones(3), "num_steps": 4}
    path = dyweight_file(tmp_path / "s.pkl", **(given | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_published(path)
    assert str(path) in str(caught.value) and "DyWeight" in str(caught.value)


# -- EPD -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("student", ["epd", "ipndm"])
@pytest.mark.parametrize("points", [1, 2, 3])
@pytest.mark.parametrize("afs", [False, True])
def test_epd(student: str, points: int, afs: bool, tmp_path: Path) -> None:
    parameters = epd_parameters(4, points)
    path = epd_file(tmp_path / "s.pkl", parameters, sampler_stu=student, afs=afs, fcn=afs)
    solver = load_published(path)
    assert solver.nfe == 4 * (1 + points) - int(afs)
    levels = rules.uniform_in_vp_time(5)
    wanted = rules.epd(
        at_level(EDM()),
        levels,
        {k: v.double() for k, v in parameters.items()},
        noise() * levels[0],
        order=3 if student == "ipndm" else 1,
        afs=afs,
        fcn=afs,
    )
    assert agree(sample(solver), wanted)
    assert load_solver(solver.save(tmp_path / "s.safetensors")).nfe == solver.nfe


@pytest.mark.parametrize("backend", ["flux", "sd3"])
def test_epd_of_a_flow(backend: str, tmp_path: Path) -> None:
    parameters = epd_parameters(3, 2)
    config: dict[str, Any] = {"sigma_max": 1.0, "sigma_min": 0.001, "resolution": 512}
    if backend == "flux":
        config["flowmatch_mu"] = 1.15
    settings = {"backend": backend, "backend_config": config, "schedule_type": "flowmatch"}
    path = epd_file(tmp_path / "s.pkl", parameters, dataset_name="ms_coco", **settings)
    options: dict[str, Any] = {}
    if backend == "sd3":
        options = {"shift": 3}
        with pytest.raises(ValueError, match="shift of its grid is not in the file"):
            load_published(path)
    u = torch.linspace(1, 0.001, 4, dtype=torch.float64)
    shift = torch.tensor(1.15).double().exp() if backend == "flux" else 3
    times = shift / (shift + 1 / u - 1)
    double = {k: v.double() for k, v in parameters.items()}
    flow = GaussianMixture(RectifiedFlow())
    wanted = rules.epd(flow, times, double, noise()) / (1 - times[-1])
    assert agree(sample(load_published(path, **options), RectifiedFlow()), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_points": 3}, r"r_params has shape \(4, 2\), expected \(4, 3\)"),
        ({"num_points": 1 << 30}, "num_points is"),
        ({"sampler_stu": "heun"}, "student is 'heun'"),
        ({"sampler_stu": "ipndm", "max_order": 9}, "max_order is 9"),
        ({"scale_time": 3.0}, "expected finite levels above 0"),
        ({"num_steps": 4}, r"r_params has shape \(4, 2\), expected \(3, 2\)"),
        ({"schedule_type": "flowmatch"}, "backend_config is None"),
        ({"backend": "flux"}, "which a flow does not have"),
    ],
)
def test_a_wrong_epd_file_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    parameters = epd_parameters(4, 2)
    parameters["scale_time_params"] = torch.full((4, 2), -9.0)
    with pytest.raises(ValueError, match=message):
        if change.get("sampler_stu") == "heun":
            held = {"model": persistent("EPD_predictor", parameters, EPD_HEUN)}
            load_published(write(tmp_path / "s.pkl", held))
        load_published(epd_file(tmp_path / "s.pkl", parameters, **change))


# -- AMED ----------------------------------------------------------------------------------------

STUDENTS = {"ddim": "euler", "dpm_solver_2": "dpm", "dpm_solver_pp": "dpmpp"}


def amed_settings(case: str) -> dict[str, Any]:
    base = CASES[case]
    return {
        "sampler_stu": STUDENTS.get(base.solver, base.solver),
        "max_order": base.order or 4,
        "predict_x0": base.prediction == "data",
        "lower_order_final": base.lower_order_final,
    }


@pytest.mark.parametrize("case", CASES)
def test_amed(case: str, tmp_path: Path) -> None:
    """Trajectories that the published code gave with these weights."""
    tensors = dict(reference_predictor().state_dict())
    solver = load_published(amed_file(tmp_path / "s.pkl", tensors, **amed_settings(case)))
    thresholds = case.startswith("dpmpp") and "_x0_" in case
    assert (solver.settings.get("dynamic_thresholding") == 0.995) == thresholds
    network, denoiser = problem()
    found = Sampler(denoiser, solver, dtype=torch.float64)(80 * start_noise())
    assert network.calls == solver.nfe == 6
    assert agree(found, reference(f"amed_{case}{SUFFIX}/x")[-1])
    assert load_solver(solver.save(tmp_path / "s.safetensors")).nfe == 6


def test_amed_predictors_are_single_precision(tmp_path: Path) -> None:
    tensors = {k: v.float() for k, v in reference_predictor().state_dict().items()}
    solver = load_published(amed_file(tmp_path / "s.pkl", tensors, afs=True))
    assert isinstance(solver.policy, AmedPolicy) and solver.nfe == 5
    assert solver.policy.predictor.fc_r.weight.dtype == torch.float32
    _, denoiser = problem()
    assert bool(Sampler(denoiser, solver)(80 * start_noise().float()).isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler_stu": "heun"}, "student is 'heun'"),
        ({"scale_dir": 0}, "do not fit the predictor"),
        ({"scale_dir": 2.0}, r"scale_dir is 2.0, expected a number in \[0, 1\)"),
        ({"dataset_name": "ms_coco"}, "made for ms_coco"),
        ({"max_order": 7, "sampler_stu": "ipndm"}, r"order is 7, expected 1..4"),
    ],
)
def test_a_wrong_amed_file_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors = dict(reference_predictor().state_dict())
    with pytest.raises(ValueError, match=message):
        load_published(amed_file(tmp_path / "s.pkl", tensors, **change))


def test_amed_that_scales_times_of_another_process_works_in_edms_coordinates(
    tmp_path: Path,
) -> None:
    """The official code runs every model so: its input is rescaled with the level it is told."""
    tensors = dict(reference_predictor().state_dict())
    path = amed_file(tmp_path / "s.pkl", tensors, dataset_name="ms_coco", schedule_type="discrete")
    solver = load_published(path, LDM)
    assert isinstance(solver.policy, EdmCoordinates) and solver.policy.process == LDM
    without = {k: v for k, v in tensors.items() if not k.startswith("fc_scale_time")}
    path = amed_file(tmp_path / "s.pkl", without, scale_time=0, schedule_type="discrete")
    assert load_published(path, LDM).policy.process == LDM


# -- LD3 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "order", "variant"),
    [
        *(("uni_pc", order, v) for order in (1, 2, 3) for v in ("bh1", "bh2")),
        *(("dpm_solver++", order, "bh1") for order in (1, 2, 3)),
        *(("ipndm", order, "bh1") for order in (2, 4)),
        ("euler", 1, "bh1"),
    ],
)
def test_ld3(name: str, order: int, variant: str, tmp_path: Path) -> None:
    grid, network = ld3_times(7)
    path = ld3_file(tmp_path / "best_v2.pt", grid, network)
    options: dict[str, Any] = {} if name == "euler" else {"order": order}
    if name == "uni_pc":
        options["variant"] = variant
    solver = load_published(path, solver=name, **options)
    assert (solver.method, solver.nfe, published_format(path)) == ("ld3", 6, "LD3")
    wanted = rules.ld3(at_level(EDM()), name, grid, network, 80 * noise(), order, variant)
    assert agree(sample(solver), wanted)
    assert load_solver(solver.save(tmp_path / "s.safetensors")).settings == solver.settings


def test_ends_in_single_precision_are_the_processs_own(tmp_path: Path) -> None:
    grid, network = ld3_times(5)
    off = grid.float() * (1 + 3e-7)
    solver = load_published(
        ld3_file(tmp_path / "b.pt", off, network.float()), solver="ipndm", order=2
    )
    assert solver.policy.grid[[0, -1]].tolist() == [80.0, 0.002]


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ([80.0, 1.0, 0.002], {}, "the file holds times only: --set solver="),
        ([80.0, 1.0, 0.002], {"solver": "heun"}, "ignores the learned ones"),
        ([80.0, 1.0, 0.002], {"solver": "dpm_solver"}, "ratios of its stages are not in the file"),
        ([80.0, 1.0, 0.002], {"solver": "ipndm", "order": 9}, "order is 9"),
        ([80.0, 1.0, 0.002], {"solver": "ipndm"}, "order of ipndm is not in the file"),
        ([80.0, 1.0, 0.002], {"solver": "uni_pc", "order": 2}, "variant of uni_pc is not in"),
        ([80.0, 1.0, 0.002], {**IPNDM, "variant": "bh1"}, "variant is not an option"),
        ([80.0, 1.0, 1.0], IPNDM, "strictly decreasing"),
        ([1.0, 0.5, 0.001], IPNDM, "a model's own, not noise levels"),
        ([1.0], IPNDM, "not a grid and as many times"),
    ],
)
def test_a_wrong_ld3_file_or_setting_is_refused(
    grid: list[float], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    times = torch.tensor(grid, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        load_published(ld3_file(tmp_path / "b.pt", times, times), **options)


def test_ld3_of_a_latent_model(tmp_path: Path) -> None:
    times = torch.linspace(1, 0.001, 6, dtype=torch.float64)
    path = ld3_file(tmp_path / "b.pt", times, times)
    solver = load_published(path, LDM, solver="uni_pc", order=2, variant="bh2")
    assert solver.policy.process == LDM
    with pytest.raises(ValueError, match="steps in EDM's levels"):
        load_published(path, LDM, solver="euler")


# -- GAS -----------------------------------------------------------------------------------------


def gas_parameters(steps: int, order: int) -> list[Tensor]:
    small = [values(steps, seed=5 + i, scale=0.02) for i in range(2 * order)]
    return [values(steps - 1, seed=3, scale=0.3) + 1, values(steps, seed=4, scale=2e-4), *small]


@pytest.mark.parametrize(("steps", "order"), [(2, 1), (2, 2), (4, 3), (4, 4), (6, 6), (6, 3)])
def test_gas(steps: int, order: int, tmp_path: Path) -> None:
    parameters = gas_parameters(steps, order)
    path = gas_file(tmp_path / "10000.pt", parameters)
    solver = load_published(path, t_eps=0.001)
    assert (solver.method, solver.nfe, published_format(path)) == ("gs", steps, "GAS")
    double = [value.double() for value in parameters]
    assert agree(sample(solver, EDM()), rules.gas(at_level(EDM()), double, noise(), 0.001))
    assert load_solver(solver.save(tmp_path / "s.safetensors")).nfe == steps


def test_gas_on_a_variance_preserving_network_is_the_same_solver(tmp_path: Path) -> None:
    """The VP line that EDM networks are given is the network's own process here."""
    from dlms_engine.processes import VP

    parameters = gas_parameters(4, 4)
    solver = load_published(gas_file(tmp_path / "1.pt", parameters), VP(), t_eps=0.001)
    wanted = rules.gas(at_level(EDM()), [p.double() for p in parameters], noise(), 0.001)
    assert agree(sample(solver, VP()), wanted)


@pytest.mark.parametrize(
    ("parameters", "process", "options", "message"),
    [
        (gas_parameters(4, 3), None, {}, "t_eps is None; the last time is not in the file"),
        (gas_parameters(4, 3), None, {"t_eps": 2.0}, "t_eps is 2.0"),
        (gas_parameters(4, 3), RectifiedFlow(), {"t_eps": 0.001}, "the model is a flow"),
        (gas_parameters(4, 3)[:-1], None, {"t_eps": 0.001}, "7 tensors for 4 steps"),
        (gas_parameters(4, 3)[1:], None, {"t_eps": 0.001}, "tensors for 4 steps"),
        (gas_parameters(2, 3), None, {"t_eps": 0.001}, "8 tensors for 2 steps"),
        (gas_parameters(4, 3), None, {"t_eps": 0.001, "mu": 1}, "mu is not an option"),
    ],
)
def test_a_wrong_gas_file_or_setting_is_refused(
    parameters: list[Tensor],
    process: Process | None,
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=message):
        load_published(gas_file(tmp_path / "1.pt", parameters), process, **options)
