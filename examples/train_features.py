"""Train the classifier whose penultimate features the Frechet distance uses.

    python examples/train_features.py --data images.tar.xz --out runs/features
    python examples/train_features.py --preset cifar10-32 --data images.tar.xz --out runs/features-32

``--data`` holds one folder per class below ``train`` and ``test``. Writes ``features.safetensors``
(bf16-rounded weights), ``reference.safetensors`` (feature count, mean and covariance of the
training images, float64) and ``facts.json`` (accuracy and settings) to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from image_source import load_images
from recipes import CLASSIFIER, defaults
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from dlms_engine.lab.benchmark_model import ResidualFeatures
from dlms_engine.models.embedded import FeatureNetwork


def build_features(widths: str) -> FeatureNetwork | ResidualFeatures:
    """The ResNet of these widths ("64,128,256"), or the embedded model's network without any."""
    if not widths:
        return FeatureNetwork()
    return ResidualFeatures(tuple(int(width) for width in widths.split(",")))


def to_batch(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1], channels-last."""
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


def augment(x: Tensor, crop: int, generator: torch.Generator) -> Tensor:
    """Flip each image with probability 1/2 and shift it.

    ``crop`` 0 shifts the whole batch by up to one pixel; else each image by up to ``crop``, padded
    with its reflection.
    """
    device = x.device
    flip = torch.rand(len(x), 1, 1, 1, generator=generator, device=device) < 0.5
    x = torch.where(flip, x.flip(3), x)
    size = x.shape[-1]
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


@torch.no_grad()
def all_features(network: nn.Module, images: Tensor, batch: int = 1000) -> Tensor:
    """Features of every uint8 image [N, H, W, 3], float32 [N, F], on their device."""
    return torch.cat([network(to_batch(part)) for part in torch.split(images, batch)])


def fit(
    network: nn.Module, head: nn.Module, images: Tensor, targets: Tensor, args: argparse.Namespace
) -> float:
    """Trains both in place (AdamW, one cycle, label smoothing 0.1); the seconds it took."""
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
            x = augment(to_batch(images[chosen]), args.crop, generator)
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
def round_and_scale(network: Any, head: nn.Linear, images: Tensor) -> None:
    """Rounds the weights to what is shipped, bfloat16, so that exactly these are measured; one
    common factor then makes the mean feature variance 1 over the training images."""
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())
    raw = all_features(network, images).double()
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
    told = {"widths": args.widths} if args.widths else None
    save_file(weights, args.out / "features.safetensors", metadata=told)
    save_file(reference, args.out / "reference.safetensors")
    (args.out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, measures on the test images and writes; the facts."""
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(args.seed)
    sets = {}
    for name in ("train", "test"):
        images, labels, classes = load_images(
            args.data, args.size, f"/{name}/", args.out / f"{name}.npz"
        )
        sets[name] = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
    network = build_features(args.widths).to(device).to(memory_format=torch.channels_last).train()
    head = nn.Linear(network.num_features, len(classes)).to(device)
    images, targets = sets["train"]
    seconds = fit(network, head, images, targets, args)
    network.eval()
    round_and_scale(network, head, images)
    features = all_features(network, images)
    held, held_targets = sets["test"]
    with torch.no_grad():
        guesses = head(all_features(network, held)).argmax(1)
    facts = {
        "test_accuracy": float((guesses == held_targets).double().mean()),
        "epochs": args.epochs,
        "seconds": round(seconds),
        "parameters": sum(p.numel() for p in network.parameters()),
        "classes": classes,
        "reference_images": len(features),
    }
    write(network, features, facts, args)
    return facts


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    preset = defaults(CLASSIFIER, given)
    parser.add_argument("--preset", choices=sorted(CLASSIFIER), help="what the rest defaults to")
    parser.add_argument("--data", type=Path, required=True, help="image folder or tar archive")
    parser.add_argument("--out", type=Path, required=True)
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
