"""The commands that try FastPO on a machine: the demo, the benchmark, the self-test."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fastpo.cli.group import app
from fastpo.study import shipped

if TYPE_CHECKING:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of pairs, labels, training.")] = 0,
    short: Annotated[bool, typer.Option(help="A few steps of everything, to try it.")] = False,
    kind: Annotated[
        str | None,
        typer.Option(
            "--family",
            help="The tiny model: sdxl (default), or sd3, a transformer of flow matching.",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time, one thread each; one on each core.")
    ] = None,
) -> None:
    """Align a tiny model on real handwritten digits, from nothing to a page, on a CPU."""
    from fastpo.demo.base import PLAIN
    from fastpo.demo.run import run_demo

    family = PLAIN if kind is None else kind
    run_demo(out, seed=seed, short=short, family=family, processes=processes)


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
) -> None:
    """Time the kernels on this machine against eager PyTorch and torch.compile."""
    from fastpo.bench.select import Choice, select
    from fastpo.bench.show import show

    chosen = Choice(
        op,
        objective,
        pairs=pairs,
        latents=latents,
        dtypes=dtype,
        quick=quick,
        budget_seconds=budget_seconds,
    )
    show(select(chosen), out, Console())


@app.command()
def selftest(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long to try faults.")] = 3.0,
    folder: Annotated[
        Path, typer.Option(help="Where to work: its disk is tested; cleaned up at the end.")
    ] = Path("."),
) -> None:
    """Kill, cut off and damage a tiny run here, and see whether anything is lost."""
    from fastpo.selftest.command import selftest

    if not selftest(folder, minutes=minutes):
        raise typer.Exit(1)


@app.command()
def study(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help=f"A study's YAML file, or one of {', '.join(shipped())}."
        ),
    ],
    work: Annotated[
        Path | None,
        typer.Option(help="Folder of all runs; what it holds is not made again. runs/study/NAME"),
    ] = None,
    short: Annotated[bool, typer.Option(help="A few steps of every run, to try it.")] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time, one thread each; one on each core.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="The table of all runs; WORK/study.csv.")] = None,
    page: Annotated[
        Path | None, typer.Option(help="Markdown file that gets tables and figures.")
    ] = None,
    part: Annotated[list[str] | None, typer.Option(help="Only this part; repeat.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; repeat.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed; repeat.")] = None,
    flips: Annotated[
        list[float] | None, typer.Option(help="Only this share of flipped labels; repeat.")
    ] = None,
    make: Annotated[
        bool, typer.Option("--run/--no-run", help="Make runs, or only the table and the page.")
    ] = True,
) -> None:
    """Compare methods on wrong labels of a known share: every run, one table, one page."""
    from fastpo.study.command import study_command
    from fastpo.study.run import Options
    from fastpo.study.trials import Choice

    options = Options(
        work or Path("runs/study") / config.stem,
        csv=csv,
        short=short,
        processes=processes,
        choice=Choice(part or (), method or (), seed or (), flips or ()),
        make=make,
    )
    study_command(config, options, page)
