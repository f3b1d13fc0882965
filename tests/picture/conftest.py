"""Models of different depths."""

import pytest
from picture.plans import write_graph

from raygraft.graph.architectures import build_graph
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph


@pytest.fixture(scope="session")
def four_blocks(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return write_graph(tmp_path_factory.mktemp("four"), 4)


@pytest.fixture(scope="session")
def thirty_blocks(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return write_graph(tmp_path_factory.mktemp("thirty"), 30)


@pytest.fixture(scope="session")
def eighty_blocks(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return write_graph(tmp_path_factory.mktemp("eighty"), 80)


@pytest.fixture(scope="session")
def demo_graph(demo_model: object) -> Graph:
    return build_graph(ModelFile.open(str(demo_model)))
