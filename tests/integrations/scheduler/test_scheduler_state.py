"""What a scheduler carries: float32 shadow, history, learned solvers, no waiting for the device."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
from dlms_engine import grids, processes, solvers  # noqa: E402
from dlms_engine.engine.sampler import Sampler  # noqa: E402
from dlms_engine.integrations.diffusers import DLMSScheduler  # noqa: E402
from dlms_engine.integrations.scheduler import tables  # noqa: E402
from dlms_engine.models.denoiser import Denoiser  # noqa: E402
from dlms_engine.policies.distilled import save_solver  # noqa: E402
from dlms_engine.policies.dlms import Designer, DesignerPolicy, DesignerSettings  # noqa: E402

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SOLVERS = ["ddim", "dpm_solver_pp", "unipc", "deis", "ipndm"]


def noise(dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


def predict(x: Tensor) -> Tensor:
    return 0.7 * x + 0.1 * torch.sin(3 * x)


def run(scheduler: Any, x: Tensor, steps: int = 12, touch: Any = None) -> Tensor:
    scheduler.set_timesteps(steps)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(predict(x), t, x, return_dict=False)[0]
        x = x if touch is None else touch(i, x)
    return x


@pytest.mark.parametrize("solver", SOLVERS)
def test_shadow_removes_the_error_of_bfloat16_latents(solver: str) -> None:
    """The network sees and answers bfloat16 either way; only the carried state differs."""

    def error(keep: bool) -> float:
        scheduler = DLMSScheduler(**CONFIG, solver=solver)

        def forget(_i: int, x: Tensor) -> Tensor:
            scheduler._runner._state._x.copy_(x.float())
            return x

        touch = None if keep else forget
        low = run(scheduler, noise(torch.bfloat16), 40, touch)
        assert low.dtype == torch.bfloat16
        return float((low.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    exact = run(DLMSScheduler(**CONFIG, solver=solver), noise(torch.bfloat16).float(), 40)
    # planted fault: with the rounded latents in the shadow's place the error is several times that
    assert error(keep=True) < 6e-3
    assert error(keep=False) > 1.5 * error(keep=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_latents_keep_their_dtype_and_memory(dtype: torch.dtype) -> None:
    scheduler = DLMSScheduler(**CONFIG)
    scheduler.set_timesteps(4)
    x = noise(dtype)
    kept = x.clone()
    given = [x]
    for t in scheduler.timesteps:
        given.append(scheduler.step(predict(given[-1]), t, given[-1]).prev_sample)
    assert {g.dtype for g in given} == {dtype}
    assert len({g.data_ptr() for g in given}) == len(given)  # old latents stay what they were
    assert torch.equal(x, kept)


class NoReads(TorchDispatchMode):
    """Fails on everything that makes the host wait for a tensor's value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("begin", [0, 5])
def test_step_reads_no_value(solver: str, begin: int) -> None:
    scheduler = DLMSScheduler(**CONFIG, solver=solver)
    scheduler.set_timesteps(12)
    timesteps = scheduler.timesteps[begin:]
    outputs = [0.1 * noise() for _ in timesteps]
    x = noise()
    views = list(timesteps)
    with NoReads():
        assert scheduler.index_for_timestep(views[0]) == begin  # by its place in memory
    scheduler.set_begin_index(begin)
    with NoReads():
        for t, out in zip(views, outputs, strict=True):
            x = scheduler.step(out, t, scheduler.scale_model_input(x, t), return_dict=False)[0]
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReads():
        float(views[0])
    assert scheduler.step_index == 12


def test_a_time_that_the_run_does_not_have_is_said_to_be_taken_for_the_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scheduler = DLMSScheduler(**CONFIG)
    scheduler.set_timesteps(6)
    times = scheduler.timesteps
    assert [scheduler.index_for_timestep(t.clone()) for t in times] == list(range(6))
    assert not caplog.text  # planted: known times, copied
    assert scheduler.index_for_timestep(123456) == 0
    assert "123456 is none of this run's 6" in caplog.text and "set_begin_index" in caplog.text


def test_the_timestep_is_not_used_at_all_after_the_first_step() -> None:
    scheduler = DLMSScheduler(**CONFIG)
    expected = run(scheduler, noise(), 6)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(0)
    x = noise()
    for _ in range(6):
        x = scheduler.step(predict(x), torch.tensor(float("nan")), x, return_dict=False)[0]
    assert torch.equal(x, expected)


