"""Saturated pairs of objectives whose logit is not beta d: KTO and MaPO."""

import json

import pytest
import torch
from pydantic import TypeAdapter

from fastpo import loss
from fastpo.config import load_config
from fastpo.config.objectives import OBJECTIVES, ObjectiveConfig
from fastpo.train import Observer, train
from fastpo.train.batch_statistics import RunningStatistics, Statistics
from fastpo.train.logits import logit_sizes
from tests.conftest import read_metrics

WITHOUT = {"ipo", "adaptive_ipo", "sft"}  # no sigmoid
SHAPE = (8, 4, 6, 6)  # four pairs


def objective(**options):
    return TypeAdapter(ObjectiveConfig).validate_python(options)


def predictions():
    """A policy and a reference, off the target by more in some rows than in others, float64."""
    generator = torch.Generator().manual_seed(3)
    target, *noise = torch.randn((3, *SHAPE), generator=generator, dtype=torch.float64)
    rows = torch.tensor([0.2, 0.7, 0.5, 0.4, 0.6, 0.5, 0.9, 0.3]).view(-1, 1, 1, 1)
    return target + rows * noise[0], target + 0.5 * noise[1], target


def ran(statistics):
    """Running statistics that have seen a step."""
    statistics(torch.tensor([0.6, 2.0], dtype=torch.float64))
    statistics.finish_step(lambda sums: sums)
    return statistics


@pytest.mark.parametrize(
    "statistics",
    [None, Statistics(lambda sums: sums + torch.tensor([0.4, 4.0])), ran(RunningStatistics())],
    ids=["own", "processes", "running"],
)
def test_kto_s_logits_are_those_of_its_two_terms(statistics):
    """One term alone is `sigmoid(-logit) / 2`, from which the logit is had back."""
    policy, reference, target = predictions()
    sizes = []
    for liked in (1.0, 0.0):
        out = loss.kto(
            policy, reference, target,
            beta=20.0, liked_weight=liked, disliked_weight=1.0 - liked, reduce=statistics,
            reduction="none", impl="reference",
        )  # fmt: skip
        sizes.append(torch.logit(2.0 * out.loss).abs())
    totals = None if statistics is None else statistics.latest
    found = logit_sizes(objective(name="kto", beta=20.0), out, totals)
    assert found is not None and found.dtype == torch.float64
    # The baseline is a float32 number where it was handed in.
    torch.testing.assert_close(found, torch.minimum(*sizes), rtol=1e-6, atol=1e-6)
    assert (sizes[0] < sizes[1]).unique().numel() == 2  # each of both is the smaller one


def test_mapo_s_logit_is_that_of_its_preference():
    """`loss - e_w` is `b softplus(-v)`, from which v is had back."""
    policy, _, target = predictions()
    options = {"beta": 0.5, "snr": 0.3, "num_timesteps": 40}
    out = loss.mapo(policy, target, **options, reduction="none", impl="reference")
    preference = (out.loss - out.policy_error[:4]) / options["beta"]
    expected = torch.log(torch.expm1(preference)).abs()
    found = logit_sizes(objective(name="mapo", **options), out, None)
    torch.testing.assert_close(found, expected)
    perfect = loss.mapo(target, target, **options, impl="reference")
    none = logit_sizes(objective(name="mapo", **options), perfect, None)
    assert none is not None and none.tolist() == [0.0] * 4


class Look(Observer):
    """Keeps each step's table."""

    def __init__(self):
        self.tables = []

    def on_step(self, step, table, metrics):
        self.tables.append(table)


@pytest.mark.parametrize("statistics", ["micro_batch", "running"])
def test_a_run_of_kto_counts_pairs_of_which_both_images_are_beyond_four(experiment, statistics):
    """Two pairs a pass, and steps of two passes; `error` is the policy's less the reference's."""
    options = {"objective": {"name": "kto", "beta": 5e4}, "statistics": statistics}
    path = experiment("sd15", max_steps=4, accumulation_steps=2, optim={"lr": 3e-3}, **options)
    look = Look()
    lines = read_metrics(train(load_config(path), progress=False, observers=[look]))
    running, shares = torch.zeros(2, dtype=torch.float64), []
    for table, line in zip(look.tables, lines, strict=True):
        gains = -torch.stack([table["error_winner"], table["error_loser"]])
        if statistics == "running":
            zero = torch.where(running[1] > 0, running[0] / running[1], 0.0).clamp(min=0.0)
            running = 0.9 * running + torch.tensor([gains.mean(0).sum(), gains.shape[1]])
        else:
            means = [gains[:, rows].mean() for rows in torch.arange(gains.shape[1]).split(2)]
            zero = torch.stack(means).repeat_interleave(2)[: gains.shape[1]].clamp(min=0.0)
        logits = (5e4 * (gains - zero)).abs().amin(0)
        torch.testing.assert_close(table["logit"], logits, rtol=1e-3, atol=0.05)
        assert line["rewards/saturated"] == (table["logit"] > 4.0).double().mean()
        assert "slope" not in line
        shares.append(line["rewards/saturated"])
    assert shares[0] == 0.0 < max(shares)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_share_is_told_wherever_there_is_a_sigmoid(experiment, name):
    options = {"objective": {"name": name}, "max_steps": 1}
    if name.startswith("adaptive"):
        options["annotators"] = {"kind": "ledger"}
    if name == "mapo":
        options["backward"] = "sampled"
    folder = train(load_config(experiment("sd15", **options)), progress=False)
    (line,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert ("rewards/saturated" in line) == (name not in WITHOUT)
