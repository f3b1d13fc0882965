"""examples/three_ways.py: on this machine, and as a job of a running cluster."""

import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from deployment.processes import (
    COMMANDS,
    REPOSITORY,
    end,
    environment,
    eventually,
    free_port,
    run,
    start,
)

from raygraft import LLM, SamplingParams

pytestmark = pytest.mark.process

SCRIPT = "examples/three_ways.py"
PROMPT = "the cat"


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> str:
    """What the uncut model answers."""
    with LLM(tiny_model, runtime="in-process") as llm:
        (answer,) = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24))
    return PROMPT + answer.text


@dataclass(frozen=True)
class Head:
    """A Ray that runs beside the tests."""

    address: str
    dashboard: str
    folder: Path


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head`, with ports and a folder of its own."""
    port, dashboard = free_port(), free_port()
    # A short path: those of Ray's sockets have 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="rg-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "head.log"
        with log.open("w") as output:
            process = start(
                *(COMMANDS / "ray", "start", "--head", "--block", "--num-cpus=2"),
                *("--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder}/ray"),
                *("--include-dashboard=true", f"--dashboard-port={dashboard}"),
                *(f"--dashboard-agent-listen-port={free_port()}", "--labels=place=head"),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                url = f"http://127.0.0.1:{dashboard}"
                answers = eventually(lambda: process.poll() is None and _answers(url), 60)
                assert answers, log.read_text()
                yield Head(f"127.0.0.1:{port}", url, Path(folder))
            finally:
                end(process)


def _answers(url: str) -> bool:
    token = environment()["RAY_AUTH_TOKEN"]
    request = urllib.request.Request(
        f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def test_on_this_machine(tiny_model: Path, expected: str) -> None:
    done = run(sys.executable, SCRIPT, "--model", tiny_model, "--prompt", PROMPT)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert "attention: 2 stages" in done.stdout
    assert "feed-forward: 2 stages" in done.stdout


def test_on_a_running_cluster(head: Head, tiny_model: Path, expected: str) -> None:
    nodes = ("--attention-node", "place=head", "--feed-forward-node", "127.0.0.1")
    arguments = ("--model", tiny_model, "--prompt", PROMPT, "--address", head.address)
    done = run(sys.executable, SCRIPT, *arguments, *nodes)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_as_a_job(head: Head, tiny_model: Path, expected: str) -> None:
    submit = (COMMANDS / "ray", "job", "submit", "--address", head.dashboard, "--working-dir", ".")
    began = time.time()
    done = run(*submit, "--", "python", SCRIPT, "--model", tiny_model, "--prompt", PROMPT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected in done.stdout
    folder = _unpacked(head)
    names = {path.name for path in folder.iterdir()}
    assert {"raygraft", "graph", "actors", "examples", "cluster.yaml"} <= names
    assert not {".venv", ".git", "tests"} & names
    assert not list(folder.rglob("*.gguf"))
    # Only devices import a backend: they took it from the working directory too.
    (compiled,) = (folder / "raygraft/kernels/reference").glob("__pycache__/backend.*.pyc")
    assert compiled.stat().st_mtime > began


def test_the_command_as_a_job(head: Head, tiny_model: Path) -> None:
    submit = (COMMANDS / "ray", "job", "submit", "--address", head.dashboard, "--working-dir", ".")
    command = ("python", "-m", "raygraft", "plan", "--cluster", "cluster.yaml", "-m", tiny_model)
    refused = run(*submit, "--", *command)
    assert refused.returncode == 1, refused.stdout
    assert "device head: no living node matches node=host=box-a" in refused.stdout
    assert "127.0.0.1 (" in refused.stdout
    assert "Traceback" not in refused.stdout


def test_without_the_secret(head: Head, tiny_model: Path) -> None:
    """A cluster with authentication: one line says why it cannot be joined."""
    wrong = environment() | {"RAY_AUTH_TOKEN": "f" * 32}
    command = [COMMANDS / "raygraft", "run", "-m", tiny_model, "-p", PROMPT]
    done = subprocess.run(
        [*command, "--address", head.address, "--json"],
        env=wrong,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert f"error: cannot join the Ray cluster at {head.address}" in done.stderr


def _unpacked(head: Head) -> Path:
    """The working directory as the job's node has it."""
    (folder,) = (head.folder / "ray").glob(
        "session_latest/runtime_resources/working_dir_files/_ray_pkg_*/"
    )
    return folder
