"""Images from a folder or a tar archive as one uint8 array, decoded once and cached."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def _members(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (relative posix name, encoded bytes) for every image file in ``source``."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                yield path.relative_to(source).as_posix(), path.read_bytes()
        return
    # "r:*" finds the compression (none, gz, bz2, xz) by itself; members come in archive order,
    # so a compressed archive is read in one forward pass.
    with tarfile.open(source, "r:*") as archive:
        for member in archive:
            if member.isfile() and PurePosixPath(member.name).suffix.lower() in SUFFIXES:
                handle = archive.extractfile(member)
                if handle is not None:
                    yield member.name, handle.read()


def load_images(
    source: Path, size: int, include: str = "", cache: Path | None = None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Decode every image whose name contains ``include``, box-resized to ``size`` x ``size``.

    Returns:
        images: uint8 [N, size, size, 3] RGB.
        labels: int64 [N], the index of the image's parent folder in ``classes``.
        classes: sorted parent folder names (one entry for a flat folder).

    Raises:
        FileNotFoundError: ``source`` does not exist.
        ValueError: nothing in ``source`` matches.
    """
    if cache is not None and cache.exists():
        with np.load(cache, allow_pickle=False) as stored:
            key = [str(source.resolve()), str(size), include]
            if stored["key"].tolist() == key:
                return stored["images"], stored["labels"], stored["classes"].tolist()
    if not source.exists():
        raise FileNotFoundError(f"no image folder or archive at {source}")
    pixels: list[np.ndarray] = []
    folders: list[str] = []
    for name, data in _members(source):
        if include not in name:
            continue
        with Image.open(io.BytesIO(data)) as image:
            # BOX is the exact area average when the ratio is an integer (32 -> 16).
            small = image.convert("RGB").resize((size, size), Image.Resampling.BOX)
        pixels.append(np.asarray(small, dtype=np.uint8))
        folders.append(PurePosixPath(name).parent.name)
    if not pixels:
        raise ValueError(f"no image in {source} has {include!r} in its name")
    classes, labels = np.unique(np.array(folders), return_inverse=True)
    images = np.stack(pixels)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(".tmp.npz")
        key_array = np.array([str(source.resolve()), str(size), include])
        np.savez(temporary, images=images, labels=labels, classes=classes, key=key_array)
        os.replace(temporary, cache)
    return images, labels.astype(np.int64), classes.tolist()
