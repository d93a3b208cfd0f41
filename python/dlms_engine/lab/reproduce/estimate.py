"""What a table will take: network calls counted on a stand-in, their time measured on the model."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...learners import distill
from ...learners.registry import learner
from ...learners.start.problem import SamplingProblem
from ...learners.training.settings import TrainerSettings
from ...models.denoiser import Denoiser
from ...processes import Process
from ..comparison.budget import Calls, counted
from .models import PaperModel
from .settings import ReproduceSettings
from .tables import TableRow

_PROBES = (4, 12)
"""Updates that are counted where there are more."""
_FEW = 8
"""Training noises that LD3 is counted on."""
_SHAPE = (1, 8, 8)
_GRADIENTS = 32  # samples in a call that gradients run back through


@dataclass(frozen=True)
class Pace:
    """Seconds a sample, on the machine and the model.

    Attributes:
        forward: of a network call in a batch of sampling.
        trained: of a pass forwards or backwards while gradients are kept.
        features: of the features of a finished sample.
    """

    forward: float
    trained: float
    features: float


@dataclass(frozen=True)
class Estimate:
    """What everything takes as if nothing were done.

    Attributes:
        sampling: network calls of samples and exact solutions.
        training: network calls of the distillations.
        features: samples whose features are taken.
        pace: of this machine.
        cells: (nfe, row's name) -> network calls.
    """

    sampling: int
    training: Calls
    features: int
    pace: Pace
    cells: Mapping[tuple[int, str], int]

    @property
    def calls(self) -> int:
        return self.sampling + self.training.total

    @property
    def seconds(self) -> float:
        kept = self.training.backward  # calls that keep their gradients
        plain = self.sampling + self.training.forward - kept
        pace = self.pace
        return plain * pace.forward + 2 * kept * pace.trained + self.features * pace.features

    def cell(self, nfe: int, row: TableRow) -> int:
        return self.cells.get((nfe, row.name), 0)

    def facts(self) -> dict[str, Any]:
        """JSON values."""
        training = {"forward": self.training.forward, "backward": self.training.backward}
        return {
            "seconds": self.seconds, "sampling": self.sampling, **training,
            "features": self.features, "pace": asdict(self.pace),
        }  # fmt: skip

    def line(self) -> str:
        minutes = self.seconds / 60
        time = f"{minutes:.1f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
        return (
            f"about {time} on this machine: {self.sampling:,} network calls to sample, "
            f"{self.training.total:,} to distil, features of {self.features:,} samples; "
            f"a call takes {self.pace.forward:.3g} s a sample, with gradients "
            f"{2 * self.pace.trained:.3g} s, features {self.pace.features:.3g} s"
        )


def estimated(
    cells: Sequence[tuple[int, TableRow]],
    arguments: Callable[[TableRow], Mapping[str, Any]],
    model: PaperModel,
    features: nn.Module,
    seeds: int,
    settings: ReproduceSettings,
    *,
    accurate: bool,
) -> Estimate:
    """The estimate for ``cells`` (nfe, row).

    Args:
        arguments: of ``distill``, for a learned row.
        seeds: distillations of a learned row.
        accurate: accurate samples are measured too, twice as many as ``settings.samples``.
    """
    trained: dict[str, dict[int, Calls]] = {}
    for row in {row.name: row for _, row in cells if row.preset}.values():
        nfes = [nfe for nfe, other in cells if other.name == row.name]
        trained[row.name] = training_calls(arguments(row), nfes, model.denoiser.process)
    sampling = min(settings.exact_samples, settings.samples) * settings.exact_nfe
    sampling += 2 * settings.samples * settings.accurate_nfe * accurate
    images, training, calls = 2 * settings.samples * accurate, Calls(), {}
    for nfe, row in cells:
        if not row.runs_here:
            continue
        runs = seeds if row.preset else 1
        one = trained[row.name][nfe] if row.preset else Calls()
        training.forward += runs * one.forward
        training.backward += runs * one.backward
        sampling += runs * nfe * settings.samples
        images += runs * settings.samples
        calls[nfe, row.name] = runs * (one.total + nfe * settings.samples)
    return Estimate(
        sampling, training, images, measured_pace(model, features, settings.batch), calls
    )


def measured_pace(model: PaperModel, features: nn.Module, batch: int) -> Pace:
    """Two network calls of each kind, after one to warm up."""
    problem = SamplingProblem(model.denoiser, model.shape, model.conditions)
    t = torch.tensor(problem.process.t_max, dtype=torch.float64)

    def call(count: int, gradients: bool) -> Tensor:
        x = problem.noise(range(count)).requires_grad_(gradients)
        found = problem.predict(x, t, range(count)).sum()
        if gradients:
            found.backward()
        return found.detach()

    few = min(batch, _GRADIENTS)
    with torch.no_grad():
        forward = _seconds(lambda: call(batch, False)) / batch
        images = torch.zeros(few, *model.shape, device=problem.device)
        seen = _seconds(lambda: features(images).sum()) / few
    with torch.enable_grad():
        trained = _seconds(lambda: call(few, True)) / few
    return Pace(forward, trained / 2, seen)


def _seconds(call: Callable[[], Tensor]) -> float:
    """Of the faster of two calls; reading the number waits for the device."""
    call().item()
    found = []
    for _ in range(2):
        started = time.perf_counter()
        call().item()
        found.append(time.perf_counter() - started)
    return min(found)


def training_calls(
    arguments: Mapping[str, Any], nfes: Sequence[int], process: Process
) -> dict[int, Calls]:
    """About how many network calls, one a sample, ``distill(**arguments)`` makes at every nfe.

    A few updates are counted on a network of one number at the middle nfe, and calls are taken to
    grow with the updates, with LD3's rounds and with nfe. A method that refuses makes none.
    """
    middle = sorted(nfes)[len(nfes) // 2]
    found = _counted(dict(arguments), middle, process)
    return {nfe: _times(found, nfe / middle) for nfe in nfes}


def _counted(settings: dict[str, Any], nfe: int, process: Process) -> Calls:
    method, trajectories = settings.pop("method"), settings.pop("trajectories", None)
    for name, plain in (("last_step", "pixels"), ("loss", "l2"), ("lpips_weights", None)):
        if name in settings:  # distances on networks that the stand-in has not
            settings[name] = plain
    entry = learner(method)
    batch = int(settings.get("batch", TrainerSettings(**entry.defaults).batch))
    updates = math.ceil((trajectories or 0) / batch)
    rounds = settings.get("rounds", 0) + settings.get("rounds_times", 0)

    def run(count: int | None, **changes: Any) -> Calls:
        denoiser = Denoiser(_Number(), process, "data", features="tap")
        with counted(denoiser.network) as calls, _silent():
            distill(
                denoiser, method, nfe=nfe, shape=_SHAPE, trajectories=count, progress=False,
                **{**settings, **changes},
            )  # fmt: skip
        return calls

    try:
        if rounds and trajectories:  # LD3: every mini-batch of every round is validated
            noises = min(trajectories, _FEW)
            few, more = (run(noises, rounds=count, rounds_times=0) for count in (1, 2))
            left = rounds * trajectories / noises - 1
        elif entry.trained and updates > _PROBES[1]:
            few, more = (run(batch * probe) for probe in _PROBES)
            left = (updates - _PROBES[0]) / (_PROBES[1] - _PROBES[0])
        else:
            return run(trajectories)
    except (ValueError, FloatingPointError):
        return Calls()
    rest = _times(Calls(more.forward - few.forward, more.backward - few.backward), left)
    return Calls(few.forward + rest.forward, few.backward + rest.backward)


@contextmanager
def _silent() -> Iterator[None]:
    """What learners say of the stand-in concerns nobody."""
    log = logging.getLogger("dlms_engine")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _times(calls: Calls, factor: float) -> Calls:
    return Calls(round(calls.forward * factor), round(calls.backward * factor))


class _Number(nn.Module):
    """A network of one number that answers like a data prediction; ``tap`` is its bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.tap = nn.Identity()
        self.number = nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def forward(self, x: Tensor, _time: Tensor) -> Tensor:
        found: Tensor = self.tap(x) * self.number / (1 + x.square())
        return found
