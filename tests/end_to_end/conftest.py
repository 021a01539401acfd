"""Runs on two processes, and the configuration file that they change."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from fastpo.config import load_config
from fastpo.train import train
from tests.end_to_end.many_runs import run_all
from tests.faults.two_ranks import two_ranks

STEPS, MIDDLE = 4, 2


@pytest.fixture(scope="session")
def train_on_two():
    """Runs jobs of `many_runs.py` on two processes: `train_on_two(folder, jobs) -> outcomes`."""

    def launch(folder, jobs):
        listed = folder / "jobs.json"
        listed.write_text(json.dumps(jobs))
        compiler = folder / "c++"  # DeepSpeed's optimizer, compiled in half of the time
        compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0 -g0\n')
        compiler.chmod(0o755)
        env = {"CXX": str(compiler), "DS_ACCELERATOR": "cpu"}
        out = folder / "out"
        with two_ranks(out, lambda _: [listed], act=run_jobs, env=env) as ranks:
            codes = ranks.exit_codes(timeout=3600)
            text = ranks.text(0)[-6000:] + ranks.text(1)[-6000:]
        file = listed.with_suffix(".done")
        outcomes = dict(map(json.loads, file.read_text().splitlines())) if file.exists() else {}
        assert list(outcomes) == [job["name"] for job in jobs], text
        assert codes == [0, 0], text
        return outcomes

    return launch


def run_jobs(words):
    run_all(Path(words[0]))


@pytest.fixture(scope="session")
def steps_on_two():
    """Makes the steps of `sparse_steps.py` on two processes: `steps_on_two(folder, jobs)`."""

    def launch(folder, jobs):
        listed = folder / "steps.json"
        listed.write_text(json.dumps(jobs))
        env = {"DS_ACCELERATOR": "cpu"}
        with two_ranks(folder / "out", lambda _: [listed], act=make_steps, env=env) as ranks:
            codes = ranks.exit_codes(timeout=3600)
            assert codes == [0, 0], ranks.text(0)[-6000:] + ranks.text(1)[-6000:]

    return launch


def make_steps(words):
    from tests.end_to_end.sparse_steps import run_all as make_all  # needs DeepSpeed

    make_all(Path(words[0]))


@pytest.fixture
def run(experiment, read_metrics):
    """Trains a small experiment: `run(**options)` gives its metrics."""

    def train_it(**options):
        return read_metrics(train(load_config(experiment(**options)), progress=False))

    return train_it


@pytest.fixture(scope="session")
def exported():
    """Loads the weights that a run left for diffusers: `exported(folder, name="final")`."""

    def load(folder, name="final"):
        files = sorted((folder / name).rglob("*.safetensors"))
        assert files
        return {f"{f.name}.{k}": v for f in files for k, v in load_file(f).items()}

    return load


@pytest.fixture(scope="module")
def base(tiny_data, light_pipelines, tiny_caches, tmp_path_factory):
    """A configuration file of four steps, with a checkpoint after two."""
    raw = {
        "seed": 7,
        "model": {"path": str(light_pipelines["sdxl"])},
        "data": {"source": "folder", "path": str(tiny_data)},
        "prepare": {
            "cache_dir": str(tiny_caches / "sdxl"),
            "resolution": 32,
            "store_precision": "fp32",
        },
        "train": {
            "output_dir": "unused",
            "objective": {"name": "dpo", "beta": 500.0},
            # Fast, or margins would be little more than rounding, and its sign a ledger's vote.
            "optim": {"lr": 1e-3, "warmup_steps": 2},
            "max_steps": STEPS,
            "micro_batch_size": 2,
            "precision": "fp32",
            "checkpoint_every": MIDDLE,
            "trackers": [],
        },
    }
    path = tmp_path_factory.mktemp("two") / "base.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path
