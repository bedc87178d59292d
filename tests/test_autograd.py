"""Gradients of every order, forward mode, vmap, and the operators that torch.compile and torch.export see."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import tconv

PYTORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

OURS = {1: tconv.conv_transpose1d, 2: tconv.conv_transpose2d, 3: tconv.conv_transpose3d}
THEIRS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
CONFIGS = [
    {},
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"stride": 1, "dilation": 2, "groups": 2},
    {"stride": 2, "dilation": 3, "output_padding": 2, "padding": 1},
]


def leaves(rank: int, device: str, groups: int = 1, batched: bool = True) -> tuple[torch.Tensor, ...]:
    def leaf(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, dtype=torch.float64, device=device, requires_grad=True)

    x = leaf(2, 2, *(3,) * rank) if batched else leaf(2, *(3,) * rank)
    return x, leaf(2, 2, *(2,) * rank), leaf(2 * groups)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("rank", [1, 2])
def test_gradcheck(rank: int, config: dict, device: str) -> None:
    inputs = leaves(rank, device, config.get("groups", 1))
    assert gradcheck(lambda x, w, b: OURS[rank](x, w, b, **config), inputs, check_forward_ad=True)
    assert gradgradcheck(lambda x, w, b: OURS[rank](x, w, b, **config), inputs)


def test_gradcheck_3d_unbatched(device: str) -> None:
    x = torch.rand(1, 2, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.rand(1, 1, 2, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(lambda x, w: tconv.conv_transpose3d(x, w, stride=2), (x, w))
    assert gradgradcheck(lambda x, w: tconv.conv_transpose3d(x, w, stride=2), (x, w))


def test_third_derivative(device: str) -> None:
    x, w, _ = leaves(1, device)

    def third(function) -> torch.Tensor:
        y = function(x, w, stride=2).pow(3).sum()
        (gx,) = torch.autograd.grad(y, x, create_graph=True)
        (gw,) = torch.autograd.grad(gx.pow(2).sum(), w, create_graph=True)
        return torch.autograd.grad(gw.sin().sum(), x)[0]

    assert torch.allclose(third(tconv.conv_transpose1d), third(F.conv_transpose1d))


def test_gradient_penalty_training_step(device: str) -> None:
    """The WGAN-GP pattern: the gradient's norm is part of the loss."""
    x = torch.rand(2, 3, 5, 5, dtype=torch.float64, device=device, requires_grad=True)
    results = []
    for kind in (torch.nn.ConvTranspose2d, tconv.nn.ConvTranspose2d):
        torch.manual_seed(1)
        layer = kind(3, 4, 3, stride=2).to(device, torch.float64)
        (g,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
        (g.norm() - 1).square().backward()
        results.append([p.grad for p in layer.parameters()])
    for a, e in zip(*results):
        assert torch.allclose(a, e)


IN_DIMS = [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (0, None, 0), (1, 2, 0), (0, 0, None)]


@pytest.mark.parametrize("in_dims", IN_DIMS)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("through_operators", [False, True])
def test_vmap(in_dims: tuple, batched: bool, through_operators: bool, device: str) -> None:
    base = [t.detach() for t in leaves(2, device, 2, batched)]
    arguments = {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}
    stacked = [t if d is None else torch.stack([t, t + 1, t * 2]).movedim(0, d) for t, d in zip(base, in_dims)]

    def ours(x, w, b):
        if through_operators:
            return torch.ops.tconv.conv_transpose(x, w, b, 2, [2, 2], [1, 1], [1, 1], [1, 1], -1)
        return tconv.conv_transpose2d(x, w, b, **arguments)

    result = torch.func.vmap(ours, in_dims)(*stacked)
    expected = torch.func.vmap(lambda x, w, b: F.conv_transpose2d(x, w, b, **arguments), in_dims)(*stacked)
    assert torch.allclose(result, expected)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)])
def test_per_sample_gradients(in_dims: tuple, device: str) -> None:
    x, w, _ = (t.detach() for t in leaves(2, device))
    x, w = (t if d is None else torch.stack([t, t + 1]) for t, d in zip((x, w), in_dims))

    def gradients(function):
        def loss(x, w):
            return function(x, w, stride=2).sin().sum()

        return torch.func.vmap(torch.func.grad(loss, (0, 1)), in_dims)(x, w)

    for a, e in zip(gradients(tconv.conv_transpose2d), gradients(F.conv_transpose2d)):
        assert torch.allclose(a, e)


