"""A model with a few blocks to share out."""

import pytest
from tiny_models import write_tiny_llama

from raygraft.graph.architectures import build_graph
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph


@pytest.fixture(scope="session")
def four_blocks(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    path = tmp_path_factory.mktemp("four") / "four.gguf"
    return build_graph(ModelFile.open(write_tiny_llama(path, blocks=4)))


@pytest.fixture(scope="session")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """Eight leaves: few enough to try every assignment to two devices."""
    path = tmp_path_factory.mktemp("one") / "one.gguf"
    return build_graph(ModelFile.open(write_tiny_llama(path, blocks=1, tied=True)))
