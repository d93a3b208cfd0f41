"""Benchmark models: trained by the examples, stored beside the code, loaded by ``--model NAME``.

They are too large for the package. ``benchmarks/models/NAME/`` of a checkout holds the files, or
``NAME/`` in the folder that the environment variable ``DLMS_MODELS`` names. What reads them:

    DLMS_MODEL_DEVICE   cpu or cuda; default: cuda where there is a GPU
    DLMS_MODEL_DTYPE    float32, float16 or bfloat16: the dtype the U-Net computes in where no
                        gradient runs; there it stays float32, as do the features
    DLMS_MODEL_COMPILE  1: torch.compile the U-Net for large batches without gradients

The samples live where the networks do; the noise is the same, bit for bit, wherever that is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..models.denoiser import Denoiser
from ..models.embedded import ReferenceStatistics
from ..models.features import ResidualFeatures
from ..models.pretrained import read_config, read_features, read_network, read_reference
from ..models.unet import UNet
from ..processes import from_config

RECIPES = ("cifar10-32",)
"""Models there are recipes for."""
FILES = (
    "config.json",
    "network.safetensors",
    "features.safetensors",
    "reference.safetensors",
    "provenance.json",
)
COMPILED_FROM = 256
"""Batch size from which ``DLMS_MODEL_COMPILE`` takes effect."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class BenchmarkModel(NamedTuple):
    """What the commands need of a model.

    Attributes:
        denoiser: E[x0 | x, sigma], its bottleneck tapped.
        shape: of one sample, channels first; values lie in [-1, 1].
        features: images ``[B, *shape]`` -> ``[B, F]``.
        reference: statistics of these features over the training images.
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    features: nn.Module
    reference: ReferenceStatistics


class BenchmarkNetwork(nn.Module):
    """``network(x, c_noise)`` as EDM preconditioning calls it, whatever the U-Net's dtype.

    Tensors go in and come out in the caller's dtype; between, the U-Net runs in its own.
    ``bottleneck`` passes on the middle block's output ``[B, C, 8, 8]``, for a denoiser's tap.

    Args:
        unet: a network with a ``mid_block``, called with c_noise.
        precise: the same in float32, asked where gradients run back; float16 would lose the small
            ones. None: ``unet`` itself.
        compile: use torch.compile for batches of at least ``COMPILED_FROM`` without gradients; it
            compiles once a batch size, which small and rare ones would not pay back.

    One call at a time: threads need a copy each.
    """

    def __init__(
        self, unet: nn.Module, *, precise: nn.Module | None = None, compile: bool = False
    ) -> None:
        super().__init__()
        # The first parameter's dtype is what a denoiser hands over: float32, whatever the U-Net's.
        place = next(unet.parameters()).device
        self.outside = nn.Parameter(torch.zeros((), device=place), requires_grad=False)
        self.unet = unet
        self.precise = precise
        self.bottleneck = nn.Identity()
        self._middle: Tensor | None = None
        for each in (unet, precise):
            if each is not None:
                cast(nn.Module, each.mid_block).register_forward_hook(self._keep)
        self._fast: Callable[..., tuple[Tensor, Tensor]] = (
            torch.compile(self._both, dynamic=False) if compile else self._both
        )

    def _keep(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._middle = output

    def _both(self, x: Tensor, c_noise: Tensor, unet: nn.Module) -> tuple[Tensor, Tensor]:
        output = unet(x, c_noise)
        middle, self._middle = self._middle, None
        assert middle is not None
        return output, middle

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Raw output F like ``x`` = c_in * noisy image ``[B, 3, H, W]``; ``c_noise`` ``[B]``.

        c_noise = ln(sigma) / 4 is never rounded below float32.
        """
        gradients = torch.is_grad_enabled() and x.requires_grad
        unet = self.precise if gradients and self.precise is not None else self.unet
        call = self._both if gradients or len(x) < COMPILED_FROM else self._fast
        inside = next(unet.parameters())
        moved = x.to(inside.dtype, memory_format=torch.channels_last)
        wide = torch.promote_types(c_noise.dtype, torch.float32)
        output, middle = call(moved, c_noise.to(wide), unet)
        self.bottleneck(middle.to(x.dtype))
        return output.to(x.dtype, memory_format=torch.contiguous_format)


class FloatFeatures(nn.Module):
    """A feature network in its own dtype and memory format, called in any."""

    def __init__(self, network: ResidualFeatures) -> None:
        super().__init__()
        self.network = network
        self.num_features = network.num_features

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` -> ``[B, F]`` in the dtype of ``images``."""
        moved = images.to(self.network.scale.dtype, memory_format=torch.channels_last)
        return cast(Tensor, self.network(moved).to(images.dtype))


def model_folder(name: str) -> Path:
    """Where the model's files are.

    Raises:
        ValueError: no such model.
        FileNotFoundError: it has not been made; the message says how.
    """
    if name not in RECIPES:
        raise ValueError(f"benchmark model is {name!r}, expected one of {', '.join(RECIPES)}")
    named = os.environ.get("DLMS_MODELS")
    checkout = Path(__file__).resolve().parents[3]
    root = Path(named).expanduser() if named else checkout / "benchmarks" / "models"
    path = root / name
    missing = [file for file in FILES if not (path / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the model {name} is not in {path} (missing: {', '.join(missing)}). Set DLMS_MODELS to "
            f"the folder that holds {name}/, or make it in a checkout, on a GPU: "
            "DATA=cifar10.tar scripts/gpu_record.sh train export"
        )
    return path


def load_benchmark_model(name: str, device: torch.device | str | None = None) -> BenchmarkModel:
    """The model, in eval mode, with frozen parameters.

    Args:
        device: where it lives; None for DLMS_MODEL_DEVICE or what that defaults to.

    Raises:
        ValueError: no such model, or an environment variable holds no word it may hold.
        FileNotFoundError: its files are absent.
    """
    device, dtype, path = torch.device(device or _device()), _dtype(), model_folder(name)
    config = read_config(path)
    unet = load_unet(name, device, dtype)
    precise = None if dtype == torch.float32 else load_unet(name, device)
    compiled = os.environ.get("DLMS_MODEL_COMPILE", "0") not in ("", "0")
    network = BenchmarkNetwork(unet, precise=precise, compile=compiled).eval()
    process, sigma_data = from_config(config["process"]), float(config["sigma_data"])
    denoiser = Denoiser(network, process, "edm", sigma_data=sigma_data, features="bottleneck")
    shape = (3, unet.size, unet.size)
    return BenchmarkModel(
        denoiser, shape, FloatFeatures(read_features(path, device)), read_reference(path)
    )


def load_unet(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> UNet:
    """The U-Net alone, channels-last, frozen; its time argument is c_noise."""
    return read_network(model_folder(name), device, dtype)


def _device() -> torch.device:
    said = os.environ.get("DLMS_MODEL_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if said.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"DLMS_MODEL_DEVICE is {said!r}, expected cpu or cuda")
    if said.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"DLMS_MODEL_DEVICE is {said!r}, but torch sees no GPU: use cpu")
    return torch.device(said)


def _dtype() -> torch.dtype:
    said = os.environ.get("DLMS_MODEL_DTYPE") or "float32"
    if said not in DTYPES:
        raise ValueError(f"DLMS_MODEL_DTYPE is {said!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[said]
