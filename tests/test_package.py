"""The command line, the examples in docstrings, the KernelBench files, and the binary's promises."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import math
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tconv
from tconv import _C, problems
from tconv.__main__ import _directions, check, main

KERNELBENCH = Path(__file__).resolve().parent.parent / "examples" / "kernelbench"


def modules() -> list[str]:
    skipped = {"__main__", "_C", "bench"}
    return ["tconv"] + [f"tconv.{m.name}" for m in pkgutil.iter_modules(tconv.__path__) if m.name not in skipped]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_reduced_problems_say_what_they_were() -> None:
    whole = problems.parse("layer", "2d b8 c64>64 i1024x512 t3x3")
    small = problems.reduced(whole, 4e9, 1e9, sizes=True)
    assert small.flops() <= 1e9 < 2 * small.flops()
    assert (small.batch, small.full_batch, small.full_input) == (1, 8, (1024, 512))
    assert all(n in (whole.input[i] >> by for by in range(8)) for i, n in enumerate(small.input))
    assert problems.reduced(whole, 4e9, 1e9) == replace(whole, batch=1, full_batch=8)  # sizes stay
    assert problems.reduced(whole, 1e12, math.inf, sizes=True) == whole
    assert problems.reduced(whole, 4e9, 1.0, sizes=True).input == (8, 8)  # no further


def test_public_names_have_docstrings_with_examples() -> None:
    assert [n for n in tconv.__all__ if n != "nn" and not getattr(tconv, n).__doc__] == []
    for name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "optimize", "explain"):
        assert ">>>" in getattr(tconv, name).__doc__
    tests = doctest.DocTestFinder().find(tconv.functional)
    assert sum(len(t.examples) for t in tests) >= 6


# --- Command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "problem",
    [
        "1d b2 c4>6 i9 t4 s2 p1",
        "2d b2 g2 c8>6 i5x6 t3x3 s2 p1 op1 f64 | bias",
        "2d b2 c4>8 i5x6 t3x3 s3 d2 f16 channels_last | bias gelu",
        "3d b1 c4>4 i3x4x5 t2x3x2 s2 bf16 | pre:leaky_relu(0.1) bias gelu group_norm(2,affine) add_tensor",
        "2d b2 c4>8 i5x6 t3x3 | batch_norm(affine) relu prelu",
    ],
)
def test_check(problem: str, device: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["check", problem, "--device", device]) == 0
    assert capsys.readouterr().out.startswith("ok ")


def test_check_finds_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from tconv import _core

    run_forward = _core.run_forward
    monkeypatch.setattr(_core, "run_forward", lambda *a: run_forward(*a) * 1.001)
    good, rows = check("2d c4>4 i5x5 t3x3", "cpu")
    assert not good and rows[0][0] == "output"


def test_plan_info_and_errors(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "2d c4>4 i5x5 t3x3"]) == 0
    assert "chosen" in capsys.readouterr().out
    assert main(["plan", "2d c4>4 i5x5 t3x3", "--device", "h200"]) == 0
    assert "on h200" in capsys.readouterr().out
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "reference" in text and torch.__version__ in text
    assert main(["plan", "2d nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["unknown"])


def test_compile_without_a_gpu(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCONV_CACHE_DIR", str(tmp_path))
    problem = "2d b8 c64>64 i64x64 t3x3 | bias gelu group_norm(8,affine)"
    status = main(["compile", "--training", "--device", "h200", problem])
    captured = capsys.readouterr()
    if status == 2 and "nvrtc" in captured.err.lower():
        pytest.skip("NVRTC is not installed")
    assert status == 0, captured.err
    assert "grad_weight" in captured.out and "grad_epilogue" in captured.out and "registers" in captured.out


def test_compile_for_training_names_what_training_runs() -> None:
    problems = _directions("2d b2 g4 c8>8 i8x8 t3x3 | pre:relu bias gelu", True)
    assert problems[0].endswith("save")
    assert [p.split()[-1] for p in problems[1:3]] == ["tf32", "pre:relu"]
    assert " grad_weight tf32 |" in problems[2]  # gradients of grouped layers follow the flag
    assert problems[3].endswith("grad_epilogue | add_channel gelu")  # the bias's gradient is that of an added operand
    assert problems[4].endswith("grad_epilogue | relu")
    for problem in problems:
        _C.plan_string(problem.replace(" tf32", ""), "cpu", "")


def upsampler() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.ConvTranspose2d(16, 8, 4, 2, 1), torch.nn.ReLU())


def test_problems_of_a_model() -> None:
    from tconv.__main__ import _problems_of_model

    (problem,) = _problems_of_model(f"{__name__}:upsampler", ["2x16x5x6"], "bf16")
    assert problem == "2d b2 c16>8 i5x6 t4x4 s2 p1 bf16 | bias relu"
    (problem,) = _problems_of_model(f"{__name__}:upsampler", ["2x16x5x6"], "f32")
    assert problem.startswith("2d b2 c16>8 i5x6 t4x4 s2 p1 tf32 |")
    with pytest.raises(ValueError, match="module:factory"):
        _problems_of_model("nothing", [], "f32")


# --- Examples ---------------------------------------------------------------------------------------------------------


def _runner():
    spec = importlib.util.spec_from_file_location("kernelbench_run", KERNELBENCH / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = {
    "S1 level 1, 57": {"batch_size": 1, "height": 9, "width": 11},
    "S2 level 1, 81": {"batch_size": 1, "height_in": 5, "width_in": 6},
    "S3 level 1, 73": {"batch_size": 1, "depth": 3, "height": 4, "width": 5},
    "S3 with groups=4": {"batch_size": 1, "depth": 3, "height": 4, "width": 5},
    "S4 level 2, 19": {"batch_size": 2, "height": 7, "width": 6},
}


@pytest.mark.parametrize("name", SMALL)
def test_kernelbench_models(name: str, device: str) -> None:
    run = _runner()
    assert set(SMALL) == set(run.CASES)
    theirs, ours, module = run.build(name)
    assert {n: p.shape for n, p in theirs.state_dict().items()} == {
        n.partition(".")[2] if "." in n and "." not in m else n: p.shape
        for (n, p), m in zip(ours.state_dict().items(), theirs.state_dict())
    }
    for a, e in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(a, e)  # same seed, same initialisation, same order
    for key, value in SMALL[name].items():
        assert hasattr(module, key)
        setattr(module, key, value)
    theirs, ours = theirs.to(device), ours.to(device)
    (x,) = (t.to(device) for t in module.get_inputs())
    assert 0 <= x.min() and x.max() < 1
    with torch.backends.cudnn.flags(allow_tf32=False):
        x.requires_grad_()
        grad = torch.rand_like(theirs(x))
        for a, e in zip(run.step(ours, x, grad), run.step(theirs, x, grad)):
            torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4)


FULL = {
    "57": [(8, 64, 1024, 1024), (64, 64, 3)],
    "81": [(16, 32, 64, 128), (32, 64, 3, 5, 1, 2)],
    "73": [(4, 32, 32, 64, 128), (32, 32, 3, 2, 1, 4)],
    "19": [(128, 64, 256, 256), (64, 64, 3, 1, 8, 8)],
}


@pytest.mark.parametrize("number", FULL)
def test_kernelbench_sizes(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full sizes, without the memory: torch.rand is replaced."""
    run = _runner()
    (file,) = {case[0] for case in run.CASES.values() if case[0].startswith(f"{number}_")}
    module = run.load(file)
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.empty(shape, device="meta"))
    (x,) = module.get_inputs()
    assert [tuple(x.shape), tuple(module.get_init_inputs())] == FULL[number]
    names = re.findall(r"\w+", str(__import__("inspect").signature(module.ModelNew)))
    assert names[:3] == ["in_channels", "int", "out_channels"]


