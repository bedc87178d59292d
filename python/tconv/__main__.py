"""``python -m tconv plan|check|bench|compile|info``: the package from the command line.

A problem is a string: ``2d b8 g1 c64>64 i1024x1024 t3x3 s1 p0 f32``, optionally followed by ``| bias gelu``. The C++
tool ``tconv`` reads the same strings.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import time
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import _C, _chain, _core, _fused

_DTYPES = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}


def _plan(options: argparse.Namespace) -> int:
    if options.device.startswith("cuda"):
        _core.add_search_paths()
    for problem in options.problem:
        print(_C.plan_string(problem, options.device, options.only).explain())
    return 0


# --- check ------------------------------------------------------------------------------------------------------------


def _operands(chain: str, channels: int, shape: Sequence[int], dtype: torch.dtype, device: str) -> List[Tensor]:
    operands = []
    for word in _chain.parse(chain)[1]:
        for index in range(_chain.num_operands(word)):
            size = tuple(shape) if word.name in ("add_tensor", "scale_tensor") else (channels,)
            value = torch.rand(size, dtype=torch.float64) - 0.5
            if word.name == "batch_norm" and index == 1:
                value = value.abs() + 0.5  # a variance
            operands.append(value.to(dtype).to(device))
    return operands


def _relative(ours: Tensor, exact: Tensor) -> float:
    if not exact.numel():
        return 0.0
    norm = exact.norm().item()
    return (ours.double().cpu() - exact).norm().item() / (norm if norm > 0 else 1.0)


def _tolerance(dtype: torch.dtype, terms: int, precision: int) -> float:
    """Relative L2 error that rounding alone can explain: one rounding of the result plus a random walk over the sum."""
    unit = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    accumulate = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    if dtype == torch.float32 and precision == _core.TF32:
        unit = 2.0**-11
    return 4.0 * (unit + accumulate * max(terms, 1) ** 0.5) + 8.0 * accumulate


def check(problem: str, device: str, training: bool = True) -> Tuple[bool, List[Tuple[str, float, float]]]:
    """Runs a problem and compares the result and all gradients with float64 PyTorch on the CPU."""
    p = _C.parse_problem(problem)
    rank, dtype = p["rank"], _DTYPES[p["dtype"]]
    geom = _core.Geometry(
        rank,
        p["stride"],
        p["padding"],
        p["output_padding"],
        p["groups"],
        p["dilation"],
        _core.PRECISIONS[p["precision"]],
    )
    torch.manual_seed(0)
    memory_format = torch.contiguous_format
    if p["layout"] == "channels_last" and rank > 1:
        memory_format = torch.channels_last if rank == 2 else torch.channels_last_3d
    x = (torch.rand(p["batch"], p["in_channels"], *p["input"], dtype=torch.float64) - 0.5).to(dtype)
    w = (torch.rand(p["in_channels"], p["out_channels"] // p["groups"], *p["kernel"], dtype=torch.float64) - 0.5).to(
        dtype
    )
    bias = (torch.rand(p["out_channels"], dtype=torch.float64) - 0.5).to(dtype) if p["bias"] else None
    chain = " ".join(t for t in p["epilogue"].split() if t not in ("bias", "save"))
    shape = (p["batch"], p["out_channels"], *p["output"])
    operands = _operands(chain, p["out_channels"], shape, dtype, "cpu")

    inputs = [x, w, *([bias] if bias is not None else []), *operands]
    # Statistics of a given normalisation have no gradient.
    fixed = set()
    at = len(inputs) - len(operands)
    for word in _chain.parse(chain)[1]:
        if word.name == "batch_norm":
            fixed |= {at, at + 1}
        at += _chain.num_operands(word)

    def prepare(tensors: Sequence[Tensor]) -> List[Tensor]:
        return [t.detach().clone().requires_grad_(training and i not in fixed) for i, t in enumerate(tensors)]

    theirs = prepare([t.double() for t in inputs])
    moved = [t.to(device) for t in inputs]
    moved[0] = moved[0].contiguous(memory_format=memory_format)
    ours = [t.detach().requires_grad_(training and i not in fixed) for i, t in enumerate(moved)]

    def split(t: Sequence[Tensor]) -> Tuple[Tensor, Tensor, Optional[Tensor], List[Tensor]]:
        first = 2 + (bias is not None)
        return t[0], t[1], (t[2] if bias is not None else None), list(t[first:])

    reference = getattr(torch.nn.functional, f"conv_transpose{rank}d")
    x64, w64, bias64, operands64 = split(theirs)
    exact = _chain.compose(
        " ".join(t for t in chain.split() if not t.startswith("out:")),
        lambda t: reference(t, w64, bias64, *geom[1:6]),
        x64,
        operands64,
        rank,
    )
    result = _fused.call(geom, *split(ours), chain) if chain else _plain(geom, ours, bias is not None)
    terms = p["in_channels"] // p["groups"]
    for taps in p["kernel"]:
        terms *= taps
    positions = p["batch"]
    for size in p["output"]:
        positions *= size
    code = _core._precision_code(geom.precision, result, _core.FORWARD, geom.groups)
    rows = [("output", _relative(result.detach(), exact.detach()), _tolerance(dtype, terms, code))]
    if training:
        code = _core._precision_code(geom.precision, result, _core.GRAD_WEIGHT, geom.groups)
        grad = (torch.rand(exact.shape, dtype=torch.float64) - 0.5).to(result.dtype)
        wanted = [i for i in range(len(inputs)) if i not in fixed]
        theirs_grad = torch.autograd.grad(exact, [theirs[i] for i in wanted], grad.double())
        ours_grad = torch.autograd.grad(result, [ours[i] for i in wanted], grad.to(device))
        names = ["grad_input", "grad_weight", *(["grad_bias"] if bias is not None else [])]
        names += [f"grad_operand{i}" for i in range(len(operands))]
        for i, mine, other in zip(wanted, ours_grad, theirs_grad):
            count = max(terms, positions)
            # A chain in 16 bits keeps the convolution's result rounded to 16 bits: one more rounding on the way back.
            rows.append((names[i], _relative(mine, other), (3.0 if chain else 1.0) * _tolerance(dtype, count, code)))
    return all(error <= allowed for _, error, allowed in rows), rows


def _plain(geom: _core.Geometry, tensors: Sequence[Tensor], bias: bool) -> Tensor:
    from . import functional

    precision = None if geom.precision == _core.FOLLOW_FLAGS else ("fp32", "tf32")[geom.precision]
    function = getattr(functional, f"conv_transpose{geom.rank}d")
    return function(tensors[0], tensors[1], tensors[2] if bias else None, *geom[1:6], precision=precision)


def _check(options: argparse.Namespace) -> int:
    bad = 0
    for problem in options.problem:
        good, rows = check(problem, options.device)
        bad += not good
        print(f"{'ok   ' if good else 'WRONG'} {_C.parse_problem(problem)['text']}")
        for name, error, allowed in rows:
            mark = "" if error <= allowed else "  <-"
            print(f"      {name:<14} relative error {error:.2e}, allowed {allowed:.2e}{mark}")
    return 1 if bad else 0


# --- the rest ---------------------------------------------------------------------------------------------------------


def _compile(options: argparse.Namespace) -> int:
    """Fills the disk cache of compiled device code; needs NVRTC but no GPU when a known device is named."""
    _core.add_search_paths()
    problems = list(options.problem)
    for file in options.file:
        with open(file) as lines:
            problems += [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    if options.model:
        problems += _problems_of_model(options.model, options.input, options.dtype)
    if not problems:
        print("python -m tconv compile: no problem given", file=sys.stderr)
        return 2
    start = time.perf_counter()
    for number, problem in enumerate(problems, 1):
        for direction in _directions(problem, options.training):
            for unit in _C.compile(direction, options.device):
                how = "cached" if unit["from_cache"] else f"{unit['seconds']:.2f} s"
                spills = f", {unit['spill_bytes']} bytes spilled" if unit["spill_bytes"] else ""
                name = f"{unit['kernel']} {unit['entry']}"
                print(f"[{number}/{len(problems)}] {name}: {how}, {unit['registers']} registers{spills}  {direction}")
    print(f"{len(problems)} problems in {time.perf_counter() - start:.1f} s")
    return 0


def _problems_of_model(name: str, shapes: Sequence[str], dtype: str) -> List[str]:
    """Problem strings of the layers of `package.module:factory()`, run once on the CPU after tconv.optimize."""
    from . import optimize
    from ._explain import plans_of

    module, _, factory = name.partition(":")
    if not factory:
        raise ValueError(f"--model must be module:factory, got {name}")
    model = optimize(getattr(importlib.import_module(module), factory)().eval().to(_DTYPES[dtype]))
    inputs = [torch.zeros([int(n) for n in shape.split("x")], dtype=_DTYPES[dtype]) for shape in shapes]
    texts = []
    for _, plan in plans_of(model, *inputs):
        if plan is None:
            continue
        head, bar, chain = plan.problem.partition("|")
        tf32 = dtype == "f32" and _core.default_is_tf32(_core.FORWARD, _C.parse_problem(head)["groups"])
        texts.append(f"{head.strip()}{' tf32' if tf32 else ''}{f' | {chain.strip()}' if bar else ''}")
    return list(dict.fromkeys(texts))


def _directions(problem: str, training: bool) -> List[str]:
    """The problem strings of a layer's forward and, for training, of its gradients."""
    if not training:
        return [problem]
    p = _C.parse_problem(problem)
    head = p["text"].partition("|")[0].strip()
    pre = " ".join(t for t in p["epilogue"].split() if t.startswith("pre:"))
    ops = " ".join(t for t in p["epilogue"].split() if not t.startswith("pre:") and t != "bias")
    # A grouped layer's gradients follow the flags though its forward pass, and so the string, is in full precision.
    follows = p["dtype"] == "f32" and p["groups"] > 1 and "tf32" not in head.split()
    precision = " tf32" if follows and _core.default_is_tf32(_core.GRAD_INPUT, p["groups"]) else ""
    found = [
        f"{p['text']} save" if ops else p["text"],
        f"{head} grad_input{precision}",
        f"{head} grad_weight{precision} | {pre}".rstrip(" |"),
    ]

    def alone(channels: int, size: Sequence[int], chain: str) -> str:
        layout = "" if p["layout"] == "contiguous" else f" {p['layout']}"
        shape = f"{p['rank']}d b{p['batch']} c{channels}>{channels} i{'x'.join(map(str, size))} t1 {p['dtype']}{layout}"
        return f"{shape} grad_epilogue | {chain}"

    if ops:
        # As in _fused._bias_as_operand.
        found.append(alone(p["out_channels"], p["output"], f"add_channel {ops}" if p["bias"] else ops))
    if pre:
        found.append(alone(p["in_channels"], p["input"], pre.replace("pre:", "")))
    return found


