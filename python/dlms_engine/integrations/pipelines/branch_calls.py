"""Pipelines that call their network once per guidance branch: both calls, joined as one.

Which call is the conditional one, and with what guidance, is read off two recorded steps: from the
weights with which the pipeline mixes the calls' outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .calls import NotReplayed, same, solve_weights
from .interception import Interception
from .recording import Program, Recorder, SlotRecord


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

    def run(self, arguments: dict[str, Any]) -> Program:
        """Two steps, recorded.

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
                self.pipe(**{**arguments, "num_inference_steps": 2, "output_type": "latent"})
            return self.recorder.program()
        except NotReplayed as exc:
            raise ValueError(f"{type(self.pipe).__name__} cannot be distilled for: {exc}") from exc
        finally:
            self.pipe.scheduler.run_with(None)
            for tap in taps:
                tap.remove()


def joined_branches(
    pipe: Any, arguments: dict[str, Any], prompts: int
) -> tuple[tuple[Any, ...], dict[str, Any], float]:
    """Arguments of one call for both branches, the unconditional half first, and the guidance scale.

    Raises:
        ValueError: other than two calls of one network, guidance that changes with the step, or
            branches that differ in more than their tensors.
    """
    program = Recording(pipe).run(arguments)
    name = type(pipe).__name__
    orders = [program.order[n] for n in sorted(program.order)]
    slots = orders[0]
    if any(order != slots for order in orders):
        raise ValueError(
            f"{name} calls other networks in other steps: distilling needs one for all"
        )
    if len(slots) != 2 or slots[0].module != slots[1].module:
        raise ValueError(f"{name} makes {len(slots)} network calls a step: distilling takes two")
    weights = [solve_weights(program.products[n])[:2].tolist() for n in sorted(program.products)]
    first, last = weights[0], weights[-1]
    if (
        abs(sum(first) - 1) > 1e-2
        or max(abs(a - b) for a, b in zip(first, last, strict=True)) > 1e-2
    ):
        raise ValueError(
            f"{name} mixes its branches with {weights}: distilling needs one guidance scale"
        )
    conditional = 0 if first[0] > first[1] else 1
    records = [program.slots[slots[1 - conditional]], program.slots[slots[conditional]]]
    return (*_joined(name, records, prompts), _stated(pipe, first[conditional]))


def _stated(pipe: Any, measured: float) -> float:
    """The scale the pipeline was given, where that is what was measured."""
    for attribute in ("guidance_scale", "_guidance_scale"):
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
