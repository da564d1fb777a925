"""Calibration sequences that begin with images and captions, as inputs of a multimodal model's own code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError

from offline_prune.calibration.chat import chat_template
from offline_prune.calibration.image_rows import CaptionedImage
from offline_prune.calibration.recording import ImageInputs, Inputs
from offline_prune.model.loading import SourceModel
from vllm_spense.errors import SpenseError, first_line


@dataclass(frozen=True)
class ImageReader:
    """Makes a model's inputs of images and captions, with the model's own processor and chat template.

    Attributes:
        processor: of transformers.
        template: in whose form a user shows the image and the assistant says the caption.

    Raises:
        SpenseError: at `of`, for a model that sees no images, has no processor or no chat template, or whose vision
            tower's weights are stored in another form than transformers keeps them.
    """

    processor: Any
    template: str

    @classmethod
    def of(cls, model: SourceModel) -> ImageReader:
        kind = type(model.skeleton).__name__
        if getattr(model.skeleton.config, "vision_config", None) is None or model.text is model.skeleton.base_model:
            raise SpenseError(f"{model.folder}: {kind} sees no images; --calibration-images needs a multimodal model")
        if missing := model.missing_outside_blocks():
            raise SpenseError(
                f"{model.folder}: {kind} cannot be calibrated with images: transformers makes {missing[0]} of other "
                "tensors"
            )
        processor: Any = model.processor
        if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
            raise SpenseError(f"{model.folder}: no processor that turns images and text into inputs")
        template = chat_template(processor) or chat_template(processor.tokenizer)
        if template is None:
            raise SpenseError(
                f"{model.folder}: no chat template, so nothing says where an image stands in a text of {kind}"
            )
        return cls(processor, template)

    def tokens(self, document: CaptionedImage) -> int:
        """How many tokens an image and its caption take."""
        return self._process([document])["input_ids"].shape[1]

    def inputs(self, documents: Sequence[CaptionedImage], text: torch.Tensor) -> Inputs:
        """One sequence: images with captions, and after them as much text as has room.

        Args:
            text: int64 (length,).

        Returns:
            `input_ids` int64 (1, length), and whatever else the processor makes.
        """
        made = self._process(documents)
        # Sequences have no padding.
        made.pop("attention_mask", None)
        ids = made["input_ids"]
        room = max(0, len(text) - ids.shape[1])
        for name, value in made.items():
            # What there is of every token: kinds of tokens, of which text is 0.
            if value.shape == ids.shape:
                more = text[:room] if name == "input_ids" else torch.zeros(room, dtype=value.dtype)
                # A tokenizer may make one token more of several documents than of each; the last words go.
                made[name] = torch.cat([value, more[None]], dim=1)[:, : len(text)]
        return made

    def _process(self, documents: Sequence[CaptionedImage]) -> Inputs:
        try:
            text = "".join(map(self._rendered, documents))
            images = [document.open() for document in documents]
            made = self.processor(text=[text], images=[images], add_special_tokens=False, return_tensors="pt")
        except (TemplateError, TypeError, ValueError, ImportError, KeyError) as error:
            where = ", ".join(str(document.source) for document in documents[:3])
            raise SpenseError(f"{where}: {type(self.processor).__name__} cannot read it: {first_line(error)}") from None
        return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}

    def _rendered(self, document: CaptionedImage) -> str:
        messages = [
            {"role": "user", "content": [{"type": "image"}]},
            {"role": "assistant", "content": [{"type": "text", "text": document.caption}]},
        ]
        return str(self.processor.apply_chat_template(messages, chat_template=self.template, tokenize=False))


@dataclass(frozen=True)
class ImagePlan:
    """Which calibration sequences begin with which images.

    Attributes:
        sequences: one entry for each calibration sequence; empty for those that are text alone.
    """

    sequences: tuple[tuple[CaptionedImage, ...], ...]

    def fingerprint(self) -> str:
        """Of all images, captions, and where they stand."""
        whole = ";".join(",".join(each.fingerprint() for each in documents) for documents in self.sequences)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def inputs(self, reader: ImageReader, tokens: torch.Tensor, first: int) -> ImageInputs:
        """Of some sequences, by their number among these.

        Args:
            tokens: int64 (sequences, length), their text.
            first: number of the first of them among all.
        """

        def of(number: int) -> Callable[[], Inputs]:
            return lambda: reader.inputs(self.sequences[first + number], tokens[number])

        return {number: of(number) for number in range(len(tokens)) if self.sequences[first + number]}


def image_places(samples: int, share: float) -> list[int]:
    """Numbers of the sequences that begin with images: that share of them, at least one, evenly spread."""
    wanted = max(1, round(share * samples))
    return [(2 * i + 1) * samples // (2 * wanted) for i in range(wanted)]


def deal(
    images: Iterable[CaptionedImage],
    tokens_of: Callable[[CaptionedImage], int],
    samples: int,
    length: int,
    share: float,
    source: str,
    say: Callable[[str], None],
) -> ImagePlan:
    """Deals images out to a share of the sequences until the next one has room in none of them.

    Args:
        images: in their order; each is used once.
        tokens_of: how many tokens an image and its caption take.
        samples, length: of the calibration text.
        share: of the sequences, above 0 and at most 1.
        source: of the images, for messages.
        say: told how many images are used, and how many are too large for a sequence.

    Raises:
        SpenseError: too few images for each of these sequences to have one.
    """
    places = image_places(samples, share)
    room, dealt = dict.fromkeys(places, length), {place: list[CaptionedImage]() for place in places}
    too_large: list[CaptionedImage] = []
    for image in images:
        count = tokens_of(image)
        emptiest = max(places, key=room.__getitem__)
        if count > length:
            too_large.append(image)
            if len(too_large) > samples and len(too_large) > sum(map(len, dealt.values())):
                break
        elif count > room[emptiest]:
            break
        else:
            dealt[emptiest].append(image)
            room[emptiest] -= count
    left_out = f"; {len(too_large)} left out that take more than --length {length} tokens" if too_large else ""
    used = sum(map(len, dealt.values()))
    if not all(dealt.values()):
        raise SpenseError(
            f"{source}: found {used} images that fit, expected at least one for each of {len(places)} sequences with "
            f"images{left_out}; use more images, or smaller --samples or --image-share"
        )
    taken = sum(length - each for each in room.values())
    say(
        f"calibration images: {used} with their captions take {taken} tokens, at the beginning of {len(places)} of "
        f"{samples} sequences{left_out}"
    )
    return ImagePlan(tuple(tuple(dealt.get(number, ())) for number in range(samples)))
