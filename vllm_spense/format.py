"""The Spense annotation: the key `spense` inside a compressed-tensors `quantization_config`.

docs/format.md is the specification; this module is its only implementation. Standard library only, so that
reading an annotation costs nothing in a process that has not loaded torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from vllm_spense.errors import FormatError

#: Of annotations that name no experts, and of those that do.
VERSION, WITH_EXPERTS = 1, 2
KEY = "spense"
#: Holds the annotation of a checkpoint that has no `quantization_config` (`spense prune --quantize none`).
SIDECAR = "spense.json"
#: How the pruner reordered intermediate indices. The name ends so that no reader of weights takes the file for some.
PERMUTATION = "spense_permutation.st"
GROUP = 4
KEPT = 2
#: Every sharding of a region must leave whole groups of four on each rank.
MIN_ALIGNMENT = 32
#: More experts than this in one layer are taken for an error.
MOST_EXPERTS = 2**16

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Regions:
    """How one MLP's intermediate indices are split: [0, sparse) is 2:4, [sparse, sparse + dense) is dense."""

    sparse: int
    dense: int

    @property
    def intermediate(self) -> int:
        return self.sparse + self.dense

    @property
    def dense_ratio(self) -> float:
        """ρ = D / I."""
        return self.dense / self.intermediate

    @property
    def mlp_sparsity(self) -> float:
        """Share of zeros in the MLP weights, (1 − ρ) / 2."""
        return (1 - self.dense_ratio) / 2

    def to_dict(self) -> dict[str, int]:
        return {"sparse": self.sparse, "dense": self.dense}


@dataclass(frozen=True)
class Projections:
    """Names of the linear layers inside an MLP module, as the checkpoint spells them.

    `gate` and `up` are equal when the checkpoint holds both in one tensor of 2·I rows, gate's first.
    """

    gate: str
    up: str
    down: str

    @property
    def fused(self) -> bool:
        return self.gate == self.up

    def to_dict(self) -> dict[str, str]:
        return {"gate": self.gate, "up": self.up, "down": self.down}


@dataclass(frozen=True)
class Calibration:
    """Which text the Hessians were estimated from: `samples` sequences of `length` tokens."""

    source: str
    samples: int
    length: int
    seed: int

    def to_dict(self) -> dict[str, Scalar]:
        return {"source": self.source, "samples": self.samples, "length": self.length, "seed": self.seed}


@dataclass(frozen=True)
class Annotation:
    """Everything a reader needs beyond the ordinary checkpoint.

    Attributes:
        method: name of the pruning method, for people.
        settings: the method's settings, scalars, for people; readers must not depend on them.
        calibration: None for methods that look at no data.
        alignment: power of two, at least 32; every S and D is a multiple of it.
        projections: names of gate, up and down inside each module.
        modules: full names of the pruned MLP modules, in checkpoint spelling.
        default: regions of every module not named in `overrides`.
        overrides: regions of single modules, or of all experts of a layer.
        experts: full names of what holds the routed experts of a layer, in checkpoint spelling → how many these are.
            Expert e is the pruned module NAME.e; all of a layer have the same regions.
        expert_projections: names of gate, up and down inside each expert; None without experts.
    """

    method: str
    settings: Mapping[str, Scalar]
    calibration: Calibration | None
    alignment: int
    projections: Projections
    modules: tuple[str, ...]
    default: Regions
    overrides: Mapping[str, Regions] = field(default_factory=lambda: MappingProxyType({}))
    experts: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    expert_projections: Projections | None = None

    def __post_init__(self) -> None:
        _validate(self)

    def regions(self, module: str) -> Regions:
        """Regions of one pruned module, of an expert, or of all experts of a layer.

        Raises:
            KeyError: `module` is not among `modules` nor `experts`.
        """
        name = self._holder(module) or module
        if name not in self._names:
            raise KeyError(module)
        return self.overrides.get(name, self.default)

    def layers(self, module: str) -> tuple[str, str, str]:
        """Full names of the gate, up and down of a module or an expert."""
        names = (self.expert_projections if self._holder(module) else None) or self.projections
        return f"{module}.{names.gate}", f"{module}.{names.up}", f"{module}.{names.down}"

    def mlps(self) -> Iterator[str]:
        """Full names of all pruned MLPs, each expert one."""
        yield from self.modules
        for name, count in self.experts.items():
            for expert in range(count):
                yield f"{name}.{expert}"

    def _holder(self, module: str) -> str | None:
        """What holds an expert."""
        name = module.rpartition(".")[0]
        return name if name in self.experts else None

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset((*self.modules, *self.experts))

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, keys in the order of docs/format.md."""
        return {
            "version": WITH_EXPERTS if self.experts else VERSION,
            "method": {"name": self.method, "settings": dict(self.settings)},
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "alignment": self.alignment,
            "projections": self.projections.to_dict(),
            "regions": {
                "default": self.default.to_dict(),
                "overrides": {name: regions.to_dict() for name, regions in self.overrides.items()},
            },
            "modules": list(self.modules),
            **self._experts_to_dict(),
        }

    def _experts_to_dict(self) -> dict[str, Any]:
        if self.expert_projections is None:
            return {}
        return {"experts": {"projections": self.expert_projections.to_dict(), "counts": dict(self.experts)}}

    def to_json(self) -> str:
        """The canonical text: two spaces of indent, a final newline."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, data: object, file: object = None) -> Annotation:
        """Reads and validates the JSON object.

        Raises:
            FormatError: with `file` named, for an unknown version or key, a missing key, a wrong type, or
                regions that contradict the alignment or each other.
        """
        try:
            return _read_annotation(data)
        except FormatError as error:
            raise error.inside(file) from None


