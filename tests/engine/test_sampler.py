"""The sampler against a plain loop, its call counts, seeds, batches and refusals."""

from __future__ import annotations

import pytest
import torch
from analytic import GaussianMixture, run_table
from torch import Tensor, nn

from dlms_engine import grids, ops, processes, solvers
from dlms_engine.engine.sampler import Sampler, seeded_noise
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.dlms import Designer, DesignerPolicy, DesignerSettings

EDM = processes.EDM()
FLOW = processes.RectifiedFlow()


def noise(process: processes.Process = EDM, batch: int = 5) -> Tensor:
    sigma = float(process.sigma(torch.tensor(process.t_max, dtype=torch.float64)))
    return seeded_noise(range(batch), (16,), sigma, dtype=torch.float64)


def tables(process: processes.Process):
    grid = grids.polynomial(process, 4)
    yield solvers.ddim(process, grid)
    yield solvers.ipndm(process, grid, order=3, afs=True)
    yield solvers.dpm_solver_pp(process, grid, order=3)
    yield solvers.unipc(process, grid, order=2)
    yield solvers.heun(process, grid)


CASES = [(p, t) for p in (EDM, FLOW, processes.VP()) for t in tables(p)]


@pytest.mark.parametrize(("process", "table"), CASES, ids=lambda v: getattr(v, "name", None))
def test_float64_run_equals_the_definition_and_counts_calls(process, table):
    mixture = GaussianMixture(process)
    x = noise(process)
    expected = run_table(table, GaussianMixture(process), x)
    sampler = Sampler(
        Denoiser(lambda x, t: mixture(x, t), process, "data"), table, dtype=torch.float64
    )
    torch.testing.assert_close(sampler(x), expected, rtol=0, atol=1e-10)
    assert mixture.calls == table.nfe == sampler.nfe


def test_every_backend_of_this_device_agrees_with_eager():
    table = solvers.dpm_solver_pp(EDM, grids.polynomial(EDM, 5), order=3)
    denoiser = small_network_denoiser()
    x = seeded_noise(range(3), (3, 8, 8), 80.0)
    expected = Sampler(denoiser, table, backend="eager")(x)
    for name in ops.available("cpu"):
        got = Sampler(denoiser, table, backend=name)(x)
        assert torch.equal(got, expected), name


