"""What an installed wheel must do without extras: compiled parts, sampling, recommending, a file."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dlms_engine as dlms
from dlms_engine import processes, solvers
from dlms_engine.engine import native


class Shrink(nn.Module):
    """E[x0 | x] of a standard normal distribution, bent a little."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (x / (1 + t.reshape(-1, 1, 1, 1) ** 2)).tanh()


def main() -> None:
    if native.native is None:
        raise SystemExit(f"the compiled module is missing: {native.problem}")
    if dlms.ops.backends.select("auto", "cpu").name != "cpu":
        raise SystemExit(f"no compiled operators: {dlms.ops.backends.missing('cpu')}")
    process = processes.EDM()
    denoiser = dlms.Denoiser(Shrink(), process, prediction="data")
    table = solvers.ipndm(process, dlms.grids.polynomial(process, 5))
    compiled = dlms.Sampler(denoiser, table).sample(range(4), (3, 8, 8))
    eager = dlms.Sampler(denoiser, table, backend="eager").sample(range(4), (3, 8, 8))
    torch.testing.assert_close(compiled, eager)
    dlms.save("wheel.safetensors", table)
    again = dlms.Sampler(denoiser, dlms.load_solver("wheel.safetensors"))
    if not torch.equal(again.sample(range(4), (3, 8, 8)), compiled):
        raise SystemExit("the saved solver samples something else")
    print(f"dlms_engine {dlms.__version__} samples, compiled for {native.native.cpu_isa()}")


if __name__ == "__main__":
    main()
