"""The commands from a model and data to trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from fastpo.cli.group import ConfigPath, Overrides, app, configured, tell
from fastpo.system.process import Rank
from fastpo.system.storage import storage_errors
from fastpo.system.words import counted

if TYPE_CHECKING:
    pass


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
        str,
        typer.Argument(help="'accelerate launch train.py ...', or a file: a script, JSON, YAML."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="YAML file to write.")],
    trainer: Annotated[
        str | None,
        typer.Option(
            help="diffusers-sd15, diffusers-sdxl, salesforce, mapo, mapo-lora, simpletuner, "
            "flow-factory"
        ),
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes that train.")] = None,
    data: Annotated[str | None, typer.Option(help="Data instead of the command's.")] = None,
) -> None:
    """Write a configuration from another trainer's launch command or configuration."""
    from fastpo.convert.command import convert, read_source

    with storage_errors():
        text, name = read_source(command)
        draft = convert(text, out, trainer=trainer, processes=processes, data=data, file=name)
    for note in draft.notes:
        tell("[bold yellow]note:[/]", note)
    print(out)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, rtx4090, ...")] = "h100",
    utilization: Annotated[float, typer.Option(help="Share of the GPU's dense peak.")] = 0.4,
    world_size: Annotated[int, typer.Option(help="Processes, one GPU each.")] = 1,
    pairs: Annotated[int | None, typer.Option(help="Pairs in the data.")] = None,
    live_share: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="For train.backward: share of pairs that need a backward pass, above 0 and up to "
            "1; default: that of a run in train.output_dir.",
        ),
    ] = None,
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
            live_share=live_share,
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
    with configured(config, overrides) as resolved:
        check_trackers(resolved.train.trackers)  # hours of encoding later is too late
        model = ModelFolder.resolve(resolved.model)
        setup_noise(resolved, model)  # likewise: timesteps that the model does not have
        model.family.check_attention(resolved.train.attention)
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
    with configured(config, overrides) as resolved:  # a mistake is told before torch is imported
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
    """Write a LoRA as one file for ComfyUI, Automatic1111, kohya's trainers or diffusers."""
    from fastpo.train.consolidate import export_lora

    print(export_lora(source, out, form, average=average))
