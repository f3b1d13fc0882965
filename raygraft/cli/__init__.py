"""The command line, one file per command."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run a command. Exit codes: 0, 2 for wrong use or an impossible plan, 1 for a failure."""
    import click  # noqa: PLC0415  # keep `import raygraft.cli` light

    from raygraft.cli.app import app  # noqa: PLC0415
    from raygraft.graph.errors import RaygraftError  # noqa: PLC0415

    try:
        code = app(standalone_mode=False)
    except RaygraftError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except click.exceptions.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.exceptions.Abort):
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code or 0)
