"""Train an EDM model on a folder or tar archive of images.

The network is a diffusers ``UNet2DModel``; EDM preconditioning (Karras et al. 2022) wraps it:

    D(x, sigma) = c_skip x + c_out F(c_in x, C_NOISE_SCALE * c_noise),   c_noise = ln(sigma) / 4

with sigma_data = 0.5. ``C_NOISE_SCALE`` spreads c_noise (about -1.5 .. 1.1) over the positional
embedding's frequencies, whose fastest period is 2 pi; the same constant is applied by
``dlms_engine.models.embedded`` when the trained weights are loaded.

    MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 \\
    python examples/train_embedded.py --data images.tar.xz --out runs/embedded --images 2000000

    python examples/train_embedded.py --preset cifar10-32 --data images.tar.xz --include train/ \\
        --out runs/cifar10-32 --minutes 9

Interrupt at any time (Ctrl-C saves) or give ``--minutes``; the same command resumes where it
stopped, on the CPU to the bit: the noise, the image order, the flips and the augmentation of a step
are functions of (seed, step) and of the kind of device alone. A preset with a cooldown may be ended
by ``--minutes 9 --finish``, which measures the speed and lets the learning rate fall to zero just
before the time is up.
"""

from __future__ import annotations

import argparse
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from augment import augment
from edm_network import SIGMA_DATA, build_network, denoise, sample_grid
from image_source import load_images
from recipes import TRAINING, defaults
from torch import Tensor, nn
from tqdm import tqdm
from training_state import State, plot_loss

P_MEAN, P_STD = -1.2, 1.2
RECORD_EVERY = 100  # batches
FACTS = (
    "seed", "batch", "size", "channels", "layers", "attention", "groups", "head", "lr", "warmup",
    "ema_half_life", "augment",
)  # fmt: skip


