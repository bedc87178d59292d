"""The problems that figures are made of: named layers and chains, and what a device needs for them at least."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import _C

NAMED = Path(__file__).with_name("problems.json")
DTYPES = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """One line of the table: a problem string taken apart, as far as PyTorch's layers need it."""

    name: str
    rank: int
    batch: int
    groups: int
    in_channels: int
    out_channels: int
    input: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    bias: bool
    ops: tuple[tuple[str, tuple[str, ...]], ...]
    seed: str = ""
    full_batch: int = 0  # the batch that the problem names, where it had to be reduced
    full_input: tuple[int, ...] = ()  # and the sizes

    def output(self) -> tuple[int, ...]:
        return tuple(
            (i - 1) * s - 2 * p + d * (k - 1) + op + 1
            for i, k, s, p, op, d in zip(
                self.input, self.kernel, self.stride, self.padding, self.output_padding, self.dilation, strict=True
            )
        )

    def elements(self) -> tuple[int, int, int]:
        """Elements of input, weight and output."""
        taps = math.prod(self.kernel)
        return (
            self.batch * self.in_channels * math.prod(self.input),
            self.in_channels * (self.out_channels // self.groups) * taps,
            self.batch * self.out_channels * math.prod(self.output()),
        )

    def flops(self) -> float:
        return 2.0 * self.elements()[0] * (self.out_channels // self.groups) * math.prod(self.kernel)

    def floor_ms(self, direction: str, dtype: str, rates: dict[str, float]) -> float:
        """The longer of moving each tensor once and of the products, at the rates the device reaches."""
        size = DTYPES[dtype].itemsize
        x, w, y = self.elements()
        passes = {"forward": (x + w + y, 1), "backward": (2 * x + 2 * w + y, 2), "train": (3 * x + 3 * w + 2 * y, 3)}
        moved, products = passes[direction]
        return max(size * moved / (rates["bandwidth"] * 1e9), products * self.flops() / (rates[dtype] * 1e9))

    def string(self, dtype: str = "f32", layout: str = "contiguous", direction: str = "forward", *, tf32: bool) -> str:
        """The problem string, without the epilogue."""

        def dims(letters: str, values: tuple[int, ...], default: int) -> str:
            if all(v == default for v in values):
                return ""
            return f" {letters}" + (str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values)))

        sizes = "x".join(map(str, self.input))
        text = f"{self.rank}d b{self.batch} g{self.groups} c{self.in_channels}>{self.out_channels} i{sizes}"
        text += " t" + "x".join(map(str, self.kernel)) + dims("s", self.stride, 1) + dims("p", self.padding, 0)
        text += dims("op", self.output_padding, 0) + dims("d", self.dilation, 1) + f" {dtype}"
        text += " channels_last" if layout == "channels_last" else ""
        text += f" {direction}" if direction != "forward" else ""
        follows = self.groups == 1 or direction in ("grad_input", "grad_weight")  # as _core.default_is_tf32
        return text + (" tf32" if tf32 and dtype == "f32" and follows else "")

    def chain(self) -> str:
        parts = (["bias"] if self.bias else []) + [f"{n}({','.join(a)})" if a else n for n, a in self.ops]
        return " ".join(parts)


def parse(name: str, text: str, seed: str = "") -> Shape:
    """Reads a problem string such as `2d b8 g4 c64>64 i256x256 t4x4 s2 p1 | bias gelu`."""
    found = _C.parse_problem(text)
    ops: list[tuple[str, tuple[str, ...]]] = []
    for word in found["epilogue"].split():
        op, _, scalars = word.partition("(")
        ops.append((op, tuple(scalars.rstrip(")").split(",")) if scalars else ()))
    dims: dict[str, Any] = {
        key: tuple(found[key]) for key in ("input", "kernel", "stride", "padding", "output_padding", "dilation")
    }
    return Shape(
        name=name, rank=found["rank"], batch=found["batch"], groups=found["groups"], in_channels=found["in_channels"],
        out_channels=found["out_channels"], **dims, bias=found["bias"],
        ops=tuple(op for op in ops if op[0] != "bias"), seed=seed,
    )  # fmt: skip


def named() -> list[Shape]:
    table = json.loads(NAMED.read_text())
    return [parse(row["name"], row["problem"], row.get("seed", "")) for row in table["problems"]]


def reduced(shape: Shape, available_bytes: float, most_flops: float, *, sizes: bool = False) -> Shape:
    """The same problem with the largest batch (a power of two below its own) that fits memory and patience.

    With `sizes`, one image that takes more than `most_flops` is halved along its longest side until it does not, or has
    no side of 16.
    """
    batch = shape.batch
    while batch > 1:
        at = replace(shape, batch=batch)
        x, w, y = at.elements()
        # Input, its gradient, twice output and grad_output (PyTorch's beside ours), and PyTorch's reordered copies.
        if 4 * (4 * x + 4 * w + 5 * y) <= available_bytes and at.flops() <= most_flops:
            break
        batch = 1 << ((batch - 1).bit_length() - 1)
    small = replace(shape, batch=batch)
    while sizes and small.flops() > most_flops and max(small.input) >= 16:
        longest = small.input.index(max(small.input))
        small = replace(small, input=tuple(n // 2 if i == longest else n for i, n in enumerate(small.input)))
    if batch != shape.batch:
        small = replace(small, full_batch=shape.batch)
    return replace(small, full_input=shape.input) if small.input != shape.input else small
