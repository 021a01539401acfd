"""Rounds: begin anew from the base with the ledger's verdict, resumable anywhere."""

import csv
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fastpo.config import load_config, parse_config
from fastpo.data.cache import PairCache
from fastpo.data.cache.flips import is_flipped
from fastpo.errors import CacheError, ConfigError
from fastpo.ledger import PairLedger
from fastpo.plan.dataset import DataSize, count_visits
from fastpo.reference_cache import prepare_reference
from fastpo.review.evidence import load_evidence
from fastpo.train import Observer, train
from fastpo.train.rounds import about_labels, hand_over, next_round, verdicts
from fastpo.train.state import Round, TrainingState
from tests.conftest import raw_config
from tests.faults.two_ranks import two_ranks

LEDGER = {
    "objective": {"name": "adaptive_dpo", "beta": 500.0, "weight_kind": "gate"},
    "annotators": {"kind": "ledger"},
    "rounds_settled": 0.0,
}
ROUNDS = {
    **LEDGER,
    **{"max_steps": None, "epochs": 2.5, "round_epochs": 2, "rounds": 2, "rounds_turn": 0.5},
    "optim": {"lr": 1e-2},
}


class Starts(Observer):
    """What each round begins with."""

    def __init__(self):
        self.weights, self.steps, self.closed, self.totals = [], [], [], []
        self.rates, self._trainer = [], None

    def on_start(self, trainer, start):
        self._trainer = trainer
        copied = {name: p.detach().clone() for name, p in trainer.state.trainable.items()}
        self.weights.append(copied)
        self.steps.append(start)
        self.closed.append(verdicts(trainer.state.ledger))
        self.totals.append(trainer.state.ledger.total.clone())

    def on_step(self, step, table, metrics):
        self.rates.append(metrics["lr"])
        self.ended = self._trainer.state.ledger.total.clone()


