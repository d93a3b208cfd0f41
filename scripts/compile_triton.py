"""Compiles the Triton kernels ahead of time, without a GPU, and reads the assembler's report."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

DTYPES = (("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("fp64", "fp64"))
"""(state, network) dtypes, as in ops/reference.py."""

CASES = ((1, False, False), (3, True, True), (3, False, False), (4, False, False), (6, False, True))
"""(depth, guided, a row for each sample) that are compiled."""

MOST_WAITS = 2.7
"""Serial waits for memory of a forward row of 2 to 4 slots that all samples share; a row for each
sample comes after a division."""

MOST_WAITS_BACKWARD = 2
"""The same of a backward row, whose sums through a block's threads take as long again: only waits for
memory count (the slot number, then the slots)."""

DESIGNERS = (
    # label, parameters, row, c_noise, what differs from DESIGNER
    ("edm,fp32", "fp32", "fp32", "fp32", {}),
    ("edm,fp64", "fp64", "fp64", "fp64", {}),
    ("edm,noise,afs", "fp32", "fp32", "fp32", {"NOISE": 1}),
    ("edm,no features", "fp32", "fp32", "fp32", {"FEATURES": 0}),
    ("vp,noise", "fp32", "fp32", "fp32", {"PROCESS": 1, "NETWORK": 2, "LEVEL": 1, "NOISE": 1}),
    ("flow", "fp32", "fp32", "fp32", {"PROCESS": 2, "NETWORK": 4, "LEVEL": 1, "LOG": 0}),
    ("cosine", "fp32", "fp32", "fp32", {"PROCESS": 3, "NETWORK": 3, "LEVEL": 1}),
    ("discrete", "fp32", "fp32", "fp32", {"PROCESS": 4, "NETWORK": 2, "LEVEL": 2}),
)
"""Designer rows that are compiled: every process and kind of network once."""

DESIGNER = {
    **{"STEPS": 5, "ORDER": 4, "DEPTH": 4, "AFS": 1, "FEATURES": 64, "LOG": 1, "FROZEN": 0},
    **{"PROCESS": 0, "NOISE": 0, "NETWORK": 0, "LEVEL": 0, "LANES": 8, "HIDDEN": 128, "CHUNK": 32},
}


def load_device(name: str = "device") -> ModuleType:
    """kernels/triton/`name`.py; those that hold kernels need nothing but Triton."""
    path = ROOT / "kernels" / "triton" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"dlms_triton_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _signature(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    return {
        n: "constexpr" if n in constants else types.get(n, "i32" if n == "blocks" else "i64")
        for n in kernel.arg_names
    }


def _types(kernel: Any, state: str, network: str) -> dict[str, str]:
    """Pointer types by name: what touches the network has its dtype, sums are float64."""
    outside = {"f_ptr", "f_cond_ptr", "input_ptr"}
    outside |= {"grad_f_ptr", "grad_f_cond_ptr", "grad_input_ptr"}
    return {
        name: f"*{network if name in outside else 'fp64' if name == 'partial_ptr' else state}"
        for name in kernel.arg_names
        if name.endswith("_ptr")
    }


def variants(device: ModuleType) -> list[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """(label, kernel, signature, constants) of everything that is compiled."""
    found = []
    for state, network in DTYPES:
        for depth, guided, each in CASES:
            shared = {"DEPTH": depth, "GUIDED": guided, "BLOCK": 1024}
            label = f"<{state},{network},{depth}{',guided' * guided}{',each' * each}>"
            forward = device.fused_row_kernel
            constants = {**shared, "M_TO_RING": True, "EACH": each}
            types = _types(forward, state, network)
            signature = _signature(forward, types, constants)
            found.append((f"triton.fused_row{label}", forward, signature, constants))
            backward = device.fused_row_backward_kernel
            types = _types(backward, state, network)
            signature = _signature(backward, types, shared)
            found.append((f"triton.fused_row_backward{label}", backward, signature, dict(shared)))
    kernel = device.sum_middle_kernel
    for out in ("fp32", "fp64"):
        constants = {"BLOCK": 128}
        signature = _signature(kernel, {"in_ptr": "*fp64", "out_ptr": f"*{out}"}, constants)
        found.append((f"triton.sum_middle<{out}>", kernel, signature, constants))
    return found


def designer_variants(
    device: ModuleType,
) -> list[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """As `variants`, of the designer's row."""
    kernel, found = device.designer_row_kernel, []
    network = {"w1_ptr", "b1_ptr", "w2_ptr", "b2_ptr", "time_w_ptr", "time_b_ptr"}
    network |= {"index_ptr", "head_ptr", "bias_ptr"}
    for label, state, row, noise, changes in DESIGNERS:
        types = {name: "*fp64" for name in kernel.arg_names if name.endswith("_ptr")}
        types |= {name: f"*{state}" for name in (*network, "features_ptr")}
        types |= {"row_ptr": f"*{row}", "c_noise_ptr": f"*{noise}", "n": "i32"}
        starts = label not in ("edm,noise,afs", "edm,no features")  # those differ in the row alone
        for start in (True, False) if starts else (False,):
            constants = {**DESIGNER, **changes, "START": start}
            signature = _signature(kernel, types, constants)
            name = f"triton.designer_{'start' if start else 'row'}<{label}>"
            found.append((name, kernel, signature, constants))
    return found


