"""Where downloaded models, compiled functions and packed weights are kept."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_path() -> Path:
    """The user's cache folder; RAYGRAFT_CACHE_DIR names another."""
    own = os.environ.get("RAYGRAFT_CACHE_DIR")
    return Path(own) if own else user_cache_path("raygraft")
