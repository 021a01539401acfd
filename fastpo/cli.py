"""The commands `fastpo plan | prepare | train | consolidate | evaluate | report | demo | bench`.

What a user can mend is told in one line, with exit code 2, and nothing half-written is left behind;
`--debug` shows where it came from.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
except ImportError as error:
    raise SystemExit(
        f"fastpo: {error.name} is not installed; the commands need `pip install 'fastpo[eval]'`"
    ) from None

from fastpo._version import __version__
from fastpo.errors import FastPOError

app = typer.Typer(
    name="fastpo",
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
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, rtx4090, ...")] = "h100",
    utilisation: Annotated[float, typer.Option(help="Share of the GPU's dense peak.")] = 0.4,
    world_size: Annotated[int, typer.Option(help="Processes, one GPU each.")] = 1,
    pairs: Annotated[int | None, typer.Option(help="Pairs in the data.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")] = False,
    debug: Debug = False,
) -> None:
    """Say what a run will cost: FLOPs, memory, disk, hours. Needs no weights, data or GPU."""
    from fastpo.config import load_config
    from fastpo.plan import make_plan, print_plan

    with Console(stderr=True).status("planning") as spinner:
        planned = make_plan(
            load_config(config, overrides or ()),
            gpu=gpu,
            utilisation=utilisation,
            world_size=world_size,
            pairs=pairs,
            status=spinner.update,
        )
    if as_json:
        print(planned.model_dump_json(indent=2))
    else:
        print_plan(planned, Console())


@app.command()
def prepare(
    config: ConfigPath,
    overrides: Overrides = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="K|auto",
            help="Also compute the reference's errors on K visits of each pair, for "
            "train.reference: cached; auto: on what the configured run draws.",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="For --reference auto: processes that will train [this launch's]"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Encode images and prompts once, into a cache that training reads."""
    from fastpo.config import load_config
    from fastpo.data.prepare import prepare
    from fastpo.models.folder import ModelFolder
    from fastpo.system.process import Rank

    visits = _visits(reference)
    if processes is not None and reference != "auto":
        raise typer.BadParameter("--processes is for --reference auto alone")
    resolved = load_config(config, overrides or ())
    model = ModelFolder.resolve(resolved.model)
    cache, tell = prepare(resolved, model=model), Rank.of_launch().rank == 0
    if tell:
        print(f"{len(cache)} pairs in {cache.folder}")
    if reference is not None:
        from fastpo.reference_cache import prepare_reference

        errors = prepare_reference(resolved, visits, processes=processes, model=model)
        if tell:
            print(f"the reference's errors on them in {errors.folder}")


def _visits(reference: str | None) -> int | None:
    if reference is None or reference == "auto":
        return None
    if reference.isdecimal() and int(reference) > 0:
        return int(reference)
    raise typer.BadParameter(f"must be a number of visits, or auto; got {reference!r}")


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the run in the folder.")] = False,
    debug: Debug = False,
) -> None:
    """Align the model with the prepared preferences."""
    from fastpo.config import load_config
    from fastpo.train import train

    train(load_config(config, overrides or ()), resume=resume, overwrite=overwrite)


@app.command()
def consolidate(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run's folder or a checkpoint's.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    average: Annotated[
        bool, typer.Option("--average", help="Take the moving average (train.ema_decay).")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint's weights as a folder that stock diffusers loads."""
    from fastpo.train.consolidate import consolidate

    print(consolidate(source, out, average=average))


@app.command()
def evaluate(config: ConfigPath, overrides: Overrides = None, debug: Debug = False) -> None:
    """Sample the base and the aligned model alike, score both, and compare."""
    from fastpo.config import load_config
    from fastpo.evaluate import evaluate

    evaluate(load_config(config, overrides or ()))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `fastpo train` made.")],
    out: Annotated[Path, typer.Option(help="Folder for the page and its pictures.")] = Path(
        "report"
    ),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "FastPO report",
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML page about one run or several."""
    from fastpo.report import write_report

    print(write_report(runs, out, title=title))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of pairs, labels, training.")] = 0,
    short: Annotated[bool, typer.Option(help="A few steps of everything, to try it.")] = False,
    debug: Debug = False,
) -> None:
    """Align a tiny SDXL on real handwritten digits, from nothing to a page, on a CPU."""
    from fastpo.demo.run import run_demo

    run_demo(out, seed=seed, short=short)


@app.command()
def bench(
    op: Annotated[str, typer.Option(help="loss or noise.")] = "loss",
    objective: Annotated[
        list[str] | None, typer.Option(help="Objective (or prediction, for the noise); repeat.")
    ] = None,
    pairs: Annotated[list[int] | None, typer.Option(help="Pairs in the batch; repeat.")] = None,
    latents: Annotated[list[str] | None, typer.Option(help="sdxl, sd15 or video; repeat.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16 or fp32; repeat.")] = None,
    quick: Annotated[bool, typer.Option(help="One small case, a few seconds.")] = False,
    budget_seconds: Annotated[float, typer.Option(help="Stop in time; important first.")] = 600,
    out: Annotated[Path | None, typer.Option(help="CSV file for all rows.")] = None,
    debug: Debug = False,
) -> None:
    """Time the kernels on this machine against eager PyTorch and torch.compile."""
    from fastpo.bench.select import select
    from fastpo.bench.show import show

    run = select(op, objective, pairs, latents, dtype, quick=quick, budget_seconds=budget_seconds)
    show(run, out, Console())


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; the process exits with 2 at an error the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # transformers warns of image processors that nothing here uses, at every start.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(arguments, standalone_mode=True)
    except FastPOError as error:
        if "--debug" in arguments:
            raise
        Console(stderr=True, soft_wrap=True).print(
            f"[bold red]error:[/] {_escape(str(error))}", highlight=False
        )
        sys.exit(2)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
