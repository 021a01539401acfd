"""The commands: `fastpo --help` lists them.

User errors are reported in one line, with exit code 2, and leave nothing half-written behind;
`--debug` shows the traceback instead. `--verbose` shows what other libraries log. A command that a
signal ends exits with 75 if the same goes on (`train` with `--resume`): `fastpo.system.signals`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
from fastpo.system.library_log import is_of_use, kept_apart
from fastpo.system.process import Rank
from fastpo.system.signals import (
    EXIT_INTERRUPTED,
    EXIT_KEYBOARD,
    Interrupted,
    catch_signals,
)
from fastpo.system.storage import storage_errors
from fastpo.system.words import counted

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
                _tell("[dim]note:[/]", log.told())
            return result
        except FastPOError as error:
            if ctx.params["debug"]:
                raise
            if not error.everywhere or Rank.of_launch().rank == 0:
                _tell("[bold red]error:[/]", str(error))
            ctx.exit(error.exit_code)
        except (Interrupted, KeyboardInterrupt) as ending:
            if ctx.params["debug"]:
                raise
            if Rank.of_launch().rank == 0:
                _tell("[bold yellow]ended:[/]", str(ending) or "by Ctrl-C")
            ctx.exit(EXIT_INTERRUPTED if isinstance(ending, Interrupted) else EXIT_KEYBOARD)


def _spelled_anew(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if name not in OLD_SPELLINGS:
        return argument
    new = OLD_SPELLINGS[name]
    _tell("[bold yellow]warning:[/]", f"{name} is now {new}; the next release drops {name}")
    return new + equals + value


def _tell(head: str, text: str) -> None:
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
def _configured(path: Path, overrides: list[str] | None) -> Iterator[Config]:
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


@app.command()
def init(
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="YAML file to write.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder, .safetensors file, hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder, file, hub id.")] = None,
    gpu: Annotated[str | None, typer.Option(help="As for plan; default: this one's.")] = None,
    objective: Annotated[str, typer.Option(help="dpo, adaptive_dpo, mapo, kto, ...")] = "dpo",
    lora: Annotated[bool | None, typer.Option("--lora/--full", help="Default: what fits.")] = None,
) -> None:
    """Write a commented configuration for a model, data and a GPU."""
    from fastpo.plan.command import init

    method = None if lora is None else ("lora" if lora else "full")
    init(out, model=model, data=data, gpu=gpu, objective=objective, method=method)


@app.command(name="convert-args")
def convert_args(
    command: Annotated[
        str, typer.Argument(help="'accelerate launch train.py ...', or a file with it.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="YAML file to write.")],
    trainer: Annotated[
        str | None, typer.Option(help="diffusers-sd15, diffusers-sdxl, salesforce, mapo, mapo-lora")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes that train.")] = None,
    data: Annotated[str | None, typer.Option(help="Data instead of the command's.")] = None,
) -> None:
    """Write a configuration from another trainer's launch command."""
    from fastpo.convert.command import convert

    file = Path(command)
    text = command
    if len(command) < 4096 and "\n" not in command and file.is_file():
        text = file.read_text(encoding="utf-8")
    with storage_errors():
        draft = convert(text, out, trainer=trainer, processes=processes, data=data)
    for note in draft.notes:
        _tell("[bold yellow]note:[/]", note)
    print(out)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, rtx4090, ...")] = "h100",
    utilization: Annotated[float, typer.Option(help="Share of the GPU's dense peak.")] = 0.4,
    world_size: Annotated[int, typer.Option(help="Processes, one GPU each.")] = 1,
    pairs: Annotated[int | None, typer.Option(help="Pairs in the data.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")] = False,
) -> None:
    """Say what a run will cost: FLOPs, memory, disk, hours. Needs no weights, data or GPU."""
    from fastpo.config import load_config
    from fastpo.plan import make_plan, print_plan

    with Console(stderr=True).status("planning") as spinner:
        planned = make_plan(
            load_config(config, overrides or ()),
            gpu=gpu,
            utilization=utilization,
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
    retry_quarantined: Annotated[
        bool, typer.Option("--retry-quarantined", help="Try the pairs again that were left out.")
    ] = False,
) -> None:
    """Encode images and prompts once, into a cache that training reads."""
    from fastpo.data.prepare import prepare
    from fastpo.models.folder import ModelFolder
    from fastpo.noise import setup_noise
    from fastpo.reference_cache.open import read_visits
    from fastpo.system.trackers import check_trackers

    visits = read_visits(reference)
    if processes is not None and reference != "auto":
        raise typer.BadParameter("--processes is for --reference auto alone")
    with _configured(config, overrides) as resolved:
        check_trackers(resolved.train.trackers)  # hours of encoding later is too late
        model = ModelFolder.resolve(resolved.model)
        setup_noise(resolved, model)  # likewise: timesteps that the model does not have
        cache = prepare(resolved, model=model, retry_quarantined=retry_quarantined)
        tell = Rank.of_launch().rank == 0
        if tell:
            print(f"{counted(len(cache), 'pair')} in {cache.folder}")
            if summary := cache.summary():
                print(summary)
        if reference is not None:
            from fastpo.reference_cache import prepare_reference

            errors = prepare_reference(resolved, visits, processes=processes, model=model)
            if tell:
                print(f"the reference's errors on them in {errors.folder}")


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the run in the folder.")] = False,
    change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="With --resume: change a key from here on, e.g. train.optim.lr=1e-6; repeat.",
        ),
    ] = None,
) -> None:
    """Align the model with the prepared preferences."""
    with _configured(config, overrides) as resolved:  # a mistake is told before torch is imported
        from fastpo.train import train

        train(resolved, resume=resume, overwrite=overwrite, changes=change or ())


