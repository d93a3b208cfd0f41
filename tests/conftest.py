"""Shared set-up: one thread, and this folder on the path so that tests can import ``analytic``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
