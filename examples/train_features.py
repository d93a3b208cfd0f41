"""Train the small 16x16 classifier whose penultimate features the Frechet distance uses.

    python examples/train_features.py --data images.tar.xz --out runs/features

``--data`` holds one folder per class below ``train`` and ``test``. Writes ``features.safetensors``
(bf16-rounded weights), ``reference.safetensors`` (feature count, mean and covariance of the
training images, float64) and ``facts.json`` (accuracy and settings) to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from image_source import load_images
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from dlms_engine.embedded import FEATURES, FeatureNetwork


def to_batch(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1], channels-last."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip each image with probability 1/2 and shift the batch by up to one pixel."""
    flip = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    x = torch.where(flip, x.flip(3), x)
    dy, dx = torch.randint(0, 3, (2,), generator=generator).tolist()
    size = x.shape[-1]
    padded = functional.pad(x, (1, 1, 1, 1), mode="reflect")
    shifted = padded[:, :, dy : dy + size, dx : dx + size]
    return shifted.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def all_features(network: nn.Module, images: np.ndarray, batch: int = 1000) -> torch.Tensor:
    """Features of every image, float32 [N, FEATURES]."""
    parts = np.array_split(images, max(1, len(images) // batch))
    return torch.cat([network(to_batch(part)) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="image folder or tar archive")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=4e-3, help="peak one-cycle AdamW learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels, classes = load_images(args.data, args.size, "/train/", args.out / "train.npz")
    held, held_labels, _ = load_images(args.data, args.size, "/test/", args.out / "test.npz")
    targets = torch.from_numpy(labels)
    network = FeatureNetwork().to(memory_format=torch.channels_last).train()
    head = nn.Linear(FEATURES, len(classes))
    fast = torch.compile(network) if args.compile else network
    parameters = [*network.parameters(), *head.parameters()]
    per_epoch = len(images) // args.batch
    total = args.epochs * per_epoch
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total, pct_start=0.2)
    began = time.monotonic()
    bar = tqdm(total=total, unit="step", mininterval=2)
    for _ in range(args.epochs):
        order = torch.randperm(len(images), generator=generator)[: per_epoch * args.batch]
        for chosen in order.view(per_epoch, args.batch):
            x = augment(to_batch(images[chosen.numpy()]), generator)
            with torch.autocast("cpu", torch.bfloat16):
                logits = head(fast(x))
            loss = functional.cross_entropy(logits.float(), targets[chosen], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    seconds = time.monotonic() - began

    network.eval()
    # Ship (and measure) exactly the rounded weights that a user loads.
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())
        # One common factor makes the mean feature variance 1 over the training images.
        raw = all_features(network, images).double()
        network.scale.fill_(float(raw.var(0).mean().rsqrt()))
        network.scale.copy_(network.scale.bfloat16())
        head.weight.div_(network.scale)
        features = all_features(network, images).double()
        guesses = head(all_features(network, held)).argmax(1)
    accuracy = float((guesses == torch.from_numpy(held_labels)).double().mean())
    count = torch.tensor([len(features)], dtype=torch.int64)
    reference = {"count": count, "mean": features.mean(0), "covariance": features.T.cov()}
    weights = {
        name: (tensor.bfloat16() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    save_file(weights, args.out / "features.safetensors")
    save_file(reference, args.out / "reference.safetensors")
    facts = {
        "test_accuracy": accuracy,
        "epochs": args.epochs,
        "seconds": round(seconds),
        "parameters": sum(p.numel() for p in network.parameters()),
        "classes": classes,
        "reference_images": len(features),
    }
    (args.out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
