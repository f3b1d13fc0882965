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
                *(f"--dashboard-agent-listen-port={free_port()}", "--labels=place=head,board=left"),
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
    assert "feed-forward: 3 stages" in done.stdout


def test_on_a_running_cluster(head: Head, tiny_model: Path, expected: str) -> None:
    nodes = ("--attention-node", "place=head", "--feed-forward-node", "left")
    arguments = ("--model", tiny_model, "--prompt", PROMPT, "--address", head.address)
    done = run(sys.executable, SCRIPT, *arguments, *nodes)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_as_a_job(head: Head, tiny_model: Path, expected: str) -> None:
    submit = (COMMANDS / "ray", "job", "submit", "--address", head.dashboard, "--working-dir", ".")
    script = f"python {SCRIPT} --model {tiny_model} --prompt '{PROMPT}' --attention-node left"
    plan = f"python -m raygraft plan -m {tiny_model} --device a:node=left --json"
    began = time.time()
    done = run(*submit, "--", "bash", "-c", f"{script} && {plan}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected in done.stdout
    assert '"asked": true' in done.stdout
    folder = _unpacked(head)
    names = {path.name for path in folder.iterdir()}
    assert {"raygraft", "graph", "actors", "examples", "cluster.yaml"} <= names
    assert not {".venv", ".git", "tests"} & names
    assert not list(folder.rglob("*.gguf"))
    # Only devices import a backend: they took it from the working directory too.
    (compiled,) = (folder / "raygraft/kernels/reference").glob("__pycache__/backend.*.pyc")
    assert compiled.stat().st_mtime > began


def _unpacked(head: Head) -> Path:
    """The working directory as the job's node has it."""
    (folder,) = (head.folder / "ray").glob(
        "session_latest/runtime_resources/working_dir_files/_ray_pkg_*/"
    )
    return folder
