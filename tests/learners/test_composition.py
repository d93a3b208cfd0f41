"""DLMS starts from any learned grid: an LD3, GITS or free-table file, a table, or times."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from mixture_network import EDM, mixture_denoiser

from dlms_engine import grids, solvers
from dlms_engine.cli import main
from dlms_engine.engine.sampler import Sampler
from dlms_engine.learners import distill
from dlms_engine.learners.dlms.objective import Dlms
from dlms_engine.learners.dlms.settings import DlmsSettings
from dlms_engine.learners.training.noise import unit_noise
from dlms_engine.policies.distilled import DistilledSolver, load_solver

NOISE = 80.0 * unit_noise(0, range(4), (16,)).double()
OFFSETS = torch.tensor([1.0, 1.1, 0.93, 1.05, 1.0], dtype=torch.float64)
MAKERS = {
    "dpm_solver_pp": ("data", lambda g, t: solvers.dpm_solver_pp(EDM, g, network_times=t)),
    "ipndm": ("noise", lambda g, t: solvers.ipndm(EDM, g, network_times=t)),
    "unipc": ("data", lambda g, t: solvers.unipc(EDM, g, network_times=t)),
    "deis": ("noise", lambda g, t: solvers.deis(EDM, g, network_times=t)),
}


def learned_grid() -> torch.Tensor:
    grid = grids.logsnr(EDM, 4)
    return torch.cat([grid[:1], grid[1:-1] * 0.9, grid[-1:]])


def start(grid, **changes) -> Dlms:
    settings = {"nfe": 4, "afs": False, "validation_samples": 4, "validation_steps": 8} | changes
    made = Dlms(mixture_denoiser(), DlmsSettings(grid=grid, **settings), (16,))
    made.module.to(torch.float64)
    return made


def run(made: Dlms, policy) -> torch.Tensor:
    return Sampler(made.denoiser, policy, dtype=torch.float64)(NOISE)


@pytest.mark.parametrize("init", MAKERS)
def test_untrained_it_is_its_solver_on_the_learned_times(init: str, tmp_path: Path) -> None:
    prediction, maker = MAKERS[init]
    grid = learned_grid()
    table = maker(grid, grid * OFFSETS)
    path = DistilledSolver(table, "ld3").save(tmp_path / "ld3.safetensors")
    for source in (str(path), path, table):
        made = start(source, init=init, prediction=prediction)
        assert torch.equal(made.module.grid, grid)
        torch.testing.assert_close(run(made, made.policy), run(made, table), rtol=0, atol=1e-5)
    plain = start(source, init=init, prediction=prediction, time_scaling=False)
    torch.testing.assert_close(
        run(plain, plain.policy), run(plain, maker(grid, None)), rtol=0, atol=1e-5
    )
    # planted: without the network times it is another solver
    assert (run(plain, plain.policy) - run(made, table)).abs().max() > 1e-3


def test_times_and_a_table_with_an_analytical_first_step() -> None:
    times = learned_grid()
    assert torch.equal(start(times.tolist()).module.grid, times)
    afs = solvers.ipndm(EDM, times, afs="zero", network_times=times * OFFSETS)
    made = start(afs, nfe=3, afs=True, init="ipndm", prediction="noise")
    torch.testing.assert_close(run(made, made.policy), run(made, afs), rtol=0, atol=1e-5)


def test_another_number_of_steps_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"5 times \(4 steps\), expected 6 \(5 steps\).*afs"):
        start(learned_grid(), afs=True)
    with pytest.raises(ValueError, match=r"expected one of"):
        start("ld3")


def test_a_scaling_out_of_reach_is_cut_and_said(caplog: pytest.LogCaptureFixture) -> None:
    grid = learned_grid()
    far = solvers.ipndm(EDM, grid, network_times=grid * torch.tensor([1, 1.4, 1, 1, 1]).double())
    with caplog.at_level(logging.WARNING, "dlms_engine"):
        made = start(far)
    assert "40 %" in caplog.text and "scale_range=0.44" in caplog.text
    with torch.no_grad():
        design = made.module(None, grid[:1], 1)
    assert float(design.network_time / design.time) == pytest.approx(1 + 0.95 * 0.2, abs=1e-6)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dlms_engine"):
        wide = start(far, scale_range=0.44)
    assert not caplog.text
    with torch.no_grad():
        design = wide.module(None, grid[:1], 1)
    assert float(design.network_time / design.time) == pytest.approx(1.4, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gits", {"points": 13, "trajectories": 16}),
        ("ld3", {"train": 4, "validation": 4, "rounds": 1, "rounds_times": 1, "loss": "l2",
                 "student": "ipndm", "teacher_nfe": 8, "lr": 0.05}),
        ("free_table", {"trajectories": 16, "batch": 8, "validation_samples": 4,
                        "validation_steps": 8, "teacher_steps": 8, "afs": False}),
    ],
)  # fmt: skip
def test_it_goes_on_from_another_learners_file(method: str, settings, tmp_path: Path) -> None:
    path = tmp_path / f"{method}.safetensors"
    common = {"nfe": 3, "shape": (16,), "progress": False}
    first = distill(mixture_denoiser(), method, output=path, **common, **settings)
    quick = {"trajectories": 16, "batch": 8, "validation_samples": 4, "validation_steps": 8}
    out = tmp_path / "dlms.safetensors"
    afs = len(first.policy.grid) - 1 > common["nfe"]  # GITS may have chosen it
    solver = distill(
        mixture_denoiser(), "dlms", grid=str(path), afs=afs, output=out, **common, **quick
    )
    assert torch.equal(solver.policy.designer.grid, first.policy.grid)
    assert solver.settings["grid"] == first.policy.grid.tolist()
    assert load_solver(out).settings["grid"] == first.policy.grid.tolist()
    with pytest.raises(ValueError, match="per-sample policy"):
        distill(mixture_denoiser(), "dlms", grid=str(out), afs=afs, **common, **quick)


def test_the_command_line_takes_a_solver_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ["batch=8", "validation_samples=4", "validation_steps=8"]
    tiny = ["distill", "--model", "cli_model:tiny", "--nfe", "3", "--json"]
    ld3 = ["train=2", "validation=2", "rounds=1", "rounds_times=0", "loss=l2", "teacher_nfe=6"]
    main([*tiny, "--method", "ld3", "-o", "ld3.safetensors", *(f"--set={s}" for s in ld3)])
    chosen = ["grid=ld3.safetensors", "afs=false", *quick]
    main(
        [
            *tiny,
            "--method=dlms",
            "--trajectories=16",
            "-o",
            "s.safetensors",
            *(f"--set={s}" for s in chosen),
        ]
    )
    grid = load_solver("ld3.safetensors").policy.grid
    assert torch.equal(load_solver("s.safetensors").policy.designer.grid, grid)
