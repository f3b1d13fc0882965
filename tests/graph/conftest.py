"""A model with enough blocks for ranges."""

import pytest
from tiny_models import write_tiny_llama

from raygraft.graph.architectures import build_graph
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph


@pytest.fixture(scope="session")
def deep_graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """Twelve blocks."""
    path = tmp_path_factory.mktemp("deep") / "deep.gguf"
    return build_graph(ModelFile.open(write_tiny_llama(path, blocks=12, width=32, kv_heads=1)))
