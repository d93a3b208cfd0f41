"""guided-diffusion's networks as plain functions of a state dict: an independent second writing.

Follows the published flags and tensor names; nothing of ``dlms_engine`` is used.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def shapes(flags: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a U-Net or classifier with these flags."""
    found: dict[str, tuple[int, ...]] = {}
    base, blocks = flags["model_channels"], flags["num_res_blocks"]
    width_of = [int(m * base) for m in flags["channel_mult"]]
    told = 4 * base
    kernel = (1,) * flags.get("attention_dims", 1)

    def put(name: str, out: int, into: int, *rest: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (out, into, *rest), (out,)

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"] = found[f"{name}.bias"] = (width,)

    def res(name: str, into: int, out: int) -> None:
        norm(f"{name}.in_layers.0", into)
        put(f"{name}.in_layers.2", out, into, 3, 3)
        put(f"{name}.emb_layers.1", out * (2 if flags["use_scale_shift_norm"] else 1), told)
        norm(f"{name}.out_layers.0", out)
        put(f"{name}.out_layers.3", out, out, 3, 3)
        if into != out:
            put(f"{name}.skip_connection", out, into, 1, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        put(f"{name}.qkv", 3 * width, width, *kernel)
        put(f"{name}.proj_out", width, width, *kernel)

    put("time_embed.0", told, base)
    put("time_embed.2", told, told)
    if flags.get("num_classes"):
        found["label_emb.weight"] = (flags["num_classes"], told)
    width = width_of[0]
    put("input_blocks.0.0", width, flags["in_channels"], 3, 3)
    stack, index, factor = [width], 1, 1
    for level, target in enumerate(width_of):
        for _ in range(blocks):
            res(f"input_blocks.{index}.0", width, target)
            width = target
            if factor in flags["attention_resolutions"]:
                attention(f"input_blocks.{index}.1", width)
            stack.append(width)
            index += 1
        if level + 1 < len(width_of):
            if flags["resblock_updown"]:
                res(f"input_blocks.{index}.0", width, width)
            else:
                put(f"input_blocks.{index}.0.op", width, width, 3, 3)
            stack.append(width)
            index, factor = index + 1, factor * 2
    res("middle_block.0", width, width)
    attention("middle_block.1", width)
    res("middle_block.2", width, width)
    if "pool" in flags:
        norm("out.0", width)
        if flags["pool"] == "attention":
            side = flags["image_size"] // factor
            found["out.2.positional_embedding"] = (width, side * side + 1)
            put("out.2.qkv_proj", 3 * width, width, 1)
            put("out.2.c_proj", flags["out_channels"], width, 1)
        else:
            put("out.3", flags["out_channels"], width, 1, 1)
        return found
    index = 0
    for level in range(len(width_of) - 1, -1, -1):
        for i in range(blocks + 1):
            res(f"output_blocks.{index}.0", width + stack.pop(), width_of[level])
            width, place = width_of[level], 1
            if factor in flags["attention_resolutions"]:
                attention(f"output_blocks.{index}.1", width)
                place = 2
            if level > 0 and i == blocks:
                if flags["resblock_updown"]:
                    res(f"output_blocks.{index}.{place}", width, width)
                else:
                    put(f"output_blocks.{index}.{place}.conv", width, width, 3, 3)
                factor //= 2
            index += 1
    norm("out.0", width)
    put("out.2", flags["out_channels"], width_of[0], 3, 3)
    return found


def random_state(flags: dict[str, Any], seed: int = 0) -> State:
    """Weights small enough that activations stay of order one, norms near the identity."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in shapes(flags).items():
        fan = math.prod(shape[1:]) if len(shape) > 1 else 4
        state[name] = torch.randn(shape, generator=generator) / math.sqrt(fan)
        if len(shape) == 1 and name.endswith("weight"):
            state[name] = 1 + 0.2 * state[name]
    return state


class Reference:
    """Evaluates ``flags`` on ``state``."""

    def __init__(self, state: State, flags: dict[str, Any]) -> None:
        self.s, self.flags = state, flags

    def conv(self, name: str, x: Tensor, **more: Any) -> Tensor:
        return F.conv2d(x, self.s[f"{name}.weight"], self.s[f"{name}.bias"], **more)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.s[f"{name}.weight"], self.s[f"{name}.bias"], 1e-5)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.s[f"{name}.weight"].T + self.s[f"{name}.bias"]

    def times(self, t: Tensor) -> Tensor:
        half = self.flags["model_channels"] // 2
        rates = torch.tensor([10000.0 ** (-i / half) for i in range(half)], dtype=t.dtype)
        angles = t[:, None] * rates[None]
        told = self.linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1))
        return self.linear("time_embed.2", told * told.sigmoid())

    def res(self, name: str, x: Tensor, emb: Tensor, resize: str = "") -> Tensor:
        h = F.silu(self.norm(f"{name}.in_layers.0", x))
        if resize:
            h, x = self.resized(h, resize), self.resized(x, resize)
        h = self.conv(f"{name}.in_layers.2", h, padding=1)
        told = self.linear(f"{name}.emb_layers.1", F.silu(emb))[..., None, None]
        if self.flags["use_scale_shift_norm"]:
            half = told.shape[1] // 2
            h = self.norm(f"{name}.out_layers.0", h) * (1 + told[:, :half]) + told[:, half:]
        else:
            h = self.norm(f"{name}.out_layers.0", h + told)
        h = self.conv(f"{name}.out_layers.3", F.silu(h), padding=1)
        if f"{name}.skip_connection.weight" in self.s:
            x = self.conv(f"{name}.skip_connection", x)
        return x + h

    @staticmethod
    def resized(x: Tensor, how: str) -> Tensor:
        if how == "up":
            return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return (
            x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]
        ) / 4

    def heads(self, channels: int, up: bool = False) -> int:
        if self.flags.get("num_head_channels", -1) != -1:
            return channels // self.flags["num_head_channels"]
        upper = self.flags.get("num_heads_upsample", -1)
        return upper if up and upper != -1 else self.flags["num_heads"]

    def mixed(self, packed: Tensor, heads: int, split_first: bool) -> Tensor:
        """Head by head, query by query."""
        batch, width, _ = packed.shape
        per = width // (3 * heads)
        out = []
        for h in range(heads):
            if split_first:  # q of all heads, then k of all heads, then v
                q, k, v = (
                    packed[:, part * heads * per + h * per : part * heads * per + (h + 1) * per]
                    for part in range(3)
                )
            else:  # q, k, v of the first head, then of the second
                q, k, v = (
                    packed[:, h * 3 * per + part * per : h * 3 * per + (part + 1) * per]
                    for part in range(3)
                )
            scores = torch.einsum("bct,bcs->bts", q, k) / math.sqrt(per)
            out.append(torch.einsum("bts,bcs->bct", scores.softmax(-1), v))
        assert len(out) * per * 3 == width and batch == out[0].shape[0]
        return torch.cat(out, 1)

    def attention(self, name: str, x: Tensor, up: bool = False) -> Tensor:
        flat = x.flatten(2)
        weight = self.s[f"{name}.qkv.weight"].flatten(1)
        packed = torch.einsum("oc,bct->bot", weight, self.norm(f"{name}.norm", flat))
        packed = packed + self.s[f"{name}.qkv.bias"][:, None]
        order = self.flags["use_new_attention_order"]
        h = self.mixed(packed, self.heads(x.shape[1], up), order)
        out = torch.einsum("oc,bct->bot", self.s[f"{name}.proj_out.weight"].flatten(1), h)
        return x + (out + self.s[f"{name}.proj_out.bias"][:, None]).reshape(x.shape)

    def down(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        f = self.flags
        h = self.conv("input_blocks.0.0", x, padding=1)
        kept, index, factor = [h], 1, 1
        for level in range(len(f["channel_mult"])):
            for _ in range(f["num_res_blocks"]):
                h = self.res(f"input_blocks.{index}.0", h, emb)
                if factor in f["attention_resolutions"]:
                    h = self.attention(f"input_blocks.{index}.1", h)
                kept.append(h)
                index += 1
            if level + 1 < len(f["channel_mult"]):
                name = f"input_blocks.{index}.0"
                if f["resblock_updown"]:
                    h = self.res(name, h, emb, "down")
                else:
                    h = self.conv(f"{name}.op", h, stride=2, padding=1)
                kept.append(h)
                index, factor = index + 1, factor * 2
        h = self.res("middle_block.0", h, emb)
        h = self.attention("middle_block.1", h)
        return self.res("middle_block.2", h, emb), kept

    def unet(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        f = self.flags
        emb = self.times(t)
        if labels is not None:
            emb = emb + self.s["label_emb.weight"][labels]
        h, kept = self.down(x, emb)
        index, factor = 0, 2 ** (len(f["channel_mult"]) - 1)
        for level in range(len(f["channel_mult"]) - 1, -1, -1):
            for i in range(f["num_res_blocks"] + 1):
                h = self.res(f"output_blocks.{index}.0", torch.cat([h, kept.pop()], 1), emb)
                place = 1
                if factor in f["attention_resolutions"]:
                    h = self.attention(f"output_blocks.{index}.1", h, up=True)
                    place = 2
                if level and i == f["num_res_blocks"]:
                    name = f"output_blocks.{index}.{place}"
                    if f["resblock_updown"]:
                        h = self.res(name, h, emb, "up")
                    else:
                        h = self.conv(f"{name}.conv", self.resized(h, "up"), padding=1)
                    factor //= 2
                index += 1
        return self.conv("out.2", F.silu(self.norm("out.0", h)), padding=1)

    def classifier(self, x: Tensor, t: Tensor) -> Tensor:
        h, _ = self.down(x, self.times(t))
        h = F.silu(self.norm("out.0", h))
        if self.flags["pool"] == "adaptive":
            return self.conv("out.3", h.mean((2, 3), keepdim=True))[:, :, 0, 0]
        flat = h.flatten(2)
        flat = torch.cat([flat.mean(2, keepdim=True), flat], 2)
        flat = flat + self.s["out.2.positional_embedding"]
        packed = torch.einsum("oc,bct->bot", self.s["out.2.qkv_proj.weight"][..., 0], flat)
        packed = packed + self.s["out.2.qkv_proj.bias"][:, None]
        h = self.mixed(packed, self.heads(flat.shape[1]), True)
        out = torch.einsum("oc,bct->bot", self.s["out.2.c_proj.weight"][..., 0], h)
        return out[:, :, 0] + self.s["out.2.c_proj.bias"]