def compile_one(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    arch: int,
    options: dict[str, int],
) -> Any:
    """The compiled kernel; `.asm` holds its ptx and its cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or (name in ("n", "total") and signature[name] == "i64")
    }
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, GPUTarget("cuda", arch, 32), options)


def options(device: ModuleType, label: str) -> dict[str, int]:
    """How a kernel is compiled when it is launched."""
    if label.startswith("triton.fused_row<"):
        return dict(device.FORWARD[8 if "<fp64" in label else 4])
    return dict(device.BACKWARD) if "backward" in label else {"num_warps": 4}


def assemble(ptx: str, arch: int) -> str:
    """ptxas's report on the kernel."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        target = re.search(r"^\.target (\S+)", ptx, re.MULTILINE)
        name = target[1].rstrip(",") if target else f"sm_{arch}"
        command = [str(ptxas), "-v", f"--gpu-name={name}", str(path), "-o", str(path) + ".cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ptxas for sm_{arch}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def contracted(label: str, ptx: str) -> str | None:
    """The fused multiply-adds that would change the state's bits, or None.

    In float64 backward kernels the coefficient sums may be contracted, and all of the designer's
    rows: they are compared with a tolerance, not bit for bit.
    """
    if "backward<fp64" in label or "sum_middle" in label or "designer" in label:
        return None
    wide = r"fma\.rn\.f64" if "<fp64" in label else r"fma\.rn(\.ftz)?\.f32"
    found = re.findall(wide, ptx)
    return f"{label}: {len(found)} fused multiply-adds" if found else None


def flushed(label: str, ptx: str) -> str | None:
    """The operations of rows that flush denormal numbers to zero, or None; the designer's rows may."""
    found = [] if "designer" in label else re.findall(r"\b[a-z0-9.]+\.ftz\b[a-z0-9.]*", ptx)
    return f"{label}: {len(found)} flush denormals to zero, {found[0]}" if found else None


def waits(label: str, cubin: bytes) -> str | None:
    """Serial waits for memory above what a row of 2 to 4 slots may take, or None."""
    from serial_waits import disassemble, parse, round_trips

    found = re.match(r"triton\.fused_row(_backward)?<fp32,\w+,[234](,guided)?>", label)
    if not found:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        (code,) = parse(disassemble(path)).values()
    count = round_trips(code, only_memory=bool(found[1]))
    most = MOST_WAITS_BACKWARD if found[1] else MOST_WAITS
    return (
        f"{label}: {count:.2f} serial waits for memory, at most {most} are allowed"
        if count > most
        else None
    )


def triton_report(arches: tuple[int, ...]) -> list[dict[str, Any]]:
    """Resources of every kernel for every architecture, as keyword arguments of `Resources`.

    RuntimeError if a kernel does not compile, gives no cubin, contracts the state's arithmetic, flushes
    denormals or waits for memory too often.
    ModuleNotFoundError without Triton; RuntimeError under TRITON_INTERPRET=1.
    """
    from compile_kernels import parse_report
    from triton import knobs

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: unset it to compile the Triton kernels")
    found = []
    rows = load_device()
    every = variants(rows) + designer_variants(load_device("designer_device"))
    for label, kernel, signature, constants in every:
        for arch in arches:
            compiled = compile_one(kernel, signature, constants, arch, options(rows, label))
            if not compiled.asm.get("cubin"):
                raise RuntimeError(f"{label} for sm_{arch}: no cubin")
            ptx = compiled.asm["ptx"]
            fault = contracted(label, ptx) or flushed(label, ptx)
            if fault:
                raise RuntimeError(f"sm_{arch}: {fault}; use mul() in kernels/triton/device.py")
            fault = waits(label, compiled.asm["cubin"]) if arch == 90 else None
            if fault:
                raise RuntimeError(f"sm_{arch}: {fault}")
            reports = parse_report(assemble(compiled.asm["ptx"], arch), arch)
            if len(reports) != 1:
                raise RuntimeError(f"{label} for sm_{arch}: {len(reports)} kernels in the report")
            found.append({**vars(reports[0]), "kernel": label})
    return found
