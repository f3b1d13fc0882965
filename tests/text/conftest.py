"""The tokenizer of the demo model, shared by these tests."""

import json
from pathlib import Path

import gguf
import pytest

from raygraft.text import Tokenizer


@pytest.fixture(scope="session")
def demo_tokenizer(demo_metadata: dict[str, object]) -> Tokenizer:
    return Tokenizer.from_metadata(demo_metadata)


# Until tests/conftest.py provides these two: to be deleted from here on.


@pytest.fixture(scope="session")
def demo_metadata() -> dict[str, object]:
    import os

    reader = gguf.GGUFReader(os.environ["RAYGRAFT_DEMO_MODEL"])
    return {key: field.contents() for key, field in reader.fields.items()}


@pytest.fixture(scope="session")
def oracle_cases() -> list[dict[str, object]]:
    path = Path(__file__).parent.parent / "oracle" / "smollm2-135m-q4_1.json"
    return list(json.loads(path.read_text())["cases"])
