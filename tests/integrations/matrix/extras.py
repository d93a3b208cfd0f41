"""Adapters, caches, modular pipelines and schedulers of other kinds, from small random components."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import diffusers
import tiny_pipelines as tiny
import torch
from diffusers.guiders import SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig
from images import PICTURE, SIZE, Case, common, flow, generator, mask, prompts, quiet, qwen
from tiny_pipelines import embeddings, seeded
from variants import sd_ddim, sd_parts
from videos import CLIP, TEXT, ltx, wan, wan_vae


class Part(torch.nn.Module):
    """A component that only has to be there."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, *_: Any) -> bool:
        return True


def latent_consistency() -> Any:
    unet = tiny._unet(time_cond_proj_dim=8)
    scheduler = diffusers.LCMScheduler(clip_sample=False, set_alpha_to_one=False)
    parts = sd_parts(unet=unet, scheduler=scheduler)
    return quiet(diffusers.LatentConsistencyModelPipeline(**parts))


def ltx_condition() -> Any:
    parts = {k: v for k, v in ltx().components.items() if v is not None}
    return quiet(diffusers.LTXConditionPipeline(**TEXT, **parts))


def adapter_weights(unet: Any) -> dict[str, Any]:
    """An IP-Adapter for ``unet``: keys and values of every cross attention, and a projection."""
    width, draw = unet.config.cross_attention_dim, torch.Generator().manual_seed(8)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * 0.3

    layers, number = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            continue
        channels = unet.get_submodule(name.removesuffix(".processor")).to_q.weight.shape[0]
        for kind in ("k", "v"):
            layers[f"{number}.to_{kind}_ip.weight"] = numbers(channels, width)
        number += 2
    projection = {
        "proj.weight": numbers(4 * width, width), "proj.bias": numbers(4 * width),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": layers}


def ip_adapter() -> Any:
    pipe = tiny.sd()
    pipe.unet._load_ip_adapter_weights([adapter_weights(pipe.unet)])
    pipe.set_ip_adapter_scale(0.7)
    return pipe


def lora() -> Any:
    from peft import LoraConfig

    pipe = tiny.sd()
    pipe.text_encoder = Part()
    torch.manual_seed(0)
    pipe.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    )
    return pipe


def cosmos(kind: str) -> Any:
    module = sys.modules[diffusers.CosmosTransformer3DModel.__module__]
    if not hasattr(module, "transforms"):  # of torchvision, for the padding mask alone
        resize = torch.nn.functional.interpolate
        module.transforms = SimpleNamespace(functional=SimpleNamespace(
            resize=lambda mask, size, **_: resize(mask, size)),
            InterpolationMode=SimpleNamespace(NEAREST=None))  # fmt: skip
    transformer = seeded(
        lambda: diffusers.CosmosTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32),
            patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0), concat_padding_mask=True,
            extra_pos_embed_type="learnable",
        )
    )  # fmt: skip
    parts = {**TEXT, "transformer": transformer, "safety_checker": Part()}
    if kind == "CosmosTextToWorld":
        blocks = (8, 8, 8, 8)
        parts["vae"] = seeded(
            lambda: diffusers.AutoencoderKLCosmos(
                latent_channels=4, encoder_block_out_channels=blocks,
                decode_block_out_channels=blocks, attention_resolutions=(8,), resolution=64,
                num_layers=1, patch_size=4, scaling_factor=1.0, spatial_compression_ratio=4,
                temporal_compression_ratio=4,
            )
        )  # fmt: skip
        parts["scheduler"] = diffusers.EDMEulerScheduler(
            sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"
        )
    else:
        parts["vae"] = wan_vae()
        parts["scheduler"] = flow(use_karras_sigmas=True)
        parts["transformer"] = seeded(
            lambda: diffusers.CosmosTransformer3DModel(
                **{**transformer.config, "in_channels": 16, "out_channels": 16}
            )
        )
    return quiet(getattr(diffusers, f"{kind}Pipeline")(**parts))


def flux_fill() -> Any:
    transformer = seeded(
        lambda: diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=48, out_channels=16, num_layers=1,
            num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
            pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
        )
    )  # fmt: skip
    parts = {k: v for k, v in tiny.flux().components.items() if k not in ("transformer",)}
    parts = {k: v for k, v in parts.items() if "image_enc" not in k and "feature" not in k}
    return quiet(diffusers.FluxFillPipeline(**parts | {"transformer": transformer}))


def anyflow() -> Any:
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
    transformer = seeded(
        lambda: diffusers.AnyFlowTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
            out_channels=16, text_dim=32, freq_dim=256, ffn_dim=32, num_layers=1,
            cross_attn_norm=True, rope_max_seq_len=32, gate_value=0.25, deltatime_type="r",
        )
    )  # fmt: skip
    parts = {**TEXT, "vae": wan_vae(), "scheduler": scheduler}
    return quiet(diffusers.AnyFlowPipeline(transformer=transformer, **parts))


def first_block_cache() -> Any:
    pipe = tiny.flux()
    pipe.transformer = seeded(
        lambda: diffusers.FluxTransformer2DModel(**{**pipe.transformer.config, "num_layers": 2})
    )
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.5))
    return pipe


