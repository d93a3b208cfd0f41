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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

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
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["fused_row", "fused_row_backward"])
def test_cuda_kernels(tmp_path, name, arch):
    output = tmp_path / "kernel.o"
    found = compile_cuda(ROOT / "kernels" / "cuda" / f"{name}.cu", arch, output)
    assert [r.fault() for r in found if r.fault()] == []
    assert len(found) == (20 if name == "fused_row" else 6), [r.kernel for r in found]
    tool = disassembler()
    if tool is not None and name == "fused_row":
        check_machine_code(subprocess.check_output([tool, "-sass", str(output)], text=True))


def disassembler() -> str | None:
    """cuobjdump from the PATH or from Triton's package."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
        if (folder / "cuobjdump").exists() and (folder / "nvdisasm").exists():
            os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return shutil.which("cuobjdump")


def check_machine_code(sass: str) -> None:
    """Forward: no contraction, no local memory, and every full pack stored in 16-byte words."""
    functions = re.split(r"Function : ", sass)[1:]
    assert functions
    for code in functions:
        name = code.split(maxsplit=1)[0]
        assert not re.search(r"\b(FFMA|DFMA|LDL|STL)\b", code), name
        words = 5 if ("bfloat16" in name or "half" in name) else 3  # x, m: fp32; input: network
        assert len(re.findall(r"\bSTG\.E\.128\b", code)) == words, name


def test_the_machine_code_check_can_fail():
    good = "Function : k\n STG.E.128 STG.E.128 STG.E.128\n"
    check_machine_code(good)
    for bad in (good + "FFMA R1", good + "LDL R1", good.replace("E.128", "E", 1)):
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
@pytest.mark.parametrize("arch", [80, 90])
def test_triton_kernels(tmp_path, arch):
    report = tmp_path / "triton.json"
    script = str(ROOT / "scripts" / "compile_kernels.py")
    done = run_script([script, "--triton", "--arch", str(arch), "--json", str(report)])
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert len(found) == 40 and {r["arch"] for r in found} == {arch}


@needs_triton
def test_a_contracted_kernel_would_be_found(tmp_path):
    """Without `mul` the compiler contracts: the check on the assembly sees it."""
    source = (ROOT / "kernels" / "triton" / "device.py").read_text()
    assert "return libdevice.mul_rn(a, b)" in source
    folder = tmp_path / "kernels" / "triton"
    folder.mkdir(parents=True)
    (folder / "device.py").write_text(source.replace("libdevice.mul_rn(a, b)", "a * b"))
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "import pathlib, compile_triton as c\n"
        f"c.ROOT = pathlib.Path({str(tmp_path)!r})\n"
        "label, kernel, signature, constants = c.variants(c.load_device())[0]\n"
        "compiled = c.compile_one(kernel, signature, constants, 90, 4)\n"
        "print(c.contracted(label, compiled.asm['ptx']))\n"
    )
    done = run_script(["-c", code])
    assert "fused multiply-adds" in done.stdout, done.stdout + done.stderr
