"""``dlms bench loop``: a whole sampling run of a small model, and what the engine adds to it.

Times a run as diffusers-style Python would do it (every row in eager torch), a run of the engine
(the C++ loop on the CPU, one CUDA graph on a GPU) and the bare network evaluations, so that the
engine's overhead is what is left. All give the same sample, and that is checked first.

Two clocks. *One run*: from the call until the device is done, which is what a user waits. *Back to
back* (GPU only): CUDA events around many runs, in which the host's share hides behind the device's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlms_engine import grids, ops, solvers
from dlms_engine.engine.noise import seeded_noise
from dlms_engine.engine.sampler import GRAPHS, Sampler
from dlms_engine.lab.bench import rivals
from dlms_engine.lab.bench.device import interleaved_events, no_gpu, quantiles
from dlms_engine.lab.bench.timing import (
    conditions,
    finish_report,
    json_options,
    machine,
    measure_within,
    say_not_measured,
)
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.processes import EDM

SHAPE = (3, 16, 16)
WAYS = EAGER, ENGINE, BARE = "eager loop", "engine", "bare network"


class PlainNetwork(nn.Module):
    """Sixteen convolutions with random weights: something to launch where diffusers is absent."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Conv2d(SHAPE[0], width, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(14))
        self.last = nn.Conv2d(width, SHAPE[0], 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """F ``[B, 3, 16, 16]`` for ``x`` of that shape and ``c_noise`` ``[B]``."""
        x = self.first(x) + c_noise.to(x.dtype).reshape(-1, 1, 1, 1)
        for layer in self.body:
            x = x + functional.silu(layer(x))
        return torch.tanh(self.last(x))


def _make_denoiser(network: str, device: str) -> Denoiser:
    """The embedded model (needs diffusers) or `PlainNetwork`, as a denoiser."""
    if network == "embedded":
        from dlms_engine.models.embedded import load_embedded

        return load_embedded(device)
    torch.manual_seed(0)
    return Denoiser(PlainNetwork().eval().to(device), EDM(), prediction="edm")


def wall_times(run: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Milliseconds of each call, until the device is done."""
    times = []
    for i in range(repeats + 3):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        if i >= 3:  # the first runs build, capture and warm caches
            times.append(1e3 * (time.perf_counter() - start))
    return times


def interleaved_walls(
    runs: Sequence[Callable[[], object]], device: str, repeats: int
) -> list[list[float]]:
    """`wall_times` of each run, `[len(runs)][repeats]`, one call of every run in turn."""
    for run in runs:
        wall_times(run, device, 0)
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for held, run in zip(times, runs, strict=True):
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            held.append(1e3 * (time.perf_counter() - start))
    return times


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bare_forwards(network: Callable[[Tensor, Tensor], Tensor], x: Tensor, nfe: int) -> Any:
    """`nfe` network evaluations and nothing else, as one graph on a GPU."""
    c_noise = torch.zeros(x.shape[0], device=x.device)

    def run() -> None:
        with torch.no_grad():
            for _ in range(nfe):
                network(x, c_noise)

    if not x.is_cuda:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@dataclass(frozen=True)
class Clocks:
    """What takes the times; tests put others in their place.

    `walls` gives milliseconds of one run as `interleaved_walls` does, `events` microseconds as
    `device.interleaved_events`; None where there is no GPU.
    """

    walls: Callable[[Sequence[Callable[[], object]], str, int], list[list[float]]]
    events: Callable[[Sequence[Callable[[int], object]], int], list[list[float]]] | None

    @staticmethod
    def on(device: str) -> Clocks:
        """The clocks of a device."""
        return Clocks(interleaved_walls, interleaved_events if device == "cuda" else None)


def _measure(
    network: str, device: str, batch: int, nfe: int, repeats: int, clocks: Clocks | None = None
) -> dict[str, Any]:
    """Milliseconds of each way to run: ``milliseconds`` and ``back_to_back`` {way: times}.

    Also ``captured``: whether the engine's run is a CUDA graph (None where there can be none).
    RuntimeError if the engine's sample differs from the eager one by more than rounding.
    """
    clocks = clocks or Clocks.on(device)
    denoiser = _make_denoiser(network, device)
    table = solvers.ipndm(denoiser.process, grids.polynomial(denoiser.process, nfe))
    noise = seeded_noise(range(batch), SHAPE, denoiser.process.t_max, device=device)
    eager, engine = (Sampler(denoiser, table, backend=b).to(device) for b in ("eager", "auto"))
    GRAPHS.clear()
    want, got = eager(noise), engine(noise)
    captured = len(GRAPHS) > 0 if noise.is_cuda else None
    off = (got - want).abs().max().item()
    # The network's own kernels may differ between runs and capture (cuDNN picks its algorithms).
    if not off <= 1e-2 * want.abs().max().item():
        raise RuntimeError(
            f"the engine's sample differs from the eager one by {off:.3e}; not timed"
        )
    ways: dict[str, Callable[[], object]] = {
        EAGER: lambda: eager(noise),
        ENGINE: lambda: engine(noise),
        BARE: bare_forwards(denoiser.network, noise, table.nfe),
    }
    runs = list(ways.values())
    times = dict(zip(ways, clocks.walls(runs, device, repeats), strict=True))
    found: dict[str, Any] = {"captured": captured, "milliseconds": times, "back_to_back": None}
    if clocks.events is not None:
        calls = [lambda _, run=run: run() for run in runs]
        events = clocks.events(calls, repeats)
        found["back_to_back"] = {
            way: [1e-3 * t for t in each] for way, each in zip(ways, events, strict=True)
        }
    return found


def loop_summary(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Quantiles in milliseconds, the eager loop's time over the engine's, and the overhead."""
    found: dict[str, Any] = {
        way: dict(zip(("p20", "p50", "p80"), quantiles(each), strict=True))
        for way, each in times.items()
    }
    middle = {way: each["p50"] for way, each in found.items()}
    return {
        **found,
        "times_faster_than_eager": middle[EAGER] / middle[ENGINE],
        "overhead": middle[ENGINE] / middle[BARE] - 1,
    }


def report(args: argparse.Namespace, clocks: Clocks | None = None) -> dict[str, Any]:
    """Everything, as JSON."""
    absent = rivals.absence() or ""
    network = args.network
    if network == "auto":
        network = "plain" if absent else "embedded"
    found: dict[str, Any] = {}

    def measure(repeats: int) -> None:
        found.update(_measure(network, args.device, args.batch, args.nfe, repeats, clocks))

    left = measure_within(args.seconds, [args.repeats], measure)
    settings = {key: getattr(args, key) for key in ("device", "batch", "nfe", "repeats")}
    settings["network"] = network
    result: dict[str, Any] = {
        "benchmark": "loop",
        "machine": machine() if args.device == "cuda" else {"torch": torch.__version__},
        "conditions": conditions(),
        "backends": ops.available(args.device),
        "settings": settings,
        "absent": [{"what": "embedded model", "reason": absent}] if absent else [],
        **found,
        "summary": {
            key: loop_summary(found[key])
            for key in ("milliseconds", "back_to_back")
            if found.get(key)
        },
    }
    say_not_measured(result, [f"{repeats} repeats" for repeats in left], args)
    return result


def show(result: dict[str, Any]) -> None:
    """Prints tables for people."""
    said = result["settings"]
    for missing in result["absent"]:
        print(f"{missing['what']} absent: {missing['reason']}")
    for key, clock in (("milliseconds", "one run"), ("back_to_back", "back to back")):
        held = result["summary"].get(key)
        if held is None:
            continue
        print(f"{clock}, {said['network']} network:")
        for way in WAYS:
            p20, p50, p80 = held[way].values()
            print(f"  {way:<14} p20 {p20:8.3f}  p50 {p50:8.3f}  p80 {p80:8.3f} ms")
        print(
            f"  {said['nfe']} evaluations at batch {said['batch']} on {said['device']}: "
            f"{held['times_faster_than_eager']:.2f} times the eager loop's speed, "
            f"{100 * held['overhead']:.1f} % above the bare network"
        )
    if result.get("captured") is False:
        print("the engine's run was NOT captured as a CUDA graph")


def bench_loop(argv: list[str] | None = None) -> int:
    """Command line. Status 2 if the device is not there."""
    parser = argparse.ArgumentParser(prog="dlms bench loop", description="A whole sampling run.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--network",
        choices=("auto", "embedded", "plain"),
        default="auto",
        help="auto: the embedded model, or the plain network where diffusers is absent",
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=30)
    json_options(parser)
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}, expected at least 1")
    if args.device == "cuda" and no_gpu(parser.prog):
        return 2
    result = report(args)
    if not finish_report(result, args):
        show(result)
    return int(not result["summary"])


if __name__ == "__main__":
    raise SystemExit(bench_loop())
