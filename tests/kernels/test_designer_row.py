"""The designer's row as a kernel: equal to the torch operations, for every process and setting.

Under the interpreter on the CPU, on a GPU compiled.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from designer_cases import DISCRETE, EDM, both, check, make_denoiser, make_policy, sampler
from gpu import triton_device
from kernel_cases import assert_no_worse_than_eager

from dlms_engine import processes
from dlms_engine.engine.sampler import seeded_noise
from dlms_engine.models.preconditioning import PREDICTIONS
from dlms_engine.ops import designer_row


@pytest.fixture
def device() -> str:
    return triton_device()


@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize(("steps", "order"), [(2, 1), (2, 3), (5, 2), (5, 4), (5, 7)])
def test_orders_steps_and_first_steps(device, steps, order, afs, prediction):
    policy = make_policy(steps=steps, order=order, afs=afs, prediction=prediction)
    check(device, policy, make_denoiser(EDM, "edm"))


@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize("network", ["edm", "data", "noise", "velocity", "flow", "reverse_flow"])
@pytest.mark.parametrize(
    "process",
    [EDM, processes.VP(), processes.VP.fitted(0.002, 80.0), processes.Cosine(), DISCRETE],
    ids=["edm", "vp", "vp fitted", "cosine", "discrete"],
)
def test_processes_and_networks(device, process, network, prediction):
    check(device, make_policy(process, prediction=prediction), make_denoiser(process, network))


def test_a_number_for_every_prediction_of_a_network():
    assert set(designer_row.NETWORK_CODES) == set(PREDICTIONS)


@pytest.mark.parametrize("network", ["data", "velocity", "flow", "reverse_flow"])
def test_rectified_flow(device, network):
    """From t = 1, where alpha is zero."""
    flow = processes.RectifiedFlow()
    policy = make_policy(flow, coordinate="linear", afs=False)
    check(device, policy, make_denoiser(flow, network))


@pytest.mark.parametrize(
    "options",
    [
        {"features": 0},
        {"features": 5},
        {"features": 100},
        {"time_range": 0.0},
        {"scale_range": 0.0},
        {"time_gain": 0.1},
        {"coordinate": "linear"},
        {"steps": 1, "afs": False},
    ],
    ids=str,
)
def test_settings(device, options):
    check(device, make_policy(**options), make_denoiser(EDM, "edm"))


def test_a_designer_with_features_on_a_network_without_a_tap(device):
    check(device, make_policy(), make_denoiser(EDM, "edm", False))


def test_a_time_argument_of_the_networks_own(device):
    denoiser = make_denoiser(EDM, "edm")
    denoiser._time_input = lambda t: 1000 * t
    want, got = both(device, make_policy(), denoiser)
    for (_, noise), (_, expected) in zip(got[:-1], want[:-1], strict=True):
        torch.testing.assert_close(denoiser._noise_level(noise), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_samples_bits_do_not_depend_on_its_batch(device, dtype, prediction):
    policy = make_policy(prediction=prediction)
    policy.designer.to(dtype=dtype)
    for name in ("grid", "init_weights", "init_logits", "constants"):
        setattr(policy.designer, name, getattr(policy.designer, name).double())
    denoiser = make_denoiser(EDM, "edm")
    whole = both(device, policy, denoiser, LARGE if device == "cuda" else 5)[1]
    for batch in (1, 3):
        part = both(device, policy, denoiser, batch)[1]
        for pair, alone in zip(whole, part, strict=True):
            assert all(torch.equal(w[:batch], a) for w, a in zip(pair, alone, strict=True))


@torch.no_grad()
def test_a_float32_designer_is_as_near_to_float64_as_the_torch_operations(device):
    policy, denoiser = make_policy(prediction="noise"), make_denoiser(EDM, "edm")
    narrow = make_policy(prediction="noise")
    for name, parameter in narrow.designer.named_parameters():
        parameter.data = parameter.data.float()
        policy.designer.get_parameter(name).copy_(parameter)  # the same numbers
    batch = LARGE if device == "cuda" else 5
    truth = both(device, policy, denoiser, batch)[0]
    eager, kernel = both(device, narrow, denoiser, batch)
    for n in range(1, len(truth)):
        assert_no_worse_than_eager(kernel[n][0], eager[n][0].cpu(), truth[n][0].cpu())


LARGE = 17  # more samples than one program handles on a GPU; interpreted, each costs seconds

FAULTS = {
    "weights that do not sum to one": (
        "weights += z - tl.sum(z, axis=0) / order",
        "weights += z + 0 * order",
    ),
    "another output written through": ("(lane == n + 1)", "(lane == n)"),
    "the weights shifted": ("tl.load(state + 4 + lane", "tl.load(state + 5 + lane"),
    "float32 series": ("z * (0.008333333333333333", "z * (0.00833333376795"),
    "the scale forgotten": ("(a * scale)", "(a * 1.0)"),
    "times of the step before": ("bias = bias_ptr + (step - 1)", "bias = bias_ptr + (step * 0)"),
    "slots of zero weight read": ("real = used & (lane <= n)", "real = used"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_be_found(device, fault, tmp_path, monkeypatch):
    from dlms_engine.kernels.triton import designer

    good, bad = FAULTS[fault]
    source = Path(designer.device.__file__).read_text()
    assert source.count(good) == 1
    path = tmp_path / "designer_device.py"
    path.write_text(source.replace(good, bad))
    spec = importlib.util.spec_from_file_location("faulty_designer_device", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(designer, "device", module)
    with pytest.raises(AssertionError):
        check(device, make_policy(prediction="noise"), make_denoiser(EDM, "edm"))


@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_whole_run(device, batch, prediction):
    policy = make_policy(prediction=prediction)
    noise = seeded_noise(range(batch), (3, 8, 8), 80.0, dtype=torch.float64, device=device)
    want = sampler(device, "eager", policy)(noise)
    got = sampler(device, "triton", policy)(noise)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_whole_run_in_float32(device):
    policy = make_policy()
    policy.designer.requires_grad_(False)
    noise = seeded_noise(range(3), (3, 8, 8), 80.0, device=device)
    want = sampler(device, "eager", policy, torch.float32)(noise)
    got = sampler(device, "triton", policy, torch.float32)(noise)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_an_empty_batch(device):
    noise = torch.zeros(0, 3, 8, 8, dtype=torch.float64, device=device)
    assert sampler(device, "triton", make_policy())(noise).shape == noise.shape