class SmallNetwork(nn.Module):
    """Per-sample arithmetic only: convolutions may pick another order for another batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return torch.tanh(self.gain * x) * (1 + c_noise.reshape(-1, *[1] * (x.ndim - 1)))


def small_network_denoiser() -> Denoiser:
    return Denoiser(SmallNetwork(), EDM, "edm")


def test_a_sample_does_not_depend_on_its_batch():
    table = solvers.ipndm(EDM, grids.polynomial(EDM, 5), order=4, afs=True)
    sampler = Sampler(small_network_denoiser(), table)
    together = sampler.sample(range(7), (3, 5, 5))
    alone = torch.cat([sampler.sample([seed], (3, 5, 5)) for seed in range(7)])
    assert torch.equal(together, alone)


def test_that_check_sees_a_leak_between_samples():
    inner = SmallNetwork()
    leaky = Denoiser(lambda x, t: inner(x, t) - x.mean(0) * 1e-6, EDM, "edm")
    table = solvers.ddim(EDM, grids.polynomial(EDM, 3))
    sampler = Sampler(leaky, table)
    together = sampler.sample(range(4), (3, 5, 5))
    alone = torch.cat([sampler.sample([seed], (3, 5, 5)) for seed in range(4)])
    assert not torch.equal(together, alone)


def test_repeated_runs_are_the_same_bits_and_leave_the_noise_alone():
    sampler = Sampler(small_network_denoiser(), solvers.ddim(EDM, grids.polynomial(EDM, 3)))
    x = seeded_noise([1, 2], (3, 4, 4), 80.0)
    kept = x.clone()
    first = sampler(x)
    assert torch.equal(first, sampler(x))
    assert torch.equal(x, kept)


def test_trajectory_and_callback_see_every_row():
    table = solvers.ddim(EDM, grids.polynomial(EDM, 4))
    seen: list[int] = []
    x = noise(batch=2)
    mixture = GaussianMixture(EDM)
    sampler = Sampler(Denoiser(lambda x, t: mixture(x, t), EDM, "data"), table, dtype=torch.float64)
    end, states = sampler(x, return_trajectory=True, callback=lambda step: seen.append(step.index))
    assert seen == [0, 1, 2, 3]
    assert states.shape == (5, 2, 16)
    assert torch.equal(states[0], x)
    assert torch.equal(states[-1], end)


def test_the_network_is_asked_where_the_table_says_and_in_its_own_dtype():
    asked: list[tuple[float, torch.dtype, torch.dtype]] = []

    class Asked(SmallNetwork):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            asked.append((float(c_noise[0]), x.dtype, c_noise.dtype))
            return super().forward(x, c_noise).to(x.dtype)

    table = solvers.heun(EDM, grids.polynomial(EDM, 2))
    sampler = Sampler(Denoiser(Asked().to(torch.bfloat16), EDM, "edm"), table)
    sampler(seeded_noise([0], (3, 4, 4), 80.0))
    expected = [float(t.log() / 4) for t in table.times]
    assert [round(a[0], 5) for a in asked] == [round(e, 5) for e in expected]
    assert {a[1:] for a in asked} == {(torch.bfloat16, torch.float32)}


def test_batched_tables_run_a_grid_per_sample():
    grid = torch.stack([grids.polynomial(EDM, 4), grids.logsnr(EDM, 4)])
    table = solvers.dpm_solver_pp(EDM, grid, order=2)
    mixture = GaussianMixture(EDM)
    denoiser = Denoiser(lambda x, t: mixture(x, t), EDM, "data")
    x = noise(batch=2)
    together = Sampler(denoiser, table, dtype=torch.float64)(x)
    for i in range(2):
        one = solvers.dpm_solver_pp(EDM, grid[i], order=2)
        alone = Sampler(denoiser, one, dtype=torch.float64)(x[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("order", [2, 4, 7])
def test_an_untrained_designer_is_the_table_it_starts_from(prediction, afs, order):
    """Also with features that are not zero: the head starts at zero whatever it reads."""
    steps = 6
    grid = grids.polynomial(EDM, steps)
    weights = torch.zeros(steps, order, dtype=torch.float64)
    for n in range(1, steps + 1):
        row = AB[min(n, order, 4)]
        weights[n - 1, : len(row)] = torch.tensor(row, dtype=torch.float64)
    settings = DesignerSettings(steps, order, afs, prediction, features=0)
    policy = DesignerPolicy(Designer(settings, EDM, grid, weights))
    mixture = GaussianMixture(EDM)
    denoiser = Denoiser(lambda x, t: mixture(x, t), EDM, "data")
    x = noise(batch=3)
    got = Sampler(denoiser, policy, dtype=torch.float64)(x)
    expected = reference_multistep(mixture, grid, weights, afs, prediction, x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    if prediction == "noise":
        table = solvers.ipndm(EDM, grid, order=min(order, 4), afs="zero" if afs else False)
        handcrafted = Sampler(denoiser, table, dtype=torch.float64)(x)
        torch.testing.assert_close(got, handcrafted, rtol=0, atol=1e-9)


AB = {
    1: (1.0,),
    2: (1.5, -0.5),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def reference_multistep(mixture, grid, weights, afs, prediction, x):
    """DLMS Eq. 8-9 for sigma = t, and its noise form, as printed."""
    queue: list[Tensor] = []
    for n in range(1, len(grid)):
        t, t_next = grid[n - 1], grid[n]
        data = torch.zeros_like(x) if afs and n == 1 else mixture(x, t)
        queue.insert(0, data if prediction == "data" else (x - data) / t)
        combined = sum(w * m for w, m in zip(weights[n - 1], queue, strict=False))
        q = t_next / t
        x = q * x + (1 - q) * combined if prediction == "data" else x + (t_next - t) * combined
    return x


def test_a_solver_of_another_process_is_refused_with_both_named():
    table = solvers.ddim(FLOW, grids.polynomial(FLOW, 3))
    with pytest.raises(ValueError, match=r"edm.*|flow.*"):
        Sampler(small_network_denoiser(), table)


def test_what_is_no_solver_and_no_seeds_is_refused_with_what_to_do():
    """A path was "str, expected a table or policy", and a number "not iterable"."""
    with pytest.raises(TypeError, match=r"solver is str.*load_solver\(path\)"):
        Sampler(small_network_denoiser(), "five.safetensors")
    sampler = Sampler(small_network_denoiser(), solvers.ddim(EDM, grids.polynomial(EDM, 3)))
    with pytest.raises(TypeError, match=r"seeds is 8, expected .* such as range\(8\)"):
        sampler.sample(8, (3, 8, 8))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'fastest'"):
        Sampler(
            small_network_denoiser(), solvers.ddim(EDM, grids.polynomial(EDM, 3)), backend="fastest"
        )


def test_thresholding_runs_through_the_slow_path():
    table = solvers.ddim(EDM, grids.polynomial(EDM, 3))
    denoiser = Denoiser(lambda x, t: 4 * x, EDM, "data", dynamic_thresholding=1.0)
    out = Sampler(denoiser, table)(seeded_noise([0], (3, 4, 4), 80.0))
    assert out.abs().max() < 1.01  # every data prediction was clipped to [-1, 1]
    plain = Sampler(Denoiser(lambda x, t: 4 * x, EDM, "data"), table)
    assert plain(seeded_noise([0], (3, 4, 4), 80.0)).abs().max() > 10


def test_an_empty_batch_is_legal():
    sampler = Sampler(small_network_denoiser(), solvers.ddim(EDM, grids.polynomial(EDM, 3)))
    assert sampler(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)


def test_a_whole_run_compiles_to_one_graph_and_is_not_compiled_again():
    torch._dynamo.reset()
    table = solvers.dpm_solver_pp(EDM, grids.polynomial(EDM, 4), order=3)
    sampler = Sampler(small_network_denoiser(), table)
    compiled = torch.compile(sampler, fullgraph=True)
    x = seeded_noise([0, 1], (3, 4, 4), 80.0)
    expected = sampler(x)
    torch.testing.assert_close(compiled(x), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(x + 1), sampler(x + 1))


def test_rng_of_the_device_is_the_cpus_on_the_cpu_and_others_are_refused() -> None:
    plain = seeded_noise([3, 4], (2, 2), 5.0)
    assert torch.equal(seeded_noise([3, 4], (2, 2), 5.0, rng="device"), plain)
    with pytest.raises(ValueError, match="rng is 'gpu'"):
        seeded_noise([3], (2, 2), rng="gpu")  # type: ignore[arg-type]
