"""Every argument that PyTorch refuses is refused with its exception type, by a message that names the argument."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tconv

X = torch.rand(2, 4, 5, 6)
W = torch.rand(4, 3, 3, 3)
B = torch.rand(3)

# what -> (arguments, keywords, part of our message, how PyTorch calls it when it is not an error there)
CASES = {
    "zero stride": ((X, W), {"stride": 0}, r"stride=\(0, 0\)"),
    "negative stride": ((X, W), {"stride": (1, -1)}, r"stride=\(1, -1\)"),
    "negative padding": ((X, W), {"padding": -1}, r"padding=\(-1, -1\)"),
    "zero dilation": ((X, W), {"dilation": 0}, r"dilation=\(0, 0\)"),
    "output_padding equals stride": ((X, W), {"stride": 2, "output_padding": 2}, "output padding must be smaller"),
    "output_padding, one dimension": (
        (X, W),
        {"stride": (2, 1), "output_padding": 1},
        "output padding must be smaller",
    ),
    "negative output_padding": ((X, W), {"stride": 2, "output_padding": -1}, "negative output_padding"),
    "zero groups": ((X, W), {"groups": 0}, "groups=0"),
    "negative groups": ((X, W), {"groups": -1}, "groups=-1"),
    "channels not divisible": ((X, W), {"groups": 3}, "divisible by 3"),
    "float stride": ((X, W), {"stride": 1.5}, "'stride' must be"),
    "float in a tuple": ((X, W), {"stride": (1, 2.0)}, "'stride' must be"),
    "bool stride": ((X, W), {"stride": True}, "'stride' must be"),
    "string padding": ((X, W), {"padding": "same"}, "'padding' must be"),
    "float groups": ((X, W), {"groups": 1.0}, "'groups' must be"),
    "too many strides": ((X, W), {"stride": (1, 1, 1)}, r"stride=\[1, 1, 1\]"),
    "no strides": ((X, W), {"stride": ()}, r"stride=\[\]"),
    "two dimensions": ((X[0, 0], W), {}, "Expected 3D .unbatched. or 4D"),
    "five dimensions": ((X[None], W), {}, "Expected 3D .unbatched. or 4D"),
    "weight of three dimensions": ((X, W[0]), {}, "expected weight to be 4-dimensional|expected stride"),
    "channels differ": ((X, W[:3]), {}, "to have 3 channels, but got 4"),
    "short bias": ((X, W, B[:2]), {}, "expected bias to be 1-dimensional with 3 elements"),
    "bias of two dimensions": ((X, W, B[None]), {}, "expected bias to be 1-dimensional"),
    "bias without dimensions": ((X, W, B[0]), {}, "expected bias to be 1-dimensional"),
    "bias dtype": ((X, W, B.double()), {}, "bias type"),
    "weight dtype": ((X, W.double()), {}, "weight type"),
    "integers": ((X.int(), W.int()), {}, "int32"),
    "booleans": ((X.bool(), W.bool()), {}, "bool"),
    "input is no tensor": (([1.0], W), {}, "'input' .position 1. must be Tensor"),
    "bias is no tensor": ((X, W, 3), {}, "'bias' .position 3. must be Tensor"),
    "no weight": ((X, None), {}, "'weight' .position 2. must be Tensor"),
    "negative output": ((X, W), {"padding": 10}, "output size"),
    "no input channels": ((X[:, :0], W[:0]), {}, "at least 1 at dimension 0"),
    "no output channels": ((X, W[:, :0]), {}, "at least 1 output channel"),
    "no height": ((X[:, :, :0], W), {}, "zero batch"),
    "no taps": ((X, W[:, :, :0]), {}, "kernel size must be at least 1"),
    "sparse": ((X.to_sparse(), W), {}, "only dense"),
    "float8": ((X.to(torch.float8_e4m3fn), W.to(torch.float8_e4m3fn)), {}, "float8"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_as_pytorch_refuses(case: str) -> None:
    arguments, keywords, message = CASES[case]
    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)) as theirs:
        F.conv_transpose2d(*arguments, **keywords)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message) as ours:
        tconv.conv_transpose2d(*arguments, **keywords)
    assert isinstance(ours.value, theirs.type), f"PyTorch raises {theirs.type.__name__}, tconv {ours.type.__name__}"


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("two dimensions", "five dimensions")])
def test_refused_again_after_a_valid_call(case: str) -> None:
    """Valid arguments that compare equal (1 and 1.0 and True) must not let invalid ones through a cache."""
    tconv.conv_transpose2d(X, W, B)
    test_refused_as_pytorch_refuses(case)


def test_complex_is_named() -> None:
    with pytest.raises(NotImplementedError, match="complex64"):
        tconv.conv_transpose2d(X.cfloat(), W.cfloat())


def test_meta_and_cpu_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match=r"same device.*meta.*cpu"):
        tconv.conv_transpose2d(X.to("meta"), W)


def test_meta_tensors_have_shapes_only() -> None:
    y = tconv.conv_transpose2d(X.to("meta"), W.to("meta"), stride=2)
    assert y.is_meta and y.shape == F.conv_transpose2d(X, W, stride=2).shape


def test_nothing_is_allocated_before_an_error() -> None:
    x = torch.empty(1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="expected bias"):
        tconv.conv_transpose2d(x.expand(1, 2**20, 2**20, 2**20), x.expand(2**20, 2**20, 1, 1), torch.empty(3))


MODULES = {
    "channels not divisible by groups": ((4, 4, 3), {"groups": 3}),
    "zero groups": ((4, 4, 3), {"groups": 0}),
    "reflect padding": ((4, 4, 3), {"padding_mode": "reflect"}),
}


@pytest.mark.parametrize("case", MODULES)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_modules_refuse_as_pytorchs(case: str, rank: int) -> None:
    arguments, keywords = MODULES[case]
    with pytest.raises(Exception) as theirs:  # whatever it raises is the expectation
        getattr(torch.nn, f"ConvTranspose{rank}d")(*arguments, **keywords)
    with pytest.raises(theirs.type) as ours:
        getattr(tconv.nn, f"ConvTranspose{rank}d")(*arguments, **keywords)
    assert str(ours.value) == str(theirs.value)


def test_output_size_out_of_range() -> None:
    with pytest.raises(ValueError, match="requested an output size"):
        tconv.nn.ConvTranspose2d(4, 4, 3, stride=2)(X, output_size=(100, 100))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_cuda_plan_without_cuda_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match="driver"):
        tconv._C.plan_string("2d c4>4 i8x8 t3x3", "cuda", "")
    with pytest.raises(RuntimeError, match="driver"):
        ones, zeros = (1, 1), (0, 0)
        geometry = ((8, 8), (3, 3), ones, zeros, zeros, ones)
        tconv._C.plans([(0, 2, 1, 1, 4, 4, *geometry, 0, 0, 0, 0, "", False, None, None, "")])


def test_bad_problem_strings() -> None:
    with pytest.raises(ValueError, match=r"stride|s0"):
        tconv._C.parse_problem("2d c4>4 i8x8 t3x3 s0")
    with pytest.raises(ValueError, match="nonsense"):
        tconv._C.parse_problem("2d c4>4 i8x8 t3x3 | nonsense")
