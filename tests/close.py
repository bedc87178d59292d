"""Comparison with float64 references: one tolerance from the dtype and the number of terms (docs/numerics.md)."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_close(
    ours: Tensor, exact: Tensor, terms: int = 1, slack: float = 1.0, what: str = "", size: Tensor | None = None
) -> None:
    """Relative L2 error against a float64 result: one rounding of the result and a random walk over the sum.

    size: the result of the operands' absolute values, where terms may cancel; rounding goes with the terms.
    """
    assert tuple(ours.shape) == tuple(exact.shape), f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    if not ours.numel():
        return
    unit = UNIT[ours.dtype]
    walk = 2.0**-53 if ours.dtype == torch.float64 else 2.0**-24
    exact = exact.double().cpu()
    norm = exact.norm().item() or 1.0
    terms_norm = norm if size is None else max(norm, size.double().cpu().norm().item())
    allowed = slack * (4 * unit * norm + 4 * walk * max(terms, 1) ** 0.5 * terms_norm) / norm
    error = (ours.double().cpu() - exact).norm().item() / norm
    assert error <= allowed, f"{what}: relative error {error:.3e}, allowed {allowed:.3e}"
