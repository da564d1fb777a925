"""Opening any checkpoint as a dense model, and its perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from offline_prune.model.loading import load_tokenizer
from offline_prune.model.model_tensors import ModelTensors
from offline_prune.model.safetensors_reader import SafetensorsReader
from offline_prune.model.skeleton import empty_model
from offline_prune.runtime.matmul_precision import exact_matmul, fast_matmul
from vllm_spense.checkpoint_files import read_object
from vllm_spense.errors import SpenseError


def load_dense(
    folder: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A plain or a Spense checkpoint as an ordinary dense model, and its tokenizer: see `dense_model`."""
    return dense_model(folder, device, dtype, trust_remote_code), load_tokenizer(Path(folder))


def dense_model(
    folder: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A plain or a Spense checkpoint as an ordinary dense model; FP8 weights are multiplied by their scales.

    Activations are not quantized. To run the files exactly as a server does, serve them.

    Raises:
        SpenseError: no such folder, or a tensor of the model is not in it.
    """
    folder = Path(folder)
    model = empty_model(folder, trust_remote_code)
    tensors = ModelTensors(SafetensorsReader(folder), model, read_object(folder / "config.json"), torch.float32)
    for parameter in model.parameters():
        # What is loaded takes the type of what it replaces.
        parameter.data = parameter.data.float()
    stored = {name: tensors.read_stored(name) for name in tensors.targets}
    rules = LoadStateDictConfig(weight_mapping=tensors.conversions.rules, device_map={"": "cpu"})
    convert_and_load_state_dict_in_model(model, stored, rules)
    model.tie_weights()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.is_meta:
            raise SpenseError(f"{folder}: no tensor {name}")
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(parameter.to(device, dtype), requires_grad=False))
    model.tie_weights()
    for buffer_name, buffer in list(model.named_buffers()):
        owner, _, leaf = buffer_name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(device))
    for module_name, module in model.named_modules():
        if module_name.endswith("rotary_emb"):
            # Angles of hundreds of radians, which some versions of transformers compute as a product of matrices.
            module.forward = exact_matmul()(module.forward)
    return model.eval()


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of each next token, every sequence on its own.

    Args:
        tokens: int64 (n, length).
    """
    total, count = 0.0, 0
    with fast_matmul():
        for sequence in tokens.to(model.device).split(1):
            logits = model(input_ids=sequence, use_cache=False).logits[0, :-1].float()
            total += nn.functional.cross_entropy(logits, sequence[0, 1:], reduction="sum").item()
            count += sequence.shape[1] - 1
    return math.exp(total / count)


@dataclass(frozen=True)
class Agreement:
    """How a model predicts a text's next tokens, and how far from a reference model's predictions that is.

    Attributes:
        perplexity: as `perplexity`.
        kl: mean over the positions of KL(reference ‖ model), in nats.
        top1_agreement: share of the positions where both find the same token most likely.
    """

    perplexity: float
    kl: float
    top1_agreement: float


@torch.inference_mode()
def agreement(model: PreTrainedModel, reference: PreTrainedModel, tokens: torch.Tensor) -> Agreement:
    """Compares two models of one vocabulary, every sequence on its own.

    Args:
        tokens: int64 (n, length).
    """
    totals, count = torch.zeros(4, dtype=torch.float64), 0
    with fast_matmul():
        for sequence in tokens.to(model.device).split(1):
            found, expected = (
                each(input_ids=sequence, use_cache=False).logits[0, :-1].float().log_softmax(-1)
                for each in (model, reference)
            )
            totals += compared(found, expected, sequence[0, 1:])
            count += sequence.shape[1] - 1
    loss, _, kl, same = (totals / count).tolist()
    return Agreement(math.exp(loss), kl, same)


def compared(found: torch.Tensor, expected: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sums over positions: negative log-likelihoods of a model and of its reference, KL(reference ‖ model), and 1 where
    both find the same token most likely.

    Args:
        found, expected: log-probabilities (positions, vocabulary) of the model and its reference.
        targets: int64 (positions,), the tokens that came.

    Returns:
        float64 (4,), in host memory.
    """
    losses = [nn.functional.nll_loss(each, targets, reduction="sum") for each in (found, expected)]
    kl = nn.functional.kl_div(found, expected, reduction="sum", log_target=True)
    same = (found.argmax(-1) == expected.argmax(-1)).sum()
    return torch.stack([*losses, kl, same.float()]).double().cpu()
