"""Any solver of the engine as a diffusers scheduler, and whole pipelines through the engine.

    import dlms_engine
    from dlms_engine.integrations.diffusers import DLMSScheduler

    pipe.scheduler = DLMSScheduler.from_config(pipe.scheduler.config, solver="unipc")

The class stays at this module path: saved pipelines name it.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor

try:
    # diffusers looks for SchedulerMixin in this module when it loads a saved pipeline
    from diffusers import SchedulerMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput
except ImportError as exc:
    raise ImportError(
        "dlms_engine.integrations.diffusers needs diffusers: pip install 'dlms-engine[diffusers]'"
    ) from exc

from ..solvers.policy import policy_of
from .pipelines.acceleration import Acceleration
from .pipelines.networks import network_of
from .pipelines.parts import scheduler_of
from .scheduler.base import EngineScheduler
from .scheduler.clipping import clips
from .scheduler.foreign_calls import StepTuple, refuse_level, refuse_other
from .scheduler.noise import kind_of, make_alphas_cumprod, make_betas
from .scheduler.origin import OriginCheck
from .scheduler.runner import Runner
from .scheduler.runs import SchedulerRun, SchedulerRuns
from .scheduler.source import Source, load_source

__all__ = ["DLMSScheduler", "SchedulerMixin", "accelerate"]


class DLMSScheduler(EngineScheduler):
    """Runs a solver of the engine in a diffusers pipeline; one network call per step.

    Arguments not listed here mean what they mean in diffusers' own schedulers.

    Args:
        solver: a name (``"dpm_solver_pp"``, ``"unipc"``, ``"deis"``, ``"ddim"``, ``"ipndm"``, ...),
            the path of a solver file, or a ``SolverTable``, policy or ``DistilledSolver``. A
            learned solver brings its own times and its own number of steps.
        solver_order: order of multistep solvers; None is 2 for DPM-Solver++, UniPC and DEIS.
        solver_options: further keyword arguments of the solver's maker.
        final_sigmas_type: ``"zero"`` or ``"sigma_min"``; None follows the solver (DEIS ends at the
            smallest training level, DDIM follows ``set_alpha_to_one``, the others end at zero).
        shift, flow_shift: the static shift of flow models, under either name.
        sigma_data: set for EDM models, whose range is ``sigma_min`` .. ``sigma_max``.
        snr_shift_scale: CogVideoX divides the signal-to-noise ratio by it.
        flow_grid: whose rule a flow's times follow: ``"flow_match"`` (the default), ``"unipc"``,
            ``"dpm_solver_pp"`` or ``"deis"``; ``from_config`` takes that of the given class.
        use_flow_sigmas: read by FLUX's pipelines, which then pass no sigmas, not even the caller's.
        sigma_label: the noise label of an EDM network, ``"log"`` (0.25 ln sigma) or ``"atan"``.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: read by pipelines, which have
            defaults of their own where the config has none.
        stochastic_sampling: must be False; pipelines read it.

    State and history are float32 also under half-precision pipelines; ``step`` never reads a
    tensor's value. ``scheduler.watch(pipe.unet)`` lets a per-sample solver see the bottleneck.
    """

    # without DPMSolverSDE, which cannot be built unless torchsde is installed
    _compatibles: ClassVar[list[str]] = [
        *(kind.name for kind in KarrasDiffusionSchedulers if "SDE" not in kind.name),
        "FlowMatchEulerDiscreteScheduler",
    ]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        solver: Any = "dpm_solver_pp",
        solver_order: int | None = None,
        solver_options: dict[str, Any] | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str | None = None,
        set_alpha_to_one: bool = True,
        lower_order_final: bool = True,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        lambda_min_clipped: float | None = None,
        variance_type: str | None = None,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        shift: float | None = None,
        flow_shift: float | None = None,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = None,
        max_shift: float | None = None,
        base_image_seq_len: int | None = None,
        max_image_seq_len: int | None = None,
        shift_terminal: float | None = None,
        time_shift_type: str = "exponential",
        invert_sigmas: bool = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_data: float | None = None,
        sigma_schedule: str = "karras",
        rho: float = 7.0,
        snr_shift_scale: float | None = None,
        flow_grid: str | None = None,
        use_flow_sigmas: bool = False,
        sigma_label: str = "log",
        stochastic_sampling: bool = False,
    ) -> None:
        if stochastic_sampling:
            raise ValueError("stochastic_sampling is True: the engine's solvers are deterministic")
        self._source = load_source(solver)
        self._name_solver()
        if kind_of(self.config) == "vp":
            self.betas = make_betas(self.config)
            self.alphas = 1.0 - self.betas
            self.alphas_cumprod = make_alphas_cumprod(self.config, self.betas)
            sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5
        else:
            sigmas = torch.arange(1, num_train_timesteps + 1) / num_train_timesteps
            if trained_betas is not None:  # without effect, as for diffusers' own flow schedulers
                self.betas = make_betas(self.config)
        timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self._runs = SchedulerRuns(SchedulerRun(timesteps, sigmas.flip(0)))
        self._watch: Any = None
        self._acceleration: Any = None  # under accelerate()
        self._origin = OriginCheck(self._source)

    # -- before the loop -------------------------------------------------------------------------

    def watch(self, network: torch.nn.Module, features: str = "mid_block") -> None:
        """Hooks ``network`` (``pipe.unet``), so that a per-sample solver sees its bottleneck."""
        from .scheduler.watch import Watch

        self.unwatch()
        self._watch = Watch(network, features)

    def unwatch(self) -> None:
        """Takes the hooks of ``watch`` away."""
        if self._watch is not None:
            self._watch.remove()
        self._watch = None

    @property
    def watched(self) -> bool:
        """Whether ``watch`` is in force."""
        return self._watch is not None

    @property
    def clips(self) -> bool:
        """Whether the data prediction is clipped or thresholded in every step."""
        return clips(self.config)

    def run_with(self, acceleration: Acceleration | None) -> None:
        """Lets ``acceleration`` listen to later runs; None ends that."""
        self._acceleration = acceleration

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        **other: Any,
    ) -> None:
        """Makes the table and forgets the last run.

        Args:
            num_inference_steps: solver steps; a learned solver accepts its own number only.
            device: where ``timesteps`` go; the latents' device is found at the first step.
            timesteps: custom network times, used as given, fractions included.
            sigmas: custom noise levels, N or N + 1 with the final 0; flow shifts apply to them.
            mu: dynamic shift of flow models.
            other: what only other schedulers take; refused by name.

        Raises:
            ValueError: missing or contradicting arguments, a step number the solver cannot run.
        """
        refuse_other("set_timesteps", other)
        self._origin.caller(self)
        make = Runner if self._acceleration is None else self._acceleration.runner
        runner = make(
            self._source,
            self.config,
            self.noise_model,
            num_inference_steps,
            timesteps,
            sigmas,
            mu,
            self._watch,
        )
        steps = len(runner.timesteps)
        run = SchedulerRun(runner.timesteps.to(device), runner.sigmas, steps, runner)
        given = timesteps is not None or sigmas is not None
        run.order = 1 if given else self._order(num_inference_steps, steps)
        self._runs.begin(run)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The first step of the loop (image-to-image starts late)."""
        self._begin_index = begin_index
        if self._runner is not None:
            self._runner.prepare(begin_index)

    @property
    def begin_index(self) -> int | None:
        """What ``set_begin_index`` was given."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """Index of the next step; None before the first."""
        return self._step_index

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the start noise: 1, or that of EDM's first level.

        A learned solver may begin below the config's ``sigma_max``.
        """
        if kind_of(self.config) != "edm":
            return 1.0
        if isinstance(self._source, str):
            highest = self.noise_model.process.t_max
        else:
            highest = float(policy_of(self._source).t_start)
        return float((highest**2 + 1) ** 0.5)

    # -- the loop --------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input for latents ``[k * B, ...]``: unchanged except for EDM and AFS.

        Raises:
            ValueError: a noise level in place of latents.
        """
        refuse_level(sample)
        if self._runner is None:
            return sample
        return self._runner.scaled(self._now(timestep), sample)

    @property
    def scaled_input(self) -> bool:
        """Whether ``scale_model_input`` was called in this run."""
        return self._runner is not None and self._runner.was_scaled

    def _now(self, timestep: Any) -> int:
        if self._step_index is not None:
            return self._step_index
        if self._begin_index is not None:
            return self._begin_index
        return 0 if timestep is None else self.index_for_timestep(timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        **other: Any,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One row of the table: latents ``[B, ...]`` after this step, in ``sample``'s dtype.

        Without ``return_dict`` a tuple; its second item, the data prediction, is made when it is read.
        What only other schedulers take is refused by name.

        ``timestep`` is only looked at before the first step of a run without a begin index, and
        then not its value if it is an element of ``timesteps``. The solvers are deterministic:
        ``generator`` is not used and ``eta`` must be 0.

        Raises:
            ValueError: ``set_timesteps`` was not called, all steps were taken, or eta is not 0.
        """
        refuse_other("step", other)
        if eta or variance_noise is not None:
            raise ValueError(f"eta is {eta}, expected 0: the engine's solvers are deterministic")
        run = self._runs.stepping()
        if run.runner is None:
            raise ValueError("call set_timesteps before step")
        if run.step_index is None:
            run.step_index = self._now(timestep)
            run.runner.begin(run.step_index)
            self._origin.latents(tuple(sample.shape))
            self._origin.late(run.step_index, run.runner.count)
        runner, n = run.runner, run.step_index
        latents = runner.advance(n, model_output, sample)
        run.step_index = n + 1
        if return_dict:
            return SchedulerOutput(prev_sample=latents)
        return StepTuple.of(latents, lambda: runner.predicted(n, model_output, sample))

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


