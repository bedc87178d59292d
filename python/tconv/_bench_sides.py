"""The two sides of the benchmark, a problem in PyTorch's layers and in tconv's, and the clocks that time them."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import tconv
from tconv.problems import DTYPES, Shape

Run = Callable[[], Any]

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}

# ---------------------------------------------------------------------------------------------------------------------
# The two sides


@dataclass
class Case:
    """A problem on one device, in one dtype and layout: tensors and both implementations."""

    shape: Shape
    dtype: str
    layout: str
    device: torch.device
    input: Tensor = field(init=False)
    theirs: nn.Module = field(init=False)
    ours: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        shape = self.shape
        torch.manual_seed(sum(shape.name.encode()))
        kinds = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
        layer = kinds[shape.rank](
            shape.in_channels, shape.out_channels, shape.kernel, stride=shape.stride, padding=shape.padding,
            output_padding=shape.output_padding, groups=shape.groups, bias=shape.bias, dilation=shape.dilation,
        )  # fmt: skip
        layer = layer.to(self.device, DTYPES[self.dtype])
        size = (shape.batch, shape.in_channels, *shape.input)
        self.input = torch.rand(size, device=self.device).to(DTYPES[self.dtype])
        if self.layout == "channels_last":
            self.input = self.input.to(memory_format=CHANNELS_LAST[shape.rank])
            layer = layer.to(memory_format=CHANNELS_LAST[shape.rank])
        modules = [module(shape, name, scalars).to(self.device, DTYPES[self.dtype]) for name, scalars in shape.ops]
        kinds_of_ours = {1: tconv.nn.ConvTranspose1d, 2: tconv.nn.ConvTranspose2d, 3: tconv.nn.ConvTranspose3d}
        mine = kinds_of_ours[shape.rank](
            shape.in_channels, shape.out_channels, shape.kernel, stride=shape.stride, padding=shape.padding,
            output_padding=shape.output_padding, groups=shape.groups, bias=shape.bias, dilation=shape.dilation,
        )  # fmt: skip
        mine.weight, mine.bias = layer.weight, layer.bias
        self.theirs = nn.Sequential(layer, *modules) if modules else layer
        self.ours = tconv.nn.Fused(mine, modules) if modules else mine

    def parameters(self) -> list[Tensor]:
        return [p for p in self.theirs.parameters() if p.requires_grad]

    def forward(self, model: nn.Module) -> Run:
        def run() -> Tensor:
            with torch.no_grad():
                return model(self.input)

        return run

    def gradients(self, model: nn.Module, grad_output: Tensor, *, whole_step: bool) -> Run:
        """The gradients of input and parameters; with whole_step, the forward pass too, every time."""
        wanted = [self.input.detach().requires_grad_(), *self.parameters()]
        if whole_step:
            return lambda: torch.autograd.grad(model(wanted[0]), wanted, grad_output)
        output = model(wanted[0])
        return lambda: torch.autograd.grad(output, wanted, grad_output, retain_graph=True)

    def runs(self, direction: str, model: nn.Module, grad_output: Tensor | None) -> Run:
        if direction == "forward":
            return self.forward(model)
        assert grad_output is not None
        return self.gradients(model, grad_output, whole_step=direction == "train")


def module(shape: Shape, name: str, scalars: tuple[str, ...]) -> nn.Module:
    """The layer that a word of the chain stands for."""
    numbers = [float(s) for s in scalars if re.fullmatch(r"-?(inf|[\d.]+(e-?\d+)?)", s)]
    options = dict(s.split("=") for s in scalars if "=" in s)
    plain: dict[str, Callable[[], nn.Module]] = {
        "relu": nn.ReLU,
        "gelu": nn.GELU,
        "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
        "silu": nn.SiLU,
        "mish": nn.Mish,
        "sigmoid": nn.Sigmoid,
        "tanh": nn.Tanh,
        "hardswish": nn.Hardswish,
        "leaky_relu": lambda: nn.LeakyReLU(*numbers),
        "hardtanh": lambda: nn.Hardtanh(*numbers),
        "clamp": lambda: tconv.nn.Clamp(*numbers),
        "scale": lambda: tconv.nn.Scale(*numbers),
        "add": lambda: tconv.nn.AddConstant(*numbers),
        "add_channel": lambda: tconv.nn.AddChannel(shape.out_channels),
        "group_norm": lambda: nn.GroupNorm(
            int(numbers[0]), shape.out_channels, eps=float(options.get("eps", 1e-5)), affine="affine" in scalars
        ),
    }
    if name not in plain:
        raise ValueError(f"problem {shape.name}: the benchmark has no PyTorch layer for {name!r}")
    return plain[name]()


# ---------------------------------------------------------------------------------------------------------------------
# Clocks


class CpuClock:
    def __init__(self) -> None:
        self.flush_note = "caches as the other side left them"

    def once(self, run: Run) -> float:
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3

    def settle(self) -> None:
        pass


class CudaClock:
    """CUDA events around one call, behind a flushed L2 and enough work that the host never lets the device wait."""

    def __init__(self, device: torch.device, lead_us: float = 1000) -> None:
        self.device = device
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
        self.flush_note = "L2 flushed by writing 256 MB"
        self.lead_cycles = int(lead_us * 1000)
        self.begin = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def once(self, run: Run) -> float:
        # _sleep counts clock cycles (about 1.5-2 per ns here): the host enqueues the whole call meanwhile. A backward
        # call of seven launches took a slow host longer than a lead of 400.
        torch.cuda._sleep(self.lead_cycles)  # type: ignore[no-untyped-call]
        self.flush.zero_()
        self.begin.record()
        run()
        self.end.record()
        self.end.synchronize()
        return float(self.begin.elapsed_time(self.end))

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)


Clock = CpuClock | CudaClock


def interleaved(clock: Clock, runs: dict[str, Run], seconds: float, least: int = 3, most: int = 25) -> dict[str, float]:
    """Median milliseconds of each, run in turns; at least `least` rounds, more while `seconds` allow."""
    for run in runs.values():  # the first call may compile, plan or try algorithms
        run()
    clock.settle()
    begin = time.perf_counter()
    for run in runs.values():
        clock.once(run)
    spent = time.perf_counter() - begin
    rounds = max(least, min(most, int(seconds / max(spent, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        names = list(runs) if turn % 2 == 0 else list(reversed(runs))
        for name in names:
            times[name].append(clock.once(runs[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def captured(run: Run) -> Run:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
