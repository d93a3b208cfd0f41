"""Recording what a pipeline calls in a step: the real run first, then one with stand-ins.

The first shows which arguments hold the latents and which follow the time. From the second come the
weights with which the pipeline mixes its calls' outputs: stand-ins are never nearly alike, and other
values show whether the mix depends on them. It calls no network: further prompts cost their encoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..scheduler.flow_times import is_default
from ..scheduler.times import vector
from .calls import NotReplayed, Slot
from .dry_run import DryRun, StandIns
from .interception import Interception
from .kinds import generators_of, scales_of
from .proof import INSTEAD, run_steps
from .recording import Program, Recorder, SlotRecord
from .step_calls import NetworkCall, StepCalls, TimeForm, time_form
from .whole_loop import rounded_weights

EXPERTS = ("transformer", "transformer_2")  # for early and for late times
FEWEST, MOST_RECORDED = 3, 64  # steps: two points lie on any straight line


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
class _Recorded:
    program: Program
    times: dict[int, float]
    steps: int


class Recording:
    """Listens to runs of ``pipe`` with its present ``DLMSScheduler``.

    The first run of a kind is recorded; the same kind with other prompts takes a run with stand-ins.
    """

    def __init__(self, pipe: Any) -> None:
        from .acceleration import module_components

        parts = module_components(pipe)
        self.pipe = pipe
        self.boundary = boundary_of(pipe)
        self.names = list(parts)
        self._parts = list(parts.values())
        self.own_times = False
        self._session: Any = None
        self._runner: Any = None
        self._known: dict[int, _Recorded] = {}
        self._stand_ins = StandIns()

    def __deepcopy__(self, memo: dict[int, Any]) -> Recording:
        return self

    def runner(self, *arguments: Any) -> Any:
        """For the scheduler's ``set_timesteps``."""
        from .acceleration import SessionRunner

        timesteps, sigmas = arguments[4:6]
        self.own_times = timesteps is not None or (
            sigmas is not None and not is_default(vector(sigmas, "sigmas"))
        )

        made = SessionRunner(*arguments)
        self._runner = made
        made.session = self._session
        made.finish = lambda dry: self._stand_ins.like(_start(dry), 65536)
        self._session.begin(made)
        return made

    def step_calls(self, arguments: dict[str, Any]) -> StepCalls:
        """The calls of one step of ``pipe(**arguments)``.

        Raises:
            ValueError: the pipeline's loop is not one of calls that are mixed linearly, with weights of
                their own for each network, or an argument follows the steps in another way.
        """
        rewind, count = _rewinder(arguments), _prompts(arguments)
        try:
            if count in self._known:
                try:
                    return self._made(arguments, self._known[count])
                except NotReplayed:  # of another length, for instance
                    rewind()
            self._known[count] = self._recorded(arguments)
            rewind()
            made = self._made(arguments, self._known[count])
            rewind()  # for the proof, whose images are to be encoded alike
            return made
        except NotReplayed as exc:
            self._known.pop(count, None)
            raise ValueError(
                f"{type(self.pipe).__name__} cannot be distilled for: {exc}; {INSTEAD}"
            ) from exc

    def _recorded(self, arguments: dict[str, Any]) -> _Recorded:
        steps = self._steps()
        recorder = Recorder(self.names, self._parts)
        self._run(recorder, arguments, steps)
        program, model = recorder.program(), self.pipe.scheduler.noise_model
        times = model.timestep(self._runner.times).tolist()
        return _Recorded(program, dict(enumerate(times)), steps)

    def _made(self, arguments: dict[str, Any], known: _Recorded) -> StepCalls:
        dry = DryRun(known.program, self.names, self._stand_ins)
        self._run(dry, arguments, known.steps)
        if dry.failure is not None:
            raise dry.failure
        if not dry.finished:
            raise NotReplayed("the pipeline left its loop early")
        return _step_calls(self, arguments, known, dry)

    def _run(self, session: Recorder | DryRun, arguments: dict[str, Any], steps: int) -> None:
        self._session = session
        taps = []
        for number, module in enumerate(self._parts):

            def heard(_m: Any, original: Any, a: Any, k: Any, number: int = number) -> Any:
                return session.call(number, original, a, k)

            taps.append(Interception(module, heard))
        try:
            run_steps(self.pipe, self, arguments, steps)
        finally:
            for tap in taps:
                tap.remove()

    def _steps(self) -> int:
        """The fewest steps, with times on both sides of a boundary."""
        if self.boundary is None:
            return FEWEST
        for steps in range(FEWEST, MOST_RECORDED + 1):
            self.pipe.scheduler.set_timesteps(steps)
            times = self.pipe.scheduler.timesteps.tolist()
            if times[0] >= self.boundary > times[-1]:
                return steps
        raise ValueError(
            f"{type(self.pipe).__name__} has no time on each side of its boundary, {self.boundary:g}, "
            f"with {FEWEST} to {MOST_RECORDED} steps: one of its networks is not used"
        )


def _prompts(arguments: dict[str, Any]) -> int:
    """How many prompts a run is for, as far as its stand-ins' shapes depend on it."""
    prompt = arguments.get("prompt")
    return len(prompt) if isinstance(prompt, list) else 1


def _start(dry: DryRun) -> Tensor:
    assert dry.start is not None
    return dry.start


def _rewinder(arguments: dict[str, Any]) -> Callable[[], None]:
    """Images are encoded with the same random numbers in each of the runs."""
    from .acceleration import rewinder

    return rewinder(generators_of(arguments))


# -- from a program to the calls -----------------------------------------------------------------


def _step_calls(
    recording: Recording, arguments: dict[str, Any], known: _Recorded, dry: DryRun
) -> StepCalls:
    pipe, boundary, times = recording.pipe, recording.boundary, known.times
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
    maker = _Maker(recording, known, dry, int(_start(dry).shape[0]))
    made: list[list[NetworkCall]] = []
    leaves: list[list[list[Any]]] = []
    guidance: list[float | None] = []
    for k, side in enumerate(sides):
        slots, mix = _alike(recording, known.program, side, weights, rows[0])
        names = {recording.names[slot.module] for slot in slots}
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
        tuple(_start(dry).shape[1:]),
        bool(pipe.scheduler.scaled_input),
        guidance[0],
        guidance[1] if len(guidance) > 1 else None,
        boundary,
        recording.own_times,
    )


def _alike(
    recording: Recording, program: Program, rows: list[int], weights: Tensor, first: int
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
    recording: Recording
    known: _Recorded
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
            self.recording.names[slot.module],
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
        levels = int(self.recording.pipe.scheduler.config.num_train_timesteps)
        where = f"argument {path} of {self.recording.names[slot.module]}"
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
