"""Trajectory optimal anisotropic diffusion: kernels and stages. The modules import in the order of the data's flow."""

__version__ = "0.1.0"
