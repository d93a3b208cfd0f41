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


def clip(folder: Path, width: int = 8, projection: int | None = None) -> tuple[Any, Any]:
    """A text encoder and a tokenizer of letters, written into ``folder`` on the way.

    ``projection``: of the pooled embedding, as in the encoders of SDXL and SD3.
    """
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    letters = "abcdefghijklmnopqrstuvwxyz"
    ends = ["<|startoftext|>", "<|endoftext|>"]
    words = [*letters, *(letter + "</w>" for letter in letters), *ends]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=projection or width,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    kind = CLIPTextModel if projection is None else CLIPTextModelWithProjection
    return seeded(lambda: kind(config)), CLIPTokenizer(*files, model_max_length=12)


def t5() -> tuple[Any, Any]:
    """An encoder of width 16 and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "the", "sea", "rain"]
    rules = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rules, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=12,
    )  # fmt: skip
    config = T5Config(vocab_size=len(words), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return seeded(lambda: T5EncoderModel(config)), tokenizer


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


def sdxl(kind: str = "", **parts: Any) -> Any:
    """StableDiffusionXL{,Img2Img,Inpaint}Pipeline."""
    unet = _unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
    )
    cls = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline")
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = cls(
        vae=vae(),
        **{name: parts.get(name) for name in names},
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**SD_CONFIG, timestep_spacing="leading"),
        add_watermarker=False,
    )
    if (
        kind and not parts
    ):  # without a text encoder the pipeline does not know the embedding's width
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


TEXT_PARTS = (
    "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3",
)  # fmt: skip


def sd3(kind: str = "", **scheduler: Any) -> Any:
    """StableDiffusion3{,Img2Img,Inpaint}Pipeline; text encoders and tokenizers by name."""
    parts = {name: scheduler.pop(name, None) for name in TEXT_PARTS}
    channels = 16 if kind == "Inpaint" else 4  # the inpainting pipeline insists on 16
    transformer = seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=channels,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            out_channels=channels,
            pos_embed_max_size=8,
        )
    )
    cls = getattr(diffusers, f"StableDiffusion3{kind}Pipeline")
    pipe = cls(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        vae=vae(channels),
        **parts,
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
    """Flux{,Img2Img,Inpaint}Pipeline; text encoders and tokenizers by name."""
    parts = {name: scheduler.pop(name, None) for name in TEXT_PARTS[:4]}
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
        **parts,
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
