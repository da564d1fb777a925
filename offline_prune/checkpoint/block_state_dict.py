"""What the checkpoint's part of one block will hold, gathered while the block is pruned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from offline_prune.checkpoint.writer import stored_form
from offline_prune.model.experts import Experts
from offline_prune.model.gated_mlp import GatedMlp
from offline_prune.model.model_tensors import ModelTensors


class BlockStateDict:
    """Tensors by full name, in the form in which the checkpoint has them.

    Attributes:
        tensors: what has been kept so far, on the device that computed it.
        permutations: pruned module → int32 (I,), the original index of each intermediate index; or (E, I) of all routed
            experts of a block. In host memory.
    """

    def __init__(self, source: ModelTensors) -> None:
        self.source = source
        self.tensors: dict[str, torch.Tensor] = {}
        self.permutations: dict[str, torch.Tensor] = {}

    def keep(self, layer: str, weight: torch.Tensor, scales: torch.Tensor | None) -> None:
        """Keeps a linear layer's weight: float (N, K), with the scales (N, 1) of its FP8 form or None."""
        form = stored_form(weight, scales, self.source.dtype(f"{layer}.weight"))
        self.tensors.update({f"{layer}.{key}": value for key, value in form.items()})

    def put(self, name: str, layer: nn.Linear, weight: torch.Tensor, scales: torch.Tensor | None) -> None:
        """Keeps a weight, and gives it to its layer as its readers will see it."""
        seen = weight if scales is not None else weight.to(self.source.dtype(f"{name}.weight"))
        layer.weight.copy_(seen)
        self.keep(name, weight, scales)

    def put_expert(
        self,
        experts: Experts,
        block: nn.Module,
        expert: int,
        pruned: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]],
    ) -> None:
        """As `put`, for some of an expert's projections.

        Args:
            pruned: `gate_up`, (2·I, H), or `down`, (H, I) → the weight and its scales.
        """
        gate_up, down = experts.parameters(block, expert)
        names = experts.projections.to_dict()
        for kind, (weight, scales) in pruned.items():
            parts = ("down",) if kind == "down" else ("gate", "up")
            whole = []
            for i, part in enumerate(parts):
                name = f"{experts.stored}.{expert}.{names[part]}"
                rows = slice(i * len(weight) // len(parts), (i + 1) * len(weight) // len(parts))
                whole.append(
                    weight[rows] if scales is not None else weight[rows].to(self.source.dtype(f"{name}.weight"))
                )
                self.keep(name, weight[rows], None if scales is None else scales[rows])
            seen = torch.cat(whole)
            places = [down] if kind == "down" else gate_up
            for place, values in zip(places, seen.chunk(len(places)), strict=True):
                place.copy_(values)

    def put_gate_up(
        self,
        name: str,
        mlp: GatedMlp,
        layers: tuple[nn.Linear, ...],
        weight: torch.Tensor,
        scales: torch.Tensor | None,
        order: torch.Tensor,
    ) -> None:
        """Puts the stacked weight, and the biases in its new row order, back into their layers."""
        biases: list[torch.Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        moved = torch.cat(biases)[order] if biases else None
        start = 0
        for projection, layer in zip(dict.fromkeys((mlp.projections.gate, mlp.projections.up)), layers, strict=True):
            rows = slice(start, start + layer.out_features)
            self.put(f"{name}.{projection}", layer, weight[rows], None if scales is None else scales[rows])
            if moved is not None:
                bias = f"{name}.{projection}.bias"
                layer.bias.copy_(moved[rows])
                self.tensors[bias] = layer.bias.to(self.source.dtype(bias)).clone()
            start = rows.stop

    def scales(self, layer: str, device: torch.device) -> torch.Tensor | None:
        """float32 (N, 1) of a kept layer's FP8 form, or None."""
        kept = self.tensors.get(f"{layer}.weight_scale")
        return None if kept is None else kept.to(device, torch.float32)

    def complete(self, prefix: str) -> dict[str, torch.Tensor]:
        """What was kept, and whatever else the source has under a prefix, sorted by name."""
        places = ((name, self.source.place(name)) for name in self.source)
        others = (name for name, place in places if place.startswith(prefix) and name not in self.tensors)
        return dict(sorted({**self.tensors, **{name: self.source.read(name) for name in others}}.items()))
