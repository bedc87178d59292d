"""Compares the models of this folder with PyTorch's and times both: python examples/kernelbench/run.py --batch 1

Same seed, so both start from the same parameters. Outputs and gradients must agree within atol = rtol = 1e-4.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

HERE = Path(__file__).resolve().parent


class Reference19(nn.Module):
    """The reference model of level 2, problem 19."""

    def __init__(self, in_channels, out_channels, kernel_size, stride, groups, num_groups):
        super().__init__()
        self.conv_transpose = nn.ConvTranspose2d(in_channels, out_channels, kernel_size, stride=stride)
        self.group_norm = nn.GroupNorm(num_groups=num_groups, num_channels=out_channels)

    def forward(self, x):
        return self.group_norm(nn.functional.gelu(self.conv_transpose(x)))


def reference_57(i, o, k, stride=1, padding=0, output_padding=0, groups=1, bias=False):
    return nn.ConvTranspose2d(i, o, k, stride, padding, output_padding, groups, bias)


def reference_81(i, o, k, stride=1, padding=0, dilation=1, bias=False):
    return nn.ConvTranspose2d(i, o, k, stride, padding, dilation=dilation, bias=bias)


def reference_73(i, o, k, stride=1, padding=0, output_padding=0, groups=1, bias=False):
    return nn.ConvTranspose3d(i, o, k, stride, padding, groups=groups, bias=bias)


# name -> (file, reference, constructor arguments other than the file's own)
CASES: dict[str, tuple[str, Callable[..., nn.Module], dict | None]] = {
    "S1 level 1, 57": ("57_conv_transposed_2D__square_input__square_kernel.py", reference_57, None),
    "S2 level 1, 81": (
        "81_conv_transposed_2D_asymmetric_input_square_kernel___dilated____padded____strided__.py",
        reference_81,
        None,
    ),
    "S3 level 1, 73": (
        "73_conv_transposed_3D_asymmetric_input_square_kernel__strided_padded__grouped_.py",
        reference_73,
        None,
    ),
    "S3 with groups=4": (
        "73_conv_transposed_3D_asymmetric_input_square_kernel__strided_padded__grouped_.py",
        reference_73,
        {"groups": 4},
    ),
    "S4 level 2, 19": ("19_ConvTranspose2d_GELU_GroupNorm.py", Reference19, None),
}


def load(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"kernelbench_{file.split('_')[0]}", HERE / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(name: str) -> tuple[nn.Module, nn.Module, ModuleType]:
    """(reference, ours, the file's module), from the same seed."""
    file, reference, other = CASES[name]
    module = load(file)
    arguments = module.get_init_inputs()
    keywords = other or {}
    if other:
        arguments = arguments[:5]
    torch.manual_seed(0)
    theirs = reference(*arguments, **keywords)
    torch.manual_seed(0)
    ours = module.ModelNew(*arguments, **keywords)
    return theirs, ours, module


def seconds(device: torch.device, call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def step(model: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], grad)]


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, bool]:
    """Largest difference, and whether it is allowed. Gradients of parameters are sums over millions of terms, of which
    both sides round every one: they are compared by their norm."""
    worst = (ours - theirs).abs().max().item() if ours.numel() else 0.0
    if torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4):
        return worst, True
    relative = ((ours - theirs).double().norm() / theirs.double().norm()).item()
    return worst, relative < 1e-4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=None, help="batch size instead of the file's, for small machines")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="part of a case's name, such as S2")
    parser.add_argument("--forward", action="store_true", help="leave the gradients out")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    live = sys.stderr.isatty()

    def show(text: str) -> None:
        if live:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)

    print(f"{'case':<18}{'batch':>6}{'largest difference':>20}{'PyTorch ms':>12}{'tconv ms':>10}{'ratio':>7}  what")
    bad = 0
    names = [name for name in CASES if options.only in name]
    for number, name in enumerate(names, 1):
        show(f"[{number}/{len(names)}] {name}: building")
        theirs, ours, module = build(name)
        theirs, ours = theirs.to(device), ours.to(device)
        if options.batch is not None:
            module.batch_size = options.batch
        torch.manual_seed(1)
        (x,) = (t.to(device) for t in module.get_inputs())
        with torch.no_grad():
            show(f"[{number}/{len(names)}] {name}: forward")
            worst, good = difference(ours(x), theirs(x))
            reference = seconds(device, lambda: theirs(x), options.repeats)  # noqa: B023
            mine = seconds(device, lambda: ours(x), options.repeats)  # noqa: B023
        show("")
        row = "{:<18}{:>6}{:>20.2e}{:>12.2f}{:>10.2f}{:>7.2f}  {}"
        verdict = "" if good else "  WRONG"
        ms = (reference * 1e3, mine * 1e3, reference / mine)
        print(row.format(name, x.shape[0], worst, *ms, f"forward{verdict}"), flush=True)
        bad += not good
        if options.forward:
            continue
        show(f"[{number}/{len(names)}] {name}: forward and backward")
        x.requires_grad_()
        with torch.no_grad():
            grad = torch.rand_like(theirs(x))
        checks = [difference(a, b) for a, b in zip(step(ours, x, grad), step(theirs, x, grad))]
        worst, good = max(c[0] for c in checks), all(c[1] for c in checks)
        reference = seconds(device, lambda: step(theirs, x, grad), options.repeats)  # noqa: B023
        mine = seconds(device, lambda: step(ours, x, grad), options.repeats)  # noqa: B023
        show("")
        verdict = "" if good else "  WRONG"
        ms = (reference * 1e3, mine * 1e3, reference / mine)
        print(row.format(name, x.shape[0], worst, *ms, f"training step{verdict}"), flush=True)
        bad += not good
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
