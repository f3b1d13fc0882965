"""The pages of the paged KV cache: which are free, and which are known by what they hold.

A full page whose content is known by the ids up to its end can serve every sequence that begins
with the same ids. Its key is chained over the pages before it, so equal keys mean equal prefixes.
Shared pages are full, so nobody writes to them again and none is ever copied.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b


class PagePool:
    """Pages of `block_size` tokens, numbered alike on every device with a cache.

    Pages that nobody uses any more keep what they hold until they are needed, those that were let
    go first are taken first.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self._empty = list(range(blocks - 1, -1, -1))
        self._users = [0] * blocks
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()
        """Pages with a key and without a user, the longest unused first."""

    @property
    def free(self) -> int:
        """How many pages nobody uses."""
        return len(self._empty) + len(self._unused)

    def held(self) -> list[int]:
        """Pages that somebody uses, or that may be shared."""
        return [p for p in range(self.blocks) if self._users[p] or p in self._key_of]

    def needed(self, tokens: int) -> int:
        """Pages for so many tokens."""
        return -(-tokens // self.block_size)

    def take(self) -> int | None:
        """A page for new content, the caller's until it is given back; None when all are used."""
        if self._empty:
            page = self._empty.pop()
        elif self._unused:
            page, _ = self._unused.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        else:
            return None
        self._users[page] = 1
        return page

    def known(self, keys: Sequence[bytes]) -> tuple[int, int]:
        """How many of the first pages with these keys are there, and how many of them unused."""
        pages = [self._page_of[key] for key in keys[: self._run(keys)]]
        return len(pages), sum(not self._users[page] for page in pages)

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """The first pages with these keys, as far as they are there; the caller is one more user.

        They are to be read only, and given back.
        """
        pages = [self._page_of[key] for key in keys[: self._run(keys)]]
        for page in pages:
            self._users[page] += 1
            self._unused.pop(page, None)
        return pages

    def publish(self, page: int, key: bytes) -> None:
        """Let others share a page that is full, and will not be written to any more."""
        if key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def give_back(self, pages: Sequence[int]) -> None:
        """The caller uses a sequence's pages no more; its last ones are forgotten first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._key_of:
                self._unused[page] = None
            else:
                self._empty.append(page)

    def _run(self, keys: Sequence[bytes]) -> int:
        count = 0
        while count < len(keys) and keys[count] in self._page_of:
            count += 1
        return count


def extend_keys(keys: list[bytes], ids: Sequence[int], block_size: int, pages: int) -> None:
    """Append the keys of a sequence's full pages, up to so many of them."""
    while len(keys) < pages:
        start = len(keys) * block_size
        digest = blake2b(keys[-1] if keys else b"", digest_size=16)
        digest.update(array("q", ids[start : start + block_size]))
        keys.append(digest.digest())
