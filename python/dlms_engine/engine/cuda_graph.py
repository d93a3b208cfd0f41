"""A whole sampling run as one CUDA graph: network, guidance and fused rows of every evaluation.

`run_captured` captures any function of named tensors, replays it, and runs it plainly where it cannot be
captured. New tables, noise and conditioning of the same shapes are copied to its buffers: no new capture.

What cannot be captured is found in `cuda_graph_check.py`, the rest is recorded in
`cuda_graph_capture.py`; what a graph depends on and which are kept is in `cuda_graph_cache.py`; the run
itself (`cuda_graph_run.py`), one call, is C++ (``csrc/cuda/graph_run.h``).
Importing this module needs no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cuda_graph_capture as capture
from .cuda_graph_cache import GraphCache, graph_key, token
from .cuda_graph_capture import Body, Inputs, StepLoop
from .cuda_graph_check import GraphCaptureError, explain
from .cuda_graph_run import CapturedRun, LoopedRun, UnsettledNetworkError, show_once
from .native import native

__all__ = [
    "CapturedRun",
    "GraphCaptureError",
    "LoopedRun",
    "Runnable",
    "StaleGraphError",
    "explain",
    "obstacle",
    "plainly",
    "run_captured",
    "try_captured",
]


class StaleGraphError(RuntimeError):
    """A captured run no longer gives what running the network gives."""


def obstacle(device: torch.device) -> str | None:
    """Why nothing can be captured on `device` at this moment, or None."""
    if device.type != "cuda":
        return f"CUDA graphs need tensors on an NVIDIA GPU, these are on {device}"
    if torch.compiler.is_compiling():
        return "torch.compile is tracing; it may capture on its own (mode='reduce-overhead')"
    if capture.CAPTURING.mine:
        return "another run is being captured; this one becomes part of it"
    if torch.cuda.is_current_stream_capturing():
        return "the current stream is already capturing; the run becomes part of that graph"
    return None


def run_captured(
    cache: GraphCache,
    network: Any,
    options: tuple[Any, ...],
    body: Body,
    inputs: dict[str, Tensor],
    modules: tuple[Any, ...] = (),
    loop: StepLoop | None = None,
) -> Tensor:
    """``body(inputs)``, replayed as a graph where it can be captured; the plain call elsewhere.

    ``body`` may overwrite its inputs; the caller's are left alone. A capture that fails is tried
    once, told once and remembered.

    Args:
        network: owner of the graph, see ``graph_key``; ``options`` and ``modules`` too.
        inputs: named tensors on one device, the state ``"x"`` first.
        loop: the same run step by step, for caches whose ``loop`` is not "never".
    """
    run = Runnable(network, options, body, inputs, modules)
    if loop is not None and cache.loop != "never" and native is not None:
        output, reason = try_captured(cache, run._replace(loop=loop))
        if output is not None:
            return output
        if reason is not None and cache.loop == "always":
            show_once(token(network), reason)
    output, reason = try_captured(cache, run)
    if output is not None:
        return output
    if reason is not None:
        show_once(token(network), reason)
    return plainly(body, inputs)


class Runnable(NamedTuple):
    """A run that may be captured; a new capture is compared with the plain run by each of ``parts``."""

    network: Any
    options: tuple[Any, ...]
    body: Body
    inputs: dict[str, Tensor]
    modules: tuple[Any, ...] = ()
    loop: StepLoop | None = None
    parts: Callable[[Tensor], Sequence[Tensor]] | None = None

    def key(self, tensors: bool | None = None) -> tuple[Any, str]:
        """As ``graph_key``; a loop's does not depend on the number of steps."""
        inputs, options = self.inputs, self.options
        if self.loop is not None:
            per_step = [(k, inputs[k].shape[1:], inputs[k].dtype) for k in self.loop.per_step]
            inputs = {k: v for k, v in inputs.items() if k not in self.loop.per_step}
            options = (*options, "loop", per_step)
        return graph_key(self.network, inputs, options, self.modules, tensors)

    def capture(self) -> CapturedRun:
        """Raises ``GraphCaptureError``."""
        if self.loop is None:
            return CapturedRun(self.body, self.inputs, self.network, self._rekey)
        steps = len(self.inputs[self.loop.per_step[0]])
        if steps > capture.MAX_STEPS:
            raise GraphCaptureError(f"a loop has at most {capture.MAX_STEPS} steps, not {steps}")
        return LoopedRun(self.body, self.inputs, self.network, self._rekey, self.loop)

    def _rekey(self) -> Any:
        return self.key(True)[0], self.key(False)[0]


