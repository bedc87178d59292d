"""``tconv.explain``: which kernels were considered for a layer, with their price or their reason to refuse."""

from __future__ import annotations

from typing import Any, List, Optional, Tuple, Union

import torch
from torch import Tensor

from . import _C, _core, _fused
from . import functional as F
from . import nn as tnn


def explain(layer: Union[torch.nn.Module, str], *inputs: Any, device: Optional[str] = None) -> str:
    """Every kernel that was considered, with its predicted cost or its reason to refuse.

    Args:
        layer: a transposed convolution, a :class:`tconv.nn.Fused`, any model that contains some, or a problem string
            such as ``"2d b8 c64>64 i1024x1024 t3x3"``.
        inputs: what the module would be called with. None for a problem string.
        device: for a problem string: ``"cpu"`` (the default), ``"cuda"``, ``"cuda:1"``, or a known device such as
            ``"h200"``, which need not be there.

    Returns:
        Text: one block per convolution in the order of execution.

    Example::

        >>> import torch, tconv
        >>> text = tconv.explain(tconv.nn.ConvTranspose2d(8, 4, 2, stride=2), torch.randn(1, 8, 16, 16))
        >>> "chosen" in text
        True
    """
    if isinstance(layer, str):
        if (device or "").startswith("cuda"):
            _core.add_search_paths()
        return _C.plan_string(layer, device or "cpu", "").explain()
    if not isinstance(layer, torch.nn.Module):
        raise TypeError(f"explain(): argument 'layer' must be a torch.nn.Module or a problem string, not {type(layer)}")
    blocks = []
    for path, plan in plans_of(layer, *inputs):
        text = "nothing to do: the result has no elements" if plan is None else plan.explain()
        blocks.append(f"{path}: {text}" if path else text)
    return "\n".join(blocks)


def plans_of(model: torch.nn.Module, *inputs: Any) -> List[Tuple[str, Any]]:
    """(path, plan) of every transposed convolution in a forward, in the order of execution."""
    found: List[Tuple[str, Any]] = []
    names = {id(module): path for path, module in model.named_modules()}
    inside = {id(module.layer) for module in model.modules() if isinstance(module, tnn.Fused)}
    handles = []

    def note(module: Any, args: Any) -> None:
        found.append((names[id(module)], _plan_of(module, *args)))

    kinds: Any = (tnn._TransposedConvolution, tnn.Fused)
    for module in model.modules():
        if isinstance(module, kinds) and id(module) not in inside:
            handles.append(module.register_forward_pre_hook(note))
    if not handles:
        raise ValueError("the module contains no transposed convolution of tconv; see tconv.optimize")
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _plan_of(module: Any, x: Tensor, *extra: Any) -> Any:
    if isinstance(module, tnn.Fused):
        arguments = tnn.assemble(module.layer, module._recipe, list(module.ops), x, extra).arguments
        plan = _fused.entry_for(*arguments, save=False).plan
    elif hasattr(module, "tconv_ops"):
        arguments = tnn.assemble(module, module._recipe, list(module.tconv_ops), x, ()).arguments
        plan = _fused.entry_for(*arguments, save=False).plan
    else:
        dtype = F.autocast_dtype(x.device.type)
        tensors = [t if dtype is None else F._cast(t, dtype) for t in (x, module.weight, module.bias)]
        geometry = (module.stride, module.padding, module.output_padding, module.groups, module.dilation)
        plan = _core.forward_entry(len(module.kernel_size), *tensors, *geometry, module.precision).plan  # type: ignore
    return plan
