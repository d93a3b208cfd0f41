"""What a caller gets wrong on the first day is refused with what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from mixture_network import mixture_denoiser
from torch import Tensor, nn

from dlms_engine import Denoiser, Sampler, distill, grids, recommend, solvers
from dlms_engine.models.wrapping import check_keywords
from dlms_engine.processes import EDM, RectifiedFlow


def first_channel(x: Tensor, t: Tensor) -> Tensor:
    return x[:, :1]


def test_an_output_that_is_not_like_its_input_is_no_prediction() -> None:
    """One channel of three was spread over all of them, and solvers were ranked on that."""
    denoiser = Denoiser(first_channel, EDM(), prediction="data")
    with pytest.raises(ValueError, match=r"returned \[4, 1, 2, 2\] for x \[4, 3, 2, 2\]"):
        denoiser(torch.zeros(4, 3, 2, 2), 1.0)
    with pytest.raises(ValueError, match="expected a tensor like x"):
        recommend(denoiser, nfe=3, shape=(3, 2, 2), effort="lean", progress=False)
    assert denoiser(torch.zeros(4, 1, 2, 2), 1.0).shape == (4, 1, 2, 2)


@pytest.mark.parametrize(
    ("network", "process", "said"),
    [
        (first_channel, "EDM", "process is 'EDM', expected one of dlms_engine.processes"),
        (first_channel, None, "process is None, expected one of dlms_engine.processes"),
        (EDM(), EDM(), "network is EDM, expected a callable"),
    ],
)
def test_what_is_no_network_or_process(network: Any, process: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        Denoiser(network, process, prediction="data")


def test_names_of_conditions_are_checked_before_the_work() -> None:
    def labelled(x: Tensor, c_noise: Tensor, label: Tensor, *, scale: float = 1.0) -> Tensor:
        return x * scale

    def anything(x: Tensor, c_noise: Tensor, **conditions: Any) -> Tensor:
        return x

    check_keywords(labelled, ["label"])
    check_keywords(labelled, ["label", "scale"])
    check_keywords(anything, ["whatever"])
    with pytest.raises(ValueError, match=r"takes \(input\), expected network\(x, c_noise\)"):
        check_keywords(torch.nn.Identity(), [])
    with pytest.raises(ValueError, match=r"takes \(t, x\), the time first"):  # as torchcfm's do
        check_keywords(lambda t, x, y=None: x, [])
    with pytest.raises(ValueError, match="the network needs label beside x and c_noise"):
        check_keywords(labelled, [])
    with pytest.raises(ValueError, match="conditions have size, which the network does not take"):
        check_keywords(labelled, ["label", "size"])


def test_a_class_is_no_process() -> None:
    with pytest.raises(TypeError, match=r"process is the class EDM, expected one: EDM\(\)"):
        Denoiser(first_channel, EDM, prediction="data")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"effort": "fast"}, "effort is 'fast'"),  # it was lean, without a word
        ({"shape": 16}, "shape is 16, expected that of one sample"),
        ({"shape": "16"}, "shape is '16', expected that of one sample"),
        ({"shape": (-1, 4)}, "a size in shape is -1"),
        ({"shape": ()}, r"shape is \(\), expected at least one size"),  # an error of torch.randn
        ({"nfe": 2.5}, "nfe is 2.5"),
        ({"nfe": 1000}, "nfe is 1000, expected 1 to 96: .* exact solution of at most 384"),
        ({"conditions": {"t": 1}}, r"conditions have \['t'\], which denoisers or samplers take"),
        ({"conditions": [1, 2]}, "conditions are list, expected keywords"),
    ],
)
def test_recommend_refuses_by_value(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        recommend(mixture_denoiser(), **({"nfe": 3, "shape": (16,), "progress": False} | wrong))


@pytest.mark.parametrize("wrong", [{"shape": 16}, {"cond": [1, 2]}])
def test_distill_refuses_by_value(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="expected"):
        distill(mixture_denoiser(), **({"nfe": 3, "shape": (16,), "progress": False} | wrong))


@dataclass
class Output:
    sample: Tensor


def half(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda y: [y],
        lambda y: (y, None),
        lambda y: ((y,), 1),
        lambda y: (Output(y), None),
        lambda y: {"sample": y},
    ],
)
def test_the_tensor_is_found_in_what_networks_return(wrapped: Any) -> None:
    x = torch.ones(2, 3)
    found = Denoiser(lambda x, t: wrapped(half(x, t)), EDM(), "data")(x, 1.0)
    assert torch.equal(found, 0.5 * x)


@pytest.mark.parametrize("returned", [None, (), [], (None, 1), ((), 1), {"x": 1}, {}, 3.0, "text"])
def test_what_holds_no_tensor_is_refused_by_name(returned: Any) -> None:
    """It was an IndexError, or 'NoneType object is not subscriptable'."""
    network, name = lambda x, t: returned, type(returned).__name__
    flow = RectifiedFlow()
    table = solvers.ddim(flow, grids.time_uniform(flow, 2))
    for call in (Denoiser(network, flow), Sampler(Denoiser(network, flow), table)):
        with pytest.raises(TypeError, match=f"the network returned {name}.*wrap it"):
            call(torch.ones(2, 3), *((1.0,) if isinstance(call, Denoiser) else ()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: y + 0j, "returned torch.complex64, expected floating point"),  # half was dropped
        (lambda y: y.long(), "returned torch.int64, expected floating point"),
        (lambda y: y[:1], r"returned \[1, 3\] for x \[2, 3\]"),  # one sample served all
        (lambda y: y.flatten(), r"returned \[6\] for x \[2, 3\]"),
    ],
)
def test_an_output_that_is_no_prediction_is_refused_everywhere(change: Any, said: str) -> None:
    flow = RectifiedFlow()
    denoiser = Denoiser(lambda x, t: change(half(x, t)), flow)
    table = solvers.ddim(flow, grids.time_uniform(flow, 2))
    with pytest.raises(ValueError, match=said):
        denoiser(torch.ones(2, 3), 1.0)
    with pytest.raises(ValueError, match=said):
        Sampler(denoiser, table)(torch.ones(2, 3))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_network_may_write_into_its_times(batch: int) -> None:
    """``t *= 1000`` changed the sampler's own times for the runs to come, or raised."""
    flow = RectifiedFlow()

    def polite(x: Tensor, t: Tensor) -> Tensor:
        return x * (1000 * t)[:, None].sin()

    def hasty(x: Tensor, t: Tensor) -> Tensor:
        t *= 1000
        return x * t[:, None].sin()

    table, x = solvers.ddim(flow, grids.time_uniform(flow, 3)), torch.randn(batch, 4)
    samplers = [Sampler(Denoiser(network, flow), table) for network in (polite, hasty)]
    for _ in range(3):
        wanted, found = (sampler(x) for sampler in samplers)
        assert torch.equal(found, wanted)


