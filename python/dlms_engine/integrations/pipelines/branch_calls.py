"""Pipelines that call their network once per guidance branch, or two networks: calls joined as one.

Which call is the conditional one, and with what guidance, is read off recorded steps: from the
weights with which the pipeline mixes the calls' outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .calls import NotReplayed, path_name, same, solve_weights
from .interception import Interception
from .recording import Program, Recorder, SlotRecord

EXPERTS = ("transformer", "transformer_2")  # for early and for late times
MOST_RECORDED = 64


class Recording:
    """Listens to one run of ``pipe`` with its present ``DLMSScheduler``."""

    def __init__(self, pipe: Any) -> None:
        from .acceleration import module_components

        self.pipe = pipe
        parts = module_components(pipe)
        self.recorder = Recorder(list(parts), list(parts.values()))
        self._parts = list(parts.values())

    def runner(self, *arguments: Any) -> Any:
        """For the scheduler's ``set_timesteps``."""
        from .acceleration import SessionRunner

        made = SessionRunner(*arguments)
        made.session = self.recorder
        self.recorder.begin(made)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Recording:
        return self

    def run(self, arguments: dict[str, Any], steps: int = 2) -> Program:
        """``steps`` steps, recorded.

        Raises:
            ValueError: the pipeline's loop is not one of calls mixed linearly.
        """
        taps = []
        for number, module in enumerate(self._parts):

            def heard(_m: Any, original: Any, a: Any, k: Any, number: int = number) -> Any:
                return self.recorder.call(number, original, a, k)

            taps.append(Interception(module, heard))
        self.pipe.scheduler.run_with(self)
        try:
            with torch.no_grad():
                self.pipe(**{**arguments, "num_inference_steps": steps, "output_type": "latent"})
            return self.recorder.program()
        except NotReplayed as exc:
            raise ValueError(f"{type(self.pipe).__name__} cannot be distilled for: {exc}") from exc
        finally:
            self.pipe.scheduler.run_with(None)
            for tap in taps:
                tap.remove()


Joined = tuple[tuple[Any, ...], dict[str, Any], float | None]
"""Arguments of one call for all branches, the unconditional half first, and the guidance scale."""


def joined_branches(pipe: Any, arguments: dict[str, Any], prompts: int) -> Joined:
    """The calls of a pipeline that calls one network twice a step.

    Raises:
        ValueError: other than two calls of one network, guidance that changes with the step, or
            branches that differ in more than their tensors.
    """
    program = Recording(pipe).run(arguments)
    if len({slot.module for slots in program.order.values() for slot in slots}) > 1:
        raise ValueError(
            f"{type(pipe).__name__} calls other networks in other steps: distilling takes those that "
            "a boundary_ratio of the pipeline's config switches by time"
        )
    return _branches(pipe, program, sorted(program.order), prompts)


def boundary_of(pipe: Any) -> float | None:
    """The scheduler's time from which up ``transformer`` is called, below it ``transformer_2``.

    None where the pipeline does not switch networks by time.
    """
    ratio = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    networks = [getattr(pipe, name, None) for name in EXPERTS]
    if ratio is None or not all(isinstance(network, nn.Module) for network in networks):
        return None
    return float(ratio) * float(pipe.scheduler.config.num_train_timesteps)


def switched_branches(
    pipe: Any, arguments: dict[str, Any], prompts: int, boundary: float
) -> tuple[tuple[Any, ...], dict[str, Any], tuple[float | None, float | None]]:
    """The calls of a pipeline with two networks, which are given the same arguments.

    Returns:
        arguments of one call for all branches, and each network's guidance scale.

    Raises:
        ValueError: the pipeline does not switch at ``boundary``, or its networks' arguments differ.
    """
    steps = _steps_across(pipe, boundary)
    recording = Recording(pipe)
    program = recording.run(arguments, steps)
    name, times = type(pipe).__name__, pipe.scheduler.timesteps.tolist()
    early = [n for n in sorted(program.order) if times[n] >= boundary]
    late = [n for n in sorted(program.order) if times[n] < boundary]
    for expert, rows in zip(EXPERTS, (early, late), strict=True):
        called = {recording.recorder.names[slot.module] for n in rows for slot in program.order[n]}
        if called != {expert}:
            raise ValueError(
                f"{name} calls {sorted(called)} on {expert}'s side of its boundary, {boundary:g}"
            )
    first, second = (_branches(pipe, program, rows, prompts) for rows in (early, late))
    for (path, one), (_, two) in zip(*(_conditions(each) for each in (first, second)), strict=True):
        if not same(one, two):
            raise ValueError(f"{name} gives its two networks different {path_name(path)}")
    return first[0], first[1], (first[2], second[2])