@pytest.mark.parametrize("solver", SOLVERS)
def test_latents_changed_by_a_callback_are_taken_over(solver: str) -> None:
    """In place or by a new tensor, and the history of earlier steps stays valid."""

    def in_place(i: int, x: Tensor) -> Tensor:
        return x.mul_(0.9) if i == 3 else x

    def replaced(i: int, x: Tensor) -> Tensor:
        return x * 0.9 if i == 3 else x

    ends = [
        run(DLMSScheduler(**CONFIG, solver=solver), noise(), touch=f) for f in (in_place, replaced)
    ]
    untouched = run(DLMSScheduler(**CONFIG, solver=solver), noise())
    assert torch.equal(*ends)
    assert (ends[0] - untouched).abs().max() > 1e-3


def test_reset_forgets_history_begin_and_shapes() -> None:
    scheduler = DLMSScheduler(**CONFIG, solver="unipc")
    first = run(scheduler, noise())
    scheduler.set_timesteps(7)
    scheduler.set_begin_index(3)
    scheduler.step(noise(batch=5), scheduler.timesteps[3], noise(batch=5))
    scheduler.set_timesteps(12)
    assert scheduler.step_index is None and scheduler.begin_index is None
    assert torch.equal(run(scheduler, noise()), first)


def test_gradients_flow_through_steps() -> None:
    scheduler = DLMSScheduler(**CONFIG, solver="unipc")
    x = noise().double().requires_grad_()
    end = run(scheduler, x, 5)
    (grad,) = torch.autograd.grad(end.square().sum(), x)
    step = 1e-5 * torch.ones_like(x)
    with torch.no_grad():
        up, down = (run(scheduler, x + sign * step, 5).square().sum() for sign in (1, -1))
    expected = float((up - down) / 2)
    assert float((grad * step).sum()) == pytest.approx(expected, rel=1e-5)


# -- learned solvers -----------------------------------------------------------------------------


