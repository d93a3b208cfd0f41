"""Pictures of training, grids, quality and samples, drawn with matplotlib's Agg backend.

Every function returns the written path. matplotlib is imported on the first call: it is an extra.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..processes import Process
from ..support.files import replacing, require_writable
from ..support.transfer import to_host

LEARNED_COLOURS = (
    "#b3123c", "#d95f02", "#7b3294", "#1b7837", "#1f5fbf", "#8c6d00", "#111111", "#d64fa0",
)  # fmt: skip
HANDCRAFTED_COLOURS = ("#3b6ea5", "#4f9d9d", "#8a8a8a", "#a68a3d", "#6c7fb3", "#708238")
MARKERS = "osD^vP*X"
DRAWN = ("loss", "error", "rmse", "distance", "validation")
"""Words in the names of history columns worth a curve."""


def new_figure(width: float, height: float) -> Any:
    """A figure that belongs to no window system and to no global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install matplotlib (or 'dlms-engine[plots]')"
        ) from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def pillow() -> Any:
    """``PIL.Image``, which writes pictures without axes.

    Raises:
        ImportError: pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "pictures are written by pillow: pip install 'dlms-engine[plots]'; a .safetensors file "
            "needs nothing"
        ) from error
    return Image


def check_plot(path: str | os.PathLike[str]) -> None:
    """Ahead of the work: that ``write_figure`` can write there.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a suffix of no picture that it draws.
        OSError: the file cannot be written.
    """
    kinds = sorted(new_figure(1, 1).canvas.get_supported_filetypes())
    target = Path(path)
    if target.suffix.lstrip(".") not in ("", *kinds):
        raise ValueError(
            f"plot is {target}, expected a name that ends in one of {', '.join(kinds)}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    require_writable(target)


def write_figure(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Atomic: a reader never sees half a picture."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        figure.savefig(partial, format=target.suffix.lstrip(".") or "png")
    return target


def tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def loss_curve(
    history: Sequence[Mapping[str, float]],
    path: str | os.PathLike[str],
    *,
    step: str = "trajectories",
    title: str = "Distillation",
) -> Path:
    """Every numeric column of a training history against its ``step`` column, log axis.

    Args:
        history: one mapping a logged update, such as ``solver.history``.
        path: picture to write; its suffix chooses the format.
        step: column for the horizontal axis; the row number where it is absent.

    Raises:
        ValueError: the history holds no positive numbers.
    """
    columns = _numeric_columns(history, without=step)
    if not columns:
        raise ValueError("the history holds no positive numbers: nothing to draw")
    figure = new_figure(6.0, 3.6)
    axes = figure.subplots()
    for index, (name, points) in enumerate(columns.items()):
        at = [float(history[row].get(step, row)) for row, _ in points]
        colour = (*LEARNED_COLOURS, *HANDCRAFTED_COLOURS)[index % 14]
        axes.plot(at, [value for _, value in points], label=name, color=colour, linewidth=1.2)
    axes.set(xlabel=step, yscale="log", title=title)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    return write_figure(figure, path)


def _numeric_columns(
    history: Sequence[Mapping[str, Any]], without: str
) -> dict[str, list[tuple[int, float]]]:
    columns: dict[str, list[tuple[int, float]]] = {}
    for row, entry in enumerate(history):
        for name, value in entry.items():
            if name == without or not any(word in name for word in DRAWN):
                continue
            if not isinstance(value, int | float):
                continue
            if value > 0:
                columns.setdefault(name, []).append((row, float(value)))
    return columns


def grids(
    process: Process,
    handcrafted: Mapping[str, Tensor],
    learned: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    title: str = "Time grids",
) -> Path:
    """Noise levels sigma / alpha against the step index, as in Figure 4 of Liang et al. (2025).

    Args:
        handcrafted: label -> times ``[steps + 1]``, drawn dotted.
        learned: label -> times ``[steps + 1]``, or ``[B, steps + 1]`` for grids that differ a
            sample: then the geometric mean is drawn with the band from smallest to largest.
    """
    figure = new_figure(6.0, 4.0)
    axes = figure.subplots()
    for index, (label, times) in enumerate(handcrafted.items()):
        colour = HANDCRAFTED_COLOURS[index % len(HANDCRAFTED_COLOURS)]
        level = _noise_level(process, times)
        axes.plot(level, ":", label=label, color=colour, marker=".", linewidth=1.4)
    for index, (label, times) in enumerate(learned.items()):
        colour = LEARNED_COLOURS[index % len(LEARNED_COLOURS)]
        levels = _noise_level(process, times).reshape(-1, times.shape[-1])
        axes.plot(levels.log().mean(0).exp(), label=label, color=colour, marker="o", linewidth=1.8)
        if len(levels) > 1:
            low, high = levels.min(0).values, levels.max(0).values
            axes.fill_between(range(len(low)), low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="step", ylabel=r"$\sigma / \alpha$", yscale="log", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    return write_figure(figure, path)


def _noise_level(process: Process, times: Tensor) -> Tensor:
    """Sigma / alpha ``[..., steps + 1]`` float64 on the CPU; 0 would leave a log axis: lifted."""
    t = times.detach().to("cpu", torch.float64)
    level = torch.as_tensor(process.sigma(t)) / torch.as_tensor(process.alpha(t))
    return level.clamp_min(1e-5)


def quality(
    handcrafted: Mapping[str, Mapping[int, float]],
    learned: Mapping[str, Mapping[int, float]],
    path: str | os.PathLike[str],
    *,
    ylabel: str,
    title: str = "",
) -> Path:
    """Quality (lower is better) against network evaluations, log axis.

    Args:
        handcrafted: label -> {nfe: value}, drawn dotted.
        learned: label -> {nfe: value}, drawn solid.
    """
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    for index, (label, values) in enumerate(handcrafted.items()):
        colour = HANDCRAFTED_COLOURS[index % len(HANDCRAFTED_COLOURS)]
        _curve(axes, label, values, color=colour, linestyle=":", marker=MARKERS[index % 8])
    for index, (label, values) in enumerate(learned.items()):
        colour = LEARNED_COLOURS[index % len(LEARNED_COLOURS)]
        _curve(axes, label, values, color=colour, linestyle="-", marker="o", linewidth=2.0)
    axes.set(xlabel="network evaluations (NFE)", ylabel=ylabel, yscale="log", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    many = len(handcrafted) + len(learned) > 6  # beside the curves, not on them
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if many else {}
    axes.legend(frameon=False, fontsize=7, **beside)
    tidy(axes)
    return write_figure(figure, path)


def _curve(axes: Any, label: str, values: Mapping[int, float], **style: Any) -> None:
    at = sorted(values)
    axes.plot(at, [values[nfe] for nfe in at], label=label, markersize=4, **style)


def is_image(shape: Sequence[int]) -> bool:
    """Whether samples of ``shape`` can be drawn: ``[C, H, W]`` with one channel or three."""
    return len(shape) == 3 and shape[0] in (1, 3)


def to_uint8(images: Tensor) -> Tensor:
    """Images ``[B, C, H, W]`` in [-1, 1] -> uint8 ``[B, H, W, C]`` (C 1 or 3), rounded."""
    pixels = to_host(images).float().clamp(-1, 1).mul(127.5).add(127.5).round()
    return pixels.to(torch.uint8).permute(0, 2, 3, 1)


def tile(images: Tensor, columns: int, *, enlarge: int = 1, gap: int = 1) -> Tensor:
    """Images ``[B, C, H, W]`` in [-1, 1] -> one uint8 picture ``[rows, width, C]``, white gaps.

    Each pixel becomes ``enlarge`` x ``enlarge`` pixels: small images stay sharp.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images are {list(images.shape)}, expected [B, 1 or 3, H, W]")
    if columns < 1:
        raise ValueError(f"columns is {columns}, expected at least 1")
    pixels = to_uint8(images)
    pixels = pixels.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)
    canvas = pixels.new_full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255
    )
    for index in range(count):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = pixels[index]
    return canvas


