"""Evaluations of a distillation as replays: on a stand-in graph with buffers that replays overwrite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from standin_driver import StandinCapture
from torch import Tensor, nn

from dlms_engine.engine import captured_calls as module
from dlms_engine.engine import cuda_graph_run
from dlms_engine.engine.captured_calls import captured_calls, recomputed
from dlms_engine.engine.cuda_graph import run_captured
from dlms_engine.engine.cuda_graph_cache import GraphCache
from dlms_engine.engine.cuda_graph_capture import CAPTURING
from dlms_engine.engine.sampler import Sampler
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.models.tap import FeatureTap
from dlms_engine.processes import EDM, grids
from dlms_engine.solvers import ddim

SHAPE = (3, 2, 4, 4)


class Small(nn.Module):
    """A bottleneck, times and labels that matter, and whatever ``side`` says."""

    def __init__(self, side: str = "") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Conv2d(2, 3, 3, padding=1)
            self.mid_block = nn.Conv2d(3, 3, 3, padding=1)
            self.last = nn.Conv2d(3, 2, 3, padding=1)
        self.side = side
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, power: int = 1) -> Tensor:
        shift = t if label is None else t + label
        hidden = self.mid_block(torch.tanh(self.first(x) + shift[:, None, None, None].to(x.dtype)))
        if self.side == "reads" and hidden.sum().item() > 1e9:
            return x
        if self.side == "draws":
            hidden = hidden + 1e-9 * torch.randn_like(hidden)
        if self.side == "counts":
            self.count = getattr(self, "count", 0) + 1
        out: Tensor = self.last(torch.tanh(hidden) ** power)
        return out


def small(side: str = "", features: str = "mid_block", **options: Any) -> Denoiser:
    return Denoiser(Small(side), EDM(), "edm", features=features, **options)


def guided() -> Denoiser:
    return small(guidance_scale=2.0, unconditional={"label": torch.zeros(1)})


def noise(seed: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.fixture
def calls(captured: StandinCapture, monkeypatch: pytest.MonkeyPatch) -> StandinCapture:
    """Captures at once."""
    monkeypatch.setattr(module, "REPEATED", 0)
    return captured


Numbers = list[Tensor]


def two_alive(denoiser: Denoiser, bottleneck: bool = True, **conditions: Any) -> Numbers:
    """Gradients of two evaluations that are alive at once, one of them of the other's output."""
    x, t = (
        noise(1, denoiser.device).requires_grad_(),
        torch.tensor([0.5, 1.0, 3.0], device=denoiser.device).requires_grad_(),
    )
    later = torch.tensor([2.0, 1.0, 4.0], device=denoiser.device).requires_grad_()
    one = denoiser.predict(x, t, **conditions)
    features = denoiser.last_features
    two = denoiser.predict(one + 0.1 * x, later, **conditions)
    loss = (two * noise(2, denoiser.device)).sum() + (one * noise(3, denoiser.device)).sum()
    if bottleneck:
        loss = loss + features.square().sum() + denoiser.bottleneck.sum()
    return [one.detach(), two.detach(), *torch.autograd.grad(loss, [x, t, later])]


def only_bottleneck(denoiser: Denoiser) -> Numbers:
    x = noise(1, denoiser.device).requires_grad_()
    denoiser.predict(x, torch.tensor(0.3))
    return list(torch.autograd.grad(denoiser.bottleneck.square().sum(), [x]))


def of_times_alone(denoiser: Denoiser) -> Numbers:
    """The tapped module does not see them."""
    t = torch.tensor(1.5, device=denoiser.device).requires_grad_()
    out = denoiser.network_output(noise(1, denoiser.device), t)
    assert isinstance(out, Tensor)
    return list(torch.autograd.grad(out.sum() + (denoiser.bottleneck * t).sum(), [t]))


