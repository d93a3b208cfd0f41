"""A pipeline's network, or its two networks, with the prompts built in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..scheduler.probe import ProbeLoop
from .prompt_calls import NetworkCall, is_batched


class PipelineNetwork(nn.Module):
    """A pipeline's network with its prompts built in: sample i of a batch has prompt i mod P.

    Args:
        network: the pipeline's.
        call: arguments of one call of the network for all prompts.

    Attributes:
        call: what it was made with.
        batched: the arguments that have a row for each prompt and branch.
        first: number of the batch's first sample, so that training goes through all prompts.

    Samples come on the network's device; the remembered arguments are moved there once.
    """

    def __init__(self, network: nn.Module, call: NetworkCall) -> None:
        super().__init__()
        self.network = network
        self.call = call
        self._loop = _loop(network, call)
        self._prompts, self._branches = call.prompts, call.branches
        self.batched = _batched(call)
        self._shared = {k: v for k, v in self._loop.tensors().items() if k not in self.batched}
        self.first = 0

    def time_scale(self, levels: int) -> float:
        """Factor from the scheduler's times to the network's."""
        return self._loop.time_scale(self.call.timestep, levels)

    def forward(self, x: Tensor, time: Tensor, **_: Any) -> Tensor:
        """``x`` ``[branches * B, ...]``, ``time`` ``[branches * B]`` in the network's unit."""
        rows = self._rows(x.shape[0] // self._branches, x.device)
        return self._output(self._loop, x, time, self._of_branches(rows))

    def _rows(self, batch: int, device: torch.device) -> Tensor:
        """``[batch]`` the samples' prompts."""
        return (torch.arange(batch, device=device) + self.first) % self._prompts

    def _of_branches(self, rows: Tensor) -> Tensor:
        return torch.cat([rows + self._prompts * k for k in range(self._branches)])

    def _output(self, loop: ProbeLoop, x: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        self._place(x.device)
        chosen = {k: v[rows] for k, v in self.batched.items()} | self._shared
        out = loop.evaluate(x, time, chosen)
        return out[:, : x.shape[1]] if out.ndim == 4 else out

    def _place(self, device: torch.device) -> None:
        """The arguments on ``device``, where they are not."""
        for kept in (self.batched, self._shared):
            for name, value in kept.items():
                if value.device != device:
                    kept[name] = value.to(device)


class SwitchedNetwork(PipelineNetwork):
    """Two experts with the same arguments, each for its own times; guidance is mixed in here.

    Their guidance scales may differ, so the denoiser around it has none. A batch whose samples lie
    on both sides of the boundary is divided between the two.

    Args:
        experts: for times from ``boundary`` up, and for those below.

    Attributes:
        boundary: in the network's unit; infinite until it is set.
    """

    def __init__(self, experts: tuple[nn.Module, nn.Module], call: NetworkCall) -> None:
        super().__init__(experts[0], call)
        self.second = experts[1]
        self._loops = (self._loop, _loop(experts[1], call))
        self._scales = (call.guidance, call.guidance_2)
        self.boundary = float("inf")

    def forward(self, x: Tensor, time: Tensor, **_: Any) -> Tensor:
        """``x`` ``[B, ...]``, ``time`` ``[B]`` in the network's unit."""
        rows, late = self._rows(x.shape[0], x.device), time < self.boundary
        if bool((late == late[:1]).all()):
            return self._mixed(int(late[0]), x, time, rows)
        places = [torch.nonzero(late == which)[:, 0] for which in (False, True)]
        parts = [self._mixed(k, x[i], time[i], rows[i]) for k, i in enumerate(places)]
        return torch.cat(parts)[torch.cat(places).argsort()]

    def _mixed(self, expert: int, x: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        loop, scale = self._loops[expert], self._scales[expert]
        if scale is None:
            return self._output(loop, x, time, rows)
        both = self._output(
            loop, torch.cat([x, x]), torch.cat([time, time]), self._of_branches(rows)
        )
        other, conditional = both.chunk(2)
        return other + scale * (conditional - other)


def _loop(network: nn.Module, call: NetworkCall) -> ProbeLoop:
    loop = ProbeLoop(network)
    loop.call = call.args, call.kwargs
    return loop


def _batched(call: NetworkCall) -> dict[str, Tensor]:
    """The remembered arguments that have one row per sample."""
    names = ("sample", "hidden_states", "timestep", "timesteps")
    rest = {k: v for k, v in call.kwargs.items() if k not in names}
    found = pytree.tree_flatten_with_path((call.args[2:], rest))[0]
    return {
        f"argument{i}": leaf
        for i, (path, leaf) in enumerate(found)
        if is_batched(str(path), leaf, call.prompts * call.branches)
    }
