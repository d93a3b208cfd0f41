"""Train the classifier whose penultimate features the Frechet distance uses.

    python examples/train_features.py --data images.tar.xz --out runs/features
    python examples/train_features.py --preset emoji --data images/emoji.npz --out runs/features-emoji

``--data`` holds one folder per class below ``train`` and ``test``, or is a file of
``prepare_images.py``, whose test images lie beside it or, without any, are every tenth. Writes
``features.safetensors`` (bf16-rounded weights), ``reference.safetensors`` (feature count, mean and
covariance of the training images, float64) and ``facts.json`` (accuracy and settings) to ``--out``;
with ``--deliver`` all three as one file there.

The reference of a model that is trained on moved images (emoji) is that of images so moved.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from image_source import load_images
from recipes import CLASSIFIER, defaults
from safetensors.torch import save_file
from timed_training import SHIFT, SMALLEST, Images, moved
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from dlms_engine.models.embedded import FeatureNetwork
from dlms_engine.models.features import ResidualFeatures

REFERENCE = 20_000
"""Images that the reference of moved images is taken from."""


def build_features(widths: str) -> FeatureNetwork | ResidualFeatures:
    """The ResNet of these widths ("64,128,256"), or the embedded model's network without any."""
    if not widths:
        return FeatureNetwork()
    return ResidualFeatures(tuple(int(width) for width in widths.split(",")))


