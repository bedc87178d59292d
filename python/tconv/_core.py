"""Calls into the core: one cached plan per layer and size, outputs from PyTorch's allocator, the current stream.

Everything here works on plain dense or strided tensors on the CPU or a CUDA device and knows nothing of autograd.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple, NoReturn, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from . import _C

Size = Tuple[int, ...]
IntOrInts = Union[int, Sequence[int]]

# The core's enumerations, in the order of problem.h.
FORWARD, GRAD_INPUT, GRAD_WEIGHT, EPILOGUE, GRAD_EPILOGUE = range(5)
CONTIGUOUS, CHANNELS_LAST = range(2)
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
# Precision as an argument of the operators: what PyTorch's flags say at the time of the call, or a fixed choice.
FOLLOW_FLAGS, FP32, TF32 = -1, 0, 1
PRECISIONS = {None: FOLLOW_FLAGS, "fp32": FP32, "tf32": TF32}

_CHANNELS_LAST_FORMAT = {2: torch.channels_last, 3: torch.channels_last_3d}
# A vocoder sees a new length with every sentence; the tables are emptied rather than left to grow.
_MAX_ENTRIES = 4096


class Geometry(NamedTuple):
    """Everything about a transposed convolution except its tensors."""

    rank: int
    stride: Size
    padding: Size
    output_padding: Size
    groups: int
    dilation: Size
    precision: int = FOLLOW_FLAGS

    def output_size(self, input_size: Sequence[int], kernel: Sequence[int]) -> tuple:
        """``(i - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1`` per dimension."""
        return tuple(
            (i - 1) * s - 2 * p + d * (t - 1) + op + 1
            for i, t, s, p, op, d in zip(
                input_size, kernel, self.stride, self.padding, self.output_padding, self.dilation
            )
        )


# --- PyTorch's flags ----------------------------------------------------------------------------------------------

_precision_getter = getattr(torch._C, "_get_fp32_precision_getter", None)


def tf32_allowed() -> bool:
    """Whether PyTorch's flags let a CUDA convolution round fp32 operands to TF32."""
    if _precision_getter is not None:
        return _precision_getter("cuda", "conv") == "tf32"
    return bool(torch.backends.cudnn.allow_tf32)


def default_is_tf32(direction: int, groups: int) -> bool:
    """What the flags make of an fp32 problem on CUDA.

    cuDNN computes the forward pass of grouped layers in fp32 whatever they say, most of their gradients in TF32.
    """
    return (groups == 1 or direction in (GRAD_INPUT, GRAD_WEIGHT)) and tf32_allowed()


def _precision_code(precision: int, x: Tensor, direction: int, groups: int) -> int:
    if x.dtype != torch.float32 or not x.is_cuda:
        return FP32  # the CPU computes in fp32 always; other dtypes have one arithmetic only
    if precision == FOLLOW_FLAGS:
        return TF32 if default_is_tf32(direction, groups) else FP32
    return precision


# --- CUDA -----------------------------------------------------------------------------------------------------------

_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_search_paths_added = False


def add_search_paths() -> None:
    """Tells the core where PyTorch's CUDA wheels keep NVRTC."""
    global _search_paths_added
    if _search_paths_added:
        return
    _search_paths_added = True
    folders = []
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec is not None else []:
        folders += [os.path.join(root, *tail) for tail in (("cu13", "lib"), ("cuda_nvrtc", "lib"), ("cu14", "lib"))]
    folders.append(os.path.join(os.path.dirname(torch.__file__), "lib"))
    for folder in folders:
        if os.path.isdir(folder):
            _C.add_search_path(folder)


def _stream(x: Tensor) -> int:
    if not x.is_cuda:
        return 0
    if _raw_stream is not None:
        return _raw_stream(x.get_device())
    return torch.cuda.current_stream(x.device).cuda_stream


# --- Memory format ----------------------------------------------------------------------------------------------------


def strides_like_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """PyTorch's own rule for what counts as channels-last, dense or not (``TensorImpl``'s of the same name)."""
    rank = len(shape) - 2
    if rank not in (2, 3) or strides[1] == 0:
        return False
    smallest = 0
    for dim in (1, *range(rank + 1, 1, -1), 0):
        if shape[dim] == 0 or strides[dim] < smallest:
            return False
        if dim == 0 and smallest == strides[1]:
            return False  # every order fits: NCHW
        smallest = strides[dim]
        if shape[dim] > 1:
            smallest *= shape[dim]
    return True


def suggest_layout(*tensors: Tensor) -> int:
    """Channels-last as soon as one operand is, which is how PyTorch's convolutions choose their output's format."""
    return CHANNELS_LAST if any(strides_like_channels_last(t.shape, t.stride()) for t in tensors) else CONTIGUOUS


def empty(shape: Sequence[int], layout: int, like: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """An uninitialised tensor in the given layout."""
    if layout == CHANNELS_LAST and len(shape) >= 4:
        memory_format = _CHANNELS_LAST_FORMAT[len(shape) - 2]
        return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format)
    if dtype is None:  # the way of most calls, and 1 us quicker than naming dtype and device
        return like.new_empty(shape)
    return torch.empty(shape, dtype=dtype, device=like.device)


def is_dense(x: Tensor, layout: int) -> bool:
    """Whether the tensor's memory already is in the layout."""
    if layout == CHANNELS_LAST and x.dim() >= 4:
        return x.is_contiguous(memory_format=_CHANNELS_LAST_FORMAT[x.dim() - 2])
    return x.is_contiguous()


def dense(x: Tensor, layout: int) -> Tensor:
    """The tensor itself if its memory already is in the layout, otherwise a copy that is."""
    if x.is_neg():
        x = x.resolve_neg()
    if layout == CHANNELS_LAST and x.dim() >= 4:
        return x.contiguous(memory_format=_CHANNELS_LAST_FORMAT[x.dim() - 2])
    return x.contiguous()


def dense_weight(w: Tensor) -> Tuple[Tensor, bool]:
    """The weight, and whether it lies in channels_last: kernels on CUDA read that as it is. Otherwise contiguous."""
    if w.is_neg():
        w = w.resolve_neg()
    if w.is_contiguous():
        return w, False
    if w.is_cuda and is_dense(w, CHANNELS_LAST):
        return w, True
    return w.contiguous(), False


# --- Arguments --------------------------------------------------------------------------------------------------------


def _wrong_type(name: str, argument: str, wanted: str, value: Any) -> NoReturn:
    raise TypeError(f"{name}(): argument '{argument}' must be {wanted}, not {type(value).__name__}")


def _as_int(name: str, argument: str, value: Any, wanted: str) -> int:
    if isinstance(value, bool) or isinstance(value, float):
        _wrong_type(name, argument, wanted, value)
    if type(value) is int:
        return value
    if isinstance(value, Tensor) and (value.dim() != 0 or value.is_floating_point() or value.dtype == torch.bool):
        _wrong_type(name, argument, wanted, value)
    try:
        return value.__index__()
    except (AttributeError, TypeError):
        _wrong_type(name, argument, wanted, value)


def _as_ints(name: str, argument: str, value: Any, rank: int) -> Size:
    wanted = "int or tuple of ints"
    if isinstance(value, (tuple, list)):
        numbers = tuple(_as_int(name, argument, v, wanted) for v in value)
        if len(numbers) == 1:
            numbers *= rank
        if len(numbers) != rank:
            raise RuntimeError(
                f"{name}(): expected {argument} to be a single integer value or a list of {rank} values to match the "
                f"convolution dimensions, but got {argument}={list(value)}"
            )
        return numbers
    return (_as_int(name, argument, value, wanted),) * rank


def geometry(
    rank: int,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: Any,
    dilation: Any,
    precision: Optional[str] = None,
) -> Geometry:
    """Arguments as a user may write them, normalised; refuses what is not made of integers, and values out of range."""
    name = f"conv_transpose{rank}d"
    result = Geometry(
        rank,
        _as_ints(name, "stride", stride, rank),
        _as_ints(name, "padding", padding, rank),
        _as_ints(name, "output_padding", output_padding, rank),
        _as_int(name, "groups", groups, "int"),
        _as_ints(name, "dilation", dilation, rank),
        precision_code(name, precision),
    )
    for argument, smallest in (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1)):
        values = getattr(result, argument)
        if min(values) < smallest:
            kind = "non-positive" if smallest == 1 else "negative"
            raise RuntimeError(
                f"{name}(): {kind} {argument} is not supported: got {argument}={values}, must be at least {smallest}"
            )
    if result.groups < 1:
        raise RuntimeError(f"{name}(): non-positive groups is not supported: got groups={groups}, must be at least 1")
    for op, s, d in zip(result.output_padding, result.stride, result.dilation):
        if op >= s and op >= d:
            raise RuntimeError(
                f"{name}(): output padding must be smaller than either stride or dilation, but got "
                f"output_padding={result.output_padding}, stride={result.stride}, dilation={result.dilation}"
            )
    return result


