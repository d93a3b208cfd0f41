"""Non-leaking augmentation of EDM (Karras et al. 2022, appendix F.2, Table 6).

Each transformation is applied to an image with some probability and its parameters are passed to the
network as 9 labels, all zero for an untouched image. Trained so, the network knows the augmented
images apart from the real ones, and with zero labels it draws real ones alone.

    label    transformation                        probability   parameter
    0        horizontal flip                       1             a uniform on {0, 1}
    1        vertical flip                         p             a uniform on {0, 1}
    2        scaling by 2^(0.2 a)                  p             a normal
    3, 4     rotation by a; cos a - 1, sin a       p             a uniform on [-pi, pi]
    5, 6     stretch by 2^(0.2 |a|) along b and    p             a normal, b uniform on [-pi, pi]
             squeeze across; |a| cos b, |a| sin b
    7, 8     shift by a/8 of width, b/8 of height  p             a, b normal

The map is computed from the labels, so that equal labels mean equal transformations; that is why
the stretch is never negative (squeezing along b is stretching across it). Horizontal flips are
exact; of the others, the composed affine map is sampled once, on twice as many points a side (cubic,
reflected at the borders) that are averaged by fours, against aliasing. The paper's pipeline low-pass
filters with a wavelet instead.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

LABELS = 9
STRETCH, SHIFT = 0.2, 0.125


def augment(x: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Augmented images and their labels.

    Args:
        x: float ``[B, C, H, W]``.
        probability: of each transformation but the horizontal flip, which always has 1/2.
        generator: on the device of ``x``; the draws are a function of its state.

    Returns:
        ``[B, C, H, W]`` and labels ``[B, 9]`` float32. An image whose labels 1 to 8 are zero is
        returned as it is or exactly flipped.
    """
    flip, labels = draw(len(x), probability, generator)
    x = torch.where(flip[:, None, None, None] > 0, x.flip(3), x)
    moved = warp(x, inverse_map(labels))
    untouched = (labels[:, 1:] == 0).all(1)
    x = torch.where(untouched[:, None, None, None], x, moved)
    return x.contiguous(memory_format=torch.channels_last), labels


def draw(count: int, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Horizontal flips ``[count]`` in {0, 1} and all labels ``[count, 9]``, float32."""
    device = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def normal() -> Tensor:
        return torch.randn(count, generator=generator, device=device)

    on = (uniform(5, count) < probability).float()
    flip = (uniform(count) < 0.5).float()
    vertical = (uniform(count) < 0.5).float() * on[0]
    scale = normal() * on[1]
    angle = (2 * uniform(count) - 1) * math.pi * on[2]
    stretch = normal().abs() * on[3]
    along = (2 * uniform(count) - 1) * math.pi
    shift_x, shift_y = normal() * on[4], normal() * on[4]
    columns = (
        flip, vertical, scale, angle.cos() - 1, angle.sin(), stretch * along.cos(),
        stretch * along.sin(), shift_x, shift_y,
    )  # fmt: skip
    return flip, torch.stack(columns, 1)


def inverse_map(labels: Tensor) -> Tensor:
    """``[B, 2, 3]``: where in the source, in [-1, 1] coordinates, each target point is read.

    The image is flipped, scaled, rotated, stretched and shifted in this order, so the point is
    shifted, squeezed, rotated, scaled and flipped back in the opposite one.
    """
    _, vertical, scale, cosine, sine, stretch_x, stretch_y, shift_x, shift_y = labels.unbind(1)
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)

    def matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return torch.stack([torch.stack([a, b], 1), torch.stack([c, d], 1)], 1)

    c, s = cosine + 1, sine
    shrink = torch.exp2(-STRETCH * scale)
    amount = torch.hypot(stretch_x, stretch_y)
    still = amount == 0
    along_x = torch.where(still, one, stretch_x / torch.where(still, one, amount))
    along_y = torch.where(still, zero, stretch_y / torch.where(still, one, amount))
    turn = matrix(along_x, -along_y, along_y, along_x)
    squeeze = matrix(torch.exp2(-STRETCH * amount), zero, zero, torch.exp2(STRETCH * amount))
    linear = (
        matrix(one, zero, zero, 1 - 2 * vertical)
        @ matrix(shrink, zero, zero, shrink)
        @ matrix(c, s, -s, c)
        @ turn
        @ squeeze
        @ turn.transpose(1, 2)
    )
    back = -2 * SHIFT * torch.stack([shift_x, shift_y], 1)  # an image is 2 units wide
    return torch.cat([linear, linear @ back[:, :, None]], 2)


def warp(x: Tensor, where: Tensor) -> Tensor:
    """Images ``[B, C, H, W]`` read through affine maps ``[B, 2, 3]``."""
    count, channels, height, width = x.shape
    shape = (count, channels, 2 * height, 2 * width)
    points = functional.affine_grid(where, list(shape), align_corners=False)
    dense = functional.grid_sample(
        x, points, mode="bicubic", padding_mode="reflection", align_corners=False
    )
    return functional.avg_pool2d(dense, 2)
