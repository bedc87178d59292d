"""Chains of operations around a convolution: torch.nn's modules in the core's words, and those in PyTorch's operations.

A chain is the core's epilogue string: ``pre:leaky_relu(0.1) gelu group_norm(8,eps=1e-05,affine) scale(2)``.
``describe`` turns a module into such a word and its operands; ``compose`` applies a chain with differentiable PyTorch
operations, which is what gradients of second order, vmap and forward-mode differentiation go through.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Word(NamedTuple):
    """One operation of a chain, parsed: name as in epilogue.def."""

    name: str
    scalars: Tuple[float, ...] = ()
    num_groups: int = 0
    eps: float = 1e-5
    affine: bool = False


NORMS = {"group_norm": 2, "layer_norm": 2, "batch_norm": 4}  # operands when affine
WITH_OPERAND = {"scale_channel", "add_channel", "prelu", "add_tensor", "scale_tensor"}


@lru_cache(maxsize=1024)
def parse(chain: str) -> Tuple[Tuple[Word, ...], Tuple[Word, ...]]:
    """(pre, ops) of a chain; ``bias`` and the dtypes are not operations and are passed over."""
    pre: List[Word] = []
    ops: List[Word] = []
    for token in chain.split():
        if token in ("bias", "save") or token.startswith(("operands:", "out:")):
            continue
        target = ops
        if token.startswith("pre:"):
            token, target = token[4:], pre
        name, _, rest = token.partition("(")
        arguments = rest.rstrip(")").split(",") if rest else []
        if name not in NORMS:
            target.append(Word(name, tuple(float(a) for a in arguments)))
            continue
        groups = int(arguments.pop(0)) if name == "group_norm" else 0
        eps, affine = 1e-5, False
        for argument in arguments:
            if argument == "affine":
                affine = True
            else:
                eps = float(argument.partition("=")[2])
        target.append(Word(name, (), groups, eps, affine))
    return tuple(pre), tuple(ops)


def num_operands(word: Word) -> int:
    if word.name in NORMS:
        return NORMS[word.name] - (0 if word.affine else 2)
    return 1 if word.name in WITH_OPERAND else 0


# --- In PyTorch's operations ------------------------------------------------------------------------------------------


def _per_channel(v: Tensor, rank: int) -> Tensor:
    return v.reshape(-1, *(1,) * rank)


def _clamp(x: Tensor, a: float, b: float) -> Tensor:
    return torch.clamp(x, a, b)


_POINTWISE: Dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "clamp": _clamp,
    "hardtanh": F.hardtanh,
    "scale": lambda x, a: x * a,
    "add": lambda x, a: x + a,
}


def _apply(word: Word, x: Tensor, operands: Sequence[Tensor], rank: int) -> Tensor:
    name = word.name
    if name in _POINTWISE:
        return _POINTWISE[name](x, *word.scalars)
    if name in ("scale_channel", "add_channel", "prelu"):
        v = _per_channel(operands[0], rank)
        if name == "prelu":
            return torch.where(x > 0, x, x * v)
        return x * v if name == "scale_channel" else x + v
    if name == "add_tensor":
        return x + operands[0]
    if name == "scale_tensor":
        return x * operands[0]
    weight, bias = (operands[-2], operands[-1]) if word.affine else (None, None)
    if name == "group_norm":
        return F.group_norm(x, word.num_groups, weight, bias, word.eps)
    if name == "layer_norm":
        return channel_layer_norm(x, weight, bias, word.eps, rank)
    return F.batch_norm(x, operands[0], operands[1], weight, bias, False, 0.0, word.eps)


def channel_layer_norm(x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], eps: float, rank: int) -> Tensor:
    """Normalisation over the channels at every position."""
    channels = x.dim() - rank - 1
    moved = x.movedim(channels, -1)
    return F.layer_norm(moved, (x.shape[channels],), weight, bias, eps).movedim(-1, channels)


def compose(chain: str, conv: Callable[[Tensor], Tensor], x: Tensor, operands: Sequence[Tensor], rank: int) -> Tensor:
    """The chain around ``conv`` in differentiable operations. Widening dtypes follow ``out:`` at the norm."""
    pre, ops = parse(chain)
    for word in pre:
        x = _apply(word, x, (), rank)
    return compose_ops(chain, ops, conv(x), operands, rank)


def compose_ops(chain: str, ops: Sequence[Word], y: Tensor, operands: Sequence[Tensor], rank: int) -> Tensor:
    unbatched = y.dim() == rank + 1
    if unbatched:
        y = y.unsqueeze(0)
    out = output_dtype(chain)
    work = y.dtype
    wide = out or work
    if any(t.dtype != work for t in operands):
        wide = torch.promote_types(wide, torch.float32)
    if wide != work:
        y = y.to(wide)  # the core's fused chain computes 16-bit values in fp32 throughout
    at = 0
    for word in ops:
        count = num_operands(word)
        own = [t.to(y.dtype) for t in operands[at : at + count]]
        if unbatched:
            own = [t.unsqueeze(0) if t.dim() == rank + 1 else t for t in own]
        y = _apply(word, y, own, rank)
        at += count
    y = y.to(out or work)
    return y.squeeze(0) if unbatched else y


_CORE_DTYPES = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}
CORE_DTYPE_NAMES = {dtype: name for name, dtype in _CORE_DTYPES.items()}


@lru_cache(maxsize=1024)
def output_dtype(chain: str) -> Optional[torch.dtype]:
    for token in chain.split():
        if token.startswith("out:"):
            return _CORE_DTYPES[token[4:]]
    return None


# --- From modules -----------------------------------------------------------------------------------------------------

Operands = Callable[[Any, int], Tuple[Tensor, ...]]


def _no_operands(module: Any, channels: int) -> Tuple[Tensor, ...]:
    return ()


class Described(NamedTuple):
    """A module in the core's words. The text is fixed when a chain is built; operands are fetched at every call, so
    that parameters which are replaced or computed (parametrizations) are seen."""

    text: str
    operands: Operands = _no_operands
    widens: bool = False  # CUDA's autocast runs it in fp32 and returns fp32
    norm: bool = False
    residual: bool = False  # its operand is an extra argument of the call
    statistics: bool = False  # BatchNorm: can be fused while the module is in eval mode only


Answer = Union[Described, str]  # or the reason why it cannot be part of a chain
Rule = Callable[[Any, int], Answer]
RULES: Dict[type, Rule] = {}


def rule(*types: type) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for type_ in types:
            RULES[type_] = function
        return function

    return register


def describe(module: nn.Module, channels: int) -> Answer:
    """A module as a word of a chain over ``channels`` channels, or the reason why it is none."""
    function = RULES.get(type(module))
    if function is None:
        return f"{type(module).__name__} is not an operation that can be fused"
    return function(module, channels)


def _fixed(text: str) -> Rule:
    answer = Described(text)
    return lambda module, channels: answer


for _type, _text in (
    (nn.ReLU, "relu"),
    (nn.SiLU, "silu"),
    (nn.Mish, "mish"),
    (nn.Sigmoid, "sigmoid"),
    (nn.Tanh, "tanh"),
    (nn.Hardswish, "hardswish"),
    (nn.Hardsigmoid, "hardsigmoid"),
    (nn.ReLU6, "hardtanh(0,6)"),
    (nn.Identity, ""),
):
    RULES[_type] = _fixed(_text)


@rule(nn.LeakyReLU)
def _leaky_relu(module: nn.LeakyReLU, channels: int) -> Answer:
    return Described(f"leaky_relu({float(module.negative_slope)!r})")


@rule(nn.ELU)
def _elu(module: nn.ELU, channels: int) -> Answer:
    return Described(f"elu({float(module.alpha)!r})")


@rule(nn.GELU)
def _gelu(module: nn.GELU, channels: int) -> Answer:
    return Described("gelu_tanh" if module.approximate == "tanh" else "gelu")


@rule(nn.Softplus)
def _softplus(module: nn.Softplus, channels: int) -> Answer:
    if module.beta != 1 or module.threshold != 20:
        return f"Softplus with beta={module.beta}, threshold={module.threshold}; only beta=1, threshold=20 is fused"
    return Described("softplus", widens=True)


@rule(nn.Hardtanh)
def _hardtanh(module: nn.Hardtanh, channels: int) -> Answer:
    return Described(f"hardtanh({float(module.min_val)!r},{float(module.max_val)!r})")


def _prelu_operands(module: Any, channels: int) -> Tuple[Tensor, ...]:
    weight = module.weight
    return (weight if module.num_parameters == channels else weight.expand(channels),)


@rule(nn.PReLU)
def _prelu(module: nn.PReLU, channels: int) -> Answer:
    if module.num_parameters not in (1, channels):
        return f"PReLU of {module.num_parameters} parameters on {channels} channels"
    return Described("prelu", _prelu_operands)


def weight_operand(module: Any, channels: int) -> Tuple[Tensor, ...]:
    return (module.weight,)


def affine_operands(module: Any, channels: int) -> Tuple[Tensor, ...]:
    """(weight, bias) of a norm, with what is missing filled in; nothing if both are."""
    weight, bias = module.weight, module.bias
    if weight is None and bias is None:
        return ()
    if weight is None:
        return (torch.ones_like(bias), bias)
    return (weight, torch.zeros_like(weight) if bias is None else bias)


def affine_text(module: Any) -> str:
    return "" if module.weight is None and module.bias is None else ",affine"


def _batch_norm_operands(module: Any, channels: int) -> Tuple[Tensor, ...]:
    return (module.running_mean, module.running_var, *affine_operands(module, channels))


@rule(nn.GroupNorm)
def _group_norm(module: nn.GroupNorm, channels: int) -> Answer:
    if module.num_channels != channels:
        return f"GroupNorm over {module.num_channels} channels on {channels} channels"
    text = f"group_norm({module.num_groups},eps={module.eps!r}{affine_text(module)})"
    return Described(text, affine_operands, widens=True, norm=True)


@rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _instance_norm(module: Any, channels: int) -> Answer:
    if module.track_running_stats:
        return "InstanceNorm that tracks running statistics"
    if module.num_features != channels and module.affine:
        return f"InstanceNorm over {module.num_features} channels on {channels} channels"
    return Described(f"group_norm({channels},eps={module.eps!r}{affine_text(module)})", affine_operands, norm=True)


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm(module: Any, channels: int) -> Answer:
    if module.num_features != channels:
        return f"BatchNorm over {module.num_features} channels on {channels} channels"
    if module.running_mean is None or module.running_var is None:
        return "BatchNorm without running statistics"
    text = f"batch_norm(eps={module.eps!r}{affine_text(module)})"
    return Described(text, _batch_norm_operands, norm=True, statistics=True)
