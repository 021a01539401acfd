"""Base against aligned model: the same prompts and seeds sampled from both, scored, compared.

`<output_dir>/evaluation/` then holds

    base/ aligned/   one PNG per prompt and seed, under the same name in both
    samples.json     prompt, seed and file of each, the sampling settings, both fingerprints
    scores.csv       every metric of every image
    summary.json     per metric means, gain and win rate with intervals
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from fastpo.config import Config
from fastpo.errors import ConfigError
from fastpo.evaluate.folders import (
    EVALUATION,
    SAMPLE_LIST,
    SAMPLES,
    SCORES,
    SUMMARY,
    last_step,
)
from fastpo.evaluate.sampling import (
    ImageSampler,
    Sample,
    check_aligned,
    holds_samples,
    plan_samples,
    read_images,
)
from fastpo.evaluate.scorers import Scorer, Scores, build_scorers, needs_groups
from fastpo.evaluate.win_rate import NOTES, MetricSummary, compare_scores
from fastpo.models.export import export_fingerprint
from fastpo.system.files import write_json, write_text
from fastpo.system.ownership import check_replaceable, claim, owned_folder
from fastpo.system.progress import progress_bar
from fastpo.system.storage import storage_errors
from fastpo.system.writer_lock import sole_writer

SCORE_TOGETHER = 64  # images held in memory at once


@dataclass(frozen=True)
class Evaluation:
    """The outcome of an evaluation.

    Attributes:
        folder: The folder `evaluation` with images, scores and summary.
        samples: What was sampled from both models.
        base_scores: `(N,)` per metric, of the base's images.
        aligned_scores: The same for the aligned model's images.
        metrics: The comparison per metric.
        primary: The first scorer's first metric; None without scorers.
    """

    folder: Path
    samples: tuple[Sample, ...]
    base_scores: Scores
    aligned_scores: Scores
    metrics: dict[str, MetricSummary]
    primary: str | None


@storage_errors()
def evaluate(
    config: Config,
    *,
    aligned: Path | None = None,
    scorers: Sequence[Scorer] | None = None,
    progress: bool = True,
    base_samples: Path | None = None,
    step: int | None = None,
) -> Evaluation:
    """Samples both models alike, scores the images and writes `<output_dir>/evaluation/`.

    Images that are there already are kept if everything they depend on is unchanged (weights,
    prompts, seeds, settings, versions); so is the part that an interrupted call left.

    Args:
        config: The experiment.
        aligned: Folder with `pytorch_lora_weights.safetensors` or the denoiser; default
            `<output_dir>/final`.
        scorers: Objects with the protocol `fastpo.evaluate.Scorer`; default: built from
            `evaluate.scorers`. Without any, images are made but not compared.
        progress: Whether to show progress bars and the outcome on standard error.
        base_samples: Folder in which several runs share the base's images: it is sampled once for
            all runs that agree in model, prompts, seeds and settings (by one run at a time).
        step: The step of `aligned`, for the report; default: the run's last, of what it exported.

    Raises:
        ConfigError: No prompts, an unknown scorer, or two scorers with one metric's name.
        CheckpointError: There is no aligned model to evaluate.
        ModelError: The base pipeline or a scorer's model is not available.
        ForeignPathError: The folder `evaluation` is none that an evaluation made.
        BusyFolderError: Another process evaluates there.
    """
    folder = config.train.output_dir / "evaluation"
    samples = plan_samples(config)
    sampler = ImageSampler(config, progress=progress)
    source = check_aligned(aligned or config.train.output_dir / "final", sampler.family)
    if scorers is None:
        scorers = configured_scorers(config)
    claim(folder, EVALUATION)
    for name in ("base", "aligned"):
        check_replaceable(folder / name, SAMPLES)
    with sole_writer(folder):
        _fill_base(sampler, folder / "base", samples, base_samples)
        sampler.fill(folder / "aligned", samples, label="aligned", aligned=source)
        result = _score(config, scorers, folder, samples, progress=progress)
        fingerprints = {
            "base": sampler.fingerprint(samples),
            "aligned": sampler.fingerprint(samples, source),
        }
        about = {
            "settings": sampler.settings,
            "fingerprints": fingerprints,
            "aligned": _about_weights(source, config.train.output_dir, step),
        }
        _write(result, config, about)
    if progress:
        _show(result)
    return result


def _score(
    config: Config,
    scorers: Sequence[Scorer],
    folder: Path,
    samples: Sequence[Sample],
    *,
    progress: bool,
) -> Evaluation:
    """Scores both models' images and compares them; errors as in `score_images`."""
    base = score_folder(scorers, folder / "base", samples, progress=progress)
    after = score_folder(scorers, folder / "aligned", samples, progress=progress)
    index = [sample.prompt_index for sample in samples]
    metrics = {
        name: compare_scores(base[name], after[name], index, confidence=config.evaluate.confidence)
        for name in base
    }
    return Evaluation(folder, tuple(samples), base, after, metrics, next(iter(metrics), None))


def score_folder(
    scorers: Sequence[Scorer], folder: Path, samples: Sequence[Sample], *, progress: bool = True
) -> Scores:
    """Scores the images of a filled folder, a few at a time; errors as in `score_images`."""
    parts: list[Scores] = []
    if not scorers:
        return {}
    with progress_bar(
        f"score {folder.name}", len(samples), unit="images", show=progress
    ) as advance:
        for some in _slices(samples, whole_prompts=any(map(needs_groups, scorers))):
            prompts = [sample.prompt for sample in some]
            parts.append(score_images(scorers, read_images(folder, some), prompts))
            advance(len(some))
    return {metric: np.concatenate([part[metric] for part in parts]) for metric in parts[0]}


