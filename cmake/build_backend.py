"""scikit-build-core, with torch's headers among the build requirements where there are none yet.

The compiled parts need the headers of torch >= 2.11, of any build: they use its stable ABI. An
environment that has torch lends its own (``find_torch.py``), so that nothing is downloaded and a CPU
build of torch is not joined by a CUDA one. In an environment without torch the build asks for it; pip
downloads it once and installs the same file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import find_torch
from scikit_build_core import build as _backend
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

TORCH = "torch>=2.11"

Settings = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*_backend.get_requires_for_build_wheel(config_settings), *_torch(config_settings)]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*_backend.get_requires_for_build_editable(config_settings), *_torch(config_settings)]


def _torch(config_settings: Settings) -> list[str]:
    """torch, unless its headers are there or the caller names a folder of them."""
    named = any("DLMS_TORCH_DIR" in key for key in config_settings or {})
    return [] if named or find_torch.folder() is not None else [TORCH]
