"""The reverse sweep: gradients, calls, memory; students with decoupled times."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic import GaussianMixture
from torch import Tensor, nn

from dlms_engine import grids, ops, solvers
from dlms_engine.engine.adjoint import solve, walk
from dlms_engine.learners.training.base_table import Base
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.processes import EDM

DATA = Path(__file__).parents[1] / "data"
STUDENTS = {
    "uni_pc-bh1-f64-o2": Base("unipc", 2, "bh1"),
    "uni_pc-bh2-f64-o2": Base("unipc", 2, "bh2"),
    "uni_pc-bh1-f64-o3": Base("unipc", 3, "bh1"),
    "uni_pc-bh2-f64-o3": Base("unipc", 3, "bh2"),
    "dpm_solverpp-o2": Base("dpm_solver_pp", 2),
    "dpm_solverpp-o3": Base("dpm_solver_pp", 3),
    "ipndm-o2": Base("ipndm", 2),
    "ipndm-o3": Base("ipndm", 3),
    "ipndm-o4": Base("ipndm", 4),
    "euler": Base("euler"),
}


def mixture(process: Any = None) -> tuple[GaussianMixture, Denoiser]:
    """The analytic problem behind the interface of a network."""
    process = process or EDM()
    network = GaussianMixture(process)
    return network, Denoiser(network, process, "data")


def start_noise() -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=(8, 16)))


@pytest.mark.parametrize("name", STUDENTS)
def test_student_with_decoupled_times_equals_the_reference(name: str) -> None:
    with np.load(DATA / "ld3.npz") as file:
        prefix = f"{name}-N5-edm-pert_interior/"
        ref = {
            k[len(prefix) :]: torch.from_numpy(file[k]) for k in file.files if k.startswith(prefix)
        }
    network, denoiser = mixture()
    t, tc = ref["t"].requires_grad_(), ref["tc"].requires_grad_()
    table = STUDENTS[name].table(denoiser.process, t, tc)
    end = solve(denoiser, table, 80.0 * start_noise())[-1]
    # the reference rounds UniPC's contraction to single precision
    bound = 2e-6 if name.startswith("uni_pc") else 1e-10
    assert float((end.detach() - ref["x_final"]).abs().max()) < bound
    assert network.calls == 5 == table.nfe


def test_unipc_time_gradient_is_exact() -> None:
    """Order 3, log-time gradient against central differences (the reference is 9-25 % off)."""
    _, denoiser = mixture()
    base, grid = Base("unipc", 3, "bh1"), grids.polynomial(EDM(), 5)

    def loss(log_t: Tensor) -> Tensor:
        t = torch.cat([grid[:1], log_t.exp(), grid[-1:]])
        return solve(denoiser, base.table(EDM(), t, t), 80.0 * start_noise())[-1].square().mean()

    at = grid[1:-1].log()
    leaf = at.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    with torch.no_grad():
        for i in range(len(at)):
            step = torch.zeros_like(at)
            step[i] = 1e-5
            central = float(loss(at + step) - loss(at - step)) / 2e-5
            assert abs(float(grad[i]) - central) < 1e-6 * float(grad.abs().max())


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_sweep_equals_autograd(batched: bool, prediction: str) -> None:
    """All gradients of the hand-written sweep, with losses on inner states too."""
    _, denoiser = mixture()
    grid = grids.polynomial(EDM(), 4)
    made = (
        solvers.dpm_solver_pp(EDM(), grid, order=3, afs=True)
        if prediction == "data"
        else solvers.ipndm(EDM(), grid, order=3)
    )
    x = 80.0 * start_noise()
    lead = (8,) if batched else ()
    names = ("a", "b", "times", "initial_scale", "grid", "t_start", "t_end")

    def gradients(own: bool) -> list[Tensor]:
        parts = {
            k: getattr(made, k).expand((*lead, *getattr(made, k).shape)).clone() for k in names
        }
        leaves = [parts[k].requires_grad_() for k in names[:4]]
        table, start = dataclasses.replace(made, **parts), x.clone().requires_grad_()
        if own:
            states = solve(denoiser, table, start)
            end, inner = states[-1], states[1]
        else:
            (_, _, inner), *_, (_, _, end) = walk(denoiser, table, start)
        loss = end.square().sum() + (0.01 * inner).sin().sum()
        return list(torch.autograd.grad(loss, [*leaves, start]))

    for name, left, right in zip((*names[:4], "x"), gradients(True), gradients(False), strict=True):
        scale = float(right.abs().max())
        assert scale > 0, name
        # a slot from before the first evaluation has no weight to learn
        assert float((left - right).abs().max()) < 1e-12 * scale, name


@pytest.mark.parametrize("scale", [None, 3.0])
def test_rows_go_back_through_the_kernel(
    scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One backward kernel an evaluation; guidance and float32 as autograd has them."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 16).requires_grad_(False)

    def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return torch.tanh(layer(x) + label[:, None] + t[:, None])

    options: dict[str, Any] = {}
    if scale is not None:
        options = {"guidance_scale": scale, "unconditional": {"label": torch.zeros(1)}}
    denoiser = Denoiser(network, EDM(), "edm", **options)
    made = solvers.ipndm(EDM(), grids.polynomial(EDM(), 4), order=3)
    calls: list[int] = []
    kernel = ops.fused_row_backward
    monkeypatch.setattr(
        ops, "fused_row_backward", lambda *given: (calls.append(1), kernel(*given))[1]
    )

    def gradients(run: Any) -> list[Tensor]:
        leaves = [getattr(made, k).clone().requires_grad_() for k in ("a", "b", "times")]
        table = dataclasses.replace(made, **dict(zip(("a", "b", "times"), leaves, strict=True)))
        end = run(denoiser, table, 80.0 * start_noise().float(), label=torch.full((8,), 0.3))
        return list(torch.autograd.grad(end.square().sum(), leaves))

    ours = gradients(lambda *given, **cond: solve(*given, **cond)[-1])
    assert len(calls) == made.nfe
    for left, right in zip(ours, gradients(lambda *g, **c: end_of(*g, **c)), strict=True):
        assert float((left - right).abs().max()) < 1e-4 * float(right.abs().max())


def end_of(*given: Any, **cond: Any) -> Tensor:
    """By autograd through the plain run."""
    return list(walk(*given, **cond))[-1][2]


class Wide(nn.Module):
    """A network whose graph dwarfs a state; counts the graphs alive at once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 4096).double(), nn.Linear(4096, 16).double()
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x) + t[:, None]))


