"""The Triton operators as PyTorch sees them (interpreter on the CPU, compiled on a GPU)."""

from __future__ import annotations

import pytest
import torch
from gpu import triton_device
from kernel_cases import make_case

from dlms_engine import kernels, ops
from dlms_engine.ops import reference


@pytest.fixture
def device() -> str:
    return triton_device()


def test_opcheck(device):
    from dlms_engine.kernels.triton import operators

    case = make_case((2, 3, 4), 2, guided=True).to(device)
    f, f_cond, x, ring, row = (t.requires_grad_() for t in case.forward())
    torch.library.opcheck(operators.fused_row, (f, f_cond, x, ring, row))
    case = make_case((2, 3, 4), 2).to(device)
    torch.library.opcheck(operators.fused_row_, (*case.forward(), torch.zeros_like(case.f)))
    torch.library.opcheck(operators.fused_row_backward, case.backward())


def test_gradients_are_those_of_autograd_through_the_reference(device):
    case = make_case((2, 3, 4), 3, torch.float64, per_sample=True, guided=True)

    def gradients(fused_row, where):
        inputs = [t.detach().to(where).requires_grad_() for t in case.forward()]
        outputs = fused_row(*inputs)
        upstream = [g.to(where) for g in case.grads]
        return [g.cpu() for g in torch.autograd.grad(outputs, inputs, upstream)]

    want = gradients(reference.fused_row, "cpu")
    found = gradients(ops.select("triton", device).fused_row, device)
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_explicit_choice_raises_where_it_cannot_be_had():
    if kernels.triton_reason() is None:
        pytest.skip("Triton can be had here")
    with pytest.raises(ops.BackendUnavailable, match="triton"):
        ops.select("triton", "cuda")


def test_in_place_needs_contiguous_tensors(device):
    case = make_case((2, 3, 4), 2).to(device)
    x = case.x.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="must be contiguous"):
        ops.select("triton", device).fused_row_(
            case.f, None, x, case.ring, case.row, torch.zeros_like(case.f)
        )