_geometries: dict = {}


def known_geometry(
    rank: int, stride: Any, padding: Any, output_padding: Any, groups: Any, dilation: Any, precision: Optional[str]
) -> Geometry:
    """``geometry`` for eager calls: 0.4 us instead of 10 when the arguments were seen before."""
    key = (_C.geometry_key(rank, stride, padding, output_padding, groups, dilation), precision)
    found = _geometries.get(key) if key[0] is not None else None
    if found is None:
        found = geometry(rank, stride, padding, output_padding, groups, dilation, precision)
        if key[0] is not None:
            _remember(_geometries, key, found)
    return found


def precision_code(name: str, precision: Optional[str]) -> int:
    try:
        return PRECISIONS[precision]
    except (KeyError, TypeError):
        raise ValueError(f"{name}(): precision must be 'fp32', 'tf32' or None, got {precision!r}") from None


def check_tensors(name: str, **tensors: Optional[Tensor]) -> None:
    """Type, device, dtype and memory of the operands; the first one sets what the others must agree with."""
    first: Optional[Tensor] = None
    first_name = ""
    for position, (argument, tensor) in enumerate(tensors.items(), 1):
        if tensor is None and argument == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name}(): argument '{argument}' (position {position}) must be Tensor, not {type(tensor).__name__}"
            )
        if first is None:
            first, first_name = tensor, argument
        if tensor.device.type not in ("cpu", "cuda", "meta"):
            raise NotImplementedError(
                f"{name}(): {argument} is on device '{tensor.device}'; tconv runs on cpu and cuda devices"
            )
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise RuntimeError(f"{name}(): {argument} has layout {tensor.layout}; only dense (strided) tensors work")
        if tensor.dtype not in DTYPE_CODES:
            raise NotImplementedError(
                f"{name}() is not implemented for {argument} of dtype {tensor.dtype}; allowed: float32, float64, "
                "float16, bfloat16"
            )
        if tensor.dtype != first.dtype:
            raise RuntimeError(
                f"{name}(): {first_name} type ({first.dtype}) and {argument} type ({tensor.dtype}) should be the same"
            )
        if tensor.device != first.device:
            raise RuntimeError(
                f"{name}(): expected all tensors to be on the same device, but {first_name} is on {first.device} and "
                f"{argument} is on {tensor.device}"
            )


