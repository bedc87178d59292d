"""python -m tconv bench — every figure of the project comes from here.

Each problem is timed next to PyTorch in the same process: the two run in turns, the median of repeated runs counts.
On a GPU the times are CUDA events around one call, the L2 cache is flushed before each run and the host is kept ahead
of the device, so that a call's cost on the host (reported on its own) does not hide in the time on the device. Inputs
are uniform in [0, 1); results are compared with PyTorch's before anything is timed, into memory that held NaN.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tconv
from tconv import _C, _core, _fused
from tconv._bench_sides import CHANNELS_LAST, Case, Clock, CpuClock, CudaClock, Run, captured, interleaved
from tconv.problems import DTYPES, Shape, named, parse, reduced

Listed = tuple[Shape, str, str, str]  # dtype, layout, direction


# What one card can reach, in 1e12 units a second: copy (read + write), products (a multiply-add is two) by dtype, TF32
# for f32.
# Measured once by a copy and by matrix products; what is not listed here is measured when the driver starts.
KNOWN_RATES = {"NVIDIA H200": {"bandwidth": 4.26, "f32": 404.0, "f16": 775.0, "bf16": 775.0}}


# ---------------------------------------------------------------------------------------------------------------------
# What is measured besides time


def poison(like: Iterable[Tensor], clock: Clock) -> None:
    """Fills memory that the next results will probably get with NaN, so that an unwritten element shows."""
    held = [torch.full_like(t, math.nan) for t in like]
    clock.settle()
    del held


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for t in value if t is not None]


def compare(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> dict[str, float | bool]:
    """Relative L2 error (the worst tensor) and whether every element is within atol = rtol = 1e-4."""
    worst, close = 0.0, True
    for mine, reference in zip(ours, theirs, strict=True):
        if mine.shape != reference.shape or mine.dtype != reference.dtype:
            raise RuntimeError(
                f"result {tuple(mine.shape)} {mine.dtype}, PyTorch {tuple(reference.shape)} {reference.dtype}"
            )
        # Slice by slice: float64 copies of whole tensors would not fit beside the problem itself.
        error = norm = 0.0
        for a, b in zip(mine.reshape(-1).split(1 << 26), reference.reshape(-1).split(1 << 26), strict=True):
            a, b = a.float(), b.float()
            error += float((a - b).square().sum(dtype=torch.float64))
            norm += float(b.square().sum(dtype=torch.float64))
            close = close and bool(torch.isclose(a, b, atol=1e-4, rtol=1e-4).all())
        relative = math.sqrt(error / norm) if norm else math.sqrt(error)
        worst = math.nan if math.isnan(relative) or math.isnan(worst) else max(worst, relative)
    return {"relative_l2": worst, "allclose_1e4": close}


# Largest relative L2 distance to PyTorch's result. TF32 rounds each operand to 11 bits, f16 likewise, bf16 to 8; the
# errors are independent and average out over the sum, the final rounding does not.
LIMIT = {"f32": 1e-3, "f64": 1e-12, "f16": 2e-3, "bf16": 1.5e-2}


def against_float64(
    case: Case, direction: str, grad_output: Tensor | None, result: Sequence[Tensor], reference: Sequence[Tensor]
) -> dict[str, float]:
    """Relative L2 errors of both sides against float64: who is off where the two differ.

    Sums over millions of positions lose digits on the tensor cores, which truncate; libraries differ in how often they
    move a partial sum to fp32.
    """
    exact = copy.copy(case)
    exact.input = case.input.double()
    model = copy.deepcopy(case.theirs).double()
    exact.theirs = model
    truth = tensors(exact.runs(direction, model, None if grad_output is None else grad_output.double())())
    truth = [t.to(torch.float32 if case.dtype != "f64" else torch.float64) for t in truth]
    wide = [[t.to(truth[0].dtype) for t in side] for side in (result, reference)]
    return {
        name: float(compare(side, truth)["relative_l2"]) for name, side in zip(("tconv", "torch"), wide, strict=True)
    }


def resident(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def extra_memory(run: Run, device: torch.device) -> int | None:
    """Peak bytes in use during a call beyond what is in use before it, without the result itself."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        size = sum(t.numel() * t.element_size() for t in tensors(run()))
        return max(0, torch.cuda.max_memory_allocated() - before - size)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None
    before = resident("VmRSS")
    size = sum(t.numel() * t.element_size() for t in tensors(run()))
    return max(0, resident("VmHWM") - before - size)


