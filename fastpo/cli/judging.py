"""The commands that judge: models by their images, images by scorers, labels by a run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from fastpo.cli.group import ConfigPath, Overrides, app, configured
from fastpo.system.ownership import check_claim
from fastpo.system.signals import catch_signals
from fastpo.system.words import counted

if TYPE_CHECKING:
    from fastpo.config import Config


@app.command()
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FOLDER",
            help="Of the aligned model: a checkpoint, a run that has not ended, or an export such "
            "as RUN/ema [RUN/final]; repeat, with --out, for a table of several models",
            show_default=False,
        ),
    ] = None,
    average: Annotated[
        bool, typer.Option("--average", help="The moving average (train.ema_decay).")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A folder for a table of all --weights on each prompt set, with every scorer."
        ),
    ] = None,
) -> None:
    """Sample the base and the aligned model alike, score both, and compare."""
    named = [named_weights(text) for text in weights or ()]
    if out is None and len(named) > 1:
        raise typer.BadParameter(
            "several --weights are compared in a table: name its folder, --out"
        )
    with configured(config, overrides) as resolved:
        from fastpo.train.consolidate import exported

        run = resolved.train.output_dir
        if out is not None:
            _evaluate_many(resolved, named or [("final", run / "final")], out, average=average)
            return
        from fastpo.evaluate import evaluate

        only = named[0][1] if named else None
        with exported(run, only, average=average) as (folder, step):
            evaluate(resolved, aligned=folder, step=step)


def named_weights(text: str) -> tuple[str, Path]:
    """Reads `[NAME=]FOLDER`; without a name it is the run's, and the checkpoint's."""
    name, equals, folder = text.partition("=")
    if equals and "/" not in name:
        return name, Path(folder)
    path = Path(text)
    parts = [part for part in path.absolute().parts if part not in ("final", "checkpoints")]
    return "-".join(parts[-2:] if "checkpoints" in path.parts else parts[-1:]), path


def _evaluate_many(
    config: Config, named: Sequence[tuple[str, Path]], out: Path, *, average: bool
) -> None:
    from fastpo.evaluate.many import TABLE, Candidate, evaluate_many
    from fastpo.evaluate.table_files import show
    from fastpo.train.consolidate import exported

    check_claim(out, TABLE)
    with ExitStack() as stack:
        candidates = []
        for name, path in named:
            folder, _ = stack.enter_context(exported(path, path, average=average))
            candidates.append(Candidate(name, folder))
        table = evaluate_many(config, candidates, out)
    if table is not None:
        show(table, Console())
        print(out / "index.html")


@app.command()
def pairs(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG_OR_TABLE",
            help="A YAML file, whose section evaluate says what to sample and how to score it; or "
            "a .jsonl, .json, .csv or .parquet table of ranked or scored images, or of likes.",
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder to make; of a table a .jsonl file.")
    ],
    overrides: Overrides = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="As for evaluate [the base]")
    ] = None,
    pick: Annotated[
        Literal["extremes", "once", "all"] | None,
        typer.Option(
            help="Of a prompt: best and worst; each image once; all [extremes; of tables all]"
        ),
    ] = None,
    gap: Annotated[float, typer.Option(min=0.0, help="Least difference within a pair.")] = 0.0,
) -> None:
    """Make pairs: from a model's scored samples, from ranked lists, or from likes."""
    if source.suffix not in (".yaml", ".yml"):
        from fastpo.pairs.tables import pairs_from_table

        if overrides or weights:
            raise typer.BadParameter("--set and --weights are for a configuration, not a table")
        print(pairs_from_table(source, out, pick=pick or "all", gap=gap))
        return
    with configured(source, overrides) as resolved:
        from fastpo.evaluate.many import Candidate
        from fastpo.pairs.sample import PAIRS, pairs_from_model
        from fastpo.train.consolidate import exported

        check_claim(out, PAIRS)
        with exported(resolved.train.output_dir, weights) as (folder, _):
            model = None if folder is None else Candidate(named_weights(str(weights))[0], folder)
            made = pairs_from_model(resolved, out, model=model, pick=pick or "extremes", gap=gap)
        if made is not None:
            print(made)


@app.command()
def score(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Of images.")],
    scorers: Annotated[
        list[str],
        typer.Option("--scorer", help="As in evaluate.scorers, e.g. pickscore:DIR; repeat."),
    ],
    prompts: Annotated[
        str | None,
        typer.Option(help="A prompt set in the images' order, e.g. lines:FILE, hpdv2:DIR."),
    ] = None,
    out: Annotated[
        list[Path] | None, typer.Option(help="A .json or .csv file to write; repeat.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images rated at once.")] = 16,
    precision: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option()] = "fp32",
) -> None:
    """Rate images that are there already; prompts from metadata.jsonl or text files beside."""
    from fastpo.evaluate.score import WRITERS, check_new_file, score_pictures, show
    from fastpo.evaluate.scorers import build_scorers

    for file in out or ():  # building scorers may mean to download them
        check_new_file(file, WRITERS)
    built = build_scorers(scorers, batch_size=batch_size, precision=precision)
    with catch_signals():
        show(score_pictures(folders, built, prompts=prompts, out=out or ()), Console())


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `fastpo train` made.")],
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("report"),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "FastPO report",
) -> None:
    """Write one self-contained HTML page about one run or several."""
    from fastpo.report import write_report

    print(write_report(runs, out, title=title))


@app.command()
def minority(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="Folder for table and gallery.")] = Path("minority"),
    pairs: Annotated[
        int, typer.Option(min=1, help="Of the most suspicious, and of the most certain pairs.")
    ] = 100,
    side: Annotated[int, typer.Option(min=32, help="Pixels of the images.")] = 320,
) -> None:
    """Say of every pair how likely its label is wrong; a page to judge the extremes by eye."""
    from fastpo.review.gallery import write_gallery

    print(write_gallery(run, out, pairs=pairs, side=side))


@app.command()
def relabel(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A finished run's folder; with --by a YAML file.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the cleaned data set.")],
    threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Change labels this likely to be wrong.")
    ] = None,
    marks: Annotated[Path | None, typer.Option(help="A reviewer's file, from the gallery.")] = None,
    by: Annotated[str | None, typer.Option(help="SCORER[,SCORER...]: their majority.")] = None,
    action: Annotated[
        Literal["drop", "tie", "turn"] | None,
        typer.Option(help="With wrong labels [--threshold: drop; --marks, --by: turn]"),
    ] = None,
    weigh: Annotated[
        bool,
        typer.Option(help="With --by: pair_weight, from how far apart the images' scores are."),
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="With --by: images rated at once [evaluate.score_batch_size]"),
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(help="With --by [evaluate.score_precision]"),
    ] = None,
) -> None:
    """Write a cleaned copy of a run's data set, and what changed and why."""
    from fastpo.review.relabel import Rules, relabel

    scorers = [] if by is None else [name.strip() for name in by.split(",")]
    with catch_signals():
        rules = Rules(threshold, marks, scorers, action, weigh, batch_size, precision)
        done = relabel(run, out, rules)
    told = ", ".join(f"{done[name]:,} {name}" for name in ("kept", "dropped", "tied", "turned"))
    print(f"{told} of {counted(done['pairs'], 'pair')}: {out} (data: {{source: folder}})")
    print("A label that most others speak against may be a taste that few share, and no error.")