def check_shapes(geom: Geometry, x: Any, w: Any, bias: Optional[Any]) -> None:
    """Shapes of input, weight and bias, in the order in which PyTorch looks at them."""
    rank, groups = geom.rank, geom.groups
    name = f"conv_transpose{rank}d"
    x_shape, w_shape = tuple(x.shape), tuple(w.shape)
    if len(x_shape) not in (rank + 1, rank + 2):
        raise RuntimeError(
            f"Expected {rank + 1}D (unbatched) or {rank + 2}D (batched) input to {name}, but got input of size: "
            f"{list(x_shape)}"
        )
    if len(w_shape) != rank + 2:
        raise RuntimeError(
            f"{name}(): expected weight to be {rank + 2}-dimensional (in_channels, out_channels / groups, kernel), but "
            f"got weight of size {list(w_shape)}"
        )
    if w_shape[0] < groups:
        raise RuntimeError(
            f"{name}(): given groups={groups}, expected weight to be at least {groups} at dimension 0, but got weight "
            f"of size {list(w_shape)}"
        )
    if w_shape[0] % groups:
        raise RuntimeError(
            f"{name}(): given groups={groups}, expected weight to be divisible by {groups} at dimension 0, but got "
            f"weight of size {list(w_shape)}"
        )
    channels = x_shape[-rank - 1]
    if channels != w_shape[0]:
        raise RuntimeError(
            f"{name}(): given weight of size {list(w_shape)}, expected input{list(x_shape)} to have {w_shape[0]} "
            f"channels, but got {channels} channels instead"
        )
    out_channels = w_shape[1] * groups
    if out_channels < 1:
        raise RuntimeError(
            f"{name}(): weight must have at least 1 output channel at dimension 1, but got weight of size "
            f"{list(w_shape)}"
        )
    if min(w_shape[2:]) < 1:
        raise RuntimeError(f"{name}(): kernel size must be at least 1, but got weight of size {list(w_shape)}")
    if bias is not None and tuple(bias.shape) != (out_channels,):
        raise RuntimeError(
            f"{name}(): given weight of size {list(w_shape)}, expected bias to be 1-dimensional with {out_channels} "
            f"elements, but got bias of size {list(bias.shape)} instead"
        )


