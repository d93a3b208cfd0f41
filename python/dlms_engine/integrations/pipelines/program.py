"""What a recorded run says of the pipeline's loop: its calls, and how the model output is mixed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .calls import Slot, gram, sliced_gram
from .forms import Packing

Columns = tuple[Packing, bool]  # how branches are read from outputs; one tensor a sample


@dataclass
class SlotRecord:
    """What is known about a slot's calls after some steps.

    Attributes:
        first: the leaves of its first call.
        forms: leaf number -> how it is made of the latents.
        steps: leaf number -> row -> value, for small arguments that follow the steps.
        columns: how the latents' branches are read from the outputs.
        output_leaves, output_spec: of its first call, so that stand-ins look alike.
    """

    spec: Any
    paths: list[str]
    first: list[Any]
    forms: dict[int, Packing]
    columns: Columns | None
    output_leaves: list[Any]
    output_spec: Any
    steps: dict[int, dict[int, Any]] = field(default_factory=dict)


@dataclass
class Program:
    """What the engine's loop has to do in every step; made by ``Recorder.program``.

    Attributes:
        rows: the first row and the one after the last.
        slots: what each kind of call looks like.
        order: row -> its calls, in the pipeline's order.
        products: row -> ``gram`` of the recorded outputs, latents and model output.
        dtypes: of the calls' outputs and of the model output.
        slices: the latents' length along dimension 1 where each of its slices is mixed with weights of
            its own: channels that are not guided, frames of a video; else 0.
    """

    rows: tuple[int, int]
    slots: dict[Slot, SlotRecord]
    order: dict[int, list[Slot]]
    products: dict[int, Tensor]
    dtypes: tuple[torch.dtype, ...]
    slices: int = 0


def mixed_products(columns: list[Tensor], sample: Tensor, output: Tensor, slices: int) -> Tensor:
    """``gram`` of the branches and the latents, or ``sliced_gram``."""
    if slices:
        return sliced_gram(columns, sample, output)
    return gram([*columns, sample], output)
