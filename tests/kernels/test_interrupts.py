"""Ctrl-C while code is linked: it comes afterwards, and the code is whole."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from raygraft.kernels.compile_cache import compiling
from raygraft.kernels.interrupts import held_back

LINKED = """
import os, signal
from llvmlite.binding.executionengine import ExecutionEngine

signal.signal(signal.SIGINT, signal.default_int_handler)
calls = []
set_object_cache = ExecutionEngine.set_object_cache

def interrupted(asked):
    def call(*arguments):
        if not calls:
            os.kill(os.getpid(), signal.SIGINT)
        calls.append(arguments)
        return asked(*arguments)
    return call

ExecutionEngine.set_object_cache = lambda self, notify, get: set_object_cache(
    self, interrupted(notify), interrupted(get)
)

from raygraft.kernels.compiled import compiled

@compiled
def twice(x):
    return 2 * x

try:
    twice(3)
except KeyboardInterrupt:
    assert calls, "LLVM asked nothing"
    print("interrupted,", twice(3))
"""


def test_an_interrupt_waits_for_the_end() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), compiling(), compiling():
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_does_not_wait() -> None:
    reached = 0
    with pytest.raises(KeyboardInterrupt), held_back():
        signal.raise_signal(signal.SIGINT)
        reached += 1
        signal.raise_signal(signal.SIGINT)
        reached += 1
    assert reached == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_are_left_alone() -> None:
    handlers = []

    def hold() -> None:
        with held_back():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


def test_an_interrupt_while_llvm_links(tmp_path: Path) -> None:
    script = tmp_path / "linked.py"
    script.write_text(LINKED)
    environment = os.environ | {"RAYGRAFT_CACHE_DIR": str(tmp_path)}
    for _ in ("compiled", "loaded"):
        made = subprocess.run(
            [sys.executable, script], env=environment, capture_output=True, text=True, check=False
        )
        assert made.stdout == "interrupted, 6\n", made.stderr
        assert "Exception ignored" not in made.stderr
