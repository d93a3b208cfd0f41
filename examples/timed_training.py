"""Train one model for a number of seconds: ``cifar10-32``, ``emoji`` or ``emoji-flow``.

    python examples/timed_training.py --model emoji --images emoji.npz --out runs/emoji --seconds 120

Time, not the number of steps, fixes the schedule: the learning rate rises, stays, and falls linearly
to zero over the last share of ``--seconds``, whatever the machine's speed. On a GPU a whole step
(draws, forward, backward, Adam) is one CUDA graph over the compiled network, and nothing is read by
the host but the loss, now and then. Every ``--save-every`` seconds the averaged weights are written
in bfloat16 to ``--deliver`` and the full state to ``--out``; the same command goes on from there.

EDM models regress the raw output F of Karras et al. 2022, equation 7, whose loss weight is 1 for
every noise level (their equation 8); flows regress noise - data (Liu et al. 2023, equation 1).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from draw_samples import draw_rows, picture
from recipes import TIMED
from safetensors.torch import save_file
from timed_state import State, hardware, plot_loss
from torch import Tensor, nn
from torch.nn import functional

from dlms_engine.models.unet import UNet

AVERAGE_EVERY = 4  # steps
RECORD_EVERY = 100  # steps
IN_FLIGHT = 16  # steps that the host may run ahead of the GPU
SMALLEST, SHIFT = 0.88, 1.5
"""How moved images are: the least scale, and the shift in pixels of the network's images."""
PART = 15_000_000
"""Bytes of one file of delivered weights, about."""


class Images:
    """Batches from images held on the device; every draw comes from torch's default generator.

    Args:
        stored: ``images`` uint8 ``[N, S, S, 3]``, ``labels`` int64 ``[N]``, ``flip`` bool ``[N]``:
            which may be mirrored.
        size: side of the batches' images; ``S`` is ``size``, or twice that: then each image is
            ``moved`` before it is averaged down.
        dropout: probability that an image's class is hidden (becomes ``classes``).
    """

    def __init__(self, stored: dict[str, Tensor], size: int, classes: int, dropout: float) -> None:
        self.pixels, self.labels, self.flip = stored["images"], stored["labels"], stored["flip"]
        self.size, self.classes, self.dropout = size, classes, dropout

    def __call__(self, batch: int) -> tuple[Tensor, Tensor | None]:
        """Images in [-1, 1] ``[batch, 3, size, size]`` and labels ``[batch]``."""
        device = self.pixels.device
        chosen = torch.randint(len(self.pixels), (batch,), device=device)
        x = self.pixels[chosen].permute(0, 3, 1, 2).float() / 127.5 - 1
        flip = (torch.rand(batch, device=device) < 0.5) & self.flip[chosen]
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
        if x.shape[-1] != self.size:
            x = moved(x, SMALLEST, SHIFT / self.size)
        labels = None
        if self.classes:
            hidden = torch.rand(batch, device=device) < self.dropout
            labels = torch.where(hidden, self.classes, self.labels[chosen])
        return x.contiguous(memory_format=torch.channels_last), labels