def host_cost(device: torch.device, clock: Clock, calls: int = 300) -> dict[str, float]:
    """Microseconds of host time per call of a layer so small that nothing else counts."""
    x = torch.rand(1, 8, 8, 8, device=device)
    w = torch.rand(8, 8, 3, 3, device=device)
    sides: dict[str, Run] = {
        "tconv": lambda: tconv.conv_transpose2d(x, w, None, 2, 1),
        "torch": lambda: nn.functional.conv_transpose2d(x, w, None, 2, 1),
    }
    best: dict[str, list[float]] = {name: [] for name in sides}
    with torch.no_grad():
        for run in sides.values():
            run()
        clock.settle()
        for _ in range(7):
            for name, run in sides.items():
                begin = time.perf_counter()
                for _ in range(calls):
                    run()
                best[name].append((time.perf_counter() - begin) / calls * 1e6)
                clock.settle()
    return {name: round(statistics.median(values), 2) for name, values in best.items()}


def fastest(clock: Clock, run: Run, seconds: float) -> float:
    """The shortest of repeated runs: what the machine can do when nothing else is in the way."""
    times = [clock.once(run) for _ in range(3)]
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        times.append(clock.once(run))
    return min(times)


def rates(device: torch.device, dtypes: Sequence[str]) -> dict[str, float]:
    """The device's ceilings in 1e12 units a second: bandwidth, and the products of each dtype."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    found = dict(KNOWN_RATES.get(name, {}))
    clock: Clock = CudaClock(device) if device.type == "cuda" else CpuClock()
    if "bandwidth" not in found:
        elements = (1 << 28) if device.type == "cuda" else (1 << 25)
        source = torch.rand(elements, device=device)
        target = torch.empty_like(source)
        copy = fastest(clock, lambda: target.copy_(source), 0.5)
        found["bandwidth"] = 2 * 4 * elements / copy / 1e9
    n = 4096 if device.type == "cuda" else 1536
    for dtype in dtypes:
        if dtype in found:
            continue
        # On a CPU 16-bit operands are converted and multiplied in fp32.
        kind = torch.float32 if device.type == "cpu" and dtype in ("f16", "bf16") else DTYPES[dtype]
        a, b = (torch.rand(n, n, device=device).to(kind) for _ in range(2))
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        product = fastest(clock, lambda a=a, b=b: a @ b, 1.0)  # type: ignore[misc]
        torch.backends.cuda.matmul.allow_tf32 = allowed
        found[dtype] = 2.0 * n**3 / product / 1e9
    return {key: round(value, 4) for key, value in found.items()}


def commit() -> str:
    """The commit of the checkout that the driver runs in, else the one recorded when the package was built."""
    here = Path(__file__).resolve().parent
    try:
        from tconv._build_info import commit as built
    except ImportError:
        built = "unknown"
    if built != "unknown":
        return built
    answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, check=False, capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else built


def machine(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, check=False, capture_output=True, text=True).stdout.splitlines()[0].strip()
        except (OSError, IndexError):
            driver = "unknown"
        return {
            "kind": "cuda", "name": properties.name, "driver": driver, "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }  # fmt: skip
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    match = re.search(r"model name\s*: (.*)", text)
    return {"kind": "cpu", "name": match[1] if match else platform.processor(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str | None]:
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {
        "tconv": tconv.__version__, "torch": torch.__version__, "cuda": torch.version.cuda,
        "cudnn": str(cudnn) if cudnn else None, "python": platform.python_version(),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# One row


@dataclass
class Options:
    seconds: float  # per row, shared by its sides
    ieee: bool = False
    compiled: bool = False
    regret: bool = False


def plan_of(case: Case, direction: str, only: str = "") -> Any:
    precise = case.device.type == "cpu" or not torch.backends.cudnn.allow_tf32
    text = case.shape.string(case.dtype, case.layout, direction, tf32=not precise)
    chain = case.shape.chain() if direction == "forward" else ""
    return _C.plan_string(text + (f" | {chain}" if chain else ""), str(case.device), only)


def describe(case: Case, direction: str) -> dict[str, Any]:
    """What the planner chose for a direction of the table: kernels, predicted time, workspace."""
    parts = {"forward": ["forward"], "backward": ["grad_input", "grad_weight"], "train": ["forward"]}[direction]
    plans = [plan_of(case, part) for part in parts]
    steps = [step for plan in plans for step in plan.steps]
    return {
        "kernels": [f"{step['kernel']}:{step['config']}" for step in steps],
        "predicted_ms": round(sum(plan.microseconds for plan in plans) / 1e3, 5),
        "workspace_bytes": max(plan.workspace_bytes for plan in plans),
    }


def raw_runs(case: Case, direction: str, plans: dict[str, Any]) -> dict[str, Run]:
    """Plans on raw addresses, without the front end, all into the same memory. Layers without a chain."""
    shape, device = case.shape, case.device
    kind = DTYPES[case.dtype]
    layer = case.ours
    x, weight = case.input, layer.weight.detach().contiguous()  # type: ignore[operator, union-attr]
    bias = None if layer.bias is None else layer.bias.detach()  # type: ignore[operator, union-attr]
    grad = torch.rand((shape.batch, shape.out_channels, *shape.output()), device=device).to(kind)
    if case.layout == "channels_last":
        grad = grad.to(memory_format=CHANNELS_LAST[shape.rank])
    result = torch.full_like({"forward": grad, "grad_input": x, "grad_weight": weight}[direction], math.nan)
    grad_bias = torch.empty(shape.out_channels, device=device, dtype=kind) if shape.bias else None
    most = max(plan.workspace_bytes for plan in plans.values())
    workspace = torch.empty(most + 256, dtype=torch.uint8, device=device)
    address = (workspace.data_ptr() + 255) & ~255

    def at(tensor: Tensor | None, used: bool = True) -> int | None:
        return tensor.data_ptr() if tensor is not None and used else None

    def bound(plan: Any) -> Run:
        def run() -> tuple[Tensor, Tensor]:
            stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
            forward = direction == "forward"
            _C.run(
                plan, stream, torch.get_num_threads(), at(x, direction != "grad_input"),
                at(weight, direction != "grad_weight"), at(bias, forward), at(grad, not forward), at(result),
                at(grad_bias, direction == "grad_weight"), None, None, None, address, None, None, False,
            )  # fmt: skip
            return result, workspace

        return run

    return {name: bound(plan) for name, plan in plans.items()}


REGRET_CANDIDATES, REGRET_FACTOR = 12, 1.5  # of the lowest price; within that factor lie up to 120, minutes to compile


def regret(case: Case, direction: str, clock: Clock, seconds: float) -> dict[str, Any]:
    """The kernels and configs that may be the best, timed: how far the planner's choice is from the best of them."""
    found: dict[str, Any] = {}
    for part in ["forward"] if direction == "forward" else ["grad_input", "grad_weight"]:
        fitting = [c for c in plan_of(case, part).candidates if not c["refusal"]]
        by_price = sorted(fitting, key=lambda c: c["microseconds"])
        most = REGRET_FACTOR * by_price[0]["microseconds"]
        near = [c for c in by_price[:REGRET_CANDIDATES] if c["microseconds"] <= most]
        names = {f"{c['kernel']}:{c['config']}": c for c in fitting if c["chosen"] or c in near}
        times = interleaved(clock, raw_runs(case, part, {n: plan_of(case, part, n) for n in names}), seconds)
        picked = next(name for name, candidate in names.items() if candidate["chosen"])
        best = min(times, key=lambda name: times[name])
        found[part] = {
            "chosen": picked, "best": best, "regret": round(times[picked] / times[best], 4),
            "ms": {name: round(value, 5) for name, value in times.items()},
            "predicted_ms": {name: round(candidate["microseconds"] / 1e3, 5) for name, candidate in names.items()},
        }  # fmt: skip
    return found


