"""Every architecture of the installed transformers, made tiny: does it prune, and if not, why not?

`python -m benchmarks.zoo` tries all causal and image-text language models, compares with results/zoo.json, and exits
with 1 if anything is different. `--write` keeps what it found and makes docs/notes/models.md from it. Names of model
types as arguments restrict it to them; `--part 2/4` takes every fourth from the second on, for processes side by side.

A model is tried three times: its hidden states stream through block after block as they go through the whole model;
pruned at sparsity 0 without quantization, it gives the original's logits; pruned at 37.5% in FP8, it verifies.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from benchmarks.zoo_table import table
from offline_prune.calibration.hidden_states import Stream
from offline_prune.checkpoint.dense_model import dense_model
from offline_prune.checkpoint.verify import verify
from offline_prune.model.experts import Mixture
from offline_prune.model.gated_mlp import GatedMlp, Unsupported
from offline_prune.model.loading import SourceModel
from offline_prune.pipeline import prune
from offline_prune.report import Report
from offline_prune.runtime import matmul_precision
from offline_prune.settings import PruneSettings
from vllm_spense.errors import SpenseError, first_line

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = ROOT / "benchmarks/results/zoo.json"
TABLE = ROOT / "docs/notes/models.md"

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 4, 64, 128, 320
#: Settings that have these names in some configuration, whatever the architecture.
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "attention_hidden_size"), HIDDEN
    ),
    **dict.fromkeys(
        ("out_hidden_size", "projection_dim", "mm_hidden_size", "word_embed_proj_dim", "lru_width"), HIDDEN
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "block_ff_dim"), INTERMEDIATE
    ),
    **dict.fromkeys(
        ("decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "mlp_dim", "shared_intermediate_size"), INTERMEDIATE
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "v_head_dim", "global_head_dim", "attention_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), INTERMEDIATE
    ),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "intermediate_size_mlp"), INTERMEDIATE),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_ssm",), 128),
    "mamba_n_groups": 1,
    "n_groups": 1,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "sliding_window": 16,
    "max_position_embeddings": 512,
    "image_size": 28,
    "patch_size": 14,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
}
#: What single configuration classes need beside these, or otherwise.
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
#: The last two layers read keys and values that the first two leave.
_SHARED_KV = {
    "layer_types": 2 * ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
}
#: Two blocks of each kind; the hybrid ones share their attention and their MLP.
_SHARED_BLOCKS = {"layers_block_type": 2 * ["linear_attention", "hybrid"]}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("Qwen2VLTextConfig", "Qwen2_5_VLTextConfig", "Qwen2_5OmniTextConfig"), _MROPE),
    **dict.fromkeys(("Glm4vTextConfig", "GlmOcrTextConfig", "Glm46VTextConfig"), _MROPE),
    "Glm4vMoeTextConfig": {"rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [1, 1, 2]}},
    **dict.fromkeys(("PaddleOCRTextConfig", "HunYuanVLTextConfig", "Cosmos3EdgeTextConfig"), _MROPE),
    # Its default has a size for each layer.
    "Gemma3nTextConfig": {**_SHARED_KV, "intermediate_size": INTERMEDIATE},
    "Gemma4TextConfig": _SHARED_KV,
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]]},
    "Lfm2MoeConfig": {"layer_types": 2 * ["conv", "full_attention"]},
    "Mamba2Config": {"num_heads": 8},
    # Half of it is rotated.
    "Mistral4Config": {"head_dim": SIZES["qk_nope_head_dim"] + SIZES["qk_rope_head_dim"]},
    "RecurrentGemmaConfig": {"intermediate_size": 2 * INTERMEDIATE},
    "ZambaConfig": {**_SHARED_BLOCKS, "attention_hidden_size": 2 * HIDDEN, "attention_head_dim": HIDDEN // 2},
    "Zamba2Config": _SHARED_BLOCKS,
    "xLSTMConfig": {"ffn_proj_factor": 2.0},
}

#: Classes that cannot be asked for the logits of a text.
_MORE_THAN_TEXT = {"PI0ForConditionalGeneration": "it needs a robot's state"}

TOKENS = (4, 24)


@dataclass(frozen=True)
class Architecture:
    """A model type and the class that its checkpoints name."""

    model_type: str
    name: str

    @property
    def key(self) -> str:
        return f"{self.model_type} {self.name}"

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        return getattr(transformers, self.name).config_class or type(AutoConfig.for_model(self.model_type))


@dataclass(frozen=True)
class Outcome:
    """What became of an architecture.

    Attributes:
        result: prunes | prunes with --skip-unsupported | refused | traceback | not built.
        why: the words of a refusal, or the last line of a traceback.
        gated: whether some block of its language model has a gated MLP that can be pruned, or experts.
        pruned, blocks: decoder blocks whose MLPs or experts were pruned, and all of them.
    """

    result: str
    why: str = ""
    gated: bool = False
    pruned: int = 0
    blocks: int = 0


def architectures() -> list[Architecture]:
    """All causal and image-text language models, one for each class."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    multimodal = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    found = dict.fromkeys(
        Architecture(model_type, name if isinstance(name, str) else name[0])
        for mapping in (causal, multimodal)
        for model_type, name in mapping.items()
    )
    return list(found)


