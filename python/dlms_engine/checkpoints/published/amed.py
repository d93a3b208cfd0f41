"""AMED predictors (Zhou et al. 2024, arXiv:2312.00094) as the policy that runs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...policies.amed import AmedPolicy
from ...policies.amed_formulas import AmedBase
from ...policies.amed_predictor import AmedPredictor
from ...policies.coordinates import EdmCoordinates
from ...policies.distilled import DistilledSolver
from ...processes import EDM, Process, edm_coordinates
from ..restricted import Record, state_dict
from .contents import Predictor, no_more
from .levels import schedule

_SOLVERS: dict[str, Any] = {
    "amed": "amed",
    "euler": "ddim",
    "dpm": "dpm_solver_2",
    "ipndm": "ipndm",
    "dpmpp": "dpm_solver_pp",
}


def is_amed(held: Any) -> bool:
    """A snapshot of the predictor."""
    module = held.get("model") if isinstance(held, dict) else None
    return isinstance(module, Record) and module.kind == "AMED_predictor"


def from_amed(held: Any, process: Process | None, options: dict[str, Any]) -> DistilledSolver:
    """The policy with the predictor's weights, which reads the bottleneck of the denoiser.

    Raises:
        ValueError: a form that the policy does not run.
    """
    no_more(options)
    found = Predictor(held["model"], held.get("loss_fn"))
    process = found.process(process)
    base = _base(found)
    predictor = _predictor(found)
    kind = found.get("schedule_type", str)
    times = schedule(process, kind, found.get("schedule_rho", float, 7.0), found.points)
    settings = {"method": "amed", **found.notes()}
    if base.solver == "dpm_solver_pp" and base.prediction == "data":
        settings["dynamic_thresholding"] = 0.995  # of the denoiser, which the policy does not set
    if isinstance(process, EDM) or not predictor.scale_time:
        return DistilledSolver(AmedPolicy(predictor, base, process, times), "amed", settings)
    levels = process.sigma_over_alpha(times)
    inner = AmedPolicy(predictor, base, edm_coordinates(process), levels)
    return DistilledSolver(EdmCoordinates(inner, process), "amed", settings)


def _base(found: Predictor) -> AmedBase:
    student = found.get("sampler_stu", str)
    if student not in _SOLVERS:
        raise ValueError(f"its student is {student!r}, expected one of {sorted(_SOLVERS)}")
    afs = found.get("afs", bool)
    if student == "ipndm":
        return AmedBase("ipndm", found.get("max_order", int, 4), afs=afs)
    if student == "dpmpp":
        prediction: Any = "data" if found.get("predict_x0", bool, True) else "noise"
        lower = found.get("lower_order_final", bool, True)
        return AmedBase("dpm_solver_pp", found.get("max_order", int, 3), prediction, lower, afs)
    return AmedBase(_SOLVERS[student], afs=afs)


def _predictor(found: Predictor) -> AmedPredictor:
    tensors = state_dict(found.module)
    first = tensors.get("enc_layer0.weight")
    if not isinstance(first, Tensor) or first.ndim != 2 or not first.is_floating_point():
        raise ValueError("its enc_layer0.weight is no matrix")
    bounds = (found.get(name, float, 0.0) for name in ("scale_dir", "scale_time"))
    predictor = AmedPredictor(first.shape[1], *bounds)
    predictor.to(torch.float64 if first.dtype == torch.float64 else torch.float32)
    try:
        predictor.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"its tensors do not fit the predictor: {error}") from error
    if not all(bool(v.isfinite().all()) for v in predictor.state_dict().values()):
        raise ValueError("its tensors hold numbers that are not finite")
    return predictor
