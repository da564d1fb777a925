"""Runs vLLM engines one after another and writes what they generated. A program of its own (`engines.py` starts it),
because vLLM pins the threads of the process it runs in.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import torch
from forked import fork_instead_of_spawn

# On Intel CPUs with AMX oneDNN takes several hundred times as long for a product of FP8 matrices as torch does without
# it. Here, where processes of other ranks come by as well.
torch._C._set_mkldnn_enabled(False)


def main() -> None:
    """Reads {"prompts": […], "runs": [{…}, …]} from the file named first, writes one answer per run to the second.

    An answer: as "completions" for each prompt the token ids, and for each token the log probabilities of the likeliest
    tokens; as "counts" the engine's counters by name.
    """
    source, target = sys.argv[1:]
    with open(source, encoding="utf-8") as file:
        order = json.load(file)
    fork_instead_of_spawn()
    answers = [_run(order["prompts"], run) for run in order["runs"]]
    with open(target, "w", encoding="utf-8") as file:
        json.dump(answers, file)


def _run(prompts: list[str], run: dict[str, Any]) -> dict[str, Any]:
    # Not above, where each process of a rank would load vLLM's front end too, which takes it seconds.
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest
    from vllm.v1.metrics.reader import Counter

    memory: dict[str, Any] = {}
    if run["among_others"]:
        # What the others take would be mistaken for this one's.
        memory = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 30}
    options = json.loads(run["options"])
    adapters = [LoRARequest(path, number, path) for number, path in enumerate(run["adapters"], 1)]
    # One more than there are: on a CPU prompts without an adapter get what is in the last place.
    lora = {"enable_lora": True, "max_loras": len(adapters) + 1, "max_lora_rank": 8} if adapters else {}
    arguments = {
        "quantization": run["quantization"],
        "enforce_eager": not run["compiled"],
        "tensor_parallel_size": run["ranks"],
        "pipeline_parallel_size": run["stages"],
        "enable_expert_parallel": run["expert_parallel"],
        "load_format": run["load_format"],
        "dtype": run["dtype"],
        "max_model_len": 256,
        "seed": 0,
    }
    llm = LLM(run["model"], **arguments | memory | lora | options)
    if run["reload"]:
        # A reload must fill what was emptied, not leave what was there.
        llm.apply_model(_zero_weights)
        llm.collective_rpc("reload_weights")
    chosen = [[None, *adapters][i % (len(adapters) + 1)] for i in range(len(prompts))]
    for _ in range(1 + run["again"]):
        outputs = llm.generate(
            prompts,
            SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=5),
            use_tqdm=False,
            lora_request=chosen if adapters else None,
        )
    completions = [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                {token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs or []
            ],
        }
        for output in outputs
    ]
    counted = [] if options.get("disable_log_stats", True) else llm.get_metrics()
    counts = {each.name: each.value for each in counted if isinstance(each, Counter)}
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return {"completions": completions, "counts": counts}


def _zero_weights(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            parameter.data.zero_()


if __name__ == "__main__":
    main()
