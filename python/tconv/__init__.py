"""Transposed convolution for PyTorch: every rank, every parameter, forward and backward, fused, deterministic."""

from . import nn
from ._explain import explain
from ._optimize import optimize
from .compile import compile_backend, decompositions
from .functional import conv_transpose1d, conv_transpose2d, conv_transpose3d

__version__ = "0.1.0"
__all__ = [
    "compile_backend",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "decompositions",
    "explain",
    "nn",
    "optimize",
]
