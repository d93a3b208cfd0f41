"""A published table made again: every solver at every nfe distilled, sampled and measured; resumable."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...learners import distill
from ...learners.training.identity import named_conditions, run_identity
from ...models.denoiser import Denoiser
from ...policies.distilled import load_solver
from ...support.files import only_one, write_text
from ...support.parallel import World
from ...support.values import json_value
from ..comparison.budget import countable, counted
from ..comparison.measure import Entry, Measured, Measurer
from ..comparison.result import Floors, distance
from ..comparison.store import Store, digest, network_digest
from ..evaluation.frechet import label_of_features, require_torchmetrics
from ..evaluation.own_features import own_features
from ..evaluation.schedule import changed
from ..plots import is_image
from .data_sets import DATA_SETS
from .estimate import Estimate, estimated
from .inception import DecodedFeatures, InceptionFeatures
from .models import PaperModel
from .settings import Fid, ReproduceSettings, chosen_nfes, chosen_rows
from .tables import Panel, PublishedTable, TableRow

_FORMAT = "dlms_engine.reproduce/1"


class Reproduction:
    """One panel of a table on one model; what is finished lies in ``folder``.

    Args:
        fid: None measures the distance to accurate samples on the model's own features, which is no FID.
        lpips: weights of LPIPS for LD3 (``Ld3Settings.lpips_weights``).
        files: what the model came from, JSON values for the result.

    Raises:
        ValueError: nothing of the table is left by ``settings``, or several processes.
    """

    def __init__(
        self,
        table: PublishedTable,
        panel: Panel,
        model: PaperModel,
        folder: Path,
        settings: ReproduceSettings,
        *,
        fid: Fid | None = None,
        lpips: Path | None = None,
        files: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        if World.current().size > 1:
            raise ValueError("reproduce runs in one process: start it without torchrun")
        self.table, self.panel = table, panel
        self.model = dataclasses.replace(model, denoiser=countable(model.denoiser))
        self.settings, self.fid, self.lpips = settings, fid, lpips
        self.folder, self.files = folder, list(files)
        self.nfes = chosen_nfes(panel, settings.nfes)
        self.rows = chosen_rows(panel, settings.rows)
        self.seeds = (
            tuple(range(table.runs)) if settings.training_seeds is None else settings.training_seeds
        )
        self.samples = range(settings.first_seed, settings.first_seed + settings.samples)
        self._measurers: dict[float | None, Measurer] = {}
        self._advance: Callable[[int], object] = lambda _done: None

    @property
    def stem(self) -> str:
        """Of the files with the result, in ``folder``."""
        return f"{self.table.name}-{self.panel.data}"

    @cached_property
    def features(self) -> nn.Module:
        """From finished samples to what the distance is taken on."""
        if self.fid is not None:
            found: nn.Module = InceptionFeatures(self.fid.network.to(self.model.denoiser.device))
            return found if self.model.decode is None else DecodedFeatures(found, self.model.decode)
        conditional = self.model.conditions is not None
        return own_features(self.model.denoiser, self.model.shape, conditional=conditional)

    @cached_property
    def estimate(self) -> Estimate:
        """Calls and time, for everything that is asked for as if nothing were done."""
        return estimated(
            list(self.cells()), self.arguments, self.model, self.features, len(self.seeds),
            self.settings, accurate=self.fid is None,
        )  # fmt: skip

    def cells(self) -> Iterator[tuple[int, TableRow]]:
        """(nfe, row) in the order in which they are made: those that the paper has a figure of."""
        for nfe in self.nfes:
            yield from ((nfe, row) for row in self.rows if nfe in row.figures)

    def run(self, *, progress: bool = True) -> dict[str, Any]:
        """Makes the table; killed and called again, it goes on.

        Returns:
            the JSON-able result, also in ``STEM.json``, which is there from the first cell on.

        Raises:
            RuntimeError: another process makes the same table in the folder.
            OSError: the folder cannot be written to.
            ImportError: torchmetrics is missing; raised before the work.
        """
        require_torchmetrics()
        self.folder.mkdir(parents=True, exist_ok=True)
        total = self.estimate.calls
        with (
            only_one(self.folder / f"{self.stem}.json"),
            tqdm(total=total, unit="eval", unit_scale=True, disable=not progress) as bar,
        ):
            self._advance = bar.update
            bar.set_description("exact solutions")
            few = self.samples[: min(self.settings.exact_samples, len(self.samples))]
            exact = self._measurer(None).endpoints(self.settings.exact_nfe, few) if few else None
            floors = self._floors(bar)
            rows: list[dict[str, Any]] = []
            result = self._result(rows, floors)
            for nfe, row in self.cells():
                spent, planned = bar.n, self.estimate.cell(nfe, row)
                rows.append(self._row(nfe, row, exact, floors, bar))
                write_text(
                    self.folder / f"{self.stem}.json", json.dumps(json_value(result), indent=1)
                )
                bar.update(max(0, planned - (bar.n - spent)))
        return result

    # -- parts ----------------------------------------------------------------------------------

    def _advanced(self, done: int) -> None:
        self._advance(done)

    def _measurer(self, threshold: float | None) -> Measurer:
        """For solvers that were published with this thresholding; each has a cache of its own."""
        if threshold not in self._measurers:
            model, kind = self.model, "plain" if threshold is None else f"threshold-{threshold}"
            self._measurers[threshold] = Measurer(
                with_thresholding(model.denoiser, threshold),
                self.features,
                model.shape,
                Store(self.folder / "cache" / self.panel.data / kind),
                batch=self.settings.batch,
                conditions=model.conditions,
                advance=self._advanced,
                clamp=model.decode is None and is_image(model.shape),
                save_seconds=0.0,
            )
        return self._measurers[threshold]

    def _floors(self, bar: tqdm[Any]) -> Floors | None:
        """What distances are taken to without FID: accurate samples of other seeds."""
        if self.fid is not None:
            return None
        bar.set_description("accurate samples")
        own, other = self._measurer(None).accurate(self.settings.accurate_nfe, self.samples)
        return Floors.of(own.sums, other.sums, None)

    def _row(
        self,
        nfe: int,
        row: TableRow,
        exact: Tensor | None,
        floors: Floors | None,
        bar: tqdm[Any],
    ) -> dict[str, Any]:
        published = row.figures[nfe]
        found: dict[str, Any] = {
            "nfe": nfe,
            "row": row.name,
            "learned": row.preset is not None,
            "published": published.value,
            "published_spread": published.spread,
        }
        if not row.runs_here:
            return found
        runs = []
        try:
            for seed in self.seeds if row.preset else self.seeds[:1]:
                bar.set_description(f"{nfe} evaluations: {row.name}")
                entry = self._entry(nfe, row, seed)
                meter = self._measurer(row.threshold)
                measured = meter.measure(f"one-{entry.digest}", [entry], self.samples, exact)[0]
                runs.append({"seed": seed, **self._figures(measured, floors)})
        except (ValueError, FloatingPointError) as refusal:
            return {**found, "refused": str(refusal)}
        return {**found, **_mean(runs), "runs": runs, "notes": self.notes(row)}

    def _figures(self, measured: Measured, floors: Floors | None) -> dict[str, float]:
        held = floors.references["accurate"] if floors is not None else self.fid.reference  # type: ignore[union-attr]
        return {"distance": distance(measured.sums, held), "rmse": measured.rmse}

    def _entry(self, nfe: int, row: TableRow, seed: int) -> Entry:
        if row.preset is None:
            return Entry(row.name, row.table(self.model.denoiser.process, nfe))
        arguments = self.arguments(row)
        key = {**self._identity, "arguments": arguments, "nfe": nfe, "seed": seed}
        name = f"{row.preset}-{nfe}-seed{seed}-{digest({}, key)}.safetensors"
        path = self.folder / "solvers" / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            with counted(self.model.denoiser.network, self._advanced):
                distill(
                    self.model.denoiser,
                    nfe=nfe,
                    shape=self.model.shape,
                    conditions=self.model.conditions,
                    output=path,
                    resume=path.with_name(f"{path.stem}.checkpoint.safetensors").exists(),
                    progress=False,
                    seed=seed,
                    feature_network=self._trained_features,
                    **arguments,
                )
        return Entry(row.name, load_solver(path).policy, str(row.learner["method"]))

    def arguments(self, row: TableRow) -> dict[str, Any]:
        """``distill``'s, as in the paper as far as what is given allows; ``notes`` say what differs."""
        found = {**row.learner, **(self.settings.changes or {})}
        if found["method"] == "dlms" and self.model.decode is None:
            usual = "pixels" if self._trained_features is None else "features"
            said = {**row.settings, **(self.settings.changes or {})}
            found["last_step"] = said.get("last_step", usual)
        if found["method"] == "ld3" and self.lpips is not None and self.model.decode is None:
            found.setdefault("lpips_weights", str(self.lpips))
        return found

    @property
    def _trained_features(self) -> nn.Module | None:
        if self.fid is None or self.model.decode is not None:
            return None
        return InceptionFeatures(self.fid.network, rounded=False)

    def notes(self, row: TableRow) -> list[str]:
        """How the row's making differs from the paper's."""
        if row.preset is None:
            return []
        found, pixels = self.arguments(row), self.model.decode is None
        said = [f"{k}={v}" for k, v in (self.settings.changes or {}).items()]
        said = [f"settings changed: {', '.join(said)}"] if said else []
        wanted = row.settings.get("last_step") != "pixels"
        if found["method"] == "dlms" and pixels and wanted and found["last_step"] == "pixels":
            said.append("without the Inception distance: no FID weights were given")
        if found["method"] == "ld3" and "lpips_weights" not in found and "loss" not in row.settings:
            said.append("without LPIPS: the loss is the most perceptual one at hand")
        return said

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """Of the model and what it is trained against; the key of solver files."""
        names = named_conditions(self.model.conditions)
        features = None if self._trained_features is None else network_digest(self.features)
        return {**run_identity(self.model.denoiser, names), "features": features}

    def _result(self, rows: list[dict[str, Any]], floors: Floors | None) -> dict[str, Any]:
        settings = asdict(self.settings)
        return {
            "format": _FORMAT,
            "table": self.table.name,
            "paper": self.table.paper,
            "number": self.table.number,
            "title": self.table.title,
            "data": self.panel.data,
            "distance": label_of_features(self.features),
            "fid": self.fid is not None,
            "floor": None if floors is None else floors.values["accurate"],
            "settings": {**settings, "nfes": list(self.nfes), "training_seeds": list(self.seeds)},
            "estimate": self.estimate.facts(),
            "files": self.files,
            "paper_samples": DATA_SETS[self.panel.data].samples,
            "torch": torch.__version__,
            "rows": rows,
        }


def with_thresholding(denoiser: Denoiser, quantile: float | None) -> Denoiser:
    """``denoiser`` with another dynamic thresholding; it shares the network and everything else."""
    if quantile == denoiser.dynamic_thresholding:
        return denoiser
    return changed(denoiser, dynamic_thresholding=quantile)


def _mean(runs: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Mean of the runs' figures, and the distance's standard deviation where there are several."""
    values = [run["distance"] for run in runs]
    several = len(values) > 1 and all(map(math.isfinite, values))
    return {
        "distance": statistics.fmean(values),
        "spread": statistics.stdev(values) if several else None,
        "rmse": statistics.fmean(run["rmse"] for run in runs),
    }
