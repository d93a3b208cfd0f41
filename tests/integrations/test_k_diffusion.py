"""Samplers with k-diffusion's signature, and the ComfyUI nodes on a stand-in of its interface."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from comfy_standin import EpsSampling, FlowSampling, Model, install
from torch import Tensor

from dlms_engine import grids, processes, solvers
from dlms_engine.engine.sampler import Sampler
from dlms_engine.integrations.k_diffusion import get_sigmas_dlms, sample_dlms
from dlms_engine.models.denoiser import Denoiser

STD = 0.5  # of the Gaussian data of the exact models below
NAMES = ["ddim", "dpm_solver_pp", "unipc", "deis", "ipndm", "heun"]


def gaussian(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
    """E[x0 | x] for data N(0, STD^2) in the space x0 + sigma z."""
    s = sigma.reshape(-1, 1, 1, 1)
    return STD**2 / (STD**2 + s**2) * x


def gaussian_flow(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
    """E[x0 | x] in the space (1 - sigma) x0 + sigma z."""
    s = sigma.reshape(-1, 1, 1, 1)
    return (1 - s) * STD**2 / ((1 - s) ** 2 * STD**2 + s**2) * x


def noise(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("solver", NAMES)
def test_arrives_at_the_data(solver: str) -> None:
    """Exact answer: the state shrinks with the standard deviation of the marginal."""
    sigmas = get_sigmas_dlms(40, 0.02, 20.0)
    z = noise()
    found = sample_dlms(gaussian, z * 20.0, sigmas, disable=True, solver=solver)
    exact = z * 20.0 * STD / (STD**2 + 20.0**2) ** 0.5
    assert (found - exact).abs().max() < (0.1 if solver == "ddim" else 0.012)


@pytest.mark.parametrize("solver", NAMES)
def test_flow_models_use_their_own_log_snr(solver: str) -> None:
    sigmas = get_sigmas_dlms(40, sigma_max=1.0, schedule="uniform")
    z = noise()
    found = sample_dlms(gaussian_flow, z, sigmas, disable=True, solver=solver, flow=True)
    assert (found - z * STD).abs().max() < (0.1 if solver == "ddim" else 0.015)


@pytest.mark.parametrize("solver", ["dpm_solver_pp", "unipc"])
def test_flow_is_the_engines_flow(solver: str) -> None:
    """At few steps it matters which log-SNR the exponential integrator runs in."""
    process = processes.RectifiedFlow()
    grid = grids.shifted(process, 6)
    options = {"order": 2}
    table = solvers.make_solver(solver, process, grid, **options)
    expected = Sampler(Denoiser(gaussian_flow, process, "data"), table)(noise())
    sigmas = get_sigmas_dlms(6, sigma_max=1.0, schedule="shifted")
    torch.testing.assert_close(sigmas, grid.float())
    settings: dict[str, Any] = {"disable": True, "solver": solver}
    found = sample_dlms(gaussian_flow, noise(), sigmas, flow=True, **settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    wrong = sample_dlms(gaussian_flow, noise(), sigmas, flow=False, **settings)
    assert (wrong - expected).abs().max() > 1e-3


def test_euler_is_eulers_method() -> None:
    sigmas = get_sigmas_dlms(5, 0.1, 10.0)
    x = noise() * 10.0
    found = sample_dlms(gaussian, x, sigmas, disable=True, solver="ddim")
    for s, t in itertools.pairwise(sigmas):
        x = x + (x - gaussian(x, s.expand(2))) / s * (t - s)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-6)


def test_callback_and_extra_arguments() -> None:
    seen: list[dict[str, Any]] = []
    asked: list[Tensor] = []

    def model(x: Tensor, sigma: Tensor, *, cond: str) -> Tensor:
        assert cond == "yes" and sigma.shape == (2,)
        asked.append(sigma)
        return gaussian(x, sigma)

    sigmas = get_sigmas_dlms(4, 0.1, 10.0)
    sample_dlms(model, noise() * 10, sigmas, {"cond": "yes"}, seen.append, True, solver="unipc")
    assert [s["i"] for s in seen] == [0, 1, 2, 3]
    assert set(seen[0]) == {"x", "i", "sigma", "sigma_hat", "denoised"}
    torch.testing.assert_close(torch.stack([s["sigma"] for s in seen]), sigmas[:-1])
    assert torch.equal(seen[0]["x"], noise() * 10)  # the state before the step, not overwritten
    torch.testing.assert_close(torch.stack(asked)[:, 0], sigmas[:-1])


@pytest.mark.parametrize("maker", ["dpm_solver_pp", "ipndm"])
@pytest.mark.parametrize("afs", [False, True])
def test_a_table_of_a_vp_model_runs_in_sigma_space(maker: str, afs: bool) -> None:
    process = processes.VP()
    table = solvers.make_solver(maker, process, grids.time_uniform(process, 6), afs=afs)

    def network(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (c(t).float().reshape(-1, 1, 1, 1) for c in (process.alpha, process.sigma))
        return torch.sin(x) * 0.1 + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        t = process.inverse_sigma(sigma)
        return network(process.alpha(t).float().reshape(-1, 1, 1, 1) * x, t)

    start = noise() * float(process.sigma(process.t_max))
    expected = Sampler(Denoiser(network, process, "data"), table)(start)
    sigmas = get_sigmas_dlms(solver=table)
    alpha = float(process.alpha(process.t_max))
    found = sample_dlms(model, start / alpha, sigmas, disable=True, solver=table)
    end = float(process.alpha(process.t_min))
    torch.testing.assert_close(found * end, expected, rtol=0, atol=2e-4)


def test_a_late_start_takes_the_end_of_the_solver() -> None:
    process = processes.EDM(0.02, 20.0)
    table = solvers.dpm_solver_pp(process, grids.polynomial(process, 6), order=3)
    sigmas = get_sigmas_dlms(solver=table)
    data, z = noise(), noise().flip(0)
    start = data + float(sigmas[3]) * z
    found = sample_dlms(lambda x, s: data, start, sigmas[3:], disable=True, solver=table)
    torch.testing.assert_close(found, data + 0.02 * z, rtol=0, atol=1e-5)


def test_misuse_is_named() -> None:
    process = processes.EDM(0.02, 20.0)
    table = solvers.ddim(process, grids.polynomial(process, 4))
    with pytest.raises(ValueError, match="get_sigmas_dlms"):
        sample_dlms(gaussian, noise(), get_sigmas_dlms(4, 0.1, 9.0), disable=True, solver=table)
    with pytest.raises(ValueError, match="decreasing"):
        sample_dlms(gaussian, noise(), torch.tensor([2.0, 1.0, 1.5]), disable=True)
    with pytest.raises(ValueError, match="at most 1"):
        sample_dlms(gaussian, noise(), torch.tensor([2.0, 0.0]), disable=True, flow=True)
    with pytest.raises(ValueError, match="n is 3"):
        get_sigmas_dlms(3, solver=table)
    with pytest.raises(ValueError, match="schedule"):
        get_sigmas_dlms(3, schedule="other")  # type: ignore[arg-type]
    shifted = solvers.ddim(
        process, grids.polynomial(process, 4), network_times=grids.polynomial(process, 4) * 0.9
    )
    with pytest.raises(ValueError, match="other times"):
        sample_dlms(
            gaussian, noise(), get_sigmas_dlms(solver=shifted), disable=True, solver=shifted
        )


# -- ComfyUI --------------------------------------------------------------------------------------


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_nodes_give_sampler_and_sigmas(comfy: None, kind: str) -> None:
    from dlms_engine.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
    sampling, denoise = (
        (FlowSampling(), gaussian_flow) if kind == "flow" else (EpsSampling(), gaussian)
    )
    model = Model(sampling, denoise)
    sampler_node, sigmas_node = (NODE_CLASS_MAPPINGS[n]() for n in ("DLMSSampler", "DLMSSigmas"))
    assert "dpm_solver_pp" in sampler_node.INPUT_TYPES()["required"]["solver"][0]
    (sampler,) = sampler_node.get_sampler(solver="unipc", order=4)
    (sigmas,) = sigmas_node.get_sigmas(model, 30, 1.0)
    assert sigmas.shape == (31,) and sigmas[-1] == 0 and sigmas.device.type == "cpu"
    steps: list[int] = []
    start = noise() * sigmas[0]
    out = sampler.sample(model, sigmas, start, lambda i, *_: steps.append(i))
    high = float(sigmas[0])
    exact = noise() * STD if kind == "flow" else start * STD / (STD**2 + high**2) ** 0.5
    assert steps == list(range(30)) and (out - exact).abs().max() < 0.03
    (half,) = sigmas_node.get_sigmas(model, 10, 0.5)
    assert half.shape == (11,) and half[0] < sigmas[0]


def test_nodes_read_solver_files(comfy: None, tmp_path: Any) -> None:
    from dlms_engine.integrations.comfyui.nodes import DLMSSampler, DLMSSigmas
    from dlms_engine.policies.distilled import save_solver

    process = processes.EDM(0.0292, 14.6146)
    table = solvers.dpm_solver_pp(process, grids.polynomial(process, 5), order=2)
    path = str(save_solver(tmp_path / "five.safetensors", table))
    model = Model(EpsSampling(), gaussian)
    (sampler,) = DLMSSampler().get_sampler("ddim", 2, path)
    (sigmas,) = DLMSSigmas().get_sigmas(model, 1, 1.0, path)
    assert sigmas.shape == (6,)
    out = sampler.sample(model, sigmas, noise() * sigmas[0], lambda *_: None)
    assert bool(out.isfinite().all())


def test_the_samplers_are_in_ksamplers_list(comfy: None) -> None:
    import comfy.samplers
    from comfy.k_diffusion import sampling

    from dlms_engine.integrations.comfyui.ksampler import register_samplers

    names = register_samplers()
    assert register_samplers() == names  # a second load adds nothing
    assert "dlms_unipc" in names
    assert comfy.samplers.KSampler.SAMPLERS.count("dlms_unipc") == 1
    assert comfy.samplers.KSAMPLER_NAMES.count("dlms_unipc") == 1
    sigmas = get_sigmas_dlms(6)
    start = noise() * sigmas[0]
    found = sampling.sample_dlms_unipc(gaussian, start, sigmas, disable=True)
    assert torch.equal(found, sample_dlms(gaussian, start, sigmas, disable=True, solver="unipc"))


def test_a_solver_file_is_checked_when_loaded_and_read_again_when_changed(tmp_path: Any) -> None:
    from dlms_engine.integrations.comfyui.nodes import DLMSSampler, DLMSSigmas
    from dlms_engine.policies.distilled import save_solver

    assert DLMSSampler.VALIDATE_INPUTS("") is True
    # a path that comes from another node: ComfyUI gives None, and refused every such workflow
    assert DLMSSampler.VALIDATE_INPUTS(None) is True and DLMSSampler.IS_CHANGED(None) == ""
    assert "solver_file" in str(DLMSSampler.VALIDATE_INPUTS(str(tmp_path / "missing.safetensors")))
    process = processes.EDM(0.0292, 14.6146)
    path = tmp_path / "five.safetensors"
    save_solver(path, solvers.dpm_solver_pp(process, grids.polynomial(process, 5), order=2))
    assert DLMSSigmas.VALIDATE_INPUTS(str(path)) is True
    before = DLMSSampler.IS_CHANGED(solver_file=str(path), solver="ddim", order=2)
    assert before == DLMSSampler.IS_CHANGED(solver_file=str(path))
    save_solver(path, solvers.dpm_solver_pp(process, grids.polynomial(process, 6), order=2))
    assert DLMSSampler.IS_CHANGED(solver_file=str(path)) != before


def test_a_split_schedule_keeps_its_order_up_to_the_split() -> None:
    """SplitSigmas: the first part ended with a first-order step, as if the picture were finished."""
    sigmas = get_sigmas_dlms(8)
    start = noise() * sigmas[0]
    seen: list[Tensor] = []
    sample_dlms(
        gaussian, start, sigmas, None, lambda d: seen.append(d["x"].clone()), True, solver_order=2
    )
    half = sample_dlms(gaussian, start, sigmas[:5], disable=True, solver_order=2)
    assert (half - seen[4]).abs().max() < 1e-5 * seen[4].abs().max()


def test_two_evaluation_solvers_count_the_schedules_steps() -> None:
    """ComfyUI's progress went to 11 of 6."""
    steps: list[int] = []
    sigmas = get_sigmas_dlms(6)
    sample_dlms(
        gaussian, noise() * sigmas[0], sigmas, None, lambda d: steps.append(d["i"]), True,
        solver="heun",
    )  # fmt: skip
    assert max(steps) == 5 and steps == sorted(steps)


