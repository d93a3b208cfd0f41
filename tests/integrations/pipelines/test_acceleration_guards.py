"""``accelerate`` on pipelines that were changed: hooks, compiled networks, caches, other schedulers."""

from __future__ import annotations

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
import tiny_pipelines as tiny  # noqa: E402

from dlms_engine import grids, solvers  # noqa: E402
from dlms_engine.integrations.diffusers import DLMSScheduler, accelerate  # noqa: E402
from dlms_engine.integrations.pipelines.interception import Interception  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
ASKED = {"height": 16, "width": 16, "num_inference_steps": 4}


def images(pipe: Any, seed: int = 3, **extra: Any) -> torch.Tensor:
    inputs = {**tiny.sd_inputs(), **ASKED, "generator": torch.Generator().manual_seed(seed)}
    return torch.as_tensor(pipe(**{**inputs, **extra}).images)


def stepped(pipe: Any) -> torch.Tensor:
    original = pipe.scheduler
    pipe.scheduler = DLMSScheduler.from_config(original.config, solver="unipc")
    expected = images(pipe)
    pipe.scheduler = original
    return expected


def runs(pipe: Any, acceleration: Any) -> torch.Tensor:
    """The third call: the loop is the engine's if it ever is."""
    images(pipe)
    images(pipe)
    return images(pipe)


def test_a_hook_that_changes_the_networks_output_counts() -> None:
    """Forward hooks were bypassed."""
    pipe = tiny.sd()
    plain = stepped(pipe)

    def louder(_m: Any, _a: Any, output: Any) -> Any:
        return tuple(1.3 * o for o in output) if isinstance(output, tuple) else output

    pipe.unet.register_forward_hook(louder)
    expected = stepped(pipe)
    assert (expected - plain).abs().max() > 0.1
    acceleration = accelerate(pipe, solver="unipc")
    torch.testing.assert_close(runs(pipe, acceleration), expected, rtol=0, atol=1e-5)
    assert acceleration.report().whole_loop


def test_a_compiled_network() -> None:
    """``torch.compile(pipe.unet)`` raised."""
    pipe = tiny.sd()
    expected = stepped(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    acceleration = accelerate(pipe, solver="unipc")
    torch.testing.assert_close(runs(pipe, acceleration), expected, rtol=0, atol=1e-5)
    acceleration.undo()
    torch.testing.assert_close(stepped(pipe), expected, rtol=0, atol=1e-5)


def test_a_cache_stays_step_by_step() -> None:
    pipe = tiny.flux()
    config = diffusers.FirstBlockCacheConfig(threshold=0.1)
    asked = {"num_inference_steps": 4}

    def run() -> torch.Tensor:
        return torch.as_tensor(pipe(**{**tiny.flux_inputs(), **asked}).images)

    pipe.transformer.enable_cache(config)
    original = pipe.scheduler
    pipe.scheduler = DLMSScheduler.from_config(original.config, solver="unipc")
    expected = run()
    pipe.scheduler = original
    acceleration = accelerate(pipe, solver="unipc")
    for _ in range(3):
        torch.testing.assert_close(run(), expected, rtol=0, atol=1e-5)
    assert "cache" in acceleration.report().reason


def test_a_cache_that_is_switched_on_later() -> None:
    """The recorded loop called the network outside the context its cache needs, and raised."""
    pipe = tiny.flux()

    def run() -> torch.Tensor:
        return torch.as_tensor(pipe(**{**tiny.flux_inputs(), "num_inference_steps": 4}).images)

    original = pipe.scheduler
    pipe.scheduler = DLMSScheduler.from_config(original.config, solver="unipc")
    plain = run()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.9))
    cached = run()
    pipe.transformer.disable_cache()
    assert (plain - cached).abs().max() > 1e-3
    pipe.scheduler = original
    acceleration = accelerate(pipe, solver="unipc")
    for _ in range(2):
        torch.testing.assert_close(run(), plain, rtol=0, atol=1e-5)
    assert acceleration.report().whole_loop
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.9))
    for _ in range(2):
        torch.testing.assert_close(run(), cached, rtol=0, atol=1e-5)
    assert "cache" in acceleration.report().reason
    pipe.transformer.disable_cache()
    torch.testing.assert_close(run(), plain, rtol=0, atol=1e-5)
    assert acceleration.report().whole_loop


def test_training_mode_counts_only_with_dropout() -> None:
    pipe = tiny.sd()
    pipe.unet.train()
    expected = stepped(pipe)
    acceleration = accelerate(pipe, solver="unipc")
    torch.testing.assert_close(runs(pipe, acceleration), expected, rtol=0, atol=1e-5)
    assert acceleration.report().whole_loop
    acceleration.undo()
    next(m for m in pipe.unet.modules() if isinstance(m, torch.nn.Dropout)).p = 0.1
    acceleration = accelerate(pipe, solver="unipc")
    images(pipe)
    assert "dropout" in acceleration.report().reason


def test_clipping_stays_step_by_step() -> None:
    """``clip_sample`` was ignored by the loop."""
    pipe = tiny.unconditional("DDPM")
    pipe.scheduler = diffusers.DDPMScheduler(clip_sample=True)
    acceleration = accelerate(pipe, solver="ddim")
    pipe(num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0))
    assert "clips" in acceleration.report().reason


