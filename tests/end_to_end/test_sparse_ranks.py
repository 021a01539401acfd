"""`train.backward` under DeepSpeed ZeRO, and two processes' gradients beside those of `all`."""

import json

import pytest
import torch

pytest.importorskip("deepspeed")
STEPS = 10
LEDGER = [
    "train.objective={name: adaptive_dpo, beta: 500.0, weight_kind: gate}",
    "train.annotators={kind: ledger}",
    "train.statistics=running",
]
KINDS = {
    "all": LEDGER,
    "alive": [*LEDGER, "train.backward=alive"],
    "sampled": ["train.backward=sampled", "train.backward_threshold=8.0"],
}
METHODS = {"lora": "1e-2", "full": "1e-3"}
MODES = ("plain", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def runs(base, train_on_two):
    """`runs[mode, method, kind]` is the folder of a run of two processes."""
    folders, jobs = {}, []
    for mode in MODES:
        for method, rate in METHODS.items():
            for kind, options in KINDS.items():
                key = mode, method, kind
                folders[key] = base.parent / "-".join(key)
                settings = [f"train.method={method}", f"train.optim.lr={rate}", *options]
                settings += ["train.accumulation_steps=2", f"train.max_steps={STEPS}"]
                settings += [f"train.output_dir={folders[key]}"]
                settings += [] if mode == "plain" else [f"train.deepspeed={mode}"]
                jobs.append({"name": " ".join(key), "config": str(base), "set": settings})
    outcomes = train_on_two(base.parent, jobs)
    assert set(outcomes.values()) == {"ok"}, outcomes
    return folders


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(a, b, keys=("loss", "rewards/margins", "grad_norm"), rel=5e-3):
    for x, y in zip(a, b, strict=True):
        for key in keys:
            assert y[key] == pytest.approx(x[key], rel=rel, abs=2e-5), (key, x["step"])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_alive_trains_as_all_does(runs, mode, method, exported):
    whole, alive = runs[mode, method, "all"], runs[mode, method, "alive"]
    assert_same(metrics(whole), metrics(alive))
    assert min(m["backward/share"] for m in metrics(alive)) < 1.0
    a, b = exported(whole), exported(alive)
    assert all(torch.allclose(a[name], b[name], rtol=0, atol=1e-3) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES[1:])
def test_every_stage_draws_and_trains_as_plain_data_parallelism(runs, mode, method):
    plain, sharded = (metrics(runs[m, method, "sampled"]) for m in ("plain", mode))
    assert plain[-1]["backward/cost"] < 3.0
    told = ("loss", "grad_norm", "backward/share", "backward/cost", "backward/effective")
    assert_same(plain, sharded, told)
