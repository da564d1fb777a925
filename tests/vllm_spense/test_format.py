"""The annotation: exact bytes, strict reading, round trips."""

import copy
import json
import pickle
import time
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_spense.errors import FormatError
from vllm_spense.format import Annotation, Calibration, Projections, Regions

ANNOTATION = Annotation(
    method="spensegpt+",
    settings=MappingProxyType({"selection": "spensegpt+", "damping": 0.01}),
    calibration=Calibration("builtin", 64, 512, 0),
    alignment=128,
    projections=Projections("gate_proj", "up_proj", "down_proj"),
    modules=("model.layers.0.mlp", "model.layers.1.mlp"),
    default=Regions(1152, 384),
    overrides=MappingProxyType({"model.layers.1.mlp": Regions(768, 768)}),
)

TEXT = """{
  "version": 1,
  "method": {
    "name": "spensegpt+",
    "settings": {
      "selection": "spensegpt+",
      "damping": 0.01
    }
  },
  "calibration": {
    "source": "builtin",
    "samples": 64,
    "length": 512,
    "seed": 0
  },
  "alignment": 128,
  "projections": {
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj"
  },
  "regions": {
    "default": {
      "sparse": 1152,
      "dense": 384
    },
    "overrides": {
      "model.layers.1.mlp": {
        "sparse": 768,
        "dense": 768
      }
    }
  },
  "modules": [
    "model.layers.0.mlp",
    "model.layers.1.mlp"
  ]
}
"""


def test_exact_bytes() -> None:
    assert ANNOTATION.to_json() == TEXT


def test_exact_bytes_are_read_back() -> None:
    assert Annotation.from_dict(json.loads(TEXT)) == ANNOTATION


def test_overrides_win_over_the_default() -> None:
    assert ANNOTATION.regions("model.layers.0.mlp") == Regions(1152, 384)
    assert ANNOTATION.regions("model.layers.1.mlp") == Regions(768, 768)
    with pytest.raises(KeyError):
        ANNOTATION.regions("model.layers.2.mlp")


def test_regions_speak_the_papers_terms() -> None:
    assert Regions(1152, 384).dense_ratio == 0.25
    assert Regions(1152, 384).mlp_sparsity == 0.375


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | NAMES


@st.composite
def annotations(draw: st.DrawFn) -> Annotation:
    alignment = 2 ** draw(st.integers(5, 10))
    sizes = st.integers(0, 40).map(lambda n: n * alignment)
    regions = st.builds(Regions, sizes, sizes).filter(lambda r: r.intermediate > 0)
    modules = draw(st.lists(NAMES, min_size=1, max_size=5, unique=True))
    overridden = draw(st.lists(st.sampled_from(modules), unique=True))
    return Annotation(
        method=draw(NAMES),
        settings=draw(st.dictionaries(NAMES, SCALARS, max_size=4)),
        calibration=draw(st.none() | st.builds(Calibration, NAMES, st.integers(1), st.integers(1), st.integers(0))),
        alignment=alignment,
        projections=draw(st.builds(Projections, NAMES, NAMES, NAMES).filter(lambda p: p.down not in (p.gate, p.up))),
        modules=tuple(modules),
        default=draw(regions),
        overrides={name: draw(regions) for name in overridden},
    )


@given(annotations())
def test_round_trip(annotation: Annotation) -> None:
    assert Annotation.from_dict(json.loads(annotation.to_json())) == annotation
    assert Annotation.from_dict(json.loads(annotation.to_json())).to_json() == annotation.to_json()


def edited(path: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(json.loads(TEXT))
    *parents, last = path.split("/")
    place = data
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "key", "words"),
    [
        ("version", 2, "version", "newer"),
        ("version", 0, "version", "unknown version"),
        ("version", "1", "version", "unknown version"),
        ("version", True, "version", "unknown version"),
        ("version", ..., "version", "unknown version"),
        ("extra", 1, "extra", "unknown key"),
        ("method/extra", 1, "method.extra", "unknown key"),
        ("regions/default/size", 1, "regions.default.size", "unknown key"),
        ("modules", ..., "modules", "missing key"),
        ("regions/default/dense", ..., "regions.default.dense", "missing key"),
        ("regions/default/sparse", 1152.0, "regions.default.sparse", "wrong type"),
        ("regions/default/sparse", True, "regions.default.sparse", "wrong type"),
        ("regions/default/sparse", 1151, "regions.default.sparse", "multiple of 128"),
        ("regions/default/sparse", -128, "regions.default.sparse", "not negative"),
        ("regions/default", {"sparse": 0, "dense": 0}, "regions.default", "empty"),
        ("regions/overrides/model.layers.1.mlp/dense", 7, "regions.overrides.model.layers.1.mlp.dense", "multiple"),
        ("regions/overrides/nowhere", {"sparse": 0, "dense": 128}, "regions.overrides.nowhere", "not listed"),
        ("alignment", 96, "alignment", "power of two"),
        ("alignment", 16, "alignment", "at least 32"),
        ("modules", ["a", "a"], "modules", "twice"),
        ("modules", [], "modules", "no module is listed"),
        ("projections/down", "up_proj", "projections.down", "shares a tensor"),
        ("modules", [1], "modules[0]", "wrong type"),
        ("projections", None, "projections", "not an object"),
        ("method/settings/list", [1], "method.settings.list", "scalar"),
        ("calibration/samples", "64", "calibration.samples", "wrong type"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: Any, key: str, words: str) -> None:
    with pytest.raises(FormatError) as caught:
        Annotation.from_dict(edited(path, value), "somewhere/config.json")
    assert caught.value.file == "somewhere/config.json"
    assert caught.value.key == key
    assert words in str(caught.value)
    assert "found" in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "spense", 1])
def test_an_annotation_is_an_object(data: Any) -> None:
    with pytest.raises(FormatError, match="not an object"):
        Annotation.from_dict(data)


def test_thousands_of_modules_take_no_time() -> None:
    """Each module is looked up once, and looking up one must not look at all."""
    names = [f"model.layers.{i}.mlp" for i in range(32_000)]
    data = json.loads(TEXT) | {"modules": names}
    data["regions"]["overrides"] = {name: {"sparse": 768, "dense": 768} for name in names[::2]}
    start = time.perf_counter()
    annotation = Annotation.from_dict(data)
    assert sum(annotation.regions(name).sparse for name in annotation.modules) == 16_000 * (768 + 1152)
    with pytest.raises(FormatError, match=r"twice.*layers\.31999"):
        Annotation.from_dict(data | {"modules": [*names, names[-1]]})
    assert time.perf_counter() - start < 2  # 0.2 s where a scan for each took half a minute


def test_errors_survive_the_way_between_processes() -> None:
    error = FormatError("wrong", file="f", layer="l", key="k", found=1, expected=2)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
