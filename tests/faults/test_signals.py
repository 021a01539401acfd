"""Signals end a command cleanly, and the same command goes on as if it had not been ended."""

import os
import re
import signal
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastpo.cli import main
from fastpo.config import load_config
from fastpo.data.cache import PairCache
from fastpo.data.prepare import prepare
from fastpo.data.prepare.encode import ShardBuilder
from fastpo.evaluate.sampling import ImageSampler
from fastpo.models.folder import ModelFolder
from fastpo.system.signals import Interrupted, catch_signals
from fastpo.testing import write_folder
from fastpo.train import Observer, train
from tests.faults.test_prepare import content
from tests.faults.test_ranks import acting_at, send
from tests.faults.two_ranks import two_ranks
from tests.forked import FORK, print_to

ROOT = Path(__file__).parents[2]
ENDING = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT]
RUN = {"max_steps": 5, "checkpoint_every": 4, "ema_decay": 0.9, "lora": {"dropout": 0.2}}


@pytest.fixture(autouse=True)
def as_from_a_terminal():
    """`nohup` and a shell's background jobs hand ignored signals on, which a command leaves so."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ENDING[:3]}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Sends(Observer):
    """Sends this process signals after a step."""

    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers

    def on_step(self, step, table, metrics):
        if step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.fixture
def equal(read_metrics):
    """Compares two runs: what they logged, exported and found out about pairs."""

    def compare(one, two):
        assert read_metrics(one) == read_metrics(two)
        assert (one / "minority.csv").read_text() == (two / "minority.csv").read_text()
        for name in ("final", "ema"):
            file = f"{name}/pytorch_lora_weights.safetensors"
            a, b = load_file(one / file), load_file(two / file)
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    return compare


def steps_of(folder):
    return [int(p.name[5:]) for p in sorted((folder / "checkpoints").iterdir())]


def test_a_training_that_each_signal_has_ended_is_the_whole_one(
    experiment, equal, one_thread, capfd
):
    whole = train(load_config(experiment(name="whole", **RUN)), progress=False)
    config = load_config(experiment(**RUN))
    folder = config.train.output_dir
    before = [signal.getsignal(number) for number in ENDING]
    for step, number in enumerate(ENDING, 1):
        with pytest.raises(Interrupted, match=rf"{number.name} after {step} of 5 .*--resume"):
            train(config, resume=True, progress=False, observers=[Sends(step, number)])
        assert steps_of(folder)[-1] == step
        assert f"{number.name}: saving, then ending" in capfd.readouterr().err
    train(config, resume=True, progress=False)
    equal(folder, whole)
    assert [signal.getsignal(number) for number in ENDING] == before
    assert not [t.name for t in threading.enumerate() if t.name.startswith("read_")]


def test_a_signal_amid_a_step_leaves_the_step_out(experiment, equal, one_thread, monkeypatch):
    options = {**RUN, "max_steps": 3, "accumulation_steps": 3, "micro_batch_size": 1}
    options |= {"loader_workers": 0}
    options |= {"objective": {"name": "kto", "beta": 500.0}, "statistics": "running"}
    whole = train(load_config(experiment(name="whole", **options)), progress=False)
    config = load_config(experiment(**options))
    read, calls = PairCache.read, []

    def ended_in_the_fifth(cache, indices, visit):
        calls.append(visit)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(cache, indices, visit)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after 1 of 3 steps"):
        patch.setattr(PairCache, "read", ended_in_the_fifth)
        train(config, progress=False)
    assert len(calls) == 5 and steps_of(config.train.output_dir) == [1]
    train(config, resume=True, progress=False)
    equal(config.train.output_dir, whole)


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_a_signal_before_the_first_step_ends_at_once(experiment, monkeypatch, number):
    config = load_config(experiment())
    monkeypatch.setattr(ModelFolder, "resolve", lambda *_: send(number)())
    expected = KeyboardInterrupt if number == signal.SIGINT else Interrupted
    with pytest.raises(expected):
        train(config, resume=True, progress=False)
    assert not config.train.output_dir.exists()


def test_a_second_ctrl_c_ends_at_once(experiment):
    config = load_config(experiment(checkpoint_every=4))
    twice = Sends(1, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=False, observers=[twice])
    assert not (config.train.output_dir / "checkpoints").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_in_the_last_step_lets_the_run_finish(experiment):
    config = load_config(experiment(max_steps=2))
    folder = train(config, progress=False, observers=[Sends(2, signal.SIGTERM)])
    assert (folder / "final").is_dir() and (folder / "minority.csv").is_file()


def test_an_overwriting_that_is_ended_before_its_first_step_leaves_the_old_run(experiment):
    path = experiment(max_steps=1)
    folder = train(load_config(path), progress=False)
    before = (folder / "metrics.jsonl").read_bytes()

    class Starts(Observer):
        def on_start(self, trainer, start):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="before the first step"):
        train(load_config(path), overwrite=True, progress=False, observers=[Starts()])
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert (folder / "final").is_dir()


def test_training_works_in_a_thread_which_can_set_no_handlers(experiment):
    config, errors = load_config(experiment(max_steps=1)), []

    def run():
        try:
            train(config, progress=False)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(300)
    assert not errors and (config.train.output_dir / "final").is_dir()


def test_handlers_of_the_caller_and_ignored_signals_stay():
    got = []
    try:
        signal.signal(signal.SIGTERM, lambda *_: got.append("mine"))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with catch_signals() as signals:
            for number in (signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), number)
            assert signals.received is None
        assert got == ["mine"]
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_save_together_when_one_is_told_to_end(experiment, tmp_path, read_metrics, rank):
    path = experiment(max_steps=4, checkpoint_every=3)
    act = acting_at(1, rank, send(signal.SIGUSR1))
    with two_ranks(tmp_path / "out", lambda _: ["train", path, "--resume"], act=act) as ranks:
        assert ranks.exit_codes() == [75, 75], ranks.text(0) + ranks.text(1)
        assert "ended:" in ranks.text(0) and "ended:" not in ranks.text(1)
    (step,) = steps_of(tmp_path / "run")
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, step + 1))
    with two_ranks(tmp_path / "again", lambda _: ["train", path, "--resume"]) as ranks:
        assert ranks.exit_codes() == [0, 0], ranks.text(0) + ranks.text(1)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def command(*words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_preparing_ends_and_goes_on(
    config_for, experiment, tmp_path, monkeypatch, one_thread, number, capsys
):
    from fastpo.config import dump_config

    write_folder(tmp_path / "data", 3, prompts=1)
    whole = config_for(prepare={"cache_dir": str(tmp_path / "whole")})
    prepare(whole, progress=False)
    path, parts, write = tmp_path / "mine.yaml", [], ShardBuilder.write
    path.write_text(dump_config(config_for()))

    def ended_in_the_second(builder, folder, part):
        parts.append(part.name)
        if len(parts) == 2:
            os.kill(os.getpid(), number)
        write(builder, folder, part)

    with monkeypatch.context() as patch:
        patch.setattr(ShardBuilder, "write", ended_in_the_second)
        assert command("prepare", path) == (130 if number == signal.SIGINT else 75)
    assert capsys.readouterr().err.splitlines()[-1].startswith("ended:")
    left = [p.name for p in (tmp_path / "cache").iterdir()]
    assert parts[0] in left and parts[1] not in left
    assert not [name for name in left if "partial" in name]
    assert command("prepare", path) == 0
    assert content(tmp_path / "cache") == content(tmp_path / "whole")


def test_an_evaluation_ends_and_goes_on(experiment, monkeypatch, capsys):
    path = experiment(max_steps=1)
    folder = train(load_config(path), progress=False) / "evaluation"
    images, batches = ImageSampler.images, []
    words = ["evaluate", path]
    for change in ("batch_size=1", "seeds_per_prompt=1"):
        words += ["--set", f"evaluate.{change}"]

    def ended_in_the_second(sampler, pipeline, batch):
        batches.append(batch[0].seed)
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return images(sampler, pipeline, batch)

    monkeypatch.setattr(ImageSampler, "images", ended_in_the_second)
    assert command(*words) == 75
    assert "ended: ended by SIGTERM" in capsys.readouterr().err
    assert not (folder / "base").exists() and not (folder / "summary.json").exists()
    assert command(*words) == 0
    assert len(batches) == 5, "the first image was kept: 2 of the base, 2 of the aligned model"
    assert (folder / "summary.json").exists()


def job_script():
    """The job of docs/slurm.md."""
    text = (ROOT / "docs" / "slurm.md").read_text()
    return re.search(r"```bash\n(#!/bin/bash\n.*?)```", text, re.DOTALL)[1]


FASTPO = """#!/bin/bash
trap 'kill -USR1 "$(<pid)"' USR1
printf '%s\\n' "$@" > words.new; mv words.new words
until [ -e code ]; do sleep 0.02 & wait $!; done
exit "$(<code)"
"""
"""Stands for `fastpo`, which `play` forks from the test instead: its signals and exit status."""


def forked_command(words, output):
    print_to(output)
    main(words)


def play(folder, env, *, warn_when):
    """Starts the job's script in its folder, and what it asks for; warns it once; its status."""
    job = subprocess.Popen(["bash", "job.sh"], env=env, cwd=folder)
    words, end = folder / "words", time.monotonic() + 180
    while not words.exists():
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    asked = words.read_text().splitlines()
    training = FORK.Process(target=forked_command, args=(asked, folder / "output.txt"))
    training.start()
    (folder / "pid").write_text(str(training.pid))
    words.unlink()
    while warn_when is not None and not warn_when():
        assert training.is_alive() and time.monotonic() < end
        time.sleep(0.01)
    if warn_when is not None:
        job.send_signal(signal.SIGUSR1)
    training.join(180)
    (folder / "code.new").write_text(str(training.exitcode))
    (folder / "code.new").rename(folder / "code")
    status = job.wait(180)
    (folder / "code").unlink()
    return status


