"""``torch.compile(model, backend="tconv")``: the captured graph is rewritten, then Inductor compiles the rest.

The rewriting happens before differentiation, on calls as the model wrote them (``conv_transpose2d``, ``gelu``,
``group_norm``), so training works as well.
"""

from __future__ import annotations

import operator
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from . import _core, _fused, functional

_CALLS: Dict[Any, Callable[..., Tensor]] = {}
for _rank in (1, 2, 3):
    _public = getattr(functional, f"conv_transpose{_rank}d")
    for _owner in (torch, F):
        _CALLS[getattr(_owner, f"conv_transpose{_rank}d")] = _public

_SIGNATURE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}


def _bound(node: Node, names: Sequence[str], defaults: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """The node's arguments by name; None where it has others."""
    if len(node.args) > len(names) or any(k not in names for k in node.kwargs):
        return None
    bound = {**defaults, **dict(zip(names, node.args)), **node.kwargs}
    return bound if all(name in bound for name in names) else None


def _plain_numbers(*values: Any) -> bool:
    return not any(isinstance(v, Node) for v in values)


def fused_call(
    input: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
    operands: Sequence[Tensor],
    chain: str,
) -> Tensor:
    """What a fused run of the graph becomes."""
    rank = weight.dim() - 2
    geom = _core.geometry(rank, stride, padding, output_padding, groups, dilation)
    dtype = functional.autocast_dtype(input.device.type)
    if dtype is not None:
        input, weight, bias = (functional._cast(t, dtype) for t in (input, weight, bias))  # type: ignore[assignment]
    return _fused.call(geom, input, weight, bias, list(operands), chain)


# --- Words ------------------------------------------------------------------------------------------------------------

Word = Tuple[str, List[Any], bool]  # text, operand nodes, is a norm


def _number(value: Any) -> Optional[str]:
    return repr(float(value)) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _simple(text: str, names: Sequence[str] = ("input", "inplace")) -> Callable[[Node], Optional[Word]]:
    def read(node: Node) -> Optional[Word]:
        bound = _bound(node, names, {"inplace": False})
        return None if bound is None else (text, [], False)

    return read


def _scalar(text: str, argument: str, default: float) -> Callable[[Node], Optional[Word]]:
    def read(node: Node) -> Optional[Word]:
        bound = _bound(node, ("input", argument, "inplace"), {argument: default, "inplace": False})
        number = None if bound is None else _number(bound[argument])
        return None if number is None else (f"{text}({number})", [], False)

    return read


def _gelu(node: Node) -> Optional[Word]:
    bound = _bound(node, ("input", "approximate"), {"approximate": "none"})
    if bound is None or bound["approximate"] not in ("none", "tanh"):
        return None
    return ("gelu_tanh" if bound["approximate"] == "tanh" else "gelu", [], False)


def _hardtanh(node: Node) -> Optional[Word]:
    bound = _bound(
        node, ("input", "min_val", "max_val", "inplace"), {"min_val": -1.0, "max_val": 1.0, "inplace": False}
    )
    numbers = [] if bound is None else [_number(bound["min_val"]), _number(bound["max_val"])]
    return None if None in numbers or not numbers else (f"hardtanh({numbers[0]},{numbers[1]})", [], False)


def _group_norm(node: Node) -> Optional[Word]:
    names = ("input", "num_groups", "weight", "bias", "eps")
    bound = _bound(node, names, {"weight": None, "bias": None, "eps": 1e-5})
    if bound is None or not isinstance(bound["num_groups"], int) or not isinstance(bound["eps"], float):
        return None
    affine = [bound["weight"], bound["bias"]]
    if (affine[0] is None) != (affine[1] is None):
        return None
    if affine[0] is None:
        return (f"group_norm({bound['num_groups']},eps={bound['eps']!r})", [], True)
    return (f"group_norm({bound['num_groups']},eps={bound['eps']!r},affine)", affine, True)


def _batch_norm(node: Node) -> Optional[Word]:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    defaults = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    bound = _bound(node, names, defaults)
    if bound is None or bound["training"] is not False or bound["running_mean"] is None or bound["running_var"] is None:
        return None
    affine = [bound["weight"], bound["bias"]]
    if (affine[0] is None) != (affine[1] is None) or not isinstance(bound["eps"], float):
        return None
    given = [bound["running_mean"], bound["running_var"]]
    if affine[0] is None:
        return (f"batch_norm(eps={bound['eps']!r})", given, True)
    return (f"batch_norm(eps={bound['eps']!r},affine)", given + affine, True)


_WORDS: Dict[Any, Callable[[Node], Optional[Word]]] = {
    F.relu: _simple("relu"),
    torch.relu: _simple("relu", ("input",)),
    F.leaky_relu: _scalar("leaky_relu", "negative_slope", 0.01),
    torch._C._nn.leaky_relu: _scalar("leaky_relu", "negative_slope", 0.01),
    F.elu: _scalar("elu", "alpha", 1.0),
    F.gelu: _gelu,
    F.silu: _simple("silu"),
    F.mish: _simple("mish"),
    F.sigmoid: _simple("sigmoid", ("input",)),
    torch.sigmoid: _simple("sigmoid", ("input",)),
    F.tanh: _simple("tanh", ("input",)),
    torch.tanh: _simple("tanh", ("input",)),
    F.hardswish: _simple("hardswish"),
    F.hardsigmoid: _simple("hardsigmoid"),
    F.hardtanh: _hardtanh,
    F.relu6: _simple("hardtanh(0,6)"),
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
}
_METHODS: Dict[str, str] = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "tanh": "tanh"}


