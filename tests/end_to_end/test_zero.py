"""DeepSpeed ZeRO on two processes: all stages train, save, resume and export as plain DDP does.

All runs of two processes happen in one launch (`many_runs.py`); the tests compare what they left.
"""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from fastpo.config import load_config
from fastpo.train import train
from fastpo.train.consolidate import consolidate
from tests.end_to_end.many_runs import interrupt
from tests.forked import FORK

pytest.importorskip("deepspeed")
STEPS, MIDDLE = 4, 2  # of the base configuration: all, and those before its checkpoint
ADAPTIVE = "train.objective={name: adaptive_dpo, beta: 500.0}"
OBJECTIVES = {
    "dpo": [],
    "mapo": ["train.objective={name: mapo}"],
    "ledger": [
        ADAPTIVE,
        "train.annotators={kind: ledger}",
        "data.held_out=0.3",
        "train.held_out_every=1",
    ],
}
# Adapters start at zero: slower ones would leave margins that are little more than rounding.
METHODS = {
    "lora": ["train.method=lora", "train.optim.lr=1e-2"],
    "full": ["train.method=full"],
}
MATRIX = {f"{m} {o}": [*METHODS[m], *OBJECTIVES[o]] for m in METHODS for o in OBJECTIVES}
# Every stage meets both methods, and every objective meets a stage. Of each stage, the ledger's
# run is resumed, whose checkpoints hold the most; whole weights before adapters.
SHARDED = {
    "zero1": ("lora ledger", "full dpo"),
    "zero2": ("lora mapo", "full ledger"),
    "zero3": ("lora ledger", "full ledger"),
}
RUNS = [("plain", what) for what in MATRIX if any(what in some for some in SHARDED.values())]
RUNS += [(mode, what) for mode, several in SHARDED.items() for what in several]
RESUMED = [
    (mode, what)
    for mode, what in RUNS
    if what == "full ledger" or (what == "lora ledger" and mode in ("plain", "zero1"))
]
AVERAGES = [
    ADAPTIVE,
    "train.annotators={kind: ema, decays: [0.9, 0.5]}",
    "train.ema_decay=0.9",
]
EXTRAS = {
    "lora ema": [*METHODS["lora"], *AVERAGES],
    "full ema": [*METHODS["full"], *AVERAGES],
    "lora micro": [
        *METHODS["lora"],
        "train.accumulation_steps=2",
        "train.gradient_checkpointing=offload",
        "train.max_steps=2",
        "train.lora.dropout=0.2",
    ],
    "full micro": [
        "train.method=full",
        "train.accumulation_steps=2",
        "train.gradient_checkpointing=true",
        "train.max_steps=2",
    ],
    "lora bf16": [*METHODS["lora"], "train.precision=bf16", "train.max_steps=1"],
    "full bf16": [*METHODS["full"], "train.precision=bf16", "train.max_steps=1"],
}
# Of what both methods do alike under a stage, each stage meets one method.
EXTRAS_OF = {
    "plain": tuple(EXTRAS),
    "zero2": ("lora ema", "full micro", "lora bf16", "full bf16"),
    "zero3": ("full ema", "lora micro", "lora bf16", "full bf16"),
}
ONCE = {f"{m} fp32": [*METHODS[m], "train.max_steps=1"] for m in METHODS}


@pytest.fixture(scope="module")
def alone(base):
    """A run of one process, whose two micro-batches a step are those of two processes."""
    folder = base.parent / "alone"
    changes = [*MATRIX["full ledger"], "train.accumulation_steps=2"]
    train(load_config(base, [*changes, f"train.output_dir={folder}"]), progress=False)
    return folder