def tiny_config(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A configuration of a class with small sizes, and of all configurations inside it."""
    default = kind()
    values: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            values[name] = tiny_config(type(value)).to_dict()
        elif name in SIZES and isinstance(value, int | None) and not isinstance(value, bool):
            values[name] = SIZES[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            values[name] = VOCABULARY - 1
    if "qk_rope_head_dim" in values:
        # Latent attention has as many keys as queries, and rotates a part of them alone.
        values |= {"head_dim": values["qk_rope_head_dim"], "num_key_value_heads": SIZES["num_attention_heads"]}
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        values["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}
    return kind(**{**values, **SPECIAL.get(kind.__name__, {})})


def tiny_model(architecture: Architecture, folder: Path) -> None:
    """Saves a random model, BF16, to `folder`."""
    config = tiny_config(architecture.config_class)
    torch.manual_seed(0)
    model = getattr(transformers, architecture.name)._from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            # Larger than the usual initialization, so that the layers matter.
            nn.init.normal_(parameter, std=0.15)
        # Gemma 3n's scale begins at zero, and inputs that are all zero have no Hessian.
        elif name.endswith(("bias", "correct_output_scale")):
            nn.init.normal_(parameter, std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)


def attempt(architecture: Architecture, folder: Path) -> Outcome:
    """Makes, prunes and checks one architecture."""
    if architecture.name in _MORE_THAN_TEXT:
        return Outcome("not built", _MORE_THAN_TEXT[architecture.name])
    try:
        tiny_model(architecture, folder / "model")
    except Exception as error:
        return Outcome("not built", _words(error))
    gated, blocks = False, 0
    try:
        source = SourceModel(str(folder / "model"))
        supported = [not isinstance(block.mlp, Unsupported) for block in source.blocks]
        gated, blocks = any(supported), len(source.blocks)
        skip = gated and not all(supported)
        tokens = torch.randint(0, VOCABULARY - 8, TOKENS, generator=torch.Generator().manual_seed(0))
        pruned = _prune_both(source, folder, tokens, skip)
    except SpenseError as error:
        return Outcome("refused", str(error).replace(f"{folder}/", ""), gated, 0, blocks)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if str(ROOT) in frame.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
        return Outcome("traceback", f"{where}: {_words(error)}", gated, 0, blocks)
    return Outcome("prunes with --skip-unsupported" if skip else "prunes", "", gated, pruned, blocks)


def _prune_both(source: SourceModel, folder: Path, tokens: torch.Tensor, skip: bool) -> int:
    common: dict[str, Any] = {"skip_unsupported": skip, "samples": len(tokens), "length": tokens.shape[1]}
    common |= {"calibration": "builtin", "device": "cpu", "batch_tokens": 2 * tokens.shape[1]}
    same = PruneSettings(
        str(folder / "model"), folder / "same", sparsity=0.0, selection="random", quantize="none", **common
    )
    prune(same, tokens=tokens)
    _require_same_logits(folder, tokens, source.tensors.read_by_transformers)
    # With FP32 products in full on every CPU.
    with mock.patch.object(matmul_precision, "_matmul_precision", return_value=nullcontext()):
        _require_same_stream(source, folder, tokens)
    report = prune(PruneSettings(str(folder / "model"), folder / "pruned", **common), tokens=tokens)
    verified = verify(folder / "pruned").mlps
    assert verified == sum(1 if layer.tokens is None else len(layer.tokens) for layer in report.layers), verified
    return sum(not isinstance(block.mlp, Unsupported) for block in source.blocks)


def _require_same_logits(folder: Path, tokens: torch.Tensor, by_transformers: bool) -> None:
    """Reordered intermediate indices change nothing but the order of sums.

    Args:
        by_transformers: whether it reads what was pruned; else Spense does.
    """
    logits = []
    for name in ("model", "same"):
        if name == "model" or by_transformers:
            model, problems = _opened(folder / name)
            assert not problems["missing_keys"], problems
            assert not problems["unexpected_keys"], problems
        else:
            model = dense_model(folder / name)
        with torch.inference_mode():
            logits.append(model(input_ids=tokens, use_cache=False).logits)
    error = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    assert error < 1e-3, f"logits differ by {error:.1e}"


def _require_same_stream(source: SourceModel, folder: Path, tokens: torch.Tensor) -> None:
    """The last block sees in the stream what it sees in the whole model."""
    seen: list[torch.Tensor] = []
    whole, _ = _opened(folder / "model")
    text = whole.get_submodule(source.text_name) if source.text_name else whole
    last = source.blocks[-1].name
    hook = whole.get_submodule(last).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.inference_mode():
        text(input_ids=tokens, use_cache=False)
    hook.remove()
    device = torch.device("cpu")
    stream = Stream(source, tokens, device, torch.float32, 2 * tokens.shape[1])
    for index, block in enumerate(source.blocks[:-1]):
        module = source.load(block.name, device, torch.float32)
        if isinstance(block.mlp, GatedMlp):
            stream.attend(index, module, block.mlp, lambda *_: None)
        elif isinstance(block.mlp, Mixture):
            stream.attend_experts(index, module, block.mlp)
        stream.advance(index, module, block.name)
        source.unload(block.name)
    error = (stream.unpacked(stream.hidden) - seen[0]).abs().max() / seen[0].abs().max()
    assert error < 2e-2, f"hidden states differ by {error:.1e}"


def _opened(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    config = AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    model, problems = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), problems


def known() -> dict[str, Outcome]:
    """What was found before, by `Architecture.key`."""
    if not EXPECTED.exists():
        return {}
    return {key: Outcome(**found) for key, found in json.loads(EXPECTED.read_text(encoding="utf-8")).items()}


def _keep(key: str, outcome: Outcome) -> None:
    """Writes one outcome to the file and makes the table anew; several processes may do so at once."""
    with EXPECTED.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        every = dict(sorted({**known(), key: outcome}.items()))
        text = json.dumps({key: vars(each) for key, each in every.items()}, indent=1, ensure_ascii=False)
        # Others read it meanwhile.
        whole = EXPECTED.with_suffix(".new")
        whole.write_text(text + "\n", encoding="utf-8")
        whole.replace(EXPECTED)
        TABLE.write_text(table(every), encoding="utf-8")


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)[:160]}"


def part(text: str) -> tuple[int, int]:
    """A value of `--part`.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    first, step = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= step:
        raise argparse.ArgumentTypeError(f"found {text}, expected N/OF with N from 1 to OF")
    return first, step


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--part", type=part, default="1/1", metavar="N/OF", help="every OF-th, from the N-th on")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--missing", action="store_true", help="only those without an outcome")
    options = parser.parse_args(arguments)
    if unknown := {*options.types} - {each.model_type for each in architectures()}:
        parser.error(f"found {', '.join(sorted(unknown))}, which transformers does not know; expected types of models")
    first, step = options.part
    every = [each for each in architectures() if not options.types or each.model_type in options.types]
    if options.missing:
        every = [each for each in every if each.key not in known()]
    chosen = every[first - 1 :: step]
    expected = known()
    different = []
    for architecture, outcome in _outcomes(chosen):
        key = architecture.key
        print(f"{key}: {outcome.result} {outcome.pruned}/{outcome.blocks} {outcome.why}", flush=True)
        if expected.get(key) != outcome:
            different.append(key)
        if options.write:
            _keep(key, outcome)
    if options.write:
        return 0
    print(f"{len(chosen)} tried, {len(different)} not as expected {', '.join(different)}")
    return 1 if different else 0


def _outcomes(chosen: list[Architecture]) -> Iterator[tuple[Architecture, Outcome]]:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for architecture in chosen:
        with tempfile.TemporaryDirectory() as folder, undrawn():
            yield architecture, attempt(architecture, Path(folder))


def _blank(report: Report, path: Path) -> None:
    path.touch()


def undrawn() -> AbstractContextManager[object]:
    """Inside, reports have no picture, which would take longer than all else."""
    return mock.patch.object(Report, "draw", _blank)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
