#!/usr/bin/env python3
"""Builds the GPU engine or takes the build that was brought along, checks it and times it, offline.

    scripts/gpu_check.sh [--rehearse] [build | GROUP | STAGE ...]     default: everything

Groups, in order: smoke (correctness, the GPU tests and memcheck, side by side), bench (each with
the GPU to itself), later (what is worth having when time is left). Each stage is a process with a
limit of its own; the report is rewritten after each, so that a kill loses one stage. `build` alone
compiles into build/gpu_site and needs no GPU.

--rehearse runs what stands in for each stage on a CPU and says what the stage would have measured.

Environment: VENV or PYTHON (scripts/gpu_check.sh), OUT (build/gpu_check), BUDGET (seconds in all,
270; a rehearsal 1200), BENCH_SECONDS (75, kept for the benchmarks), ARCH (90), VENDOR (vendor:
packages or wheels that the machine lacks; git ignores it), DLMS_COMMIT (where there is no git).

Writes $OUT/gpu_check.json (everything) and $OUT/gpu_check_logs.tar.gz. Status 0: every stage passed.
1: one failed or found no time. 2: something that is needed is not there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "gpu_stages"))
import plan  # noqa: E402
import runner  # noqa: E402
import site_build  # noqa: E402
import summary  # noqa: E402
from checks import write_json  # noqa: E402

TESTED = ("torch", "triton", "dlms_engine")
"""What VENDOR must not hold."""


class Missing(Exception):
    """Something that is needed is not there: (what, what to do)."""


class Report:
    """The report and the logs in OUT, rewritten after each stage."""

    def __init__(self, out: Path, work: Path, *, rehearse: bool) -> None:
        self.out, self.work, self.rehearse = out, work, rehearse
        self.outcomes: list[runner.Outcome] = []
        self._start = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def add(self, outcome: runner.Outcome) -> None:
        """Notes what became of a stage."""
        self.outcomes.append(outcome)
        print(f"{outcome.stage.name}: {outcome.status} after {outcome.seconds:.1f} s", flush=True)
        self.write()

    def reports(self) -> dict[str, Any]:
        """What the stages wrote, by stage."""
        answer = {}
        for outcome in self.outcomes:
            path = self.work / f"{outcome.stage.name}.json"
            if path.is_file():
                answer[outcome.stage.name] = json.loads(path.read_text())
        return answer

    def write(self) -> None:
        """The JSON of everything so far, and the logs."""
        reports = self.reports()
        first = reports.get("import", {})
        stages = [
            {
                "stage": o.stage.name,
                "status": o.status,
                "seconds": round(o.seconds, 2),
                "measures": o.stage.measures,
                "said": summary.headline(
                    o, reports.get(o.stage.name), self.work / f"{o.stage.name}.log"
                ),
            }
            for o in self.outcomes
        ]
        whole = {"benchmark": "gpu_check", "rehearsal": self.rehearse, "started": self._start}
        whole |= {key: first.get(key) for key in ("machine", "backends", "copy_bytes_per_s")}
        write_json(self.out / "gpu_check.json", {**whole, "stages": stages, "results": reports})
        partial = self.out / "gpu_check_logs.tar.gz.partial"
        with tarfile.open(partial, "w:gz") as archive:
            for log in sorted(self.work.glob("*.log")):
                archive.add(log, log.name)
        partial.replace(self.out / "gpu_check_logs.tar.gz")


def vendored(vendor: Path, work: Path) -> list[str]:
    """Folders of ``vendor`` for PYTHONPATH; wheels in it are unpacked."""
    if not vendor.is_dir():
        return []
    for package in TESTED:
        if (vendor / package).exists() or any(vendor.glob(f"{package}-*.whl")):
            raise Missing(
                f"{vendor} holds {package}",
                "remove it: what is tested is this checkout, with the machine's torch and triton",
            )
    wheels = sorted(vendor.glob("*.whl"))
    if not wheels:
        return [str(vendor)]
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / "vendor")
    return [str(work / "vendor"), str(vendor)]


def prepare(rehearse: bool) -> None:
    """Raises Missing for what is needed and is not there."""
    try:
        import torch
    except ImportError:
        raise Missing(
            f"{sys.executable} has no torch", "use a Python with torch >= 2.11: PYTHON=..."
        ) from None
    if not rehearse and not torch.cuda.is_available():
        raise Missing(
            "torch sees no NVIDIA GPU",
            "run this on a machine with one; here, scripts/gpu_check.sh --rehearse runs stand-ins",
        )


def build(work: Path) -> runner.Stage:
    """The stage that compiles."""
    command = ("python", f"{plan.HERE}/site_build.py", "build")
    return runner.Stage("build", "compiling the extension for this GPU", (command,), 240)


def environment(paths: list[str], work: Path, *, rehearse: bool) -> dict[str, str]:
    """Of every stage."""
    values = dict(os.environ)
    cuda = values.setdefault("CUDA_HOME", "/usr/local/cuda")
    values["PATH"] = f"{cuda}/bin:{values['PATH']}"
    values["PYTHONPATH"] = ":".join([*paths, *filter(None, [values.get("PYTHONPATH")])])
    values |= {"PYTHONUNBUFFERED": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    values |= {"TRITON_CACHE_DIR": str(work / "triton"), "DLMS_COMMIT": site_build.commit()}
    values.pop("TRITON_INTERPRET", None)  # the kernels themselves, not the interpreter
    values.pop("DLMS_REQUIRE_CUDA", None)
    # A rehearsal interprets them; on a GPU a run in which no GPU test ran must fail.
    values |= {"TRITON_INTERPRET": "1"} if rehearse else {"DLMS_REQUIRE_CUDA": "1"}
    return values


def run(args: argparse.Namespace, out: Path, work: Path) -> int:
    """All that was asked for; the status."""
    budget = float(os.environ.get("BUDGET", "1200" if args.rehearse else "270"))
    report = Report(out, work, rehearse=args.rehearse)
    paths = vendored(Path(os.environ.get("VENDOR", ROOT / "vendor")), work)
    values = environment(paths, work, rehearse=args.rehearse)
    runs = runner.Runner(ROOT, work, budget, values, rehearse=args.rehearse, after=report.add)
    reason = site_build.problem()
    if reason is not None and not args.rehearse:
        print(f"{reason}: building")
        runs.run(runner.Group("build", (build(work),), alone=True))
        if runs.outcomes[-1].status != "passed":
            print(summary.table(runs.outcomes, {}, work, rehearse=False))
            return 1
    used = None if reason is not None and args.rehearse else site_build.SITE
    if used is not None:
        site_build.refresh()
        values["PYTHONPATH"] = f"{used}:{values['PYTHONPATH']}"
    runs.run(runner.Group("import", (plan.first(work, used),), alone=True))
    if runs.outcomes[-1].status == "passed":
        chosen = runner.select(plan.groups(work), args.stages)
        for group in chosen:
            # Correctness may take what the benchmarks that follow leave of the budget.
            follows = any(g.name == "bench" for g in chosen) and group.name == "smoke"
            runs.run(group, plan.BENCH_SECONDS if follows and not args.rehearse else 0.0)
    print(f"\n{summary.table(runs.outcomes, report.reports(), work, rehearse=args.rehearse)}")
    good = all(o.status == "passed" for o in runs.outcomes)
    print(f"gpu_check: {'passed' if good else 'FAILED'}, {budget - runs.left():.0f} s, {out}")
    return int(not good)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", help="build, groups or stages")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with stand-ins")
    args = parser.parse_args()
    if args.stages == ["build"]:
        command = [sys.executable, str(ROOT / plan.HERE / "site_build.py"), "build"]
        return subprocess.run(command, cwd=ROOT, check=False).returncode
    out = Path(os.environ.get("OUT", ROOT / "build" / "gpu_check")).resolve()
    work = ROOT / "build" / "gpu_check_work"
    try:
        runner.select(plan.groups(work), args.stages)
        prepare(args.rehearse)
        shutil.rmtree(work, ignore_errors=True)
        for folder in (out, work):
            folder.mkdir(parents=True, exist_ok=True)
        return run(args, out, work)
    except ValueError as error:
        print(f"gpu_check: {error}")
    except Missing as error:
        print(f"gpu_check: {error.args[0]}\n  what to do: {error.args[1]}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
