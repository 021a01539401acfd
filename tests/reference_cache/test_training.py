"""Training on reference errors computed before: the same losses, and no reference."""

from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from fastpo.config import ObjectiveConfig, TrainConfig
from fastpo.loss import pair_errors
from fastpo.reference_cache import prepare_reference
from fastpo.reference_cache.store import ReferenceErrors
from fastpo.train import Observer, train
from fastpo.train.checkpoint_folders import list_checkpoints
from fastpo.train.objective import build_loss
from fastpo.types import PairPredictions

ADAPTIVE = {"name": "adaptive_dpo", "beta": 500.0, "weight_kind": "gate"}


RUNS = {
    "lora, accumulation, flips, captions": (
        "sdxl",
        {
            "accumulation_steps": 2,
            "empty_prompt_rate": 0.5,
            "data": {"flip_rate": 0.4, "flip_seed": 1},
        },
    ),
    "full, ledger, SD1.5": (
        "sd15",
        {
            "method": "full",
            "objective": ADAPTIVE,
            "annotators": {"kind": "ledger"},
            "max_steps": 8,
            "optim": {"lr": 1e-5},
        },
    ),
    "lora, ema, bf16, SD1.5": (
        "sd15",
        {"objective": ADAPTIVE, "annotators": {"kind": "ema"}, "precision": "bf16"},
    ),
    "full, bf16": ("sdxl", {"method": "full", "precision": "bf16", "max_steps": 3}),
}


@pytest.mark.parametrize(("family", "options"), RUNS.values(), ids=RUNS)
def test_cached_equals_live_to_rounding(shared, settle, read_metrics, family, options):
    """float32 rounds an error of order 1 by 1e-7, which the slope of 500 makes 5e-5 on the logit.

    In bf16 the predictions are rounded alike wherever a pair stands in its batch, here; on another
    device they may be rounded otherwise.
    """
    live = settle(shared, family, name="live", reference="live", **options)
    cached = settle(shared, family, name="cached", **options)
    prepare_reference(cached, progress=False)
    one, two = (read_metrics(train(config, progress=False)) for config in (live, cached))
    assert len(one) == live.train.max_steps
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-4)
        assert b["rewards/margins"] == pytest.approx(a["rewards/margins"], abs=5e-7)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    visits = [
        (config.train.output_dir / "minority.csv").read_text().splitlines()
        for config in (live, cached)
    ]
    assert [line.split(",")[:3] for line in visits[0]] == [
        line.split(",")[:3] for line in visits[1]
    ]


OBJECTIVES = [get_args(o.model_fields["name"].annotation)[0] for o in
              get_args(get_args(ObjectiveConfig)[0])]  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_takes_errors_for_predictions(name):
    needed = {"tau": 10.0} if name in ("ipo", "adaptive_ipo") else {}
    objective = TypeAdapter(ObjectiveConfig).validate_python({"name": name, **needed})
    loss = build_loss(TrainConfig(output_dir="o", objective=objective, max_steps=1))  # pyright: ignore
    torch.manual_seed(0)
    policy, reference, target = (torch.randn(n, 4, 8, 8) * 0.1 for n in (6, 6, 3))
    minority = torch.tensor([0.1, 0.6, 0.9]) if name.startswith("adaptive") else None
    results = []
    for known in (reference, pair_errors(reference, target)):
        leaf = policy.clone().requires_grad_()
        out = loss(PairPredictions(leaf, known), target, minority, None)
        out.loss.backward()
        results.append((out.loss.detach(), leaf.grad, out.margin))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


class Passes(Observer):
    """Counts the forward passes of the models of a run."""

    def __init__(self):
        self.models, self.count = [], 0

    def on_start(self, trainer, start):
        denoisers = trainer.denoisers
        self.models = [denoisers.policy, denoisers.frozen]
        for model in filter(None, self.models):
            model.register_forward_pre_hook(self.note)

    def note(self, *_):
        self.count += 1


@pytest.mark.parametrize(("reference", "passes"), [("cached", 2), ("live", 4)])
def test_cached_training_holds_and_runs_no_reference(shared, settle, reference, passes):
    config = settle(shared, method="full", max_steps=2, reference=reference)
    prepare_reference(config, 1, progress=False)
    seen = Passes()
    train(config, progress=False, observers=[seen])
    assert (seen.models[1] is None) == (reference == "cached")
    assert seen.count == passes


def test_a_resumed_run_is_the_same_and_live_may_become_cached(shared, settle, read_metrics):
    options = {"max_steps": 6, "checkpoint_every": 3}
    whole = settle(shared, name="whole", **options)
    prepare_reference(whole, progress=False)
    expected = read_metrics(train(whole, progress=False))
    train(settle(shared, name="parts", **{**options, "max_steps": 3}), progress=False)
    parts = settle(shared, name="parts", **options)
    assert read_metrics(train(parts, resume=True, progress=False)) == expected
    live = settle(shared, name="live", **{**options, "max_steps": 3, "reference": "live"})
    train(live, progress=False)
    switched = settle(shared, name="live", **options)
    went_on = read_metrics(train(switched, resume=True, progress=False))
    for a, b in zip(went_on, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-4)


@pytest.fixture
def rounded(monkeypatch):
    """Reference errors that are off by rounding, as another device's may be."""
    lookup, off = ReferenceErrors.lookup, torch.tensor([1e-7, 0.0, -1e-7, 0.0])
    monkeypatch.setattr(
        ReferenceErrors, "lookup", lambda self, batch: lookup(self, batch) + off[: 2 * len(batch)]
    )


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.usefixtures("rounded")
def test_rounding_is_no_vote_before_the_weights_move(shared, settle, warmup):
    """A warm-up's first update has a rate of zero, so the second step's margins are rounding."""
    still = 2 if warmup else 1
    config = settle(
        shared,
        objective=ADAPTIVE,
        annotators={"kind": "ledger"},
        optim={"lr": 1e-3, "warmup_steps": warmup},
        max_steps=still + 1,
        checkpoint_every=1,
        keep_checkpoints=still + 1,
    )
    prepare_reference(config, 1, progress=False)
    saved = [
        folder / "ledger.safetensors" for folder in list_checkpoints(train(config, progress=False))
    ]
    counted = [load_file(path)["moments"][0].sum().item() for path in saved]
    assert counted[:still] == [0.0] * still
    assert counted[still] > 0


@pytest.mark.usefixtures("rounded")
def test_averages_do_not_judge_before_the_weights_move(shared, settle, read_metrics):
    """They agree with the policy then, and their scale over the batch makes rounding an opinion."""
    config = settle(
        shared,
        objective={**ADAPTIVE, "weight_kind": "linear"},
        annotators={"kind": "ema", "warmup_steps": 0, "batched": True},
        optim={"lr": 1e-3, "warmup_steps": 2},
    )
    prepare_reference(config, 1, progress=False)
    lines = read_metrics(train(config, progress=False))
    assert [line["weight/mean"] for line in lines[:2]] == [1.0, 1.0]
    assert lines[2]["weight/mean"] < 1.0