def check_sizes(geom: Geometry, x_shape: Size, kernel: Size) -> None:
    """Sizes that only numbers can answer: zero inputs and negative outputs."""
    rank = geom.rank
    name = f"conv_transpose{rank}d"
    spatial = x_shape[-rank:]
    batch = x_shape[0] if len(x_shape) == rank + 2 else 1
    if batch > 0 and min(spatial) < 1:
        raise RuntimeError(
            f"{name}(): only a zero batch is supported as an empty input, but got input of size {list(x_shape)}"
        )
    output = geom.output_size(spatial, kernel)
    if min(output) < 0:
        raise RuntimeError(
            f"{name}(): given input size {list(spatial)}, kernel {list(kernel)}, {geom}: the output size "
            f"{list(output)} is too small"
        )


# --- Plans ------------------------------------------------------------------------------------------------------------


class Entry:
    """A plan and what has to be known to run it on tensors of these sizes and strides."""

    __slots__ = ("copies", "cuda", "geom", "layout", "plan", "shape", "w_shape", "weight_last", "workspace", "x_shape")

    def __init__(self, plan: Any, geom: Geometry, shape: Size, layout: int, x_shape: Size, w_shape: Size) -> None:
        self.plan = plan  # None: the forward result has no elements (so gradients are zero), or meta tensors
        self.geom = geom
        self.shape = shape
        self.layout = layout
        self.workspace: int = 0 if plan is None else plan.workspace_bytes
        self.x_shape = x_shape
        self.w_shape = w_shape
        self.cuda = -1  # the device's index; -1 on the CPU
        self.copies = True  # whether an operand may have to be copied into the plan's layout first
        self.weight_last = False  # without copies: the weight lies in channels_last

    def workspace_for(self, x: Tensor) -> Optional[Tensor]:
        if self.workspace and x.is_cuda:
            return torch.empty(self.workspace, dtype=torch.uint8, device=x.device)
        return None


def plan_arguments(
    direction: int,
    geom: Geometry,
    batch: int,
    in_channels: int,
    out_channels: int,
    input_size: Sequence[int],
    kernel: Sequence[int],
    like: Tensor,
    layout: int,
    epilogue: str = "",
    save: bool = False,
    operand_dtype: Optional[torch.dtype] = None,
    output_dtype: Optional[torch.dtype] = None,
    only: str = "",
) -> Optional[Tuple[Any, ...]]:
    """For ``make_plan``; None when there is nothing to compute: no elements, or meta tensors."""
    if batch == 0 or like.is_meta or 0 in geom.output_size(input_size, kernel):
        return None
    if like.is_cuda:
        add_search_paths()
    return (
        direction,
        geom.rank,
        batch,
        geom.groups,
        in_channels,
        out_channels,
        tuple(input_size),
        tuple(kernel),
        geom.stride,
        geom.padding,
        geom.output_padding,
        geom.dilation,
        DTYPE_CODES[like.dtype],
        layout,
        _precision_code(geom.precision, like, direction, geom.groups),
        like.get_device() if like.is_cuda else -1,
        epilogue,
        save,
        None if operand_dtype is None else DTYPE_CODES[operand_dtype],
        None if output_dtype is None else DTYPE_CODES[output_dtype],
        only,
    )


