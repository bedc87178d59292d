"""The main job, end to end: python examples/demo.py, or `make demo`, which sets everything up first.

1. The four seed problems at full size (a smaller batch where memory is short), forward and backward, verified against
   PyTorch with atol = rtol = 1e-4 and timed next to it.
2. A trained network on real pictures: the text detector that the package rapidocr-onnxruntime carries, read from its
   ONNX file into PyTorch. Its head ends in two transposed convolutions. tconv.optimize rewrites the head; the output
   before and after must agree. The pictures are written to out/demo.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from PIL import Image, ImageDraw
from torch import Tensor, nn

import tconv
from tconv import bench, problems

ROOT = Path(__file__).resolve().parent.parent
SEEDS = ("kernelbench_1_57", "kernelbench_1_81", "kernelbench_1_73", "kernelbench_1_73_groups4", "kernelbench_2_19")
TOLERANCE = 1e-4


class Progress:
    """A bar on one line of the terminal, or one line per step where there is none."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done, self.begin = steps, 0, time.perf_counter()
        self.live = sys.stderr.isatty()

    def step(self, text: str) -> None:
        filled = 24 * self.done // self.steps
        bar = "#" * filled + "." * (24 - filled)
        line = f"[{bar}] {self.done}/{self.steps} {time.perf_counter() - self.begin:4.0f} s  {text}"
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[2K{line[:width]}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
        self.done += 1

    def clear(self) -> None:
        if self.live:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The seeds


def close(ours: Tensor, theirs: Tensor) -> tuple[bool, float]:
    """allclose, and the largest difference over what is allowed there; in slices, which need little memory."""
    worst = 0.0
    for a, b in zip(ours.reshape(-1).split(1 << 24), theirs.reshape(-1).split(1 << 24), strict=True):
        worst = max(worst, float(((a - b).abs() / (TOLERANCE + TOLERANCE * b.abs())).nan_to_num(math.inf).max()))
    return worst <= 1, worst


def timed(run: Callable[[], Any], settle: Callable[[], None], seconds: float) -> tuple[Any, float]:
    """The result and the median of runs; one run where it takes longer than `seconds`."""
    times: list[float] = []
    result = None
    while not times or (sum(times) + times[-1] <= seconds and len(times) < 9):
        result = None
        settle()
        begin = time.perf_counter()
        result = run()
        settle()
        times.append(time.perf_counter() - begin)
    return result, sorted(times)[len(times) // 2]


def seed_row(shape: problems.Shape, device: torch.device, progress: Progress) -> tuple[str, bool]:
    clock: bench.Clock = bench.CudaClock(device) if device.type == "cuda" else bench.CpuClock()
    label = f"{shape.seed} {shape.name}"
    progress.step(f"{label}: inputs")
    case = bench.Case(shape, "f32", "contiguous", device)
    size = (shape.batch, shape.out_channels, *shape.output())
    grad_output = torch.rand(size, device=device)
    if device.type == "cuda":  # the first call compiles the kernel and starts cuDNN
        for model in (case.theirs, case.ours):
            torch.autograd.grad(model(case.input.requires_grad_()), case.input, grad_output)
    forward: dict[str, tuple[Tensor, float]] = {}
    backward: dict[str, tuple[tuple[Tensor, ...], float]] = {}
    for side, model in (("PyTorch", case.theirs), ("tconv", case.ours)):
        wanted = [case.input.detach().requires_grad_(), *case.parameters()]
        progress.step(f"{label}: forward, {side}")
        output, seconds = timed(lambda model=model, x=wanted[0]: model(x), clock.settle, 1.0)  # type: ignore[misc]
        progress.step(f"{label}: backward, {side}")
        backward[side] = timed(
            lambda y=output, w=wanted: torch.autograd.grad(y, w, grad_output, retain_graph=True),  # type: ignore[misc]
            clock.settle,
            1.0,
        )
        forward[side] = output.detach(), seconds
        del output, wanted
        gc.collect()
    progress.step(f"{label}: verify")
    ok, worst = close(forward["tconv"][0], forward["PyTorch"][0])
    # A gradient of a weight adds up millions of terms: its rounding error grows with the sum, as rtol allows.
    agree, mark = True, ""
    for mine, reference in zip(backward["tconv"][0], backward["PyTorch"][0], strict=True):
        scale = float(reference.abs().max()) or 1.0
        good, most = close(mine / max(scale, 1.0), reference / max(scale, 1.0))
        agree, worst = agree and good, max(worst, most)
    if ok and not agree and math.isfinite(worst):  # float64 says who is right
        errors = bench.against_float64(case, "backward", grad_output, backward["tconv"][0], backward["PyTorch"][0])
        agree, mark = errors["tconv"] <= errors["torch"], "*"
    ok = ok and agree
    t, f = (forward[side][1] * 1e3 for side in ("PyTorch", "tconv"))
    tb, fb = (backward[side][1] * 1e3 for side in ("PyTorch", "tconv"))
    batch = f"{shape.batch} of {shape.full_batch}" if shape.full_batch else str(shape.batch)
    name = {"kernelbench_1_73_groups4": "S3 groups=4"}.get(shape.name, shape.seed)
    text = f"{name:<12} {batch:>8} {t:>10.1f} {f:>10.1f} {t / f:>6.2f} {tb:>11.1f} {fb:>10.1f} {tb / fb:>6.2f}"
    return f"{text}  {'ok' + mark if ok else 'WRONG'} ({worst:.2f} of it)", ok


def build_key(device: torch.device) -> str:
    """Names the compiled library, PyTorch and the device: what the verification at full size depends on."""
    library = hashlib.sha256(Path(str(tconv._C.__file__)).read_bytes()).hexdigest()[:16]
    return f"{library} {torch.__version__} {device} {torch.get_num_threads()}"


def seeds(device: torch.device, progress: Progress, most_batch: int, out: Path, full: bool) -> bool:
    """At full size; where this very build has already done that, at an eighth of the batch unless --full asks."""
    record = out / "seeds_verified.txt"
    key = build_key(device)
    quick = not full and device.type == "cpu" and record.is_file() and record.read_text() == key
    if quick:
        print(
            "This build has already verified the seeds at full size here; now an eighth of the batch. ARGS=--full: all."
        )
    shapes = {s.name: s for s in problems.named()}
    room = 0.85 * (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else bench.resident_available())
    lines, good = [], True
    for name in SEEDS:
        shape = shapes[name]
        # A fused chain's reference keeps the result of every layer for its backward pass.
        fitting = problems.reduced(shape, room / (2 if shape.ops else 1), math.inf)
        if fitting.batch > most_batch:
            fitting = replace(shape, batch=most_batch, full_batch=shape.batch)
        if quick:
            fitting = replace(shape, batch=max(1, fitting.batch // 8), full_batch=shape.batch)
        elif fitting.full_batch:
            reason = "--batch" if fitting.batch == most_batch else f"{room / 1e9:.1f} GB of memory are free"
            progress.clear()
            print(f"{shape.seed}: batch {fitting.batch} instead of {shape.batch}, because of {reason}")
        line, ok = seed_row(fitting, device, progress)
        lines.append(line)
        good = good and ok
        gc.collect()
    progress.clear()
    threads = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"\nThe seeds in fp32, PyTorch {torch.__version__} on {threads}, in ms, atol = rtol = {TOLERANCE}")
    sides = f"{'fwd torch':>10} {'tconv':>10} {'ratio':>6} {'bwd torch':>11} {'tconv':>10} {'ratio':>6}"
    print(f"{'':<12} {'batch':>8} {sides}")
    print("\n".join(lines))
    if any("ok*" in line for line in lines):
        print("* beyond it, because gradients of PyTorch's are further from those in float64 than tconv's")
    if good and not quick and most_batch > max(s.batch for s in shapes.values()):
        out.mkdir(parents=True, exist_ok=True)
        temporary = record.with_suffix(".part")
        temporary.write_text(key)
        temporary.replace(record)
    return good


# ---------------------------------------------------------------------------------------------------------------------
# The network


class Detector(nn.Module):
    """The ONNX graph of the text detector, run node by node; its head is an nn.Sequential that can be rewritten.

    Only the operators of that network are known; any other is an error that names it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        graph = onnx.load(str(path)).graph
        self.input_name, self.output_name = graph.input[0].name, graph.output[0].name
        constants = {t.name: np.array(numpy_helper.to_array(t)) for t in graph.initializer}
        nodes = []
        for node in graph.node:
            if node.op_type == "Constant":
                constants[node.output[0]] = np.array(numpy_helper.to_array(node.attribute[0].t))
            else:
                nodes.append(node)
        first = next(index for index, node in enumerate(nodes) if node.op_type == "ConvTranspose")
        self.steps: list[tuple[str, list[str], str, dict[str, Any]]] = []
        for node in nodes[:first]:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            self.steps.append((node.op_type, list(node.input), node.output[0], attributes))
        used = {name for _, inputs, _, _ in self.steps for name in inputs}
        for name in sorted(used & constants.keys()):
            self.register_buffer(self.key(name), torch.from_numpy(constants[name]))
        self.names = used & constants.keys()
        self.head_input = nodes[first].input[0]
        self.head = self.read_head(nodes[first:], constants)

    @staticmethod
    def key(name: str) -> str:
        return "c_" + name.replace(".", "_").replace("@", "_")

    @staticmethod
    def read_head(nodes: list[Any], constants: dict[str, np.ndarray]) -> nn.Sequential:
        """The chain from the first transposed convolution to the output, as the layers of torch.nn."""
        layers: list[nn.Module] = []
        for node in nodes:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            values = [torch.from_numpy(constants[name]) for name in node.input[1:] if name in constants]
            if node.op_type == "ConvTranspose":
                (weight,) = values
                pads = attributes["pads"]
                layer = nn.ConvTranspose2d(
                    weight.shape[0], weight.shape[1] * attributes["group"], tuple(attributes["kernel_shape"]),
                    stride=tuple(attributes["strides"]), padding=tuple(pads[:2]), groups=attributes["group"],
                    dilation=tuple(attributes["dilations"]),
                )  # fmt: skip
                layer.weight.data.copy_(weight)
                layers.append(layer)
            elif node.op_type == "Add":  # the bias, written as a node of its own
                layer = layers[-1]
                if not isinstance(layer, nn.ConvTranspose2d) or layer.bias is None:
                    raise RuntimeError(f"the detector's head adds {node.input[1]} where no bias can be")
                layer.bias.data.copy_(values[0].reshape(-1))
            elif node.op_type == "BatchNormalization":
                weight, bias, mean, variance = values
                norm = nn.BatchNorm2d(weight.numel(), eps=attributes["epsilon"])
                norm.load_state_dict({"weight": weight, "bias": bias, "running_mean": mean, "running_var": variance,
                                      "num_batches_tracked": torch.tensor(0)})  # fmt: skip
                layers.append(norm)
            elif node.op_type in ("Relu", "Sigmoid"):
                layers.append(nn.ReLU() if node.op_type == "Relu" else nn.Sigmoid())
            else:
                raise RuntimeError(f"the detector's head holds {node.op_type}, which this reader does not know")
        return nn.Sequential(*layers)

    def forward(self, picture: Tensor) -> Tensor:
        values: dict[str, Tensor] = {self.input_name: picture}
        for operator, inputs, output, attributes in self.steps:
            operands = [getattr(self, self.key(n)) if n in self.names else values[n] for n in inputs if n]
            values[output] = self.apply_operator(operator, operands, attributes)
        return self.head(values[self.head_input])

    @staticmethod
    def apply_operator(operator: str, x: list[Tensor], attributes: dict[str, Any]) -> Tensor:
        functional = nn.functional
        if operator == "Conv":
            pads = attributes["pads"]
            return functional.conv2d(
                x[0], x[1], x[2] if len(x) > 2 else None, attributes["strides"], pads[:2], attributes["dilations"],
                attributes["group"],
            )  # fmt: skip
        if operator == "BatchNormalization":
            return functional.batch_norm(x[0], x[3], x[4], x[1], x[2], eps=attributes["epsilon"])
        if operator == "HardSigmoid":
            return (x[0] * attributes["alpha"] + attributes["beta"]).clamp(0, 1)
        if operator == "Resize":  # nearest, by whole factors given last
            return functional.interpolate(x[0], scale_factor=[float(v) for v in x[-1][2:]], mode="nearest")
        if operator == "Concat":
            return torch.cat(x, attributes["axis"])
        simple: dict[str, Callable[..., Tensor]] = {
            "Add": torch.add, "Mul": torch.mul, "Div": torch.div, "Relu": torch.relu,
            "Clip": lambda a, low, high: a.clamp(float(low), float(high)),
            "GlobalAveragePool": lambda a: a.mean((2, 3), keepdim=True),
        }  # fmt: skip
        if operator not in simple:
            raise RuntimeError(f"the detector holds the operator {operator}, which this reader does not know")
        return simple[operator](*x)


def package_file(package: str, ending: str) -> Path:
    """A file inside an installed package, found without importing it."""
    for entry in metadata.files(package) or []:
        if str(entry).endswith(ending):
            return Path(str(entry.locate()))
    raise RuntimeError(
        f"the package {package} holds no file that ends in {ending!r}; `make demo` installs the right one"
    )


def pictures() -> dict[str, Image.Image]:
    """A scan of a printed page that scikit-image ships, enlarged, and a sign drawn here."""
    page = Image.open(package_file("scikit-image", "skimage/data/page.png")).convert("RGB")
    page = page.resize((1152, 576), Image.Resampling.BICUBIC)
    sign = Image.new("RGB", (960, 544), "#24405c")
    draw = ImageDraw.Draw(sign)
    draw.rounded_rectangle((40, 36, 920, 300), 24, fill="#f2efe6")
    draw.text((90, 66), "Transposed", fill="#24405c", font_size=96)
    draw.text((330, 176), "convolution", fill="#b03a2e", font_size=96)
    draw.text((70, 330), "o = s i + d t - p", fill="#f2c14e", font_size=60)
    draw.text((520, 470), "small print, 24 pixels high", fill="#d8dee6", font_size=24)
    return {"page": page, "sign": sign}


def gray(values: np.ndarray) -> Image.Image:
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


def sheet(parts: list[tuple[str, Image.Image]]) -> Image.Image:
    """Titled pictures in two columns."""
    width, height = parts[0][1].size
    rows = (len(parts) + 1) // 2
    page = Image.new("RGB", (2 * width + 24, rows * (height + 32) + 8), "white")
    draw = ImageDraw.Draw(page)
    for index, (title, image) in enumerate(parts):
        left, top = 8 + index % 2 * (width + 8), 8 + index // 2 * (height + 32)
        draw.text((left, top), title, fill="black", font_size=16)
        page.paste(image.convert("RGB"), (left, top + 24))
    return page


def network(device: torch.device, progress: Progress, out: Path) -> bool:
    out.mkdir(parents=True, exist_ok=True)
    progress.step("text detector: read the weights")
    detector = Detector(package_file("rapidocr-onnxruntime", "det_infer.onnx")).eval().to(device)
    images = pictures()
    clock: bench.Clock = bench.CudaClock(device) if device.type == "cuda" else bench.CpuClock()

    def run(picture: Tensor) -> tuple[Tensor, float]:
        with torch.no_grad():
            detector(picture)  # the first call sets up memory and plans on either side
            return timed(lambda: detector(picture), clock.settle, 1.0)

    inputs = {
        name: (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device).float() / 255 - 0.5) / 0.5
        for name, image in images.items()
    }
    before, features, head = {}, {}, {}
    for name, picture in inputs.items():
        progress.step(f"text detector: {name}, torch.nn")
        hook = detector.head.register_forward_pre_hook(lambda _, given, name=name: features.__setitem__(name, given[0]))
        before[name] = run(picture)
        hook.remove()
    with torch.no_grad():
        head["torch"] = {n: timed(lambda f=f: detector.head(f), clock.settle, 0.5)[1] for n, f in features.items()}
    progress.step("text detector: tconv.optimize")
    report = tconv.optimize(detector).tconv_report
    rows, good = [], True
    for name, picture in inputs.items():
        progress.step(f"text detector: {name}, tconv")
        probability, seconds = run(picture)
        with torch.no_grad():
            head_seconds = timed(lambda f=features[name]: detector.head(f), clock.settle, 0.5)[1]
        theirs, their_seconds = before[name]
        ok, _ = close(probability, theirs)
        good = good and ok
        maps = [t[0, 0].float().cpu().numpy() for t in (theirs, probability)]
        difference = np.abs(maps[0] - maps[1])
        shown = np.asarray(images[name]).astype(np.float32) / 255
        marked = shown * (1 - 0.6 * maps[1][..., None]) + np.array([1.0, 0.1, 0.1]) * 0.6 * maps[1][..., None]
        parts = [
            ("input", images[name]), ("where text is (tconv)", Image.fromarray((marked * 255).astype(np.uint8))),
            ("probability, torch.nn", gray(maps[0])), ("probability, tconv", gray(maps[1])),
            (f"difference x 1e5 (largest {difference.max():.1e})", gray(difference * 1e5)),
        ]  # fmt: skip
        images[name].save(out / f"{name}_input.png")
        gray(maps[0]).save(out / f"{name}_before.png")
        gray(maps[1]).save(out / f"{name}_after.png")
        gray(difference * 1e5).save(out / f"{name}_difference.png")
        sheet(parts).save(out / f"{name}.png")
        found = float((maps[1] > 0.3).mean())
        rows.append(
            f"{name:<6} {images[name].size[0]:>5}x{images[name].size[1]:<4} {their_seconds * 1e3:>9.1f}"
            f" {seconds * 1e3:>8.1f} {head['torch'][name] * 1e3:>11.2f} {head_seconds * 1e3:>8.2f}"
            f" {head['torch'][name] / head_seconds:>6.2f} {found:>7.1%}  {'ok' if ok else 'WRONG'}"
            f" (largest difference {difference.max():.1e})"
        )
    progress.clear()
    print(f"\n{report}")
    print("\nA trained text detector before and after tconv.optimize; times in ms, text: share of pixels above 0.3")
    print(f"{'':<6} {'pixels':>10} {'torch':>9} {'tconv':>8} {'head torch':>11} {'tconv':>8} {'ratio':>6} {'text':>7}")
    print("\n".join(rows))
    try:
        shown_path = out.relative_to(Path.cwd())
    except ValueError:
        shown_path = out
    print(f"pictures: {shown_path}/{{{','.join(images)}}}.png and their parts beside them")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1 << 30, help="largest batch of the seeds")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo")
    parser.add_argument("--full", action="store_true", help="all seeds at full size, though this build has passed them")
    parser.add_argument("--skip", choices=["seeds", "network"], help="leave one part out")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    parts = [part for part in ("seeds", "network") if part != arguments.skip]
    progress = Progress((6 * len(SEEDS) if "seeds" in parts else 0) + (6 if "network" in parts else 0))
    good = True
    if "seeds" in parts:
        good = seeds(device, progress, arguments.batch, arguments.out, arguments.full)
    if "network" in parts:
        good = network(device, progress, arguments.out) and good
    print("\nall results agree with PyTorch's" if good else "\nsome results differ from PyTorch's", file=sys.stdout)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
