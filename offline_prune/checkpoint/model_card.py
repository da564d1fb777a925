"""README.md of a checkpoint: what it is, how to serve it, how it was made and what that cost."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from offline_prune.methods.regions import mean_sparsity
from offline_prune.runtime.versions import versions
from vllm_spense.errors import first_line
from vllm_spense.format import Annotation

FILE = "README.md"
#: What becomes of the original model's.
ORIGINAL = "README-original.md"
#: Of the original's front matter, what holds for the pruned model too.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
_BEGIN, _END = "<!-- spense evaluate -->", "<!-- end of spense evaluate -->"
_MEASURED = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)


def facts(annotation: Annotation, fp8: bool) -> dict[str, str]:
    """What an annotation says, for people: heading → text."""
    calibration, default = annotation.calibration, annotation.default
    sparsity = mean_sparsity(map(annotation.regions, annotation.mlps()))
    found = {
        "weights": "FP8 E4M3, one scale per output channel" if fp8 else "unquantized (research only)",
        "method": annotation.method,
        "settings": ", ".join(f"{key}={value}" for key, value in annotation.settings.items()),
        "calibration": "none"
        if calibration is None
        else f"{calibration.source}, {calibration.samples} × {calibration.length} tokens, seed {calibration.seed}",
        "regions": f"sparse {default.sparse} + dense {default.dense} = {default.intermediate}",
        "MLP sparsity": f"{sparsity:.2%} (dense ratio {1 - 2 * sparsity:.3g})",
        "alignment": str(annotation.alignment),
    }
    if annotation.modules:
        found["MLPs"] = f"{len(annotation.modules)}, {annotation.modules[0]} … {annotation.modules[-1]}"
    if annotation.experts:
        layers = list(annotation.experts)
        found["experts"] = f"{sum(annotation.experts.values())}, in {layers[0]} … {layers[-1]}"
    if annotation.overrides:
        found["other regions"] = "; ".join(
            f"{name}: {regions.sparse} + {regions.dense}" for name, regions in annotation.overrides.items()
        )
    return found


def model_card(
    model: str,
    source: Path,
    annotation: Annotation,
    fp8: bool,
    measured: Sequence[str],
    skipped: Mapping[str, str],
    say: Callable[[str], None],
    read_by_transformers: bool = True,
) -> str:
    """The text of README.md; nothing in it differs between two equal runs.

    Args:
        model: as the user named it.
        source: its folder, whose own card may say a licence.
        measured: a section of Markdown about what was measured on the way.
        skipped: block that was left as it was → why.
        say: told where the original's card cannot be read.
        read_by_transformers: whether it knows the names of all tensors.
    """
    from huggingface_hub import ModelCardData

    base = public_name(model, source)
    tags = ["spense", "sparse", *(["fp8", "compressed-tensors"] if fp8 else [])]
    given: dict[str, Any] = {**_kept(source / FILE, say), "base_model": base, "library_name": "vllm", "tags": tags}
    about = {
        **facts(annotation, fp8),
        **({"left as they were": "; ".join(f"{name}: {why}" for name, why in skipped.items())} if skipped else {}),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    lines = [
        "---",
        ModelCardData(**given).to_yaml(),
        "---",
        "",
        f"# {base.rpartition('/')[2]}, pruned by Spense",
        "",
        f"The MLPs of `{base}` in two regions: one 2:4 sparse, one dense.",
        *([f"The original's own card is [{ORIGINAL}]({ORIGINAL})."] if (source / FILE).is_file() else []),
        "",
        "## Serve",
        "",
        *(_SERVE if fp8 else _NOT_SERVED),
        *(() if read_by_transformers else _UNKNOWN_NAMES),
        "",
        "## How it was made",
        "",
        *table(["", ""], [(name, value.replace("|", "\\|")) for name, value in about.items()]),
        "",
        *measured,
        "",
    ]
    return "\n".join(lines)


_SERVE = (
    "In this folder, where `vllm-spense` is installed:",
    "",
    "```sh",
    "vllm serve . --quantization spense",
    "```",
    "",
    "`--quantization compressed-tensors` serves the same files as a dense FP8 model, without Spense.",
)
_NOT_SERVED = ("For research: the weights are not quantized, so Spense does not serve them.",)
_UNKNOWN_NAMES = (
    "",
    "transformers reads experts of this model only where a layer has all of them in one tensor, so it does not read "
    "these files; vLLM and `spense evaluate` do.",
)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows)]


def public_name(model: str, folder: Path) -> str:
    """A model's hub name, or that of its folder; not where the folder is.

    Args:
        model: as the user named it.
        folder: where it is, perhaps in the hub's cache, whose folders are named after models.
    """
    if not os.path.isdir(model):
        return model
    parts = folder.resolve().parts
    cached = next((part for part in parts if part.startswith("models--")), None)
    return cached.removeprefix("models--").replace("--", "/") if cached else parts[-1]


def write_measured(folder: Path, lines: Sequence[str]) -> Path:
    """Puts lines into a checkpoint's card, in place of those that were put there before.

    The card is never half written. One that is missing is made.

    Returns:
        The card.

    Raises:
        OSError: it cannot be read or written.
        UnicodeDecodeError: it is not UTF-8.
    """
    file = folder / FILE
    before = file.read_bytes().decode("utf-8") if file.exists() else ""
    section = "\n".join([_BEGIN, *lines, _END])
    after, found = _MEASURED.subn(lambda _: section, before, count=1)
    if not found:
        after = f"{before.rstrip()}\n\n{section}\n".lstrip()
    temporary = folder / f".{FILE}.{os.getpid()}"
    try:
        with temporary.open("wb") as out:
            out.write(after.encode())
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return file


def _kept(card: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """What a card's front matter says that holds for the pruned model too."""
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    if not card.is_file():
        return {}
    try:
        data = metadata_load(card) or {}
    except (OSError, ValueError, YAMLError) as error:
        said = first_line(error)
        say(f"{card}: its front matter cannot be read, so the licence is not in the pruned model's card: {said}")
        return {}
    return {key: data[key] for key in _KEPT if key in data}
