"""A pipeline's modules, scheduler and random generators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def module_components(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's components that are modules, by name; each module once."""
    parts = dict(getattr(pipe, "components", {}))
    found: dict[str, nn.Module] = {}
    for name, part in parts.items():
        if isinstance(part, nn.Module) and not any(part is other for other in found.values()):
            found[name] = part
    return found


def scheduler_of(pipe: Any) -> Any:
    """The scheduler that ``pipe``'s own loop steps.

    Raises:
        ValueError: it has none, or other pipelines inside it have the loops (Kandinsky's combined ones).
    """
    name, scheduler = type(pipe).__name__, getattr(pipe, "scheduler", None)
    if not hasattr(scheduler, "config"):
        raise ValueError(
            f"{name} has no scheduler: expected a diffusers pipeline with its components loaded"
        )
    inner = [
        key
        for key, part in vars(pipe).items()
        if hasattr(part, "components") and getattr(part, "scheduler", None) is scheduler
    ]
    if inner:
        raise ValueError(
            f"{name} runs other pipelines, which step its scheduler: pass pipe.{' or pipe.'.join(inner)}"
        )
    return scheduler


def set_scheduler(pipe: Any, scheduler: Any) -> None:
    """Makes ``scheduler`` the pipeline's, also for modular pipelines."""
    if hasattr(pipe, "update_components") and not hasattr(type(pipe), "scheduler"):
        pipe.update_components(scheduler=scheduler)
    else:
        pipe.scheduler = scheduler


def rewinder(generators: list[torch.Generator]) -> Callable[[], None]:
    """A function that puts every random generator back to where it is now."""
    states = [g.get_state() for g in generators]
    shared = torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def rewind() -> None:
        torch.set_rng_state(shared)
        if devices:
            torch.cuda.set_rng_state_all(devices)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

    return rewind