def make_plan(arguments: Optional[Tuple[Any, ...]], following: Sequence[Optional[Tuple[Any, ...]]] = ()) -> Any:
    """A plan of the core, or None without arguments.

    Those that are ``following`` are needed next: what all of them have to compile is compiled at the same time.
    """
    if arguments is None:
        return None
    return _C.plans([arguments, *(other for other in following if other is not None)])[0]


def _batch_of(shape: Size, rank: int) -> int:
    return shape[0] if len(shape) == rank + 2 else 1


def _remember(table: dict, key: Any, entry: Any) -> Any:
    if len(table) >= _MAX_ENTRIES:
        table.clear()
    table[key] = entry
    return entry


_forward_entries: dict = {}
_backward_entries: dict = {}


def forward_entry(
    rank: int,
    x: Tensor,
    w: Tensor,
    bias: Optional[Tensor],
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: Any,
    dilation: Any,
    precision: Optional[str],
) -> Entry:
    """The plan for these arguments; validates them when they are seen for the first time."""
    numbers = _C.geometry_key(rank, stride, padding, output_padding, groups, dilation)
    if numbers is None:
        geom = geometry(rank, stride, padding, output_padding, groups, dilation, precision)
        stride, padding, output_padding, groups, dilation = geom[1:6]
        numbers = _C.geometry_key(rank, stride, padding, output_padding, groups, dilation)
    try:
        key = (
            numbers,
            x.shape,
            x.stride(),
            x.dtype,
            x.device,
            w.shape,
            w.stride(),
            w.dtype,
            w.device,
            None if bias is None else (bias.shape, bias.stride(), bias.dtype, bias.device),
            precision,
            tf32_allowed() if x.is_cuda and precision is None else None,
        )
    except (AttributeError, RuntimeError, NotImplementedError):  # not tensors, or tensors without strides
        key = None
    try:
        return _forward_entries[key]
    except (KeyError, TypeError):  # TypeError: unhashable precision, refused below
        pass
    geom = geometry(rank, stride, padding, output_padding, groups, dilation, precision)
    check_tensors(f"conv_transpose{rank}d", input=x, weight=w, bias=bias)
    return _remember(_forward_entries, key, make_forward_entry(geom, x, w, bias))


def make_forward_entry(geom: Geometry, x: Tensor, w: Tensor, bias: Optional[Tensor]) -> Entry:
    check_shapes(geom, x, w, bias)
    rank = geom.rank
    x_shape, w_shape = tuple(x.shape), tuple(w.shape)
    check_sizes(geom, x_shape, w_shape[2:])
    spatial, kernel = x_shape[-rank:], w_shape[2:]
    out_channels = w_shape[1] * geom.groups
    layout = suggest_layout(x, w) if len(x_shape) == rank + 2 else CONTIGUOUS
    arguments = plan_arguments(
        FORWARD,
        geom,
        _batch_of(x_shape, rank),
        w_shape[0],
        out_channels,
        spatial,
        kernel,
        x,
        layout,
        "bias" if bias is not None else "",
    )
    shape = (*x_shape[: -rank - 1], out_channels, *geom.output_size(spatial, kernel))
    entry = Entry(make_plan(arguments), geom, shape, layout, x_shape, w_shape)
    entry.cuda = x.get_device() if x.is_cuda else -1
    contiguous = is_dense(w, CONTIGUOUS)
    entry.weight_last = x.is_cuda and not contiguous and is_dense(w, CHANNELS_LAST)
    dense_already = (
        is_dense(x, layout),
        contiguous or entry.weight_last,
        bias is None or is_dense(bias, CONTIGUOUS),
    )
    entry.copies = not all(dense_already)
    return entry


