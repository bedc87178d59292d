"""Convolution and chain in one plan: inference, training, and the gradient of the chain."""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import _C, _autograd, _chain, _core, _ops, functional
from ._core import Entry, Geometry

_entries: dict = {}
_STATISTICS = {torch.float64: torch.float64}
MAX_OPERANDS = 16  # kMaxOperands of tconv.h


class FusedEntry(Entry):
    """A plan for convolution and chain, with what its training form keeps."""

    __slots__ = ("has_ops", "operand_dtype", "output_dtype", "save", "statistics")
    has_ops: bool
    operand_dtype: Optional[torch.dtype]
    output_dtype: torch.dtype
    save: bool
    statistics: int


def _signature(operands: Sequence[Tensor]) -> tuple:
    return tuple((t.shape, t.dtype, t.device) for t in operands)


def _operand_dtype(chain: str, operands: Sequence[Tensor], work: torch.dtype) -> Optional[torch.dtype]:
    """The one dtype of all channel operands; None when it is the problem's."""
    dtypes = {t.dtype for word, t in _pairs(chain, operands) if word.name not in ("add_tensor", "scale_tensor")}
    if not dtypes or dtypes == {work}:
        return None
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _pairs(chain: str, operands: Sequence[Tensor]) -> List[Tuple[_chain.Word, Tensor]]:
    pairs = []
    at = 0
    for word in _chain.parse(chain)[1]:
        count = _chain.num_operands(word)
        pairs += [(word, t) for t in operands[at : at + count]]
        at += count
    return pairs


def _check_operands(name: str, chain: str, operands: Sequence[Tensor], like: Tensor, shape: Sequence[Any]) -> None:
    rank = int(name[-2])
    channels = shape[-rank - 1]
    pairs = _pairs(chain, operands)
    expected = sum(_chain.num_operands(word) for word in _chain.parse(chain)[1])
    if len(operands) != expected:
        raise RuntimeError(f"{name}(): chain `{chain}` takes {expected} operands, got {len(operands)}")
    for word, t in pairs:
        if t.device != like.device:
            raise RuntimeError(
                f"{name}(): expected all tensors to be on the same device, but input is on {like.device} and an "
                f"operand of {word.name} is on {t.device}"
            )
        if t.dtype not in _core.DTYPE_CODES:
            raise NotImplementedError(f"{name}(): operand of {word.name} has dtype {t.dtype}, which is not supported")
        if word.name in ("add_tensor", "scale_tensor"):
            if tuple(t.shape) != tuple(shape):
                raise RuntimeError(
                    f"{name}(): operand of {word.name} must have the result's size {list(shape)}, got {list(t.shape)}"
                )
            if t.dtype != like.dtype:
                raise RuntimeError(
                    f"{name}(): operand of {word.name} must have the input's dtype {like.dtype}, got {t.dtype}"
                )
        elif tuple(t.shape) != (channels,):
            raise RuntimeError(
                f"{name}(): operand of {word.name} must have {channels} elements, one per channel, got size "
                f"{list(t.shape)}"
            )


def entry_for(
    geom: Geometry, x: Tensor, w: Tensor, bias: Optional[Tensor], operands: Sequence[Tensor], chain: str, save: bool
) -> FusedEntry:
    key = (
        geom,
        chain,
        save,
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        w.shape,
        w.stride(),
        w.dtype,
        w.device,
        None if bias is None else (bias.shape, bias.dtype, bias.device),
        _signature(operands),
        _core.tf32_allowed() if x.is_cuda else None,
    )
    entry = _entries.get(key)
    if entry is None:
        entry = _core._remember(_entries, key, _make_entry(geom, x, w, bias, operands, chain, save))
    return entry


