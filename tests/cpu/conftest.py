"""A tiny model and a text, shared by the tests of the pruner."""

from pathlib import Path

import pytest
from tiny_models import tiny_model


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"{i} sheep jump over {i * i % 97} fences." for i in range(400)))
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")
