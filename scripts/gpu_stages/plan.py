"""The stages, the most valuable evidence first, and what stands in for each without a GPU."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from checks import ROOT
from runner import Group, Stage

HERE = "scripts/gpu_stages"
BENCH = ("python", "-m", "dlms_engine.lab.bench")
LEARNERS = (
    "dlms",
    "dlms-noise",
    "free_table",
    "amed",
    "amed-plugin",
    "ld3",
    "dode",
    "gits",
    "auto",
)
NO_GPU = "needs an NVIDIA GPU"
ALONE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""The allocator's cache hides bounds: under a sanitizer every tensor gets its own allocation."""


def _check(
    work: Path, name: str, measures: str, limit: float, script: str, *extra: str, **stand_in: str
) -> Stage:
    """A stage that is one of the scripts here; ``stand_in`` adds options in a rehearsal."""
    common = ("python", f"{HERE}/{script}.py", "--output", str(work / f"{name}.json"), *extra)
    short = tuple(word for k, v in stand_in.items() for word in (f"--{k.replace('_', '-')}", v))
    return Stage(
        name,
        measures,
        ((*common, "--seconds", str(limit - 3)),),
        limit,
        stand_in=((*common, "--device", "cpu", *short),),
    )


def smoke(work: Path) -> list[Stage]:
    """Correctness, one process a subject."""
    rows = "the bits of the reference and the error to float64, forward and backward"
    stages = [
        _check(work, "rows-cuda", f"CUDA rows: {rows}", 45, "rows", "--backend", "cuda",
               stand_in="cpu", seconds="4"),
        _check(work, "graphs", "captured runs replayed on new inputs, to the bit", 45, "graphs"),
        _check(work, "sampling", "samples of the embedded model against the CPU's", 45, "sampling",
               model="tiny"),
        *(_check(work, f"learner-{name}", f"20 updates of {name} on the GPU", 60, "learner",
                 "--method", name, model="tiny", updates="1") for name in LEARNERS),
        _check(work, "learners-captured", "updates with captured evaluations are those without", 100,
               "captured_learner", model="tiny", updates="2"),
        _check(work, "rows-triton", f"Triton rows: {rows}", 60, "rows", "--backend", "triton",
               stand_in="triton", seconds="1"),
        _check(work, "designer", "the designer's kernel against torch, to 1e-12", 45, "designer",
               seconds="1"),
    ]  # fmt: skip
    return stages


def files_with(word: str) -> tuple[str, ...]:
    """Test files that mention ``word``."""
    files = (
        path for path in (ROOT / "tests").rglob("test_*.py") if word in path.read_text("utf-8")
    )
    return tuple(sorted(str(path.relative_to(ROOT)) for path in files))


def tests(name: str, measures: str, limit: float, *selection: str) -> Stage:
    """pytest on several workers where pytest-xdist is installed."""
    base = ("python", "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-W", "default")
    workers = ("-n", "6") if importlib.util.find_spec("xdist") else ()
    return Stage(
        name,
        measures,
        ((*base, *workers, *selection),),
        limit,
        cores=6 if workers else 1,
        stand_in=((*base, "--collect-only", "-q", "-q", *selection),),
    )


def all_tests() -> tuple[Stage, ...]:
    """The tests that need a GPU; then those of Triton kernels, which run interpreted without one."""
    return (
        tests("tests", "every test marked needs_cuda", 150, "-m", "needs_cuda",
              *files_with("needs_cuda")),
        tests("tests-triton", "the tests of Triton kernels, compiled instead of interpreted", 110,
              "-m", "not needs_cuda and not slow", *files_with("triton_device()")),
    )  # fmt: skip


def sanitizer(tool: str, limit: float) -> Stage:
    """compute-sanitizer on the rows; once without it first, as it would slow Triton's compiler."""
    rows = ("python", "scripts/sanitize_rows.py")
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *rows)
    return Stage(
        tool,
        f"compute-sanitizer {tool} on the rows of both backends",
        (rows, command),
        limit,
        stand_in=((*rows, "--device", "cpu"),),
        environment=ALONE,
    )


