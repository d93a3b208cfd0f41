"""A wrong wrapping is noticed, and what the network probably is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from analytic import GaussianMixture
from torch import Tensor

from dlms_engine import Denoiser, Sampler, check, distill
from dlms_engine.lab.evaluation import schedule
from dlms_engine.lab.evaluation.schedule import better_times
from dlms_engine.processes import EDM, VP, Cosine, Process, RectifiedFlow, VPDiscrete

MEANS = torch.tensor([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]], dtype=torch.float64)
LEVELS = VPDiscrete(betas=torch.linspace(1e-4, 0.02, 1000))
KINDS = ("data", "noise", "velocity", "flow", "reverse_flow")


def network_of(process: Process, kind: str, told: str = "t", scale: float = 1.0):  # type: ignore[no-untyped-def]
    """A network of this convention with the mixture's exact answers."""
    mixture = GaussianMixture(process, MEANS, 0.05)

    def network(x: Tensor, c: Tensor) -> Tensor:
        c = c.double() / scale
        t = 1 - c if told == "reversed" else c
        t = t.clamp(process.t_min, process.t_max)
        data = mixture(x.double(), t)
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        noise = (x - alpha * data) / sigma
        made = {
            "data": data,
            "noise": noise,
            "velocity": alpha * noise - sigma * data,
            "flow": noise - data,
            "reverse_flow": data - noise,
        }
        return made[kind].to(x.dtype)

    return network


