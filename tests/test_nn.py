"""tconv.nn: layers, Fused chains, their gradients, autocast, compile, state."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import tconv
from tconv import _C, _chain

C = 8  # output channels of the blocks below


def ops_by_name() -> dict[str, list[nn.Module]]:
    """One chain per operation of the core, and some that real networks have."""
    return {
        "relu": [nn.ReLU()],
        "leaky_relu": [nn.LeakyReLU(0.2)],
        "elu": [nn.ELU(0.7)],
        "gelu": [nn.GELU()],
        "gelu_tanh": [nn.GELU(approximate="tanh")],
        "silu": [nn.SiLU()],
        "mish": [nn.Mish()],
        "sigmoid": [nn.Sigmoid()],
        "tanh": [nn.Tanh()],
        "softplus": [nn.Softplus()],
        "hardswish": [nn.Hardswish()],
        "hardsigmoid": [nn.Hardsigmoid()],
        "clamp": [tconv.nn.Clamp(-0.1, 0.3)],
        "clamp from above": [tconv.nn.Clamp(max=0.3)],
        "hardtanh": [nn.Hardtanh(-0.2, 0.2)],
        "relu6": [nn.ReLU6()],
        "scale": [tconv.nn.Scale(1.5)],
        "add": [tconv.nn.AddConstant(-0.25)],
        "scale_channel": [tconv.nn.ScaleChannel(C)],
        "add_channel": [tconv.nn.AddChannel(C)],
        "prelu": [nn.PReLU(C)],
        "prelu of one": [nn.PReLU()],
        "add_tensor": [tconv.nn.Add()],
        "scale_tensor": [tconv.nn.Multiply()],
        "group_norm": [nn.GroupNorm(4, C)],
        "group_norm plain": [nn.GroupNorm(2, C, affine=False)],
        "instance_norm": [nn.InstanceNorm2d(C)],
        "instance_norm affine": [nn.InstanceNorm2d(C, affine=True)],
        "layer_norm": [tconv.nn.ChannelLayerNorm(C)],
        "batch_norm": [nn.BatchNorm2d(C).eval()],
        "batch_norm training": [nn.BatchNorm2d(C)],
        "batch_norm in the middle, training": [nn.ReLU(), nn.BatchNorm2d(C), nn.GELU()],
        "identity": [nn.Identity(), nn.ReLU()],
        "S4": [nn.GELU(), nn.GroupNorm(4, C)],
        "SAM": [tconv.nn.ChannelLayerNorm(C), nn.GELU()],
        "PointPillars": [nn.BatchNorm2d(C).eval(), nn.ReLU()],
        "VISTA": [nn.InstanceNorm2d(C), nn.GELU()],
        "residual": [nn.SiLU(), tconv.nn.Add(), nn.GroupNorm(2, C), tconv.nn.Multiply(), nn.Tanh()],
        "as many operands as there may be": [nn.PReLU(C, init=0.9) for _ in range(16)],
        "long": [nn.SiLU(), tconv.nn.AddChannel(C), nn.GroupNorm(4, C), nn.PReLU(C), tconv.nn.Scale(0.5), nn.ELU()],
    }


def block(name: str, device: str, dtype: torch.dtype, pre: bool = False):
    """(fused, the modules one after the other, extra arguments)."""
    ops = [op.to(device, dtype) for op in ops_by_name()[name]]
    for op in ops:
        for parameter in op.parameters():
            nn.init.uniform_(parameter, 0.2, 1.0)
        if isinstance(op, nn.BatchNorm2d):
            nn.init.uniform_(op.running_mean, -0.5, 0.5)
            nn.init.uniform_(op.running_var, 0.5, 1.5)
    layer = tconv.nn.ConvTranspose2d(4, C, 3, stride=2, padding=1).to(device, dtype)
    before = [nn.LeakyReLU(0.1), nn.Tanh()] if pre else []
    reference = copy.deepcopy((layer, before, ops))

    def unfused(x, *extra):
        conv, lead, follow = reference
        remaining = list(extra)
        for module in lead:
            x = module(x)
        x = nn.functional.conv_transpose2d(x, conv.weight, conv.bias, 2, 1)
        for module in follow:
            residual = isinstance(module, (tconv.nn.Add, tconv.nn.Multiply))
            x = module(x, remaining.pop(0)) if residual else module(x)
        return x

    parameters = [p for m in (reference[0], *reference[2]) for p in m.parameters()]
    count = sum(isinstance(op, (tconv.nn.Add, tconv.nn.Multiply)) for op in ops)
    extra = [torch.rand(2, C, 9, 11, device=device, dtype=dtype, requires_grad=True) for _ in range(count)]
    return tconv.nn.Fused(layer, ops, before), unfused, parameters, extra


def test_every_operation_of_the_core_is_covered() -> None:
    names = {operation["name"] for operation in _C.operations()}
    words = set()
    for ops in ops_by_name().values():
        for op in ops:
            answer = _chain.describe(op, C)
            assert not isinstance(answer, str), answer
            words.add(answer.text.split("(")[0])
    assert names <= words, f"no test for {names - words}"
    assert {w for w in words if w} <= names
    for operation in _C.operations():  # the two descriptions of operands agree
        word = _chain.Word(operation["name"])
        given = {"none": 0, "channel": 1, "tensor": 1}[operation["operand"]]
        assert operation["norm"] or _chain.num_operands(word) == given


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("name", ops_by_name())
def test_chain_equals_its_modules(name: str, pre: bool, channels_last: bool, device: str) -> None:
    if device == "cuda" and pre != channels_last:
        pytest.skip("half of the combinations, because each compiles its kernels")
    fused, unfused, parameters, extra = block(name, device, torch.float64, pre)
    x = torch.rand(2, 4, 5, 6, device=device, dtype=torch.float64).sub_(0.5)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    expected = unfused(x, *extra)
    y = fused(x, *extra)
    torch.testing.assert_close(y, expected)
    if "training" not in name:
        assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    with torch.no_grad():
        torch.testing.assert_close(fused(x, *extra), expected)
    grad = torch.rand_like(expected)
    mine = torch.autograd.grad(y, [x, *fused.parameters(), *extra], grad)
    other = torch.autograd.grad(expected, [x, *parameters, *extra], grad)
    # PyTorch's hardsigmoid backward multiplies by 1/6 in fp32, whatever the dtype.
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if name == "hardsigmoid" else {}
    for a, e in zip(mine, other):
        torch.testing.assert_close(a, e, **tolerance)


@pytest.mark.parametrize("name", ["S4", "residual", "layer_norm", "prelu of one", "batch_norm", "long"])
def test_second_derivatives_of_a_chain(name: str, device: str) -> None:
    fused, _, _, _ = block(name, device, torch.float64, pre=True)
    x = torch.rand(1, 4, 2, 2, device=device, dtype=torch.float64, requires_grad=True)
    count = sum(isinstance(op, (tconv.nn.Add, tconv.nn.Multiply)) for op in fused.ops)
    extra = [torch.rand(1, C, 3, 3, device=device, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    inputs = (x, *extra, *fused.parameters())

    def call(x, *rest):
        return fused(x, *rest[:count])

    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


def test_second_derivative_when_the_input_comes_from_the_weight(device: str) -> None:
    """The gradient by the weight must not also flow through an input computed from that weight."""
    layer = tconv.nn.ConvTranspose2d(2, 2, 2).double().to(device)
    fused = tconv.nn.Fused(layer, [nn.SiLU()])

    def loss(convolve):
        x = layer.weight.square().reshape(1, 2, 4, 2)
        (g,) = torch.autograd.grad(convolve(x).sin().sum(), layer.weight, create_graph=True)
        return torch.autograd.grad(g.square().sum(), layer.weight)[0]

    torch.testing.assert_close(loss(fused), loss(lambda x: nn.functional.silu(layer(x))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["S4", "residual", "SAM", "PointPillars", "softplus"])
def test_sixteen_bits(name: str, dtype: torch.dtype, device: str) -> None:
    fused, unfused, parameters, extra = block(name, device, torch.float32)
    x = torch.rand(2, 4, 5, 6, device=device, requires_grad=True)
    exact = unfused(x, *extra)
    other = torch.autograd.grad(exact.sum(), [x, *parameters])
    half = fused.to(dtype)
    x16 = x.detach().to(dtype).requires_grad_()
    y = half(x16, *(t.detach().to(dtype) for t in extra))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, atol=6e-2, rtol=6e-2)
    for a, e in zip(torch.autograd.grad(y.float().sum(), [x16, *half.parameters()]), other):
        assert a.dtype == dtype
        assert (a.float() - e).norm() <= 8e-2 * e.norm() + 0.2


@pytest.mark.parametrize("name", ["S4", "SAM", "VISTA", "PointPillars", "softplus", "residual", "prelu", "add_channel"])
def test_autocast_returns_the_dtype_of_the_modules(name: str, device: str) -> None:
    fused, unfused, _, extra = block(name, device, torch.float32)
    x = torch.rand(2, 4, 5, 6, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        try:
            expected = unfused(x, *extra)
        except RuntimeError:
            pytest.skip("PyTorch itself refuses this chain under autocast")
        y = fused(x, *extra)
    if name != "add_channel":  # bf16 + an fp32 parameter is fp32 in PyTorch; a chain stays in the layer's dtype
        assert y.dtype == expected.dtype
    torch.testing.assert_close(y.float(), expected.float(), atol=6e-2, rtol=6e-2)
    grads = torch.autograd.grad(y.float().sum(), list(fused.parameters()))
    assert all(g.dtype == p.dtype for g, p in zip(grads, fused.parameters()))


@pytest.mark.parametrize("name", ["S4", "residual", "SAM", "batch_norm", "batch_norm training", "prelu of one"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_chain(name: str, backend: str, device: str) -> None:
    torch._dynamo.reset()
    if backend == "inductor" and name not in ("S4", "residual"):
        pytest.skip("covered by aot_eager")
    fused, unfused, parameters, extra = block(name, device, torch.float64, pre=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(fused, backend=counter, fullgraph=True, dynamic=True)
    for height, width in ((5, 6), (4, 7), (9, 3)):
        x = torch.rand(2, 4, height, width, device=device, dtype=torch.float64, requires_grad=True)
        size = (2, C, 2 * height - 1, 2 * width - 1)
        extra = [torch.rand(size, device=device, dtype=torch.float64, requires_grad=True) for _ in extra]
        y, expected = compiled(x, *extra), unfused(x, *extra)
        torch.testing.assert_close(y, expected)
        grad = torch.rand_like(expected)
        mine = torch.autograd.grad(y, [x, *fused.parameters(), *extra], grad)
        other = torch.autograd.grad(expected, [x, *parameters, *extra], grad)
        for a, e in zip(mine, other):
            torch.testing.assert_close(a, e)
    # PyTorch's own BatchNorm in training mode compiles twice with dynamic=True.
    assert counter.frame_count <= (2 if "training" in name else 1)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("chain", ["pre:silu gelu group_norm(4,eps=1e-05,affine)", "relu layer_norm(eps=1e-05,affine)"])
def test_opcheck_of_chains(chain: str, channels_last: bool, device: str) -> None:
    x = torch.rand(2, 4, 4, 4, device=device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    w, b = torch.rand(4, C, 3, 3, device=device), torch.rand(C, device=device)
    operands = [torch.rand(C, device=device), torch.rand(C, device=device)]
    rest = (chain, 1, [2, 2], [0, 0], [0, 0], [1, 1], -1)
    ops = torch.ops.tconv
    torch.library.opcheck(ops.fused.default, (x, w, b, operands, *rest))
    y, raw, mean, rstd = ops.fused_training(x, w, b, operands, *rest)
    after = " ".join(t for t in chain.split() if not t.startswith("pre:"))
    arguments = (raw, torch.rand_like(y), mean, rstd, operands, after, 2, [True, False])
    torch.library.opcheck(ops.chain_backward.default, arguments)
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    torch.library.opcheck(ops.fused_training.default, (*leaves, [t.detach().requires_grad_() for t in operands], *rest))
    if "pre:" in chain:
        torch.library.opcheck(ops.apply_pre.default, (x, chain, 2))


def test_transforms_of_a_chain(device: str) -> None:
    fused, unfused, _, _ = block("S4", device, torch.float64, pre=True)
    x = torch.rand(3, 2, 4, 4, 4, device=device, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(fused)(x), torch.stack([unfused(t) for t in x]))
    tangent = torch.rand_like(x[0])
    mine, other = (torch.func.jvp(f, (x[0],), (tangent,))[1] for f in (fused, unfused))
    torch.testing.assert_close(mine, other)


def test_chain_on_unbatched_and_empty_inputs(device: str) -> None:
    fused, unfused, _, _ = block("S4", device, torch.float64)
    x = torch.rand(2, 4, 5, 6, device=device, dtype=torch.float64)
    torch.testing.assert_close(fused(x[0]), unfused(x)[0])
    assert fused(x[:0]).shape == (0, C, 9, 11)


def test_chain_gives_the_same_bits_every_time() -> None:
    fused, _, _, _ = block("long", "cpu", torch.float32, pre=True)
    x = torch.rand(2, 4, 9, 8, requires_grad=True)

    def everything() -> list[torch.Tensor]:
        y = fused(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *fused.parameters()])]

    before = torch.get_num_threads()
    try:
        first = everything()
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, e) for a, e in zip(everything(), first))
    finally:
        torch.set_num_threads(before)


def test_chain_grammar_is_checked() -> None:
    layer = tconv.nn.ConvTranspose2d(4, C, 3)
    with pytest.raises(TypeError, match="layer must be a ConvTranspose"):
        tconv.nn.Fused(nn.Conv2d(4, 4, 3), [nn.ReLU()])
    with pytest.raises(TypeError, match="Dropout; allowed: "):
        tconv.nn.Fused(layer, [nn.Dropout()])
    with pytest.raises(ValueError, match="one normalisation, got GroupNorm, BatchNorm2d"):
        tconv.nn.Fused(layer, [nn.GroupNorm(2, C), nn.BatchNorm2d(C)])
    with pytest.raises(ValueError, match="GroupNorm over 16 channels on 8"):
        tconv.nn.Fused(layer, [nn.GroupNorm(2, 16)])
    with pytest.raises(ValueError, match="pre must consist of pointwise"):
        tconv.nn.Fused(layer, [], [nn.GroupNorm(2, 4)])
    with pytest.raises(ValueError, match="pre must consist of pointwise"):
        tconv.nn.Fused(layer, [], [nn.PReLU()])
    with pytest.raises(ValueError, match="beta=2"):
        tconv.nn.Fused(layer, [nn.Softplus(beta=2)])
    fused = tconv.nn.Fused(layer, [tconv.nn.Add()])
    with pytest.raises(TypeError, match="takes 1 extra"):
        fused(torch.rand(1, 4, 3, 3))
    with pytest.raises(RuntimeError, match="must have the result's size"):
        fused(torch.rand(1, 4, 3, 3), torch.rand(1, C, 4, 4))
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        tconv.nn.Fused(layer, [nn.ReLU()])


def test_weight_norm_inside_a_chain(device: str) -> None:
    for normalise in (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm):
        layer = normalise(tconv.nn.ConvTranspose2d(4, C, 3)).to(device)
        fused = tconv.nn.Fused(layer, [nn.ReLU()])
        x = torch.rand(1, 4, 3, 3, device=device)
        before = fused(x)
        with torch.no_grad():
            for parameter in fused.parameters():
                parameter.mul_(2)
        assert not torch.allclose(before, fused(x))
        torch.testing.assert_close(fused(x), layer(x).relu())


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", ["layer", "chain"])
def test_state_travels(rank: int, kind: str, device: str) -> None:
    layer = getattr(tconv.nn, f"ConvTranspose{rank}d")(4, C, 3, stride=2, output_padding=1)
    layer.precision = "fp32"
    module = (layer if kind == "layer" else tconv.nn.Fused(layer, [nn.GELU(), nn.GroupNorm(4, C)])).to(device)
    x = torch.rand(2, 4, *(4,) * rank, device=device)
    expected = module(x)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), expected)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)
    if kind == "layer":
        theirs = getattr(torch.nn, f"ConvTranspose{rank}d")(4, C, 3, stride=2, output_padding=1).to(device)
        theirs.load_state_dict(module.state_dict())
        module.load_state_dict(theirs.state_dict())
        with torch.backends.cudnn.flags(allow_tf32=False):
            torch.testing.assert_close(expected, theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_lazy_layers_become_layers(rank: int) -> None:
    layer = getattr(tconv.nn, f"LazyConvTranspose{rank}d")(6, 3)
    assert layer(torch.rand(1, 5, *(4,) * rank)).shape[1] == 6
    assert type(layer) is getattr(tconv.nn, f"ConvTranspose{rank}d") and layer.in_channels == 5


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_output_size(rank: int) -> None:
    ours = getattr(tconv.nn, f"ConvTranspose{rank}d")(4, 6, 3, stride=2, padding=1)
    theirs = getattr(torch.nn, f"ConvTranspose{rank}d")(4, 6, 3, stride=2, padding=1)
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(1, 4, *(5,) * rank)
    for size in (9, 10):
        wanted = [size] * rank
        assert ours(x, output_size=wanted).shape == (1, 6, *wanted)
        torch.testing.assert_close(ours(x, output_size=wanted), theirs(x, output_size=wanted), atol=1e-5, rtol=1e-5)


def test_initialisation_is_pytorchs() -> None:
    for rank in (1, 2, 3):
        torch.manual_seed(7)
        theirs = getattr(torch.nn, f"ConvTranspose{rank}d")(4, 6, 3)
        torch.manual_seed(7)
        ours = getattr(tconv.nn, f"ConvTranspose{rank}d")(4, 6, 3)
        assert all(torch.equal(a, e) for a, e in zip(ours.parameters(), theirs.parameters()))
        assert isinstance(ours, type(theirs))


def test_precision_of_a_module_is_passed_on() -> None:
    layer = tconv.nn.ConvTranspose1d(2, 2, 3)
    layer.precision = "fp16"
    with pytest.raises(ValueError, match="precision must be"):
        layer(torch.rand(1, 2, 4))
