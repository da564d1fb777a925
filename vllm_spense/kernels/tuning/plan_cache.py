"""What searches found, kept on disk: a service that starts again does not search again."""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_spense.kernels.jit.sources import code_digest, digest

if TYPE_CHECKING:
    import torch

# A child of vLLM's logger: its handlers and level apply in every process that vLLM starts.
logger = logging.getLogger("vllm.spense")

Found = TypeVar("Found")

_CHECKSUM_BYTES = hashlib.sha256().digest_size


def folder() -> Path:
    """`SPENSE_CACHE_DIR`, or `spense` in the user's cache folder."""
    if chosen := os.environ.get("SPENSE_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spense"


@cache
def environment(device: torch.device) -> Mapping[str, str]:
    """The part of a key that every search depends on: GPU, driver, torch and this package's code."""
    # Not above: `spense estimate` only reads what is kept, and torch takes seconds to load.
    import torch

    gpu = torch.cuda.get_device_name(device)
    return {"gpu": gpu, "driver": _driver(), "torch": torch.__version__, "code": code_digest()}


def _driver() -> str:
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    version = ctypes.create_string_buffer(80)
    nvml.nvmlInit_v2()
    status = nvml.nvmlSystemGetDriverVersion(version, len(version))
    nvml.nvmlShutdown()
    return version.value.decode() if status == 0 else f"unknown ({status})"


def load_or_find(key: Mapping[str, Any], kind: Callable[..., Found], find: Callable[[], Found]) -> Found:
    """What an earlier call found for this key, in this process or another, or else what `find` finds now.

    One file per key, named by its hash: processes never rewrite each other's results, and equal results that are
    written at once replace each other whole. A file that cannot be read, or is not about this key, is replaced with a
    warning. A folder that cannot be written costs a warning and a new search next time; so does one that others could
    have written into, which is not used at all.

    Args:
        key: everything the result depends on, as JSON.
        kind: makes the result from its fields, which are JSON: its dataclass, or a function that also checks them and
            raises ValueError or TypeError.
    """
    file = folder() / f"{digest(json.dumps(key, sort_keys=True))}.json"
    found = _load(file, key, kind)
    if found is None:
        found = find()
        entry = {"key": key, "found": asdict(found)}  # type: ignore[call-overload]
        _keep(file, json.dumps(entry, indent=2).encode())
    return found


def load_or_make_bytes(name: str, make: Callable[[], bytes]) -> bytes:
    """The content of file `name`, which says all that the content depends on; made now if it is not there yet.

    The file begins with a checksum, because damaged machine code shows only when it runs. As above, a file that does
    not hold what it should is replaced with a warning.
    """
    file = folder() / name
    try:
        stored = _read(file)
        if stored is not None:
            content = stored[_CHECKSUM_BYTES:]
            if _checksum(content) == stored[:_CHECKSUM_BYTES]:
                return content
            raise ValueError("its checksum is wrong")
    except (OSError, ValueError) as error:
        logger.warning("Spense: ignored %s and made it again: %s", file, error)
    content = make()
    _keep(file, _checksum(content) + content)
    return content


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _load(file: Path, key: Mapping[str, Any], kind: Callable[..., Found]) -> Found | None:
    try:
        stored = _read(file)
        if stored is None:
            return None
        entry = json.loads(stored)
        if entry["key"] != key:
            raise ValueError("it is about something else")
        return kind(**entry["found"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("Spense: ignored %s and searched again: %s", file, error)
        return None


def _read(file: Path) -> bytes | None:
    """The content of a file of the cache; None if there is no such file, or the folder is not to be trusted.

    Raises:
        OSError: it cannot be read.
        ValueError: others could have written it.
    """
    if not _is_safe(file.parent):
        return None
    try:
        stream = file.open("rb")
    except FileNotFoundError:
        return None
    with stream:
        if reason := _reason_against(os.fstat(stream.fileno())):
            raise ValueError(reason)
        return stream.read()


def _is_safe(folder: Path) -> bool:
    """Whether nobody else can put plans and machine code there, which this process would run. If not, says so once."""
    try:
        reason = _reason_against(folder.stat())
    except OSError:
        return True  # there is nothing in it
    if reason:
        _warn_of_folder(folder, reason)
    return not reason


def _reason_against(about: os.stat_result) -> str | None:
    if about.st_uid not in (0, os.geteuid()):
        return f"it belongs to the user with the number {about.st_uid}"
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write into it (mode {stat.S_IMODE(about.st_mode):o})"
    return None


@cache
def _warn_of_folder(folder: Path, reason: str) -> None:
    logger.warning(
        "Spense: works without its cache %s, so that every start searches and compiles again: %s. chmod go-w it if it "
        "is yours, or choose another folder with SPENSE_CACHE_DIR",
        folder,
        reason,
    )


def _keep(file: Path, content: bytes) -> None:
    """Writes a file whole, or not at all; that it cannot be written costs a warning."""
    if not _is_safe(file.parent):
        return
    try:
        # Whatever the umask: nobody else may write there.
        file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        logger.warning("Spense: cannot keep %s for the next start: %s", file.name, error)
