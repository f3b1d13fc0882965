"""Raygraft: run a language model with each functional region on the device that suits it.

from raygraft import LLM, SamplingParams

with LLM(devices=["a:threads=1", "b:threads=1"], place={"kind:attention": "a"}) as llm:
    print(llm.generate("The capital of France is", SamplingParams(temperature=0))[0].text)
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raygraft.actors.request import SamplingParams
    from raygraft.completion import Completion
    from raygraft.graph.errors import RaygraftError
    from raygraft.llm import LLM
    from raygraft.placement.plan import Plan

__all__ = ["LLM", "Completion", "Plan", "RaygraftError", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "raygraft.llm",
    "Completion": "raygraft.completion",
    "Plan": "raygraft.placement.plan",
    "RaygraftError": "raygraft.graph.errors",
    "SamplingParams": "raygraft.actors.request",
}

try:
    __version__ = version("raygraft")
except PackageNotFoundError:  # a working directory that was not installed, as in a Ray job
    __version__ = "0+unknown"


def __getattr__(name: str) -> object:
    """Import what is asked for, and only that: `import raygraft` alone loads no Ray."""
    if name not in _HOMES:
        raise AttributeError(f"module 'raygraft' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
