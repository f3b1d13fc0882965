"""Processes of their own for these tests, and what they leave behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parent.parent.parent
COMMANDS = Path(sys.executable).parent
"""Where `raygraft` and `ray` are."""


def environment() -> dict[str, str]:
    """This environment, joined to no cluster, with a secret that only these processes share."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    own.pop("PYTHONDONTWRITEBYTECODE", None)
    return own | {
        "PATH": f"{COMMANDS}{os.pathsep}{own['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def start(*command: object, **options: object) -> subprocess.Popen[str]:
    """Start a command as the leader of a process group, as a terminal does."""
    return subprocess.Popen(
        [str(part) for part in command],
        env=environment(),
        cwd=REPOSITORY,
        text=True,
        start_new_session=True,
        **options,  # type: ignore[call-overload]
    )


def run(*command: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and nothing of it longer than `timeout` seconds."""
    process = start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        end(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def end(process: subprocess.Popen[str]) -> None:
    """Kill what a test has started, with all below it."""
    if process.poll() is None:
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def eventually(condition: Callable[[], object], seconds: float) -> bool:
    """Whether a condition holds within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class Family:
    """All processes below one, and the files of shared memory that they have mapped."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.members = psutil.Process(process.pid).children(recursive=True)
        self.shared = {path for member in self.members for path in _shared_memory(member.pid)}

    def devices(self) -> list[psutil.Process]:
        """The processes of device actors."""
        return [member for member in self.members if "ray::RayDevice" in _title(member)]

    def left(self) -> list[str]:
        """What is still there of it."""
        alive = [
            f"{member.pid} {_title(member)}"
            for member in self.members
            if member.is_running() and member.status() != psutil.STATUS_ZOMBIE
        ]
        return alive + [path for path in self.shared if Path(path).exists()]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _shared_memory(pid: int) -> set[str]:
    """Files in /dev/shm that a process has mapped, and that still have a name there."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    return set(re.findall(r"(/dev/shm/\S+)$", maps, re.MULTILINE))


def interrupt(process: subprocess.Popen[str]) -> None:
    """Ctrl-C: a terminal signals every process of the group."""
    os.killpg(process.pid, signal.SIGINT)
