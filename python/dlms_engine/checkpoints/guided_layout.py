"""From a guided-diffusion state dict to its network.

A state dict says how many layers there are and how wide, not how many heads share them: that is an
argument, under the name of the published flag.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .networks import GuidedClassifier, GuidedUNet

ARCHITECTURE = ("num_heads", "num_head_channels", "num_heads_upsample", "use_new_attention_order")


def infer_settings(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments that a U-Net's or classifier's state dict determines.

    Raises:
        ValueError: not a state dict of these networks.
    """
    try:
        width = tensors["time_embed.0.weight"].shape[1]
        first = tensors["input_blocks.0.0.weight"]
        blocks = 1 + max(_numbers(tensors, r"input_blocks\.(\d+)\."))
        levels = _levels(tensors, blocks)
        each = blocks // levels - 1
        starts = [1 + level * (each + 1) for level in range(levels)]
        outputs = [tensors[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0] for i in starts]
        projected = tensors["input_blocks.1.0.emb_layers.1.weight"].shape[0]
        qkv = tensors["middle_block.1.qkv.weight"]
    except (KeyError, ValueError, IndexError) as exc:
        raise ValueError(
            f"not the weights of a guided-diffusion U-Net or classifier: {exc}"
        ) from exc
    mults = [_ratio(channels, width) for channels in outputs]
    found: dict[str, Any] = {
        "in_channels": first.shape[1],
        "model_channels": width,
        "num_res_blocks": each,
        "channel_mult": mults,
        "attention_resolutions": [
            2**level
            for level, i in enumerate(starts)
            if f"input_blocks.{i}.1.qkv.weight" in tensors
        ],
        "use_scale_shift_norm": projected == 2 * outputs[0],
        "resblock_updown": levels > 1 and f"input_blocks.{each + 1}.0.op.weight" not in tensors,
        "attention_dims": qkv.ndim - 2,
    }
    return {**found, **(_unet(tensors) if _is_unet(tensors) else _classifier(tensors, levels))}


def _numbers(tensors: Mapping[str, Tensor], pattern: str) -> list[int]:
    return [int(match[1]) for key in tensors if (match := re.match(pattern, key))]


def _ratio(channels: int, width: int) -> float:
    return channels // width if channels % width == 0 else channels / width


def _is_unet(tensors: Mapping[str, Tensor]) -> bool:
    return "output_blocks.0.0.in_layers.0.weight" in tensors


def _levels(tensors: Mapping[str, Tensor], blocks: int) -> int:
    """How many resolutions: a level has as many blocks as stand before the first change of it."""
    if _is_unet(tensors):
        rising = [i for i in _numbers(tensors, r"output_blocks\.(\d+)\.") if _rises(tensors, i)]
        each = min(rising, default=blocks - 1) + 1
    else:
        each = _each_of_encoder(tensors)
    if blocks % each:
        raise ValueError(f"{blocks} blocks do not divide into levels of {each}")
    return blocks // each


def _rises(tensors: Mapping[str, Tensor], i: int) -> bool:
    """Whether output block ``i`` ends in an upsampling."""
    return any(
        f"output_blocks.{i}.{place}.{name}" in tensors
        for place in (1, 2)
        for name in ("conv.weight", "in_layers.2.weight")
    )


def _each_of_encoder(tensors: Mapping[str, Tensor]) -> int:
    """Blocks of a level with its downsampling, from the convolutions or from the attention.

    A downsampling residual block looks like any other, but has no attention: a run of attending
    blocks is a level without it.
    """
    strided = _numbers(tensors, r"input_blocks\.(\d+)\.0\.op\.")
    if strided:
        return min(strided)
    attending = set(_numbers(tensors, r"input_blocks\.(\d+)\.1\.qkv\."))
    if not attending:
        raise ValueError("the levels of a classifier without attention cannot be inferred")
    start = min(attending)
    end = next(i for i in range(start, start + len(attending) + 1) if i not in attending)
    return end - start + 1


def _unet(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    labels = tensors.get("label_emb.weight")
    return {
        "out_channels": tensors["out.2.weight"].shape[0],
        "num_classes": None if labels is None else labels.shape[0],
    }


def _classifier(tensors: Mapping[str, Tensor], levels: int) -> dict[str, Any]:
    positions = tensors.get("out.2.positional_embedding")
    if positions is None:
        last = tensors.get("out.3.weight")
        if last is None:
            raise ValueError("a classifier with this pooling is not known")
        return {"pool": "adaptive", "out_channels": last.shape[0], "image_size": 0}
    side = round((positions.shape[1] - 1) ** 0.5)
    return {
        "pool": "attention",
        "out_channels": tensors["out.2.c_proj.weight"].shape[0],
        "image_size": side << (levels - 1),
    }


def guided_settings(tensors: Mapping[str, Tensor], **architecture: Any) -> dict[str, Any]:
    """All constructor arguments of a state dict's network: inferred ones and ``architecture``.

    Args:
        architecture: what the tensors do not say: ``num_heads`` or ``num_head_channels``,
            ``num_heads_upsample``, ``use_new_attention_order``. The order defaults to the published
            one: new for 2D attention weights (consistency-model repository), else legacy.

    Raises:
        ValueError: unknown arguments, or tensors that do not fit.
    """
    unknown = sorted(set(architecture) - set(ARCHITECTURE))
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}, expected {', '.join(ARCHITECTURE)}")
    settings = infer_settings(tensors)
    given = {k: v for k, v in architecture.items() if v is not None}
    unet = _is_unet(tensors)
    if not {"num_heads", "num_head_channels"} & set(given):
        if unet:
            raise ValueError(
                "give num_heads or num_head_channels as in the checkpoint's flags: the weights do not "
                "say how many heads share them (64 channels a head, but for the 128x128 model's 4)"
            )
        given["num_head_channels"] = 64
    given.setdefault("use_new_attention_order", settings["attention_dims"] == 2)
    if not unet:
        given.pop("num_heads_upsample", None)
    return {**settings, **given}


def build_settings(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """A network from all its arguments, in evaluation mode; with ``pool`` it is a classifier."""
    kind = GuidedClassifier if "pool" in settings else GuidedUNet
    try:
        network: nn.Module = kind(**settings).float()  # whatever torch's default is
        network.load_state_dict(dict(tensors))
    except (RuntimeError, TypeError) as exc:
        raise ValueError(
            f"the weights do not fit {kind.__name__}({dict(settings)}): {exc}"
        ) from exc
    return network.eval().requires_grad_(False)
