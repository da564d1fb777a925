"""Headers of a checkpoint's files against its annotation, before a worker starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_config import HIDDEN, MLP, I, quantization_config
from vllm.config import CUDAGraphMode

from vllm_spense.errors import FormatError, SpenseError
from vllm_spense.format import Annotation
from vllm_spense.plugin import preflight
from vllm_spense.plugin.config import SpenseConfig
from vllm_spense.plugin.preflight import check_engine


@pytest.fixture
def config() -> SpenseConfig:
    return SpenseConfig.from_config(quantization_config())


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        (
            "up_proj.weight",
            torch.zeros(I, HIDDEN),
            r"wrong type \(file: .*\.safetensors; layer: .*up_proj\.weight; found: F32",
        ),
        ("up_proj.weight_scale", torch.ones(I, 1), r"layer: .*up_proj\.weight_scale; found: F32; expected: BF16"),
        (
            "up_proj.weight_scale",
            torch.ones(I).bfloat16(),
            r"up_proj\.weight_scale; found: \(96,\); expected: \(96, 1\)",
        ),
        ("down_proj.weight_scale", None, r"missing \(file: .*; layer: .*down_proj\.weight_scale; key: modules"),
    ],
)
def test_files_against_the_annotation(
    config: SpenseConfig, tmp_path: Path, name: str, tensor: torch.Tensor | None, said: str
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for layer, shape in {"gate_proj": (I, HIDDEN), "up_proj": (I, HIDDEN), "down_proj": (HIDDEN, I)}.items():
        tensors[f"{MLP}.{layer}.weight"] = torch.zeros(shape).to(torch.float8_e4m3fn)
        tensors[f"{MLP}.{layer}.weight_scale"] = torch.ones(shape[0], 1, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    config.maybe_update_config(str(tmp_path))

    del tensors[f"{MLP}.{name}"]
    save_file(tensors | ({} if tensor is None else {f"{MLP}.{name}": tensor}), tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=said):
        config.maybe_update_config(str(tmp_path))


def engine(**changes: Any) -> Any:
    given = {
        "tensor_parallel_size": 1,
        "data_parallel_size": 1,
        "enable_expert_parallel": False,
        "enable_eplb": False,
        "lora_config": None,
        **changes,
    }
    parallel = SimpleNamespace(**given)
    return SimpleNamespace(
        parallel_config=parallel,
        lora_config=given["lora_config"],
        load_config=SimpleNamespace(load_format="auto"),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE),
        model_config=SimpleNamespace(
            architectures=[given.pop("architecture", "Qwen3MoeForCausalLM")], enforce_eager=False
        ),
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0)
        ),
    )


def test_the_mode_of_cuda_graphs_that_garbles(monkeypatch: pytest.MonkeyPatch) -> None:
    annotation = Annotation.from_dict(quantization_config()["spense"])
    for mode in CUDAGraphMode:
        given = engine()
        given.compilation_config.cudagraph_mode = mode
        check_engine(annotation, given)
        with monkeypatch.context() as on_a_gpu:
            on_a_gpu.setattr(preflight, "current_platform", SimpleNamespace(is_cuda=lambda: True))
            if mode is not CUDAGraphMode.FULL:
                check_engine(annotation, given)
                continue
            with pytest.raises(SpenseError, match=r"key: cudagraph_mode; found: FULL; expected: FULL_AND_PIECEWISE"):
                check_engine(annotation, given)
            given.model_config.enforce_eager = True
            check_engine(annotation, given)


def of_experts() -> Annotation:
    data = quantization_config()["spense"] | {"version": 2, "modules": []}
    data["experts"] = {"projections": data["projections"], "counts": {"model.layers.1.mlp.experts": 4}}
    return Annotation.from_dict(data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"enable_eplb": True, "enable_expert_parallel": True}, "key: --enable-eplb; found: True"),
        ({"data_parallel_size": 2}, "key: --data-parallel-size; found: 2; expected: 1"),
        ({"lora_config": object()}, "key: --enable-lora"),
        ({"tensor_parallel_size": 3}, r"does not divide the sparse region.*layer: model\.layers\.1\.mlp\.experts"),
    ],
)
def test_options_that_experts_cannot_be_served_with(changes: dict[str, Any], words: str) -> None:
    annotation = of_experts()
    check_engine(annotation, engine())
    check_engine(annotation, engine(tensor_parallel_size=3, enable_expert_parallel=True))
    with pytest.raises(SpenseError, match=words):
        check_engine(annotation, engine(**changes))


def test_releases_of_vllm_that_do_not_load_experts_of_granite_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    granite = engine(architecture="GraniteMoeForCausalLM")
    monkeypatch.setattr("vllm.__version_tuple__", (0, 29, 0))
    check_engine(of_experts(), granite)
    monkeypatch.setattr("vllm.__version_tuple__", (0, 28, 1))
    for served in ("GraniteMoeHybridForCausalLM", "Qwen3MoeForCausalLM"):
        check_engine(of_experts(), engine(architecture=served))
    with pytest.raises(SpenseError, match=r"GraniteMoeForCausalLM does not load experts one by one.*0\.29 or later"):
        check_engine(of_experts(), granite)