def to_batch(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1], channels-last."""
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


def augment(
    x: Tensor, size: int, crop: int, mirrored: Tensor, generator: torch.Generator
) -> Tensor:
    """Flip each image with probability 1/2 where ``mirrored`` ``[B]`` allows it, and shift it.

    ``crop`` 0 shifts the whole batch by up to one pixel; else each image by up to ``crop``, padded
    with its reflection. Images of twice the ``size`` are moved as a generator's are.
    """
    device = x.device
    flip = torch.rand(len(x), 1, 1, 1, generator=generator, device=device) < 0.5
    x = torch.where(flip & mirrored[:, None, None, None], x.flip(3), x)
    if x.shape[-1] != size:
        x = moved(x, SMALLEST, SHIFT / size)
        return x.contiguous(memory_format=torch.channels_last)
    if not crop:
        dy, dx = torch.randint(0, 3, (2,), generator=generator, device=device).tolist()
        padded = functional.pad(x, (1, 1, 1, 1), mode="reflect")
        shifted = padded[:, :, dy : dy + size, dx : dx + size]
        return shifted.contiguous(memory_format=torch.channels_last)
    moves = torch.randint(-crop, crop + 1, (2, len(x), 1), generator=generator, device=device)
    line = torch.arange(size, device=device)
    rows, columns = (size - 1 - (size - 1 - (line + move).abs()).abs() for move in moves)
    pixels = x.permute(0, 2, 3, 1)
    which = torch.arange(len(x), device=device)[:, None, None]
    return pixels[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Labelled(NamedTuple):
    """``pixels`` uint8 [N, H, W, 3], ``targets`` int64 [N], ``mirrored`` bool [N]: may be flipped."""

    pixels: Tensor
    targets: Tensor
    mirrored: Tensor


def load_sets(
    args: argparse.Namespace, device: torch.device
) -> tuple[Labelled, Labelled, list[str]]:
    """Training images, test images and the names of the classes."""
    if args.data.suffix != ".npz":
        sets = []
        for name in ("train", "test"):
            pixels, targets, classes = load_images(
                args.data, args.size, f"/{name}/", args.out / f"{name}.npz"
            )
            mirrored = torch.ones(len(pixels), dtype=torch.bool, device=device)
            on_device = (torch.from_numpy(array).to(device) for array in (pixels, targets))
            sets.append(Labelled(*on_device, mirrored))
        return sets[0], sets[1], classes
    whole, classes = load_prepared(args.data, device)
    beside = args.data.with_name(f"{args.data.stem}-test.npz")
    if beside.exists():
        return whole, load_prepared(beside, device)[0], classes
    apart = torch.arange(len(whole.targets), device=device) % 10 == 9
    train, test = (Labelled(*(part[mask] for part in whole)) for mask in (~apart, apart))
    return train, test, classes


def load_prepared(path: Path, device: torch.device) -> tuple[Labelled, list[str]]:
    """A file of ``prepare_images.py`` and the names of its classes."""
    with np.load(path, allow_pickle=False) as stored:
        arrays = (torch.from_numpy(stored[k]).to(device) for k in ("images", "labels", "flip"))
        return Labelled(*arrays), stored["classes"].tolist()


def to_size(images: Tensor, size: int) -> Tensor:
    """A batch of uint8 images, those of twice the ``size`` averaged down to it."""
    x = to_batch(images)
    return x if x.shape[-1] == size else functional.avg_pool2d(x, 2)


@torch.no_grad()
def all_features(network: nn.Module, images: Tensor, size: int, batch: int = 1000) -> Tensor:
    """Features of every uint8 image [N, H, W, 3], float32 [N, F], on their device."""
    return torch.cat([network(to_size(part, size)) for part in torch.split(images, batch)])


@torch.no_grad()
def reference_features(network: nn.Module, train: Labelled, size: int) -> Tensor:
    """Features of what a generator is trained on: the images, or ``REFERENCE`` moved ones."""
    if train.pixels.shape[1] == size:
        return all_features(network, train.pixels, size)
    stored = {"images": train.pixels, "labels": train.targets, "flip": train.mirrored}
    draw = Images(stored, size, 0, 0.0)
    return torch.cat([network(draw(1000)[0]) for _ in range(REFERENCE // 1000)])


def fit(network: nn.Module, head: nn.Module, train: Labelled, args: argparse.Namespace) -> float:
    """Trains both in place (AdamW, one cycle, label smoothing 0.1); the seconds it took."""
    images, targets, mirrored = train
    device = images.device
    generator = torch.Generator(device).manual_seed(args.seed)
    fast = torch.compile(network) if args.compile else network
    per_epoch = len(images) // args.batch
    if not per_epoch:
        raise ValueError(f"{len(images)} images do not fill a batch of {args.batch}: lower --batch")
    total = args.epochs * per_epoch
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=args.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total, pct_start=args.warm)
    began = time.monotonic()
    bar = tqdm(total=total, unit="step", mininterval=2)
    for _ in range(args.epochs):
        order = torch.randperm(len(images), generator=generator, device=device)
        for chosen in order[: per_epoch * args.batch].view(per_epoch, args.batch):
            x = to_batch(images[chosen])
            x = augment(x, args.size, args.crop, mirrored[chosen], generator)
            with torch.autocast(device.type, torch.bfloat16):
                logits = head(fast(x))
            loss = functional.cross_entropy(logits.float(), targets[chosen], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    return time.monotonic() - began


@torch.no_grad()
def round_and_scale(network: Any, head: nn.Linear, images: Tensor, size: int) -> None:
    """Rounds the weights to what is shipped, bfloat16, so that exactly these are measured; one
    common factor then makes the mean feature variance 1 over the training images."""
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())
    raw = all_features(network, images, size).double()
    network.scale.fill_(float(raw.var(0).mean().rsqrt()))
    network.scale.copy_(network.scale.bfloat16())
    head.weight.div_(network.scale)


def write(network: nn.Module, features: Tensor, facts: dict[str, Any], args: Any) -> None:
    """The three files."""
    count = torch.tensor([len(features)], dtype=torch.int64)
    features = features.double().cpu()
    reference = {"count": count, "mean": features.mean(0), "covariance": features.T.cov()}
    weights = {
        name: (tensor.bfloat16() if tensor.is_floating_point() else tensor).contiguous().cpu()
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    metadata = {"widths": args.widths} if args.widths else {}
    save_file(weights, args.out / "features.safetensors", metadata=metadata)
    save_file(reference, args.out / "reference.safetensors")
    (args.out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if args.deliver is not None:
        args.deliver.mkdir(parents=True, exist_ok=True)
        together = {**weights, **{f"reference.{k}": v for k, v in reference.items()}}
        beside = args.deliver / f".{args.preset}-features.safetensors"
        save_file(together, beside, metadata={**metadata, "facts": json.dumps(facts)})
        os.replace(beside, args.deliver / f"{args.preset}-features.safetensors")


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, measures on the test images and writes; the facts."""
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(args.seed)
    training, test, classes = load_sets(args, device)
    network = build_features(args.widths).to(device).to(memory_format=torch.channels_last).train()
    head = nn.Linear(network.num_features, len(classes)).to(device)
    seconds = fit(network, head, training, args)
    network.eval()
    round_and_scale(network, head, training.pixels, args.size)
    features = reference_features(network, training, args.size)
    with torch.no_grad():
        guesses = head(all_features(network, test.pixels, args.size)).argmax(1)
    facts = {
        "test_accuracy": float((guesses == test.targets).double().mean()),
        "epochs": args.epochs,
        "seconds": round(seconds),
        "parameters": sum(p.numel() for p in network.parameters()),
        "classes": classes,
        "training_images": len(training.targets),
        "test_images": len(test.targets),
        "reference_images": len(features),
    }
    write(network, features, facts, args)
    return facts


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    preset = defaults(CLASSIFIER, given)
    parser.add_argument("--preset", choices=sorted(CLASSIFIER), help="what the rest defaults to")
    parser.add_argument("--data", type=Path, required=True, help="folder, tar or prepared npz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deliver", type=Path, help="folder for all of it in one file")
    parser.add_argument("--size", type=int)
    parser.add_argument("--widths", help="of the ResNet, e.g. 64,128,256; '': the embedded network")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float, help="peak one-cycle AdamW learning rate")
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument("--warm", type=float, help="share of the steps in which the rate rises")
    parser.add_argument("--crop", type=int, help="pixels an image is shifted by at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.set_defaults(**preset)
    return parser.parse_args(given)


if __name__ == "__main__":
    print(json.dumps(train(arguments())))
