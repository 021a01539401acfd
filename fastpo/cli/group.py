"""What the commands share: their group, with how errors are reported, and common options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from typer.core import TyperGroup
except ImportError as error:
    raise SystemExit(
        f"fastpo: {error.name} is not installed; the commands need `pip install 'fastpo[eval]'`"
    ) from None

from fastpo._version import __version__
from fastpo.errors import FastPOError
from fastpo.system.library_log import kept_apart
from fastpo.system.process import Rank
from fastpo.system.signals import (
    EXIT_INTERRUPTED,
    EXIT_KEYBOARD,
    Interrupted,
    catch_signals,
)
from fastpo.system.storage import storage_errors

if TYPE_CHECKING:
    from fastpo.config import Config

OLD_SPELLINGS = {"--utilisation": "--utilization"}
"""Options as they were called, and their names now; the old ones are accepted for one release."""
SHARED = ("--debug", "--verbose")


class Commands(TyperGroup):
    """The group of all commands: the options that they share, and how errors are reported."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Takes shared options from anywhere, and old spellings with a warning."""
        args = [_spelled_anew(argument) for argument in args]
        return super().parse_args(ctx, sorted(args, key=lambda a: a not in SHARED))

    def invoke(self, ctx: typer.Context) -> Any:
        """Runs a command; a user error ends the process with exit code 2."""
        try:
            with storage_errors(), kept_apart(shown=ctx.params["verbose"]) as log:
                result = super().invoke(ctx)
            if log.waiting and Rank.of_launch().rank == 0 and not ctx.params["verbose"]:
                tell("[dim]note:[/]", log.told())
            return result
        except FastPOError as error:
            if ctx.params["debug"]:
                raise
            if not error.everywhere or Rank.of_launch().rank == 0:
                tell("[bold red]error:[/]", str(error))
            ctx.exit(error.exit_code)
        except (Interrupted, KeyboardInterrupt) as ending:
            if ctx.params["debug"]:
                raise
            if Rank.of_launch().rank == 0:
                tell("[bold yellow]ended:[/]", str(ending) or "by Ctrl-C")
            ctx.exit(EXIT_INTERRUPTED if isinstance(ending, Interrupted) else EXIT_KEYBOARD)


def _spelled_anew(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if name not in OLD_SPELLINGS:
        return argument
    new = OLD_SPELLINGS[name]
    tell("[bold yellow]warning:[/]", f"{name} is now {new}; the next release drops {name}")
    return new + equals + value


def tell(head: str, text: str) -> None:
    """Prints a line to standard error, its head marked up and its text as it is."""
    Console(stderr=True, soft_wrap=True).print(f"{head} {escape(text)}", highlight=False)


app = typer.Typer(
    name="fastpo",
    cls=Commands,
    help="Align diffusion models with human preferences.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The experiment's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. train.optim.lr=1e-6."),
]


@contextmanager
def configured(path: Path, overrides: list[str] | None) -> Iterator[Config]:
    """Reads a command's configuration, keeps it off all files named there, and ends it cleanly."""
    from fastpo.config import input_paths, load_config
    from fastpo.system.ownership import protecting

    config = load_config(path, overrides or ())
    with catch_signals(), protecting([path, *input_paths(config)]):
        yield config


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show other libraries' messages.")
    ] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