class Wiggle(nn.Module):
    """A noise predictor with a bottleneck that depends on sample and time."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.Identity()

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        t = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1, 1, 1) / 1000
        hidden = self.mid_block(torch.sin(sample + t))
        return 0.8 * sample + 0.1 * hidden * (1 + t)


def config_scheduler() -> Any:
    return diffusers.DDIMScheduler(**CONFIG, clip_sample=False)


def process() -> Any:
    return DLMSScheduler(**CONFIG).noise_model.process


def designer(*, features: int = 64, afs: bool = False, steps: int = 4) -> DesignerPolicy:
    p = process()
    settings = DesignerSettings(
        steps=steps, order=3, afs=afs, features=features, coordinate="linear", prediction="data"
    )
    weights = torch.zeros(steps, 3, dtype=torch.float64)
    weights[:, 0] = 1.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        grid = grids.time_uniform(p, steps)
        policy = DesignerPolicy(Designer(settings, p, grid, weights))
        nn.init.normal_(policy.designer.head.weight, std=0.3)
    return policy


def in_pipeline(scheduler: DLMSScheduler, network: nn.Module, steps: int, batch: int = 3) -> Tensor:
    """A pipeline's loop without guidance."""
    scheduler.set_timesteps(steps)
    x = noise(batch=batch) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = network(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(out, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("afs", [False, True, "zero"])
@pytest.mark.parametrize("maker", ["dpm_solver_pp", "ipndm"])
def test_a_table_runs_as_in_the_sampler(maker: str, afs: Any) -> None:
    p = process()
    table = solvers.make_solver(maker, p, grids.time_uniform(p, 5), afs=afs)
    network = Wiggle()
    expected = Sampler(Denoiser(network, p, "noise"), table)(noise(batch=3))
    scheduler = DLMSScheduler.from_config(config_scheduler().config, solver=table)
    found = in_pipeline(scheduler, network, table.nfe)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_noise_of_a_solver_that_begins_below_the_configs_highest_level() -> None:
    """The noise was that of ``sigma_max``, 700, and the solver's first level 80."""
    config = diffusers.EDMEulerScheduler(sigma_max=700.0).config
    process = processes.EDM(0.002, 80.0)
    table = solvers.ipndm(process, grids.polynomial(process, 4))
    scheduler = DLMSScheduler.from_config(config, solver=table)
    assert scheduler.init_noise_sigma == (80.0**2 + 1) ** 0.5
    network = Wiggle()
    found = in_pipeline(scheduler, network, 4)
    expected = Sampler(Denoiser(network, process, "edm"), table)(noise(batch=3) * 80.0)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    # planted fault: a handcrafted solver begins at the config's level
    handcrafted = DLMSScheduler.from_config(config, solver="ipndm")
    assert handcrafted.init_noise_sigma == (700.0**2 + 1) ** 0.5


def test_afs_is_refused_where_the_pipeline_does_not_scale() -> None:
    p = process()
    table = solvers.ddim(p, grids.time_uniform(p, 5), afs=True)
    scheduler = DLMSScheduler.from_config(config_scheduler().config, solver=table)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="accelerate"):
        scheduler.step(noise(), scheduler.timesteps[0], noise())


@pytest.mark.parametrize("afs", [False, True])
def test_per_sample_rows_equal_the_sampler(afs: bool) -> None:
    policy = designer(afs=afs)
    network = Wiggle()
    denoiser = Denoiser(network, process(), "noise", features="mid_block")
    expected = Sampler(denoiser, policy)(noise(batch=3))
    scheduler = DLMSScheduler.from_config(config_scheduler().config, solver=policy)
    scheduler.watch(network)
    found = in_pipeline(scheduler, network, policy.nfe)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    alone = in_pipeline(scheduler, network, policy.nfe, batch=1)
    torch.testing.assert_close(found[:1], alone, rtol=1e-6, atol=1e-5)
    blind = scheduler._watch._replace_time
    scheduler._watch.ratio = None
    assert blind(network, (noise(), 1), {}) is None
    # planted fault: the same rows with the pipeline's shared times are another answer
    scheduler._watch._handles[1].remove()
    assert (in_pipeline(scheduler, network, policy.nfe) - expected).abs().max() > 1e-4
    scheduler.unwatch()


def test_a_per_sample_solver_must_see_the_network() -> None:
    scheduler = DLMSScheduler.from_config(config_scheduler().config, solver=designer())
    with pytest.raises(ValueError, match="watch"):
        scheduler.set_timesteps(4)


def test_a_designer_without_features_needs_no_watch() -> None:
    policy = designer(features=0)
    network = Wiggle()
    expected = Sampler(Denoiser(network, process(), "noise"), policy)(noise(batch=3))
    scheduler = DLMSScheduler.from_config(config_scheduler().config, solver=policy)
    found = in_pipeline(scheduler, network, policy.nfe)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_learned_solver_is_saved_beside_the_config(tmp_path: Any) -> None:
    p = process()
    table = solvers.dpm_solver_pp(p, grids.time_uniform(p, 4), order=3)
    own = DLMSScheduler.from_config(config_scheduler().config, solver=table)
    own.save_pretrained(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "dlms_solver.safetensors",
        "scheduler_config.json",
    ]
    loaded = DLMSScheduler.from_pretrained(tmp_path)
    network = Wiggle()
    assert torch.equal(in_pipeline(own, network, 4), in_pipeline(loaded, network, 4))
    by_path = DLMSScheduler(**CONFIG, solver=str(tmp_path / "dlms_solver.safetensors"))
    assert torch.equal(in_pipeline(own, network, 4), in_pipeline(by_path, network, 4))
    assert copy.deepcopy(loaded).solver.nfe == 4


def test_a_config_names_no_file_of_this_machine(tmp_path: Any) -> None:
    """A config is downloaded: a path in it would be opened wherever it points."""
    path = tmp_path / "elsewhere" / "solver.safetensors"
    path.parent.mkdir()
    save_solver(path, solvers.ddim(processes.EDM(), grids.polynomial(processes.EDM(), 3)))
    DLMSScheduler(**CONFIG).save_pretrained(tmp_path / "scheduler")
    config = tmp_path / "scheduler" / "scheduler_config.json"
    held = json.loads(config.read_text())
    for named in (str(path), "../elsewhere/solver.safetensors", "dlms_solver.safetensors"):
        config.write_text(json.dumps(held | {"solver": named}))
        with pytest.raises((ValueError, OSError), match="the config's solver is|dlms_solver"):
            DLMSScheduler.from_pretrained(tmp_path / "scheduler")
        with pytest.raises(ValueError, match="the config's solver is"):
            DLMSScheduler.from_config(json.loads(config.read_text()))
    config.write_text(json.dumps(held))
    DLMSScheduler.from_pretrained(tmp_path / "scheduler")  # planted: without the path it loads


def test_learned_solver_refuses_what_it_was_not_made_for() -> None:
    p = process()
    table = solvers.ddim(p, grids.time_uniform(p, 4))
    own = DLMSScheduler.from_config(config_scheduler().config, solver=table)
    with pytest.raises(ValueError, match="num_inference_steps=4"):
        own.set_timesteps(50)
    with pytest.raises(ValueError, match="its own times"):
        own.set_timesteps(timesteps=[900, 500, 300, 100])
    other = DLMSScheduler(beta_schedule="squaredcos_cap_v2", solver=table)
    with pytest.raises(ValueError, match="made for"):
        other.set_timesteps(4)
    with pytest.raises(TypeError, match="expected a name"):
        DLMSScheduler(solver=3)


def test_a_late_start_of_a_learned_table_is_consistent() -> None:
    """Constant data prediction: any start must arrive exactly at it."""
    p = process()
    table = solvers.dpm_solver_pp(p, grids.time_uniform(p, 6, t_min=0.2), order=3)
    scheduler = DLMSScheduler.from_config(
        diffusers.DDIMScheduler(**CONFIG, prediction_type="sample", clip_sample=False).config,
        solver=table,
    )
    data, z = noise(), noise().flip(0)
    for begin in (0, 1, 3, 5):
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(begin)
        x = scheduler.add_noise(data, z, scheduler.timesteps[begin : begin + 1])
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(data, t, x, return_dict=False)[0]
        end = p.alpha(0.2).float() * data + p.sigma(0.2).float() * z
        torch.testing.assert_close(x, end, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["in place", "data", "numpy"])
def test_a_callbacks_change_counts_however_it_is_made(way: str) -> None:
    """A change through ``.data`` or numpy leaves no trace on the tensor: it was ignored."""

    def halve(x: torch.Tensor) -> None:
        if way == "in place":
            x.mul_(0.5)
        elif way == "data":
            x.data.mul_(0.5)
        else:
            x.numpy()[...] *= 0.5

    ends = []
    for changed in (True, False):
        scheduler = DLMSScheduler(beta_schedule="scaled_linear", solver="dpm_solver_pp")
        scheduler.set_timesteps(5)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            x = scheduler.step(torch.sin(x) + 0.1, t, x, return_dict=False)[0]
            if changed:
                halve(x)
            else:
                x = x * 0.5
        ends.append(x)
    assert torch.equal(*ends)


def test_a_start_after_the_last_step_says_what_to_do() -> None:
    """Image-to-image with a strength so small that no step is left."""
    scheduler = DLMSScheduler()
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=r"no step is left.*strength"):
        scheduler.set_begin_index(5)


