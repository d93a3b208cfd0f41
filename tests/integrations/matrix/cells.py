"""One row of the matrix: a pipeline with its own scheduler, with ours, and accelerated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import extras
import images
import torch
import variants
import videos
from images import Case

from dlms_engine.integrations.diffusers import DLMSScheduler, accelerate

CASES: dict[str, Case] = {**images.CASES, **videos.CASES, **variants.CASES, **extras.CASES}
STEPS = 4
CLOSE = 2e-5  # of the largest value: float32 arithmetic in another order


@dataclass(frozen=True)
class Row:
    """Outcome of one case; differences are relative to the largest value.

    Attributes:
        original: the class of the pipeline's own scheduler.
        same: ``DLMSScheduler`` with the original's solver against the original; None where the
            engine has no such solver.
        refused: why ``DLMSScheduler`` does not take the config, or "".
        accelerated: largest difference of three accelerated runs from the step-by-step one.
        whole_loop: whether the engine ran the loop.
        reason: why not.
        calls: network calls of each step, in the recorded run.
    """

    name: str
    original: str
    same: float | None
    refused: str
    accelerated: float
    whole_loop: bool
    reason: str
    calls: list[int]


def output_of(pipe: Any, inputs: dict[str, Any]) -> torch.Tensor:
    result = pipe(**inputs)
    if isinstance(result, torch.Tensor):  # a modular pipeline's
        return result.float()
    for field in ("images", "frames", "prediction", "audios"):
        value = getattr(result, field, None)
        if value is not None:
            return torch.as_tensor(value).float()
    raise AssertionError(f"{type(result).__name__} has no field that is known here")


def relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    assert expected.shape == found.shape and bool(found.isfinite().all())
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-12))


def same_solver(scheduler: Any) -> str | None:
    """The solver's name under which the engine computes what ``scheduler`` computes."""
    name = type(scheduler).__name__
    if name == "FlowMatchEulerDiscreteScheduler" or name.startswith(("DDIM", "CogVideoXDDIM")):
        return "ddim"
    return {"UniPCMultistepScheduler": "unipc", "DPMSolverMultistepScheduler": "dpm_solver_pp"}.get(
        name
    )


def exact_times(scheduler: Any) -> Any:
    """A multistep flow scheduler that tells the network its times; diffusers' cuts off the fraction."""
    if not scheduler.config.get("use_flow_sigmas"):
        return scheduler

    class Exact(type(scheduler)):
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps

    Exact.__name__ = type(scheduler).__name__
    return Exact.from_config(scheduler.config)


def row(name: str, solver: str = "unipc") -> Row:
    make, inputs = CASES[name]
    pipe = make()
    original = pipe.scheduler = exact_times(pipe.scheduler)

    def run() -> torch.Tensor:
        return output_of(pipe, {**inputs(), "num_inference_steps": STEPS})

    plain = run()
    own, refused, same = same_solver(original), "", None
    try:
        if own is not None:
            pipe.scheduler = DLMSScheduler.from_config(original.config, solver=own)
            same = relative(plain, run())
        pipe.scheduler = DLMSScheduler.from_config(original.config, solver=solver)
        stepped = run()
    except ValueError as exc:
        refused, stepped = str(exc), plain
    pipe.scheduler = original
    acceleration = accelerate(pipe, solver=solver)
    outputs = [run() for _ in range(3)]
    report = acceleration.report()
    calls = report.kinds[-1].calls_per_step
    acceleration.undo()
    assert relative(plain, run()) == 0.0  # the pipeline is what it was
    worst = max(relative(stepped, output) for output in outputs)
    return Row(name, type(original).__name__, same, refused, worst, report.whole_loop,
               report.reason, calls)  # fmt: skip


if __name__ == "__main__":
    import sys
    import time

    torch.set_num_threads(1)
    for name in sys.argv[1:] or CASES:
        began = time.perf_counter()
        try:
            r = row(name)
            print(f"{name}: same {r.same} accelerated {r.accelerated:.1e} whole {r.whole_loop} "
                  f"{r.reason} refused {r.refused} calls {sorted(set(r.calls))} "
                  f"{time.perf_counter() - began:.1f} s", flush=True)  # fmt: skip
        except Exception as exc:
            print(f"{name}: {type(exc).__name__}: {exc}", flush=True)
