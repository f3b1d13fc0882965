"""The cache of compiled code follows contents: a moved folder hits, an edited callee misses.

What one process compiles, others wait for; what nobody has used for long goes.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from raygraft.kernels.compile_cache import COMPILING, keep_within_bound

CALLEE = "from .constants import OFFSET\nfrom raygraft.kernels.compiled import compiled\n\n\n"
CALLEE += "@compiled\ndef inner(x):\n    return x + OFFSET\n"
CALLER = "from raygraft.kernels.compiled import compiled\n\nfrom . import callee\n"
CALLER += (
    "from .callee import inner\n\n\n@compiled(nogil=True)\ndef outer(x):\n    return inner(x) * 2\n"
)
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
from probe.caller import outer
value = [outer(x) for x in json.loads(sys.argv[2])]
stats = outer.stats
print(json.dumps([value, sum(stats.cache_hits.values()), sum(stats.cache_misses.values())]))
"""

SAYING = """
import threading, time
from raygraft.kernels.compile_cache import doing

def say():
    while not doing():
        time.sleep(0.01)
    print(doing(), flush=True)

threading.Thread(target=say, daemon=True).start()
"""
ARRAYS = """
import json, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from probe.arrays import doubled
value = float(doubled(np.ones(5)).sum())
print(json.dumps([value, sum(doubled.stats.cache_hits.values())]))
"""
BROKEN = """
import sys
sys.path.insert(0, sys.argv[1])
from filelock import FileLock
from numba import TypingError
from probe.broken import broken
from raygraft.kernels.compile_cache import cache_folder, doing
try:
    broken(1)
except TypingError:
    FileLock(cache_folder() / ".lock").acquire(timeout=0)
    print([doing()])
"""


def write(folder: Path, offset: int) -> Path:
    package = folder / "probe"
    package.mkdir(parents=True)
    sources = {
        "__init__": "",
        "callee": CALLEE,
        "caller": CALLER,
        "constants": f"OFFSET = {offset}\n",
    }
    for name, source in sources.items():
        path = package / f"{name}.py"
        path.write_text(source)
        os.utime(path, (1, 1))  # neither new nor different: only contents count
    return folder


