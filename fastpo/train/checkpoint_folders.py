"""Which checkpoints a run has, which of them are whole, and which may go.

Ours are folders named exactly `step-` and eight digits whose `state.json` tells the same step.
Others, such as one that its user renamed, are neither resumed from nor removed.
"""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from fastpo.errors import CheckpointError, NoWholeCheckpointError
from fastpo.system.checksums import Checksum
from fastpo.system.manifest import MANIFEST, find_damage, first_mistake
from fastpo.system.ownership import Kind, remove_owned, strangers
from fastpo.train.best import BestHeldOut
from fastpo.train.changes import Change
from fastpo.train.state import Round

if TYPE_CHECKING:
    from fastpo.train.distributed import Processes

STATE, WEIGHTS, OPTIMIZER = "state.json", "trainable.safetensors", "optimizer.pt"
# The ledger's votes, `metric` (the minority metric that moving averages gave each pair last) and
# the running statistics of batches; the file is older than the last two, and keeps its name.
HISTORY = "ledger.safetensors"
FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})")
CHECKPOINT = Kind(
    "a checkpoint",
    r"(trainable|ledger|average-[\w-]+)\.safetensors|optimizer\.pt|(state|manifest)\.json",
    lambda folder: not strangers(folder, CHECKPOINT),
)