def test_functorch_transforms(device: str) -> None:
    x, w, _ = (t.detach() for t in leaves(1, device))

    def ours(x):
        return tconv.conv_transpose1d(x, w, stride=2).sin().sum()

    def theirs(x):
        return F.conv_transpose1d(x, w, stride=2).sin().sum()

    assert torch.allclose(torch.func.hessian(ours)(x), torch.func.hessian(theirs)(x))
    assert torch.allclose(torch.func.jacrev(torch.func.grad(ours))(x), torch.func.hessian(theirs)(x))


def operator_inputs(rank: int, device: str, dtype: torch.dtype, channels_last: bool = False):
    x = torch.rand(2, 4, *(4,) * rank, device=device, dtype=dtype)
    if channels_last and rank > 1:
        x = x.contiguous(memory_format=torch.channels_last if rank == 2 else torch.channels_last_3d)
    x.requires_grad_()
    w = torch.rand(4, 3, *(3,) * rank, device=device, dtype=dtype, requires_grad=True)
    b = torch.rand(6, device=device, dtype=dtype, requires_grad=True)
    geometry = (2, [2] * rank, [1] * rank, [1] * rank, [1] * rank, -1)
    g = torch.rand(2, 6, *(8,) * rank, device=device, dtype=dtype, requires_grad=True)
    return x, w, b, g, geometry


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_opcheck(rank: int, channels_last: bool, device: str) -> None:
    x, w, b, g, geometry = operator_inputs(rank, device, torch.float64, channels_last)
    ops = torch.ops.tconv
    torch.library.opcheck(ops.conv_transpose.default, (x, w, b, *geometry))
    torch.library.opcheck(ops.conv_transpose.default, (x, w, None, *geometry))
    torch.library.opcheck(ops.conv_transpose_grad_input.default, (g, w, list(x.shape[2:]), *geometry))
    torch.library.opcheck(ops.conv_transpose_grad_weight.default, (x, g, [3] * rank, *geometry))


