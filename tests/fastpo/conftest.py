"""Caches in small, the threads that their bytes depend on, and what the GPU's scripts run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpo.config import parse_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def one_thread():
    """Torch on one thread, so that sums round alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config_for(tiny_pipelines, tmp_path):
    """`config_for("sdxl", data={...}, prepare={...})`: shards of two pairs in `tmp_path`."""

    def config(family="sdxl", **sections):
        raw = {
            "model": {"path": str(tiny_pipelines[family])},
            "data": {"source": "folder", "path": str(tmp_path / "data")},
            "prepare": {
                "cache_dir": str(tmp_path / "cache"),
                "resolution": 32,
                "shard_size": 2,
                "batch_size": 2,
                "store_precision": "fp32",
            },
            "train": {"output_dir": "unused", "objective": {"name": "sft"}, "max_steps": 1},
        }
        for name, changes in sections.items():
            raw.setdefault(name, {}).update(changes)
        return parse_config(raw)

    return config


@pytest.fixture
def script_calls(tmp_path):
    """Words of each Python call of a GPU's script: `script_calls("gpu.sh", *options)`."""
    stub, log = tmp_path / "python", tmp_path / "calls"
    stub.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"if sys.argv[1] != '-c': print(json.dumps(sys.argv[1:]), file=open({str(log)!r}, 'a'))\n"
    )
    stub.chmod(0o755)

    def asked(script, *options):
        log.write_text("")
        env = {**os.environ, "PYTHON": str(stub), "OUT": str(tmp_path), "COMMIT": "abc1234"}
        command = ["bash", ROOT / "benchmarks" / script, *options]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        return [json.loads(line) for line in log.read_text().splitlines()]

    return asked
