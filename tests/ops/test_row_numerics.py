"""Every backend computes what `ops.reference` says: bits in float32, twice its error in half."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from marks import slow

from dlms_engine import ops
from dlms_engine.ops import layout, reference

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
]
SHAPES = [(1,), (3, 5), (2, 3, 7, 5), (2, 1031), (0, 4), (3, 0), (4, 4, 32, 33)]
needs_cpu_library = pytest.mark.skipif(
    "cpu" not in ops.available(), reason="built without _ops_cpu: nothing to compare"
)


def make_case(shape, depth, state, network, per_sample, guided, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=g, dtype=torch.float64)

    f = randn(*shape).to(network)
    f_cond = randn(*shape).to(network) if guided else None
    width = layout.row_width(depth)
    row = randn(*((shape[0], width) if per_sample else (width,)))
    row[..., layout.SLOT] = torch.randint(0, depth, row.shape[:-1], generator=g).double()
    row[..., layout.B :] *= torch.rand(row[..., layout.B :].shape, generator=g) < 0.7
    x, ring = (randn(*shape) * 30).to(state), randn(depth, *shape).to(state)
    return f, f_cond, x, ring, row.to(state)


@needs_cpu_library
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[1]}"[6:])
def test_compiled_row_has_the_bits_of_eager(shape, depth, dtypes):
    for per_sample, guided in itertools.product((False, True), repeat=2):
        case = make_case(shape, depth, *dtypes, per_sample, guided)
        expected = reference.fused_row(*case)
        for got, want in zip(ops.fused_row(*case), expected, strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)
        f, f_cond, x, ring, row = case
        before, network_input = ring.clone(), torch.full_like(f, float("nan"))
        ops.fused_row_(f, f_cond, x, ring, row, network_input)
        reference.write_slot(before, row, expected[1])
        assert torch.equal(x, expected[0]) and torch.equal(ring, before)
        assert torch.equal(network_input, expected[2])


@needs_cpu_library
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[1]}"[6:])
@pytest.mark.parametrize("depth", [1, 3, 5])
def test_compiled_backward_has_the_bits_of_eager(depth, dtypes):
    for per_sample, guided in itertools.product((False, True), repeat=2):
        case = make_case((3, 4, 57), depth, *dtypes, per_sample, guided)
        grads = [torch.randn(3, 4, 57, dtype=d) for d in (dtypes[0], dtypes[0])]
        grads.append(torch.randn(3, 4, 57).to(dtypes[1]))
        *got, got_row = ops.fused_row_backward(*grads, *case)
        *want, want_row = reference.fused_row_backward(*grads, *case)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        # Both sum in float64: at most the last bit of the state dtype is the order's.
        torch.testing.assert_close(got_row, want_row, rtol=2e-7, atol=1e-4)
        assert not got_row[..., layout.SLOT].any()


def assert_no_worse_than_eager(fused, case, slack=2.0):
    """float64 is the truth, the eager row of the same dtypes the yardstick; maximum errors."""
    wide = tuple(None if t is None else t.double() for t in case)
    names = ("x_next", "m", "network_input")
    results = (fused(*case), reference.fused_row(*case), reference.fused_row(*wide))
    for name, got, eager, truth in zip(names, *results, strict=True):
        assert got.isfinite().all(), name
        yard = (eager.double() - truth).abs().max()
        floor = torch.finfo(got.dtype).eps * truth.abs().max()
        error = (got.double() - truth).abs().max()
        assert error <= slack * max(yard, floor), f"{name}: {error:.2e} > {slack} x {yard:.2e}"


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=lambda d: f"{d[1]}"[6:])
def test_error_is_at_most_twice_that_of_eager(dtypes):
    for seed in range(5):
        case = make_case((3, 4, 33), 3, *dtypes, False, True, seed)
        assert_no_worse_than_eager(ops.fused_row, case)


def test_the_error_check_can_fail():
    def sloppy(*case):
        x_next, m, network_input = reference.fused_row(*case)
        return x_next.bfloat16().float(), m, network_input

    case = make_case((3, 4, 33), 3, torch.float32, torch.float32, False, True)
    with pytest.raises(AssertionError, match="x_next"):
        assert_no_worse_than_eager(sloppy, case)


@pytest.mark.parametrize("name", ops.available("cpu"))
@pytest.mark.parametrize("per_sample", [False, True], ids=["static", "per_sample"])
def test_a_slot_of_weight_zero_is_not_read(name, per_sample):
    f, f_cond, x, ring, row = make_case((2, 9), 4, torch.float32, torch.float32, per_sample, True)
    row[..., layout.B + 1 :] = 0.0
    ring.fill_(float("nan"))
    for out in ops.select(name).fused_row(f, f_cond, x, ring, row):
        assert out.isfinite().all()
    row[..., layout.B + 2] = 0.5  # the control: now it is read
    x_next, m, _ = ops.select(name).fused_row(f, f_cond, x, ring, row)
    assert x_next.isnan().all() and m.isfinite().all()


@pytest.mark.parametrize("name", ops.available("cpu"))
def test_an_output_of_weight_zero_does_not_reach_the_state(name):
    f, _, x, ring, row = make_case((2, 9), 1, torch.float32, torch.float32, False, False)
    row[layout.B] = 0.0
    x_next, m, _ = ops.select(name).fused_row(f.fill_(float("nan")), None, x, ring, row)
    assert x_next.isfinite().all() and m.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_conversions_agree_with_torch_on_every_pattern(dtype):
    """All 65536 values in, and on the way out ties, overflow, subnormals and NaN."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    row = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    ring = torch.zeros(1, 1, every.numel())
    zero = torch.zeros(1, every.numel())
    _, m, _ = ops.fused_row(every[None], None, zero, ring, row)
    # 0 * 0 + 1 * F: only -0 changes, to +0.
    assert torch.equal(m.nan_to_num(7.0), every[None].float().nan_to_num(7.0))

    finite = every[every.isfinite()].float()
    between = torch.cat([finite * s for s in (1.0, 1 + 2**-9, 1 + 2**-12, 1 - 2**-12, 1 + 2**-20)])
    wild = torch.tensor([65504.0, 65519.9, 65520.0, 3.4e38, 1e-8, 2.98e-8, 2.9803e-8, 6e-8, 1e-45])
    values = torch.cat([between, wild, -wild, torch.tensor([float("nan"), float("inf")])])[None]
    row = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    _, _, out = ops.fused_row(values.to(dtype), None, values, torch.zeros(1, *values.shape), row)
    want = values.to(dtype)
    nan = want.isnan()  # torch itself has two bit patterns for it, by vector and by scalar code
    assert torch.equal(out.isnan(), nan)
    assert torch.equal(out[~nan].view(torch.int16), want[~nan].view(torch.int16))


