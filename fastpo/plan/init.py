"""`fastpo init`: a commented configuration for a model, data and a GPU."""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from fastpo._version import __version__
from fastpo.config import Config, Objective, Section, SourceConfig, parse_config, with_keys
from fastpo.config.fields import discriminator_of, sections_of
from fastpo.data.sources import recognize
from fastpo.errors import ForeignPathError
from fastpo.models.registry import load_family
from fastpo.plan.architecture import resolve_architecture
from fastpo.plan.choose import ROOM, Choice, choose
from fastpo.plan.dataset import count_source
from fastpo.plan.gpus import Gpu, find_gpu
from fastpo.system.files import check_folder, make_folder, write_text

FIRST = re.compile(r"# Written by `fastpo init`, version \S+; ([0-9a-f]{16})\n")
PROMPTS = [
    "a lighthouse on a cliff at dusk, oil painting",
    "a red bicycle leaning against a brick wall",
    "portrait of an old fisherman, soft light",
    "a bowl of ramen on a wooden table, steam rising",
]
BATCH = {"lora": 64, "full": 128}
FLOW_BETA, SATURATED_SHARE = 1000.0, 0.1
"""What the shipped configurations of flow-matching models begin with, and hold."""
FEW_PAIRS, PUBLISHED_STEPS, EPOCHS = 100_000, 2000, 4


@dataclass(frozen=True)
class Wanted:
    """What the user asked for.

    Attributes:
        model: A folder, a single file or a hub id.
        data: A folder, a file or a hub id.
        gpu: A short name of `fastpo.plan.gpus`.
        objective: A name of `fastpo.config.OBJECTIVES`.
        method: `lora`, `full`, or None: what fits.
    """

    model: str
    data: str
    gpu: str = "rtx4090"
    objective: str = "dpo"
    method: Literal["lora", "full"] | None = None


def write_config(
    out: Path, wanted: Wanted, *, status: Callable[[str], None] = lambda text: None
) -> Config:
    """Writes the file, whole or not at all.

    Args:
        out: The file; one that `fastpo init` wrote and nobody edited is replaced.
        wanted: What it is for.
        status: Called with what is being counted.

    Returns:
        The configuration that the file holds.

    Raises:
        ForeignPathError: The file exists and is not as `fastpo init` wrote it.
        ConfigError: An unknown GPU or objective, data of no known kind, or nothing fits.
        DataError: The data cannot be read, or the model edits source images that it has not, or the
            other way round.
        ModelError: The model is none that FastPO trains, or not on this machine.
    """
    _check_free(out)
    gpu = find_gpu(wanted.gpu)
    raw: dict[str, Any] = {
        "model": {"path": wanted.model},
        "data": {"source": recognize(wanted.data), "path": wanted.data},
        "prepare": {"cache_dir": f"caches/{out.stem}"},
        "train": {
            "output_dir": f"runs/{out.stem}",
            "objective": {"name": wanted.objective},
            "max_steps": PUBLISHED_STEPS,
        },
    }
    asked = parse_config(raw)
    architecture = resolve_architecture(asked)
    side = architecture.resolution
    raw = with_keys(raw, {"prepare.resolution": side, "train.precision": "bf16"})
    source = SourceConfig(name="data", **raw["data"])
    status("counting pairs")
    size = count_source(source)
    pairs, family = size.pairs, load_family(architecture.family)
    if pairs is not None:  # else nobody knows yet whether there are source images
        family.check_edits(size.sources, wanted.data)
    slope = _slope(asked.train.objective) if architecture.flow is not None else {}
    raw = with_keys(raw, slope)
    batch = _batch(wanted.method or "lora", pairs)
    chosen = choose(raw, architecture, gpu, method=wanted.method, batch=batch, status=status)
    raw = with_keys(raw, {**chosen.values, **_length(chosen, pairs, batch)})
    raw = with_keys(raw, {"evaluate": {"prompts": PROMPTS, "precision": "bf16"}})
    config = parse_config(raw)
    why = _reasons(chosen, gpu, pairs, batch) | {
        "model.path": f"{family.name.upper()}: {architecture.source}.",
        "prepare.resolution": "What the model was made for.",
    }
    if slope:
        why["train.auto_slope"] = "Flow models differ in the size of their margins by far."
    make_folder(out.parent)
    write_text(out, _signed(_text(out, raw, why, wanted)))
    return config


def _slope(objective: Objective) -> dict[str, Any]:
    """A slope that follows the margins, where they make a logit, and where it begins."""
    start = objective.logit_slope()
    if start is None:
        return {}
    return {"train.objective.beta": min(start, FLOW_BETA), "train.auto_slope": SATURATED_SHARE}


