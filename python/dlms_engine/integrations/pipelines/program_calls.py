"""A step's network calls, read off a recorded run and one with stand-ins.

Whatever is read here is what the recorded run did: which arguments hold the latents, how others follow
the time, which rows belong to which sample, and with what weights the calls' outputs are mixed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .calls import NotReplayed, Slot
from .dry_run import DryRun
from .kinds import scales_of
from .program import Program, SlotRecord
from .step_calls import NetworkCall, StepCalls, TimeForm, time_form
from .whole_loop import rounded_weights

EXPERTS = ("transformer", "transformer_2")  # for early and for late times


def boundary_of(pipe: Any) -> float | None:
    """The scheduler's time from which up ``transformer`` is called, below it ``transformer_2``.

    None where the pipeline does not switch networks by time.
    """
    ratio = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    networks = [getattr(pipe, name, None) for name in EXPERTS]
    if ratio is None or not all(isinstance(network, nn.Module) for network in networks):
        return None
    return float(ratio) * float(pipe.scheduler.config.num_train_timesteps)


@dataclass
class RecordedRun:
    """A run of ``pipe``, whose networks are ``names``; ``times`` are the scheduler's, by step."""

    pipe: Any
    names: list[str]
    boundary: float | None
    program: Program
    times: dict[int, float]
    steps: int


def start_of(dry: DryRun) -> Tensor:
    """The latents a run with stand-ins began with, ``[B, ...]``."""
    assert dry.start is not None
    return dry.start


def step_calls_of(
    known: RecordedRun, dry: DryRun, arguments: dict[str, Any], own_times: bool
) -> StepCalls:
    """The calls of one step, from a recorded run and one with stand-ins.

    Args:
        own_times: the run had times of its own.

    Raises:
        NotReplayed: the loop is not one of calls that are mixed linearly.
        OneByOne: it can only be replayed for one sample.
    """
    pipe, boundary, times = known.pipe, known.boundary, known.times
    rows = sorted(known.program.order)
    scales = scales_of(arguments, pipe) + _own_scales(pipe)
    weights = rounded_weights(dry.weights(), scales, dry.dtype or torch.float32)
    sign = pipe.scheduler.noise_model.sign  # the engine's networks predict the opposite of some
    sides = [rows]
    if boundary is not None:
        sides = [
            [n for n in rows if times[n] >= boundary],
            [n for n in rows if times[n] < boundary],
        ]
    maker = _Maker(known, dry, int(start_of(dry).shape[0]))
    made: list[list[NetworkCall]] = []
    leaves: list[list[list[Any]]] = []
    guidance: list[float | None] = []
    for k, side in enumerate(sides):
        slots, mix = _alike(known.program, side, weights, rows[0])
        names = {known.names[slot.module] for slot in slots}
        if boundary is not None and names != {EXPERTS[k]}:
            raise NotReplayed(
                f"it calls {sorted(names)} on {EXPERTS[k]}'s side of its boundary, {boundary:g}"
            )
        calls = maker.calls(slots, [sign * weight for weight in mix])
        made.append(calls)
        leaves += [maker.samples(slot, call) for slot, call in zip(slots, calls, strict=True)]
        guidance.append(None if known.program.slices else _guidance(mix, scales))
    flat = [call for calls in made for call in calls]
    return StepCalls(
        flat,
        len(made[0]),
        [list(sample) for sample in zip(*leaves, strict=True)],
        tuple(start_of(dry).shape[1:]),
        bool(pipe.scheduler.scaled_input),
        guidance[0],
        guidance[1] if len(guidance) > 1 else None,
        boundary,
        own_times,
    )


def _alike(
    program: Program, rows: list[int], weights: Tensor, first: int
) -> tuple[list[Slot], list[float]]:
    """The calls of every one of ``rows``, and the weights of their branches.

    Raises:
        NotReplayed: they differ between the rows, or the latents are mixed in.
    """
    slots = program.order[rows[0]]
    if any(program.order[n] != slots for n in rows):
        raise NotReplayed("it makes other network calls in other steps")
    branches = sum(_copies(program.slots[slot]) for slot in slots) * max(program.slices, 1)
    mixes = [weights[n - first].tolist() for n in rows]
    if any(abs(a - b) > 1e-2 for mix in mixes for a, b in zip(mix, mixes[0], strict=True)):
        shown = [[round(w, 3) for w in mix[:branches]] for mix in mixes]
        raise NotReplayed(f"it mixes its branches with {shown}, other weights in other steps")
    if abs(mixes[0][-1]) > 1e-3:
        raise NotReplayed("it adds the latents to its network's output")
    return slots, mixes[0][:branches]


def _copies(record: SlotRecord) -> int:
    assert record.columns is not None
    return record.columns[0].copies


