"""Conditions of every sample reach the network of every learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from marks import slow
from torch import Tensor, nn

from dlms_engine import Denoiser, Sampler, distill, grids, ops, solvers
from dlms_engine.engine import sampler
from dlms_engine.engine.cuda_graph_cache import GraphCache
from dlms_engine.learners.start import SamplingProblem, find_start
from dlms_engine.learners.training.conditioned import conditioned
from dlms_engine.learners.training.noise import tell_first_sample
from dlms_engine.learners.training.validation import exact_solution
from dlms_engine.processes import EDM, RectifiedFlow


class Labelled(nn.Module):
    """Refuses labels that are not a row a sample, as class-conditional networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        assert label.shape == (len(x), 2), f"label is {tuple(label.shape)}, expected [{len(x)}, 2]"
        self.seen.append(label)
        return torch.tanh(x / (1 + t[:, None])) * self.scale + label


def test_rows_follow_the_samples() -> None:
    network = Labelled()
    labels = torch.eye(2)
    denoiser = conditioned(Denoiser(network, EDM(), "data"), {"label": labels}, "dlms")
    denoiser.first_sample(3)
    x = torch.zeros(3, 2)
    denoiser.predict(x, 1.0)
    assert torch.equal(network.seen[-1], labels[[1, 0, 1]])
    denoiser.first_sample(0)  # planted: another first sample, other rows
    denoiser.predict(x, 1.0)
    assert torch.equal(network.seen[-1], labels[[0, 1, 0]])


class Parts(NamedTuple):
    label: Tensor


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda label: {"added": {"label": label, "crop": 3}}, lambda c: c["added"]["label"]),
        (lambda label: [label, None], lambda c: c[0]),
        (lambda label: (label,), lambda c: c[0]),
        (Parts, lambda c: c.label),
    ],
)
@pytest.mark.parametrize("method", ["auto", "free_table"])
def test_rows_inside_containers_follow_the_samples(pack: Any, unpack: Any, method: str) -> None:
    """All rows went to every batch: an error about sizes inside the network, or wrong ones."""
    network = Labelled()

    def packed(x: Tensor, t: Tensor, c: Any) -> Tensor:
        return network(x, t, unpack(c))

    labels = torch.eye(2)[[0, 1, 1]]
    flat = SamplingProblem(Denoiser(network, EDM(), "data"), (2,), {"label": labels})
    wrapped = Denoiser(packed, EDM(), "data")
    nested = SamplingProblem(wrapped, (2,), {"c": pack(labels)})
    numbers, time = range(4, 8), torch.tensor(1.0, dtype=torch.float64)
    x = torch.cat([flat.noise(numbers)] * 2)
    assert torch.equal(nested.predict(x, time, numbers), flat.predict(x, time, numbers))
    solver = distill(
        wrapped, method, nfe=2, shape=(2,), conditions={"c": pack(labels)}, progress=False,
        trajectories=16, **({"budget": "1k"} if method == "auto" else {"validation_samples": 8}),
    )  # fmt: skip
    assert solver.nfe == 2
    with pytest.raises(ValueError, match="one condition for all samples"):
        conditioned(wrapped, {"c": pack(labels)}, "gits")


def test_guided_rows_are_doubled() -> None:
    network = Labelled()
    base = Denoiser(
        network, EDM(), "data", guidance_scale=2.0, unconditional={"label": torch.zeros(1, 2)}
    )
    denoiser = conditioned(base, {"label": torch.eye(2)}, "dlms")
    denoiser.predict(torch.zeros(2, 2), 1.0)
    assert torch.equal(network.seen[-1], torch.cat([torch.zeros(2, 2), torch.eye(2)]))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("dlms", {"validation_samples": 4, "batch": 4}),
        ("amed", {"validation_samples": 4, "batch": 4}),
        ("free_table", {"validation_samples": 4, "batch": 4}),
        slow("auto", {"budget": "3k", "effort": "lean"}),
    ],
)
def test_learners_take_a_row_a_sample(method: str, settings: dict[str, object]) -> None:
    """One row of labels went to batches of eight as it was, several rows were refused."""
    trajectories = {} if method == "auto" else {"trajectories": 4}
    solver = distill(
        Denoiser(Labelled(), EDM(), "data"), method, nfe=4, shape=(2,), progress=False,
        cond={"label": torch.eye(2)}, **trajectories, **settings,
    )  # fmt: skip
    assert solver.nfe == 4


