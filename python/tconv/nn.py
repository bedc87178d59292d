"""Modules with the constructors, initialisation, state and messages of :mod:`torch.nn`."""

from __future__ import annotations

from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvTransposeNd

from . import _chain, _core, _fused
from . import functional as F
from ._chain import Answer, Described, rule
from ._fused import MAX_OPERANDS

__all__ = [
    "Add",
    "AddChannel",
    "AddConstant",
    "ChannelLayerNorm",
    "Clamp",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Fused",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "LazyConvTranspose3d",
    "Multiply",
    "Scale",
    "ScaleChannel",
]


class _TransposedConvolution:
    """The forward of all ranks; everything else is torch.nn's."""

    # None follows PyTorch's flags; "fp32" or "tf32" decides for this module (assign to the instance).
    precision: Optional[str] = None

    _tconv_function: Callable[..., Tensor]
    weight: Any
    bias: Any

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


_DOC = """A transposed convolution layer over {n} dimension{s}: :class:`torch.nn.ConvTranspose{n}d` in every respect.

    .. math::
        y[b, c_o, o] = \\text{{bias}}[c_o] + \\sum_{{c_i, i, t:\\ o = s i + d t - p}} x[b, c_i, i]\\, w[c_i, c_o, t]

    Same constructor, initialisation, state_dict, ``repr`` and ``output_size`` argument. The attribute ``precision``
    (``None``, ``"fp32"`` or ``"tf32"``) overrides PyTorch's flags for fp32 tensors on CUDA.

    Shape:
        - input: :math:`(N, C_{{in}}, {i})` or :math:`(C_{{in}}, {i})`
        - output: :math:`(N, C_{{out}}, {o})` with
          :math:`o = (i - 1) s - 2 p + d (k - 1) + \\text{{output\\_padding}} + 1` per dimension

    Raises:
        ValueError: ``groups`` does not divide the channels, another padding mode than zeros, an impossible
            ``output_size``.
        RuntimeError: inputs that do not fit; see :func:`tconv.conv_transpose{n}d`.

    Example::

        >>> import torch, tconv
        >>> layer = tconv.nn.ConvTranspose{n}d(8, 4, 4, stride=2, padding=1)
        >>> layer(torch.randn({x})).shape
        torch.Size({y})
    """


def _doc(rank: int) -> str:
    return _DOC.format(
        n=rank,
        s="" if rank == 1 else "s",
        i=("L", "H, W", "D, H, W")[rank - 1],
        o=("L'", "H', W'", "D', H', W'")[rank - 1],
        x=", ".join(map(str, (2, 8) + (5,) * rank)),
        y=[2, 4] + [10] * rank,
    )


class ConvTranspose1d(_TransposedConvolution, torch.nn.ConvTranspose1d):
    __doc__ = _doc(1)
    _tconv_function = staticmethod(F.conv_transpose1d)


class ConvTranspose2d(_TransposedConvolution, torch.nn.ConvTranspose2d):
    __doc__ = _doc(2)
    _tconv_function = staticmethod(F.conv_transpose2d)


class ConvTranspose3d(_TransposedConvolution, torch.nn.ConvTranspose3d):
    __doc__ = _doc(3)
    _tconv_function = staticmethod(F.conv_transpose3d)


class LazyConvTranspose1d(_TransposedConvolution, torch.nn.LazyConvTranspose1d):
    __doc__ = """A :class:`ConvTranspose1d` that takes ``in_channels`` from its first input."""
    cls_to_become = ConvTranspose1d  # type: ignore[assignment]
    _tconv_function = staticmethod(F.conv_transpose1d)


class LazyConvTranspose2d(_TransposedConvolution, torch.nn.LazyConvTranspose2d):
    __doc__ = """A :class:`ConvTranspose2d` that takes ``in_channels`` from its first input."""
    cls_to_become = ConvTranspose2d  # type: ignore[assignment]
    _tconv_function = staticmethod(F.conv_transpose2d)


class LazyConvTranspose3d(_TransposedConvolution, torch.nn.LazyConvTranspose3d):
    __doc__ = """A :class:`ConvTranspose3d` that takes ``in_channels`` from its first input."""
    cls_to_become = ConvTranspose3d  # type: ignore[assignment]
    _tconv_function = staticmethod(F.conv_transpose3d)


# --- Operations of a chain that torch.nn has no module for ------------------------------------------------------------