def bench(work: Path, name: str, measures: str, limit: float, *options: str, **stand: str) -> Stage:
    """A benchmark of `dlms bench`; ``stand`` holds a rehearsal's options, or what it has to say."""
    output = ("--output", str(work / f"{name}.json"))
    return Stage(
        name,
        measures,
        ((*BENCH, *options, *output, "--seconds", str(limit - 5)),),
        limit,
        stand_in=((*BENCH, options[0], *stand["instead"].split(), *output),),
        refusal=stand.get("refusal", ""),
    )


def benches(work: Path) -> list[Stage]:
    """Speed, the GPU to itself."""
    cuda = ("--device", "cuda")
    return [
        bench(work, "bench-row", "one row: in-graph time, share of the copy bandwidth", 40,
              "device", instead="", refusal=NO_GPU),
        bench(work, "bench-loop", "5 evaluations: against the eager loop and the bare network", 40,
              "loop", *cuda, instead="--device cpu --network plain --repeats 1"),
        _check(work, "captured", "a captured run above its evaluations; WHILE loop against unrolled", 45,
               "captured", model="tiny"),
        bench(work, "bench-step", "a step beside diffusers' eager step", 60,
              "step", *cuda, "--no-compile", instead="--quick --rounds 1 --round-seconds 0.001"),
        bench(work, "bench-distill", "updates a second of every learner on the GPU", 60,
              "distill", *cuda, "--models", "embedded", "--each", "0.7",
              instead="--models embedded --methods free_table --batch 2 --each 0.1"),
    ]  # fmt: skip


def later(work: Path) -> list[Stage]:
    """What is worth having when time is left."""
    cuda = ("--device", "cuda")
    return [
        _check(work, "distil-32", "seconds to distil DLMS at 5 evaluations on a 32x32 model", 110,
               "distil_32", model="tiny", trajectories="32"),
        _check(work, "distil-32-captured", "the same with captured evaluations", 110, "distil_32",
               "--capture", model="tiny", trajectories="32"),
        bench(work, "bench-distill-captured", "updates a second, evaluations captured and not", 75,
              "distill", *cuda, "--each", "0.7", "--capture", "--models", "unet-32", "embedded",
              "--methods", "dlms", "amed", "free_table", "ld3",
              instead="--models embedded --methods free_table --capture", refusal=NO_GPU),
        bench(work, "bench-distill-cpu", "updates a second of every learner on the CPU", 90,
              "distill", "--models", "embedded", "--each", "1",
              instead="--models embedded --methods free_table --batch 2 --each 0.1"),
        bench(work, "bench-compiled", "a step beside diffusers' compiled step", 100,
              "step", "--device", "cuda", instead="--device cuda", refusal=NO_GPU),
        sanitizer("racecheck", 70),
        sanitizer("initcheck", 70),
    ]  # fmt: skip


def groups(work: Path) -> list[Group]:
    """All stages; reports go to ``work``."""
    return [
        Group("smoke", (*smoke(work), *all_tests(), sanitizer("memcheck", 90))),
        Group("bench", tuple(benches(work)), alone=True),
        Group("later", tuple(later(work)), alone=True),
    ]


BENCH_SECONDS = float(os.environ.get("BENCH_SECONDS", "75"))
"""Kept for the benchmarks while the correctness stages run."""


def first(work: Path, site: Path | None) -> Stage:
    """Imports the build and names the machine: nothing follows if it fails."""
    command = ("python", f"{HERE}/site_build.py", "check", "--output", str(work / "import.json"))
    command += ("--site", str(site)) if site is not None else ()
    return Stage(
        "import",
        "the build imports; GPU, driver and versions; the copy bandwidth",
        (command,),
        45,
        stand_in=((*command, "--device", "cpu"),),
    )
