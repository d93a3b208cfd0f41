"""The engine's loop over a proven program: networks, their mix and the fused row of every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...engine.cuda_graph import run_captured
from ...engine.cuda_graph_cache import GraphCache
from ...ops import layout
from .calls import Slot, rebuild, take_apart
from .dry_run import DryRun
from .forms import read_columns
from .program import SlotRecord

NICE = (0.0, 1.0, -1.0)


def rounded_weights(weights: Tensor, guidance: list[float], dtype: torch.dtype) -> Tensor:
    """Measured mixing weights as the numbers they stand for, where a known number is that near.

    ``guidance`` are the scales among the call's arguments: g and 1 - g and their opposites, and
    differences of two; any other number of four places has to be nearer.
    """
    known = list(NICE)
    for scale in guidance:
        known += [scale, 1 - scale, -scale, scale - 1, 1 + scale, -1 - scale]
    known += [one - other for one in guidance for other in guidance]
    reach = 1e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-5
    result = weights.clone()
    for i, value in enumerate(result.reshape(-1).tolist()):
        nearest = min(known, key=lambda k: abs(k - value))
        short = round(value, 4)
        if reach < 1e-3 and abs(short - value) <= 1e-6 * max(abs(short), 1.0):
            nearest = short
        if abs(nearest - value) <= reach * max(abs(nearest), 1.0):
            result.view(-1)[i] = nearest
    return result


def along_slices(row: Tensor, x: Tensor) -> Tensor:
    """``row`` ``[C]`` as a factor of ``x`` ``[B, C, ...]``."""
    return row.reshape(1, -1, *([1] * (x.ndim - 2)))


@dataclass
class _Inputs:
    """Tensors of one run by name, and the plain values that a captured graph would freeze."""

    tensors: dict[str, Tensor]
    plain: dict[str, Any]

    @classmethod
    def of(cls, dry: DryRun, numbers: dict[Slot, int]) -> _Inputs:
        """Constants are named ``c<slot>/<leaf>``, those that follow the step ``s<slot>/<leaf>/<row>``."""
        made = cls({}, {})
        for slot, leaves in dry.first.items():
            where = numbers[slot]
            for i, leaf in enumerate(leaves):
                following = dry.steps[slot].get(i)
                if following is None:
                    made._put(f"c{where}/{i}", leaf)
                else:
                    for n, value in following.items():
                        made._put(f"s{where}/{i}/{n}", value)
        return made

    def _put(self, name: str, value: Any) -> None:
        (self.tensors if isinstance(value, Tensor) else self.plain)[name] = value


class WholeLoop:
    """Runs every row of ``dry``'s runner in the engine.

    Args:
        originals: component number -> its own call.
        modules: component number -> the module, whose weights key the captured graphs.
        guidance: scales that may appear among the mixing weights.
    """

    def __init__(
        self,
        dry: DryRun,
        originals: dict[int, Any],
        modules: dict[int, nn.Module],
        guidance: list[float],
    ) -> None:
        assert dry.start is not None and dry.dtype is not None
        self.dry, self.program = dry, dry.program
        self.originals = originals
        self.modules = modules
        self.sample_dtype = dry.start.dtype
        half = (torch.float16, torch.bfloat16)
        # the fused row's network side: the state's dtype, or the pipeline's where that is half
        self.dtype = torch.float64 if self.sample_dtype == torch.float64 else torch.float32
        self.side = self.dtype if dry.dtype not in half else dry.dtype
        self.numbers = {slot: k for k, slot in enumerate(self.program.slots)}
        self.weights = rounded_weights(dry.weights(), guidance, dry.dtype)

    @torch.no_grad()
    def run(self, cache: GraphCache) -> Tensor:
        """The latents after the last row, in the pipeline's dtype."""
        runner, start = self.dry.runner, self.dry.start
        assert start is not None
        begin, end = self.program.rows
        plan = runner.plan_of(begin)
        rows = plan.packed.clone()
        rows[:-1, layout.C_IN] = torch.tensor(plan.c_in[1:], dtype=torch.float64)
        self.scales = [self._guided(n - begin) for n in range(begin, end)]
        rows[begin:end, layout.GUIDANCE] = torch.tensor(
            [1.0 if scale is None else scale for scale in self.scales], dtype=torch.float64
        )
        self.inputs = _Inputs.of(self.dry, self.numbers)
        device = start.device
        tensors = {
            **self.inputs.tensors,
            "x": start.to(self.dtype).contiguous(),
            "rows": rows[begin:end].to(device=device, dtype=self.dtype),
            "weights": self.weights.to(device=device, dtype=self.dtype),
            "first_scale": torch.tensor(plan.c_in[begin], dtype=self.dtype, device=device),
        }
        self.depth = plan.depth
        self.correctors = runner.correctors
        if self.correctors is not None:
            self.correctors.to(device)
        options = (
            str(self.program.order),
            str(self.program.slices),
            str(self._shapes()),
            str(self.scales),
            str([self._left_out(n - begin) for n in range(begin, end)]),
        )
        plain = tuple(sorted((name, repr(value)) for name, value in self.inputs.plain.items()))
        learned = [] if self.correctors is None else [self.correctors]
        networks = nn.ModuleList([*self.modules.values(), *learned])
        x = run_captured(cache, networks, (*options, plain), self._body, tensors)
        return x.to(self.sample_dtype)

    def _shapes(self) -> list[Any]:
        return [(r.forms, r.columns, sorted(r.steps)) for r in self.program.slots.values()]

    def _guided(self, n: int) -> float | None:
        """The guidance scale where the mix is F_uncond + g (F_cond - F_uncond): the kernel mixes."""
        if self.program.slices:
            return None
        row = self.weights[n]
        order = self.program.order[self.program.rows[0] + n]
        branches = sum(self._copies(slot) for slot in order)
        first, second, rest = float(row[0]), float(row[1]) if len(row) > 2 else 0.0, row[2:]
        plain = branches == 2 and not bool(rest.any()) and abs(first + second - 1) < 1e-12
        return second if plain else None

    def _left_out(self, n: int) -> tuple[bool, bool]:
        """Whether the one branch is taken as it is, and whether the latents have no weight.

        A captured run is without those operations: other weights of that kind are another run.
        """
        row = self.weights[n].tolist()
        return row[0] == 1.0 and not any(row[1:]), not row[-1]

    def _copies(self, slot: Slot) -> int:
        columns = self.program.slots[slot].columns
        assert columns is not None
        return columns[0].copies

    # -- the loop --------------------------------------------------------------------------------

    def _body(self, inputs: Mapping[str, Tensor]) -> Tensor:
        x = inputs["x"]
        ring = x.new_empty((self.depth, *x.shape))
        network_input = (inputs["first_scale"] * x).to(self.side).contiguous()
        fused_row_ = ops.select("auto", x.device).fused_row_
        begin, end = self.program.rows
        for n in range(begin, end):
            latents = network_input.to(self.sample_dtype)
            branches = [
                branch
                for slot in self.program.order[n]
                for branch in self._branches(slot, n, latents, inputs)
            ]
            f, f_cond = self._mixed(n - begin, branches, x, inputs["weights"])
            row = inputs["rows"][n - begin]
            fused_row_(f, f_cond, x, ring, row, network_input)
            if self.correctors is not None and n >= self.correctors.first:
                kept = range(min(n + 1, self.depth))
                x = self.correctors(n, x, [ring[(n - k) % self.depth] for k in kept])
                network_input.copy_(row[layout.C_IN] * x)
        return x

    def _branches(
        self, slot: Slot, n: int, latents: Tensor, inputs: Mapping[str, Tensor]
    ) -> list[Tensor]:
        record = self.program.slots[slot]
        leaves = [self._leaf(record, slot, i, n, latents, inputs) for i in range(len(record.first))]
        args, kwargs = rebuild(record.spec, leaves)
        output = self.originals[slot.module](*args, **kwargs)
        call = take_apart(slot.module, slot.place, (), {}, output)
        assert record.columns is not None
        return read_columns(call.outputs, tuple(latents.shape), *record.columns)

    def _leaf(
        self,
        record: SlotRecord,
        slot: Slot,
        i: int,
        n: int,
        latents: Tensor,
        inputs: Mapping[str, Tensor],
    ) -> Any:
        where = self.numbers[slot]
        following = i in record.steps
        name = f"s{where}/{i}/{n}" if following else f"c{where}/{i}"
        leaf = inputs[name] if name in inputs else self.inputs.plain[name]
        form = record.forms.get(i)
        return leaf if form is None else form.build(latents, leaf)

    def _mixed(
        self, n: int, branches: list[Tensor], x: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What the fused row takes: two branches it mixes itself, or their sum made here."""
        if self.scales[n] is not None:
            first, second = (b.to(self.side).contiguous() for b in branches)
            return first, second
        (alone, no_latents), slices = self._left_out(n), self.program.slices
        if slices:
            table = weights[n, : len(branches) * slices].reshape(-1, slices)
            factors = [along_slices(row, x) for row in table]
        else:
            factors = [weights[n, k] for k in range(len(branches))]
        if len(branches) == 1 and alone:
            return branches[0].to(self.side).contiguous(), None
        mixed = branches[0].to(self.dtype) * factors[0]
        for factor, branch in zip(factors[1:], branches[1:], strict=True):
            mixed = mixed + branch.to(self.dtype) * factor
        if not no_latents:
            mixed = mixed + x * weights[n, -1]
        return mixed.to(self.side).contiguous(), None
