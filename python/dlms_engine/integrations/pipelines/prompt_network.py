"""A pipeline's network, or its two networks, with the prompts built in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .step_calls import NetworkCall, StepCalls, evaluated
from .whole_loop import along_slices

_Rows = Tensor | list[int]


class PipelineNetwork(nn.Module):
    """What a pipeline calls in a step, with its prompts: sample i of a batch has prompt i mod P.

    The calls' outputs are mixed here, but for one call of both branches, which the denoiser mixes.
    Of two networks that are switched by time each has its own calls; a batch whose samples lie on both
    sides of the boundary is divided between them.

    Args:
        networks: the pipeline's, by component name.
        call: the calls of one step for all prompts.

    Attributes:
        call: what it was made with.
        first: number of the batch's first sample, so that training goes through all prompts.

    Samples come on the networks' device; the remembered arguments are moved there once.
    """

    def __init__(self, networks: dict[str, nn.Module], call: StepCalls) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.call = call
        self.first = 0
        self._stacks = call.stacks
        self._samples = [_stacked(call)] if self._stacks else [list(s) for s in call.samples]
        self._weights = [one.table() for one in call.calls]
        self._times = [dict(one.times) for one in call.calls]
        self._device = torch.device("cpu")

    @property
    def one_call(self) -> bool:
        """Whether one call with at most two branches makes a step: a bottleneck for each sample."""
        call = self.call
        return call.fused or (len(call.calls) == 1 and call.calls[0].copies == 1 and call.stacks)

    def conditions(self) -> list[Tensor]:
        """Every tensor that the networks are given besides latents and time."""
        leaves = [leaf for sample in self._samples for one in sample for leaf in one]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def forward(self, x: Tensor, time: Tensor, **_: Any) -> Tensor:
        """``x`` ``[B, ...]``, ``time`` ``[B]`` in the scheduler's unit; both twice where it is fused."""
        self._place(x.device)
        if self.call.fused:
            half = x.shape[0] // 2
            return torch.cat(self._branches(0, x[:half], time[:half], self._rows(half, x.device)))
        return self._mixed(x, time, self._rows(x.shape[0], x.device))

    def _rows(self, batch: int, device: torch.device) -> _Rows:
        """The samples' prompts; on the device where they are an index there."""
        count = len(self.call.samples)
        if self._stacks:
            return (torch.arange(batch, device=device) + self.first) % count
        return [(self.first + k) % count for k in range(batch)]

    def _mixed(self, x: Tensor, time: Tensor, rows: _Rows) -> Tensor:
        if self.call.boundary is None:
            return self._side(range(len(self.call.calls)), x, time, rows)
        late = time < self.call.boundary
        sides = [range(self.call.first), range(self.call.first, len(self.call.calls))]
        if bool((late == late[:1]).all()):
            return self._side(sides[int(late[0])], x, time, rows)
        places = [torch.nonzero(late == which)[:, 0] for which in (False, True)]
        parts = [
            self._side(
                side,
                x[i],
                time[i],
                rows[i] if isinstance(rows, Tensor) else [rows[k] for k in i.tolist()],
            )
            for side, i in zip(sides, places, strict=True)
        ]
        return torch.cat(parts)[torch.cat(places).argsort()]

    def _side(self, calls: range, x: Tensor, time: Tensor, rows: _Rows) -> Tensor:
        """The mix of ``calls``, summed in float32 or wider."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        total = None
        for k in calls:
            branches = self._branches(k, x, time, rows)
            table = self._weights[k].to(wide)
            for weight, row, branch in zip(
                self.call.calls[k].weights, table, branches, strict=False
            ):
                alone = weight == 1.0 and table.shape[1] == 1
                part = branch if alone else branch.to(wide) * along_slices(row, branch)
                total = part if total is None else total + part
        assert total is not None
        return total.to(x.dtype)

    def _branches(self, k: int, x: Tensor, time: Tensor, rows: _Rows) -> list[Tensor]:
        call, network = self.call.calls[k], self.networks[self.call.calls[k].module]
        if self._stacks:
            leaves = list(self._samples[0][k])
            for i in call.batched:
                if isinstance(leaves[i], Tensor) and leaves[i].numel():
                    leaves[i] = leaves[i][:, rows].flatten(0, 1)
            return evaluated(call, self._times[k], network, leaves, x, time)
        alone = [
            evaluated(call, self._times[k], network, self._samples[row][k], x[n : n + 1], time[n : n + 1])
            for n, row in enumerate(rows)
        ]  # fmt: skip
        return [torch.cat(parts) for parts in zip(*alone, strict=True)]

    def _place(self, device: torch.device) -> None:
        """The arguments on ``device``, where they are not."""
        if device == self._device:
            return
        self._device = device
        for sample in self._samples:
            for one in sample:
                one[:] = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in one]
        self._weights = [table.to(device) for table in self._weights]
        for times in self._times:
            for i, (offset, factor) in times.items():
                times[i] = offset.to(device), factor.to(device)


def _stacked(call: StepCalls) -> list[list[Any]]:
    """Call -> leaves; batched ones are ``[copies, P, ...]``."""
    return [
        [_column(one, i, [sample[k][i] for sample in call.samples]) for i in range(len(leaves))]
        for k, (one, leaves) in enumerate(zip(call.calls, call.samples[0], strict=True))
    ]


def _column(call: NetworkCall, i: int, values: list[Any]) -> Any:
    kept = i in call.batched and isinstance(values[0], Tensor) and values[0].numel()
    return torch.stack(values, dim=1) if kept else values[0]
