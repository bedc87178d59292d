"""KernelBench level 1, problem 73: ConvTranspose3d 32 -> 32, 3x3x3, stride 2, padding 1, on 4 x 32 x 32 x 64 x 128.

The benchmark calls its model as (32, 32, 3, 2, 1, 4). The sixth position is output_padding, and the benchmark's own
model does not hand output_padding on, so what it times is a dense convolution without output padding. This one does the
same: handing the 4 on would be an error (it must be smaller than the stride), and grouping would be another problem.
The grouped layer that the file's name speaks of is ModelNew(32, 32, 3, 2, 1, groups=4).
"""

import torch
from torch import nn

import tconv


class ModelNew(nn.Module):
    """A 3D transposed convolution with stride and padding; parameters initialised as torch.nn does."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        output_padding: int = 0,
        groups: int = 1,
        bias: bool = False,
    ):
        super().__init__()
        self.conv_transpose3d = tconv.nn.ConvTranspose3d(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=groups, bias=bias
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_transpose3d(x)


batch_size = 4
in_channels = 32
out_channels = 32
kernel_size = 3
depth = 32
height = 64
width = 128
stride = 2
padding = 1
groups = 4


def get_inputs():
    return [torch.rand(batch_size, in_channels, depth, height, width)]


def get_init_inputs():
    return [in_channels, out_channels, kernel_size, stride, padding, groups]