def moved(x: Tensor, smallest: float, shift: float) -> Tensor:
    """Each image shrunk and shifted over white, then averaged to half its side.

    Args:
        x: ``[B, 3, 2 S, 2 S]`` in [-1, 1]; white is 1.
        smallest: the scale is uniform from here to 1.
        shift: at most this share of the side, each way.
    """
    scale = 1 / (smallest + (1 - smallest) * torch.rand(len(x), device=x.device))
    offset = 2 * shift * (2 * torch.rand(2, len(x), device=x.device) - 1)
    zero = torch.zeros_like(scale)
    rows = [torch.stack([scale, zero, offset[0]], 1), torch.stack([zero, scale, offset[1]], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    # Points outside read 0, so white has to be 0 meanwhile.
    dense = functional.grid_sample(x - 1, grid, padding_mode="zeros", align_corners=False)
    return functional.avg_pool2d(dense, 2) + 1


def make_loss(recipe: dict[str, Any]) -> Callable[..., Tensor]:
    """``loss(network, clean, noise, normal, labels)``; ``normal`` ``[B]`` draws the noise level."""
    mean, deviation = recipe["level_mean"], recipe["level_std"]
    if recipe["prediction"] == "flow":

        def flow(network: Any, clean: Tensor, noise: Tensor, normal: Tensor, labels: Any) -> Tensor:
            t = torch.sigmoid(mean + deviation * normal)
            s = t.view(-1, 1, 1, 1)
            return _regress(network, (1 - s) * clean + s * noise, t, labels, noise - clean)

        return flow
    data = recipe["sigma_data"]

    def edm(network: Any, clean: Tensor, noise: Tensor, normal: Tensor, labels: Any) -> Tensor:
        log = mean + deviation * normal
        s = log.exp().view(-1, 1, 1, 1)
        total = (s**2 + data**2).sqrt()
        # (clean - c_skip * noisy) / c_out, without the cancellation at small sigma.
        target = (s * clean - data**2 * noise) / (data * total)
        return _regress(network, (clean + s * noise) / total, log / 4, labels, target)

    return edm


def _regress(network: Any, x: Tensor, c_noise: Tensor, labels: Any, target: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        raw = network(x, c_noise, labels)
    return functional.mse_loss(raw.float(), target)


class Step:
    """One update of the network; on a GPU captured once and replayed.

    Args:
        compiled: compile the loss; ``captured``: one CUDA graph a step (GPU only).
    """

    def __init__(
        self, state: State, images: Images, recipe: dict[str, Any], compiled: bool, captured: bool
    ) -> None:
        self.state, self.images, self.batch = state, images, recipe["batch"]
        self.network = state.network
        loss = make_loss(recipe)
        self.loss = torch.compile(loss, dynamic=False) if compiled else loss
        self.parameters = list(state.network.parameters())
        self.total = torch.zeros((), device=state.lr.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if captured:
            self._capture()

    def eager(self) -> None:
        clean, labels = self.images(self.batch)
        noise = torch.randn_like(clean)
        normal = torch.randn(self.batch, device=clean.device)
        loss = self.loss(self.network, clean, noise, normal, labels)
        self.state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.state.optimizer.step()
        self.total += loss.detach()

    def _capture(self) -> None:
        """Three steps on a stream of their own, which compile, then the capture; they leave no
        trace: weights, moments and draws are put back."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        kept = self.state.copied()
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.eager()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.state.optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.eager()
        torch.clear_autocast_cache()
        self.state.restore(kept)
        self.total.zero_()

    def __call__(self) -> None:
        if self.graph is None:
            self.eager()
        else:
            self.graph.replay()


def learning_rate(peak: float, seen: int, warmup: int, left: float, cooldown: float) -> float:
    """Linear over the first ``warmup`` images, constant, linear to 0 over the last seconds."""
    return peak * min(1.0, (seen + 1) / warmup) * min(1.0, max(0.0, left / cooldown))


def train(args: argparse.Namespace, now: Callable[[], float] = time.monotonic) -> dict[str, Any]:
    """Trains until the time is up or a signal comes, and delivers; the facts of the run.

    Args:
        now: a clock, in seconds; the end is ``args.seconds`` after its first reading.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    end = now() + args.seconds
    recipe = {**TIMED[args.model], **(json.loads(args.change) if args.change else {})}
    state, step, facts, config = prepare(args, recipe)
    print(f"{args.model}: ready with {end - now():.1f} s left", flush=True)
    stop = _stopped_by_signals()
    before, began, first = state.seconds, now(), state.step
    saved, pace = began, Pace(state.lr.device)
    while not stop and (left := end - now()) > 0:
        seen = state.step * recipe["batch"]
        cooldown = recipe["cooldown"] * args.seconds
        state.lr.fill_(learning_rate(recipe["lr"], seen, recipe["warmup"], left, cooldown))
        step()
        state.step += 1
        if state.step % AVERAGE_EVERY == 0:
            state.average(recipe["ema_share"] * seen, recipe["batch"] * AVERAGE_EVERY)
        if state.step % IN_FLIGHT == 0:
            pace.wait()
        if state.step % RECORD_EVERY == 0:
            state.record(step.total, RECORD_EVERY, recipe["batch"])
        state.seconds = before + now() - began
        if now() - saved > args.save_every:
            state.save(facts)
            deliver(state, facts, config, args)
            saved = now()
    float(step.total)  # the last steps are done, not only launched
    speed = (state.step - first) * recipe["batch"] / max(1e-9, now() - began)
    print(f"{args.model}: {speed:,.0f} images/s, loss {state.recent_loss()}", flush=True)
    state.save(facts)
    summary = deliver(state, facts, config, args)
    plot_loss(state.history, args.out / "loss.png")
    if args.samples:
        torch.backends.cudnn.benchmark = False  # a few calls: trying algorithms would take longer
        rows = draw_rows(state.ema, recipe, config["classes"], args.samples, args.seed)
        picture(rows, args.out / "samples.png")
    return summary


def prepare(
    args: argparse.Namespace, recipe: dict[str, Any]
) -> tuple[State, Step, dict[str, Any], dict[str, Any]]:
    """Images on the device, the network, what an earlier call left, and the step."""
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    with np.load(args.images, allow_pickle=False) as stored:
        tensors = {k: torch.from_numpy(stored[k]).to(device) for k in ("images", "labels", "flip")}
        classes = stored["classes"].tolist()
    config = {**recipe["network"], "classes": len(classes) if recipe["dropout"] else 0}
    images = Images(tensors, config["size"], config["classes"], recipe["dropout"])
    state = State(UNet(**config).to(device), recipe["lr"], args.out / "state.safetensors")
    facts = {"model": args.model, "recipe": recipe, "seed": args.seed, "classes": classes}
    state.load(facts)
    step = Step(state, images, recipe, args.compile, args.capture and device.type == "cuda")
    return state, step, facts, config


def _stopped_by_signals() -> list[int]:
    """A list that is empty until SIGINT or SIGTERM comes: the running step is finished first."""
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: received.append(number))
    return received


class Pace:
    """Keeps the host at most two waits ahead of the GPU, so that its clock is the GPU's."""

    def __init__(self, device: torch.device) -> None:
        self.last = torch.cuda.Event() if device.type == "cuda" else None
        if self.last is not None:
            self.last.record()

    def wait(self) -> None:
        if self.last is not None:
            self.last.synchronize()
            self.last = torch.cuda.Event()
            self.last.record()


def deliver(
    state: State, facts: dict[str, Any], config: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Writes the averaged weights in bfloat16, in parts small enough to carry; the summary.

    Every part names the step, so that parts of two deliveries are never taken for one model.
    """
    device = state.lr.device
    summary = {
        **facts,
        "config": config,
        "step": state.step,
        "images_seen": state.step * facts["recipe"]["batch"],
        "parameters": sum(p.numel() for p in state.ema.parameters()),
        "seconds": round(state.seconds, 1),
        "loss": state.recent_loss(),
        "learning_rate": float(state.lr),
        "hardware": hardware(device),
        "torch": torch.__version__,
        "commit": os.environ.get("DLMS_COMMIT") or None,
    }
    if args.deliver is None:
        return summary
    args.deliver.mkdir(parents=True, exist_ok=True)
    weights = {k: v.bfloat16().cpu().contiguous() for k, v in state.ema.state_dict().items()}
    total = sum(2 * v.numel() for v in weights.values())
    parts: list[dict[str, Tensor]] = [{} for _ in range(-(-total // PART))]
    sizes = [0] * len(parts)
    for name, value in sorted(weights.items(), key=lambda item: -item[1].numel()):
        smallest = sizes.index(min(sizes))
        parts[smallest][name] = value
        sizes[smallest] += 2 * value.numel()
    written = []
    for index, part in enumerate(parts):
        suffix = f".{index}" if len(parts) > 1 else ""
        path = args.deliver / f"{args.model}{suffix}.safetensors"
        fresh = args.out / f"delivered{suffix}.tmp"
        metadata = {"training": json.dumps({**summary, "part": index, "parts": len(parts)})}
        save_file(part, fresh, metadata=metadata)
        written.append((fresh, path))
    for fresh, path in written:
        copy = path.with_name("." + path.name)  # another file system, perhaps: no rename across
        copy.write_bytes(fresh.read_bytes())
        os.replace(copy, path)
    print(f"{args.model}: delivered step {state.step}, loss {summary['loss']}", flush=True)
    return summary


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(TIMED), required=True)
    parser.add_argument("--images", type=Path, required=True, help="npz of prepare_images.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")
    parser.add_argument("--deliver", type=Path, help="folder for the averaged weights")
    parser.add_argument("--seconds", type=float, required=True, help="of this call, with its setup")
    parser.add_argument("--save-every", type=float, default=60, help="seconds")
    parser.add_argument("--samples", type=int, default=10, help="a row of the picture; 0: none")
    parser.add_argument("--change", help="JSON object laid over the recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-capture", dest="capture", action="store_false")
    return parser.parse_args(words)


if __name__ == "__main__":
    train(arguments())
