"""The command line, one file per command."""

from __future__ import annotations

import os
import sys

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C has ended, as a shell gives it."""


def main() -> None:
    """Run a command. Exit codes: 0, 2 for wrong use or an impossible plan, 1 for a failure."""
    from raygraft.cli.app import app  # noqa: PLC0415  # keep `import raygraft.cli` light

    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _leave()
        raise


def _leave() -> None:
    """End this process now, with what Ray has started for it.

    An interrupt comes at any point. A thread in the middle of compiled code aborts the process when
    the interpreter goes from under it, as it does in an orderly exit.
    """
    if ray := sys.modules.get("ray"):
        ray.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)
