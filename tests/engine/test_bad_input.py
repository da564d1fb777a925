"""What a user can get wrong is said in the process that the user started, before a worker exists."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Edit, prune_tiny
from engines import VLLM
from safetensors.torch import load_file, save_file

from vllm_spense.errors import SpenseError
from vllm_spense.format import KEY

pytestmark = pytest.mark.engine


def refusal(model: Path, **arguments: Any) -> str:
    """What vLLM says to these arguments while it still is in the process that the user started."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    with pytest.raises((SpenseError, ValueError)) as refused:
        AsyncEngineArgs(model=str(model), dtype="float32", max_model_len=128, **arguments).create_engine_config()
    return str(refused.value)


@pytest.mark.parametrize(
    ("edit", "quantization", "said"),
    [
        pytest.param(
            lambda config: config.pop(KEY),
            "spense",
            ["this is not a Spense checkpoint", "config.json; key: quantization_config.spense; found: nothing"],
            id="no annotation",
        ),
        pytest.param(
            lambda config: config[KEY].update(version=3),
            None,
            ["unknown version", "config.json; key: version; found: 3; expected: 1 | 2"],
            id="future version",
        ),
        pytest.param(
            lambda config: config[KEY].update(colour="red"),
            "spense",
            ["unknown key", "config.json; key: colour"],
            id="unknown key",
        ),
        pytest.param(
            lambda config: config[KEY]["regions"]["default"].update(sparse=384),
            None,
            ["model.safetensors; layer: model.layers.0.mlp.gate_proj; key: regions", "found: 384 rows; expected: 512"],
            id="wrong S",
        ),
        pytest.param(
            lambda config: config[KEY].update(modules=["model.layers.7.mlp"]),
            None,
            ["a tensor of a pruned module is missing", "layer: model.layers.7.mlp.gate_proj.weight; key: modules"],
            id="unknown module",
        ),
        pytest.param(
            lambda config: config[KEY].update(modules=["model.layers.0.mlp.experts.0"]),
            None,
            ["MoE experts", "config.json; key: modules; found: model.layers.0.mlp.experts.0"],
            id="experts",
        ),
        pytest.param(
            lambda config: config.update(quant_method="fp8"),
            "spense",
            ["key: quantization_config.quant_method; found: fp8; expected: compressed-tensors"],
            id="another quantization",
        ),
    ],
)
def test_edited_annotation(
    edited: Callable[[Edit], Path], edit: Edit, quantization: str | None, said: list[str]
) -> None:
    message = refusal(edited(edit), quantization=quantization)
    for part in said:
        assert part in message


def test_model_without_quantization(dense_models: dict[str, Path]) -> None:
    assert "config file for spense" in refusal(dense_models["llama"], quantization="spense")


def test_research_checkpoint(dense_models: dict[str, Path], tmp_path: Path) -> None:
    bf16 = prune_tiny(dense_models["llama"], tmp_path / "bf16", quantize="none")
    message = refusal(bf16, quantization="spense")
    assert "pruned but not quantized" in message
    assert "--quantize fp8" in message


@pytest.mark.parametrize(
    "load_format", ["sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache", "bitsandbytes", "gguf"]
)
def test_load_format(spense_checkpoint: Path, load_format: str) -> None:
    message = refusal(spense_checkpoint, load_format=load_format)
    assert f"key: --load-format; found: {load_format}; expected: auto" in message


@pytest.mark.parametrize(
    ("option", "value"), [("cpu_offload_gb", 4.0), ("offload_group_size", 2)], ids=["unified memory", "prefetched"]
)
def test_offloaded_weights(spense_checkpoint: Path, option: str, value: float) -> None:
    message = refusal(spense_checkpoint, **{option: value})
    assert f"key: --{option.replace('_', '-')}; found: {value}; expected: 0" in message


def test_expert_parallel(spense_checkpoint: Path) -> None:
    """Refused by vLLM: this model has none."""
    assert "Number of experts in the model must be greater than 0" in refusal(
        spense_checkpoint, enable_expert_parallel=True
    )


@pytest.mark.parametrize(
    ("switch", "value", "said"),
    [
        ("SPENSE_PATH", "libary", "SPENSE_PATH: found libary, expected reference | library | one-launch | dense"),
        ("SPENSE_DENSE_COPY_GIB", "8GB", "SPENSE_DENSE_COPY_GIB: found 8GB, expected a number of GiB"),
    ],
)
def test_switches(switch: str, value: str, said: str, spense_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(switch, value)
    assert said in refusal(spense_checkpoint)


def test_ranks_that_do_not_divide_a_region(spense_checkpoints: dict[str, Path]) -> None:
    message = refusal(spense_checkpoints["threes"], tensor_parallel_size=3)
    assert "layer: model.layers.0.mlp; key: regions.sparse; found: 256; expected: a multiple of 12" in message


def test_truncated_weights(edited: Callable[[Edit], Path]) -> None:
    weights = edited(lambda _: None) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    message = refusal(weights.parent)
    assert "a weight file is damaged" in message
    assert str(weights) in message


def test_missing_shard(edited: Callable[[Edit], Path]) -> None:
    folder = edited(lambda _: None)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    message = refusal(folder)
    assert "a weight file is missing" in message
    assert "model-00002-of-00002.safetensors" in message


SERVER = "vllm.entrypoints.openai.api_server"


def arguments(model: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--dtype", "float32", "--enforce-eager", "--max-model-len", "128", *more]


@pytest.fixture
def last_words(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The lines that a server ends with which does not get as far as a worker. It runs in this process, which has
    imported what a new one needs ten seconds for."""

    from vllm.v1.engine.async_llm import AsyncLLM

    def started(*_: object, **__: object) -> None:
        raise AssertionError("the engine starts")

    # Or the test would never end.
    monkeypatch.setattr(AsyncLLM, "__init__", started)
    # The server sets it, for what it would start; thus it is taken back.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")

    def run(model: Path, *more: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [SERVER, *arguments(model, *more)])
        with pytest.raises((SpenseError, ValueError)) as refused:
            runpy.run_module(SERVER, run_name="__main__")
        return "".join(traceback.format_exception(refused.value)).splitlines()

    return run


def test_terminal_ends_with_the_message(last_words: Callable[..., list[str]], spense_checkpoint: Path) -> None:
    assert "with this load format" in last_words(spense_checkpoint, "--load-format", "sharded_state")[-1]


def test_terminal_ends_with_the_annotation_error(
    last_words: Callable[..., list[str]], edited: Callable[[Edit], Path]
) -> None:
    # The last line is pydantic's pointer to its own documentation.
    said = last_words(edited(lambda config: config[KEY].update(version=3)))
    assert "unknown version of the Spense format" in said[-2]


def serve(model: Path) -> list[str]:
    """The lines that a server prints which does not come up."""
    done = subprocess.run(
        [sys.executable, "-m", SERVER, *arguments(model)],
        env=os.environ | VLLM,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    return done.stdout.splitlines()


def test_third_non_zero_is_one_line_on_the_terminal(edited: Callable[[Edit], Path]) -> None:
    weights = edited(lambda _: None) / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"].view(torch.uint8)[5, 8:12] = 0x38
    save_file(tensors, weights, metadata={"format": "pt"})
    said = [line for line in serve(weights.parent) if "not 2:4; the first is row 5, columns 8 to 11" in line]
    # Once as a line of its own, once as the last line of the worker's traceback.
    assert "FormatError" not in said[0]
    assert "layer: model.layers.1.mlp.down_proj" in said[0]
    assert "found: [1.0, 1.0, 1.0, 1.0]" in said[0]
