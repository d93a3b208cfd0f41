"""Stage: a captured run replayed on new inputs has the bits of the plain loop.

That a run was replayed is seen from outside: a replay does not enter the network's `forward`.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import checks
import torch
from torch import Tensor, nn

from dlms_engine import Denoiser, Sampler, grids, processes, seeded_noise, solvers

SHAPE = (3, 8, 8)
EDM = processes.EDM()
VP = processes.VPDiscrete(betas=torch.linspace(1e-4, 0.02, 100))


ENTERED = [0]
"""Calls of `forward`; not an attribute of the network, whose attributes a capture is keyed on."""


class Elementwise(nn.Module):
    """No library kernels, which may choose another algorithm while capturing: the bits must agree."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.Identity()
        self.gain = nn.Parameter(torch.tensor(0.7), requires_grad=False)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        """F ``[B, ...]``; ``mid_block`` is the bottleneck."""
        ENTERED[0] += 1
        hidden = self.mid_block(torch.tanh(self.gain * x))
        shift = c_noise if label is None else c_noise + label
        return hidden * (1 + 0.1 * shift[:, None, None, None]) - 0.3 * x


def make(
    device: str, process: processes.Process, policy: str, **options: Any
) -> tuple[Sampler, Elementwise]:
    """A sampler on the device and its network."""
    from designer_cases import make_policy

    network = Elementwise().to(device)
    denoiser = Denoiser(network, process, "noise", features="mid_block", **options)
    if policy == "dlms":
        made: Any = make_policy(process)
    else:
        made = solvers.ipndm(process, grids.logsnr(process, 4), order=3, afs=True)
    return Sampler(denoiser, made).to(device), network


def noise(device: str, first: int, batch: int = 3) -> Tensor:
    return seeded_noise(range(first, first + batch), SHAPE, 8.0, device=device)


def replayed(device: str, sampler: Sampler, **cond: Any) -> dict[str, Any]:
    """Runs on three sets of inputs; each must be the plain loop's, bit for bit."""
    entered = []
    for first in (0, 10, 20):
        x = noise(device, first)
        before = ENTERED[0]
        got = sampler(x, **{k: v + first for k, v in cond.items()})
        entered.append(ENTERED[0] - before)
        want = sampler(x, callback=lambda step: None, **{k: v + first for k, v in cond.items()})
        if not torch.equal(got, want):
            off = (got - want).abs().max().item()
            raise AssertionError(f"inputs {first}: differs from the plain loop by up to {off:.3e}")
    if device != "cpu" and entered[1:] != [0, 0]:
        raise AssertionError(f"not replayed: the network was entered {entered} times")
    return {"network_calls": entered, "replayed": entered[1:] == [0, 0]}


def check(device: str, process: processes.Process, policy: str) -> dict[str, Any]:
    return replayed(device, make(device, process, policy)[0])


def guided(device: str) -> dict[str, Any]:
    """Two branches, and a condition that changes between runs."""
    unconditional = {"label": torch.zeros(1)}
    sampler, _ = make(device, EDM, "table", guidance_scale=2.0, unconditional=unconditional)
    return replayed(device, sampler, label=torch.ones(3, device=device))


def new_weights(device: str) -> dict[str, Any]:
    """In-place updates of the network are what a replay computes with."""
    sampler, network = make(device, EDM, "table")
    before = sampler(noise(device, 0))
    network.gain.mul_(1.5)
    figures = replayed(device, sampler)
    if torch.equal(before, sampler(noise(device, 0))):
        raise AssertionError("the samples of new weights are those of the old ones")
    return figures


def two_threads(device: str) -> dict[str, Any]:
    """Two threads on streams of their own through one sampler."""
    sampler, _ = make(device, EDM, "table")
    firsts = [range(1000 * t, 1000 * t + 20) for t in range(2)]
    want = {i: sampler(noise(device, i), callback=lambda step: None) for r in firsts for i in r}
    checks.synchronize(device)
    wrong: list[int] = []

    def work(numbers: range) -> None:
        stream = torch.cuda.Stream() if device != "cpu" else None
        with torch.cuda.stream(stream):
            wrong.extend(i for i in numbers if not torch.equal(sampler(noise(device, i)), want[i]))

    threads = [threading.Thread(target=work, args=(numbers,)) for numbers in firsts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise AssertionError(f"wrong samples: {wrong[:10]} of {len(want)}")
    return {"runs": len(want)}


def main() -> int:
    args = checks.options(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    device = args.device
    run = checks.Checks("graphs", args.output, args.seconds, device=device)
    for policy in ("table", "dlms"):
        for process in (EDM, VP):
            run.run(f"{policy}, {process.name}", lambda: check(device, process, policy))  # noqa: B023
    run.run("guided, with a condition", lambda: guided(device))
    run.run("new weights", lambda: new_weights(device))
    run.run("two threads", lambda: two_threads(device))
    return run.status()


if __name__ == "__main__":
    sys.exit(main())
