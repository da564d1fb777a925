"""A state's checksum is its file's, and what ends the writing of one is what a person hears of."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from offline_prune.checkpoint import state_file
from offline_prune.checkpoint.journal import crc32_of
from offline_prune.checkpoint.state_file import write_state

STATE: dict[str, Any] = {"weights": [torch.ones(300, 1000), torch.ones(3)], "more": {"step": 7}}


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4096, 2**22 + 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.float32])
def test_a_checksum_is_that_of_the_file(size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    whole = torch.arange(2 * size).remainder(200).to(dtype)
    state = {"half": whole[::2], "part": whole[size:], "nothing": [], "step": size}
    file = tmp_path / "state"
    assert write_state(file, state) == crc32_of(file)
    read = torch.load(file, weights_only=True)
    for name in ("half", "part"):
        found, expected = read.pop(name), state.pop(name)
        assert found.dtype == dtype
        assert torch.equal(found.float(), expected.float())
    assert read == state


def test_a_full_disk_is_what_the_system_calls_it() -> None:
    with pytest.raises(OSError, match="No space left") as error:
        write_state(Path("/dev/full"), STATE)
    assert error.value.errno == errno.ENOSPC


@pytest.mark.parametrize("write", [1, 5, 20])
def test_an_interruption_stays_one(write: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    original = state_file._Summed.write

    def interrupted(self: state_file._Summed, data: bytes) -> int:
        written.append(len(data))
        if len(written) == write:
            raise KeyboardInterrupt
        return original(self, data)

    monkeypatch.setattr(state_file._Summed, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_state(tmp_path / "state", STATE)
