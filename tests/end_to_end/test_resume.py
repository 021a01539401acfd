"""Checkpoints: a run that goes on is the run that was not stopped, and no other."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastpo.cli import main
from fastpo.config import load_config
from fastpo.errors import CheckpointError
from fastpo.train import Observer, train
from tests.forked import FORK

ADAPTIVE = {"name": "adaptive_dpo", "beta": 500.0}


@pytest.mark.parametrize(
    "options",
    [
        {
            "lora": {"rank": 2, "dropout": 0.2},
            "objective": ADAPTIVE,
            "annotators": {"kind": "ema"},
            "statistics": "running",
        },
        {"method": "full", "objective": ADAPTIVE, "annotators": {"kind": "ledger"}},
    ],
    ids=["lora, ema", "full, ledger"],
)
def test_killed_and_resumed_equals_uninterrupted(experiment, read_metrics, options, run, exported):
    options = {**options, "max_steps": 14, "checkpoint_every": 3, "ema_decay": 0.9}
    whole = run(name="whole", **options)
    path = experiment(name="killed", **options)
    folder = load_config(path).train.output_dir
    process = FORK.Process(target=main, args=(["train", str(path)],))
    process.start()
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(read_metrics(folder)) < 14
    train(load_config(path), resume=True, progress=False)
    assert read_metrics(folder) == whole
    one, two = (exported(path.parent / name) for name in ("whole", "killed"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    minority = [(path.parent / n / "minority.csv").read_text() for n in ("whole", "killed")]
    assert minority[0] == minority[1]


def as_before_manifests(checkpoint):
    """Makes a checkpoint an earlier version's, without checksums: a test may change it."""
    (checkpoint / "manifest.json").unlink()
    state = checkpoint / "state.json"
    about = json.loads(state.read_text())
    state.write_text(json.dumps({k: about[k] for k in ("step", "cache", "group", "config")}))
    return checkpoint


def test_a_checkpoint_of_another_number_of_processes_is_refused(experiment):
    path = experiment(micro_batch_size=1, accumulation_steps=2)
    train(load_config(path), progress=False)
    other = load_config(path, ["train.accumulation_steps=1", "train.max_steps=6"])
    with pytest.raises(CheckpointError, match=r"with 2 micro-batches a step.*this run has 1"):
        train(other, resume=True, progress=False)


def test_a_ledger_of_another_version_is_named(experiment):
    path = experiment()
    folder = train(load_config(path), progress=False)
    file = as_before_manifests(folder / "checkpoints" / "step-00000004") / "ledger.safetensors"
    saved = load_file(file)
    saved["moments"] = saved["moments"][:3].clone()
    save_file(saved, file)
    with pytest.raises(CheckpointError, match=r"ledger\.safetensors: .*another scale"):
        train(load_config(path), resume=True, progress=False)


def test_what_a_killed_save_left_is_swept_up(experiment):
    path = experiment()
    folder = train(load_config(path), progress=False)
    (folder / "checkpoints" / ".step-00000006.partial-1").mkdir()
    (folder / "final").rename(folder / ".final.old-1")
    train(load_config(path), resume=True, progress=False)
    assert not [p for p in folder.rglob(".*") if "partial" in p.name or ".old-" in p.name]
    assert (folder / "final").is_dir()


def contents(folder):
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".writer"]
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def test_a_finished_run_is_left_alone_and_a_shorter_one_refused(experiment, capsys):
    path = experiment()
    folder = train(load_config(path), progress=False)
    before = contents(folder)
    with pytest.raises(CheckpointError, match=r"has done 4 steps, train\.max_steps asks for 3"):
        train(load_config(path, ["train.max_steps=3"]), resume=True, progress=False)
    epochs = ["train.max_steps=null", "train.epochs=0.2"]
    with pytest.raises(CheckpointError, match=r"has done 4 steps, train\.epochs asks for 2"):
        train(load_config(path, epochs), resume=True, progress=False)
    train(load_config(path), resume=True, progress=False)
    assert "is finished: all 4 steps are done" in capsys.readouterr().out
    assert contents(folder) == before


class Killed(Observer):
    """Ends a run after its last step, as a kill before the export would."""

    def on_step(self, step, table, metrics):
        if step == 6:
            raise KeyboardInterrupt


def test_a_prolonged_run_that_was_killed_before_its_export_is_exported(experiment):
    """Its folder still holds the shorter run's results."""
    path = experiment()
    folder = train(load_config(path), progress=False)
    longer, exported = load_config(path, ["train.max_steps=6"]), folder / "final"
    before = contents(exported)
    with pytest.raises(KeyboardInterrupt):
        train(longer, resume=True, progress=False, observers=[Killed()])
    assert (folder / "checkpoints" / "step-00000006").is_dir()
    assert contents(exported) == before
    train(longer, resume=True, progress=False)
    assert contents(exported) != before
    assert (folder / "minority.csv").is_file()


def test_a_checkpoint_from_before_a_key_was_added_goes_on_with_its_default(experiment):
    path = experiment(checkpoint_every=2)
    folder = train(load_config(path), progress=False)
    state = as_before_manifests(folder / "checkpoints" / "step-00000004") / "state.json"
    about = json.loads(state.read_text())
    del about["config"]["train"]["snr_gamma"]
    state.write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"train\.snr_gamma: None there, 5\.0 here"):
        train(load_config(path, ["train.snr_gamma=5.0"]), resume=True, progress=False)
    train(load_config(path, ["train.max_steps=6"]), resume=True, progress=False)
    assert (folder / "checkpoints" / "step-00000006").is_dir()
    about["config"]["train"]["gone"] = 1  # a key of another version is named
    state.write_text(json.dumps(about))
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    with pytest.raises(CheckpointError, match=r"train\.gone: 1 there, None here"):
        train(load_config(path), resume=True, progress=False)


def test_another_runs_folder_or_checkpoint_is_not_touched(experiment):
    path = experiment()
    train(load_config(path), progress=False)
    with pytest.raises(CheckpointError, match=r"--resume.*--overwrite"):
        train(load_config(path), progress=False)
    other = load_config(path, ["train.objective.beta=9", "train.optim.lr=2e-3"])
    with pytest.raises(CheckpointError, match=r"train\.objective\.beta: 500\.0 there, 9\.0 here"):
        train(other, resume=True, progress=False)
    for step in (2, 4):
        (path.parent / "run" / "checkpoints" / f"step-0000000{step}" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"4: .*state\.json is missing.*2: .*is missing"):
        train(load_config(path), resume=True, progress=False)
    train(load_config(path), overwrite=True, progress=False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "method": "full",
            "precision": "bf16",
            "weights": "bf16",
            "channels_last": True,
            "ema_decay": 0.9,
            "optim": {"name": "adamw_8bit", "lr": 1e-3},
        },
    ],
    ids=["lora", "full, bf16 weights, 8-bit, channels-last"],
)
def test_a_run_may_be_prolonged(experiment, read_metrics, options, run, exported):
    whole = run(name="whole", max_steps=6, **options)
    path = experiment(name="parts", max_steps=4, **options)
    train(load_config(path), progress=False)
    train(load_config(path, ["train.max_steps=6"]), resume=True, progress=False)
    assert read_metrics(path.parent / "parts") == whole
    one, two = (exported(path.parent / name) for name in ("whole", "parts"))
    assert all(torch.equal(one[k], two[k]) for k in one)