def test_opcheck_zero_batch_and_unbatched(device: str) -> None:
    x, w, b, _, geometry = operator_inputs(2, device, torch.float32)
    torch.library.opcheck(torch.ops.tconv.conv_transpose.default, (x.detach()[:0], w, b, *geometry))
    torch.library.opcheck(torch.ops.tconv.conv_transpose.default, (x.detach()[0], w, b, *geometry))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_changing_sizes_compiles_once(backend: str, device: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    layer = tconv.nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2).to(device)
    theirs = torch.nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2).to(device)
    theirs.load_state_dict(layer.state_dict())
    compiled = torch.compile(lambda x: layer(x).relu() * 2, backend=counter, fullgraph=True, dynamic=True)
    for n, height, width in ((2, 5, 6), (3, 7, 4), (5, 9, 11)):
        x = torch.rand(n, 4, height, width, device=device, requires_grad=True)
        y = compiled(x)
        exact = theirs(x).relu() * 2
        assert torch.allclose(y, exact, atol=1e-5)
        a = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        e = torch.autograd.grad(exact.square().sum(), [x, *theirs.parameters()])
        for mine, other in zip(a, e):
            assert torch.allclose(mine, other, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("channels_last", [False, True])
def test_compile_keeps_memory_format(channels_last: bool, device: str) -> None:
    torch._dynamo.reset()
    layer = tconv.nn.ConvTranspose2d(4, 6, 3, stride=2).to(device)
    x = torch.rand(2, 4, 5, 6, device=device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert torch.compile(layer, fullgraph=True)(x).stride() == layer(x).stride()


def test_export(device: str) -> None:
    layer = tconv.nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1).to(device)
    x = torch.rand(2, 4, 5, 6, device=device)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert "tconv.conv_transpose.default" in targets
    for n in (2, 7):
        x = torch.rand(n, 4, 5, 6, device=device)
        assert torch.equal(program.module()(x), layer(x))
    lowered = program.run_decompositions(tconv.decompositions())
    targets = [str(n.target) for n in lowered.graph.nodes if n.op == "call_function"]
    assert any("aten.convolution" in t for t in targets) and not any("tconv" in t for t in targets)
    assert torch.allclose(lowered.module()(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, device: str) -> None:
    x = torch.rand(2, 4, 5, 6, device=device)
    ours = tconv.nn.ConvTranspose2d(4, 6, 3).to(device)
    theirs = torch.nn.ConvTranspose2d(4, 6, 3).to(device)
    theirs.load_state_dict(ours.state_dict())
    with torch.autocast(device, dtype=dtype):
        y, exact = ours(x), theirs(x)
        assert y.dtype == exact.dtype == dtype
        assert torch.allclose(y, exact, atol=2e-2, rtol=2e-2)
        y.float().sum().backward()
        exact.float().sum().backward()
    for a, e in zip(ours.parameters(), theirs.parameters()):
        assert a.grad.dtype == e.grad.dtype == torch.float32
        assert torch.allclose(a.grad, e.grad, atol=1e-1, rtol=2e-2)
    with torch.autocast(device, enabled=False):
        assert ours(x).dtype == torch.float32


def test_autocast_under_compile(device: str) -> None:
    torch._dynamo.reset()
    layer = tconv.nn.ConvTranspose2d(4, 6, 3).to(device)
    x = torch.rand(2, 4, 5, 6, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, dtype=torch.bfloat16):
        y = compiled(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x))
    assert compiled(x).dtype == torch.float32


@pytest.mark.skipif(PYTORCH < (2, 5), reason="PyTorch 2.4 does not serve operators that are registered in Python here")
def test_flop_counter(device: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for kind in (torch.nn.ConvTranspose2d, tconv.nn.ConvTranspose2d):
        layer = kind(4, 6, 3, stride=2).to(device)  # PyTorch's formula for the backward overlooks groups
        x = torch.rand(2, 4, 5, 6, device=device, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_tensor_subclass_goes_through_the_dispatcher(device: str) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    x = torch.rand(2, 4, 5, 6, device=device)
    w = torch.rand(4, 3, 3, 3, device=device)
    y = tconv.conv_transpose2d(TwoTensor(x, x + 1), w, stride=2)
    assert isinstance(y, TwoTensor)
    assert torch.equal(y.a, tconv.conv_transpose2d(x, w, stride=2))
    assert torch.equal(y.b, tconv.conv_transpose2d(x + 1, w, stride=2))


def test_torch_function_mode_and_fx_see_the_call() -> None:
    from torch.overrides import TorchFunctionMode

    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    x, w = torch.rand(1, 4, 5), torch.rand(4, 3, 3)
    with Mode():
        y = tconv.conv_transpose1d(x, w)
    assert tconv.conv_transpose1d in seen and torch.equal(y, tconv.conv_transpose1d(x, w))
    graph = torch.fx.symbolic_trace(lambda a: tconv.conv_transpose1d(a, w, stride=2))
    assert any(n.target is tconv.conv_transpose1d for n in graph.graph.nodes)
    assert torch.equal(graph(x), tconv.conv_transpose1d(x, w, stride=2))


def test_checkpoint_and_saved_tensors_hooks(device: str) -> None:
    from torch.utils.checkpoint import checkpoint

    layer = tconv.nn.ConvTranspose2d(4, 6, 3).to(device)
    x = torch.rand(2, 4, 5, 6, device=device, requires_grad=True)
    (direct,) = torch.autograd.grad(layer(x).square().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(direct, again)
    with torch.autograd.graph.save_on_cpu():
        y = layer(x).square().sum()
    assert torch.equal(torch.autograd.grad(y, x)[0], direct)


def test_changing_a_saved_weight_in_place_is_an_error() -> None:
    x = torch.rand(2, 4, 5, requires_grad=True)
    w = torch.rand(4, 3, 3)
    y = tconv.conv_transpose1d(x, w).sum()
    w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_frozen_weight_keeps_no_activation() -> None:
    x = torch.rand(2, 4, 5, requires_grad=True)
    w = torch.rand(4, 3, 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tconv.conv_transpose1d(x, w)
    assert len(kept) == 1 and kept[0].data_ptr() == w.data_ptr()
