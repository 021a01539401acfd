"""DeepSpeed ZeRO on two processes: all stages train, save, resume and export as plain DDP does.

All runs of two processes happen in one launch (`many_runs.py`); the tests compare what they left.
"""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastpo.config import load_config, parse_config
from fastpo.consolidate import consolidate
from fastpo.errors import CheckpointError, ConfigError
from fastpo.train import train
from fastpo.zero import NAMES, read_settings

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("many_runs.py")
BIN = Path(sys.executable).parent
ADAPTIVE = "train.objective={name: adaptive_dpo, beta: 500.0}"
OBJECTIVES = {
    "dpo": [],
    "mapo": ["train.objective={name: mapo}"],
    "ledger": [ADAPTIVE, "train.annotators={kind: ledger}"],
}
METHODS = ("lora", "full")
MODES = ("plain", "zero1", "zero2", "zero3")
MATRIX = {f"{m} {o}": [f"train.method={m}", *OBJECTIVES[o]] for m in METHODS for o in OBJECTIVES}
AVERAGES = [
    ADAPTIVE,
    "train.annotators={kind: ema, decays: [0.9, 0.5]}",
    "train.ema_decay=0.9",
    "train.optim={lr: 1e-3}",  # or averages and policy differ by little more than rounding
]
EXTRAS = {
    "lora ema": AVERAGES,
    "full ema": ["train.method=full", *AVERAGES],
    "lora micro": [
        "train.accumulation_steps=2",
        "train.gradient_checkpointing=true",
        "train.lora.dropout=0.2",
    ],
    "full micro": [
        "train.method=full",
        "train.accumulation_steps=2",
        "train.gradient_checkpointing=true",
    ],
    "full bf16": ["train.method=full", "train.precision=bf16", "train.max_steps=1"],
}
STEPS, MIDDLE = 4, 2


