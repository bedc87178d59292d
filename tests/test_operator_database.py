"""The sample and error inputs of PyTorch's own operator database."""

from __future__ import annotations

import pytest
import torch

import tconv

database = pytest.importorskip("torch.testing._internal.common_methods_invocations")
INFOS = {info.name: info for info in database.op_db if info.name.startswith("nn.functional.conv_transpose")}
OURS = {f"nn.functional.conv_transpose{n}d": getattr(tconv, f"conv_transpose{n}d") for n in (1, 2, 3)}


def wide(value: object) -> object:
    return value.detach().double() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OURS)
def test_sample_inputs(name: str, dtype: torch.dtype, device: str) -> None:
    info = INFOS[name]
    count = 0
    for sample in info.sample_inputs(device, dtype, requires_grad=True):
        count += 1
        tensors = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]
        low = dtype in (torch.float16, torch.bfloat16)
        with torch.backends.cudnn.flags(allow_tf32=False):
            y = OURS[name](sample.input, *sample.args, **sample.kwargs)
            if low:
                # Exact products, fp32 sums, one rounding: PyTorch's own 16-bit result may be further off than that.
                exact, size = (
                    info.op(*(convert(t) for t in (sample.input, *sample.args)), **sample.kwargs)
                    for convert in (wide, lambda t: abs(wide(t)) if isinstance(t, torch.Tensor) else t)
                )
                assert y.dtype == dtype and y.shape == exact.shape
                bound = torch.finfo(dtype).eps * exact.abs() + 1e-5 * size + 1e-6
                assert ((y.double() - exact).abs() <= bound).all()
                continue
            expected = info.op(sample.input, *sample.args, **sample.kwargs)
            assert y.dtype == expected.dtype
            torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
            if not expected.numel():
                continue
            grad = torch.rand_like(expected)
            mine = torch.autograd.grad(y, tensors, grad)
            other = torch.autograd.grad(expected, tensors, grad)
        for a, e in zip(mine, other):
            torch.testing.assert_close(a, e, atol=1e-3, rtol=1e-4)
    assert count > 0


@pytest.mark.parametrize("name", OURS)
def test_error_inputs(name: str) -> None:
    info = INFOS[name]
    if info.error_inputs_func is None:
        pytest.skip("this version of PyTorch lists no error inputs")
    count = 0
    for error in info.error_inputs("cpu"):
        count += 1
        sample = error.sample_input
        with pytest.raises(error.error_type):
            OURS[name](sample.input, *sample.args, **sample.kwargs)
    assert count > 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_module_database(rank: int, training: bool, device: str) -> None:
    """Constructors and inputs from PyTorch's module database, the lazy modules included."""
    modules = pytest.importorskip("torch.testing._internal.common_modules")
    count = 0
    for prefix in ("", "Lazy"):
        theirs_type = getattr(torch.nn, f"{prefix}ConvTranspose{rank}d")
        ours_type = getattr(tconv.nn, f"{prefix}ConvTranspose{rank}d")
        for info in modules.module_db:
            if info.module_cls is not theirs_type:
                continue
            for sample in info.module_inputs_func(
                info, device=device, dtype=torch.float64, requires_grad=True, training=training
            ):
                count += 1
                build, call = sample.constructor_input, sample.forward_input
                torch.manual_seed(3)
                theirs = theirs_type(*build.args, **build.kwargs).to(device, torch.float64)
                torch.manual_seed(3)
                ours = ours_type(*build.args, **build.kwargs).to(device, torch.float64)
                torch.manual_seed(4)  # lazy modules initialise in their first call
                expected = theirs(*call.args, **call.kwargs)
                torch.manual_seed(4)
                y = ours(*call.args, **call.kwargs)
                torch.testing.assert_close(y, expected)
                assert repr(ours) == repr(theirs)
                assert list(ours.state_dict()) == list(theirs.state_dict())
                for a, e in zip(ours.parameters(), theirs.parameters()):
                    assert torch.equal(a, e)
    assert count > 0
