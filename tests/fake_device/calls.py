"""The public calls on a device by name, small; each returns what has to be equal on every device."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import commands
import torch
from cli_model import tiny

import dlms_engine as dlms

TINY = "cli_model:tiny"
SIZES = ("--samples", "4", "--exact-nfe", "8", "--accurate-nfe", "6", "--batch", "4")


def _denoiser(device: str, **options: Any) -> tuple[dlms.Denoiser, tuple[int, ...]]:
    held = tiny()
    held.denoiser.network.to(device, **options)  # type: ignore[union-attr]
    return held.denoiser, held.shape


def _sampled(device: str, around: Callable[[], AbstractContextManager[Any]], **options: Any) -> Any:
    denoiser, shape = _denoiser(device, **options)
    process = denoiser.process
    table = dlms.solvers.ipndm(process, dlms.grids.polynomial(process, 4), order=3)
    with around():
        return [dlms.Sampler(denoiser, table).sample(range(3), shape)]


def inference_mode(device: str, _folder: Path) -> Any:
    return _sampled(device, torch.inference_mode)


def autocast(device: str, _folder: Path) -> Any:
    return _sampled(device, lambda: torch.autocast(device, dtype=torch.bfloat16))


def by_dtype(device: str, _folder: Path) -> Any:
    return _sampled(device, nullcontext, dtype=torch.bfloat16)


def recommend(device: str, _folder: Path) -> Any:
    denoiser, shape = _denoiser(device)
    start = dlms.recommend(denoiser, 3, shape, effort="lean", progress=False)
    return [start.ranking[0].rmse, start.proof.disagreement]


def auto(device: str, folder: Path) -> Any:
    denoiser, shape = _denoiser(device)
    solver = dlms.distill(
        denoiser, "auto", nfe=3, shape=shape, budget="40000calls", held_out=8, samples=64,
        output=folder / "auto.safetensors", progress=False,
    )  # fmt: skip
    report = solver.report
    assert {"base", "table", "corrector"} <= {stage["name"] for stage in report["stages"]}
    return [report["rmse"], *(stage["rmse"] for stage in report["stages"])]


def _command(device: str, *arguments: object) -> None:
    placed = (*arguments, "--model", TINY, "--device", device)
    assert commands.run(*placed) == 0, placed


def evaluate(device: str, folder: Path) -> Any:
    _command(device, "evaluate", "--nfe", 3, *SIZES, "--folder", folder, "--json")
    return []


def record(device: str, folder: Path) -> Any:
    few = ("--nfe", 3, "--full-nfe", 3, "--screen-samples", 2, "--exact-samples", 4)
    _command(device, "evaluate", "--record", *few, *SIZES, "--folder", folder)
    return _figures(folder / "record.json")


def compare(device: str, folder: Path) -> Any:
    few = ("--nfe", 3, "--methods", "dode", "--budget", 4000)
    few += ("--exact-samples", 4, "--screen-samples", 2)  # type: ignore[assignment]
    _command(device, "compare", *few, *SIZES, "--folder", folder)
    return _figures(folder / "compare.json")


def _figures(path: Path) -> list[float]:
    return [row["rmse"] for row in json.loads(path.read_text())["rows"]]


def accelerate(device: str, _folder: Path) -> Any:
    """Latents of a pipeline: recorded in the first call, the whole loop in the second."""
    import tiny_pipelines

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = tiny_pipelines.sd().to(device)
        acceleration = dlms.accelerate(pipe, solver="unipc")
        size = {"height": 16, "width": 16, "num_inference_steps": 4}
        found = [pipe(**tiny_pipelines.sd_inputs(), **size).images for _ in range(2)]
    assert acceleration.report().whole_loop, acceleration.report()
    return found


def scheduler(device: str, _folder: Path) -> Any:
    from dlms_engine.integrations.diffusers import DLMSScheduler

    stepper = DLMSScheduler(solver="ipndm")
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 8, 8, generator=generator).to(device) * stepper.init_noise_sigma
    outputs = [torch.randn(2, 4, 8, 8, generator=generator) for _ in range(5)]
    stepper.set_timesteps(5, device=device)
    for t, output in zip(stepper.timesteps, outputs, strict=True):
        stepper.scale_model_input(x, t)
        x = stepper.step(output.to(device), t, x, return_dict=False)[0]
    return [x]


def k_diffusion(device: str, _folder: Path) -> Any:
    from dlms_engine.integrations import k_diffusion as sampling

    def model(x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> torch.Tensor:
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    sigmas = torch.tensor([14.0, 5.0, 1.5, 0.4, 0.05, 0.0])
    start = 14.0 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return [sampling.sample_dlms(model, start.to(device), sigmas, disable=True)]


CALLS: dict[str, Callable[[str, Path], Any]] = {
    call.__name__: call
    for call in (
        inference_mode, autocast, by_dtype, recommend, auto, evaluate, record, compare, accelerate,
        scheduler, k_diffusion,
    )
}  # fmt: skip
RUNS = {"inference_mode", "autocast", "by_dtype", "scheduler", "k_diffusion"}
"""Those that only sample, and read nothing."""
