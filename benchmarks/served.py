"""Does vLLM serve what Spense prunes? Tiny models of architectures that are unlike Llama, against stock vLLM.

`python -m benchmarks.served` makes each model with random weights, prunes it, and has two engines answer the same
prompts from the same files: `--quantization spense` and stock's `--quantization compressed-tensors`. Stock has no FP8
experts on a CPU: there transformers' model of the files stands for it (`served_twin.py`). It exits with 1
unless every outcome is what results/served.json says; `--write` keeps what it found, also in docs/notes/models.md.
Names of models as arguments restrict it to them. It needs vLLM, torchvision for models that see, and no GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import zoo
from benchmarks.served_models import MODELS, Model, make_pruned, runs_here
from benchmarks.served_twin import load_as_served
from benchmarks.zoo import ROOT
from benchmarks.zoo_table import SERVED
from offline_prune.checkpoint.verify import open_checkpoint
from vllm_spense.errors import SpenseError, first_line

STOCK = "compressed-tensors"
QUANTIZATIONS = ("spense", STOCK)
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):",
    "1, 2, 3, 4,",
    "Dear Sir or Madam,",
    "Cats and dogs are",
    "Water boils at",
    "Once the rain had stopped, the children ran out into the garden and",
)
#: Nats, by type of the activations. Where answers part, no engine may prefer its own token by more.
ROUNDING = {"float32": 1e-3, "bfloat16": 0.25}
#: The same where one engine does not round the inputs of a projection that the other rounds.
ABSORBED = 0.25
#: Of the prompts, two may be answered otherwise: of many activations one or two lie so close to the middle between two
#: FP8 numbers that another order of sums rounds them the other way. A wrong product moves all answers.
EXCEPTIONS = 2
TOKENS = 16
#: For models with a draft head, and vLLM's counter of the tokens that it has proposed.
SPECULATIVE = {"method": "mtp", "num_speculative_tokens": 1}
DRAFTED = "vllm:spec_decode_num_draft_tokens"


@dataclass(frozen=True)
class Outcome:
    """What became of a model.

    Attributes:
        vllm_class: that served it.
        result: served | differs | left dense | refused | stock cannot.
        why: the error.
        images: whether it was asked about an image as well.
    """

    result: str
    vllm_class: str = ""
    why: str = ""
    images: bool = False


def serve(folders: dict[str, Path]) -> dict[str, Outcome]:
    """Has both engines answer for each model, all in one process beside this one."""
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    with tempfile.TemporaryDirectory() as folder:
        order, answers = Path(folder, "order.json"), Path(folder, "answers.json")
        order.write_text(json.dumps({name: str(path) for name, path in folders.items()}))
        command = [sys.executable, "-m", "benchmarks.served", "--answer", order, answers]
        done = subprocess.run(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        assert done.returncode == 0, done.stdout.decode()[-5000:]
        found = json.loads(answers.read_text())
    return {name: _judge(name, found[name]) for name in folders}


def _judge(name: str, answers: dict[str, Any]) -> Outcome:
    ours, theirs = (answers[quantization] for quantization in QUANTIZATIONS)
    images = bool(MODELS[name].image)
    if "error" in theirs:
        return Outcome("stock cannot", "", theirs["error"], images)
    if "error" in ours:
        return Outcome("refused", theirs["class"], ours["error"], images)
    tolerance = ABSORBED if MODELS[name].absorbed else ROUNDING[MODELS[name].dtype]
    gaps = [_gap(a, b) for a, b in zip(ours["answers"], theirs["answers"], strict=True)]
    apart = [f"{gap:.3f}" for gap in gaps if gap > tolerance]
    if not all(each.get("drafted", True) for each in (ours, theirs)):
        return Outcome("left dense", theirs["class"], "no token was drafted", images)
    if ours["dense"] or not ours["spense"] or theirs["spense"]:
        return Outcome("left dense", theirs["class"], ours["dense"], images)
    if len(apart) > EXCEPTIONS:
        return Outcome("differs", theirs["class"], f"{len(apart)} answers, by {', '.join(apart)} nats", images)
    return Outcome("served", theirs["class"], "", images)


def _gap(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    """By how much an engine prefers its own token where two answers part, in nats; 0 where they do not.

    Answers have for each token the log probabilities of the likeliest, the token first.
    """
    for a, b in zip(ours, theirs, strict=True):
        mine, other = next(iter(a)), next(iter(b))
        if mine != other:
            return max(a[mine] - a.get(other, -float("inf")), b[other] - b.get(mine, -float("inf")))
    return 0.0


def _answer(order: Path, answers: Path) -> None:
    """Runs in the process of the engines."""
    # On Intel CPUs with AMX oneDNN takes several hundred times as long for a product of FP8 matrices as torch does.
    torch._C._set_mkldnn_enabled(False)
    found = {}
    for name, folder in json.loads(order.read_text()).items():
        ours = _run(MODELS[name], folder, "spense")
        if open_checkpoint(Path(folder)).annotation.experts and not torch.cuda.is_available():
            theirs = _twin(Path(folder), ours)
        else:
            theirs = _run(MODELS[name], folder, STOCK)
        found[name] = {"spense": ours, STOCK: theirs}
    answers.write_text(json.dumps(found))


def _twin(folder: Path, ours: dict[str, Any]) -> dict[str, Any]:
    """What transformers' model says after the same tokens, with FP8 activations."""
    if "error" in ours:
        return {"class": ""}
    model, tokenizer = load_as_served(folder)
    answers = []
    for prompt, answer in zip(PROMPTS, ours["answers"], strict=True):
        before = tokenizer(prompt).input_ids
        tokens = [int(next(iter(step))) for step in answer]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*before, *tokens]])).logits[0, len(before) - 1 : -1]
        likeliest = logits.log_softmax(-1).topk(len(answer[0]))
        answers.append(
            [
                {str(token): value for token, value in zip(step.tolist(), values.tolist(), strict=True)}
                for step, values in zip(likeliest.indices, likeliest.values, strict=True)
            ]
        )
    return {"class": ours["class"], "spense": False, "answers": answers}


