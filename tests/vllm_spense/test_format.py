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
    names = draw(st.lists(NAMES, min_size=1, max_size=8, unique=True))
    modules, holders = names[:5], names[5:]
    overridden = draw(st.lists(st.sampled_from(names), unique=True))
    projections = st.builds(Projections, NAMES, NAMES, NAMES).filter(lambda p: p.down not in (p.gate, p.up))
    return Annotation(
        method=draw(NAMES),
        settings=draw(st.dictionaries(NAMES, SCALARS, max_size=4)),
        calibration=draw(st.none() | st.builds(Calibration, NAMES, st.integers(1), st.integers(1), st.integers(0))),
        alignment=alignment,
        projections=draw(projections),
        modules=tuple(modules),
        default=draw(regions),
        overrides={name: draw(regions) for name in overridden},
        experts={name: draw(st.integers(1, 2**16)) for name in holders},
        expert_projections=draw(projections) if holders else None,
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
        ("version", 3, "version", "newer"),
        ("version", 2, "experts", "missing key"),
        ("experts", {}, "experts", "unknown key"),
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


EXPERTS = {"projections": {"gate": "w1", "up": "w3", "down": "w2"}, "counts": {"model.layers.0.moe": 3}}


def with_experts(**changes: Any) -> dict[str, Any]:
    data = edited("version", 2) | {"experts": EXPERTS}
    for path, value in changes.items():
        place = data["experts"] if path in EXPERTS else data
        data |= {"experts": {**EXPERTS, path: value}} if place is data["experts"] else {path: value}
    return data


def test_experts_are_modules_with_names_and_regions_of_their_own() -> None:
    data = with_experts()
    data["regions"]["overrides"]["model.layers.0.moe"] = {"sparse": 256, "dense": 128}
    annotation = Annotation.from_dict(data)
    assert annotation.to_dict() == data
    experts = [f"model.layers.0.moe.{i}" for i in range(3)]
    assert list(annotation.mlps()) == ["model.layers.0.mlp", "model.layers.1.mlp", *experts]
    assert {annotation.regions(name) for name in (*experts, "model.layers.0.moe")} == {Regions(256, 128)}
    assert annotation.layers(experts[2]) == tuple(f"model.layers.0.moe.2.{leaf}" for leaf in ("w1", "w3", "w2"))
    assert annotation.layers("model.layers.1.mlp")[0] == "model.layers.1.mlp.gate_proj"
    assert Annotation.from_dict(with_experts(modules=[]) | {"regions": {**data["regions"], "overrides": {}}}).experts


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"counts": {}}, "experts.counts", "no experts"),
        ({"counts": {"a": 0}}, "experts.counts.a", "no number of experts"),
        ({"counts": {"a": 2**40}}, "experts.counts.a", "no number of experts"),
        ({"counts": {"a": "4"}}, "experts.counts.a", "wrong type"),
        ({"counts": {"model.layers.1.mlp": 4}}, "modules", "one name"),
        ({"projections": {"gate": "a", "up": "b", "down": "a"}}, "experts.projections.down", "shares a tensor"),
        ({"version": 1}, "experts", "unknown key"),
    ],
)
def test_what_is_wrong_with_experts_is_named(changes: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        Annotation.from_dict(with_experts(**changes))
    assert caught.value.key == key


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
