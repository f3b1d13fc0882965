from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygraft.graph.errors import RequestError
from raygraft.text import StopMatcher


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, found the slow way, and whether there is one."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def run(stops: Sequence[str], chunks: Sequence[str]) -> tuple[list[str], bool]:
    matcher = StopMatcher(stops)
    emitted = []
    stopped = False
    for chunk in chunks:
        text, stopped = matcher.push(chunk)
        emitted.append(text)
    emitted.append(matcher.finish())
    return emitted, stopped


SHORT = st.text(alphabet="ab\n", min_size=1, max_size=5)


@settings(deadline=None)
@given(stops=st.lists(SHORT, max_size=4), chunks=st.lists(st.text(alphabet="ab\n", max_size=6)))
def test_chunks_make_no_difference(stops: list[str], chunks: list[str]) -> None:
    emitted, stopped = run(stops, chunks)
    assert ("".join(emitted), stopped) == cut("".join(chunks), stops)


@settings(deadline=None)
@given(stops=st.lists(SHORT, max_size=4), text=st.text(alphabet="ab\n"))
def test_no_more_is_held_back_than_needed(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops)
    given_out = ""
    for end, character in enumerate(text, 1):
        emitted, stopped = matcher.push(character)
        if stopped:
            break
        given_out += emitted
        held = text[len(given_out) : end]
        assert held == "" or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("stops", "chunks", "emitted", "stopped"),
    [
        ([], ["a", "b"], ["a", "b", ""], False),
        (["END"], ["oneE", "N", "x"], ["one", "", "ENx", ""], False),
        (["END"], ["oneE", "N", "Dx", "y"], ["one", "", "", "", ""], True),
        (["END"], ["oneE"], ["one", "E"], False),
        (["aab"], ["aaab"], ["a", ""], True),
        (["abcd", "bc"], ["abcd"], ["a", ""], True),  # "bc" is complete first
        (["b", "ab"], ["xab"], ["x", ""], True),  # of two at once, the longest
        (["\n\n"], ["a\n", "\nb"], ["a", "", ""], True),
    ],
)
def test_examples(stops: list[str], chunks: list[str], emitted: list[str], stopped: bool) -> None:
    assert run(stops, chunks) == (emitted, stopped)


@pytest.mark.parametrize("stops", [[""], ["a", ""], "stop"])
def test_stops_that_make_no_sense(stops: Sequence[str]) -> None:
    with pytest.raises(RequestError, match="non-empty strings"):
        StopMatcher(stops)
