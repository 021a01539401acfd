"""Two processes of one run: what they must agree on, and what happens when one hangs or dies."""

import pytest

from tests.faults.two_ranks import two_ranks

DIFFERENT = {
    "lr": ("train.optim.lr=1e-2", "train.optim.lr is 0.001 on rank 0, 0.01 on rank 1"),
    "seed": ("seed=8", "seed is 7 on rank 0, 8 on rank 1"),
    "steps": ("train.max_steps=5", "train.max_steps is 4 on rank 0, 5 on rank 1"),
}
MODES = ["plain", *(pytest.param(f"zero{k}", marks=pytest.mark.slow) for k in (1, 2, 3))]


def settings_for(mode):
    return [] if mode == "plain" else ["--set", f"train.deepspeed={mode}"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("key", DIFFERENT)
def test_different_settings_are_named(experiment, tmp_path, key, mode):
    path = experiment()
    change, told = DIFFERENT[key]

    def words(rank):
        return ["train", path, *settings_for(mode), *(["--set", change] if rank else [])]

    with two_ranks(tmp_path / "out", words) as ranks:
        assert ranks.exit_codes() == [2, 2], ranks.text(0) + ranks.text(1)
        assert told in ranks.text(0)
        assert ranks.text(0).count("error:") == 1
        assert "Traceback" not in ranks.text(0) + ranks.text(1)
        assert "error:" not in ranks.text(1)
    assert not (tmp_path / "run").exists()
