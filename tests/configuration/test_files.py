"""What a YAML file may say beside its devices, and how the command line adds to it."""

from pathlib import Path

import pytest

from raygraft.cli.options import configuration
from raygraft.configuration import Configuration, parse_regions, parse_rules, read_configuration
from raygraft.graph.errors import ConfigurationError
from raygraft.placement.rules import Together


def read(folder: Path, text: str) -> Configuration:
    path = folder / "devices.yaml"
    path.write_text(f"devices: [a, b]\n{text}")
    return read_configuration(path)


@pytest.mark.parametrize(
    ("place", "rules"),
    [
        ("{head: a}", ["head=a"]),
        ("{head: a|b, kind:ffn: '!b'}", ["head=a|b", "kind:ffn=!b"]),
        ("{head: '! a | b'}", ["head=!a|b"]),
        ("{embed: ~head}", ["embed~head"]),
        ("{kind:qkv: '~ kind:out', '*': a}", ["kind:qkv~kind:out", "*=a"]),
        ("[head=a, 'kind:ffn=!b', embed~head]", ["head=a", "kind:ffn=!b", "embed~head"]),
        ("[embed=~head]", ["embed~head"]),
        ("", []),
        ("[]", []),
        ("{}", []),
    ],
)
def test_rules_of_every_form(tmp_path: Path, place: str, rules: list[str]) -> None:
    found = read(tmp_path, f"place: {place}\n").rules
    assert [str(rule) for rule in found] == rules
    assert [isinstance(rule, Together) for rule in found] == ["~" in rule for rule in rules]
    assert parse_rules(rules) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("place: {head: '!'}", "rule head=!: a device's name is missing"),
        ("place: {embed: '~'}", "selector '': cannot read ''"),
        ("place: {embed: ~}", "place: embed: None: expected a selector and a device"),
        ("place: [embed~]", "selector '': cannot read ''"),
        ("regions: [tail]", "regions: expected names with their selectors"),
        ("regions: {tail: 3}", "regions: expected names with their selectors"),
        ("override_tensor: ffn=a", "override_tensor: expected a list of REGEX=DEVICE"),
        ("override_tensor: {ffn: a}", "override_tensor: expected a list of REGEX=DEVICE"),
        ("region: {}", "'region' is not known here; accepted are devices, place, regions"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        read(tmp_path, text)
    assert message in str(error.value)


def test_the_command_line_adds_to_the_file(tmp_path: Path) -> None:
    """Later rules win, and so does the first override."""
    text = "place: {head: a}\nregions: {tail: head, top: embed}\noverride_tensor: [ffn=a]\n"
    read(tmp_path, text)
    path = tmp_path / "devices.yaml"
    found = configuration(path, ["c"], ["tail=c"], None, ["tail=blk.1"], ["attn=b"])
    assert [spec.name for spec in found.devices] == ["a", "b", "c"]
    assert [str(rule) for rule in found.rules] == ["head=a", "tail=c"]
    assert found.regions == {"tail": "blk.1", "top": "embed"}
    assert found.override_tensor == ("attn=b", "ffn=a")


@pytest.mark.parametrize(
    ("texts", "regions"),
    [
        ([], {}),
        (["tail=blk.1+head"], {"tail": "blk.1+head"}),
        ([" tail = blk.1 ", "top=embed"], {"tail": "blk.1", "top": "embed"}),
    ],
)
def test_regions_of_the_command_line(texts: list[str], regions: dict[str, str]) -> None:
    assert parse_regions(texts) == regions


def test_a_region_without_a_selector() -> None:
    with pytest.raises(ConfigurationError, match="region 'tail': expected NAME=SELECTOR"):
        parse_regions(["tail"])
