"""From LLVM code to functions in memory, with compiled objects kept in the user's cache folder.

The key of an object is what the code is written from (its name and the sources that write it), the
processor, and LLVM's version: writing LLVM code from Python takes as long as many a model's load.
Like Numba's cache (`raygraft.kernels.compiled`) it lies under `compiled`, within the same bound,
and is safe for processes that write at once: a file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba.core import config
from numpy.typing import NDArray

from raygraft.kernels.compile_cache import cache_folder, compiling, found_or_missed, used
from raygraft.kernels.compiled import content_key, load_object

_made: dict[str, NDArray[np.int64]] = {}
"""By title: addresses, which live as long as the process, as programs hold them."""


def compile_module(
    title: str, write: Callable[[], ir.Module], functions: Sequence[str]
) -> NDArray[np.int64]:
    """Addresses of the functions of a module, which is written if it is not in the cache.

    The same array for the same title, whichever threads ask for it.
    """
    with compiling():
        if title not in _made:
            _made[title] = _loaded(title, write, functions)
    return _made[title]


def _loaded(
    title: str, write: Callable[[], ir.Module], functions: Sequence[str]
) -> NDArray[np.int64]:
    name = config.CPU_NAME or llvm.get_host_cpu_name()
    features = config.CPU_FEATURES
    if features is None:
        features = "" if config.CPU_NAME else llvm.get_host_cpu_features().flatten()
    words = (title, _sources(), name, features, llvmlite.__version__)
    path = cache_folder() / f"{hashlib.sha256(repr(words).encode()).hexdigest()[:32]}.o"
    found = found_or_missed(lambda: _read(path))
    if found is None:
        found = _compile(write(), name, features)
        _write(path, found)
    engine = load_object(found)
    addresses = [engine.get_function_address(each) for each in functions]
    return np.array(addresses, np.int64)


def _compile(module: ir.Module, cpu: str, features: str) -> bytes:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=cpu, features=features, opt=3, jit=True
    )
    parsed = llvm.parse_assembly(str(module))
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    llvm.create_pass_builder(machine, options).getModulePassManager().run(
        parsed, llvm.create_pass_builder(machine, options)
    )
    found: bytes = machine.emit_object(parsed)
    return found


@functools.cache
def _sources() -> str:
    """A digest of the files that write code."""
    here = Path(__file__).parent
    writers = (here / f"{name}.py" for name in ("lanes", "products", "rounding"))
    return content_key([*writers, *sorted((here / "formats").glob("*.py"))])


def _read(path: Path) -> bytes | None:
    try:
        found = path.read_bytes()
    except OSError:
        return None
    used(path)
    return found


def _write(path: Path, data: bytes) -> None:
    """A cache that cannot be written costs time, nothing else."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).replace(path)
