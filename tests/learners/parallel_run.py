"""Distils on the analytic mixture; started by ``test_parallel`` alone and under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mixture_network import mixture_denoiser

from dlms_engine.learners import distill
from dlms_engine.parallel import finish, initialise

if __name__ == "__main__":
    initialise()
    distill(
        mixture_denoiser(),
        "dlms",
        nfe=3,
        shape=(16,),
        trajectories=96,
        batch=24,
        lr=1e-3,
        validation_samples=8,
        validation_steps=16,
        validate_every=0,
        progress=False,
        grid="polynomial",
        output=sys.argv[1],
        resume="--resume" in sys.argv,
    )
    finish()
