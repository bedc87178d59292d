"""The operators as PyTorch's dispatcher knows them: ``torch.ops.tconv.*``.

Used wherever PyTorch has to see an operator rather than a Python call: torch.compile, torch.export, fake tensors,
modes. Eager calls do not come here (``functional`` and ``_autograd`` reach the core directly). Needs PyTorch 2.4.

``int groups`` stands before the lists, because DTensor's sharding cache looks at arguments only from the first plain
int on. ``precision`` -1 follows PyTorch's flags when the operator runs, so a compiled graph needs no recompilation when
they change.
"""

from __future__ import annotations

from typing import Any, List, NoReturn, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import _batching, _core
from ._core import Geometry

available = hasattr(torch.library, "register_vmap") or hasattr(torch.library, "register_autograd")

_GEOMETRY = "int groups, int[] stride, int[] padding, int[] output_padding, int[] dilation, int precision"


def _geometry(rank: int, rest: Sequence[Any]) -> Geometry:
    groups, stride, padding, output_padding, dilation, precision = rest
    return Geometry(rank, tuple(stride), tuple(padding), tuple(output_padding), groups, tuple(dilation), precision)


def _arguments(geom: Geometry) -> Tuple[Any, ...]:
    return (
        geom.groups,
        list(geom.stride),
        list(geom.padding),
        list(geom.output_padding),
        list(geom.dilation),
        geom.precision,
    )


def _unavailable() -> NoReturn:
    raise RuntimeError(
        f"tconv under torch.compile, torch.export, fake tensors and tensor subclasses needs PyTorch 2.4 or newer; this "
        f"is {torch.__version__}. Eager calls work."
    )


def conv_transpose(x: Tensor, w: Tensor, bias: Optional[Tensor], geom: Geometry) -> Tensor:
    if not available:
        _unavailable()
    return torch.ops.tconv.conv_transpose(x, w, bias, *_arguments(geom))


def grad_input(g: Tensor, w: Tensor, input_size: Sequence[Any], geom: Geometry) -> Tensor:
    return torch.ops.tconv.conv_transpose_grad_input(g, w, list(input_size), *_arguments(geom))


def grad_weight(x: Tensor, g: Tensor, kernel: Sequence[Any], geom: Geometry) -> Tensor:
    return torch.ops.tconv.conv_transpose_grad_weight(x, g, list(kernel), *_arguments(geom))


# --- Implementations --------------------------------------------------------------------------------------------------


def _conv_transpose(x: Tensor, w: Tensor, bias: Optional[Tensor], *rest: Any) -> Tensor:
    return _core.forward(_geometry(w.dim() - 2, rest), x, w, bias)


def _grad_input(g: Tensor, w: Tensor, input_size: Sequence[int], *rest: Any) -> Tensor:
    return _core.grad_input(_geometry(w.dim() - 2, rest), g, w, input_size)


def _grad_weight(x: Tensor, g: Tensor, kernel: Sequence[int], *rest: Any) -> Tensor:
    return _core.grad_weight(_geometry(len(kernel), rest), x, g, kernel)[0]


# --- Fake kernels -----------------------------------------------------------------------------------------------------


def _empty_like(shape: Sequence[Any], rank: int, *tensors: Tensor) -> Tensor:
    """Same strides as the real kernels give: channels-last as soon as one operand is."""
    layout = _core.CONTIGUOUS
    if len(shape) == rank + 2 and rank > 1:
        layout = _core.suggest_layout(*tensors)
    return _core.empty(shape, layout, tensors[0])


def _conv_transpose_fake(x: Tensor, w: Tensor, bias: Optional[Tensor], *rest: Any) -> Tensor:
    rank = w.dim() - 2
    geom = _geometry(rank, rest)
    _core.check_shapes(geom, x, w, bias)
    size = geom.output_size(x.shape[-rank:], w.shape[2:])
    return _empty_like((*x.shape[: -rank - 1], w.shape[1] * geom.groups, *size), rank, x, w)


def _grad_input_fake(g: Tensor, w: Tensor, input_size: Sequence[Any], *rest: Any) -> Tensor:
    rank = w.dim() - 2
    return _empty_like((*g.shape[: -rank - 1], w.shape[0], *input_size), rank, g, w)