@pytest.fixture(scope="module")
def runs(base, alone, train_on_two):
    """All runs of two processes: `runs[mode, what]` is a folder, `what` one of the tables above."""
    folders, jobs = {}, []
    shared = load_config(base).train
    assert (shared.max_steps, shared.checkpoint_every) == (STEPS, MIDDLE)

    def add(mode, what, changes, after=None):
        key = mode, what if after is None else f"{what}, resumed"
        folders[key] = base.parent / "-".join(key).replace(" ", "_").replace(",", "")
        settings = [*changes, f"train.output_dir={folders[key]}"]
        settings += [] if mode == "plain" else [f"train.deepspeed={mode}"]
        job = {"name": " ".join(key), "config": str(base), "set": settings}
        jobs.append(job if after is None else {**job, "after": [str(after), MIDDLE]})

    for mode, what in RUNS:
        add(mode, what, MATRIX[what])
        if (mode, what) in RESUMED:
            add(mode, what, MATRIX[what], after=folders[mode, what])
    for mode, several in EXTRAS_OF.items():
        for what in several:
            add(mode, what, EXTRAS[what])
            if "ema" in what and mode != "plain":
                add(mode, what, EXTRAS[what], after=folders[mode, what])
    for what, changes in ONCE.items():
        add("plain", what, changes)
    add("zero2", "alone", MATRIX["full ledger"], after=alone)
    outcomes = train_on_two(base.parent, jobs)
    assert set(outcomes.values()) == {"ok"}, outcomes
    return folders


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


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
@pytest.mark.parametrize(("mode", "what"), [run for run in RUNS if run[0] != "plain"])
def test_every_stage_trains_as_plain_data_parallelism(runs, mode, what):
    plain, sharded = runs["plain", what], runs[mode, what]
    assert_same_steps(metrics(plain), metrics(sharded))
    start, *ends = (checkpoint(plain, MIDDLE), checkpoint(plain, STEPS), checkpoint(sharded, STEPS))
    assert_same_update(start, *ends)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "what"), RESUMED)
def test_interrupted_and_resumed_equals_uninterrupted(runs, mode, what, exported):
    whole, resumed = runs[mode, what], runs[mode, f"{what}, resumed"]
    assert_same_steps(metrics(whole), metrics(resumed), exactly=True)
    a, b = exported(whole), exported(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (whole / "minority.csv").read_text() == (resumed / "minority.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "what"), RUNS)
def test_a_checkpoint_is_consolidated_as_training_exports_it(runs, mode, what, tmp_path, exported):
    out = consolidate(runs[mode, what], tmp_path / "out")
    a, b = exported(runs[mode, what]), exported(out.parent, out.name)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["plain", *SHARDED])
def test_stock_diffusers_loads_a_consolidated_checkpoint(runs, mode, method, tmp_path):
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    folder = next(runs[mode, what] for m, what in RUNS if m == mode and method in what)
    out = consolidate(folder, tmp_path / "out")
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
@pytest.mark.parametrize(("mode", "what"), [("zero2", "lora ema"), ("zero3", "full ema")])
def test_moving_averages_judge_and_are_exported_where_weights_are_shared(
    runs, mode, what, exported
):
    plain, sharded = runs["plain", what], runs[mode, what]
    assert_same_steps(metrics(plain), metrics(sharded), rel=5e-2)
    assert metrics(sharded)[-1]["minority/q90"] > 1e-2
    for file in ("average-annotators.safetensors", "average-export.safetensors"):
        a, b = (checkpoint(f, STEPS, file) for f in (plain, sharded))
        assert_same_update(checkpoint(plain, MIDDLE, file), a, b, tolerance=0.1)
    assert exported(plain, "ema").keys() == exported(sharded, "ema").keys()
    assert_same_steps(metrics(sharded), metrics(runs[mode, f"{what}, resumed"]), exactly=True)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "what"), [("zero2", "full micro"), ("zero3", "lora micro")])
def test_accumulation_checkpointing_and_dropout_change_nothing(runs, mode, what):
    assert_same_steps(metrics(runs["plain", what]), metrics(runs[mode, what]))


