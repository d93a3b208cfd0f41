"""What ``DLMSScheduler`` has beside its loop: files, noise, and finding a timestep."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from diffusers import ConfigMixin, SchedulerMixin
    from diffusers.configuration_utils import FrozenDict
except ImportError as exc:
    raise ImportError("schedulers need diffusers: pip install 'dlms-engine[diffusers]'") from exc

from ...solvers import SOLVERS
from ...support.versioned import Versioned
from .adopt import adopt
from .flow_times import static_shift
from .foreign_calls import without_missing
from .foreign_class import is_foreign
from .indices import index_of
from .noise import NoiseModel
from .runner import Runner
from .runs import SchedulerRun, SchedulerRuns
from .source import SOLVER_FILE, Source, load_source

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
PIPELINE_KEYS = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


def _refuse_path(solver: Any) -> None:
    """A config is someone else's data: it may name a solver, not a place on this machine."""
    if isinstance(solver, str) and solver not in SOLVERS:
        beside = " (from_pretrained(folder) reads the one beside the JSON)"
        raise ValueError(
            f"the config's solver is {solver!r}, expected one of {sorted(SOLVERS)}; a solver file is "
            f"given as solver=path{beside if solver == SOLVER_FILE else ''}"
        )


class EngineScheduler(Versioned, SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Loading, saving and noising; ``DLMSScheduler`` adds constructor and loop."""

    # Read by pipelines that trim a multistep history themselves (ChronoEdit). Here the history belongs to
    # the run, which begins anew where the latents change their shape.
    model_outputs: Sequence[Tensor] = ()
    last_sample: Tensor | None = None

    _source: Source
    _runs: SchedulerRuns
    _internal_dict: Any

    # -- the run of the thread that asks ---------------------------------------------------------

    def _run(self) -> SchedulerRun:
        run = self._runs.current()
        assert run is not None
        return run

    @property
    def timesteps(self) -> Tensor:
        """``[steps]`` the times that this thread's run passes to the network."""
        return self._run().timesteps

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        self._run().timesteps = value

    @property
    def sigmas(self) -> Tensor:
        """``[steps + 1]`` sigma / alpha of the states in this thread's run; a flow's sigma."""
        return self._run().sigmas

    @sigmas.setter
    def sigmas(self, value: Tensor) -> None:
        self._run().sigmas = value

    @property
    def num_inference_steps(self) -> int | None:
        """Steps of this thread's run; None before ``set_timesteps``."""
        return self._run().num_inference_steps

    @num_inference_steps.setter
    def num_inference_steps(self, value: int | None) -> None:
        self._run().num_inference_steps = value

    @property
    def order(self) -> int:
        """Steps of the loop for each of ``num_inference_steps``, not the order of accuracy.

        Two for solvers of two evaluations a step, by which image-to-image pipelines find the step
        they begin with; one where the caller gave times or sigmas, of which pipelines count the rows.
        """
        found = self._run().order
        return self._order() if found is None else found

    def _order(self, steps: int | None = None, rows: int = 0) -> int:
        if not isinstance(self._source, str):
            return 1
        each = SOLVERS[self._source].evaluations_per_step
        # a first step at infinite lambda_ and a last one to sigma = 0 may cost one evaluation each
        return each if steps is None or rows >= each * steps - 1 else 1

    @property
    def _step_index(self) -> int | None:
        return self._run().step_index

    @_step_index.setter
    def _step_index(self, value: int | None) -> None:
        self._run().step_index = value

    @property
    def _begin_index(self) -> int | None:
        return self._run().begin_index

    @_begin_index.setter
    def _begin_index(self, value: int | None) -> None:
        self._run().begin_index = value

    @property
    def _runner(self) -> Runner | None:
        return self._run().runner

    def _name_solver(self) -> None:
        """Keeps the config JSON-able, and ``solver`` in it even where it is the default.

        A key that is always explicit survives a detour through another class: by it ``from_config``
        tells our own configs from others.
        """
        name = SOLVER_FILE if not isinstance(self._source, str) else self._source
        defaults = {*self.config.get("_use_default_values", ())} - {"solver"}
        self.register_to_config(solver=name)
        config = without_missing(self.config, PIPELINE_KEYS)
        config.pop("_use_default_values", None)
        kept = sorted(defaults & config.keys())
        self._internal_dict = FrozenDict(config | ({"_use_default_values": kept} if kept else {}))

    # -- loading and saving ----------------------------------------------------------------------

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """A scheduler from another one's: ``from_config(pipe.scheduler.config, solver=...)``.

        ``solver`` is anything the constructor takes. The grid is that of diffusers' own class for the
        solver, with what the config says outright (``adopt``). With a learned solver, clipping is only
        done when asked for here.

        Raises:
            ValueError: the config itself names a file; only a caller may.
        """
        if isinstance(config, dict) and "solver" not in kwargs and not is_foreign(config):
            _refuse_path(config.get("solver"))
        if isinstance(config, dict) and is_foreign(config):
            kwargs.setdefault("solver", "dpm_solver_pp")
            kwargs["solver"] = source = load_source(kwargs["solver"])
            adopted = adopt(config, source if isinstance(source, str) else None)
            options = {**adopted.pop("solver_options", {}), **(kwargs.get("solver_options") or {})}
            kwargs |= {"solver_options": options} if options else {}
            config = adopted
        # clipping in a config of another solver is not meant for a learned one
        theirs = isinstance(config, dict) and config.get("solver") != SOLVER_FILE
        if theirs and not isinstance(load_source(kwargs.get("solver", "ddim")), str):
            config = {k: v for k, v in config.items() if k not in ("clip_sample", "thresholding")}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any = None, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """As in diffusers; a learned solver is read from the safetensors file beside the JSON."""
        hub = {k: v for k, v in kwargs.items() if k in HUB_ARGUMENTS}
        config = cls.load_config(pretrained_model_name_or_path, subfolder=subfolder, **hub)
        if config.get("solver") == SOLVER_FILE and "solver" not in kwargs:
            folder = Path(str(pretrained_model_name_or_path), subfolder or "")
            if folder.is_dir():
                kwargs["solver"] = str(folder / SOLVER_FILE)
            else:
                from huggingface_hub import hf_hub_download

                kwargs["solver"] = hf_hub_download(
                    str(pretrained_model_name_or_path), SOLVER_FILE, subfolder=subfolder, **hub
                )
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_config(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Writes the JSON and, for a learned solver, ``dlms_solver.safetensors`` beside it."""
        if not isinstance(self._source, str):
            from ...policies.distilled import save_solver

            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            save_solver(folder / SOLVER_FILE, self._source)
        # diffusers names the repository by splitting the directory's text
        super().save_config(os.fspath(save_directory), push_to_hub, **kwargs)

    @property
    def solver(self) -> Source:
        """The solver's name, or the learned solver itself."""
        return self._source

    # -- what servers need -----------------------------------------------------------------------

    @property
    def shift(self) -> float:
        """The static shift of a flow model, 1 without one; under either name."""
        return static_shift(self.config)

    def set_shift(self, shift: float) -> None:
        """Another static shift for later runs of a flow model, as servers set it for each request.

        Raises:
            ValueError: not a flow model, or the solver is learned and has its own times.
        """
        if self.noise_model.kind != "flow" or not isinstance(self._source, str):
            raise ValueError(
                f"shift {shift}: only handcrafted solvers of flow models have one to set"
            )
        self.register_to_config(shift=float(shift), flow_shift=None)

    # -- noise -----------------------------------------------------------------------------------

    @property
    def noise_model(self) -> NoiseModel:
        """Process, prediction and time unit this config describes, as it is now.

        Pipelines and callers change a scheduler's config (``register_to_config``) and its
        ``alphas_cumprod`` between runs; either is another object then.
        """
        held = (self._internal_dict, self.__dict__.get("alphas_cumprod"))
        kept: tuple[Any, Any, NoiseModel] | None = self.__dict__.get("_noise_model")
        if kept is not None and kept[0] is held[0] and kept[1] is held[1]:
            return kept[2]
        model = NoiseModel.from_config(self.config, held[1])
        self.__dict__["_noise_model"] = (*held, model)
        return model

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Alpha * original + sigma * noise at ``timesteps`` ``[B]`` or ``[1]``.

        With a begin index the level is that of the begin (before the loop) or of the next step
        (in it), whatever ``timesteps`` says, as in diffusers.
        """
        if self._begin_index is None or self._runner is None:
            t = self._times_of(timesteps)
        else:
            n = self._begin_index if self._step_index is None else self._step_index
            t = self._runner.levels[n].reshape(1)
        process = self.noise_model.process
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        alpha, sigma = (
            value.to(original_samples).reshape(shape)
            for value in (process.alpha(t), process.sigma(t))
        )
        return alpha * original_samples + sigma * noise.to(original_samples)

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor | None = None) -> Tensor:
        """``add_noise`` under the name and argument order of the flow-matching pipelines."""
        assert noise is not None
        return self.add_noise(sample, noise, torch.as_tensor(timestep))

    def _times_of(self, timesteps: Tensor) -> Tensor:
        values = torch.as_tensor(timesteps).reshape(-1).detach().cpu()
        if self._runner is None:
            return self.noise_model.time(values)
        known, levels = self._runner.host_timesteps, self._runner.levels
        own = self.noise_model.time(values)
        for i, value in enumerate(values.tolist()):
            if value in known:
                own[i] = levels[known.index(value)]
        return own

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """Index of ``timestep``; a view into the schedule is found without reading its value.

        A foreign tensor on an accelerator is taken for the first step, because reading it would
        wait for the device: pipelines that start elsewhere call ``set_begin_index``. So is a time
        that the schedule does not have, with a warning.
        """
        base = self.timesteps if schedule_timesteps is None else schedule_timesteps
        known = None
        if schedule_timesteps is None and self._runner is not None:
            known = self._runner.host_timesteps
        return index_of(timestep, base, known)
