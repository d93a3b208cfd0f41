"""Image pipelines of diffusers from small random components, by name: (pipeline, arguments)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import tiny_pipelines as tiny
import torch
from tiny_pipelines import embeddings, seeded, vae

Case = tuple[Callable[[], Any], Callable[[], dict[str, Any]]]
PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(7))
SIZE = {"height": 16, "width": 16}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def common(**extra: Any) -> dict[str, Any]:
    return {"output_type": "latent", "generator": generator(), "guidance_scale": 3.0, **extra}


def prompts(length: int, width: int, masks: bool = False) -> dict[str, Any]:
    """Prompt and negative prompt embeddings, with attention masks where a pipeline wants them."""
    given: dict[str, Any] = {
        "prompt_embeds": embeddings(1, length, width, seed=1),
        "negative_prompt_embeds": embeddings(1, length, width, seed=2),
    }
    if masks:
        mask = torch.ones(1, length, dtype=torch.long)
        given |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    return given


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def ddim() -> Any:
    return diffusers.DDIMScheduler(clip_sample=False)


def mask() -> torch.Tensor:
    shape = torch.zeros(1, 1, 16, 16)
    shape[..., :8] = 1
    return shape


def controlnet(**extra: Any) -> Any:
    return seeded(
        lambda: diffusers.ControlNetModel(
            block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
            conditioning_embedding_out_channels=(4, 8), norm_num_groups=4, **extra,
        )
    )  # fmt: skip


def sd_controlnet() -> Any:
    base, control = tiny.sd(), controlnet()
    with torch.no_grad():  # zero convolutions would hide that residuals follow the steps
        for part in (*control.controlnet_down_blocks, control.controlnet_mid_block):
            torch.nn.init.normal_(part.weight, std=0.3)
    parts = {k: v for k, v in base.components.items() if k != "image_encoder"}
    return quiet(diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=control,
                                                             requires_safety_checker=False))  # fmt: skip


def unet8() -> Any:
    return tiny._unet(in_channels=8, out_channels=4)


def pix2pix() -> Any:
    parts = {**tiny.sd().components, "unet": unet8()}
    cls = diffusers.StableDiffusionInstructPix2PixPipeline
    return quiet(cls(**parts, requires_safety_checker=False))


def marigold() -> Any:
    pipe = diffusers.MarigoldDepthPipeline(
        unet=unet8(), vae=vae(), scheduler=ddim(), text_encoder=None, tokenizer=None,
        prediction_type="depth", scale_invariant=True, shift_invariant=True,
    )  # fmt: skip
    pipe.empty_text_embedding = embeddings(1, 2, 8, seed=1)
    return quiet(pipe)


def kandinsky22() -> Any:
    unet = seeded(
        lambda: diffusers.UNet2DConditionModel(
            in_channels=4, out_channels=8, addition_embed_type="image", layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn", block_out_channels=(32, 64),
            encoder_hid_dim=32, encoder_hid_dim_type="image_proj", cross_attention_dim=32,
            attention_head_dim=4, resnet_time_scale_shift="scale_shift",
        )
    )  # fmt: skip
    movq = seeded(
        lambda: diffusers.VQModel(
            block_out_channels=(32, 32), latent_channels=4, norm_num_groups=8, norm_type="spatial",
            num_vq_embeddings=12, vq_embed_dim=4, layers_per_block=1,
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        )
    )  # fmt: skip
    pipe = diffusers.KandinskyV22Pipeline(unet=unet, scheduler=ddim(), movq=movq)
    return quiet(pipe)


def pixart(kind: str) -> Any:
    transformer = seeded(
        lambda: diffusers.PixArtTransformer2DModel(
            sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2,
            caption_channels=16, in_channels=4, cross_attention_dim=16, out_channels=8,
            norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
            use_additional_conditions=False,
        )
    )  # fmt: skip
    cls = getattr(diffusers, f"PixArt{kind}Pipeline")
    parts = {"text_encoder": None, "tokenizer": None, "vae": vae(), "scheduler": ddim()}
    return quiet(cls(transformer=transformer, **parts))


def hunyuan_dit() -> Any:
    transformer = seeded(
        lambda: diffusers.HunyuanDiT2DModel(
            sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
            in_channels=4, cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=8,
            hidden_size=16, activation_fn="gelu-approximate", text_len=7, text_len_t5=7,
        )
    )  # fmt: skip
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2",
                           "safety_checker", "feature_extractor"))  # fmt: skip
    return quiet(
        diffusers.HunyuanDiTPipeline(
            **parts, vae=vae(), transformer=transformer, scheduler=diffusers.DDPMScheduler(),
            requires_safety_checker=False,
        )
    )  # fmt: skip


def hunyuan_dit_inputs() -> dict[str, Any]:
    one = prompts(7, 16, masks=True)
    return {**common(**SIZE), **one, **{f"{k}_2": v for k, v in one.items()},
            "use_resolution_binning": False}  # fmt: skip


def aura_flow() -> Any:
    transformer = seeded(
        lambda: diffusers.AuraFlowTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
            attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16,
            joint_attention_dim=16, out_channels=4, pos_embed_max_size=64,
        )
    )  # fmt: skip
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae(), "scheduler": flow()}
    return quiet(diffusers.AuraFlowPipeline(transformer=transformer, **parts))


def sana() -> Any:
    transformer = seeded(
        lambda: diffusers.SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
            attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4,
            cross_attention_dim=8, caption_channels=8, sample_size=8,
        )
    )  # fmt: skip
    sana_vae = seeded(
        lambda: diffusers.AutoencoderDC(
            in_channels=3, latent_channels=4, attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            downsample_block_type="conv", upsample_block_type="interpolate",
            decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.4,
        )
    )  # fmt: skip
    parts = {"tokenizer": None, "text_encoder": None, "scheduler": flow(shift=3.0)}
    return quiet(diffusers.SanaPipeline(transformer=transformer, vae=sana_vae, **parts))


def sana_multistep() -> Any:
    pipe = sana()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    return pipe


def lumina2() -> Any:
    transformer = seeded(
        lambda: diffusers.Lumina2Transformer2DModel(
            sample_size=4, patch_size=2, in_channels=4, hidden_size=8, num_layers=1,
            num_attention_heads=1, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2),
            cap_feat_dim=8, num_refiner_layers=1,
        )
    )  # fmt: skip
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae(), "scheduler": flow()}
    return quiet(diffusers.Lumina2Pipeline(transformer=transformer, **parts))


def cogview4() -> Any:
    transformer = seeded(
        lambda: diffusers.CogView4Transformer2DModel(
            patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=4,
            out_channels=4, text_embed_dim=16, time_embed_dim=8, condition_dim=4,
        )
    )  # fmt: skip
    scheduler = flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True,
                     time_shift_type="linear")  # fmt: skip
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae(), "scheduler": scheduler}
    return quiet(diffusers.CogView4Pipeline(transformer=transformer, **parts))


def cogview3() -> Any:
    transformer = seeded(
        lambda: diffusers.CogView3PlusTransformer2DModel(
            patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
            out_channels=4, text_embed_dim=16, time_embed_dim=8, condition_dim=2,
            pos_embed_max_size=8, sample_size=8,
        )
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing",
        rescale_betas_zero_snr=True, snr_shift_scale=4.0,
    )  # fmt: skip
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae(), "scheduler": scheduler}
    return quiet(diffusers.CogView3PlusPipeline(transformer=transformer, **parts))


def chroma() -> Any:
    transformer = seeded(
        lambda: diffusers.ChromaTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
            approximator_hidden_dim=16, approximator_layers=1, approximator_num_channels=16,
        )
    )  # fmt: skip
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae(), "scheduler": flow()}
    return quiet(diffusers.ChromaPipeline(transformer=transformer, **parts))


def chroma_inputs() -> dict[str, Any]:
    asked = {**common(**SIZE), **prompts(7, 16, masks=True)}
    return {k: v.bool() if k.endswith("mask") else v for k, v in asked.items()}


def qwen() -> Any:
    transformer = seeded(
        lambda: diffusers.QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        )
    )  # fmt: skip
    qwen_vae = seeded(
        lambda: diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        )
    )  # fmt: skip
    parts = {"tokenizer": None, "text_encoder": None, "vae": qwen_vae, "scheduler": flow()}
    return quiet(diffusers.QwenImagePipeline(transformer=transformer, **parts))


def qwen_inputs(scale: float) -> dict[str, Any]:
    mask = torch.ones(1, 7, dtype=torch.long)
    return {**common(**SIZE), **prompts(7, 16), "prompt_embeds_mask": mask,
            "negative_prompt_embeds_mask": mask, "true_cfg_scale": scale,
            "guidance_scale": None}  # fmt: skip


def z_image() -> Any:
    transformer = seeded(
        lambda: diffusers.ZImageTransformer2DModel(
            all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1,
            n_refiner_layers=1, n_heads=2, n_kv_heads=2, qk_norm=True, cap_feat_dim=16,
            rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
        )
    )  # fmt: skip
    with torch.no_grad():  # made with torch.empty
        transformer.x_pad_token.fill_(1.0)
        transformer.cap_pad_token.fill_(1.0)
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae(), "scheduler": flow()}
    return quiet(diffusers.ZImagePipeline(transformer=transformer, **parts))


def z_image_inputs() -> dict[str, Any]:
    return {**common(**SIZE), "prompt_embeds": [embeddings(7, 16, seed=1)],
            "negative_prompt_embeds": [embeddings(7, 16, seed=2)]}  # fmt: skip


CASES: dict[str, Case] = {
    "StableDiffusionPipeline": (tiny.sd, lambda: {**tiny.sd_inputs(), **SIZE}),
    "StableDiffusionPipeline, rescaled": (
        tiny.sd, lambda: {**tiny.sd_inputs(), **SIZE, "guidance_rescale": 0.7}),
    "StableDiffusionImg2ImgPipeline": (
        lambda: tiny.sd("Img2Img"), lambda: {**tiny.sd_inputs(), "image": PICTURE, "strength": 0.8}),
    "StableDiffusionInpaintPipeline": (
        lambda: tiny.sd("Inpaint"),
        lambda: {**tiny.sd_inputs(), **SIZE, "image": PICTURE, "mask_image": mask()}),
    "StableDiffusionControlNetPipeline": (
        sd_controlnet, lambda: {**tiny.sd_inputs(), "image": PICTURE, **SIZE}),
    "StableDiffusionInstructPix2PixPipeline": (
        pix2pix, lambda: {**tiny.sd_inputs(), "image": PICTURE, "image_guidance_scale": 1.5}),
    "StableDiffusionXLPipeline": (tiny.sdxl, lambda: {**tiny.sdxl_inputs(), **SIZE}),
    "StableDiffusionXLImg2ImgPipeline": (
        lambda: tiny.sdxl("Img2Img"),
        lambda: {**tiny.sdxl_inputs(), "image": PICTURE, "strength": 0.8}),
    "StableDiffusion3Pipeline": (tiny.sd3, tiny.sd3_inputs),
    "StableDiffusion3Img2ImgPipeline": (
        lambda: tiny.sd3("Img2Img"), lambda: {**tiny.sd3_inputs(), "image": PICTURE}),
    "FluxPipeline": (tiny.flux, tiny.flux_inputs),
    "FluxImg2ImgPipeline": (
        lambda: tiny.flux("Img2Img"), lambda: {**tiny.flux_inputs(), "image": PICTURE}),
    "FluxKontextPipeline": (
        lambda: tiny.flux("Kontext"),
        lambda: {**tiny.flux_inputs(), "image": PICTURE, "max_area": 256, "_auto_resize": False}),
    "DDPMPipeline": (
        lambda: tiny.unconditional("DDPM"), lambda: {"generator": generator(), "output_type": "np"}),
    "DiTPipeline": (
        tiny.dit,
        lambda: {"class_labels": [1], "generator": generator(), "output_type": "np"}),
    "MarigoldDepthPipeline": (
        marigold, lambda: {"image": PICTURE, "processing_resolution": 0, "generator": generator(),
                           "output_type": "np"}),
    "KandinskyV22Pipeline": (
        kandinsky22,
        lambda: {"image_embeds": embeddings(1, 32, seed=1), "guidance_scale": 3.0,
                 "negative_image_embeds": embeddings(1, 32, seed=2), "output_type": "latent",
                 "height": 64, "width": 64, "generator": generator()}),
    "PixArtAlphaPipeline": (
        lambda: pixart("Alpha"),
        lambda: {**common(**SIZE), **prompts(7, 16, masks=True), "negative_prompt": None,
                 "use_resolution_binning": False}),
    "PixArtSigmaPipeline": (
        lambda: pixart("Sigma"),
        lambda: {**common(**SIZE), **prompts(7, 16, masks=True), "negative_prompt": None,
                 "use_resolution_binning": False}),
    "HunyuanDiTPipeline": (hunyuan_dit, hunyuan_dit_inputs),
    "AuraFlowPipeline": (
        aura_flow, lambda: {**common(**SIZE), **prompts(7, 16, masks=True)}),
    "SanaPipeline": (
        sana,
        lambda: {**common(height=32, width=32), **prompts(7, 8, masks=True), "negative_prompt": None,
                 "use_resolution_binning": False}),
    "SanaPipeline, multistep flow": (
        sana_multistep,
        lambda: {**common(height=32, width=32), **prompts(7, 8, masks=True), "negative_prompt": None,
                 "use_resolution_binning": False}),
    "Lumina2Pipeline": (
        lumina2,
        lambda: {**common(**SIZE), **prompts(7, 8, masks=True), "cfg_normalization": False}),
    "Lumina2Pipeline, truncated guidance": (
        lumina2,
        lambda: {**common(**SIZE), **prompts(7, 8, masks=True), "cfg_normalization": False,
                 "cfg_trunc_ratio": 0.5}),
    "Lumina2Pipeline, normalised": (
        lumina2, lambda: {**common(**SIZE), **prompts(7, 8, masks=True)}),
    "CogView4Pipeline": (cogview4, lambda: {**common(**SIZE), **prompts(7, 16)}),
    "CogView3PlusPipeline": (cogview3, lambda: {**common(**SIZE), **prompts(7, 16)}),
    "ChromaPipeline": (chroma, chroma_inputs),
    "QwenImagePipeline": (qwen, lambda: qwen_inputs(1.0)),
    "QwenImagePipeline, true guidance": (qwen, lambda: qwen_inputs(4.0)),
    "ZImagePipeline": (z_image, z_image_inputs),
}  # fmt: skip
