"""The sizes of a model that decide how long it takes, read from a config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_spense.errors import SpenseError
from vllm_spense.format import Regions

KV_BYTES = {"auto": 2, "fp8": 1}
_NUMBERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_MAY_BE_MISSING = ("num_key_value_heads", "head_dim")
#: Number of experts, as models spell it.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
#: Of mixtures that the estimate knows: the other sizes, with their defaults.
_MIXTURE: Mapping[str, int | None] = {
    "num_experts_per_tok": None,
    "moe_intermediate_size": None,
    "n_shared_experts": 0,
    "shared_expert_intermediate_size": 0,
    "shared_intermediate_size": 0,
    "first_k_dense_replace": 0,
}
#: What says that only some layers have experts, other than `first_k_dense_replace`, and the values that do not.
_SOME_LAYERS: Mapping[str, tuple[Any, ...]] = {
    "decoder_sparse_step": (None, 1),
    "moe_layer_freq": (None, 1),
    "mlp_only_layers": (None, []),
    "expert_layer_period": (None, 1),
}
#: What attention has (DeepSeek) that caches latents in place of keys and values.
_LATENTS = "kv_lora_rank"
#: No model has more of anything; products of sizes stay finite.
_MOST = 2**31


@dataclass(frozen=True)
class Mixture:
    """Of the layers with experts.

    Attributes:
        layers: how many have them; the others have an MLP.
        count: routed experts of a layer.
        top_k: of them, those of a token.
        intermediate: of each.
        shared: intermediate size of what all tokens pass besides; 0 for none.
    """

    layers: int
    count: int
    top_k: int
    intermediate: int
    shared: int

    def active(self, tokens: int) -> float:
        """Experts of a layer that have tokens, if every expert is as likely."""
        return self.count * (1 - (1 - self.top_k / self.count) ** tokens)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], file: object) -> Mixture | None:
        """None for a model without experts.

        Raises:
            SpenseError: a size is missing or wrong, or experts are in some layers by a rule that the estimate does not
                know.
        """
        key = next((key for key in _EXPERTS if config.get(key)), None)
        if key is None:
            return None
        # Mixtral, OLMoE and Granite-MoE have only experts, and call their size as others call an MLP's.
        defaults = {**_MIXTURE, "moe_intermediate_size": config["intermediate_size"]}
        sizes = {key: config[key], **{name: config.get(name, default) for name, default in defaults.items()}}
        for name, found in sizes.items():
            # An optional one may be null.
            least = 1 if name == key or _MIXTURE[name] is None else 0
            if found is None and not least:
                sizes[name] = found = 0
            if type(found) is not int or not least <= found < _MOST:
                raise _wrong_size(file, name, found, least)
        for name, usual in _SOME_LAYERS.items():
            if config.get(name) not in usual:
                raise SpenseError(
                    f"{file}: the estimate does not know which layers have experts (key: {name}; "
                    f"found: {str(config[name])[:60]})"
                )
        layers = config["num_hidden_layers"] - sizes["first_k_dense_replace"]
        if layers < 1:
            raise _wrong_size(
                file, "first_k_dense_replace", sizes["first_k_dense_replace"], 0, config["num_hidden_layers"] - 1
            )
        if sizes["num_experts_per_tok"] > sizes[key]:
            raise _wrong_size(file, "num_experts_per_tok", sizes["num_experts_per_tok"], most=sizes[key])
        each = sizes["moe_intermediate_size"]
        # Models spell one of them.
        shared = sizes["shared_expert_intermediate_size"] or sizes["shared_intermediate_size"]
        shared = shared or sizes["n_shared_experts"] * each
        return cls(layers, sizes[key], sizes["num_experts_per_tok"], each, shared)


def _wrong_size(file: object, key: str, found: object, least: int = 1, most: int = _MOST - 1) -> SpenseError:
    return SpenseError(
        f"{file}: a size is missing or wrong (key: {key}; found: {str(found)[:60]}; expected: {least} to {most})"
    )


@dataclass(frozen=True)
class Pruned:
    """Regions of what is pruned.

    Attributes:
        mlps: of each MLP that all tokens pass, shared experts among them.
        experts: of the routed experts of each layer.
    """

    mlps: Sequence[Regions] = ()
    experts: Sequence[Regions] = ()

    def sparse(self, mixture: Mixture | None) -> int:
        """Sparse intermediate indices of all MLPs and experts of a model with such layers."""
        experts = mixture.count if mixture else 0
        return sum(each.sparse for each in self.mlps) + experts * sum(each.sparse for each in self.experts)

    def sparsity(self, model: Model) -> float:
        """Zeros in the weights of all MLPs and experts of a model."""
        mixture, indices = model.mixture, sum(model.mlps)
        if mixture:
            indices += mixture.layers * mixture.count * mixture.intermediate
        return self.sparse(mixture) / 2 / indices


@dataclass(frozen=True)
class Model:
    """The sizes that matter, as config.json spells them; no mixture for a model without experts."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int
    head_dim: int
    tied: bool
    mixture: Mixture | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], file: object = None) -> Model:
        """
        Raises:
            SpenseError: a size is missing or is no such number, or it is not known where experts are or what attention
                caches.
        """
        for key in (*_NUMBERS, *_MAY_BE_MISSING):
            found = config.get(key)
            optional = found is None and key in _MAY_BE_MISSING
            if optional or (type(found) is int and 0 < found < _MOST):
                continue
            raise _wrong_size(file, key, found)
        if config.get(_LATENTS):
            raise SpenseError(
                f"{file}: the estimate does not know latent attention (key: {_LATENTS}; "
                f"found: {str(config[_LATENTS])[:60]})"
            )
        numbers = {key: config[key] for key in _NUMBERS}
        heads = numbers["num_attention_heads"]
        return cls(
            **numbers,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or max(1, numbers["hidden_size"] // heads),
            tied=bool(config.get("tie_word_embeddings", False)),
            mixture=Mixture.from_config(config, file),
        )

    @property
    def attention_shapes(self) -> tuple[tuple[int, int], ...]:
        """(N, K) of qkv and o."""
        heads, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return (heads + 2 * kv, self.hidden_size), (self.hidden_size, heads)

    @property
    def mlps(self) -> Sequence[int]:
        """Intermediate sizes of the MLPs that all tokens pass, shared experts among them."""
        mixture = self.mixture
        dense = [self.intermediate_size] * (self.num_hidden_layers - (mixture.layers if mixture else 0))
        return [*dense, *[mixture.shared] * mixture.layers] if mixture and mixture.shared else dense

    def mlp_shapes(self, intermediate: int) -> tuple[tuple[int, int], ...]:
        """(N, K) of gate_up and down."""
        return (2 * intermediate, self.hidden_size), (self.hidden_size, intermediate)

    def weight_bytes(self, pruned: Pruned | None = None) -> int:
        """Of all weights: linear layers in FP8 with a float32 scale for each output; BF16 embeddings, head, routers."""

        def linear(shapes: Sequence[tuple[int, int]]) -> int:
            return sum(n * k + 4 * n for n, k in shapes)

        total = self.num_hidden_layers * linear(self.attention_shapes)
        total += sum(linear(self.mlp_shapes(intermediate)) for intermediate in self.mlps)
        if mixture := self.mixture:
            each = linear(self.mlp_shapes(mixture.intermediate)) + 2 * self.hidden_size
            total += mixture.layers * mixture.count * each
        if pruned:
            total -= 3 * self.hidden_size * pruned.sparse(self.mixture) * 3 // 8
        embeddings = (1 if self.tied else 2) * self.vocab_size * self.hidden_size * 2
        return total + embeddings

    def kv_bytes(self, tokens: int, kv_cache_dtype: str) -> int:
        """Of the KV cache of that many tokens."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * KV_BYTES[kv_cache_dtype] * tokens
