"""What a memory plan may count on."""

import pytest
import torch

from offline_prune import plan


def test_what_an_earlier_run_left_in_torchs_cache_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs in one process plan alike: the second must not move its activations to the host."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 45)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1)
    assert plan._free(torch.device("cuda", 0)) == 74
