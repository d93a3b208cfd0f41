"""Two processes distil what one does, to rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from dlms_engine.learners.noise import unit_noise
from dlms_engine.parallel import World
from dlms_engine.sampler import seeded_noise
from dlms_engine.solver_file import load_solver

SCRIPT = Path(__file__).parent / "parallel_run.py"


def start(output: Path, processes: int) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_processes_distil_what_one_does(tmp_path: Path) -> None:
    parameters = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.safetensors"
        start(output, processes)
        designer = load_solver(output).policy.designer
        parameters.append(torch.cat([p.detach().flatten() for p in designer.parameters()]))
    moved = (parameters[0]).abs().max()
    assert moved > 1e-3  # training did something
    torch.testing.assert_close(parameters[0], parameters[1], rtol=1e-3, atol=1e-5)


def test_shares_cover_a_batch_once_and_noise_does_not_depend_on_them() -> None:
    for size in (1, 2, 3, 5):
        shares = [World(rank, size).slice(7) for rank in range(size)]
        assert [i for start, stop in shares for i in range(start, stop)] == list(range(7))
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
