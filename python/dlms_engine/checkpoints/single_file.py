"""Latent-diffusion and Stable Diffusion files (``.ckpt``, ``.safetensors``) as diffusers pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    import diffusers
except ImportError as exc:
    raise ImportError(
        "dlms_engine.checkpoints.single_file needs diffusers: pip install 'dlms-engine[diffusers]'"
    ) from exc

from .formats import read_tensors
from .load import checkpoint_kind


def load_single_file(
    path: str | Path,
    *,
    config: str | Path | None = None,
    pipeline: str = "StableDiffusionPipeline",
    **options: Any,
) -> Any:
    """A pipeline of a single-file checkpoint, by diffusers' own conversion.

    Args:
        path: ``.safetensors``, or a ``.ckpt`` of tensors alone.
        config: directory of a diffusers pipeline of the same architecture (its JSON files are read);
            without it diffusers contacts the hub.
        pipeline: class name in diffusers.
        options: for ``from_single_file`` (``torch_dtype``, ``text_encoder``, ...).

    Raises:
        UnsafeCheckpointError: the file holds more than tensors; ``dlms convert`` says what to do.
        ValueError: not a latent-diffusion checkpoint, unknown pipeline, or no such folder.
    """
    path = Path(path)
    tensors = read_tensors(path)  # refuses pickled code before anyone else opens the file
    if checkpoint_kind(path, tensors) != "ldm":
        raise ValueError(
            f"{path} is no latent-diffusion checkpoint: use "
            "dlms_engine.checkpoints.load.load_checkpoint"
        )
    del tensors
    kind = getattr(diffusers, pipeline, None)
    if kind is None or not hasattr(kind, "from_single_file"):
        raise ValueError(f"pipeline is {pipeline!r}, expected a diffusers class with single files")
    if config is not None:
        if not Path(config).is_dir():
            raise ValueError(f"config is {config}, expected the directory of a diffusers pipeline")
        options = {"config": str(config), "local_files_only": True, **options}
    return kind.from_single_file(str(path), **options)
