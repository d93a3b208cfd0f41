"""Every public path on the stand-in device: no mixed devices, no host read but the allowed ones, and
the numbers of the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dlms_engine as dlms
from dlms_engine.lab.evaluation.frechet import FrechetDistance, feature_sums
from dlms_engine.models.embedded import embedded_features
from fake_device.allowed import ALLOWED, SAMPLING
from fake_device.models import SHAPE, SHORT, denoiser, table
from fake_device.standin import standin


def on_host(x: Any) -> Tensor:
    """The numbers of a tensor on the stand-in device."""
    assert x.device.type == "gpu"
    numbers: Tensor = x.numbers
    return numbers


# -- sampling ---------------------------------------------------------------------------------------


def learned(method: str, made: dlms.Denoiser) -> Any:
    """An untrained policy: what matters is where it runs."""
    from dlms_engine.learners.amed.objective import Amed
    from dlms_engine.learners.amed.settings import AmedSettings
    from dlms_engine.learners.dlms.objective import Dlms
    from dlms_engine.learners.dlms.settings import DlmsSettings

    if method == "table":
        return table(made.process)
    if method == "dlms":
        return Dlms(made, DlmsSettings(nfe=5), SHAPE).policy
    solver = "amed" if method == "amed" else "ipndm"
    return Amed(made, AmedSettings(nfe=5, solver=solver), SHAPE).policy


@pytest.mark.parametrize("method", ["table", "dlms", "amed", "plugin"])
def test_sample(method: str) -> None:
    here = denoiser()
    expected = dlms.Sampler(here, learned(method, here), backend="eager").sample(range(3), SHAPE)
    with standin(*SAMPLING):
        there = denoiser("gpu")
        found = dlms.Sampler(there, learned(method, there)).sample(range(3), SHAPE)
    assert torch.equal(on_host(found), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"memory_format": torch.channels_last},
        {"dynamic_thresholding": 0.99},
        {"classes": 4, "guidance_scale": 2.0},
    ],
    ids=lambda options: "-".join(options),
)
def test_sample_options(options: dict[str, Any]) -> None:
    options = dict(options)
    labels = {"class_labels": torch.tensor([1, 2])} if "classes" in options else {}
    if labels:
        options["unconditional"] = {"class_labels": torch.tensor([4])}
    here = denoiser(**options)
    sampler = dlms.Sampler(here, table(here.process), backend="eager")
    expected = sampler.sample(range(2), SHAPE, **labels)
    with standin(*SAMPLING):
        there = denoiser("gpu", **options)
        far = {key: value.to("gpu") for key, value in labels.items()}
        found = dlms.Sampler(there, table(there.process)).sample(range(2), SHAPE, **far)
    assert torch.allclose(on_host(found), expected, rtol=1e-4, atol=1e-4)


def test_noise_from_the_cpu_is_moved_once_and_a_trajectory_stays() -> None:
    noise = 80.0 * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    with standin(*SAMPLING):
        there = denoiser("gpu")
        sampler = dlms.Sampler(there, table(there.process))
        end, states = sampler(noise, return_trajectory=True)
    assert torch.equal(on_host(states)[0], noise)
    assert torch.equal(on_host(states)[-1], on_host(end))


# -- learning ---------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "dlms": ("dlms", {"teacher_interpolation": 1, "last_step": "bottleneck"}, {"host_numbers": 1}),
    "dlms, endpoint": ("dlms", {"endpoint_share": 1.0, "endpoint_steps": 6}, {"host_numbers": 1}),
    "amed": ("amed", {"endpoint_share": 0.0}, {"host_numbers": 3}),
    "amed, endpoint": ("amed", {"endpoint_share": 1.0}, {"host_numbers": 1}),
    "plugin": ("amed", {"solver": "ipndm", "endpoint_share": 0.0}, {"host_numbers": 3}),
    "free_table": ("free_table", {"teacher_steps": 6}, {"host_numbers": 1, "rows_down": 1}),
    "free_table, trajectory": (
        "free_table",
        {"loss": "trajectory", "interpolation": 1},
        {"host_numbers": 1, "rows_down": 2},
    ),
}
"""Learner, settings, and the reads of one update; AMED steps its optimiser three times in it."""


def distilled(method: str, device: str, updates: int, settings: dict[str, Any]) -> Any:
    return dlms.distill(
        denoiser(device), method, nfe=5, shape=SHAPE, progress=False,
        trajectories=4 * updates, **SHORT, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_learners_with_updates(name: str) -> None:
    method, settings, reads = CASES[name]
    with standin(*ALLOWED) as short:
        distilled(method, "gpu", 1, settings)
    with standin(*ALLOWED) as long:
        solver = distilled(method, "gpu", 3, settings)
    more = {key: value - short.reads[key] for key, value in long.reads.items()}
    per_update = {f"support.transfer.{key}": 2 * value for key, value in reads.items()}
    assert {key: value for key, value in more.items() if value} == per_update
    expected = distilled(method, "cpu", 3, settings)
    losses = [[entry.get("loss", 0.0) for entry in s.history] for s in (solver, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert solver.best["score"] == pytest.approx(expected.best["score"], rel=1e-3)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ld3", {"train": 2, "validation": 2, "rounds": 1, "rounds_times": 1, "teacher_nfe": 6}),
        ("dode", {"batch": 4}),
        ("gits", {"trajectories": 4, "batch": 4, "points": 11}),
    ],
)
def test_learners_of_tables(method: str, settings: dict[str, Any]) -> None:
    options: dict[str, Any] = {"nfe": 5, "shape": SHAPE, "progress": False, **settings}
    with standin(*ALLOWED):
        found = dlms.distill(denoiser("gpu"), method, **options).policy
    expected = dlms.distill(denoiser(), method, **options).policy
    assert found.times.device.type == found.a.device.type == "cpu"
    for name in ("a", "b", "times"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-4)


def test_a_checkpoint_goes_on(tmp_path: Any) -> None:
    settings = {
        "method": "dlms",
        **SHORT,
        "teacher_interpolation": 0,
        "nfe": 5,
        "shape": SHAPE,
        "progress": False,
    }
    path = tmp_path / "solver.safetensors"
    from dlms_engine.learners.training.trainer import Trainer

    whole = Trainer._update
    done: list[int] = []

    def stops(self: Trainer) -> dict[str, float]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return whole(self)

    with standin(*ALLOWED):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Trainer, "_update", stops)
            dlms.distill(denoiser("gpu"), trajectories=16, output=path, **settings)
        dlms.distill(denoiser("gpu"), trajectories=16, output=path, resume=True, **settings)
    one = dlms.distill(denoiser(), trajectories=16, **settings)
    two = dlms.load_solver(path)
    for key, tensor in one.policy.state()[0].items():
        assert torch.allclose(two.policy.state()[0][key], tensor, rtol=1e-3, atol=1e-4)


# -- evaluation -------------------------------------------------------------------------------------


def test_frechet_sums() -> None:
    images = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = feature_sums(embedded_features()(images))
    with standin(*ALLOWED):
        distance = FrechetDistance(embedded_features("gpu"), device="gpu")
        distance.update(images.to("gpu"))
        sums = distance.sums
    for found, wanted in zip(sums, expected, strict=True):
        assert found.device.type == "cpu"
        assert torch.allclose(found.double(), wanted.double())
