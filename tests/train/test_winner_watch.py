"""The warning of a policy that gets worse at the winners."""

import pytest

from fastpo.config import load_config
from fastpo.train import train
from fastpo.train.winner_watch import STEPS, WinnerWatch


def told(winner, margin, *, steps=STEPS, compared=True):
    watch = WinnerWatch(compared=compared)
    lines = [
        watch.see({"step": i + 1, "error/winner": winner(i), "rewards/margins": margin})
        for i in range(steps)
    ]
    return [line for line in lines if line]


def test_winners_that_get_worse_than_the_margin_is_wide_are_told_once():
    (line,) = told(lambda i: 0.15 + 0.01 * (i % 3), 0.05, steps=3 * STEPS)
    assert line.startswith(f"step {STEPS}: the winners' own error has grown, by 0.16 over")
    assert "(0.05)" in line


@pytest.mark.parametrize(
    ("winner", "margin", "compared"),
    [
        (lambda i: -0.01, 0.05, True),  # better
        (lambda i: 0.02, 0.05, True),  # worse, by less than the margin
        (lambda i: 1.0 if i % 2 else -0.9, 0.01, True),  # noise
        (lambda i: 0.15, 0.05, False),  # an error by itself
    ],
)
def test_what_is_no_failure_is_not_told(winner, margin, compared):
    assert told(winner, margin, steps=2 * STEPS, compared=compared) == []


def test_a_run_that_ruins_its_winners_says_so(experiment, capsys, read_metrics):
    options = {"max_steps": STEPS, "optim": {"lr": 0.03}, "method": "full", "checkpoint_every": 100}
    folder = train(load_config(experiment("sd15", **options)), progress=False)
    assert "the winners' own error has grown" in capsys.readouterr().out
    last = read_metrics(folder)[-1]
    assert 0.0 <= last["rewards/saturated"] <= 1.0
