"""scripts/gpu_check.py: what it runs, what a kill costs, what it refuses, and its rehearsal."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

from dlms_engine.lab.bench import __main__ as bench
from dlms_engine.lab.bench import device, distill, loop

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
for folder in (ROOT / "scripts", ROOT / "scripts" / "gpu_stages"):
    sys.path.append(str(folder))
gpu_check, plan, runner, site_build, summary, checks = map(
    importlib.import_module, ("gpu_check", "plan", "runner", "site_build", "summary", "checks")
)
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


def call(tmp_path: Path, *arguments: str, python: str = sys.executable):
    environment = {k: v for k, v in os.environ.items() if k not in ("VENV", "BUDGET")}
    environment |= {"OUT": str(tmp_path), "PYTHON": python}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


# -- what is refused ------------------------------------------------------------------------------


@needs_bash
def test_an_unknown_stage_is_refused(tmp_path):
    done = call(tmp_path, "bench", "speed")
    assert done.returncode == 2 and "no stage 'speed'" in done.stdout
    assert "bench-row" in done.stdout, "the stages there are"


@needs_bash
def test_a_missing_python_is_told(tmp_path):
    done = call(tmp_path, python="no-such-python")
    assert done.returncode == 2 and "no 'no-such-python'" in done.stdout


@needs_bash
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would run")
def test_without_a_gpu_it_says_what_to_do(tmp_path):
    done = call(tmp_path, "graphs")
    assert done.returncode == 2 and "--rehearse" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "gpu_check.json").exists()


@pytest.mark.parametrize("name", ["torch", "triton", "dlms_engine"])
@pytest.mark.parametrize("wheel", [False, True])
def test_what_is_tested_may_not_be_vendored(tmp_path, name, wheel):
    vendor = tmp_path / "vendor"
    (vendor / (f"{name}-2.0-py3-none-any.whl" if wheel else name)).mkdir(parents=True)
    with pytest.raises(gpu_check.Missing, match=f"vendor holds {name}"):
        gpu_check.vendored(vendor, tmp_path)


def test_vendored_wheels_are_unpacked(tmp_path):
    vendor = tmp_path / "vendor"
    vendor.mkdir()
    with zipfile.ZipFile(vendor / "thing-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing/__init__.py", "value = 3\n")
    first, *_ = gpu_check.vendored(vendor, tmp_path / "work")
    assert (Path(first) / "thing" / "__init__.py").read_text() == "value = 3\n"
    assert gpu_check.vendored(tmp_path / "none", tmp_path) == []


# -- the build ------------------------------------------------------------------------------------


def checkout(root: Path) -> Path:
    for name in ("csrc/a.cpp", "python/dlms_engine/a.py", "kernels/b.py", "kernels/cuda/k.cu"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("1\n")
    return root


def stamped(site: Path, root: Path, **changes: str) -> Path:
    site.mkdir(exist_ok=True)
    stamp = {"digest": site_build.digest(root), "commit": "1", "python": sys.version.split()[0]}
    (site / "BUILD.json").write_text(json.dumps({**stamp, **changes}))
    return site


def test_what_was_compiled_from_other_sources_is_not_used(tmp_path):
    root, site = checkout(tmp_path / "root"), tmp_path / "site"
    assert "nothing is built" in site_build.problem(site, root)
    stamped(site, root)
    assert site_build.problem(site, root) is None
    (root / "python/dlms_engine/a.py").write_text("2\n")
    assert site_build.problem(site, root) is None, "what is compiled does not depend on it"
    for name in ("csrc/a.cpp", "kernels/cuda/k.cu"):
        (root / name).write_text("2\n")
        assert "other sources" in site_build.problem(site, root)
        stamped(site, root)
    assert "Python 3.8.1" in site_build.problem(stamped(site, root, python="3.8.1"), root)


def test_the_python_files_are_always_the_checkouts(tmp_path):
    root, site = checkout(tmp_path / "root"), tmp_path / "site"
    package = site / "dlms_engine"
    assert site_build.refresh(site, root) == 3  # two Python files, and the kernel's source
    (package / "_C.so").write_text("compiled")
    (package / "old.py").write_text("gone from the checkout")
    (root / "kernels/b.py").write_text("2\n")
    assert site_build.refresh(site, root) == 2 and site_build.refresh(site, root) == 0
    assert (package / "kernels/b.py").read_text() == "2\n"
    assert sorted(p.name for p in package.iterdir()) == ["_C.so", "a.py", "kernels"]


# -- stages, limits and the report ----------------------------------------------------------------


def stage(name: str, program: str, limit: float = 30.0, **options) -> runner.Stage:
    command = (("python", "-c", program),)
    return runner.Stage(name, "what", command, limit, stand_in=command, **options)


def run(tmp_path: Path, *groups: runner.Group, budget: float = 60.0, reserve: float = 0.0, **more):
    tmp_path.mkdir(exist_ok=True)
    report = gpu_check.Report(tmp_path / "out", tmp_path, rehearse=False)
    report.out.mkdir(exist_ok=True)
    runs = runner.Runner(
        tmp_path, tmp_path, budget, dict(os.environ), rehearse=False, after=report.add, **more
    )
    for group in groups:
        runs.run(group, reserve)
    written = json.loads((report.out / "gpu_check.json").read_text())
    return {entry["stage"]: entry["status"] for entry in written["stages"]}, report


CHILD = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time, pathlib\\nwhile not "
                  "pathlib.Path('ended').exists(): time.sleep(0.1)\\npathlib.Path('outlived').touch()"])
time.sleep(60)
"""


