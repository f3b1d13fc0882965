"""The kinds of token that a GGUF file tells apart."""

from enum import IntEnum


class TokenKind(IntEnum):
    """A value of `tokenizer.ggml.token_type`; see `gguf.TokenType`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # marks structure, is no text: <|im_start|>
    USER_DEFINED = 4  # text that is always one token
    UNUSED = 5
    BYTE = 6  # one byte, written <0x0A>
