"""A plugin that cannot register says which versions met and what to do, and lets vLLM go on."""

from __future__ import annotations

import ast
import importlib
import logging
import sys
from pathlib import Path

import pytest
import vllm

import vllm_spense
from vllm_spense.plugin.versions import CHECKED


def test_it_says_so_at_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delitem(sys.modules, "vllm_spense.plugin.config", raising=False)
    # As if vLLM had moved it.
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.quantization", None)
    logger = logging.getLogger("vllm.spense")
    logger.addHandler(caplog.handler)
    try:
        vllm_spense.register()
    finally:
        logger.removeHandler(caplog.handler)
    (record,) = {id(record): record for record in caplog.records}.values()
    assert record.levelno == logging.ERROR
    said = record.getMessage()
    assert f"Spense {vllm_spense.__version__} cannot register with vLLM {vllm.__version__}" in said
    assert "vllm.model_executor.layers.quantization" in said
    assert f"It is for vLLM {CHECKED[0]} to {CHECKED[-1]}: install one of these, or a newer Spense" in said


def test_releases_are_those_of_the_package() -> None:
    """What pip may install with it."""
    setup = Path(vllm_spense.__file__).parents[1] / "setup.py"
    major, minor, _ = map(int, CHECKED[-1].split("."))
    oldest = ".".join(CHECKED[0].split(".")[:2])
    assert f'"vllm>={oldest},<{major}.{minor + 1}"' in setup.read_text(encoding="utf-8")


def test_all_that_is_imported_of_vllm_is_there() -> None:
    """Within functions too, which tests of a CPU may never enter."""
    for file in Path(vllm_spense.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{file.name}: {node.module} has no {alias.name}"
