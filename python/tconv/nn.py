"""Modules with the constructors, initialisation, state and messages of :mod:`torch.nn`."""

from __future__ import annotations

from typing import Any, Callable, List, Optional

import torch
from torch import Tensor

from . import functional as F

__all__ = [
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "LazyConvTranspose3d",
]


class _TransposedConvolution:
    """The forward of all ranks; everything else is torch.nn's."""

    # None follows PyTorch's flags; "fp32" or "tf32" decides for this module (assign to the instance).
    precision: Optional[str] = None

    _tconv_function: Callable[..., Tensor]

    def forward(self: Any, input: Tensor, output_size: Optional[List[int]] = None) -> Tensor:
        """The layer applied to ``input``; ``output_size`` picks one of the sizes that a stride leaves open."""
        if self.padding_mode != "zeros":
            raise ValueError(f"Only `zeros` padding mode is supported for {type(self).__name__}")
        output_padding = self.output_padding
        if output_size is not None:
            output_padding = self._tconv_output_padding(input, output_size)
        return self._tconv_function(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
            precision=self.precision,
        )

    def _tconv_output_padding(self: Any, input: Tensor, output_size: List[int]) -> List[int]:
        rank = len(self.kernel_size)
        return self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, rank, self.dilation
        )


class ConvTranspose1d(_TransposedConvolution, torch.nn.ConvTranspose1d):
    __doc__ = torch.nn.ConvTranspose1d.__doc__
    _tconv_function = staticmethod(F.conv_transpose1d)


class ConvTranspose2d(_TransposedConvolution, torch.nn.ConvTranspose2d):
    __doc__ = torch.nn.ConvTranspose2d.__doc__
    _tconv_function = staticmethod(F.conv_transpose2d)


class ConvTranspose3d(_TransposedConvolution, torch.nn.ConvTranspose3d):
    __doc__ = torch.nn.ConvTranspose3d.__doc__
    _tconv_function = staticmethod(F.conv_transpose3d)


class LazyConvTranspose1d(_TransposedConvolution, torch.nn.LazyConvTranspose1d):
    __doc__ = torch.nn.LazyConvTranspose1d.__doc__
    cls_to_become = ConvTranspose1d  # type: ignore[assignment]
    _tconv_function = staticmethod(F.conv_transpose1d)


class LazyConvTranspose2d(_TransposedConvolution, torch.nn.LazyConvTranspose2d):
    __doc__ = torch.nn.LazyConvTranspose2d.__doc__
    cls_to_become = ConvTranspose2d  # type: ignore[assignment]
    _tconv_function = staticmethod(F.conv_transpose2d)


class LazyConvTranspose3d(_TransposedConvolution, torch.nn.LazyConvTranspose3d):
    __doc__ = torch.nn.LazyConvTranspose3d.__doc__
    cls_to_become = ConvTranspose3d  # type: ignore[assignment]
    _tconv_function = staticmethod(F.conv_transpose3d)
