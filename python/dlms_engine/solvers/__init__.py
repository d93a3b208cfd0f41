"""Makers of solver tables: ``maker(process, grid, *, afs=False, ...) -> SolverTable``."""

from .ddim import ddim
from .deis import deis
from .dpm_solver import dpm_solver_2, dpm_solver_pp, dpm_solver_pp_2s, heun
from .ipndm import ipndm, ipndm_v
from .registry import SOLVERS, handcrafted, make_solver
from .unipc import unipc

__all__ = [
    "SOLVERS",
    "ddim",
    "deis",
    "dpm_solver_2",
    "dpm_solver_pp",
    "dpm_solver_pp_2s",
    "handcrafted",
    "heun",
    "ipndm",
    "ipndm_v",
    "make_solver",
    "unipc",
]