def deep_cache() -> Any:
    """The mid block is computed in every other call and reused in between, as DeepCache does."""
    pipe = sd_ddim()  # four calls in four steps: every run begins with a computed one
    block, kept = pipe.unet.mid_block, {"calls": 0, "output": None}
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kept["calls"] % 2 == 0:
            kept["output"] = plain(*args, **kwargs)
        kept["calls"] += 1
        return kept["output"]

    block.forward = forward
    return pipe


def modular(blocks: Any, parts: dict[str, Any]) -> Any:
    """A modular pipeline that is given embeddings."""
    for name in ("ip_adapter", "text_encoder"):
        blocks.sub_blocks.pop(name, None)
    pipe = blocks.init_pipeline()
    networks = [name for name in ("unet", "transformer") if name in parts]
    pipe.update_components(**{k: parts[k] for k in (*networks, "vae", "scheduler")})
    return quiet(pipe)


def modular_sdxl() -> Any:
    return modular(diffusers.StableDiffusionXLAutoBlocks(), tiny.sdxl().components)


def modular_flux() -> Any:
    return modular(diffusers.FluxAutoBlocks(), tiny.flux().components)


def modular_wan() -> Any:
    return modular(diffusers.WanBlocks(), wan().components)


def skipped_layers() -> Any:
    """A guider that puts hooks on the network for its third call of every step."""
    skip = LayerSkipConfig(
        indices=[0], fqn="blocks", skip_attention=True, skip_ff=True, skip_attention_scores=False
    )
    pipe = modular_wan()
    pipe.update_components(
        guider=SkipLayerGuidance(
            skip_layer_config=skip, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0
        )
    )
    return pipe


def modular_qwen() -> Any:
    return modular(diffusers.QwenImageAutoBlocks(), qwen().components)


def adapter() -> Any:
    """The network empties the list of the adapter's residuals that it is given."""
    residuals = seeded(
        lambda: diffusers.T2IAdapter(
            in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2,
            adapter_type="full_adapter",
        )
    )  # fmt: skip
    unet = seeded(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4,
        )
    )  # fmt: skip
    parts = {k: v for k, v in sd_parts(unet=unet).items() if k != "image_encoder"}
    return quiet(diffusers.StableDiffusionAdapterPipeline(**parts, adapter=residuals))


def modular_sdxl_inputs() -> dict[str, Any]:
    given = {k: v for k, v in tiny.sdxl_inputs().items() if k != "guidance_scale"}
    return {**given, **SIZE, "output": "latents"}


CASES: dict[str, Case] = {
    "LatentConsistencyModelPipeline": (
        latent_consistency,
        lambda: {**common(**SIZE), "prompt_embeds": embeddings(1, 7, 8, seed=1)}),
    "LTXConditionPipeline": (
        ltx_condition,
        lambda: {**common(height=32, width=32, num_frames=9), **prompts(7, 16, masks=True),
                 "image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(7))}),
    "StableDiffusionPipeline, IP-Adapter": (
        ip_adapter,
        lambda: {**tiny.sd_inputs(), **SIZE,
                 "ip_adapter_image_embeds": [embeddings(2, 1, 8, seed=9)]}),
    "StableDiffusionPipeline, LoRA": (
        lora, lambda: {**tiny.sd_inputs(), **SIZE, "cross_attention_kwargs": {"scale": 0.6}}),
    "StableDiffusionPipeline, DeepCache": (deep_cache, lambda: {**tiny.sd_inputs(), **SIZE}),
    "FluxPipeline, FirstBlockCache": (first_block_cache, tiny.flux_inputs),
    "FluxFillPipeline": (
        flux_fill,
        lambda: {**tiny.flux_inputs(), "image": PICTURE, "mask_image": mask()}),
    "CosmosTextToWorldPipeline": (
        lambda: cosmos("CosmosTextToWorld"),
        lambda: {**common(height=32, width=32, num_frames=9), **prompts(7, 16)}),
    "Cosmos2TextToImagePipeline": (
        lambda: cosmos("Cosmos2TextToImage"),
        lambda: {**common(height=16, width=16), **prompts(7, 16)}),
    "AnyFlowPipeline": (anyflow, lambda: {**common(**CLIP), **prompts(7, 32)}),
    "StableDiffusionXLModularPipeline": (modular_sdxl, modular_sdxl_inputs),
    "FluxModularPipeline": (modular_flux, lambda: {**tiny.flux_inputs(), "output": "latents"}),
    "WanModularPipeline": (
        modular_wan,
        lambda: {**CLIP, **prompts(7, 32), "generator": generator(), "output": "latents"}),
    "WanModularPipeline, skipped layers": (
        skipped_layers,
        lambda: {**CLIP, **prompts(7, 32), "generator": generator(), "output": "latents"}),
    "QwenImageModularPipeline": (
        modular_qwen,
        lambda: {**SIZE, **prompts(7, 16), "generator": generator(), "output": "latents",
                 "prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long),
                 "negative_prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long)}),
    "StableDiffusionAdapterPipeline": (
        adapter, lambda: {**tiny.sd_inputs(), **SIZE, "image": PICTURE}),
}  # fmt: skip
