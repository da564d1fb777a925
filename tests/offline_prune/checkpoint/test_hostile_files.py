"""Files that were changed at random: whoever reads them says what is wrong in a SpenseError, or finds nothing wrong."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import run
from tiny_models import tiny_model

from offline_prune.checkpoint.verify import open_checkpoint, verify
from offline_prune.model.loading import SourceModel
from vllm_spense.checkpoint_files import INDEX_NAME, SINGLE_NAME
from vllm_spense.conformance import read_quantization
from vllm_spense.errors import SpenseError
from vllm_spense.estimate import estimate, load, read_cache
from vllm_spense.roofline import GPUS

#: What stands in the place of a value: every type of JSON, and values that arithmetic or Python's own readers dislike.
ODD = [None, True, 0, -1, 10**39, 1.5, float("nan"), float("inf"), "", "x", "../x", "re:(a+)+$", "é\n[/]", [], [[]], {}]
ODD += [{"a": {}}, [None], ["a", 1], {"": None}]


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside."""
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inside:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated(data: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A copy in which something is replaced, missing, additional or in another's place."""
    data = copy.deepcopy(data)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        every = list(places(data))
        if not every:
            break
        *way, last = chance.choice(every)
        place = data
        for key in way:
            place = place[key]
        kind = chance.choice(["replace", "replace", "replace", "remove", "add", "swap"])
        if kind == "replace":
            place[last] = copy.deepcopy(chance.choice(ODD))
        elif kind == "remove":
            del place[last]
        elif kind == "add" and isinstance(place, dict):
            place[chance.choice(["spense", "extra", "ignore", "layers"])] = copy.deepcopy(chance.choice(ODD))
        else:
            place[last] = copy.deepcopy(data[chance.choice(list(data))])
    return data


def refuses_or_reads(read: Callable[..., Any], *arguments: object) -> bool:
    """Whether it was read; any exception but a SpenseError, or one that no terminal can show, is a fault."""
    try:
        read(*arguments)
    except SpenseError as error:
        str(error).encode()
        return False
    return True


@pytest.fixture(scope="module")
def checkpoint(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("strangers") / "out"
    run(llama, out, text)
    return out


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_annotations_and_quantization(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    outcomes = [
        refuses_or_reads(read_quantization, mutated(config, random.Random(seed)), "config.json") for seed in range(3000)
    ]
    assert 0.6 < outcomes.count(False) / len(outcomes) < 0.99


def test_configurations(copied: Path) -> None:
    file = copied / "config.json"
    config = json.loads(file.read_text())
    outcomes = []
    for seed in range(150):
        file.write_text(json.dumps(mutated(config, random.Random(seed))))
        outcomes += [refuses_or_reads(open_checkpoint, copied), refuses_or_reads(verify, copied)]
        refuses_or_reads(lambda: estimate(*load(str(copied), None), GPUS["h100"], 32, 4096))
    assert {True, False} == set(outcomes)


def test_sources(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model")
    file = model / "config.json"
    config = json.loads(file.read_text())
    outcomes = []
    for seed in range(150):
        file.write_text(json.dumps(mutated(config, random.Random(seed))))
        outcomes.append(refuses_or_reads(SourceModel, str(model)))
        refuses_or_reads(load, str(model), None)
    assert {True, False} == set(outcomes)


def test_indexes(copied: Path) -> None:
    names = open_checkpoint(copied).tensors.headers
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, SINGLE_NAME)}
    outcomes = []
    for seed in range(300):
        (copied / INDEX_NAME).write_text(json.dumps(mutated(index, random.Random(seed))))
        outcomes.append(refuses_or_reads(open_checkpoint, copied))
    assert {True, False} == set(outcomes)


def test_headers(copied: Path) -> None:
    file = copied / SINGLE_NAME
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    outcomes = []
    for seed in range(400):
        text = json.dumps(mutated(header, random.Random(seed))).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data)
        outcomes.append(refuses_or_reads(open_checkpoint, copied))
    assert {True, False} == set(outcomes)


def test_flipped_bytes(copied: Path) -> None:
    """Of the header's length and text, and of config.json: most are no JSON any more."""
    outcomes = []
    for name, first in ((SINGLE_NAME, 2000), ("config.json", 4000)):
        raw = (copied / name).read_bytes()
        for seed in range(200):
            chance, changed = random.Random(seed), bytearray(raw)
            for _ in range(chance.choice([1, 1, 3])):
                changed[chance.randrange(min(first, len(raw)))] = chance.randrange(256)
            (copied / name).write_bytes(changed[: chance.choice([None, None, None, chance.randrange(first)])])
            outcomes.append(refuses_or_reads(open_checkpoint, copied))
        (copied / name).write_bytes(raw)
    assert {True, False} == set(outcomes)


def test_times(tmp_path: Path) -> None:
    key = {"gpu": "NVIDIA H100", "path": "library", "tokens": 32, "n": 512, "k": 256, "split": "output"}
    entry = {
        "key": key | {"projections": 2, "sparse": 96, "dense": 160},
        "found": {"us": {"library": 9.5, "one-launch": 8}},
    }
    model, layers = load("tiny", 0.375)
    found = set()
    for seed in range(500):
        (tmp_path / "times.json").write_text(json.dumps(mutated(entry, random.Random(seed))))
        cache = read_cache(tmp_path)
        found.add(len(cache))
        assert estimate(model, layers, GPUS["h100"], 32, 16, "auto", cache).spense_ms > 0
    assert {0, 1, 2} <= found