def test_branches_of_other_sizes_are_refused_by_key() -> None:
    """Seven words and five: torch's error about expanded sizes named neither."""

    def network(x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        return x + text["words"].mean((1, 2))[:, None]

    denoiser = Denoiser(
        network, EDM(), "data", guidance_scale=2.0,
        unconditional={"text": {"words": torch.zeros(1, 5, 2)}},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"unconditional\['text'\]\['words'\] is \[1, 5, 2\]"):
        denoiser(torch.ones(3, 4), 1.0, text={"words": torch.ones(3, 7, 2)})
    with pytest.raises(
        ValueError, match=r"condition\['text'\]\['words'\] is \[2, 5, 2\], expected \[3"
    ):
        denoiser(torch.ones(3, 4), 1.0, text={"words": torch.ones(2, 5, 2)})
    assert denoiser(torch.ones(3, 4), 1.0, text={"words": torch.ones(1, 5, 2)}).shape == (3, 4)


class Tapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.used(x) * t[:, None]


def test_features_that_no_call_gives_are_refused_by_name() -> None:
    """A traced network took the hook and never ran it; the error said to name the features."""
    arguments = (torch.ones(2, 3), torch.ones(2))
    for made in (torch.jit.script(Tapped()), torch.jit.trace(Tapped(), arguments)):
        with pytest.raises(ValueError, match=r"features='used' is inside a scripted or traced"):
            Denoiser(made, EDM(), "data", features="used")
        assert Denoiser(made, EDM(), "data")(torch.ones(2, 3), 1.0).shape == (2, 3)
    denoiser = Denoiser(Tapped(), EDM(), "data", features="idle")
    denoiser(torch.ones(2, 3), 1.0)
    with pytest.raises(RuntimeError, match="did not run its module 'idle'"):
        _ = denoiser.bottleneck


@pytest.mark.parametrize(
    ("level", "said"),
    [
        (lambda t: t.tolist(), "time_input gave float for times"),
        (lambda t: 5.0, "time_input gave float"),
        (lambda t: t.expand(2, *t.shape), r"time_input gave \[2\] for times \[\]"),
    ],
)
def test_a_time_input_gives_a_tensor_like_the_times(level: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Denoiser(half, EDM(), "data", time_input=level)(torch.ones(2, 3), 1.0)
