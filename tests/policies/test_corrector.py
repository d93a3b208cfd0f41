"""The corrector: zero before training, batch-invariant, in the file, the sampler and the export."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dlms_engine import Denoiser, Sampler, load_solver, save, solvers
from dlms_engine.engine.export import SamplerModule
from dlms_engine.policies.corrector import (
    CorrectedPolicy,
    Corrector,
    CorrectorSettings,
    layout_of,
    read_corrector,
)
from dlms_engine.processes import EDM, grids
from dlms_engine.solvers.file import SolverFileError

SHAPES = {"image": (3, 6, 5), "sequence": (7, 4), "vector": (5,)}


def network(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * 0.7


def policy(layout: str, *, trained: bool = True, rows: int = 1) -> tuple[Denoiser, CorrectedPolicy]:
    """Correctors of the last ``rows`` of four rows."""
    process = EDM()
    table = solvers.ipndm(process, grids.polynomial(process, 4), order=3)
    shape = SHAPES[layout]
    channels = shape[1] if layout == "sequence" else shape[0]
    torch.manual_seed(0)
    parts = []
    for n in range(4 - rows, 4):
        outputs = min(n + 1, 3)
        corrector = Corrector(CorrectorSettings(layout, channels, outputs, width=8))
        if trained:
            for parameter in corrector.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
            corrector.scales.copy_(torch.tensor([0.5, 2.0, 1.0, 1.5])[: 1 + outputs])
        parts.append(corrector)
    return Denoiser(network, process, "data"), CorrectedPolicy(table, parts)


@pytest.mark.parametrize("layout", SHAPES)
def test_untrained_corrector_changes_nothing(layout: str) -> None:
    denoiser, corrected = policy(layout, trained=False)
    x = 80 * torch.randn(3, *SHAPES[layout])
    assert torch.equal(Sampler(denoiser, corrected)(x), Sampler(denoiser, corrected.rows)(x))
    denoiser, corrected = policy(layout)  # planted: a trained one does
    assert not torch.equal(Sampler(denoiser, corrected)(x), Sampler(denoiser, corrected.rows)(x))


@pytest.mark.parametrize("correctors", [1, 4])
@pytest.mark.parametrize("layout", SHAPES)
def test_sampler_export_and_definition_agree(layout: str, correctors: int) -> None:
    denoiser, corrected = policy(layout, rows=correctors)
    x = 80 * torch.randn(3, *SHAPES[layout])
    rows, history, state = corrected.rows, list[Tensor](), x
    for n in range(rows.nfe):
        history.insert(0, denoiser.predict(state, rows.times[n], rows.prediction))
        state = float(rows.a[n]) * state
        for k, m in enumerate(history[: rows.depth]):
            state = state + float(rows.b[n, k]) * m
        if n >= rows.nfe - correctors:
            state = corrected.parts[n - (rows.nfe - correctors)](state, history[: rows.depth])
    expected = state
    sampler = Sampler(denoiser, corrected)
    for found in (
        sampler(x),
        Sampler(denoiser, corrected, backend="eager")(x),
        SamplerModule(sampler, torch.device("cpu"))(x),
        sampler(x, return_trajectory=True)[1][-1],
    ):
        assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    if correctors > 1:  # planted: a run without those of earlier rows is another one
        last = CorrectedPolicy(corrected.rows, corrected.parts[-1])
        assert float((Sampler(denoiser, last)(x) - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("layout", SHAPES)
def test_a_sample_is_the_same_alone_and_in_a_batch(layout: str) -> None:
    denoiser, corrected = policy(layout)
    sampler = Sampler(denoiser, corrected)
    x = 80 * torch.randn(5, *SHAPES[layout])
    whole = sampler(x)
    alone = torch.cat([sampler(x[i : i + 1]) for i in range(5)])
    assert float((whole - alone).abs().max()) < 1e-5 * float(whole.abs().max())


@pytest.mark.parametrize("correctors", [1, 3])
@pytest.mark.parametrize("layout", SHAPES)
def test_file_gives_the_same_samples(layout: str, correctors: int, tmp_path: Path) -> None:
    denoiser, corrected = policy(layout, rows=correctors)
    path = save(tmp_path / "s.safetensors", corrected)
    again = load_solver(path)
    x = 80 * torch.randn(2, *SHAPES[layout])
    assert torch.equal(Sampler(denoiser, again)(x), Sampler(denoiser, corrected)(x))
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(SolverFileError):
        load_solver(path)


def test_settings_and_numbers_that_do_not_fit_are_refused() -> None:
    _, corrected = policy("vector")
    state = corrected.parts[-1].state_dict()
    good = {"layout": "vector", "channels": 5, "outputs": 3, "width": 8, "layers": 3}
    read_corrector(dict(state), good)
    for key, value in (
        ("layout", "cube"), ("channels", 0), ("outputs", 2), ("width", 10**6), ("layers", 900),
        ("layers", True),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"corrector|layout|expected"):
            read_corrector(dict(state), {**good, key: value})
    with pytest.raises(ValueError, match="not finite"):
        read_corrector({**state, "gain": torch.tensor(float("nan"))}, good)
    with pytest.raises(ValueError, match="positive"):
        read_corrector({**state, "scales": torch.zeros(4)}, good)


def test_more_outputs_than_the_rows_keep_are_refused() -> None:
    _, corrected = policy("vector")
    deep = Corrector(CorrectorSettings("vector", 5, 4))
    with pytest.raises(ValueError, match="rows keep 3"):
        CorrectedPolicy(corrected.rows, deep)


def test_too_many_correctors_or_outputs_of_an_early_row_are_refused() -> None:
    _, corrected = policy("vector", rows=4)
    with pytest.raises(ValueError, match="expected 1 to 4"):
        CorrectedPolicy(corrected.rows, [corrected.parts[0], *corrected.parts])
    with pytest.raises(ValueError, match="corrector of row 0 reads 3 outputs"):
        CorrectedPolicy(corrected.rows, corrected.parts[::-1])


def test_layouts() -> None:
    assert [layout_of((3, 4, 4)), layout_of((4, 4)), layout_of((4,))] == list(SHAPES)
    assert layout_of((3, 2, 4, 4)) is None


@pytest.mark.parametrize("layout", SHAPES)
def test_half_precision_around_it_does_not_reach_it(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast made its convolutions bfloat16's, a cast of the sampler its weights."""
    denoiser, corrected = policy(layout)
    sampler, x = Sampler(denoiser, corrected), 80 * torch.randn(3, *SHAPES[layout])
    wanted = sampler(x)

    def autocast() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            made = sampler(x)
        assert isinstance(made, Tensor)
        return made

    assert torch.equal(autocast(), wanted)
    cast = copy.deepcopy(sampler).to(torch.bfloat16)
    assert torch.equal(cast(x), wanted)
    with monkeypatch.context() as planted:
        planted.setattr(torch, "is_autocast_enabled", lambda kind: False)
        assert not torch.equal(autocast(), wanted)
    monkeypatch.delattr(Corrector, "_apply")
    assert not torch.equal(copy.deepcopy(sampler).to(torch.bfloat16)(x), wanted)


@pytest.mark.parametrize("layout", SHAPES)
def test_other_samples_than_it_was_trained_on_are_refused(layout: str) -> None:
    """torch spoke of the sizes of its weights."""
    denoiser, corrected = policy(layout)
    shape = SHAPES[layout]
    axis = 1 if layout == "sequence" else 0
    other = [*shape[:axis], shape[axis] + 1, *shape[axis + 1 :]]
    sampler = Sampler(denoiser, corrected)
    for wrong in (other, [*shape, 3]):
        with pytest.raises(ValueError, match=f"was trained on {layout}s of {shape[axis]} channels"):
            sampler(torch.randn(2, *wrong))
    assert sampler(torch.randn(2, *shape)).shape == (2, *shape)