def test_kernelbench_runner(capsys: pytest.CaptureFixture, device: str) -> None:
    arguments = ["--batch", "1", "--only", "S2", "--repeats", "1", "--device", device]
    assert _runner().main(arguments) == 0
    out = capsys.readouterr().out
    assert "S2" in out and "training step" in out and "WRONG" not in out


# --- The binary -------------------------------------------------------------------------------------------------------


def test_the_module_keeps_to_the_limited_api() -> None:
    """No symbol of PyTorch, none of Python outside the stable ABI of 3.10, no C++ runtime of the build machine."""
    path = Path(_C.__file__)
    assert ".abi3." in path.name
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("needs binutils")
    undefined = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True)
    names = {line.split()[-1].split("@")[0] for line in undefined.stdout.splitlines() if line.strip()}
    assert not {n for n in names if re.search(r"torch|at4|c10|cuda", n, re.IGNORECASE)}
    python = {n for n in names if n.startswith("_Py")}
    assert python <= {"_Py_NoneStruct", "_Py_Dealloc", "_PyObject_New"}, python
    dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert not [n for n in needed if re.match(r"libpython|libtorch|libc10|libcuda|libnvrtc|libgomp", n)], needed


def test_arguments_of_the_binding_are_checked() -> None:
    with pytest.raises(TypeError, match="a plan takes 21 arguments, got 2"):
        _C.plans([(1, 2)])
    for not_a_list_of_tuples in (None, ((1, 2),), [1]):
        with pytest.raises(TypeError, match="a list of tuples"):
            _C.plans(not_a_list_of_tuples)
    assert _C.plans([]) == []
    with pytest.raises(TypeError, match=r"expected a tconv\._C\.Plan"):
        _C.run(*[None] * 16)
    with pytest.raises(ValueError, match="direction must be in"):
        _C.plans([(9, *[0] * 20)])
    with pytest.raises(TypeError):
        _C.Plan()
    assert _C.geometry_key(2, 1, (0, 0), 0, 1, [1]) == _C.geometry_key(2, (1, 1), 0, 0, 1, 1)
    assert _C.geometry_key(2, 1.0, 0, 0, 1, 1) is None and _C.geometry_key(2, True, 0, 0, 1, 1) is None


