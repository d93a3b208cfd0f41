"""``accelerate``: only the network's first input is scaled for a pipeline that has not scaled it yet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
import tiny_pipelines as tiny  # noqa: E402

from dlms_engine import grids, solvers  # noqa: E402
from dlms_engine.integrations.diffusers import DLMSScheduler, accelerate  # noqa: E402
from dlms_engine.integrations.pipelines import recording  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = {"num_inference_steps": 3}


class Encoder(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.mean(dim=(2, 3))


class WithImages(diffusers.StableDiffusionXLPipeline):
    """Encodes an image after ``set_timesteps``, as SDXL does for IP-Adapters."""

    @property
    def components(self) -> dict[str, Any]:
        return {**super().components, "image_encoder": self.encoder}

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(float(self.encoder(torch.ones(1, 3, 4, 4)).mean()))
        return super().prepare_latents(*args, **kwargs)


def encoded(case: str) -> list[float]:
    pipe = tiny.sdxl()
    pipe.__class__ = WithImages
    pipe.encoder, pipe.seen = Encoder(), []
    options = {"solver_options": {"afs": True}}
    if case == "edm":
        pipe.scheduler, options = diffusers.EDMEulerScheduler(), {}
    acceleration = accelerate(pipe, solver="ipndm", **options)
    for _ in range(2):  # recorded, then in the engine's loop
        pipe(**tiny.sdxl_inputs(), height=16, width=16, **STEPS)
    assert acceleration.report().whole_loop
    return list(pipe.seen)


@pytest.mark.parametrize("case", ["edm", "analytical first step"])
def test_an_image_encoder_gets_the_image(case: str) -> None:
    """In the recorded run it was given the image times the scale of the latents, 1 / 80 for EDM."""
    assert encoded(case) == [1.0, 1.0]


def test_an_image_that_is_scaled_is_seen(monkeypatch: Any) -> None:
    def everything(args: Any, kwargs: Any, factor: float) -> Any:
        return tuple(a * factor if isinstance(a, Tensor) else a for a in args), kwargs

    monkeypatch.setattr(recording, "scaled_first", everything)
    first, second = encoded("edm")
    assert first < 0.1 and second == 1.0


class Unusual(diffusers.DDIMPipeline):
    """Calls its network with names that no pipeline of diffusers uses."""

    def __call__(self, steps: int = 4, seed: int = 0) -> Tensor:
        x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            with torch.no_grad():
                x = self.scheduler.step(self.unet(noisy=x, level=t), t, x).prev_sample
        return x


class Network(nn.Module):
    def forward(self, noisy: Tensor, level: Tensor) -> Tensor:
        return torch.sin(noisy + level / 1000)


def test_a_network_that_is_not_known_in_time_is_refused() -> None:
    """Its first input went unscaled into a row for a scaled one."""
    pipe = tiny.unconditional("DDIM")
    pipe.__class__, pipe.unet = Unusual, Network()
    process = DLMSScheduler.from_config(pipe.scheduler.config).noise_model.process
    with_afs, without = (
        solvers.ddim(process, grids.time_uniform(process, 4 + afs), afs=afs)
        for afs in (True, False)
    )
    acceleration = accelerate(pipe, solver=with_afs)
    with pytest.raises(ValueError, match="unet is not known by a tensor and a time"):
        pipe()
    acceleration.undo()
    accelerate(pipe, solver=without)
    assert torch.allclose(pipe(), pipe(), atol=1e-5)
