"""What a process of a study does: bases, data, one run. Each returns what failed, or None."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from fastpo.bench.measure import environment
from fastpo.config import parse_config, with_keys
from fastpo.data.prepare import prepare
from fastpo.evaluate import evaluate
from fastpo.evaluate.compare import sample_base
from fastpo.study.measure import score_row, verdict_row
from fastpo.study.rows import ABOUT, keep_row
from fastpo.study.trials import Trial, described
from fastpo.study.world import Places
from fastpo.system.files import make_folder, write_json
from fastpo.system.json_text import read_json
from fastpo.system.pool import told

DATA = "data.json"
MOST_BYTES = 1 << 24  # of the list of pairs that are to be found


def places_of(trial: Trial, work: Path) -> Places:
    """A run's folders; its base is trained if it is not there."""
    data = trial.data.folder(work)
    base = trial.world.build_base(work / "base", short=trial.short)
    return Places(base, data / "preferences", data / "cache", trial.folder(work) / "run")


@told
def build_bases(trials: Sequence[Trial], work: Path) -> None:
    """Trains the base of each world, one after another: some share one."""
    make_folder(work / "base")
    for trial in {described(t.world): t for t in trials}.values():
        trial.world.build_base(work / "base", short=trial.short)


@told
def make_data(trials: Sequence[Trial], work: Path) -> None:
    """Writes and prepares the preferences that some runs share, and samples their base's images."""
    data = trials[0].data
    folder, places = data.folder(work), places_of(trials[0], work)
    if not (folder / DATA).is_file():
        make_folder(folder)
        found = trials[0].world.write_preferences(
            places.preferences, base=places.base, seed=data.seed, short=data.short
        )
        write_json(folder / DATA, sorted(found))
    configs = [trial.config(places_of(trial, work)) for trial in trials]
    prepare(configs[0], progress=False)
    for config in {c.evaluate.model_dump_json(): c for c in configs}.values():
        sample_base(config, folder / "base-samples", progress=False)


@told
def make_run(trial: Trial, work: Path) -> None:
    """Trains and evaluates one run, or goes on with it, and keeps its row.

    The CPU seconds are those of this call: of a run that was killed, those since then.
    """
    started = time.process_time()
    places, data = places_of(trial, work), trial.data.folder(work)
    config = trial.config(places)
    prepare(config, progress=False)
    trained = trial.method.train(config)
    evaluated = parse_config(
        with_keys(config.model_dump(mode="json"), {"train.output_dir": str(trained.run)})
    )
    evaluation = evaluate(
        evaluated,
        scorers=trial.world.scorers(places.base),
        base_samples=data / "base-samples",
        progress=False,
    )
    looked_for = frozenset(read_json(data / DATA, most_bytes=MOST_BYTES))
    reward = evaluation.aligned_scores[trial.world.columns["reward"]]
    about = environment()
    row = {
        **verdict_row(trained.verdicts, config, looked_for),
        **score_row(evaluation, trial.world.columns),
        "passes": trained.passes,
        "cpu_s": time.process_time() - started,
        **{key: str(about[key]) for key in ABOUT},
        "scores": [round(float(score), 6) for score in reward],
    }
    keep_row(work, trial, row)
