"""Who may import whom: docs/design.md's table, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_any(path: Path, packages: set[str]) -> set[str]:
    return {name for name in imported(path) if any(name == p or name.startswith(f"{p}.") for p in packages)}


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("path", files("offline_prune"), ids=lambda p: p.name)
def test_the_pruner_knows_only_the_format_of_the_plugin(path: Path) -> None:
    allowed = {"vllm_spense.format", "vllm_spense.layout", "vllm_spense.errors"}
    if path.name == "__main__.py":
        allowed.add("offline_prune.cli")
    ours = {name for name in imports_any(path, {"vllm_spense"}) if name != "vllm_spense"}
    assert not {name for name in ours if not any(name == a or name.startswith(f"{a}.") for a in allowed)}
    assert not imports_any(path, {"vllm", "benchmarks", "scripts"})


@pytest.mark.parametrize("path", files("vllm_spense/kernels"), ids=lambda p: p.name)
def test_kernels_know_no_framework(path: Path) -> None:
    others = {"vllm", "offline_prune", "vllm_spense.ops.dispatch", "vllm_spense.ops.gemm", "vllm_spense.plugin.config"}
    assert not imports_any(path, others | {"vllm_spense.plugin.linear", "vllm_spense.plugin.loaders", "transformers"})


@pytest.mark.parametrize("name", ["__init__", "errors", "format", "policy"])
def test_these_need_the_standard_library_alone(name: str) -> None:
    needed = imports_any(ROOT / f"vllm_spense/{name}.py", {"torch", "vllm", "numpy", "pydantic", "transformers"})
    assert not needed


def test_nothing_imports_the_benchmarks() -> None:
    for path in files("vllm_spense") + files("offline_prune"):
        assert not imports_any(path, {"benchmarks", "scripts", "tests"}), path


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("vllm_spense", ("torch", "vllm")),
        ("vllm_spense.format", ("torch", "vllm")),
        ("offline_prune.cli", ("torch", "vllm", "transformers")),
        ("offline_prune.runtime.threads", ("torch", "vllm", "transformers")),
        ("offline_prune.pipeline", ("vllm",)),
    ],
)
def test_importing_stays_light(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(sorted(set({absent!r}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", ["vllm_spense", "offline_prune", "benchmarks", "scripts", "tests"])
def test_modules_stay_readable(folder: str) -> None:
    for path in files(folder):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 420, path
