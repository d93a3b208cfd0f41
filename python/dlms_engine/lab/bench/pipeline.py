"""``dlms bench pipeline``: images per second, noise to image, against diffusers with torch.compile.

    dlms bench pipeline --model cifar10-32 --device cuda --solver dlms-5.safetensors

One network, compiled alike and in the same dtype for both: the engine's sampler (one CUDA graph on a
GPU) and diffusers' DPM-Solver++ (``EDMDPMSolverMultistepScheduler``, order 2) with as many network
evaluations. On a GPU a third way compiles the network for diffusers with ``mode="reduce-overhead"``,
i.e. as a CUDA graph of each evaluation. Before anything is timed, both are run with many evaluations
and have to end at the same image.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlms_engine import embedded, grids, ops, solvers
from dlms_engine.engine.noise import seeded_noise
from dlms_engine.engine.sampler import Sampler
from dlms_engine.lab.bench.device import no_gpu, quantiles
from dlms_engine.lab.bench.loop import wall_times
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

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CHECK_EVALUATIONS, CHECK_RMSE = 40, 0.05
_Run = Callable[[Tensor], Tensor]


def make_network(model: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, tuple[int, ...]]:
    """The model's network on the device itself, and the shape of a sample.

    Raises:
        ValueError: no such model.
        FileNotFoundError: a benchmark model that has not been made.
    """
    from dlms_engine.lab import benchmark_model

    network: nn.Module
    shape: tuple[int, ...]
    if model == "embedded":
        network, shape = embedded.embedded_network(device, dtype), embedded.IMAGE_SHAPE
    elif model in benchmark_model.RECIPES:
        unet = benchmark_model.load_unet(model, device, dtype)
        network, shape = unet, (3, unet.size, unet.size)
    else:
        names = ", ".join(("embedded", *benchmark_model.RECIPES))
        raise ValueError(f"model is {model!r}, expected one of {names}")
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network, shape


def make_denoiser(network: nn.Module, policy: Any) -> Denoiser:
    """For the policy: a table needs no bottleneck, and so no hook in the network."""
    tap = None if policy.static_table() is not None else "mid_block"
    process = EDM(embedded.SIGMA_MIN, embedded.SIGMA_MAX)
    return Denoiser(network, process, sigma_data=embedded.SIGMA_DATA, features=tap)


def diffusers_run(network: nn.Module, nfe: int) -> _Run:
    """Noise ``sigma_max * z`` ``[B, ...]`` -> samples, as a diffusers pipeline would do it.

    Raises:
        ImportError: diffusers is not installed.
    """
    try:
        from diffusers import EDMDPMSolverMultistepScheduler
    except ImportError as error:
        raise ImportError(
            "the comparison needs diffusers: pip install 'dlms_engine[diffusers]'"
        ) from error
    make: Any = EDMDPMSolverMultistepScheduler  # untyped in diffusers
    scheduler = make(
        sigma_min=embedded.SIGMA_MIN, sigma_max=embedded.SIGMA_MAX, sigma_data=embedded.SIGMA_DATA
    )
    dtype = next(network.parameters()).dtype

    @torch.no_grad()
    def run(noise: Tensor) -> Tensor:
        scheduler.set_timesteps(nfe, device=noise.device)
        x = noise
        for t in scheduler.timesteps:
            torch.compiler.cudagraph_mark_step_begin()  # the last output has been used up
            scaled = scheduler.scale_model_input(x, t).to(dtype)
            output: Tensor = network(scaled, t.float().expand(len(x)))
            x = scheduler.step(output.float(), t, x, return_dict=False)[0]
        return x

    return run


def check_pipeline(
    denoiser: Denoiser, rival: nn.Module, shape: tuple[int, ...], device: str
) -> float:
    """RMSE between both ways at ``CHECK_EVALUATIONS`` evaluations of DPM-Solver++.

    Raises:
        RuntimeError: above ``CHECK_RMSE``: they do not solve the same equation.
    """
    process = denoiser.process
    noise = seeded_noise(range(2), shape, process.t_max, device=device)
    grid = grids.polynomial(process, CHECK_EVALUATIONS)
    own = Sampler(denoiser, solvers.dpm_solver_pp(process, grid, order=2)).to(device)(noise)
    assert isinstance(own, Tensor)
    other = diffusers_run(rival, CHECK_EVALUATIONS)(noise)
    off = float((own - other).square().mean().sqrt())
    if not off <= CHECK_RMSE:
        raise RuntimeError(
            f"the engine and diffusers end {off:.3f} apart, expected at most {CHECK_RMSE}: the "
            "comparison would be of different models"
        )
    return off


def _measure(
    denoiser: Denoiser,
    policy: Any,
    shape: tuple[int, ...],
    device: str,
    batch: int,
    repeats: int,
    rivals: Mapping[str, nn.Module],
) -> dict[str, dict[str, float]]:
    """{way: milliseconds and images per second} at one batch size.

    Args:
        policy: the solver of the engine; the others get as many evaluations.
        rivals: name -> network that diffusers' scheduler runs.
    """
    process, nfe = denoiser.process, int(policy.nfe)
    noise = seeded_noise(range(batch), shape, process.t_max, device=device)
    sampler = Sampler(denoiser, policy).to(device)
    ways: dict[str, _Run] = {"dlms_engine": lambda x: sampler(x)}
    ways |= {name: diffusers_run(network, nfe) for name, network in rivals.items()}
    found = {}
    for name, run in ways.items():
        times = wall_times(lambda run=run: run(noise), device, repeats)  # type: ignore[misc]
        p20, p50, p80 = quantiles(times)
        found[name] = {
            "p20_ms": p20,
            "p50_ms": p50,
            "p80_ms": p80,
            "images_per_second": 1e3 * batch / statistics.median(times),
        }
    return found


def solver_of(path: Path | None, nfe: int) -> tuple[str, Any]:
    """Name and policy of a solver file, or iPNDM with ``nfe`` evaluations.

    Raises:
        ValueError: the file is no solver.
    """
    if path is None:
        process = EDM(embedded.SIGMA_MIN, embedded.SIGMA_MAX)
        return f"ipndm-{nfe}", solvers.ipndm(process, grids.polynomial(process, nfe))
    from dlms_engine.policies.distilled import load_solver
    from dlms_engine.solvers.policy import policy_of

    held = load_solver(path)
    policy = policy_of(held)
    return f"{getattr(held, 'method', 'table')}-{policy.nfe}", policy


def _report(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as JSON."""
    network, shape = make_network(args.model, args.device, _DTYPES[args.dtype])
    label, policy = solver_of(args.solver, args.nfe)
    # Copies, so that no rival's network carries the hook that a learned solver needs.
    rivals = {"diffusers": copy.deepcopy(network)}
    if args.compile and args.device == "cuda":
        rivals["diffusers, reduce-overhead"] = copy.deepcopy(network)
    denoiser = make_denoiser(network, policy)
    if args.compile:
        # A batch size compiles for itself: kernels for any size would be slower.
        for each, mode in zip(
            (network, *rivals.values()), (None, None, "reduce-overhead"), strict=False
        ):
            each.compile(dynamic=False, mode=mode)
    batches: dict[str, Any] = {}
    off = check_pipeline(denoiser, rivals["diffusers"], shape, args.device)

    def measure(batch: int) -> None:
        found = _measure(denoiser, policy, shape, args.device, batch, args.repeats, rivals)
        own = found["dlms_engine"]["images_per_second"]
        rate = {n: own / t["images_per_second"] for n, t in found.items() if n != "dlms_engine"}
        batches[str(batch)] = {"ways": found, "times_the_speed_of": rate}

    left = measure_within(args.seconds, args.batches, measure)
    report = {
        "benchmark": "pipeline",
        "machine": machine() if args.device == "cuda" else {"torch": torch.__version__},
        "conditions": conditions(),
        "backends": ops.available(args.device),
        "settings": {
            "model": args.model,
            "device": args.device,
            "dtype": args.dtype,
            "compile": args.compile,
            "solver": label,
            "nfe": int(policy.nfe),
            "repeats": args.repeats,
        },
        "rmse_between_them": off,
        "batches": batches,
    }
    say_not_measured(report, [f"batch {batch}" for batch in left], args)
    return report


