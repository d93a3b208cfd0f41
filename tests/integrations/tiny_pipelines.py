"""Tiny random-weight diffusers pipelines, built without any download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

SD_CONFIG: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
GUIDANCE = 3.0


def seeded(make: Any, seed: int = 0) -> Any:
    """``make()`` under a fixed seed, in evaluation mode, without disturbing other tests."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def embeddings(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vae(latent_channels: int = 4, blocks: int = 2) -> Any:
    """An autoencoder that shrinks by 2 ** (blocks - 1)."""
    return seeded(
        lambda: AutoencoderKL(
            block_out_channels=(8,) * blocks,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            latent_channels=latent_channels,
            norm_num_groups=4,
            sample_size=16,
            shift_factor=0.0,
        )
    )


def _unet(**extra: Any) -> Any:
    return seeded(
        lambda: UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
            norm_num_groups=4,
            **extra,
        )
    )


def clip(folder: Path) -> tuple[Any, Any]:
    """A text encoder of width 8 and a tokenizer of letters, written into ``folder`` on the way."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    ends = ["<|startoftext|>", "<|endoftext|>"]
    words = [*letters, *(letter + "</w>" for letter in letters), *ends]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    return seeded(lambda: CLIPTextModel(config)), CLIPTokenizer(*files, model_max_length=12)


def sd(kind: str = "", text: tuple[Any, Any] = (None, None), **options: Any) -> Any:
    """StableDiffusion{,Img2Img,Inpaint}Pipeline; ``text`` is an encoder and a tokenizer."""
    cls = getattr(diffusers, f"StableDiffusion{kind}Pipeline")
    pipe = cls(
        vae=vae(),
        text_encoder=text[0],
        tokenizer=text[1],
        unet=_unet(),
        scheduler=diffusers.PNDMScheduler(**SD_CONFIG, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd_inputs(batch: int = 1) -> dict[str, Any]:
    return {
        "prompt_embeds": embeddings(batch, 7, 8, seed=1),
        "negative_prompt_embeds": embeddings(batch, 7, 8, seed=2),
        "guidance_scale": GUIDANCE,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(3),
    }


def sdxl(kind: str = "") -> Any:
    """StableDiffusionXL{,Img2Img,Inpaint}Pipeline."""
    unet = _unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
    )
    cls = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline")
    pipe = cls(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**SD_CONFIG, timestep_spacing="leading"),
        add_watermarker=False,
    )
    if kind:  # without a text encoder the pipeline does not know the embedding's width
        pipe._get_add_time_ids = _add_time_ids(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _add_time_ids(pipe: Any) -> Any:
    def make(*args: Any, dtype: Any = torch.float32, **_: Any) -> Any:
        ids = torch.tensor([[16, 16, 0, 0, 16, 16]], dtype=dtype)
        return ids, ids

    return make


def sdxl_inputs(batch: int = 1) -> dict[str, Any]:
    return {
        **sd_inputs(batch),
        "pooled_prompt_embeds": embeddings(batch, 8, seed=4),
        "negative_pooled_prompt_embeds": embeddings(batch, 8, seed=5),
    }


def sd3(kind: str = "", **scheduler: Any) -> Any:
    """StableDiffusion3{,Img2Img}Pipeline."""
    transformer = seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            out_channels=4,
            pos_embed_max_size=8,
        )
    )
    cls = getattr(diffusers, f"StableDiffusion3{kind}Pipeline")
    pipe = cls(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3_inputs(batch: int = 1) -> dict[str, Any]:
    return {
        "prompt_embeds": embeddings(batch, 7, 16, seed=1),
        "negative_prompt_embeds": embeddings(batch, 7, 16, seed=2),
        "pooled_prompt_embeds": embeddings(batch, 8, seed=4),
        "negative_pooled_prompt_embeds": embeddings(batch, 8, seed=5),
        "guidance_scale": GUIDANCE,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(3),
        "height": 16,
        "width": 16,
    }


def flux(kind: str = "", **scheduler: Any) -> Any:
    """Flux{,Img2Img}Pipeline."""
    transformer = seeded(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 4, 8),
        )
    )
    settings = {"shift": 3.0, "use_dynamic_shifting": True} | scheduler
    cls = getattr(diffusers, f"Flux{kind}Pipeline")
    pipe = cls(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**settings),
        vae=vae(latent_channels=4),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_inputs(batch: int = 1) -> dict[str, Any]:
    return {
        "prompt_embeds": embeddings(batch, 7, 16, seed=1),
        "pooled_prompt_embeds": embeddings(batch, 8, seed=4),
        "guidance_scale": GUIDANCE,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(3),
        "height": 16,
        "width": 16,
    }


def unconditional(kind: str = "DDIM") -> Any:
    """DDIMPipeline or DDPMPipeline on an 8 x 8 pixel network."""
    unet = seeded(
        lambda: UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
        )
    )
    scheduler = getattr(diffusers, f"{kind}Scheduler")(clip_sample=False)
    pipe = getattr(diffusers, f"{kind}Pipeline")(unet=unet, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit() -> Any:
    """DiTPipeline with learned variance, as the published one."""
    transformer = seeded(
        lambda: DiTTransformer2DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        )
    )
    pipe = diffusers.DiTPipeline(
        transformer=transformer,
        vae=vae(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
