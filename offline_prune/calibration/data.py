"""Calibration text: Hugging Face data sets, local files, and a built-in source that needs no download."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import random
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from vllm_spense.errors import SpenseError

DEFAULT_SOURCE = "simplescaling/s1K-1.1"
BUILTIN = "builtin"
FILE_KINDS = (".jsonl", ".txt", ".parquet")

#: Installed packages whose docstrings make the built-in text; the held-out text comes from others.
BUILTIN_PACKAGES = ("torch", "numpy", "datasets", "huggingface_hub")
HELDOUT_PACKAGES = ("matplotlib", "pandas", "transformers")
_SHORTEST_DOCSTRING = 200

Document = str | list[dict[str, str]]


def calibration_tokens(
    source: str, tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: int
) -> torch.Tensor:
    """Draws documents in random order, tokenizes them and cuts the stream into equal sequences.

    Args:
        source: `builtin`, a `.jsonl`, `.txt` or `.parquet` file, or the name of a Hugging Face data set.
        samples, length: how many sequences of how many tokens.
        seed: of the order of the documents.

    Returns:
        int64 (samples, length).

    Raises:
        SpenseError: no such source, rows without text, or fewer than samples · length tokens in it.
    """
    return pack(_documents(source, seed), tokenizer, samples, length, source)


def heldout_tokens(tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: int = 0) -> torch.Tensor:
    """Text for perplexity that the built-in calibration source does not contain; int64 (samples, length)."""
    return pack(docstrings(HELDOUT_PACKAGES, seed), tokenizer, samples, length, "held-out docstrings")


def pack(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, samples: int, length: int, source: str
) -> torch.Tensor:
    """Concatenates tokenized documents, end-of-text between them, into int64 (samples, length)."""
    stream: list[int] = []
    wanted = samples * length
    for document in documents:
        stream.extend(_tokenize(document, tokenizer))
        if len(stream) >= wanted:
            return torch.tensor(stream[:wanted]).view(samples, length)
    raise SpenseError(
        f"{source}: found {len(stream)} tokens, expected at least {wanted} ({samples} samples × {length}); "
        "use a longer text, or smaller --samples or --length"
    )


def _tokenize(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not isinstance(document, str):
        if tokenizer.chat_template:
            document = str(tokenizer.apply_chat_template(document, tokenize=False))
            return tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        document = "\n\n".join(message["content"] for message in document)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tokenizer(document, verbose=False)["input_ids"] + end


def _documents(source: str, seed: int) -> Iterator[Document]:
    if source == BUILTIN:
        return docstrings(BUILTIN_PACKAGES, seed)
    path = Path(source)
    rows = _read_file(path) if path.suffix in FILE_KINDS or path.exists() else _read_dataset(source)
    random.Random(seed).shuffle(rows)
    return (_render(row, f"{source}, row {i}") for i, row in enumerate(rows))


def _read_file(path: Path) -> list[Any]:
    if not path.is_file():
        raise SpenseError(f"{path}: no such file")
    if path.suffix not in FILE_KINDS:
        raise SpenseError(f"{path}: found a {path.suffix or 'nameless'} file, expected {', '.join(FILE_KINDS)}")
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise SpenseError(f"{path}: not a parquet file: {error}") from None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpenseError(f"{path}: not UTF-8 text: {error}") from None
    if path.suffix == ".txt":
        return [text]
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise SpenseError(f"{path}, line {number}: not valid JSON: {error}") from None
    return rows


def _read_dataset(name: str) -> list[Any]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return list(load_dataset(name, split="train"))
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SpenseError(
            f"calibration data {name}: neither a file nor a data set that can be loaded: {reason}\n"
            f"Without a network, give a {', '.join(FILE_KINDS)} file, or `--calibration {BUILTIN}`."
        ) from None


def _render(row: Any, where: str) -> Document:
    """A row as plain text or as a chat, by the columns that data sets for language models use."""
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        for key in ("messages", "conversations"):
            if isinstance(row.get(key), list):
                return [_message(message, where) for message in row[key]]
        if isinstance(row.get("text"), str):
            return row["text"]
        question = row.get("question") or row.get("prompt") or row.get("instruction")
        answer = row.get("deepseek_attempt") or row.get("answer") or row.get("response") or row.get("output")
        if isinstance(question, str) and isinstance(answer, str):
            thinking = row.get("deepseek_thinking_trajectory")
            if thinking:
                answer = f"<think>\n{thinking}\n</think>\n\n{answer}"
            return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise SpenseError(f"{where}: found {found}; expected a column text, messages, or question and answer")


def _message(message: Any, where: str) -> dict[str, str]:
    if isinstance(message, dict):
        role = message.get("role") or {"human": "user", "gpt": "assistant"}.get(str(message.get("from")))
        content = message.get("content") or message.get("value")
        if isinstance(role, str) and isinstance(content, str):
            return {"role": role, "content": content}
    raise SpenseError(f"{where}: found the message {str(message)[:80]}; expected one with role and content")


def docstrings(packages: Iterable[str], seed: int) -> Iterator[str]:
    """The docstrings of installed packages, one Python file's after another's, files in random order."""
    files: list[Path] = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            files += Path(spec.origin).parent.rglob("*.py")
    files.sort(key=lambda path: path.parts[-4:])
    random.Random(seed).shuffle(files)
    for path in files:
        text = "\n\n".join(_docstrings_of(path))
        if text:
            yield text


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return  # Packages ship templates and tests of broken files; they are no prose.
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text and len(text) >= _SHORTEST_DOCSTRING:
                yield inspect.cleandoc(text)
