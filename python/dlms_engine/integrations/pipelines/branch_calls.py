"""Recording what a pipeline calls in a step: the real run first, then one with stand-ins.

The first shows which arguments hold the latents and which follow the time. From the second come the
weights with which the pipeline mixes its calls' outputs: stand-ins are never nearly alike, and other
values show whether the mix depends on them. It calls no network: further prompts cost their encoding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..scheduler.flow_times import is_default
from ..scheduler.times import vector
from .calls import NotReplayed
from .dry_run import DryRun, StandIns
from .interception import Interception
from .kinds import generators_of
from .parts import module_components, rewinder
from .program_calls import RecordedRun, boundary_of, start_of, step_calls_of
from .proof import INSTEAD, run_steps
from .recording import Recorder
from .session_runner import SessionRunner
from .step_calls import StepCalls

FEWEST, MOST_RECORDED = 3, 64  # steps: two points lie on any straight line


class Recording:
    """Listens to runs of ``pipe`` with its present ``DLMSScheduler``.

    The first run of a kind is recorded; the same kind with other prompts takes a run with stand-ins.
    """

    def __init__(self, pipe: Any) -> None:
        parts = module_components(pipe)
        self.pipe = pipe
        self.boundary = boundary_of(pipe)
        self.names = list(parts)
        self._parts = list(parts.values())
        self.own_times = False
        self._session: Any = None
        self._runner: Any = None
        self._known: dict[int, RecordedRun] = {}
        self._stand_ins = StandIns()

    def __deepcopy__(self, memo: dict[int, Any]) -> Recording:
        return self

    def runner(self, *arguments: Any) -> Any:
        """For the scheduler's ``set_timesteps``."""
        timesteps, sigmas = arguments[4:6]
        self.own_times = timesteps is not None or (
            sigmas is not None and not is_default(vector(sigmas, "sigmas"))
        )

        made = SessionRunner(*arguments)
        self._runner = made
        made.session = self._session
        made.finish = lambda dry: self._stand_ins.like(start_of(dry), 65536)
        self._session.begin(made)
        return made

    def step_calls(self, arguments: dict[str, Any]) -> StepCalls:
        """The calls of one step of ``pipe(**arguments)``.

        Raises:
            ValueError: the pipeline's loop is not one of calls that are mixed linearly, with weights of
                their own for each network, or an argument follows the steps in another way.
        """
        rewind, count = _rewinder(arguments), _prompts(arguments)
        try:
            if count in self._known:
                try:
                    return self._made(arguments, self._known[count])
                except NotReplayed:  # of another length, for instance
                    rewind()
            self._known[count] = self._recorded(arguments)
            rewind()
            made = self._made(arguments, self._known[count])
            rewind()  # for the proof, whose images are to be encoded alike
            return made
        except NotReplayed as exc:
            self._known.pop(count, None)
            raise ValueError(
                f"{type(self.pipe).__name__} cannot be distilled for: {exc}; {INSTEAD}"
            ) from exc

    def _recorded(self, arguments: dict[str, Any]) -> RecordedRun:
        steps = self._steps()
        recorder = Recorder(self.names, self._parts)
        self._run(recorder, arguments, steps)
        program, model = recorder.program(), self.pipe.scheduler.noise_model
        times = model.timestep(self._runner.times).tolist()
        return RecordedRun(
            self.pipe, self.names, self.boundary, program, dict(enumerate(times)), steps
        )

    def _made(self, arguments: dict[str, Any], known: RecordedRun) -> StepCalls:
        dry = DryRun(known.program, self.names, self._stand_ins)
        self._run(dry, arguments, known.steps)
        if dry.failure is not None:
            raise dry.failure
        if not dry.finished:
            raise NotReplayed("the pipeline left its loop early")
        return step_calls_of(known, dry, arguments, self.own_times)

    def _run(self, session: Recorder | DryRun, arguments: dict[str, Any], steps: int) -> None:
        self._session = session
        taps = []
        for number, module in enumerate(self._parts):

            def heard(_m: Any, original: Any, a: Any, k: Any, number: int = number) -> Any:
                return session.call(number, original, a, k)

            taps.append(Interception(module, heard))
        try:
            run_steps(self.pipe, self, arguments, steps)
        finally:
            for tap in taps:
                tap.remove()

    def _steps(self) -> int:
        """The fewest steps, with times on both sides of a boundary."""
        if self.boundary is None:
            return FEWEST
        for steps in range(FEWEST, MOST_RECORDED + 1):
            self.pipe.scheduler.set_timesteps(steps)
            times = self.pipe.scheduler.timesteps.tolist()
            if times[0] >= self.boundary > times[-1]:
                return steps
        raise ValueError(
            f"{type(self.pipe).__name__} has no time on each side of its boundary, {self.boundary:g}, "
            f"with {FEWEST} to {MOST_RECORDED} steps: one of its networks is not used"
        )


def _prompts(arguments: dict[str, Any]) -> int:
    """How many prompts a run is for, as far as its stand-ins' shapes depend on it."""
    prompt = arguments.get("prompt")
    return len(prompt) if isinstance(prompt, list) else 1


def _rewinder(arguments: dict[str, Any]) -> Callable[[], None]:
    """Images are encoded with the same random numbers in each of the runs."""
    return rewinder(generators_of(arguments))
