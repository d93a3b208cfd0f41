"""One suite for every implementation of the fused row that can be had here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import (
    DTYPES,
    Case,
    assert_no_worse_than_eager,
    assert_same_bits,
    make_case,
    truth_of,
)

from dlms_engine import kernels, ops
from dlms_engine.ops import backends, layout, reference

SHAPES = [(2, 4), (3, 3, 5, 7), (1, 1), (5, 2), (2, 3, 8, 8), (1, 1300), (0, 3, 4)]


def params() -> list[Any]:
    cuda = pytest.mark.needs_cuda
    return [
        pytest.param(("eager", "cpu"), id="eager"),
        pytest.param(("cpu", "cpu"), id="cpu"),
        pytest.param(("triton", "cpu"), id="triton-interpreted"),
        pytest.param(("eager", "cuda"), id="eager-cuda", marks=cuda),
        pytest.param(("cuda", "cuda"), id="cuda", marks=cuda),
        pytest.param(("triton", "cuda"), id="triton", marks=cuda),
    ]


@pytest.fixture(params=params())
def backend(request: pytest.FixtureRequest) -> tuple[ops.Backend, str]:
    name, device = request.param
    if name == "triton" and (device == "cpu") != kernels.interpreted():
        pytest.skip("TRITON_INTERPRET=1 runs the Triton kernels on the CPU, unset on the GPU")
    if name not in backends.available() and device == "cpu":
        pytest.skip(f"backend {name}: {backends._missing.get(name, 'not part of this build')}")
    return ops.select(name, device), device


def run(backend: tuple[ops.Backend, str], case: Case) -> tuple[torch.Tensor, ...]:
    there = case.to(backend[1])
    return tuple(t.cpu() for t in backend[0].fused_row(*there.forward()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "depth", "per_sample", "guided"),
    [
        ((3, 3, 5, 7), 1, False, False),
        ((3, 3, 5, 7), 3, True, True),
        ((2, 3, 8, 8), 4, False, True),
        ((2, 1300), 2, True, False),
        ((2, 4, 8), 7, False, False),
        ((2, 2, 4), 20, True, True),
    ],
)
def test_forward_has_the_bits_of_the_reference(backend, dtype, shape, depth, per_sample, guided):
    case = make_case(shape, depth, dtype, per_sample=per_sample, guided=guided)
    got, want = run(backend, case), reference.fused_row(*case.forward())
    assert_same_bits(got, want)
    for g, w, truth in zip(got, want, truth_of(case), strict=True):
        assert_no_worse_than_eager(g, w, truth)


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "each"])
def test_every_depth(backend, per_sample):
    slow = backend[0].name == "triton"  # compiled or interpreted: seconds for each depth
    for depth in (1, 5, 12, 20) if slow else range(1, 21):
        case = make_case((2, 5), depth, per_sample=per_sample, guided=depth % 2 == 0, seed=depth)
        assert_same_bits(run(backend, case), reference.fused_row(*case.forward()), f"depth {depth}")
        got = backend[0].fused_row_backward(*case.to(backend[1]).backward())
        want = reference.fused_row_backward(*case.backward())
        assert_same_bits(tuple(got[:4]), want[:4], f"gradients at depth {depth}")
        torch.testing.assert_close(got[4].cpu(), want[4], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "each"])
def test_any_shape_functional_and_in_place(backend, shape, per_sample):
    case = make_case(shape, 3, torch.bfloat16, per_sample=per_sample, guided=True, seed=1)
    want = reference.fused_row(*case.forward())
    assert_same_bits(run(backend, case), want, "functional")
    there = case.to(backend[1])
    network_input = torch.full_like(there.f, float("nan"))
    backend[0].fused_row_(*there.forward(), network_input)
    ring = case.ring.clone()
    reference.write_slot(ring, case.row, want[1])
    assert_same_bits((there.x, there.ring, network_input), (want[0], ring, want[2]), "in place")


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "each"])
def test_a_slot_of_zero_weight_is_not_read(backend, per_sample):
    case = make_case((2, 3, 8, 8), 4, per_sample=per_sample)
    case.row[..., layout.B + 2] = 0.0
    clean = reference.fused_row(*case.forward())
    for i in range(2):
        row = case.row if case.row.dim() == 1 else case.row[i]
        slot = int(row[layout.SLOT])
        case.ring[(slot - 2) % 4, i] = float("nan")
        case.ring[slot, i] = float("nan")  # the slot m goes to is never read either
    assert_same_bits(run(backend, case), clean)


def test_the_poison_would_be_seen(backend):
    case = make_case((2, 3, 8, 8), 4)
    case.ring[(int(case.row[layout.SLOT]) - 2) % 4] = float("nan")
    assert run(backend, case)[0].isnan().all()


@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_any_alignment(backend, offset):
    case = make_case((2, 3, 8, 8), 3, torch.float16, guided=True)
    want = reference.fused_row(*case.forward())

    def shifted(t: torch.Tensor) -> torch.Tensor:
        room = t.new_full((t.numel() + offset,), float("nan"))
        room[offset:] = t.flatten()
        return room[offset:].view(t.shape)

    there = case.to(backend[1]).map(shifted)
    assert_same_bits(tuple(t.cpu() for t in backend[0].fused_row(*there.forward())), want)


def test_strided_inputs(backend):
    case = make_case((2, 4, 6, 8), 2, guided=True)
    want = reference.fused_row(*case.forward())

    def strided(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t

    there = case.to(backend[1]).map(strided)
    assert_same_bits(tuple(t.cpu() for t in backend[0].fused_row(*there.forward())), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("depth", "per_sample", "guided"), [(1, False, True), (3, True, True), (6, False, False)]
)
def test_backward(backend, dtype, depth, per_sample, guided):
    case = make_case((3, 2, 5, 8), depth, dtype, per_sample=per_sample, guided=guided, seed=2)
    case.row[..., -1] = 0.0 if depth > 1 else 1.0
    got = tuple(t.cpu() for t in backend[0].fused_row_backward(*case.to(backend[1]).backward()))
    want = reference.fused_row_backward(*case.backward())
    assert_same_bits(got[:4], want[:4])
    # The sums differ in order only; all run in float64 before the one rounding to the row's dtype.
    # So half an ulp of the result, and what reordering N products in float64 can move.
    bound = torch.finfo(got[4].dtype).eps * want[4].abs() + 240 * 2.0**-52 * 240 * 16
    assert ((got[4] - want[4]).abs() <= bound).all()


def test_backward_reads_the_slot_of_a_zero_weight_but_no_poison(backend):
    case = make_case((2, 40), 3)
    case.row[layout.B + 1 :] = 0.0
    slot = int(case.row[layout.SLOT])
    case.ring[(slot - 2) % 3] = float("nan")
    got = backend[0].fused_row_backward(*case.to(backend[1]).backward())[4].cpu()
    want = reference.fused_row_backward(*case.backward())[4]
    assert want[layout.B + 1] != 0 and want[layout.B + 2] == 0
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_empty_backward(backend):
    case = make_case((0, 3, 4), 2)
    grads = backend[0].fused_row_backward(*case.to(backend[1]).backward())
    assert [tuple(g.shape) for g in grads] == [(0, 3, 4), (0,), (0, 3, 4), (2, 0, 3, 4), (8,)]
    assert (grads[4] == 0).all()


Kernel = Callable[..., tuple[torch.Tensor, ...]]


def batch_invariant(forward: Kernel, backward: Kernel, device: str, case: Case) -> None:
    """Each sample alone gives the bits it has in the batch."""

    def both(c: Case) -> tuple[torch.Tensor, ...]:
        there = c.to(device)
        grads = backward(*there.backward())
        return tuple(t.cpu() for t in (*forward(*there.forward()), grads[0], grads[2], grads[4]))

    alone = [both(case.sample(i)) for i in range(case.x.shape[0])]
    together = both(case)
    assert_same_bits(together, tuple(torch.cat(parts) for parts in zip(*alone, strict=True)))


@pytest.mark.parametrize("shape", [(5, 3, 7), (3, 1300)], ids=str)
def test_batch_invariance(backend, shape):
    kernels, device = backend
    case = make_case(shape, 3, per_sample=True, guided=True)
    batch_invariant(kernels.fused_row, kernels.fused_row_backward, device, case)


@pytest.mark.parametrize("faulty", ["forward", "backward"])
def test_the_invariance_check_can_fail(backend, faulty):
    """The planted kernel adds the batch's mean: nothing for a sample alone, a little in a batch."""
    kernels, device = backend

    def leaking(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kernel = kernels.fused_row if faulty == "forward" else kernels.fused_row_backward
        first, *others = kernel(*args)
        return (first + 1e-6 * (first.mean(0) - first), *others)

    both = {"forward": kernels.fused_row, "backward": kernels.fused_row_backward, faulty: leaking}
    case = make_case((5, 3, 7), 3, per_sample=True)
    batch_invariant(both["forward"], both["backward"], device, case.sample(0))
    with pytest.raises(AssertionError, match="differs by"):
        batch_invariant(both["forward"], both["backward"], device, case)
