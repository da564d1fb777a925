"""Calibration text as tokens: from data sets and files, and from built-in sources that need no download."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

import torch
from transformers import PreTrainedTokenizerBase

from offline_prune.calibration.chat import Chat, RefusedChat, chat_template, plain_text, read_row, templated
from offline_prune.calibration.python_text import code, docstrings, installed
from offline_prune.calibration.rows import shuffled_rows
from vllm_spense.errors import SpenseError

BUILTIN, BUILTIN_CODE = "builtin", "builtin-code"

#: Installed packages whose docstrings, and code without them, make the built-in texts; held-out texts come from others.
BUILTIN_PACKAGES = ("torch", "numpy", "datasets", "huggingface_hub")
#: Torch's own dependencies, whose files follow where these are too short.
MORE_BUILTIN_PACKAGES = ("sympy", "networkx")
HELDOUT_PACKAGES = ("matplotlib", "pandas", "transformers")
#: Built-in source → what it takes from packages, in an order that a seed decides.
_BUILTIN: Mapping[str, Callable[[Iterable[str], int], Iterator[str]]] = {BUILTIN: docstrings, BUILTIN_CODE: code}

Document = str | Chat


def calibration_tokens(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
    say: Callable[[str], None] = lambda _: None,
    fewest: int | None = None,
) -> torch.Tensor:
    """Draws documents in random order, tokenizes them and cuts the stream into equal sequences.

    Args:
        source: `builtin`, `builtin-code`, a `.jsonl`, `.txt` or `.parquet` file, a folder of such files, or the name of
            a Hugging Face data set. Text files are cut into passages about as long as a sequence, which are drawn like
            documents.
        samples, length: how many sequences of how many tokens.
        seed: of the order of the documents.
        say: told about chats that were left out because the chat template refuses them.
        fewest: as `pack` has it.

    Returns:
        int64 (samples, length).

    Raises:
        SpenseError: no such source, a damaged one, rows without text (names file and line), or fewer than
            samples · length tokens in it.
    """
    return pack(_documents(source, seed, length), tokenizer, samples, length, _described(source), say, fewest)


def heldout_tokens(tokenizer: PreTrainedTokenizerBase, samples: int, length: int) -> torch.Tensor:
    """Text for perplexity that the built-in calibration source does not contain; int64 (samples, length)."""
    return pack(docstrings(HELDOUT_PACKAGES, seed=0), tokenizer, samples, length, "held-out docstrings")


def pack(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    source: str,
    say: Callable[[str], None] = lambda _: None,
    fewest: int | None = None,
) -> torch.Tensor:
    """Concatenates tokenized documents, end-of-text between them, into int64 (samples, length).

    Args:
        fewest: where the documents end early, so many samples will do; None for all.

    Raises:
        SpenseError: fewer tokens than that.
    """
    stream: list[int] = []
    wanted, drawn = samples * length, 0
    refused: list[RefusedChat] = []
    for document in documents:
        drawn += 1
        try:
            stream.extend(_tokenize(document, tokenizer))
        except RefusedChat as error:
            refused.append(error)
        if len(stream) >= wanted:
            break
    left_out = [
        f"{source}: the chat template refuses {len(refused)} of {drawn} documents, which are left out; first {error}"
        for error in refused[:1]
    ]
    samples = max(min(samples, len(stream) // length), samples if fewest is None else fewest)
    wanted = samples * length
    if len(stream) < wanted:
        found = (
            f"{source}: found {len(stream)} tokens, expected at least {wanted} ({samples} samples × {length}); "
            "use a longer text, or smaller --samples or --length"
        )
        raise SpenseError("\n".join([found, *left_out]))
    for line in left_out:
        say(line)
    return torch.tensor(stream[:wanted]).view(samples, length)


def check_vocabulary(tokens: torch.Tensor, embeddings: int) -> None:
    """Raises SpenseError where tokens, int64 of any shape, have no row among the model's embeddings."""
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < embeddings:
            raise SpenseError(
                f"the text: found token {token}, expected 0 to {embeddings - 1}, for which the model has "
                "embeddings; is this its tokenizer?"
            )


def _tokenize(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Raises RefusedChat where the tokenizer's chat template has no form for it."""
    text = plain_text(document) if isinstance(document, Chat) else document
    if not text.strip():
        return []
    if isinstance(document, Chat) and (template := chat_template(tokenizer)):
        text = templated(document, template, tokenizer)
        return tokenizer(_valid(text), add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tokenizer(_valid(text), verbose=False)["input_ids"] + end


def _valid(text: str) -> str:
    """With U+FFFD for lone surrogates, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _documents(source: str, seed: int, length: int) -> Iterator[Document]:
    if read := _BUILTIN.get(source):
        return chain(read(BUILTIN_PACKAGES, seed), read(MORE_BUILTIN_PACKAGES, seed))
    return (read_row(row, where) for where, row in shuffled_rows(source, seed, length))


def _described(source: str) -> str:
    """A source as errors name it: how long a built-in one is depends on what is installed."""
    if source not in _BUILTIN:
        return source
    packages = (*BUILTIN_PACKAGES, *MORE_BUILTIN_PACKAGES)
    return f"{source}, from {', '.join(installed(packages)) or 'none'} of the packages {', '.join(packages)}"
