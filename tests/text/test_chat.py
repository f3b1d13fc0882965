import re
from datetime import datetime

import pytest

from raygraft.graph.errors import ModelFileError, RequestError
from raygraft.text import ChatTemplate, Tokenizer

from .vocabularies import make_named

USER = {"role": "user", "content": "What is gravity?"}


def test_the_demo_model_s_template(
    demo_tokenizer: Tokenizer, oracle_cases: list[dict[str, object]]
) -> None:
    template = ChatTemplate.for_tokenizer(demo_tokenizer)
    prompts = {case["name"]: case["prompt"] for case in oracle_cases}
    assert template.render([USER]) == prompts["chat_hello"]


def test_without_a_template_it_is_chatml() -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER]
    spoken = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is gravity?<|im_end|>\n"
    )
    template = ChatTemplate(None)
    assert template.render(messages) == spoken + "<|im_start|>assistant\n"
    assert template.render(messages, add_generation_prompt=False) == spoken


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|</s>"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),  # blocks leave no blank lines
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for m in messages %}{% break %}{% endfor %}z", "z"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "What is gravity?"),
        ("{{ tools is none }} {{ nothing }}", "True "),
    ],
)
def test_what_templates_are_written_for(source: str, text: str) -> None:
    assert ChatTemplate(source, "<s>", "</s>").render([USER]) == text


def test_a_model_s_own_tokens() -> None:
    metadata = make_named(["<s>", "</s>"], bos=3, eos=4)
    metadata["tokenizer.chat_template"] = "{{ bos_token + messages[0].content + eos_token }}"
    template = ChatTemplate.for_tokenizer(Tokenizer.from_metadata(metadata))
    assert template.render([USER]) == "<s>What is gravity?</s>"


def test_the_date() -> None:
    year = ChatTemplate("{{ strftime_now('%Y') }}").render([USER])
    assert year in {str(datetime.now().year), str(datetime.now().year - 1)}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "chat template: can only concatenate str"),
        ("{{ nothing.nothing }}", "'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_templates_that_refuse(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        ChatTemplate(source).render([USER])


def test_a_template_that_is_no_jinja() -> None:
    with pytest.raises(ModelFileError, match=r"tokenizer.chat_template, line 2: "):
        ChatTemplate("x\n{% if %}")


@pytest.mark.parametrize("message", [{}, {"role": "user"}, {"content": "x"}])
def test_messages_that_lack_something(message: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="message 1 has no text as its"):
        ChatTemplate(None).render([USER, message])