def torch_runs(case: Case, direction: str, grad_output: Tensor | None, options: Options) -> dict[str, Run]:
    """PyTorch's sides. `torch` is the default; on CUDA cudnn.benchmark is tried both ways and the better one counts."""
    model = case.theirs
    runs = {"torch": case.runs(direction, model, grad_output)}
    if case.device.type == "cuda":

        def under(run: Run, *, benchmark: bool | None = None, tf32: bool | None = None) -> Run:
            def with_flags() -> Any:
                # Plain assignments: the context manager of torch.backends costs the host tens of microseconds.
                before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
                torch.backends.cudnn.benchmark = before[0] if benchmark is None else benchmark
                torch.backends.cudnn.allow_tf32 = before[1] if tf32 is None else tf32
                try:
                    return run()
                finally:
                    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before

            return with_flags

        runs["torch_benchmark"] = under(runs["torch"], benchmark=True)
        if options.ieee and case.dtype == "f32":
            runs["torch_ieee"] = under(runs["torch"], tf32=False)
    if options.compiled and case.shape.ops:
        runs["torch_compile"] = case.runs(direction, torch.compile(model), grad_output)  # type: ignore[arg-type]
    return runs


def compile_ahead(listed: Sequence[Listed], device: torch.device, workers: int) -> float:
    """Fills the disk cache of compiled kernels; a first run needs hundreds. Returns the seconds it took.

    In processes, because the compiler serialises much of its work within one.
    """
    begin = time.perf_counter()
    tf32 = torch.backends.cudnn.allow_tf32
    wanted: dict[str, bool] = {}  # problem -> with gradients
    for shape, dtype, layout, direction in listed:
        chain = f" | {shape.chain()}" if shape.chain() else ""
        text = shape.string(dtype, layout, tf32=tf32) + chain
        wanted[text] = wanted.get(text, False) or direction != "forward"
    command = [sys.executable, "-m", "tconv", "compile", "--device", str(device)]
    processes = []
    for training in (True, False):
        # A chain's plans for training and for inference are not the same.
        fused = [text for text in wanted if text.partition(" | ")[2] not in ("", "bias")]
        texts = [text for text, gradients in wanted.items() if gradients == training]
        texts += [] if training else [text for text in fused if text not in texts]
        for part in (texts[i::workers] for i in range(workers)):
            if part:
                options = ["--training"] if training else []
                processes.append(subprocess.Popen([*command, *options, *part], stdout=subprocess.DEVNULL))
    for process in processes:
        if process.wait() != 0:
            progress("bench: a problem did not compile ahead; its row says why\n")
    return time.perf_counter() - begin