class About(BaseModel):
    """What a checkpoint says of itself: `state.json`.

    Attributes:
        step: Finished optimizer steps.
        cache: The prepared cache's fingerprint.
        group: Micro-batches of one optimizer step, over all processes.
        config: The configuration, as nested mappings.
        manifest: The manifest's file; None in a checkpoint of a version that wrote none.
        metrics: `metrics.jsonl` as it was then, if the version recorded it.
        model: The model's fingerprint, if the version recorded it.
        changes: Keys that were changed on the way, oldest first.
        best: The best measurement on held-out pairs, if there was one.
        round: Which of several rounds was under way.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    step: int
    cache: str
    group: int
    config: dict[str, Any]
    manifest: str | None = None
    metrics: Checksum | None = None
    model: str | None = None
    changes: list[Change] = []
    best: BestHeldOut | None = None
    round: Round | None = None


def checkpoint_folder(run: Path, step: int) -> Path:
    """Returns where a run keeps the checkpoint of a step."""
    return run / FOLDER / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Returns the step that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(run: Path) -> list[Path]:
    """Returns the folders of a run that are named as checkpoints are, oldest first."""
    folder = run / FOLDER
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _NAME.fullmatch(path.name) and path.is_dir())


def read_about(checkpoint: Path) -> About:
    """Reads what a checkpoint says of itself.

    Raises:
        CheckpointError: `state.json` is missing or does not hold what it should.
    """
    path = checkpoint / STATE
    try:
        return About.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{checkpoint} is not a whole checkpoint: {STATE} is missing"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged: {first_mistake(error)}") from None


def check_whole(checkpoint: Path) -> bool:
    """Checks every file of a checkpoint against its manifest.

    Returns:
        Whether there was a manifest. Checkpoints of versions that wrote none are only looked at:
        each file must be there, and as long as its own header says.

    Raises:
        CheckpointError: It is not whole; the text names the file and what is wrong with it.
    """
    about = read_about(checkpoint)
    if about.manifest is not None or (checkpoint / MANIFEST).exists():
        damage = find_damage(checkpoint)
        if damage:
            raise CheckpointError(f"{checkpoint} is not a whole checkpoint: {damage}")
        return True
    for name in dict.fromkeys((WEIGHTS, HISTORY, *_names(checkpoint, "*.safetensors"))):
        _check_header(checkpoint / name)
    if not zipfile.is_zipfile(checkpoint / OPTIMIZER):
        raise CheckpointError(f"{checkpoint / OPTIMIZER} cannot be read: it is missing or cut off")
    return False


def newest_whole(run: Path) -> Path | None:
    """Returns a run's newest checkpoint that is whole, None if it has none at all.

    Tells, a line each, which it passed over and why.

    Raises:
        CheckpointError: There are checkpoints, but none is whole; the text names each.
    """
    return _newest_whole(run, reversed(list_checkpoints(run)))


def agree_on_newest_whole(run: Path, processes: Processes) -> Path | None:
    """As `newest_whole`, with the same answer on all processes, each of which checks (collective).

    The main process proposes one after the other, until one is whole for all: it may lie on a
    storage of which they see different states.
    """
    candidates = [step_of(path) for path in reversed(list_checkpoints(run))]
    refused: list[str] = []
    while True:
        step = processes.tell(candidates.pop(0) if candidates else -1)
        if step < 0:
            return _none_whole(run, refused)
        checkpoint = checkpoint_folder(run, step)
        reasons = processes.gather_objects(_why_not(checkpoint))
        rank = next((rank for rank, reason in enumerate(reasons) if reason), None)
        if rank is None:
            _tell_unverified(checkpoint, say=processes.main)
            return checkpoint
        reason = f"{reasons[rank]}{f' (on rank {rank})' if rank else ''}"
        refused.append(f"{checkpoint.name}: {reason}")
        if processes.main:
            _tell(f"passed over {checkpoint}: {reason}")


class Rotation:
    """Keeps a run's newest whole checkpoints and removes older ones.

    A new checkpoint is first read back from the disk, in a thread beside the steps that follow: an
    older one goes only when `keep` newer ones were found whole in this process.

    Args:
        run: The run's folder.
        keep: How many checkpoints stay.
        main: Whether this is the main process; the others do nothing.
    """

    def __init__(self, run: Path, *, keep: int, main: bool) -> None:
        self._run, self._keep, self._main = run, keep, main
        self._whole: set[str] = set()
        self._best: list[str] = []
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def trust(self, checkpoint: Path) -> None:
        """Takes a checkpoint for whole that was verified already."""
        self._whole.add(checkpoint.name)

    def prefer(self, checkpoint: Path) -> None:
        """Keeps a checkpoint, the best so far, beside the newest.

        The one before may go when this one was found whole in this process.
        """
        self._best.append(checkpoint.name)

    def begin(self, newest: Path) -> None:
        """Starts to read the newest checkpoint back and then to remove old ones."""
        self.wait()
        if self._main:
            self._thread = self._thread or ThreadPoolExecutor(1, "checkpoints")
            self._pending = self._thread.submit(self._rotate, newest)

    def wait(self) -> None:
        """Waits until that is done.

        Raises:
            OSError: An old checkpoint could not be removed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, and ends the thread; errors as `wait`."""
        thread, self._thread = self._thread, None
        try:
            self.wait()
        finally:
            if thread is not None:
                thread.shutdown()

    def _rotate(self, newest: Path) -> None:
        damage = find_damage(newest, from_disk=True)
        if damage:
            _tell(
                f"{newest} was written, but reads back differently: {damage}; older ones are kept"
            )
            return
        self._whole.add(newest.name)
        older = [path for path in list_checkpoints(self._run) if path.name <= newest.name]
        whole, best = 0, self._best
        certain = [i for i, name in enumerate(best) if name in self._whole]
        kept = best[certain[-1] :] if certain else best
        for path in reversed(older):
            if whole >= self._keep and path.name not in kept and is_ours(path):
                remove_owned(path, CHECKPOINT)
                self._whole.discard(path.name)
            whole += path.name in self._whole


def is_ours(path: Path) -> bool:
    """Whether a folder is a checkpoint under the name that we gave it, and holds nothing else."""
    if path.is_symlink() or strangers(path, CHECKPOINT):
        return False
    try:
        return step_of(path) == read_about(path).step
    except CheckpointError:
        return False


def was_renamed(path: Path) -> bool:
    """Whether a checkpoint says that it is of another step than its name."""
    try:
        return step_of(path) != read_about(path).step
    except CheckpointError:
        return False


def _newest_whole(run: Path, checkpoints: Iterable[Path]) -> Path | None:
    refused: list[str] = []
    for checkpoint in checkpoints:
        reason = _why_not(checkpoint)
        if reason is None:
            _tell_unverified(checkpoint, say=True)
            return checkpoint
        refused.append(f"{checkpoint.name}: {reason}")
        _tell(f"passed over {checkpoint}: {reason}")
    return _none_whole(run, refused)


def _none_whole(run: Path, refused: list[str]) -> None:
    if refused:
        raise NoWholeCheckpointError(
            f"no checkpoint in {run / FOLDER} is whole; {'; '.join(refused)}"
        )


def _why_not(checkpoint: Path) -> str | None:
    """Why a run is not resumed from a folder that is named as a checkpoint; None if it may be."""
    try:
        about = read_about(checkpoint)
        check_whole(checkpoint)
    except CheckpointError as error:
        return str(error)
    if about.step != step_of(checkpoint):
        return f"its {STATE} says step {about.step}: it was renamed"
    return None


def _tell_unverified(checkpoint: Path, *, say: bool) -> None:
    if say and read_about(checkpoint).manifest is None:
        _tell(f"{checkpoint} has no {MANIFEST} (an earlier version wrote none): not verified")


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def _names(folder: Path, pattern: str) -> Iterator[str]:
    return (path.name for path in sorted(folder.glob(pattern)))


def _check_header(file: Path) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file.parent} is not a whole checkpoint: {file.name} is missing")
    try:
        with safe_open(file, framework="pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
