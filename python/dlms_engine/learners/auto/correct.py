"""Trains the corrector on stored runs: no network evaluation an update.

What it reads, the last state and the outputs, and what it should give, the exact end, do not depend
on it. They are made once; then training is a small regression.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ...policies.corrector import Corrector, CorrectorSettings, layout_of
from ...solvers.table import SolverTable
from ...support.optimiser import optimiser_step
from ...support.transfer import host_numbers
from ..start import SamplingProblem
from .budget import Budget
from .feature_phase import train_on_features
from .runs import Runs, run_keeping
from .targets import Targets

WIDTHS = {"image": 32, "sequence": 32, "vector": 64}
LARGEST = 100_000
"""Most parameters: the file that holds them stays under 1 MiB."""


LEAST_SAMPLES = 64
MOST, MOST_VECTORS = 8192, 16384
"""Samples it is trained on; a vector tells less than an image."""
LARGEST_STORE = 1 << 27
"""Numbers that stored runs may hold (512 MiB)."""
EPOCHS, BATCH = 50, 32
LEAST_SHARE = 0.05
"""Of the budget, for training where the samples have taken what there was."""
CHECK_SHARE = 0.15
"""Of the samples, kept from the fit to choose the epoch."""


def settings_for(shape: tuple[int, ...], depth: int) -> CorrectorSettings | None:
    """A corrector for samples of ``shape``; None where it has no layout or would be too large."""
    layout = layout_of(shape)
    if layout is None:
        return None
    channels = shape[0] if layout in ("image", "vector") else shape[1]
    outputs = min(depth, 5)
    while outputs > 1 and channels * (1 + outputs) > 96:
        outputs -= 1
    settings = CorrectorSettings(layout, channels, outputs, WIDTHS[layout])
    taps = {"image": 9, "sequence": 3, "vector": 1}[layout]
    first, last = channels * (1 + outputs), channels
    count = taps * settings.width * (first + last + settings.width)
    return settings if count <= LARGEST else None


def initial_corrector(settings: CorrectorSettings, runs: Runs, target: Tensor) -> Corrector:
    """Zero, its inputs and output scaled by what ``runs`` show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        corrector = Corrector(settings)
    scale_to(corrector, runs.end, runs.outputs, *host_numbers([(target - runs.end).std()]))
    return corrector.to(runs.end.device)


def scale_to(corrector: Corrector, x: Tensor, outputs: list[Tensor], error: float) -> None:
    """Scales a corrector's inputs to unit deviation on these states and outputs, its own output to
    ``error``.
    """
    newest = outputs[: corrector.settings.outputs]
    inputs = [x, newest[0], *(a - b for a, b in itertools.pairwise(newest))]
    deviations = [max(value, 1e-12) for value in host_numbers([each.std() for each in inputs])]
    corrector.scales.copy_(torch.tensor(deviations, device="cpu"))
    corrector.gain.fill_(max(error, 1e-12))


