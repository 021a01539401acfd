"""The commands: `fastpo --help` lists them.

User errors are reported in one line, with exit code 2, and leave nothing half-written behind;
`--debug` shows the traceback instead. `--verbose` shows what other libraries log. A command that a
signal ends exits with 75 if the same goes on (`train` with `--resume`): `fastpo.system.signals`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from fastpo.cli.group import app, tell

# isort: split
# In the order of `fastpo --help`.
from fastpo.cli import training as training

# isort: split
from fastpo.cli import judging as judging

# isort: split
from fastpo.cli import trying as trying

# isort: split
from fastpo.system.library_log import is_of_use
from fastpo.system.signals import EXIT_KEYBOARD


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; the process exits with 2 at a user error."""
    logging.getLogger("transformers.utils.import_utils").addFilter(is_of_use)
    try:
        app(list(sys.argv[1:] if argv is None else argv), standalone_mode=True)
    except KeyboardInterrupt:  # before a command had begun
        tell("[bold yellow]ended:[/]", "by Ctrl-C")
        raise SystemExit(EXIT_KEYBOARD) from None