def test_a_kill_loses_one_stage(tmp_path):
    """A stage that hangs is ended with its children; the report has it and the others."""
    group = runner.Group(
        "g",
        (
            stage("hangs", CHILD, limit=1.5),
            stage("fails", "raise SystemExit(3)"),
            stage("good", "open('good.json', 'w').write('{\"checks\": []}')"),
        ),
    )
    states, report = run(tmp_path, group, cores=1)
    assert states == {"hangs": "out of time", "fails": "failed (3)", "good": "passed"}
    assert report.reports() == {"good": {"checks": []}}
    (tmp_path / "ended").touch()  # a child that is still there answers
    time.sleep(2)
    assert not (tmp_path / "outlived").exists()
    with tarfile.open(tmp_path / "out" / "gpu_check_logs.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["fails.log", "good.log", "hangs.log"]


def test_the_report_is_written_after_each_stage(tmp_path):
    look = "import json; print(len(json.load(open('out/gpu_check.json'))['stages']))"
    group = runner.Group("g", (stage("first", "pass"), stage("second", look)), alone=True)
    run(tmp_path, group)
    assert (tmp_path / "second.log").read_text().splitlines()[-1] == "1"


def spans(tmp_path: Path, alone: bool, **more) -> list[tuple[float, float]]:
    note = (
        "import time; a = time.time(); time.sleep(0.4); open(f'{n}.span', 'w').write("
        "f'{a} {time.time()}')"
    )
    stages = tuple(stage(f"s{n}", f"n = {n}; {note}") for n in range(3))
    run(tmp_path, runner.Group("g", stages, alone=alone), **more)
    return sorted(tuple(map(float, p.read_text().split())) for p in tmp_path.glob("*.span"))


def overlap(times: list[tuple[float, float]]) -> bool:
    return any(b[0] < a[1] for a, b in itertools.pairwise(times))


def test_benchmarks_run_alone_and_checks_side_by_side(tmp_path):
    assert not overlap(spans(tmp_path / "alone", True, cores=8))
    assert overlap(spans(tmp_path / "together", False, cores=8))
    assert not overlap(spans(tmp_path / "one", False, cores=1))


def test_what_finds_no_time_says_so(tmp_path):
    states, _ = run(tmp_path, runner.Group("g", (stage("late", "pass"),)), budget=20, reserve=18)
    assert states == {"late": "no time left"}


def test_a_command_that_does_not_exist_fails(tmp_path):
    missing = runner.Stage("missing", "what", (("no-such-tool",),), 10)
    states, _ = run(tmp_path, runner.Group("g", (missing,)))
    assert states == {"missing": "failed (cannot be started)"}


def test_stages_are_chosen_by_their_names_and_groups(tmp_path):
    everything = plan.groups(tmp_path)
    chosen = runner.select(everything, ["graphs", "bench"])
    assert [g.name for g in chosen] == ["smoke", "bench"]
    assert [s.name for s in chosen[0].stages] == ["graphs"]
    names = [s.name for g in everything for s in g.stages]
    assert len(names) == len(set(names)) and runner.select(everything, []) == everything


# -- checks ---------------------------------------------------------------------------------------


def broken() -> dict:
    raise RuntimeError("wrong\nmore")


def absent() -> dict:
    raise checks.Absent("no such thing")


def test_one_failing_check_does_not_hide_the_others(tmp_path, capsys):
    made = checks.Checks("t", tmp_path / "t.json", 30)
    for name, check in (("a", broken), ("b", dict), ("c", absent)):
        made.run(name, check)
    entries = json.loads((tmp_path / "t.json").read_text())["checks"]
    assert [e["status"] for e in entries] == ["failed", "passed", "absent"]
    assert entries[0]["reason"] == "RuntimeError: wrong" and made.status() == 1
    assert "Traceback" in capsys.readouterr().err
    outcome = runner.Outcome(stage("t", "pass"), "failed (1)", 1.0)
    text = summary.table([outcome], {"t": made.report}, tmp_path, rehearse=False)
    assert "1 of 3 checks passed, 1 failed, 1 absent" in text
    assert "failed: t: a: RuntimeError: wrong" in text


def test_checks_that_never_ran_are_no_success(tmp_path):
    made = checks.Checks("t", None, -1.0)
    made.run("late", dict)
    assert made.report["checks"][0]["status"] == "not reached" and made.status() == 1


# -- the commands ---------------------------------------------------------------------------------


def test_every_benchmark_understands_its_options(tmp_path, monkeypatch):
    for module in (device, distill, loop):
        monkeypatch.setattr(module, "no_gpu", lambda program: True)
    for group in plan.groups(tmp_path):
        for each in group.stages:
            if each.name.startswith("bench") and not each.name.endswith("cpu"):
                *_, options = each.commands[0][:3], each.commands[0][3:]
                assert bench.main_bench(list(options)) == 2, each.name  # argparse would exit
                if each.refusal:  # what a rehearsal runs instead is refused as well
                    assert bench.main_bench(list(each.stand_in[0][3:])) == 2, each.name


def test_every_file_with_a_gpu_test_is_run():
    stages = {stage.name: stage.commands[0] for stage in plan.all_tests()}
    assert "tests/kernels/test_sampler_cuda.py" in stages["tests"]
    assert "tests/kernels/test_designer_row.py" in stages["tests-triton"]
    files = [name for command in stages.values() for name in command if name.endswith(".py")]
    assert len(files) >= 6 and all((ROOT / name).is_file() for name in files)


@pytest.mark.slow
@needs_bash
@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearsed where there is no GPU")
def test_the_rehearsal(tmp_path):
    done = call(tmp_path, "--rehearse", "graphs", "bench-row", "bench-compiled", "racecheck")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    states = {entry["stage"]: entry["status"] for entry in report["stages"]}
    assert states == dict.fromkeys(
        ("import", "graphs", "bench-row", "bench-compiled", "racecheck"), "passed"
    )
    assert report["rehearsal"] and report["machine"]["torch"] == torch.__version__
    assert all(c["status"] == "passed" for c in report["results"]["graphs"]["checks"])
    for entry in report["stages"]:
        assert entry["measures"] in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu_check.json", "gpu_check_logs.tar.gz"]
