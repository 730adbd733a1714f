from __future__ import annotations

from pathlib import Path

import pytest
import torch

from builders import layers


@pytest.mark.parametrize(
    ("has", "wanted", "dtype"),
    [(True, True, torch.bfloat16), (False, True, torch.float32), (True, False, torch.float32)],
)
def test_a_training_is_in_bfloat16_only_where_the_cpu_has_it(monkeypatch, has, wanted, dtype):
    monkeypatch.setattr(layers, "computes_bf16", lambda: has)
    assert layers.training_dtype(wanted) == dtype
    with layers.narrow_products(wanted):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_what_the_cpu_has_is_read_from_it():
    flags = next(
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")
    ).split()
    assert layers.computes_bf16() == ("avx512_bf16" in flags or "amx_bf16" in flags)
