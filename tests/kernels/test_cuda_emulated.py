"""The CUDA kernels' own source, run on the CPU: indexing, arithmetic and sums without a GPU.

What this cannot see: races, the launch and the host code, which need a GPU (scripts/gpu_check.sh).
"""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from kernel_cases import DTYPES, Case, assert_same_bits, make_case
from marks import slow
from torch import Tensor

from dlms_engine.ops import layout, reference

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def build(folder: Path, kernels: Path, optimize: str = "-O1") -> ctypes.CDLL:
    here = Path(__file__).parent / "emulation"
    library = folder / "emulated.so"
    command = ["g++", "-std=c++17", optimize, "-ffp-contract=off", "-shared", "-fPIC"]
    command += [f"-I{part}" for part in (here, kernels, ROOT / "csrc")]
    command += [str(here / "emulate.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("emulated"), ROOT / "kernels" / "cuda")


def pointers(tensors: list[Tensor | None]) -> ctypes.Array:
    assert all(t is None or t.is_contiguous() for t in tensors)
    values = [None if t is None else t.data_ptr() for t in tensors]
    return (ctypes.c_void_p * len(values))(*values)


def numbers(*values: int) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_full(shape or like.shape, float("nan"))


def forward(
    library, case: Case, way: str, in_place: bool = False, most: int = 65535
) -> tuple[Tensor, ...]:
    """(x_next, m or ring, network_input)."""
    f, f_cond, x, ring, row = case.forward()
    x_next, m = (x, ring) if in_place else (empty(x), empty(x))
    network_input = empty(f)
    each = row.dim() == 2
    size = numbers(
        x.shape[0] if each else 1,
        x[0].numel() if each else x.numel(),
        x.numel(),
        row.shape[1] if each else 0,
        ring.shape[0],
    )
    arguments = pointers([f, f_cond, x, ring, row, x_next, m, network_input])
    aligned, early = way != "scalars", way == "early slots"
    most = ctypes.c_int64(most)
    library.dlms_forward(DTYPE_CODES[f.dtype], arguments, size, in_place, aligned, early, most)
    return x_next, m, network_input


def backward(library, case: Case, aligned: bool) -> tuple[Tensor, ...]:
    f, f_cond, x, ring, row = case.forward()
    grad_f_cond = None if f_cond is None else empty(f)
    outputs = [empty(f), grad_f_cond, empty(x), empty(ring), empty(row)]
    width = row.shape[1] if row.dim() == 2 else 0
    size = numbers(x.shape[0], x[0].numel(), x.numel(), width, ring.shape[0])
    arguments = pointers([*case.grads, f, f_cond, x, ring, row, *outputs])
    library.dlms_backward(DTYPE_CODES[f.dtype], arguments, size, aligned)
    return tuple(f.new_empty(0) if t is None else t for t in outputs)


DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
CASES = [
    # shape, depth, per_sample, guided
    ((3, 3, 5, 7), 1, False, False),  # scalar path: 315 elements
    ((2, 4, 8, 8), 2, False, True),
    ((3, 4, 8, 8), 3, True, True),
    ((2, 2056), 4, True, False),  # more than one block a sample
    ((3, 1, 7), 6, True, True),  # general depth, ragged samples
    ((2, 4, 4, 8), 20, False, True),
]


WAYS = ["words", "scalars", "early slots"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("shape", "depth", "per_sample", "guided"), CASES)
def test_forward_bits(library, dtype, way, shape, depth, per_sample, guided):
    case = make_case(shape, depth, dtype, per_sample=per_sample, guided=guided)
    if depth > 2:
        case.row[..., layout.B + 2] = 0.0
    want = reference.fused_row(*case.forward())
    for i in range(shape[0]):
        row = case.row[i] if per_sample else case.row
        slot = int(row[layout.SLOT])
        case.ring[slot, i] = float("nan")  # never read
        if depth > 2:
            case.ring[(slot - 2) % depth, i] = float("nan")
    assert_same_bits(forward(library, case, way), want)
    again = case.map(torch.clone)
    got = forward(library, again, way, in_place=True, most=2)  # 2 samples a launch
    ring = case.ring.clone()
    reference.write_slot(ring, case.row, want[1])
    assert_same_bits((got[0], got[2]), (want[0], want[2]), "in place")
    torch.testing.assert_close(again.ring, ring, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("depth", [2, 3, 4, 5])
@pytest.mark.parametrize("slot", [-7, -1, 0, 6, 1_000_003, -(2**31), 2**31 - 128])
def test_any_slot_number_is_taken_modulo_the_depth(library, way, depth, slot):
    case = make_case((2, 64), depth)
    case.row[layout.SLOT] = float(slot)
    taken = case.row.clone()
    taken[layout.SLOT] = float(slot % depth)
    want = reference.fused_row(case.f, None, case.x, case.ring, taken)
    assert_same_bits(forward(library, case, way), want)
    ring = case.ring.clone()
    forward(library, case, way, in_place=True)
    reference.write_slot(ring, taken, want[1])
    assert torch.equal(case.ring, ring)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_weight_of_zero_keeps_the_sign_of_zero(library, way, zero):
    """What stands in for an unread slot must not turn a sum of -0 into +0."""
    case = make_case((1, 8), 3)
    case.row[layout.A], case.row[layout.B :] = 1.0, zero
    case.x[:] = torch.tensor([-0.0, 0.0] * 4)
    x_next = forward(library, case, way)[0]
    assert torch.equal(x_next.view(torch.int32), case.x.view(torch.int32))


@pytest.mark.parametrize("depth", [3, 20])
@pytest.mark.parametrize("way", ["words", "scalars"])
def test_slots_beyond_two_to_the_31(library, way, depth):
    """A ring of 20 slots of 2^27 elements, of which only the pages that are touched exist."""
    total, n = 2**27 * 20 // depth // 8 * 8, 64
    case = make_case((1, n), depth)
    case.row[layout.SLOT] = 0.0  # m_{n-1} lies in the last slot
    want = reference.fused_row(*case.forward())
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    with mmap.mmap(-1, 4 * depth * total, flags=flags) as memory:
        address = ctypes.addressof(held := ctypes.c_char.from_buffer(memory))
        for slot in range(depth):
            ctypes.memmove(address + 4 * slot * total, case.ring[slot].data_ptr(), 4 * n)
        x, m, network_input = case.x.clone(), empty(case.x), empty(case.f)
        arguments = pointers([case.f, None, x, None, case.row, x, m, network_input])
        arguments[3] = address
        size = numbers(1, n, total, 0, depth)
        library.dlms_forward(0, arguments, size, False, way != "scalars", False, ctypes.c_int64(1))
        del held  # the view that keeps the memory open
    assert_same_bits((x, m, network_input), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("aligned", [True, False], ids=["words", "scalars"])
@pytest.mark.parametrize(("shape", "depth", "per_sample", "guided"), CASES)
def test_backward_bits_and_sums(library, dtype, aligned, shape, depth, per_sample, guided):
    case = make_case(shape, depth, dtype, per_sample=per_sample, guided=guided, seed=3)
    if depth > 2:
        case.row[..., layout.B + 2] = 0.0
    want = reference.fused_row_backward(*case.backward())
    got = backward(library, case, aligned)
    assert_same_bits(got[:4], want[:4])
    count = case.x.numel()
    bound = torch.finfo(got[4].dtype).eps * want[4].abs() + count * 2.0**-52 * count * 16
    assert ((got[4] - want[4]).abs() <= bound).all()


def test_backward_sums_do_not_depend_on_batch_or_alignment(library):
    case = make_case((4, 2056), 3, torch.bfloat16, per_sample=True, guided=True)
    together = backward(library, case, True)[4]
    alone = [backward(library, case.sample(i), aligned=i % 2 == 0)[4] for i in range(4)]
    assert torch.equal(together, torch.cat(alone))


def test_backward_of_a_poisoned_slot_of_zero_weight(library):
    case = make_case((2, 40), 3)
    case.row[layout.B + 1 :] = 0.0
    case.ring[(int(case.row[layout.SLOT]) - 2) % 3] = float("nan")
    got, want = backward(library, case, True), reference.fused_row_backward(*case.backward())
    assert want[4][layout.B + 1] != 0 and want[4][layout.B + 2] == 0
    torch.testing.assert_close(got[4], want[4], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("file", "fault", "way"),
    [
        slow("fused_row_kernel.cuh", ("weights[k] != S(0);", "true;"), "words"),
        slow("fused_row_kernel.cuh", ("wanted && from == s", "from == s"), "early slots"),
        slow("fused_row_kernel.cuh", ("b[g] != S(0)", "k0 + g < depth"), "scalars"),
        ("fused_row_kernel.cuh", ("mul(c_in, acc", "mul(S(2), acc"), "words"),
        slow("fused_row_kernel.cuh", ("row += count * row_stride;", ""), "words"),
        slow("row_math.cuh", ("s < 0 ? s + depth : s", "s < 0 ? 0 : s"), "scalars"),
        slow("row_math.cuh", ("+ (kMultiple - k)) % kDepth", "- k) % kDepth"), "words"),
        slow("row_math.cuh", ("__fadd_rn(a, b)", "std::fma(a, 1.0f + 1e-7f, b)"), "words"),
    ],
    ids=[
        "reads-zero-weights",
        "uses-zero-weights",
        "general-zero-weights",
        "wrong-column",
        "second-launch-of-samples",
        "wrong-slot-back",
        "wrong-slot",
        "other-rounding",
    ],
)
def test_a_planted_fault_is_found(tmp_path, file: str, fault: tuple[str, str], way: str):
    folder = tmp_path / "cuda"
    shutil.copytree(ROOT / "kernels" / "cuda", folder)
    source = (folder / file).read_text()
    assert fault[0] in source
    (folder / file).write_text(source.replace(*fault))
    faulty = build(tmp_path, folder, "-O0")
    with pytest.raises(AssertionError):
        test_forward_bits(faulty, torch.float32, way, (3, 4, 8, 8), 3, True, True)


@pytest.mark.parametrize(
    "fault",
    [
        slow(("b != S(0) || isfinite(past.at[j])", "true")),
        ("x_next.at[j] = b != S(0) ? sum_so_far", "x_next.at[j] = true ? x_next.at[j]"),
        slow(("sample * p.n + first : 0", "sample * p.n : 0")),
        slow(
            (
                "past[k] = place.read(p.ring + slot_back(slot, k, depth)",
                "past[k] = place.read(p.ring + k",
            )
        ),
    ],
    ids=["unfinite-slots", "no-history", "one-place", "wrong-slot"],
)
def test_a_planted_fault_of_the_backward_is_found(tmp_path, fault: tuple[str, str]):
    folder = tmp_path / "cuda"
    shutil.copytree(ROOT / "kernels" / "cuda", folder)
    path = folder / "fused_row_backward_kernel.cuh"
    source = path.read_text()
    assert fault[0] in source
    path.write_text(source.replace(*fault))
    faulty = build(tmp_path, folder, "-O0")
    with pytest.raises(AssertionError):
        test_backward_bits_and_sums(faulty, torch.float32, True, (3, 4, 8, 8), 3, True, True)
        test_backward_of_a_poisoned_slot_of_zero_weight(faulty)


def test_a_planted_sign_is_found(tmp_path):
    folder = tmp_path / "cuda"
    shutil.copytree(ROOT / "kernels" / "cuda", folder)
    source = (folder / "fused_row_kernel.cuh").read_text()
    assert "S(-0.0)" in source
    (folder / "fused_row_kernel.cuh").write_text(source.replace("S(-0.0)", "S(0.0)"))
    with pytest.raises(AssertionError):
        test_a_weight_of_zero_keeps_the_sign_of_zero(build(tmp_path, folder, "-O0"), "words", 0.0)
