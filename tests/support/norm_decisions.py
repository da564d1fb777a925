"""What Spense decides about the norms of models that vLLM builds, as tests of those decisions want it.

`python norm_decisions.py ANSWERS FOLDER…` builds each model with dummy weights, in this process, and writes for each
folder what its norms hand on, and what its down_proj does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm_models import quantization_config

#: What is no language model, or none of its decoder layers.
_UNQUANTIZED = [rf"re:(.*\.)?{name}(\..*)?$" for name in ("lm_head", "visual", "vision_tower", "multi_modal_projector")]


def annotate(folder: Path) -> Path:
    """Makes a model's configuration that of a checkpoint whose MLPs are pruned, and removes the weights."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    text = config.get("text_config", config)
    layers = "model.language_model.layers" if "text_config" in config else "model.layers"
    sparse = text["intermediate_size"] // 64 * 32
    regions = {"sparse": sparse, "dense": text["intermediate_size"] - sparse}
    changes = {
        "modules": [f"{layers}.{i}.mlp" for i in range(text["num_hidden_layers"])],
        "regions": {"default": regions, "overrides": {}},
    }
    config["quantization_config"] = quantization_config(**changes) | {"ignore": _UNQUANTIZED}
    file.write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    return folder


def decisions(folders: Sequence[Path], answers: Path) -> dict[Path, Any]:
    """Of each folder's model, in a process beside this one."""
    command = [sys.executable, __file__, answers, *folders]
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout.decode()[-5000:]
    return dict(zip(folders, json.loads(answers.read_text()), strict=True))


def _decided(folder: Path) -> dict[str, Any]:
    import gc
    import tempfile

    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_spense.plugin.linear import InputSplitLinearMethod
    from vllm_spense.plugin.norms import FusedRMSNorm

    engine = EngineArgs(
        str(folder),
        load_format="dummy",
        enforce_eager=True,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=64,
    ).create_engine_config()
    with tempfile.TemporaryDirectory() as temporary, set_current_vllm_config(engine):
        init_distributed_environment(1, 0, f"file://{temporary}/store", 0, "gloo")
        initialize_model_parallel()
        with set_default_torch_dtype(torch.float32):
            model = initialize_model(engine)
            get_model_loader(engine.load_config).load_weights(model, engine.model_config)
            process_weights_after_loading(model, engine.model_config, torch.device("cpu"))
        found: dict[str, Any] = {"class": type(model).__name__, "norms": {}, "down": {}}
        for name, module in model.named_modules():
            method = getattr(module, "quant_method", None)
            if isinstance(module, FusedRMSNorm) and module.link:
                found["norms"][name] = [module.link.reader, module.link.takes_fp8]
            elif isinstance(method, InputSplitLinearMethod):
                problem = method.plan.problem
                found["down"][name] = [method.defers_epilogue, problem.scaled, problem.separate_outputs]
    model = None
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps([_decided(Path(folder)) for folder in sys.argv[2:]]))
