"""What an emoji model has memorised: for each sample, the nearest training image.

    python examples/nearest_images.py --model emoji --images images/emoji.npz --count 8 --out nearest

A sample is compared with every training image as training showed it: shrunk, shifted and, where that is
allowed, mirrored. The yardstick is the same distance between each training image and the nearest of the
others. Writes ``nearest.json`` and ``nearest.png``: samples in the upper row of each pair, their nearest
training images below. Neither belongs into the project: both show training images or speak of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from draw_samples import draw, picture
from recipes import TIMED
from timed_training import SHIFT, SMALLEST
from torch import Tensor
from torch.nn import functional

from dlms_engine.models import load

SCALES = (SMALLEST, 0.92, 0.96, 1.0)
MEMORISED = 0.5
"""A sample nearer than this share of the median yardstick is called a copy."""


def views(pixels: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
    """Training images as training shows them.

    Args:
        pixels: uint8 ``[N, 64, 64, 3]``; ``mirrored`` bool ``[N]``.

    Yields:
        views ``[V, 3, 32, 32]`` and the image each is of ``[V]``.
    """
    x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    which = torch.arange(len(x))
    x = torch.cat([x, x[mirrored].flip(3)])
    which = torch.cat([which, which[mirrored]])
    made, of = [], []
    steps = (-SHIFT, 0.0, SHIFT)
    for scale, right, down in itertools.product(SCALES, steps, steps):
        row = torch.tensor([[1 / scale, 0, right / 16], [0, 1 / scale, down / 16]])
        grid = functional.affine_grid(row.expand(len(x), 2, 3), list(x.shape), align_corners=False)
        dense = functional.grid_sample(x - 1, grid, padding_mode="zeros", align_corners=False)
        made.append(functional.avg_pool2d(dense, 2) + 1)
        of.append(which)
    return torch.cat(made), torch.cat(of)


def nearest(
    x: Tensor, among: Tensor, of: Tensor, without: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RMS distance to, and place of, the nearest view for each ``x`` ``[B, 3, 32, 32]``.

    ``without`` ``[B]``: an image whose views do not count.
    """
    flat = among.flatten(1)
    squares = (flat**2).sum(1)
    found, places = [], []
    for index, one in enumerate(x.flatten(1).split(64)):
        distance = squares - 2 * one @ flat.T
        if without is not None:
            own = without[64 * index : 64 * index + len(one), None] == of
            distance = distance.masked_fill(own, torch.inf)
        best, place = distance.min(1)
        found.append(((best + (one**2).sum(1)).clamp(min=0) / one.shape[1]).sqrt())
        places.append(place)
    return torch.cat(found), torch.cat(places)


@torch.no_grad()
def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Draws, compares, writes; the figures."""
    model = load(args.model)
    with np.load(args.images, allow_pickle=False) as stored:
        pixels, mirrored = (torch.from_numpy(stored[k]) for k in ("images", "flip"))
        names = stored["names"].tolist()
    among, of = views(pixels, mirrored)
    labels = torch.arange(len(model.classes)).repeat_interleave(args.count)
    noise = torch.randn(
        len(labels), *model.shape, generator=torch.Generator().manual_seed(args.seed)
    )
    network: Any = model.denoiser.network
    samples = draw(network, TIMED[args.model], noise, labels, args.guidance).clamp(-1, 1)
    distance, place = nearest(samples, among, of)
    plain = functional.avg_pool2d(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, 2)
    chosen = torch.arange(0, len(plain), max(1, len(plain) // 300))
    yardstick = float(nearest(plain[chosen], among, of, chosen)[0].median())
    args.out.mkdir(parents=True, exist_ok=True)
    pairs = torch.stack([samples, among[place]], 1)
    rows = pairs.reshape(len(model.classes), args.count, 2, *model.shape).transpose(1, 2)
    picture(rows.reshape(-1, args.count, *model.shape), args.out / "nearest.png")
    copied = (distance < MEMORISED * yardstick).reshape(len(model.classes), args.count)
    facts = {
        "model": args.model,
        "samples": len(samples),
        "guidance_scale": args.guidance,
        "median_distance": float(distance.median()),
        "median_between_training_images": yardstick,
        "share_of_copies": float(copied.double().mean()),
        "share_by_class": dict(zip(model.classes, copied.double().mean(1).tolist(), strict=True)),
        "nearest": [names[of[index]] for index in place.tolist()],
    }
    (args.out / "nearest.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("emoji", "emoji-flow"), default="emoji")
    parser.add_argument("--images", type=Path, required=True, help="npz of prepare_images.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=8, help="samples a class")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    facts = compare(parser.parse_args())
    print(json.dumps({k: v for k, v in facts.items() if k != "nearest"}, indent=2))
