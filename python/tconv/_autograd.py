"""Gradients of any order: three operations that are linear in both arguments and each other's derivatives.

``y = T(x, w)`` (transposed convolution), ``C(g, w)`` (its gradient by x, a strided convolution), ``W(x, g)`` (its
gradient by w). Each class calls the core directly; PyTorch's dispatcher is not involved, which keeps eager calls cheap.
"""

from __future__ import annotations

from typing import Any, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch.autograd import Function

from . import _batching, _core
from ._core import Entry, Geometry

_functorch_active = torch._C._are_functorch_transforms_active
_forward_ad = torch.autograd.forward_ad


def _differentiable() -> bool:
    """Whether what is computed now must itself be differentiable: create_graph, or a functorch transform."""
    return torch.is_grad_enabled() or _functorch_active()


def bias_gradient(grad_output: Tensor, rank: int) -> Tensor:
    dims = [d for d in range(grad_output.dim()) if d != grad_output.dim() - rank - 1]
    return grad_output.sum(dims)


def grad_input(
    geom: Geometry, grad_output: Tensor, w: Tensor, input_size: Sequence[int], x: Optional[Tensor] = None
) -> Tensor:
    """``x``: that of the ``grad_weight`` that follows, if it does."""
    if _differentiable():
        return ConvTransposeGradInput.apply(grad_output, w, geom, tuple(input_size))
    return _core.grad_input(geom, grad_output, w, input_size, x)


def grad_weight(geom: Geometry, x: Tensor, grad_output: Tensor, kernel: Sequence[int]) -> Tensor:
    if _differentiable():
        return ConvTransposeGradWeight.apply(x, grad_output, geom, tuple(kernel))
    return _core.grad_weight(geom, x, grad_output, kernel)[0]


def conv_transpose(geom: Geometry, x: Tensor, w: Tensor, bias: Optional[Tensor]) -> Tensor:
    if _differentiable():
        return ConvTranspose.apply(x, w, bias, geom)
    return _core.forward(geom, x, w, bias)


def _sum(*terms: Optional[Tensor]) -> Optional[Tensor]:
    result = None
    for term in terms:
        if term is not None:
            result = term if result is None else result + term
    return result


