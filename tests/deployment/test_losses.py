"""A device that dies, and a person who has had enough: what is said, and what is left."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from deployment.processes import COMMANDS, Family, end, eventually, interrupt, start
from tiny_models import write_tiny_llama

pytestmark = pytest.mark.process

CUT = (
    *("--device", "a:threads=1", "--place", "kind:attention=a"),
    *("--device", "b:threads=1", "--place", "kind:ffn=b"),
)
ENDLESS = ("-p", "the cat", "-n", -1, "--temp", 0, "--repeat-penalty", 0.1)
"""An answer that repeats itself, as what was there before is preferred."""
LONG = ("-n", 600)


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for an answer of minutes."""
    return write_tiny_llama(tmp_path_factory.mktemp("long") / "long.gguf", context=100_000)


@contextmanager
def answering(model: Path, *more: object) -> Iterator[subprocess.Popen[str]]:
    """A `raygraft run` in the middle of its answer."""
    process = start(
        *(COMMANDS / "raygraft", "run", "-m", model, *ENDLESS, *CUT, *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.read(20)
        yield process
    finally:
        end(process)


def test_a_killed_device_and_nobody_who_replaces_it(long_model: Path) -> None:
    with answering(long_model, "--on-loss", "fail") as process:
        family = Family(process)
        devices = family.devices()
        assert len(devices) == 2
        killed = time.monotonic()
        devices[0].kill()
        _, said = process.communicate(timeout=20)
        assert time.monotonic() - killed < 10
        assert process.returncode == 1
        assert "Traceback" not in said
        (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "was lost: its actor died" in error
        assert error.startswith(("error: device a on node ", "error: device b on node "))
        assert eventually(lambda: not family.left(), 5), family.left()


@pytest.fixture(scope="module")
def undisturbed(long_model: Path) -> str:
    """An answer of 600 tokens, after its first 20 characters."""
    with answering(long_model, *LONG) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        process.communicate(timeout=60)
    return text


@pytest.mark.parametrize("policy", ["replace", "replan"])
def test_a_killed_device_and_an_answer_that_goes_on(
    long_model: Path, undisturbed: str, policy: str
) -> None:
    with answering(long_model, *LONG, "--on-loss", policy) as process:
        assert process.stdout is not None
        family = Family(process)
        family.devices()[1].kill()
        text = process.stdout.read()
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert text == undisturbed
        assert eventually(lambda: not family.left(), 5), family.left()


def test_ctrl_c_during_an_answer(long_model: Path) -> None:
    with answering(long_model) as process:
        family = Family(process)
        asked = time.monotonic()
        interrupt(process)
        _, said = process.communicate(timeout=20)
        assert time.monotonic() - asked < 8
        assert process.returncode == 130, said
        assert "Traceback" not in said
        assert said.splitlines()[-1] == "interrupted"
        assert eventually(lambda: not family.left(), 5), family.left()


@pytest.mark.parametrize("stage", ["starting Ray", "loading weights"])
def test_ctrl_c_before_an_answer(long_model: Path, stage: str) -> None:
    process = start(
        *(COMMANDS / "raygraft", "run", "-m", long_model, *ENDLESS, *CUT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        assert any(stage in line for line in iter(process.stderr.readline, ""))
        time.sleep(0.2)
        family = Family(process)
        interrupt(process)
        _, rest = process.communicate(timeout=20)
        assert process.returncode == 130, rest
        assert "Traceback" not in rest
        assert "interrupted" in rest
        assert eventually(lambda: not family.left(), 5), family.left()
    finally:
        end(process)
