"""The texts that a pruned model is measured on, each a domain with a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from offline_prune.calibration.data import calibration_tokens, pack
from offline_prune.calibration.heldout import HELDOUT, heldout_documents
from offline_prune.calibration.rows import FILE_KINDS, require_path
from vllm_spense.errors import SpenseError

#: As a `--text`.
_EXPECTED = f"a {', '.join(FILE_KINDS)} file, a folder with such files, or no --text for the built-in ones"


def require_texts(texts: Sequence[Path]) -> None:
    """Raises SpenseError for a text that is not there, or two of one name, before a model is downloaded for them."""
    for text in _named(texts).values():
        require_path(text, _EXPECTED)


def domains(
    texts: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, torch.Tensor]:
    """Domain → its tokens, int64 (n, length) with n of at most `samples`.

    Args:
        texts: files or folders as calibration takes them, each named without its folder and ending; none for the
            built-in held-out texts.
        say: told about chats that are left out, and texts that are shorter than wanted.

    Raises:
        SpenseError: a text that is missing, damaged or shorter than one sequence, or two of one name.
    """
    require_texts(texts)
    found: dict[str, torch.Tensor] = {}
    sources: Mapping[str, Path | None] = _named(texts) if texts else dict.fromkeys(HELDOUT)
    for name, text in sources.items():
        if text is None:
            tokens = pack(heldout_documents(name), tokenizer, samples, length, name, say, fewest=1)
        else:
            tokens = calibration_tokens(str(text), tokenizer, samples, length, 0, say, fewest=1)
        if len(tokens) < samples:
            say(f"{text or name}: {len(tokens)} sequences of {length} tokens instead of {samples}; the text ends there")
        found[name] = tokens
    return found


def _named(texts: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in texts:
        name = text.resolve().stem
        if name in found:
            raise SpenseError(f"--text: found {found[name]} and {text}, both named {name}; expected different names")
        found[name] = text
    return found
