"""Files that come back from the disk otherwise than they were written, and the next command.

Each trial damages one file of one kind: a flipped bit, an end that is missing, or a block of
zeros, as a power cut leaves it.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from fastpo.selftest.child import Tell, call
from fastpo.selftest.trials import LIMIT, Bench, Test, Trial, Verdict, act, compare, finish
from fastpo.selftest.world import CHECKPOINT_EVERY, STEPS, TRAININGS, Stage, World

STOPPED = {"lora": 5, "full": 4}
"""After how many steps the runs stop whose checkpoints are damaged."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        title: What it holds.
        source: Where it is copied from: `whole`, or `stopped`, a run that was killed half-way.
        folders: What is copied.
        pattern: The files, as a path in the place.
        stage: The command that reads them.
    """

    title: str
    source: Literal["whole", "stopped"]
    folders: tuple[str, ...]
    pattern: str
    stage: Stage


def _of_cache(title: str, pattern: str, stage: Stage = "lora") -> Kind:
    return Kind(title, "whole", ("cache",), f"cache/{pattern}", stage)


def _of_checkpoint(title: str, stage: Stage, pattern: str) -> Kind:
    newest = STOPPED[stage] // CHECKPOINT_EVERY * CHECKPOINT_EVERY
    return Kind(
        title, "stopped", (stage,), f"{stage}/checkpoints/step-{newest:08d}/{pattern}", stage
    )


KINDS = (
    _of_cache("latents", "shard-*/latents.safetensors"),
    _of_cache("text embeddings", "text-*/text.safetensors"),
    _of_cache("index", "*.arrow"),
    _of_cache("parts' tables", "*/*.parquet"),
    _of_cache("parts' records", "*/record.json"),
    _of_cache("quarantine", "quarantine.jsonl"),
    _of_cache("cache's manifest", "manifest.json"),
    _of_cache("reference errors", "reference/*/visit-*.npy"),
    _of_cache("reference errors' manifest", "reference/*/reference.json"),
    _of_checkpoint("weights (LoRA)", "lora", "trainable.*"),
    _of_checkpoint("weights (full)", "full", "trainable.*"),
    _of_checkpoint("optimizer's moments", "lora", "optimizer.*"),
    _of_checkpoint("moving averages", "lora", "average-*"),
    _of_checkpoint("moving averages that vote", "full", "average-*"),
    _of_checkpoint("ledger", "lora", "ledger.*"),
    _of_checkpoint("checkpoint's state and manifest", "lora", "*.json"),
    Kind("metrics", "stopped", ("lora",), "lora/metrics.jsonl", "lora"),
    Kind("run's configuration", "stopped", ("lora",), "lora/config.yaml", "lora"),
    Kind("run's history", "stopped", ("lora",), "lora/run.json", "lora"),
    Kind("run's marker", "stopped", ("lora",), "lora/.fastpo", "lora"),
    Kind("checkpoint's marker", "stopped", ("full",), "full/checkpoints/*/.fastpo", "full"),
    Kind("exported LoRA, then resumed", "whole", ("lora",), "lora/final/[a-z]*", "lora"),
    Kind("exported LoRA, then evaluated", "whole", ("lora",), "lora/final/[a-z]*", "evaluate"),
    Kind("exported UNet, then resumed", "whole", ("full",), "full/final/unet/*", "full"),
    Kind("evaluation's images", "whole", ("lora",), "lora/evaluation/*/*.png", "evaluate"),
)

MENDS = "`fastpo prepare CONFIG"
"""How a refusal names the command that makes a damaged part of a cache again."""

Damage = Callable[[bytearray, random.Random], bytearray]


def flip_bit(content: bytearray, chance: random.Random) -> bytearray:
    """Flips one bit."""
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return content


def truncate(content: bytearray, chance: random.Random) -> bytearray:
    """Leaves out the end, in one of four cases everything."""
    return content[: chance.choice([0, chance.randrange(len(content))] + 2 * [len(content) // 2])]


def clear_block(content: bytearray, chance: random.Random) -> bytearray:
    """Sets up to 512 bytes to zero."""
    start = chance.randrange(len(content))
    stop = min(len(content), start + 512)
    content[start:stop] = bytes(stop - start)
    return content


DAMAGES: dict[Test, Damage] = {
    "flipped bit": flip_bit,
    "truncated file": truncate,
    "zeroed block": clear_block,
}


def stop_runs(world: World) -> None:
    """Makes the runs that stopped half-way, in `stopped/`."""
    place = world.folder / "stopped"
    place.mkdir()
    for stage in TRAININGS:
        ending = call(_stop, world, stage, place, limit=LIMIT)
        assert ending.last("done") == STOPPED[stage], ending


def _stop(tell: Tell, world: World, stage: Stage, place: Path) -> None:
    def told(key: str, value: int) -> None:
        tell(key, value)
        if (key, value) == ("done", STOPPED[stage]):
            os._exit(0)

    act(told, world, stage, place)


def damage_trials(count: int) -> Iterator[Trial]:
    """Yields `count` trials of each damage to each kind of file, in turn."""
    for number in range(count):
        for kind in KINDS:
            for damage in DAMAGES:
                yield Trial(
                    damage,
                    f"{damage} in {kind.title}",
                    f"{damage}, {kind.title}, {number}",
                    partial(_damaged, kind, damage, number),
                )


def _damaged(kind: Kind, damage: Test, number: int, bench: Bench, folder: Path) -> Verdict:
    place, chance = folder / "place", random.Random(f"{damage} {kind.title} {number}")
    for name in kind.folders:
        bench.world.copy(kind.source, name, place)
    files = [path for path in sorted(place.glob(kind.pattern)) if path.stat().st_size]
    if not files:
        return Verdict("missed", f"no {kind.pattern}")
    file = chance.choice(files)
    before = file.read_bytes()
    after = bytes(DAMAGES[damage](bytearray(before), chance))
    if after == before:
        return Verdict("missed")
    file.write_bytes(after)
    return _judge(bench, kind, place, file)


def _mend(bench: Bench, kind: Kind, place: Path, text: str) -> Verdict:
    """Does what a refusal advises, after which the command must go on."""
    stage = "reference" if "reference/" in kind.pattern else "prepare"
    ending = call(act, bench.world, stage, place, _verify_always, limit=LIMIT)
    if ending.how != "returned":
        return Verdict("lost", f"{text}; its advice ends with: {ending.text}")
    verdict = finish(bench, kind.stage, place)
    if verdict.outcome != "equal":
        return Verdict(verdict.outcome, f"{text}; after its advice: {verdict.detail}")
    return Verdict("refused", text)


def _verify_always() -> None:
    sys.argv += ["--set", "data.verify=always"]


def _judge(bench: Bench, kind: Kind, place: Path, file: Path) -> Verdict:
    """Runs the command that reads a damaged file, and compares."""
    where = file.relative_to(place).as_posix()
    ending = call(act, bench.world, kind.stage, place, limit=LIMIT)
    if ending.how == "refused":
        text = f"{where}: {ending.text}"
        if file.name not in ending.text and str(file.parent) not in ending.text:
            return Verdict("unclear", text)
        return _mend(bench, kind, place, text) if MENDS in text else Verdict("refused", text)
    verdict = compare(bench, kind.stage, place, ending)
    if verdict.outcome != "equal":
        only = where.endswith(f"/{verdict.detail}") and str(file) in ending.output
        return Verdict("said" if only else verdict.outcome, f"{where}: {verdict.detail}")
    stopped = STOPPED.get(kind.stage, 0) if kind.source == "stopped" else 0
    if ending.last("start", STEPS.get(kind.stage, 0)) >= stopped // CHECKPOINT_EVERY * 2:
        return verdict
    said = file.parent.name in ending.output
    return Verdict("older" if said else "unclear", f"{where}: {ending.output[-300:]}")