class Batches:
    """Training batches from images held on the device; ``batches(step)`` depends on nothing else.

    Args:
        images: uint8 ``[N, H, W, 3]``.
        augmented: probability of EDM's augmentation; 0 leaves horizontal flips alone.
    """

    def __init__(
        self, images: np.ndarray, batch: int, seed: int, device: torch.device, augmented: float
    ) -> None:
        if len(images) < batch:
            raise ValueError(f"{len(images)} images do not fill a batch of {batch}: lower --batch")
        self.images = torch.from_numpy(images).to(device)
        self.batch, self.seed, self.augmented = batch, seed, augmented
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Clean images in [-1, 1] [B, 3, H, W], unit noise like them, sigma [B], labels [B, 9]."""
        device, batch = self.images.device, self.batch
        epoch, position = divmod(step, len(self.images) // batch)
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.images))
            self._epoch, self._order = epoch, torch.from_numpy(order).to(device)
        chosen = self.images[self._order[position * batch : (position + 1) * batch]]
        generator = torch.Generator(device).manual_seed(self.seed * 1_000_000_007 + step)
        clean, labels = chosen.permute(0, 3, 1, 2).float() / 127.5 - 1, None
        if self.augmented:
            clean, labels = augment(clean, self.augmented, generator)
        else:
            flip = torch.rand(batch, 1, 1, 1, generator=generator, device=device) < 0.5
            clean = torch.where(flip, clean.flip(3), clean)
        clean = clean.contiguous(memory_format=torch.channels_last)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        normal = torch.randn(batch, generator=generator, device=device)
        sigma = (P_MEAN + P_STD * normal).exp()
        return clean, noise.contiguous(memory_format=torch.channels_last), sigma, labels


def learning_rate(seen: int, images: int, peak: float, warmup: int, cooldown: int) -> float:
    """Linear warm-up over ``warmup`` images, then to zero at ``images``: a cosine, or with a
    ``cooldown`` constant and linear over the last ``cooldown`` images."""
    rise = min(1.0, seen / warmup)
    if cooldown:
        return peak * rise * min(1.0, max(0.0, (images - seen) / cooldown))
    progress = min(1.0, max(0.0, (seen - warmup) / max(1, images - warmup)))
    return peak * rise * 0.5 * (1 + math.cos(math.pi * progress))


def update(state: State, batches: Batches, fast: nn.Module, args: argparse.Namespace) -> Tensor:
    """One step of Adam and of the moving average; the loss, not yet waited for."""
    seen = state.step * args.batch
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(seen, state.images, args.lr, args.warmup, state.cooldown)
    clean, noise, sigma, labels = batches(state.step)
    s = sigma.view(-1, 1, 1, 1)
    weight = (s**2 + SIGMA_DATA**2) / (s * SIGMA_DATA) ** 2
    estimate = denoise(fast, clean + s * noise, sigma, labels)
    loss = (weight * (estimate - clean) ** 2).mean()
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    trained = list(state.network.parameters())
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    state.optimizer.step()
    # Ramp-up (EDM): the half-life never exceeds 5% of what has been seen.
    half_life = max(1.0, min(args.ema_half_life, 0.05 * seen))
    averaged = list(state.ema.parameters())
    torch._foreach_lerp_(averaged, trained, 1 - 0.5 ** (args.batch / half_life))
    state.step += 1
    return loss.detach()


class Clock:
    """Seconds of this call, what is left of ``--minutes``, and when to save and to draw."""

    def __init__(self, minutes: float | None) -> None:
        self.began = self.saved = self.drawn = time.monotonic()
        self.limit = math.inf if minutes is None else 60 * minutes

    def spent(self) -> float:
        return time.monotonic() - self.began

    def left(self) -> float:
        return self.limit - self.spent()


def train(args: argparse.Namespace) -> bool:
    """Trains until the end of the run or of the time; True at the end of the run."""
    clock = Clock(args.minutes)
    if args.finish and (args.minutes is None or not args.cooldown):
        raise ValueError("--finish needs --minutes and a preset or option with a --cooldown")
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    images, _, _ = load_images(args.data, args.size, args.include, args.out / "images.npz")
    batches = Batches(images, args.batch, args.seed, device, args.augment)
    network, ema = (build_network(vars(args), args.augment > 0).to(device) for _ in range(2))
    ema.load_state_dict(network.state_dict())
    ema.requires_grad_(False)
    state = State(network, ema, args.lr, args.images, args.cooldown)
    facts = {k: getattr(args, k) for k in FACTS}
    if not args.cooldown:  # a cosine's shape depends on its length: another one is another run
        facts["images"] = args.images
    checkpoint = args.out / "checkpoint.safetensors"
    if checkpoint.exists():
        state.load(checkpoint, facts)
    fast: Any = torch.compile(network) if args.compile else network
    stop = False

    def on_signal(_signum: int, _frame: object) -> None:
        nonlocal stop
        stop = True  # finish the running step, then save

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    before, first = state.seconds, state.step
    waiting: list[Tensor] = []  # losses on the device: asking for each would wait for each step
    speed: tuple[float, int] | None = None
    goal = math.ceil(state.images / args.batch)
    bar = tqdm(total=goal * args.batch, initial=state.step * args.batch, unit="img", mininterval=5)
    while state.step < goal and not stop:
        waiting.append(update(state, batches, fast, args))
        bar.update(args.batch)
        end = state.step == goal
        if len(state.unrecorded) + len(waiting) >= RECORD_EVERY or end:
            record_losses(state, waiting, args.batch)
            bar.set_postfix(loss=f"{state.history[-1][1]:.4f}")
            if args.finish and not state.final and state.step - first >= args.probe:
                goal = choose_end(state, speed, clock, args.batch)
                bar.total = goal * args.batch
                end = state.step == goal
            speed = speed or (clock.spent(), state.step)
        stop = stop or clock.left() <= 0
        state.seconds = before + clock.spent()
        now = time.monotonic()
        if now - clock.saved > args.save_every and not (stop or end):
            state.unrecorded += torch.stack(waiting).tolist() if waiting else []
            waiting = []
            state.save(checkpoint, facts)
            clock.saved = now
        if now - clock.drawn > args.grid_every and not (stop or end):
            draw(state, args)
            clock.drawn = now
    bar.close()
    state.unrecorded += torch.stack(waiting).tolist() if waiting else []
    state.save(checkpoint, facts)
    draw(state, args)
    word = "finished" if state.step >= goal else "stopped, call again"
    print(f"{word}: {state.step * args.batch} images in {state.seconds:.0f} s; {checkpoint}")
    return state.step >= goal


def record_losses(state: State, waiting: list[Tensor], batch: int) -> None:
    """Moves the waiting losses into the history.

    Raises:
        FloatingPointError: the mean is not finite; the last checkpoint is from before.
    """
    losses = [*state.unrecorded, *torch.stack(waiting).tolist()]
    waiting.clear()
    state.unrecorded = []
    mean = float(np.mean(losses))
    if not math.isfinite(mean):
        raise FloatingPointError(
            f"the loss is {mean} after {state.step} steps: lower --lr and go on from the checkpoint"
        )
    state.history.append((state.step * batch, mean))


def choose_end(state: State, speed: tuple[float, int] | None, clock: Clock, batch: int) -> int:
    """Fixes the run's length so that it ends with the time; the number of steps.

    The speed is that since the first record of this call: compilation lies before it. A tenth of
    what is left, at least 15 s, stays for saving, the pictures and slower phases.
    """
    since, step = speed or (0.0, 0)
    per_second = (state.step - step) / max(1e-9, clock.spent() - since)
    room = max(0.0, clock.left() - max(15.0, 0.1 * clock.left()))
    steps = state.step + int(per_second * room)
    state.images = steps * batch
    state.cooldown = max(1, min(state.cooldown, (steps - state.step) * batch))
    state.final = True
    return steps


def draw(state: State, args: argparse.Namespace) -> None:
    name = args.out / f"samples_{state.step * args.batch:08d}.png"
    sample_grid(state.ema, name, args.size, 8, 18, args.seed)
    plot_loss(state.history, args.out / "loss.png")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    preset = defaults(TRAINING, given)
    parser.add_argument("--preset", choices=sorted(TRAINING), help="what the rest defaults to")
    parser.add_argument("--data", type=Path, required=True, help="image folder or tar archive")
    parser.add_argument("--include", default="", help="keep names containing this, e.g. train/")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")
    parser.add_argument("--images", type=int, help="images to see in total")
    parser.add_argument("--size", type=int)
    parser.add_argument("--channels", help="of each level, from the top")
    parser.add_argument("--layers", type=int, help="residual blocks a level")
    parser.add_argument("--attention", help="levels with attention besides the middle, e.g. 1,2")
    parser.add_argument("--groups", type=int, help="groups of the normalisation")
    parser.add_argument("--head", type=int, help="channels of an attention head")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float, help="peak Adam learning rate")
    parser.add_argument("--warmup", type=int, help="warm-up, in images")
    parser.add_argument("--cooldown", type=int, help="linear fall at the end, in images; 0: cosine")
    parser.add_argument("--ema-half-life", type=float, help="in images")
    parser.add_argument("--augment", type=float, help="probability of EDM's augmentation; 0: off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="save and stop after this time")
    parser.add_argument("--finish", action="store_true", help="end the run within --minutes")
    parser.add_argument("--probe", type=int, default=300, help="--finish: steps before choosing")
    parser.add_argument("--save-every", type=float, default=60, help="seconds")
    parser.add_argument("--grid-every", type=float, default=300, help="seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.set_defaults(**preset)
    return parser.parse_args(given)


if __name__ == "__main__":
    given = arguments()
    ended = train(given)
    raise SystemExit(75 if given.finish and not ended else 0)  # 75: to be called again