def test_a_noise_model_that_is_not_understood_keeps_the_pipelines_scheduler(caplog: Any) -> None:
    pipe = tiny.sd()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(
        **tiny.SD_CONFIG, algorithm_type="sde-dpmsolver++"
    )
    original, expected = pipe.scheduler, images(pipe)
    with caplog.at_level(logging.WARNING):
        acceleration = accelerate(pipe, solver="unipc")
    assert "algorithm_type" in caplog.text and pipe.scheduler is original
    assert torch.equal(images(pipe), expected)
    assert "algorithm_type" in acceleration.report().reason
    acceleration.undo()


def test_what_only_our_scheduler_refuses_runs_with_the_pipelines_own(caplog: Any) -> None:
    """Nothing raises that diffusers itself runs; what diffusers refuses still raises."""
    pipe = tiny.sd()
    expected = images(pipe, eta=0.5)
    acceleration = accelerate(pipe, solver="unipc")
    pipe.scheduler.step = _refuse
    with caplog.at_level(logging.WARNING):
        assert torch.equal(images(pipe, eta=0.5), expected)
    assert "its own scheduler runs" in acceleration.report().reason
    with pytest.raises(ValueError, match="divisible by 8"):
        images(pipe, height=17)


def _refuse(*_args: Any, **_kwargs: Any) -> Any:
    raise ValueError("a step that cannot be taken")


def test_a_learned_solver_is_kept() -> None:
    pipe = tiny.sd()
    process = DLMSScheduler.from_config(pipe.scheduler.config).noise_model.process
    table = solvers.unipc(process, grids.time_uniform(process, 4), order=2)
    pipe.scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver=table)
    acceleration = accelerate(pipe)
    assert pipe.scheduler.solver is table
    acceleration.undo()


def test_a_directory_is_a_solver(tmp_path: Any) -> None:
    pipe = tiny.sd()
    process = DLMSScheduler.from_config(pipe.scheduler.config).noise_model.process
    table = solvers.unipc(process, grids.time_uniform(process, 4), order=2)
    DLMSScheduler.from_config(pipe.scheduler.config, solver=table).save_pretrained(tmp_path)
    expected = DLMSScheduler.from_config(pipe.scheduler.config, solver=table)
    found = DLMSScheduler.from_config(pipe.scheduler.config, solver=str(tmp_path))
    for scheduler in (expected, found):
        scheduler.set_timesteps(4)
    assert torch.equal(expected.sigmas, found.sigmas)


def test_callers_in_threads_get_their_own_pictures() -> None:
    """One accelerated pipeline, several threads: 19 of 72 pictures were another caller's."""
    pipe = tiny.sd()
    accelerate(pipe, solver="unipc")
    expected = [images(pipe, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: images(pipe, seed), range(8)))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_copy_of_a_module_is_not_listened_to() -> None:
    calls: list[int] = []

    def listener(_m: Any, original: Any, args: Any, kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    module = torch.nn.Linear(2, 2)
    interception = Interception(module, listener)
    x = torch.ones(1, 2)
    other = copy.deepcopy(module)
    assert type(other) is torch.nn.Linear
    assert torch.equal(module(x), other(x)) and calls == [1]
    interception.remove()
    assert type(module) is torch.nn.Linear


class Memory:
    """What a pipeline hands its network from step to step, such as a cache of keys and values."""

    value: Any = None


class Remembering(torch.nn.Module):
    """A network that adds a part of what the first call of a run left in ``memory``."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, cross_attention_kwargs: Any = None, **kwargs: Any) -> Any:
        output, memory = self.inner(*args, **kwargs), cross_attention_kwargs["memory"]
        if memory.value is None:
            memory.value = output[0].clone()
        return (output[0] + 0.1 * memory.value, *output[1:])


def test_an_object_that_remembers_stays_step_by_step() -> None:
    """The loop was given the dry run's cache, which nobody had filled: it raised."""

    def run(pipe: Any) -> torch.Tensor:
        return images(pipe, cross_attention_kwargs={"memory": Memory()})

    pipe = tiny.sd()
    pipe.unet = Remembering(pipe.unet)
    original = pipe.scheduler
    pipe.scheduler = DLMSScheduler.from_config(original.config, solver="unipc")
    expected = run(pipe)
    pipe.scheduler = original
    acceleration = accelerate(pipe, solver="unipc")
    for _ in range(3):
        torch.testing.assert_close(run(pipe), expected, rtol=0, atol=1e-5)
    assert "Memory, which may remember earlier calls" in acceleration.report().reason


def test_a_loop_that_fails_goes_on_step_by_step(monkeypatch: Any, caplog: Any) -> None:
    """Whatever the engine's loop raises, the pipeline's own run is still there, and it is said."""
    from dlms_engine.integrations.pipelines import acceleration as module

    pipe = tiny.sd()
    expected = stepped(pipe)
    acceleration = accelerate(pipe, solver="unipc")
    images(pipe)
    monkeypatch.setattr(module, "WholeLoop", _refuse)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(images(pipe), expected, rtol=0, atol=1e-5)
    assert "the engine's loop failed: ValueError: a step that cannot be taken" in caplog.text
    assert "failed" in acceleration.report().reason
    torch.testing.assert_close(images(pipe), expected, rtol=0, atol=1e-5)