def _make_entry(
    geom: Geometry, x: Tensor, w: Tensor, bias: Optional[Tensor], operands: Sequence[Tensor], chain: str, save: bool
) -> FusedEntry:
    rank = geom.rank
    name = f"conv_transpose{rank}d"
    _core.check_tensors(name, input=x, weight=w, bias=bias)
    _core.check_shapes(geom, x, w, bias)
    x_shape, w_shape = tuple(x.shape), tuple(w.shape)
    spatial, kernel = x_shape[-rank:], w_shape[2:]
    _core.check_sizes(geom, x_shape, kernel)
    out_channels = w_shape[1] * geom.groups
    shape = (*x_shape[: -rank - 1], out_channels, *geom.output_size(spatial, kernel))
    _check_operands(name, chain, operands, x, shape)
    layout = _core.suggest_layout(x, w) if len(x_shape) == rank + 2 else _core.CONTIGUOUS
    operand_dtype = _operand_dtype(chain, operands, x.dtype)
    output_dtype = _chain.output_dtype(chain)
    arguments = _core.plan_arguments(
        _core.FORWARD,
        geom,
        _core._batch_of(x_shape, rank),
        w_shape[0],
        out_channels,
        spatial,
        kernel,
        x,
        layout,
        ("bias " if bias is not None else "") + chain,
        save,
        operand_dtype,
        output_dtype,
    )
    plan = _core.make_plan(arguments)
    entry = FusedEntry(plan, geom, shape, layout, x_shape, w_shape)
    entry.has_ops = bool(_chain.parse(chain)[1])
    entry.operand_dtype = operand_dtype
    entry.output_dtype = output_dtype or x.dtype
    entry.statistics = 0 if plan is None else plan.num_statistics
    entry.save = save and entry.has_ops
    return entry


def _prepare_operands(entry: FusedEntry, chain: str, operands: Sequence[Tensor]) -> List[Tensor]:
    prepared = []
    for word, t in _pairs(chain, operands):
        if word.name in ("add_tensor", "scale_tensor"):
            prepared.append(_core.dense(t, entry.layout))
        else:
            if entry.operand_dtype is not None:
                t = t.to(entry.operand_dtype)
            prepared.append(_core.dense(t, _core.CONTIGUOUS))
    return prepared


