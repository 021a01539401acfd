"""Faults of real file systems: a copy of a disk in the middle of a run, and one that is full.

Both mount something, which only root may; `allowed` says why not.
"""

import filecmp
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from fastpo.config import dump_config
from fastpo.selftest.child import Call
from fastpo.selftest.trials import LIMIT, Trial, Verdict, act, compare, ended_call, finish
from fastpo.selftest.world import STAGES

MEGABYTES = 64


def allowed():
    """Returns why nothing can be mounted here, or None."""
    try:
        with tempfile.TemporaryDirectory() as folder, _disk(Path(folder)):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"nothing can be mounted here: {error}"


def mount_trials(count):
    """Yields copies of a disk in the middle of a run, and disks that become full, in turn."""
    for number in range(count):
        stage = STAGES[number % len(STAGES)]
        row = f"ext4 on a loop device, copied in the middle of {stage}"
        yield Trial("power cut", row, f"loop device {stage} {number}", partial(_copied, stage))
        row = f"tmpfs that becomes full in {stage}"
        yield Trial("write error", row, f"tmpfs {stage} {number}", partial(_full, stage))


@contextmanager
def _disk(folder):
    """Gives an ext4 of its own, mounted; its image is `folder/image`."""
    image, mounted = folder / "image", folder / "disk"
    with image.open("wb") as file:
        file.truncate(MEGABYTES << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, capture_output=True)
    mounted.mkdir()
    with _mounted(["-o", "loop", image], mounted):
        yield mounted


@contextmanager
def _mounted(options, where):
    subprocess.run(["mount", *options, where], check=True, capture_output=True)
    try:
        yield where
    finally:
        for _ in range(50):  # a process that was killed lets go of it a moment later
            if subprocess.run(["umount", where], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.1)


def _copied(stage, bench, folder):
    """Copies the image while a stopped process runs on it, and goes on from the copy."""
    chance = random.Random(folder.name + str(time.time_ns()))
    with _disk(folder) as disk:
        _lay_out(stage, bench, disk)
        os.sync()
        call = Call(act, bench.world, stage, disk / "place")
        time.sleep(chance.uniform(0.0, 1.2 * bench.seconds[stage]))
        call.send(signal.SIGSTOP)
        _copy_at_one_moment(folder / "image", folder / "copy")
        call.send(signal.SIGKILL)
        ending = call.result(limit=LIMIT)
    if ending.how == "returned":
        return Verdict("missed")
    with _mounted(["-o", "loop", folder / "copy"], disk):
        return finish(bench, stage, disk / "place", ending.last("saved"))


def _lay_out(stage, bench, disk):
    """A place on the disk, with the command's configuration beside it."""
    bench.world.lay_out(stage, disk / "place")
    config = bench.world.config(stage, disk / "place")
    (disk / "place" / f"{stage}.yaml").write_text(dump_config(config))


def _copy_at_one_moment(image, copy):
    """Copies an image until it did not change on the way: the kernel may write at any time."""
    for _ in range(20):
        shutil.copyfile(image, copy)
        if filecmp.cmp(image, copy, shallow=False):
            return
    raise OSError(f"{image} does not come to rest")


def _full(stage, bench, folder):
    """Runs a command on a file system that is too small for it, and again when it has grown."""
    chance = random.Random(folder.name + str(time.time_ns()))
    disk = folder / "disk"
    disk.mkdir()
    with _mounted(["-t", "tmpfs", "-o", f"size={MEGABYTES}M", "tmpfs"], disk):
        _lay_out(stage, bench, disk)
        used = shutil.disk_usage(disk).used >> 10
        kilobytes = used + chance.randrange(4, {"lora": 1200, "full": 9000}.get(stage, 300))
        _resize(disk, f"{kilobytes}k")
        ending = ended_call(bench, stage, disk / "place", _nothing)
        _resize(disk, f"{MEGABYTES}M")
        if ending.how == "returned":
            return Verdict("missed")
        if ending.how != "refused":
            return compare(bench, stage, disk / "place", ending)
        verdict = finish(bench, stage, disk / "place", ending.last("saved"))
        return Verdict("refused", ending.text) if verdict.outcome == "equal" else verdict


def _resize(disk, size):
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True, capture_output=True)


def _nothing():
    pass
