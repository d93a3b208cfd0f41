"""Settings by name: those of the papers and those of the embedded model."""

from .papers import PRESETS, preset

__all__ = ["PRESETS", "preset"]
