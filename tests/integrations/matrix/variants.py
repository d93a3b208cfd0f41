"""Inpainting, image-to-image, adapters and motion: further pipelines from small random components."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny_pipelines as tiny
import torch
from images import PICTURE, SIZE, Case, common, ddim, flow, generator, mask, prompts, quiet, qwen
from tiny_pipelines import SD_CONFIG, seeded, vae
from videos import TEXT, unipc_flow, wan_transformer, wan_vae

MASKED = {"image": PICTURE, "mask_image": mask()}


def sd_parts(**changed: Any) -> dict[str, Any]:
    return {**tiny.sd().components, "requires_safety_checker": False, **changed}


def pag() -> Any:
    parts = sd_parts(scheduler=ddim(), pag_applied_layers="mid")
    return quiet(diffusers.StableDiffusionPAGPipeline(**parts))


def sd_ddim() -> Any:
    """The pipeline itself sets ``steps_offset`` and ``clip_sample`` of this scheduler."""
    return quiet(diffusers.StableDiffusionPipeline(
        **sd_parts(scheduler=diffusers.DDIMScheduler(**{**SD_CONFIG, "steps_offset": 0}))))  # fmt: skip


def sd_zero_snr() -> Any:
    scheduler = diffusers.DDIMScheduler(
        **SD_CONFIG, prediction_type="v_prediction", rescale_betas_zero_snr=True,
        timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip
    return quiet(diffusers.StableDiffusionPipeline(**sd_parts(scheduler=scheduler)))


def animatediff() -> Any:
    unet = seeded(
        lambda: diffusers.UNet2DConditionModel(
            block_out_channels=(8, 8), layers_per_block=1, sample_size=8, cross_attention_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=2,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
        )
    )  # fmt: skip
    motion = seeded(
        lambda: diffusers.MotionAdapter(
            block_out_channels=(8, 8), motion_layers_per_block=1, motion_norm_num_groups=2,
            motion_num_attention_heads=2,
        )
    )  # fmt: skip
    return quiet(
        diffusers.AnimateDiffPipeline(
            **TEXT, unet=unet, vae=vae(), motion_adapter=motion, scheduler=ddim(),
            feature_extractor=None, image_encoder=None,
        )
    )  # fmt: skip


def stable_video() -> Any:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    unet = seeded(
        lambda: diffusers.UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=8,
            out_channels=4, cross_attention_dim=8, num_attention_heads=4,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            projection_class_embeddings_input_dim=24, addition_time_embed_dim=8,
        )
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", sigma_max=700.0,
        sigma_min=0.002, prediction_type="v_prediction", timestep_spacing="leading", steps_offset=1,
        timestep_type="continuous", use_karras_sigmas=True,
    )  # fmt: skip
    temporal = seeded(
        lambda: diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 64), latent_channels=4, layers_per_block=1,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        )
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=8, projection_dim=8, num_hidden_layers=1, num_attention_heads=2, image_size=16,
        intermediate_size=16, patch_size=8,
    )  # fmt: skip
    return quiet(
        diffusers.StableVideoDiffusionPipeline(
            unet=unet, vae=temporal, scheduler=scheduler,
            image_encoder=seeded(lambda: CLIPVisionModelWithProjection(vision)),
            feature_extractor=CLIPImageProcessor(crop_size=16, size=16),
        )
    )  # fmt: skip


def wan_video() -> Any:
    return quiet(
        diffusers.WanVideoToVideoPipeline(
            **TEXT, vae=wan_vae(), scheduler=unipc_flow(), transformer=wan_transformer()
        )
    )


def inpaint9() -> Any:
    """Mask and masked image as channels beside the latents."""
    parts = sd_parts(unet=tiny._unet(in_channels=9, out_channels=4))
    return quiet(diffusers.StableDiffusionInpaintPipeline(**parts))


def lumina() -> Any:
    transformer = seeded(
        lambda: diffusers.LuminaNextDiT2DModel(
            sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=2,
            num_attention_heads=3, num_kv_heads=1, multiple_of=16, ffn_dim_multiplier=None,
            norm_eps=1e-5, learn_sigma=True, qk_norm=True, cross_attention_dim=16, scaling_factor=1.0,
        )
    )  # fmt: skip
    parts = {**TEXT, "vae": vae(), "scheduler": flow()}
    return quiet(diffusers.LuminaPipeline(transformer=transformer, **parts))


def qwen_image() -> Any:
    parts = {k: v for k, v in qwen().components.items() if k != "processor"}
    return quiet(diffusers.QwenImageImg2ImgPipeline(**parts))


def flux_control() -> Any:
    transformer = seeded(
        lambda: diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=32, out_channels=16, num_layers=1, num_single_layers=1,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
            pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
        )
    )  # fmt: skip
    parts = {**tiny.flux().components, "transformer": transformer}
    names = ("image_encoder", "feature_extractor")
    return quiet(
        diffusers.FluxControlPipeline(**{k: v for k, v in parts.items() if k not in names})
    )


def deepfloyd() -> Any:
    unet = seeded(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=3, out_channels=6, block_out_channels=(32, 64),
            layers_per_block=1, cross_attention_dim=16, encoder_hid_dim=16, attention_head_dim=8,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            addition_embed_type="text", addition_embed_type_num_heads=2,
        )
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5, variance_type="learned_range",
    )  # fmt: skip
    parts = dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))
    return quiet(
        diffusers.IFPipeline(**TEXT, **parts, unet=unet, scheduler=scheduler,
                             requires_safety_checker=False)
    )  # fmt: skip


CASES: dict[str, Case] = {
    "StableDiffusionPipeline, DDIM": (sd_ddim, lambda: {**tiny.sd_inputs(), **SIZE}),
    "StableDiffusionPipeline, zero terminal SNR": (
        sd_zero_snr, lambda: {**tiny.sd_inputs(), **SIZE}),
    "StableDiffusionPAGPipeline": (
        pag, lambda: {**tiny.sd_inputs(), **SIZE, "pag_scale": 2.0}),
    "StableDiffusionXLInpaintPipeline": (
        lambda: tiny.sdxl("Inpaint"), lambda: {**tiny.sdxl_inputs(), **SIZE, **MASKED}),
    "StableDiffusionInpaintPipeline, joined": (
        inpaint9, lambda: {**tiny.sd_inputs(), **SIZE, **MASKED}),
    "LuminaPipeline": (
        lumina, lambda: {**common(height=32, width=32), **prompts(7, 16, masks=True)}),
    "FluxInpaintPipeline": (
        lambda: tiny.flux("Inpaint"), lambda: {**tiny.flux_inputs(), **MASKED}),
    "FluxControlPipeline": (
        flux_control, lambda: {**tiny.flux_inputs(), "control_image": PICTURE}),
    "StableDiffusion3InpaintPipeline": (
        lambda: tiny.sd3("Inpaint"), lambda: {**tiny.sd3_inputs(), **MASKED}),
    "QwenImageImg2ImgPipeline": (
        qwen_image,
        lambda: {**common(**SIZE), **prompts(7, 16), "image": PICTURE, "strength": 0.8,
                 "prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long), "guidance_scale": None,
                 "negative_prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long),
                 "true_cfg_scale": 1.0}),
    "DDIMPipeline": (
        lambda: tiny.unconditional("DDIM"), lambda: {"generator": generator(), "output_type": "np"}),
    "IFPipeline": (
        deepfloyd, lambda: {**common(height=8, width=8), **prompts(7, 16), "output_type": "np"}),
    "AnimateDiffPipeline": (
        animatediff,
        lambda: {**tiny.sd_inputs(), **SIZE, "num_frames": 3}),
    "StableVideoDiffusionPipeline": (
        stable_video,
        lambda: {"image": PICTURE, "num_frames": 2, "output_type": "latent", "generator": generator(),
                 "max_guidance_scale": 2.5, "decode_chunk_size": 2, **SIZE}),
    "WanVideoToVideoPipeline": (
        wan_video,
        lambda: {**common(height=16, width=16), **prompts(7, 32),
                 "video": [torch.rand(3, 16, 16, generator=generator()) for _ in range(5)]}),
}  # fmt: skip
