"""A file of a state: what torch saves, on the disk, and its checksum."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch


def write_state(path: Path, state: Any) -> int:
    """Writes what `torch.load` reads with `weights_only`.

    Returns:
        `journal.crc32_of` the file, taken on the way: a state is too large to be read again for it.

    Raises:
        OSError: the file system refuses it.
    """
    with path.open("wb") as file:
        summed = _Summed(file)
        try:
            torch.save(state, cast(IO[bytes], summed))
        except RuntimeError as error:
            # Torch closes its archive also after what ended the writing, and then complains of where it stands.
            ended = error.__context__
            if not isinstance(ended, (OSError, KeyboardInterrupt)):
                raise
            raise ended from None
        file.flush()
        os.fsync(file.fileno())
    return summed.crc32


class _Summed:
    """A file that is written from its beginning to its end, and the checksum of what has been written.

    Attributes:
        crc32: as `journal.crc32_of` finds it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.crc32 = file, 0

    def write(self, data: bytes) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()