def _own_scales(pipe: Any) -> list[float]:
    names = ("guidance_scale", "_guidance_scale_2", "_true_cfg_scale")
    found = [getattr(pipe, name, None) for name in names]
    return [float(v) for v in found if isinstance(v, (int, float)) and not isinstance(v, bool)]


def _guidance(mix: list[float], scales: list[float]) -> float | None:
    """The conditional branch's weight where two are mixed: one of ``scales``, or the larger."""
    if len(mix) != 2:
        return None
    either = [*mix[::-1], *(-w for w in mix)]  # Lumina 2 hands over the negative
    stated = [w for w in either if any(abs(w - s) < 1e-9 for s in scales)]
    return stated[0] if stated else max(mix)


@dataclass
class _Maker:
    known: RecordedRun
    dry: DryRun
    batch: int

    def calls(self, slots: list[Slot], mix: list[float]) -> list[NetworkCall]:
        made, place = [], 0
        for slot in slots:
            record = self.known.program.slots[slot]
            branches = _copies(record) * max(self.known.program.slices, 1)
            made.append(self._call(slot, record, mix[place : place + branches]))
            place += branches
        return made

    def _call(self, slot: Slot, record: SlotRecord, weights: list[float]) -> NetworkCall:
        assert record.columns is not None
        copies = max(form.copies for form in record.forms.values())
        batched = [
            i
            for i, (path, leaf) in enumerate(zip(record.paths, record.first, strict=True))
            if is_batched(path, leaf, copies * self.batch)
        ]
        call = NetworkCall(
            self.known.names[slot.module],
            record.spec,
            record.forms,
            {},
            batched,
            copies,
            record.columns,
            weights,
            self.known.program.slices,
        )
        if self.batch > 1 and not call.stacks:
            raise OneByOne("it gives its network every sample apart")
        for i in self._following(slot):
            offset, factor = self._time(slot, i)
            if i in batched:
                offset, factor = (
                    self._of_sample(part, record, call, 0) for part in (offset, factor)
                )
            call.times[i] = offset, factor
        return replace(
            call,
            forms={i: replace(form, interleaved=False) for i, form in record.forms.items()},
            columns=(replace(record.columns[0], interleaved=False), record.columns[1]),
        )

    def samples(self, slot: Slot, call: NetworkCall) -> list[list[Any]]:
        """Each sample's leaves."""
        record = self.known.program.slots[slot]
        return [
            [self._leaf(leaf, i, record, call, k) for i, leaf in enumerate(self.dry.first[slot])]
            for k in range(self.batch)
        ]

    def _leaf(self, leaf: Any, i: int, record: SlotRecord, call: NetworkCall, sample: int) -> Any:
        form = call.forms.get(i)
        if i in call.times:
            return None
        if form is not None and form.dim is None:
            return leaf.new_empty(0)
        return self._of_sample(leaf, record, call, sample) if i in call.batched else leaf

    def _of_sample(
        self, leaf: Tensor, record: SlotRecord, call: NetworkCall, sample: int
    ) -> Tensor:
        """Its ``copies`` rows."""
        rest = leaf.shape[1:]
        if any(form.interleaved for form in record.forms.values()):
            return leaf.reshape(self.batch, call.copies, *rest)[sample]
        return leaf.reshape(call.copies, self.batch, *rest)[:, sample]

    # -- times -----------------------------------------------------------------------------------

    def _following(self, slot: Slot) -> list[int]:
        """Leaves that follow the steps in this call or, by name, in another one."""
        slots = self.known.program.slots
        names = {record.paths[i] for record in slots.values() for i in record.steps}
        return [i for i, path in enumerate(slots[slot].paths) if path in names]

    def _time(self, slot: Slot, i: int) -> TimeForm:
        program = self.known.program
        path = program.slots[slot].paths[i]
        shape = torch.as_tensor(program.slots[slot].first[i]).shape
        values: dict[int, Any] = {}
        for other, record in program.slots.items():
            if path not in record.paths:
                continue
            k = record.paths.index(path)
            if torch.as_tensor(record.first[k]).shape == shape:
                used = [n for n, slots in program.order.items() if other in slots]
                values |= record.steps.get(k) or dict.fromkeys(used, record.first[k])
        levels = int(self.known.pipe.scheduler.config.num_train_timesteps)
        where = f"argument {path} of {self.known.names[slot.module]}"
        try:
            return time_form(values, self.known.times, levels, where)
        except ValueError as exc:
            raise NotReplayed(str(exc)) from exc


class OneByOne(ValueError):
    """The pipeline's call is for several samples, and can only be replayed for one."""


WITHOUT_BATCH = ("txt_ids", "img_ids", "image_rotary_emb")


def is_batched(path: str, leaf: Any, count: int) -> bool:
    """Whether an argument has one row for each of ``count`` samples."""
    return (
        isinstance(leaf, Tensor)
        and leaf.ndim > 0
        and leaf.shape[0] == count
        and not any(name in path for name in WITHOUT_BATCH)
    )
