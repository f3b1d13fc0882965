"""The tokenizer of the demo model, shared by these tests."""

import pytest

from raygraft.text import Tokenizer


@pytest.fixture(scope="session")
def demo_tokenizer(demo_metadata: dict[str, object]) -> Tokenizer:
    return Tokenizer.from_metadata(demo_metadata)
