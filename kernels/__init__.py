"""How regions are computed: one folder per backend behind the seam of `kernels.base`.

| backend     | computes with | for                                     |
|-------------|---------------|-----------------------------------------|
| `reference` | NumPy         | the oracle: every operator, to be read  |

A new backend is one class and one line of `BACKENDS`.
"""

from __future__ import annotations

from importlib import import_module

from raygraft.graph.errors import ConfigurationError
from raygraft.kernels.base import Backend, BackendOptions

BACKENDS = {
    "reference": "raygraft.kernels.reference.backend:ReferenceBackend",
}
"""Name -> module:class, imported when first asked for."""

DEFAULT_BACKEND = "reference"


def create_backend(name: str, options: BackendOptions) -> Backend:
    """The backend of this name. Raises ConfigurationError, which lists the known names."""
    if name not in BACKENDS:
        raise ConfigurationError(
            f"backend {name!r} is not known; known are {', '.join(sorted(BACKENDS))}"
        )
    module, _, attribute = BACKENDS[name].partition(":")
    backend: Backend = getattr(import_module(module), attribute)(options)
    return backend