@app.command()
def rerun(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    out: Annotated[
        Path | None, typer.Option(help="The new run's folder [RUN-rerun]", show_default=False)
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare weights, metrics and tables bit by bit.")
    ] = False,
) -> None:
    """Train a run again from what it recorded, and say whether the result is equal."""
    from fastpo.train.rerun import rerun

    print(rerun(run, out, check=check))


@app.command()
def consolidate(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run's folder or a checkpoint's.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    average: Annotated[
        bool, typer.Option("--average", help="Take the moving average (train.ema_decay).")
    ] = False,
) -> None:
    """Write a checkpoint's weights as a folder that stock diffusers loads."""
    from fastpo.train.consolidate import consolidate

    print(consolidate(source, out, average=average))


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run's folder or a checkpoint's.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    form: Annotated[
        Literal["kohya", "comfyui", "diffusers"],
        typer.Option("--format", help="Whose names the layers get."),
    ],
    average: Annotated[
        bool, typer.Option("--average", help="Take the moving average (train.ema_decay).")
    ] = False,
) -> None:
    """Write a LoRA as one file for ComfyUI, Automatic1111, sd-scripts or diffusers."""
    from fastpo.train.consolidate import export_lora

    print(export_lora(source, out, form, average=average))


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
    named = [_named(text) for text in weights or ()]
    if out is None and len(named) > 1:
        raise typer.BadParameter(
            "several --weights are compared in a table: name its folder, --out"
        )
    with _configured(config, overrides) as resolved:
        from fastpo.train.consolidate import exported

        run = resolved.train.output_dir
        if out is not None:
            _evaluate_many(resolved, named or [("final", run / "final")], out, average=average)
            return
        from fastpo.evaluate import evaluate

        only = named[0][1] if named else None
        with exported(run, only, average=average) as (folder, step):
            evaluate(resolved, aligned=folder, step=step)


def _named(text: str) -> tuple[str, Path]:
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
    from fastpo.evaluate.many import Candidate, evaluate_many
    from fastpo.evaluate.table_files import show
    from fastpo.train.consolidate import exported

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
    with _configured(source, overrides) as resolved:
        from fastpo.evaluate.many import Candidate
        from fastpo.pairs.sample import pairs_from_model
        from fastpo.train.consolidate import exported

        with exported(resolved.train.output_dir, weights) as (folder, _):
            model = None if folder is None else Candidate(_named(str(weights))[0], folder)
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
    from fastpo.evaluate.score import score_pictures, show
    from fastpo.evaluate.scorers import build_scorers

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
) -> None:
    """Write a cleaned copy of a run's data set, and what changed and why."""
    from fastpo.review.relabel import Rules, relabel

    scorers = [] if by is None else [name.strip() for name in by.split(",")]
    with catch_signals():
        done = relabel(run, out, Rules(threshold, marks, scorers, action))
    told = ", ".join(f"{done[name]:,} {name}" for name in ("kept", "dropped", "tied", "turned"))
    print(f"{told} of {counted(done['pairs'], 'pair')}: {out} (data: {{source: folder}})")
    print("A label that most others speak against may be a taste that few share, and no error.")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of pairs, labels, training.")] = 0,
    short: Annotated[bool, typer.Option(help="A few steps of everything, to try it.")] = False,
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


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; the process exits with 2 at a user error."""
    logging.getLogger("transformers.utils.import_utils").addFilter(is_of_use)
    try:
        app(list(sys.argv[1:] if argv is None else argv), standalone_mode=True)
    except KeyboardInterrupt:  # before a command had begun
        _tell("[bold yellow]ended:[/]", "by Ctrl-C")
        raise SystemExit(EXIT_KEYBOARD) from None


if __name__ == "__main__":
    main()
