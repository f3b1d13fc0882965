"""What a person writes about devices, and what is understood."""

from pathlib import Path

import pytest

from raygraft.configuration import (
    parse_device,
    parse_devices,
    parse_rules,
    parse_size,
    read_configuration,
)
from raygraft.graph.errors import ConfigurationError
from raygraft.placement.devices import DeviceSpec


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        (4096, 4096),
        ("4096B", 4096),
        ("1k", 1000),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("500MB", 500_000_000),
        ("1.5 MiB", 1_572_864),
        ("2GiB", 2 * 2**30),
        ("2gib", 2 * 2**30),
        (" 2G ", 2_000_000_000),
    ],
)
def test_sizes(text: object, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "1i", "-1GiB", "1TiBs", "1 000", "0x10", "two", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="no amount of memory"):
        parse_size(text)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("a", DeviceSpec("a")),
        ("a:", DeviceSpec("a")),
        ({"name": "a"}, DeviceSpec("a")),
        (DeviceSpec("a", threads=3), DeviceSpec("a", threads=3)),
        ("a:threads=2,memory=2GiB", DeviceSpec("a", threads=2, memory=2**31)),
        ("a: threads = 2 , node=10.0.0.7", DeviceSpec("a", threads=2, node="10.0.0.7")),
        ("a:node=board=left", DeviceSpec("a", node="board=left")),
        ("a:regions=attention+head", DeviceSpec("a", regions=("attention", "head"))),
        ({"name": "a", "regions": ["blk.[0-3]"]}, DeviceSpec("a", regions=("blk.[0-3]",))),
        ({"name": "a", "threads": None, "node": None}, DeviceSpec("a")),
        ("box-2_b:backend=reference", DeviceSpec("box-2_b", "reference")),
        ("a:backend=cuda,gpu=1", DeviceSpec("a", "cuda", gpu=1)),
        ({"name": "a", "backend": "b.py:B", "gpu": 0}, DeviceSpec("a", "b.py:B", gpu=0)),
        ("a:actor=both", DeviceSpec("a", actor="both")),
    ],
    ids=str,
)
def test_devices(device: object, expected: DeviceSpec) -> None:
    assert parse_device(device) == expected  # type: ignore[arg-type]


def test_rules_in_all_their_forms() -> None:
    texts = ["kind:attention=a", "head=a|b"]
    assert [str(rule) for rule in parse_rules(texts)] == texts
    assert parse_rules({"kind:attention": "a", "head": "a | b"}) == parse_rules(texts)
    assert parse_rules(None) == ()


def test_a_file_of_devices(tmp_path: Path) -> None:
    path = tmp_path / "devices.yaml"
    path.write_text(
        "devices:\n"
        "  - {name: a, threads: 2, memory: 1GiB, regions: [attention]}\n"
        "  - b:node=board=left\n"
        "place:\n"
        "  kind:attention: a\n"
        "  head: a|b\n"
    )
    read = read_configuration(path)
    assert read.devices == parse_devices(
        ["a:threads=2,memory=1GiB,regions=attention", "b:node=board=left"]
    )
    assert [str(rule) for rule in read.rules] == ["kind:attention=a", "head=a|b"]


def test_a_cluster_file_holds_the_same_below_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "cluster_name: mine\n"
        "metadata:\n"
        "  owner: me\n"
        "  raygraft: {devices: [a, b], place: ['kind:ffn=b']}\n"
    )
    read = read_configuration(path)
    assert [device.name for device in read.devices] == ["a", "b"]
    assert [str(rule) for rule in read.rules] == ["kind:ffn=b"]


def test_two_devices_of_one_name() -> None:
    with pytest.raises(ConfigurationError, match="two devices are named 'a'"):
        parse_devices(["a", {"name": "a"}])
