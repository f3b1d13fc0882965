"""Functions of llama.cpp's libraries that llama-cpp-python carries but does not wrap."""

from __future__ import annotations

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def library(name: str) -> ctypes.CDLL:
    """One of the libraries that come with llama-cpp-python."""
    package = find_spec("llama_cpp")
    if package is None or package.origin is None:
        raise SystemExit("llama-cpp-python is not installed; see docs/benchmarks.md")
    ending = "dylib" if sys.platform == "darwin" else "so"
    return ctypes.CDLL(str(Path(package.origin).parent / "lib" / f"lib{name}.{ending}"))


def function(name: str, where: str, result: Any, *arguments: Any) -> Any:
    """A function of such a library, with its types."""
    found = getattr(library(where), name)
    found.restype, found.argtypes = result, arguments
    return found