def _run(model: Model, folder: str, quantization: str) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    options: dict[str, Any] = {"limit_mm_per_prompt": {"image": 1, "video": 0}} if model.image else {}
    if model.plain_rope:
        options["compilation_config"] = {"custom_ops": ["all", "-rotary_embedding"]}
    if model.speculates:
        options |= {"speculative_config": SPECULATIVE, "disable_log_stats": False}
    try:
        llm = LLM(
            folder,
            quantization=quantization,
            model_impl=model.implementation,
            enforce_eager=True,
            dtype=model.dtype,
            trust_remote_code=model.is_remote,
            max_model_len=256,
            max_num_seqs=16,
            seed=0,
            **options,
        )
        outputs = llm.generate(
            _prompts(model),
            SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=5),
            use_tqdm=False,
        )
        (found,) = llm.apply_model(_describe)
        if model.speculates:
            found["drafted"] = sum(metric.value for metric in llm.get_metrics() if metric.name == DRAFTED)
        return found | {"answers": [_likeliest(output.outputs[0].logprobs or []) for output in outputs]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {first_line(error)[:300]}"}
    finally:
        llm = None
        gc.collect()
        cleanup_dist_env_and_memory()


def _likeliest(steps: Sequence[Any]) -> list[dict[str, float]]:
    ordered = (sorted(step.items(), key=lambda entry: entry[1].rank) for step in steps)
    return [{str(token): entry.logprob for token, entry in step} for step in ordered]


def _prompts(model: Model) -> list[Any]:
    if not model.image:
        return list(PROMPTS)
    from PIL import Image

    pixels = torch.randint(0, 256, (56, 56, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    seeing = [{"prompt": f"{model.image}{text}", "multi_modal_data": {"image": image}} for text in PROMPTS[::2]]
    return [*PROMPTS[1::2], *seeing]


def _describe(model: nn.Module) -> dict[str, Any]:
    """The model's class, and what Spense does not run although it was pruned."""
    from vllm_spense.plugin.config import SpenseConfig
    from vllm_spense.plugin.serving_check import require_served

    configs = (getattr(module, "quant_config", None) for module in model.modules())
    config = next((each for each in configs if isinstance(each, SpenseConfig)), None)
    dense = ""
    if config is not None:
        try:
            require_served(model, config)
        except SpenseError as error:
            dense = str(error)
    return {"class": type(model).__name__, "spense": config is not None, "dense": dense}


def known() -> dict[str, Outcome]:
    """What was found before."""
    if not SERVED.exists():
        return {}
    return {name: Outcome(**found) for name, found in json.loads(SERVED.read_text(encoding="utf-8")).items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=" | ".join(MODELS))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--answer", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.answer:
        _answer(*options.answer)
        return 0
    if unknown := {*options.names} - MODELS.keys():
        parser.error(f"found {', '.join(sorted(unknown))}, expected names from {', '.join(MODELS)}")
    chosen = options.names or [name for name, model in MODELS.items() if runs_here(model)]
    for name in () if options.names else MODELS.keys() - set(chosen):
        print(f"{name}: not tried, torchvision is not installed")
    outcomes = _outcomes(chosen)
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome.result} {outcome.vllm_class} {outcome.why}", flush=True)
    if options.write:
        every = {name: asdict(found) for name, found in sorted({**known(), **outcomes}.items())}
        SERVED.write_text(json.dumps(every, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        zoo.TABLE.write_text(zoo.table(zoo.known()), encoding="utf-8")
        return 0
    return 0 if all(known().get(name) == outcome for name, outcome in outcomes.items()) else 1


def _outcomes(names: Iterable[str]) -> dict[str, Outcome]:
    with tempfile.TemporaryDirectory() as folder:
        return serve({name: make_pruned(name, Path(folder)) for name in names})


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