def run(
    entry: FusedEntry, x: Tensor, w: Tensor, bias: Optional[Tensor], operands: Sequence[Tensor], chain: str
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, raw, mean, rstd) of a plan that keeps them; the last three have no elements where there is nothing."""
    if entry.save:
        raw = _core.empty(entry.shape, entry.layout, x)
    else:
        raw = x.new_empty(0)
    count = entry.statistics if entry.save else 0
    dtype = _STATISTICS.get(x.dtype, torch.float32)
    mean = torch.empty(count, dtype=dtype, device=x.device)
    rstd = torch.empty(count, dtype=dtype, device=x.device)
    kept = (
        raw.data_ptr() if entry.save else None,
        mean.data_ptr() if count else None,
        rstd.data_ptr() if count else None,
    )
    return run_inference(entry, x, w, bias, operands, chain, kept), raw, mean, rstd


def run_inference(
    entry: FusedEntry,
    x: Tensor,
    w: Tensor,
    bias: Optional[Tensor],
    operands: Sequence[Tensor],
    chain: str,
    kept: Tuple[Optional[int], Optional[int], Optional[int]] = (None, None, None),
) -> Tensor:
    """The result alone; `kept` are the addresses of raw, mean and rstd."""
    layout = entry.layout
    x = _core.dense(x, layout)
    w, weight_last = _core.dense_weight(w)
    if bias is not None:
        bias = _core.dense(bias, _core.CONTIGUOUS)
    prepared = _prepare_operands(entry, chain, operands) if operands else ()
    y = _core.empty(entry.shape, layout, x, entry.output_dtype)
    if entry.plan is None:
        return y
    workspace = entry.workspace_for(x)
    _C.run(
        entry.plan,
        _core._stream(x),
        0 if x.is_cuda else torch.get_num_threads(),
        x.data_ptr(),
        w.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None,
        y.data_ptr(),
        None,
        *kept,
        None if workspace is None else workspace.data_ptr(),
        tuple([t.data_ptr() for t in prepared]) if prepared else None,
        None,
        weight_last,
    )
    return y


_pointwise_entries: dict = {}


def _pointwise_plan(
    direction: int,
    x: Tensor,
    rank: int,
    layout: int,
    chain: str,
    operand_dtype: Any,
    output_dtype: Any,
    following: Optional[Callable[[], List[Any]]] = None,
) -> Any:
    """The chain alone, on a tensor of the result's shape: as far as sizes go, a convolution of one tap, stride 1.

    ``following`` gives the arguments of the plans that are needed next.
    """
    ones, zeros = (1,) * rank, (0,) * rank
    geom = Geometry(rank, ones, zeros, zeros, 1, ones, _core.FP32)
    key = (direction, x.shape, x.dtype, x.device, layout, chain, operand_dtype, output_dtype)
    plan = _pointwise_entries.get(key)
    if plan is None:
        channels = x.shape[-rank - 1]
        arguments = _core.plan_arguments(
            direction,
            geom,
            _core._batch_of(tuple(x.shape), rank),
            channels,
            channels,
            tuple(x.shape[-rank:]),
            ones,
            x,
            layout,
            chain,
            False,
            operand_dtype,
            output_dtype,
        )
        plan = _core.make_plan(arguments, following() if following is not None else ())
        _core._remember(_pointwise_entries, key, plan)
    return plan


def _strip(chain: str) -> str:
    """The operations after the convolution only."""
    return " ".join(t for t in chain.split() if not t.startswith("pre:") and not t.startswith("out:"))


def _pre_as_ops(chain: str) -> str:
    return " ".join(t[4:] for t in chain.split() if t.startswith("pre:"))


def _pre_only(chain: str) -> str:
    return " ".join(t for t in chain.split() if t.startswith("pre:"))


def chain_backward(
    raw: Tensor,
    grad_output: Tensor,
    mean: Tensor,
    rstd: Tensor,
    operands: Sequence[Tensor],
    chain: str,
    rank: int,
    wanted: Sequence[bool],
    following: Optional[Callable[[], List[Any]]] = None,
) -> List[Tensor]:
    """[gradient of raw, gradient of each operand]; operands that are not wanted give an empty tensor."""
    layout = _core.suggest_layout(raw) if raw.dim() == rank + 2 else _core.CONTIGUOUS
    raw = _core.dense(raw, layout)
    grad_output = _core.dense(grad_output, layout)
    operand_dtype = _operand_dtype(chain, operands, raw.dtype)
    output = _chain.output_dtype(chain)
    plan = _pointwise_plan(_core.GRAD_EPILOGUE, raw, rank, layout, _strip(chain), operand_dtype, output, following)
    pairs = _pairs(chain, operands)
    prepared, grads = [], []
    for (word, t), want in zip(pairs, wanted):
        tensor_operand = word.name in ("add_tensor", "scale_tensor")
        if not tensor_operand and operand_dtype is not None:
            t = t.to(operand_dtype)
        t = _core.dense(t, layout if tensor_operand else _core.CONTIGUOUS)
        prepared.append(t)
        if not want:
            grads.append(t.new_empty(0))
        else:
            grads.append(_core.empty(t.shape, layout if tensor_operand else _core.CONTIGUOUS, t))
    result = _core.empty(raw.shape, layout, raw)
    if plan is None:
        return [result.zero_(), *(g.zero_() for g in grads)]
    workspace = None
    if raw.is_cuda and plan.workspace_bytes:
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=raw.device)
    _C.run(
        plan,
        _core._stream(raw),
        0 if raw.is_cuda else torch.get_num_threads(),
        raw.data_ptr(),
        None,
        None,
        grad_output.data_ptr(),
        result.data_ptr(),
        None,
        None,
        mean.data_ptr() if mean.numel() else None,
        rstd.data_ptr() if rstd.numel() else None,
        None if workspace is None else workspace.data_ptr(),
        tuple(t.data_ptr() for t in prepared),
        tuple(g.data_ptr() if want else None for g, want in zip(grads, wanted)),
        False,
    )
    return [result, *(g.to(t.dtype) if want else g for g, t, want in zip(grads, operands, wanted))]


def _bias_as_operand(
    raw: Tensor, operands: Sequence[Tensor], chain: str, rank: int, wanted: Sequence[bool]
) -> Tuple[List[Tensor], str, List[bool]]:
    """Operands, chain and what is wanted of ``chain_backward`` with one more operand: a zero that is added to ``raw``.

    Its gradient is that of the bias, which ``raw`` contains: the pass that writes the gradient of ``raw`` adds it up
    too, and nothing reads it again for that.
    """
    zero = raw.new_zeros(raw.shape[-rank - 1], dtype=_operand_dtype(chain, operands, raw.dtype) or raw.dtype)
    return [zero, *operands], "add_channel " + chain, [True, *wanted]


def pre_backward(x: Tensor, grad: Tensor, chain: str, rank: int) -> Tensor:
    """Gradient of the operations before the convolution."""
    empty = x.new_empty(0)
    return chain_backward(x, grad, empty, empty, (), _pre_as_ops(chain), rank, ())[0]


# --- Autograd ---------------------------------------------------------------------------------------------------------


class FusedConvTranspose(Function):
    """Convolution and chain with the gradient of both. Eager tensors only; transforms go through ``composed``."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, w: Tensor, bias: Optional[Tensor], chain: str, geom: Geometry, *operands: Tensor
    ) -> Tensor:
        entry = entry_for(geom, x, w, bias, operands, chain, True)
        y, raw, mean, rstd = run(entry, x, w, bias, operands, chain)
        ctx.chain, ctx.geom, ctx.has_bias, ctx.has_ops = chain, geom, bias is not None, entry.has_ops
        ctx.save_for_backward(x, w, bias, raw, mean, rstd, *operands)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, w, bias, raw, mean, rstd, *operands = ctx.saved_tensors
        chain, geom = ctx.chain, ctx.geom
        need_x, need_w, need_bias = ctx.needs_input_grad[:3]
        wanted = list(ctx.needs_input_grad[5:])
        size, pre = x.shape[-geom.rank :], _pre_only(chain)
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, grad, x, w, bias, operands)
        grads: List[Optional[Tensor]] = [None] * len(operands)
        grad_x = grad_w = grad_bias = None
        if ctx.has_ops:
            joins = need_bias and len(operands) < MAX_OPERANDS
            given, words, asked = operands, chain, wanted
            if joins:
                given, words, asked = _bias_as_operand(raw, operands, chain, geom.rank, wanted)

            def following() -> List[Any]:  # raw lies in memory as the gradient that will replace it
                asked = []
                if need_x:
                    asked.append(_core.describe_grad_input(geom, raw, w, size).arguments)
                if need_w:
                    asked.append(_core.describe_grad_weight(geom, x, raw, w.shape[2:], pre).arguments)
                return asked

            grad, *rest = chain_backward(raw, grad, mean, rstd, given, words, geom.rank, asked, following)
            if joins:
                grad_bias, need_bias = rest.pop(0).to(raw.dtype), False
            grads = [g if want else None for g, want in zip(rest, wanted)]
        if need_x:
            grad_x = _core.grad_input(geom, grad, w, size, x if need_w else None, pre)
            if pre:
                grad_x = pre_backward(x, grad_x, chain, geom.rank)
        if need_w:
            grad_w, sum_of_grad = _core.grad_weight(geom, x, grad, w.shape[2:], need_bias, pre)
            grad_bias = sum_of_grad if need_bias else grad_bias
        elif need_bias:
            grad_bias = _autograd.bias_gradient(grad, geom.rank)
        return (grad_x, grad_w, grad_bias, None, None, *grads)


