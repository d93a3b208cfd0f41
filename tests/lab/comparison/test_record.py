"""The record's parts: resuming, shared evaluations, the store, and floors that a perfect solver meets."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import cli_model
import pytest
import torch

from dlms_engine import solvers
from dlms_engine.lab.comparison import session
from dlms_engine.lab.comparison.measure import Entry, Measurer
from dlms_engine.lab.comparison.page import markdown
from dlms_engine.lab.comparison.record import RecordSettings, evaluate_one, record
from dlms_engine.lab.comparison.result import Sizes, best
from dlms_engine.lab.comparison.run import CompareSettings
from dlms_engine.lab.comparison.store import Store, digest, model_digest, network_digest
from dlms_engine.lab.evaluation.own_features import PixelFeatures
from dlms_engine.learners.start.problem import SamplingProblem
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.processes import EDM

pytest.importorskip("torchmetrics")
NFE = 3
SEEDS = range(10)


def entries() -> list[Entry]:
    process = cli_model.tiny().denoiser.process
    return [Entry(label, table) for label, table in solvers.handcrafted(process, NFE)][:6]


def measurer(folder: Path, batch: int = 4) -> Measurer:
    held = cli_model.tiny()
    assert held.features is not None
    return Measurer(held.denoiser, held.features, held.shape, Store(folder), batch=batch)


def numbers(found: list[object]) -> list[object]:
    return [(m.rmse, m.sums.total.tolist(), m.sums.outer.tolist()) for m in found]  # type: ignore[attr-defined]


def test_interrupted_measuring_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dlms_engine.lab.comparison import measure

    monkeypatch.setattr(measure, "SAVE_SECONDS", 0.0)
    exact = measurer(tmp_path / "whole").endpoints(12, SEEDS)
    whole = numbers(measurer(tmp_path / "whole").measure("m", entries(), SEEDS, exact))
    calls = 0
    forward = cli_model.TinyNetwork.forward

    def stop(self: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return forward(self, *inputs)

    monkeypatch.setattr(cli_model.TinyNetwork, "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        measurer(tmp_path / "killed").measure("m", entries(), SEEDS, exact)
    assert (tmp_path / "killed" / "m.safetensors").exists(), "killed before anything was saved"
    before = calls
    again = numbers(measurer(tmp_path / "killed").measure("m", entries(), SEEDS, exact))
    assert again == whole
    assert calls - before < 2 * 20 + 20, "everything was run again"


def test_other_seeds_or_solvers_are_not_taken_from_the_cache(tmp_path: Path) -> None:
    first = numbers(measurer(tmp_path).measure("m", entries(), SEEDS))
    assert numbers(measurer(tmp_path).measure("m", entries(), SEEDS)) == first
    assert numbers(measurer(tmp_path).measure("m", entries()[::-1], SEEDS)) == first[::-1]
    assert numbers(measurer(tmp_path).measure("m", entries(), range(1, 11))) != first


def half(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.5 * x


def third(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return x / 3


WEIGHTS = torch.nn.Conv2d(3, 3, 1)


class Weighed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = WEIGHTS

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: Any = None) -> torch.Tensor:
        out: torch.Tensor = self.inner(x) if label is None else self.inner(x) + label
        return out


GUIDED = {"unconditional": {"label": torch.zeros(1, 1, 1, 1)}}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "half": (half, {"prediction": "data"}),
    "third": (third, {"prediction": "data"}),
    "usual": (Weighed(), {}),
    "data": (Weighed(), {"prediction": "data"}),
    "sigma_data": (Weighed(), {"sigma_data": 1.0}),
    "time": (Weighed(), {"time_input": "t"}),
    "scale": (Weighed(), {"time_input": "t", "time_scale": 1000}),
    "thresholded": (Weighed(), {"dynamic_thresholding": 0.9}),
    "guided": (Weighed(), {"guidance_scale": 2.0, **GUIDED}),
    "more": (Weighed(), {"guidance_scale": 3.0, **GUIDED}),
}


def test_a_network_wrapped_otherwise_is_another_model() -> None:
    """The caches of ``evaluate`` and ``compare`` know a model by it; planted: the weights say nothing."""
    process, digests, weights = EDM(), {}, {}
    for name, (network, given) in MODELS.items():
        problem = SamplingProblem(Denoiser(network, process, **given), (3, 4, 4))
        digests[name] = model_digest(problem)
        weights[name] = network_digest(network)
        assert model_digest(problem) == digests[name]
    assert len(set(digests.values())) == len(MODELS)
    assert len(set(weights.values())) == 2
    # what is usual is not said: results of before are found again
    assert digests["usual"] == weights["usual"]


def test_evaluate_measures_again_what_is_wrapped_otherwise(tmp_path: Path) -> None:
    table = solvers.handcrafted(EDM(), NFE)[0][1]
    sizes = Sizes(samples=4, exact_samples=4, exact_nfe=8, screen_samples=0)
    found = [
        evaluate_one(
            Denoiser(network, EDM(), "data"), PixelFeatures((3, 4, 4)), None, (3, 4, 4),
            Entry("solver", table), tmp_path, sizes, distances=False, progress=False,
        )["rmse"]
        for network in (half, third, half)
    ]  # fmt: skip
    assert found[0] == found[2] != found[1]


def test_the_file_of_results_is_json_whatever_a_solver_does(tmp_path: Path) -> None:
    held = cli_model.tiny()
    assert held.features is not None
    table = solvers.handcrafted(held.denoiser.process, NFE)[0][1]
    broken = Entry("broken", dataclasses.replace(table, b=table.b + 1e30))
    sizes = CompareSettings((NFE,), 4, 4, 0, 8, 8, 4, shown=0)
    with session.measuring(
        held.denoiser, held.features, held.shape, tmp_path, None, batch=4, total=1, progress=False
    ) as (measurer, bar):
        kept = session.Session(measurer, bar, held.reference, sizes, tmp_path / "record.json")
        kept.add(kept.row(broken, "full"))
    assert not math.isfinite(kept.result()["rows"][0]["rmse"])  # planted

    def word(found: str) -> None:
        raise AssertionError(f"{found} is no JSON")

    rows = json.loads((tmp_path / "record.json").read_text(), parse_constant=word)["rows"]
    assert rows[0]["rmse"] is None and rows[0]["to_accurate"] is None
    read = {**kept.result(), "rows": [*rows, {**rows[0], "solver": "learned", "learned": True,
            "base": "broken", "rmse": 0.0}]}  # fmt: skip
    assert "| **learned** |" in markdown(read)  # type: ignore[arg-type]


def test_damaged_or_foreign_cache_counts_as_absent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save("a", {"n": 1}, {"x": torch.ones(3)})
    found = store.load("a", {"n": 1})
    assert found is not None and torch.equal(found["x"], torch.ones(3))
    assert store.load("a", {"n": 2}) is None and store.load("b", {"n": 1}) is None
    path = tmp_path / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    assert store.load("a", {"n": 1}) is None


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype", "fact"])
def test_digest_sees_every_change(change: str) -> None:
    x = torch.arange(4, dtype=torch.float32)
    same = digest({"x": x.clone()}, 1)
    assert same == digest({"x": x}, 1)
    other = {
        "value": digest({"x": x + torch.tensor([0, 0, 0, 1e-6])}, 1),
        "name": digest({"y": x}, 1),
        "shape": digest({"x": x.reshape(2, 2)}, 1),
        "dtype": digest({"x": x.view(torch.int32)}, 1),
        "fact": digest({"x": x}, 2),
    }
    assert other[change] != same


def test_shared_evaluations_give_the_figures_of_single_runs(tmp_path: Path) -> None:
    """Handcrafted solvers are screened together; each figure is that of the solver run alone."""
    held = cli_model.labelled()
    meter = Measurer(
        held.denoiser, cli_model.Means(), held.shape, Store(tmp_path),
        batch=4, conditions=held.conditions,
    )  # fmt: skip
    candidates = solvers.handcrafted(held.denoiser.process, 4)[::9]
    tables = [Entry(label, table) for label, table in candidates]
    exact = meter.endpoints(12, SEEDS)
    alone = meter.measure("alone", tables, SEEDS, exact)
    calls: list[int] = []
    handle = held.denoiser.network.register_forward_hook(  # type: ignore[union-attr]
        lambda _module, given, _out: calls.append(len(given[0]))
    )
    together = meter.measure("together", tables, SEEDS, exact, share=True)
    handle.remove()
    assert sum(calls) < 0.8 * 4 * len(SEEDS) * len(tables)
    for one, other in zip(alone, together, strict=True):
        assert one.rmse == pytest.approx(other.rmse, rel=1e-4)
        assert torch.allclose(one.sums.total, other.sums.total, rtol=1e-4, atol=1e-4)


def test_perfect_solver_has_no_excess_and_a_wrong_one_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = cli_model.tiny()
    assert held.features is not None
    settings = RecordSettings(
        nfes=(24,),
        full_nfes=(24,),
        screen_samples=16,
        exact_samples=16,
        samples=16,
        exact_nfe=24,
        accurate_nfe=24,
        batch=8,
    )
    perfect = measurer(tmp_path / "m").accurate_table(24)
    wrong = solvers.ddim(held.denoiser.process, perfect.grid)
    both = [("wrong", wrong), ("perfect", perfect)]
    monkeypatch.setattr(session, "handcrafted", lambda _process, _nfe: both)
    found = record(
        held.denoiser,
        held.features,
        held.reference,
        held.shape,
        [Entry("also perfect", perfect, "dlms")],
        tmp_path,
        settings,
        progress=False,
    )
    rows = {row["solver"]: row for row in found["rows"]}
    assert rows["perfect"]["rmse"] == 0.0
    assert {row["size"] for row in found["rows"]} == {"full"}
    assert rows["perfect"]["excess_accurate"] == pytest.approx(0.0, abs=1e-12)
    assert rows["wrong"]["rmse"] > 1e-3
    assert abs(rows["wrong"]["excess_accurate"]) > 1e-6
    chosen = best(found["rows"], 24, "rmse")
    assert chosen is not None and chosen["solver"] == "perfect"
    assert rows["also perfect"]["learned"] and rows["also perfect"]["method"] == "dlms"


@pytest.mark.parametrize(
    "sizes",
    [
        {"nfes": ()},
        {"nfes": (5, 4, 5)},  # was a mean of two distillations, with an error of 0
        {"samples": 10},
        {"screen_samples": 1},
        {"exact_samples": 20_000},
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        RecordSettings(**sizes)  # type: ignore[arg-type]
