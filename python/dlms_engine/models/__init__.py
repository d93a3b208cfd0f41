"""Models that ship with the package: CIFAR-10 at 16x16 (``embedded``) and emoji (:func:`load`)."""

from .pretrained import NAMES, PretrainedModel, load, provenance

__all__ = ["NAMES", "PretrainedModel", "load", "provenance"]
