"""LD3 on the Gaussian mixture: the problem, settings of a second, its loop."""

from __future__ import annotations

from typing import Any

from analytic import GaussianMixture

from dlms_engine.learners.ld3.loop import Ld3Loop
from dlms_engine.learners.ld3.objective import Ld3
from dlms_engine.learners.ld3.settings import Ld3Settings
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.processes import EDM


def mixture(process: Any = None) -> tuple[GaussianMixture, Denoiser]:
    """The analytic problem behind the interface of a network."""
    process = process or EDM()
    network = GaussianMixture(process)
    return network, Denoiser(network, process, "data")


def tiny(**changes: Any) -> dict[str, Any]:
    """Settings of a run of a second."""
    return {
        "train": 6, "validation": 4, "batch": 2, "rounds": 1, "rounds_times": 2, "loss": "l2",
        "teacher_nfe": 12, "radius": 0.05, **changes,
    }  # fmt: skip


def float_problem() -> Denoiser:
    return mixture()[1]


def make_loop(**changes: Any) -> Ld3Loop:
    settings = Ld3Settings(nfe=4, **tiny(**changes))
    return Ld3Loop(Ld3(float_problem(), settings), (16,), seed=1)
