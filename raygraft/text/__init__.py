"""Text on its way in and out: tokenizer, chat templates, stop strings."""

from raygraft.text.chat import DEFAULT_TEMPLATE, ChatTemplate
from raygraft.text.detokenizer import Detokenizer
from raygraft.text.pre_tokenizers import PRE_TOKENIZERS
from raygraft.text.stops import StopMatcher
from raygraft.text.tokenizer import Tokenizer

__all__ = [
    "DEFAULT_TEMPLATE",
    "PRE_TOKENIZERS",
    "ChatTemplate",
    "Detokenizer",
    "StopMatcher",
    "Tokenizer",
]
