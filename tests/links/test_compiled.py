"""The cache of compiled code follows contents: a moved folder hits, an edited callee misses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def start(folder: Path, cache: Path, arguments: str = "[3]") -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(folder), arguments]
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
