"""The loop every gradient learner shares: optimiser, EMA sets, validation, checkpoints, resume."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...support.optimiser import optimiser_step
from ...support.parallel import World
from ...support.progress import inner_progress
from ...support.transfer import host_numbers
from ...support.values import require_finite
from .checkpoint import read_checkpoint, save_checkpoint, try_to_save
from .ema import EmaSets
from .learner import Learner, Numbers
from .monitor import Monitor, Silent
from .noise import tell_first_sample, unit_noise
from .settings import TrainerSettings

__all__ = ["Learner", "Progress", "Trainer", "TrainerSettings"]

_log = logging.getLogger("dlms_engine")


@dataclass
class Progress:
    """What a checkpoint holds beside tensors."""

    update: int = 0
    best_score: float = math.inf
    best_set: str = "init"
    history: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0


class Trainer:
    """Trains ``learner.module``; the best of raw and averaged sets by validation is kept.

    Noise is a pure function of (seed, update, index), so a run that was killed and resumed is
    bit-identical to one that was not, wherever the kill fell.
    """

    def __init__(
        self,
        learner: Learner,
        settings: TrainerSettings,
        shape: tuple[int, ...],
        *,
        checkpoint: Path | None = None,
        fingerprint: dict[str, Any] | None = None,
        world: World | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        self.learner = learner
        self.settings = settings
        self.shape = shape
        self.world = world or World()
        if settings.batch < self.world.size:
            raise ValueError(
                f"batch is {settings.batch}, but {self.world.size} processes share it: set batch to "
                "at least one trajectory a process"
            )
        self.state = Progress()
        self._monitor = monitor or Silent()
        self._path = checkpoint
        self._fingerprint = fingerprint or {}
        groups = learner.parameter_groups(settings.lr)
        self._rates = [float(g["lr"]) for g in groups]
        self.optimiser = torch.optim.Adam(groups, betas=(0.9, 0.999), eps=1e-8)
        self._ema = EmaSets(learner.module, settings.ema_kimg)
        self._best = self._copy()
        self._before = (0, self._tensors())  # as the current update began

    def run(self, *, resume: bool = False, progress: bool = True) -> Progress:
        """Trains to the end and loads the best parameters into the module.

        Raises:
            KeyboardInterrupt: after a checkpoint was written, when one is configured.
            FloatingPointError: the start or too many gradients are not finite; a checkpoint holds the
                best so far.
        """
        if resume:
            self._resume()
        if not self.state.history:
            # the exact solution of the validation may take longer than all updates
            with inner_progress(progress and self.world.rank == 0):
                self._validate()
        total = self.settings.updates
        saved = time.monotonic()
        bar = tqdm(
            total=total,
            initial=self.state.update,
            desc="distilling",
            unit="update",
            disable=not (progress and self.world.rank == 0),
        )
        try:
            while self.state.update < total:
                logged = self._update()
                bar.set_postfix({k: f"{v:.4g}" for k, v in list(logged.items())[:3]})
                bar.update()
                if time.monotonic() - saved > self.settings.checkpoint_seconds:
                    try_to_save(self._save, self.state.update)
                    saved = time.monotonic()
        except FloatingPointError:
            try_to_save(self._save, self.state.update)
            raise
        except (KeyboardInterrupt, RuntimeError) as stop:
            if isinstance(stop, RuntimeError) and self.world.size == 1:
                raise
            self._rewind()  # with several ranks an error usually means that another rank died
            saved_now = try_to_save(self._save, self.state.update)
            if saved_now and self._path is not None and self.world.rank == 0:
                _log.warning("interrupted: %s is saved, resume continues it", self._path)
            raise
        finally:
            bar.close()
        try_to_save(self._save, self.state.update)
        self._restore(self._best)
        return self.state

    # -- one update -----------------------------------------------------------------------------

    def _update(self) -> dict[str, float]:
        self._before = (self.state.update, self._tensors())
        for group, rate in zip(self.optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._rate(self.state.update)
        self.learner.progress = self.state.update / self.settings.updates
        noise = self._noise()
        logged: dict[str, float] = {}
        self.optimiser.zero_grad(set_to_none=True)
        for numbers in self.learner.iteration(noise):
            logged = self._step(numbers)
            self.optimiser.zero_grad(set_to_none=True)
        logged = self._mean(logged)
        self._ema.update(self.learner.module, self.settings.batch)
        self.state.update += 1
        every = self.settings.validate_every
        entry: dict[str, Any] = {"update": self.state.update, **logged}
        if self.state.update == self.settings.updates or (every and self.state.update % every == 0):
            entry.update(self._validate())
        self._log(entry)
        return logged

    def _log(self, entry: dict[str, Any]) -> None:
        self.state.history.append(entry)
        self._monitor.log(self.state.update, {**entry, "lr": self.optimiser.param_groups[0]["lr"]})

    def _mean(self, numbers: dict[str, float]) -> dict[str, float]:
        """Numbers of the whole batch from those of every rank's share."""
        if self.world.size == 1:
            return numbers
        start, stop = self.world.slice(self.settings.batch)
        own = torch.tensor(list(numbers.values()), dtype=torch.float64, device="cpu")
        whole = self.world.sum_(own * (stop - start) / self.settings.batch)
        return dict(zip(numbers, whole.tolist(), strict=True))

    def _step(self, numbers: Numbers) -> dict[str, float]:
        """One step of the optimiser; ``numbers`` and the norm are read together, once."""
        start, stop = self.world.slice(self.settings.batch)
        parameters = [p for p in self.learner.module.parameters() if p.grad is not None]
        for parameter in parameters:
            assert parameter.grad is not None
            share = (stop - start) / self.settings.batch
            self.world.sum_(parameter.grad.mul_(share))
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        size, *values = host_numbers([norm, *numbers.values()])
        logged = dict(zip(numbers, values, strict=True))
        if not math.isfinite(size):
            self.state.skipped += 1
            _log.warning("update %d: gradient is not finite, skipped", self.state.update)
            if self.state.skipped > 20 + self.settings.updates // 10:
                raise FloatingPointError(
                    f"{self.state.skipped} updates had gradients that are not finite: lower lr "
                    f"(now {self.settings.lr}) or the time range"
                )
            return logged
        optimiser_step(self.optimiser)
        return logged

    def _rate(self, update: int) -> float:
        rate = 1.0
        if self.settings.warmup and update < self.settings.warmup:
            rate = (update + 1) / self.settings.warmup
        if self.settings.decay == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * update / self.settings.updates))
        return rate

    def _noise(self) -> Tensor:
        """Unit noise of this update: the part of its batch that belongs to this rank."""
        batch = self.settings.batch
        start, stop = self.world.slice(batch)
        first = self.state.update * batch
        tell_first_sample(self.learner.denoiser, first + start)
        indices = range(first + start, first + stop)
        return unit_noise(self.settings.seed, indices, self.shape, self.learner.denoiser.device)

    # -- validation and parameter sets -----------------------------------------------------------

    def _copy(self) -> dict[str, Tensor]:
        return {k: v.detach().clone() for k, v in self.learner.module.named_parameters()}

    def _restore(self, parameters: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.learner.module.named_parameters():
                parameter.copy_(parameters[name])

    def _validate(self) -> dict[str, Any]:
        raw = self._copy()
        candidates = {"raw": raw}
        if self.state.update:
            candidates |= self._ema.sets()
        found: dict[str, Any] = {}
        for name, parameters in candidates.items():
            self._restore(parameters)
            numbers = self.learner.validate()
            found[f"validation/{name}"] = numbers["score"]
            if name == "raw":
                found |= {k: v for k, v in numbers.items() if k != "score"}
                found["describe"] = self.learner.describe()
            if numbers["score"] < self.state.best_score:
                self.state.best_score = numbers["score"]
                self.state.best_set = f"{name}@{self.state.update}"
                self._best = {k: v.clone() for k, v in parameters.items()}
        if not self.state.update:
            require_finite(found["validation/raw"], "the score of the solver to start from")
        elif not math.isfinite(found["validation/raw"]):  # too large a step, or the network itself
            self._restore(self._best)
            again = self.learner.validate()["score"]
            require_finite(again, f"after update {self.state.update} the score of the best so far")
        self._restore(raw)
        if not self.state.update:
            self._log({"update": 0, **found})
        return found

    # -- checkpoints ------------------------------------------------------------------------------

    def _save(self) -> None:
        if self._path is None or self.world.rank != 0:
            return
        tensors = self._tensors() | {f"best/{k}": v for k, v in self._best.items()}
        save_checkpoint(self._path, tensors, self.state, self._fingerprint)

    def _tensors(self) -> dict[str, Tensor]:
        """Copies of all that an update changes."""
        tensors = {f"raw/{k}": v for k, v in self._copy().items()}
        tensors |= {f"ema/{k}": v.clone() for k, v in self._ema.tensors().items()}
        for name, parameter in self.learner.module.named_parameters():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"adam/{name}/{key}"] = torch.as_tensor(value).clone()
        return tensors

    def _load(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of ``_tensors``."""
        self._restore(_part(tensors, "raw/"))
        self._ema.load(_part(tensors, "ema/"))
        for name, parameter in self.learner.module.named_parameters():
            held = _part(tensors, f"adam/{name}/")
            if held:
                step = held.pop("step")  # Adam counts on the host
                moved = {key: value.to(parameter.device) for key, value in held.items()}
                self.optimiser.state[parameter] = {"step": step, **moved}
            else:
                self.optimiser.state.pop(parameter, None)

    def _rewind(self) -> None:
        """Back to where the current update began: cut short, it is done again after resuming."""
        self.state.update, tensors = self._before
        self.state.history = [e for e in self.state.history if e["update"] <= self.state.update]
        self._load(tensors)

    def _resume(self) -> None:
        found = self._path is not None and self._path.exists()
        self.world.check_equal(int(found), "whether there is a checkpoint to resume")
        if self._path is None or not found:
            return
        tensors, state = read_checkpoint(self._path, self._fingerprint)
        self.state = Progress(**state)
        device = next(self.learner.module.parameters()).device
        self._best = {k: v.to(device) for k, v in _part(tensors, "best/").items()}
        self._load(tensors)
        self._before = (self.state.update, self._tensors())


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
