"""Which pages of the paged KV cache are free."""

from __future__ import annotations


class PagePool:
    """Numbers of free pages. A page holds `block_size` tokens, on every device with a cache."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self._free = list(range(blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        """How many pages are free."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Pages for so many tokens."""
        return -(-tokens // self.block_size)

    def take(self, count: int) -> list[int]:
        """Pages that are the caller's until they are given back. There must be that many."""
        taken = self._free[-count:] if count else []
        del self._free[len(self._free) - count :]
        return taken[::-1]

    def give_back(self, pages: list[int]) -> None:
        """The pages may be handed out again."""
        self._free.extend(reversed(pages))
