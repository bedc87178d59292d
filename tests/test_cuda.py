"""What only a GPU can show: whose kernels run, streams, CUDA graphs, several devices, more than 2**31 elements."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from close import assert_close
from torch.profiler import ProfilerActivity, profile

import tconv

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FOREIGN = re.compile(r"cudnn|cutlass|xmma|implicit|convol|dgrad|wgrad|nchwTo|nhwcTo|sgemm|hgemm", re.IGNORECASE)
FOREIGN_OPERATORS = re.compile(r"aten::(_?convolution|cudnn|conv_|slow_conv|thnn)")

# The seeds at sizes that take no time.
SEEDS = {
    "S1": (lambda: tconv.nn.ConvTranspose2d(64, 64, 3, bias=False), (2, 64, 64, 64)),
    "S2": (
        lambda: tconv.nn.ConvTranspose2d(
            32, 64, (3, 5), stride=(2, 3), padding=(1, 2), dilation=(2, 1), groups=4, bias=False
        ),
        (2, 32, 32, 48),
    ),
    "S3": (lambda: tconv.nn.ConvTranspose3d(32, 32, 3, stride=2, padding=1, output_padding=1), (1, 32, 8, 12, 16)),
    "S3 grouped": (
        lambda: tconv.nn.ConvTranspose3d(32, 32, (3, 5, 7), stride=2, padding=(1, 2, 3), output_padding=1, groups=4),
        (1, 32, 6, 8, 12),
    ),
    "S4": (
        lambda: tconv.nn.Fused(tconv.nn.ConvTranspose2d(64, 64, 3), [torch.nn.GELU(), torch.nn.GroupNorm(8, 64)]),
        (4, 64, 32, 32),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("seed", SEEDS)
def test_only_our_kernels_run(seed: str, dtype: torch.dtype) -> None:
    make, shape = SEEDS[seed]
    layer = make().to("cuda", dtype)
    x = torch.rand(shape, device="cuda", dtype=dtype, requires_grad=True)

    def step() -> None:
        layer(x).backward(grad)

    grad = torch.rand_like(layer(x))
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    kernels = {e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA}
    operators = {e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CPU}
    assert any(re.search("gemm|gather|depthwise", name) for name in kernels), kernels
    assert not [name for name in kernels if FOREIGN.search(name)]
    assert not [name for name in operators if FOREIGN_OPERATORS.match(name)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_captured_step_follows_new_data(seed: str) -> None:
    make, shape = SEEDS[seed]
    layer = make().cuda()
    x = torch.rand(shape, device="cuda", requires_grad=True)
    inputs = [x, *layer.parameters()]
    grad = torch.rand_like(layer(x))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up, as torch.cuda.graph asks
        torch.autograd.grad(layer(x), inputs, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        gradients = torch.autograd.grad(y, inputs, grad)
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.rand(shape))
            grad.copy_(torch.rand(grad.shape))
        graph.replay()
        expected = layer(x)
        assert torch.equal(y, expected)
        for ours, again in zip(gradients, torch.autograd.grad(expected, inputs, grad)):
            assert torch.equal(ours, again)


def test_work_is_queued_on_the_current_stream() -> None:
    x, w = torch.rand(8, 64, 128, 128, device="cuda"), torch.rand(64, 64, 3, 3, device="cuda")
    expected = tconv.conv_transpose2d(x + 1, w)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        later = x + 1  # still to come when the call returns
        y = tconv.conv_transpose2d(later, w)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_thread_that_has_used_no_cuda(dtype: torch.dtype) -> None:
    """Such a thread has no context; nothing but our own calls sets one when all memory comes from PyTorch's cache."""
    layer = tconv.nn.ConvTranspose2d(64, 64, 3).to("cuda", dtype, memory_format=torch.channels_last)
    x = torch.rand(2, 64, 32, 40, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    grad = torch.rand_like(layer(x))
    results: list[Any] = []

    def step() -> None:
        inputs = [x.detach().requires_grad_(), *layer.parameters()]
        results.append(torch.autograd.grad(layer(inputs[0]), inputs, grad))

    step()
    expected, results[:] = [t.clone() for t in results[0]], []
    torch.cuda.synchronize()
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert len(results) == 1  # an error in the thread would have left nothing
    for ours, first in zip(results[0], expected):
        assert torch.equal(ours, first)


def off_the_boundary(x: torch.Tensor) -> torch.Tensor:
    """The same values in the same memory format, one element behind a 16-byte boundary."""
    memory = torch.empty(x.numel() + 1, device=x.device, dtype=x.dtype)
    view = memory.as_strided(x.shape, x.stride(), 1).copy_(x)
    assert view.data_ptr() % 16 != 0
    return view


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("make", [
    lambda: tconv.nn.ConvTranspose2d(64, 64, 3), lambda: tconv.nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1),
], ids=["S1", "upsampling"])  # fmt: skip
def test_tensors_off_the_boundary_that_their_programs_want(
    make: Any, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """Kernels that copy 16 bytes at a time have a second program for such tensors, with the same sums."""
    layer = make().to("cuda", dtype, memory_format=layout)
    x = torch.rand(8, 64, 64, 64, device="cuda", dtype=dtype).to(memory_format=layout)
    grad = torch.rand_like(layer(x))

    def step(x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        x = x.detach().requires_grad_()
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, [x, layer.weight], grad)]

    expected = step(x, grad)
    views = off_the_boundary(x), off_the_boundary(grad)
    for ours, aligned in zip(step(*views), expected):
        assert torch.equal(ours, aligned)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = layer(views[0])
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one() -> None:
    layer = tconv.nn.ConvTranspose2d(48, 32, 4, stride=2, padding=1)
    x = torch.rand(2, 48, 20, 24)
    results = []
    for index in range(2):
        own = layer.to(f"cuda:{index}")
        there = x.to(f"cuda:{index}").requires_grad_()
        with torch.cuda.device(1 - index):  # the current device is the other one
            y = own(there)
            (gradient,) = torch.autograd.grad(y.square().sum(), there)
            assert torch.cuda.current_device() == 1 - index
        assert y.device == gradient.device == there.device
        results.append((y.detach().cpu(), gradient.cpu()))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    replicas = torch.nn.parallel.replicate(layer.to("cuda:0"), [0, 1])
    outputs = torch.nn.parallel.parallel_apply(replicas, [x.to("cuda:0"), x.to("cuda:1")])
    assert torch.equal(outputs[0].cpu(), outputs[1].cpu())
    with pytest.raises(RuntimeError, match="device"):
        layer.to("cuda:0")(x.to("cuda:1"))


