"""One clear error, no traceback, exit code 2: for whatever a person gets wrong."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.command_line import Command, Ended
from tiny_models import truncated, write_tiny_llama


def refused(ended: Ended, *parts: str) -> None:
    """It ended with one error line that says all of `parts`."""
    assert ended.code == 2
    assert ended.out == ""
    assert "Traceback" not in ended.err
    (error,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    for part in parts:
        assert part in error


def damaged(write: Callable[[Path, Path], object], *said: str) -> tuple[object, tuple[str, ...]]:
    return pytest.param(write, said, id=said[0])


@pytest.mark.parametrize(
    ("write", "said"),
    [
        damaged(
            lambda model, out: truncated(model, out, -1000),
            "truncated: output.weight ends at byte",
        ),
        damaged(lambda model, out: truncated(model, out, 500), "truncated: metadata key"),
        damaged(lambda model, out: truncated(model, out, 6), "truncated: the version"),
        damaged(lambda _, out: out.write_bytes(b""), "not a GGUF file: it starts with b''"),
        damaged(lambda _, out: out.write_text("a letter"), "not a GGUF file: it starts with"),
        damaged(lambda _, out: out.mkdir(), "no such file"),
        damaged(
            lambda _, out: write_tiny_llama(out, architecture="gpt5"), "'gpt5'", "known are llama"
        ),
        damaged(
            lambda _, out: write_tiny_llama(out, omit=["blk.1.attn_q.weight"]),
            "blk.1.attn_q.weight is missing",
        ),
        damaged(
            lambda _, out: write_tiny_llama(out, reshape={"blk.1.ffn_down.weight": (64, 64)}),
            "blk.1.ffn_down.weight has the shape (64, 64), expected is (64, 96)",
        ),
        damaged(
            lambda _, out: write_tiny_llama(out, omit=["llama.block_count"]),
            "the metadata lacks llama.block_count",
        ),
        damaged(
            lambda _, out: write_tiny_llama(out, omit=["tokenizer.ggml.tokens"]),
            "tokenizer.ggml.tokens",
        ),
    ],
)
def test_model_files(
    raygraft: Command,
    tiny_model: Path,
    tmp_path: Path,
    write: Callable[[Path, Path], object],
    said: tuple[str, ...],
) -> None:
    path = tmp_path / "damaged.gguf"
    write(tiny_model, path)
    refused(raygraft("plan", "-m", path), "damaged.gguf", *said)


TWO = ("--device", "a", "--device", "b")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--place", "blk.7.attn=cpu"), ("'blk.7.attn' names no region", "blk.0 to blk.1")),
        (("--place", "blk.[=cpu"), ("'blk.['", "such as [0-11]")),
        ((*TWO, "--place", "head=c"), ("rule 1 (head=c)", "no device 'c'", "a, b")),
        (("--place", "kind:attention"), ("'kind:attention'", "SELECTOR=DEVICE")),
        (("--place", "head="), ("name is missing",)),
        (("--device", "a:threads"), ("'threads' has no value", "NAME:key=value")),
        (("--device", "a:thread=1"), ("'thread' is no key of a device", "threads, memory")),
        (("--device", "a:threads=0"), ("device a: threads", "greater than or equal to 1")),
        (("--device", "a:threads=two"), ("device a: threads", "integer")),
        (("--device", "a:memory=lots"), ("'lots' is no amount of memory", "2GiB")),
        (("--device", "a:backend=tpu"), ("backend 'tpu' is not known", "reference")),
        (("--device", "a:regions=blk.["), ("'blk.['",)),
        (("--device", "a:backend=cuda,gpu=one"), ("device a: gpu", "integer")),
        (("--device", "a:backend=cuda,gpu=-1"), ("device a: gpu", "greater than or equal to 0")),
        (("--device", "a:gpu=1"), ("device a: gpu=1", "'cpu' runs on no GPU", "cuda does")),
        (("--device", "a:actor=engine"), ("'engine' cannot be the actor of device a",)),
        (
            ("--device", "a:actor=x", "--device", "b:actor=a"),
            ("device b: actor=a", "device that lives in another"),
        ),
        (
            ("--device", "a:actor=x,node=n0", "--device", "b:actor=x,node=n1"),
            ("device b: actor=x is on node n0 with device a", "this one is on n1"),
        ),
        (("--device", "1a"), ("'1a' cannot be a device's name",)),
        (("--device", "engine"), ("'engine' cannot be a device's name",)),
        (("--device", "a", "--device", "a"), ("two devices are named 'a'",)),
        (
            ("--device", "a:regions=attention"),
            ("no device can run the region embed", "a: it only takes attention"),
        ),
        (
            ("--device", "a:memory=100KiB", "--device", "b:memory=50KiB"),
            ("too small for the model: it needs 673 KiB", "they have 150 KiB", "b 50.0 KiB"),
        ),
        (
            ("--device", "a:memory=100KiB", "--device", "b", "--place", "model=a"),
            ("device a is too small", "rule 1 (model=a)", "need 673 KiB", "it has 100 KiB"),
        ),
        (("-c", "5000"), ("a context of 5000 tokens", "1 to 256")),
        (
            ("--cache-type", "q8_0"),
            ("no device can run", "a q8_0 cache needs keys of a multiple of 32 numbers, not 16"),
        ),
        (("--devices", "nowhere.yaml"), ("nowhere.yaml: cannot be read",)),
    ],
    ids=" ".join,
)
def test_devices_and_rules(
    raygraft: Command, tiny_model: Path, arguments: tuple[str, ...], said: tuple[str, ...]
) -> None:
    refused(raygraft("plan", "-m", tiny_model, *arguments), *said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("devices: [a\n", ("no YAML: line 2, column 1",)),
        ("devices: a\tb: c\n\x00", ("no YAML",)),
        ("", ("no devices", "metadata.raygraft.devices")),
        ("- a\n", ("no devices",)),
        ("devices: []\n", ("no devices",)),
        ("devices: a\n", ("no devices",)),
        ("metadata: {raygraft: 1}\n", ("no devices",)),
        ("devices: [7]\n", ("devices: 7 is no device",)),
        ("devices: [{threads: 1}]\n", ("device without a name: name",)),
        ("devices: [{name: a, memory: 2 apples}]\n", ("device a: memory: '2 apples'",)),
        (
            "devices: [a]\nrules: {}\n",
            ("'rules' is not known here", "devices, place, regions, override_tensor"),
        ),
        ("devices: [a]\nplace: a\n", ("place: expected selectors",)),
        ("devices: [a]\nplace: {head: 1}\n", ("place: head: ", "1")),
        ("devices: [a]\nplace: {1: a}\n", ("place: 1: ", "a")),
        ("devices: [a]\nplace: [{head: a}]\n", ("place:", "{'head': 'a'}")),
    ],
    ids=repr,
)
def test_device_files(
    raygraft: Command, tmp_path: Path, tiny_model: Path, text: str, said: tuple[str, ...]
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    refused(raygraft("plan", "-m", tiny_model, "--devices", path), "wrong.yaml", *said)


@pytest.mark.parametrize("arguments", [(), ("-p", "a", "-f", "b"), ("-f", "nowhere.txt")])
def test_prompts_that_are_not_there(
    raygraft: Command, tiny_model: Path, arguments: tuple[str, ...]
) -> None:
    refused(raygraft("run", "-m", tiny_model, *arguments))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "--temp", "-1"), "--temp"),
        (("plan", "--nonsense"), "--nonsense"),
        (("plan", "--device"), "--device"),
        (("bench", "--cache-type", "f64"), "'f64' is not one of 'f32', 'f16', 'q8_0'"),
        (("fly",), "fly"),
    ],
)
def test_wrong_use(raygraft: Command, arguments: tuple[str, ...], said: str) -> None:
    """Typer says these, in a frame of its own."""
    ended = raygraft(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert "Traceback" not in ended.err
    assert said in ended.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "-p", "the cat " * 100), ("the prompt has ", "the context holds 256")),
        (("run", "-p", "the cat sat", "-c", "2"), ("the context holds 2",)),
        (("run", "-p", ""), ("the prompt is empty",)),
        (("chat", "--system", "Be short. " * 100), ("the prompt has ", "the context holds 256")),
    ],
    ids=["longer than the model's context", "longer than -c", "empty", "system message"],
)
def test_prompts_are_refused_before_any_device_is_started(
    raygraft: Command,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said: tuple[str, ...],
) -> None:
    monkeypatch.setattr("raygraft.llm._start_fleet", None)
    refused(raygraft(*arguments, "-m", tiny_model), *said)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_node_that_is_not_there(raygraft: Command, tiny_model: Path) -> None:
    arguments = ("-m", tiny_model, "-p", "a", "--device", "a:node=nowhere")
    refused(raygraft("run", *arguments), "no living node matches node=nowhere")


@pytest.mark.process
def test_a_cluster_that_is_not_there(tiny_model: Path) -> None:
    """Said at once, by a process that is in no cluster yet."""
    command = [sys.executable, "-m", "raygraft", "plan", "-m", str(tiny_model)]
    done = subprocess.run(
        [*command, "--address", "127.0.0.1:1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: cannot join the Ray cluster at 127.0.0.1:1: " in done.stderr
