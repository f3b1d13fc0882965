"""From LLVM code to functions in memory, with compiled objects kept in the user's cache folder.

The key of an object is the code itself, the processor, and LLVM's version; like Numba's cache
(`raygraft.kernels.compiled`) it lies under `compiled`, and is safe for processes that write at
once: a file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba.core import config
from numpy.typing import NDArray

from raygraft.kernels.compiled import cache_folder

_engines: list[llvm.ExecutionEngine] = []
"""They own the code; functions live as long as the process."""


def compile_module(module: ir.Module, functions: Sequence[str]) -> NDArray[np.int64]:
    """Addresses of the functions of a module."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    text = str(module)
    name = config.CPU_NAME or llvm.get_host_cpu_name()
    features = config.CPU_FEATURES
    if features is None:
        features = "" if config.CPU_NAME else llvm.get_host_cpu_features().flatten()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=name, features=features, opt=3, jit=True
    )
    words = (text, name, features, llvmlite.__version__)
    path = cache_folder() / f"{hashlib.sha256(repr(words).encode()).hexdigest()[:32]}.o"
    found = _read(path)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(_EMPTY), machine)
    if found is None:
        parsed = llvm.parse_assembly(text)
        options = llvm.create_pipeline_tuning_options(speed_level=3)
        llvm.create_pass_builder(machine, options).getModulePassManager().run(
            parsed, llvm.create_pass_builder(machine, options)
        )
        found = machine.emit_object(parsed)
        _write(path, found)
    engine.add_object_file(llvm.ObjectFileRef.from_data(found))
    engine.finalize_object()
    _engines.append(engine)
    return np.array([engine.get_function_address(each) for each in functions], np.int64)


_EMPTY = ""


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _write(path: Path, data: bytes) -> None:
    """A cache that cannot be written costs time, nothing else."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).replace(path)
