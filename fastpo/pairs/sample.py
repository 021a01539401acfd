"""Pairs from a model: images of each prompt from several seeds, scored, the better over the worse.

A folder then holds

    pairs.jsonl                what `source: folder` reads, with seeds, scores and gap
    images/<model>/<set>/      one PNG per prompt and seed
    scores/<model>/<set>/      every image's scores by one scorer
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from fastpo.config import Config
from fastpo.errors import ConfigError, DataError
from fastpo.evaluate.many import BASE, Candidate, Cell, filled_cells
from fastpo.evaluate.sampling import ImageSampler, Sample
from fastpo.evaluate.scorers import Scores
from fastpo.pairs.choose import Pick, choose_pairs
from fastpo.system.files import write_text
from fastpo.system.json_text import finite, parse_json
from fastpo.system.ownership import Kind
from fastpo.system.process import Rank
from fastpo.system.storage import storage_errors
from fastpo.system.words import counted

LISTING = "pairs.jsonl"


def _holds_pairs(folder: Path) -> bool:
    try:
        with (folder / LISTING).open(encoding="utf-8") as file:
            first = parse_json(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and {"seed_winner", "scores_winner"} <= set(first)


PAIRS = Kind("sampled pairs", r"(images|scores)/.*|pairs\.jsonl", _holds_pairs)


@storage_errors()
def pairs_from_model(
    config: Config,
    out: Path,
    *,
    model: Candidate | None = None,
    pick: Pick = "extremes",
    gap: float = 0.0,
    process: Rank | None = None,
) -> str | None:
    """Samples, scores and pairs; what is there already is kept.

    Images, scores and the choice are those of the configuration's section `evaluate`: its prompts
    and sets, `seeds_per_prompt` images each, sampled and rated as there. Pairs are ordered by the
    first scorer's first metric; a pair on which another scorer's first metric says the opposite is
    left out.

    Args:
        config: The experiment.
        out: The folder to work in; one that this function made is gone on with.
        model: The weights to sample from; default: the base.
        pick: See `choose_pairs`.
        gap: See `choose_pairs`, in units of the first metric.
        process: This process of the launch; all share the work.

    Returns:
        What was written, in a line; None in all processes but the first.

    Raises:
        ConfigError: No prompts or scorers, or one image a prompt.
        DataError: No pair has the gap.
        CheckpointError: There are no weights.
        ModelError: The base pipeline or a scorer's model is not available.
        ForeignPathError: `out` is none that this function made.
    """
    process = process or Rank.of_launch()
    options = config.evaluate
    if not options.scorers:
        raise ConfigError("nothing to order images by: give evaluate.scorers")
    if options.seeds_per_prompt < 2:
        raise ConfigError("evaluate.seeds_per_prompt: pairs need two images of a prompt at least")
    sampler = ImageSampler(config, progress=process.rank == 0)
    models = [model or Candidate(BASE)]
    with filled_cells(sampler, models, out, PAIRS, process) as (cells, scored):
        if process.rank != 0:
            return None
        lines, prompts, opposed = [], 0, 0
        for cell in cells:
            firsts = [next(iter(scored.read(cell, text) or {})) for text in options.scorers]
            scores = scored.all_of(cell)
            for row, agreed in _pairs(cell, out, scores, firsts, pick, gap):
                opposed += not agreed
                if agreed:
                    lines.append(json.dumps(finite(row), ensure_ascii=False, allow_nan=False))
            prompts += len(cell.prompts.prompts)
    if not lines:
        raise DataError(f"{counted(prompts, 'prompt')}, but no pair with a gap of {gap:g}")
    write_text(out / LISTING, "\n".join(lines) + "\n")
    left = f"; left out: {opposed} on which the scorers disagree" * bool(opposed)
    return f"{counted(len(lines), 'pair')} of {counted(prompts, 'prompt')} in {out}{left}"


def _pairs(
    cell: Cell, out: Path, scores: Scores, firsts: Sequence[str], pick: Pick, gap: float
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yields a cell's pairs as rows of the listing, and whether no scorer says the opposite."""
    numbered = list(enumerate(cell.samples))
    for _, group in groupby(numbered, key=lambda item: item[1].prompt_index):
        own = list(group)
        values = [float(scores[firsts[0]][i]) for i, _ in own]
        for choice in choose_pairs(values, pick, gap=gap):
            (w, winner), (v, loser) = own[choice.winner], own[choice.loser]
            agreed = all(scores[metric][w] >= scores[metric][v] for metric in firsts)
            yield _row(cell, out, scores, (w, winner), (v, loser)) | {"gap": choice.gap}, agreed


def _row(
    cell: Cell, out: Path, scores: Scores, winner: tuple[int, Sample], loser: tuple[int, Sample]
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": f"{cell.prompts.name}-{winner[1].prompt_index}-{winner[1].seed}-{loser[1].seed}",
        "prompt": winner[1].prompt,
    }
    if sources := winner[1].sources:
        row["source"] = sources[0] if len(sources) == 1 else list(sources)
    for side, (_, sample) in (("winner", winner), ("loser", loser)):
        row[side] = (cell.folder / sample.file).relative_to(out).as_posix()
    for side, (i, sample) in (("winner", winner), ("loser", loser)):
        row[f"seed_{side}"] = sample.seed
        row[f"scores_{side}"] = {metric: float(values[i]) for metric, values in scores.items()}
    return row
