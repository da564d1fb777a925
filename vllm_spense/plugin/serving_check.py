"""Which of vLLM's classes serves a checkpoint, and whether it gives every pruned layer to Spense.

vLLM builds a model in a process of its own, which this module is the program of: it changes settings of the whole
process. Importing this module does not load vLLM.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_spense.errors import FormatError, SpenseError

if TYPE_CHECKING:
    from torch import nn

    from vllm_spense.plugin.config import SpenseConfig

#: Lines of what vLLM said that an error repeats.
_LAST_LINES = 5


@dataclass(frozen=True)
class Serving:
    """How vLLM serves a checkpoint.

    Attributes:
        architecture: that the checkpoint names.
        vllm_class: None where vLLM has no class of its own for it, and may run it by way of transformers.
        layers: that Spense runs; None where no model was built.
    """

    architecture: str
    vllm_class: str | None
    layers: int | None = None


def find_class(folder: Path) -> Serving | None:
    """Looks a checkpoint's architecture up in vLLM's registry; None where vLLM is not installed."""
    entries, architecture = registry(), _architecture(folder)
    return Serving(architecture, entries.get(architecture)) if entries else None


def registry() -> dict[str, str]:
    """vLLM's class for each architecture that it has a class of its own for.

    Read from the registry's source: importing it takes longer than pruning a small model. Empty without vLLM.
    """
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.origin is None:
        return {}
    source = Path(vllm.origin).parent / "model_executor/models/registry.py"
    if not source.exists():
        return {}
    entries: dict[str, str] = {}
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                match key, value:
                    case ast.Constant(value=str(name)), ast.Tuple(elts=[_, ast.Constant(value=str(found))]):
                        entries[name] = found
    return entries


def prove_serving(folder: Path, trust_remote_code: bool = False) -> Serving:
    """Has vLLM build the model on the meta device, and asks every pruned layer of it who runs it.

    Raises:
        SpenseError: vLLM is not installed, or does not build this model.
        FormatError: a pruned layer is not run by Spense.
    """
    if importlib.util.find_spec("vllm") is None:
        raise SpenseError("vLLM is not installed here, so it cannot say whether it serves this checkpoint")
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", **os.environ}
    with tempfile.TemporaryDirectory() as temporary:
        answer = Path(temporary, "answer.json")
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, folder, answer, *(["--trust-remote-code"] * trust_remote_code)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            said = "\n".join(done.stdout.strip().splitlines()[-_LAST_LINES:])
            raise SpenseError(f"{folder}: vLLM does not build this model:\n{said}")
        found = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in found:
        raise SpenseError(found["error"])
    return Serving(**found)


def require_served(model: nn.Module, config: SpenseConfig) -> int:
    """Every pruned MLP of a model that vLLM built has gate, up and down run by Spense, and so have pruned experts; how
    many layers these are, all experts of one being one.

    Raises:
        FormatError: the first that has not.
    """
    from vllm_spense.plugin.experts import DenseExpertsMethod, RegionExpertsMethod
    from vllm_spense.plugin.linear import RegionLinearMethod

    ours: dict[str, list[RegionLinearMethod]] = {}
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, RegionLinearMethod):
            ours.setdefault(method.name.rpartition(".")[0], []).append(method)
    for mlp in dict.fromkeys(name.rpartition(".")[0] for name in config.layers):
        found = [(each.split, each.projections) for each in ours.get(mlp, [])]
        gates = sum(projections for split, projections in found if split == "output")
        downs = sum(split == "input" for split, _ in found)
        if (gates, downs) != (2, 1):
            raise FormatError(
                f"vLLM's {type(model).__name__} does not give this pruned MLP to Spense",
                layer=mlp,
                found=", ".join(each.name.rpartition(".")[2] for each in ours.get(mlp, [])) or "none of its layers",
                expected="gate, up and down",
            )
    experts = [
        module.layer_name
        for module in model.modules()
        if isinstance(getattr(module, "quant_method", None), RegionExpertsMethod | DenseExpertsMethod)
    ]
    if missing := sorted(set(config.experts) - set(experts)):
        raise FormatError(
            f"vLLM's {type(model).__name__} does not give these pruned experts to Spense",
            layer=missing[0],
            found="other layers",
            expected="one layer of routed experts",
        )
    expected = len(config.annotation.modules)
    if len(ours) != expected:
        raise FormatError(
            f"vLLM's {type(model).__name__} leaves pruned MLPs out", found=f"{len(ours)} MLPs", expected=expected
        )
    return sum(map(len, ours.values())) + len(experts)


def _build(folder: Path, trust_remote_code: bool) -> Serving:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_spense.plugin.config import NAME, SpenseConfig

    engine = EngineArgs(
        str(folder),
        quantization=NAME,
        load_format="dummy",
        enforce_eager=True,
        skip_tokenizer_init=True,
        trust_remote_code=trust_remote_code,
    ).create_engine_config()
    with tempfile.TemporaryDirectory() as temporary, set_current_vllm_config(engine):
        init_distributed_environment(1, 0, f"file://{temporary}/store", 0, "gloo")
        initialize_model_parallel()
        dtype = engine.model_config.dtype
        assert isinstance(dtype, torch.dtype), dtype
        with set_default_torch_dtype(dtype), torch.device("meta"):
            model = initialize_model(engine)
    config: Any = engine.quant_config
    assert isinstance(config, SpenseConfig)
    return Serving(_architecture(folder), type(model).__name__, require_served(model, config))


def _architecture(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return next(iter(config.get("architectures") or ()), "")


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("answer", type=Path)
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args()
    try:
        answer: dict[str, object] = asdict(_build(options.folder, options.trust_remote_code))
    except SpenseError as error:
        answer = {"error": str(error)}
    options.answer.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    _main()
