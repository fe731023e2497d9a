"""Trajectory optimal anisotropic diffusion: kernels and stages. The modules import in the order of the data's flow."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anisodiff.models import load_denoiser

__version__ = "0.1.0"
__all__ = ["load_denoiser"]


def __getattr__(name: str) -> Any:
    if name == "load_denoiser":  # on demand: it needs torch, the command line's help and the workflow do not
        from anisodiff.models import load_denoiser

        return load_denoiser
    raise AttributeError(f"module 'anisodiff' has no attribute {name!r}")
