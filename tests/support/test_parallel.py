"""Two processes distil what one does, to rounding; a killed one is started again and goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from marks import slow
from mixture_network import mixture_denoiser
from safetensors.torch import load_file

from dlms_engine.engine.sampler import seeded_noise
from dlms_engine.learners.dlms.objective import Dlms
from dlms_engine.learners.dlms.settings import DlmsSettings
from dlms_engine.learners.training.losses import log_mean
from dlms_engine.learners.training.noise import unit_noise
from dlms_engine.learners.training.trainer import Trainer, TrainerSettings
from dlms_engine.policies.distilled import load_solver
from dlms_engine.support.parallel import World

SCRIPT = Path(__file__).parent / "parallel_run.py"
RUNS = ("dlms", "dlms-endpoint", "amed", "free_table", "ld3", "ld3-best", "dode", "gits")
LAUNCH = ["-m", "torch.distributed.run", "--standalone"]


def start(processes: int, *words: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs the script; a run that hangs fails the test by its timeout."""
    several = [*LAUNCH, f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    command = [sys.executable, *(several if processes > 1 else []), str(SCRIPT), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def numbers(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a solver file."""
    load_solver(path)
    return load_file(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Every method, distilled by one process and by two."""
    found = []
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"by{processes}")
        done = start(processes, folder, *RUNS)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(folder)
    return found[0], found[1]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_distil_what_one_does(name: str, folders: tuple[Path, Path]) -> None:
    one, two = (numbers(folder / f"{name}.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=f"{name} {key}")
    assert not list(folders[1].glob("*.checkpoint*"))


def test_training_did_something(folders: tuple[Path, Path]) -> None:
    """Or equality would say nothing: the learned numbers are not those of the start."""
    for name in ("dlms", "dlms-endpoint"):
        assert numbers(folders[0] / f"{name}.safetensors")["bias"].abs().max() > 1e-3
    ld3 = load_solver(folders[0] / "ld3.safetensors").policy
    assert (ld3.times - ld3.grid[:-1]).abs().max() > 1e-3
    best = load_solver(folders[0] / "free_table.safetensors").best
    assert best["set"] != "init" and not best["set"].endswith("@0")
    for name in ("amed", "free_table", "ld3", "ld3-best", "dode"):
        best = load_solver(folders[0] / f"{name}.safetensors").best
        assert best["compared"]["kept"] == "learned", name


@pytest.mark.parametrize(("name", "call"), [("dlms", 80), slow("ld3", 200)])
def test_a_killed_process_is_started_again_and_goes_on(
    name: str, call: int, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """torchrun --max-restarts: the result is, to the bit, that of a run that was not disturbed."""
    done = start(2, tmp_path, name, "--die", call, restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").read_text() == f"{name}.checkpoint.safetensors"
    anew, rest = (int((f / f"{name}.calls").read_text()) for f in (folders[1], tmp_path))
    assert rest <= anew - call // 4  # it went on, and did not begin anew
    whole, resumed = (numbers(f / f"{name}.safetensors") for f in (folders[1], tmp_path))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.slow
def test_without_restarts_a_killed_process_ends_the_run_and_resume_continues(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    done = start(2, tmp_path, "dlms", "--die", 80)
    assert done.returncode != 0 and (tmp_path / "died").exists()
    assert not (tmp_path / "dlms.safetensors").exists()
    assert start(2, tmp_path, "dlms", "--resume").returncode == 0
    whole, resumed = (numbers(f / "dlms.safetensors") for f in (folders[1], tmp_path))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_logarithm_of_a_mean_is_shared_out_rightly() -> None:
    """Gradients of the ranks, weighted by their counts, add up to the whole batch's."""
    values = torch.tensor([0.5, 2.0, 4.0, 1.5, 3.0], dtype=torch.float64)
    whole = values.clone().requires_grad_()
    whole.mean().log().backward()
    total = torch.stack([values.sum(), torch.tensor(5.0).double()])

    class Fake(World):
        def sum_(self, value: torch.Tensor) -> torch.Tensor:
            return total.clone()

    found = []
    for rank in range(2):
        world = Fake(rank, 2)
        first, stop = world.slice(5)
        own = values[first:stop].clone().requires_grad_()
        loss = log_mean(own.mean(), stop - first, world)
        assert float(loss.detach()) == pytest.approx(float(values.mean().log()))
        loss.backward()
        assert own.grad is not None
        found.append(own.grad * (stop - first) / 5)
        # planted: the mean of the ranks' logarithms has another gradient
        other = values[first:stop].clone().requires_grad_()
        other.mean().log().backward()
        assert other.grad is not None and not torch.allclose(other.grad, own.grad)
    assert whole.grad is not None
    torch.testing.assert_close(torch.cat(found), whole.grad)


def test_a_batch_smaller_than_the_world_is_refused() -> None:
    learner = Dlms(mixture_denoiser(), DlmsSettings(nfe=3), (16,))
    settings = TrainerSettings(batch=2, trajectories=4)
    Trainer(learner, settings, (16,), world=World(1, 2))
    with pytest.raises(ValueError, match="batch is 2, but 3 processes share it"):
        Trainer(learner, settings, (16,), world=World(1, 3))


def test_ranks_that_see_other_files_are_told() -> None:
    class Fake(World):
        def gather(self, value: torch.Tensor) -> list[torch.Tensor]:
            return [value, torch.tensor(1)]

    Fake(0, 2).check_equal(1, "the checkpoint")
    with pytest.raises(ValueError, match=r"disagree on the checkpoint \(\[0, 1\], by rank\)"):
        Fake(0, 2).check_equal(0, "the checkpoint")


def test_shares_cover_a_batch_once_and_noise_does_not_depend_on_them() -> None:
    for size in (1, 2, 3, 5):
        shares = [World(rank, size).slice(7) for rank in range(size)]
        assert [i for start, stop in shares for i in range(start, stop)] == list(range(7))
        rounds = World(0, size).rounds(7)
        assert [k for batches in rounds for k in batches] == list(range(7))
        dealt = [World(rank, size).deal(rounds[-1]) for rank in range(size)]
        assert [k for k in dealt if k is not None] == rounds[-1]
    whole = unit_noise(4, range(10, 17), (2, 3))
    parts = [
        unit_noise(4, range(10 + a, 10 + b), (2, 3))
        for a, b in (World(0, 2).slice(7), World(1, 2).slice(7))
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, unit_noise(5, range(10, 17), (2, 3)))


def test_training_noise_is_not_what_people_sample_with() -> None:
    """Seeds beyond 32 bits are cut by the generator: training once drew the noise of seeds 0, 1, ..."""
    sampled = seeded_noise(range(64), (2, 3))
    trained = unit_noise(0, range(64), (2, 3))
    distances = (sampled[:, None] - trained[None]).abs().amax(dim=(2, 3))
    assert distances.min() > 1e-3
    assert (trained[:, None] - trained[None]).abs().amax(dim=(2, 3)).fill_diagonal_(1).min() > 1e-3
