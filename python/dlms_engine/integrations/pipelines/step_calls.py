"""The network calls of one step of a pipeline, for many prompts: how each is made of latents and time.

They are read off a recorded run: which part of an argument is the latents and which is constant (image
latents joined in channels or tokens), which arguments follow the scheduler's time, and with what
weights the outputs are mixed into what the scheduler is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .calls import same
from .forms import Packing, read_columns
from .program import Columns

TimeForm = tuple[Tensor, Tensor]
"""``offset + factor * time``, two float64 tensors of the argument's shape."""


@dataclass
class NetworkCall:
    """One network call of a step; leaves are numbered as in the flattened ``(args, kwargs)``.

    Attributes:
        module: the component's name.
        spec: pytree of the arguments.
        forms: leaves that hold the latents.
        times: leaves that follow the scheduler's time.
        batched: leaves with ``copies`` rows a sample, copy by copy.
        copies: how often a sample is in the batch.
        columns: how the branches are read from the outputs.
        weights: of the branches in the mix; of each branch's slices along dimension 1 where there are.
        slices: how many; 0 where a branch has one weight.
    """

    module: str
    spec: Any
    forms: dict[int, Packing]
    times: dict[int, TimeForm]
    batched: list[int]
    copies: int
    columns: Columns
    weights: list[float]
    slices: int = 0

    def table(self) -> Tensor:
        """``[branches, slices]`` float64 weights; ``[branches, 1]`` without slices."""
        return torch.tensor(self.weights, dtype=torch.float64).reshape(-1, max(self.slices, 1))

    @property
    def stacks(self) -> bool:
        """Whether samples can share a call: no reshaped latents, no lists of one tensor a sample."""
        forms = [*self.forms.values(), self.columns[0]]
        whole = all(f.sample is None and (f.shape is None or f.shape[0] == -1) for f in forms)
        return whole and not self.columns[1]

    def alike(self, other: NetworkCall) -> bool:
        """Whether ``other`` is the same call for other prompts."""
        weights = zip(self.weights, other.weights, strict=False)
        return (
            (self.module, self.spec, self.forms, self.batched, self.columns, len(self.weights))
            == (other.module, other.spec, other.forms, other.batched, other.columns, len(other.weights))
            and all(abs(a - b) <= 1e-2 for a, b in weights)
            and self.times.keys() == other.times.keys()
        )  # fmt: skip


@dataclass
class StepCalls:
    """The calls of a step for all prompts.

    Attributes:
        calls: in order; of two networks that are switched by time those of the first come first.
        first: how many of them are the first network's; all without a second one.
        samples: prompt -> call -> leaves. Batched ones have ``copies`` rows; of leaves that are the
            latents only the dtype counts.
        shape: of one sample's latents, as the scheduler sees them.
        scaled: whether the pipeline lets the scheduler scale the network's input, as an analytical
            first step needs.
        guidance: the scale where two branches are mixed; None without.
        guidance_2: the second network's.
        boundary: of two networks, the scheduler's time from which up the first is called.
        own_times: whether the pipeline passes times of its own to the scheduler.
    """

    calls: list[NetworkCall]
    first: int
    samples: list[list[list[Any]]]
    shape: tuple[int, ...]
    scaled: bool
    guidance: float | None = None
    guidance_2: float | None = None
    boundary: float | None = None
    own_times: bool = False

    @property
    def fused(self) -> bool:
        """Whether it is one call for both branches, the unconditional one first: the engine mixes."""
        if (
            len(self.calls) != 1
            or self.calls[0].slices
            or self.guidance is None
            or self.boundary is not None
        ):
            return False
        one = self.calls[0]
        return one.stacks and one.copies == 2 and abs(one.weights[1] - self.guidance) < 1e-9

    @property
    def stacks(self) -> bool:
        """Whether the samples of any batch can share a call."""
        return all(call.stacks for call in self.calls) and all(
            _stackable(call, [sample[k] for sample in self.samples])
            for k, call in enumerate(self.calls)
        )


