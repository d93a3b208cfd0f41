"""Pictures: the pixels of a grid of samples, what is drawn in the plots, and atomic writing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from dlms_engine import grids, plots, processes
from dlms_engine.lab import demo_pictures

pytest.importorskip("matplotlib")
EDM = processes.EDM()


def test_tile_puts_every_pixel_where_it_belongs() -> None:
    images = torch.linspace(-1, 1, 3 * 3 * 2 * 2, dtype=torch.float64).reshape(3, 3, 2, 2)
    canvas = plots.tile(images, columns=2, enlarge=3, gap=1)
    assert canvas.shape == (2 * 6 + 1, 2 * 6 + 1, 3)
    third = canvas[7:13, 0:6]
    expected = ((images[2] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    assert torch.equal(third[::3, ::3], expected)
    assert torch.equal(third, expected.repeat_interleave(3, 0).repeat_interleave(3, 1))
    assert bool((canvas[6] == 255).all()) and bool((canvas[7:, 7:] == 255).all())


def test_out_of_range_values_are_clamped_not_wrapped() -> None:
    images = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0]).reshape(5, 1, 1, 1)
    assert plots.to_uint8(images).flatten().tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 4, 4, 4)])
def test_tile_refuses_what_is_no_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        plots.tile(torch.zeros(shape), columns=1)


def test_samples_file_holds_the_exact_pixels(tmp_path: Path) -> None:
    images = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)) * 2 - 1
    path = plots.samples(images, tmp_path / "new" / "grid.png", columns=2, enlarge=2)
    with Image.open(path) as picture:
        found = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        assert picture.size == (21, 21)
    assert torch.equal(found.reshape(21, 21, 3), plots.tile(images, 2, enlarge=2))
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]


def _drawn(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The figures that are written from here on."""
    figures: list[object] = []
    write = plots.write_figure

    def keep(figure: object, path: object) -> Path:
        figures.append(figure)
        return write(figure, path)  # type: ignore[arg-type]

    monkeypatch.setattr(plots, "write_figure", keep)
    return figures


def test_loss_curve_draws_losses_and_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = _drawn(monkeypatch)
    history = [
        {"update": 0, "validation/raw": 2.0},
        {"update": 5, "loss": 1.0, "lr": 0.1, "describe": {}},
        {"update": 10, "loss": 0.5, "validation/raw": 1.0},
    ]
    plots.loss_curve(history, tmp_path / "loss.png", step="update")
    (axes,) = figures[0].axes  # type: ignore[attr-defined]
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves == {
        "validation/raw": [[0, 2.0], [10, 1.0]],
        "loss": [[5, 1.0], [10, 0.5]],
    }
    assert axes.get_yscale() == "log"


def test_loss_curve_refuses_an_empty_history(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.loss_curve([{"update": 1, "loss": math.nan}], tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())


def test_grids_draws_noise_levels_and_the_band_of_per_sample_grids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = _drawn(monkeypatch)
    handcrafted = grids.polynomial(EDM, 3)
    learned = torch.tensor([[80.0, 4.0, 1.0, 0.002], [80.0, 1.0, 1.0, 0.002]], dtype=torch.float64)
    plots.grids(EDM, {"rho 7": handcrafted}, {"DLMS": learned}, tmp_path / "grid.png")
    (axes,) = figures[0].axes  # type: ignore[attr-defined]
    curves = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert curves["rho 7"] == pytest.approx(handcrafted.tolist())
    assert curves["DLMS"] == pytest.approx([80.0, 2.0, 1.0, 0.002])  # geometric mean
    assert len(axes.collections) == 1
    assert axes.get_yscale() == "log"


def test_grids_ending_at_zero_noise_stay_on_the_axis(tmp_path: Path) -> None:
    flow = processes.RectifiedFlow()
    times = torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    assert plots.grids(flow, {"uniform": times}, {}, tmp_path / "grid.png").exists()


def test_quality_sorts_by_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = _drawn(monkeypatch)
    plots.quality(
        {"ddim": {5: 0.2, 3: 0.4}},
        {"dlms": {5: 0.1}},
        tmp_path / "q.png",
        ylabel="RMSE",
    )
    (axes,) = figures[0].axes  # type: ignore[attr-defined]
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves["ddim"] == [[3, 0.4], [5, 0.2]]
    assert curves["dlms"] == [[5, 0.1]]


def test_side_by_side_labels_its_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = _drawn(monkeypatch)
    panels = {"accurate\n48": torch.zeros(4, 3, 8, 8), "DLMS\n5": torch.ones(4, 3, 8, 8)}
    path = plots.side_by_side(panels, tmp_path / "panels.png", columns=2)
    titles = [axes.get_title() for axes in figures[0].axes]  # type: ignore[attr-defined]
    assert titles == list(panels)
    with Image.open(path) as picture:
        assert picture.size[0] > picture.size[1]


def test_a_failed_write_leaves_the_old_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "q.png"
    plots.quality({"a": {3: 1.0}}, {}, path, ylabel="y")
    before = path.read_bytes()

    def fail(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.quality({"a": {3: 2.0}}, {}, path, ylabel="y")
    assert path.read_bytes() == before


def test_a_caption_ends_within_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ran out on both sides."""
    drawn = []
    monkeypatch.setattr(demo_pictures, "write_figure", lambda figure, _: drawn.append(figure))
    images = torch.zeros(4, 3, 4, 4)
    sentence = (
        "At 5 network calls the distilled sampler is 4.6 times closer to the accurate picture than "
        "the best untrained one (dpm_solver_pp2-flat/time_quadratic/afs-dockhorn);\nand 1.4 times "
        "further away than that with 10 calls."
    )

    def widths(text: str) -> tuple[float, float, float]:
        others = {str(count): images for count in range(3)}
        demo_pictures.compared(("accurate", images), others, tmp_path / "x.png", caption=text)
        figure = drawn[-1]
        figure.canvas.draw()
        box = figure._supxlabel.get_window_extent()
        return box.x0, box.x1, figure.bbox.x1

    low, high, whole = widths(sentence)
    assert low >= 0 and high <= whole
    titles = [axis.title.get_window_extent() for axis in drawn[-1].axes]
    assert all(title.y1 <= drawn[-1].bbox.y1 for title in titles)  # the upper ones were cut
    monkeypatch.setattr(demo_pictures, "within", lambda caption, _: caption)  # planted
    low, high, whole = widths(sentence)
    assert low < 0 and high > whole


def test_a_learning_curve_is_legible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The legend lay on the line of the best untrained sampler; values were 4 x 10^-2."""
    drawn = []
    monkeypatch.setattr(demo_pictures, "write_figure", lambda figure, _: drawn.append(figure))
    baselines = {"best without training, 5 network calls": 0.048, "of 10": 0.007}
    errors = [0.046, 0.03, 0.02, 0.015]
    demo_pictures.learning_curve(errors, baselines, tmp_path / "x.png", title="Learning")
    figure = drawn[-1]
    figure.canvas.draw()
    axes, (legend,) = figure.axes[0], figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    ticks = [*axes.yaxis.get_majorticklabels(), *axes.yaxis.get_minorticklabels()]
    said = {tick.get_text() for tick in ticks}
    assert {"0.01", "0.02", "0.03"} <= said
    assert all(not text or float(text) > 0 for text in said)
