"""The build that is tested: made here or brought along, and only ever of this checkout's sources.

What is compiled is compared with its sources by their SHA-256; the Python files beside it are always
this checkout's, copied again where they have changed since.

    python scripts/gpu_stages/site_build.py build    compile and install into build/gpu_site
    python scripts/gpu_stages/site_build.py check    import it, name the machine, measure a copy

`build` needs torch's headers and nvcc but no GPU, so that a build can be carried to a machine with
one; `ARCH` (90) is the compute capability it is compiled for.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from checks import ROOT, write_json

SITE = ROOT / "build" / "gpu_site"
STAMP = "BUILD.json"
NATIVE = ("csrc", "kernels/cuda", "cmake", "CMakeLists.txt", "pyproject.toml")
PYTHON = {"python/dlms_engine": "dlms_engine", "kernels": "dlms_engine/kernels"}
"""Folder of the checkout -> folder of the installation."""
LEFT_OUT = (".pyc", ".so", ".partial")
PACKAGES = ("torch", "triton", "diffusers", "numpy", "nvidia-cuda-runtime", "pytest-xdist")
# An editable installation answers imports before PYTHONPATH does: the build is what is tested.
CUSTOMIZE = """import sys

sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith("ScikitBuild")]
"""


def files_of(top: Path) -> list[Path]:
    """Source files in a folder, or the file itself."""
    paths = [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file())
    return [p for p in paths if "__pycache__" not in p.parts and p.suffix not in LEFT_OUT]


def digest(root: Path = ROOT, parts: Iterable[str] = NATIVE) -> str:
    """SHA-256 of the names and bytes of every file in ``parts`` of a checkout."""
    total = hashlib.sha256()
    for path in (path for part in parts for path in files_of(root / part)):
        total.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def problem(site: Path = SITE, root: Path = ROOT) -> str | None:
    """Why what is compiled in ``site`` cannot be used for this checkout, or None."""
    if not (site / STAMP).is_file():
        return f"nothing is built in {site}"
    stamp = json.loads((site / STAMP).read_text())
    if stamp["digest"] != digest(root):
        return f"{site} was compiled from other sources ({stamp['commit']})"
    if stamp["python"].split(".")[:2] != platform.python_version().split(".")[:2]:
        return f"{site} was built for Python {stamp['python']}"
    return None


def refresh(site: Path = SITE, root: Path = ROOT) -> int:
    """Gives ``site`` the checkout's Python files; how many changed."""
    changed = 0
    for source, target in PYTHON.items():
        files = {p.relative_to(root / source): p for p in files_of(root / source)}
        for name, path in files.items():
            copy = site / target / name
            if not copy.is_file() or copy.read_bytes() != path.read_bytes():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
                changed += 1
        inner = [site / t for t in PYTHON.values() if t.startswith(f"{target}/")]
        for copy in (site / target).rglob("*.py"):
            stale = copy.relative_to(site / target) not in files
            if stale and not any(folder in copy.parents for folder in inner):
                copy.unlink()
                changed += 1
    return changed


def commit() -> str:
    """Of this checkout; DLMS_COMMIT says it where there is no git."""
    if os.environ.get("DLMS_COMMIT"):
        return os.environ["DLMS_COMMIT"]
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def build(site: Path = SITE) -> int:
    """Compiles for one architecture; a missing part fails the build instead of being left out."""
    architecture = os.environ.get("ARCH", "90")
    if problem(site) is None:
        print(f"{site} is compiled from these sources; Python files renewed: {refresh(site)}")
        return 0
    shutil.rmtree(site, ignore_errors=True)
    start, sources = time.monotonic(), digest()
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    command += ["--no-index", "--target", str(site), "--config-settings=cmake.define.DLMS_CUDA=ON"]
    command += [
        f"--config-settings=cmake.define.DLMS_CUDA_ARCHITECTURES={architecture}-real",
        "--config-settings=cmake.define.DLMS_REQUIRE_NATIVE=ON",
        str(ROOT),
    ]
    status = subprocess.run(command, check=False).returncode
    if status or digest() != sources:
        print("the sources changed while they were compiled" if not status else "not built")
        return status or 1
    (site / "sitecustomize.py").write_text(CUSTOMIZE)
    stamp = {"digest": sources, "commit": commit(), "architecture": architecture}
    stamp |= {"python": platform.python_version(), "seconds": round(time.monotonic() - start, 1)}
    write_json(site / STAMP, stamp)
    print(f"built {site}: {stamp}")
    return 0


def versions() -> dict[str, str | None]:
    """Of the packages that a figure has to be quoted with."""
    answer: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            answer[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            answer[name] = None
    return answer


def machine() -> dict[str, Any]:
    """GPU, driver, versions, processor and commit."""
    import torch

    facts: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    facts |= {"cpus": os.cpu_count(), "commit": commit(), "packages": versions()}
    facts |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    facts["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        facts |= {"gpu": p.name, "capability": f"{p.major}.{p.minor}"}
        facts |= {"driver": done.stdout.strip() or "unknown", "memory_bytes": p.total_memory}
        facts |= {"multiprocessors": p.multi_processor_count, "l2_bytes": p.L2_cache_size}
    return facts


def check(output: Path | None, device: str, site: Path | None) -> int:
    """Imports the package from ``site``, names its backends and measures a device-to-device copy."""
    import dlms_engine
    from dlms_engine import ops

    place = Path(dlms_engine.__file__).parents[1]
    facts = {"machine": machine(), "package": str(place), "backends": ops.available(device)}
    print(f"{place}: backends on {device} {facts['backends']}")
    if site is not None and place != site:
        print(f"the package does not come from the build that is to be tested, {site}")
        return 1
    missing = {"cuda", "triton"} - set(facts["backends"]) if device == "cuda" else set()
    if device == "cuda":
        from dlms_engine.lab.bench.device import copy_bandwidth

        facts["copy_bytes_per_s"] = copy_bandwidth()
        print(f"copy {facts['copy_bytes_per_s'] / 1e12:.3f} TB/s, bytes read plus written")
    if output is not None:
        write_json(output, facts)
    if missing:
        print(f"not built or not loaded: {sorted(missing)}")
    return int(bool(missing))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("build", "check"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--site", type=Path, help="where the package has to come from")
    args = parser.parse_args()
    return build() if args.what == "build" else check(args.output, args.device, args.site)


if __name__ == "__main__":
    sys.exit(main())
