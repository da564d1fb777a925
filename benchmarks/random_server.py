"""What a vLLM server is started with to be measured without a checkpoint: a tokenizer, and random weights.

    vllm serve FOLDER --load-format dummy --worker-extension-cls benchmarks.random_server.RandomWeights

vLLM imports this module in each worker, last of all that it imports, before the worker takes its GPU. There it waits
for the file that `GO` names in the environment, so that a server is through with importing when it gets the GPU.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

#: Of the environment: a file that a worker waits for; without it, none waits.
GO = "SPENSE_SERVER_GO"
#: For `--worker-extension-cls`, and the method that a server's `/collective_rpc` is asked for.
EXTENSION, FILL = "benchmarks.random_server.RandomWeights", "fill_with_random_values"


class RandomWeights:
    """Becomes a base of vLLM's worker."""

    def fill_with_random_values(self) -> None:
        """Replaces dummy values, which are nearly all zeros in FP8, as `engine_times` does in its own process."""
        from benchmarks.random_weights import fill_random

        fill_random(self.get_model())  # type: ignore[attr-defined]


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Writes a tokenizer whose words are the tokens' numbers in hexadecimal digits, with a blank between them.

    Any tokens decode to a text that encodes to the same tokens, so that prompts made of random ones keep their length.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    # vLLM refuses a text with more characters for each token than the longest word has, and here blanks count too.
    zero = "0" * (len(f"{vocabulary - 1:x}") + 1)
    words = {zero: 0, **{f"{token:x}": token for token in range(1, vocabulary)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token=zero))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def wait_for_turn() -> None:
    """Returns once the file that `GO` names is there."""
    if file := os.environ.get(GO):
        while not Path(file).exists():
            time.sleep(0.1)


wait_for_turn()
