"""KernelBench level 1, problem 81: ConvTranspose2d 32 -> 64, 3x3, stride 5, padding 1, dilation 2.

On 16 x 32 x 64 x 128. With stride 5 and three taps two apart, 64 % of the outputs meet no tap at all and are exactly
zero.
"""

import torch
from torch import nn

import tconv


class ModelNew(nn.Module):
    """A 2D transposed convolution with stride, padding and dilation; parameters initialised as torch.nn does."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        bias: bool = False,
    ):
        super().__init__()
        self.conv_transpose2d = tconv.nn.ConvTranspose2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, dilation=dilation, bias=bias
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_transpose2d(x)


batch_size = 16
in_channels = 32
out_channels = 64
kernel_size = 3
height_in = 64
width_in = 128
stride = 5
padding = 1
dilation = 2


def get_inputs():
    return [torch.rand(batch_size, in_channels, height_in, width_in)]


def get_init_inputs():
    return [in_channels, out_channels, kernel_size, stride, padding, dilation]
