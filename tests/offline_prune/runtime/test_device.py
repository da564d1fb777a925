"""Which device computes, and how precisely."""

from __future__ import annotations

import pytest
import torch

from offline_prune.runtime.device import compute_dtype, pick_device


def test_auto_is_a_device_of_this_machine() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"architecture": "aarch64"}, torch.float32),
    ],
    ids=str,
)
def test_bfloat16_where_the_cpu_has_it(
    capabilities: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert compute_dtype(torch.device("cpu")) == dtype
    assert compute_dtype(torch.device("cuda", 0)) == torch.bfloat16
