"""The model files that both sides read, made on demand and kept in the user's cache folder."""

from __future__ import annotations

import ctypes
from pathlib import Path

from random_model import SHAPES, write_random_model
from reporting import say

from raygraft.demo_model import demo_model_path
from raygraft.kernels.cache_folder import cache_path

DEMO = ("Q4_1", "Q4_0", "Q8_0", "F16")
"""What SmolLM2 is measured in: as it comes, and requantised by llama.cpp."""
RANDOM = ("Q4_K", "Q6_K", "Q4_0")
"""What a random model of 1B shape is measured in."""


def demo_file(kind: str) -> Path:
    """SmolLM2-135M in one of the formats of `DEMO`."""
    original = demo_model_path(say)
    if kind == "Q4_1":
        return original
    path = _folder() / f"SmolLM2-135M-Instruct.{kind}.gguf"
    if not path.is_file():
        say(f"requantising the demo model to {kind}")
        _requantise(original, path, kind)
    return path


def random_file(kind: str, shape: str = "1b") -> Path:
    """A model with random weights."""
    path = _folder() / f"random-{shape}.{kind}.gguf"
    if not path.is_file():
        say(f"writing {path.name}")
        write_random_model(path, kind, SHAPES[shape])
    return path


def _folder() -> Path:
    folder = cache_path() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _requantise(source: Path, target: Path, kind: str) -> None:
    import llama_cpp  # noqa: PLC0415  # not needed when the file is there
    from llama import quieten  # noqa: PLC0415

    quieten()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.allow_requantize = True
    unfinished = target.with_suffix(".unfinished")
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(unfinished).encode(), ctypes.byref(parameters)
    )
    if failed:
        raise SystemExit(f"llama.cpp cannot requantise {source} to {kind}")
    unfinished.replace(target)
