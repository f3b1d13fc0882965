"""Which sequences run, and which of their rows the next half-batch computes."""

from __future__ import annotations

import time
from array import array
from bisect import insort
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from raygraft.actors.batch import Chunk, divide
from raygraft.actors.pages import PagePool, extend_keys
from raygraft.actors.request import FinishReason, GeneratedSequence, Token
from raygraft.graph.capability import Limits
from raygraft.graph.errors import QueueFullError

LEAST_CHUNK = 32
"""Rows of a prompt that are worth a half-batch of their own."""

_NOTHING: Mapping[GeneratedSequence, int] = MappingProxyType({})


class Scheduler:
    """Sequences that wait, run or leave, and the pages that they hold.

    Sequences that decode go first; what is left of a step's rows is divided among prompts. Pages
    are taken as sequences grow. When none is left the youngest sequence is set aside: it gives its
    pages back, and is computed again from its ids later. The oldest is never set aside, so each
    request ends.
    """

    def __init__(self, limits: Limits, pages: PagePool, max_queue: int | None = None) -> None:
        self.limits = limits
        self.pages = pages
        self.max_queue = max_queue
        self.set_aside = 0
        """How often a sequence had to give its pages back."""
        self.cached_tokens = 0
        """Of prompts: what was in the cache already and was not computed."""
        self.waiting: list[GeneratedSequence] = []
        self.running: list[GeneratedSequence] = []
        """Both by age, the oldest first."""
        self._with_deadline: set[GeneratedSequence] = set()

    @property
    def busy(self) -> bool:
        """Whether a sequence has not ended."""
        return bool(self.waiting or self.running)

    @property
    def decoding(self) -> int:
        """Sequences that run and are past their prompt, those in flight included."""
        return sum(sequence.pending <= 1 for sequence in self.running)

    @property
    def prompt_rows(self) -> int:
        """Rows of prompts that are left to compute."""
        return sum(s.pending for s in self.running if s.pending > 1)

    def check_room(self, arriving: int) -> None:
        """Raises QueueFullError when so many more sequences can neither run nor wait."""
        if self.max_queue is None:
            return
        runs = max(0, self.limits.max_sequences - len(self.running))
        waiting = len(self.waiting)
        if waiting + arriving > runs + self.max_queue:
            raise QueueFullError(
                f"{len(self.running)} requests run and {waiting} wait; {arriving} more would make "
                f"more than {self.max_queue} wait: try again later"
            )

    def add(self, sequence: GeneratedSequence) -> None:
        """Let a sequence wait for its turn."""
        insort(self.waiting, sequence, key=lambda other: other.number)
        if sequence.deadline is not None:
            self._with_deadline.add(sequence)

    def end(self, sequence: GeneratedSequence, reason: FinishReason) -> None:
        """No later step contains the sequence; its pages are free once its steps are back."""
        if sequence.finished:
            return
        sequence.finish_reason = reason
        self._with_deadline.discard(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
        self._let_go(sequence)

    def expire(self) -> list[GeneratedSequence]:
        """End the sequences whose time is over, and name them."""
        if not self._with_deadline:
            return []
        now = time.monotonic()
        late = [s for s in self._with_deadline if s.deadline is not None and s.deadline <= now]
        for sequence in late:
            self.end(sequence, "deadline")
        return late

    def admit(self) -> None:
        """Let waiting sequences run, the oldest first, while there are pages for all their ids."""
        while self.waiting and len(self.running) < self.limits.max_sequences:
            sequence = self.waiting[0]
            keys = self._reusable_keys(sequence)
            if self.running:
                known, unused = self.pages.known(keys)
                own = self.pages.needed(len(sequence.ids) + 1) - known + unused
                if own > self.pages.free - sum(self._promised(other) for other in self.running):
                    return
            del self.waiting[0]
            insort(self.running, sequence, key=lambda other: other.number)
            sequence.pages = array("i", self.pages.share(keys))
            sequence.published = len(sequence.pages)
            sequence.computed = len(sequence.pages) * self.pages.block_size
            if sequence.cached is None:
                sequence.cached = sequence.computed
                self.cached_tokens += sequence.computed

    def next_of(self, chunks: Sequence[Chunk]) -> dict[GeneratedSequence, int] | None:
        """Sequences that go on after a step in flight, whatever it draws, each with its row there.

        None when a sequence has to wait for what is drawn, or for room: others shall not go ahead
        of it, nor give their pages for a token that may never come.
        """
        found: dict[GeneratedSequence, int] = {}
        row = 0
        for chunk in chunks:
            sequence = chunk.sequence
            goes_on = chunk.logits and not (sequence.scoring or sequence.finished)
            if goes_on and sequence.computed + 1 < sequence.limit:
                if sequence.params.penalises:
                    return None
                found[sequence] = row
            row += chunk.logits
        size = self.pages.block_size
        new = sum(len(sequence.pages) * size == sequence.computed for sequence in found)
        return found if new <= self.pages.free else None

    def certain_steps(self, most: int) -> int:
        """For how many steps, at least one, all sequences go on whatever is drawn for them.

        There are pages for all of these. What is in flight counts as computed.
        """
        going = [s for s in self.running if s.computed + 1 < s.limit]
        if self.prompt_rows or any(s.params.penalises or s.scoring or s.leaving for s in going):
            return 1
        steps = min([most, *(s.limit - 1 - s.computed for s in going)])
        while steps > 1 and self._new_pages(going, steps) > self.pages.free:
            steps -= 1
        return max(1, steps)

    def continued(self, chunks: Sequence[Chunk], steps: int) -> list[Sequence[Chunk]]:
        """What follows these chunks of a decode step in so many more, which are certain."""
        return [
            [chunk for before in chunks if (chunk := self._chunk(before.sequence, 1))]
            for _ in range(steps)
        ]

    def choose(
        self, half_batches: int, left: int, drawn: Mapping[GeneratedSequence, int] = _NOTHING
    ) -> list[Chunk]:
        """The rows of the next half-batch, which count as computed from now on.

        `half_batches` share the work of a round; `left` of them, with this one, have no rows yet.
        Tokens of some sequences may still be `drawn`, in these rows of the step before.
        """
        quota = -(-len(self.running) // half_batches)
        decoding = [s for s in self.running if s.pending == 1 or s in drawn][:quota]
        chunks = [
            chunk
            for sequence in decoding
            if (chunk := self._chunk(sequence, 1, drawn.get(sequence)))
        ]
        room = self.limits.max_rows - len(chunks)
        prompts = [s for s in self.running if s.pending > 1]
        if prompts and room:
            wanted = [sequence.pending for sequence in prompts]
            budget = max(1, self.limits.max_rows // half_batches - len(chunks))
            even = max(LEAST_CHUNK, -(-sum(wanted) // left))
            shares = divide(min(room, budget, even), wanted)
            for sequence, rows in zip(prompts, shares, strict=True):
                if rows and (chunk := self._chunk(sequence, rows)):
                    chunks.append(chunk)
        return chunks

    def returned(self, chunk: Chunk, tokens: Sequence[Token]) -> bool:
        """A chunk came back with so many tokens or scores; whether the sequence takes them."""
        sequence = chunk.sequence
        sequence.in_flight -= 1
        takes = not sequence.finished
        if takes:
            sequence.tokens += tokens
            if not sequence.scoring:
                sequence.ids += [token.id for token in tokens]
                self._publish(sequence)
        if not sequence.in_flight:
            if sequence.finished:
                self._let_go(sequence)
            elif sequence.leaving:
                self._set_aside(sequence)
        return takes

    def start_again(self, pages: PagePool, limits: Limits) -> None:
        """All that was computed is lost: every sequence waits to be computed from its ids."""
        self.pages, self.limits = pages, limits
        for sequence in [*self.running]:
            sequence.in_flight, sequence.pages = 0, array("i")
            self._set_aside(sequence)

    def _chunk(
        self, sequence: GeneratedSequence, rows: int, drawn_in: int | None = None
    ) -> Chunk | None:
        """So many rows of a sequence, or as many as there are pages for."""
        if sequence.leaving or sequence not in self.running:  # made room for an older one
            return None
        rows = min(rows, self._room(sequence, sequence.computed + rows) - sequence.computed)
        if rows <= 0:
            return None
        start, stop = sequence.computed, sequence.computed + rows
        logits = int(stop >= len(sequence.ids))
        if sequence.scoring:
            logits = max(0, stop - max(start, sequence.scored))
            sequence.scored = max(stop, sequence.scored)
        sequence.computed = stop
        sequence.in_flight += 1
        self._publish(sequence)
        return Chunk(sequence, start, rows, logits, drawn_in)

    def _room(self, sequence: GeneratedSequence, tokens: int) -> int:
        """Take pages for so many tokens, or as many as there are; how many tokens they hold."""
        pool = self.pages
        while len(sequence.pages) * pool.block_size < tokens:
            page = pool.take()
            if page is not None:
                sequence.pages.append(page)
            elif not self._make_room(sequence):
                break
        return len(sequence.pages) * pool.block_size

    def _make_room(self, needy: GeneratedSequence) -> bool:
        """Set the youngest sequence aside for an older one; whether that could be done now."""
        youngest = self.running[-1]
        if youngest is needy:
            return False
        if youngest.in_flight:
            youngest.leaving = True
            return False
        self._set_aside(youngest)
        return True

    def _set_aside(self, sequence: GeneratedSequence) -> None:
        self.set_aside += 1
        self.running.remove(sequence)
        insort(self.waiting, sequence, key=lambda other: other.number)
        sequence.leaving = False
        sequence.scored = len(sequence.tokens) if sequence.scoring else 0
        self._let_go(sequence)

    def _let_go(self, sequence: GeneratedSequence) -> None:
        """Give the pages of a sequence back, unless a step that uses them is in flight."""
        if not sequence.in_flight:
            self.pages.give_back(sequence.pages)
            sequence.pages, sequence.computed, sequence.published = array("i"), 0, 0

    def _new_pages(self, sequences: Sequence[GeneratedSequence], tokens: int) -> int:
        """Pages to be taken so that all these sequences have room for so many tokens more."""
        needed = (self.pages.needed(s.computed + tokens) - len(s.pages) for s in sequences)
        return sum(max(0, pages) for pages in needed)

    def _promised(self, sequence: GeneratedSequence) -> int:
        """Pages that a running sequence needs for the ids that it has, and has not taken yet."""
        return max(0, self.pages.needed(len(sequence.ids) + 1) - len(sequence.pages))

    def _reusable_keys(self, sequence: GeneratedSequence) -> list[bytes]:
        """Keys of the pages that may be shared: the last id is computed, for its logits."""
        if sequence.scoring:
            return []
        size = self.pages.block_size
        count = (len(sequence.ids) - 1) // size
        extend_keys(sequence.keys, sequence.ids, size, count)
        return sequence.keys[:count]

    def _publish(self, sequence: GeneratedSequence) -> None:
        """Let others share the pages that are full now: their steps will come after this one."""
        full = min(sequence.computed, len(sequence.ids)) // self.pages.block_size
        if full > sequence.published:
            extend_keys(sequence.keys, sequence.ids, self.pages.block_size, full)
            for index in range(sequence.published, full):
                self.pages.publish(sequence.pages[index], sequence.keys[index])
            sequence.published = full
