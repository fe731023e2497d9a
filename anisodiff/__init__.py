"""Trajectory optimal anisotropic diffusion: method = network x path x grid x solver, a folder for each.

The names below are the public face. They are loaded on demand, because they need torch, which the command line's help
and the workflow do without.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anisodiff.denoiser import Denoiser
    from anisodiff.grids.fixed import karras
    from anisodiff.models import Model, levels, load, load_denoiser, sample
    from anisodiff.paths.noise_path import NoisePath
    from anisodiff.solvers.loop import solve
    from anisodiff.solvers.registry import SOLVERS

__version__ = "0.1.0"
__all__ = ["SOLVERS", "Denoiser", "Model", "NoisePath", "karras", "levels", "load", "load_denoiser", "sample", "solve"]

_HOME = {
    "Denoiser": "denoiser",
    "NoisePath": "paths.noise_path",
    "SOLVERS": "solvers.registry",
    "karras": "grids.fixed",
    "solve": "solvers.loop",
} | dict.fromkeys(("Model", "levels", "load", "load_denoiser", "sample"), "models")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"anisodiff.{_HOME[name]}"), name)
    raise AttributeError(f"module 'anisodiff' has no attribute {name!r}")
