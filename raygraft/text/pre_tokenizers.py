r"""The patterns that cut a text into words before byte-level BPE, by the name in a GGUF file.

`tokenizer.ggml.pre` names them. The patterns are those of the models' own `tokenizer.json` as
llama.cpp applies them (`llama-vocab.cpp`): one after another, each on the pieces that the one
before left, and every match and every gap between two matches becomes a piece. Where llama.cpp
departs from a model's own pattern, we go with llama.cpp, and a comment says so.

They are Oniguruma patterns, whose `\s`, `\p{L}` and the like know all of Unicode. Letters that
Unicode normalisation would replace are written as escapes, so that no editor changes them.
"""

from dataclasses import dataclass

from raygraft.graph.errors import ModelFileError


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How to cut a text into words, and what else the name implies.

    `ignore_merges`: a word that is a token stays one, whether merges lead to it or not.
    `add_bos`: a text begins with the beginning-of-text token where the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_ENGLISH = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_OTHERS = r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _modern(digits: str, before: str = _ENGLISH + "|", word: str = r"\p{L}+") -> str:
    """The shape that Llama 3 and most models after it use."""
    return rf"{before}[^\r\n\p{{L}}\p{{N}}]?{word}|{digits}|{_OTHERS}[\r\n]*|{_SPACES}"


def _cased(digits: str, after: str) -> str:
    """Words that also break between a small and a capital letter (ASCII only, as llama.cpp)."""
    first, rest = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{first}*{rest}+{after}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{first}+{rest}*{after}"
        rf"|{digits}|{_OTHERS}[\r\n/]*|{_SPACES}"
    )


_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+|{_OTHERS}|\s+(?!\S)|\s+"
_LLAMA3 = _modern(r"\p{N}{1,3}")
_QWEN2 = _modern(r"\p{N}")

# DeepSeek's first models list the letters of cased scripts instead of naming a class.
_CASED_LETTERS = (
    r"A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}"
    r"\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}"
    r"\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}"
    r"\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}"
    r"\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}"
    r"\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}"
    r"\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}"
    r"\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}"
    r"\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}"
    r"\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}"
    r"\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}"
    r"\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}"
    r"\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}"
    r"\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}"
    r"\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}"
    r"\x{1E900}-\x{1E943}"
)
# To llama.cpp a space is only ever a space, also where a class of the model has it: here that of
# U+2028 or U+3000, and below in the marks, which begin at U+3000 in the model's own pattern.
_ASIAN = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}&&\S]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+",
    r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3001}-\x{3002}]+",
    r"\s+$",
    _ASIAN,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+"
    rf"|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_BLOOM = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+"

_GROUPS: dict[tuple[str, ...], PreTokenizer] = {
    ("default",): PreTokenizer(
        (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ),
    (
        *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"),
        *("gigachat", "a.x-4.0", "mellum", "modern-bert", "jina-es", "jina-de"),
        *("jina-v2-es", "jina-v2-de"),
    ): PreTokenizer((_GPT2,)),
    (
        *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"),
        *("minerva-7b", "mellum2"),
    ): PreTokenizer((r"\p{N}", _GPT2)),
    (
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
        *("lfm2", "jina-v5-nano"),
    ): PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): PreTokenizer((_LLAMA3,)),
    (
        *("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open"),
        *("grok-2", "kormo", "f2llmv2"),
    ): PreTokenizer((_QWEN2,)),
    ("qwen35",): PreTokenizer(
        (
            rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        )
    ),
    ("deepseek-llm",): PreTokenizer(_DEEPSEEK_LLM),
    ("deepseek-coder",): PreTokenizer(_DEEPSEEK_CODER),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm"): PreTokenizer(_DEEPSEEK_V3),
    ("falcon",): PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    ("poro-chat", "bloom", "gpt3-finnish"): PreTokenizer((_BLOOM,)),
    ("viking",): PreTokenizer((_BLOOM, r"\p{N}")),
    ("tekken",): PreTokenizer((_cased(r"\p{N}", ""),), ignore_merges=True, add_bos=True),
    ("gpt-4o", "llama4", "kanana2", "minimax-m2"): PreTokenizer(
        (_cased(r"\p{N}{1,3}", rf"(?:{_ENGLISH})?"),)
    ),
    ("bailingmoe", "bailingmoe2", "llada-moe"): PreTokenizer(
        (
            rf"'[sSdDmMtT]|'[lL][lL]|'[vV][eE]|'[rR][eE]|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
            rf"|{_OTHERS}[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    ("seed-coder",): PreTokenizer(
        (
            rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",
        )
    ),
}

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    name: pre_tokenizer for names, pre_tokenizer in _GROUPS.items() for name in names
}


def find_pre_tokenizer(name: str | None) -> PreTokenizer:
    """The pre-tokenizer of that name; a file without a name has `default`, as in llama.cpp.

    Raises `ModelFileError` for a name that is not in the table.
    """
    found = PRE_TOKENIZERS.get(name or "default")
    if found is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise ModelFileError(f"tokenizer.ggml.pre is {name!r}; known here: {known}")
    return found
