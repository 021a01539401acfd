"""Two processes of one run: what they must agree on, and what happens when one hangs or dies."""

import itertools
import os
import signal
import threading

import pytest
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch.nn.modules.module import register_module_forward_pre_hook

from fastpo.cli import main
from fastpo.data.cache import PairCache
from fastpo.errors import DataError
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


FORWARD_PASSES = 2  # of a step's micro-batch: the policy's and the reference's


def acting_at(step, rank, act):
    """The command line, in which one rank calls `act` as it begins to compute a step."""

    def run(words):
        if os.environ["RANK"] == str(rank):
            passes = itertools.count(FORWARD_PASSES)

            def forward(module, _):
                computes = isinstance(module, UNet2DConditionModel)
                if computes and next(passes) == FORWARD_PASSES * step:
                    act()

            register_module_forward_pre_hook(forward)
        main(words)

    return run


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("mode", "victim"),
    [
        ("plain", 0),
        ("plain", 1),
        *(pytest.param(f"zero{k}", k % 2, marks=pytest.mark.slow) for k in (1, 2, 3)),
    ],
)
def test_the_death_of_a_process_is_named_and_the_run_goes_on(
    experiment, tmp_path, mode, victim, read_metrics
):
    path = experiment(family="sd15", max_steps=4)
    other = 1 - victim

    def words(rank):
        return ["train", path, *settings_for(mode), "--resume"]

    kill = acting_at(3, victim, send(signal.SIGKILL))
    with two_ranks(tmp_path / "out", words, act=kill) as ranks:
        codes, text = ranks.exit_codes(), ranks.text(other)
    assert (codes[victim], codes[other]) == (-signal.SIGKILL, 76), text
    assert text.count("error:") == 1
    assert f"rank {victim}" in text and "has ended; last seen at" in text
    assert "Traceback" not in text
    with two_ranks(tmp_path / "again", words) as ranks:
        assert ranks.exit_codes() == [0, 0], ranks.text(0) + ranks.text(1)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_named(experiment, tmp_path, victim):
    """Under rank 0's control the store stops as well, for which torch waits without a limit."""
    path = experiment(max_steps=6, hang_timeout=6.0)  # longer than a busy machine pauses
    stop, other = acting_at(3, victim, send(signal.SIGSTOP)), 1 - victim
    with two_ranks(tmp_path / "out", lambda _: ["train", path], act=stop) as ranks:
        ranks[other].join(300)
        text = ranks.text(other)
        assert ranks[other].exitcode == 76, text
        assert ranks[victim].exitcode is None
    assert text.count("error:") == 1
    assert f"rank {victim}" in text and "gives no sign of life" in text
    assert "stopped by a signal" in text


def test_a_process_that_waits_for_ever_is_named_by_itself_and_by_the_other(
    experiment, tmp_path, monkeypatch
):
    path = experiment(max_steps=6, hang_timeout=6.0)  # longer than a busy machine pauses
    read, reads = PairCache.read, itertools.count(1)

    def read_late(*args, **options):
        if os.environ.get("RANK") == "1" and next(reads) == 3:
            threading.Event().wait()
        return read(*args, **options)

    monkeypatch.setattr(PairCache, "read", read_late)
    with two_ranks(tmp_path / "out", lambda _: ["train", path]) as ranks:
        assert ranks.exit_codes() == [76, 76], ranks.text(0) + ranks.text(1)
        for rank in (0, 1):
            text = ranks.text(rank)
            assert "no progress for" in text and "step 3, waiting for data" in text, text
            assert text.count("error:") == 1
    assert "rank 1 (process" in ranks.text(0)


def test_an_error_of_one_process_reaches_the_others(experiment, tmp_path):
    path = experiment(max_steps=6)

    def fail():
        raise DataError("shard-00003 cannot be read")

    with two_ranks(tmp_path / "out", lambda _: ["train", path], act=acting_at(3, 1, fail)) as ranks:
        assert ranks.exit_codes() == [76, 2], ranks.text(0) + ranks.text(1)
        assert "rank 1 stopped: shard-00003 cannot be read" in ranks.text(0)
        assert "error: shard-00003 cannot be read" in ranks.text(1)
        assert "Traceback" not in ranks.text(0) + ranks.text(1)


def test_both_processes_go_on_from_the_newest_whole_checkpoint_with_the_change(
    experiment, tmp_path, read_metrics
):
    path, checkpoints = experiment(family="sd15"), tmp_path / "run" / "checkpoints"

    def resumed(*words):
        with two_ranks(tmp_path / "out", lambda rank: ["train", path, *words]) as ranks:
            return ranks.exit_codes(), ranks.text(0), ranks.text(1)

    assert resumed()[0] == [0, 0]
    weights = checkpoints / "step-00000004" / "trainable.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    codes, first, second = resumed("--resume", "--change", "train.optim.lr=5e-4")
    assert codes == [0, 0], first + second
    assert first.count("passed over") == 1 and "passed over" not in second
    assert [line["lr"] for line in read_metrics(tmp_path / "run")] == [1e-3, 1e-3, 5e-4, 5e-4]
    for folder in checkpoints.iterdir():
        (folder / "optimizer.pt").write_bytes(b"")
    codes, first, second = resumed("--resume")
    assert codes == [2, 2], first + second
    assert "is whole; step-00000004: " in first and "; step-00000002: " in first
    assert "error:" not in second