def _read_annotation(data: object) -> Annotation:
    if not isinstance(data, Mapping):
        raise FormatError("the annotation is not an object", key=KEY, found=_kind(data), expected="object")
    # The version comes first: a future version may have keys that mean nothing here.
    version = data.get("version")
    if type(version) is not int or version not in (VERSION, WITH_EXPERTS):
        hint = "; a newer vllm-spense may read it" if type(version) is int and version > WITH_EXPERTS else ""
        raise FormatError(
            f"unknown version of the Spense format{hint}",
            key="version",
            found=version if type(version) is int else _kind(version),
            expected=f"{VERSION} | {WITH_EXPERTS}",
        )
    keys = ("version", "method", "calibration", "alignment", "projections", "regions", "modules")
    more = ("experts",) if version == WITH_EXPERTS else ()
    _, method, calibration, alignment, projections, regions, modules, *experts = _take(data, "", (*keys, *more))
    of_experts, counts = _read_experts(*experts) if experts else (None, {})

    name, settings = _take(method, "method", ("name", "settings"))
    default, overrides = _take(regions, "regions", ("default", "overrides"))
    return Annotation(
        method=_typed(name, "method.name", str),
        settings=_read_settings(settings),
        calibration=None if calibration is None else _read_calibration(calibration),
        alignment=_typed(alignment, "alignment", int),
        projections=_read_projections(projections, "projections"),
        modules=_read_modules(modules),
        default=_read_regions(default, "regions.default"),
        overrides=MappingProxyType(
            {
                name: _read_regions(value, f"regions.overrides.{name}")
                for name, value in _typed(overrides, "regions.overrides", dict).items()
            }
        ),
        experts=MappingProxyType(counts),
        expert_projections=of_experts,
    )


def _read_settings(data: object) -> Mapping[str, Scalar]:
    settings = _typed(data, "method.settings", dict)
    for name, value in settings.items():
        if not isinstance(value, Scalar):
            key = f"method.settings.{name}"
            raise FormatError("a setting is not a scalar", key=key, found=_kind(value), expected="scalar")
    return MappingProxyType(dict(settings))


def _read_calibration(data: object) -> Calibration:
    source, samples, length, seed = _take(data, "calibration", ("source", "samples", "length", "seed"))
    return Calibration(
        source=_typed(source, "calibration.source", str),
        samples=_typed(samples, "calibration.samples", int),
        length=_typed(length, "calibration.length", int),
        seed=_typed(seed, "calibration.seed", int),
    )


def _read_projections(data: object, key: str) -> Projections:
    gate, up, down = _take(data, key, ("gate", "up", "down"))
    return Projections(
        gate=_typed(gate, f"{key}.gate", str),
        up=_typed(up, f"{key}.up", str),
        down=_typed(down, f"{key}.down", str),
    )