def test_code_that_was_forgotten_is_loaded_again() -> None:
    make, shape = SEEDS["S4"]
    layer, x = make().cuda(), torch.rand(shape, device="cuda", requires_grad=True)

    def step() -> list[torch.Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))]

    before = step()
    tconv._C.forget_functions()
    with_its_plans = step()
    layer(x[:, :, 1:]).sum().backward()  # plans of another size
    for first, again, last in zip(before, with_its_plans, step()):
        assert torch.equal(first, again) and torch.equal(first, last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_more_than_two_to_the_31_elements(layout: torch.memory_format) -> None:
    batch, channels, height, width = 5, 64, 1280, 1344
    output = batch * channels * 4 * height * width
    assert output > 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < 16e9:
        pytest.skip(f"needs 16 GB of GPU memory, {free / 1e9:.0f} free")
    x = torch.rand(batch, channels, height, width, device="cuda", dtype=torch.float16).to(memory_format=layout)
    w = torch.rand(channels, channels, 2, 2, device="cuda", dtype=torch.float16) - 0.5
    x.requires_grad_(), w.requires_grad_()
    y = tconv.conv_transpose2d(x, w, stride=2)
    assert y.numel() == output and y.is_contiguous(memory_format=layout)
    for image, rows in ((0, slice(0, 3)), (batch - 1, slice(height - 3, height))):
        part = x[image : image + 1, :, rows].detach().double()
        expected = F.conv_transpose2d(part, w.detach().double(), stride=2)
        assert_close(y[image : image + 1, :, 2 * rows.start : 2 * rows.stop].detach(), expected, channels)
    (grad_x,) = torch.autograd.grad(y, x, y.detach(), retain_graph=True)
    part = y[batch - 1 :, :, -6:].detach().double()
    expected = F.conv2d(part, w.detach().double(), stride=2)
    assert_close(grad_x[batch - 1 :, :, -3:], expected, 4 * channels)
