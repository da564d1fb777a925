"""What config.json and the headers of the weights must say: docs/format.md's rules that need no weights.

`spense verify` and the plugin ask the same functions, so neither passes what the other refuses. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_spense.checkpoint_files import TensorHeader, read_object
from vllm_spense.errors import FormatError
from vllm_spense.format import GROUP, KEY, SIDECAR, Annotation, Regions

BASE = "compressed-tensors"
FORMAT, STATUS = "float-quantized", "compressed"
#: Quantization that every linear layer has: bits, type, strategy, dynamic.
FP8 = {"weights": (8, "float", "channel", False), "input_activations": (8, "float", "token", True)}
_ARGUMENTS = ("num_bits", "type", "strategy", "dynamic")
#: Other arguments of compressed-tensors that change nothing about how a checkpoint is read.
_OBSERVERS = ("observer", "observer_kwargs")
#: Keys of `quantization_config` that change what a weight means, in ways that pruned layers do not follow.
_FOREIGN = ("sparsity_config", "transform_config")

#: What architectures call their number of layers.
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")

WEIGHT_DTYPE, SCALE_DTYPE = "F8_E4M3", "BF16"
FLOAT_DTYPES = ("BF16", "F16", "F32")
SCALE_SUFFIX = "_scale"


@dataclass(frozen=True)
class Annotated:
    """A folder's annotation.

    Attributes:
        file: config.json, or spense.json for a checkpoint without FP8.
        quantization: the `quantization_config` of config.json, None for a checkpoint without FP8.
    """

    annotation: Annotation
    file: Path
    quantization: Mapping[str, Any] | None


def read_annotated(folder: Path, config: Mapping[str, Any]) -> Annotated | None:
    """The annotation of a folder with this config.json, checked; None for a model that Spense did not write.

    Raises:
        FormatError: an annotation that breaks the format, or quantization that contradicts it.
    """
    config_file, sidecar = folder / "config.json", folder / SIDECAR
    quantization = config.get("quantization_config")
    if quantization is None:
        if not sidecar.exists():
            return None
        return Annotated(Annotation.from_dict(read_object(sidecar), sidecar), sidecar, None)
    if not isinstance(quantization, dict):
        raise _wrong(config_file, "", quantization, "an object")
    if KEY not in quantization:
        return None
    return Annotated(read_quantization(quantization, config_file), config_file, quantization)


def read_quantization(quantization: Mapping[str, Any], file: object = None) -> Annotation:
    """The annotation in a checkpoint's `quantization_config`, all of which is checked.

    Raises:
        FormatError: there is none, it breaks the format, or the quantization is not the one that every linear layer of
            a Spense checkpoint has.
    """
    if KEY not in quantization:
        raise FormatError(
            "this is not a Spense checkpoint",
            file=file,
            key=f"quantization_config.{KEY}",
            found="nothing",
            expected="the annotation that `spense prune` writes",
        )
    for key, expected in (("quant_method", BASE), ("format", FORMAT), ("quantization_status", STATUS)):
        if (found := quantization.get(key)) != expected:
            raise _wrong(file, key, found, expected)
    for key in _FOREIGN:
        if quantization.get(key):
            raise _wrong(file, key, quantization[key], "nothing")
    annotation = Annotation.from_dict(quantization[KEY], file)
    _check_groups(quantization.get("config_groups"), file)
    ignored = Ignored.read(quantization, file)
    for module in annotation.modules:
        if "experts" in module.split("."):
            raise FormatError(
                "MoE experts are listed as modules",
                file=file,
                key="modules",
                found=module,
                expected="experts under the key `experts`, and here modules with one MLP each",
            )
    for module in annotation.mlps():
        for layer in annotation.layers(module):
            if layer in ignored:
                raise FormatError(
                    "a pruned layer is not quantized",
                    file=file,
                    layer=layer,
                    key="quantization_config.ignore",
                    found=layer,
                    expected="layers that were not pruned",
                )
    return annotation


#: Beginnings and ends of the patterns that `ignore` may hold, around an escaped name, and whether that name may come
#: after others.
_PATTERNS = ((r"re:(.*\.)?", r"(\..*)?$", True), ("re:", r"(\..*)?$", False), ("re:", r"\..*", False))


@dataclass(frozen=True)
class Ignored:
    """Which linear layers `ignore` leaves unquantized.

    Attributes:
        names: of layers.
        roots: of modules with all that is inside them.
        tails: likewise, but of names that may begin with others: a server's names differ from the files' in that.
    """

    names: frozenset[str]
    roots: frozenset[str]
    tails: frozenset[str]

    @classmethod
    def read(cls, quantization: Mapping[str, Any], file: object = None) -> Ignored:
        """
        Raises:
            FormatError: `ignore` holds something else than names and patterns of a few kinds. A stranger's regular
                expressions are not run: some take for ever.
        """
        key = "ignore"
        names: set[str] = set()
        roots: set[str] = set()
        tails: set[str] = set()
        listed = quantization.get(key) or []
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise _wrong(file, key, listed, "a list of names")
        for name in listed:
            if not name.startswith("re:"):
                names.add(name)
                continue
            for head, end, anywhere in _PATTERNS:
                root = re.sub(r"\\(.)", r"\1", name.removeprefix(head).removesuffix(end))
                if root and f"{head}{re.escape(root)}{end}" == name:
                    (tails if anywhere else roots).add(root)
                    break
            else:
                raise _wrong(
                    file, key, name, r"a name, or re:NAME\..*, re:NAME(\..*)?$, re:(.*\.)?NAME(\..*)?$, escaped"
                )
        return cls(frozenset(names), frozenset(roots), frozenset(tails))

    def __contains__(self, layer: str) -> bool:
        parts = layer.split(".")
        beginnings = {".".join(parts[:stop]) for stop in range(1, len(parts) + 1)}
        if layer in self.names or not self.roots.isdisjoint(beginnings):
            return True
        return any(f".{tail}." in f".{layer}." for tail in self.tails)


def _check_groups(groups: object, file: object) -> None:
    key = "config_groups"
    if not isinstance(groups, dict):
        raise _wrong(file, key, groups, "an object")
    everywhere = False
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise _wrong(file, f"{key}.{name}", group, "an object")
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise _wrong(file, f"{key}.{name}.targets", targets, "a list of names")
        if len(targets) == 1 and targets[0].endswith("Attention"):
            continue  # About the KV cache; vLLM passes it over too.
        if group.get("format") not in (None, FORMAT):
            raise _wrong(file, f"{key}.{name}.format", group["format"], FORMAT)
        if group.get("output_activations") is not None:
            raise _wrong(file, f"{key}.{name}.output_activations", group["output_activations"], "nothing")
        for what, expected in FP8.items():
            _check_arguments(group.get(what), expected, f"{key}.{name}.{what}", file)
        everywhere |= "Linear" in targets
    if not everywhere:
        raise _wrong(file, key, list(groups), 'a group with "Linear" among its targets')


def _check_arguments(arguments: object, expected: tuple[object, ...], key: str, file: object) -> None:
    if not isinstance(arguments, dict):
        raise _wrong(file, key, arguments, "an object")
    for name, value in (*zip(_ARGUMENTS, expected, strict=True), ("symmetric", True)):
        # What compressed-tensors takes for granted; all else is written out.
        found = arguments.get(name, {"dynamic": False, "symmetric": True}.get(name))
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            raise _wrong(file, f"{key}.{name}", found, value)
    for name, value in arguments.items():
        if name not in (*_ARGUMENTS, "symmetric", *_OBSERVERS) and value is not None:
            raise _wrong(file, f"{key}.{name}", value, "nothing")


def _wrong(file: object, key: str, found: object, expected: object) -> FormatError:
    return FormatError(
        "a Spense checkpoint has another kind of quantization",
        file=file,
        key=f"quantization_config.{key}".removesuffix("."),
        found="nothing" if found is None else str(found)[:100],
        expected=expected,
    )


def check_tensors(
    annotation: Annotation, headers: Mapping[str, TensorHeader], folder: Path, quantized: bool = True
) -> None:
    """Compares the annotation with the headers of a checkpoint's tensors.

    Args:
        folder: named where a tensor is missing.
        quantized: whether linear layers are FP8.

    Raises:
        FormatError: a tensor of a pruned module is missing, or has the wrong type or a shape that contradicts the
            regions or its neighbours'; an FP8 weight without its scales, or scales without it.
    """
    for module in annotation.mlps():
        regions, names = annotation.regions(module), annotation.layers(module)
        gate, up, down = (_pruned(headers, layer, folder, quantized) for layer in names)
        parts = 2 if names[0] == names[1] else 1
        for name, header in ((names[0], gate), (names[1], up)):
            require_extent(regions, header.shape[0], name, "rows", header.file, parts)
        require_extent(regions, down.shape[1], names[2], "columns", down.file)
        hidden = down.shape[0]
        for name, header in ((names[0], gate), (names[1], up)):
            if header.shape[1] != hidden or hidden % GROUP:
                raise FormatError(
                    "the hidden size is not that of down, or no multiple of four",
                    file=header.file,
                    layer=f"{name}.weight",
                    found=f"{header.shape[1]} columns, and {hidden} rows of {names[2].removeprefix(f'{module}.')}",
                    expected=f"equal multiples of {GROUP}",
                )
    for name, header in headers.items():
        if header.dtype == WEIGHT_DTYPE or name.endswith(f".weight{SCALE_SUFFIX}"):
            _check_scaled(headers, name.removesuffix(SCALE_SUFFIX), quantized)


def require_sane_depth(config: Mapping[str, Any], tensors: int, file: object) -> None:
    """Raises FormatError where config.json names more layers than there are tensors: building a model of a billion
    layers, even without weights, never ends."""
    for prefix, part in (("", config), ("text_config.", config.get("text_config"))):
        for name in _DEPTHS:
            layers = part.get(name) if isinstance(part, Mapping) else None
            if isinstance(layers, int) and layers > tensors:
                raise FormatError(
                    "more layers than tensors",
                    file=file,
                    key=f"{prefix}{name}",
                    found=layers,
                    expected=f"at most {tensors}",
                )


def require_extent(
    regions: Regions, found: int, layer: str, what: str = "intermediate indices", file: object = None, parts: int = 1
) -> None:
    """Raises FormatError where S + D, `parts` times, is not what a layer has of rows or columns."""
    if found != parts * regions.intermediate:
        both = f"{regions.sparse} sparse + {regions.dense} dense"
        raise FormatError(
            "the regions do not add up to the intermediate size",
            file=file,
            layer=layer,
            key="regions",
            found=f"{found} {what}",
            expected=f"{parts * regions.intermediate} ({both if parts == 1 else f'{parts} × ({both})'})",
        )


def _pruned(headers: Mapping[str, TensorHeader], layer: str, folder: Path, quantized: bool) -> TensorHeader:
    name = f"{layer}.weight"
    for needed in (name, f"{name}{SCALE_SUFFIX}")[: 1 + quantized]:
        if needed not in headers:
            raise FormatError(
                "a tensor of a pruned module is missing",
                file=folder,
                layer=needed,
                key="modules",
                found="nothing",
                expected="the tensor, because the annotation names its module",
            )
    header, dtypes = headers[name], (WEIGHT_DTYPE,) if quantized else FLOAT_DTYPES
    if header.dtype not in dtypes:
        raise _wrong_tensor("a pruned weight has the wrong type", name, header, header.dtype, " | ".join(dtypes))
    if len(header.shape) != 2:
        raise _wrong_tensor("a weight is no matrix", name, header, header.shape, "(rows, columns)")
    return header


def _check_scaled(headers: Mapping[str, TensorHeader], name: str, quantized: bool) -> None:
    """Of an FP8 weight and its scales, one of which is there."""
    scale = f"{name}{SCALE_SUFFIX}"
    if scale not in headers:
        raise _wrong_tensor("an FP8 weight without its scales", name, headers[name], "nothing", scale)
    if name not in headers:
        raise _wrong_tensor("scales without their weight", scale, headers[scale], "nothing", name)
    weight, scales = headers[name], headers[scale]
    if not quantized:
        raise _wrong_tensor("scales in a checkpoint without FP8", scale, scales, scales.dtype, "nothing")
    if weight.dtype != WEIGHT_DTYPE or len(weight.shape) != 2:
        found = f"{weight.dtype} {list(weight.shape)}"
        raise _wrong_tensor("a weight with scales is no FP8 matrix", name, weight, found, WEIGHT_DTYPE)
    if scales.dtype != SCALE_DTYPE:
        raise _wrong_tensor("scales have the wrong type", scale, scales, scales.dtype, SCALE_DTYPE)
    if scales.shape != (weight.shape[0], 1):
        raise _wrong_tensor("scales do not fit their weight", scale, scales, scales.shape, (weight.shape[0], 1))


def _wrong_tensor(message: str, name: str, header: TensorHeader, found: object, expected: object) -> FormatError:
    return FormatError(message, file=header.file, layer=name, found=found, expected=expected)