def _differentiable_backward(
    ctx: Any, grad: Tensor, x: Tensor, w: Tensor, bias: Optional[Tensor], operands: Sequence[Tensor]
) -> Any:
    """Under create_graph: the unfused chain again, in operations that are differentiable any number of times.

    Each operand is replaced by an alias, so that a gradient by the weight does not also flow through an input that was
    itself computed from that weight.
    """
    inputs = [x, w, bias, *operands]
    needed = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[5:]]
    aliases = [t.view_as(t) if t is not None and n else t for t, n in zip(inputs, needed)]
    result = composed(ctx.geom, aliases[0], aliases[1], aliases[2], aliases[3:], ctx.chain)
    targets = [t for t, n in zip(aliases, needed) if n]
    grads = iter(torch.autograd.grad(result, targets, grad, create_graph=True, allow_unused=True))
    answers = [next(grads) if n else None for n in needed]
    return (*answers[:3], None, None, *answers[3:])


def composed(
    geom: Geometry, x: Tensor, w: Tensor, bias: Optional[Tensor], operands: Sequence[Tensor], chain: str
) -> Tensor:
    """The same result from the differentiable convolution and PyTorch's pointwise operations and norms."""
    return _chain.compose(
        chain, lambda t: _autograd.ConvTranspose.apply(t, w, bias, geom), x, list(operands), geom.rank
    )


# --- Operators for torch.compile --------------------------------------------------------------------------------------


