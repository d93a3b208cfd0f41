"""``dlms bench loop``: a whole sampling run of a small model, and what the engine adds to it.

Times a run as diffusers-style Python would do it (every row in eager torch), a run of the engine
(the C++ loop on the CPU, one CUDA graph on a GPU) and the bare network evaluations, so that the
engine's overhead is what is left. All give the same sample, and that is checked first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlms_engine import grids, ops, solvers
from dlms_engine.bench.device import machine, no_gpu, quantiles
from dlms_engine.bench.timing import finish, json_options
from dlms_engine.denoiser import Denoiser
from dlms_engine.processes import EDM
from dlms_engine.sampler import Sampler, seeded_noise

SHAPE = (3, 16, 16)


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


def make_denoiser(network: str, device: str) -> Denoiser:
    """The embedded model (needs diffusers) or `PlainNetwork`, as a denoiser."""
    if network == "embedded":
        from dlms_engine.embedded import load_embedded

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


def measure(
    network: str, device: str, batch: int, nfe: int, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of each way to run, {name: times}.

    RuntimeError if the engine's sample differs from the eager one by more than rounding.
    """
    denoiser = make_denoiser(network, device)
    table = solvers.ipndm(denoiser.process, grids.polynomial(denoiser.process, nfe))
    noise = seeded_noise(range(batch), SHAPE, denoiser.process.t_max, device=device)
    eager, engine = (Sampler(denoiser, table, backend=b).to(device) for b in ("eager", "auto"))
    want, got = eager(noise), engine(noise)
    off = (got - want).abs().max().item()
    # The network's own kernels may differ between runs and capture (cuDNN picks its algorithms).
    if not off <= 1e-2 * want.abs().max().item():
        raise RuntimeError(
            f"the engine's sample differs from the eager one by {off:.3e}; not timed"
        )
    ways: dict[str, Callable[[], object]] = {
        "eager loop": lambda: eager(noise),
        "engine": lambda: engine(noise),
        "bare network": bare_forwards(denoiser.network, noise, table.nfe),
    }
    return {name: wall_times(run, device, repeats) for name, run in ways.items()}


def main(argv: list[str] | None = None) -> int:
    """Command line. Status 2 if the device is not there."""
    parser = argparse.ArgumentParser(prog="dlms bench loop", description="A whole sampling run.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--network", choices=("embedded", "plain"), default="embedded")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=30)
    json_options(parser)
    args = parser.parse_args(argv)
    if args.device == "cuda" and no_gpu(parser.prog):
        return 2
    times = measure(args.network, args.device, args.batch, args.nfe, args.repeats)
    report = {
        "benchmark": "loop",
        "machine": machine() if args.device == "cuda" else {"torch": torch.__version__},
        "backends": ops.available(args.device),
        "settings": {
            key: getattr(args, key) for key in ("network", "device", "batch", "nfe", "repeats")
        },
        "milliseconds": times,
    }
    if finish(report, args):
        return 0
    middle = {name: statistics.median(t) for name, t in times.items()}
    for name, each in times.items():
        p20, p50, p80 = quantiles(each)
        print(f"{name:<14} p20 {p20:8.3f}  p50 {p50:8.3f}  p80 {p80:8.3f} ms")
    overhead = middle["engine"] / middle["bare network"] - 1
    print(
        f"{args.nfe} evaluations at batch {args.batch} on {args.device}: "
        f"{middle['eager loop'] / middle['engine']:.2f} times the eager loop's speed, "
        f"{100 * overhead:.1f} % above the bare network"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