def in_other_order(denoiser: Denoiser, **conditions: Any) -> Numbers:
    """The later evaluation's gradient first, then again the earlier one's; and one without a time's."""
    x, y = noise(1, denoiser.device).requires_grad_(), noise(2, denoiser.device).requires_grad_()
    t = torch.tensor(1.5, device=denoiser.device).requires_grad_()
    one, two = (denoiser.predict(each, t, **conditions) for each in (x, y))
    three = denoiser.predict(x, 0.7, **conditions)
    plain = denoiser.predict(y.detach(), 0.7, **conditions)
    found = [*torch.autograd.grad(two.sum(), [y, t]), *torch.autograd.grad(one.sum(), [x, t])]
    return [*found, *torch.autograd.grad(three.square().sum(), [x]), plain]


def recomputing(denoiser: Denoiser, **conditions: Any) -> Numbers:
    x, t = (
        noise(4, denoiser.device).requires_grad_(),
        torch.tensor(1.5, device=denoiser.device).requires_grad_(),
    )
    predict = lambda x, t: denoiser.predict(x, t, **conditions)  # noqa: E731
    out = recomputed(denoiser, predict, recomputed(denoiser, predict, x, t), 0.5 * t)
    return list(torch.autograd.grad(out.square().sum(), [x, t]))


def same(found: Numbers, wanted: Numbers) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "two alive": (small, two_alive, {}),
    "other order": (small, in_other_order, {}),
    "bottleneck": (small, only_bottleneck, {}),
    "times alone": (lambda: small(features="first"), of_times_alone, {}),
    "recomputed": (small, recomputing, {}),
    "label": (small, two_alive, {"label": torch.tensor([0.1, 0.2, 0.3])}),
    "number": (small, two_alive, {"power": 2}),
    "guided": (guided, two_alive, {"label": torch.tensor([0.1, 0.2, 0.3])}),
    "guided, recomputed": (guided, recomputing, {"label": torch.tensor([0.1, 0.2, 0.3])}),
    "double": (lambda: small().double(), in_other_order, {}),
    "half": (lambda: small().bfloat16(), only_bottleneck, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_plain_evaluations(
    calls: StandinCapture, case: str
) -> None:
    make, work, conditions = CASES[case]
    denoiser = make()
    want = work(denoiser, **conditions)
    with captured_calls(denoiser) as through:
        for _ in range(2):
            same(work(denoiser, **conditions), want)
        stats = through.graphs.stats()
        assert stats["captures"] and stats["replays"] >= stats["captures"] and not stats["failures"]
        assert not through.refused
    assert len(through.graphs) == 0 and denoiser.calls.through is None
    same(work(denoiser, **conditions), want)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPEATED", 0)
    make, work, conditions = CASES[case]
    denoiser = make().cuda()
    conditions = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in conditions.items()}
    want = work(denoiser, **conditions)
    with captured_calls(denoiser) as through:
        for _ in range(3):
            for one, other in zip(work(denoiser, **conditions), want, strict=True):
                scale = other.abs().max().item()
                torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 * scale)
        stats = through.graphs.stats()
    assert stats["replays"] and not stats["failures"] and not through.refused