def accelerate(pipe: Any, solver: Any = None, **settings: Any) -> Acceleration:
    """Runs ``pipe``'s denoising loop in the engine; the pipeline is called as before.

    The first call with new kinds of arguments runs step by step and is recorded; later ones run
    network, guidance and step of every evaluation in one loop (one CUDA graph where the device
    allows it), if the record shows that this gives the same. Other calls run step by step with the
    same solver; ``report()`` says which and why.

    Args:
        pipe: a diffusers pipeline, modular ones included.
        solver: anything ``DLMSScheduler`` takes; a per-sample solver watches the network's
            bottleneck (``mid_block``) and runs step by step. None keeps the solver of a pipeline
            that has a ``DLMSScheduler`` already, and is ``"dpm_solver_pp"`` for others.
        settings: further arguments of ``DLMSScheduler``.

    Returns:
        the ``Acceleration``; its ``undo()`` restores the pipeline. Where the noise model is not
        understood the pipeline keeps its own scheduler, which is logged and reported.

    Raises:
        ValueError: an unknown solver, or one made for another noise model; settings that are no arguments
            of ``DLMSScheduler``, or that it refuses where it takes the pipeline's config without them; a
            pipeline without a scheduler, or whose loop is another pipeline's.
    """
    original, refusal = scheduler_of(pipe), ""
    config = {"_class_name": type(original).__name__, **original.config}
    if solver is None:
        solver = original.solver if isinstance(original, DLMSScheduler) else "dpm_solver_pp"
    source = load_source(solver)
    unknown = settings.keys() - inspect.signature(DLMSScheduler.__init__).parameters.keys()
    if unknown:
        raise ValueError(f"DLMSScheduler has no arguments {sorted(unknown)}")
    try:
        scheduler = _tried(config, source, settings)
    except ValueError as exc:
        if not isinstance(source, str) or (settings and _takes(config, source)):
            raise
        scheduler, refusal = None, str(exc)
    learned = scheduler is not None and not isinstance(source, str)
    if learned and policy_of(scheduler.solver).needs_features:
        scheduler.watch(network_of(pipe))
    return Acceleration(pipe, scheduler, refusal)


def _tried(config: dict[str, Any], source: Source, settings: dict[str, Any]) -> Any:
    """A scheduler that can run; of a named solver the table of one step is made to see it."""
    made = DLMSScheduler.from_config(config, solver=source, **settings)
    made.noise_model  # noqa: B018 - made here, so that it is refused here
    if isinstance(source, str):
        copy.deepcopy(made).set_timesteps(1, mu=1.0)
    return made


def _takes(config: dict[str, Any], source: Source) -> bool:
    try:
        _tried(config, source, {})
    except ValueError:
        return False
    return True
