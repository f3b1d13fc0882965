"""Chat templates: a conversation as the text that a model was trained on.

A template is a Jinja program that comes with the model file, so it is run in a sandbox. The
environment is that of Hugging Face transformers, for which templates are written:
https://huggingface.co/docs/transformers/chat_templating.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from raygraft.graph.errors import ModelFileError, RequestError
from raygraft.text.tokenizer import Tokenizer

# ChatML, for files without a template.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# What a template may raise besides Jinja's own errors: it is a program, and it may be wrong.
_PROGRAM_ERRORS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


class _Generation(Extension):
    """Accepts `{% generation %}`, with which transformers marks what the model wrote."""

    tags = {"generation"}  # noqa: RUF012 (Jinja reads it from the class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the two tags, as if the tags were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Renders conversations with one template.

    `source` None means ChatML. Raises `ModelFileError` where the template is no Jinja.
    """

    def __init__(
        self, source: str | None, bos_token: str | None = None, eos_token: str | None = None
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _format_now
        try:
            self._template = environment.from_string(DEFAULT_TEMPLATE if source is None else source)
        except TemplateSyntaxError as error:
            raise ModelFileError(
                f"tokenizer.chat_template, line {error.lineno}: {error.message}"
            ) from error
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer) -> "ChatTemplate":
        """The template of a model, with the model's own tokens. Raises `ModelFileError`."""
        bos_token, eos_token = (
            None if token_id is None else tokenizer.token_bytes(token_id).decode("utf-8", "replace")
            for token_id in (tokenizer.bos_id, tokenizer.eos_id)
        )
        return cls(tokenizer.chat_template, bos_token, eos_token)

    def render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; a message has a `role` and a `content`.

        With `add_generation_prompt`, the text ends where the model's answer begins. Many
        templates write the beginning-of-text token themselves: encode such a text without
        `add_special`, or it begins twice. Raises `RequestError` for a message without role or
        content, and where the template refuses the conversation.
        """
        for position, message in enumerate(messages):
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise RequestError(f"message {position} has no text as its {key!r}: {message}")
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except (TemplateError, *_PROGRAM_ERRORS) as error:
            raise RequestError(f"the model's chat template: {error}") from error


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _format_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which a prompt is not.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