def _word(node: Node) -> Optional[Word]:
    if node.op == "call_method" and node.target in _METHODS and len(node.args) == 1 and not node.kwargs:
        return (_METHODS[node.target], [], False)
    if node.op == "call_function" and node.target in _WORDS:
        return _WORDS[node.target](node)
    if node.op == "call_function" and node.target in (operator.mul, torch.mul) and len(node.args) == 2:
        number = _number(node.args[1])
        return None if number is None else (f"scale({number})", [], False)
    return None


# --- Rewriting --------------------------------------------------------------------------------------------------------


def rewrite(module: GraphModule) -> int:
    """Replaces the transposed convolutions of a captured graph, with the chains that follow them; returns how many."""
    _inline_modules(module)
    graph = module.graph
    count = 0
    # Autocast gives the operations of a chain dtypes of their own; under it only the calls are replaced.
    mixed = functional._any_autocast is None or functional._any_autocast()
    mixed = mixed or any(n.target is torch.amp.autocast_mode._enter_autocast for n in graph.nodes)
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _CALLS:
            continue
        bound = _bound(node, _SIGNATURE, _DEFAULTS)
        if bound is None:
            continue
        count += 1
        words, operands, last = ([], [], node) if mixed else _following(node)
        if not words or not _plain_numbers(*(bound[name] for name in _SIGNATURE[3:])):
            node.target = _CALLS[node.target]
            continue
        with graph.inserting_before(last):
            call = graph.call_function(fused_call, (*(bound[name] for name in _SIGNATURE), operands, " ".join(words)))
        call.meta = dict(last.meta)
        last.replace_all_uses_with(call)
        while last is not node:
            before = last.args[0] if last.args else last.kwargs["input"]
            graph.erase_node(last)
            last = before
        graph.erase_node(node)
    if count:
        graph.lint()
        module.recompile()
    return count


def _inline_modules(module: GraphModule) -> None:
    """Layers that the graph calls as modules (PyTorch before 2.5) become calls with their parameters."""
    graph = module.graph

    def attribute(target: str, name: str, owner: Any) -> Any:
        return None if getattr(owner, name) is None else graph.get_attr(f"{target}.{name}")

    for node in list(graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        layer: Any = module.get_submodule(node.target)
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
            continue
        kind = type(layer)
        with graph.inserting_before(node):
            if kind in _LAYERS:
                function: Any = _LAYERS[kind]
                weights = [attribute(node.target, name, layer) for name in ("weight", "bias")]
                rest = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
                call = graph.call_function(function, (node.args[0], *weights, *rest))
            elif kind is torch.nn.GroupNorm:
                weights = [attribute(node.target, name, layer) for name in ("weight", "bias")]
                call = graph.call_function(F.group_norm, (node.args[0], layer.num_groups, *weights, layer.eps))
            elif kind in _ACTIVATIONS:
                function, names = _ACTIVATIONS[kind]
                keywords = {name: getattr(layer, name) for name in names}
                call = graph.call_function(function, (node.args[0],), keywords)
            else:
                continue
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)


