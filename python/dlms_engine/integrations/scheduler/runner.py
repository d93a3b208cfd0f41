"""One run of a scheduler, from ``set_timesteps`` to the last step."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...policies.corrector import CorrectedPolicy, Correctors
from ...solvers.policy import policy_of
from ...solvers.table import SolverTable
from .clipping import clipped, clips
from .flow_times import is_default
from .noise import NoiseModel
from .origin import origin_of
from .plan import (
    Rows,
    StartRows,
    late_start,
    make_plan,
    policy_rows,
    spliced,
    strided_rows,
    table_rows,
)
from .sample_rows import SampleRows
from .source import SolverLike, Source
from .state import State
from .tables import named_table, solver_options
from .times import Times, run_times, vector
from .watch import Watch

_log = logging.getLogger("dlms_engine")


class Runner:
    """Everything between two ``set_timesteps``: rows, levels, and the state once it is running.

    Attributes:
        timesteps: ``[steps]`` the times passed to the network; int64 where all are whole, else float32.
        levels: ``[steps + 1]`` float64 process times of the states.
        sigmas: ``[steps + 1]`` float32: sigma / alpha of the states, or a flow's sigma.
        correctors: what follows the rows of a learned solver, if anything does.
    """

    def __init__(
        self,
        source: Source,
        config: Mapping[str, Any],
        model: NoiseModel,
        steps: int | None,
        timesteps: Any,
        sigmas: Any,
        mu: float | None,
        watch: Watch | None,
    ) -> None:
        self._config = config
        self._model = model
        self._steps = steps
        self._watch = watch
        self._own_rows: SampleRows | None = None
        self.correctors: Correctors | None = None
        self._times: Times | None = None
        self._name = source if isinstance(source, str) else None
        if self._name is not None:
            self._rows = self._named(steps, timesteps, sigmas, mu)
        else:
            self._rows = self._learned(source, steps, timesteps, sigmas)
        self.levels = self._rows.levels
        told = self._told()
        asked = model.timestep(self._rows.times) if told is None else told
        whole = asked.round()
        exact = model.kind == "vp" and bool(((asked - whole).abs() < 1e-6).all())
        self.timesteps = whole.to(torch.int64) if exact else asked.to(torch.float32)
        self.host_timesteps: list[float] = self.timesteps.tolist()
        process = model.process
        levels = process.sigma(self.levels)
        if model.kind != "flow":
            levels = levels / process.alpha(self.levels)
        self.sigmas = (1 - levels if model.sign < 0 and model.kind == "flow" else levels).float()
        self._whole, self._prepared = self._rows, 0
        self._plan: StartRows = make_plan(self._rows, model, 0)
        self._state: State | None = None
        self._was_scaled = False
        if watch is not None:
            watch.reset()

    @property
    def times(self) -> Tensor:
        """``[count]`` float64 process times of the evaluations."""
        return self._rows.times

    def _told(self) -> Tensor | None:
        """Network times that the caller gave beside the levels."""
        return None if self._times is None else self._times.told

    # -- rows -------------------------------------------------------------------------------------

    def _table(self, grid: Tensor, steps: int) -> SolverTable:
        assert self._name is not None
        c = self._config
        options = solver_options(
            self._name, c["solver_order"], c["lower_order_final"], c["solver_options"], steps
        )
        return named_table(self._name, self._model.process, grid, options, self._model.key)

    def _named(self, steps: int | None, timesteps: Any, sigmas: Any, mu: float | None) -> Rows:
        assert self._name is not None
        # an analytical first step is no evaluation: one grid step more for as many evaluations
        afs = (self._config["solver_options"] or {}).get("afs", False)
        count = None if steps is None else steps + (afs is not False)
        self._times = run_times(self._config, self._model, self._name, count, timesteps, sigmas, mu)
        grid = self._times.grid
        if self._times.stride is not None and count == steps:
            if self._config["solver_options"]:
                self._table(grid, len(grid) - 1)  # refuses what DDIM does not take
            return strided_rows(self._model, grid, self._times.stride)
        return table_rows(self._table(grid, len(grid) - 1))

    def _learned(self, source: SolverLike, steps: int | None, timesteps: Any, sigmas: Any) -> Rows:
        policy = policy_of(source)
        self._model.check(policy.process)
        if isinstance(policy, CorrectedPolicy):
            self.correctors, policy = policy.correctors, policy.rows
        table = policy.static_table()
        rows = policy_rows(policy) if table is None else table_rows(table)
        if policy.needs_features:
            self._own_rows = SampleRows(policy, self._model, self._watch, self._config)
        told = timesteps is not None or (
            sigmas is not None and not is_default(vector(sigmas, "sigmas"))
        )
        if told and origin_of(source).get("own_times") is not True:
            raise ValueError("a learned solver has its own times: leave timesteps and sigmas out")
        given = timesteps if sigmas is None else sigmas
        asked = steps if given is None else len(given)
        if asked != rows.count:
            raise ValueError(
                f"the solver was made for {rows.count} evaluations: pass "
                f"num_inference_steps={rows.count}, not {asked}"
            )
        return rows

    def prepare(self, index: int) -> None:
        """Makes the rows of a run that starts at step ``index``; early, so that step() need not."""
        if index >= self._whole.count:
            least = 1 / (self._steps or self._whole.count)  # of steps of two rows, perhaps
            raise ValueError(
                f"no step is left: the run begins after step {index} of {self._whole.count}; raise "
                f"strength to {least:.3g} or more (or lower denoising_start), or ask for "
                "more num_inference_steps"
            )
        if index < 0:
            raise ValueError(f"begin index is {index}, expected 0..{self._whole.count - 1}")
        if index != self._prepared:
            self._rows = self._late(index) if index else self._whole
            self._plan = make_plan(self._rows, self._model, index)
            self._prepared = index

    def begin(self, index: int) -> None:
        """Called once, when the first step is known to be ``index``."""
        self.prepare(index)
        if index == 0 and self._rows.scale != 1.0 and not self._was_scaled:
            raise ValueError(
                "this solver has an analytical first step, which rescales the network's first "
                "input, but the pipeline does not call scale_model_input: use "
                "dlms_engine.integrations.diffusers.accelerate, or a solver without it"
            )
        if index:
            self._own_rows = None  # its first steps are gone: its nominal rows go on
            if self._watch is not None:
                self._watch.reset()  # and so do their times
            self._without_correctors(index)
        self._state = State(self._plan, self.correctors)

    def _without_correctors(self, index: int) -> None:
        """They were trained on whole runs: after a late start the rows go on alone, which is said."""
        if self.correctors is not None:
            self.correctors = None
            _log.warning("the run begins at step %d: the solver's correctors are left out", index)

    def _late(self, index: int) -> Rows:
        rows, times = self._whole, self._times
        aligned = times is not None and len(times.grid) - 1 == rows.count
        if times is None or not aligned or times.stride is not None:
            return late_start(rows, index)
        tail = self._table(times.grid[index:], len(times.grid) - 1)
        return spliced(rows, index, table_rows(tail))

    # -- steps ------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Rows, each one network evaluation."""
        return self._whole.count

    def plan_of(self, index: int) -> StartRows:
        """The packed rows of a run that starts at step ``index``."""
        self.prepare(index)
        return self._plan

    def scaled_latents(self, n: int, sample: Tensor) -> Tensor:
        """What a pipeline that scales gives its network at step ``n``; changes nothing here."""
        factor = self._plan.c_in[n]
        return sample if factor == 1.0 else (sample * factor).to(sample.dtype)

    def shaped_output(self, output: Tensor, sample: Tensor) -> Tensor:
        """``output`` without a learned variance.

        Raises:
            ValueError: it has another shape than the latents for another reason.
        """
        if output.shape == sample.shape:
            return output
        channels = sample.shape[1]
        learned = self._config.get("variance_type") in ("learned", "learned_range")
        if learned and output.shape[1] == 2 * channels:
            return output[:, :channels]
        raise ValueError(
            f"model_output is {tuple(output.shape)}, sample is {tuple(sample.shape)}: set "
            "variance_type='learned_range' for networks that predict a variance too"
        )

    @property
    def was_scaled(self) -> bool:
        """Whether the pipeline has let ``scaled`` see the network's input."""
        return self._was_scaled

    def scaled(self, n: int, sample: Tensor) -> Tensor:
        """The network's input of evaluation ``n``."""
        self._was_scaled = True
        factor = self._plan.c_in[n] if n < len(self._plan.c_in) else 1.0
        return sample if factor == 1.0 else (sample * factor).to(sample.dtype)

    def advance(self, n: int, output: Tensor, sample: Tensor) -> Tensor:
        """Latents after row ``n``."""
        if n >= self._rows.count:
            raise ValueError(
                f"all {self._rows.count} steps were taken: call set_timesteps for a new run"
            )
        output = self.shaped_output(output, sample)
        assert self._state is not None
        if not self._state.fits(sample):
            self._restart(n, sample)
        if self._own_rows is not None:
            plan, times = self._plan, self.host_timesteps
            row = self._own_rows.row(n, sample, plan.scale, plan.depth, times)
            return self._state.advance(n, output, sample, row)
        clip = functools.partial(clipped, config=self._config) if clips(self._config) else None
        return self._state.advance(n, output, sample, clip=clip, keep_noise=self._name == "ddim")

    def predicted(self, n: int, output: Tensor, sample: Tensor) -> Tensor:
        """The data prediction of row ``n``, from what ``advance`` was given."""
        pre = self._model.preconditioning(self._rows.times[n], "data")
        scale = self._rows.scale if n == 0 else 1.0
        x, f = sample.float() * scale, self.shaped_output(output, sample).float()
        data = float(pre.c_skip) * x + float(pre.c_out) * f
        return (clipped(data, self._config) if clips(self._config) else data).to(sample.dtype)

    def _restart(self, n: int, sample: Tensor) -> None:
        """Latents of another shape or device: a late start, as the history is of the old ones."""
        _log.warning(
            "the latents became %s: the solver begins anew at step %d", list(sample.shape), n
        )
        self.begin(n)
