"""Stand-ins for the fixtures of tests/conftest.py, until that file has them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def demo_model() -> Path:
    path = os.environ.get("RAYGRAFT_TEST_MODEL")
    if not path:
        pytest.skip("RAYGRAFT_TEST_MODEL names no demo model")
    return Path(path)


@pytest.fixture(scope="session")
def oracle_cases() -> list[dict[str, Any]]:
    path = Path(__file__).parent.parent / "oracle" / "smollm2-135m-q4_1.json"
    cases: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cases"]
    return cases
