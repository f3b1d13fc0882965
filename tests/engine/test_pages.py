"""Pages: nobody's twice, shared by content, forgotten last by whoever needs them."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from raygraft.actors.pages import PagePool, extend_keys

BLOCKS = 6


def keys_of(ids, size=2):
    keys = []
    extend_keys(keys, ids, size, len(ids) // size)
    return keys


def test_keys_name_all_ids_up_to_their_page():
    one, two = keys_of([1, 2, 3, 4]), keys_of([1, 2, 3, 5])
    assert one[0] == two[0]
    assert one[1] != two[1]
    assert keys_of([9, 2, 3, 4])[1] != one[1]  # the same page after another one
    extended = keys_of([1, 2])
    extend_keys(extended, [1, 2, 3, 4], 2, 2)
    assert extended == one


def test_the_longest_unused_page_goes_first_and_the_end_of_a_sequence_before_its_beginning():
    pool = PagePool(4, 2)
    first, second = keys_of([1, 2, 3, 4]), keys_of([5, 6])
    pages = [pool.take() for _ in range(2)]
    for page, key in zip(pages, first, strict=True):
        pool.publish(page, key)
    other = pool.take()
    pool.publish(other, second[0])
    pool.give_back(pages)
    pool.give_back([other])
    assert pool.free == 4
    assert pool.known(first) == (2, 2)
    taken = [pool.take() for _ in range(2)]
    assert taken[1] == pages[1]  # after the one that nobody ever used
    assert pool.known(first) == (1, 1)
    assert pool.share(first) == pages[:1]
    assert pool.known(first) == (1, 0)
    assert pool.take() == other
    assert pool.take() is None


class Pools(RuleBasedStateMachine):
    """Sequences over a small alphabet take, publish, share and give back."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(BLOCKS, 1)
        self.content = [None] * BLOCKS
        self.holders = []

    @rule(ids=st.lists(st.integers(0, 2), min_size=1, max_size=4))
    def begin(self, ids):
        keys = keys_of(ids, 1)
        known, unused = self.pool.known(keys)
        before = self.pool.free
        pages = self.pool.share(keys)
        assert (len(pages), before - unused) == (known, self.pool.free)
        for index, page in enumerate(pages):
            assert self.content[page] == ids[: index + 1]
        while len(pages) < len(ids):
            page = self.pool.take()
            if page is None:
                break
            assert all(page not in held for held in self.holders)
            pages.append(page)
            self.content[page] = ids[: len(pages)]
            self.pool.publish(page, keys[len(pages) - 1])
        self.holders.append(pages)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def end(self, data):
        self.pool.give_back(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @invariant()
    def all_pages_are_somewhere(self):
        used = {page for pages in self.holders for page in pages}
        assert self.pool.free == BLOCKS - len(used)


TestPools = Pools.TestCase
TestPools.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
