"""Starts engines for the tests, and compares what they generated."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import TypeVar

from forked import run_program

# Twenty prompts of unequal lengths, so that one batch holds prefill and decode of many shapes.
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a",
    "Water boils at",
    "def fibonacci(n):",
    "The three primary colours are",
    "In 1969, the first human",
    "Dear Sir or Madam,",
    "To make bread you need flour,",
    "The opposite of hot is",
    "A triangle has",
    "She opened the door and saw",
    "The largest planet is",
    "1, 2, 3, 4,",
    "My favourite season is",
    "The sun rises in the",
    "Shakespeare wrote",
    "Cats and dogs are",
    "The quick brown fox",
    "Hello! How are",
    "Once the rain had stopped, the children ran out into the garden and",
]

#: Nats. Spense and stock vLLM on one rank sum the same products in another order, which moves log probabilities of
#: tiny models by 2e-6 at most. An activation close to the middle between two FP8 numbers may then be rounded the other
#: way, and from there on its completion moves by up to 4e-2; whether and where depends on the weights and on this CPU.
#: A wrong product moves every completion: a single row whose scale is wrong by 1% by 4e-2 and more.
ROUNDING = 1e-3
#: Nats. Five times what such a rounding was seen to move a log probability by.
ROUNDED_OTHERWISE = 0.2
#: Completions of which a server, or a GPU in a type of fewer bits, may prefer other tokens for that reason.
EXCEPTIONS = len(PROMPTS) // 4

VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # Threads pinned to cores that other programs use too wait for each other in every operation.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Run:
    """One engine.

    Attributes:
        quantization: None leaves the choice to vLLM.
        ranks, stages: tensor and pipeline parallel size.
        among_others: takes a small part of a GPU's memory instead of nearly all.
        expert_parallel: each rank has whole experts.
        adapters: LoRAs; prompt i takes the (i mod (n + 1))-th of n, and none where that is 0. All are in one batch.
        options: more of `vllm.LLM`'s arguments, as JSON.
        again: asks twice, and the second answers count.
    """

    model: Path
    quantization: str | None
    compiled: bool = False
    ranks: int = 1
    stages: int = 1
    reload: bool = False
    load_format: str = "auto"
    dtype: str = "float32"
    among_others: bool = False
    expert_parallel: bool = False
    adapters: tuple[Path, ...] = ()
    options: str = "{}"
    again: bool = False


@dataclass(frozen=True)
class Completion:
    """32 greedy tokens, and for each the log probabilities of the five likeliest."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


def generate(
    runs: Sequence[Run],
    switches: Mapping[str, str] | None = None,
    counts: dict[Run, dict[str, float]] | None = None,
    prompts: Sequence[str] = PROMPTS,
) -> dict[Run, list[Completion]]:
    """Completions of the prompts by each run, all in one process beside this one.

    Args:
        switches: environment variables of that process.
        counts: gets vLLM's counters of each run that sets `disable_log_stats` to false.
    """
    environment = os.environ | VLLM | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | (switches or {})
    with TemporaryDirectory() as folder:
        order, answers = Path(folder, "order.json"), Path(folder, "answers.json")
        orders = [
            asdict(run) | {"model": str(run.model), "adapters": [str(adapter) for adapter in run.adapters]}
            for run in runs
        ]
        order.write_text(json.dumps({"prompts": list(prompts), "runs": orders}))
        program = Path(__file__).with_name("generate.py")
        done = run_program(program, order, answers, environment=environment)
        assert done.returncode == 0, done.stdout[-5000:]
        found = json.loads(answers.read_text())
    if counts is not None:
        counts.update((run, one["counts"]) for run, one in zip(runs, found, strict=True))
    return {
        run: [
            Completion(one["tokens"], [{int(token): p for token, p in step.items()} for step in one["logprobs"]])
            for one in answer["completions"]
        ]
        for run, answer in zip(runs, found, strict=True)
    }


Case = TypeVar("Case")
Answer = TypeVar("Answer")


def on_one_gpu(complete: Callable[[Case], Answer], cases: Sequence[Case]) -> dict[Case, Answer]:
    """What engines answer that share a GPU: the first alone, so that the others find the kernels that it searched for;
    then they all at once."""
    first, *others = cases
    found = {first: complete(first)}
    if others:
        with ThreadPoolExecutor(len(others)) as pool:
            found |= zip(others, pool.map(complete, others), strict=True)
    return found


