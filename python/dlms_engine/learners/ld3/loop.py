"""The training loop of LD3: rounds, soft forcing, patience, checkpoints.

Not the shared ``Trainer``: start noises are trained too, validation follows every step, and the
best state is reloaded on the way (Tong et al. 2024, Algorithm 1 and Appendix B.1).
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...support.optimiser import optimiser_step
from ...support.parallel import World
from ...support.transfer import host_numbers
from ...support.values import require_finite
from ..training.checkpoint import try_to_save
from ..training.monitor import Monitor, Silent
from ..training.noise import unit_noise
from .objective import TYPICAL_LOSS, Graded, Ld3
from .pairs import Pairs, project
from .state import Ld3State, Ld3Store

_log = logging.getLogger("dlms_engine")


class Ld3Loop:
    """Fits ``learner.module``; the state with the least validation loss is kept.

    Start noises are a function of (seed, index), mini-batches are taken in order, and a checkpoint
    holds the moved noises and RMSprop's state: a resumed run is bit-identical to one that never
    stopped. With several ranks every mini-batch is shared out and gradients are summed.
    """

    def __init__(
        self,
        learner: Ld3,
        shape: tuple[int, ...],
        *,
        seed: int = 0,
        checkpoint: Path | None = None,
        fingerprint: dict[str, Any] | None = None,
        world: World | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        self._monitor = monitor or Silent()
        self.learner = learner
        self.settings = s = learner.settings
        self.world = world or World()
        self.radius = s.ball(math.prod(shape))
        device = learner.denoiser.device
        noise = unit_noise(seed, range(s.train + s.validation), shape, device)
        self.pairs = {
            "train": Pairs(noise[: s.train], s.batch, self.world),
            "valid": Pairs(noise[s.train :], s.batch, self.world),
        }
        self._optimiser = torch.optim.RMSprop(
            [learner.module.logits], lr=s.lr, momentum=s.momentum, weight_decay=0.0
        )
        start = Ld3State(
            whole=s.whole,
            lr=s.lr,
            lr_times=s.lr_times_share / s.steps if s.lr_times is None else s.lr_times,
            lr_noise=12 / s.steps if s.lr_noise is None else s.lr_noise,
        )
        self._store = Ld3Store(
            learner.module,
            self._optimiser,
            self.pairs,
            start,
            self.world,
            checkpoint,
            fingerprint or {},
        )

    @property
    def state(self) -> Ld3State:
        """Counters, rates and history."""
        return self._store.state

    # -- the run -----------------------------------------------------------------------------------

    def run(self, *, resume: bool = False, progress: bool = True) -> Ld3State:
        """Trains to the end and loads the best grid.

        Raises:
            KeyboardInterrupt, FloatingPointError: after a checkpoint was written, when one is configured.
        """
        self._prepare(progress)
        if not (resume and self._store.resume()):
            self._begin()
        batches = self.pairs["train"].count
        batches += self.pairs["valid"].count if self.radius > 0 else 0
        bar = tqdm(
            total=batches * self.settings.total_rounds,
            initial=self.state.round * batches + self.state.position,
            desc="learning times",
            unit="batch",
            disable=not (progress and self.world.rank == 0),
        )
        try:
            self._loop(batches, bar)
        except FloatingPointError:
            try_to_save(self._store.save, self.state.updates)
            raise
        except KeyboardInterrupt:
            kept = True
            if (
                self.world.size == 1
            ):  # several ranks stop at several places: the last round's counts
                self._store.rewind()
                kept = try_to_save(self._store.save, self.state.updates)
            if kept and self._store.path is not None and self._store.path.exists():
                _log.warning("interrupted: %s is saved, resume continues it", self._store.path)
            raise
        finally:
            bar.close()
        try_to_save(self._store.save, self.state.updates)
        self._store.load(self._store.best)
        self._of_best()
        return self.state

    def _loop(self, batches: int, bar: Any) -> None:
        saved = time.monotonic()
        while not self.state.finished:
            part, k = self._place()
            self._store.remember(part, self.pairs[part].own(k))
            if self.state.position == 0:
                self._open_round()
            self._batch()
            self.state.position += 1
            if self.state.position == batches:
                self._close_round()
            bar.set_postfix(loss=f"{self.state.best_score:.4g}", round=self.state.round)
            bar.update()
            # several ranks meet in a checkpoint, so it cannot depend on one rank's clock
            late = time.monotonic() - saved > self.settings.checkpoint_seconds
            due = self.state.position == 0 if self.world.size > 1 else late
            if due:
                try_to_save(self._store.save, self.state.updates)
                saved = time.monotonic()

    def _prepare(self, progress: bool) -> None:
        bar = tqdm(
            total=sum(pairs.count for pairs in self.pairs.values()),
            desc="teacher",
            unit="batch",
            leave=False,
            disable=not (progress and self.world.rank == 0),
        )
        for pairs in self.pairs.values():
            pairs.solve(self.learner.targets, bar)
        bar.close()

    def _begin(self) -> None:
        """Initial grid, loss scale and score, before the first update."""
        s, state = self.settings, self.state
        state.init = str(s.init) if isinstance(s.init, str) else "given"
        if s.init == "best":
            state.init = self.learner.choose_start(self.pairs["valid"].measure)
        self._store.best = self._store.parameters()
        first = self._validate(whole=True)
        require_finite(first, "the loss of the solver to start from")
        if s.loss_scale is not None:
            state.loss_scale = s.loss_scale
        elif self.learner.kind != "lpips" and first > 0:
            state.loss_scale = TYPICAL_LOSS / first
        self._log({"update": 0, "validation": first, **self.describe()})

    def _log(self, entry: dict[str, Any]) -> None:
        state = self.state
        state.history.append(entry)
        rates = {"lr": state.lr, "lr_times": state.lr_times, "lr_noise": state.lr_noise}
        self._monitor.log(state.updates, {**self.describe(), **rates, **entry})

    def describe(self) -> dict[str, Any]:
        """The present times, JSON-able."""
        with torch.no_grad():
            times = self.learner.module()
        return {"grid": times.grid.tolist(), "network_times": times.network.tolist()}

    # -- rounds ------------------------------------------------------------------------------------

    @property
    def _with_times(self) -> bool:
        return self.settings.decouple and self.state.round >= self.settings.rounds

    def _open_round(self) -> None:
        state = self.state
        self._store.load(self._store.best)
        # the validation noises have moved since: scores of two rounds do not compare
        state.best_score = self._of_best()
        state.moved = False
        if state.round == self.settings.rounds:
            state.failures = 0

    def _close_round(self) -> None:
        state = self.state
        if self.radius > 0 and not state.moved:
            state.lr_noise *= 0.5
        state.round += 1
        state.position = 0
        if state.round >= self.settings.total_rounds:
            state.finished = True

    def _place(self) -> tuple[str, int]:
        """(part, mini-batch of it) that comes next."""
        trained, position = self.pairs["train"].count, self.state.position
        return ("train", position) if position < trained else ("valid", position - trained)

    def _batch(self) -> None:
        part, k = self._place()
        if part == "train":
            self._train(k)
        else:
            self._move_validation(k)

    # -- one mini-batch ---------------------------------------------------------------------------

    def _train(self, k: int) -> None:
        state = self.state
        for parameter in self.learner.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        graded = self._grade("train", k)
        if self._step():
            state.updates += 1
        score = self._validate()
        self._judge(score)
        self._log({"update": state.updates, "round": state.round, "validation": score})
        if graded is not None:
            self._move("train", k, graded)

    def _grade(self, part: str, k: int) -> Graded | None:
        pairs = self.pairs[part]
        own = pairs.own(k)
        if own.stop == own.start:
            return None
        weight = self.state.loss_scale / pairs.size(k)
        return self.learner.grade(pairs.noise[own], pairs.target[own], weight)

    def _step(self) -> bool:
        """Clips and applies the gradients; False where they are not finite."""
        module = self.learner.module
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        for grad in grads:
            self.world.sum_(grad)
        if not all(bool(torch.isfinite(grad).all()) for grad in grads):
            self.state.skipped += 1
            _log.warning("batch %d: gradient is not finite, skipped", self.state.position)
            return False
        torch.nn.utils.clip_grad_norm_([module.logits], self.settings.clip)
        self._optimiser.param_groups[0]["lr"] = self.state.lr
        optimiser_step(self._optimiser)
        if self._with_times and module.offsets.numel():
            torch.nn.utils.clip_grad_norm_([module.offsets], self.settings.clip)
            assert module.offsets.grad is not None
            with torch.no_grad():
                module.offsets.sub_(self.state.lr_times * module.offsets.grad)
        return True

    def _move(self, part: str, k: int, graded: Graded) -> Tensor:
        """Projected SGD on the noises; only where the loss falls is it kept. How many were?"""
        if self.radius == 0:
            return graded.losses.new_zeros(())
        pairs = self.pairs[part]
        own = pairs.own(k)
        noise = pairs.noise[own]
        proposed = noise - self.state.lr_noise * graded.noise_grad
        proposed = project(proposed, pairs.centres[own], self.radius)
        better = self.learner.measure(proposed, pairs.target[own]) < graded.losses
        keep = better.reshape(-1, *[1] * (noise.ndim - 1))
        pairs.noise[own] = torch.where(keep, proposed, noise)
        return better.sum().to(graded.losses.dtype)

    def _move_validation(self, k: int) -> None:
        graded = self._grade("valid", k)
        moved = self.pairs["valid"].noise.new_zeros(())
        if graded is not None:
            moved += self._move("valid", k, graded)
        self.state.moved |= host_numbers([self.world.sum_(moved)])[0] > 0

    # -- validation and patience -------------------------------------------------------------------

    def _validate(self, whole: bool | None = None) -> float:
        """Mean loss over the validation noises in use."""
        everything = self.state.whole if whole is None else whole
        return self.pairs["valid"].measure(self.learner.measure, None if everything else 1)

    def _of_best(self) -> float:
        """Of the best times, which are loaded."""
        return require_finite(self._validate(), f"after {self.state.updates} updates the loss")

    def _judge(self, score: float) -> None:
        state, s = self.state, self.settings
        if score < state.best_score:
            state.failures = 0
            self._store.keep_best(score)
            return
        state.failures += 1
        if state.failures < s.patience:
            return
        state.failures = 0
        self._store.load(self._store.best)
        if not state.whole:  # the first time only the yardstick gets finer
            state.whole = True
            state.best_score = self._of_best()
            return
        state.lr = max(s.lr_floor, state.lr * s.decay)
        if self._with_times:
            state.lr_times = max(s.lr_times_floor, state.lr_times * s.decay)
            state.at_floor += int(state.lr_times <= s.lr_times_floor)
            if state.at_floor >= s.stop_at_floor:
                state.finished = True
