"""What is said of a run before it runs."""

import pytest
from safetensors.torch import load_file

from fastpo.config import load_config
from fastpo.train import train
from fastpo.train.live_share import NAME


@pytest.fixture
def told(capsys, monkeypatch):
    """`told(config, resume=False)`: trains, and returns the banner as one line."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(config, *, resume=False):
        folder = train(config, resume=resume)
        return folder, " ".join(capsys.readouterr().err.split())

    return run


@pytest.mark.parametrize(
    ("options", "which"),
    [
        ({"backward": "alive"}, "pairs whose gradient is not zero"),
        (
            {"backward": "sampled", "backward_threshold": 8.0},
            "gradient scales from 8 on, and part of the others",
        ),
    ],
)
def test_only_a_resumed_run_tells_the_share_of_late(experiment, told, options, which):
    path = experiment(max_steps=4, **options)
    folder, fresh = told(load_config(path, ["train.max_steps=2"]))
    assert which in fresh and "of late" not in fresh
    (history,) = folder.glob("checkpoints/step-00000002/ledger.safetensors")
    share = load_file(history)[NAME].item()
    assert share == 1.0 if options["backward"] == "alive" else 0.0 < share < 1.0
    _, resumed = told(load_config(path), resume=True)
    assert f"{which}; {share:.0%} needed one of late" in resumed


def test_a_run_with_every_backward_pass_says_nothing_of_them(experiment, told):
    assert " backward " not in told(load_config(experiment(max_steps=1)))[1]
