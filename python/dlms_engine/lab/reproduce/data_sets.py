"""The papers' data sets: which published files they take, how many samples, how the model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

_EDM = "https://nvlabs-fi-cdn.nvidia.com/edm"
_OPENAI = "https://openaipublic.blob.core.windows.net"
_BATCHES = f"{_OPENAI}/diffusion/jul-2021/ref_batches"
_STATISTICS = "the diff-sampler repository's FID statistics, or your own of the training images"


@dataclass(frozen=True)
class NeededFile:
    """A file that somebody else published.

    Attributes:
        option: of the command.
        name: of the file or directory.
        source: where it is published.
        sha256: of the published file, where it is known.
    """

    option: str
    name: str
    source: str
    sha256: str = ""

    def __str__(self) -> str:
        checksum = f", SHA-256 {self.sha256}" if self.sha256 else ""
        return f"--{self.option} {self.name} ({self.source}{checksum})"


INCEPTION = NeededFile(
    "fid-weights",
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0",
    "6726825d...",
)


@dataclass(frozen=True)
class DataSet:
    """What a table is made on.

    Attributes:
        name: what the command calls it.
        model: the network and its data, in words.
        kind: how the checkpoint is read: an EDM "snapshot", a "guided" U-Net of guided-diffusion or of
            the consistency-model repository, or a diffusers "pipeline".
        files: what must be given.
        reference: statistics of the data's Inception features, keys ``mu`` and ``sigma``, for FID.
        samples: as many as the papers take.
        side: of the pixels that a guided U-Net, which fits any, was trained on.
        classes: labels are drawn from these; 0 for none.
        guidance: scale of the classifier's gradient (guided) or of classifier-free guidance (pipeline).
    """

    name: str
    model: str
    kind: Literal["snapshot", "guided", "pipeline"]
    files: tuple[NeededFile, ...]
    reference: NeededFile
    samples: int = 50_000
    side: int = 256
    classes: int = 0
    guidance: float | None = None

    def check(self, given: Mapping[str, object]) -> None:
        """Raises ValueError that names every needed file that is not among the options ``given``."""
        missing = [file for file in self.files if given.get(file.option) is None]
        if missing:
            raise ValueError(
                f"{self.name} ({self.model}) needs {'; '.join(map(str, missing))}. For FID also "
                f"{INCEPTION} and {self.reference}"
            )
        known = {file.option for file in self.files} | ({"config"} if self.text else set())
        extra = [name for name, value in given.items() if value is not None and name not in known]
        if extra:
            raise ValueError(f"--{extra[0]} has no use with {self.name}: leave it out")

    @property
    def text(self) -> bool:
        """Whether its samples belong to prompts."""
        return any(file.option == "prompts" for file in self.files)


def _snapshot(name: str, model: str, file: str, statistics: str, classes: int = 0) -> DataSet:
    checkpoint = NeededFile("checkpoint", file, f"{_EDM}/pretrained/{file}")
    reference = NeededFile("fid-reference", statistics, f"{_EDM}/fid-refs/{statistics}")
    return DataSet(name, model, "snapshot", (checkpoint,), reference, classes=classes)


def _stable_diffusion(name: str, version: str, files: Sequence[tuple[str, str, str]]) -> DataSet:
    first, *others = (NeededFile("checkpoint", *file) for file in files)
    either = ", or ".join(
        f"{other.name} ({other.source}, SHA-256 {other.sha256})" for other in others
    )
    source = f"{first.source}{f'; {either}' if either else ''}; or a diffusers directory of it"
    prompts = NeededFile(
        "prompts",
        "prompts.txt",
        "one prompt a line: the captions of MS-COCO_val2014_30k_captions.csv, from the "
        "text2image-benchmark repository, in its order",
    )
    return DataSet(
        name,
        f"Stable Diffusion {version}, MS-COCO captions, guidance 7.5",
        "pipeline",
        (NeededFile("checkpoint", first.name, source, first.sha256), prompts),
        NeededFile("fid-reference", "ms_coco-512x512.npz", _STATISTICS),
        samples=30_000,
        guidance=7.5,
    )


_SD15 = "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5"
_SD14 = "https://huggingface.co/CompVis/stable-diffusion-v-1-4-original"
_BEDROOM = NeededFile(
    "fid-reference",
    "VIRTUAL_lsun_bedroom256.npz",
    f"{_BATCHES}/lsun/bedroom/VIRTUAL_lsun_bedroom256.npz",
)
DATA_SETS: dict[str, DataSet] = {
    held.name: held
    for held in (
        _snapshot(
            "cifar10",
            "EDM's CIFAR-10 32x32, unconditional",
            "edm-cifar10-32x32-uncond-vp.pkl",
            "cifar10-32x32.npz",
        ),
        _snapshot(
            "ffhq64",
            "EDM's FFHQ 64x64, unconditional",
            "edm-ffhq-64x64-uncond-vp.pkl",
            "ffhq-64x64.npz",
        ),
        _snapshot(
            "afhqv2",
            "EDM's AFHQv2 64x64, unconditional",
            "edm-afhqv2-64x64-uncond-vp.pkl",
            "afhqv2-64x64.npz",
        ),
        _snapshot(
            "imagenet64",
            "EDM's ImageNet 64x64, a class a sample",
            "edm-imagenet-64x64-cond-adm.pkl",
            "imagenet-64x64.npz",
            classes=1000,
        ),
        DataSet(
            "bedroom-pixel",
            "the consistency-model repository's EDM of LSUN-Bedroom 256x256",
            "guided",
            (
                NeededFile(
                    "checkpoint",
                    "edm_bedroom256_ema.pt",
                    f"{_OPENAI}/consistency/edm_bedroom256_ema.pt",
                ),
            ),
            _BEDROOM,
        ),
        DataSet(
            "imagenet256-adm",
            "guided-diffusion's ImageNet 256x256, classifier guidance 2.0, a class a sample",
            "guided",
            (
                NeededFile(
                    "checkpoint",
                    "256x256_diffusion.pt",
                    f"{_OPENAI}/diffusion/jul-2021/256x256_diffusion.pt",
                ),
                NeededFile(
                    "classifier",
                    "256x256_classifier.pt",
                    f"{_OPENAI}/diffusion/jul-2021/256x256_classifier.pt",
                ),
            ),
            NeededFile(
                "fid-reference",
                "VIRTUAL_imagenet256_labeled.npz",
                f"{_BATCHES}/imagenet/256/VIRTUAL_imagenet256_labeled.npz",
            ),
            samples=10_000,
            classes=1000,
            guidance=2.0,
        ),
        DataSet(
            "bedroom-ldm",
            "latent diffusion's LSUN-Bedroom 256x256, unconditional",
            "pipeline",
            (
                NeededFile(
                    "checkpoint",
                    "DIRECTORY of a diffusers LDMPipeline",
                    "https://ommer-lab.com/files/latent-diffusion/lsun_bedrooms.zip, converted with "
                    "scripts/conversion_ldm_uncond.py of the diffusers repository",
                ),
            ),
            _BEDROOM,
        ),
        DataSet(
            "ddpm-cifar10",
            "DDPM's CIFAR-10 32x32, noise prediction",
            "pipeline",
            (
                NeededFile(
                    "checkpoint",
                    "DIRECTORY of the diffusers pipeline",
                    "https://huggingface.co/google/ddpm-cifar10-32",
                ),
            ),
            NeededFile("fid-reference", "cifar10-32x32.npz", f"{_EDM}/fid-refs/cifar10-32x32.npz"),
        ),
        _stable_diffusion(
            "sd15",
            "1.5",
            [
                (
                    "v1-5-pruned-emaonly.safetensors",
                    _SD15,
                    "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
                ),
                (
                    "v1-5-pruned-emaonly.ckpt",
                    _SD15,
                    "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516",
                ),
            ],
        ),
        _stable_diffusion(
            "sd14",
            "1.4",
            [
                (
                    "sd-v1-4.ckpt",
                    _SD14,
                    "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556",
                )
            ],
        ),
    )
}
"""name -> data set."""
