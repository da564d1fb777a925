"""Tasks: how often a model finds the right answer, by the rules of lm-evaluation-harness.

    pip install 'lm-eval[api]'
    python -m benchmarks.tasks ORIGINAL ./pruned …

asks every model the same questions and writes benchmarks/results/tasks.json. Tasks and their data come from the
Hugging Face hub, or from files in `--task-folder`. Without a hub there are those of `packaged_tasks.py`, and
`continuation`, from the texts of `benchmarks.texts`: which of four passages of a text comes next?

    python -m benchmarks.tasks ORIGINAL ./pruned … --serve
    python -m benchmarks.tasks ./pruned --url http://localhost:8000/v1

ask vLLM, which serves one model after the other here, or a server that is there already, whose model's tokenizer is in
the folder. Both run the files as they are, FP8 activations included; otherwise transformers runs the weights, with
activations as they are.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import add_out, positive, readable_folder, run_main
from benchmarks.envelope import write_result
from benchmarks.packaged_tasks import PACKAGED, packaged
from benchmarks.quality_tables import tasks as table
from benchmarks.texts import documents
from offline_prune.calibration.heldout import HELDOUT
from offline_prune.checkpoint.dense_model import load_dense
from offline_prune.runtime.device import pick_device
from scripts.bootstrap import kind
from scripts.server import check_port, exit_on_signals, starting_vllm
from vllm_spense.errors import SpenseError

#: Small tasks that many papers report.
TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "winogrande")
CONTINUATION = "continuation"
#: Characters of a question's text and of each passage that may come next; passages of one question.
_TEXT, _PASSAGE, _CHOICES = 240, 60, 4

Row = dict[str, Any]
Question = dict[str, Any]


def main() -> None:
    options = parse()
    exit_on_signals()
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        sys.exit("tasks need lm-evaluation-harness: pip install 'lm-eval[api]'")
    manager = TaskManager(include_path=str(options.task_folder) if options.task_folder else None)
    for name in options.tasks:
        if name not in (CONTINUATION, *PACKAGED) and not manager.match_tasks([name]):
            raise SpenseError(f"--tasks: found {name}, which lm-evaluation-harness does not know")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        tasks = [task for name in options.tasks for task in wanted(name, options.questions, Path(scratch))]
        for folder in options.models:
            with server(folder, options) as url:
                rows += answers(model(folder, url, options), folder.name, tasks, manager, options)
            write_result(options.out, "tasks", rows)
    print("\n".join(table(rows)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tasks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=readable_folder, metavar="FOLDER", help="plain or Spense checkpoints")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=f"[{' '.join(TASKS)}]")
    parser.add_argument("--task-folder", type=readable_folder, help="more tasks, as YAML files")
    parser.add_argument("--limit", type=positive, help="questions of each task; all by default")
    parser.add_argument("--questions", type=positive, default=200, help=f"of each text, in {CONTINUATION}")
    runs = parser.add_mutually_exclusive_group()
    runs.add_argument("--url", help="of a server that runs the model, …/v1")
    runs.add_argument("--serve", action="store_true", help="have vLLM serve each model")
    parser.add_argument("--port", type=int, default=8000, help="with --serve")
    parser.add_argument("--chat", action="store_true", help="ask by the chat template")
    parser.add_argument(
        "--context", type=positive, default=4096, help="with --serve: tokens of a question and its answer"
    )
    parser.add_argument("--batch", type=positive, default=8, help="questions at a time")
    parser.add_argument("--device", default="auto")
    add_out(parser, "tasks")
    options = parser.parse_args()
    if options.url and len(options.models) > 1:
        parser.error(f"--url: found {len(options.models)} models, expected the one that the server runs")
    return options


def wanted(name: str, count: int, scratch: Path) -> Iterator[str | dict[str, Any]]:
    """A task as the harness takes it: its name or its description; `continuation` is a task for each text."""
    if name in PACKAGED:
        yield packaged(name)
        return
    if name != CONTINUATION:
        yield name
        return
    for domain in HELDOUT:
        file = scratch / f"{domain}.jsonl"
        file.write_text("".join(json.dumps(question) + "\n" for question in questions(documents(domain), count)))
        yield {
            "task": f"{CONTINUATION}_{domain}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{label}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }


def questions(texts: Iterable[str], count: int) -> list[Question]:
    """What follows the beginning of a text: the next passage, or one of three that come later?

    Returns:
        One of each text that is long enough, at most `count`: {"text", "choices", "label"}.

    Raises:
        SpenseError: no text is long enough.
    """
    shortest = _TEXT + _CHOICES * _PASSAGE
    found = []
    for number, text in enumerate(islice((text for text in texts if len(text) >= shortest), count)):
        chance = random.Random(number)
        later = chance.sample(range(_TEXT + _PASSAGE, len(text) - _PASSAGE + 1, _PASSAGE), _CHOICES - 1)
        label = chance.randrange(_CHOICES)
        starts = [*later[:label], _TEXT, *later[label:]]
        choices = [text[start : start + _PASSAGE] for start in starts]
        found.append({"text": text[:_TEXT], "choices": choices, "label": label})
    if not found:
        raise SpenseError(f"found no text of at least {shortest} characters to ask about")
    return found


@contextmanager
def server(folder: Path, options: argparse.Namespace) -> Iterator[str | None]:
    """URL of the server to ask, which --serve starts and stops; None where none shall run."""
    if not options.serve:
        yield options.url
        return
    check_port(options.port, "--port 8001")
    limit = ("--max-model-len", str(options.context))
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "server.log")
        with starting_vllm(folder, options.port, log, kind() == "cpu", *limit) as started:
            started.wait_until_ready()
            yield started.url


def model(folder: Path, url: str | None, options: argparse.Namespace) -> Any:
    """The model, or the server that runs it, as the harness takes it."""
    if url:
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        return LocalCompletionsAPI(
            base_url=f"{url.rstrip('/')}/completions",
            model=served_name(url),
            tokenizer=str(folder),
            batch_size=options.batch,
        )
    from lm_eval.models.huggingface import HFLM

    device = pick_device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    dense, tokenizer = load_dense(folder, str(device), dtype)
    return HFLM(pretrained=dense, tokenizer=tokenizer, batch_size=options.batch)


def served_name(url: str) -> str:
    """What the server calls its model.

    Raises:
        SpenseError: there is no such server.
    """
    from openai import APIConnectionError, OpenAI

    try:
        return OpenAI(base_url=url, api_key="none", max_retries=0).models.list().data[0].id
    except APIConnectionError as error:
        raise SpenseError(f"--url {url}: {error}") from None


def answers(
    lm: Any, name: str, tasks: Sequence[str | dict[str, Any]], manager: Any, options: argparse.Namespace
) -> Iterator[Row]:
    """One row for each task and metric; `stderr` is over its questions.

    Raises:
        SpenseError: a task's data cannot be fetched.
    """
    from lm_eval import simple_evaluate

    try:
        found = simple_evaluate(
            lm,
            tasks=list(tasks),
            task_manager=manager,
            limit=options.limit,
            log_samples=False,
            apply_chat_template=options.chat,
        )
    except ConnectionError as error:
        raise SpenseError(f"{error}; --tasks {CONTINUATION} needs no network") from None
    assert found is not None
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, rule = key.partition(",")
            if rule and not metric.endswith("_stderr"):
                yield {
                    "model": name,
                    "served": "vLLM" if options.serve else options.url,
                    "task": task,
                    "metric": metric,
                    "value": value,
                    # The harness says "N/A" of a single question.
                    "stderr": stderr if isinstance(stderr := metrics.get(f"{metric}_stderr,{rule}"), float) else None,
                    "questions": found["n-samples"][task]["effective"],
                }


if __name__ == "__main__":
    run_main(main)
