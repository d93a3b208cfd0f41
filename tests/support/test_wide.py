"""Casts that leave single precision alone."""

from __future__ import annotations

import torch
from torch import nn

from dlms_engine.support.wide import at_least_single


def test_only_casts_below_single_precision_are_left_out() -> None:
    single, half = torch.ones(2), torch.ones(2, dtype=torch.float16)
    for kind in (torch.float16, torch.bfloat16):
        assert single.to(kind).dtype == kind  # planted: the cast alone
        assert at_least_single(lambda t, kind=kind: t.to(kind))(single).dtype == torch.float32
    narrow = at_least_single(lambda t: t.to(torch.bfloat16))
    assert narrow(half).dtype == torch.bfloat16 and narrow(single.double()).dtype == torch.float64
    assert at_least_single(lambda t: t.double())(single).dtype == torch.float64
    assert at_least_single(lambda t: t.to("meta", torch.float16))(single).device.type == "meta"


def test_a_module_moves_as_it_did() -> None:
    layer = nn.Linear(2, 2)
    assert layer._apply(at_least_single(lambda t: t.to("meta"))).weight.is_meta
