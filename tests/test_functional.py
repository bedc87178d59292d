"""conv_transpose1d/2d/3d against float64 PyTorch, over every parameter; memory formats, empty and odd inputs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from close import assert_close
from conftest import DEVICES
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import tconv

OURS = {1: tconv.conv_transpose1d, 2: tconv.conv_transpose2d, 3: tconv.conv_transpose3d}
THEIRS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


@st.composite
def problems(draw) -> dict:
    rank = draw(st.integers(1, 3))

    def per_dimension(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = per_dimension(1, 4 if rank < 3 else 3)
    stride = per_dimension(1, 4 if rank < 3 else 3)
    dilation = per_dimension(1, 3)
    output_padding = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation))
    size = per_dimension(1, (9, 6, 4)[rank - 1])
    # Padding that leaves something of each dimension.
    padding = tuple(
        draw(st.integers(0, max(0, min(4, ((i - 1) * s + d * (k - 1) + op) // 2))))
        for i, k, s, d, op in zip(size, kernel, stride, dilation, output_padding)
    )
    return {
        "rank": rank,
        "shape": (draw(st.integers(1, 3)), groups * draw(st.integers(1, 4)), *size),
        "out": draw(st.integers(1, 5)),
        "kernel": kernel,
        "arguments": {
            "stride": stride,
            "padding": padding,
            "output_padding": output_padding,
            "groups": groups,
            "dilation": dilation,
        },
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from(DTYPES)),
        "unbatched": draw(st.booleans()),
        "format": draw(st.sampled_from(["contiguous", "channels_last", "strided", "expanded"])),
        "device": "cpu",
        "seed": draw(st.integers(0, 2**16)),
    }


def tensors(problem: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(problem["seed"])

    def uniform(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, generator=generator, dtype=torch.float64) - 0.5).to(problem["dtype"])

    shape, rank = problem["shape"], problem["rank"]
    x = uniform(*shape).to(problem["device"])
    w = uniform(shape[1], problem["out"], *problem["kernel"]).to(problem["device"])
    b = uniform(problem["out"] * problem["arguments"]["groups"]).to(problem["device"]) if problem["bias"] else None
    if problem["format"] == "channels_last" and rank > 1:
        x = x.contiguous(memory_format=FORMATS[rank])
    elif problem["format"] == "strided":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = x
        x = wide[..., 1::2]
    elif problem["format"] == "expanded":
        x = x[:1].expand(x.shape)
    if problem["unbatched"]:
        x = x[0]
    return x, w, b


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems())
def test_output_and_gradients_match_float64(problem: dict) -> None:
    compare_with_float64(problem)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device")
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))  # each compiles three kernels
@given(problems())
def test_output_and_gradients_match_float64_on_cuda(problem: dict) -> None:
    compare_with_float64({**problem, "device": "cuda"})


def compare_with_float64(problem: dict) -> None:
    x, w, b = tensors(problem)
    rank, arguments = problem["rank"], problem["arguments"]
    ours = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    theirs = [t.detach().cpu().double().requires_grad_() for t in (x, w, b) if t is not None]
    # CUDA's TF32 has another tolerance, tested on its own.
    y = OURS[rank](*ours[:2], ours[2] if b is not None else None, **arguments, precision="fp32")
    exact = THEIRS[rank](*theirs[:2], theirs[2] if b is not None else None, **arguments)
    sizes = [t.detach().abs().requires_grad_() for t in theirs]
    size = THEIRS[rank](*sizes[:2], sizes[2] if b is not None else None, **arguments)
    assert y.dtype == x.dtype and y.device == x.device
    terms = w.numel() // problem["out"]
    assert_close(y, exact, terms, what="output", size=size)
    grad = torch.rand(exact.shape, dtype=torch.float64).sub_(0.5).to(y.dtype)
    positions = exact.numel()
    mine = torch.autograd.grad(y, ours, grad.to(y.device))
    other = torch.autograd.grad(exact, theirs, grad.double())
    absolute = torch.autograd.grad(size, sizes, grad.double().abs())
    for name, a, e, s in zip(("grad_input", "grad_weight", "grad_bias"), mine, other, absolute):
        assert_close(a, e, max(terms, positions), what=name, size=s)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems())
def test_memory_format_is_pytorchs(problem: dict) -> None:
    problem = {**problem, "device": "cpu", "dtype": torch.float32}
    arguments = problem["arguments"]
    # There PyTorch's CPU leaves oneDNN for a plain loop that returns contiguous 3D results; its CUDA side does not.
    plain_loop = any(op >= s for op, s in zip(arguments["output_padding"], arguments["stride"], strict=True))
    plain_loop = plain_loop or (problem["shape"][0] == 1 and arguments["groups"] == 1)
    assume(not (problem["rank"] == 3 and plain_loop))
    x, w, b = tensors(problem)
    y = OURS[problem["rank"]](x, w, b, **arguments)
    expected = THEIRS[problem["rank"]](x, w, b, **arguments)

    def order(t: torch.Tensor) -> tuple[int, ...]:  # the stride of a dimension of size 1 means nothing
        return tuple(stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1)

    assert order(y) == order(expected)


def test_channels_last_weight_gives_channels_last_output(device: str) -> None:
    x = torch.rand(2, 4, 5, 6, device=device)
    w = torch.rand(4, 3, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    y = tconv.conv_transpose2d(x, w)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    assert_close(y, F.conv_transpose2d(x.cpu().double(), w.cpu().double()), 36, slack=2e4 if device == "cuda" else 1)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_zero_batch(rank: int, device: str) -> None:
    x = torch.rand(0, 4, *(5,) * rank, device=device, requires_grad=True)
    w = torch.rand(4, 3, *(3,) * rank, device=device, requires_grad=True)
    b = torch.rand(3, device=device, requires_grad=True)
    y = OURS[rank](x, w, b, stride=2)
    assert y.shape == (0, 3, *(11,) * rank)
    gx, gw, gb = torch.autograd.grad(y.sum(), (x, w, b))
    assert gx.shape == x.shape
    assert torch.equal(gw, torch.zeros_like(w)) and torch.equal(gb, torch.zeros_like(b))


def test_zero_size_output(device: str) -> None:
    x = torch.rand(2, 4, 1, 1, device=device, requires_grad=True)
    w = torch.rand(4, 3, 2, 2, device=device, requires_grad=True)
    y = tconv.conv_transpose2d(x, w, padding=1)
    assert y.shape == (2, 3, 0, 0)
    gx, gw = torch.autograd.grad(y.sum(), (x, w))
    assert torch.equal(gx, torch.zeros_like(x)) and torch.equal(gw, torch.zeros_like(w))


def test_taps_outside_contribute_nothing(device: str) -> None:
    """inf in the weight times the zeros outside the input would be NaN."""
    x = torch.rand(1, 2, 4, 4, device=device)
    w = torch.rand(2, 3, 3, 3, device=device)
    w[:, :, 0, 0] = float("inf")
    y = tconv.conv_transpose2d(x, w, padding=0)
    assert torch.isinf(y[:, :, :4, :4]).all()
    assert torch.isfinite(y[:, :, 4:, :]).all() and torch.isfinite(y[:, :, :, 4:]).all()


def test_nan_spreads_to_the_outputs_it_feeds_only(device: str) -> None:
    x = torch.rand(1, 2, 5, 5, device=device)
    x[0, 0, 2, 2] = float("nan")
    y = tconv.conv_transpose2d(x, torch.rand(2, 3, 2, 2, device=device), stride=2)
    assert torch.isnan(y[:, :, 4:6, 4:6]).all()
    assert torch.isnan(y).sum() == 3 * 4


def test_offset_views(device: str) -> None:
    """Addresses that are aligned to an element and to nothing else."""
    flat = torch.rand(1 + 2 * 4 * 5 * 7, device=device)
    weights = torch.rand(3 + 4 * 3 * 3 * 3, device=device)
    x, w = flat[1:].view(2, 4, 5, 7), weights[3:].view(4, 3, 3, 3)
    y = tconv.conv_transpose2d(x, w, stride=2, precision="fp32")
    assert_close(y, F.conv_transpose2d(x.cpu().double(), w.cpu().double(), stride=2), 36)


def test_negative_view_is_resolved() -> None:
    x = torch._neg_view(torch.rand(1, 2, 4, 4))
    w = torch.rand(2, 3, 3, 3)
    assert torch.allclose(tconv.conv_transpose2d(x, w), F.conv_transpose2d(x, w), atol=1e-6)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
def test_only_wanted_gradients(needs: tuple[int, int, int], device: str) -> None:
    x, w, b = torch.rand(2, 4, 5, device=device), torch.rand(4, 3, 3, device=device), torch.rand(3, device=device)
    leaves = [t.requires_grad_(bool(n)) for t, n in zip((x, w, b), needs)]
    tconv.conv_transpose1d(x, w, b, stride=2).sum().backward()
    assert [t.grad is not None for t in leaves] == [bool(n) for n in needs]


def test_expanded_grad_output(device: str) -> None:
    x = torch.rand(2, 4, 5, 6, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.rand(4, 3, 3, 3, dtype=torch.float64, device=device)
    y = tconv.conv_transpose2d(x, w)
    y.sum().backward()  # its gradient is one number, expanded
    expected = torch.autograd.grad(F.conv_transpose2d(x, w).sum(), x)[0]
    assert torch.allclose(x.grad, expected)


def test_same_bits_every_run_and_every_thread_count() -> None:
    x = torch.rand(3, 16, 17, 19, requires_grad=True)
    w = torch.rand(16, 8, 3, 3, requires_grad=True)
    b = torch.rand(16, requires_grad=True)
    grad = torch.rand(3, 16, 35, 39)

    def everything() -> list[torch.Tensor]:
        y = tconv.conv_transpose2d(x, w, b, stride=2, groups=2)
        return [y.detach(), *torch.autograd.grad(y, (x, w, b), grad)]

    before = torch.get_num_threads()
    try:
        first = everything()
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for a, e in zip(everything(), first):
                assert torch.equal(a, e), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


def test_calls_from_many_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    x, w = torch.rand(2, 8, 9, 9), torch.rand(8, 4, 3, 3)
    expected = tconv.conv_transpose2d(x, w, stride=2)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: tconv.conv_transpose2d(x, w, stride=2), range(64)))
    assert all(torch.equal(r, expected) for r in results)


def test_many_sizes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tconv._core, "_MAX_ENTRIES", 8)
    tconv._core._forward_entries.clear()
    w = torch.rand(2, 2, 3)
    for length in range(1, 40):
        tconv.conv_transpose1d(torch.rand(1, 2, length), w)
        assert len(tconv._core._forward_entries) <= 8


def test_precision_is_checked_and_harmless_on_the_cpu() -> None:
    x, w = torch.rand(1, 2, 4), torch.rand(2, 2, 3)
    assert torch.equal(tconv.conv_transpose1d(x, w, precision="tf32"), tconv.conv_transpose1d(x, w, precision="fp32"))
    with pytest.raises(ValueError, match="precision must be"):
        tconv.conv_transpose1d(x, w, precision="bf16")


@pytest.mark.large(gigabytes=14)
def test_more_than_two_to_the_31_elements() -> None:
    """One row of the batch lies beyond what 32 bits address; bf16 keeps it at 4 GB."""
    batch, length = 3, 2**30
    x = torch.zeros(batch, 1, length // 2, dtype=torch.bfloat16)
    x[-1, 0, -1], x[0, 0, 0] = 3.0, 2.0
    w = torch.tensor([[[1.0, 0.5]]], dtype=torch.bfloat16)
    y = tconv.conv_transpose1d(x, w, stride=2)
    assert y.shape == (batch, 1, length) and y.numel() > 2**31
    assert y[-1, 0, -2:].tolist() == [3.0, 1.5] and y[0, 0, :2].tolist() == [2.0, 1.0]
    assert torch.count_nonzero(y).item() == 4


def test_import_costs_no_compiler() -> None:
    """`import tconv` must not pull in torch._dynamo or torch._inductor."""
    code = "import sys, torch; a = set(sys.modules); import tconv; print(*sorted(set(sys.modules) - a))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "torch._inductor" not in loaded and "torch._dynamo.eval_frame" not in loaded
