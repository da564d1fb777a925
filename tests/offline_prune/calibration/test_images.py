"""Calibration with images: what the blocks see is what the whole model sees, and bad input is named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import contents, cut_off, run
from seeing_models import SEEING, captioned, last_hidden_states, listed, processor_without_videos, seeing_model

from offline_prune.calibration import hidden_states
from offline_prune.calibration.hidden_states import Stream
from offline_prune.calibration.image_rows import CaptionedImage, captioned_images
from offline_prune.calibration.images import ImageReader, deal, image_places
from offline_prune.calibration.kept_arguments import kept, restored
from offline_prune.checkpoint.verify import open_checkpoint
from offline_prune.memory_plan import kept_of_images
from offline_prune.model.gated_mlp import GatedMlp
from offline_prune.model.loading import SourceModel
from vllm_spense.errors import SpenseError

CPU = torch.device("cpu")
SAMPLES, LENGTH = 4, 96


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeing_model("Gemma-3, multimodal", tmp_path_factory.mktemp("gemma") / "model")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return captioned(tmp_path_factory.mktemp("pictures") / "folder", 8)


def kept_bytes(stream: Stream) -> int:
    """Of tensors that sequences with images have of their own."""
    tensors: dict[int, torch.Tensor] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            tensors[value.data_ptr()] = value
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ():
            visit(each)
        if hasattr(value, "packed"):
            visit(value.packed)

    visit([stream._arguments.seeing, list(stream._arguments.added.values())])
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("name", SEEING)
def test_blocks_see_what_they_see_in_the_whole_model(name: str, pictures: Path, tmp_path: Path) -> None:
    """Positions and masks of images, and features that are added between blocks, are the model's own."""
    source = SourceModel(str(seeing_model(name, tmp_path / "model")))
    vars(source)["processor"] = processor_without_videos(name, tmp_path / "model")
    reader = ImageReader.of(source)
    tokens = torch.randint(0, 256, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    found = captioned_images(str(pictures), 0)
    images = deal(found, reader.tokens, SAMPLES, LENGTH, 0.5, "", print).inputs(reader, tokens, 0)
    assert list(images) == [1, 3]

    stream = Stream(source, tokens, CPU, torch.float32, 2 * LENGTH, images=images)
    assert 0 < kept_bytes(stream) <= len(images) * kept_of_images(source, LENGTH, torch.float32.itemsize)
    for index, block in enumerate(source.blocks):
        module = source.load(block.name, CPU, torch.float32)
        assert isinstance(block.mlp, GatedMlp)
        stream.attend(index, module, block.mlp, lambda *_: None)
        stream.advance(index, module, block.name)

    inputs = [images[i]() if i in images else {"input_ids": tokens[i : i + 1]} for i in range(SAMPLES)]
    assert all(each["input_ids"].shape == (1, LENGTH) for each in inputs)
    expected = torch.cat(last_hidden_states(tmp_path / "model", inputs))
    error = (stream.hidden - expected).abs().amax(dim=(1, 2)) / expected.abs().amax(dim=(1, 2))
    assert error.max() < 1e-4, error


def test_a_model_is_calibrated_with_images(gemma: Path, pictures: Path, text: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"length": LENGTH, "method": "spensegpt++", "tune_steps": 4}
    run(gemma, tmp_path / "text", text, **given)
    given |= {"calibration_images": str(pictures), "image_share": 0.25}
    run(gemma, tmp_path / "images", text, **given)
    assert contents(tmp_path / "text") != contents(tmp_path / "images")
    settings = open_checkpoint(tmp_path / "images").annotation.settings
    assert (settings["calibration_images"], settings["image_share"]) == (str(pictures), 0.25)
    assert "calibration_images" not in open_checkpoint(tmp_path / "text").annotation.settings

    cut_off(gemma, tmp_path / "resumed", text, 1, **given)
    run(gemma, tmp_path / "resumed", text, resume=True, **given)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "images")


def test_a_run_with_other_images_is_not_resumed(gemma: Path, text: Path, tmp_path: Path) -> None:
    given = {"length": LENGTH, "calibration_images": str(captioned(tmp_path / "pictures", 4)), "image_share": 0.25}
    cut_off(gemma, tmp_path / "out", text, 1, **given)
    (tmp_path / "pictures/0.txt").write_text("Another caption.")
    with pytest.raises(SpenseError, match="calibration image files"):
        run(gemma, tmp_path / "out", text, resume=True, **given)


