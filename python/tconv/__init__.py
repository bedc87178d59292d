"""Transposed convolution for PyTorch: every rank, every parameter, forward and backward, fused, deterministic."""

from . import nn
from .functional import conv_transpose1d, conv_transpose2d, conv_transpose3d

__version__ = "0.1.0"
__all__ = ["conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "nn"]