def _slices(samples: Sequence[Sample], *, whole_prompts: bool) -> Iterator[Sequence[Sample]]:
    """Cuts samples, which lie prompt by prompt, into slices of about `SCORE_TOGETHER`."""
    start = 0
    for end in range(1, len(samples) + 1):
        full = end == len(samples) or end - start >= SCORE_TOGETHER
        inside = whole_prompts and end < len(samples)
        if full and not (inside and samples[end].prompt == samples[end - 1].prompt):
            yield samples[start:end]
            start = end


def configured_scorers(config: Config) -> list[Scorer]:
    """Builds the scorers of `evaluate.scorers`; errors as in `build_scorer`."""
    options = config.evaluate
    return build_scorers(
        options.scorers, batch_size=options.score_batch_size, precision=options.score_precision
    )


def score_images(
    scorers: Sequence[Scorer], images: Sequence[Image.Image], prompts: Sequence[str]
) -> Scores:
    """Returns all scorers' metrics, in order.

    Raises:
        ConfigError: Two scorers share a metric's name, or one returned anything but a finite
            number per image.
    """
    scores: dict[str, NDArray[np.float64]] = {}
    for scorer in scorers:
        for metric, values in scorer.score(images, prompts).items():
            array = np.asarray(values, dtype=np.float64)
            if metric in scores:
                raise ConfigError(f"evaluate.scorers: two scorers give a metric {metric!r}")
            if array.shape != (len(images),) or not np.isfinite(array).all():
                raise ConfigError(
                    f"evaluate.scorers: {scorer.name} must give one finite number per image for "
                    f"{metric!r}, got shape {array.shape} for {len(images)} images with "
                    f"{int((~np.isfinite(array)).sum())} of them not finite"
                )
            scores[metric] = array
    return scores


def _fill_base(
    sampler: ImageSampler, folder: Path, samples: Sequence[Sample], shared: Path | None
) -> None:
    """Samples the base into the run's folder, by way of the shared one if there is one."""
    if shared is None:
        sampler.fill(folder, samples, label="base")
        return
    store = _fill_shared(sampler, samples, shared)
    if not holds_samples(folder, samples, sampler.fingerprint(samples)):
        with owned_folder(folder, SAMPLES) as copy:
            shutil.copytree(store, copy, dirs_exist_ok=True)


def _fill_shared(sampler: ImageSampler, samples: Sequence[Sample], shared: Path) -> Path:
    """Samples the base into the folder of runs that agree, and returns it."""
    store = shared / sampler.fingerprint(samples)[:16]
    sampler.fill(store, samples, label="base")
    return store


def sample_base(config: Config, shared: Path, *, progress: bool = True) -> Path:
    """Samples the base's images before any run, where `evaluate` takes them from.

    Several processes may then evaluate at once with the same `base_samples`.

    Args:
        config: The experiment.
        shared: The folder `base_samples` of `evaluate`.
        progress: Whether to show a progress bar.

    Returns:
        The folder of the images.

    Raises:
        ConfigError: No prompts.
        ModelError: The base pipeline is not available.
        ForeignPathError: There are other things in their place.
    """
    samples = plan_samples(config)
    return _fill_shared(ImageSampler(config, progress=progress), samples, shared)


def _about_weights(source: Path, run: Path, step: int | None) -> dict[str, Any]:
    """What the report compares with the run's weights and steps when it is made."""
    inside = source.resolve().is_relative_to(run.resolve())
    return {
        "folder": str(source.resolve().relative_to(run.resolve())) if inside else str(source),
        "weights": export_fingerprint(source),
        "step": last_step(run) if inside and step is None else step,
    }


def _write(result: Evaluation, config: Config, about: dict[str, Any]) -> None:
    listed = [
        {**asdict(s), "base": f"base/{s.file}", "aligned": f"aligned/{s.file}"}
        for s in result.samples
    ]
    write_json(result.folder / SAMPLE_LIST, {**about, "samples": listed})
    write_text(result.folder / SCORES, _scores_csv(result))
    summary = {
        "primary": result.primary,
        "prompts": len({sample.prompt_index for sample in result.samples}),
        "comparisons": len(result.samples),
        "confidence": config.evaluate.confidence,
        "metrics": {name: asdict(metric) for name, metric in result.metrics.items()},
        "notes": NOTES,
    }
    write_json(result.folder / SUMMARY, summary)


def _scores_csv(result: Evaluation) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "prompt_index", "seed", "prompt", *result.metrics])
    for model, scores in (("base", result.base_scores), ("aligned", result.aligned_scores)):
        for i, s in enumerate(result.samples):
            values = (repr(float(scores[name][i])) for name in result.metrics)
            writer.writerow([model, s.prompt_index, s.seed, s.prompt, *values])
    return text.getvalue()


def _show(result: Evaluation) -> None:
    console = Console(stderr=True)
    if not result.metrics:
        console.print("no scorers given (evaluate.scorers): images were made but not compared")
        return
    table = Table("metric", "base", "aligned", "gain", "win rate")
    for name, m in result.metrics.items():
        low, high = m.win_interval
        table.add_row(
            name,
            f"{m.base_mean:.4g}",
            f"{m.aligned_mean:.4g}",
            f"{m.gain:+.4g}",
            f"{m.win_rate:.1%} [{low:.1%}, {high:.1%}]".replace("[", r"\["),
        )
    console.print(table)
