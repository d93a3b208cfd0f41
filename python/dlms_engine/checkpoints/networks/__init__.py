"""Networks of published pixel-space checkpoints, written from the papers' descriptions.

Module names are those of the published weights, so that their tensors load by name.
"""

from __future__ import annotations

from .adm import DhariwalUNet
from .guided import GuidedClassifier, GuidedUNet
from .song import SongUNet

NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
GUIDED = {"GuidedUNet": GuidedUNet, "GuidedClassifier": GuidedClassifier}

__all__ = ["GUIDED", "NETWORKS", "DhariwalUNet", "GuidedClassifier", "GuidedUNet", "SongUNet"]
