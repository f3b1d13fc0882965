"""What an engine has done, in sums: speeds and metrics are made of them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class Timings:
    """Sums so far, in seconds and rows; a step with rows of a prompt counts as prefill."""

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    half_batches: int = 0
    """Steps that shared their round with others."""
    generated_tokens: int = 0
    latest_steps: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=4096))
    """Rows and seconds of steps that nobody has looked at yet."""
