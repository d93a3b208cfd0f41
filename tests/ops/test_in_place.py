"""The row in place and autograd: writes are counted, gradients that would be lost are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlms_engine import ops
from dlms_engine.ops import layout, schema

WRITTEN = {"x": 2, "ring": 3, "network_input": 5}


def arguments() -> list[Tensor | None]:
    row = torch.tensor([0.1, 0.9, 0.5, 1.0, 1.0, 0.0, 0.2, 0.0])
    assert len(row) == layout.row_width(2)
    ring, network_input = torch.zeros(2, 2, 3), torch.zeros(2, 3)
    return [torch.ones(2, 3), None, torch.ones(2, 3), ring, row, network_input]


def in_place(backend: str):
    """The public operator: torch's own for what it dispatches to, else the backend's."""
    return torch.ops.dlms.fused_row_ if backend == "cpu" else ops.select(backend).fused_row_


@pytest.mark.parametrize("backend", ops.available("cpu"))
@pytest.mark.parametrize("grad", [True, False])
def test_what_is_written_counts_a_version(backend: str, grad: bool) -> None:
    """Autograd then finds a tensor that was saved for backward and overwritten."""
    given = arguments()
    before = {name: given[at]._version for name, at in WRITTEN.items()}
    with torch.set_grad_enabled(grad):
        in_place(backend)(*given)
    after = {name: given[at]._version for name, at in WRITTEN.items()}
    assert all(after[name] > before[name] for name in WRITTEN), (before, after)


@pytest.mark.skipif("cpu" not in ops.available(), reason="built without _ops_cpu")
def test_backward_through_what_was_overwritten_is_an_error() -> None:
    given = arguments()
    scale = torch.ones(2, 3, requires_grad=True)
    product = (scale * given[2]).sum()
    torch.ops.dlms.fused_row_(*given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    # The operator of loops counts nothing: the same backward would be wrong in silence.
    given = arguments()
    product = (scale * given[2]).sum()
    torch.ops.dlms._fused_row_(*given)
    product.backward()
    assert not torch.equal(scale.grad, torch.ones(2, 3))


@pytest.mark.parametrize("backend", ops.available("cpu"))
@pytest.mark.parametrize("name", list(WRITTEN))
def test_a_leaf_that_requires_grad_is_refused(backend: str, name: str) -> None:
    given = arguments()
    written = given[WRITTEN[name]].requires_grad_()
    start = written.detach().clone()
    with pytest.raises(RuntimeError, match="requires grad"):
        in_place(backend)(*given)
    assert torch.equal(written.detach(), start)
    with torch.no_grad():
        in_place(backend)(*given)
    assert not torch.equal(written.detach(), start)


@pytest.mark.skipif("cpu" not in ops.available(), reason="built without _ops_cpu")
@pytest.mark.parametrize("name", ["f", "f_cond", "row"])
def test_a_gradient_that_would_be_lost_is_refused(name: str) -> None:
    given = arguments()
    given[1] = torch.ones(2, 3)
    given[("f", "f_cond", "x", "ring", "row").index(name)].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name} requires grad, but a row in place keeps no"):
        ops.fused_row_(*given)


def test_inference_tensors_are_taken() -> None:
    with torch.inference_mode():
        given = arguments()
        ops.fused_row_(*given)
    assert given[2].is_inference() and not torch.equal(given[2], torch.ones(2, 3))


@pytest.mark.skipif("cpu" not in ops.available(), reason="built without _ops_cpu")
def test_loops_use_the_operator_that_counts_nothing() -> None:
    given = arguments()
    backend = ops.select("cpu")
    backend(*given)
    assert backend.in_loop is torch.ops.dlms._fused_row_.default and given[2]._version == 0
    torch.library.opcheck(
        torch.ops.dlms._fused_row_.default,
        tuple(arguments()),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(schema.SCHEMAS) >= {"fused_row_", "_fused_row_"}