def test_a_layer_outlives_its_plan() -> None:
    layer, x = tconv.nn.ConvTranspose2d(3, 4, 3, stride=2), torch.rand(1, 3, 5, 6)
    before = layer(x)
    _C.forget_functions()
    assert torch.equal(layer(x), before)  # with the plan that it has
    torch.testing.assert_close(layer(x[..., :4])[..., :8], before[..., :8])  # with one that is made again


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    layer = "2d b8 c64>64 i256x256 t3x3 tf32"
    table = tmp_path / "measured.def"

    def plan() -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "tconv", "plan", "--device", "h200", layer]
        env = {**os.environ, "TCONV_MEASURED": str(table)}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=env)

    table.write_text(f'// by hand\n\nMEASURED("{layer}", "gather:2x8,w4")\n')
    chosen = next(line for line in plan().stdout.splitlines() if line.split()[:1] == ["chosen"])
    assert "gather:2x8,w4" in chosen and chosen.endswith("measured as the best")
    table.write_text("MEASURED(\n")
    failed = plan()
    assert failed.returncode != 0 and "TCONV_MEASURED: line 1 of" in failed.stderr + failed.stdout
    table.unlink()
    failed = plan()
    assert failed.returncode != 0 and "TCONV_MEASURED: cannot read" in failed.stderr + failed.stdout


def test_typed() -> None:
    assert (Path(tconv.__file__).parent / "py.typed").exists()


def test_import_in_a_fresh_interpreter_from_threads() -> None:
    code = (
        "import threading, torch, tconv\n"
        "def work():\n"
        "    tconv.conv_transpose1d(torch.rand(1, 2, 9), torch.rand(2, 2, 3))\n"
        "ts = [threading.Thread(target=work) for _ in range(8)]\n"
        "[t.start() for t in ts]; [t.join() for t in ts]; print('done')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "done"