def _conditions(call: Joined) -> list[tuple[Any, Any]]:
    """The arguments but for latents and time, with their paths."""
    found = pytree.tree_flatten_with_path((call[0], call[1]))[0]
    own = ("hidden_states", "sample", "timestep", "timesteps")
    return [(path, leaf) for path, leaf in found if path_name(path) not in own]


def _steps_across(pipe: Any, boundary: float) -> int:
    """The fewest steps with times on both sides of ``boundary``."""
    for steps in range(2, MOST_RECORDED + 1):
        pipe.scheduler.set_timesteps(steps)
        times = pipe.scheduler.timesteps.tolist()
        if times[0] >= boundary > times[-1]:
            return steps
    raise ValueError(
        f"{type(pipe).__name__} has no time on each side of its boundary, {boundary:g}, with 2 to "
        f"{MOST_RECORDED} steps: one of its networks is not used"
    )


def _branches(pipe: Any, program: Program, rows: list[int], prompts: int) -> Joined:
    """The calls of ``rows``, which are alike, as one."""
    name = type(pipe).__name__
    slots = program.order[rows[0]]
    if any(program.order[n] != slots for n in rows):
        raise ValueError(
            f"{name} makes other network calls in other steps: distilling needs the same"
        )
    if len(slots) > 2:
        raise ValueError(
            f"{name} makes {len(slots)} network calls a step: distilling takes one or two"
        )
    records = [program.slots[slot] for slot in slots]
    mixes = [solve_weights(program.products[n])[: len(slots)].tolist() for n in rows]
    first, last = mixes[0], mixes[-1]
    changes = max(abs(a - b) for a, b in zip(first, last, strict=True))
    if abs(sum(first) - 1) > 1e-2 or changes > 1e-2:
        raise ValueError(
            f"{name} mixes its branches with {mixes}: distilling needs one guidance scale"
        )
    if len(slots) == 1:
        args, kwargs = pytree.tree_unflatten(records[0].first, records[0].spec)
        return args, kwargs, None
    conditional = 0 if first[0] > first[1] else 1
    ordered = [records[1 - conditional], records[conditional]]
    return (*_joined(name, ordered, prompts), _stated(pipe, first[conditional]))


def _stated(pipe: Any, measured: float) -> float:
    """The scale the pipeline was given, where that is what was measured."""
    for attribute in ("guidance_scale", "_guidance_scale", "_guidance_scale_2"):
        value = getattr(pipe, attribute, None)
        if isinstance(value, (int, float)) and abs(value - measured) < 1e-2 * max(abs(value), 1.0):
            return float(value)
    return measured


def _joined(
    name: str, records: list[SlotRecord], prompts: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    other, conditional = records
    leaves: list[Any] = []
    for path, one, two in zip(other.paths, other.first, conditional.first, strict=True):
        if isinstance(one, Tensor) and one.ndim and one.shape[0] == prompts:
            if one.shape != two.shape:
                raise ValueError(
                    f"{name}: {path} is {tuple(one.shape)} and {tuple(two.shape)} in the two "
                    "branches: pass a negative prompt as long as the prompt"
                )
            leaves.append(torch.cat([one, two]))
        elif path.startswith("cache") or same(one, two):
            leaves.append(one)
        else:
            raise ValueError(f"{name}: {path} differs between the branches and has no row a prompt")
    args, kwargs = pytree.tree_unflatten(leaves, other.spec)
    return args, kwargs