def _fused(x: Tensor, w: Tensor, bias: Optional[Tensor], operands: Sequence[Tensor], chain: str, *rest: Any) -> Tensor:
    geom = _ops._geometry(w.dim() - 2, rest)
    return run_inference(entry_for(geom, x, w, bias, operands, chain, False), x, w, bias, operands, chain)


def _fused_training(
    x: Tensor, w: Tensor, bias: Optional[Tensor], operands: Sequence[Tensor], chain: str, *rest: Any
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    geom = _ops._geometry(w.dim() - 2, rest)
    return run(entry_for(geom, x, w, bias, operands, chain, True), x, w, bias, operands, chain)


def _fused_fake(
    x: Tensor, w: Tensor, bias: Optional[Tensor], operands: Sequence[Tensor], chain: str, *rest: Any
) -> Tensor:
    y = _ops._conv_transpose_fake(x, w, bias, *rest)
    _check_operands(f"conv_transpose{w.dim() - 2}d", chain, operands, x, y.shape)
    return y.to(_chain.output_dtype(chain) or x.dtype)


def _fused_training_fake(
    x: Tensor, w: Tensor, bias: Optional[Tensor], operands: Sequence[Tensor], chain: str, *rest: Any
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    y = _fused_fake(x, w, bias, operands, chain, *rest)
    rank = w.dim() - 2
    ops = _chain.parse(chain)[1]
    raw = torch.empty_like(y, dtype=x.dtype) if ops else x.new_empty(0)
    batch = x.shape[0] if x.dim() == rank + 2 else 1
    count: Any = 0
    for word in ops:
        if word.name == "group_norm":
            count = batch * word.num_groups
        elif word.name == "layer_norm":
            count = batch
            for size in y.shape[-rank:]:
                count = count * size
    statistics = _STATISTICS.get(x.dtype, torch.float32)
    return y, raw, x.new_empty(count, dtype=statistics), x.new_empty(count, dtype=statistics)


def _chain_backward(
    raw: Tensor,
    grad_output: Tensor,
    mean: Tensor,
    rstd: Tensor,
    operands: Sequence[Tensor],
    chain: str,
    rank: int,
    wanted: Sequence[bool],
) -> List[Tensor]:
    return chain_backward(raw, grad_output, mean, rstd, operands, chain, rank, wanted)


def _chain_backward_fake(
    raw: Tensor,
    grad_output: Tensor,
    mean: Tensor,
    rstd: Tensor,
    operands: Sequence[Tensor],
    chain: str,
    rank: int,
    wanted: Sequence[bool],
) -> List[Tensor]:
    layout = _core.suggest_layout(raw) if raw.dim() == rank + 2 else _core.CONTIGUOUS
    grads = []
    for (word, t), want in zip(_pairs(chain, operands), wanted):
        tensor_operand = word.name in ("add_tensor", "scale_tensor")
        if want:
            grads.append(_core.empty(t.shape, layout if tensor_operand else _core.CONTIGUOUS, t))
        else:
            grads.append(t.new_empty(0))
    return [_core.empty(raw.shape, layout, raw), *grads]


def _apply_pre(x: Tensor, chain: str, rank: int) -> Tensor:
    """The operations before the convolution, applied on their own."""
    layout = _core.suggest_layout(x) if x.dim() == rank + 2 else _core.CONTIGUOUS
    x = _core.dense(x, layout)
    plan = _pointwise_plan(_core.EPILOGUE, x, rank, layout, _pre_as_ops(chain), None, None)
    y = _core.empty(x.shape, layout, x)
    if plan is None:
        return y
    workspace = None
    if x.is_cuda and plan.workspace_bytes:
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=x.device)
    threads = 0 if x.is_cuda else torch.get_num_threads()
    scratch = None if workspace is None else workspace.data_ptr()
    unused = (None,) * 3
    _C.run(
        plan, _core._stream(x), threads, x.data_ptr(), *unused, y.data_ptr(), None, *unused, scratch, None, None, False
    )
    return y


def _apply_pre_fake(x: Tensor, chain: str, rank: int) -> Tensor:
    layout = _core.suggest_layout(x) if x.dim() == rank + 2 else _core.CONTIGUOUS
    return _core.empty(x.shape, layout, x)


def _training_context(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, ...]) -> None:
    x, w, _, operands, chain = inputs[:5]
    _, raw, mean, rstd = output
    ctx.chain, ctx.geom = chain, _ops._geometry(w.dim() - 2, inputs[5:])
    ctx.count = len(operands)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(raw, mean, rstd)
    ctx.save_for_backward(x, w, raw, mean, rstd, *operands)


