"""Image archives of the shape that the training examples read, filled with noise: for rehearsals."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

ROWS = (
    ("Smileys & Emotion", "face-smiling"), ("Smileys & Emotion", "heart"),
    ("People & Body", "hand-prop"), ("People & Body", "person"),
    ("Animals & Nature", "animal-bird"), ("Food & Drink", "drink"), ("Activities", "sport"),
    ("Travel & Places", "hotel"), ("Objects", "tool"), ("Symbols", "arrow"), ("Flags", "flag"),
)  # fmt: skip


def _add(archive: tarfile.TarFile, name: str, pixels: np.ndarray) -> None:
    data = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(data, "png")
    member = tarfile.TarInfo(name)
    member.size = data.tell()
    data.seek(0)
    archive.addfile(member, data)


def make(folder: Path) -> tuple[Path, Path, Path]:
    """A CIFAR-10-like tar, an emoji-like tar and its table, in ``folder``; the same every time."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    cifar, emoji, table = folder / "cifar10.tar", folder / "emoji64.tar", folder / "emoji.csv"
    with tarfile.open(cifar, "w") as archive:
        for index in range(96):
            kind, bright = ("train" if index < 64 else "test"), index % 2
            pixels = generator.integers(0, 96, (32, 32, 3)) + 120 * bright
            _add(archive, f"images/{kind}/{'ab'[bright]}/{index}.png", pixels)
    lines = ["image,name,category,subcategory,skin"]
    with tarfile.open(emoji, "w") as archive:
        for index in range(88):
            category, subcategory = ROWS[index % len(ROWS)]
            pixels = generator.integers(0, 256, (64, 64, 4))
            pixels[:, :, index % 3] //= 4
            _add(archive, f"emoji64/{index:04x}.png", pixels)
            lines.append(f"{index:04x}.png,MADE UP {index},{category},{subcategory},")
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return cifar, emoji, table