def real(count: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(3, (count,), generator=generator)
    return (MEANS[rows] + 0.05 * torch.randn(count, 2, generator=generator)).float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("process", [VP(), RectifiedFlow(t_max=0.999)], ids=lambda p: p.name)
def test_right_passes_and_wrong_names_the_right_one(process: Process, kind: str) -> None:
    network = network_of(process, kind)
    right = check(Denoiser(network, process, kind), real())  # type: ignore[arg-type]
    assert right.ok and right.score < 0.5, right
    for other in KINDS:
        if other == kind:
            continue
        found = check(Denoiser(network, process, other), real())  # type: ignore[arg-type]
        assert not found.ok and f"prediction={kind!r}" in found.best, (kind, other, str(found))


@pytest.mark.parametrize("told", ["t", "reversed"])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_time_the_other_way_round_and_in_thousands(told: str, scale: float) -> None:
    process = RectifiedFlow()
    network = network_of(process, "reverse_flow", told, scale)
    right = Denoiser(network, process, "reverse_flow", time_input=told, time_scale=scale)  # type: ignore[arg-type]
    assert check(right, real()).ok
    wrong = check(Denoiser(network, process), real())
    assert "reverse_flow" in wrong.best and not wrong.ok
    if (told, scale) != ("t", 1.0):
        assert f"time_input={told!r}" in wrong.best and ("1000" in wrong.best) == (scale > 1)
    assert "with prediction=" in str(wrong)


def test_without_samples_it_uses_its_own() -> None:
    process = RectifiedFlow()
    network = network_of(process, "flow")
    assert check(Denoiser(network, process), shape=(2,)).ok
    wrong = check(Denoiser(network, process, "reverse_flow"), shape=(2,))
    assert not wrong.ok and wrong.own_samples
    with pytest.raises(ValueError, match="samples"):
        check(Denoiser(network, process))


@pytest.mark.parametrize(
    ("samples", "kind", "said"),
    [
        (real().tolist(), TypeError, "samples are list, expected a tensor"),
        (real().numpy(), TypeError, "samples are ndarray, expected a tensor"),
        (real().to(torch.uint8), ValueError, "samples are torch.uint8, expected floating point"),
        (real()[0], ValueError, r"samples are \[2\], expected \[B, 2\]"),
        (real()[:0], ValueError, r"samples are \[0, 2\]"),
        (real()[:, :1], ValueError, r"samples are \[64, 1\], expected \[B, 2\]"),
    ],
)
def test_samples_that_are_none_are_refused(samples: Any, kind: type[Exception], said: str) -> None:
    """'list' object has no attribute 'to', and what torch says of the deviation of bytes."""
    with pytest.raises(kind, match=said):
        check(Denoiser(network_of(VP(), "noise"), VP(), "noise"), samples, shape=(2,))


def test_a_network_that_knows_nothing_is_said_to() -> None:
    found = check(Denoiser(lambda x, t: torch.full_like(x, 5.0), VP(), "noise"), real())
    assert not found.ok and "no wrapping" in str(found)


@pytest.mark.parametrize("process", [EDM(), VP(), LEVELS, RectifiedFlow()], ids=lambda p: p.name)
@pytest.mark.parametrize(
    ("means", "std"),
    [
        (torch.zeros(1, 8, dtype=torch.float64), 0.5),  # a blind guess is all there is to know
        (200 * MEANS, 10.0),  # above the levels of VP, and flows are nearly done at once
        (1e-3 * MEANS, 5e-5),  # below the least level
        (4e4 * MEANS, 2e3),
    ],
    ids=["gaussian", "large", "small", "huge"],
)
def test_a_right_wrapping_is_right_whatever_the_data(
    process: Process, means: Tensor, std: float
) -> None:
    """Data like a Gaussian, or far from the size of the noise, made it say that nothing fits."""
    mixture = GaussianMixture(process, means, std)
    denoiser = Denoiser(lambda x, t: mixture(x.double(), t.double()).to(x), process, "data")
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(64, means.shape[1], generator=generator)
    rows = torch.randint(len(means), (64,), generator=generator)
    given = check(denoiser, (means[rows] + std * noise).float())
    assert given.ok, given
    assert ("as well as a blind guess" in str(given)) == (given.score >= 0.9)
    if float(means.abs().max()) < 1e4:  # float32 of a flow's first state knows too little there
        own = check(denoiser, shape=(means.shape[1],))
        assert own.ok, own


def test_the_best_of_wrappings_that_all_fail_may_be_the_given_one() -> None:
    """It named the best of the others, whose error was larger than that of the given one."""
    network = network_of(VP(), "noise")

    def faint(x: Tensor, t: Tensor) -> Tensor:  # knows little more than nothing
        sigma = VP().sigma(t.double())[:, None].float()
        return 0.02 * network(x, t) + 0.98 * sigma * x

    found = check(Denoiser(faint, VP(), "noise"), real())
    assert not found.ok and "no wrapping" in str(found)
    assert found.best == min(found.scores, key=found.scores.__getitem__)
    assert f"{min(found.scores.values()):.2f} of a blind guess" in str(found)


def test_rows_of_conditions_are_dealt_to_the_samples() -> None:
    """Three rows and sixteen samples of its own: sample i has row i mod 3; it was a size mismatch."""
    network = network_of(VP(), "noise")
    seen: set[int] = set()

    def labelled(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        assert label.tolist() == [i % 3 for i in range(len(x))]
        seen.add(len(x))
        return network(x, t)

    denoiser = Denoiser(labelled, VP(), "noise")
    assert check(denoiser, shape=(2,), cond={"label": torch.arange(3)}).ok  # the earlier name
    assert check(denoiser, real(), conditions={"label": torch.arange(3)}).ok
    assert check(denoiser, real(), conditions=lambda numbers: {"label": numbers % 3}).ok
    with pytest.raises(ValueError, match="two names of one argument"):
        check(denoiser, real(), conditions={}, cond={})
    assert seen == {16, 64}


@pytest.mark.parametrize(
    ("process", "usual"),
    [(EDM(), "edm"), (VP(), "noise"), (Cosine(), "noise"), (RectifiedFlow(), "flow")],
)
def test_default_prediction_follows_the_process(process: Process, usual: str) -> None:
    """It was "edm" on every process."""
    assert Denoiser(lambda x, t: x, process).prediction == usual


@pytest.mark.parametrize("prediction", ["noise", "edm"])
def test_predictions_that_say_nothing_at_alpha_zero_are_refused(prediction: str) -> None:
    """The answer was infinite, and samples not a number."""
    x = torch.ones(2, 2)
    with pytest.raises(ValueError, match="alpha is 0 at t = 1"):
        Denoiser(lambda x, t: x, RectifiedFlow(), prediction)(x, 1.0)  # type: ignore[arg-type]
    assert Denoiser(lambda x, t: x, RectifiedFlow(), prediction)(x, 0.999).isfinite().all()  # type: ignore[arg-type]


def test_time_inputs_by_name() -> None:
    seen = []

    def network(x: Tensor, c: Tensor) -> Tensor:
        seen.append(c)
        return x

    for name, scale, wanted in (
        ("t", 1000.0, 250.0), ("reversed", None, 0.75), ("sigma", None, 1 / 3),
        ("log_sigma", 0.25, torch.log(torch.tensor(1 / 3)).item() / 4),
    ):  # fmt: skip
        Denoiser(network, RectifiedFlow(), time_input=name, time_scale=scale)(
            torch.zeros(1, 2), 0.25
        )
        assert float(seen[-1]) == pytest.approx(wanted, rel=1e-6)
    index = Denoiser(network, LEVELS, time_input="index")
    index(torch.zeros(1, 2), 0.25)
    assert seen[-1].dtype == torch.int64 and abs(float(seen[-1]) - 250) <= 1
    with pytest.raises(ValueError, match="the process is EDM"):
        Denoiser(network, EDM(), time_input="index")
    with pytest.raises(ValueError, match="time_input"):
        Denoiser(network, EDM(), time_input="tau")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="time_scale"):
        Denoiser(network, EDM(), time_scale=1000.0)


class Table(torch.nn.Module):
    """Reads what it knows of a level from a table, as networks with an embedding of the index do."""

    def __init__(self) -> None:
        super().__init__()
        self.times = torch.nn.Embedding(LEVELS.levels, 1, dtype=torch.float64)
        every = torch.arange(1, LEVELS.levels + 1, dtype=torch.float64) / LEVELS.levels
        self.times.weight.data = every[:, None]
        self.mixture = GaussianMixture(LEVELS, MEANS, 0.05)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        t = self.times(index)[:, 0]
        alpha, sigma = LEVELS.alpha(t)[:, None], LEVELS.sigma(t)[:, None]
        return ((x - alpha * self.mixture(x.double(), t)) / sigma).to(x.dtype)


@pytest.mark.parametrize("samples", [None, real()], ids=["own", "real"])
def test_a_table_of_embeddings_wants_the_index(samples: Tensor | None) -> None:
    found = check(Denoiser(Table(), LEVELS), samples, shape=(2,))
    assert not found.ok and found.best == "prediction='noise', time_input='index'"
    assert "gives nothing finite" in str(found)
    assert check(Denoiser(Table(), LEVELS, time_input="index"), samples, shape=(2,)).ok
    # what takes no wrapping says why itself
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        check(Denoiser(lambda x, t: x @ torch.ones(5, 2), LEVELS), samples, shape=(2,))
    with pytest.raises(ValueError, match=r"takes \(input\), expected network\(x, c_noise\)"):
        check(Denoiser(torch.nn.Linear(5, 2), LEVELS), samples, shape=(2,))


WIDE = torch.randn(6, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ALPHAS = torch.exp(2 * LEVELS.log_alpha(torch.arange(1, 1001) / 1000))  # their products


@pytest.mark.parametrize(
    "given",
    [Cosine(), VPDiscrete(alphas_cumprod=ALPHAS.sqrt()), VP(beta_d=9.9)],
    ids=["cosine", "alphas", "half"],
)
def test_a_network_of_another_schedule_is_seen(given: Process) -> None:
    """It denoises all the same, so that alphas for their products, or a cosine for a line, passed."""
    mixture = GaussianMixture(VP(), WIDE, 0.2)

    def network(x: Tensor, index: Tensor) -> Tensor:
        t = index.double() if not isinstance(given, VPDiscrete) else (index.double() + 1) / 1000
        t = t.clamp(VP().t_min, VP().t_max)
        alpha, sigma = VP().alpha(t)[:, None], VP().sigma(t)[:, None]
        return ((x - alpha * mixture(x.double(), t)) / sigma).to(x)

    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(6, (32,), generator=generator)
    samples = (WIDE[rows] + 0.2 * torch.randn(32, 48, generator=generator)).float()
    found = check(Denoiser(network, given, "noise"), samples)
    assert not found.ok and found.best.startswith("another schedule")
    assert "another schedule" in str(found)
    right = LEVELS if isinstance(given, VPDiscrete) else VP()
    assert check(Denoiser(network, right, "noise"), samples).ok


def test_few_samples_of_the_right_schedule_do_not_accuse_it() -> None:
    """Of a few points of a plane another time happens to be nearer by more than ``GAIN``."""
    denoiser = Denoiser(network_of(VP(), "noise"), VP(), "noise")
    gains = []
    for start in range(0, 96, 8):
        few = real(96)[start : start + 8]
        assert better_times(denoiser, few, {}) is None
        with pytest.MonkeyPatch.context() as patched:  # planted: nothing asks how sure it is
            patched.setattr(schedule, "SURE", -float("inf"))
            gains.append(better_times(denoiser, few, {}))
    assert any(gain is not None for gain in gains)


@pytest.mark.parametrize("scale", [2.0, 7.5, 15.0])
def test_guidance_does_not_make_a_wrapping_wrong(scale: float) -> None:
    """A guided prediction is none of the data: from a scale of four on nothing fitted."""
    mixture = GaussianMixture(VP(), MEANS, 0.05)
    single = [GaussianMixture(VP(), MEANS[i : i + 1], 0.05) for i in range(3)]

    def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        wide, times = x.double(), t.double()
        every = torch.stack([*(each(wide, times) for each in single), mixture(wide, times)])
        return every[label, torch.arange(len(x))].to(x)

    denoiser = Denoiser(
        network, VP(), "data", guidance_scale=scale, unconditional={"label": torch.tensor([3])}
    )
    labels = torch.arange(3)
    noise = torch.randn(48, 2, generator=torch.Generator().manual_seed(3))
    samples = (MEANS.repeat(16, 1) + 0.05 * noise).float()
    guided = denoiser.predict(samples, 0.3, label=labels.repeat(16))
    assert check(denoiser, samples, conditions={"label": labels}).ok
    assert check(denoiser, shape=(2,), conditions={"label": labels}).ok
    denoiser.prediction = "velocity"
    assert not check(denoiser, samples, conditions={"label": labels}).ok
    denoiser.prediction = "data"
    assert denoiser.guidance_scale == scale
    assert torch.equal(denoiser.predict(samples, 0.3, label=labels.repeat(16)), guided)


@pytest.mark.slow
def test_a_table_of_embeddings_is_distilled_and_sampled() -> None:
    denoiser = Denoiser(Table(), LEVELS, time_input="index")
    solver = distill(denoiser, nfe=4, shape=(2,), budget="20k", progress=False)
    assert solver.report is not None and solver.report["ratio"] > 1
    assert bool(Sampler(denoiser, solver).sample(range(4), (2,)).isfinite().all())
