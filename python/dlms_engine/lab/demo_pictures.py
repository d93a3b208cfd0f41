"""The demo's two pictures, for someone who has never heard of samplers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from .plots import LEARNED_COLOURS, new_figure, tidy, tile, write_figure

WHITE_AT = 0.2
"""Difference of values in [-1, 1] that is drawn at full strength: a tenth of the range."""


def compared(
    accurate: tuple[str, Tensor],
    others: Mapping[str, Tensor],
    path: Path,
    *,
    caption: str,
    columns: int = 4,
    enlarge: int = 4,
) -> Path:
    """The same seeds by every sampler, and below each how far it is from the accurate picture.

    Args:
        accurate: title and images ``[B, C, H, W]`` in [-1, 1].
        others: title -> images of the same seeds.
        caption: the sentence under the pictures.
    """
    panels = {accurate[0]: accurate[1], **others}
    pictures = {title: tile(images, columns, enlarge=enlarge) for title, images in panels.items()}
    height, width = next(iter(pictures.values())).shape[:2]
    side = 2.9
    text = within(caption, side * len(panels))
    below = 0.3 + 0.25 * len(text.splitlines())
    figure = new_figure(side * len(panels), 2 * (side * height / width + 0.45) + below)
    axes = figure.subplots(2, len(panels), squeeze=False)
    for axis in axes.flatten():
        axis.set_axis_off()
    for column, (title, picture) in enumerate(pictures.items()):
        axes[0][column].imshow(picture.squeeze(-1).numpy(), cmap="gray", interpolation="nearest")
        axes[0][column].set_title(title, fontsize=11)
    for column, images in enumerate(others.values(), start=1):
        strength = difference(images, accurate[1])
        map_ = tile(2 * strength - 1, columns, enlarge=enlarge)[..., 0]
        axes[1][column].imshow(
            map_.numpy(), cmap="magma", vmin=0, vmax=255, interpolation="nearest"
        )
        axes[1][column].set_title(
            f"difference to accurate: {picture_rmse(images, accurate[1]):.3f}", fontsize=10
        )
    axes[1][0].text(
        0.5, 0.5, "right: where each one\ndiffers from the accurate\npicture (black: nowhere)",
        ha="center", va="center", fontsize=10, transform=axes[1][0].transAxes,
    )  # fmt: skip
    figure.supxlabel(text, fontsize=12)
    return write_figure(figure, path)


def within(caption: str, inches: float) -> str:
    """``caption``, whose own lines stay, broken so that 12 points fit into ``inches``."""
    characters = int(inches * 72 / (12 * 0.62))  # of the default face, an average one and some air
    return "\n".join(textwrap.fill(line, characters) for line in caption.splitlines())


def difference(images: Tensor, accurate: Tensor) -> Tensor:
    """Mean absolute difference over the channels, ``[B, 1, H, W]`` in [0, 1], 1 at ``WHITE_AT``."""
    return ((images - accurate).abs().mean(1, keepdim=True) / WHITE_AT).clamp(max=1)


def picture_rmse(images: Tensor, accurate: Tensor) -> float:
    """Root of the mean squared difference of all values."""
    return float((images.double() - accurate.double()).square().mean().sqrt())


def learning_curve(
    errors: Sequence[float], baselines: Mapping[str, float], path: Path, *, title: str
) -> Path:
    """Endpoint RMSE after each round of learning, one line; what is not learned as dashed lines.

    Args:
        errors: before the first round, after it, after the next, ...
        baselines: label -> endpoint RMSE.
    """
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    axes.plot(
        range(len(errors)), errors, color=LEARNED_COLOURS[0], marker="o", linewidth=1.8,
        label="distilled, on the samples it learns from",
    )  # fmt: skip
    for index, (label, value) in enumerate(baselines.items()):
        style = ("--", "-.", ":")[index % 3]
        axes.axhline(value, color="#555555", linestyle=style, linewidth=1.2, label=label)
    axes.set(
        xlabel="rounds of learning",
        ylabel="distance to the accurate picture\n(root mean square, values in [-1, 1])",
        yscale="log",
        title=title,
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "1235" else "")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    tidy(axes)
    return write_figure(figure, path)