@pytest.mark.parametrize("method", ["ld3", "dode", "gits"])
def test_one_row_for_all_or_a_refusal(method: str) -> None:
    denoiser = Denoiser(Labelled(), EDM(), "data")
    with pytest.raises(ValueError, match="one condition for all samples"):
        distill(denoiser, method, nfe=4, shape=(2,), conditions={"label": torch.eye(2)})
    if method == "gits":
        cond = {"label": torch.ones(1, 2)}
        assert distill(
            denoiser, method, nfe=4, shape=(2,), cond=cond, trajectories=4, points=12
        ).nfe == 4  # fmt: skip


def test_the_first_exact_solution_has_the_conditions_of_its_batch() -> None:
    """Its proof, made on the first call, left other samples' conditions for the run after it."""
    denoiser = conditioned(
        Denoiser(Labelled(), RectifiedFlow(), "flow"), {"label": torch.eye(2)}, "dlms"
    )
    x = torch.ones(3, 2)
    ends = []
    for _ in range(2):
        tell_first_sample(denoiser, 1)
        ends.append(exact_solution(denoiser, x, 4))
    assert torch.equal(*ends)
    tell_first_sample(denoiser, 0)
    assert not torch.equal(exact_solution(denoiser, x, 4), ends[0])  # the order matters


def test_a_captured_run_takes_the_rows_of_its_batch_as_inputs(captured, monkeypatch) -> None:
    """Rows chosen while a graph is captured were the rows of every later batch."""
    monkeypatch.setattr(sampler, "GRAPHS", GraphCache())
    monkeypatch.setattr(Sampler, "_captures", lambda self, place, watched: True)
    network = Labelled()
    del network.seen  # a list that grows in every run keeps a network from being captured
    network.forward = lambda x, t, label: torch.tanh(x / (1 + t[:, None])) + label  # type: ignore
    made = conditioned(Denoiser(network, EDM(), "data"), {"label": torch.eye(2)}, "dlms")
    table = solvers.ddim(made.process, grids.polynomial(made.process, 3))
    run = Sampler(made, table, backend="eager")
    outcomes = []
    for first in (0, 1, 2):
        made.first_sample(first)
        noise = torch.ones(1, 2)
        found = run._run_graph(noise.clone(), torch.float32, ops.select("eager", noise.device), {})
        expected = run._run_plain(
            run._steps(noise, {}), noise, torch.float32, ops.select("eager", noise.device), None
        )
        assert torch.equal(found, expected)
        outcomes.append(found)
    assert captured.made == 1
    assert torch.equal(outcomes[0], outcomes[2]) and not torch.equal(outcomes[0], outcomes[1])


def test_a_kept_start_of_other_conditions_is_not_taken(tmp_path: Path) -> None:
    """Those of its two first samples alone were compared."""
    store, labels = tmp_path / "two.start.json", torch.eye(2)[[0, 1, 1]]
    denoiser = Denoiser(Labelled(), EDM(), "data")

    def calls(label: Tensor) -> int:
        problem = SamplingProblem(denoiser, (2,), {"label": label})
        find_start(problem, 2, effort="lean", store=store)
        return problem.calls

    first = calls(labels)
    assert calls(labels) < first / 4, "the same conditions: kept"
    assert calls(torch.cat([labels, labels[:1]])) >= first - 8
