"""A tiny diffusers Stable Diffusion pipeline's weights under the names of latent-diffusion files."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

RES = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _res(rest: str) -> str:
    name, _, end = rest.rpartition(".")
    return f"{RES[name]}.{end}"


def unet_key(key: str, layers: int, cross_ups: set[int]) -> str:
    """``layers`` residual blocks a level; ``cross_ups``: up blocks with attention."""
    for ours, theirs in (
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ):
        if key.startswith(ours + "."):
            return theirs + key[len(ours) :]
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key):
        place = {"resnets0": 0, "attentions0": 1, "resnets1": 2}[found[1] + found[2]]
        rest = _res(found[3]) if found[1] == "resnets" else found[3]
        return f"middle_block.{place}.{rest}"
    found = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key)
    assert found is not None, key
    side, block, kind, j, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    index = 1 + block * (layers + 1) + j if side == "down" else block * (layers + 1) + j
    name = "input_blocks" if side == "down" else "output_blocks"
    if kind == "resnets":
        return f"{name}.{index}.0.{_res(rest)}"
    if kind == "attentions":
        return f"{name}.{index}.1.{rest}"
    if kind == "downsamplers":
        return f"{name}.{index + layers}.0.{rest.replace('conv', 'op')}"
    return f"{name}.{index + layers}.{2 if block in cross_ups else 1}.{rest}"


def vae_key(key: str, levels: int) -> str:
    if not key.startswith(("encoder.", "decoder.")):
        return key  # quant_conv, post_quant_conv
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    key = re.sub(r"mid_block\.resnets\.0", "mid.block_1", key)
    key = re.sub(r"mid_block\.resnets\.1", "mid.block_2", key)
    if "mid_block.attentions.0" in key:
        for ours, theirs in ATTENTION.items():
            key = key.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)

    def up(found: Any) -> str:
        return f"up.{levels - 1 - int(found[1])}."

    key = re.sub(r"up_blocks\.(\d)\.", up, key)
    return key.replace("resnets", "block").replace("upsamplers.0", "upsample")


def ldm_state(pipe: Any) -> dict[str, Tensor]:
    """U-Net and autoencoder of ``pipe``, as a latent-diffusion file names them."""
    config = pipe.unet.config
    cross = {i for i, kind in enumerate(config.up_block_types) if "CrossAttn" in kind}
    unet = pipe.unet.state_dict().items()
    state = {
        f"model.diffusion_model.{unet_key(k, config.layers_per_block, cross)}": v for k, v in unet
    }
    levels = len(pipe.vae.config.block_out_channels)
    for key, value in pipe.vae.state_dict().items():
        name = vae_key(key, levels)
        # attention of the autoencoder is a 1x1 convolution there
        wide = ".mid.attn_1." in name and name.endswith(".weight") and value.ndim == 2
        state[f"first_stage_model.{name}"] = value[..., None, None] if wide else value
    return state