class Scale(torch.nn.Module):
    """``x * value`` with a fixed number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = float(value)

    def forward(self, input: Tensor) -> Tensor:
        return input * self.value

    def extra_repr(self) -> str:
        return f"{self.value}"


class AddConstant(torch.nn.Module):
    """``x + value`` with a fixed number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = float(value)

    def forward(self, input: Tensor) -> Tensor:
        return input + self.value

    def extra_repr(self) -> str:
        return f"{self.value}"


class Clamp(torch.nn.Module):
    """``torch.clamp(x, min, max)``; either bound may be None."""

    def __init__(self, min: Optional[float] = None, max: Optional[float] = None) -> None:
        super().__init__()
        if min is None and max is None:
            raise ValueError("Clamp: at least one of min and max must be given")
        self.min = None if min is None else float(min)
        self.max = None if max is None else float(max)

    def forward(self, input: Tensor) -> Tensor:
        return torch.clamp(input, self.min, self.max)

    def extra_repr(self) -> str:
        return f"min={self.min}, max={self.max}"


class _PerChannel(torch.nn.Module):
    def __init__(self, num_channels: int, fill: float, device: Any, dtype: Any) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.weight = torch.nn.Parameter(torch.full((num_channels,), fill, device=device, dtype=dtype))

    def _shaped(self, input: Tensor) -> Tensor:
        # Batched input: channels are dimension 1.
        return self.weight.reshape(-1, *(1,) * (input.dim() - 2))

    def extra_repr(self) -> str:
        return f"{self.num_channels}"