class ConvTranspose(Function):
    """T(x, w) + bias. The last argument is the plan's Entry on the eager path, else only the Geometry."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, bias: Optional[Tensor], how: Union[Entry, Geometry]) -> Tensor:
        if type(how) is Entry:
            return _core.run_forward(how, x, w, bias)
        return _core.forward(how, x, w, bias)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Tensor) -> None:
        x, w, _, how = inputs
        ctx.geom = how.geom if type(how) is Entry else how
        ctx.x_size = tuple(x.shape[-ctx.geom.rank :])
        ctx.kernel = tuple(w.shape[2:])
        # Each gradient needs the other operand only, so a frozen decoder keeps no activations.
        needs_x, needs_w = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_w else None, w if needs_x else None)
        ctx.save_for_forward(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, w = ctx.saved_tensors
        geom: Geometry = ctx.geom
        need_x, need_w, need_bias = ctx.needs_input_grad[:3]
        grad_x = grad_w = grad_bias = None
        if need_x:
            grad_x = grad_input(geom, grad, w, ctx.x_size, x)  # not saved without need_w
        if need_w and need_bias and not _differentiable():
            grad_w, grad_bias = _core.grad_weight(geom, x, grad, ctx.kernel, with_bias=True)
            return grad_x, grad_w, grad_bias, None
        if need_w:
            grad_w = grad_weight(geom, x, grad, ctx.kernel)
        if need_bias:
            grad_bias = bias_gradient(grad, geom.rank)
        return grad_x, grad_w, grad_bias, None

    @staticmethod
    def jvp(ctx: Any, x_t: Any, w_t: Any, bias_t: Any, _: Any) -> Optional[Tensor]:
        x, w = ctx.saved_tensors
        geom: Geometry = ctx.geom
        result = _sum(
            None if x_t is None else conv_transpose(geom, x_t, w, None),
            None if w_t is None else conv_transpose(geom, x, w_t, None),
        )
        if bias_t is not None:
            term = bias_t.reshape((-1,) + (1,) * geom.rank)
            if result is None:
                size = geom.output_size(ctx.x_size, w.shape[2:])
                return term.expand(*x.shape[: -geom.rank - 1], bias_t.shape[0], *size).contiguous()
            result = result + term
        return result

    @staticmethod
    def vmap(info: Any, in_dims: Tuple[Any, ...], x: Tensor, w: Tensor, bias: Optional[Tensor], how: Any) -> Any:
        geom = how.geom if type(how) is Entry else how
        return _batching.conv_transpose(
            lambda g, x_, w_, b_: ConvTranspose.apply(x_, w_, b_, g), info.batch_size, in_dims, x, w, bias, geom
        )


class EagerConvTranspose(ConvTranspose):
    """The same outside of functorch's transforms. A ``forward`` that takes the context saves 7 us a call: for a
    separate ``setup_context`` PyTorch binds the arguments with ``inspect.signature`` every time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Optional[Tensor], how: Entry) -> Tensor:  # type: ignore[override]
        ctx.entry = how
        needs_x, needs_w = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_w else None, w if needs_x else None)
        if _forward_ad._current_level >= 0:
            ctx.save_for_forward(x, w)
        return _core.run_forward(how, x, w, bias)

    setup_context = Function.setup_context

    @staticmethod
    def _describe(ctx: Any) -> None:
        entry: Entry = ctx.entry
        ctx.geom, ctx.kernel = entry.geom, entry.w_shape[2:]
        ctx.x_size = entry.x_shape[-entry.geom.rank :]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        EagerConvTranspose._describe(ctx)
        return ConvTranspose.backward(ctx, grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Optional[Tensor]:
        EagerConvTranspose._describe(ctx)
        return ConvTranspose.jvp(ctx, *tangents)


class ConvTransposeGradInput(Function):
    """C(g, w): the gradient of T by its input."""

    @staticmethod
    def forward(grad_output: Tensor, w: Tensor, geom: Geometry, input_size: Tuple[int, ...]) -> Tensor:
        return _core.grad_input(geom, grad_output, w, input_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Tensor) -> None:
        grad_output, w, ctx.geom, ctx.input_size = inputs
        needs_g, needs_w = ctx.needs_input_grad[:2]
        ctx.kernel = tuple(w.shape[2:])
        ctx.save_for_backward(grad_output if needs_w else None, w if needs_g else None)
        ctx.save_for_forward(grad_output, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        g, w = ctx.saved_tensors
        need_g, need_w = ctx.needs_input_grad[:2]
        grad_g = conv_transpose(ctx.geom, grad, w, None) if need_g else None
        grad_w = grad_weight(ctx.geom, grad, g, ctx.kernel) if need_w else None
        return grad_g, grad_w, None, None

    @staticmethod
    def jvp(ctx: Any, g_t: Any, w_t: Any, *_: Any) -> Optional[Tensor]:
        g, w = ctx.saved_tensors
        return _sum(
            None if g_t is None else grad_input(ctx.geom, g_t, w, ctx.input_size),
            None if w_t is None else grad_input(ctx.geom, g, w_t, ctx.input_size),
        )

    @staticmethod
    def vmap(info: Any, in_dims: Tuple[Any, ...], g: Tensor, w: Tensor, geom: Geometry, size: Tuple[int, ...]) -> Any:
        return _batching.grad_input(
            lambda geom_, g_, w_: ConvTransposeGradInput.apply(g_, w_, geom_, size),
            info.batch_size,
            in_dims,
            g,
            w,
            geom,
        )


class ConvTransposeGradWeight(Function):
    """W(x, g): the gradient of T by its weight."""

    @staticmethod
    def forward(x: Tensor, grad_output: Tensor, geom: Geometry, kernel: Tuple[int, ...]) -> Tensor:
        return _core.grad_weight(geom, x, grad_output, kernel)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Tensor) -> None:
        x, grad_output, ctx.geom, ctx.kernel = inputs
        ctx.x_size = tuple(x.shape[-ctx.geom.rank :])
        needs_x, needs_g = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_g else None, grad_output if needs_x else None)
        ctx.save_for_forward(x, grad_output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, g = ctx.saved_tensors
        need_x, need_g = ctx.needs_input_grad[:2]
        grad_x = grad_input(ctx.geom, g, grad, ctx.x_size) if need_x else None
        grad_g = conv_transpose(ctx.geom, x, grad, None) if need_g else None
        return grad_x, grad_g, None, None

    @staticmethod
    def jvp(ctx: Any, x_t: Any, g_t: Any, *_: Any) -> Optional[Tensor]:
        x, g = ctx.saved_tensors
        return _sum(
            None if x_t is None else grad_weight(ctx.geom, x_t, g, ctx.kernel),
            None if g_t is None else grad_weight(ctx.geom, x, g_t, ctx.kernel),
        )

    @staticmethod
    def vmap(info: Any, in_dims: Tuple[Any, ...], x: Tensor, g: Tensor, geom: Geometry, kernel: Tuple[int, ...]) -> Any:
        return _batching.grad_weight(
            lambda geom_, x_, g_: ConvTransposeGradWeight.apply(x_, g_, geom_, kernel),
            info.batch_size,
            in_dims,
            x,
            g,
            geom,
        )
