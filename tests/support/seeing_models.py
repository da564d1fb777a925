"""Tiny multimodal models with processors that need no torchvision, captioned images, and what a model makes of both.

transformers reads videos with torchvision alone, so processors that would read them too are made without that part.
Its processor of Mistral-3 needs torchvision as a whole, so another stands for it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from benchmarks.served_models import MODELS, make

#: Name in `MODELS` → the processor's class, if it works without torchvision.
SEEING = {
    "Gemma-3, multimodal": "Gemma3Processor",
    "Qwen2.5-VL": "Qwen2_5_VLProcessor",
    "Qwen3-VL": "Qwen3VLProcessor",
    "Mistral-3": None,
}
_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}SEEN{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}<end>{% endfor %}"
)


def seeing_model(name: str, folder: Path) -> Path:
    """A random model of `SEEING`, with a chat template that shows images."""
    model = MODELS[name]
    make(model if SEEING[name] else replace(model, processor=None), folder)
    (folder / "chat_template.jinja").write_text(_TEMPLATE.replace("SEEN", model.image))
    return folder


class _Pixtral:
    """As much of `PixtralProcessor` as calibration needs: rows of 28 × 28 pixels, [IMG] for each, then a break."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.image_processor = transformers.PixtralImageProcessorPil(
            patch_size={"height": 28, "width": 28}, size={"longest_edge": 56}
        )
        self.chat_template = (folder / "chat_template.jinja").read_text()
        self.apply_chat_template = self.tokenizer.apply_chat_template

    def __call__(self, text: list[str], images: list[Any], **options: Any) -> dict[str, torch.Tensor]:
        pixels = self.image_processor(images[0], return_tensors="pt")
        parts = text[0].split("<|image_pad|>")
        whole = parts[0]
        for (height, width), part in zip(pixels["image_sizes"].tolist(), parts[1:], strict=True):
            row = "<|image_pad|>" * (width // 28)
            whole += "[IMG_BREAK]".join([row] * (height // 28)) + "<|vision_end|>" + part
        return {**self.tokenizer([whole], **options), **pixels}


def processor_without_videos(name: str, folder: Path) -> Any:
    if SEEING[name] is None:
        return _Pixtral(folder)
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