Cold = dict[Listed, dict[str, float]]


def cold_calls(listed: Sequence[Listed], device: torch.device) -> Cold:
    """Milliseconds of first calls with nothing compiled before: forward, gradients, or for a training step both.

    In one process without a disk cache, which has the machine to itself: a call compiles on up to a dozen cores. It
    forgets all that was compiled before each call.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), without_caches) as pool:
        return pool.submit(first_calls, listed, device).result()


def without_caches() -> None:
    os.environ["TCONV_CACHE_DIR"] = ""
    os.environ["CUDA_CACHE_DISABLE"] = "1"  # the driver's own, which NVRTC uses


def forget() -> None:
    """As in a new process: no layer has been seen, no program compiled."""
    for table in (_core._forward_entries, _core._backward_entries, _fused._entries, _fused._pointwise_entries):
        table.clear()
    _C.forget_functions()


def first_calls(listed: Sequence[Listed], device: torch.device) -> Cold:
    clock = CudaClock(device)
    # The first program of a process loads the compiler, and PyTorch's first gradient imports.
    tiny = torch.rand(1, 8, 8, 8, device=device, requires_grad=True)
    result = tconv.conv_transpose2d(tiny, torch.rand(8, 8, 3, 3, device=device))
    torch.autograd.grad(result, tiny, torch.ones_like(result))

    def first(run: Run) -> float:
        clock.settle()
        begin = time.perf_counter()
        run()
        clock.settle()
        return round((time.perf_counter() - begin) * 1e3, 2)

    milliseconds: Cold = {}
    for number, job in enumerate(listed):
        shape, dtype, layout, direction = job
        progress(f"bench: first calls [{number + 1}/{len(listed)}] {shape.name} {dtype} {layout} {direction}")
        case = Case(shape, dtype, layout, device)
        forget()
        milliseconds[job] = times = {}
        if direction == "forward":
            times["forward"] = first(case.forward(case.ours))
            continue
        with torch.no_grad():
            grad_output = torch.rand_like(case.ours(case.input))
        if direction == "train":  # keeps more than a forward pass without gradients
            forget()
            times["forward"] = first(partial(case.ours, case.input))
        gradients = case.gradients(case.ours, grad_output, whole_step=False)
        forget()
        times["gradients"] = first(gradients)
    progress("")
    return milliseconds


def measure(case: Case, direction: str, clock: Clock, ceilings: dict[str, float], options: Options) -> dict[str, Any]:
    shape = case.shape
    grad_output = None
    if direction != "forward":
        with torch.no_grad():
            grad_output = torch.rand_like(case.theirs(case.input))
            if case.dtype == "f16":  # a weight's gradient sums over all positions; float16 ends at 65504
                grad_output *= min(1.0, 8192 / (shape.batch * math.prod(shape.output())))
    ours = case.runs(direction, case.ours, grad_output)
    sides = torch_runs(case, direction, grad_output, options)

    reference = tensors(sides["torch"]())
    poison(reference, clock)
    first = time.perf_counter()
    result = tensors(ours())
    clock.settle()
    first_call_ms = (time.perf_counter() - first) * 1e3
    check = compare(result, reference)
    ok = bool(check["relative_l2"] <= LIMIT[case.dtype])
    errors = {}
    if not ok and math.isfinite(check["relative_l2"]):
        # Where the sides differ, float64 says who is right: at least as close to it as PyTorch is required.
        errors = against_float64(case, direction, grad_output, result, reference)
        ok = errors["tconv"] <= max(LIMIT[case.dtype], errors["torch"])
    del result, reference
    row: dict[str, Any] = {
        "name": shape.name, "seed": shape.seed or None, "dtype": case.dtype, "layout": case.layout,
        "direction": direction, "problem": shape.string(case.dtype, case.layout, tf32=False)
        + (f" | {shape.chain()}" if shape.chain() else ""),
        "batch": shape.batch, "full_batch": shape.full_batch or shape.batch,
        "input": list(shape.input), "full_input": list(shape.full_input or shape.input), **check,
        "ok": ok, "first_call_ms": round(first_call_ms, 2),
    }  # fmt: skip
    if errors:
        row["error_to_float64"] = errors
    row |= describe(case, direction)
    extra = {"tconv": extra_memory(ours, case.device), "torch": extra_memory(sides["torch"], case.device)}
    row["extra_bytes"] = extra

    times = interleaved(clock, {"tconv": ours, **sides}, options.seconds)
    theirs = min(times[name] for name in ("torch", "torch_benchmark") if name in times)
    floor = shape.floor_ms(direction, case.dtype, ceilings)
    row |= {
        "ms": {name: round(value, 5) for name, value in times.items()},
        "tconv_ms": round(times["tconv"], 5), "torch_ms": round(theirs, 5),
        "ratio": round(theirs / times["tconv"], 4), "floor_ms": round(floor, 5),
        "share_of_floor": round(floor / times["tconv"], 4),
    }  # fmt: skip
    if case.device.type == "cuda" and direction == "forward" and theirs < 0.4:
        # Small layers are run from CUDA graphs in practice; there the host's share is gone on both sides.
        replays = {"tconv": captured(ours), "torch": captured(sides["torch"])}
        row["graph_ms"] = {k: round(v, 5) for k, v in interleaved(clock, replays, options.seconds / 2).items()}
    if options.regret and not shape.ops and direction in ("forward", "backward"):
        row["regret"] = regret(case, direction, clock, options.seconds)
    return row


# ---------------------------------------------------------------------------------------------------------------------
# The table and the command


def compare_layouts(rows: Sequence[dict[str, Any]]) -> None:
    """Adds the ratio to PyTorch's better memory format to rows of problems that were measured in both."""
    best: dict[tuple[str, str, str], float] = {}
    for row in rows:
        key = row["name"], row["dtype"], row["direction"]
        best[key] = min(best.get(key, math.inf), row["torch_ms"])
    for row in rows:
        row["ratio_better_layout"] = round(best[row["name"], row["dtype"], row["direction"]] / row["tconv_ms"], 4)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values)) if values else math.nan


def milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.1f}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per row, at most 100 columns, and the geometric means."""
    lines = [
        f"{'problem':<26} {'dtype':<8} {'direction':<9} {'torch ms':>9} {'tconv':>9} {'ratio':>6} {'floor':>6}  kernel"
    ]
    for row in rows:
        name = row["name"] + (f" b{row['batch']}" if row["batch"] != row["full_batch"] else "")
        name += f" i{'x'.join(map(str, row['input']))}" if row["input"] != row["full_input"] else ""
        kind = row["dtype"] + (" cl" if row["layout"] == "channels_last" else "")
        kernel = row["kernels"][0].split(":")[0] if row["kernels"] else "-"
        wrong = "" if row["ok"] else f" WRONG {row['relative_l2']:.1e}"
        lines.append(
            f"{name[:26]:<26} {kind:<8} {row['direction']:<9} {milliseconds(row['torch_ms']):>9}"
            f" {milliseconds(row['tconv_ms']):>9} {row['ratio']:>6.2f} {row['share_of_floor']:>6.0%}"
            f"  {kernel[: 20 - min(len(wrong), 16)]}{wrong}"
        )
    for dtype, direction in sorted({(r["dtype"], r["direction"]) for r in rows}):
        group = [r for r in rows if (r["dtype"], r["direction"]) == (dtype, direction)]
        for layout in sorted({r["layout"] for r in group}):
            same = [r["ratio"] for r in group if r["layout"] == layout]
            better = [r["ratio_better_layout"] for r in group if r["layout"] == layout]
            line = f"{dtype} {layout} {direction}: {len(same)} problems, geometric mean {geometric_mean(same):.2f}x"
            line += f" of PyTorch, lowest {min(same):.2f}x"
            if any(b < 0.999 * a for a, b in zip(same, better, strict=True)):
                line += f"; against its better layout {geometric_mean(better):.2f}x, lowest {min(better):.2f}x"
            lines.append(line)
    cold = [
        (ms, f"{r['name']} {r['dtype']} {r['layout']} {what}")
        for r in rows
        for what, ms in r.get("cold_call_ms", {}).items()
    ]
    if cold:
        longest, where = max(cold)
        median = statistics.median([t for t, _ in cold])
        lines.append(
            f"first calls with nothing compiled before: {len(cold)}, median {median:.0f} ms,"
            f" {sum(t > 1000 for t, _ in cold)} above 1 s, longest {longest:.0f} ms ({where})"
        )
    regrets = [
        (part["regret"], f"{r['name']} {r['dtype']} {r['layout']} {direction}, best {part['best']}")
        for r in rows
        for direction, part in r.get("regret", {}).items()
    ]
    if regrets:
        worst, where = max(regrets)
        lines.append(
            f"planner regret over {len(regrets)} choices: geometric mean {geometric_mean([r for r, _ in regrets]):.3f},"
            f" {sum(r > 1.05 for r, _ in regrets)} above 1.05, worst {worst:.3f} ({where})"
        )
    return "\n".join(lines)


def jobs(shapes: dict[str, list[Shape]], arguments: argparse.Namespace) -> list[Listed]:
    """What to measure, the most wanted first: fp32 forward of every problem, then fp32 gradients, then 16 bits."""
    listed = []
    layouts = arguments.layouts.split(",")
    for dtype in arguments.dtypes.split(","):
        for direction in arguments.directions.split(","):
            for shape in shapes[dtype]:
                for layout in layouts if dtype in ("f16", "bf16") else layouts[:1]:
                    if (direction == "train") != bool(shape.ops) and direction != "forward":
                        continue  # gradients of plain layers on their own, those of chains as a whole step
                    if layout == "channels_last" and shape.rank == 1:
                        continue
                    listed.append((shape, dtype, layout, direction))
    return listed


def progress(text: str) -> None:
    end = "\r" if sys.stderr.isatty() else "\n"
    print(f"\x1b[2K{text}" if end == "\r" else text, end=end, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tconv bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("problems", nargs="*", help="problem strings; default: the named problems of the package")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--filter", default="", help="only problems whose name, seed or string matches this expression")
    parser.add_argument("--dtypes", default=None, help="default: f32,f16 on CUDA, f32,bf16 on the CPU")
    parser.add_argument("--directions", default="forward,backward,train")
    parser.add_argument("--layouts", default="contiguous,channels_last", help="of 16-bit tensors; fp32 uses the first")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument(
        "--budget", type=float, default=None,
        help="seconds, default 600 on CUDA and 3600 on the CPU; what does not fit is named and left out",
    )  # fmt: skip
    parser.add_argument("--row-seconds", type=float, default=None, help="timed seconds per row")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; default: as PyTorch")
    parser.add_argument("--ieee", action="store_true", help="time PyTorch without TF32 too")
    parser.add_argument("--compile", action="store_true", help="time torch.compile on chains too")
    parser.add_argument("--regret", action="store_true", help="time the 12 cheapest configs beside the choice")
    parser.add_argument("--cold", action="store_true", help="time first calls with nothing compiled before too (CUDA)")
    parser.add_argument("--full-batch", action="store_true", help="never reduce the batch or sizes")
    parser.add_argument(
        "--workers", type=int, default=min(12, os.cpu_count() or 1), help="compile ahead on CUDA; 0: no"
    )
    parser.add_argument("--stop-on-error", action="store_true", help="do not go on after an exception")
    arguments = parser.parse_args(argv)

    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    on_cuda = device.type == "cuda"
    arguments.budget = arguments.budget or (600 if on_cuda else 3600)
    arguments.dtypes = arguments.dtypes or ("f32,f16" if on_cuda else "f32,bf16")
    clock: Clock = CudaClock(device) if on_cuda else CpuClock()
    options = Options(
        seconds=arguments.row_seconds or (0.25 if on_cuda else 2.0), ieee=arguments.ieee, compiled=arguments.compile,
        regret=arguments.regret,
    )  # fmt: skip

    shapes = [parse(f"given_{i + 1}", text) for i, text in enumerate(arguments.problems)] or named()
    wanted = re.compile(arguments.filter, re.IGNORECASE)
    shapes = [s for s in shapes if wanted.search(f"{s.name} {s.seed} {s.string(tf32=False)} | {s.chain()}")]
    if not shapes:
        parser.error(f"no problem matches --filter {arguments.filter!r}")
    sized = {dtype: shapes for dtype in arguments.dtypes.split(",")}
    if not arguments.full_batch:
        room = torch.cuda.mem_get_info(device)[0] * 0.8 if on_cuda else min(resident_available() * 0.5, 3e9)
        for dtype in sized:
            # Where the processor has no bfloat16 instructions, PyTorch takes half a second for 1e9 operations.
            slow = not on_cuda and dtype == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
            most = math.inf if on_cuda else 1e9 if slow else 1.6e11
            sized[dtype] = [reduced(s, room, most, sizes=slow) for s in shapes]

    load = [round(os.getloadavg()[0], 2)]
    listed = jobs(sized, arguments)
    cold = cold_calls(listed, device) if on_cuda and arguments.cold else {}
    begin = time.perf_counter()
    if on_cuda and arguments.workers:
        progress(f"bench: compiling ahead in {arguments.workers} processes")
        progress(f"bench: compiled in {compile_ahead(listed, device, arguments.workers):.0f} s\n")
    ceilings = rates(device, arguments.dtypes.split(","))
    host = host_cost(device, clock)
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    case: Case | None = None
    for number, (shape, dtype, layout, direction) in enumerate(listed):
        spent = time.perf_counter() - begin
        label = f"{shape.name} {dtype} {layout} {direction}"
        if spent > arguments.budget:
            left_out.append({"row": label, "reason": f"budget of {arguments.budget:.0f} s"})
            continue
        progress(f"bench [{number + 1}/{len(listed)}] {spent:4.0f} s  {label}")
        try:
            if case is None or (case.shape, case.dtype, case.layout) != (shape, dtype, layout):
                case = None  # frees the last one's tensors first
                case = Case(shape, dtype, layout, device)
            rows.append(measure(case, direction, clock, ceilings, options))
            if cold:
                rows[-1]["cold_call_ms"] = cold[shape, dtype, layout, direction]
        except (RuntimeError, ValueError, MemoryError) as error:
            if arguments.stop_on_error:
                raise
            left_out.append({"row": label, "reason": f"{type(error).__name__}: {error}"})
            case = None
        if on_cuda:
            torch.cuda.empty_cache()
    progress("")

    compare_layouts(rows)
    failed = [row for row in rows if not row["ok"]]
    if rows:
        print(table(rows))
    print(f"host cost per call: tconv {host['tconv']} us, PyTorch {host['torch']} us (a tiny layer, no gradient)")
    for entry in left_out:
        print(f"left out: {entry['row']}: {entry['reason'][:400]}")
    if arguments.json:
        load.append(round(os.getloadavg()[0], 2))
        record = {
            "commit": commit(), "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(device) | ({} if on_cuda else {"load_average": load}), "versions": versions(),
            "rates_tera": ceilings, "host_us_per_call": host,
            "method": f"medians of interleaved runs, {clock.flush_note}, inputs uniform in [0, 1)",
            "seconds": round(time.perf_counter() - begin, 1), "left_out": left_out, "rows": rows,
        }  # fmt: skip
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        head = {key: value for key, value in record.items() if key != "rows"}
        body = ",\n".join("  " + json.dumps(row) for row in rows)
        arguments.json.write_text(json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + body + "\n ]\n}\n")
        print(f"written: {arguments.json}")
    if failed:
        print(f"{len(failed)} of {len(rows)} results differ from PyTorch's by more than allowed", file=sys.stderr)
    broken = [entry for entry in left_out if not entry["reason"].startswith("budget")]
    return 1 if failed or broken else 0


def resident_available() -> float:
    """Bytes of memory that a process can still take."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return float(match[1]) * 1024 if match else 4e9


if __name__ == "__main__":
    sys.exit(main())
