"""Every input that torch's own tests have for its recurrent modules, on ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import CELL_MODULES, LAYERS, assert_equal_modules, pair
from torch.testing._internal.common_modules import module_db

INFOS = [info for info in module_db if info.name in {f"nn.{name}" for name in LAYERS + CELL_MODULES}]


def test_all_six_modules_are_there() -> None:
    assert len(INFOS) == 6


@pytest.mark.full_on("triton")  # some 50 layers each
@pytest.mark.few(2, "backend", "info", "dtype", "training")
@pytest.mark.runs(torch.float64)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name[3:])
def test_sample_inputs(info: Any, dtype: torch.dtype, training: bool, backend: str) -> None:
    packed = {"with_packed_sequence": True} if info.name in ("nn.RNN", "nn.GRU") else {}
    samples = info.module_inputs_func(
        info, device=torch.device("cpu"), dtype=dtype, requires_grad=True, training=training, **packed
    )
    assert len(samples) >= 2
    for sample in samples:
        make, call = sample.constructor_input, sample.forward_input
        assert not call.kwargs
        theirs, ours = (m.train(training) for m in pair(info.name[3:], *make.args, **make.kwargs, dtype=dtype))
        assert_equal_modules(theirs, ours, *call.args)