def start(
    folder: Path, cache: Path, arguments: str = "[3]", program: str = PROGRAM
) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "error", "-c", program, str(folder), arguments]
    environment = os.environ | {"RAYGRAFT_CACHE_DIR": str(cache)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def outcome(process: "subprocess.Popen[str]") -> Any:
    output, _ = process.communicate(timeout=120)
    return json.loads(output)


def test_contents_decide(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = write(tmp_path / "first", 10)
    assert outcome(start(first, cache)) == [[26], 0, 1]
    moved = write(tmp_path / "moved", 10)
    edited = write(tmp_path / "edited", 20)
    processes = [start(moved, cache), start(edited, cache)]
    assert outcome(processes[0]) == [[26], 1, 0]
    assert outcome(processes[1]) == [[46], 0, 1], "a constant two imports away has changed"
    assert outcome(start(first, cache)) == [[26], 1, 0], "the old contents still have their entry"


def test_processes_that_compile_at_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = write(tmp_path / "first", 10)
    processes = [start(folder, cache, arguments) for arguments in ("[3]", "[3.5]")]
    assert [outcome(process)[0] for process in processes] == [[26], [27.0]]
    assert outcome(start(folder, cache, "[3, 3.5]")) == [[26, 27.0], 2, 0]


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert outcome(start(write(tmp_path / "first", 10), blocked)) == [[26], 0, 1]


def test_processes_that_need_the_same_at_once_compile_it_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = write(tmp_path / "first", 10)
    (cache / "compiled").mkdir(parents=True)
    with FileLock(cache / "compiled" / ".lock"):  # as another process that compiles
        processes = [start(folder, cache, program=SAYING + PROGRAM) for _ in range(3)]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == COMPILING
    outcomes = [outcome(process) for process in processes]
    assert [value for value, _, _ in outcomes] == [[26]] * 3
    assert sorted(missed for _, _, missed in outcomes) == [0, 0, 1]


def test_a_process_that_dies_while_it_compiles_is_not_waited_for(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = write(tmp_path / "first", 10)
    dying = "from raygraft.kernels import compile_cache as c\nimport time\n"
    dying += "with c.compiling():\n    c.found_or_missed(lambda: None)\n    print('has it')\n"
    dying += "    import sys; sys.stdout.flush(); time.sleep(100)\n"
    first = start(folder, cache, program=dying)
    assert first.stdout is not None
    assert first.stdout.readline().strip() == "has it"
    second = start(folder, cache, program=SAYING + PROGRAM)
    assert second.stdout is not None
    assert second.stdout.readline().strip() == COMPILING
    first.kill()
    first.communicate(timeout=10)
    assert outcome(second) == [[26], 0, 1]


def test_what_cannot_be_compiled_lets_others_have_their_turn(tmp_path: Path) -> None:
    folder = write(tmp_path / "first", 10)
    source = "from raygraft.kernels.compiled import compiled\n\n\n"
    source += "@compiled\ndef broken(x):\n    return x.nothing\n"
    (folder / "probe" / "broken.py").write_text(source)
    process = start(folder, tmp_path / "cache", program=BROKEN)
    assert process.communicate(timeout=120)[0].strip() == "['']"


def test_code_that_is_found_is_loaded_without_what_compiling_needs(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = write(tmp_path / "first", 10)
    asking = PROGRAM + "print(json.dumps('numba.np.arraymath' in sys.modules))"
    said = [start(folder, cache, program=asking).communicate(timeout=120)[0] for _ in range(2)]
    assert [line.splitlines()[1] for line in said] == ["true", "false"]
    assert said[1].splitlines()[0] == "[[26], 1, 0]"


def test_code_with_arrays_is_found_as_well(tmp_path: Path) -> None:
    folder = write(tmp_path / "first", 10)
    source = "import numpy as np\n\nfrom raygraft.kernels.compiled import compiled\n\n\n"
    source += "@compiled\ndef doubled(a):\n    return np.concatenate((a, a)) * 2\n"
    path = folder / "probe" / "arrays.py"
    path.write_text(source)
    os.utime(path, (1, 1))
    for hits in range(2):
        assert outcome(start(folder, tmp_path / "cache", program=ARRAYS)) == [20.0, hits]


def test_sources_that_are_newer_than_the_process_have_no_cache(tmp_path: Path) -> None:
    folder = write(tmp_path / "first", 10)
    later = time.time() + 1000
    os.utime(folder / "probe" / "constants.py", (later, later))
    for _ in range(2):
        assert outcome(start(folder, tmp_path / "cache")) == [[26], 0, 1]


def entry(folder: Path, name: str, age: float) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(1000))
    used = time.time() - age
    os.utime(path, (used, used))
    return path


def test_what_was_unused_longest_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = entry(tmp_path, "a-1/outer.compiled", 300)
    recent = [entry(tmp_path, name, 100) for name in ("a-1/inner.compiled", "c.o")]
    oldest = entry(tmp_path, "b.o", 900)
    lock = entry(tmp_path, ".lock", 1e6)
    draft = entry(tmp_path, "a-1/outer.5d3e", 10)
    left_behind = entry(tmp_path, "a-1/outer.6f70", 10_000)
    keep_within_bound(tmp_path)
    assert all(path.exists() for path in (old, oldest, lock, *recent))
    assert draft.exists()
    assert not left_behind.exists()
    draft.unlink()
    monkeypatch.setenv("RAYGRAFT_COMPILED_BYTES", "2500")
    keep_within_bound(tmp_path)
    assert [path.exists() for path in (oldest, old, *recent, lock)] == [False, False, *[True] * 3]
    monkeypatch.setenv("RAYGRAFT_COMPILED_BYTES", "0")
    keep_within_bound(tmp_path)
    os.utime(tmp_path / "a-1", (1, 1))
    keep_within_bound(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_an_entry_that_is_found_counts_as_used(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = write(tmp_path / "first", 10)
    outcome(start(folder, cache))
    (path,) = cache.glob("compiled/*/outer-*.compiled")
    os.utime(path, (1, 1))
    assert outcome(start(folder, cache)) == [[26], 1, 0]
    assert path.stat().st_mtime > 1