def test_the_slurm_jobs_requeues_come_to_the_end(experiment, tmp_path, equal, one_thread):
    """Plays the scheduler: warns the job's script, and starts it again when it has asked for it."""
    options = {"max_steps": 40, "checkpoint_every": 30, "ema_decay": 0.9}
    whole = train(load_config(experiment(name="whole", **options)), progress=False)
    path = experiment(**options)
    metrics, asked = tmp_path / "run" / "metrics.jsonl", tmp_path / "asked"
    commands = {"fastpo": FASTPO, "scontrol": f'#!/bin/bash\necho "$@" >> {asked}\n'}
    for name, text in commands.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    (tmp_path / "job.sh").write_text(job_script())
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    env |= {"CONFIG": str(path)}

    def has_begun():
        return metrics.exists() and metrics.read_text().count("\n") >= 3

    assert play(tmp_path, env, warn_when=has_begun) == 75
    assert asked.read_text() == "requeue 42\n"
    assert not (tmp_path / "run" / "final").exists()
    assert play(tmp_path, env, warn_when=None) == 0
    assert asked.read_text() == "requeue 42\n"
    equal(tmp_path / "run", whole)


def test_ctrl_c_before_a_command_has_begun_is_one_line(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastpo.cli.app", interrupted)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "ended: by Ctrl-C\n"
