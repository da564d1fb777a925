"""Code that travels with a tiny MiMo, which transformers does not know: Qwen2's layers, and draft layers (MTP) beside
them that the model itself never runs."""

from __future__ import annotations

from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model, Qwen2RMSNorm


class MiMoConfig(Qwen2Config):
    """Qwen2's, and how many draft layers there are."""

    model_type = "mimo"

    num_nextn_predict_layers: int = 1


class DraftLayer(Qwen2DecoderLayer):
    """A decoder layer, and what makes its input and output."""

    def __init__(self, config: MiMoConfig) -> None:
        super().__init__(config, 0)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.token_layernorm = Qwen2RMSNorm(size, eps)
        self.hidden_layernorm = Qwen2RMSNorm(size, eps)
        self.final_layernorm = Qwen2RMSNorm(size, eps)
        self.input_proj = nn.Linear(2 * size, size, bias=False)


class MiMoModel(Qwen2Model):
    """Qwen2's with draft layers."""

    def __init__(self, config: MiMoConfig) -> None:
        super().__init__(config)
        self.mtp_layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_nextn_predict_layers))
        self.post_init()


class MiMoForCausalLM(Qwen2ForCausalLM):
    """Qwen2's with draft layers."""

    config_class = MiMoConfig

    def __init__(self, config: MiMoConfig) -> None:
        super().__init__(config)
        self.model = MiMoModel(config)
        self.post_init()


MiMoConfig.register_for_auto_class()
MiMoForCausalLM.register_for_auto_class("AutoModelForCausalLM")
