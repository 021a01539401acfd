"""`train.backward` under DeepSpeed ZeRO, and two processes' gradients beside those of `all`."""

import json

import pytest
import torch

pytest.importorskip("deepspeed")
STEPS = 8
LEDGER = [
    "train.objective={name: adaptive_dpo, beta: 500.0, weight_kind: gate}",
    "train.annotators={kind: ledger}",
    "train.statistics=running",
]
KINDS = {
    "all": LEDGER,
    "alive": [*LEDGER, "train.backward=alive"],
}
METHODS = {"lora": "1e-2", "full": "1e-3"}
PLAIN = [("plain", method, kind) for method in METHODS for kind in ("all", "alive")]
# That `all` trains alike under every stage is seen in test_zero.py.
ALIVE = [("zero2", "lora"), ("zero3", "full")]
RUNS = [*PLAIN, *((*run, "alive") for run in ALIVE)]


@pytest.fixture(scope="module")
def runs(base, train_on_two):
    """`runs[mode, method, kind]` is the folder of a run of two processes."""
    folders, jobs = {}, []
    for key in RUNS:
        mode, method, kind = key
        folders[key] = base.parent / "-".join(key)
        settings = [f"train.method={method}", f"train.optim.lr={METHODS[method]}", *KINDS[kind]]
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
@pytest.mark.parametrize(("mode", "method"), [*(("plain", m) for m in METHODS), *ALIVE])
def test_alive_trains_as_all_does(runs, mode, method, exported):
    whole, alive = runs["plain", method, "all"], runs[mode, method, "alive"]
    assert_same(metrics(whole), metrics(alive))
    a, b = exported(whole), exported(alive)
    assert all(torch.allclose(a[name], b[name], rtol=0, atol=1e-3) for name in a)
