"""`train.backward` on two processes: gradients beside those of `all`, under every ZeRO stage."""

import math
from itertools import zip_longest

import pytest
import torch

pytest.importorskip("deepspeed")

from tests.end_to_end import sparse_steps

BASE = [
    "train.objective={name: adaptive_dpo, beta: 500.0, weight_kind: gate, margin_scale: 500.0}",
    "train.annotators={kind: ledger}",
    "train.statistics=micro_batch",
    # Out of the way: clipping, which would come before the hook, and the update, behind which the
    # next kind of step begins.
    "train.optim={lr: 1.0e-12, max_grad_norm: 1.0e+9}",
    "train.max_steps=1",
    "train.accumulation_steps=3",  # 11 pairs by twos and two shapes: both processes' one epoch
]
AT_ONCE, LOOKING = 1.0, 0.1  # the running share before the step
TOGETHER = "train.statistics=processes"
SAMPLED = ["train.backward=sampled", "train.backward_threshold=1.5"]
ALL, ALIVE, DRAWN = ["train.backward=all"], ["train.backward=alive"], "sampled"
KINDS = {
    "at once": [ALIVE, AT_ONCE],
    "looking first": [ALIVE, LOOKING],
    "at once, statistics of both": [[*ALIVE, TOGETHER], AT_ONCE],
    "looking first, statistics of both": [[*ALIVE, TOGETHER], LOOKING],
    DRAWN: [SAMPLED, LOOKING],
}
WHOLE = {"all": [ALL, None], "all, statistics of both": [[*ALL, TOGETHER], None]}
MODES, METHODS = ("plain", "zero1", "zero2", "zero3"), ("lora", "full")
RUNS = [(mode, method) for method in METHODS for mode in MODES]


@pytest.fixture(scope="module")
def steps(base, steps_on_two):
    """`steps[mode, method][kind]`, see `sparse_steps.py`."""
    jobs = []
    for mode, method in RUNS:
        name = f"{mode}-{method}"
        kinds = {**(WHOLE if mode == "plain" else {}), **KINDS}
        keys = [*BASE, f"train.method={method}", f"train.output_dir={base.parent / name}"]
        keys += [] if mode == "plain" else [f"train.deepspeed={mode}"]
        jobs.append(
            {
                "config": str(base),
                "set": keys,
                "kinds": [[kind, *how] for kind, how in kinds.items()],
                "out": str(base.parent / f"{name}.pt"),
            }
        )
    steps_on_two(base.parent, jobs)
    return {run: torch.load(job["out"]) for run, job in zip(RUNS, jobs, strict=True)}


def distance(a, b):
    """How far gradients are apart, by the first one's length."""
    assert a.keys() == b.keys()
    apart = math.sqrt(sum((a[name] - b[name]).square().sum().item() for name in a))
    length = math.sqrt(sum(a[name].square().sum().item() for name in a))
    assert length > 0
    return apart / length


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "method"), RUNS)
def test_alive_has_the_gradient_of_all(steps, mode, method):
    whole, here = steps["plain", method], steps[mode, method]
    for kind in KINDS:
        if kind == DRAWN:
            continue
        expected = whole["all, statistics of both" if "both" in kind else "all"]
        assert distance(expected["gradients"], here[kind]["gradients"]) <= 2e-5
        assert here[kind]["table"]["index"].equal(expected["table"]["index"])
        torch.testing.assert_close(
            here[kind]["table"]["margin"], expected["table"]["margin"], rtol=1e-7, atol=5e-7
        )
    closed = sparse_steps.VERDICTS[here["at once"]["table"]["index"].long()] < 0
    assert here["at once"]["table"]["kept"].equal((~closed).double())
    assert distance(*(whole[kind]["gradients"] for kind in WHOLE)) > 1e-4  # statistics matter


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "method"), RUNS)
def test_every_stage_draws_the_same_pairs(steps, mode, method):
    plain, here = (steps[m, method][DRAWN] for m in ("plain", mode))
    kept, live = plain["table"]["kept"], plain["table"]["scale"] > 0.0
    assert 0 < (kept > 1.0).sum() < live.sum()
    torch.testing.assert_close(here["table"]["kept"], kept, rtol=1e-4, atol=0)
    assert distance(plain["gradients"], here["gradients"]) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_is_that_of_the_passes_which_processes_wait_for(steps, mode, kind):
    """Counted of full fine-tuning, whose reference is another model than its policy."""
    step = steps[mode, "full"][kind]
    rows = {}
    for graph in (False, True):
        mine, other = (
            [n for n, with_graph in seen if with_graph is graph] for seen in step["passes"]
        )
        rows[graph] = sum(max(pair) for pair in zip_longest(mine, other, fillvalue=0))
        if graph or mode == "zero3":
            assert len(mine) == len(other)
    assert step["cost"][0] == pytest.approx((rows[False] + 3 * rows[True]) / 6)
    assert "looking" in kind or kind == DRAWN or step["cost"][0] < 3.0


@pytest.mark.slow
def test_a_resumed_run_of_both_goes_on_as_if_never_ended(base, train_on_two, read_metrics):
    """With its draws, and the running share by which both go over to looking first."""
    keys = ["train.deepspeed=zero3", "train.method=full"]
    keys += ["train.backward=sampled", "train.backward_threshold=16.0"]
    keys += ["train.accumulation_steps=3", "train.max_steps=8"]
    whole, parts = (base.parent / f"sampled-{name}" for name in ("whole", "parts"))
    jobs = [
        {"name": "whole", "config": str(base), "set": [*keys, f"train.output_dir={whole}"]},
        {"name": "parts", "config": str(base), "set": [*keys, f"train.output_dir={parts}"]},
    ]
    jobs[1]["after"] = [str(whole), 6]
    assert train_on_two(base.parent, jobs) == {"whole": "ok", "parts": "ok"}
    steps = read_metrics(whole)
    assert len(steps) == 8
    assert steps[0]["backward/share"] == 1.0 > steps[-1]["backward/share"]
    assert read_metrics(parts) == steps
