"""Prompts drawn at random: slices of sentences, code, numbers and plain random ids.

A fixed list of prompts could be learnt by heart; these differ in every run, and the seed that
is printed gives the same ones again.
"""

import random
from collections.abc import Callable

SENTENCES = """
The harbour was quiet that morning, and only one boat had come back from the north before dawn.
Water boils at a lower temperature on a mountain because the pressure of the air is smaller there.
My sister asked whether the museum opens on Mondays, but nobody in the office could tell her.
In 1821 the town had fewer than four hundred people, most of whom worked in the salt mines.
To make the soup, chop two onions, fry them slowly in butter, and add a litre of warm stock.
If the train is late again, we will take the bus to Lyon and walk the rest of the way.
A good map does not show everything; it leaves out what the reader would only stumble over.
The committee decided, by seven votes to five, that the old bridge should be repaired first.
She opened the letter, read it twice, and put it back into the drawer without a word.
Most birds of this family build their nests near rivers, where insects are easy to find.
"What do you mean by that?" he said. "I thought you had already paid for the tickets."
The number of stars that can be seen with the naked eye is about six thousand.
Der Zug nach Hamburg fährt heute von Gleis sieben ab, nicht wie üblich von Gleis vier.
Le café était fermé, alors nous avons bu un thé chez la voisine en attendant la pluie.
明日の朝は雨が降るので、傘を持って行ってください。
<|im_start|>user Name three rivers in Europe and their lengths.<|im_end|> <|im_start|>assistant
""".strip().split("\n")

CODE = """
def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

for (int i = 0; i < n; i++) {
    if (data[i] > limit) { count += 1; }
}
SELECT name, count(*) FROM orders WHERE year = 2021 GROUP BY name;
{"id": 17, "tags": ["red", "blue"], "price": 4.25}
git commit -m "fix the parser" && git push origin main
""".strip("\n").split("\n")


def sentence_slice(draw: random.Random) -> str:
    """Ten to eighteen words in a row of the sentences, from any word on."""
    words = " ".join(draw.sample(SENTENCES, 4)).split(" ")
    start = draw.randrange(max(1, len(words) - 18))
    return " ".join(words[start : start + draw.randint(10, 18)])


def word_salad(draw: random.Random) -> str:
    """Three or four slices of a few words each, from different sentences."""
    slices = []
    for sentence in draw.sample(SENTENCES, draw.randint(3, 4)):
        words = sentence.split(" ")
        start = draw.randrange(max(1, len(words) - 3))
        slices.append(" ".join(words[start : start + draw.randint(3, 7)]))
    return " ".join(slices)


def code_slice(draw: random.Random) -> str:
    """Three or four lines in a row."""
    start = draw.randrange(len(CODE) - 4)
    return "\n".join(CODE[start : start + draw.randint(3, 4)])


def number_row(draw: random.Random) -> str:
    """A row of numbers with one step between them, and a rest that has none."""
    start, step = draw.randint(-50, 500), draw.randint(1, 30)
    rest = [str(draw.randint(0, 9999)) for _ in range(2)]
    return ", ".join([str(start + step * index) for index in range(6)] + rest)


KINDS: dict[str, Callable[[random.Random], str]] = {
    "sentence": sentence_slice,
    "salad": word_salad,
    "code": code_slice,
    "numbers": number_row,
}


def random_prompts(
    draw: random.Random,
    tokenize: Callable[[str], list[int]],
    *,
    vocabulary: int,
    each: int,
    most: int = 32,
) -> list[list[int]]:
    """`each` prompts of every kind, and one of random ids; each of at most `most` tokens."""
    prompts = [tokenize(make(draw))[:most] for make in KINDS.values() for _ in range(each)]
    return [*prompts, [draw.randrange(vocabulary) for _ in range(most // 2)]]