def test_clipping_is_that_of_ddim() -> None:
    """diffusers' DDIM keeps the noise of the prediction that was not clipped: 10 % apart."""
    reference = diffusers.DDIMScheduler(clip_sample=True, timestep_spacing="trailing")
    fresh = DLMSScheduler.from_config(diffusers.DDIMScheduler().config, solver="ddim")
    assert fresh.config.clip_sample and fresh.config.timestep_spacing == "leading"
    own = DLMSScheduler.from_config(reference.config, solver="ddim")
    ends = []
    for scheduler in (reference, own):
        scheduler.set_timesteps(5)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            x = scheduler.step(0.7 * torch.sin(x), t, x, return_dict=False)[0]
        ends.append(x)
    assert (ends[0] - ends[1]).abs().max() < 1e-5


@pytest.mark.parametrize("when", range(1, 6))
def test_a_table_that_another_thread_pushes_out_meanwhile_is_made_again(when: int) -> None:
    """Bug: between the look and the use that ended ``set_timesteps`` in a KeyError."""

    class Key:
        """Where it is hashed for the ``when``-th time, another thread's tables push this one out."""

        left = 0

        def __hash__(self) -> int:
            self.left -= 1
            if self.left == 0:
                tables._cache.clear()
            return 0

    process, key = processes.RectifiedFlow(), Key()
    grid = torch.linspace(1, 0, 4, dtype=torch.float64)
    first = tables.named_table("ddim", process, grid, {}, key)
    assert tables.named_table("ddim", process, grid, {}, key) is first
    key.left = when
    again = tables.named_table("ddim", process, grid, {}, key)
    assert torch.equal(again.a, first.a) and torch.equal(again.b, first.b)
