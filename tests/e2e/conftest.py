"""The data of every end-to-end test."""

import pytest

from tests.e2e.runs import World, build_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Shards and tokenizer, made once."""
    return build_world(tmp_path_factory.mktemp("world"))
