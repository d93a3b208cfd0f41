"""Tiny random checkpoints in the published file formats, for the papers' tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from edm_files import snapshot_bytes
from guided_reference import random_state
from torch import nn

from dlms_engine.checkpoints.networks import DhariwalUNet, SongUNet

SONG: dict[str, Any] = {
    "img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 0, "augment_dim": 9,
    "model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [],
}  # fmt: skip
ADM: dict[str, Any] = {
    "img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 4,
    "model_channels": 64, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [],
}  # fmt: skip
CLASSES = 4
GUIDED: dict[str, Any] = {
    "in_channels": 3, "model_channels": 64, "out_channels": 3, "num_res_blocks": 1,
    "attention_resolutions": [], "channel_mult": [1], "num_classes": None,
    "num_head_channels": 64, "use_scale_shift_norm": True, "resblock_updown": True,
    "use_new_attention_order": False,
}  # fmt: skip


def snapshot(path: Path, *, classes: int = 0) -> Path:
    """EDM's ``.pkl``: DDPM++, or ADM where it has classes; needs the fixture ``writers``."""
    kind, settings = (DhariwalUNet, ADM) if classes else (SongUNet, SONG)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = kind(**settings).eval()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
    path.write_bytes(snapshot_bytes(network, settings))
    return path


def guided_edm(path: Path) -> Path:
    """The consistency-model repository's ``.pt``: a state dict, without classes."""
    torch.save(random_state({**GUIDED, "attention_dims": 2}), path)
    return path


def guided(path: Path, classifier: Path) -> tuple[Path, Path]:
    """guided-diffusion's ``.pt`` files: a U-Net with classes and a variance, and its classifier."""
    torch.save(random_state({**GUIDED, "out_channels": 6, "num_classes": CLASSES}), path)
    pool = {"pool": "attention", "image_size": 8, "out_channels": CLASSES}
    pool |= {"channel_mult": [1, 1], "attention_resolutions": [2]}
    torch.save(random_state({**GUIDED, **pool}), classifier)
    return path, classifier


def ldm(folder: Path) -> Path:
    """The directory of an unconditional latent-diffusion pipeline with a VQ decoder."""
    import diffusers
    from tiny_pipelines import seeded, unconditional

    coder = seeded(
        lambda: diffusers.VQModel(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3, norm_num_groups=4,
            num_vq_embeddings=16,
        )
    )  # fmt: skip
    betas = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.DDIMScheduler(**betas, clip_sample=False)
    pipe = diffusers.LDMPipeline(coder, unconditional().unet, scheduler)
    pipe.save_pretrained(folder)
    return folder


def ddpm(folder: Path) -> Path:
    """The directory of an unconditional pixel pipeline."""
    from tiny_pipelines import unconditional

    unconditional("DDPM").save_pretrained(folder)
    return folder


def stable_diffusion(folder: Path) -> Path:
    """The directory of a guided text-to-image pipeline."""
    from tiny_pipelines import clip, sd

    sd(text=clip(folder.with_name("text"))).save_pretrained(folder)
    return folder