def train_corrector(
    corrector: Corrector,
    runs: Runs,
    target: Tensor,
    *,
    epochs: int = EPOCHS,
    batch: int = BATCH,
    lr: float = 3e-3,
    share: float = CHECK_SHARE,
    elapsed: Callable[[], float] = lambda: 0.0,
) -> dict[str, float]:
    """Least squares on all but the last ``share`` of the samples, which choose the epoch.

    Args:
        elapsed: of the time there is, 0 to 1 and above, at which it ends; the rate falls with it
            where it is ahead of the updates.

    Returns:
        ``before`` and ``after``: RMSE on the samples that choose, and the ``epoch`` kept.
    """
    count = len(target)
    held = max(1, int(share * count))
    fit = count - held
    (gain,) = host_numbers([corrector.gain])
    inputs = corrector.inputs(runs.end, runs.outputs)
    wanted = (target - runs.end) / gain
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(corrector.parameters(), lr=lr, weight_decay=1e-3)
    averaged = {k: v.detach().clone() for k, v in corrector.named_parameters()}
    updates = epochs * math.ceil(fit / batch)
    best, kept, kept_epoch = math.inf, averaged, 0
    (before,) = host_numbers([wanted[fit:].square().mean()])
    done, gone = 0, 0.0
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(fit, generator=generator, device="cpu").split(batch):
            gone = max(done / updates, elapsed())
            if gone >= 1:
                break
            for group in optimiser.param_groups:
                group["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * min(1.0, gone)))
            rows = rows.to(inputs.device)
            error = corrector.residual(inputs[rows]) / gain - wanted[rows]
            optimiser.zero_grad(set_to_none=True)
            error.square().mean().backward()
            optimiser_step(optimiser)
            done += 1
            weight = min(0.98, done / (10 + done))
            with torch.no_grad():
                for key, value in corrector.named_parameters():
                    averaged[key].lerp_(value, 1 - weight)
        if epoch % 5 == 0 or epoch == epochs or gone >= 1:
            score = _score(corrector, averaged, inputs[fit:], wanted[fit:], gain)
            if score < best:
                best, kept_epoch = score, epoch
                kept = {k: v.clone() for k, v in averaged.items()}
        if gone >= 1:
            break
    _load(corrector, kept)
    scale = gain
    return {
        "before": scale * math.sqrt(before),
        "after": scale * math.sqrt(min(best, before)),
        "epoch": float(kept_epoch),
    }


@torch.no_grad()
def _score(
    corrector: Corrector, parameters: dict[str, Tensor], inputs: Tensor, wanted: Tensor, gain: float
) -> float:
    present = {k: v.detach().clone() for k, v in corrector.named_parameters()}
    _load(corrector, parameters)
    sums = [
        (corrector.residual(i) / gain - w).square().sum()
        for i, w in zip(inputs.split(256), wanted.split(256), strict=True)
    ]
    _load(corrector, present)
    return sum(host_numbers(sums)) / wanted.numel()


def _load(corrector: Corrector, parameters: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for key, value in corrector.named_parameters():
            value.copy_(parameters[key])


def fit_corrector(
    problem: SamplingProblem,
    table: SolverTable,
    targets: Targets,
    budget: Budget,
    share: float,
    *,
    features: bool = True,
    most: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Corrector, dict[str, float]] | None:
    """A corrector trained on as many runs of ``table`` as the budget allows; None if there is none.

    Args:
        share: of the budget that may be used when it is done.
        most: samples it may use.
        features: also train on the feature distance where the denoiser taps features.
    """
    settings = settings_for(problem.shape, table.depth)
    if settings is None:
        say(f"no corrector for samples of shape {problem.shape}")
        return None
    training = EPOCHS * budget.worth(lambda: _seconds_of_one(problem, settings))
    count = _affordable(problem, table, targets, budget, share, training)
    count = count if most is None else min(count, most)
    if count < LEAST_SAMPLES:
        say(f"no corrector: the budget has {count} samples for it, {LEAST_SAMPLES} are needed")
        return None
    say(f"corrector: {count} samples")
    target = targets(count)
    runs = run_keeping(problem, table, range(count))
    corrector = initial_corrector(settings, runs, target)
    began = budget.share()
    until = max(share, began + LEAST_SHARE)
    numbers = train_corrector(
        corrector, runs, target, batch=max(BATCH, count // 64),
        elapsed=lambda: (budget.share() - began) / (until - began),
    )  # fmt: skip
    say(
        f"  RMSE {numbers['before']:.5f} -> {numbers['after']:.5f} on the "
        f"{int(CHECK_SHARE * count)} of them that were not fitted"
    )
    if features:
        train_on_features(
            problem, corrector, runs.end, corrector.inputs(runs.end, runs.outputs), target, budget,
            share, held=max(1, int(CHECK_SHARE * count)), say=say,
        )  # fmt: skip
    return corrector, {"samples": float(count), **numbers}


def _affordable(
    problem: SamplingProblem,
    table: SolverTable,
    targets: Targets,
    budget: Budget,
    share: float,
    training: float,
) -> int:
    """Samples the budget pays for: exact ends, runs of the table, and ``training`` evaluations each,
    as long as they are trained on.
    """
    most = MOST_VECTORS if len(problem.shape) == 1 else MOST
    memory = LARGEST_STORE // ((2 + table.depth) * math.prod(problem.shape))
    most = max(LEAST_SAMPLES, min(most, memory))
    have, each = targets.count, targets.cost
    left = budget.left_until(share)
    count = most
    while count > 0 and (table.nfe + training) * count + each * max(0, count - have) > left:
        count = int(count * 0.8)
    return count


@torch.enable_grad()
def _seconds_of_one(problem: SamplingProblem, settings: CorrectorSettings) -> float:
    """Of a sample's part in an update, after one to warm up."""
    corrector = Corrector(settings).to(problem.device)
    x = torch.zeros(BATCH, *problem.shape, dtype=torch.float32, device=problem.device)
    inputs = corrector.inputs(x, [x] * settings.outputs)
    started = 0.0
    for _ in range(2):
        started = time.perf_counter()
        loss = corrector.residual(inputs).square().mean()
        host_numbers([torch.autograd.grad(loss, [*corrector.parameters()])[0].sum()])
    return (time.perf_counter() - started) / BATCH