def plainly(body: Body, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return body({**inputs, "x": inputs["x"].clone(memory_format=torch.contiguous_format)})


def try_captured(cache: GraphCache, this: Runnable) -> tuple[Tensor | None, str | None]:
    """(output, None), or (None, why there is none; None if that needs no telling)."""
    if obstacle(next(iter(this.inputs.values())).device) is not None:
        return None, None
    while True:
        key, stray = this.key()
        run = cache.runs.find(key)
        if run is not None:
            return _replay(cache, run, this), None
        if stray:
            return None, (
                f"parameter {stray} is not on the state's device (offloaded?): a graph would read the "
                "memory that it leaves"
            )
        claim, run, reason = cache.runs.claim(key)
        if claim == "found":
            return _replay(cache, run, this), None
        if claim == "failed":
            return None, reason
        if claim == "mine":
            return _capture(cache, key, this)


def _capture(cache: GraphCache, key: Any, this: Runnable) -> tuple[Tensor | None, str | None]:
    """Ends the claim on `key`, with a graph or the reason why there is none."""
    try:
        run = this.capture()
        output = run.first(this.inputs)
        if this.loop is not None or this.parts is not None:
            _require_right(output, this)
        if this.loop is not None and cache.loop == "auto":
            _prefer_loop(run, this)
        # The first run of a network may have filled in attributes that are part of the key.
        settled, _ = this.key()
    except GraphCaptureError as exc:
        cache.runs.fail(key, str(exc), isinstance(exc, UnsettledNetworkError))
        return None, str(exc)
    except torch.OutOfMemoryError as exc:  # beside the graph; the plain run has more room
        reason = f"the run cannot be captured: {explain(exc)}"
        cache.runs.fail(key, reason, False)
        return None, reason
    except BaseException:
        cache.runs.release(key)  # or whoever comes next would wait for ever
        raise
    cache.runs.put(key, settled, run, run.nbytes)
    cache.runs.measured(settled, run.plain_seconds, run.graph_seconds)
    return output, None


def _require_right(output: Tensor, this: Runnable) -> None:
    """GraphCaptureError unless a new capture gives what the plain run does."""
    expected, parts = plainly(this.body, this.inputs), this.parts or (lambda whole: [whole])
    for mine, other in zip(parts(output), parts(expected), strict=True):
        difference = _difference(mine, other)
        if difference is not None:
            raise GraphCaptureError(f"captured here it {difference}")


def _prefer_loop(looped: CapturedRun, this: Runnable) -> None:
    """GraphCaptureError if the same run unrolled is more than 2 % faster."""
    unrolled = this._replace(loop=None).capture()
    unrolled.first(this.inputs)
    ours, theirs = (run.best_seconds(this.inputs) for run in (looped, unrolled))
    if ours > 1.02 * theirs:
        raise GraphCaptureError(
            f"unrolled it takes {1e6 * theirs:.0f} us, as a loop {1e6 * ours:.0f} us"
        )


def _replay(cache: GraphCache, run: CapturedRun, this: Runnable) -> Tensor:
    output = run(this.inputs)
    if cache.verify and cache.stats()["replays"] % cache.verify == 0:
        _verify(output, plainly(this.body, this.inputs))
    return output


def _verify(output: Tensor, expected: Tensor) -> None:
    """StaleGraphError unless they agree as two runs of one network do."""
    difference = _difference(output, expected)
    if difference is not None:
        raise StaleGraphError(
            f"a captured run {difference}: something that the graph has frozen was changed. Call "
            "GraphCache.invalidate(network) after such a change, or sample without a graph"
        )


def _difference(output: Tensor, expected: Tensor) -> str | None:
    """How far they are apart, or None where they agree as two runs of one network do.

    A captured run may use other algorithms of the same libraries: 1e-2 of the largest value is the
    bound, above what TF32 or half precision add up to in a few evaluations.
    """
    finite = expected.isfinite()
    if not torch.equal(finite, output.isfinite()):
        return "differs from the plain run in which numbers are finite"
    output, expected = output.where(finite, 0), expected.where(finite, 0)
    scale = expected.abs().max().item()
    error = (output - expected).abs().max().item()
    if error <= 1e-2 * scale:
        return None
    return f"differs from the plain run by {error:.3g} (largest value {scale:.3g})"
