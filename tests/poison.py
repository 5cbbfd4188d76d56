"""Memory that nobody has written holds no number that could pass for a result."""

from __future__ import annotations

import ctypes

import torch


def fill_memory() -> None:
    """Of torch.empty with NaN; and, where the C library can, of malloc and of what was freed with what is no zero."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(9).isnan().all()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # Freed bytes become 0x41, fresh ones the opposite: 12 and -0.4 as float32, 2e6 and -2e-6 as float64.
        perturb = -6
        assert libc.mallopt(perturb, 0x41)
