"""Decode an image set once, for the training examples.

    python examples/prepare_images.py cifar10-32 --data cifar10.tar.xz --out images/
    python examples/prepare_images.py emoji --data emoji64.tar --table emoji.csv --out images/

Writes ``NAME.npz`` and, where the data has test images of its own, ``NAME-test.npz``: ``images``
uint8 ``[N, S, S, 3]``, ``labels`` int64 ``[N]``, ``classes`` (names), ``flip`` bool ``[N]`` (a mirrored
copy is as good) and ``names``.

Emoji are composited on white at 64 pixels, twice what the networks see. Variants that differ in skin
tone alone, and the five bare tones, are left out: they would make two of three images a person.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
from image_source import load_images
from PIL import Image

CATEGORIES = {
    "Animals & Nature": "animal",
    "Food & Drink": "food",
    "Activities": "activity",
    "Travel & Places": "travel",
    "Objects": "object",
    "Symbols": "symbol",
    "Flags": "flag",
}
CLASSES = ("face", "heart", "hand", "person", *CATEGORIES.values())
"""The two largest categories are split: faces from hearts, hands from people."""
NOT_MIRRORED = ("symbol", "flag")


def emoji_class(category: str, subcategory: str) -> str | None:
    """The class of a row of the table; None for what is no picture of anything."""
    if category == "Smileys & Emotion":
        return "heart" if subcategory in ("heart", "emotion") else "face"
    if category == "People & Body":
        hand = subcategory.startswith("hand") or subcategory == "body-parts"
        return "hand" if hand else "person"
    return CATEGORIES.get(category)


def load_emoji(data: Path, table: Path) -> dict[str, np.ndarray]:
    """The arrays of ``emoji.npz``.

    Args:
        data: tar of ``*/CODEPOINTS.png``, RGBA.
        table: CSV with the columns image, name, category, subcategory and skin.

    Raises:
        ValueError: an image of the table is not in the archive.
    """
    files: dict[str, bytes] = {}
    with tarfile.open(data, "r:*") as archive:
        for member in archive:
            opened = archive.extractfile(member) if member.isfile() else None
            if opened is not None:
                files[PurePosixPath(member.name).name] = opened.read()
    images, labels, names = [], [], []
    with table.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            kind = emoji_class(row["category"], row["subcategory"])
            if kind is None or row["skin"]:
                continue
            if row["image"] not in files:
                raise ValueError(f"{table} names {row['image']}, which is not in {data}")
            with Image.open(io.BytesIO(files[row["image"]])) as opened_image:
                picture = opened_image.convert("RGBA")
            paper = Image.new("RGBA", picture.size, (255, 255, 255, 255))
            paper.alpha_composite(picture)
            images.append(np.asarray(paper.convert("RGB"), dtype=np.uint8))
            labels.append(CLASSES.index(kind))
            names.append(row["name"])
    mirrored = np.array([CLASSES[label] not in NOT_MIRRORED for label in labels])
    return {
        "images": np.stack(images),
        "labels": np.array(labels, dtype=np.int64),
        "classes": np.array(CLASSES),
        "flip": mirrored,
        "names": np.array(names),
    }


def load_folders(data: Path, size: int, include: str) -> dict[str, np.ndarray]:
    """The arrays of images in one folder a class, box-averaged to ``size``."""
    images, labels, classes = load_images(data, size, include)
    return {
        "images": images,
        "labels": labels,
        "classes": np.array(classes),
        "flip": np.ones(len(images), dtype=bool),
        "names": np.array([classes[label] for label in labels]),
    }


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)
    os.replace(temporary, path)
    print(f"{path}: {len(arrays['images'])} images of {len(arrays['classes'])} classes", flush=True)


def prepare(name: str, data: Path, out: Path, table: Path | None = None) -> None:
    """Writes the files of the image set ``name``; those that are there stay.

    Raises:
        ValueError: ``emoji`` without a table.
    """
    if name == "emoji":
        if table is None:
            raise ValueError("emoji need --table, the CSV of their categories")
        if not (out / "emoji.npz").exists():
            write(out / "emoji.npz", load_emoji(data, table))
        return
    for suffix, include in (("-test", "test/"), ("", "train/")):
        if not (out / f"{name}{suffix}.npz").exists():
            write(out / f"{name}{suffix}.npz", load_folders(data, 32, include))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("cifar10-32", "emoji"))
    parser.add_argument("--data", type=Path, required=True, help="image folder or tar archive")
    parser.add_argument("--table", type=Path, help="CSV of the emoji's categories")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    prepare(given.name, given.data, given.out, given.table)
