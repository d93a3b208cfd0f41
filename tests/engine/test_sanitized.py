"""Hostile callbacks under the address and undefined-behaviour sanitizers: no report.

The compiled parts are built for them in a folder of their own, beside copies of the Python parts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/engine/test_hostile_calls.py",
    "tests/engine/test_cpu_loop.py",
    "tests/ops/test_row_numerics.py",
)

# An editable installation puts its own finder first.
RUN = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "ditable" not in repr(type(f))]
sys.path.insert(0, sys.argv[1])
import dlms_engine
assert all(p.startswith(sys.argv[1]) for p in dlms_engine.__path__), dlms_engine.__path__
from dlms_engine import ops
from dlms_engine.engine import cpu_loop
assert cpu_loop.loop_available() and "cpu" in ops.available()
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not compiles", *sys.argv[2:]]))
"""


def runtime(compiler: str) -> str:
    """Libraries that must be loaded before Python itself."""
    found = [
        subprocess.run(
            [compiler, f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    if not all(os.path.isabs(path) for path in found):
        pytest.skip(f"{compiler} has no sanitizer runtime")
    return " ".join(found)


def sanitized(folder: Path) -> Path:
    """A folder for ``sys.path`` with the package and its compiled parts."""
    site, build = folder / "site", folder / "build"
    package = site / "dlms_engine"
    shutil.copytree(ROOT / "python" / "dlms_engine", package)
    shutil.copytree(ROOT / "kernels", package / "kernels")
    options = ["-DDLMS_SANITIZE=ON", "-DDLMS_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    pybind = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True
    )
    if pybind.returncode:
        pytest.skip("pybind11 is not installed")
    options.append(f"-Dpybind11_DIR={pybind.stdout.strip()}")
    for command in (
        ["cmake", "-S", ROOT, "-B", build, *options],
        ["cmake", "--build", build, "--parallel", "2"],
        ["cmake", "--install", build, "--prefix", site],
    ):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return site


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="preloads the runtime")
def test_hostile_calls_give_no_report(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None or shutil.which("cmake") is None:
        pytest.skip("needs g++ and cmake")
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime(compiler),
        # halted by the first report; Python itself never frees what it has interned
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(sanitized(tmp_path)), *TESTS],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert "runtime error" not in said and "AddressSanitizer" not in said, said[-5000:]
    assert done.returncode == 0, said[-5000:]
    assert " passed" in said