def _info(options: argparse.Namespace) -> int:
    from . import __version__

    def line(name: str, text: Any) -> None:
        print(f"{name:<12}{text}")

    line("tconv", __version__)
    line("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})")
    line("python", platform.python_version())
    cpu = _C.device_info("cpu")
    line("cpu", f"{cpu['name']}, {cpu['isa']}, {cpu['cores']} cores, {torch.get_num_threads()} threads in use")
    for index in range(_C.cuda_device_count()):
        device = _C.device_info(f"cuda:{index}")
        capability = device["compute_capability"]
        line(f"cuda:{index}", f"{device['name']}, compute capability {capability / 10:.1f}")
    if not _C.cuda_device_count():
        line("cuda", "no driver or no device")
    for backend in ("cpu", "cuda"):
        line(f"{backend} kernels", " ".join(_C.kernel_names(backend)))
    line("operations", " ".join(o["name"] for o in _C.operations()))
    return 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] == "bench":  # has options of its own
        from . import bench

        return int(bench.main(arguments[1:]) or 0)
    parser = argparse.ArgumentParser(prog="python -m tconv", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="every kernel for a problem with its price or its reason to refuse")
    plan.add_argument("problem", nargs="+")
    plan.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, or a known device such as h200")
    plan.add_argument("--only", default="", help="a kernel's name, or name:config")
    plan.set_defaults(run=_plan)
    verify = commands.add_parser("check", help="result and gradients against float64 PyTorch")
    verify.add_argument("problem", nargs="+")
    verify.add_argument("--device", default="cpu")
    verify.set_defaults(run=_check)
    build = commands.add_parser("compile", help="fill the cache of compiled device code ahead of time")
    build.add_argument("problem", nargs="*")
    build.add_argument("--file", action="append", default=[], help="a file with one problem a line")
    build.add_argument("--device", default="cuda", help="cuda, cuda:1, or a known device such as h200")
    build.add_argument("--model", default="", help="module:factory of a torch.nn.Module, whose layers are compiled")
    build.add_argument("--input", action="append", default=[], help="shape of an input of the model, such as 1x3x64x64")
    build.add_argument("--dtype", default="f32", choices=sorted(_DTYPES), help="of the model and its inputs")
    build.add_argument("--training", action="store_true", help="also the gradients")
    build.set_defaults(run=_compile)
    info = commands.add_parser("info", help="versions, devices, kernels, operations")
    info.set_defaults(run=_info)
    commands.add_parser("bench", help="time every problem beside PyTorch; see python -m tconv bench --help")
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, RuntimeError) as error:
        print(f"python -m tconv {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
