#!/usr/bin/env python3
"""Compiles every GPU kernel without a GPU and checks what the compiler reports.

CUDA: each kernels/cuda/*.cu for sm_80 and sm_90, warnings as errors; every kernel must have no
stack frame, no spills and no local memory. Triton: each kernel to a cubin for the same targets;
without contraction (no fma of the state's arithmetic) and without spills in the report.

    scripts/compile_kernels.py [--cuda] [--triton] [--arch 80 --arch 90] [--json FILE]

Environment: DLMS_TORCH_DIR, the folder of a torch package whose headers are used instead of the
installed one's (that of the oldest torch this library takes, say).

Exit status 1 if a check fails, 2 if what was asked for cannot be had (no nvcc, no triton).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHES = (80, 90)


@dataclass(frozen=True)
class Resources:
    """What the assembler says one kernel takes."""

    kernel: str
    arch: int
    registers: int
    stack: int  # bytes of local memory a thread
    spill_stores: int  # bytes
    spill_loads: int

    def fault(self) -> str | None:
        """What is wrong with it, or None."""
        if self.stack or self.spill_stores or self.spill_loads:
            return (
                f"{self.kernel} sm_{self.arch}: {self.stack} bytes of stack, "
                f"{self.spill_stores} stored and {self.spill_loads} loaded bytes of spills"
            )
        return None


_REPORT = re.compile(
    r"Function properties for (?P<name>.+)\s+"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\s+"
    r"ptxas info\s*: Used (?P<registers>\d+) registers"
)


def parse_report(text: str, arch: int) -> list[Resources]:
    """The kernels of a ptxas report (`nvcc --resource-usage`, `ptxas -v`)."""
    return [
        Resources(
            kernel=m["name"],
            arch=arch,
            registers=int(m["registers"]),
            stack=int(m["stack"]),
            spill_stores=int(m["stores"]),
            spill_loads=int(m["loads"]),
        )
        for m in _REPORT.finditer(text)
    ]


def find_nvcc() -> str | None:
    """nvcc from the PATH, CUDA_HOME or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))


def torch_includes() -> list[str]:
    """Folders of torch's headers, without importing torch; DLMS_TORCH_DIR names another torch."""
    from importlib.util import find_spec

    given = os.environ.get("DLMS_TORCH_DIR")
    if given is None:
        spec = find_spec("torch")
        if spec is None or spec.origin is None:
            raise SystemExit("compile_kernels: torch is needed for its headers: pip install torch")
        given = str(Path(spec.origin).parent)
    include = Path(given) / "include"
    if not (include / "torch" / "csrc" / "stable").is_dir():
        raise SystemExit(f"compile_kernels: {include} has no headers of torch >= 2.11")
    return [str(include), str(include / "torch" / "csrc" / "api" / "include")]


def compile_cuda(source: Path, arch: int, output: Path) -> list[Resources]:
    """Compile one .cu for one architecture; RuntimeError with the compiler's words if it fails."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc is not on the PATH nor in CUDA_HOME")
    command = [nvcc, "-std=c++17", "-O3", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DNDEBUG"]
    command += ["--Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror,-fPIC"]
    command += [f"-I{ROOT / 'csrc'}"]
    command += [part for folder in torch_includes() for part in ("-isystem", folder)]
    command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "--resource-usage"]
    command += ["-c", str(source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} for sm_{arch} does not compile:\n{text}")
    found = parse_report(_demangle(text), arch)
    if not found:
        raise RuntimeError(f"{source.name} for sm_{arch}: no kernel in the report:\n{text}")
    return found


def _demangle(text: str) -> str:
    """Readable kernel names: `fused_row_kernel<float,__half,2>`, where c++filt is installed."""
    tool = shutil.which("c++filt")
    if tool is None:
        return text
    text = subprocess.run([tool], input=text, capture_output=True, text=True, check=True).stdout
    pattern = r"(Function properties for )(?:void )?dlms::cuda::([^(]+)\(.*"
    return re.sub(pattern, lambda m: m[1] + m[2].replace(" ", ""), text)


def cuda_report(arches: tuple[int, ...]) -> list[Resources]:
    """Every kernel of kernels/cuda for every architecture."""
    found: list[Resources] = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "kernels" / "cuda").glob("*.cu")):
            for arch in arches:
                found += compile_cuda(source, arch, Path(folder) / f"{source.stem}.o")
    return found


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--cuda", action="store_true", help="only the CUDA kernels")
    parser.add_argument("--triton", action="store_true", help="only the Triton kernels")
    parser.add_argument("--arch", type=int, action="append", help="e.g. 90; default 80 and 90")
    parser.add_argument("--json", type=Path, help="also write the report there")
    args = parser.parse_args(argv)
    arches = tuple(args.arch or ARCHES)
    both = args.cuda == args.triton
    found: list[Resources] = []
    try:
        if both or args.cuda:
            found += cuda_report(arches)
        if both or args.triton:
            sys.path.insert(0, str(ROOT / "scripts"))
            from compile_triton import triton_report

            found += [Resources(**entry) for entry in triton_report(arches)]
    except (FileNotFoundError, ModuleNotFoundError) as exc:
        print(f"compile_kernels: {exc}", file=sys.stderr)
        return 2
    except RuntimeError as exc:
        print(f"compile_kernels: {exc}", file=sys.stderr)
        return 1
    for r in found:
        print(f"sm_{r.arch}  {r.registers:3d} registers  {r.stack:2d} B stack  {r.kernel}")
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in found], indent=1) + "\n")
    faults = [fault for r in found if (fault := r.fault())]
    for fault in faults:
        print(f"compile_kernels: {fault}", file=sys.stderr)
    print(f"{len(found)} kernels, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
