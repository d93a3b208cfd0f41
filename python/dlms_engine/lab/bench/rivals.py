"""One steady-state `scheduler.step` of diffusers, for comparison: eager or under torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlms_engine import solvers
from dlms_engine.engine import steps
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.ops import layout, reference
from dlms_engine.processes import VPDiscrete
from dlms_engine.solvers.table import SolverTable

STEPS = 20
AT = 12
"""The step that is timed: the middle of a run, history full, full order."""

RIVALS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++2M": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "DPM++3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "UniPC-2": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "DEIS-2": ("DEISMultistepScheduler", {"solver_order": 2}),
    "Euler": ("EulerDiscreteScheduler", {}),
}
MAKERS: dict[str, Callable[..., SolverTable]] = {
    "DPM++2M": solvers.dpm_solver_pp,
    "UniPC-2": solvers.unipc,
}
"""The engine's makers of the same solvers, both called with ``order=2``."""

TRAIN_STEPS = 1000
BETAS = (1e-4, 0.02)
"""Ends of the linear beta schedule that diffusers' schedulers have by default."""

_STATE = ("_step_index", "model_outputs", "timestep_list", "lower_order_nums", "last_sample")


def absence() -> str | None:
    """Why diffusers' schedulers cannot be had, or None if they can."""
    try:
        import diffusers

        for class_name, _ in RIVALS.values():
            getattr(diffusers, class_name)
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        # RuntimeError: diffusers' lazy import wraps what a module lacked in one.
        return f"diffusers cannot be imported ({first_line(error)}): pip install diffusers"
    return None


def first_line(error: BaseException) -> str:
    """Type and first line of an error's message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def available_rivals() -> bool:
    """Whether diffusers is installed."""
    return absence() is None


def version() -> str | None:
    """Version of diffusers, or None."""
    if not available_rivals():
        return None
    import diffusers

    return str(diffusers.__version__)


def _scheduler(name: str, device: torch.device | str) -> Any:
    import diffusers

    class_name, options = RIVALS[name]
    scheduler = getattr(diffusers, class_name)(num_train_timesteps=TRAIN_STEPS, **options)
    scheduler.set_timesteps(STEPS, device=device)
    return scheduler


def output(f: Tensor, n: int) -> Tensor:
    """What stands for the network's output at step n: f at step `AT`, less of it before.

    A constant output would not do: every exponential integrator is exact on it.
    """
    return f * ((n + 1) / (AT + 1))


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return [_clone(v) for v in value] if isinstance(value, list) else copy.copy(value)


@dataclass
class _Set:
    """Buffers of one step: what a call is given, and the scheduler's state before it."""

    f: Tensor
    latent: Tensor
    state: dict[str, Any]


class Stepper:
    """Step `AT` of `STEPS`, again and again: ``stepper(i)`` takes it on set ``i`` of the buffers.

    Args:
        name: of `RIVALS`.
        x, f: `[B, ...]` state at the start and network output of the timed step; the state keeps
            f's dtype, as a pipeline's does.
        sets: copies of all buffers, so that they can rotate through more than a cache.
    """

    def __init__(self, name: str, x: Tensor, f: Tensor, sets: int = 1) -> None:
        self.scheduler = _scheduler(name, x.device)
        self._step: Callable[..., Any] = self.scheduler.step
        latent = x.to(f.dtype)
        with torch.no_grad():
            for n, t in enumerate(self.scheduler.timesteps[:AT]):
                self.scheduler.scale_model_input(latent, t)
                latent = self.scheduler.step(output(f, n), t, latent, return_dict=False)[0]
        self._t = self.scheduler.timesteps[AT]
        state = {k: v for k, v in vars(self.scheduler).items() if k in _STATE}
        self._sets = [_Set(f.clone(), latent.clone(), _clone(state)) for _ in range(sets)]

    def compiled(self, backend: str) -> Stepper:
        """A copy whose step runs under ``torch.compile``, with every traced graph counted."""
        from torch._dynamo.backends.registry import lookup_backend

        other = copy.copy(self)
        other.graphs = 0
        inner = lookup_backend(backend)

        def count(module: Any, inputs: Any) -> Any:
            other.graphs += 1
            return inner(module, inputs)

        other._step = torch.compile(self.scheduler.step, backend=count, dynamic=False)
        return other

    graphs: int = 0
    """Graphs that torch.compile has made of the step so far."""

    def __call__(self, i: int = 0) -> Tensor:
        """The next state, `[B, ...]` in f's dtype."""
        held = self._sets[i % len(self._sets)]
        for key, value in held.state.items():
            setattr(self.scheduler, key, value.copy() if isinstance(value, list) else value)
        out: Tensor = self._step(held.f, self._t, held.latent, return_dict=False)[0]
        return out


def forget_compiled() -> None:
    """Drops what torch.compile has compiled so far.

    Too many schedulers in one process, and torch.compile runs the next one eagerly without a word.
    """
    import torch._dynamo

    torch._dynamo.reset()


def step_call(name: str, x: Tensor, f: Tensor) -> Callable[[], object]:
    """A call that takes step `AT` of `STEPS` again and again; see `Stepper`."""
    stepper = Stepper(name, x, f)
    with torch.no_grad():
        stepper()
    return stepper


def rows(name: str) -> Tensor:
    """The engine's rows of the same run, `[STEPS, 6 + depth]` float32: noise prediction.

    Noise levels are diffusers' default ones, its times those of `STEPS` linearly spaced steps.
    """
    betas = torch.linspace(*BETAS, TRAIN_STEPS, dtype=torch.float64)
    process = VPDiscrete(betas=betas)
    indices = torch.linspace(0, TRAIN_STEPS - 1, STEPS + 1, dtype=torch.float64).round().flip(0)
    grid = torch.cat([(indices[:-1] + 1) / TRAIN_STEPS, torch.zeros(1, dtype=torch.float64)])
    table = MAKERS[name](process, grid, order=2)
    denoiser = Denoiser(nn.Identity(), process, prediction="noise")
    return steps.plan_table(denoiser, table, torch.float32, torch.device("cpu")).rows


def disagreement(name: str, x: Tensor, f: Tensor, rows: Tensor) -> float:
    """How far the engine's state after step `AT` is from diffusers', relative to the largest entry.

    x, f: `[B, ...]` float32, start and network output (see `output`); rows: as by `rows`.
    """
    theirs = Stepper(name, x, f)()
    ring = x.new_zeros((layout.depth_of(rows.shape[1]), *x.shape))
    ours, scaled = x.clone(), torch.empty_like(f)
    for n, row in enumerate(rows[: AT + 1].to(x.device)):
        reference.fused_row_(output(f, n), None, ours, ring, row, scaled)
    return float((ours - theirs).abs().max() / theirs.abs().max())
