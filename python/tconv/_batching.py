"""vmap by folding: a batched input becomes more batch, a batched weight becomes more groups. One call either way."""

from __future__ import annotations

from typing import Any, Callable, Optional, Sequence, Tuple

from torch import Tensor

from ._core import Geometry


def _front(tensor: Tensor, dim: Optional[int], size: int) -> Tensor:
    """The tensor with its batch dimension first; repeated when it has none."""
    return tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _into_batch(tensor: Tensor, dim: int, rank: int) -> Tensor:
    tensor = tensor.movedim(dim, 0)  # (V, N, C, ...) or (V, C, ...)
    return tensor.flatten(0, 1) if tensor.dim() == rank + 3 else tensor


def _out_of_batch(tensor: Tensor, size: int, batched: bool) -> Tensor:
    return tensor.unflatten(0, (size, tensor.shape[0] // size)) if batched else tensor


def _into_channels(tensor: Tensor, dim: Optional[int], size: int, rank: int) -> Tensor:
    tensor = _front(tensor, dim, size)
    channels = tensor.dim() - rank - 1
    return tensor.movedim(0, channels - 1).flatten(channels - 1, channels)  # (N, V * C, ...) or (V * C, ...)


def _out_of_channels(tensor: Tensor, size: int, rank: int) -> Tuple[Tensor, int]:
    channels = tensor.dim() - rank - 1
    return tensor.unflatten(channels, (size, tensor.shape[channels] // size)), channels


def conv_transpose(
    call: Callable[..., Tensor],
    size: int,
    in_dims: Sequence[Any],
    x: Tensor,
    w: Tensor,
    bias: Optional[Tensor],
    geom: Geometry,
) -> Tuple[Tensor, int]:
    x_dim, w_dim, bias_dim = in_dims[:3]
    rank = geom.rank
    if w_dim is not None:
        folded = w.movedim(w_dim, 0).flatten(0, 1)
        folded_bias = None if bias is None else _front(bias, bias_dim, size).flatten(0, 1)
        y = call(geom._replace(groups=geom.groups * size), _into_channels(x, x_dim, size, rank), folded, folded_bias)
        return _out_of_channels(y, size, rank)
    shared_bias = bias if bias_dim is None else None
    if x_dim is None:  # only the bias is batched
        y = call(geom, x, w, None).unsqueeze(0)
    else:
        batched = x.dim() == rank + 3
        y = _out_of_batch(call(geom, _into_batch(x, x_dim, rank), w, shared_bias), size, batched)
    if bias is not None and bias_dim is not None:
        term = bias.movedim(bias_dim, 0)
        y = y + term.reshape(size, *(1,) * (y.dim() - rank - 2), term.shape[1], *(1,) * rank)
    return y, 0


def grad_input(
    call: Callable[..., Tensor], size: int, in_dims: Sequence[Any], g: Tensor, w: Tensor, geom: Geometry
) -> Tuple[Tensor, int]:
    g_dim, w_dim = in_dims[:2]
    rank = geom.rank
    if w_dim is not None:
        folded = w.movedim(w_dim, 0).flatten(0, 1)
        result = call(geom._replace(groups=geom.groups * size), _into_channels(g, g_dim, size, rank), folded)
        return _out_of_channels(result, size, rank)
    batched = g.dim() == rank + 3
    return _out_of_batch(call(geom, _into_batch(g, g_dim, rank), w), size, batched), 0


def grad_weight(
    call: Callable[..., Tensor], size: int, in_dims: Sequence[Any], x: Tensor, g: Tensor, geom: Geometry
) -> Tuple[Tensor, int]:
    x_dim, g_dim = in_dims[:2]
    rank = geom.rank
    result = call(
        geom._replace(groups=geom.groups * size),
        _into_channels(x, x_dim, size, rank),
        _into_channels(g, g_dim, size, rank),
    )
    return result.unflatten(0, (size, result.shape[0] // size)), 0
