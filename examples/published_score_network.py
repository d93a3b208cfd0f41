"""A published score network, from the registry to five evaluations.

``galaxygrad`` 0.1.9 holds score networks of galaxy images (Sampson et al. 2024, arXiv:2401.07313), a few
megabytes each, as plain arrays. They state no licence: they are read where pip puts them and go
nowhere else.

    pip install --no-deps galaxygrad==0.1.9
    python examples/published_score_network.py --nfe 5

The process is dx = -x / 2 dt + dw, so noise = -sigma * score on ``VP(beta_d=0, beta_min=1)``. The
same wrapping as a model for the command line:

    dlms distill --model examples.published_score_network:hsc32 --nfe 5 --output galaxies.safetensors
"""

from __future__ import annotations

import argparse
import importlib.metadata
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

import dlms_engine as dlms

NAMES = {
    "hsc32": ("eqx_hsc_ScoreNet32.eqx", 32),
    "ztf32": ("eqx_ZTF_ScoreNet32.eqx", 32),
    "hsc64": ("eqx_hsc_ScoreNet64.eqx", 64),
}
PATCH, HIDDEN, MIXED, BLOCKS, LAST_TIME = 4, 64, 512, 4, 10.0


class Mixer(nn.Module):
    """One block of an MLP-mixer (Tolstikhin et al. 2021): across patches, then across channels."""

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            nn.Linear(patches, MIXED), nn.ReLU(), nn.Linear(MIXED, patches)
        )
        self.channels = nn.Sequential(nn.Linear(HIDDEN, MIXED), nn.ReLU(), nn.Linear(MIXED, HIDDEN))
        self.norm1 = nn.LayerNorm((HIDDEN, patches))
        self.norm2 = nn.LayerNorm((patches, HIDDEN))

    def forward(self, y: Tensor) -> Tensor:
        """``[B, HIDDEN, patches]`` -> the same."""
        y = y + self.patches(self.norm1(y))
        y = y.transpose(1, 2)
        return (y + self.channels(self.norm2(y))).transpose(1, 2)


class ScoreNetwork(nn.Module):
    """Noise prediction of a published score network; the time is an image of its own."""

    def __init__(self, side: int) -> None:
        super().__init__()
        patches = (side // PATCH) ** 2
        self.first = nn.Conv2d(2, HIDDEN, PATCH, stride=PATCH)
        self.last = nn.ConvTranspose2d(HIDDEN, 1, PATCH, stride=PATCH)
        self.blocks = nn.ModuleList(Mixer(patches) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm((HIDDEN, patches))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """``[B, 1, H, W]``, ``[B]`` -> E[noise | x]."""
        time = (t / LAST_TIME).to(x.dtype)[:, None, None, None].expand_as(x)
        y = self.first(torch.cat([x, time], dim=1))
        low = y.shape[2:]
        y = y.flatten(2)
        for block in self.blocks:
            y = block(y)
        score = self.last(self.norm(y).unflatten(2, low))
        sigma = torch.sqrt(-torch.expm1(-t)).to(x.dtype)[:, None, None, None]
        return -sigma * score

    @torch.no_grad()
    def read(self, file: BinaryIO) -> None:
        """Takes the arrays in the order of the published file: no pickled objects."""

        def put(*parameters: Tensor) -> None:
            for parameter in parameters:
                values = torch.from_numpy(np.load(file, allow_pickle=False))
                parameter.copy_(values.reshape(parameter.shape))

        put(self.first.weight, self.first.bias)
        kernel = torch.empty(1, HIDDEN, PATCH, PATCH)
        put(kernel, self.last.bias)
        self.last.weight.copy_(kernel.flip(2, 3).transpose(0, 1))  # theirs does not turn the kernel
        for block in self.blocks:
            for mlp in (block.patches, block.channels):
                put(mlp[0].weight, mlp[0].bias, mlp[2].weight, mlp[2].bias)
            put(block.norm1.weight, block.norm1.bias, block.norm2.weight, block.norm2.bias)
        put(self.norm.weight, self.norm.bias)


def folder() -> Path:
    """Where pip has put the package's files; nothing of it is imported.

    Raises:
        ImportError: it is not installed.
    """
    try:
        files = importlib.metadata.files("galaxygrad") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError("pip install --no-deps galaxygrad==0.1.9") from error
    for file in files:
        if file.name == NAMES["hsc32"][0]:
            return Path(str(file.locate())).parent
    raise ImportError("this galaxygrad holds no weights: pip install --no-deps galaxygrad==0.1.9")


def load(name: str, where: Path | None = None) -> tuple[dlms.Denoiser, tuple[int, ...]]:
    """(denoiser, sample shape) of the network ``name``; ``where`` the .eqx files are."""
    file, side = NAMES[name]
    network = ScoreNetwork(side)
    with ((where or folder()) / file).open("rb") as opened:
        network.read(opened)
    network.eval().requires_grad_(False)
    process = dlms.processes.VP(beta_d=0.0, beta_min=1.0, t_min=0.01, t_max=LAST_TIME)
    return dlms.Denoiser(network, process, "noise"), (1, side, side)


def hsc32() -> tuple[dlms.Denoiser, tuple[int, ...]]:
    """Galaxies of the Hyper Suprime-Cam survey, 32x32."""
    return load("hsc32")


def ztf32() -> tuple[dlms.Denoiser, tuple[int, ...]]:
    """Galaxies of the Zwicky Transient Facility, 32x32."""
    return load("ztf32")


def hsc64() -> tuple[dlms.Denoiser, tuple[int, ...]]:
    """The galaxies of hsc32 at 64x64, by a network of their own."""
    return load("hsc64")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", choices=sorted(NAMES), default="hsc32")
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--budget", default="10m", help="minutes or network evaluations")
    parser.add_argument("--output", type=Path, default=None)
    chosen = parser.parse_args()
    denoiser, shape = load(chosen.name)
    print(dlms.check(denoiser, shape=shape))
    dlms.distill(denoiser, nfe=chosen.nfe, shape=shape, budget=chosen.budget, output=chosen.output)


if __name__ == "__main__":
    main()
