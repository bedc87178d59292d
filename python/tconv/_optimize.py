"""``tconv.optimize``: a model's transposed convolutions swapped and fused in place, with a report of every decision.

Parameters, state_dict keys, hooks, parametrizations and the training flag stay. What a fused layer absorbs remains in
the model under its own name, with its own parameters, as a module that passes its input through.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple, TypeVar

import torch
from torch import Tensor, nn

from . import _chain, _core
from . import nn as tnn
from ._fused import MAX_OPERANDS

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Line:
    path: str
    action: str  # swapped, fused, left
    text: str


@dataclass
class Report:
    """What ``optimize`` did to a model, and what it left and why. Prints as a table."""

    lines: List[Line] = field(default_factory=list)

    def add(self, path: str, action: str, text: str) -> None:
        self.lines.append(Line(path or "(the model)", action, text))

    def of(self, action: str) -> List[Line]:
        return [line for line in self.lines if line.action == action]

    def __str__(self) -> str:
        if not self.lines:
            return "tconv.optimize: the model has no transposed convolution"
        width = max(len(line.path) for line in self.lines)
        head = ", ".join(f"{len(self.of(action))} {action}" for action in ("swapped", "fused", "left"))
        rows = [f"  {line.path:<{width}}  {line.action:<7}  {line.text}" for line in self.lines]
        return "\n".join([f"tconv.optimize: {head}", *rows])


# --- Absorbed modules -------------------------------------------------------------------------------------------------


class Absorbed:
    """A module whose work a fused layer does. Its parameters are in use; its forward passes its input through."""

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        return input

    def apply_alone(self, input: Tensor) -> Tensor:
        """What the module computes by itself."""
        return super().forward(input)  # type: ignore[misc]

    def extra_repr(self) -> str:
        own = super().extra_repr()  # type: ignore[misc]
        return f"{own}, fused" if own else "fused"


_ABSORBED: Dict[type, type] = {}
for _base in list(_chain.RULES):
    _class = type(f"Absorbed{_base.__name__}", (Absorbed, _base), {"__module__": __name__, "__doc__": Absorbed.__doc__})
    globals()[_class.__name__] = _class
    _ABSORBED[_base] = _class
    _chain.RULES[_class] = _chain.RULES[_base]


class _FusedLayer:
    """A transposed convolution that also does the work of its neighbours in the model."""

    tconv_pre: Tuple[nn.Module, ...]
    tconv_ops: Tuple[nn.Module, ...]
    _recipe: tnn.Recipe

    def forward(self: Any, input: Tensor, output_size: Optional[List[int]] = None) -> Tensor:
        if output_size is not None:
            raise ValueError(
                f"{type(self).__name__}: output_size cannot be given to a layer that tconv.optimize has fused"
            )
        return tnn.run_chain(self, self._recipe, list(self.tconv_ops), input, ())

    def extra_repr(self: Any) -> str:
        def names(modules: Sequence[nn.Module]) -> str:
            return ", ".join(type(m).__name__.removeprefix("Absorbed") for m in modules)

        text = super().extra_repr()  # type: ignore[misc]
        if self.tconv_pre:
            text += f", pre=[{names(self.tconv_pre)}]"
        return f"{text}, ops=[{names(self.tconv_ops)}]" if self.tconv_ops else text

    def __getstate__(self: Any) -> dict:
        state = self.__dict__.copy()
        state.pop("_recipe", None)
        return state

    def __setstate__(self: Any, state: dict) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self._recipe = tnn.Recipe(self, self.tconv_pre, self.tconv_ops)


class FusedConvTranspose1d(_FusedLayer, tnn.ConvTranspose1d):
    """``ConvTranspose1d`` and its neighbours; see :func:`optimize`."""


class FusedConvTranspose2d(_FusedLayer, tnn.ConvTranspose2d):
    """``ConvTranspose2d`` and its neighbours; see :func:`optimize`."""


class FusedConvTranspose3d(_FusedLayer, tnn.ConvTranspose3d):
    """``ConvTranspose3d`` and its neighbours; see :func:`optimize`."""


_SWAPS: Dict[type, type] = {
    nn.ConvTranspose1d: tnn.ConvTranspose1d,
    nn.ConvTranspose2d: tnn.ConvTranspose2d,
    nn.ConvTranspose3d: tnn.ConvTranspose3d,
    nn.LazyConvTranspose1d: tnn.LazyConvTranspose1d,
    nn.LazyConvTranspose2d: tnn.LazyConvTranspose2d,
    nn.LazyConvTranspose3d: tnn.LazyConvTranspose3d,
}
_FUSED: Dict[type, type] = {
    tnn.ConvTranspose1d: FusedConvTranspose1d,
    tnn.ConvTranspose2d: FusedConvTranspose2d,
    tnn.ConvTranspose3d: FusedConvTranspose3d,
}


# --- Swapping ---------------------------------------------------------------------------------------------------------


def _base_type(module: nn.Module) -> type:
    """The type behind the class that torch.nn.utils.parametrize puts in front."""
    if torch.nn.utils.parametrize.is_parametrized(module):
        return type(module).__bases__[0]
    return type(module)


def _become(module: nn.Module, target: type) -> None:
    """Changes the class of a module in place; parametrized modules keep their generated properties."""
    current = type(module)
    if torch.nn.utils.parametrize.is_parametrized(module):
        members = {k: v for k, v in current.__dict__.items() if k not in ("__dict__", "__weakref__")}
        target = type(f"Parametrized{target.__name__}", (target,), members)
    module.__class__ = target


def _why_not_swapped(module: nn.Module) -> Optional[str]:
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit; optimize before scripting"
    base = _base_type(module)
    if base not in _SWAPS:
        return f"{base.__name__} is a class of its own; only torch.nn's exact types are swapped"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    weight = None if isinstance(module, nn.modules.lazy.LazyModuleMixin) else getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        if weight.dtype not in _core.DTYPE_CODES:
            return f"dtype {weight.dtype} is not supported"
        if weight.device.type not in ("cpu", "cuda", "meta"):
            return f"device {weight.device} is not supported"
    return None


# --- Fusing -----------------------------------------------------------------------------------------------------------


def _hooked(module: nn.Module, pre_hooks: bool = True) -> bool:
    return bool(
        module._forward_hooks
        or module._backward_hooks
        or getattr(module, "_backward_pre_hooks", None)
        or (pre_hooks and module._forward_pre_hooks)
    )


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


# Names under which networks define a layer normalisation over the channels of (N, C, ...).
_CHANNEL_NORMS = {"LayerNorm2d", "LayerNorm3d", "LayerNormNd", "LayerNormChannels", "SamLayerNorm", "ConvNextLayerNorm"}


def _as_channel_norm(module: nn.Module, channels: int, rank: int) -> Optional[nn.Module]:
    """The module as a ChannelLayerNorm over the same parameters, if it computes that; found out by trying it."""
    if type(module).__name__ not in _CHANNEL_NORMS or isinstance(module, tnn.ChannelLayerNorm):
        return None
    state = dict(module.named_parameters())
    if set(state) != {"weight", "bias"} or any(True for _ in module.buffers()):
        return None
    weight, eps = module.weight, getattr(module, "eps", getattr(module, "variance_epsilon", None))
    if not isinstance(eps, float) or not isinstance(weight, Tensor) or tuple(weight.shape) != (channels,):
        return None
    if weight.is_meta or weight.dtype not in (torch.float32, torch.float64):
        return None
    same = tnn.ChannelLayerNorm(channels, eps)
    same.weight, same.bias = module.weight, module.bias  # type: ignore[assignment]
    same.train(module.training)
    count = 2 * channels * 3**rank
    probe = torch.linspace(-1, 1, count, dtype=weight.dtype, device=weight.device).cos().mul(7).sin()
    probe = probe.reshape(2, channels, *(3,) * rank)
    try:
        with torch.no_grad():
            alike = torch.allclose(module(probe), same(probe), atol=1e-5, rtol=1e-4)
    except Exception:  # it wants other inputs, then it is something else
        return None
    return same if alike else None


class _Optimizer:
    def __init__(self, model: nn.Module, fuse: bool) -> None:
        self.model = model
        self.fuse = fuse
        self.report = Report()
        self.uses: Dict[int, int] = {}
        for _, module in model.named_modules(remove_duplicate=False):
            self.uses[id(module)] = self.uses.get(id(module), 0) + 1
        self.reasons: Dict[int, str] = {}  # why a chain ended, per convolution
        self.stand_ins: Dict[
            int, Tuple[nn.Module, nn.Module]
        ] = {}  # own norm classes, as tconv's over the same weights

    def run(self) -> Report:
        convolutions: List[Tuple[str, nn.Module]] = []
        for path, module in self.model.named_modules():
            if isinstance(module, (tnn._TransposedConvolution, tnn.Fused)):
                if not isinstance(module, _FusedLayer):
                    convolutions.append((path, module))
                continue
            if not isinstance(module, nn.modules.conv._ConvTransposeNd):
                continue
            reason = _why_not_swapped(module)
            if reason is not None:
                self.report.add(path, "left", reason)
                continue
            _become(module, _SWAPS[_base_type(module)])
            self.report.add(path, "swapped", type(module).__name__)
            convolutions.append((path, module))
        if self.fuse:
            for path, module in list(self.model.named_modules()):
                if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
                    self.fuse_sequential(path, module)
            for path, module in list(self.model.named_modules()):
                self.fuse_traced(path, module)
            for path, module in convolutions:
                if id(module) in self.reasons and not isinstance(module, _FusedLayer):
                    self.report.add(path, "left", f"not fused: {self.reasons[id(module)]}")
        return self.report

    def fusable_layer(self, module: nn.Module) -> bool:
        if _base_type(module) not in _FUSED:
            return False
        if self.uses.get(id(module), 1) > 1:
            self.reasons[id(module)] = "the layer is used in more than one place"
            return False
        if _hooked(module, pre_hooks=False):
            self.reasons[id(module)] = "the layer has hooks on its output"
            return False
        return True

    def word(self, module: nn.Module, channels: int, normed: bool, rank: int) -> Any:
        """The module as part of a chain, or the reason against."""
        if id(module) not in self.stand_ins and self.uses.get(id(module), 1) == 1 and not _hooked(module):
            stand_in = _as_channel_norm(module, channels, rank)
            if stand_in is not None:
                self.stand_ins[id(module)] = (module, stand_in)
        module = self.stand_ins.get(id(module), (module, module))[1]
        if isinstance(module, Absorbed) or type(module) not in _ABSORBED:
            return f"{type(module).__name__} cannot be fused"
        if isinstance(module, (tnn.Add, tnn.Multiply)):
            return f"{type(module).__name__} takes a second argument"
        if _hooked(module):
            return f"{type(module).__name__} has hooks"
        if "forward" in module.__dict__:
            return f"the forward of {type(module).__name__} was replaced on the instance"
        if self.uses.get(id(module), 1) > 1 and _has_state(module):
            return f"{type(module).__name__} is used in more than one place"
        answer = _chain.describe(module, channels)
        if isinstance(answer, _chain.Described) and answer.norm and normed:
            return f"{type(module).__name__} would be the chain's second normalisation"
        return answer

    def follow(self, conv: Any, candidates: Sequence[nn.Module]) -> List[nn.Module]:
        """The longest run of candidates that the layer can take."""
        taken: List[nn.Module] = []
        operands = 0
        normed = False
        for module in candidates:
            answer = self.word(module, conv.out_channels, normed, len(conv.kernel_size))
            if isinstance(answer, str):
                self.reasons.setdefault(id(conv), answer)
                break
            operands += 4 if answer.statistics else 2 if answer.norm else 1
            if operands > MAX_OPERANDS:
                break
            normed = normed or answer.norm
            taken.append(module)
        if not candidates:
            self.reasons.setdefault(id(conv), "nothing follows it")
        return taken

    def lead(self, conv: Any, candidates: Sequence[nn.Module]) -> List[nn.Module]:
        """The modules right before the layer that it can apply while it reads. The last candidate is the nearest."""
        taken: List[nn.Module] = []
        for at in range(len(candidates) - 1, -1, -1):
            module = candidates[at]
            answer = self.word(module, conv.in_channels, True, len(conv.kernel_size))
            if isinstance(answer, str) or answer.operands is not _chain._no_operands:
                break
            if getattr(module, "inplace", False):
                # It also changes the tensor that its producer gave away: a skip connection may rely on that.
                fresh = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.Linear)
                if at == 0 or not isinstance(candidates[at - 1], fresh):
                    break
            taken.insert(0, module)
        return taken

    def install(
        self, path: str, conv: Any, pre: Sequence[Tuple[nn.Module, str, nn.Module]], ops: Sequence[Tuple[Any, str, Any]]
    ) -> None:
        """Each neighbour is (its parent, its name there, the module)."""

        def absorb(parent: nn.Module, name: str, module: nn.Module) -> nn.Module:
            if id(module) in self.stand_ins:
                module = self.stand_ins[id(module)][1]
                parent._modules[name] = module
            elif self.uses.get(id(module), 1) > 1:  # stateless and shared: only this place changes
                module = copy.copy(module)
                parent._modules[name] = module
            module.__class__ = _ABSORBED[type(module)]
            return module

        conv.tconv_pre = tuple(absorb(*entry) for entry in pre)
        conv.tconv_ops = tuple(absorb(*entry) for entry in ops)
        _become(conv, _FUSED[_base_type(conv)])
        conv._recipe = tnn.Recipe(conv, conv.tconv_pre, conv.tconv_ops)
        names = [type(m).__name__.removeprefix("Absorbed") for m in (*conv.tconv_pre, conv, *conv.tconv_ops)]
        names[len(pre)] = names[len(pre)].replace("FusedConv", "Conv").replace("Parametrized", "")
        text = " -> ".join(names)
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in conv.tconv_ops):
            text += " (BatchNorm in eval mode; in training mode it and what follows run on their own)"
        if id(conv) in self.reasons:
            text += f"; ends there: {self.reasons[id(conv)]}"
        self.report.add(path, "fused", text)

    def fuse_sequential(self, path: str, sequential: nn.Sequential) -> None:
        names = list(sequential._modules)
        modules = [m for m in sequential._modules.values()]
        if any(m is None for m in modules) or self.uses.get(id(sequential), 1) > 1:
            return
        for at, conv in enumerate(modules):
            if conv is None or not self.fusable_layer(conv):
                continue
            followers = self.follow(conv, modules[at + 1 :])
            leaders = self.lead(conv, modules[:at])
            if not followers and not leaders:
                continue
            pre = [(sequential, names[i], modules[i]) for i in range(at - len(leaders), at)]
            ops = [(sequential, names[i], modules[i]) for i in range(at + 1, at + 1 + len(followers))]
            self.install(f"{path}.{names[at]}" if path else names[at], conv, pre, ops)
            modules = [m for m in sequential._modules.values()]

    def fuse_traced(self, path: str, parent: nn.Module) -> None:
        """Chains in a forward of Python code, found by torch.fx: modules called one after the other, each once."""
        if isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict, tnn.Fused)):
            return
        layers = {name: m for name, m in parent.named_children() if self.fusable_layer(m)}
        if not layers or self.uses.get(id(parent), 1) > 1:
            return
        chains = []
        for training in (True, False):  # a branch on self.training must not decide what is absorbed
            found = _traced_chains(parent, set(layers), training)
            if isinstance(found, str):
                for module in layers.values():
                    self.reasons.setdefault(id(module), f"its neighbours are unknown ({found})")
                return
            chains.append(found)
        for name, conv in layers.items():
            before, after = (chains[0].get(name), chains[1].get(name))
            if before is None or before != after:
                self.reasons.setdefault(id(conv), "it is not called exactly once with one argument")
                continue
            candidates = [getattr(parent, n) for n in before]
            followers = self.follow(conv, candidates)
            if followers:
                ops = [(parent, n, getattr(parent, n)) for n in before[: len(followers)]]
                self.install(f"{path}.{name}" if path else name, conv, [], ops)


def _traced_chains(parent: nn.Module, layers: set, training: bool) -> Any:
    """layer -> names of the children called on its result, one after the other; or why that cannot be known."""

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return True

    kept = dict(parent.__dict__)
    kept_tables = {k: dict(v) for k, v in kept.items() if k in ("_parameters", "_buffers", "_modules")}
    try:
        parent.training = training
        graph = Tracer().trace(parent)
    except Exception as error:  # any Python code may refuse proxies in any way
        return f"torch.fx cannot trace {type(parent).__name__}.forward: {type(error).__name__}"
    finally:  # what the forward stored on the module would be proxies
        parent.__dict__.clear()
        parent.__dict__.update(kept)
        for key, table in kept_tables.items():
            parent.__dict__[key].clear()
            parent.__dict__[key].update(table)
    calls: Dict[str, List[Any]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(node.target, []).append(node)
    chains: Dict[str, List[str]] = {}
    for layer in layers:
        nodes = calls.get(layer, [])
        if len(nodes) != 1 or len(nodes[0].args) != 1 or nodes[0].kwargs:
            continue
        chain: List[str] = []
        node = nodes[0]
        while len(node.users) == 1:
            following = next(iter(node.users))
            name = following.target
            if following.op != "call_module" or "." in name or len(calls[name]) != 1:
                break
            if tuple(following.args) != (node,) or following.kwargs:
                break
            chain.append(name)
            node = following
        chains[layer] = chain
    return chains


def optimize(model: Model, *, fuse: bool = True, verbose: bool = False) -> Model:
    """Swaps every transposed convolution of a model for tconv's and fuses what surrounds it, in place.

    Exact types of :mod:`torch.nn` only. Chains are fused where they are certain: consecutive members of an
    ``nn.Sequential``, and children that a module's forward calls one after the other (found with :mod:`torch.fx`).
    Parameters, state_dict keys, hooks, parametrizations and the training flag stay as they are.

    Args:
        model: any module; it is changed in place.
        fuse: whether to fuse chains, or only to swap layers.
        verbose: print the report.

    Returns:
        The model. ``model.tconv_report`` says what was done, and what was left and why; it prints as a table.

    Example::

        >>> import torch, tconv
        >>> model = torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 8, 2, stride=2), torch.nn.ReLU())
        >>> print(tconv.optimize(model).tconv_report)
        tconv.optimize: 1 swapped, 1 fused, 0 left
          0  swapped  ConvTranspose2d
          0  fused    ConvTranspose2d -> ReLU
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize(): argument 'model' must be torch.nn.Module, not {type(model).__name__}")
    report = _Optimizer(model, fuse).run()
    if not isinstance(model, torch.jit.ScriptModule):
        model.tconv_report = report  # type: ignore[assignment]
    if verbose:
        print(report)
    return model
