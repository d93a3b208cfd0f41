"""A frozen network's evaluations during a distillation, each of them the replay of a CUDA graph.

Work of one kind (what it does, its shapes, dtypes and conditions) shares two graphs: one of the work,
and one of its gradients, which is the work and its vector-Jacobian product in one. An evaluation keeps
nothing but its inputs for the way back, where it is computed again: any number of them may be alive, in
any order, and memory does not grow with them. States, times and conditions are inputs of the graphs;
guidance and the process are part of their key.

Whatever the graphs write to is copied out in the same call: the next replay overwrites it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..models.denoiser import Denoiser
from ..models.tap import FeatureTap, Work
from . import cuda_graph
from .cuda_graph import Runnable
from .cuda_graph_cache import GraphCache, split_tensors, token
from .cuda_graph_capture import CAPTURING, Inputs
from .cuda_graph_run import show_once
from .packed import PackedTensors

REPEATED = 12
"""Evaluations of a kind that run plainly. A capture costs six of them and what it waits for, and the
search for a start has many kinds and few of each; an update has more of its kinds than this."""
CAPTURES = 3
"""Captures of one kind. More mean that the key changes all the time, or more kinds than are kept."""
KEPT = 24
"""Graphs; the least recently used go first."""

_T = TypeVar("_T")
_OUTPUTS, _GRADIENTS = "distilling", "differentiating the network"


@contextmanager
def captured_calls(denoiser: Denoiser) -> Iterator[CapturedCalls]:
    """Captures the evaluations of ``denoiser`` and of its shallow copies; afterwards frees the graphs.

    Raises:
        ValueError: nothing can be captured where the network lies.
    """
    reason = cuda_graph.obstacle(denoiser.device)
    if reason is not None:
        raise ValueError(f"evaluations cannot be captured here: {reason}")
    calls = CapturedCalls(denoiser.calls.tap)
    denoiser.calls.through = calls
    try:
        yield calls
    finally:
        denoiser.calls.through = None
        # Unmapping memory (expandable segments) waits for the stream of the captures alone.
        torch.cuda.synchronize(denoiser.device)
        calls.graphs.clear()
        torch.cuda.empty_cache()


def recomputed(
    denoiser: Denoiser, evaluate: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor
) -> Tensor:
    """``evaluate(x, t)``, one evaluation that is computed again on the way back, and once only."""
    through = denoiser.calls.through
    if isinstance(through, CapturedCalls):
        if not through.refused:
            return evaluate(x, t)
        evaluate = through.without(evaluate)  # both times the same, whatever is refused in between
    out: Tensor = checkpoint(evaluate, x, t, use_reentrant=False, preserve_rng_state=False)
    return out


@contextmanager
def values_unread(denoiser: Denoiser) -> Iterator[None]:
    """For evaluations of which only gradients are read: a captured one leaves its value undefined."""
    through = denoiser.calls.through
    if not isinstance(through, CapturedCalls):
        yield
        return
    before, through.unread = through.unread, True
    try:
        yield
    finally:
        through.unread = before


@dataclass
class _Kind:
    """Work that may share graphs."""

    seen: int = 0
    count: int = 1  # of what the work returns; a bottleneck comes after it
    refused: set[str] = field(default_factory=set)
    captures: dict[Any, int] = field(default_factory=dict)
    layouts: dict[Any, PackedTensors] = field(default_factory=dict)


class CapturedCalls:
    """A `Through` that replays graphs where they can be made.

    Attributes:
        graphs: those that are kept.
        refused: whether some work cannot be captured; it is plain then, as without this.
        unread: see `values_unread`.
    """

    _outside_graph_keys = True

    def __init__(self, tap: FeatureTap) -> None:
        # No bound in bytes: two graphs that an update needs in turn would push out each other.
        self.graphs = GraphCache(max_bytes=1 << 62, max_entries=KEPT)
        self.tap = tap
        self.refused = self.unread = False
        self._kinds: dict[Any, _Kind] = {}
        self._thread = threading.local()

    @property
    def inside(self) -> bool:
        """As `Through`; of a whole run that is being captured, too."""
        return CAPTURING.mine or getattr(self._thread, "depth", 0) > 0

    def without(self, work: Callable[..., _T]) -> Callable[..., _T]:
        """``work`` without captures inside of it."""

        def plain(*arguments: Any) -> _T:
            depth = getattr(self._thread, "depth", 0)
            self._thread.depth = depth + 1
            try:
                return work(*arguments)
            finally:
                self._thread.depth = depth

        return plain

    def __call__(
        self,
        denoiser: Denoiser,
        name: tuple[Any, ...],
        work: Work,
        inputs: dict[str, Tensor],
        conditions: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        """As `Through`, and the bottleneck is where the tap would have left it."""
        given = {**denoiser.batch_conditions(len(inputs["x"])), **conditions}
        tensors, rest, rebuild = split_tensors(given)
        numbers = {**inputs, **tensors}
        shapes = tuple((key, t.shape, t.dtype) for key, t in numbers.items())
        kind = self._kinds.setdefault((name, shapes, str(rest[:1])), _Kind())
        if (
            _OUTPUTS in kind.refused
            or cuda_graph.obstacle(inputs["x"].device) is not None
            or any(t.requires_grad for t in tensors.values())
        ):
            return self.without(work)(inputs, conditions)
        read = denoiser.unconditional_read(given)
        options = (name, rest, *((t.data_ptr(), t.shape, t.dtype) for t in read))
        names = tuple(inputs), tuple(numbers)
        evaluation = _Evaluation(self, denoiser, kind, options, work, *names, rebuild)
        kind.seen += 1
        differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in inputs.values())
        unread = self.unread and differentiated and _OUTPUTS in kind.layouts
        made = evaluation.undefined(inputs["x"]) if unread else evaluation.outputs(numbers)
        if differentiated:
            made = _Differentiable.apply(evaluation, made, *numbers.values())  # type: ignore[no-untyped-call]
        if not unread:
            self.tap.keep(made[kind.count] if len(made) > kind.count else None)
        return made


@dataclass(frozen=True)
class _Evaluation:
    """A piece of work, but for the values of its inputs and conditions."""

    calls: CapturedCalls
    denoiser: Denoiser
    kind: _Kind
    options: tuple[Any, ...]
    work: Work
    inputs: tuple[str, ...]
    names: tuple[str, ...]  # and of the conditions' tensors
    rebuild: Callable[[Inputs], Any]

    def outputs(self, numbers: Inputs) -> tuple[Tensor, ...]:
        """What the work returns and, where there is a tap, the bottleneck; new tensors."""
        return self._run(_OUTPUTS, (), self._plain, numbers)

    def undefined(self, x: Tensor) -> tuple[Tensor, ...]:
        """Tensors like the outputs, without their values."""
        parts = self.kind.layouts[_OUTPUTS].parts
        return tuple(x.new_empty(shape, dtype=dtype) for shape, dtype in parts)

    def gradients(
        self, numbers: Inputs, wanted: Sequence[str], cotangents: Mapping[int, Tensor]
    ) -> tuple[Tensor, ...]:
        """Those of the outputs numbered in ``cotangents`` to the inputs named in ``wanted``."""

        def work(given: Inputs) -> tuple[Tensor, ...]:
            own = {k: given[k].detach().requires_grad_(k in wanted) for k in self.names}
            # On this thread: a capture knows the work of the thread that began it.
            with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
                made = self._plain(own)
                from_any = [i for i in cotangents if made[i].requires_grad]
                found = torch.autograd.grad(
                    [made[i] for i in from_any],
                    [own[k] for k in wanted],
                    [given[f"cotangent/{i}"] for i in from_any],
                    allow_unused=True,
                )
            pairs = zip(found, wanted, strict=True)
            return tuple(torch.zeros_like(own[k]) if g is None else g for g, k in pairs)

        given = {f"cotangent/{i}": cotangent for i, cotangent in cotangents.items()}
        return self._run(_GRADIENTS, (*wanted, *cotangents), work, {**numbers, **given})

    def _plain(self, given: Inputs) -> tuple[Tensor, ...]:
        tap = self.calls.tap
        tap.keep(None)
        inputs = {name: given[name] for name in self.inputs}
        made = self.calls.without(self.work)(inputs, self.rebuild(given))
        self.kind.count = len(made)
        bottleneck = tap.value
        tap.keep(None)  # of a capture it would be memory of the graph
        return made if bottleneck is None else (*made, bottleneck)

    def _run(
        self,
        doing: str,
        which: tuple[Any, ...],
        work: Callable[[Inputs], tuple[Tensor, ...]],
        inputs: Inputs,
    ) -> tuple[Tensor, ...]:
        """``work(inputs)``, replayed where it can be and has been asked for often enough."""
        kind, graphs = self.kind, self.calls.graphs
        inputs = {name: t.detach() for name, t in inputs.items()}

        def body(given: Inputs) -> Tensor:
            made = work(given)
            layout = PackedTensors.of(made)
            kind.layouts[doing] = kind.layouts[doing, which, layout.size] = layout
            return layout.packed(made)

        def parts(whole: Tensor) -> tuple[Tensor, ...]:
            return kind.layouts[doing, which, whole.numel()].unpacked(whole)

        options = (doing, which, *self.options)
        this = Runnable(self.denoiser, options, body, inputs, parts=parts)
        output = None
        if kind.seen > REPEATED and not kind.refused & {doing, _OUTPUTS}:
            before = graphs.stats()["captures"]
            output, reason = cuda_graph.try_captured(graphs, this)
            count = kind.captures.get((doing, which), 0) + graphs.stats()["captures"] - before
            kind.captures[doing, which] = count
            if count > CAPTURES:
                reason = (
                    f"the network was captured {count} times for tensors of the same shapes: its "
                    f"settings change between evaluations, or more than {KEPT} graphs take turns"
                )
            if reason is not None:
                self._refuse(doing, reason)
        return parts(cuda_graph.plainly(body, inputs) if output is None else output)

    def _refuse(self, doing: str, reason: str) -> None:
        self.kind.refused.add(doing)
        self.calls.refused |= doing == _OUTPUTS
        show_once(token(self.calls), reason, doing)


class _Differentiable(torch.autograd.Function):
    """The outputs of an evaluation, with gradients to its inputs."""

    @staticmethod
    def forward(
        ctx: Any, evaluation: _Evaluation, made: tuple[Tensor, ...], *numbers: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.evaluation = evaluation
        kind = numbers[0].device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.autocast = {"device_type": kind, "dtype": dtype, "enabled": enabled}
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*numbers)
        return made

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        evaluation: _Evaluation = ctx.evaluation
        numbers = dict(zip(evaluation.names, ctx.saved_tensors, strict=True))
        needed = zip(evaluation.names, ctx.needs_input_grad[2:], strict=True)
        wanted = [name for name, needs in needed if needs]
        known = {i: each for i, each in enumerate(cotangents) if each is not None}
        if not (wanted and known):
            return (None,) * (2 + len(numbers))
        # autograd's thread does not know the dtype, and the way back may be outside of autocast
        with torch.autocast(**ctx.autocast):
            gradients = evaluation.gradients(numbers, wanted, known)
        found = dict(zip(wanted, gradients, strict=True))
        return (None, None, *(found.get(name) for name in evaluation.names))
