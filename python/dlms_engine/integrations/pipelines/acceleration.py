"""A pipeline's denoising loop in one run of the engine, behind the pipeline's own signature.

The first call with a new kind of arguments runs step by step and is recorded. If the record shows a
loop that the engine can run and that gives the scheduler the same numbers, later calls of that kind
do: the pipeline goes through its loop without its networks (``dry_run``), this run's arguments and
mixing weights are held against the record, and the engine runs every row at the last step. Anything
else runs step by step, and ``report()`` says why.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...engine.cuda_graph_cache import GraphCache
from ..scheduler.runner import Runner
from .callers_errors import is_callers
from .calls import NotReplayed, caches
from .dry_run import DryRun, StandIns
from .interception import Interceptions, subclass
from .kinds import bound, follows_the_steps, generators_of, kind_of_call, scales_of, short
from .parts import module_components, rewinder, set_scheduler
from .recording import Program, Recorder
from .report import AccelerationReport, KindReport
from .session_runner import SessionRunner
from .whole_loop import WholeLoop

_log = logging.getLogger("dlms_engine")
MAX_KINDS = 64  # kinds of arguments that are remembered
TRIES = 2  # runs that may differ from their record before a kind stays step by step


@dataclass
class _Kind:
    """What is known of one kind of arguments: a program, a reason against one, or nothing yet."""

    report: KindReport
    program: Program | None = None
    refuted: int = 0
    stepwise: bool = False
    own_scheduler: bool = False


class Acceleration:
    """What ``accelerate`` changed on a pipeline; ``undo`` changes it back.

    Calls from several threads take turns: each gets its own pictures.

    Args:
        scheduler: a ``DLMSScheduler``, or None where ``refusal`` says why there is none: the pipeline
            then keeps its own.
    """

    def __init__(self, pipe: Any, scheduler: Any, refusal: str = "") -> None:
        self.pipe = pipe
        self._refused = refusal
        self._class = type(pipe)
        self._scheduler = pipe.scheduler
        self._own = scheduler
        self._kinds: OrderedDict[Any, _Kind] = OrderedDict()
        self._cache = GraphCache()
        self._stand_ins = StandIns()
        self._lock = threading.RLock()
        self._session: Recorder | DryRun | None = None
        self._thread: int | None = None
        self._arguments: dict[str, Any] = {}
        self._parts = Interceptions(self._heard)
        self._listen()
        if scheduler is None:
            _log.warning("%s keeps its own scheduler: %s", self._class.__name__, refusal)
        else:
            scheduler.run_with(self)
            set_scheduler(pipe, scheduler)
        made = subclass(self._class, self._accelerated())
        made.__call__ = functools.wraps(self._class.__call__)(made.__call__)
        pipe.__class__ = made

    def __deepcopy__(self, memo: dict[int, Any]) -> Acceleration:
        return self  # copies of the scheduler belong to the same pipeline

    def __reduce__(self) -> Any:
        return (_nothing, ())  # a pickled scheduler leaves the pipeline behind

    def __repr__(self) -> str:
        return str(self.report())

    def report(self) -> AccelerationReport:
        """Whole loop or step by step, and why, for each kind of arguments called so far."""
        kinds = [kind.report for kind in self._kinds.values()]
        source = "its own scheduler" if self._own is None else self._own.solver
        name = source if isinstance(source, str) else type(source).__name__
        return AccelerationReport(
            self._class.__name__, name, kinds, len(self._cache), self._refused
        )

    def undo(self) -> None:
        """The pipeline is what it was before ``accelerate``."""
        if self.pipe is None:
            return
        self.pipe.__class__ = self._class
        if self._own is not None:
            set_scheduler(self.pipe, self._scheduler)
            self._own.unwatch()
            self._own.run_with(None)
        self._parts.remove()
        self.pipe = None

    # -- listening -------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Follows parts that were replaced since; what was known of the others is forgotten."""
        if self._parts.follow(module_components(self.pipe)):
            self._kinds.clear()

    def _heard(
        self, number: int, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        session = self.session
        if session is None:
            return original(*args, **kwargs)
        return session.call(number, original, args, kwargs)

    @property
    def session(self) -> Recorder | DryRun | None:
        """Who listens to the run of this thread."""
        return self._session if self._thread == threading.get_ident() else None

    def runner(self, *arguments: Any) -> Runner:
        """The runner of a new run, for ``set_timesteps``; the session hears of it."""
        session = self.session
        runner = SessionRunner(*arguments)
        runner.session = session
        if session is not None:
            runner.finish = self._finish
            session.begin(runner)
        return runner

    # -- running ---------------------------------------------------------------------------------

    def _accelerated(self) -> Any:
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            if pipe is not self.pipe:  # a copy of the pipeline is an ordinary one
                return self._class.__call__(pipe, *args, **kwargs)
            with self._lock:
                return self.call(pipe, args, kwargs)

        return call

    def call(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pipeline's call: recorded, in the engine's loop, or step by step."""
        if self._session is not None:  # a pipeline that calls itself
            return self._class.__call__(pipe, *args, **kwargs)
        self._listen()
        arguments = bound(self._class.__call__, pipe, args, kwargs)
        self._arguments = arguments
        reason = self._refusal(pipe, arguments)
        kind = self._kind(arguments, reason)
        kind.report.runs += 1
        rewind = rewinder(generators_of(arguments))
        if kind.own_scheduler:
            return self._with_own_scheduler(pipe, args, kwargs)
        if kind.stepwise:
            return self._safely(kind, None, rewind, pipe, args, kwargs)
        if kind.program is None:
            return self._recorded(kind, rewind, pipe, args, kwargs)
        try:
            dry = DryRun(kind.program, self._parts.names, self._stand_ins)
            result = self._timed(kind, dry, pipe, args, kwargs)
            if dry.failure is not None:
                raise dry.failure
            if not dry.finished:
                raise NotReplayed("the pipeline left its loop early")
            return result
        except Exception as exc:
            kind.program = None
            self._told(kind, _why(exc))
            rewind()
            kind.refuted += 1
            kind.stepwise = kind.refuted >= TRIES or not isinstance(exc, NotReplayed)
        if kind.stepwise:
            return self._safely(kind, None, rewind, pipe, args, kwargs)
        # something besides the arguments may have changed, as a modular pipeline's guider
        return self._recorded(kind, rewind, pipe, args, kwargs)

    def _safely(
        self,
        kind: _Kind,
        session: Recorder | None,
        rewind: Callable[[], None],
        pipe: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Step by step; if only our scheduler fails, the pipeline's own runs and is reported."""
        try:
            return self._timed(kind, session, pipe, args, kwargs)
        except Exception as exc:
            named = self._own is not None and isinstance(self._own.solver, str)
            if not named or pipe.scheduler is not self._own or is_callers(exc, self._arguments):
                raise
            rewind()
            result = self._with_own_scheduler(pipe, args, kwargs)  # raises what diffusers raises
            kind.own_scheduler = kind.stepwise = True
            self._told(kind, f"its own scheduler runs: {type(exc).__name__}: {exc}")
            _log.warning("%s ran with its own scheduler: %s", self._class.__name__, exc)
            return result

    def _with_own_scheduler(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        set_scheduler(pipe, self._scheduler)
        try:
            return self._class.__call__(pipe, *args, **kwargs)
        finally:
            set_scheduler(pipe, self._own)

    def _refusal(self, pipe: Any, arguments: dict[str, Any]) -> str | None:
        if self._own is None:
            return f"its own scheduler runs: {self._refused}"
        if pipe.scheduler is not self._own:
            return "the pipeline's scheduler was replaced"
        if self._own.watched:
            return "the solver's rows are per sample"
        if self._own.clips:
            return "the scheduler's config clips the data prediction"
        name = follows_the_steps(arguments)
        return self._remembering() if name is None else f"argument {name} is called during the loop"

    def _remembering(self) -> str | None:
        """A cache that was switched on, or off, since a network's calls were recorded."""
        used = {slot.module for k in self._kinds.values() if k.program for slot in k.program.slots}
        for number in sorted(used):
            why = caches(self._parts.each[number].module)
            if why is not None:
                return f"{self._parts.names[number]}: {why}"
        return None

    def _kind(self, arguments: dict[str, Any], reason: str | None) -> _Kind:
        key = (kind_of_call(arguments), reason)
        kind = self._kinds.pop(key, None)
        if kind is None:
            kind = _Kind(KindReport(short(arguments)))
            if reason is not None:
                kind.stepwise = True
                self._told(kind, reason)
        self._kinds[key] = kind
        while len(self._kinds) > MAX_KINDS:
            self._kinds.popitem(last=False)
        return kind

    def _recorded(
        self,
        kind: _Kind,
        rewind: Callable[[], None],
        pipe: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        recorder = Recorder(self._parts.names, [part.module for part in self._parts.each])
        result = self._safely(kind, recorder, rewind, pipe, args, kwargs)
        if kind.own_scheduler:
            return result
        kind.report.calls_per_step = recorder.calls_per_step
        try:
            kind.program = recorder.program()
            kind.report.whole_loop, kind.report.reason = True, ""
        except NotReplayed as exc:
            kind.stepwise = True
            self._told(kind, str(exc))
        return result

    def _told(self, kind: _Kind, reason: str) -> None:
        kind.report.whole_loop, kind.report.reason = False, reason
        _log.info("%s runs step by step: %s", self._class.__name__, reason)

    def _timed(
        self,
        kind: _Kind,
        session: Recorder | DryRun | None,
        pipe: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        began = time.perf_counter()
        self._session, self._thread = session, threading.get_ident()
        try:
            result = self._class.__call__(pipe, *args, **kwargs)
        finally:
            self._session = self._thread = None
        how = "whole loop" if isinstance(session, DryRun) else "step by step"
        kind.report.seconds[how] = time.perf_counter() - began
        return result

    def _finish(self, dry: DryRun) -> Tensor:
        """Every row at once, with what the dry run found."""
        used = {slot.module for slot in dry.program.slots}
        loop = WholeLoop(
            dry,
            {n: self._parts.each[n].call for n in used},
            {n: self._parts.each[n].module for n in used},
            scales_of(self._arguments, self.pipe),
        )
        return loop.run(self._cache)


def _why(exc: Exception) -> str:
    if isinstance(exc, NotReplayed):
        return str(exc)
    reason = f"the engine's loop failed: {type(exc).__name__}: {exc}"
    _log.warning("%s", reason)
    return reason


def _nothing() -> None:
    return None
