"""The warning of a policy that gets worse at the winners."""

import pytest
import torch

from fastpo.config import load_config
from fastpo.train import train
from fastpo.train.metrics import COLUMNS, StepTable
from fastpo.train.winner_watch import STEPS, WinnerWatch
from tests.train.ending import EndAt


def table(winner, loser, reference):
    """A step of four pairs whose means are these."""
    rows = torch.zeros(4, len(COLUMNS), dtype=torch.float64)
    means = {"error_winner": winner, "error_loser": loser, "reference_winner": reference}
    for name, mean in means.items():
        rows[:, COLUMNS.index(name)] = mean + torch.tensor([-0.25, 0.125, 0.375, -0.25])
    return StepTable(rows, grad_norm=0.0, learning_rate=0.0, moved=True)


def told(winner, loser, *, reference=0.5, steps=STEPS, resumed=0):
    """What a run of `winner(i)` at step i is told, which goes on from a checkpoint now and then."""
    watch, lines = WinnerWatch(), []
    for i in range(steps):
        if resumed and i % resumed == 0:
            saved, watch = watch.state_dict(), WinnerWatch()
            watch.load_state_dict({"metric": torch.zeros(3), **saved})
        lines.append(watch.see(i + 1, table(winner(i), loser, reference)))
    return [line for line in lines if line]


def test_winners_that_get_worse_while_losers_do_more_are_told():
    """DPO's known failure: the margin is wide, +0.26, and accuracy looks well."""
    (line,) = told(lambda i: 0.14 + 0.01 * (i % 3 - 1), 0.40, steps=3 * STEPS)
    assert line.startswith(f"step {STEPS}: the winners' own error has grown, by 0.14 over the ")
    assert "reference's 0.5 in the last" in line
    assert "the losers' more, by 0.4: margins are won by making both worse" in line


@pytest.mark.parametrize(("loser", "how"), [(0.05, "less, by 0.05"), (-0.2, "not (-0.2)")])
def test_winners_that_get_worse_than_losers_are_told_otherwise(loser, how):
    (line,) = told(lambda i: 0.14, loser)
    assert f"the losers' {how}: losers are preferred now." in line
    assert "sdpo" not in line


@pytest.mark.parametrize("resumed", [1, 40, STEPS, 100])
@pytest.mark.parametrize("start", [0, 60])
def test_once_at_the_same_step_however_often_a_run_is_resumed(resumed, start):
    """From `start` on winners get worse."""
    whole = told(lambda i: 0.1 * (i >= start), 0.3, steps=6 * STEPS)
    assert len(whole) == 1
    assert told(lambda i: 0.1 * (i >= start), 0.3, steps=6 * STEPS, resumed=resumed) == whole


@pytest.mark.parametrize(
    "winner",
    [
        lambda i: -0.01,  # better
        lambda i: 0.004,  # by less than a hundredth of the reference's error
        lambda i: 1.0 if i % 2 else -0.8,  # noise: 0.1, with a standard error of 0.13
        lambda i: 0.45 if i % 2 else -0.25,  # and 0.1 with one of 0.05
    ],
)
def test_what_is_no_failure_is_not_told(winner):
    assert told(winner, 0.4, steps=2 * STEPS) == []


def test_growth_beyond_four_standard_errors_is_no_noise():
    """Mean 0.1, standard deviation 0.17: a standard error of 0.024."""
    assert len(told(lambda i: 0.1 + (0.168 if i % 2 else -0.168), 0.4)) == 1


def test_a_checkpoint_of_a_version_without_a_watch_begins_one():
    watch = WinnerWatch()
    watch.load_state_dict({"metric": torch.zeros(3)})
    assert any(watch.see(i, table(0.14, 0.4, 0.5)) for i in range(STEPS))


def test_a_round_begins_with_what_was_told_and_without_steps():
    first, second, third = WinnerWatch(), WinnerWatch(), WinnerWatch()
    bad, good = table(0.14, 0.4, 0.5), table(0.0, 0.0, 0.5)
    assert not any(first.see(i, bad) for i in range(STEPS - 1))
    second.begin_round(first)
    assert not any(second.see(i, good) for i in range(STEPS))
    assert any(second.see(i, bad) for i in range(STEPS))
    third.begin_round(second)
    assert not any(third.see(i, bad) for i in range(2 * STEPS))


def warnings_of(capsys):
    said = capsys.readouterr()
    assert "the winners' own error" not in said.out
    return [line for line in said.err.splitlines() if "the winners' own error" in line]


RUINED = {"optim": {"lr": 0.03}, "method": "full"}


def test_a_run_that_is_resumed_tells_once(experiment, capsys):
    options = {"max_steps": STEPS + 15, "checkpoint_every": 15, **RUINED}
    config = load_config(experiment("sd15", **options))
    for end in (15, 45, 60):
        with pytest.raises(KeyboardInterrupt):
            train(config, progress=False, resume=end > 15, observers=[EndAt(end)])
    train(config, progress=False, resume=True)
    (line,) = warnings_of(capsys)
    assert line.startswith(f"step {STEPS}: ")


def test_a_run_without_a_reference_tells_nothing(experiment, capsys):
    options = {"max_steps": STEPS, "checkpoint_every": 100, "objective": {"name": "mapo"}, **RUINED}
    train(load_config(experiment("sd15", **options)), progress=False)
    assert not warnings_of(capsys)


def test_a_run_that_ruins_its_winners_says_so(experiment, capsys, read_metrics):
    options = {"max_steps": STEPS, "checkpoint_every": 100, **RUINED}
    folder = train(load_config(experiment("sd15", **options)), progress=False)
    (line,) = warnings_of(capsys)
    assert line.startswith(f"step {STEPS}: ")
    last = read_metrics(folder)[-1]
    assert 0.0 <= last["rewards/saturated"] <= 1.0