def run_forward(entry: Entry, x: Tensor, w: Tensor, bias: Optional[Tensor]) -> Tensor:
    layout = entry.layout
    negative = x.is_neg() or w.is_neg() or (bias is not None and bias.is_neg())
    weight_last = entry.weight_last
    if entry.copies or negative:  # strides, and so the need to copy, are part of the entry's key
        x = dense(x, layout)
        w, weight_last = dense_weight(w)
        bias = None if bias is None else dense(bias, CONTIGUOUS)
    y = empty(entry.shape, layout, x)
    if entry.plan is None:
        return y
    cuda = entry.cuda
    if cuda < 0:
        stream, threads, workspace = 0, torch.get_num_threads(), None
    else:
        stream, threads = _raw_stream(cuda) if _raw_stream is not None else _stream(x), 0
        workspace = entry.workspace_for(x)
    _C.run(
        entry.plan,
        stream,
        threads,
        x.data_ptr(),
        w.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None,
        y.data_ptr(),
        None,
        None,
        None,
        None,
        None if workspace is None else workspace.data_ptr(),
        None,
        None,
        weight_last,
    )
    return y


def forward(geom: Geometry, x: Tensor, w: Tensor, bias: Optional[Tensor]) -> Tensor:
    """The transposed convolution itself, for arguments that were normalised already."""
    precision = None if geom.precision == FOLLOW_FLAGS else ("fp32", "tf32")[geom.precision]
    return run_forward(forward_entry(geom.rank, x, w, bias, *geom[1:6], precision), x, w, bias)


class Gradient(NamedTuple):
    """What the plan of a gradient is made from, checked."""

    arguments: Optional[Tuple[Any, ...]]
    layout: int
    x_shape: Size
    w_shape: Size


def describe_grad_input(geom: Geometry, grad_output: Tensor, w: Tensor, input_size: Sequence[int]) -> Gradient:
    rank, input_size = geom.rank, tuple(input_size)
    check_tensors(f"conv_transpose{rank}d backward", grad_output=grad_output, weight=w)
    batched = grad_output.dim() == rank + 2
    x_shape, w_shape = (*grad_output.shape[: -rank - 1], w.shape[0], *input_size), tuple(w.shape)
    _check_grad_output(geom, grad_output, x_shape, w_shape)
    layout = suggest_layout(grad_output, w) if batched else CONTIGUOUS
    batch, out_channels = _batch_of(x_shape, rank), w_shape[1] * geom.groups
    arguments = plan_arguments(GRAD_INPUT, geom, batch, w_shape[0], out_channels, input_size, w_shape[2:], w, layout)
    return Gradient(arguments, layout, x_shape, w_shape)


def grad_input_entry(
    geom: Geometry, grad_output: Tensor, w: Tensor, input_size: Sequence[int], x: Optional[Tensor] = None, pre: str = ""
) -> Entry:
    """With ``x`` and ``pre``, ``grad_weight`` is next with these: what both have to compile is compiled at once."""
    input_size = tuple(input_size)
    key = (
        GRAD_INPUT,
        geom,
        input_size,
        grad_output.shape,
        grad_output.stride(),
        grad_output.dtype,
        grad_output.device,
        w.shape,
        w.stride(),
        w.dtype,
        w.device,
        tf32_allowed() if w.is_cuda else None,
    )
    entry = _backward_entries.get(key)
    if entry is None:
        asked = describe_grad_input(geom, grad_output, w, input_size)
        following = [] if x is None else [describe_grad_weight(geom, x, grad_output, w.shape[2:], pre).arguments]
        plan = make_plan(asked.arguments, following)
        entry = Entry(plan, geom, asked.x_shape, asked.layout, asked.x_shape, asked.w_shape)
        _remember(_backward_entries, key, entry)
    return entry


def grad_input(
    geom: Geometry, grad_output: Tensor, w: Tensor, input_size: Sequence[int], x: Optional[Tensor] = None, pre: str = ""
) -> Tensor:
    """Gradient by the input: the strided convolution of ``grad_output`` with the same weight."""
    entry = grad_input_entry(geom, grad_output, w, input_size, x, pre)
    g = dense(grad_output, entry.layout)
    w, weight_last = dense_weight(w)
    result = empty(entry.shape, entry.layout, g)
    if entry.plan is None:
        return result.zero_()
    workspace = entry.workspace_for(g)
    _C.run(
        entry.plan,
        _stream(g),
        0 if g.is_cuda else torch.get_num_threads(),
        None,
        w.data_ptr(),
        None,
        g.data_ptr(),
        result.data_ptr(),
        None,
        None,
        None,
        None,
        None if workspace is None else workspace.data_ptr(),
        None,
        None,
        weight_last,
    )
    return result


