"""EDM's augmentation: what each label does to an image, and that nothing happens without labels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def augmentation(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import augment

    return augment


def blob(size: int = 32, centre: tuple[float, float] = (0.3, -0.2)) -> torch.Tensor:
    """A smooth spot ``[1, 1, size, size]`` at (x, y) in [-1, 1] coordinates."""
    line = (torch.arange(size) + 0.5) * 2 / size - 1
    x, y = line[None, :] - centre[0], line[:, None] - centre[1]
    return torch.exp(-(x**2 + y**2) / (2 * 0.1**2))[None, None]


def centre_of(image: torch.Tensor) -> tuple[float, float]:
    size = image.shape[-1]
    line = (torch.arange(size) + 0.5) * 2 / size - 1
    mass = image[0, 0].clamp(min=0)
    return (
        float((mass.sum(0) * line).sum() / mass.sum()),
        float((mass.sum(1) * line).sum() / mass.sum()),
    )


def labels(**values: float) -> torch.Tensor:
    names = ["flip", "vertical", "scale", "cos", "sin", "along_x", "along_y", "x", "y"]
    return torch.tensor([[values.get(name, 0.0) for name in names]])


QUARTER = {"cos": math.cos(math.pi / 2) - 1, "sin": math.sin(math.pi / 2)}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, (0.3, -0.2)),
        ({"vertical": 1.0}, (0.3, 0.2)),
        ({"scale": 2.5}, (0.3 * 2**0.5, -0.2 * 2**0.5)),
        (QUARTER, (0.2, 0.3)),
        ({"along_x": 2.5}, (0.3 * 2**0.5, -0.2 / 2**0.5)),
        ({"along_y": 2.5}, (0.3 / 2**0.5, -0.2 * 2**0.5)),
        ({"x": 1.0, "y": -1.0}, (0.55, -0.45)),  # an eighth of 2
        ({"scale": 2.5, "x": -1.0}, (0.3 * 2**0.5 - 0.25, -0.2 * 2**0.5)),  # the shift comes last
    ],
)
def test_a_spot_goes_where_its_labels_say(
    augmentation: Any, told: dict[str, float], expected: tuple[float, float]
) -> None:
    moved = augmentation.warp(blob(), augmentation.inverse_map(labels(**told)))
    assert centre_of(moved) == pytest.approx(expected, abs=0.01)


def test_the_inverse_map_is_seen_to_be_inverse(augmentation: Any) -> None:
    """The planted fault of the test above: the map the wrong way round."""
    where = augmentation.inverse_map(labels(scale=2.5))
    where = torch.cat([torch.linalg.inv(where[:, :, :2]), where[:, :, 2:]], 2)
    assert centre_of(augmentation.warp(blob(), where)) != pytest.approx(
        (0.3 * 2**0.5, -0.2 * 2**0.5), abs=0.05
    )


def test_probability_zero_leaves_images_but_for_flips(augmentation: Any) -> None:
    x = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    out, told = augmentation.augment(x, 0.0, torch.Generator().manual_seed(1))
    assert told.shape == (64, 9)
    assert torch.all(told[:, 1:] == 0)
    flipped = told[:, 0] == 1
    assert 10 < int(flipped.sum()) < 54
    assert torch.equal(out[flipped], x[flipped].flip(3))
    assert torch.equal(out[~flipped], x[~flipped])


def test_each_transformation_has_its_probability(augmentation: Any) -> None:
    _, told = augmentation.draw(20_000, 0.12, torch.Generator().manual_seed(2))
    used = (told != 0).double().mean(0)
    expected = torch.tensor([0.5, 0.06, 0.12, 0.12, 0.12, 0.12, 0.12, 0.12, 0.12])
    assert used.tolist() == pytest.approx(expected.tolist(), abs=0.01)
    again = augmentation.draw(20_000, 0.12, torch.Generator().manual_seed(2))[1]
    assert torch.equal(told, again)
    together = (told[:, 7] != 0) == (told[:, 8] != 0)
    assert bool(together.all())  # both shifts belong to one transformation


def test_values_stay_near_the_image(augmentation: Any) -> None:
    x = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    out, told = augmentation.augment(x, 1.0, torch.Generator().manual_seed(4))
    assert bool((told[:, 2] != 0).all())
    assert out.isfinite().all() and float(out.abs().max()) < 1.5  # the cubic overshoots a little
    assert not torch.equal(out, x)