def _grad_weight_fake(x: Tensor, g: Tensor, kernel: Sequence[Any], *rest: Any) -> Tensor:
    rank = len(kernel)
    groups = rest[0]
    return x.new_empty((x.shape[-rank - 1], g.shape[-rank - 1] // groups, *kernel))


# --- Gradients --------------------------------------------------------------------------------------------------------


def _bias_gradient(g: Tensor, rank: int) -> Tensor:
    return g.sum([d for d in range(g.dim()) if d != g.dim() - rank - 1])


def _conv_transpose_context(ctx: Any, inputs: Tuple[Any, ...], output: Tensor) -> None:
    x, w = inputs[:2]
    rank = w.dim() - 2
    ctx.geom = _geometry(rank, inputs[3:])
    needs_x, needs_w = ctx.needs_input_grad[:2]
    ctx.x_size, ctx.kernel = x.shape[-rank:], w.shape[2:]
    ctx.save_for_backward(x if needs_w else None, w if needs_x else None)


def _conv_transpose_backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    x, w = ctx.saved_tensors
    need_x, need_w, need_bias = ctx.needs_input_grad[:3]
    return (
        grad_input(grad, w, ctx.x_size, ctx.geom) if need_x else None,
        grad_weight(x, grad, ctx.kernel, ctx.geom) if need_w else None,
        _bias_gradient(grad, ctx.geom.rank) if need_bias else None,
        *(None,) * 6,
    )


def _grad_input_context(ctx: Any, inputs: Tuple[Any, ...], output: Tensor) -> None:
    g, w = inputs[:2]
    ctx.geom = _geometry(w.dim() - 2, inputs[3:])
    ctx.kernel = w.shape[2:]
    needs_g, needs_w = ctx.needs_input_grad[:2]
    ctx.save_for_backward(g if needs_w else None, w if needs_g else None)


def _grad_input_backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    g, w = ctx.saved_tensors
    need_g, need_w = ctx.needs_input_grad[:2]
    return (
        conv_transpose(grad, w, None, ctx.geom) if need_g else None,
        grad_weight(grad, g, ctx.kernel, ctx.geom) if need_w else None,
        *(None,) * 7,
    )


def _grad_weight_context(ctx: Any, inputs: Tuple[Any, ...], output: Tensor) -> None:
    x, g = inputs[:2]
    rank = len(inputs[2])
    ctx.geom = _geometry(rank, inputs[3:])
    ctx.x_size = x.shape[-rank:]
    needs_x, needs_g = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_g else None, g if needs_x else None)


def _grad_weight_backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    x, g = ctx.saved_tensors
    need_x, need_g = ctx.needs_input_grad[:2]
    return (
        grad_input(g, grad, ctx.x_size, ctx.geom) if need_x else None,
        conv_transpose(x, grad, None, ctx.geom) if need_g else None,
        *(None,) * 7,
    )


# --- vmap -------------------------------------------------------------------------------------------------------------


def _conv_transpose_vmap(info: Any, in_dims: Tuple[Any, ...], *args: Any) -> Any:
    x, w, bias = args[:3]
    rank = w.dim() - 2 - (in_dims[1] is not None)
    return _batching.conv_transpose(
        lambda geom, x_, w_, b_: conv_transpose(x_, w_, b_, geom),
        info.batch_size,
        in_dims,
        x,
        w,
        bias,
        _geometry(rank, args[3:]),
    )


def _grad_input_vmap(info: Any, in_dims: Tuple[Any, ...], *args: Any) -> Any:
    g, w, input_size = args[:3]
    rank = w.dim() - 2 - (in_dims[1] is not None)
    return _batching.grad_input(
        lambda geom, g_, w_: grad_input(g_, w_, input_size, geom),
        info.batch_size,
        in_dims,
        g,
        w,
        _geometry(rank, args[3:]),
    )


def _grad_weight_vmap(info: Any, in_dims: Tuple[Any, ...], *args: Any) -> Any:
    x, g, kernel = args[:3]
    return _batching.grad_weight(
        lambda geom, x_, g_: grad_weight(x_, g_, kernel, geom),
        info.batch_size,
        in_dims,
        x,
        g,
        _geometry(len(kernel), args[3:]),
    )


# --- Floating-point operations, as torch.utils.flop_counter counts a convolution: every tap of every input ------------


def _flops(x_shape: Sequence[int], w_shape: Sequence[int]) -> int:
    total = 2
    rank = len(w_shape) - 2
    for n in (x_shape[0] if len(x_shape) == rank + 2 else 1, *x_shape[-rank:], *w_shape):
        total *= n
    return total


def _conv_transpose_flops(x: Any, w: Any, *_: Any, **__: Any) -> int:
    return _flops(x, w)


def _grad_input_flops(g: Any, w: Any, input_size: Any, *_: Any, **__: Any) -> int:
    return _flops((*g[: len(g) - len(w) + 2 - 1], 0, *input_size), w)


def _grad_weight_flops(x: Any, g: Any, kernel: Any, groups: int, *_: Any, **__: Any) -> int:
    rank = len(kernel)
    return _flops(x, (x[-rank - 1], g[-rank - 1] // groups, *kernel))


# --- Registration -----------------------------------------------------------------------------------------------------

_library: Optional[torch.library.Library] = None


def _define(
    name: str, arguments: str, implementation: Any, fake: Any, backward: Any = None, context: Any = None
) -> None:
    assert _library is not None
    _library.define(f"{name}({arguments}", tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"tconv::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"tconv::{name}", backward, setup_context=context, lib=_library)


def _register() -> None:
    global _library
    _library = torch.library.Library("tconv", "DEF")
    rows: List[Tuple[Any, ...]] = [
        (
            "conv_transpose",
            f"Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
            _conv_transpose,
            _conv_transpose_fake,
            _conv_transpose_backward,
            _conv_transpose_context,
            _conv_transpose_vmap,
            _conv_transpose_flops,
        ),
        (
            "conv_transpose_grad_input",
            f"Tensor grad_output, Tensor weight, SymInt[] input_size, {_GEOMETRY}) -> Tensor",
            _grad_input,
            _grad_input_fake,
            _grad_input_backward,
            _grad_input_context,
            _grad_input_vmap,
            _grad_input_flops,
        ),
        (
            "conv_transpose_grad_weight",
            f"Tensor input, Tensor grad_output, SymInt[] kernel_size, {_GEOMETRY}) -> Tensor",
            _grad_weight,
            _grad_weight_fake,
            _grad_weight_backward,
            _grad_weight_context,
            _grad_weight_vmap,
            _grad_weight_flops,
        ),
    ]
    for name, arguments, implementation, fake, backward, context, vmap, flops in rows:
        _define(name, arguments, implementation, fake, backward, context)
        if hasattr(torch.library, "register_vmap"):
            torch.library.register_vmap(f"tconv::{name}", vmap, lib=_library)
        _register_flops(name, flops)


def _register_flops(name: str, formula: Any) -> None:
    try:
        from torch.utils.flop_counter import register_flop_formula
    except ImportError:
        return

    def without_output(*args: Any, out_shape: Any = None, **keywords: Any) -> int:
        return formula(*args, **keywords)

    register_flop_formula(getattr(torch.ops.tconv, name))(without_output)


if available:
    _register()
