"""The model that ships with the package: a real 16x16 EDM model small enough for a laptop CPU.

``assets/embedded/`` holds a diffusers ``UNet2DModel`` trained on CIFAR-10 reduced to 16x16, a small
classifier giving the features of the Frechet distance, the statistics of those features over the
training images, and ``provenance.json``. Weights are stored in bfloat16 and loaded in the dtype
asked for; the numbers in a float32 network are therefore exact bfloat16 numbers.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..processes import EDM
from .denoiser import Denoiser

IMAGE_SHAPE = (3, 16, 16)
"""Channels, height, width of the images, which lie in [-1, 1]."""
SIGMA_DATA = 0.5
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
C_NOISE_SCALE = 100.0
"""The U-Net's timestep is ``C_NOISE_SCALE * c_noise``; ``examples/train_embedded.py`` trains so."""
_FEATURES = 64
"""Number of features per image of :class:`FeatureNetwork`."""

BOTTLENECK = "unet.mid_block"
"""Path of the tapped module; its 8x8 output, averaged over channels, is 64 numbers."""


class ReferenceStatistics(NamedTuple):
    """Feature statistics of an image set.

    Attributes:
        images: number of images.
        mean: float64 ``[F]``.
        covariance: float64 ``[F, F]``, unbiased (divided by images - 1).
    """

    images: int
    mean: Tensor
    covariance: Tensor


class EmbeddedNetwork(nn.Module):
    """``network(x, c_noise)`` as EDM preconditioning calls it, over a diffusers ``UNet2DModel``.

    ``unet.mid_block`` is the bottleneck (``[B, C, 8, 8]``).
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, c_noise: Tensor, **conditions: Any) -> Tensor:
        """Raw output F ``[B, 3, 16, 16]`` for ``x`` = c_in * noisy image and ``c_noise`` ``[B]``.

        c_noise is ln(sigma) / 4 and stays in the dtype it comes in (float32 or wider): the
        timestep must not be rounded to half precision.
        """
        output = self.unet(x, C_NOISE_SCALE * c_noise, return_dict=False, **conditions)
        return cast(Tensor, output[0])


class FeatureNetwork(nn.Module):
    """Convolutional classifier without its last layer: images in [-1, 1] -> features.

    Smooth throughout (SiLU, average pooling), so the features can be differentiated with respect
    to the images. Features are scaled to a mean variance of 1 over the training images.
    """

    num_features = _FEATURES

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 96, _FEATURES)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False)
            for before, after in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(after) for after in widths[1:])
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, 16, 16]`` -> ``[B, 64]``, same dtype. Other sizes work, untested for quality."""
        x = images
        for index, (convolution, norm) in enumerate(
            zip(self.convolutions, self.norms, strict=True)
        ):
            x = functional.silu(norm(convolution(x)))
            if index in (1, 3):
                x = functional.avg_pool2d(x, 2)
        return x.mean(dim=(2, 3)) * self.scale


def assets_path() -> Path:
    """Folder of the embedded model's files.

    Raises:
        FileNotFoundError: the installation lacks the files.
    """
    # Not importlib.resources: an editable install's multiplexed path is no folder on disk.
    path = Path(__file__).resolve().parent / "assets" / "embedded"
    if not (path / "config.json").exists():
        raise FileNotFoundError(
            f"the embedded model is missing from {path}: reinstall dlms_engine, or train it with "
            "examples/train_embedded.py and export it with examples/export_embedded.py"
        )
    return path


def embedded_network(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> EmbeddedNetwork:
    """The embedded U-Net, in eval mode, with frozen parameters.

    Raises:
        ImportError: diffusers is not installed.
    """
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError(
            "the embedded model is a diffusers UNet2DModel: pip install 'dlms_engine[diffusers]'"
        ) from error
    # torch_dtype is left out: from_pretrained would keep some modules in float32 for bfloat16.
    # low_cpu_mem_usage=False: the other path needs accelerate and gains nothing at 1 MB.
    from_pretrained: Any = UNet2DModel.from_pretrained  # untyped in diffusers
    unet: nn.Module = from_pretrained(
        assets_path(), low_cpu_mem_usage=False, use_safetensors=True, local_files_only=True
    )
    network = EmbeddedNetwork(unet).to(device=device, dtype=dtype)
    return network.eval().requires_grad_(False)


def load_embedded(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Denoiser:
    """The embedded model as a denoiser with its bottleneck tapped: E[x0 | x, sigma].

    Args:
        device: where the network lives.
        dtype: of the network; the sampler's state stays float32.

    Raises:
        ImportError: diffusers is not installed.
    """
    return Denoiser(
        embedded_network(device, dtype),
        EDM(SIGMA_MIN, SIGMA_MAX),
        prediction="edm",
        sigma_data=SIGMA_DATA,
        features=BOTTLENECK,
    )


def embedded_features(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> FeatureNetwork:
    """The feature network of the Frechet distance, in eval mode, with frozen parameters."""
    from safetensors.torch import load_file

    network = FeatureNetwork().float()  # whatever torch's default is
    stored = load_file(assets_path() / "features.safetensors")
    missing, unexpected = network.load_state_dict(stored, strict=False)
    # BatchNorm's step counters are not stored: they play no part in eval mode.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"features.safetensors: missing {missing}, unexpected {unexpected}")
    return network.to(device=device, dtype=dtype).eval().requires_grad_(False)


def embedded_reference() -> ReferenceStatistics:
    """Feature statistics of the CIFAR-10 training images at 16x16, float64 on the CPU."""
    from safetensors.torch import load_file

    stored = load_file(assets_path() / "reference.safetensors")
    return ReferenceStatistics(int(stored["count"]), stored["mean"], stored["covariance"])


def embedded_provenance() -> dict[str, Any]:
    """What the embedded files are: data set, training, hardware, date, SHA-256 of every file."""
    text = (assets_path() / "provenance.json").read_text(encoding="utf-8")
    return cast(dict[str, Any], json.loads(text))
