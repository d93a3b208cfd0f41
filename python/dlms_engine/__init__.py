"""Sample pretrained diffusion and flow models well in 3 to 10 network evaluations.

    import dlms_engine as dlms

    denoiser = dlms.Denoiser(network, dlms.processes.EDM(), prediction="edm", features="mid_block")
    solver = dlms.distill(denoiser, method="dlms", nfe=5, shape=(3, 32, 32))
    images = dlms.Sampler(denoiser, solver).sample(seeds=range(64), shape=(3, 32, 32))

Names are imported on first use, so that ``import dlms_engine`` loads neither torch nor the compiled
extension.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import learners, models, ops, processes, solvers
    from .engine.export import export_sampler
    from .engine.noise import seeded_noise
    from .engine.sampler import Sampler
    from .integrations.diffusers import accelerate
    from .lab import evaluation, plots
    from .lab.evaluation.check import check
    from .learners import distill
    from .learners.start import recommend
    from .models import embedded
    from .models.denoiser import Denoiser
    from .ops import BackendUnavailable
    from .policies.distilled import load_solver, save
    from .processes import grids
    from .solvers.table import SolverTable

# public name -> the module it lives in
_HOME = {
    "BackendUnavailable": "ops",
    "Denoiser": "models.denoiser",
    "Sampler": "engine.sampler",
    "SolverTable": "solvers.table",
    "accelerate": "integrations.diffusers",
    "check": "lab.evaluation.check",
    "distill": "learners",
    "export_sampler": "engine.export",
    "load_solver": "policies.distilled",
    "recommend": "learners.start",
    "save": "policies.distilled",
    "seeded_noise": "engine.noise",
}
# public name -> the module it is
_MODULES = {
    "embedded": "models.embedded",
    "evaluation": "lab.evaluation",
    "grids": "processes.grids",
    "learners": "learners",
    "models": "models",
    "ops": "ops",
    "plots": "lab.plots",
    "processes": "processes",
    "solvers": "solvers",
}

__all__ = [
    "BackendUnavailable",
    "Denoiser",
    "Sampler",
    "SolverTable",
    "__version__",
    "accelerate",
    "check",
    "distill",
    "embedded",
    "evaluation",
    "export_sampler",
    "grids",
    "learners",
    "load_solver",
    "models",
    "ops",
    "plots",
    "processes",
    "recommend",
    "save",
    "seeded_noise",
    "solvers",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name, _MODULES.get(name))
    if home is None:
        raise AttributeError(f"module 'dlms_engine' has no attribute {name!r}; it has {__all__}")
    module = importlib.import_module(f"{__name__}.{home}")
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value  # the next use does not come back here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
