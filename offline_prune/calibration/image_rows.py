"""Images with captions: from a folder, a `.jsonl` file, or random ones."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from offline_prune.calibration.rows import shuffled_rows
from vllm_spense.errors import SpenseError

RANDOM = "random"
#: Of files in a folder.
IMAGE_KINDS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_EXPECTED = f"expected a folder of images with captions, a .jsonl file, or {RANDOM}"
#: Sides of random images, in pixels, and into how many patches of one colour they are drawn before they are enlarged.
_SIDES, _PATCHES = (224, 336, 448, 672), 16
_RANDOM_CAPTION = "Colours without a meaning."


@dataclass(frozen=True)
class CaptionedImage:
    """An image and what it shows.

    Attributes:
        source: its file, or the number that a random one is drawn from.
        caption: not empty.
    """

    source: Path | int
    caption: str

    def open(self) -> Image.Image:
        """RGB.

        Raises:
            SpenseError: the file is no image, or a damaged one; names it.
        """
        if isinstance(self.source, int):
            return _drawn(self.source)
        try:
            with Image.open(self.source) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        # SyntaxError and ValueError: what Pillow raises for damaged PNG and other files.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise SpenseError(f"{self.source}: cannot be read as an image: {error}") from None

    def fingerprint(self) -> str:
        """Of pixels and caption."""
        content = str(self.source).encode() if isinstance(self.source, int) else self.source.read_bytes()
        return hashlib.sha256(content + self.caption.encode()).hexdigest()


def captioned_images(source: str, seed: int) -> Iterable[CaptionedImage]:
    """All images of a source, in an order drawn from the seed.

    Args:
        source: a folder with `name.jpg` (or another kind) and `name.txt` side by side, or with `.jsonl` files, at any
            depth; one `.jsonl` file, whose rows are `{"image": PATH, "text": CAPTION}` with paths relative to the file;
            or `random`, which never ends.

    Raises:
        SpenseError: no such source, one without images, or an image without a caption; names the file and the line.
    """
    if source == RANDOM:
        draw = random.Random(seed)
        return (CaptionedImage(draw.getrandbits(31), _RANDOM_CAPTION) for _ in itertools.count())
    path = Path(source)
    if source.strip() and path.is_dir():
        found = list(_in_folder(path))
    elif path.suffix.lower() == ".jsonl":
        found = list(_in_file(path))
    else:
        raise SpenseError(f"--calibration-images: found {source or 'nothing'}, {_EXPECTED}")
    if not found:
        raise SpenseError(f"{source}: found no images, {_EXPECTED}")
    random.Random(seed).shuffle(found)
    return found


def _in_folder(folder: Path) -> Iterator[CaptionedImage]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = [file for file in files if file.suffix.lower() == ".jsonl"]
    for file in listed:
        yield from _in_file(file)
    if listed:
        return
    for file in files:
        if file.suffix.lower() in IMAGE_KINDS:
            beside = file.with_suffix(".txt")
            if not beside.is_file():
                raise SpenseError(f"{file}: no caption; expected {beside.name} beside it, or a .jsonl file")
            try:
                caption = beside.read_text(encoding="utf-8").strip()
            except UnicodeDecodeError as error:
                raise SpenseError(f"{beside}: not UTF-8 text: {error.reason}") from None
            yield CaptionedImage(file, _not_empty(caption, str(beside)))


def _in_file(file: Path) -> Iterator[CaptionedImage]:
    for where, row in sorted(shuffled_rows(str(file), 0, 1), key=lambda each: int(each[0].rpartition(" ")[2])):
        columns: dict[str, Any] = row if isinstance(row, dict) else {}
        for column in ("image", "text"):
            if not isinstance(columns.get(column), str):
                found = ", ".join(map(str, columns)) or type(row).__name__
                raise SpenseError(f"{where}: found {found}; expected an image, which is a path, and a text")
        path = file.parent / columns["image"]
        if not path.is_file():
            raise SpenseError(f"{where}: no such image: {path}")
        yield CaptionedImage(path, _not_empty(columns["text"].strip(), where))


def _not_empty(caption: str, where: str) -> str:
    if not caption:
        raise SpenseError(f"{where}: an empty caption; expected what the image shows")
    return caption


def _drawn(number: int) -> Image.Image:
    """Colours that vary smoothly, unlike those of white noise, in one of several sizes."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (_PATCHES, _PATCHES, 3), generator=generator, dtype=torch.uint8)
    width, height = (_SIDES[i] for i in torch.randint(0, len(_SIDES), (2,), generator=generator).tolist())
    return Image.fromarray(pixels.numpy()).resize((width, height), Image.Resampling.BICUBIC)
