"""Stop strings in a text that arrives in chunks."""

from collections.abc import Sequence

from raygraft.graph.errors import RequestError


class StopMatcher:
    """Ends a text before the stop string that is complete first.

    Of several that become complete with the same character, the longest counts. Only what may
    still become a stop string is held back, and no part of one that did is ever given out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises `RequestError` for an empty stop string."""
        if isinstance(stops, str) or not all(stops):
            raise RequestError(f"stop strings must be a list of non-empty strings, not {stops!r}")
        self._stops = tuple(dict.fromkeys(stops))
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """The text that can be given out now, and whether the end was reached."""
        if self._stopped:
            return "", True
        self._held += text
        start = self._first_stop()
        if start is not None:
            emitted, self._held, self._stopped = self._held[:start], "", True
            return emitted, True
        keep = len(self._held) - self._possible_beginning()
        emitted, self._held = self._held[:keep], self._held[keep:]
        return emitted, False

    def finish(self) -> str:
        """What was held back and became no stop string."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self) -> int | None:
        """Where the stop string begins that is complete first."""
        found = [
            (start + len(stop), start)
            for stop in self._stops
            if (start := self._held.find(stop)) >= 0
        ]
        return min(found)[1] if found else None

    def _possible_beginning(self) -> int:
        """The length of the longest end of the held text that a stop string begins with."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
