"""Every GPU kernel compiles for sm_80 and sm_90 without a GPU, without spills or local memory."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from marks import slow

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import serial_waits  # noqa: E402
from compile_kernels import Resources, compile_cuda, find_nvcc, parse_report  # noqa: E402

REPORT = """
ptxas info    : Compiling entry function 'k' for 'sm_90'
ptxas info    : Function properties for k
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 8 bytes cumulative stack size
"""


def test_a_spill_in_the_report_is_a_fault():
    (found,) = parse_report(REPORT, 90)
    assert found == Resources("k", 90, 64, 8, 4, 4)
    assert "8 bytes of stack" in str(found.fault())
    clean = REPORT.replace("8 bytes stack", "0 bytes stack").replace("4 bytes", "0 bytes")
    assert parse_report(clean, 90)[0].fault() is None


needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")


@needs_nvcc
@pytest.mark.parametrize("arch", [slow(80), 90])
@pytest.mark.parametrize("name", ["fused_row", "fused_row_backward"])
def test_cuda_kernels(tmp_path, name, arch):
    output = tmp_path / "kernel.o"
    found = compile_cuda(ROOT / "kernels" / "cuda" / f"{name}.cu", arch, output)
    assert [r.fault() for r in found if r.fault()] == []
    assert len(found) == (64 if name == "fused_row" else 15), [r.kernel for r in found]
    if name != "fused_row":
        return
    try:
        sass = serial_waits.disassemble(output)
    except serial_waits.NoDisassembler as error:
        pytest.skip(f"compiled, without spills; the machine code is not looked at: {error}")
    check_machine_code(sass)
    if arch == 90:
        check_waits(serial_waits.parse(sass))


def check_waits(kernels: dict[str, list[serial_waits.Instruction]]) -> None:
    """At most 2.7 serial waits for memory, on every path, 1 less where no slot waits for the row."""
    counted = 0
    for name, code in kernels.items():
        if match := re.search(r"fused_row_kernelI.*Li(\d)ELb([01])ELb[01]E", name):
            depth, early = int(match[1]), match[2] == "1"
            waits = serial_waits.round_trips(code)
            assert waits <= (2.7 if depth > 1 and not early else 2.2), f"{waits:.2f} {name}"
            counted += 1
    assert counted >= 2, "no kernel was recognised"


SLOW = {
    "a load before the row": (
        "fused_row_kernel.cuh",
        "const S* row = p.row + blockIdx.y * p.row_stride;\n\n  S c[kB + kDepth];",
        "const S* row = p.row + static_cast<int>(p.x[0]);\n\n  S c[kB + kDepth];",
    ),
}


@needs_nvcc
@pytest.mark.parametrize("fault", [None, *SLOW])
def test_serial_waits_of_a_slow_kernel_are_found(tmp_path, fault):
    try:
        serial_waits.disassembler()
    except serial_waits.NoDisassembler as error:
        pytest.skip(str(error))
    folder = tmp_path / "cuda"
    shutil.copytree(ROOT / "kernels" / "cuda", folder)
    if fault is not None:
        file, old, new = SLOW[fault]
        source = (folder / file).read_text()
        assert old in source
        (folder / file).write_text(source.replace(old, new))
    (folder / "some.cu").write_text(
        '#include "fused_row_kernel.cuh"\nnamespace dlms::cuda {\n'
        + "".join(
            f"template __global__ void fused_row_kernel<float, {network}, 3, false, {guided}>"
            f"(const Forward<float, {network}>);\n"
            for network in ("float", "__nv_bfloat16")
            for guided in ("false", "true")
        )
        + "}\n"
    )
    compile_cuda(folder / "some.cu", 90, tmp_path / "some.o")
    kernels = serial_waits.parse(serial_waits.disassemble(tmp_path / "some.o"))
    if fault is None:
        check_waits(kernels)
    else:
        with pytest.raises(AssertionError, match="fused_row_kernel"):
            check_waits(kernels)


def test_waits_are_counted_on_the_slowest_path():
    """Two loads in series behind a branch, one before it; a path that stores nothing is left out."""

    def code(*instructions: tuple[str, int, int]) -> list[serial_waits.Instruction]:
        return [
            serial_waits.Instruction(16 * i, text, 1, sets, waits)
            for i, (text, sets, waits) in enumerate(instructions)
        ]

    straight = code(
        ("LDG.E R1, [R2.64]", 0, 0),
        ("LDG.E R3, [R4.64]", 0, 0),
        ("STG.E [R6.64], R1", 7, 1),
        ("EXIT", 7, 0),
    )
    assert 1.0 < serial_waits.round_trips(straight) < 1.1
    assert serial_waits.round_trips(straight, only_memory=True) == 1.0
    branch = code(
        ("LDG.E R1, [R2.64]", 0, 0),
        ("@P0 BRA 0x40", 7, 1),
        ("LDG.E R3, [R1.64]", 1, 1),
        ("IADD3 R3, R3, R3, RZ", 7, 2),
        ("STG.E [R6.64], R1", 7, 1),
        ("EXIT", 7, 0),
    )
    assert 2.0 < serial_waits.round_trips(branch) < 2.1
    assert serial_waits.round_trips(branch, only_memory=True) == 2.0
    with pytest.raises(ValueError, match="no path"):
        serial_waits.round_trips(code(("LDG.E R1, [R2.64]", 0, 0), ("EXIT", 7, 1)))


def check_machine_code(sass: str) -> None:
    """Forward: no contraction, no local memory, every full pack moved in 16-byte words."""
    functions = re.split(r"Function : ", sass)[1:]
    assert functions
    for code in functions:
        name = code.split(maxsplit=1)[0]
        assert not re.search(r"\b(FFMA|DFMA|LDL|STL)\b", code), name
        words = 5 if ("bfloat16" in name or "half" in name) else 3  # x, m: fp32; input: network
        if re.search(r"any_kernelI\w+Lb0E", name):
            words = 0  # the kernel of unaligned states
        if match := re.search(r"fused_row_kernelI.*Li(\d)ELb([01])ELb([01])E", name):
            depth, early, guided = (int(group) for group in match.groups())
            slots = depth if early else depth - 1
            loads = (words - 1) // 2 * (1 + slots) + 1 + guided  # x, slots; F, twice if guided
            assert len(re.findall(r"\bLDG\.E\.128\b", code)) == loads, name
        assert len(re.findall(r"\bSTG\.E\.128\b", code)) == words, name


def test_the_machine_code_check_can_fail():
    good = "Function : k\n STG.E.128 STG.E.128 STG.E.128\n"
    check_machine_code(good)
    split = good.replace("k\n", "fused_row_kernelIffLi2ELb0ELb0E\n LDG.E.128 LDG.E.128 LDG.E\n")
    check_machine_code(split.replace("LDG.E\n", "LDG.E.128\n"))
    for bad in (good + "FFMA R1", good + "LDL R1", good.replace("E.128", "E", 1), split):
        with pytest.raises(AssertionError):
            check_machine_code(bad)


@needs_nvcc
def test_warnings_are_errors(tmp_path):
    source = tmp_path / "unused.cu"
    source.write_text("__global__ void k(float* p) { int unused = 3; *p = 1.0f; }\n")
    with pytest.raises(RuntimeError, match="unused"):
        compile_cuda(source, 90, tmp_path / "unused.o")


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run_script(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """In a process without the interpreter, which replaces the kernels when it is on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = [sys.executable, *arguments]
    return subprocess.run(script, capture_output=True, text=True, check=False, env=environment)


