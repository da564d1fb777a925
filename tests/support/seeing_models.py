"""Tiny multimodal models with processors that need no torchvision, captioned images, and what a model makes of both.

transformers reads videos with torchvision alone, so processors that would read them too are made without that part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers.processing_utils import ProcessorMixin

from benchmarks.served_models import MODELS, make

#: Name in `MODELS` → the processor's class.
SEEING = {
    "Gemma-3, multimodal": "Gemma3Processor",
    "Qwen2.5-VL": "Qwen2_5_VLProcessor",
    "Qwen3-VL": "Qwen3VLProcessor",
    "Mistral-3": "PixtralProcessor",
}
_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}SEEN{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}<end>{% endfor %}"
)


def seeing_model(name: str, folder: Path) -> Path:
    """A random model of `SEEING`, with a chat template that shows images."""
    make(MODELS[name], folder)
    (folder / "chat_template.jinja").write_text(_TEMPLATE.replace("SEEN", MODELS[name].image))
    return folder


def processor_without_videos(name: str, folder: Path) -> ProcessorMixin:
    kind: Any = getattr(transformers, SEEING[name])
    parts = [part for part in kind.get_attributes() if part != "video_processor"]
    without = type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: parts)})
    return without.from_pretrained(folder)


def captioned(folder: Path, count: int) -> Path:
    """A folder of images of several sizes with a caption beside each."""
    folder.mkdir(parents=True)
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        pixels = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize((56 + 28 * (i % 2), 56)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"Picture number {i}.")
    return folder


def listed(folder: Path, rows: list[Any]) -> Path:
    """A `.jsonl` file of rows beside the images of a folder."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def last_hidden_states(folder: Path, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """What transformers' own model gives its last norm, for each of some inputs, in float32."""
    kind = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    model.model.language_model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for each in inputs:
        with torch.inference_mode():
            model.model(**each, use_cache=False)
    return seen
