"""The model of a data set: its network, one sample's shape, conditions by sample, decoder."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.edm import read_snapshot
from ...checkpoints.load import load_checkpoint
from ...models.denoiser import Denoiser
from ...processes import EDM
from ...support.files import read_text
from .data_sets import DataSet

LABELS = 65_536
"""Class labels that are drawn; sample i has number i mod that many."""
_MOST_PROMPTS = 64 << 20
_DECODED = 8  # latents decoded together


@dataclass(frozen=True)
class PaperModel:
    """What a table is made with.

    Attributes:
        denoiser: the model, its bottleneck tapped.
        shape: of one sample; of one latent where there is ``decode``.
        conditions: the network's keyword arguments, ``learners.start.Conditions``.
        decode: latents ``[B, ...]`` -> images ``[B, 3, H, W]`` in [-1, 1]; None for pixel models.
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    conditions: Any = None
    decode: Callable[[Tensor], Tensor] | None = None


def load_paper_model(
    data: DataSet,
    files: Mapping[str, Path],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    side: int | None = None,
) -> PaperModel:
    """The model of ``data`` from its published files. No pickled code is run.

    Args:
        files: option (``"checkpoint"``, ``"classifier"``, ``"prompts"``, ``"config"``) -> path.
        dtype: of the network; state and history stay float32.
        side: of the pixels of a guided U-Net in place of the data set's.

    Raises:
        ValueError: a file is not what ``data`` names.
        UnsafeCheckpointError: reading it would need pickled code.
        ImportError: a pipeline, and diffusers is missing.
        OSError: a file cannot be read.
    """
    path = Path(files["checkpoint"])
    if not path.exists():
        raise FileNotFoundError(
            f"checkpoint: there is no {path}; {data.name} takes {data.files[0]}"
        )
    if data.kind == "snapshot":
        found = _snapshot(path, dtype)
    elif data.kind == "guided":
        found = _guided(data, path, files.get("classifier"), dtype, side or data.side)
    else:
        found = _pipeline(data, path, files, torch.device(device), dtype)
    classes = _classes(found.denoiser.network)
    if data.classes and not classes:
        raise ValueError(
            f"{path}: its network takes no class labels, {data.name} expects {data.files[0].name}"
        )
    conditions = found.conditions
    if data.classes:
        conditions = {"class_labels": drawn_labels(classes)}
    found.denoiser.to(device).eval().requires_grad_(False)
    return PaperModel(found.denoiser, found.shape, conditions, found.decode)


def drawn_labels(classes: int) -> Tensor:
    """int64 ``[LABELS]``: uniform, the same in every run."""
    return torch.randint(classes, (LABELS,), generator=torch.Generator().manual_seed(0))


def _classes(network: Any) -> int:
    """Of the first module inside that says how many classes it knows; 0 for none."""
    for module in network.modules():
        found = getattr(module, "label_dim", None) or getattr(module, "num_classes", None)
        if isinstance(found, int):
            return found
    return 0


def _snapshot(path: Path, dtype: torch.dtype) -> PaperModel:
    snapshot = read_snapshot(path)
    network = snapshot.network().to(dtype)
    side, channels = (int(snapshot.settings[key]) for key in ("img_resolution", "in_channels"))
    deepest = list(dict(network.named_children())["enc"]._modules)[-1]  # AMED's and DLMS's choice
    denoiser = Denoiser(
        network,
        EDM(snapshot.sigma_min, snapshot.sigma_max),
        "edm",
        sigma_data=snapshot.sigma_data,
        features=f"enc.{deepest}",
    )
    return PaperModel(denoiser, (channels, side, side))


def _guided(
    data: DataSet, path: Path, classifier: Path | None, dtype: torch.dtype, side: int
) -> PaperModel:
    inside = "network.network" if classifier is not None else "network"
    # a converted file says all itself
    options = {} if path.suffix == ".safetensors" else {"num_head_channels": 64}
    denoiser = load_checkpoint(
        path,
        features=f"{inside}.middle_block",
        dtype=dtype,
        classifier=classifier,
        classifier_scale=1.0 if data.guidance is None else data.guidance,
        **options,
    )
    return PaperModel(denoiser, (3, side, side))


# -- diffusers -----------------------------------------------------------------------------------


def _pipeline(
    data: DataSet,
    path: Path,
    files: Mapping[str, Path],
    device: torch.device,
    dtype: torch.dtype,
) -> PaperModel:
    from ...checkpoints.single_file import load_single_file
    from ...integrations.diffusers import DLMSScheduler
    from ...integrations.pipelines.distill import load_pipeline

    if path.is_dir():
        pipe = load_pipeline(path, dtype)
    else:
        pipe = load_single_file(path, config=files.get("config"), torch_dtype=dtype)
    pipe.to(device)
    noise = DLMSScheduler.from_config(pipe.scheduler.config, solver="ddim").noise_model
    conditions, unconditional = None, None
    if data.text:
        conditions = PromptConditions(pipe, Path(files["prompts"]))
        unconditional = conditions.encoded(("",))
    denoiser = Denoiser(
        pipe.unet,
        noise.process,
        noise.denoiser.prediction,
        features="mid_block",
        guidance_scale=data.guidance,
        unconditional=unconditional,
    )
    side = int(pipe.unet.config.sample_size)
    shape = (int(pipe.unet.config.in_channels), side, side)
    coder = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    return PaperModel(
        denoiser, shape, conditions, None if coder is None else functools.partial(_decoded, coder)
    )


@torch.no_grad()
def _decoded(coder: nn.Module, latents: Tensor) -> Tensor:
    """Images of latents ``[B, ...]``, few at a time: a decoder's states are larger than a U-Net's."""
    parameter = next(coder.parameters())
    scaled = latents.to(parameter.dtype) / float(coder.config.scaling_factor)  # type: ignore[union-attr,arg-type]
    parts = [coder.decode(part).sample for part in torch.split(scaled, _DECODED)]  # type: ignore[operator]
    return torch.cat(parts).float()


class PromptConditions:
    """Sample numbers -> what the text encoder says of their prompts; sample i has prompt i mod P.

    Encoded as they are needed: those of 30,000 prompts would take 7 GB.

    Raises:
        ValueError: the file has no prompt.
    """

    def __init__(self, pipe: Any, file: Path) -> None:
        text = read_text(file, _MOST_PROMPTS)
        self.prompts = [line.strip() for line in text.splitlines() if line.strip()]
        if not self.prompts:
            raise ValueError(f"prompts: {file} is empty, expected one prompt a line")
        self._pipe = pipe
        self._kept = functools.lru_cache(maxsize=4)(
            self.encoded
        )  # a batch is asked for at each row
        # callables are told apart by their name, in checkpoints and caches
        self.__qualname__ = f"prompts-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @torch.no_grad()
    def encoded(self, texts: tuple[str, ...]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` ``[B, tokens, width]``."""
        found, _ = self._pipe.encode_prompt(list(texts), self._pipe.device, 1, False)
        return {"encoder_hidden_states": found}

    def __call__(self, numbers: Tensor) -> Mapping[str, Tensor]:
        """int64 ``[B]`` -> keywords with B rows."""
        chosen = tuple(self.prompts[n % len(self.prompts)] for n in numbers.tolist())
        return self._kept(chosen)
