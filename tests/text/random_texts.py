"""Random texts that are hard to cut into words."""

from collections.abc import Sequence
from random import Random

_LATIN = (
    "the Hello world don't I'M we'Ve it'S they'LL he'd 'tis x'y 'RE camelCase HTTPServer naïveté "
    "Größe STRASSE_straße ǅungla ﬁn ﬀ Ｆｕｌｌ１２！ İstanbul ſ "
    "\u212a \u2126 \u212b e\u0301 o\u0308\u0323"
)
_OTHER_SCRIPTS = (
    "Москва и мир Ελλάδα \u1fd3\u1fb4 \u1f7d\u03c1\u03b1 عربي؟ ۔ עברית हिन्दी। ไทย "
    "日本語 カタカナ、。 한국어 汉字 ꙮ 𐐀𐐨 𝔘𝔫𝔦"
)
_NUMBERS = (
    "€5 $x £ 3.14 1,234,567 0x1F ½ ² ٣٤ ३ Ⅷ ① 100000000 007 a1b22c333 +1 -2 x**2 <=> ~ `a` ^ |"
)
_MARKS = (
    "!?.,;: ... “quoted” ‘q’ – — ‐ /usr/bin \\n C:\\ {}[]() # def f(x): return ☃︎ © ™ 🚀🌍 🇩🇪 "
    "👩\u200d👩\u200d👧\u200d👦"
)
_UNSEEN = (
    "\ufeff \ufffd \u00ad \u200b \u200d \ue000 \U000e0041 \U0001fae8 \u0378 \x00 \x04 \x1c \x7f"
)
WORDS = " ".join((_LATIN, _OTHER_SCRIPTS, _NUMBERS, _MARKS, _UNSEEN)).split(" ")
GAPS = (
    *("", "", " ", " ", " ", "  ", "   ", "\n", "\n\n", " \n", "\n ", "\r\n", "\t", "\t\t", "\x0b"),
    *("\u00a0", "\u3000", "\u2009", "\u2028", "\x85", " \u3000 ", "        ", "\r", " \t \n\n  "),
)


def draw_text(random: Random, specials: Sequence[str] = ()) -> str:
    """Words of many scripts with gaps of many kinds; some are torn apart, some are special."""
    text = random.choice(GAPS)
    for _ in range(random.randrange(1, 24)):
        kind = random.random()
        if kind < 0.1 and specials:
            text += random.choice(specials)
        elif kind < 0.2:
            text += "".join(random.choice(random.choice(WORDS)) for _ in range(4))
        elif kind < 0.3:
            text += random.choice(random.choice(WORDS)) * random.randrange(1, 9)
        else:
            text += random.choice(WORDS)
        text += random.choice(GAPS)
    return text
