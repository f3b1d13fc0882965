"""Tests marked `gpu` are skipped where the backend cannot start."""

import pytest

from raygraft.graph.errors import ConfigurationError
from raygraft.kernels import BackendOptions, create_backend


def _obstacle() -> str:
    try:
        create_backend("cuda", BackendOptions())
    except ConfigurationError as error:
        return str(error)
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    why = _obstacle() if marked else ""
    if why:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def backend():
    """A CUDA backend."""
    return create_backend("cuda", BackendOptions())
