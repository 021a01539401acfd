"""Two trainings started at once in one folder: exactly one trains."""

import contextlib
import io

import pytest
import yaml

from fastpo.cli import main
from fastpo.config import load_config
from fastpo.train import Observer, train
from tests.conftest import raw_config, read_metrics
from tests.forked import FORK

TRIALS = 12


class Waits(Observer):
    """Trains on when the other process is done."""

    def __init__(self, done):
        self.done = done

    def on_start(self, trainer, start):
        assert self.done.wait(60)


@pytest.fixture(scope="module")
def config(tiny_data, light_pipelines, tiny_caches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    raw = raw_config("sdxl", light_pipelines["sdxl"], tiny_data, tiny_caches, folder / "run")
    raw["train"] |= {"max_steps": 2}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def race(path, folder, flags, barrier, outcomes, done):
    """Trains as the command does; tells the exit status and what was printed."""
    error, status = io.StringIO(), 0
    barrier.wait(60)
    with contextlib.redirect_stderr(error):
        try:
            config = load_config(path, [f"train.output_dir={folder}"])
            train(config, progress=False, observers=[Waits(done)], **flags)
        except Exception as refusal:
            status = type(refusal).__name__ + ": " + str(refusal)
            done.set()
    outcomes.put(status)


@pytest.mark.parametrize(
    "flags", [{}, {"resume": True}, {"overwrite": True}], ids=["", "resume", "overwrite"]
)
def test_exactly_one_of_two_trains(config, tmp_path, one_thread, flags):
    whole = train(load_config(config, [f"train.output_dir={tmp_path / 'w'}"]), progress=False)
    for trial in range(TRIALS // 3):
        folder = tmp_path / str(trial)
        barrier, outcomes, done = FORK.Barrier(2), FORK.Queue(), FORK.Event()
        arguments = (config, folder, flags, barrier, outcomes, done)
        racers = [FORK.Process(target=race, args=arguments) for _ in range(2)]
        for racer in racers:
            racer.start()
        found = sorted((outcomes.get(timeout=120) for _ in racers), key=str)
        for racer in racers:
            racer.join(300)
        assert found[0] == 0
        assert "BusyFolderError" in found[1] and "is being written by process" in found[1]
        assert read_metrics(folder) == read_metrics(whole)


def test_the_command_refuses_in_one_line(config, tmp_path, capsys):
    from fastpo.system.writer_lock import sole_writer

    with sole_writer(tmp_path / "run"):
        with pytest.raises(SystemExit) as ended:
            main(["train", str(config), "--set", f"train.output_dir={tmp_path / 'run'}"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert "is being written by process" in error
