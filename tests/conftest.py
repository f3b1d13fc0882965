"""Fixtures that every folder of tests shares."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from tiny_models import write_tiny_llama

from raygraft.graph.architectures import build_graph
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph

# The same examples in every run; `pytest --hypothesis-profile=explore` looks for new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("repeatable")


# A shell in the background tells its commands to ignore Ctrl-C; tests interrupt what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    # Graphs are arguments of property tests; a failing example is worth printing all the same.
    config.addinivalue_line("filterwarnings", "ignore:Generating overly large repr")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of architecture `llama`, with two blocks."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_model_with_room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a context of 2,048 tokens."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "room.gguf", context=2048)


@pytest.fixture(scope="session")
def tiny_graph(tiny_model: Path) -> Graph:
    return build_graph(ModelFile.open(tiny_model))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The model that `raygraft run` uses when it is given none."""
    from raygraft.demo_model import demo_model_path

    return demo_model_path()


@pytest.fixture(scope="session")
def demo_metadata(demo_model: Path) -> dict[str, object]:
    return dict(ModelFile.open(demo_model).metadata)


@pytest.fixture(scope="session")
def oracle_cases() -> list[dict[str, Any]]:
    """What llama.cpp answers for twelve prompts, with the demo model."""
    path = Path(__file__).parent / "oracle" / "smollm2-135m-q4_1.json"
    cases: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cases"]
    return cases


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for all tests that need one."""
    import ray

    import raygraft.actors.cluster  # noqa: F401  # sets the environment that Ray reads

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
