"""The pipeline's own loop without its networks: what this run's calls are, before the engine runs them.

Every call is answered by a stand-in, random numbers of the recorded shape, and every step by random
latents. From what the pipeline makes of them come this run's arguments and the weights with which it
mixes its network's outputs; both are held against the recorded run. Whatever differs ends the
attempt before any network was evaluated; the pipeline still goes on to its end, where it puts back what
it changed (attention processors, for instance), and its result is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .calls import (
    Call,
    NotReplayed,
    Slot,
    misfit,
    same,
    snapshot,
    solve_weights,
    take_apart,
    tolerance,
)
from .forms import read_columns
from .program import Program, SlotRecord, mixed_products


class StandIns:
    """Random tensors by shape, made once: like a network's outputs, and all different.

    Their generator is their own: the pipeline's random numbers are not touched.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def like(self, leaf: Tensor, number: int) -> Tensor:
        """``leaf``'s shape, dtype and device; ``number`` tells one from another."""
        key = (tuple(leaf.shape), leaf.dtype, leaf.device, number)
        if key not in self._made:
            generator = torch.Generator().manual_seed(1 + number)
            values = torch.randn(leaf.shape, generator=generator)
            self._made[key] = values.to(device=leaf.device, dtype=leaf.dtype)
        with torch.inference_mode(False):  # what is done to a copy has to be seen
            return self._made[key].clone()


