"""The tiny models that `served.py` has vLLM serve."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from benchmarks import modeling_mimo
from benchmarks.zoo import tiny_config, undrawn
from offline_prune.pipeline import prune
from offline_prune.settings import PruneSettings

#: Two layers. vLLM's attention on a CPU wants heads of a multiple of 32.
LAYERS: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
SIZES: dict[str, Any] = {**LAYERS, "vocab_size": 288, "max_position_embeddings": 512}
#: Beside the 256 bytes, with the names that processors look for.
_NAMES = (
    "<end>",
    "<pad>",
    "<|image_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|video_pad|>",
    "[IMG_BREAK]",
    *("\n" * count for count in range(1, 5)),
)
END, PAD, IMAGE, START_OF_IMAGE, END_OF_IMAGE, VIDEO, BREAK = range(256, 263)
_SPECIAL_TOKENS = {"eos_token_id": END, "pad_token_id": PAD, "bos_token_id": END}


@dataclass(frozen=True)
class Model:
    """A tiny model to serve.

    Attributes:
        architecture: transformers' class, or one of `modeling_mimo`, whose code travels with the model.
        text: settings of its language model, beside `SIZES`.
        top: settings of the whole configuration, if that is another one.
        vision: of its vision tower.
        implementation: vLLM's --model-impl.
        dtype: of its activations.
        processor: saves what turns images into tensors, for a model that sees.
        image: how a prompt shows an image.
        renamed: parts of tensors' names that published checkpoints have and transformers' newest no longer saves.
        transposed: endings of tensors' names whose last two dimensions published checkpoints have exchanged, too.
        drafts: makes a draft head (MTP) that its files have as well, from transformers' class and the configuration.
        speculates: whether it is served with that head.
        plain_rope: whether vLLM rotates by plain torch: its CPU kernel for pairs of neighbours, (…, heads, size), is
            right for one head alone.
        absorbed: whether vLLM multiplies a projection into its neighbours while it decodes, and so does not round its
            inputs.
    """

    architecture: str
    text: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    implementation: str = "auto"
    dtype: str = "float32"
    skip_unsupported: bool = False
    processor: Callable[[PreTrainedTokenizerFast, Path], object] | None = None
    image: str = ""
    renamed: dict[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    drafts: Callable[[Any, Any], dict[str, torch.Tensor]] | None = None
    speculates: bool = False
    plain_rope: bool = False
    absorbed: bool = False

    @property
    def is_remote(self) -> bool:
        """Whether --trust-remote-code must be given."""
        return hasattr(modeling_mimo, self.architecture)

    @property
    def needs_torchvision(self) -> bool:
        """Whether vLLM's code of this model imports it, to read images."""
        return self.processor is not None or self.architecture.startswith("Qwen3_5")


def _name(token: int) -> str:
    return _NAMES[token - END]