def describe_grad_weight(
    geom: Geometry, x: Tensor, grad_output: Tensor, kernel: Sequence[int], pre: str = ""
) -> Gradient:
    rank, kernel = geom.rank, tuple(kernel)
    check_tensors(f"conv_transpose{rank}d backward", input=x, grad_output=grad_output)
    batched = x.dim() == rank + 2
    x_shape = tuple(x.shape)
    out_channels = grad_output.shape[-rank - 1]
    w_shape = (x_shape[-rank - 1], out_channels // geom.groups, *kernel)
    _check_grad_output(geom, grad_output, x_shape, w_shape)
    layout = suggest_layout(x, grad_output) if batched else CONTIGUOUS
    batch, input_size = _batch_of(x_shape, rank), x_shape[-rank:]
    arguments = plan_arguments(GRAD_WEIGHT, geom, batch, w_shape[0], out_channels, input_size, kernel, x, layout, pre)
    return Gradient(arguments, layout, x_shape, w_shape)


def grad_weight_entry(geom: Geometry, x: Tensor, grad_output: Tensor, kernel: Sequence[int], pre: str = "") -> Entry:
    kernel = tuple(kernel)
    key = (
        GRAD_WEIGHT,
        pre,
        geom,
        kernel,
        grad_output.shape,
        grad_output.stride(),
        grad_output.dtype,
        grad_output.device,
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        tf32_allowed() if x.is_cuda else None,
    )
    entry = _backward_entries.get(key)
    if entry is None:
        asked = describe_grad_weight(geom, x, grad_output, kernel, pre)
        plan = make_plan(asked.arguments)
        entry = Entry(plan, geom, asked.w_shape, asked.layout, asked.x_shape, asked.w_shape)
        _remember(_backward_entries, key, entry)
    return entry


def grad_weight(
    geom: Geometry, x: Tensor, grad_output: Tensor, kernel: Sequence[int], with_bias: bool = False, pre: str = ""
) -> Tuple[Tensor, Optional[Tensor]]:
    """Gradient by the weight and, in the same pass over ``grad_output``, by the bias; ``pre`` is applied to ``x``."""
    entry = grad_weight_entry(geom, x, grad_output, kernel, pre)
    x = dense(x, entry.layout)
    g = dense(grad_output, entry.layout)
    result = empty(entry.shape, CONTIGUOUS, x)
    grad_bias = empty((entry.w_shape[1] * geom.groups,), CONTIGUOUS, x) if with_bias else None
    if entry.plan is None:
        return result.zero_(), None if grad_bias is None else grad_bias.zero_()
    workspace = entry.workspace_for(x)
    _C.run(
        entry.plan,
        _stream(x),
        0 if x.is_cuda else torch.get_num_threads(),
        x.data_ptr(),
        None,
        None,
        g.data_ptr(),
        result.data_ptr(),
        None if grad_bias is None else grad_bias.data_ptr(),
        None,
        None,
        None,
        None if workspace is None else workspace.data_ptr(),
        None,
        None,
        False,
    )
    return result, grad_bias


def _check_grad_output(geom: Geometry, grad_output: Tensor, x_shape: Size, w_shape: Size) -> None:
    """A wrong size here would be an out-of-bounds access in the core."""
    rank = geom.rank
    wanted = (*x_shape[: -rank - 1], w_shape[1] * geom.groups, *geom.output_size(x_shape[-rank:], w_shape[2:]))
    if tuple(grad_output.shape) != wanted:
        raise RuntimeError(
            f"conv_transpose{rank}d backward: expected grad_output of size {list(wanted)} for input {list(x_shape)}, "
            f"weight {list(w_shape)} and {geom}, but got {list(grad_output.shape)}"
        )