@needs_triton
@pytest.mark.parametrize("arch", [slow(80), 90])
def test_triton_kernels(tmp_path, arch):
    report = tmp_path / "triton.json"
    script = str(ROOT / "scripts" / "compile_kernels.py")
    done = run_script([script, "--triton", "--arch", str(arch), "--json", str(report)])
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert len(found) == 56 and {r["arch"] for r in found} == {arch}


FAULTS = {
    "contracted": (r"product = tl.inline_asm_elementwise\([^)]*\)", "product = a * b"),
    "flushed": (
        r"product = tl.inline_asm_elementwise\([^)]*\)",
        "product = libdevice.mul_rn(a, b)",
    ),
    "waits": (r', "maxnreg": 64', ""),
    "waits, backward": (  # a coefficient that is loaded after something was stored
        r"tl\.store\(grad_x_ptr \+ at, (.*), mask=inside\)",
        r"tl.store(grad_x_ptr + at, \1, mask=inside)\n    a = tl.load(row + 2 + slot)\n"
        r"    grad_next += mul(tl.load(row + 2 + a.to(tl.int32)), grad_input)",
    ),
}
WORDS = {
    "contracted": "fused multiply-adds",
    "flushed": "flush denormals",
    "waits": "serial waits for memory",
    "waits, backward": "backward<fp32,fp32,3>: 3.00 serial waits for memory",
}


FAULTY = """
import json, pathlib, sys
scripts, folders = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, scripts)
import compile_triton as c
said = {}
for fault, folder in folders.items():
    c.ROOT = pathlib.Path(folder)
    device = c.load_device()
    number = 5 if "backward" in fault else 6
    label, kernel, signature, constants = c.variants(device)[number]
    asm = c.compile_one(kernel, signature, constants, 90, c.options(device, label)).asm
    code = asm["cubin" if "waits" in fault else "ptx"]
    said[fault] = str(getattr(c, fault.split(",")[0])(label, code))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said_of_faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the checks say of each faulty kernel, all of them compiled by one process."""
    source = (ROOT / "kernels" / "triton" / "device.py").read_text()
    folders = {}
    for fault, (old, new) in FAULTS.items():
        assert re.search(old, source)
        folder = tmp_path_factory.mktemp("faulty")
        changed = re.sub(old, new, source).replace(
            "from triton import knobs\n",
            "from triton import knobs\nfrom triton.language.extra import libdevice\n",
        )
        (folder / "kernels" / "triton").mkdir(parents=True)
        (folder / "kernels" / "triton" / "device.py").write_text(changed)
        folders[fault] = str(folder)
    done = run_script(["-c", FAULTY, str(ROOT / "scripts"), json.dumps(folders)])
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@needs_triton
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_triton_kernel_would_be_found(said_of_faulty, fault):
    """Without `mul`, with libdevice's product, without a bound on the registers."""
    assert WORDS[fault] in said_of_faulty[fault]


def runs_on(architectures: str, capability: int) -> bool:
    """Whether a library built for a CMAKE_CUDA_ARCHITECTURES runs on a GPU, by machine code or by PTX."""
    for entry in architectures.split(";"):
        number, _, kind = entry.partition("-")
        machine = int(number) // 10 == capability // 10 and int(number) <= capability
        if (kind != "virtual" and machine) or (kind != "real" and int(number) <= capability):
            return True
    return False


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 103, 120, 121])
def test_the_library_runs_on_every_gpu_that_torch_does(capability):
    """It had no code for Turing and Blackwell, where "auto" takes it, too."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    found = re.search(r'set\(DLMS_CUDA_ARCHITECTURES "([^"]+)"', text)
    assert found is not None and runs_on(found[1], capability)
    assert runs_on("80-real;90-real", capability) == (80 <= capability <= 90), "as it was"