def _training_backward(ctx: Any, grad: Optional[Tensor], *_: Any) -> Any:
    x, w, raw, mean, rstd, *operands = ctx.saved_tensors
    geom, chain = ctx.geom, ctx.chain
    rank = geom.rank
    nothing = (None, None, None, [None] * ctx.count, None, *(None,) * 6)
    if grad is None:
        return nothing
    need_x, need_w, need_bias, need_operands = ctx.needs_input_grad[:4]
    wanted = list(need_operands) if isinstance(need_operands, (list, tuple)) else [bool(need_operands)] * ctx.count
    grads: List[Optional[Tensor]] = [None] * ctx.count
    grad_x = grad_w = grad_bias = None
    if _chain.parse(chain)[1]:
        joins = need_bias and len(operands) < MAX_OPERANDS
        given, words, asked = operands, chain, wanted
        if joins:
            given, words, asked = _bias_as_operand(raw, operands, chain, rank, wanted)
        grad, *rest = torch.ops.tconv.chain_backward(raw, grad, mean, rstd, given, words, rank, asked)
        if joins:
            grad_bias, need_bias = rest.pop(0).to(raw.dtype), False
        grads = [g if want else None for g, want in zip(rest, wanted)]
    assert grad is not None
    pre = _pre_only(chain)
    if need_x:
        grad_x = _ops.grad_input(grad, w, x.shape[-rank:], geom)
        if pre:
            empty = x.new_empty(0)
            grad_x = torch.ops.tconv.chain_backward(x, grad_x, empty, empty, [], _pre_as_ops(chain), rank, [])[0]
    if need_w:
        activated = torch.ops.tconv.apply_pre(x, chain, rank) if pre else x
        grad_w = _ops.grad_weight(activated, grad, w.shape[2:], geom)
    if need_bias:
        grad_bias = _autograd.bias_gradient(grad, rank)
    return (grad_x, grad_w, grad_bias, grads, None, *(None,) * 6)


def _fused_flops(x: Any, w: Any, *_: Any, **__: Any) -> int:
    return _ops._flops(x, w)


if _ops.available:
    _FUSED = f"Tensor input, Tensor weight, Tensor? bias, Tensor[] operands, str chain, {_ops._GEOMETRY})"
    _ops._define("fused", f"{_FUSED} -> Tensor", _fused, _fused_fake)
    _ops._define(
        "fused_training",
        f"{_FUSED} -> (Tensor, Tensor, Tensor, Tensor)",
        _fused_training,
        _fused_training_fake,
        _training_backward,
        _training_context,
    )
    _ops._define(
        "chain_backward",
        "Tensor raw, Tensor grad_output, Tensor mean, Tensor rstd, Tensor[] operands, str chain, int rank, "
        "bool[] wanted) -> Tensor[]",
        _chain_backward,
        _chain_backward_fake,
    )
    _ops._define("apply_pre", "Tensor input, str chain, int rank) -> Tensor", _apply_pre, _apply_pre_fake)
    _ops._register_flops("fused", _fused_flops)
    _ops._register_flops("fused_training", _fused_flops)


# --- The way in -------------------------------------------------------------------------------------------------------


def call(
    geom: Geometry, x: Tensor, w: Tensor, bias: Optional[Tensor], operands: Sequence[Tensor], chain: str
) -> Tensor:
    """Convolution and chain by whichever path the moment asks for: core, autograd, dispatcher or composition."""
    every = (x, w, bias, *operands)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in every)
    if not functional._is_compiling():
        if functional._functorch_active() or torch.autograd.forward_ad._current_level >= 0:
            return composed(geom, x, w, bias, operands, chain)
        if functional.plain(*every):
            if needs_grad:
                return FusedConvTranspose.apply(x, w, bias, chain, geom, *operands)
            return run_inference(entry_for(geom, x, w, bias, operands, chain, False), x, w, bias, operands, chain)
    if not _ops.available:
        _ops._unavailable()
    arguments = (x, w, bias, list(operands), chain, *_ops._arguments(geom))
    if needs_grad:
        return torch.ops.tconv.fused_training(*arguments)[0]
    return torch.ops.tconv.fused(*arguments)
