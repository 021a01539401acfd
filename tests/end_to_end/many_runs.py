"""Runs several trainings in one set of processes.

A group of processes, and DeepSpeed's optimizer, take longer to make than a tiny model to train, so
the tests of two processes make them once for all their runs. A job is `{"name", "config", "set"}`,
and, to go on from another run's checkpoint, `"after": [folder, step]`. `JOBS.done` says how each
job ended. A job that takes minutes hangs: the stacks of all threads are printed, and the process
ends.
"""

import faulthandler
import json
import shutil
from pathlib import Path

import torch

from fastpo.config import load_config
from fastpo.errors import FastPOError
from fastpo.system.ownership import MARKER
from fastpo.train import train

PATIENCE = 1200  # seconds; compiling DeepSpeed's optimizer takes minutes beside other work


def run_all(jobs):
    """Runs the jobs of a file, in each process of the group."""
    torch.distributed.init_process_group("gloo")
    main = torch.distributed.get_rank() == 0
    for job in json.loads(jobs.read_text()):
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        config = load_config(Path(job["config"]), job["set"])
        if main and "after" in job:
            interrupt(*job["after"], config.train.output_dir)
        torch.distributed.barrier()
        try:
            train(config, resume="after" in job, progress=False)
            outcome = "ok"
        except FastPOError as error:
            outcome = f"{type(error).__name__}: {error}"
        if main:
            with jobs.with_suffix(".done").open("a") as file:
                file.write(json.dumps([job["name"], outcome]) + "\n")
    faulthandler.cancel_dump_traceback_later()
    torch.distributed.destroy_process_group()


def interrupt(folder, step, target):
    """Copies what a run had left behind when it was killed after a step."""
    name = f"step-{step:08d}"
    folder = Path(folder)
    shutil.copytree(folder / "checkpoints" / name, target / "checkpoints" / name)
    shutil.copy(folder / MARKER, target)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(lines[:step]))
