"""The proof run: the pipeline goes step by step while everything between network and scheduler is noted.

At every ``scheduler.step`` the calls since the last one are classified argument by argument
(constant, made of the latents, a small function of the step, or none of these), and the scalar
products of their outputs with what the scheduler was given are kept. The outcome is a ``Program``
for the engine, or the reason why there is none.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .calls import (
    Call,
    NotReplayed,
    Slot,
    caches,
    is_value,
    same,
    small,
    snapshot,
    take_apart,
    tolerance,
)
from .first_input import UNSCALED, UNSEEN, scaled_first
from .forms import Packing, match, output_columns
from .program import Columns, Program, SlotRecord
from .reading import nearest
from .situation import situation

MOST_SLICES = 64
FEWEST_NUMBERS = 8  # of a slice for every weight


class Recorder:
    """Listens to one step-by-step run.

    Args:
        names, modules: the pipeline's components that are modules.
    """

    def __init__(self, names: list[str], modules: list[nn.Module]) -> None:
        self.names, self.modules = names, modules
        self.reason: str | None = None
        self.begin(None)

    def begin(self, runner: Any) -> None:
        """A new run: ``set_timesteps`` was called and made ``runner``."""
        self._expected = runner
        self._rescaled = False
        self._unscaled: set[int] = set()
        self._runner: Any = None
        self._pending: list[tuple[int, tuple[Any, ...], dict[str, Any], Any]] = []
        self._slots: dict[Slot, SlotRecord] = {}
        self._order: dict[int, list[Slot]] = {}
        self._products: dict[int, Tensor] = {}
        self._slices = 0
        self._dtypes: set[torch.dtype] = set()
        self._around: dict[int, list[tuple[Any, ...]]] = {}
        self._returned: Tensor | None = None
        self._rows: list[int] = []
        self.calls_per_step: list[int] = []

    # -- listening -------------------------------------------------------------------------------

    def call(
        self, number: int, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A component is called: the real call, and its arguments as they were before it."""
        as_given = pytree.tree_map(lambda leaf: leaf, (args, kwargs))  # networks empty lists
        around = situation(self.modules[number]) if self._expected is not None else ()
        factor = 1.0 if self._rows or self._expected is None else self._expected.unscaled_factor()
        if factor != 1.0:  # the pipeline does not let the scheduler scale, or not yet
            scaled = scaled_first(args, kwargs, factor)
            if scaled is None:
                self._unscaled.add(number)
            else:
                self._rescaled = True
                args, kwargs = scaled
        output = original(*args, **kwargs)
        if self.reason is None:
            self._pending.append((number, *as_given, output))
            self._around.setdefault(number, []).append(around)
        return output

    def step(self, runner: Any, n: int, output: Tensor, sample: Tensor, latents: Tensor) -> None:
        """The scheduler took row ``n``: ``output`` and ``sample`` in, ``latents`` out."""
        pending, self._pending = self._pending, []
        if self.reason is not None:
            return
        try:
            self._step(runner, n, output, sample, pending)
        except NotReplayed as exc:
            self.reason = str(exc)
        self._returned = latents

    def _step(
        self, runner: Any, n: int, output: Tensor, sample: Tensor, pending: list[Any]
    ) -> None:
        if self._runner is None:
            self._runner = runner
        elif runner is not self._runner:
            raise NotReplayed("more than one scheduler takes steps in the pipeline's loop")
        if self._rows and n != self._rows[-1] + 1:
            raise NotReplayed("the pipeline's loop does not take the steps one after the other")
        if self._returned is not None and not same(sample, self._returned):
            raise NotReplayed("the pipeline changes the latents between two steps")
        if self._rows and output.shape != sample.shape:
            raise NotReplayed(
                f"model_output is {tuple(output.shape)} for latents {tuple(sample.shape)}"
            )
        self._rows.append(n)
        calls = self._taken_apart(pending)
        scaled = runner.scaled_latents(n, sample)
        # a step's networks are those whose arguments hold the latents, and whose outputs may
        calls = [c for c in calls if self._arguments(c, sample, scaled, n)]
        if not calls:
            raise NotReplayed("no component was called with the latents")
        self._order[n] = [c.slot for c in calls]
        self.calls_per_step.append(len(calls))
        self._same_around({c.slot.module for c in calls})
        self._outputs(n, calls, output, sample)

    def _same_around(self, numbers: set[int]) -> None:
        """The engine's loop runs where the scheduler's steps do."""
        for number in numbers:
            now = situation(self.modules[number])
            if any(then != now for then in self._around.pop(number, [])):
                raise NotReplayed(
                    f"hooks, processors or forwards of {self.names[number]} change during the run"
                )

    def _taken_apart(self, pending: list[Any]) -> list[Call]:
        places: dict[int, int] = {}
        calls = []
        for number, args, kwargs, output in pending:
            place = places.get(number, 0)
            places[number] = place + 1
            calls.append(take_apart(number, place, args, kwargs, output))
        return calls

    # -- arguments -------------------------------------------------------------------------------

    def _arguments(self, call: Call, sample: Tensor, scaled: Tensor, n: int) -> bool:
        record = self._slots.get(call.slot)
        if record is None:
            return self._first(call, sample, scaled)
        for i, leaf in enumerate(call.leaves):
            where = f"argument {record.paths[i]} of {self.names[call.slot.module]}"
            form = record.forms.get(i)
            if form is not None:
                self._state(where, form, leaf, record.first[i], sample, scaled)
            elif i in record.steps or not same(leaf, record.first[i]):
                self._varying(where, record, i, n, leaf)
        return True

    def _first(self, call: Call, sample: Tensor, scaled: Tensor) -> bool:
        forms: dict[int, Packing] = {}
        for i, leaf in enumerate(call.leaves):
            if isinstance(leaf, Tensor) and leaf.numel() * 2 >= sample.numel() // sample.shape[0]:
                form = match(leaf, scaled)
                form = form if form is not None or scaled is sample else match(leaf, sample)
                if form is not None:
                    forms[i] = form
        shape = tuple(sample.shape)
        if not forms or next(output_columns(call.outputs, shape), None) is None:
            return False
        for path, leaf in zip(call.paths, call.leaves, strict=True):
            if not is_value(leaf):
                raise NotReplayed(
                    f"argument {path} of {self.names[call.slot.module]} is a {type(leaf).__name__}, "
                    "which may remember earlier calls"
                )
        if self._rescaled and any(form.dim is not None for form in forms.values()):
            raise ValueError(UNSCALED)
        first, number = len(self._rows) == 1, call.slot.module
        if first and number in self._unscaled and self._runner.unscaled_factor() != 1.0:
            raise ValueError(UNSEEN.format(self.names[number]))
        self._slots[call.slot] = SlotRecord(
            spec=call.spec,
            paths=call.paths,
            first=[snapshot(leaf) for leaf in call.leaves],
            forms=forms,
            columns=None,
            output_leaves=call.output_leaves,
            output_spec=call.output_spec,
        )
        return True

    def _state(
        self, where: str, form: Packing, leaf: Tensor, first: Tensor, sample: Tensor, scaled: Tensor
    ) -> None:
        piece = form.piece(scaled)
        size = piece.shape[form.dim] if form.dim is not None else 0
        part = form.part(leaf, size)
        if not any(torch.equal(part, form.piece(x).to(leaf.dtype)) for x in (scaled, sample)):
            raise NotReplayed(f"{where} is made of the latents differently in different steps")
        parts = zip(form.rest(leaf, size), form.rest(first, size), strict=True)
        if not all(same(one, other) for one, other in parts):
            raise NotReplayed(f"what is joined to the latents in {where} changes with the step")

    def _varying(self, where: str, record: SlotRecord, i: int, n: int, leaf: Any) -> None:
        if not small(leaf):
            raise NotReplayed(f"{where} changes with the step")
        first = record.first[i]
        if isinstance(leaf, Tensor) and (
            not isinstance(first, Tensor) or first.shape != leaf.shape
        ):
            raise NotReplayed(f"{where} changes its shape with the step")
        values = record.steps.setdefault(i, {})
        values[n] = snapshot(leaf)

    # -- outputs ---------------------------------------------------------------------------------

    def _outputs(self, n: int, calls: list[Call], output: Tensor, sample: Tensor) -> None:
        limit = tolerance(output.dtype, *(c.outputs[0].dtype for c in calls))
        options = [self._options(call, tuple(sample.shape)) for call in calls]
        best, chosen, products = nearest(calls, options, output, sample, limit, self._slices)
        if best > limit and self._may_be_sliced(calls, sample):
            kept, self._slices = best, sample.shape[1]
            best, chosen, products = nearest(calls, options, output, sample, limit, self._slices)
            best = min(best, kept)
        if not best <= limit:
            raise NotReplayed(
                "what the scheduler is given is not a linear mix of the network's outputs "
                f"(relative misfit {best:.1e})"
            )
        for call, way in zip(calls, chosen, strict=True):
            self._slots[call.slot].columns = way
        self._products[n] = products
        self._dtypes |= {output.dtype, *(c.outputs[0].dtype for c in calls)}

    def _may_be_sliced(self, calls: list[Call], sample: Tensor) -> bool:
        """Whether the first step may have weights of their own for channels, or for a video's frames."""
        if self._slices or len(self._rows) > 1 or sample.ndim < 3:
            return False
        return sample.shape[1] <= MOST_SLICES and sample[0, 0].numel() >= FEWEST_NUMBERS * len(
            calls
        )

    def _options(self, call: Call, like: tuple[int, ...]) -> list[Columns]:
        record = self._slots[call.slot]
        if record.columns is not None:
            return [record.columns]
        return list(itertools.islice(output_columns(call.outputs, like), 8))

    # -- the outcome -----------------------------------------------------------------------------

    def program(self) -> Program:
        """What the engine has to do.

        Raises:
            NotReplayed: the pipeline does something that the engine's loop would not.
        """
        if self.reason is not None:
            raise NotReplayed(self.reason)
        if self._runner is None:
            raise NotReplayed("the pipeline took no step of its scheduler")
        end = self._rows[-1] + 1
        if end != self._runner.count:
            raise NotReplayed(
                f"the pipeline stops after {end} of {self._runner.count} steps of the schedule"
            )
        if end - self._rows[0] < 2:
            raise NotReplayed(
                "a single step does not tell arguments that follow the latents from constant ones"
            )
        for number in {slot.module for slot in self._slots}:
            why = caches(self.modules[number])
            if why is not None:
                raise NotReplayed(f"{self.names[number]}: {why}")
        for slot, record in self._slots.items():
            self._complete(slot, record)
        rows = (self._rows[0], end)
        return Program(
            rows, self._slots, self._order, self._products, tuple(self._dtypes), self._slices
        )

    def _complete(self, slot: Slot, record: SlotRecord) -> None:
        """A value for every row in which a slot is used: the first one until it changed."""
        used = [n for n, slots in self._order.items() if slot in slots]
        for i, values in record.steps.items():
            current = record.first[i]
            for n in used:
                current = values.setdefault(n, current)
