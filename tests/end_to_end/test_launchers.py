"""Every launcher starts a sharded run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastpo.config import parse_config

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


SET_LITTLE = ("torchrun", "none")
"""Launchers whose few variables the tests of two forked processes set as well."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    ["deepspeed", "accelerate", *(pytest.param(n, marks=pytest.mark.long) for n in SET_LITTLE)],
)
def test_every_launcher_starts_a_sharded_run(base, launcher, tmp_path, read_metrics):
    port = str(free_port())
    command = {
        "deepspeed": [BIN / "deepspeed", "--num_gpus=2", f"--master_port={port}", "--module"],
        "accelerate": [
            *(BIN / "accelerate", "launch", "--use_deepspeed", "--num_processes=2"),
            *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"),
            *(f"--main_process_port={port}", "-m"),
        ],
        "torchrun": [BIN / "torchrun", "--standalone", "--nproc_per_node=2", "-m"],
        "none": [sys.executable, "-m"],
    }[launcher]
    changes = [f"train.output_dir={tmp_path / 'run'}", "train.deepspeed=zero2", "train.max_steps=1"]
    options = [part for change in changes for part in ("--set", change)]
    done = subprocess.run(
        [*command, "fastpo.train", base, *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        timeout=600,
        check=False,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-4000:]
    assert (tmp_path / "run" / "final").is_dir(), text[-4000:]
    assert len(read_metrics(tmp_path / "run")) == 1
    assert f"x {1 if launcher == 'none' else 2} process(es)" in text
    parse_config(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