def _read_experts(data: object) -> tuple[Projections, dict[str, int]]:
    projections, counts = _take(data, "experts", ("projections", "counts"))
    found = {}
    for name, value in _typed(counts, "experts.counts", dict).items():
        key = f"experts.counts.{name}"
        found[name] = _typed(value, key, int)
        if not 0 < found[name] <= MOST_EXPERTS:
            raise FormatError("no number of experts", key=key, found=found[name], expected=f"1 to {MOST_EXPERTS}")
    if not found:
        raise FormatError("no experts are listed", key="experts.counts", found="{}", expected="at least one layer's")
    return _read_projections(projections, "experts.projections"), found


def _read_modules(data: object) -> tuple[str, ...]:
    modules = _typed(data, "modules", list)
    return tuple(_typed(name, f"modules[{i}]", str) for i, name in enumerate(modules))


def _read_regions(data: object, key: str) -> Regions:
    sparse, dense = _take(data, key, ("sparse", "dense"))
    return Regions(_typed(sparse, f"{key}.sparse", int), _typed(dense, f"{key}.dense", int))


def _validate(annotation: Annotation) -> None:
    alignment = annotation.alignment
    if alignment < MIN_ALIGNMENT or alignment & (alignment - 1):
        raise FormatError(
            "the alignment is not a power of two of at least 32",
            key="alignment",
            found=alignment,
            expected="32, 64, 128, …",
        )
    if not annotation.modules and not annotation.experts:
        raise FormatError("no module is listed", key="modules", found="[]", expected="the modules that were pruned")
    names: set[str] = set()
    for name in annotation.modules:
        if name in names:
            raise FormatError("a module is listed twice", key="modules", found=name, expected="unique names")
        names.add(name)
    for name in annotation.experts:
        if name in names:
            raise FormatError("experts and a module have one name", key="modules", found=name, expected="unique names")
        names.add(name)
    for key, projections in (("projections", annotation.projections), ("experts", annotation.expert_projections)):
        if projections and projections.down in (projections.gate, projections.up):
            raise FormatError(
                "down shares a tensor with gate or up",
                key="experts.projections.down" if key == "experts" else "projections.down",
                found=projections.down,
                expected="a layer of its own",
            )
    _validate_regions(annotation.default, alignment, "regions.default", None)
    for name, regions in annotation.overrides.items():
        key = f"regions.overrides.{name}"
        if name not in names:
            raise FormatError(
                "an override names a module that is not listed",
                key=key,
                found=name,
                expected="a name from `modules`" + (" or `experts`" if annotation.experts else ""),
            )
        _validate_regions(regions, alignment, key, name)


def _validate_regions(regions: Regions, alignment: int, key: str, layer: str | None) -> None:
    for name, size in regions.to_dict().items():
        if size < 0 or size % alignment:
            raise FormatError(
                f"the {name} region does not fit the alignment",
                layer=layer,
                key=f"{key}.{name}",
                found=size,
                expected=f"a multiple of {alignment}, not negative",
            )
    if regions.intermediate == 0:
        raise FormatError("both regions are empty", layer=layer, key=key, found=0, expected="sparse + dense > 0")


def _take(data: object, where: str, keys: tuple[str, ...]) -> tuple[Any, ...]:
    """Values of exactly these keys: a missing or an unknown one raises."""
    prefix = f"{where}." if where else ""
    if not isinstance(data, Mapping):
        raise FormatError("not an object", key=where or KEY, found=_kind(data), expected="object")
    for key in data:
        if key not in keys:
            raise FormatError("unknown key", key=f"{prefix}{key}", found=key, expected=" | ".join(keys))
    for key in keys:
        if key not in data:
            raise FormatError("missing key", key=f"{prefix}{key}", found="nothing", expected=key)
    return tuple(data[key] for key in keys)


def _typed(value: object, key: str, kind: type) -> Any:
    # bool is an int in Python and never one in this format.
    if isinstance(value, bool) or not isinstance(value, kind):
        raise FormatError("wrong type", key=key, found=_kind(value), expected=_NAMES[kind])
    return value


_NAMES = {str: "string", int: "integer", list: "array", dict: "object"}


def _kind(value: object) -> str:
    kind = type(value).__name__
    return f"{kind} of {len(value)}" if isinstance(value, (list, dict)) else f"{kind} {json.dumps(value)[:60]}"
