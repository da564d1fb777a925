"""What a source of calibration text can be told to be by its name alone, before anything is loaded or downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches

from offline_prune.calibration.data import BUILTIN, BUILTIN_CODE
from offline_prune.calibration.mixture import GENERATED
from offline_prune.calibration.rows import require_source
from vllm_spense.errors import SpenseError

#: Sources that are neither files nor data sets.
OWN = (BUILTIN, BUILTIN_CODE, GENERATED)
#: Of `difflib`: a letter or two of a name of ours differ.
_ALIKE = 0.8


def require_spelled(sources: Iterable[str]) -> None:
    """Raises SpenseError for a source that is nearly one of `OWN`, and no file or folder, nor somebody's data set."""
    for source in sources:
        alike = [] if "/" in source else get_close_matches(source.lower(), OWN, n=1, cutoff=_ALIKE)
        if alike and source not in OWN and not os.path.exists(source):
            raise SpenseError(f"--calibration: found {source}; did you mean {alike[0]}?")


def require_sources(sources: Iterable[str]) -> None:
    """Raises SpenseError for a file or folder that is not there."""
    for source in sources:
        if source not in OWN:
            require_source(source)