def peak_bytes(run: Any) -> int:
    """Most bytes autograd keeps at once beyond small tensors."""
    alive, peak = 0, 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal alive, peak
        size = tensor.numel() * tensor.element_size()
        if size >= 4096 * 8 and not isinstance(tensor, nn.Parameter) and tensor.shape[0] == 8:
            copy = tensor.clone()
            alive += size
            peak = max(peak, alive)

            def freed(size: int = size) -> None:
                nonlocal alive
                alive -= size

            weakref.finalize(copy, freed)
            return copy
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return peak


def test_memory_is_flat_in_nfe() -> None:
    """Network activations kept by the sweep: the same for 3 and 12 evaluations; autograd's grow."""
    denoiser = Denoiser(Wide(), EDM(), "data")

    def run(nfe: int, own: bool) -> int:
        grid = grids.polynomial(EDM(), nfe).requires_grad_()
        table = solvers.ipndm(EDM(), grid, order=3)

        def step() -> None:
            if own:
                end = solve(denoiser, table, 80.0 * start_noise())[-1]
            else:
                end = end_of(denoiser, table, 80.0 * start_noise())
            end.square().sum().backward()

        return peak_bytes(step)

    assert run(3, True) == run(12, True) > 0
    assert run(12, False) >= 3.9 * run(3, False) > 0, "the fault: one graph per evaluation"
