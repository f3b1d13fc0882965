"""Capability: what is asked of a device, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds under which a question is asked: they hold for every step of a plan."""

    max_rows: int
    """Most rows (tokens) of one step."""
    context: int
    """Longest sequence, in tokens."""
    cache_type: str = "f32"
    """Element type of the KV cache."""
    max_sequences: int = 1
    """Most sequences in one step."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A device's answer; a no carries its reason."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


YES = Verdict(True)


def no(reason: str) -> Verdict:
    """A no, with the reason that a person will read."""
    return Verdict(False, reason)
