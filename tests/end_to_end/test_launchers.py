"""Every launcher starts a sharded run."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastpo.config import parse_config
from tests.faults.two_ranks import free_port, two_ranks

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ACCELERATE = ("--use_deepspeed", "--num_processes=2", "--num_machines=1", "--mixed_precision=no")
ACCELERATE += ("--dynamo_backend=no",)
REPEATED = ("accelerate", "torchrun", "none")
"""Launchers whose variables the tests of two forked processes set as well."""


def words_for(base, folder):
    """What follows `fastpo.train`: one step, into a folder."""
    changes = (f"train.output_dir={folder}", "train.deepspeed=zero2", "train.max_steps=1")
    return [str(base), *(part for change in changes for part in ("--set", change))]


def check(folder, text, read_metrics, *, processes=2):
    """A finished run of that many processes, whose configuration can be read back."""
    assert (folder / "final").is_dir(), text[-4000:]
    assert len(read_metrics(folder)) == 1
    assert f"x {processes} process(es)" in text
    parse_config(yaml.safe_load((folder / "config.yaml").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", ["deepspeed", *(pytest.param(n, marks=pytest.mark.long) for n in REPEATED)]
)
def test_every_launcher_starts_a_sharded_run(base, launcher, tmp_path, read_metrics):
    port = free_port()
    command = {
        "deepspeed": [BIN / "deepspeed", "--num_gpus=2", f"--master_port={port}", "--module"],
        "accelerate": [
            *(BIN / "accelerate", "launch", *ACCELERATE),
            *(f"--main_process_port={port}", "-m"),
        ],
        "torchrun": [BIN / "torchrun", "--standalone", "--nproc_per_node=2", "-m"],
        "none": [sys.executable, "-m"],
    }[launcher]
    done = subprocess.run(
        [*command, "fastpo.train", *words_for(base, tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            **{"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TMPDIR": str(tmp_path)},
        },
        timeout=600,
        check=False,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-4000:]
    check(tmp_path / "run", text, read_metrics, processes=1 if launcher == "none" else 2)


def set_by_accelerate(*options):
    """The variables that `accelerate launch` adds for the processes that it starts."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.run.run", lambda _: found.update(os.environ))
        parsed = launch_command_parser().parse_args([*options, "-m", "fastpo.train"])
        launch_command(parsed)
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


def as_a_module(words):
    """`python -m fastpo.train`, in a forked process."""
    sys.argv = ["fastpo.train", *words]
    runpy.run_module("fastpo.train", run_name="__main__", alter_sys=True)


def test_what_accelerates_launcher_sets_begins_a_sharded_run(base, tmp_path, read_metrics):
    """As two forked processes, which spares four starts of Python."""
    folder = tmp_path / "run"
    env = set_by_accelerate(*ACCELERATE, f"--main_process_port={free_port()}")
    assert env["ACCELERATE_USE_DEEPSPEED"] == "true"
    env |= {"DS_ACCELERATOR": "cpu"}
    arguments = words_for(base, folder)
    with two_ranks(tmp_path / "out", lambda _: arguments, act=as_a_module, env=env) as ranks:
        assert ranks.exit_codes() == [0, 0], ranks.text(0) + ranks.text(1)
        check(folder, ranks.text(0), read_metrics)
