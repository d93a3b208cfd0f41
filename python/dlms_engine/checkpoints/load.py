"""Any known checkpoint as a denoiser, and its one-time conversion to safetensors.

    from dlms_engine.integrations.checkpoints import load_checkpoint

    denoiser = load_checkpoint("edm-cifar10-32x32-uncond-vp.pkl")
    denoiser = load_checkpoint("64x64_diffusion.pt", num_head_channels=64,
                               use_new_attention_order=True, noise_schedule="cosine",
                               classifier="64x64_classifier.pt", classifier_scale=1.0)

On the command line: ``dlms convert IN OUT.safetensors``. Nothing here runs pickled code.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.denoiser import Denoiser
from ..support.files import replacing
from . import edm
from .formats import check_format, read_metadata, read_tensors, stamp
from .guided import Noise, guided_denoiser
from .guided_layout import ARCHITECTURE, build_settings, guided_settings
from .restricted import UnsafeCheckpointError

_FORMAT = "dlms_engine.guided/1"
NOISE = tuple(field.name for field in dataclasses.fields(Noise))
_KINDS = ("edm", "guided", "ldm")


def checkpoint_kind(path: Path, tensors: dict[str, Tensor] | None = None) -> str:
    """``"edm"`` (snapshot), ``"guided"`` (U-Net or classifier) or ``"ldm"`` (latent diffusion).

    Raises:
        ValueError: none of them.
    """
    if path.suffix == ".pkl":
        return "edm"
    if path.suffix == ".safetensors":
        written = read_metadata(path).get("format", "").partition("/")[0]
        if written in ("dlms_engine.edm", "dlms_engine.guided"):
            return written.removeprefix("dlms_engine.")
    keys = set(read_tensors(path) if tensors is None else tensors)
    if {"time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight"} <= keys:
        return "guided"
    if any(key.startswith(("model.diffusion_model.", "first_stage_model.")) for key in keys):
        return "ldm"
    raise ValueError(
        f"{path}: not the weights of an EDM, guided-diffusion or latent-diffusion network; it holds "
        f"{', '.join(sorted(keys)[:3])}, ..."
    )


def load_checkpoint(
    path: str | Path,
    *,
    features: str | None = None,
    dtype: torch.dtype = torch.float32,
    classifier: str | Path | nn.Module | None = None,
    classifier_scale: float = 1.0,
    **options: Any,
) -> Denoiser:
    """A denoiser of a pixel-space checkpoint: ``denoiser(x, t, class_labels=...)``.

    Args:
        path: EDM ``.pkl``; guided-diffusion or consistency-model-repository ``.pt``; or either after
            ``convert_checkpoint``.
        features: bottleneck module for DLMS, e.g. ``"middle_block"``.
        dtype: of the weights; state and history stay float32.
        classifier: noisy classifier of guided-diffusion: a file, or a module ``(x, time)`` ->
            log-odds.
        classifier_scale: factor of its gradient.
        options: for files that do not say: ``num_head_channels`` or ``num_heads``,
            ``num_heads_upsample``, ``use_new_attention_order``, and ``kind`` ("ddpm", "edm"),
            ``noise_schedule``, ``diffusion_steps``, ``rescale_timesteps``, ``sigma_min``,
            ``sigma_max``, ``sigma_data``.

    Raises:
        UnsafeCheckpointError: reading it would need pickled code.
        ValueError: not such a checkpoint, unknown or contradicting options.
    """
    path = Path(path)
    found = checkpoint_kind(path)
    if found == "edm":
        if options or classifier is not None:
            extra = sorted(options) or ["classifier"]
            raise ValueError(
                f"{extra[0]} is not an option of EDM snapshots, which say all themselves"
            )
        return edm.load_edm(path, features=features, dtype=dtype)
    if found == "ldm":
        raise ValueError(
            f"{path} is a latent-diffusion checkpoint: load it as a pipeline with "
            "dlms_engine.checkpoints.single_file.load_single_file"
        )
    network, noise = load_network(path, **options)
    if noise is None:
        raise ValueError(f"{path} is a classifier: pass it as classifier= beside a U-Net")
    guide = load_network(classifier)[0] if isinstance(classifier, (str, Path)) else classifier
    return guided_denoiser(
        network.to(dtype),
        noise,
        classifier=None if guide is None else guide.to(dtype),
        classifier_scale=classifier_scale,
        features=features,
    )


def load_network(path: str | Path, **options: Any) -> tuple[nn.Module, Noise | None]:
    """A guided-diffusion network and its noise; None for a classifier."""
    path = Path(path)
    tensors = read_tensors(path)
    settings, noise = _described(path, tensors, options)
    return build_settings(settings, tensors), noise


def _described(
    path: Path, tensors: dict[str, Tensor], options: dict[str, Any]
) -> tuple[dict[str, Any], Noise | None]:
    metadata = read_metadata(path) if path.suffix == ".safetensors" else {}
    if metadata.get("format", "").startswith("dlms_engine."):
        check_format(path, metadata, _FORMAT)
        if options:
            raise ValueError(f"{path} says all itself: leave {', '.join(sorted(options))} out")
        held = json.loads(metadata["checkpoint"])
        noise = held["noise"]
        return held["settings"], None if noise is None else Noise(**noise)
    unknown = sorted(set(options) - {*ARCHITECTURE, *NOISE})
    if unknown:
        known = ", ".join((*ARCHITECTURE, *NOISE))
        raise ValueError(f"unknown option {unknown[0]!r}, expected one of {known}")
    settings = guided_settings(tensors, **{k: v for k, v in options.items() if k in ARCHITECTURE})
    if "pool" in settings:
        return settings, None
    given = {k: v for k, v in options.items() if k in NOISE}
    # the consistency-model repository's networks, distinguished by their attention weights, are EDM's
    given.setdefault("kind", "edm" if settings["attention_dims"] == 2 else "ddpm")
    return settings, Noise(**given)


def convert_checkpoint(source: str | Path, target: str | Path, **options: Any) -> Path:
    """Writes ``source`` as safetensors, its architecture and noise as JSON in the header.

    ``options`` as for ``load_checkpoint``. The file appears whole or not at all. Latent-diffusion
    checkpoints become plain safetensors of the same tensors, which diffusers reads.

    Raises:
        UnsafeCheckpointError: reading it would need pickled code.
        ValueError: unknown checkpoint or options, or ``target`` is no ``.safetensors``.
    """
    source, target = Path(source), Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: the output's name must end in .safetensors")
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the input: choose another name")
    if source.suffix == ".pkl":
        if options:
            raise ValueError(f"EDM snapshots take no options: leave {sorted(options)[0]} out")
        return edm.convert(source, target)
    tensors = read_tensors(source)
    found = checkpoint_kind(source, tensors)
    metadata: dict[str, str] = {}
    written = read_metadata(source) if source.suffix == ".safetensors" else {}
    if written.get("format", "").startswith("dlms_engine."):
        raise ValueError(f"{source} is converted already")
    if found == "ldm" and options:
        raise ValueError(f"latent-diffusion files take no options: leave {sorted(options)[0]} out")
    if found == "guided":
        settings, noise = _described(source, tensors, options)
        build_settings(settings, tensors)  # refuses what could not be used later
        described = {
            "settings": settings,
            "noise": None if noise is None else dataclasses.asdict(noise),
        }
        metadata = {**stamp(_FORMAT), "checkpoint": json.dumps(described)}
    with replacing(target) as partial:
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, partial, metadata)
    return target


__all__ = [
    "UnsafeCheckpointError",
    "checkpoint_kind",
    "convert_checkpoint",
    "load_checkpoint",
    "load_network",
]
