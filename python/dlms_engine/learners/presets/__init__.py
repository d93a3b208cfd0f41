"""Settings by name: those of the papers and those of the embedded model."""

from .papers import PRESETS, of

__all__ = ["PRESETS", "of"]
