"""Video and audio pipelines of diffusers from small random components, by name."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from images import Case, common, ddim, flow, prompts, quiet
from tiny_pipelines import embeddings, seeded

TEXT = {"tokenizer": None, "text_encoder": None}
CLIP = {"height": 16, "width": 16, "num_frames": 5}


def picture(size: int) -> torch.Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(7))


def wan_vae() -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True],
        )
    )  # fmt: skip


def wan_transformer(kind: str = "WanTransformer3DModel", seed: int = 0, **extra: Any) -> Any:
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12,
        "in_channels": 16, "out_channels": 16, "text_dim": 32, "freq_dim": 256, "ffn_dim": 32,
        "num_layers": 1, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }  # fmt: skip
    return seeded(lambda: getattr(diffusers, kind)(**settings | extra), seed)


def unipc_flow() -> Any:
    return diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )


def wan() -> Any:
    return quiet(
        diffusers.WanPipeline(
            **TEXT, vae=wan_vae(), scheduler=unipc_flow(), transformer=wan_transformer()
        )
    )


def wan_two() -> Any:
    return quiet(
        diffusers.WanPipeline(
            **TEXT, vae=wan_vae(), scheduler=unipc_flow(), transformer=wan_transformer(),
            transformer_2=wan_transformer(seed=1), boundary_ratio=0.875,
        )
    )  # fmt: skip


def wan_image() -> Any:
    return quiet(
        diffusers.WanImageToVideoPipeline(
            **TEXT, vae=wan_vae(), scheduler=flow(shift=3.0), image_encoder=None,
            image_processor=None, transformer=wan_transformer(in_channels=36),
        )
    )  # fmt: skip


def skyreels() -> Any:
    return quiet(
        diffusers.SkyReelsV2Pipeline(
            **TEXT, vae=wan_vae(), scheduler=unipc_flow(),
            transformer=wan_transformer("SkyReelsV2Transformer3DModel"),
        )
    )  # fmt: skip


def wan_image_two() -> Any:
    return quiet(
        diffusers.WanImageToVideoPipeline(
            **TEXT, vae=wan_vae(), scheduler=flow(shift=3.0), image_encoder=None,
            image_processor=None, transformer=wan_transformer(in_channels=36), boundary_ratio=0.9,
            transformer_2=wan_transformer(in_channels=36, seed=1),
        )
    )  # fmt: skip


def ltx(kind: str = "") -> Any:
    transformer = seeded(
        lambda: diffusers.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8,
            cross_attention_dim=16, num_layers=1, caption_channels=16,
        )
    )  # fmt: skip
    blocks = (8, 8, 8, 8)
    ltx_vae = seeded(
        lambda: diffusers.AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=blocks, decoder_block_out_channels=blocks,
            layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1, patch_size_t=1,
            encoder_causal=True, decoder_causal=False,
        )
    )  # fmt: skip
    cls = getattr(diffusers, f"LTX{kind}Pipeline")
    return quiet(cls(**TEXT, vae=ltx_vae, transformer=transformer, scheduler=flow()))


def hunyuan_video(kind: str = "", channels: int = 4, **options: Any) -> Any:
    transformer = seeded(
        lambda: diffusers.HunyuanVideoTransformer3DModel(
            in_channels=channels, out_channels=4, num_attention_heads=2, attention_head_dim=10,
            num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1,
            text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
            **{"guidance_embeds": True} | options,
        )
    )  # fmt: skip
    hunyuan_vae = seeded(
        lambda: diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        )
    )  # fmt: skip
    parts = {"text_encoder_2": None, "tokenizer_2": None, "scheduler": flow(shift=7.0)}
    if kind:
        parts["image_processor"] = None
    cls = getattr(diffusers, f"HunyuanVideo{kind}Pipeline")
    return quiet(cls(**TEXT, vae=hunyuan_vae, transformer=transformer, **parts))


def hunyuan_inputs(true: float) -> dict[str, Any]:
    attention = torch.ones(1, 7, dtype=torch.long)
    return {
        **common(**CLIP), **prompts(7, 16), "prompt_attention_mask": attention,
        "pooled_prompt_embeds": embeddings(1, 8, seed=4), "true_cfg_scale": true,
        "negative_pooled_prompt_embeds": embeddings(1, 8, seed=5),
        "negative_prompt_attention_mask": attention,
    }  # fmt: skip


def hunyuan_image(kind: str) -> Any:
    """Image latents and a mask as channels, or the first frame's latents in their place."""
    if kind == "latent_concat":
        return hunyuan_video("ImageToVideo", 9, image_condition_type=kind, guidance_embeds=False)
    return hunyuan_video("ImageToVideo", image_condition_type=kind)


