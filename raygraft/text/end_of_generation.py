"""Which tokens end an answer.

Files rarely say it in full, so llama.cpp goes by the tokens' texts (`llama-vocab.cpp`), and so do
we: an answer must end where llama.cpp ends it.
"""

from collections.abc import Iterable, Mapping

from raygraft.text.metadata import Metadata, read_token_id
from raygraft.text.token_kind import TokenKind

END_NAMES = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
)

# Tokens of fill-in-the-middle models, by the key that may name them. The first three end nothing.
FILL_NAMES = {
    "fim_pre": (
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
FILL_ENDS = ("fim_pad", "fim_rep", "fim_sep")

# These carry the answer's structure in gpt-oss; a reader must see them, so they count as text.
VISIBLE_NAMES = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def find_end_of_generation(
    metadata: Metadata, ids: Mapping[str, int], kinds: list[TokenKind], eos_id: int | None
) -> frozenset[int]:
    """The ids that end an answer; corrects in `kinds` the tokens that the file mislabels.

    `ids` maps token text to id, `kinds` holds one kind per id. Raises `ModelFileError` where a
    special id in the file is no number.
    """
    ends = set(_fill_ends(metadata, ids, kinds))
    for token_id in _present(END_NAMES, ids):
        ends.add(token_id)
        kinds[token_id] = TokenKind.CONTROL
    for token_id in _present(VISIBLE_NAMES, ids):
        kinds[token_id] = TokenKind.USER_DEFINED
    for name in ("eot", "eom"):
        named = read_token_id(metadata, f"tokenizer.ggml.{name}_token_id", len(kinds))
        if named is not None:
            ends.add(named)
    if eos_id is not None:
        ends.add(eos_id)
    _take_back(ends, ids, kinds)
    return frozenset(ends)


def _fill_ends(metadata: Metadata, ids: Mapping[str, int], kinds: list[TokenKind]) -> Iterable[int]:
    for role, names in FILL_NAMES.items():
        token_id = read_token_id(metadata, f"tokenizer.ggml.{role}_token_id", len(kinds))
        if token_id is None:
            found = _present(names, ids)
            if not found:
                continue
            token_id = min(found)
            kinds[token_id] = TokenKind.CONTROL
        if role in FILL_ENDS:
            yield token_id


def _take_back(ends: set[int], ids: Mapping[str, int], kinds: list[TokenKind]) -> None:
    """Undo two names that do not end an answer in the company of others."""
    texts = {name for name in END_NAMES if ids.get(name) in ends}
    has_call = not texts.isdisjoint({"<|call|>", "<|calls|>"})
    has_final = not texts.isdisjoint({"<|return|>", "<|flush|>"})
    if "<|end|>" in texts and has_call and has_final:
        ends.discard(ids["<|end|>"])  # it ends a message there, and the answer has several
        kinds[ids["<|end|>"]] = TokenKind.USER_DEFINED
    if {"<|tool_response>", "</s>"} <= texts:
        ends.discard(ids["</s>"])  # Gemma 4 has it as an HTML tag
        kinds[ids["</s>"]] = TokenKind.NORMAL


def _present(names: Iterable[str], ids: Mapping[str, int]) -> list[int]:
    return [ids[name] for name in names if name in ids]
