"""FastPO: fused kernels and a full trainer for aligning diffusion models with human preferences.

Importing `fastpo` or `fastpo.loss` needs torch only (and Triton for the GPU kernels).
"""

from fastpo._version import __version__

__all__ = ["__version__"]