def launch(jobs, processes=2):
    """Runs jobs under torchrun; a rank that dies after its work is done does not matter."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [sys.executable, *command, WORKER, jobs],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=2400,
        check=False,
    )
    file = jobs.with_suffix(".done")
    outcomes = dict(map(json.loads, file.read_text().splitlines())) if file.exists() else {}
    names = [job["name"] for job in json.loads(jobs.read_text())]
    assert list(outcomes) == names, done.stdout[-3000:] + done.stderr[-6000:]
    return outcomes


@pytest.fixture(scope="module")
def base(tiny_data, tiny_pipelines, tiny_caches, tmp_path_factory):
    """The configuration file that all runs change."""
    raw = raw_config(tiny_pipelines["sdxl"], tiny_data, tiny_caches)
    path = tmp_path_factory.mktemp("zero") / "base.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def raw_config(pipeline, data, caches):
    return {
        "seed": 7,
        "model": {"path": str(pipeline)},
        "data": {"source": "folder", "path": str(data)},
        "prepare": {
            "cache_dir": str(caches / "sdxl"),
            "resolution": 32,
            "store_precision": "fp32",
        },
        "train": {
            "output_dir": "unused",
            "objective": {"name": "dpo", "beta": 500.0},
            "optim": {"lr": 1e-4, "warmup_steps": 2},
            "max_steps": STEPS,
            "micro_batch_size": 2,
            "precision": "fp32",
            "checkpoint_every": MIDDLE,
            "trackers": [],
        },
    }


@pytest.fixture(scope="module")
def alone(base):
    """A run of one process, whose two micro-batches a step are those of two processes."""
    folder = base.parent / "alone"
    changes = [*MATRIX["full ledger"], "train.accumulation_steps=2"]
    train(load_config(base, [*changes, f"train.output_dir={folder}"]), progress=False)
    return folder


@pytest.fixture(scope="module")
def runs(base, alone):
    """All runs of two processes: `runs[mode, what]` is a folder, `what` one of the tables above."""
    folders, jobs = {}, []

    def add(mode, what, changes, after=None):
        key = mode, what if after is None else f"{what}, resumed"
        folders[key] = base.parent / "-".join(key).replace(" ", "_").replace(",", "")
        settings = [*changes, f"train.output_dir={folders[key]}"]
        settings += [] if mode == "plain" else [f"train.deepspeed={mode}"]
        job = {"name": " ".join(key), "config": str(base), "set": settings}
        jobs.append(job if after is None else {**job, "after": [str(after), MIDDLE]})

    for mode in MODES:
        for what, changes in MATRIX.items():
            add(mode, what, changes)
            add(mode, what, changes, after=folders[mode, what])
    for mode in ("plain", "zero2", "zero3"):
        for what, changes in EXTRAS.items():
            add(mode, what, changes)
            if "ema" in what and mode != "plain":
                add(mode, what, changes, after=folders[mode, what])
    for mode in ("zero2_offload", "zero3_offload"):
        add(mode, "full dpo", MATRIX["full dpo"])
        add(mode, "full dpo", MATRIX["full dpo"], after=folders["zero1", "full dpo"])
    add("zero2", "alone", MATRIX["full ledger"], after=alone)
    path = base.parent / "jobs.json"
    path.write_text(json.dumps(jobs))
    outcomes = launch(path)
    assert set(outcomes.values()) == {"ok"}, outcomes
    return folders


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def exported(folder, name="final"):
    files = sorted((folder / name).rglob("*.safetensors"))
    assert files
    return {f"{f.name}.{k}": v for f in files for k, v in load_file(f).items()}


def assert_same_steps(a, b, *, exactly=False, rel=5e-3):
    """An error of order 1 rounds by 1e-7, which the slope of 500 makes 5e-5 on the logit.

    Annotators compare margins of order 1e-5: their metric keeps two digits.
    """
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x.keys() - {"pairs_per_second", "data/wait"}:
            judged = key.startswith(("minority", "weight"))
            expected = pytest.approx(x[key], rel=rel, abs=1e-2 if judged else 2e-5)
            assert y[key] == (x[key] if exactly else expected), (key, x["step"])


def assert_same_update(start, a, b, *, tolerance=2e-2):
    """Two ways from `start` lead to the same place, measured by the way's length."""
    assert start.keys() == a.keys() == b.keys()
    way = sum((a[k] - start[k]).double().square().sum() for k in a).sqrt()
    apart = sum((a[k] - b[k]).double().square().sum() for k in a).sqrt()
    assert way > 0
    assert apart <= tolerance * way


def checkpoint(folder, step, file="trainable.safetensors"):
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / file)


@pytest.mark.slow
@pytest.mark.parametrize("what", MATRIX)
@pytest.mark.parametrize("mode", MODES[1:])
def test_every_stage_trains_as_plain_data_parallelism(runs, mode, what):
    plain, sharded = runs["plain", what], runs[mode, what]
    assert_same_steps(metrics(plain), metrics(sharded))
    start, *ends = (checkpoint(plain, MIDDLE), checkpoint(plain, STEPS), checkpoint(sharded, STEPS))
    assert_same_update(start, *ends)


