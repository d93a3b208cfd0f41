"""Every preset is what its method accepts, and says what the paper says."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from analytic import GaussianMixture

from dlms_engine.learners import LEARNERS, distill
from dlms_engine.learners.ld3.loop import Ld3Loop
from dlms_engine.learners.ld3.objective import Ld3
from dlms_engine.learners.ld3.settings import Ld3Settings
from dlms_engine.learners.presets import PRESETS
from dlms_engine.learners.registry import preset, resolved
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.processes import EDM, VPDiscrete

COUNTED = ("method", "trajectories")


def chosen(name: str, nfe: int) -> dict[str, object]:
    held = preset(name)
    own = {key: value for key, value in held.items() if key not in COUNTED}
    return resolved(held["method"], nfe, own, trajectories=held.get("trajectories"))


def possible(name: str) -> list[int]:
    """Evaluations a preset can be asked for: all, or even ones for two evaluations a step."""
    found = []
    for nfe in range(3, 11):
        try:
            chosen(name, nfe)
        except ValueError as refusal:
            assert "evaluations a step" in str(refusal), (name, refusal)
            continue
        found.append(nfe)
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_accepted_by_its_method(name: str) -> None:
    assert len(possible(name)) >= 4
    full = chosen(name, 6)
    for key, value in preset(name).items():
        place = full if key in COUNTED else full["settings"]
        if key.startswith("teacher_") and key not in place:
            place, key = place["teacher"], key.removeprefix("teacher_")
        assert json.loads(json.dumps(place[key])) == json.loads(json.dumps(value)), key
    # planted: a setting it does not have, and one of a wrong type
    with pytest.raises(ValueError, match="unknown setting 'colour'"):
        resolved(full["method"], 6, {**full["settings"], "colour": 1})
    number = "lr" if "lr" in full["settings"] else "batch"
    with pytest.raises(ValueError, match=f"{number} is 'fast', expected a"):
        resolved(full["method"], 6, {**full["settings"], number: "fast"})


def test_every_paper_has_presets() -> None:
    assert {held["method"] for held in PRESETS.values()} == set(LEARNERS) - {"auto"}


def test_rates_of_latent_models_follow_the_number_of_steps() -> None:
    """Appendix B.1.2: l_xi^c = 0.001 / NFE, l_x' = 12 / NFE."""
    settings = {k: v for k, v in preset("ld3-lsun-bedroom256").items() if k not in COUNTED}
    denoiser = Denoiser(GaussianMixture(EDM()), EDM(), "data")
    for nfe in (4, 8):
        own = Ld3Settings(nfe=nfe, **{**settings, "train": 2, "validation": 2, "loss": "l2"})
        state = Ld3Loop(Ld3(denoiser, own), (16,)).state
        assert (state.lr_times, state.lr_noise) == (0.001 / nfe, 12 / nfe)


@pytest.mark.parametrize("name", ["ld3-cifar10", "ld3-stable-diffusion", "dode-cifar10",
                                  "dode-lsun-bedroom256", "dode-edm-ffhq64"])  # fmt: skip
def test_preset_runs(name: str) -> None:
    discrete = VPDiscrete(betas=torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    process = EDM() if name in ("ld3-cifar10", "dode-edm-ffhq64") else discrete
    denoiser = Denoiser(GaussianMixture(process), process, "data")
    small = {"trajectories": 2, "validation": 2, "rounds": 1, "rounds_times": 1, "loss": "l2"}
    changes = small if name.startswith("ld3") else {"trajectories": 4}
    solver = distill(denoiser, nfe=4, shape=(16,), progress=False, **preset(name, **changes))
    assert solver.nfe == 4 and bool(torch.isfinite(solver.policy.b).all())


_STARTS: dict[str, dict[str, Any]] = {
    "auto": {},
    "dlms": {"init": "ab", "grid": "polynomial"},
    "amed": {"solver": "ipndm"},
    "ld3": {"student": "unipc"},
    "dode": {"solver": "ddim", "grid": "polynomial"},
    "gits": {"solver": "ddim"},
    "free_table": {"base": "ipndm", "afs": False},
}


@pytest.mark.parametrize("method", LEARNERS)
def test_what_is_resolved_may_be_given_again(method: str) -> None:
    first = resolved(method, 6, {}, trajectories=12, seed=3)
    again = resolved(
        method, first["nfe"], json.loads(json.dumps(first["settings"])),
        trajectories=first["trajectories"], seed=first["seed"],
    )  # fmt: skip
    assert again == first and first["trajectories"] == 12
    kinds = LEARNERS[method].kinds
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    counted = LEARNERS[method].trajectories
    begin = LEARNERS[method].begin
    measured = set() if begin is None else set(begin.settings)
    assert set(first["settings"]) == names - {"nfe", "seed", counted} - measured
    for name in measured & set(_STARTS[method]):
        given = resolved(method, 6, {name: _STARTS[method][name]}, trajectories=12)
        assert set(given["settings"]) == names - {"nfe", "seed", counted}, name