class DryRun:
    """Listens to one run and answers it; ``finish`` hands over what was found.

    Args:
        program: of a recorded run with the same kinds of arguments.

    Attributes:
        failure: why this run is not what the recorded one was, or what the engine's loop raised.
    """

    def __init__(self, program: Program, names: list[str], stand_ins: StandIns) -> None:
        self.program, self.names = program, names
        self._stand_ins = stand_ins
        self._numbers = {slot.module for slot in program.slots}
        self.failure: Exception | None = None
        self._next = program.rows[0]
        self.begin(None)

    def begin(self, runner: Any) -> None:
        """A new run: ``set_timesteps`` was called and made ``runner``."""
        if self.program.rows[0] < self._next < self.program.rows[1]:
            self.fail("an earlier run of the call has fewer steps than the last one")
        self.runner = runner
        self._calls: list[Call] = []
        self._places: dict[int, int] = {}
        self._next = self.program.rows[0]
        self._latents: Tensor | None = None
        self._version = 0
        self._flags: list[Tensor] = []  # read once, at the end
        self._reasons: list[str] = []
        self._products: list[Tensor] = []
        self.start: Tensor | None = None
        self.first: dict[Slot, list[Any]] = {}
        self.steps: dict[Slot, dict[int, dict[int, Any]]] = {}
        self.dtype: torch.dtype | None = None

    # -- calls -----------------------------------------------------------------------------------

    def call(
        self, number: int, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A stand-in for a network of the program; other components are called."""
        if number not in self._numbers or self.runner is None or self.finished:
            return original(*args, **kwargs)
        place = self._places.get(number, 0)
        self._places[number] = place + 1
        call = take_apart(number, place, args, kwargs, None)
        record = self.program.slots.get(call.slot)
        if record is None:
            self.fail(f"{self.names[number]} is called otherwise than in the recorded run")
        if record is None or self.failure is not None:
            return original(*args, **kwargs)
        self._calls.append(call)
        return self._answer(record)

    def fail(self, reason: str | Exception) -> None:
        """The first reason counts."""
        if self.failure is None:
            self.failure = NotReplayed(reason) if isinstance(reason, str) else reason

    def _answer(self, record: SlotRecord) -> Any:
        base = 64 * len(self._calls) + 8192 * (self._next % 4)
        leaves = [
            self._stand_ins.like(leaf, base + i)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
            else leaf
            for i, leaf in enumerate(record.output_leaves)
        ]
        stand = pytree.tree_unflatten(leaves, record.output_spec)
        call = self._calls[-1]
        call.outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        call.outputs = [leaf for leaf in call.outputs if leaf.is_floating_point()]
        return stand

    # -- steps -----------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the last step was taken."""
        return self._next >= self.program.rows[1]

    def step(
        self, n: int, output: Tensor, sample: Tensor, finish: Callable[[DryRun], Tensor]
    ) -> Tensor:
        """``output`` and ``sample`` of row ``n``: stand-in latents, or ``finish``'s after the last."""
        try:
            if self.failure is None and self._taken(n, output, sample):
                return finish(self)
        except Exception as exc:
            self.fail(exc)
        if self.failure is not None:
            return self._stand_ins.like(sample, 65536)
        self._latents = self._stand_ins.like(sample, 65536 + n % 4)
        self._version = self._latents._version
        return self._latents

    def _taken(self, n: int, output: Tensor, sample: Tensor) -> bool:
        """Looks at a step; whether it was the last one."""
        calls, self._calls, self._places = self._calls, [], {}
        if n != self._next:
            raise NotReplayed(f"the pipeline takes step {n} instead of {self._next}")
        if [c.slot for c in calls] != self.program.order[n]:
            raise NotReplayed("other calls are made in a step than in the recorded run")
        if output.shape != sample.shape:
            raise NotReplayed("model_output has another shape than the latents")
        self._state(sample)
        scaled = self.runner.scaled_latents(n, sample)
        for call in calls:
            self._arguments(call, n, sample, scaled)
        columns = [c for call in calls for c in self._columns(call, sample)]
        self._products.append(mixed_products(columns, sample, output, self.program.slices))
        self.dtype = output.dtype
        self._next = n + 1
        return self.finished

    def _state(self, sample: Tensor) -> None:
        if self._latents is None:
            self.start = snapshot(sample)
        elif sample is not self._latents or sample._version != self._version:
            self._equal(sample, self._latents, "the pipeline changes the latents between two steps")

    def _columns(self, call: Call, sample: Tensor) -> list[Tensor]:
        columns = self.program.slots[call.slot].columns
        assert columns is not None
        form, per_sample = columns
        return read_columns(call.outputs, tuple(sample.shape), form, per_sample)

    def _arguments(self, call: Call, n: int, sample: Tensor, scaled: Tensor) -> None:
        record = self.program.slots[call.slot]
        first = self.first.get(call.slot)
        if first is None:
            first = self.first[call.slot] = [snapshot(leaf) for leaf in call.leaves]
            self.steps[call.slot] = {i: {} for i in record.steps}
        for i, leaf in enumerate(call.leaves):
            where = f"argument {record.paths[i]} of {self.names[call.slot.module]}"
            if i in record.forms:
                self._holds_state(where, record, i, leaf, first[i], sample, scaled)
            elif i in record.steps:
                self._equal(leaf, record.steps[i][n], f"{where} does not only follow the step")
                self.steps[call.slot][i][n] = snapshot(leaf)
            else:
                if not isinstance(leaf, Tensor) and not same(leaf, record.first[i]):
                    raise NotReplayed(f"{where} is not what it was in the recorded run")
                self._equal(leaf, first[i], f"{where} changes with the step")

    def _holds_state(
        self,
        where: str,
        record: SlotRecord,
        i: int,
        leaf: Any,
        first: Any,
        sample: Tensor,
        scaled: Tensor,
    ) -> None:
        form, reason = record.forms[i], f"{where} is made of the latents in another way"
        piece = form.piece(scaled)
        size = piece.shape[form.dim] if form.dim is not None else 0
        if not isinstance(leaf, Tensor) or leaf.shape != record.first[i].shape:
            raise NotReplayed(f"{where} has another shape than in the recorded run")
        part = form.part(leaf, size)
        if self.runner.unscaled_factor() != 1.0:
            piece = form.piece(sample)
        self._equal(part, piece.to(leaf.dtype), reason)
        for one, other in zip(form.rest(leaf, size), form.rest(first, size), strict=True):
            self._equal(one, other, f"what is joined to the latents in {where} changes")

    def _equal(self, one: Any, other: Any, reason: str) -> None:
        """Notes whether two values are equal; on the device, to be read at the end."""
        if one is other:
            return
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            if not same(one, other):
                raise NotReplayed(reason)
            return
        if one.shape != other.shape or one.dtype != other.dtype:
            raise NotReplayed(reason)
        self._flags.append((one == other).all())
        self._reasons.append(reason)

    # -- the end ---------------------------------------------------------------------------------

    def weights(self) -> Tensor:
        """``[rows, J + 1]`` float64: what the network's branches and the latents weigh in each step.

        Shorter rows are filled up with zeros; the last column is the latents'.

        Raises:
            NotReplayed: this run is not what the recorded one was.
        """
        # All at once: every read is a wait for the device.
        parts = (*self._flags, *self._products)
        flat = [part.reshape(-1).to(parts[-1].device, torch.float64) for part in parts]
        read = list(torch.cat(flat).cpu().split([len(part) for part in flat])) if flat else []
        for flag, reason in zip(read, self._reasons, strict=False):
            if not flag:
                raise NotReplayed(reason)
        limit = tolerance(*self.program.dtypes)
        begin, end = self.program.rows
        rows = []
        products = zip(self._products, read[len(self._flags) :], strict=True)
        for n, (there, values) in zip(range(begin, end), products, strict=True):
            here = values.to(there.dtype).reshape(there.shape)
            solved = solve_weights(here)
            if misfit(here, solved) > limit:
                raise NotReplayed("the outputs are not mixed linearly before the scheduler's step")
            if misfit(self.program.products[n], solved) > limit:
                raise NotReplayed("how the network's outputs are mixed depends on their values")
            rows.append(solved)
        longest = max(len(row) for row in rows)
        table = torch.zeros(len(rows), longest, dtype=torch.float64)
        for row, solved in zip(table, rows, strict=True):
            row[: len(solved) - 1], row[-1] = solved[:-1], solved[-1]
        return table
