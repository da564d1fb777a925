from collections.abc import Iterator

import pytest
from vllm_models import spense_config, world_of_one

from vllm_spense.plugin.config import SpenseConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's layers can be built: one rank."""
    with world_of_one(tmp_path_factory.mktemp("world")):
        yield


@pytest.fixture
def config() -> SpenseConfig:
    return spense_config()