@pytest.mark.needs_cuda
@pytest.mark.parametrize("side", ["reads", "draws"])
def test_what_a_gpu_cannot_capture_is_plain(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPEATED", 0)
    denoiser = small(side).cuda()
    want = two_alive(denoiser)
    with captured_calls(denoiser) as through:
        for one, other in zip(two_alive(denoiser), want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
        assert through.refused and len(through.graphs) == 0
    assert torch.ones(3, device="cuda").sum().item() == 3  # the device is usable afterwards


def test_a_compiled_network(calls: StandinCapture) -> None:
    denoiser = Denoiser(Small(), EDM(), "edm")
    want = in_other_order(denoiser)
    denoiser.network = torch.compile(denoiser.network, backend="aot_eager")
    with captured_calls(denoiser) as through:
        for _ in range(2):
            same(in_other_order(denoiser), want)
        assert through.graphs.stats()["replays"] and not through.refused


def test_the_way_back_is_computed_in_the_precision_of_the_way_there(calls: StandinCapture) -> None:
    """Autocast ends before the gradient is asked for, as it does on autograd's own threads."""
    denoiser, x = small(), noise(1).requires_grad_()

    def gradient(dtype: torch.dtype) -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            out = denoiser.predict(x, 1.0)
        return torch.autograd.grad(out.float().square().sum(), x)[0]

    want = gradient(torch.bfloat16)
    assert (want - gradient(torch.float32)).abs().max() > 1e-4
    with captured_calls(denoiser):
        same([gradient(torch.bfloat16)], [want])


def test_other_conditions_and_scales_need_no_capture(calls: StandinCapture) -> None:
    denoiser = guided()
    with captured_calls(denoiser) as through:
        for seed, scale in enumerate((2.0, 3.0, 0.5)):
            denoiser.guidance_scale = scale
            denoiser.unconditional["label"] = torch.tensor([0.3 * seed])
            label = torch.rand(3, generator=torch.Generator().manual_seed(seed))
            found = two_alive(denoiser, label=label)
            made = through.graphs.stats()["captures"]
            denoiser.calls.through, kept = None, denoiser.calls.through
            same(found, two_alive(denoiser, label=label))
            denoiser.calls.through = kept
        assert made % 3 == 0 and through.graphs.stats()["failures"] == 0


def test_a_number_among_the_conditions_is_another_graph(calls: StandinCapture) -> None:
    denoiser = small()
    want = [denoiser.predict(noise(1), 1.0, power=power) for power in (1, 2)]
    with captured_calls(denoiser):
        for _ in range(2):
            same([denoiser.predict(noise(1), 1.0, power=power) for power in (1, 2)], want)


def test_nothing_of_an_evaluation_is_kept_but_its_inputs(calls: StandinCapture) -> None:
    kept: list[int] = []
    denoiser = small()
    x, t = noise(1).requires_grad_(), torch.tensor(1.0, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    def saved() -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            denoiser.network_output(x, t)
        return sum(kept)

    plain = saved()
    with captured_calls(denoiser):
        saved()
        assert saved() == x.numel() + 1 < plain / 2


def test_an_evaluation_is_computed_again_once(calls: StandinCapture) -> None:
    """Bug to avoid: `checkpoint` would replay the network before the graph that does so anyway."""
    denoiser = small()
    with captured_calls(denoiser) as through:
        recomputing(denoiser)
        before = through.graphs.stats()["replays"]
        recomputing(denoiser)
        assert through.graphs.stats()["replays"] - before == 4  # two there, two back


def test_a_kind_is_captured_when_it_comes_again_and_again(captured: StandinCapture) -> None:
    denoiser = small()
    with captured_calls(denoiser) as through:
        for number in range(module.REPEATED + 2):
            assert len(through.graphs) == int(number > module.REPEATED)
            denoiser.predict(noise(number), 1.0)
            denoiser.predict(noise(number)[: 1 + number % 2], 1.0)
        assert captured.made == 1


def test_a_sampler_captures_its_whole_run(calls: StandinCapture) -> None:
    """Evaluations inside another capture are part of it: no capture of their own waits for its end."""
    denoiser, runs = small(), GraphCache()
    sampler = Sampler(denoiser, ddim(EDM(), grids.logsnr(EDM(), 3)))
    want = sampler(noise(1))
    inside: list[int] = []
    with captured_calls(denoiser) as through:

        def body(given: Any) -> Tensor:
            out = sampler(given["x"])
            if CAPTURING.mine:
                inside.append(len(through.graphs))
            return out

        got = run_captured(runs, denoiser, (), body, {"x": noise(1)})
        assert len(runs) == 1 and inside == [0, 0, 0]
    same([got], [want])


# -- what cannot be captured ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "cause"),
    [
        ("reads", "_local_scalar_dense"),
        ("draws", "random"),
        ("counts", "its attribute network.count"),
    ],
)
def test_such_a_network_is_evaluated_plainly_and_named_once(
    calls: StandinCapture, caplog: pytest.LogCaptureFixture, side: str, cause: str
) -> None:
    calls.watched = True
    denoiser = small(side)
    want = two_alive(denoiser)
    with captured_calls(denoiser) as through:
        for _ in range(3):
            same(two_alive(denoiser), want)
            same(recomputing(denoiser), recomputing(small(side)))
        assert through.refused and len(through.graphs) == 0
    told = [r.message for r in caplog.records]
    assert len(told) == 1 and cause in told[0]
    assert told[0].startswith("distilling without a CUDA graph")


def test_a_capture_that_is_wrong_is_refused(
    calls: StandinCapture, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cuda_graph_run.CapturedRun.__call__
    wrong = lambda run, inputs: 1.1 * right(run, inputs)  # noqa: E731
    denoiser = small()
    want = two_alive(denoiser)
    monkeypatch.setattr(cuda_graph_run.CapturedRun, "__call__", wrong)
    with captured_calls(denoiser) as through:
        same(two_alive(denoiser), want)
        assert through.refused
    assert caplog.text.count("captured here it differs from the plain run") == 1


def test_gradients_alone_that_are_wrong_are_refused(
    calls: StandinCapture, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several gradients each is compared by itself: a small one is not lost in a large one."""
    right = cuda_graph_run.CapturedRun.__call__

    def wrong(run: Any, inputs: Any) -> Tensor:
        out = right(run, inputs)
        if any(name.startswith("cotangent") for name in inputs):
            out[-1] += 0.5  # of the time
        return out

    denoiser = small()
    want = two_alive(denoiser, bottleneck=False)
    monkeypatch.setattr(cuda_graph_run.CapturedRun, "__call__", wrong)
    with captured_calls(denoiser) as through:
        for _ in range(2):
            same(two_alive(denoiser, bottleneck=False), want)
        assert not through.refused and len(through.graphs) == 1
    told = [r.message for r in caplog.records]
    assert len(told) == 1 and told[0].startswith("differentiating the network without a CUDA graph")


def test_a_network_whose_settings_change_is_not_captured_forever(
    calls: StandinCapture, caplog: pytest.LogCaptureFixture
) -> None:
    denoiser = small()
    with captured_calls(denoiser) as through:
        for number in range(10):
            denoiser.network.setting = number
            denoiser.predict(noise(1), 1.0)
        assert through.refused and calls.made == module.CAPTURES + 1
    assert "its settings change between evaluations" in caplog.text


def test_conditions_that_want_gradients_are_evaluated_plainly(calls: StandinCapture) -> None:
    denoiser = small()
    label = torch.rand(3).requires_grad_()
    with captured_calls(denoiser):
        out = denoiser.predict(noise(1), 1.0, label=label)
    assert torch.autograd.grad(out.sum(), label)[0].abs().max() > 0


def test_without_a_gpu_it_is_refused() -> None:
    denoiser = small()
    with (
        pytest.raises(ValueError, match="cannot be captured here: .* NVIDIA GPU, these are on cpu"),
        captured_calls(denoiser),
    ):
        pass
    assert denoiser.calls.through is None


# -- planted faults -----------------------------------------------------------------------------------


def fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "no copy out":
        right = cuda_graph_run.CapturedRun.__call__

        def shared(run: Any, inputs: Any) -> Tensor:
            right(run, inputs)
            out: Tensor = run._recorded.output
            return out

        monkeypatch.setattr(cuda_graph_run.CapturedRun, "__call__", shared)
    elif name == "conditions not in the key":
        real = module.Runnable
        monkeypatch.setattr(
            module,
            "Runnable",
            lambda network, options, *rest, **more: real(network, options[:3], *rest, **more),
        )
    elif name == "bottleneck of the capture":
        monkeypatch.setattr(FeatureTap, "keep", lambda tap, value: None)


@pytest.mark.parametrize(
    ("name", "caught"),
    [
        ("no copy out", ["two alive", "other order"]),
        ("bottleneck of the capture", ["two alive"]),
    ],
)
def test_a_planted_fault_is_caught(
    calls: StandinCapture, monkeypatch: pytest.MonkeyPatch, name: str, caught: list[str]
) -> None:
    fault(name, monkeypatch)
    for case in caught:
        with pytest.raises((AssertionError, RuntimeError)):
            test_values_and_gradients_are_those_of_plain_evaluations(calls, case)


def test_a_missing_key_is_caught(calls: StandinCapture, monkeypatch: pytest.MonkeyPatch) -> None:
    fault("conditions not in the key", monkeypatch)
    with pytest.raises(AssertionError):
        test_a_number_among_the_conditions_is_another_graph(calls)