@needs_cpu_library
@pytest.mark.parametrize("isa", ["baseline", slow("avx2")])
def test_other_instruction_sets_give_the_same_bits(isa):
    """The wheel holds three; those that this machine does not choose run in a child process."""
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); import pytest; "
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', sys.argv[1], '-k', "
        "'has_the_bits_of_eager or half_conversions', '--import-mode=importlib']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, __file__],
        env={**os.environ, "DLMS_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def assert_batch_invariant(row_of, shape=(5, 3, 37)):
    f, f_cond, x, ring, row = make_case(shape, 3, torch.float32, torch.bfloat16, True, True)
    together = row_of(f, f_cond, x, ring, row)
    for i in range(shape[0]):
        one = slice(i, i + 1)
        alone = row_of(f[one], f_cond[one], x[one], ring[:, one].contiguous(), row[one])
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[one], b), f"sample {i} changes with its batch mates"


@pytest.mark.parametrize("name", ops.available("cpu"))
def test_a_sample_has_the_same_bits_in_any_batch(name):
    assert_batch_invariant(ops.select(name).fused_row)


def test_the_batch_check_can_fail():
    def leaky(f, f_cond, x, ring, row):
        x_next, m, network_input = reference.fused_row(f, f_cond, x, ring, row)
        return x_next - 1e-6 * x_next.mean(0), m, network_input

    with pytest.raises(AssertionError, match="batch mates"):
        assert_batch_invariant(leaky)


@pytest.mark.parametrize("shape", [(3, 131, 1027), (300_001,)], ids=str)
def test_thread_count_changes_no_bit(shape):
    """Large enough to be split; the second shape splits inside what would be one vector."""
    case = make_case(shape, 3, torch.float32, torch.float32, False, False)
    grads = [torch.randn(shape) for _ in range(3)]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((*ops.fused_row(*case), *ops.fused_row_backward(*grads, *case)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