def samples(
    images: Tensor, path: str | os.PathLike[str], *, columns: int = 8, enlarge: int = 4
) -> Path:
    """A plain grid of images ``[B, C, H, W]`` in [-1, 1], exact pixels, no axes."""
    image = pillow()
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas = tile(images, columns, enlarge=enlarge).numpy()
    picture = image.fromarray(canvas if canvas.shape[-1] == 3 else canvas[..., 0])
    with replacing(target) as partial:
        picture.save(partial, format=(target.suffix.lstrip(".") or "png").replace("jpg", "jpeg"))
    return target


def side_by_side(
    panels: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    columns: int = 4,
    enlarge: int = 4,
    title: str = "",
    across: int = 6,
) -> Path:
    """Sample grids next to each other, one labelled panel a sampler, the same seeds in each.

    Args:
        panels: label (may hold line breaks) -> images ``[B, C, H, W]`` in [-1, 1].
        across: panels in a line, at most.
    """
    canvases = {label: tile(images, columns, enlarge=enlarge) for label, images in panels.items()}
    height, width = next(iter(canvases.values())).shape[:2]
    panel_width = 2.6
    lines = -(-len(canvases) // across)
    across = -(-len(canvases) // lines)
    tall = panel_width * height / width + 0.3
    figure = new_figure(panel_width * across, lines * tall + 0.45)
    axes = figure.subplots(lines, across, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, (label, canvas) in zip(axes, canvases.items(), strict=False):
        axis.imshow(canvas.squeeze(-1).numpy(), cmap="gray", interpolation="nearest")
        axis.set_title(label, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    return write_figure(figure, path)
