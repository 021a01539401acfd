"""A run that is trained again from what it recorded is equal, or the first difference is named."""

import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file

from fastpo.config import load_config
from fastpo.errors import CheckpointError, ConfigError, DifferingRunError
from fastpo.train import train
from fastpo.train.rerun import differences, rerun
from tests.conftest import raw_config
from tests.train.test_changes import StopAfter


@pytest.fixture(scope="module")
def finished(tiny_data, light_pipelines, tiny_caches, tmp_path_factory):
    """A run of four steps whose rate was changed at step 2, and whose length at step 3."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    raw = raw_config("sd15", light_pipelines["sd15"], tiny_data, tiny_caches, folder)
    raw["train"] |= {"max_steps": 9, "checkpoint_every": 1, "ema_decay": 0.5}
    raw["train"]["optim"] = {"lr": 1e-3, "schedule": "linear"}
    path = folder.parent / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    config = load_config(path)
    for step, changes in ((2, []), (3, ["train.optim.lr=2e-3"])):
        with pytest.raises(KeyboardInterrupt):
            observers = [StopAfter(step)]
            train(config, resume=step > 2, changes=changes, progress=False, observers=observers)
    train(config, resume=True, changes=["train.max_steps=4"], progress=False)
    return folder


def test_a_run_with_changes_is_trained_again_equally(finished):
    told = rerun(finished, check=True, progress=False)
    assert told.endswith(
        "equals " + str(finished) + ": weights, minority table and metrics of 4 steps"
    )
    again = finished.with_name("run-rerun")
    records = [json.loads((p / "run.json").read_text())["changes"] for p in (finished, again)]
    keys = ("key", "before", "after", "step")
    one, two = ([[change[key] for key in keys] for change in record] for record in records)
    assert one == two and len(one) == 2
    with pytest.raises(CheckpointError, match="already holds a run"):
        rerun(finished, again, progress=False)


def test_the_first_difference_is_named(finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "other")
    assert list(differences(finished, other)) == []
    (other / "minority.csv").write_text("")
    assert list(differences(finished, other)) == ["minority.csv has other lines"]
    for name in ("ema", "final"):
        file = other / name / "pytorch_lora_weights.safetensors"
        weights = load_file(file)
        key = sorted(weights)[1]
        weights[key].view(-1)[0] += 0.25
        save_file(weights, file)
        found = next(differences(finished, other))
        assert found == f"{name}/pytorch_lora_weights.safetensors: {key} differs by up to 0.25"
    lines = (other / "metrics.jsonl").read_text().splitlines()
    changed = {**json.loads(lines[2]), "pairs_per_second": 0.0}
    lines[2] = json.dumps(changed)
    (other / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n")
    assert next(differences(finished, other)) == "metrics.jsonl had 4 steps and has 3"
    lines[2] = json.dumps({**changed, "grad_norm": 1.0})
    (other / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert next(differences(finished, other)).startswith("metrics.jsonl, step 3: grad_norm was ")


def test_another_result_is_an_error_that_says_what_else_was_different(finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "run")
    lines = (other / "metrics.jsonl").read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "loss": 0.5})
    (other / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    record = json.loads((other / "run.json").read_text())
    record["starts"][-1]["versions"]["torch"] = "1.0"
    (other / "run.json").write_text(json.dumps(record))
    with pytest.raises(DifferingRunError, match=r"step 1: loss was 0\.5 .*\(torch was 1\.0 and is"):
        rerun(other, check=True, progress=False)


def test_only_a_whole_finished_run_on_as_many_processes_is_trained_again(finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "run")
    record = json.loads((other / "run.json").read_text())
    record["starts"][-1]["processes"] = 2
    (other / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="trained by 2 processes, these are 1"):
        rerun(other)
    (other / "final" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has 0 bytes"):
        rerun(other)
    shutil.rmtree(other / "final")
    with pytest.raises(CheckpointError, match="is no finished run"):
        rerun(other)
    assert not (tmp_path / "run-rerun").exists()
