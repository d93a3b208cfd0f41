"""Inputs, keys and a network whose attributes change, for the tests of captured runs."""

from __future__ import annotations

import collections
import functools
from typing import Any

import numpy as np
import torch
from torch import nn

from dlms_engine.engine.cuda_graph_cache import graph_key

X = {"x": torch.zeros(3)}


def key(n: int, **options: Any) -> Any:
    return graph_key(len, {"x": torch.zeros(n + 1)}, **options)[0]


class Processor:
    def __init__(self, scale: float) -> None:
        self.scale = scale


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Adapted(nn.Linear):
    """As PEFT's layers: settings in plain attributes, lists and dicts; a processor object."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.scaling = {"default": 1.0}
        self._active_adapter = ["default"]
        self._disable_adapters = False
        self.processor = Processor(1.0)
        self.b1 = 1.1
        self.table = torch.zeros(2)
        self.strength = torch.tensor(0.5)
        self.memory = torch.zeros(4, 2)
        self.rows = self.memory[:2]
        self.register_buffer("part", self.memory[:2])
        self.skipped = {1, "up"}
        self.recent = collections.deque([1, 2])
        self.factor = np.float32(1.0)
        self.factors = np.ones(3)
        self.phase = 1 + 2j
        self.window = range(4)
        self.call = functools.partial(pow, 2)
        self.slotted = Slotted(1.0)