@pytest.mark.slow
@pytest.mark.parametrize("what", MATRIX)
@pytest.mark.parametrize("mode", MODES)
def test_interrupted_and_resumed_equals_uninterrupted(runs, mode, what):
    whole, resumed = runs[mode, what], runs[mode, f"{what}, resumed"]
    assert_same_steps(metrics(whole), metrics(resumed), exactly=True)
    a, b = exported(whole), exported(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (whole / "minority.csv").read_text() == (resumed / "minority.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_stock_diffusers_loads_the_end_and_a_consolidated_checkpoint(runs, mode, method, tmp_path):
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    folder = runs[mode, f"{method} dpo"]
    out = consolidate(folder, tmp_path / "out")
    a, b = exported(folder), exported(tmp_path, "out")
    assert all(torch.equal(a[name], b[name]) for name in a)
    config = load_config(folder / "config.yaml")
    pipeline = DiffusionPipeline.from_pretrained(config.model.path)
    if method == "lora":
        pipeline.load_lora_weights(out)
    else:
        pipeline.unet = UNet2DConditionModel.from_pretrained(out, subfolder="unet")
        assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a", num_inference_steps=1, height=32, width=32, output_type="pt").images
    assert image.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["lora ema", "full ema"])
@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_moving_averages_judge_and_are_exported_where_weights_are_shared(runs, mode, what):
    plain, sharded = runs["plain", what], runs[mode, what]
    assert_same_steps(metrics(plain), metrics(sharded), rel=5e-2)
    assert metrics(sharded)[-1]["minority/q90"] > 1e-2
    for file in ("average-annotators.safetensors", "average-export.safetensors"):
        a, b = (checkpoint(f, STEPS, file) for f in (plain, sharded))
        assert_same_update(checkpoint(plain, MIDDLE, file), a, b, tolerance=0.1)
    assert exported(plain, "ema").keys() == exported(sharded, "ema").keys()
    assert_same_steps(metrics(sharded), metrics(runs[mode, f"{what}, resumed"]), exactly=True)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["lora micro", "full micro"])
@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_accumulation_checkpointing_and_dropout_change_nothing(runs, mode, what):
    assert_same_steps(metrics(runs["plain", what]), metrics(runs[mode, what]))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_policy_and_reference_agree_in_bf16_at_first(runs, mode):
    first = metrics(runs[mode, "full bf16"])[0]
    assert first["rewards/margins"] == 0.0
    norm = metrics(runs["plain", "full bf16"])[0]["grad_norm"]
    assert first["grad_norm"] == pytest.approx(norm, rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero2_offload", "zero3_offload"])
def test_offloaded_runs_equal_plain_ones_and_go_on_from_any_stage(runs, mode):
    plain = runs["plain", "full dpo"]
    assert_same_steps(metrics(plain), metrics(runs[mode, "full dpo"]))
    assert_same_steps(metrics(plain), metrics(runs[mode, "full dpo, resumed"]))


@pytest.mark.slow
def test_one_processs_run_is_resumed_by_two(runs, alone):
    assert_same_steps(metrics(alone), metrics(runs["zero2", "alone, resumed"]))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "zero2", "zero3"])
def test_two_processes_run_is_resumed_by_one(runs, base, mode, tmp_path):
    interrupt = runpy.run_path(str(WORKER))["interrupt"]
    interrupt(runs[mode, "full ledger"], MIDDLE, tmp_path)
    changes = [*MATRIX["full ledger"], "train.accumulation_steps=2"]
    config = load_config(base, [*changes, f"train.output_dir={tmp_path}"])
    train(config, resume=True, progress=False)
    assert_same_steps(metrics(runs["plain", "full ledger"]), metrics(tmp_path))


def test_consolidate_names_what_is_missing(experiment, tmp_path):
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        consolidate(tmp_path, tmp_path / "out")
    folder = train(load_config(experiment(max_steps=1)), progress=False)
    with pytest.raises(CheckpointError, match=r"no average-export.*train\.ema_decay"):
        consolidate(folder, tmp_path / "out", average=True)
    assert not (tmp_path / "out").exists()


def test_the_moving_average_is_consolidated_as_training_exports_it(experiment, fastpo, tmp_path):
    folder = train(load_config(experiment(ema_decay=0.5)), progress=False)
    fastpo("consolidate", folder, tmp_path / "out", "--average")
    a, b = exported(folder, "ema"), exported(tmp_path, "out")
    assert all(torch.equal(a[name], b[name]) for name in a)


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


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "accelerate", "torchrun", "none"])
def test_every_launcher_starts_a_sharded_run(base, launcher, tmp_path):
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
    changes = [f"train.output_dir={tmp_path / 'run'}", "train.deepspeed=zero3", "train.max_steps=2"]
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
    assert (tmp_path / "run" / "final").is_dir(), text[-4000:]
    assert len(metrics(tmp_path / "run")) == 2
    assert f"x {1 if launcher == 'none' else 2} process(es)" in text
    parse_config(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
