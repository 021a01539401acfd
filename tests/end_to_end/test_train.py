"""Training step by step: runs that must agree do, and what a run leaves behind is usable."""

import csv
import math
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpo.config import load_config
from fastpo.data.cache import PairCache
from fastpo.errors import NonFiniteLossError
from fastpo.train import Observer, train
from fastpo.train.distributed import joined
from fastpo.train.loop import setup
from fastpo.train.run_folder import RunFolder

ADAPTIVE = {"name": "adaptive_dpo", "beta": 500.0}
RUNS = {
    "dpo": {},
    "dpo, full, SD1.5": {"family": "sd15", "method": "full"},
    "mapo": {"objective": {"name": "mapo"}},
    "sft, full": {"objective": {"name": "sft"}, "method": "full"},
    "ledger": {
        "objective": {**ADAPTIVE, "weight_kind": "gate"},
        "annotators": {"kind": "ledger"},
        "max_steps": 16,
    },
    "ema": {"objective": ADAPTIVE, "annotators": {"kind": "ema"}},
    "ema, ipo, full, bf16": {
        "objective": {"name": "adaptive_ipo", "tau": 10.0},
        "annotators": {"kind": "ema", "decays": [0.9], "warmup_steps": 1},
        "method": "full",
        "precision": "bf16",
    },
    "dropout, captions, checkpointing": {
        "lora": {"rank": 2, "dropout": 0.3},
        "empty_prompt_rate": 0.5,
        "gradient_checkpointing": True,
        "ema_decay": 0.9,
    },
    "Turbo's timesteps, min-SNR": {
        "timesteps": {"kind": "list", "values": [249, 499, 749, 999]},
        "snr_gamma": 5.0,
        "objective": {"name": "mapo"},
    },
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_logs_every_step_and_writes_its_results(experiment, read_metrics, options):
    path = experiment(**options)
    config = load_config(path)
    folder = train(config, progress=False)
    metrics = read_metrics(folder, timing=True)
    assert [m["step"] for m in metrics] == list(range(1, config.train.max_steps + 1))
    assert all(math.isfinite(v) for m in metrics for v in m.values())
    assert metrics[0]["grad_norm"] > 0
    if config.train.objective.name == "dpo":
        assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    if config.train.annotators is not None:
        assert 0 <= metrics[-1]["minority/q10"] <= metrics[-1]["minority/q90"] <= 1
    expected = ["config.yaml", "final", "metrics.jsonl", "minority.csv"]
    expected += ["ema"] if config.train.ema_decay else []
    assert set(expected) <= {p.name for p in folder.iterdir()}
    assert not [p for p in folder.rglob("*") if "partial" in p.name]


def test_metrics_tell_the_share_of_a_step_that_waited_for_data(
    experiment, read_metrics, monkeypatch
):
    read = PairCache.read

    def slowly(*args, **options):
        time.sleep(0.3)
        return read(*args, **options)

    path = experiment(max_steps=3, loader_workers=0)
    plain = read_metrics(train(load_config(path), progress=False), timing=True)
    monkeypatch.setattr(PairCache, "read", slowly)
    slow = read_metrics(train(load_config(path), overwrite=True, progress=False), timing=True)
    for fast_step, slow_step in zip(plain, slow, strict=True):
        seconds = 2 / slow_step["pairs_per_second"]  # of a step of two pairs
        assert 0.3 / seconds <= slow_step["data/wait"] < 1.0
        assert 0.0 <= fast_step["data/wait"] < slow_step["data/wait"]


def test_the_trained_model_prefers_the_winners_more(experiment, tiny_pipelines, read_metrics):
    """With all of its blocks: the light one learns too slowly."""
    whole = [f"model.path={tiny_pipelines['sdxl']}"]
    config = load_config(experiment(max_steps=60, optim={"lr": 3e-3}), whole)
    metrics = read_metrics(train(config, progress=False))
    early = sum(m["rewards/margins"] for m in metrics[:12])
    late = sum(m["rewards/margins"] for m in metrics[-12:])
    assert late > early
    assert late > 0


def test_the_same_run_twice_is_the_same_exactly(run):
    first = run(name="first")
    assert first == run(name="second")
    assert first != run(name="third", seed=8)


def test_two_processes_equal_accumulation_over_two(experiment, read_metrics, train_on_two, run):
    jobs, folders = [], {}
    # processes, the default, looks at those that there are
    running = {"objective": ADAPTIVE, "statistics": "running", "max_steps": 8}
    gate = {**running, "objective": {**ADAPTIVE, "weight_kind": "gate"}}
    sampled = {"backward": "sampled", "backward_threshold": 8.0, "optim": {"lr": 1e-2}}
    kinds = {
        "ledger": {**running, "annotators": {"kind": "ledger"}},
        "ema": {**running, "annotators": {"kind": "ema"}},
        "alive": {**gate, "annotators": {"kind": "ledger"}, "backward": "alive", "max_steps": 12},
        "sampled": {"max_steps": 8, "method": "full", "auto_slope": 0.3, **sampled},
    }
    for kind, options in kinds.items():
        run(name=f"{kind}-one", accumulation_steps=2, **options)
        path = experiment(name=f"{kind}-two", **options)
        jobs.append({"name": kind, "config": str(path), "set": []})
        folders[kind] = [path.parent / f"{kind}-{number}" for number in ("one", "two")]
    assert set(train_on_two(path.parent, jobs).values()) == {"ok"}
    for one, two in folders.values():
        before, after = read_metrics(one), read_metrics(two)
        assert len(before) == len(after) >= 8
        for a, b in zip(before, after, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                if key in ("backward/share", "backward/cost"):
                    # Those of the process with the most pairs, by which both choose how to step.
                    assert b[key] <= (1.0 if key == "backward/share" else 4.0)
                    continue
                assert b[key] == pytest.approx(a[key], rel=2e-3, abs=2e-6), key
        assert minority_column(one, "visits") == minority_column(two, "visits")
    last = {kind: read_metrics(one)[-1] for kind, (one, _) in folders.items()}
    assert last["alive"]["backward/closed"] > 0
    assert last["sampled"]["backward/cost"] < 3.0


def minority_column(folder, column):
    with (folder / "minority.csv").open() as file:
        return [row[column] for row in csv.DictReader(file)]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_a_stock_pipeline_loads_what_training_wrote(experiment, family, method):
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    path = experiment(family, method=method, optim={"lr": 1e-2})
    config = load_config(path)
    final = train(config, progress=False) / "final"
    pipeline = DiffusionPipeline.from_pretrained(config.model.path)
    pipeline.set_progress_bar_config(disable=True)
    sample = dict(num_inference_steps=2, output_type="np", height=32, width=32)
    before = pipeline("prompt 0", generator=torch.manual_seed(0), **sample).images
    if method == "lora":
        pipeline.load_lora_weights(final)
    else:
        pipeline.unet = UNet2DConditionModel.from_pretrained(final, subfolder="unet")
    after = pipeline("prompt 0", generator=torch.manual_seed(0), **sample).images
    assert abs(after - before).max() > 1e-4


def test_the_triton_loss_trains_like_the_reference(run):
    options = {"objective": ADAPTIVE, "annotators": {"kind": "ledger"}, "max_steps": 3}
    reference = run(name="reference", loss_impl="reference", **options)
    for a, b in zip(reference, run(name="triton", loss_impl="triton", **options), strict=True):
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-6), key


def test_micro_batches_of_one_equal_one_of_three(run):
    """For DPO, whose pairs do not meet, only the number of pairs in a step matters.

    An error of order 1 rounds by 1e-7 in float32, which the slope of 500 makes 5e-5 on the logit.
    """
    data = {"limit": 3}  # one shape, so that each step holds the same pairs either way
    options = {"max_steps": 3, "data": data}
    big = run(name="big", micro_batch_size=3, **options)
    small = run(name="small", micro_batch_size=1, accumulation_steps=3, **options)
    for a, b in zip(big, small, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_a_compiled_run_equals_a_plain_one(run):
    """Under accelerate's own wrapping of the forward pass, with checkpointing and adapters off."""
    options = {"max_steps": 2, "gradient_checkpointing": True, "data": {"limit": 2}}
    plain = run(name="plain", **options)
    torch._dynamo.utils.counters.clear()
    compiled = run(name="compiled", compile=True, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for a, b in zip(plain, compiled, strict=True):
        # In the first step margins are zero, or what compiled code rounds: which side is chance.
        for key in a.keys() - ({"rewards/accuracies"} if a["step"] == 1 else set()):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), key


def test_flipped_labels_are_recorded_beside_the_data_and_the_run(experiment, tiny_caches):
    path = experiment(data={"flip_rate": 0.4, "flip_seed": 1}, max_steps=1)
    folder = train(load_config(path), progress=False)
    mask = (tiny_caches / "sdxl" / "flips-rate0.4-seed1.csv").read_text().splitlines()[1:]
    flipped = [line.rsplit(",", 1)[1] in ("1", "True", "true") for line in mask]
    assert 0 < sum(flipped) < len(flipped)
    assert [v == "1" for v in minority_column(folder, "flipped")] == flipped


def test_a_non_finite_loss_stops_with_the_step_and_the_pairs_named(experiment, read_metrics):
    path = experiment(optim={"lr": 1.0, "weight_decay": 1e30}, checkpoint_every=1)
    with pytest.raises(NonFiniteLossError, match=r"step \d+ is not finite.*p\d.*step-0000000") as e:
        train(load_config(path), progress=False)
    folder = load_config(path).train.output_dir
    steps = len(read_metrics(folder))
    assert f"loss of step {steps + 1} " in str(e.value)
    assert not (folder / "final").exists()
    assert (folder / "checkpoints" / f"step-{steps:08d}").is_dir()


class Overflow(Observer):
    """Makes one weight's gradient infinite in one optimizer step (from 1)."""

    def __init__(self, step):
        self.step, self.seen = step, 0

    def on_start(self, trainer, start):
        next(iter(trainer.state.trainable.values())).register_hook(self.overflow)

    def overflow(self, gradient):
        self.seen += 1
        return torch.full_like(gradient, math.inf) if self.seen == self.step else gradient


def test_a_non_finite_gradient_stops_before_ruined_weights_are_saved(experiment):
    path = experiment(checkpoint_every=1, keep_checkpoints=1)
    with pytest.raises(NonFiniteLossError, match=r"gradient of step 3 .*step-00000002"):
        train(load_config(path), progress=False, observers=[Overflow(3)])
    kept = [p.name for p in (path.parent / "run" / "checkpoints").iterdir()]
    assert kept == ["step-00000002"]


class Diary(Observer):
    """Notes what it is told, and may stop the run."""

    def __init__(self, stop_after=None):
        self.stop_after, self.starts, self.steps = stop_after, [], []

    def on_start(self, trainer, start):
        self.starts.append((start, len(trainer.state.trainable) > 0))

    def on_step(self, step, table, metrics):
        self.steps.append((step, len(table.index), dict(metrics)))
        if step == self.stop_after:
            raise KeyboardInterrupt


def test_observers_see_every_step_and_may_stop_the_run(experiment, read_metrics):
    path, first, second = experiment(), Diary(), Diary(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        train(load_config(path), progress=False, observers=[first, second])
    folder = path.parent / "run"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (folder / "final").exists()
    rest = Diary()
    train(load_config(path), resume=True, progress=False, observers=[rest])
    assert first.starts == second.starts == [(0, True)] and rest.starts == [(2, True)]
    seen = first.steps + rest.steps
    assert [step for step, _, _ in seen] == [1, 2, 3, 4]
    assert sum(pairs for _, pairs, _ in seen) == 8 - 1  # the odd one of eleven is alone
    assert [metrics for _, _, metrics in seen] == read_metrics(folder, timing=True)


class HostReads(TorchDispatchMode):
    """Counts operators that make the host wait for the device."""

    WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.item", "aten.equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(self.WAITING):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["ema", "ledger"])
def test_a_step_waits_for_the_device_once(experiment, kind, monkeypatch):
    """Besides `StepResult.read` nothing asks for a value on the host.

    Left out are the loader and AdamW's step, which on a CPU reads its own count of steps: what they
    read lies on the host.
    """
    reads, adamw = HostReads(), torch.optim.AdamW.step

    def unwatched(*args, **kwargs):
        reads.__exit__(None, None, None)
        try:
            return adamw(*args, **kwargs)
        finally:
            reads.__enter__()

    monkeypatch.setattr(torch.optim.AdamW, "step", unwatched)
    options = {"objective": ADAPTIVE, "annotators": {"kind": kind}, "accumulation_steps": 2}
    config = load_config(experiment(**options))
    with joined(config.train) as processes:
        run = setup(config, processes, RunFolder(config.train.output_dir, main=True))
        batches = iter(list(run.data.loader(processes, 0, workers=0)))
        for step in range(run.data.total_steps):
            with reads:
                result = run.trainer.optimizer_step(batches, step)
            assert reads.seen == []
            run.trainer.record(result.read())
    with reads:
        result.read()
    assert reads.seen == ["aten._local_scalar_dense.default"], "the wait that it can see"
