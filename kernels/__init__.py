"""How regions are computed: one folder per backend behind the seam of `kernels.base`.

| backend     | computes with | for                                     |
|-------------|---------------|-----------------------------------------|
| `cpu`       | Numba         | a CPU's threads: the default            |
| `cuda`      | CuPy          | an NVIDIA GPU                           |
| `reference` | NumPy         | the oracle: every operator, to be read  |

A new backend of ours is one class and one line of `BACKENDS`. One of somebody else's is found by
an entry point of the group `raygraft.backends`, or by path: `my_file.py:MyBackend`.
"""

from __future__ import annotations

import hashlib
import sys
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from raygraft.graph.errors import ConfigurationError, RaygraftError
from raygraft.kernels.base import Backend, BackendOptions

BACKENDS = {
    "cpu": "raygraft.kernels.cpu.backend:CpuBackend",
    "cuda": "raygraft.kernels.cuda.backend:CudaBackend",
    "reference": "raygraft.kernels.reference.backend:ReferenceBackend",
}
"""Name -> module:class, imported when first asked for."""

DEFAULT_BACKEND = "cpu"
GPU_BACKENDS = ("cuda",)
"""Those of ours that run on a GPU: the first one, unless a device names another."""
ENTRY_POINTS = "raygraft.backends"


def create_backend(name: str, options: BackendOptions) -> Backend:
    """The backend of this name, entry point or path.

    Raises ConfigurationError, which lists the known names or says what is wrong with the file or
    the class.
    """
    found = find_backend(name)
    try:
        return found(options)
    except RaygraftError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"backend {name!r} cannot be started: {type(error).__name__}: {error}"
        ) from error


def find_backend(name: str) -> type[Backend]:
    """The class of this name, entry point or path. Raises ConfigurationError as above."""
    found = _find(name)
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise ConfigurationError(
            f"backend {name!r} is no subclass of raygraft.kernels.base.Backend"
        )
    return found


def known_backends() -> tuple[str, ...]:
    """Names of ours, and of installed packages."""
    return (*sorted(BACKENDS), *sorted(point.name for point in entry_points(group=ENTRY_POINTS)))


def check_backend(name: str) -> None:
    """Raise ConfigurationError for a name that is neither known nor a path. Imports nothing."""
    path, _, attribute = name.rpartition(":")
    is_path = path.endswith(".py") and attribute.isidentifier()
    if name not in known_backends() and not is_path:
        raise ConfigurationError(
            f"backend {name!r} is not known; known are {', '.join(known_backends())}, "
            "or a path such as my_file.py:MyBackend"
        )


def _find(name: str) -> object:
    check_backend(name)
    if name in BACKENDS:
        return EntryPoint(name, BACKENDS[name], ENTRY_POINTS).load()
    for point in entry_points(group=ENTRY_POINTS, name=name):
        try:
            return point.load()
        except Exception as error:
            raise ConfigurationError(
                f"backend {name!r}: {point.value} cannot be imported: "
                f"{type(error).__name__}: {error}"
            ) from error
    path, _, attribute = name.rpartition(":")
    return _from_path(Path(path), attribute)


def _from_path(path: Path, attribute: str) -> object:
    """A class of a file, imported under a name that no other file has."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ConfigurationError(f"backend {path}:{attribute}: no such file on this machine")
    name = f"raygraft_backend_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise ConfigurationError(
                f"backend {path}: cannot be imported: {type(error).__name__}: {error}"
            ) from error
    try:
        found: object = getattr(import_module(name), attribute)
    except AttributeError:
        raise ConfigurationError(f"backend {path}: it has no class {attribute}") from None
    return found
