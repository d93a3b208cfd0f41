"""The training loop of LD3: rounds, soft forcing, patience, checkpoints.

Not the shared ``Trainer``: start noises are trained too, validation follows every step, and the
best state is reloaded on the way (Tong et al. 2024, Algorithm 1 and Appendix B.1).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..parallel import World
from .checkpoint import load_checkpoint, save_checkpoint
from .ld3 import TYPICAL_LOSS, Ld3, project
from .trainer import unit_noise

log = logging.getLogger("dlms_engine")


@dataclass
class Ld3State:
    """Everything of a run that is not a tensor."""

    round: int = 0
    position: int = 0  # mini-batch within the round, training set first
    updates: int = 0
    failures: int = 0  # validations in a row that did not improve
    whole: bool = False  # validate on the whole set, no longer on its first batch
    best_score: float = math.inf
    best_update: int = 0
    lr: float = 0.0
    lr_times: float = 0.0
    lr_noise: float = 0.0
    at_floor: int = 0
    moved: bool = False  # did a validation noise move in this round
    skipped: int = 0
    loss_scale: float = 1.0
    init: str = ""
    finished: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


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
    ) -> None:
        self.learner = learner
        self.settings = s = learner.settings
        self.world = world or World()
        self.state = Ld3State(
            lr=s.lr,
            lr_times=0.1 / s.steps if s.lr_times is None else s.lr_times,
            lr_noise=12 / s.steps if s.lr_noise is None else s.lr_noise,
        )
        self.radius = s.ball(math.prod(shape))
        self._path = checkpoint
        self._fingerprint = fingerprint or {}
        noise = unit_noise(seed, range(s.train + s.validation), shape)
        self._centres = {"train": noise[: s.train], "valid": noise[s.train :]}
        self._noise = {k: v.clone() for k, v in self._centres.items()}
        self._targets: dict[str, Tensor] = {}
        self._optimiser = torch.optim.RMSprop(
            [learner.module.logits], lr=s.lr, momentum=s.momentum, weight_decay=0.0
        )
        self._best = self._copy()
        self._before: Any = None

    # -- the run ----------------------------------------------------------------------------------

    def run(self, *, resume: bool = False, progress: bool = True) -> Ld3State:
        """Trains to the end and loads the best grid.

        Raises:
            KeyboardInterrupt: after a checkpoint was written, when one is configured.
        """
        self._prepare(progress)
        if resume and self._path is not None and self._path.exists():
            self._resume()
        elif not self.state.history:
            self._begin()
        batches = self._count("train") + (self._count("valid") if self.radius > 0 else 0)
        bar = tqdm(
            total=batches * self.settings.total_rounds,
            initial=self.state.round * batches + self.state.position,
            desc="learning times",
            unit="batch",
            disable=not (progress and self.world.rank == 0),
        )
        try:
            self._loop(batches, bar)
        except KeyboardInterrupt:
            self._rewind()
            self._save()
            if self._path is not None:
                log.warning("interrupted: %s is saved, resume continues it", self._path)
            raise
        finally:
            bar.close()
        self._save()
        self._restore(self._best)
        return self.state

    def _loop(self, batches: int, bar: Any) -> None:
        saved = time.monotonic()
        while not self.state.finished:
            self._remember()
            if self.state.position == 0:
                self._open_round()
            self._batch()
            self.state.position += 1
            if self.state.position == batches:
                self._close_round()
            bar.set_postfix(loss=f"{self.state.best_score:.4g}", round=self.state.round)
            bar.update()
            # several ranks meet in a checkpoint, so it cannot depend on one rank's clock
            due = self.world.size > 1 and self.state.position == 0
            if due or (
                self.world.size == 1
                and time.monotonic() - saved > self.settings.checkpoint_seconds
            ):
                self._save()
                saved = time.monotonic()

    def _prepare(self, progress: bool) -> None:
        total = sum(self._count(part) for part in self._centres)
        bar = tqdm(
            total=total, desc="teacher", unit="batch", leave=False,
            disable=not (progress and self.world.rank == 0),
        )
        for part, centres in self._centres.items():
            target = torch.zeros_like(centres)
            for k in range(self._count(part)):
                own = self._own(part, k)
                if own.stop > own.start:
                    target[own] = self.learner.targets(centres[own])
                bar.update()
            self._targets[part] = target
        bar.close()

    def _begin(self) -> None:
        """Initial grid, loss scale and score, before the first update."""
        s, state = self.settings, self.state
        state.init = str(s.init) if isinstance(s.init, str) else "given"
        if s.init == "best" and self.world.size > 1:
            raise ValueError("init='best' runs in one process: name the grid it chose there")
        if s.init == "best":
            state.init = self.learner.choose_start(self._noise["valid"], self._targets["valid"])
        self._best = self._copy()
        first = self._validate(whole=True)
        if s.loss_scale is not None:
            state.loss_scale = s.loss_scale
        elif self.learner.kind != "lpips" and first > 0:
            state.loss_scale = TYPICAL_LOSS / first
        state.history.append({"update": 0, "validation": first, **self.describe()})

    def describe(self) -> dict[str, Any]:
        """The present times, JSON-able."""
        with torch.no_grad():
            times = self.learner.module()
        return {"grid": times.grid.tolist(), "network_times": times.network.tolist()}

    # -- rounds -------------------------------------------------------------------------------------

    @property
    def _with_times(self) -> bool:
        return self.settings.decouple and self.state.round >= self.settings.rounds

    def _open_round(self) -> None:
        state = self.state
        self._restore(self._best)
        # the validation noises have moved since: scores of two rounds do not compare
        state.best_score = self._validate()
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
        trained, position = self._count("train"), self.state.position
        return ("train", position) if position < trained else ("valid", position - trained)

    def _batch(self) -> None:
        part, k = self._place()
        if part == "train":
            self._train(k)
        else:
            self._move_validation(k)

    # -- one mini-batch -------------------------------------------------------------------------------

    def _train(self, k: int) -> None:
        state, module = self.state, self.learner.module
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        own = self._own("train", k)
        size = self._size("train", k)
        graded = None
        if own.stop > own.start:
            noise, target = self._noise["train"][own], self._targets["train"][own]
            graded = self.learner.grade(noise, target, state.loss_scale / size)
        if self._step():
            state.updates += 1
        score = self._validate()
        self._judge(score)
        state.history.append({"update": state.updates, "round": state.round, "validation": score})
        if graded is not None:
            self._move("train", own, graded.noise_grad, graded.losses)

    def _step(self) -> bool:
        """Clips and applies the gradients; False where they are not finite."""
        module = self.learner.module
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        for grad in grads:
            self.world.sum_(grad)
        if not all(bool(torch.isfinite(grad).all()) for grad in grads):
            self.state.skipped += 1
            log.warning("batch %d: gradient is not finite, skipped", self.state.position)
            return False
        torch.nn.utils.clip_grad_norm_([module.logits], self.settings.clip)
        self._optimiser.param_groups[0]["lr"] = self.state.lr
        self._optimiser.step()
        if self._with_times and module.offsets.numel():
            torch.nn.utils.clip_grad_norm_([module.offsets], self.settings.clip)
            assert module.offsets.grad is not None
            with torch.no_grad():
                module.offsets -= self.state.lr_times * module.offsets.grad
        return True

    def _move(self, part: str, own: slice, grad: Tensor, before: Tensor) -> Tensor:
        """Projected SGD on the noises; only those whose loss falls are kept. Which were: ``[B]``."""
        if self.radius == 0:
            return torch.zeros(len(before), dtype=torch.bool)
        noise = self._noise[part][own]
        proposed = project(noise - self.state.lr_noise * grad, self._centres[part][own], self.radius)
        after = self.learner.measure(proposed, self._targets[part][own])
        better = after < before
        keep = better.reshape(-1, *[1] * (noise.ndim - 1)).to(noise.device)
        self._noise[part][own] = torch.where(keep, proposed, noise)
        return better

    def _move_validation(self, k: int) -> None:
        own, moved = self._own("valid", k), torch.zeros(1)
        if own.stop > own.start:
            noise, target = self._noise["valid"][own], self._targets["valid"][own]
            weight = self.state.loss_scale / self._size("valid", k)
            graded = self.learner.grade(noise, target, weight)
            moved += self._move("valid", own, graded.noise_grad, graded.losses).sum().cpu()
        self.state.moved |= float(self.world.sum_(moved)) > 0

    # -- validation and patience -------------------------------------------------------------------------

    def _validate(self, whole: bool | None = None) -> float:
        """Mean loss over the validation noises in use, over all ranks."""
        everything = self.state.whole if whole is None else whole
        total = torch.zeros(2, dtype=torch.float64)
        for k in range(self._count("valid") if everything else 1):
            own = self._own("valid", k)
            if own.stop > own.start:
                losses = self.learner.measure(self._noise["valid"][own], self._targets["valid"][own])
                total += torch.tensor([float(losses.double().sum()), len(losses)])
        self.world.sum_(total)
        return float(total[0] / total[1])

    def _judge(self, score: float) -> None:
        state, s = self.state, self.settings
        if score < state.best_score:
            state.best_score, state.best_update, state.failures = score, state.updates, 0
            self._best = self._copy()
            return
        state.failures += 1
        if state.failures < s.patience:
            return
        state.failures = 0
        self._restore(self._best)
        if not state.whole:  # the first time only the yardstick gets finer
            state.whole = True
            state.best_score = self._validate()
            return
        state.lr = max(s.lr_floor, state.lr * s.decay)
        if self._with_times:
            state.lr_times = max(s.lr_times_floor, state.lr_times * s.decay)
            state.at_floor += int(state.lr_times <= s.lr_times_floor)
            if state.at_floor >= s.stop_at_floor:
                state.finished = True

    # -- bookkeeping ----------------------------------------------------------------------------------------

    def _count(self, part: str) -> int:
        return math.ceil(len(self._centres[part]) / self.settings.batch)

    def _size(self, part: str, k: int) -> int:
        return min(self.settings.batch, len(self._centres[part]) - k * self.settings.batch)

    def _own(self, part: str, k: int) -> slice:
        """This rank's share of mini-batch ``k``: always the same samples."""
        start, stop = self.world.slice(self._size(part, k))
        first = k * self.settings.batch
        return slice(first + start, first + stop)

    def _copy(self) -> dict[str, Tensor]:
        return {k: v.detach().clone() for k, v in self.learner.module.named_parameters()}

    def _restore(self, parameters: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.learner.module.named_parameters():
                parameter.copy_(parameters[name])

    def _remember(self) -> None:
        """What an interruption within the coming mini-batch goes back to."""
        part, k = self._place()
        own = self._own(part, k)
        held = self._optimiser.state[self.learner.module.logits]
        self._before = (
            dataclasses.replace(self.state),
            len(self.state.history),
            self._copy(),
            self._best,
            {key: torch.as_tensor(value).clone() for key, value in held.items()},
            (part, own, self._noise[part][own].clone()),
        )

    def _rewind(self) -> None:
        if self._before is None:
            return
        state, length, parameters, best, held, (part, own, noise) = self._before
        self.state = state
        del state.history[length:]
        self._restore(parameters)
        self._best = best
        if held:
            self._optimiser.state[self.learner.module.logits] = held
        else:
            self._optimiser.state.clear()
        self._noise[part][own] = noise

    # -- checkpoints ------------------------------------------------------------------------------------------

    def _gathered(self, part: str) -> Tensor:
        """The noises, each from the rank that owns it."""
        if self.world.size == 1:
            return self._noise[part]
        own = torch.zeros_like(self._noise[part])
        for k in range(self._count(part)):
            own[self._own(part, k)] = self._noise[part][self._own(part, k)]
        return self.world.sum_(own)

    def _save(self) -> None:
        if self._path is None:
            return
        tensors = {f"noise/{part}": self._gathered(part) for part in self._noise}
        if self.world.rank != 0:
            return
        tensors |= {f"raw/{k}": v for k, v in self._copy().items()}
        tensors |= {f"best/{k}": v for k, v in self._best.items()}
        held = self._optimiser.state[self.learner.module.logits]
        tensors |= {f"rmsprop/{k}": torch.as_tensor(v) for k, v in held.items()}
        save_checkpoint(self._path, tensors, self.state, self._fingerprint)

    def _resume(self) -> None:
        assert self._path is not None
        tensors, state = load_checkpoint(self._path, self._fingerprint)
        self.state = Ld3State(**state)
        self._noise = {part: tensors[f"noise/{part}"] for part in self._noise}
        self._restore({k[4:]: v for k, v in tensors.items() if k.startswith("raw/")})
        self._best = {k[5:]: v for k, v in tensors.items() if k.startswith("best/")}
        held = {k[8:]: v for k, v in tensors.items() if k.startswith("rmsprop/")}
        if held:
            self._optimiser.state[self.learner.module.logits] = held