def _check_free(out: Path) -> None:
    """Refuses a file that holds anybody's work, or that cannot be written where it shall be.

    Raises:
        ForeignPathError: It does.
        StorageError: Its folder cannot be made or written in.
    """
    check_folder(out.parent)
    if not (out.exists() or out.is_symlink()):
        return
    text = out.read_text(errors="replace") if out.is_file() and not out.is_symlink() else ""
    signature = FIRST.match(text)
    if signature is None or _signed(text[signature.end() :]) != text:
        what = "was edited since `fastpo init` wrote it" if signature else "is not of `fastpo init`"
        raise ForeignPathError(f"{out} exists and {what}; it is left as it is: give another name")


def _signed(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"# Written by `fastpo init`, version {__version__}; {digest}\n{text}"


def _batch(method: str, pairs: int | None) -> int:
    """Pairs a step, a power of two: those of the configs, or few enough for ten steps an epoch."""
    most = BATCH[method] if pairs is None else min(BATCH[method], max(1, pairs // 10))
    return 1 << (most.bit_length() - 1)


def _length(chosen: Choice, pairs: int | None, batch: int) -> dict[str, Any]:
    """Batch and length of the run, and how often it is saved."""
    values: dict[str, Any] = {
        "train.micro_batch_size": chosen.pairs,
        "train.accumulation_steps": batch // chosen.pairs,
    }
    if pairs is None or pairs > FEW_PAIRS:
        return values | {"train.max_steps": PUBLISHED_STEPS, "train.checkpoint_every": 200}
    steps = max(1, EPOCHS * pairs // batch)
    every = max(1, min(200, steps // 10))
    return values | {
        "train.max_steps": None,
        "train.epochs": EPOCHS,
        "train.checkpoint_every": every,
    }


def _reasons(chosen: Choice, gpu: Gpu, pairs: int | None, batch: int) -> dict[str, str]:
    """Why the values are what they are, by key."""
    room = f"{gpu.memory_gb:g} GB of {gpu.name}, of which {ROOM:.0%} are planned with"
    before = f" Before it came: {'; '.join(chosen.passed_over)}." if chosen.passed_over else ""
    values = chosen.values
    reasons = {
        "train.method": f"The first way that fits into {room}: {chosen.bytes / 1e9:.1f} GB at the "
        f"peak, as `fastpo plan` estimates.{before}",
        "train.micro_batch_size": f"At most {chosen.largest.pairs} fit; the step's {batch} pairs "
        "are taken in as many passes as accumulation_steps says.",
        "train.precision": f"{gpu.name} multiplies bf16 matrices fastest.",
        "train.gradient_checkpointing": "Needed for the memory."
        if values["train.gradient_checkpointing"]
        else "Not needed: activations fit.",
        "data.source": "Told by what lies there."
        if pairs is not None
        else "Told by its name; not on this disk yet.",
    }
    if pairs is not None and pairs <= FEW_PAIRS:
        reasons["train.epochs"] = f"{pairs:,} pairs."
    if "train.optim.name" in values:
        reasons["train.optim.name"] = "States of AdamW in 32 bits do not fit."
    if "train.quantize_base" in values:
        reasons["train.quantize_base"] = "Needed for the memory, with `pip install 'fastpo[8bit]'`."
    return reasons


def _text(out: Path, raw: Mapping[str, Any], why: Mapping[str, str], wanted: Wanted) -> str:
    """The file behind its first line."""
    method = f" --{wanted.method}" if wanted.method else ""
    commands = ["plan", "prepare", "train", "evaluate"]
    head = [
        f"#   fastpo init {out.name} --model {wanted.model} --data {wanted.data} --gpu "
        f"{wanted.gpu} --objective {wanted.objective}{method}",
        "#",
        *(f"#   fastpo {name:9}{out.name}" for name in commands),
        f"#   fastpo report   {raw['train']['output_dir']}",
        "#",
        "# All keys, also those that are not here: docs/keys.md.",
        "",
    ]
    body = []
    for name, section in raw.items():
        body += [*_lines(Config, name, section, "", why), ""]
    return "\n".join([*head, *body]).rstrip() + "\n"


def _lines(
    section: type[Section], name: str, value: Any, path: str, why: Mapping[str, str]
) -> list[str]:
    """A key's comment and value; of a section those of its keys."""
    key, indent = f"{path}{name}", "  " * path.count(".")
    field = section.model_fields[name]
    inner, tag = sections_of(field), discriminator_of(field)
    about = field.description or (inner[0].__doc__ if len(inner) == 1 else "") or ""
    text = " ".join([*re.split(r"\n\n", about)[0].split(), *why.get(key, "").split()])
    width = 98 - len(indent)
    comment = [f"{indent}# {line}" for line in textwrap.wrap(text, width)] if text else []
    if isinstance(value, Mapping):
        if tag is not None:
            inner = [s for s in inner if value[tag] in get_args(s.model_fields[tag].annotation)]
        below = [_lines(inner[0], k, v, f"{key}.", why) for k, v in value.items() if v is not None]
        return [*comment, f"{indent}{name}:", *(line for lines in below for line in lines)]
    dumped = yaml.safe_dump({name: value}, default_flow_style=False, width=1000).rstrip()
    return [*comment, *(indent + line for line in dumped.splitlines())]
