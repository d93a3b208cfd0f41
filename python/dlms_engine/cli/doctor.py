"""``dlms doctor``: what this installation has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import sys
from typing import Any

import typer

from .common import JsonOption, emit

BUILD = "pip install --force-reinstall --no-deps dlms-engine (from a clone: pip install .)"
# The name a package is imported by, where it is not the name it is installed by.
IMPORTED = {"pillow": "PIL", "pyyaml": "yaml"}
TOOLS = ("cli", "demo", "dev", "docs", "lint", "test")


def doctor(as_json: JsonOption = False) -> None:
    """Show what is installed and compiled, and what to do about each part that is missing.

    Exit status 1 where a compiled part that this machine needs is missing: those of the CPU, and the CUDA
    operators where torch sees a GPU.
    """
    facts = installation()
    emit(facts, as_json, _lines(facts))
    if any(not part["found"] for part in facts["compiled"].values() if part["expected"]):
        raise typer.Exit(1)


def installation() -> dict[str, Any]:
    """JSON-able facts: versions, compiled parts, backends by device, models, extras, advice."""
    import torch

    from .._version import __version__
    from ..engine import cpu_loop
    from ..ops import backends

    gpu = _gpu()
    kinds = ["cpu", *(["cuda"] if gpu is not None else [])]
    compiled = _compiled(gpu is not None)
    extras = _extras()
    facts: dict[str, Any] = {
        "dlms_engine": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "cpu_isa": cpu_loop.cpu_isa(),
        "compiled": compiled,
        "backends": {kind: list(backends.available(kind)) for kind in kinds},
        "absent_backends": {
            name: backends.missing(name) for name in backends.BACKENDS[1:] if backends.missing(name)
        },
        "models": _models(),
        "extras": extras,
    }
    return facts | {"advice": _advice(facts)}


def _gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "count": torch.cuda.device_count(),
    }


def _compiled(gpu: bool) -> dict[str, dict[str, Any]]:
    """Part -> whether it is there, whether it should be, what it does, and the problem with it."""
    from ..engine import native
    from ..ops import backends

    parts: dict[str, dict[str, Any]] = {
        "_C": {
            "found": native.native is not None,
            "expected": True,
            "does": "the sampling loop and captured runs",
            "problem": native.problem,
        }
    }
    for name in ("cpu", "cuda"):
        parts[f"_ops_{name}"] = {
            "found": name in backends.available(),
            "expected": name == "cpu" or gpu,
            "does": f"the fused row for {name} tensors",
            "problem": backends.missing(name),
        }
    return parts


def _models() -> dict[str, bool]:
    """Model of the package -> whether its files are there."""
    from .. import models
    from ..models import pretrained

    present = {"embedded": importlib.util.find_spec("diffusers") is not None}
    for name in models.NAMES:
        try:
            pretrained.folder(name)
            present[name] = True
        except FileNotFoundError:
            present[name] = False
    return present


def _extras() -> dict[str, list[str]]:
    """Extra -> packages of it that are not installed."""
    try:
        required = importlib.metadata.requires("dlms-engine") or []
    except importlib.metadata.PackageNotFoundError:  # a bare source tree
        return {}
    absent: dict[str, list[str]] = {}
    for line in required:
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        name = re.match(r"[\w.-]+", line)
        if extra is None or name is None or extra[1] in TOOLS or name[0] == "dlms-engine":
            continue
        module = IMPORTED.get(name[0].lower(), name[0].replace("-", "_"))
        absent.setdefault(extra[1], [])
        if importlib.util.find_spec(module) is None:
            absent[extra[1]].append(name[0])
    return absent


def _advice(facts: dict[str, Any]) -> list[str]:
    lines = []
    for name, part in facts["compiled"].items():
        if part["expected"] and not part["found"]:
            what = f"{name} ({part['does']}) is missing: {part['problem']}"
            if name == "_ops_cuda":
                what += "; Triton's kernels run instead where `triton` is among the backends"
                lines.append(f"{what}; compile it where nvcc is on the PATH: {BUILD}")
            else:
                lines.append(f"{what}; with a C++17 compiler: {BUILD}")
    if facts["cpu_isa"] == "baseline" and platform.machine() in ("x86_64", "AMD64"):
        lines.append("this CPU has neither AVX2 nor AVX-512: rows run on the baseline kernel")
    if facts["gpu"] is None and _has_nvidia():
        lines.append(
            f"there is an NVIDIA device, but torch {facts['torch']} does not see it: install a CUDA "
            "build of torch that fits the driver"
        )
    for extra, packages in facts["extras"].items():
        if packages:
            lines.append(
                f"for {extra}: pip install 'dlms-engine[{extra}]' (missing: {', '.join(packages)})"
            )
    return lines


def _has_nvidia() -> bool:
    from pathlib import Path

    return sys.platform == "linux" and Path("/dev/nvidia0").exists()


def _lines(facts: dict[str, Any]) -> list[str]:
    gpu = facts["gpu"]
    lines = [
        f"dlms_engine {facts['dlms_engine']}, Python {facts['python']}, torch {facts['torch']}, "
        f"{facts['platform']}, {facts['threads']} threads",
        "GPU: "
        + (
            "none that torch sees"
            if gpu is None
            else f"{gpu['count']} x {gpu['name']}, compute capability {gpu['compute_capability']}, "
            f"{gpu['memory_gib']} GiB"
        ),
        f"instruction set of the CPU kernels: {facts['cpu_isa'] or 'none, eager torch'}",
        "compiled parts:",
    ]
    for name, part in facts["compiled"].items():
        state = "yes" if part["found"] else ("MISSING" if part["expected"] else "unused")
        why = "" if part["found"] or part["expected"] else f": {part['problem']}"
        lines.append(f"  {name:10} {state:8} {part['does']}{why}")
    lines += [
        f"backends for {kind}: {', '.join(names)} (auto takes {names[0]})"
        for kind, names in facts["backends"].items()
    ]
    lines += [f"  without {name}: {why}" for name, why in facts["absent_backends"].items()]
    found = [name for name, present in facts["models"].items() if present]
    lines.append(f"models of the package: {', '.join(found) or 'none'}")
    complete = [extra for extra, packages in facts["extras"].items() if not packages]
    lines.append(f"extras: {', '.join(complete) or 'none'}")
    lines += ["what to do:", *(f"  {line}" for line in facts["advice"])] if facts["advice"] else []
    return lines