def first_gradient(folder):
    """The first step's, as AdamW's first moment has it; one vector."""
    saved = torch.load(folder / "checkpoints" / "step-00000001" / "optimizer.pt")["optimizer"]
    return torch.cat([saved[name]["exp_avg"].flatten().double() for name in sorted(saved)])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_in_bf16_stages_differ_by_no_more_than_bf16_does(runs, mode, method):
    """Two roundings of one gradient are sqrt(2) as far from one another as each from the truth."""
    first = metrics(runs[mode, f"{method} bf16"])[0]
    assert first["rewards/margins"] == 0.0, "policy and reference agree before the first update"
    exact, plain, sharded = (
        first_gradient(runs[key])
        for key in (
            ("plain", f"{method} fp32"),
            ("plain", f"{method} bf16"),
            (mode, f"{method} bf16"),
        )
    )
    rounding = (plain - exact).norm()
    assert 1e-3 * exact.norm() < rounding < 0.5 * exact.norm()
    assert (sharded - plain).norm() <= 2 * rounding
    assert (sharded - exact).norm() <= 2 * rounding


@pytest.fixture(scope="module")
def offloaded(base, runs, train_on_two, tmp_path_factory):
    """Runs with the optimizer in host memory; DeepSpeed's own is compiled for a minute or two."""
    folders, jobs = {}, []
    for mode in OFFLOADED:
        for name, after in (("whole", None), ("resumed", runs["zero1", "full dpo"])):
            folders[mode, name] = tmp_path_factory.mktemp("offloaded") / "run"
            changes = [f"train.output_dir={folders[mode, name]}", f"train.deepspeed={mode}"]
            job = {"name": f"{mode} {name}", "config": str(base)}
            job["set"] = [*MATRIX["full dpo"], *changes]
            jobs.append(job if after is None else {**job, "after": [str(after), MIDDLE]})
    outcomes = train_on_two(tmp_path_factory.mktemp("offloaded"), jobs)
    assert set(outcomes.values()) == {"ok"}, outcomes
    return folders


OFFLOADED = ("zero2_offload", "zero3_offload")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("mode", OFFLOADED)
def test_offloaded_runs_equal_plain_ones_and_go_on_from_any_stage(runs, offloaded, mode):
    plain = metrics(runs["plain", "full dpo"])
    assert_same_steps(plain, metrics(offloaded[mode, "whole"]))
    assert_same_steps(plain, metrics(offloaded[mode, "resumed"]))


def launchers():
    """What a launcher, or accelerate, leaves in the environment."""
    known = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return {
        k: v
        for k, v in os.environ.items()
        if k.startswith(("ACCELERATE_", "MASTER_")) or k in known
    }


def train_in_turn(base, folder, modes):
    """In a process of its own: one run in each mode."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    before = launchers()
    for number, mode in enumerate(modes):
        changes = ["train.max_steps=2", f"train.output_dir={folder}/{number}"]
        changes += [] if mode == "plain" else [f"train.deepspeed={mode}"]
        train(load_config(base, changes), progress=False)
        assert launchers() == before, mode


@pytest.mark.slow
def test_one_process_trains_in_one_mode_after_the_other(base, tmp_path):
    modes = ("plain", "zero2", "zero3", "plain")
    process = FORK.Process(target=train_in_turn, args=(base, tmp_path, modes))
    process.start()
    process.join(600)
    assert process.exitcode == 0
    first, *others = (metrics(tmp_path / str(number)) for number in range(4))
    for other in others:
        assert_same_steps(first, other)
    assert_same_steps(first, others[-1], exactly=True)


@pytest.mark.slow
def test_one_processs_run_is_resumed_by_two(runs, alone):
    assert_same_steps(metrics(alone), metrics(runs["zero2", "alone, resumed"]))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "zero2", "zero3"])
def test_two_processes_run_is_resumed_by_one(runs, base, mode, tmp_path):
    interrupt(runs[mode, "full ledger"], MIDDLE, tmp_path)
    changes = [*MATRIX["full ledger"], "train.accumulation_steps=2"]
    config = load_config(base, [*changes, f"train.output_dir={tmp_path}"])
    train(config, resume=True, progress=False)
    assert_same_steps(metrics(runs["plain", "full ledger"]), metrics(tmp_path))
