"""DeepSpeed's settings, taken from ours or refused; checkpoints made folders for diffusers."""

import os
import threading
import time

import pytest
import torch

from fastpo.cli import main
from fastpo.config import OptimConfig, load_config
from fastpo.errors import CheckpointError, ConfigError
from fastpo.train import train
from fastpo.train.consolidate import consolidate
from fastpo.train.zero import NAMES, cpu_adam, read_settings, short_texts, wait_for_build

pytest.importorskip("deepspeed")
from deepspeed.git_version_info import installed_ops


def train_config(experiment, **options):
    return load_config(experiment(**options)).train


@pytest.mark.parametrize("name", NAMES)
def test_packaged_settings_take_batch_clipping_and_precision_from_ours(experiment, name):
    config = train_config(
        experiment,
        deepspeed=name,
        precision="bf16",
        accumulation_steps=3,
        optim={"max_grad_norm": 0.5},
    )
    settings = read_settings(config, processes=4)
    assert settings["zero_optimization"]["stage"] == int(name[4])
    assert settings["train_batch_size"] == 2 * 3 * 4
    assert settings["gradient_clipping"] == 0.5
    assert settings["torch_autocast"]["enabled"]
    assert not settings["bf16"]["enabled"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"zero_optimization": {"stage": 0}}', r"stage must be 1, 2 or 3, got 0"),
        ('{"zero_optimization": null}', r"stage must be 1, 2 or 3, got None"),
        ("[]", "must hold an object"),
        ("{", "not a JSON file"),
        ('{"zero_optimization": {"stage": 2}, "optimizer": {}}', r"'optimizer'; train\.optim"),
        (
            '{"zero_optimization": {"stage": 2}, "gradient_clipping": 7}',
            r"gradient_clipping is 7 there, but train\.optim\.max_grad_norm says 1\.0",
        ),
        (
            '{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}',
            r"bf16\.enabled is True there",
        ),
        (
            '{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}',
            "zero_hpz_partition_size is not supported",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
            r"offload_param\.device: nvme is not supported",
        ),
    ],
)
def test_a_users_settings_that_contradict_ours_are_refused(
    experiment, tmp_path, content, complaint
):
    file = tmp_path / "ds.json"
    file.write_text(content)
    config = train_config(experiment, deepspeed=str(file))
    with pytest.raises(ConfigError, match=complaint):
        read_settings(config, processes=2)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"precision": "fp16"}, r"train\.precision: fp16"),
        ({"optim": {"name": "adafactor"}}, r"train\.optim\.name: adafactor"),
        ({"method": "full", "precision": "bf16", "weights": "bf16"}, r"train\.weights: bf16"),
    ],
)
def test_options_that_an_engine_computes_wrongly_are_refused(experiment, options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        train_config(experiment, deepspeed="zero2", **options)


def test_unknown_settings_and_a_launchers_own_are_refused(experiment, monkeypatch):
    with pytest.raises(ConfigError, match="neither a file nor one of zero1, zero2"):
        read_settings(train_config(experiment, deepspeed="zero4"), processes=1)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"say which in train\.deepspeed"):
        train(load_config(experiment()), progress=False)


def test_consolidate_names_what_is_missing(experiment, tmp_path):
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        consolidate(tmp_path, tmp_path / "out")
    folder = train(load_config(experiment(max_steps=1)), progress=False)
    with pytest.raises(CheckpointError, match=r"no average-export.*train\.ema_decay"):
        consolidate(folder, tmp_path / "out", average=True)
    assert not (tmp_path / "out").exists()


def test_the_moving_average_is_consolidated_as_training_exports_it(experiment, tmp_path, exported):
    folder = train(load_config(experiment(ema_decay=0.5)), progress=False)
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["consolidate", str(folder), str(tmp_path / "out"), "--average"])
    a, b = exported(folder, "ema"), exported(tmp_path, "out")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """As if another process were compiling DeepSpeed's CPU optimizer."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    file = tmp_path / "cpu_adam" / "lock"
    file.parent.mkdir()
    file.touch()
    return file


def test_a_killed_build_s_lock_is_named_instead_of_waited_for(lock):
    long_ago = time.time() - 3600
    os.utime(lock, (long_ago, long_ago))
    with pytest.raises(ConfigError, match=rf"{lock} .* cpu_adam .* for 60 minutes.* delete it"):
        cpu_adam([torch.nn.Parameter(torch.zeros(3))], OptimConfig())
    assert lock.exists()


def test_a_running_build_is_waited_for(lock, capsys):
    threading.Timer(0.5, lock.unlink).start()
    started = time.monotonic()
    wait_for_build("cpu_adam")
    assert 0.4 < time.monotonic() - started < 60.0
    assert capsys.readouterr().err.count(str(lock)) == 1
    wait_for_build("cpu_adam")
    assert not capsys.readouterr().err


def test_an_operator_compiled_with_deepspeed_waits_for_nobody(lock, monkeypatch):
    monkeypatch.setitem(installed_ops, "cpu_adam", True)
    wait_for_build("cpu_adam", patience=0.0)
    assert lock.exists()


def test_weights_are_texts_of_a_few_numbers_while_an_engine_starts():
    before = repr(torch.arange(900.0))
    with short_texts():
        assert "..." in repr(torch.arange(900.0))
    assert repr(torch.arange(900.0)) == before
    assert "..." not in before
