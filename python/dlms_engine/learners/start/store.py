"""A start kept in a file: JSON, used again by a model that answers as the one it was made on."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch

from ...support.files import write_text, written
from ...support.transfer import host_numbers
from ...support.values import json_value
from ..training.identity import conditions_digest
from .contest import Candidate, handcrafted_candidates
from .exact import Proof
from .problem import SamplingProblem
from .search import MeasuredCandidate, Start

_log = logging.getLogger("dlms_engine")
_FORMAT = "dlms_engine.start/4"
TOLERANCE = 1e-3
"""Largest relative difference of a model's answers on two machines."""


def keep_start(path: Path | None, problem: SamplingProblem, start: Start, afs: bool = True) -> None:
    """Writes ``start`` to ``path``, if there is one; a disk without room is a warning."""
    if path is None:
        return
    described = {"format": _FORMAT, **_key(problem, start.nfe, afs), **start.record()}
    described["answers"] = answers(problem)
    text = json.dumps(json_value(described), indent=1)
    written(lambda: write_text(path, text), "the start is not kept")


def kept_start(
    path: Path | None, problem: SamplingProblem, nfe: int, afs: bool = True
) -> Start | None:
    """The start in ``path``; None if it is not there, not readable or of another model."""
    if path is None or not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        key = _key(problem, nfe, afs)
        if found["format"] != _FORMAT or any(found[k] != v for k, v in key.items()):
            return None
        if not _same(found["answers"], answers(problem)):
            _log.info("%s is of another model: measured anew", path)
            return None
        return _start(found, problem)
    except (OSError, KeyError, TypeError, ValueError) as error:
        _log.warning("%s cannot be read (%s): measured anew", path, error)
        return None


def _start(found: dict[str, Any], problem: SamplingProblem) -> Start:
    labels = {c.label: c for c in handcrafted_candidates(problem.process, found["nfe"])}
    ranking = []
    for row in found["ranking"]:
        candidate: Candidate = labels[row["solver"]]
        rmse, error = (math.inf if row[k] is None else row[k] for k in ("rmse", "standard_error"))
        ranking.append(MeasuredCandidate(candidate, rmse, error, row["samples"]))
    proof = {k: v for k, v in found["exact"].items() if k != "holds"}
    return Start(found["nfe"], tuple(ranking), Proof(**proof), found["calls"], found["seconds"])


def _key(problem: SamplingProblem, nfe: int, afs: bool) -> dict[str, Any]:
    guidance = problem.denoiser.guidance_scale
    return {
        "nfe": nfe,
        "afs": afs,
        "process": problem.process.config(),
        "shape": list(problem.shape),
        "guidance": guidance,
        "conditions": conditions_digest(problem.conditions),
    }


@torch.no_grad()
def answers(problem: SamplingProblem) -> list[list[float]]:
    """Means and mean squares of the data prediction at three noise levels: cheap, and another network
    or convention gives others. Conditions of later samples than the two show in the key alone.
    """
    numbers = range(2)
    process = problem.process
    answers = []
    for share in (0.1, 0.5, 0.9):
        t = process.t_min + share * (process.t_max - process.t_min)
        alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
        x = problem.noise(numbers) * (sigma / float(process.sigma(process.t_max)))
        x = x + 0.5 * alpha
        times = torch.full((2,), t, dtype=torch.float64, device=x.device)
        out = problem.predict(x, times, numbers).double()
        answers.append(host_numbers([out.mean(), out.square().mean()]))
    return answers


def _same(one: list[list[float]], two: list[list[float]]) -> bool:
    left, right = torch.tensor(one, device="cpu"), torch.tensor(two, device="cpu")
    if left.shape != right.shape:
        return False
    scale = right[:, 1:].sqrt()
    means = (left[:, :1] - right[:, :1]).abs() <= TOLERANCE * scale
    squares = (left[:, 1:] - right[:, 1:]).abs() <= TOLERANCE * right[:, 1:]
    return bool(means.all() and squares.all())
