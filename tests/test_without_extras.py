"""The core needs none of the extras, and what needs one says how to install it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
from without_extras import EXTRAS

TESTS = Path(__file__).parent
ROOT = TESTS.parent
CORE_TESTS = (
    "models/test_denoiser.py", "processes", "engine/test_sampler.py", "solvers/test_table.py",
    "support/test_versioned.py", "checkpoints/test_edm.py",
    "integrations/test_k_diffusion.py", "solvers/test_registry.py",
)  # fmt: skip
PROGRAM = """
import json, os, sys, traceback
import without_extras
if sys.argv[1] == "blocked":
    without_extras.block()
import torch  # once: what is imported after a fork is the package

def told(path):
    with open(path) as file:
        return file.read()

answers = {}
for number, code in enumerate(json.loads(sys.argv[2])):
    child = os.fork()
    if not child:
        for stream in (1, 2):
            os.dup2(os.open(f"{number}.{stream}", os.O_CREAT | os.O_WRONLY), stream)
        status = 0
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    status = os.waitpid(child, 0)[1]
    answers[code] = (status, told(f"{number}.1"), told(f"{number}.2"))
print(json.dumps(answers))
"""

SAMPLING = """
import torch
import dlms_engine as dlms
from dlms_engine import grids, processes, solvers

denoiser = dlms.Denoiser(torch.nn.Identity(), processes.EDM(), prediction="data")
class Shrink(torch.nn.Module):
    def forward(self, x, t):
        return x / (1 + t.reshape(-1, 1, 1, 1) ** 2)
denoiser = dlms.Denoiser(Shrink(), processes.EDM(), prediction="data")
table = solvers.ipndm(denoiser.process, grids.polynomial(denoiser.process, 5))
images = dlms.Sampler(denoiser, table).sample(seeds=range(4), shape=(3, 8, 8))
solver = dlms.distill(denoiser, method="gits", nfe=3, shape=(3, 8, 8), trajectories=4, progress=False)
solver.save("solver.safetensors")
again = dlms.Sampler(denoiser, dlms.load_solver("solver.safetensors"))
assert torch.equal(again.sample(seeds=[1], shape=(3, 8, 8)),
                   dlms.Sampler(denoiser, solver).sample(seeds=[1], shape=(3, 8, 8)))
from dlms_engine.cli import main
main(["inspect", "solver.safetensors", "--json"])
print("finite", bool(images.isfinite().all()))
"""
# every module of the package but those that are an extra's own
IMPORTS = """
import importlib, pkgutil
import dlms_engine
own = []
for found in pkgutil.walk_packages(dlms_engine.__path__, "dlms_engine.", onerror=lambda name: None):
    library = found.name.partition(".")[2].startswith(("kernels", "_C", "_ops_"))  # compiled
    if library or found.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(found.name)
    except ImportError as error:
        assert "pip install" in str(error), (found.name, error)
        own.append(found.name)
print(*own)
"""
# what a user types -> the extra or package its message must name
ASKED = {
    "import dlms_engine; dlms_engine.accelerate": "dlms-engine[diffusers]",
    "import dlms_engine.integrations.diffusers": "dlms-engine[diffusers]",
    "import dlms_engine.integrations.pipelines.distill": "dlms-engine[diffusers]",
    "import dlms_engine.checkpoints.single_file": "dlms-engine[diffusers]",
    "from dlms_engine import embedded; embedded.embedded_network()": "dlms-engine[diffusers]",
    "import torch; from dlms_engine import plots; "
    "plots.samples(torch.zeros(1, 3, 4, 4), 'a.png')": "dlms-engine[plots]",
    "import torch; from dlms_engine.lab.evaluation import frechet; "
    "frechet._metric(torch.nn.Identity())": "dlms-engine[evaluation]",
    "from dlms_engine.cli import main; "
    "main(['distill', '--pipeline', '.', '--output', 'x', '--debug'])": "dlms-engine[diffusers]",
}


class Answer(NamedTuple):
    status: int
    stdout: str
    stderr: str


def run(codes: Iterable[str], folder: Path, how: str) -> dict[str, Answer]:
    """What each code says in a process of its own."""
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, how, json.dumps(list(codes))],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {code: Answer(*held) for code, held in json.loads(done.stdout).items()}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    return run([SAMPLING, IMPORTS, *ASKED], tmp_path_factory.mktemp("blocked"), "blocked")


def test_every_extra_is_blocked() -> None:
    """A package added to an extra in pyproject.toml must be added to the block too."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {"pillow": "PIL", "pyyaml": "yaml"}
    tools = {"hypothesis", "pytest", "pytest-xdist", "setuptools", "clang-format", "mypy", "ruff"}
    for extra, packages in project["optional-dependencies"].items():
        for package in packages:
            name = package.partition("[")[0].partition(">")[0].partition(";")[0].strip()
            if name in tools | {"dlms-engine"} or name.startswith(("types-", "mkdocs")):
                continue
            assert named.get(name, name).replace("-", "_") in EXTRAS, f"{extra}: {name}"


def test_core_samples_distils_and_saves(answers: dict[str, Answer]) -> None:
    done = answers[SAMPLING]
    assert done.status == 0 and "finite True" in done.stdout, done.stderr


def test_modules_import_or_name_their_extra(answers: dict[str, Answer]) -> None:
    done = answers[IMPORTS]
    assert done.status == 0, done.stderr
    assert set(done.stdout.split()) == {
        "dlms_engine.integrations.pipelines.denoiser",
        "dlms_engine.integrations.pipelines.distill",
        "dlms_engine.integrations.diffusers",
        "dlms_engine.integrations.scheduler.base",
        "dlms_engine.checkpoints.single_file",
    }


@pytest.mark.parametrize("code", ASKED)
def test_what_needs_an_extra_says_so(code: str, answers: dict[str, Answer]) -> None:
    done = answers[code]
    assert done.status != 0
    last = done.stderr.strip().splitlines()[-1]
    assert (
        "ImportError" in last and "pip install" in last and ASKED[code] in last.replace("_", "-")
    ), done.stderr


@pytest.mark.slow
def test_the_block_is_what_makes_them_fail(tmp_path: Path) -> None:
    """Planted: with the extras there, the same lines run."""
    pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
    code = "import dlms_engine; dlms_engine.accelerate"
    assert run([code], tmp_path, "as it is")[code].status == 0


@pytest.mark.slow
def test_core_tests_pass_without_extras() -> None:
    """The core's own tests, in an interpreter without the extras; none of them is skipped for one."""
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "without_extras", "-q", "--no-header",
            "-p", "no:cacheprovider", "-k", "not compile and not agrees_with_eager",
            *(str(TESTS / name) for name in CORE_TESTS),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "needs the extra" not in done.stdout
