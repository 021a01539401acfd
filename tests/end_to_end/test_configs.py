"""Every configuration that is shipped trains a tiny twin of itself: same keys, small numbers."""

import math
from pathlib import Path

import pytest

from fastpo.config import load_config
from fastpo.data.prepare import prepare
from fastpo.reference_cache import prepare_reference
from fastpo.testing import pickapic_row, write_pickapic
from fastpo.train import train
from tests.tiny_twins import tiny_twin

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "fastpo" / "configs").glob("*.yaml"))
STEPS = 3


@pytest.fixture(scope="module")
def pickapic(tmp_path_factory):
    """Eight labeled pairs and a tie, in the published columns."""
    folder = tmp_path_factory.mktemp("pickapic")
    rows = [pickapic_row(i, label_0=float(i % 2)) for i in range(8)]
    write_pickapic(folder / "train-00000.parquet", [*rows, pickapic_row(8, label_0=0.5)])
    return folder


def twin_overrides(path, pipelines, data, folder):
    """The `--set` options that make a shipped configuration run here, and nothing else."""
    config = load_config(path).train
    changes = {
        **tiny_twin(load_config(path), pipelines, folder / "model"),
        "data.path": data,
        "data.limit": 8,
        "prepare.cache_dir": folder / "cache",
        "prepare.resolution": 32,
        "prepare.workers": 0,
        "prepare.text_precision": "fp32",
        "train.output_dir": folder / "run",
        "train.micro_batch_size": min(config.micro_batch_size, 2),
        "train.accumulation_steps": min(config.accumulation_steps, 2),
        "train.loader_workers": 0,
        "train.trackers": "[]",
        "train.epochs": "null",
        "train.max_steps": STEPS,
    }
    if config.precision == "fp16":  # refused on a CPU
        changes["train.precision"] = "bf16"
    return [f"{key}={value}" for key, value in changes.items()]


def twin(path, pipelines, data, folder):
    """The twin's configuration, its data prepared, and its overrides."""
    overrides = twin_overrides(path, pipelines, data, folder)
    config = load_config(path, overrides)
    prepare(config, progress=False)
    if config.train.reference == "cached":
        processes = 2 if config.train.deepspeed else 1
        prepare_reference(config, None, processes=processes, progress=False)
    return config, overrides


def check(folder, read_metrics):
    """A finished run with finite numbers and an exported model."""
    metrics = read_metrics(folder)
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    assert all(math.isfinite(value) for m in metrics for value in m.values())
    assert metrics[0]["grad_norm"] > 0
    assert list((folder / "final").rglob("*.safetensors"))


PLAIN = [p for p in CONFIGS if load_config(p).train.deepspeed is None]


@pytest.mark.parametrize("path", PLAIN, ids=[p.stem for p in PLAIN])
def test_a_shipped_configuration_trains_its_tiny_twin(
    path, light_pipelines, pickapic, tmp_path, read_metrics
):
    config, _ = twin(path, light_pipelines, pickapic, tmp_path)
    check(train(config, progress=False), read_metrics)


@pytest.mark.slow
def test_shipped_deepspeed_configurations_train_on_two_processes(
    light_pipelines, pickapic, tmp_path, read_metrics, train_on_two
):
    pytest.importorskip("deepspeed")
    sharded = [p for p in CONFIGS if p not in PLAIN]
    assert sharded
    jobs = []
    for path in sharded:
        folder = tmp_path / path.stem
        overrides = twin(path, light_pipelines, pickapic, folder)[1]
        jobs.append({"name": path.stem, "config": str(path), "set": overrides})
    assert set(train_on_two(tmp_path, jobs).values()) == {"ok"}
    for path in sharded:
        check(tmp_path / path.stem / "run", read_metrics)
