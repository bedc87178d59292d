"""Transposed convolution with the signatures of :mod:`torch.nn.functional`."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import _core, _ops
from ._autograd import ConvTranspose, EagerConvTranspose
from ._core import Geometry, IntOrInts

__all__ = ["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]

if hasattr(torch, "compiler") and hasattr(torch.compiler, "is_compiling"):
    _is_compiling = torch.compiler.is_compiling
else:  # before 2.1
    import torch._dynamo

    _is_compiling = torch._dynamo.is_compiling

_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", None)
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_forward_level = torch.autograd.forward_ad
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def autocast_dtype(device_type: str) -> Optional[torch.dtype]:
    """The dtype that autocast asks of convolutions on this device now; None when it is off."""
    if device_type not in ("cpu", "cuda"):
        return None
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    if device_type == "cuda":
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None


def _cast(tensor: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
    if tensor is None or not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
        return tensor
    return tensor.to(dtype)


def plain(*tensors: Optional[Tensor]) -> bool:
    """Real tensors outside every mode and transform, which may go to the core without PyTorch's dispatcher."""
    return all(type(t) in _PLAIN for t in tensors) and not _dispatch_modes() and not _functorch_active()


def _conv_transpose(
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    stride: IntOrInts,
    padding: IntOrInts,
    output_padding: IntOrInts,
    groups: int,
    dilation: IntOrInts,
    precision: Optional[str],
) -> Tensor:
    if _is_compiling():
        return _traced(rank, input, weight, bias, stride, padding, output_padding, groups, dilation, precision)
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(
            _PUBLIC[rank],
            (input, weight, bias),
            input,
            weight,
            bias,
            stride,
            padding,
            output_padding,
            groups,
            dilation,
            precision=precision,
        )
    if (_any_autocast is None or _any_autocast()) and isinstance(input, Tensor):
        dtype = autocast_dtype(input.device.type)
        if dtype is not None:
            input, weight, bias = _cast(input, dtype), _cast(weight, dtype), _cast(bias, dtype)  # type: ignore
    if type(input) in _PLAIN and type(weight) in _PLAIN and type(bias) in _PLAIN and not _dispatch_modes():
        if _functorch_active():
            geom = _core.geometry(rank, stride, padding, output_padding, groups, dilation, precision)
            _check(geom, input, weight, bias)
            return ConvTranspose.apply(input, weight, bias, geom)
        entry = _core.forward_entry(
            rank, input, weight, bias, stride, padding, output_padding, groups, dilation, precision
        )
        if (
            torch.is_grad_enabled()
            and (input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
        ) or _forward_level._current_level >= 0:
            return EagerConvTranspose.apply(input, weight, bias, entry)
        return _core.run_forward(entry, input, weight, bias)
    return _traced(rank, input, weight, bias, stride, padding, output_padding, groups, dilation, precision)


def _check(geom: Geometry, input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> None:
    _core.check_tensors(f"conv_transpose{geom.rank}d", input=input, weight=weight, bias=bias)
    _core.check_shapes(geom, input, weight, bias)


def _traced(
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    stride: IntOrInts,
    padding: IntOrInts,
    output_padding: IntOrInts,
    groups: int,
    dilation: IntOrInts,
    precision: Optional[str],
) -> Tensor:
    """Through PyTorch's dispatcher: under torch.compile, torch.export, fake tensors, modes and tensor subclasses."""
    geom = _core.geometry(rank, stride, padding, output_padding, groups, dilation, precision)
    dtype = autocast_dtype(input.device.type) if isinstance(input, Tensor) else None
    if dtype is not None:
        input, weight, bias = _cast(input, dtype), _cast(weight, dtype), _cast(bias, dtype)  # type: ignore
    _check(geom, input, weight, bias)
    return _ops.conv_transpose(input, weight, bias, geom)


_DOC = """Transposed convolution over {n} dimension{s}.

    :func:`torch.nn.functional.conv_transpose{n}d` in every argument, and ``precision``.

    .. math::
        y[b, c_o, o] = \\text{{bias}}[c_o] + \\sum_{{c_i, i, t:\\ o = s i + d t - p}} x[b, c_i, i]\\, w[c_i, c_o, t]

    Args:
        input: the input; ``channels_last`` inputs (or weights) give ``channels_last`` outputs, as in PyTorch.
        weight: the filters.
        bias: one number per output channel, or None.
        stride: distance between the outputs of neighbouring inputs.
        padding: outputs cut off at both ends of each dimension.
        output_padding: outputs added at the end of each dimension; smaller than ``stride`` or ``dilation``.
        groups: connections from inputs to outputs are confined to this many blocks of channels.
        dilation: distance between taps.
        precision: ``"fp32"``, ``"tf32"``, or None to follow PyTorch's flags. Only fp32 tensors on CUDA are affected.

    Shape:
        - input: :math:`(N, C_{{in}}, {i})` or :math:`(C_{{in}}, {i})`
        - weight: :math:`(C_{{in}}, C_{{out}} / \\text{{groups}}, {k})`
        - output: :math:`(N, C_{{out}}, {o})` with
          :math:`o = (i - 1) s - 2 p + d (k - 1) + \\text{{output\\_padding}} + 1` per dimension

    Raises:
        TypeError: an argument is of the wrong type.
        RuntimeError: a value, shape, device or dtype that does not fit; the message names it and what is allowed.
        NotImplementedError: a dtype or device that is not supported.

    Example::

        >>> import torch, tconv
        >>> x, w = torch.randn({x}), torch.randn({w})
        >>> tconv.conv_transpose{n}d(x, w, stride=2, padding=1).shape
        torch.Size({y})
    """


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    output_padding: IntOrInts = 0,
    groups: int = 1,
    dilation: IntOrInts = 1,
    *,
    precision: Optional[str] = None,
) -> Tensor:
    return _conv_transpose(1, input, weight, bias, stride, padding, output_padding, groups, dilation, precision)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    output_padding: IntOrInts = 0,
    groups: int = 1,
    dilation: IntOrInts = 1,
    *,
    precision: Optional[str] = None,
) -> Tensor:
    return _conv_transpose(2, input, weight, bias, stride, padding, output_padding, groups, dilation, precision)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    output_padding: IntOrInts = 0,
    groups: int = 1,
    dilation: IntOrInts = 1,
    *,
    precision: Optional[str] = None,
) -> Tensor:
    return _conv_transpose(3, input, weight, bias, stride, padding, output_padding, groups, dilation, precision)


_PUBLIC = {1: conv_transpose1d, 2: conv_transpose2d, 3: conv_transpose3d}
for _n, _function in _PUBLIC.items():
    _function.__doc__ = _DOC.format(
        n=_n,
        s="" if _n == 1 else "s",
        i=("L", "H, W", "D, H, W")[_n - 1],
        k=("k", "k_h, k_w", "k_d, k_h, k_w")[_n - 1],
        o=("L'", "H', W'", "D', H', W'")[_n - 1],
        x=", ".join(map(str, (1, 8) + (5,) * _n)),
        w=", ".join(map(str, (8, 4) + (4,) * _n)),
        y=[1, 4] + [10] * _n,
    )