def rows(folder, name="votes.csv"):
    with (folder / name).open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tiny_data, light_pipelines, tiny_caches, tmp_path_factory):
    """A run of two rounds with its checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    raw = raw_config("sdxl", light_pipelines["sdxl"], tiny_data, tiny_caches, folder)
    raw["train"] |= {**ROUNDS, "checkpoint_every": 3, "keep_checkpoints": 99}
    return train(parse_config(raw), progress=False)


def test_each_round_begins_from_the_base_with_a_share_of_the_votes(experiment, read_metrics):
    seen = Starts()
    config = load_config(experiment(**ROUNDS | {"optim": {"lr": 1e-2, "schedule": "linear"}}))
    folder = train(config, progress=False, observers=[seen])
    steps = len(read_metrics(folder))
    judging = seen.steps[1]
    assert seen.steps == [0, judging] and steps > 2 * judging  # the last is longer
    for later in seen.weights[1:]:
        assert all(torch.equal(later[name], first) for name, first in seen.weights[0].items())
    assert seen.rates[0] == seen.rates[judging] == 1e-2
    assert seen.rates[judging - 1] < 1e-2  # the schedule is that of the round
    assert not seen.closed[0].any() and seen.totals[1].abs().max() > 0
    assert any(row["turned"] == "1" for row in rows(folder))
    numbers = {int(row["step"]): int(row["round"]) for row in rows(folder)}
    assert [numbers[s] for s in (1, judging, judging + 1, steps)] == [1, 1, 2, 2]


def test_the_ledger_of_the_file_is_that_of_the_run(whole):
    folder = whole
    evidence = load_evidence(folder)
    starts, doubts = evidence.histories()
    assert evidence.visits.any()
    for k in evidence.visits.nonzero()[0]:
        assert doubts[starts[k + 1] - 1] == pytest.approx(evidence.minority[k], abs=1e-6)


def test_a_run_that_was_killed_anywhere_goes_on_to_the_same_end(whole, experiment):
    """At the end of the first round, and within the second."""
    folder = whole
    assert any(row["turned"] == "1" for row in rows(folder))
    judging = max(int(row["step"]) for row in rows(folder) if row["round"] == "1")
    for number, step in enumerate((judging, judging + 3)):
        options = {**ROUNDS, "checkpoint_every": 3, "keep_checkpoints": 99}
        config = load_config(experiment(**options, name=f"killed-{number}"))
        target = config.train.output_dir
        shutil.copytree(folder, target)
        for later in sorted((target / "checkpoints").iterdir()):
            if later.name > f"step-{step:08d}":
                shutil.rmtree(later)
        shutil.rmtree(target / "final")
        train(config, resume=True, progress=False)
        for name in ("votes.csv", "minority.csv"):
            assert (target / name).read_bytes() == (folder / name).read_bytes()
        mine, other = (
            load_file(next((f / "final").glob("*.safetensors"))) for f in (target, folder)
        )
        assert all(torch.equal(mine[key], other[key]) for key in other)


@pytest.mark.parametrize("draws", ["new", "same"])
def test_rounds_draw_the_same_again_where_they_are_asked_to(experiment, draws):
    """The same pairs at the same timesteps in the same order; the last round goes on from there."""
    folder = train(load_config(experiment(**ROUNDS, rounds_draws=draws)), progress=False)
    drawn = {"1": [], "2": []}
    for row in rows(folder):
        drawn[row["round"]].append((row["pair"], row["timestep"]))
    first, last = drawn["1"], drawn["2"]
    assert len(last) > len(first) and (last[: len(first)] == first) == (draws == "same")


def test_rounds_with_the_same_draws_need_reference_errors_of_one(whole, experiment):
    """Cached, killed within the second round and gone on with: all as in one go."""
    del whole  # whose latents these runs use
    options = {**ROUNDS, "rounds_draws": "same", "checkpoint_every": 3, "keep_checkpoints": 99}
    config = load_config(experiment(**options, name="cached", reference="cached"))
    errors = prepare_reference(config, progress=False)
    assert errors.visits == 3, "2.5 epochs, the longest round's"
    folder = train(config, progress=False)
    killed = load_config(experiment(**options, name="killed", reference="cached"))
    target = killed.train.output_dir
    shutil.copytree(folder, target)
    judging = max(int(row["step"]) for row in rows(folder) if row["round"] == "1")
    for later in sorted((target / "checkpoints").iterdir()):
        if int(later.name.removeprefix("step-")) > judging + 3:
            shutil.rmtree(later)
    shutil.rmtree(target / "final")
    train(killed, resume=True, progress=False)
    assert (target / "votes.csv").read_bytes() == (folder / "votes.csv").read_bytes()
    other = load_config(experiment(**{**options, "rounds_draws": "new"}, reference="cached"))
    with pytest.raises(CacheError, match="end before the run does"):
        train(other, progress=False)


def state_of(votes, began, best_step=0, start=0):
    ledger = PairLedger(len(votes))
    ledger.total.copy_(torch.tensor(votes))
    ledger.visits.fill_(1)
    nothing = dict.fromkeys(("trainable", "weights", "optimizer", "schedule", "averages"))
    state = TrainingState(
        **nothing,
        ledger=ledger,
        last_minority=torch.zeros(len(votes)),
        round=Round(number=2, start=start, last=False),
        began=torch.tensor(began),
        turned=torch.zeros(len(votes), dtype=torch.bool),
    )
    state.best.step = best_step
    return state


@pytest.mark.parametrize(
    ("settled", "best_step", "last"),
    [(0.3, 0, True), (0.2, 0, False), (0.0, 0, False), (0.0, 9, True), (0.0, 11, False)],
)
def test_rounds_end_where_verdicts_or_held_out_accuracy_have_settled(
    experiment, settled, best_step, last
):
    """One verdict of four has changed; a best measurement of step 9 is of an earlier round."""
    config = load_config(experiment(**{**ROUNDS, "rounds": 9, "rounds_settled": settled}))
    state = state_of([1.0, -1.0, 2.0, -2.0], [False, False, False, True], best_step, start=10)
    found = next_round(state, config.train, 20)
    assert found == Round(number=3, start=20, last=last, changed=0.25)


def test_the_most_rounds_end_a_run(experiment):
    config = load_config(experiment(**{**ROUNDS, "rounds": 3}))
    assert next_round(state_of([1.0], [True]), config.train, 5).last


def test_votes_may_outweigh_what_is_carried_over():
    ledger = PairLedger(2)
    ledger.total.copy_(torch.tensor([-1.0, 3.0]))
    ledger.visits.fill_(2)
    ledger.moments.fill_(1.0)
    ledger.begin_round(0.5)
    assert ledger.total.tolist() == [-0.5, 1.5] and not ledger.moments.any()
    assert verdicts(ledger).tolist() == [True, False] and ledger.visits.tolist() == [2, 2]


def test_a_doubted_label_is_turned_round_and_back(experiment):
    config = load_config(experiment(**ROUNDS | {"rounds_turn": 0.9})).train
    state = state_of([2.0, -0.5, -2.0], [False] * 3)
    for total, turned in (([1.0, -0.25, 1.0], [False, False, True]), ([-1.0, 0.1, -2.0], None)):
        hand_over(state, state.ledger, config)
        if turned:
            assert state.ledger.total.tolist() == total and state.turned.tolist() == turned
            assert state.began.tolist() == [False, True, True]
            mean, minority = about_labels(state)
            assert mean.tolist() == [1.0, -0.25, -1.0] and (minority > 0.5).tolist() == [0, 1, 1]
            state.ledger.total.copy_(torch.tensor([2.0, 0.2, -4.0]))  # votes of the round
    assert state.turned.tolist() == [False, False, False]  # it is what the run was given again


def test_a_turned_pair_is_read_the_other_way_round(experiment):
    cache = PairCache.open(load_config(experiment()))
    before = cache.read([0, 1], visit=0)
    cache.turned[1] = True
    after = cache.read([0, 1], visit=0)
    assert torch.equal(after.latent_mean, before.latent_mean[[0, 3, 2, 1]])
    assert after.flipped.tolist() == [False, True]


def test_by_hand_a_run_begins_with_anothers_verdicts(whole, experiment, tmp_path):
    """Also where labels were flipped since: a vote is about a label."""
    folder = whole
    table = rows(folder, "minority.csv")
    totals = torch.tensor([float(r["ledger_mean"]) * int(r["visits"]) for r in table])
    options = {**LEDGER, "max_steps": 1, "verdicts": str(folder)}
    for name, rate in (("alike", 0.0), ("flipped", 0.5)):
        seen = Starts()
        config = load_config(experiment(**options, name=name, data={"flip_rate": rate}))
        train(config, progress=False, observers=[seen])
        flipped = torch.tensor([is_flipped(r["pair_id"], rate=rate, seed=0) for r in table])
        expected = 0.5 * torch.where(flipped, -totals, totals)
        assert torch.allclose(seen.totals[0], expected, atol=1e-5)
    other = tmp_path / "other"
    other.mkdir()
    options = {**options, "verdicts": str(other)}
    config = load_config(experiment(**options, name="other-run"))
    (other / "minority.csv").write_text("pair_id,flipped\n")
    with pytest.raises(ConfigError, match="knows none of the pairs"):
        train(config, progress=False)
    (other / "minority.csv").unlink()
    with pytest.raises(ConfigError, match="is not the table of a finished run"):
        train(config, progress=False)


@pytest.mark.slow
def test_two_processes_train_the_rounds_of_one(experiment, read_metrics, tmp_path):
    short = {**ROUNDS, "epochs": 0.5, "round_epochs": 0.5}
    paths = {
        name: experiment(**short, name=name, accumulation_steps=steps, statistics="micro_batch")
        for name, steps in (("one", 2), ("two", 1))
    }
    train(load_config(paths["one"]), progress=False)
    with two_ranks(tmp_path / "out", lambda _: [paths["two"]], act=train_path) as ranks:
        assert ranks.exit_codes(timeout=300) == [0, 0], ranks.text(0)[-3000:]
    one, two = (tmp_path / name for name in paths)
    told = [[m["loss"] for m in read_metrics(folder)] for folder in (one, two)]
    assert told[1] == pytest.approx(told[0], rel=1e-4)
    assert [r["round"] for r in rows(two)] == [r["round"] for r in rows(one)]


def train_path(words):
    from pathlib import Path

    train(load_config(Path(words[0])), progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotators": None, "objective": {"name": "dpo"}}, "train.rounds hands on"),
        ({"rounds": 1, "rounds_turn": None}, "train.round_epochs is about"),
        ({"rounds": 1, "round_epochs": None}, "needs train.rounds or train.verdicts"),
        ({"epochs": None, "max_steps": 4}, "train.round_epochs goes with train.epochs"),
        ({"rounds_turn": 0.4}, "must be at least 0.5"),
        (
            {"rounds": 1, "round_epochs": None, "rounds_turn": None, "rounds_draws": "same"},
            "train.rounds_draws is about the rounds behind",
        ),
        ({"deepspeed": "zero2"}, "train.rounds does not begin anew within a run of DeepSpeed"),
        ({"early_stop": 2, "rounds": 2}, "train.early_stop would end the run in its first round"),
    ],
)
def test_what_rounds_cannot_do_is_refused(experiment, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_config(experiment(**{**ROUNDS, **changes}))


def test_a_plan_counts_the_visits_of_all_rounds(experiment):
    size = DataSize(100, 100, "here")
    config = load_config(experiment(**{**ROUNDS, "rounds": 3}))
    assert count_visits(config, size, 1) == 650 == count_visits(config, size, 1, distinct=True)
    same = load_config(experiment(**{**ROUNDS, "rounds": 3, "rounds_draws": "same"}))
    assert [count_visits(same, size, 1, distinct=d) for d in (False, True)] == [650, 250]
    steps = {"epochs": None, "round_epochs": None, "max_steps": 4}
    assert count_visits(load_config(experiment(**ROUNDS | steps)), size, 3) == 2 * 4 * 3 * 2