@pytest.mark.parametrize("flow", [False, True])
def test_a_flipped_schedule_runs_from_data_to_noise(flow: bool) -> None:
    """FlipSigmas raised. There and back with many steps is where it began."""
    denoise = gaussian_flow if flow else gaussian
    sigmas = (
        get_sigmas_dlms(400, 0.01, 1.0 if flow else 10.0, schedule="shifted")
        if flow
        else (get_sigmas_dlms(400, 0.01, 10.0))
    )
    flipped = sigmas.flip(0).clone()
    flipped[0] = 1e-4
    data = noise() * STD
    there = sample_dlms(denoise, data, flipped, disable=True, flow=flow)
    back = sample_dlms(denoise, there, sigmas, disable=True, flow=flow, solver="ddim")
    assert (back - data).abs().max() < 0.05


def test_the_node_pack_is_complete() -> None:
    """What ComfyUI's manager and its users look for in a folder of custom_nodes."""
    import json
    from pathlib import Path

    import dlms_engine.integrations.comfyui as pack

    folder = Path(pack.__file__).parent
    assert "dlms-engine" in (folder / "requirements.txt").read_text()
    assert "[tool.comfy]" in (folder / "pyproject.toml").read_text()
    assert "custom_nodes" in (folder / "README.md").read_text()
    workflow = json.loads((folder / "example_workflow.json").read_text())
    used = {node["class_type"] for node in workflow.values()}
    assert set(pack.NODE_CLASS_MAPPINGS) <= used
    for node in workflow.values():
        kind = pack.NODE_CLASS_MAPPINGS.get(node["class_type"])
        if kind is not None:
            asked = kind.INPUT_TYPES()
            assert set(node["inputs"]) == {*asked["required"], *asked["optional"]}


def test_the_workflows_picture_shows_every_node(tmp_path: Any) -> None:
    """docs/images/comfyui-workflow.png is drawn from the workflow by scripts/draw_workflow.py."""
    pytest.importorskip("matplotlib")
    import importlib.util
    import json
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    where = importlib.util.spec_from_file_location("drawn", root / "scripts/draw_workflow.py")
    assert where is not None and where.loader is not None
    module = importlib.util.module_from_spec(where)
    where.loader.exec_module(module)
    workflow = json.loads(module.WORKFLOW.read_text())
    boxes = module.place(workflow)
    assert set(boxes) == set(workflow)
    for name, node in workflow.items():  # every link runs to the right
        assert all(boxes[source][0] < boxes[name][0] for source in module.links(node).values())
    module.draw(workflow, tmp_path / "again.png")
    assert (tmp_path / "again.png").stat().st_size > 10_000 and module.PICTURE.exists()
