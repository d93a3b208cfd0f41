"""csrc/cuda without Python: the driver's layouts, a C++ program, and the sanitizers."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
from marks import slow
from standin_driver import build

import dlms_engine

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc" / "cuda"
DRIVER = ROOT / "tests" / "driver"
COMPILER = shutil.which("c++") or shutil.which("g++")

pytestmark = pytest.mark.skipif(
    COMPILER is None or not CSRC.is_dir(), reason="needs a C++ compiler and the sources"
)


def headers() -> Path:
    """A folder with ``cuda.h``: a toolkit's, or the one that Triton brings."""
    folders = [Path("/usr/local/cuda/include")]
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent / "backends" / "nvidia" / "include")
    for folder in folders:
        if (folder / "cuda.h").is_file():
            return folder
    pytest.skip("no cuda.h on this machine")


def compiles(source: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [str(COMPILER), "-std=c++17", "-fsyntax-only", *flags, str(source)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_drivers_layouts_are_those_of_cuda_h(tmp_path):
    include = f"-I{headers()}"
    done = compiles(DRIVER / "layout.cpp", include, f"-I{CSRC}")
    assert done.returncode == 0, done.stderr[-2000:]
    # A planted fault: a field between two others.
    text = (CSRC / "driver.h").read_text("utf-8")
    (tmp_path / "driver.h").write_text(
        text.replace("  DevicePtr dst = 0;", "  DevicePtr odd, dst;")
    )
    assert compiles(DRIVER / "layout.cpp", include, f"-I{tmp_path}").returncode != 0


@pytest.mark.parametrize("sanitizer", [slow("address,undefined"), "thread"])
def test_a_cpp_program_under_the_sanitizers(tmp_path, sanitizer):
    """A run, a ring, and six threads on one cache."""
    include = tmp_path / "include"
    shutil.copytree(CSRC, include / "dlms")
    flags = ["-std=c++17", "-g", "-O1", f"-fsanitize={sanitizer}", f"-I{include}", "-pthread"]
    sources = [str(path) for path in sorted(CSRC.glob("*.cpp"))]
    command = [str(COMPILER), *flags, str(DRIVER / "user" / "main.cpp"), *sources, "-ldl"]
    made = subprocess.run([*command, "-o", str(tmp_path / "user")], capture_output=True, text=True)
    if made.returncode != 0 and "cannot find -l" in made.stderr:
        pytest.skip("this compiler has no such sanitizer")
    assert made.returncode == 0, made.stderr[-2000:]
    library = build(tmp_path, f"-fsanitize={sanitizer}")
    done = subprocess.run(
        [str(tmp_path / "user"), str(library)],
        capture_output=True,
        text=True,
        timeout=300,
        env={"ASAN_OPTIONS": "detect_leaks=0"},  # the stand-in forgets its nodes
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_find_package_from_an_installed_package(tmp_path):
    folders = [Path(p) for p in dlms_engine.__path__]
    found = [p / "cmake" for p in folders if (p / "lib" / "libdlms_graphs.a").is_file()]
    cmake = shutil.which("cmake")
    if not found or cmake is None:
        pytest.skip("needs CMake and a native build")
    subprocess.run(
        [cmake, "-S", str(DRIVER / "user"), "-B", str(tmp_path), f"-Ddlms_engine_DIR={found[0]}"],
        check=True,
        capture_output=True,
    )
    subprocess.run([cmake, "--build", str(tmp_path)], check=True, capture_output=True)
    library = build(tmp_path)
    done = subprocess.run([str(tmp_path / "user"), str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
