"""Every solver family against end states of the public reference codes (tests/data/README.md)."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic import GaussianMixture, run_table

from dlms_engine.processes import EDM
from dlms_engine.solvers import ddim, deis, dpm_solver_2, dpm_solver_pp, heun, ipndm, ipndm_v, unipc
from dlms_engine.solvers.table import SolverTable

DATA = Path(__file__).parent.parent / "data"
BASELINES = dict(np.load(DATA / "baselines.npz"))
LD3 = dict(np.load(DATA / "ld3.npz"))
NOISE = 80 * torch.from_numpy(np.random.default_rng(1).normal(size=(8, 16)))
COTANGENT = torch.from_numpy(np.random.default_rng(2).normal(size=(8, 16)))
PROCESS = EDM()
FORM = {"x0": "data", "eps": "noise"}


def maker(config: str) -> tuple[Any, dict[str, Any]]:
    """(maker, options) of a reference configuration such as ``unipc_bh2_o3_x0_lof1``."""
    if config in ("euler", "heun"):
        return {"euler": ddim, "heun": heun}[config], {}
    if match := re.fullmatch(r"dpm2_r(.*)", config):
        return dpm_solver_2, {"r": float(match[1])}
    if match := re.fullmatch(r"ipndm_o(\d)", config):
        return ipndm, {"order": int(match[1])}
    if match := re.fullmatch(r"deis_(tab|rhoab)_o(\d)(_exact)?", config):
        return deis, {"variant": match[1], "order": int(match[2])}
    if match := re.fullmatch(r"dpmpp_(\d)m_(x0|eps)_lof(\d)", config):
        options: dict[str, Any] = {"order": int(match[1]), "prediction": FORM[match[2]]}
        return dpm_solver_pp, {**options, "lower_order_final": match[3] == "1"}
    match = re.fullmatch(r"unipc_(bh\d)_o(\d)_(x0|eps)_lof(\d)", config)
    assert match, config
    options = {"variant": match[1], "order": int(match[2]), "prediction": FORM[match[3]]}
    return unipc, {**options, "lower_order_final": match[4] == "1"}


def assert_reproduces(table: SolverTable, final: np.ndarray) -> None:
    denoiser = GaussianMixture(PROCESS)
    got = run_table(table, denoiser, NOISE)
    error = (got - torch.from_numpy(final)).abs().max().item()
    assert error < 1e-10, f"off by {error:.1e}"
    assert denoiser.calls == table.nfe


ENTRIES = sorted({name.rsplit("/", 1)[0] for name in BASELINES})


def test_all_families_are_in_the_data() -> None:
    assert len(ENTRIES) == 78
    makers = {maker(entry.split("__")[0])[0] for entry in ENTRIES}
    assert makers == {ddim, heun, dpm_solver_2, ipndm, deis, dpm_solver_pp, unipc}


@pytest.mark.parametrize("store", ["data", "noise"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_reference_end_states(entry: str, store: str) -> None:
    make, options = maker(entry.split("__")[0])
    table = make(PROCESS, torch.from_numpy(BASELINES[f"{entry}/t"]), store=store, **options)
    assert table.nfe == (10 if make in (heun, dpm_solver_2) else 5)
    assert_reproduces(table, BASELINES[f"{entry}/final"])


@pytest.mark.parametrize("order", [2, 3, 4])
def test_ipndm_v_is_deis_in_sigma(order: int) -> None:
    entry = f"deis_rhoab_o{order}__poly7__N6__afs0"
    grid = torch.from_numpy(BASELINES[f"{entry}/t"])
    assert_reproduces(ipndm_v(PROCESS, grid, order=order), BASELINES[f"{entry}/final"])


@pytest.mark.parametrize("field", ["a", "b", "times"])
def test_the_comparison_can_fail(field: str) -> None:
    entry = "unipc_bh2_o3_x0_lof1__poly7__N6__afs0"
    table = unipc(PROCESS, torch.from_numpy(BASELINES[f"{entry}/t"]), order=3)
    assert_reproduces(table, BASELINES[f"{entry}/final"])
    value = getattr(table, field).clone()
    value[3] *= 1 + 1e-8
    with pytest.raises(AssertionError, match="off by"):
        assert_reproduces(dataclasses.replace(table, **{field: value}), BASELINES[f"{entry}/final"])


# -- decoupled network times -----------------------------------------------------------------

CASES = sorted({name.rsplit("/", 1)[0] for name in LD3})


def ld3_table(case: str, grid: torch.Tensor, asked: torch.Tensor) -> SolverTable:
    kwargs: dict[str, Any] = {"network_times": asked}
    if case.startswith("euler"):
        return ddim(PROCESS, grid, prediction="noise", **kwargs)
    match = re.search(r"-o(\d)-", case)
    assert match
    kwargs["order"] = int(match[1])
    if case.startswith("uni_pc"):
        return unipc(PROCESS, grid, variant="bh1" if "bh1" in case else "bh2", **kwargs)
    return {"dpm": dpm_solver_pp, "ipn": ipndm}[case[:3]](PROCESS, grid, **kwargs)


@pytest.mark.parametrize("case", CASES)
def test_decoupled_times(case: str) -> None:
    grid, asked = (torch.from_numpy(LD3[f"{case}/{name}"]) for name in ("t", "tc"))
    table = ld3_table(case, grid, asked)
    assert torch.equal(table.times, asked[:-1])
    assert_reproduces(table, LD3[f"{case}/x_final"])


@pytest.mark.parametrize("case", [case for case in CASES if f"{case}/grad_t" in LD3])
def test_gradients_with_decoupled_times(case: str) -> None:
    grid, asked = (torch.from_numpy(LD3[f"{case}/{n}"]).requires_grad_() for n in ("t", "tc"))
    final = run_table(ld3_table(case, grid, asked), GaussianMixture(PROCESS), NOISE)
    got = torch.autograd.grad((final * COTANGENT).sum(), (grid, asked))
    for value, name in zip(got, ("grad_t", "grad_tc"), strict=True):
        expected = torch.from_numpy(LD3[f"{case}/{name}"])
        error = ((value - expected).abs().max() / expected.abs().max()).item()
        assert error < 1e-10, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("uni_pc")])
def test_unipc_gradient_against_differences(case: str) -> None:
    """The reference drops the path through the linear system; central differences do not."""
    grid, asked = (torch.from_numpy(LD3[f"{case}/{name}"]) for name in ("t", "tc"))

    def loss(log_times: torch.Tensor) -> torch.Tensor:
        times = torch.cat([grid[:1], log_times.exp(), grid[-1:]])
        final = run_table(ld3_table(case, times, asked), GaussianMixture(PROCESS), NOISE)
        return (final * COTANGENT).sum()

    inner = grid[1:-1].log().requires_grad_()
    (grad,) = torch.autograd.grad(loss(inner), inner)
    step = 1e-5 * torch.eye(len(inner), dtype=torch.float64)
    centre = inner.detach()
    numeric = torch.stack([(loss(centre + e) - loss(centre - e)) / 2e-5 for e in step])
    torch.testing.assert_close(grad, numeric, rtol=1e-6, atol=1e-6 * float(numeric.abs().max()))