def _gemma3(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    images = transformers.Gemma3ImageProcessorPil(size={"height": 56, "width": 56}, do_pan_and_scan=False)
    transformers.Gemma3Processor(images, tokenizer, image_seq_length=4).save_pretrained(folder)


def _qwen(patch: int) -> Callable[[PreTrainedTokenizerFast, Path], None]:
    def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        pixels = (4 * patch) ** 2
        transformers.Qwen2VLImageProcessorPil(
            patch_size=patch, merge_size=2, size={"shortest_edge": pixels, "longest_edge": 4 * pixels}
        ).save_pretrained(folder)

    return save


def _pixtral(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    images = transformers.PixtralImageProcessorPil(patch_size={"height": 14, "width": 14}, size={"longest_edge": 56})
    transformers.PixtralProcessor(
        images,
        tokenizer,
        patch_size=14,
        spatial_merge_size=2,
        image_token=_name(IMAGE),
        image_break_token=_name(BREAK),
        image_end_token=_name(END_OF_IMAGE),
    ).save_pretrained(folder)


def _last_layer(kind: Any, config: Any) -> dict[str, torch.Tensor]:
    """The decoder layer that a deeper model would have, with full attention, by its names from `layers.` on."""
    deeper = type(config)(**config.to_dict())
    text = deeper.get_text_config()
    layer = f"layers.{text.num_hidden_layers}."
    text.num_hidden_layers += 1
    if getattr(text, "layer_types", None):
        text.layer_types = [*text.layer_types, "full_attention"]
    with tempfile.TemporaryDirectory() as folder:
        _save(kind, deeper, Path(folder))
        tensors = load_file(Path(folder) / "model.safetensors")
    return {
        name[name.index(layer) :]: tensor for name, tensor in tensors.items() if layer in name and "visual" not in name
    }


def _joins(size: int) -> torch.Tensor:
    """What makes one hidden state of a token's embedding and the last hidden state beside it."""
    return (0.1 * torch.randn(size, 2 * size)).bfloat16()


def _glm_head(kind: Any, config: Any) -> dict[str, torch.Tensor]:
    """After the last layer, as DeepSeek and GLM store it."""
    layer, size = f"model.layers.{config.num_hidden_layers}.", config.hidden_size
    return {
        **{f"model.{name}": tensor for name, tensor in _last_layer(kind, config).items()},
        **{f"{layer}{name}.weight": torch.ones(size).bfloat16() for name in ("enorm", "hnorm", "shared_head.norm")},
        f"{layer}eh_proj.weight": _joins(size),
        f"{layer}shared_head.head.weight": (0.1 * torch.randn(config.vocab_size, size)).bfloat16(),
    }


def _qwen_head(kind: Any, config: Any) -> dict[str, torch.Tensor]:
    """Beside the model, as Qwen3.5 stores it."""
    text = config.get_text_config()
    size = text.hidden_size
    layer = f"layers.{text.num_hidden_layers}."
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    return {
        **{f"mtp.{name.replace(layer, 'layers.0.')}": tensor for name, tensor in _last_layer(kind, config).items()},
        # Added to one.
        **{f"mtp.{name}.weight": torch.zeros(size).bfloat16() for name in norms},
        "mtp.fc.weight": _joins(size),
    }


_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}}
_VISION = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
_QWEN_VISION = {"hidden_size": 128, "intermediate_size": 256, "depth": 2, "num_heads": 4, "out_hidden_size": 128}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START_OF_IMAGE,
    "vision_end_token_id": END_OF_IMAGE,
}
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
    },
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "mlp_only_layers": [0]}
_MORE_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "mlp_only_layers": []}
_GLM_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}
_QWEN35 = Model(
    "Qwen3_5ForConditionalGeneration",
    _HYBRID,
    _QWEN_TOKENS,
    {**_QWEN_VISION, "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": []},
    dtype="bfloat16",
    processor=_qwen(16),
    image="<|vision_start|><|image_pad|><|vision_end|>",
)
_QWEN3_VL = replace(
    _QWEN35,
    architecture="Qwen3VLForConditionalGeneration",
    text=_MROPE,
    vision={**_QWEN35.vision, "deepstack_visual_indexes": [0]},
    dtype="float32",
)
_QWEN35_DRAFTS = replace(_QWEN35, text={**_HYBRID, "mtp_num_hidden_layers": 1}, drafts=_qwen_head)
#: Of the sizes of its latents vLLM's CPU kernel knows this alone.
_DEEPSEEK = {
    **{key: value for key, value in _GLM_MOE.items() if key != "num_nextn_predict_layers"},
    "num_nextn_predict_layers": 0,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "kv_lora_rank": 512,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    # As published; transformers does not read them, vLLM does.
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
_GRANITE_MOE = {"num_local_experts": 8, "num_experts_per_tok": 2, "attention_multiplier": 32**-0.5}
_GRANITE_HYBRID = {
    **_GRANITE_MOE,
    "shared_intermediate_size": 192,
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
}
MODELS = {
    "GLM": Model("GlmForCausalLM"),
    "GLM-4": Model("Glm4ForCausalLM"),
    "StableLM": Model("StableLmForCausalLM"),
    "Phi-3": Model("Phi3ForCausalLM"),
    "Phi-3 by way of transformers": Model("Phi3ForCausalLM", implementation="transformers"),
    "Qwen3-MoE": Model("Qwen3MoeForCausalLM", _MORE_EXPERTS),
    "Qwen3-MoE with a dense layer": Model("Qwen3MoeForCausalLM", _EXPERTS),
    "Qwen2-MoE": Model("Qwen2MoeForCausalLM", {**_MORE_EXPERTS, "shared_expert_intermediate_size": 192}),
    "DeepSeek-V2": Model(
        "DeepseekV2ForCausalLM",
        {**_DEEPSEEK, "topk_method": "greedy", "scoring_func": "softmax"},
        plain_rope=True,
        absorbed=True,
    ),
    "DeepSeek-V3": Model("DeepseekV3ForCausalLM", _DEEPSEEK, plain_rope=True, absorbed=True),
    "Mixtral": Model("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "OLMoE": Model("OlmoeForCausalLM", {"num_experts": 8, "num_experts_per_tok": 2}),
    "Granite-MoE": Model("GraniteMoeForCausalLM", _GRANITE_MOE),
    "Granite-MoE with a shared expert": Model(
        "GraniteMoeSharedForCausalLM", {**_GRANITE_MOE, "shared_intermediate_size": 192}
    ),
    "Granite-MoE, hybrid": Model(
        "GraniteMoeHybridForCausalLM", {**_GRANITE_HYBRID, "layer_types": ["linear_attention", "full_attention"]}
    ),
    "Granite-MoE, hybrid, attention alone": Model(
        "GraniteMoeHybridForCausalLM", {**_GRANITE_HYBRID, "layer_types": ["full_attention", "full_attention"]}
    ),
    "GLM-4.5 with MTP": Model("Glm4MoeForCausalLM", _GLM_MOE, drafts=_glm_head),
    "GLM-4.5 with MTP, speculating": Model("Glm4MoeForCausalLM", _GLM_MOE, drafts=_glm_head, speculates=True),
    "MiMo with MTP": Model("MiMoForCausalLM"),
    "MiMo with MTP, speculating": Model("MiMoForCausalLM", speculates=True),
    "Gemma-3, multimodal": Model(
        "Gemma3ForConditionalGeneration",
        {"sliding_window": 64, "query_pre_attn_scalar": 32},
        {
            "image_token_index": IMAGE,
            "boi_token_index": START_OF_IMAGE,
            "eoi_token_index": END_OF_IMAGE,
            "mm_tokens_per_image": 4,
        },
        {**_VISION, "image_size": 56, "patch_size": 14},
        processor=_gemma3,
        image="<|vision_start|>",
        renamed={"vision_tower.": "vision_tower.vision_model."},
    ),
    "Qwen2.5-VL": Model(
        "Qwen2_5_VLForConditionalGeneration",
        _MROPE,
        _QWEN_TOKENS,
        {**_QWEN_VISION, "window_size": 56, "fullatt_block_indexes": [1]},
        processor=_qwen(14),
        image="<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "Mistral-3": Model(
        "Mistral3ForConditionalGeneration",
        {},
        {"image_token_index": IMAGE, "spatial_merge_size": 2, "vision_feature_layer": -1},
        {**_VISION, "image_size": 56, "patch_size": 14, "head_dim": 32},
        processor=_pixtral,
        image="<|image_pad|>",
    ),
    "Qwen3-VL": _QWEN3_VL,
    "Qwen3-VL-MoE": replace(
        _QWEN3_VL,
        architecture="Qwen3VLMoeForConditionalGeneration",
        # As published; transformers reads neither, vLLM does.
        text={**_MROPE, **_MORE_EXPERTS, "norm_topk_prob": True, "sliding_window": None},
        image="",
        transposed=("experts.gate_up_proj", "experts.down_proj"),
    ),
    "Qwen3.5": _QWEN35,
    "Qwen3.5 with MTP": _QWEN35_DRAFTS,
    "Qwen3.5 with MTP, speculating": replace(_QWEN35_DRAFTS, speculates=True),
    "Qwen3.5, text": Model("Qwen3_5ForCausalLM", _HYBRID, dtype="bfloat16"),
}


def runs_here(model: Model) -> bool:
    """Whether this environment has what vLLM needs for it."""
    return not model.needs_torchvision or importlib.util.find_spec("torchvision") is not None


def make(model: Model, folder: Path) -> None:
    """Saves the model with random weights in BF16, a tokenizer of bytes, and what reads images."""
    kind = getattr(modeling_mimo if model.is_remote else transformers, model.architecture)
    config = tiny_config(kind.config_class)
    text = config.get_text_config()
    for owner, values in (
        (text, {**SIZES, **model.text}),
        (getattr(config, "vision_config", None), model.vision),
        (config, model.top),
    ):
        for name, value in values.items():
            setattr(owner, name, value)
    for owner in {id(each): each for each in (text, config)}.values():
        for name, value in _SPECIAL_TOKENS.items():
            setattr(owner, name, value)
    if "layer_types" not in model.text and getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    config.tie_word_embeddings = text.tie_word_embeddings = False
    whole = type(config)(**config.to_dict())
    _save(kind, whole, folder, 0.05 if model.dtype == "bfloat16" else 0.1)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for old, new in model.renamed.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    for name in [name for name in tensors if name.endswith(model.transposed)]:
        tensors[name] = tensors[name].mT.contiguous()
    if model.drafts:
        tensors |= model.drafts(kind, whole)
    save_file(tensors, file, metadata={"format": "pt"})
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    if model.processor:
        model.processor(tokenizer, folder)


def _save(kind: Any, config: Any, folder: Path, std: float = 0.1) -> None:
    torch.manual_seed(0)
    made = kind(config)
    for name, parameter in made.named_parameters():
        if parameter.ndim > 1:
            # Larger than the usual initialization, so that the layers matter; less where roundings to BF16 matter too.
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=std)
    made.to(torch.bfloat16).save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_NAMES))
    named = {"boi_token": START_OF_IMAGE, "eoi_token": END_OF_IMAGE, "image_token": IMAGE}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_name(END),
        pad_token=_name(PAD),
        extra_special_tokens={name: _name(token) for name, token in named.items()},
    )


def prune_tiny(model: Model, source: Path, out: Path) -> None:
    """A third of the intermediate indices stays dense."""
    with undrawn():
        prune(
            PruneSettings(
                str(source),
                out,
                sparsity=1 / 3,
                calibration="builtin",
                samples=2,
                length=64,
                device="cpu",
                skip_unsupported=model.skip_unsupported,
                trust_remote_code=model.is_remote,
            )
        )


def make_pruned(name: str, folder: Path) -> Path:
    """A model of `MODELS`, pruned, in a folder inside `folder`."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in name)
    make(MODELS[name], folder / slug / "dense")
    prune_tiny(MODELS[name], folder / slug / "dense", folder / slug / "pruned")
    return folder / slug / "pruned"