_LAYERS: Dict[type, Any] = {
    torch.nn.ConvTranspose1d: F.conv_transpose1d,
    torch.nn.ConvTranspose2d: F.conv_transpose2d,
    torch.nn.ConvTranspose3d: F.conv_transpose3d,
}
_ACTIVATIONS: Dict[type, Tuple[Any, Tuple[str, ...]]] = {
    torch.nn.ReLU: (F.relu, ("inplace",)),
    torch.nn.LeakyReLU: (F.leaky_relu, ("negative_slope", "inplace")),
    torch.nn.GELU: (F.gelu, ("approximate",)),
    torch.nn.SiLU: (F.silu, ("inplace",)),
    torch.nn.Sigmoid: (torch.sigmoid, ()),
    torch.nn.Tanh: (torch.tanh, ()),
}


def _following(node: Node) -> Tuple[List[str], List[Any], Node]:
    words: List[str] = []
    operands: List[Any] = []
    normed = False
    last = node
    while len(last.users) == 1:
        following = next(iter(last.users))
        first = following.args[0] if following.args else following.kwargs.get("input")
        if first is not last or sum(a is last for a in following.all_input_nodes) != 1:
            break
        if following.op == "call_function" and following.target in (operator.mul, torch.mul):
            if following.args[0] is not last or any(isinstance(a, Node) for a in following.args[1:]):
                break
        word = _word(following)
        if word is None or (word[2] and normed) or len(operands) + len(word[1]) > 16:
            break
        words.append(word[0])
        operands += word[1]
        normed = normed or word[2]
        last = following
    return words, operands, last


def compile_backend(module: GraphModule, example_inputs: List[Tensor], **options: Any) -> Callable[..., Any]:
    """The backend itself, registered as ``"tconv"``."""
    from torch._inductor.compile_fx import compile_fx

    rewrite(module)
    return compile_fx(module, example_inputs, **options)


def register() -> None:
    """Makes the name ``"tconv"`` known where the package's entry point is not installed."""
    import sys

    # torch._dynamo takes a second to import; the entry point serves those who have not done so.
    if "torch._dynamo" not in sys.modules:
        return
    from torch._dynamo.backends.registry import register_backend

    try:
        register_backend(compile_backend, name="tconv")
    except (AssertionError, ValueError):
        pass


register()


# --- Export -----------------------------------------------------------------------------------------------------------


def decompositions() -> Dict[Any, Callable[..., Any]]:
    """For ``program.run_decompositions(tconv.decompositions())``: tconv's operators in terms of ``aten``.

    An exported program then needs no tconv where it runs, and converts to ONNX and the like. Nothing else uses this.

    Example::

        >>> import torch, tconv
        >>> layer = tconv.nn.ConvTranspose2d(4, 4, 2, stride=2)
        >>> program = torch.export.export(layer, (torch.randn(1, 4, 8, 8),))
        >>> portable = program.run_decompositions(tconv.decompositions())
    """

    def conv_transpose(x: Tensor, w: Tensor, bias: Optional[Tensor], *rest: Any) -> Tensor:
        groups, stride, padding, output_padding, dilation, _ = rest
        unbatched = x.dim() == w.dim() - 1
        y = torch.ops.aten.convolution(
            x.unsqueeze(0) if unbatched else x, w, bias, stride, padding, dilation, True, output_padding, groups
        )
        return y.squeeze(0) if unbatched else y

    def fused(x: Tensor, w: Tensor, bias: Optional[Tensor], operands: List[Tensor], chain: str, *rest: Any) -> Tensor:
        from . import _chain

        return _chain.compose(chain, lambda t: conv_transpose(t, w, bias, *rest), x, operands, w.dim() - 2)

    def fused_training(*arguments: Any) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        y = fused(*arguments)  # an exported forward uses the first result only
        empty = y.new_empty(0)
        return y, empty, empty, empty

    ops = torch.ops.tconv
    return {
        ops.conv_transpose.default: conv_transpose,
        ops.fused.default: fused,
        ops.fused_training.default: fused_training,
    }