class ScaleChannel(_PerChannel):
    """``x * weight[channel]`` with a learnt weight, initially 1. Input (N, C, ...)."""

    def __init__(self, num_channels: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(num_channels, 1.0, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return input * self._shaped(input)


class AddChannel(_PerChannel):
    """``x + weight[channel]`` with a learnt weight, initially 0. Input (N, C, ...)."""

    def __init__(self, num_channels: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(num_channels, 0.0, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return input + self._shaped(input)


class Add(torch.nn.Module):
    """``x + other``: a residual connection. ``other`` is an extra argument of ``Fused``'s call."""

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        return input + other


class Multiply(torch.nn.Module):
    """``x * other``: a gate. ``other`` is an extra argument of ``Fused``'s call."""

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        return input * other


class ChannelLayerNorm(torch.nn.Module):
    """Layer normalisation over the channels at every position; ``LayerNorm2d`` in many networks. Input (N, C, ...).

    Example::

        >>> import torch, tconv
        >>> tconv.nn.ChannelLayerNorm(8)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    weight: Optional[Tensor]
    bias: Optional[Tensor]

    def __init__(
        self, num_channels: int, eps: float = 1e-6, affine: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.eps = eps
        if affine:
            self.weight = torch.nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))
            self.bias = torch.nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        return _chain.channel_layer_norm(input, self.weight, self.bias, self.eps, input.dim() - 2)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, eps={self.eps}, affine={self.weight is not None}"


@rule(Scale)
def _scale(module: Scale, channels: int) -> Answer:
    return Described(f"scale({module.value!r})")


@rule(AddConstant)
def _add_constant(module: AddConstant, channels: int) -> Answer:
    return Described(f"add({module.value!r})")


@rule(Clamp)
def _clamp(module: Clamp, channels: int) -> Answer:
    low = float("-inf") if module.min is None else module.min
    high = float("inf") if module.max is None else module.max
    return Described(f"clamp({low!r},{high!r})")


@rule(ScaleChannel)
def _scale_channel(module: ScaleChannel, channels: int) -> Answer:
    if module.num_channels != channels:
        return f"ScaleChannel of {module.num_channels} channels on {channels} channels"
    return Described("scale_channel", _chain.weight_operand)


@rule(AddChannel)
def _add_channel(module: AddChannel, channels: int) -> Answer:
    if module.num_channels != channels:
        return f"AddChannel of {module.num_channels} channels on {channels} channels"
    return Described("add_channel", _chain.weight_operand)


@rule(Add)
def _add(module: Add, channels: int) -> Answer:
    return Described("add_tensor", residual=True)


@rule(Multiply)
def _multiply(module: Multiply, channels: int) -> Answer:
    return Described("scale_tensor", residual=True)


@rule(ChannelLayerNorm)
def _channel_layer_norm(module: ChannelLayerNorm, channels: int) -> Answer:
    if module.num_channels != channels:
        return f"ChannelLayerNorm over {module.num_channels} channels on {channels} channels"
    text = f"layer_norm(eps={module.eps!r}{_chain.affine_text(module)})"
    return Described(text, _chain.affine_operands, widens=True, norm=True)


# --- Fused ------------------------------------------------------------------------------------------------------------


class Recipe:
    """A checked chain. The words are made once: they are Python formatting, which torch.compile cannot trace."""

    def __init__(self, conv: Any, pre: Sequence[torch.nn.Module], ops: Sequence[torch.nn.Module]) -> None:
        self.pre = ""
        for module in pre:
            answer = _chain.describe(module, conv.in_channels)
            assert isinstance(answer, Described), answer
            if answer.text:
                self.pre += f"pre:{answer.text} "
        self.ops: List[Described] = []
        for module in ops:
            answer = _chain.describe(module, conv.out_channels)
            assert isinstance(answer, Described), answer
            self.ops.append(answer)


class Assembled(NamedTuple):
    """A call of a chain, ready for ``_fused.call``, and how far it reaches."""

    arguments: Tuple[_core.Geometry, Tensor, Tensor, Optional[Tensor], List[Tensor], str]
    fused: int  # operations in the plan
    used: int  # extra arguments in the plan


def assemble(conv: Any, recipe: Recipe, ops: Sequence[Any], input: Tensor, extra: Sequence[Tensor]) -> Assembled:
    """The longest part of a chain that one plan can do now.

    What may not fit at a call although the grammar allows it: BatchNorm in training mode (PyTorch's batch_norm then
    runs, and everything after it), and a residual of another dtype or shape.
    """
    rank = len(conv.kernel_size)
    device_type = input.device.type
    work = F.autocast_dtype(device_type)
    if work is not None:
        input = F._cast(input, work)  # type: ignore[assignment]
    text = recipe.pre
    operands: List[Tensor] = []
    used = 0
    widened = False
    fused = 0
    for module, word in zip(ops, recipe.ops):
        if word.statistics and module.training:
            break
        if word.residual:
            own: Tuple[Tensor, ...] = (extra[used],)
            if own[0].dtype != input.dtype or own[0].dim() != input.dim():
                break
        else:
            own = word.operands(module, conv.out_channels)
        if len(operands) + len(own) > MAX_OPERANDS:
            break
        used += word.residual
        operands.extend(own)
        text += word.text + " "
        widened = widened or (word.widens and work is not None and device_type == "cuda")
        fused += 1
    if widened and input.dtype in (torch.float16, torch.bfloat16):
        text += "out:f32"
    weight, bias = conv.weight, conv.bias
    if work is not None:
        weight, bias = F._cast(weight, work), F._cast(bias, work)
    geom = (_core.geometry if F._is_compiling() else _core.known_geometry)(
        rank,
        conv.stride,
        conv.padding,
        conv.output_padding,
        conv.groups,
        conv.dilation,
        getattr(conv, "precision", None),
    )
    return Assembled((geom, input, weight, bias, operands, text), fused, used)


def run_chain(conv: Any, recipe: Recipe, ops: Sequence[Any], input: Tensor, extra: Sequence[Tensor]) -> Tensor:
    """``ops(conv(pre(input)))``; what does not fit into the plan runs as its own module afterwards."""
    arguments, fused, used = assemble(conv, recipe, ops, input, extra)
    output = _fused.call(*arguments)
    for module, word in zip(ops[fused:], recipe.ops[fused:]):
        # In an optimized model the module itself passes through, because this layer does its work.
        alone = getattr(module, "apply_alone", module)
        output = alone(output, extra[used]) if word.residual else alone(output)
        used += word.residual
    return output


def check_chain(conv: Any, pre: Sequence[torch.nn.Module], ops: Sequence[torch.nn.Module]) -> None:
    """Raises TypeError or ValueError where the modules do not follow the grammar."""
    if not isinstance(conv, _ConvTransposeNd):
        raise TypeError(f"Fused: layer must be a ConvTranspose1d, 2d or 3d, got {type(conv).__name__}")
    if conv._forward_hooks or conv._backward_hooks or getattr(conv, "_backward_pre_hooks", None):
        raise ValueError("Fused: layer has forward or backward hooks, which would not see its own output any more")
    allowed = ", ".join(sorted(t.__name__ for t in _chain.RULES))
    norms = []
    for place, modules, channels in (("pre", pre, conv.in_channels), ("ops", ops, conv.out_channels)):
        for module in modules:
            if not isinstance(module, torch.nn.Module) or type(module) not in _chain.RULES:
                raise TypeError(f"Fused: {place} contains {type(module).__name__}; allowed: {allowed}")
            answer = _chain.describe(module, channels)
            if isinstance(answer, str):
                raise ValueError(f"Fused: {place} contains {answer}")
            if answer.norm:
                norms.append(type(module).__name__)
            if place == "pre" and (answer.norm or answer.residual or answer.operands is not _chain._no_operands):
                raise ValueError(
                    f"Fused: pre must consist of pointwise operations without operands, got {type(module).__name__}"
                )
    if len(norms) > 1:
        raise ValueError(f"Fused: a chain may contain one normalisation, got {', '.join(norms)}")


class Fused(torch.nn.Module):
    r"""A transposed convolution with what surrounds it, computed together.

    .. math::
        y = \text{ops}(\text{conv}(\text{pre}(x)))

    Pointwise operations are applied to each value before it is stored; a normalisation gets its statistics from the
    same pass. Gradients of any order are those of the modules one after the other.

    Args:
        layer: a ``ConvTranspose1d``, ``2d`` or ``3d`` of :mod:`torch.nn` or :mod:`tconv.nn`; its parameters are used.
        ops: what follows, in order: pointwise modules, at most one normalisation, pointwise modules. From
            :mod:`torch.nn`: ReLU, LeakyReLU, ELU, GELU, SiLU, Mish, Sigmoid, Tanh, Softplus, Hardswish, Hardsigmoid,
            Hardtanh, ReLU6, PReLU, GroupNorm, InstanceNorm, BatchNorm. From :mod:`tconv.nn`: Scale, AddConstant,
            Clamp, ScaleChannel, AddChannel, ChannelLayerNorm, and Add and Multiply, which take an extra argument of the
            call.
        pre: pointwise modules without parameters that are applied to the input first.

    Numbers such as ``eps`` or ``negative_slope`` are read when the block is built; parameters at every call.

    BatchNorm is fused in eval mode. In training mode its statistics are the batch's: then PyTorch's own ``batch_norm``
    runs on the fused result of what precedes it, and the rest of the chain after it.

    Shape:
        - input: as for ``layer``; extra arguments: the size of the output, one for each ``Add`` and ``Multiply``
        - output: as for ``layer``

    Raises:
        TypeError: ``layer`` is no transposed convolution, or an operation is of a type that cannot be fused.
        ValueError: the modules do not follow the grammar above.

    Example::

        >>> import torch, tconv
        >>> layer = tconv.nn.ConvTranspose2d(8, 16, 3, stride=2)
        >>> block = tconv.nn.Fused(layer, [torch.nn.GELU(), torch.nn.GroupNorm(4, 16)])
        >>> block(torch.randn(1, 8, 10, 10)).shape
        torch.Size([1, 16, 21, 21])
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        ops: Sequence[torch.nn.Module] = (),
        pre: Sequence[torch.nn.Module] = (),
    ) -> None:
        super().__init__()
        ops, pre = list(ops), list(pre)
        check_chain(layer, pre, ops)
        self.pre = torch.nn.ModuleList(pre)
        self.layer = layer
        self.ops = torch.nn.ModuleList(ops)
        self._recipe = Recipe(layer, pre, ops)

    def forward(self, input: Tensor, *extra: Tensor) -> Tensor:
        """The chain applied to ``input``; ``extra`` are the operands of its Add and Multiply, in order."""
        recipe = self._recipe
        wanted = sum(word.residual for word in recipe.ops)
        if len(extra) != wanted:
            raise TypeError(f"Fused: the chain takes {wanted} extra argument(s), got {len(extra)}")
        layer = self.layer
        # weight_norm and spectral_norm of torch.nn.utils compute the weight in a hook before the forward.
        for hook in layer._forward_pre_hooks.values():
            answer = hook(layer, (input,))
            if answer is not None:
                input = answer[0] if isinstance(answer, tuple) else answer
        return run_chain(layer, recipe, list(self.ops), input, extra)

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state.pop("_recipe", None)
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._recipe = Recipe(self.layer, list(self.pre), list(self.ops))