def bench_pipeline(argv: list[str] | None = None) -> int:
    """Command line. Status 2 if the device is not there."""
    parser = argparse.ArgumentParser(prog="dlms bench pipeline", description="Noise to image.")
    parser.add_argument("--model", default="embedded", help="embedded or a benchmark model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), help="default: bfloat16 on a GPU")
    parser.add_argument("--solver", type=Path, help="solver file; default: iPNDM")
    parser.add_argument("--nfe", type=int, default=5, help="without a solver file")
    parser.add_argument("--batches", default="1,64,1024", help="batch sizes, with commas")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    json_options(parser)
    args = parser.parse_args(argv)
    if args.device == "cuda" and no_gpu(parser.prog):
        return 2
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.batches = [int(batch) for batch in args.batches.split(",")]
    found = _report(args)
    if finish_report(found, args):
        return 0
    said = found["settings"]
    print(
        f"{said['model']}, {said['solver']}, {said['dtype']} on {said['device']}: images per second"
    )
    for batch, held in found["batches"].items():
        print(f"  batch {batch}")
        for name, each in held["ways"].items():
            rate = held["times_the_speed_of"].get(name)
            gain = "" if rate is None else f"  (the engine: {rate:.2f} times that)"
            print(f"    {name:<28}{each['images_per_second']:12.1f}{gain}")
    return int(not found["batches"])


if __name__ == "__main__":
    raise SystemExit(bench_pipeline())
