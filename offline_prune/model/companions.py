"""Which files of a model folder, beside its weights and config.json, a checkpoint of it needs too."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from vllm_spense.format import SIDECAR

#: Tokenizer, chat templates, processors, generation config; the modules of sentence-transformers.
_DATA = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "additional_chat_templates/*.jinja",
    "[0-9]*_*/*",
)
_LEGAL = tuple(
    pattern
    for word in ("license", "licence", "notice", "copying", "copyright", "use_policy", "third_party", "licenses/")
    for spelled in (word, word.title(), word.upper())
    for pattern in ([f"{spelled}*"] if word.endswith("/") else [f"{spelled}*", f"*[-_.]{spelled}*"])
)
#: Remote code, which `auto_map` refers to.
_CODE = ("*.py",)
#: Not of the pruned model: weights in other forms and what describes them, adapters, traces of training.
_OTHERS = (
    ".*",
    "*.index.json",
    "consolidated*",
    "params.json",
    "original/*",
    "*.pth",
    "adapter_*",
    "quantize_config.json",
    "hf_quant_config.json",
    "trainer_state.json",
)
#: What a checkpoint has its own of.
_OWN = ("config.json", SIDECAR, "report.json")
#: For a download from the Hugging Face hub, whose `*` matches slashes too: `original/*` needs saying.
DOWNLOADED = (*_DATA, *_LEGAL, *_CODE, "README.md", "*.safetensors")
NOT_DOWNLOADED = tuple(pattern for pattern in _OTHERS if pattern not in (".*", "*.index.json"))


def companions(folder: Path) -> list[Path]:
    """Paths, relative to a model folder, of the files that travel along with its pruned weights, in order.

    Python files do where a configuration names remote code.
    """
    code = any(b'"auto_map"' in file.read_bytes() for file in folder.glob("*config.json"))
    wanted = (*_DATA, *_LEGAL, *(_CODE if code else ()))
    files = [*folder.glob("*"), *folder.glob("*/*")]
    names = sorted(file.relative_to(folder) for file in files if file.is_file())
    return [name for name in names if _any(name, wanted) and not _any(name, (*_OTHERS, *_OWN))]


def _any(name: Path, patterns: tuple[str, ...]) -> bool:
    """Whether one of the patterns matches, part by part."""
    for pattern in patterns:
        parts = pattern.split("/")
        if len(parts) == len(name.parts) and all(map(fnmatchcase, name.parts, parts)):
            return True
    return False