def _stackable(call: NetworkCall, samples: list[list[Any]]) -> bool:
    """Whether batched leaves have one shape for all prompts, and all others one value."""
    own = {i for i, form in call.forms.items() if form.dim is None} | call.times.keys()
    for i, leaf in enumerate(samples[0]):
        others = [sample[i] for sample in samples[1:]]
        if i in own:
            continue
        if i in call.batched:
            if any(other.shape != leaf.shape for other in others):
                return False
        elif not all(same(leaf, other) for other in others):
            return False
    return True


def join(parts: Sequence[StepCalls]) -> StepCalls:
    """One for the prompts of all ``parts``, in order.

    Raises:
        ValueError: the calls differ in more than their prompts.
    """
    first = parts[0]
    for part in parts[1:]:
        alike = len(part.calls) == len(first.calls) and part.shape == first.shape
        if not alike or not all(a.alike(b) for a, b in zip(first.calls, part.calls, strict=True)):
            raise ValueError("the pipeline calls its network differently for different prompts")
    return replace(first, samples=[sample for part in parts for sample in part.samples])


def time_form(values: dict[int, Any], times: dict[int, float], levels: int, where: str) -> TimeForm:
    """How an argument follows the scheduler's time: by row ``values`` and ``times``.

    Element by element the time itself, its share of ``levels``, what is left of either, or
    another straight line.

    Raises:
        ValueError: it is none.
    """
    rows = sorted(values)
    shape = torch.as_tensor(values[rows[0]]).shape
    v = torch.stack([torch.as_tensor(values[n]).double().reshape(-1).cpu() for n in rows])
    t = torch.tensor([times[n] for n in rows], dtype=torch.float64)[:, None]
    offset, factor = torch.zeros_like(v[0]), torch.zeros_like(v[0])
    left = torch.ones_like(v[0], dtype=torch.bool)
    for a, b in ((0.0, 1.0), (0.0, 1 / levels), (1.0, -1 / levels), (float(levels), -1.0)):
        line = a + b * t
        # half-precision pipelines hand over rounded times; ours are not rounded
        fits = left & ((v - line).abs() <= 1e-2 * line.abs().max()).all(dim=0)
        offset[fits], factor[fits] = a, b
        left &= ~fits
    fixed = left & (v == v[:1]).all(dim=0)
    offset[fixed] = v[0, fixed]
    left &= ~fixed
    if bool(left.any()):
        line = torch.cat([torch.ones_like(t), t], dim=1)
        solved = torch.linalg.lstsq(line, v[:, left], driver="gelsd").solution
        wrong = (line @ solved - v[:, left]).abs().max()
        if len(rows) < 3 or wrong > 1e-5 * v.abs().max():
            raise ValueError(
                f"{where} follows the steps otherwise than on a straight line of the time"
            )
        offset[left], factor[left] = solved
    return offset.reshape(shape), factor.reshape(shape)


def evaluated(
    call: NetworkCall,
    times: dict[int, TimeForm],
    network: Any,
    leaves: list[Any],
    x: Tensor,
    time: Tensor,
) -> list[Tensor]:
    """The branches ``[B, ...]`` of one call on latents ``x`` ``[B, ...]`` at ``time`` ``[B]``.

    Args:
        times: those of ``call``, on the device.
        leaves: batched ones have ``copies * B`` rows, copy by copy.
    """
    given = list(leaves)
    for i, form in call.forms.items():
        given[i] = form.build(x, leaves[i])
    for i, (offset, factor) in times.items():
        given[i] = _times(call, i, offset, factor, time)
    args, kwargs = torch.utils._pytree.tree_unflatten(given, call.spec)
    output = network(*args, **kwargs)
    found = [
        leaf
        for leaf in torch.utils._pytree.tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    return read_columns(found, tuple(x.shape), *call.columns)


def _times(call: NetworkCall, i: int, offset: Tensor, factor: Tensor, time: Tensor) -> Tensor:
    if not call.stacks:  # one sample: as it was recorded
        return (offset + factor * time.double()).to(time.dtype).reshape(offset.shape)
    if i in call.batched:  # [copies, ...] of one sample -> [copies * B, ...]
        shaped = time.double().reshape(1, -1, *([1] * (offset.ndim - 1)))
        return (offset[:, None] + factor[:, None] * shaped).to(time.dtype).flatten(0, 1)
    one = offset.reshape(-1)[0] + factor.reshape(-1)[0] * time.double()
    return one.to(time.dtype).repeat(call.copies)
