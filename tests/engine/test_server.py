"""SmolLM2, pruned as in the demo: behind the OpenAI-compatible server, and against stock vLLM on the same files."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from engines import EXCEPTIONS, PROMPTS, ROUNDING, VLLM, Run, generate, require_as_near, require_same_or_tied
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.demo import QUESTION
from scripts.server import HOST, serving

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def client(pruned_folder: Path, log: Path) -> Iterator[OpenAI]:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    options = {
        "model": str(pruned_folder),
        "served-model-name": "smollm2",
        "quantization": "spense",
        "dtype": "float32",
        "max-model-len": "512",
        "port": str(port),
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", *arguments]
    with serving(command, port, log, VLLM):
        yield OpenAI(base_url=f"http://{HOST}:{port}/v1", api_key="none", timeout=120)


def test_answer_is_the_one_of_transformers(client: OpenAI, pruned_folder: Path) -> None:
    """In what both think of the likeliest first tokens: which one wins is another on every kind of CPU, and a server
    rounds activations to FP8, which transformers does not."""
    messages = [{"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(
        model="smollm2", messages=messages, temperature=0, max_tokens=1, logprobs=True, top_logprobs=5
    )
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    found = {each.token: each.logprob for each in logprobs.content[0].top_logprobs}
    tokenizer: Any = AutoTokenizer.from_pretrained(pruned_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(pruned_folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        values, tokens = model(**prompt).logits[0, -1].log_softmax(-1).topk(50)
    expected = {tokenizer.decode([token]): value for token, value in zip(tokens, values.tolist(), strict=True)}
    assert found.keys() <= expected.keys()
    assert mean(abs(found[token] - expected[token]) for token in found) < 0.5


def test_streaming_and_several_at_once(client: OpenAI) -> None:
    prompts = ["The capital of France is", "Once upon a time", "Water boils at"]
    request = {"model": "smollm2", "prompt": prompts, "temperature": 0, "max_tokens": 8}
    streamed = [part.choices[0].index for part in client.completions.create(**request, stream=True)]
    assert set(streamed) == {0, 1, 2}
    at_once = client.completions.create(**request)
    assert [choice.index for choice in at_once.choices if choice.text] == [0, 1, 2]


def test_log_names_the_path_of_each_shape_once(client: OpenAI, log: Path) -> None:
    client.completions.create(model="smollm2", prompt="One", max_tokens=1)
    said = [line for line in log.read_text().splitlines() if "runs on cpu by the reference path" in line]
    assert len(said) == 2
    assert "output-split 3072 × 576" in said[0]
    assert "input-split 576 × 1536" in said[1]


def test_tokens_of_a_real_model(pruned_folder: Path) -> None:
    ours, stock = Run(pruned_folder, "spense"), Run(pruned_folder, "compressed-tensors")
    # Stock's product of FP8 matrices takes a CPU ten times as long as ours.
    few = PROMPTS[:8]
    answers = generate([ours, stock], prompts=few)
    try:
        require_same_or_tied(answers[ours], answers[stock], ROUNDING, EXCEPTIONS * len(few) // len(PROMPTS))
    except AssertionError:
        # On a CPU whose sums have another order in each of them: as stock's compiled engine is from its eager one.
        compiled = Run(pruned_folder, "compressed-tensors", compiled=True)
        require_as_near(answers[ours], answers[stock], generate([compiled], prompts=few)[compiled])
