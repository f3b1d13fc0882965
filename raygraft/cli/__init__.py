"""The command line, one file per command."""

from __future__ import annotations


def main() -> None:
    """Run a command. Exit codes: 0, 2 for wrong use or an impossible plan, 1 for a failure."""
    from raygraft.cli.app import app  # noqa: PLC0415  # keep `import raygraft.cli` light

    app()