def require_as_near(ours: Sequence[Completion], theirs: Sequence[Completion], again: Sequence[Completion]) -> None:
    """Ours are at most twice as far from theirs as `again`: what theirs become in another execution of the same files.

    Means are compared, over all prompts and of each. The largest of so many differences, and which tokens tie, varies
    from one CPU to the next by as much again; means, by a tenth. Weights of another pruning of the same model are four
    times as far, and so is a prompt whose product is wrong.
    """
    found, usual = (
        [mean(differences([a], [b])) for a, b in zip(theirs, others, strict=True)] for others in (ours, again)
    )
    assert mean(found) <= 2 * mean(usual), (mean(found), mean(usual))
    assert max(found) <= 2 * max(usual), (found, usual)


def require_those_of(
    ours: Sequence[Completion],
    theirs: Sequence[Completion],
    usual: tuple[Sequence[Completion], Sequence[Completion]],
) -> str:
    """Ours are theirs: at most twice as far from them as the two usual executions of the same files from each other.

    Sums in another order round other activations to other FP8 values. By the mean, because the largest of so many
    differences varies by as much again from run to run.

    Returns:
        What was found, for the record.
    """
    tolerance = 2 * mean(differences(*usual))
    found = mean(differences(ours, theirs))
    assert found <= tolerance, (found, tolerance)
    require_same_or_tied(ours, theirs, 2 * spread(*usual), EXCEPTIONS)
    # It is another execution, not the same one twice.
    assert ours != theirs
    return f"{found:.4f} nats, tolerance {tolerance:.4f}"


def spread(ours: Sequence[Completion], theirs: Sequence[Completion]) -> float:
    """Largest of the `differences`."""
    return max(differences(ours, theirs))


def differences(ours: Sequence[Completion], theirs: Sequence[Completion]) -> list[float]:
    """Of all log probabilities, in nats, while both have seen the same tokens.

    What one of them does not list is at most as likely as the least likely token that it does.
    """
    return [
        abs(x.get(token, min(x.values())) - y.get(token, min(y.values())))
        for a, b in zip(ours, theirs, strict=True)
        for x, y in zip(a.logprobs[: _agreed(a, b) + 1], b.logprobs[: _agreed(a, b) + 1], strict=True)
        for token in x.keys() | y.keys()
    ]


def require_same_or_tied(
    ours: Sequence[Completion], theirs: Sequence[Completion], tolerance: float, exceptions: int = 0
) -> None:
    """Tokens are equal, or the first that differs is a tie: neither engine prefers its own by more than `tolerance`.

    Args:
        ours, theirs: for the first prompts.
        tolerance: in nats.
        exceptions: prompts for which it may be otherwise.
    """
    apart = []
    for prompt, (a, b) in zip(PROMPTS, zip(ours, theirs, strict=True), strict=False):
        assert len(a.tokens) == len(b.tokens) == 32
        i = _agreed(a, b)
        if i < len(a.tokens):
            mine, other = a.tokens[i], b.tokens[i]
            gap = max(
                max(one.logprobs[i].values()) - one.logprobs[i].get(of_the_other, float("-inf"))
                for one, of_the_other in ((a, other), (b, mine))
            )
            if gap > tolerance:
                apart.append(f"{prompt!r}, token {i}: {mine} against {other}, {gap:.4f} nats apart")
    assert len(apart) <= exceptions, "\n".join(apart)


def require_same(ours: Sequence[Completion], theirs: Sequence[Completion]) -> None:
    """Most completions have equal tokens and log probabilities, up to `ROUNDING`; where a tie parts them, until then.

    A rounding the other way moves single completions, a wrong product all, so the one in the middle tells them apart.
    One that is wrong at some lengths alone moves their completions by more than a rounding does.
    """
    moved = sorted(spread([a], [b]) for a, b in zip(ours, theirs, strict=True))
    assert median(moved) <= ROUNDING, moved
    assert moved[-1] <= ROUNDED_OTHERWISE, moved


def _agreed(a: Completion, b: Completion) -> int:
    return next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), len(a.tokens))
