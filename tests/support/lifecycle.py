"""What one engine says between steps of its life: sleep, wake, reload. A program of its own, because vLLM pins the
threads of the process it runs in.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

#: Of `live`'s steps.
Step = tuple[Any, ...]


def live(arguments: dict[str, Any], prompts: Sequence[str], steps: Sequence[Step]) -> list[Any]:
    """Starts an engine, takes it through the steps, and returns what came of each.

    Args:
        arguments: of `vllm.LLM`.
        steps:
            ("generate",): token ids of each prompt, 16 greedy ones.
            ("zero",): fills all weights of MLPs with zeros.
            ("reload", folder or None): `reload_weights`; None for the checkpoint that is served.
            ("update", folder, dtype): the same with tensors that a trainer would send, converted to dtype.
            ("sleep", level), ("wake",) or ("wake", tags).
            ("memory",): bytes in use on the GPU, by anybody.

    Returns:
        For steps that generate or measure, their result; for others None, or the error that they ended with.
    """
    from engines import VLLM
    from forked import run_program

    environment = os.environ | VLLM | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with TemporaryDirectory() as folder:
        order, answers = Path(folder, "order.json"), Path(folder, "answers.json")
        order.write_text(json.dumps({"arguments": arguments, "prompts": list(prompts), "steps": steps}))
        done = run_program(Path(__file__), order, answers, environment=environment)
        assert done.returncode == 0, done.stdout[-5000:]
        return json.loads(answers.read_text())


def _main() -> None:
    import torch
    from vllm import LLM

    # As in generate.py.
    torch._C._set_mkldnn_enabled(False)
    source, target = map(Path, sys.argv[1:])
    order = json.loads(source.read_text())
    llm = LLM(**order["arguments"])
    target.write_text(json.dumps([_step(llm, order["prompts"], *step) for step in order["steps"]]))


def _step(llm: Any, prompts: list[str], name: str, *given: Any) -> Any:
    from vllm import SamplingParams

    if name == "generate":
        # What it has read before must not be taken for what it says now.
        llm.reset_prefix_cache()
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]
    if name == "memory":
        return _memory()
    try:
        match name:
            case "zero":
                llm.apply_model(_zero_weights)
            case "reload":
                llm.collective_rpc("reload_weights", kwargs={"weights_path": given[0]})
            case "update":
                llm.collective_rpc("reload_weights", kwargs={"weights_iterator": _sent(*given)})
            case "sleep":
                llm.sleep(level=given[0])
            case "wake":
                llm.wake_up(*given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _zero_weights(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            parameter.data.zero_()


def _sent(folder: str, dtype: str) -> list[tuple[str, Any]]:
    import torch
    from safetensors.torch import load_file

    tensors = load_file(Path(folder, "model.safetensors"))
    return [
        (name, tensor if dtype == "as they are" else tensor.to(getattr(torch, dtype)))
        for name, tensor in tensors.items()
    ]


def _memory() -> int:
    import torch

    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


if __name__ == "__main__":
    _main()