def cogvideox(kind: str = "", channels: int = 4) -> Any:
    transformer = seeded(
        lambda: diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=4,
            time_embed_dim=2, text_embed_dim=16, num_layers=1, sample_width=2, sample_height=2,
            sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=7,
        )
    )  # fmt: skip
    cog_vae = seeded(
        lambda: diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, latent_channels=4, layers_per_block=1,
            up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8),
            norm_num_groups=2, temporal_compression_ratio=4,
        )
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing",
        rescale_betas_zero_snr=True, snr_shift_scale=3.0,
    )  # fmt: skip
    cls = getattr(diffusers, f"CogVideoX{kind}Pipeline")
    return quiet(cls(**TEXT, vae=cog_vae, transformer=transformer, scheduler=scheduler))


def mochi() -> Any:
    transformer = seeded(
        lambda: diffusers.MochiTransformer3DModel(
            patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2,
            pooled_projection_dim=16, in_channels=12, qk_norm="rms_norm", text_embed_dim=16,
            time_embed_dim=4, activation_fn="swiglu", max_sequence_length=7,
        )
    )  # fmt: skip
    with torch.no_grad():
        transformer.pos_frequencies.zero_()
    mochi_vae = seeded(
        lambda: diffusers.AutoencoderKLMochi(
            latent_channels=12, out_channels=3, encoder_block_out_channels=(32,) * 4,
            decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5,
        )
    )  # fmt: skip
    scheduler = flow(invert_sigmas=True)
    return quiet(
        diffusers.MochiPipeline(**TEXT, vae=mochi_vae, transformer=transformer, scheduler=scheduler)
    )


def latte() -> Any:
    from tiny_pipelines import vae

    transformer = seeded(
        lambda: diffusers.LatteTransformer3DModel(
            sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2,
            caption_channels=16, in_channels=4, cross_attention_dim=16, out_channels=8,
            attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
            norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        )
    )  # fmt: skip
    return quiet(
        diffusers.LattePipeline(**TEXT, vae=vae(), transformer=transformer, scheduler=ddim())
    )


CASES: dict[str, Case] = {
    "WanPipeline": (wan, lambda: {**common(**CLIP), **prompts(7, 32)}),
    "WanPipeline, unguided": (
        wan, lambda: {**common(**CLIP), **prompts(7, 32), "guidance_scale": 1.0}),
    "WanPipeline, two networks": (
        wan_two, lambda: {**common(**CLIP), **prompts(7, 32), "guidance_scale_2": 2.0}),
    "WanImageToVideoPipeline": (
        wan_image,
        lambda: {**common(**CLIP), **prompts(7, 32),
                 "image": picture(16)}),
    "SkyReelsV2Pipeline": (skyreels, lambda: {**common(**CLIP), **prompts(7, 32)}),
    "LTXPipeline": (
        ltx,
        lambda: {**common(height=32, width=32, num_frames=9), **prompts(7, 16, masks=True)}),
    "HunyuanVideoPipeline": (hunyuan_video, lambda: hunyuan_inputs(1.0)),
    "HunyuanVideoPipeline, true guidance": (hunyuan_video, lambda: hunyuan_inputs(4.0)),
    "CogVideoXPipeline": (
        cogvideox,
        lambda: {**common(height=16, width=16, num_frames=8), **prompts(7, 16),
                 "max_sequence_length": 7}),
    "MochiPipeline": (
        mochi,
        lambda: {**common(height=16, width=16, num_frames=7), **prompts(7, 16, masks=True)}),
    "WanImageToVideoPipeline, two networks": (
        wan_image_two,
        lambda: {**common(**CLIP), **prompts(7, 32), "image": picture(16), "guidance_scale_2": 2.0}),
    "LTXImageToVideoPipeline": (
        lambda: ltx("ImageToVideo"),
        lambda: {**common(height=32, width=32, num_frames=9), **prompts(7, 16, masks=True),
                 "image": picture(32)}),
    "HunyuanVideoImageToVideoPipeline": (
        lambda: hunyuan_image("latent_concat"),
        lambda: {**hunyuan_inputs(4.0), "image": picture(16)}),
    "HunyuanVideoImageToVideoPipeline, first frame": (
        lambda: hunyuan_image("token_replace"),
        lambda: {**hunyuan_inputs(1.0), "image": picture(16)}),
    "CogVideoXImageToVideoPipeline": (
        lambda: cogvideox("ImageToVideo", 8),
        lambda: {**common(height=16, width=16, num_frames=8), **prompts(7, 16),
                 "max_sequence_length": 7, "image": picture(16)}),
    "LattePipeline": (
        latte,
        lambda: {**common(height=16, width=16), **prompts(7, 16), "video_length": 1,
                 "negative_prompt": None}),
}  # fmt: skip
