"""Networks of published pixel-space checkpoints, written from the papers' descriptions.

Module names are those of the published weights, so that their tensors load by name.
"""

from __future__ import annotations

from .adm import DhariwalUNet
from .song import SongUNet

NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}

__all__ = ["NETWORKS", "DhariwalUNet", "SongUNet"]