def test_blocks_that_are_tuned_whole_take_sequences_with_images_alone(
    gemma: Path, pictures: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where attention and MLP stand side by side: each sequence has its own mask."""
    given: dict[str, Any] = {
        "length": LENGTH,
        "method": "spensegpt++",
        "tune_steps": 2,
        "calibration_images": str(pictures),
    }
    losses = []
    for name, split in (("split", hidden_states.find_split), ("whole", lambda *_: None)):
        monkeypatch.setattr(hidden_states, "find_split", split)
        report = run(gemma, tmp_path / name, text, **given, image_share=0.5)
        losses.append([layer.tuning.before for layer in report.layers if layer.tuning])
    assert len(losses[0]) == 2
    # Judged on another part of the text.
    assert losses[1] == pytest.approx(losses[0], rel=0.5)


def test_images_are_dealt_out_evenly() -> None:
    assert image_places(8, 0.5) == [1, 3, 5, 7]
    assert image_places(8, 1.0) == list(range(8))
    assert image_places(8, 0.01) == [4]
    images = [CaptionedImage(number, "") for number in range(20)]
    said: list[str] = []
    plan = deal(images, lambda image: 30 if image.source else 500, 4, 100, 0.5, "here", said.append)
    assert [[each.source for each in documents] for documents in plan.sequences] == [[], [1, 3, 5], [], [2, 4, 6]]
    assert said == [
        "calibration images: 6 with their captions take 180 tokens, at the beginning of 2 of 4 sequences; "
        "1 left out that take more than --length 100 tokens"
    ]
    with pytest.raises(SpenseError, match="here: found 1 images that fit, expected at least one for each of 2 sequen"):
        deal(images[:2], lambda image: 30 if image.source else 500, 4, 100, 0.5, "here", said.append)


def test_random_images_need_no_folder() -> None:
    first, again, other = (next(iter(captioned_images("random", seed))) for seed in (0, 0, 1))
    assert first.open().tobytes() == again.open().tobytes() != other.open().tobytes()


def test_arguments_are_kept_as_they_are() -> None:
    mask = torch.rand(1, 1, 13, 13) > 0.5
    positions = torch.rand(3, 1, 13, 8), torch.rand(3, 1, 13, 8)
    known: dict[int, Any] = {}
    value = {"mask": mask, "positions": positions, "other": [mask, None, "word"]}
    there = kept(value, known)
    assert len(known) == 3
    back = restored(there, CPU)
    assert torch.equal(back["mask"], mask)
    assert torch.equal(back["other"][0], mask)
    assert all(torch.equal(a, b) for a, b in zip(back["positions"], positions, strict=True))
    assert back["other"][1:] == [None, "word"]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"image": "0.png"}, "line 2: found image; expected an image, which is a path, and a text"),
        ({"image": "9.png", "text": "x"}, "line 2: no such image: .*9.png"),
        ({"image": "0.png", "text": " "}, "line 2: an empty caption"),
    ],
)
def test_rows_that_are_no_captioned_images(row: dict[str, str], found: str, tmp_path: Path) -> None:
    folder = captioned(tmp_path / "pictures", 2)
    file = listed(folder, [{"image": "1.png", "text": "One."}, row])
    with pytest.raises(SpenseError, match=found):
        captioned_images(str(file), 0)


def test_a_file_of_rows_is_read_like_a_folder(tmp_path: Path) -> None:
    folder = captioned(tmp_path / "pictures", 3)
    beside = captioned_images(str(folder), 0)
    file = listed(folder, [{"image": f"{i}.png", "text": f"Picture number {i}."} for i in range(3)])
    assert list(captioned_images(str(file), 0)) == list(captioned_images(str(folder), 0)) == list(beside)


def test_a_folder_that_lacks_something(tmp_path: Path) -> None:
    folder = captioned(tmp_path / "pictures", 2)
    (folder / "1.txt").unlink()
    with pytest.raises(SpenseError, match=r"1\.png: no caption; expected 1\.txt beside it"):
        captioned_images(str(folder), 0)
    (tmp_path / "empty").mkdir()
    for source in (str(tmp_path / "empty"), str(tmp_path / "none"), ""):
        with pytest.raises(SpenseError, match="expected a folder of images with captions"):
            captioned_images(source, 0)


def test_an_image_that_cannot_be_read_is_named(gemma: Path, text: Path, tmp_path: Path) -> None:
    folder = captioned(tmp_path / "pictures", 8)
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SpenseError, match=r"3\.png: cannot be read as an image"):
        run(gemma, tmp_path / "out", text, length=LENGTH, calibration_images=str(folder))
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_models_that_cannot_be_calibrated_with_images(
    llama: Path, gemma: Path, pictures: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(SpenseError, match="LlamaForCausalLM sees no images; --calibration-images needs a multimodal"):
        run(llama, tmp_path / "out", text, calibration_images=str(pictures))
    shutil.copytree(gemma, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()
    with pytest.raises(SpenseError, match="no chat template, so nothing says where an image stands"):
        run(tmp_path / "model", tmp_path / "out", text, calibration_images=str(pictures))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / "model" / name).unlink(missing_ok=True)
    with pytest.raises(SpenseError, match="processor of images"):
        run(tmp_path / "model", tmp_path / "out", text, calibration_images=str(pictures))
    with pytest.raises(SpenseError, match="--image-share: found 0, expected more than 0 and at most 1"):
        run(gemma, tmp_path / "out", text, calibration_images=str(pictures), image_share=0)
