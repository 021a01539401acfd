"""A disk that refuses a write: one line that names the file and the cause, nothing half-written."""

import errno
import os
import re
import resource
import shutil
from itertools import count
from pathlib import Path

import pytest
import yaml
from safetensors import SafetensorError

from fastpo.cli import main
from fastpo.config import load_config, parse_config
from fastpo.data.prepare import prepare
from fastpo.errors import FastPOError, StorageError
from fastpo.evaluate import evaluate
from fastpo.models.encoders import Encoders
from fastpo.reference_cache import prepare_reference
from fastpo.report import write_report
from fastpo.system import files
from fastpo.system.storage import explain, storage_errors
from fastpo.testing import write_folder
from fastpo.train import train
from fastpo.train.consolidate import consolidate
from tests.conftest import raw_config
from tests.forked import FORK

REFUSALS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "quota",
    errno.EROFS: "read-only",
    errno.EACCES: "permission denied",
    errno.EMFILE: "too many files open",
    errno.EIO: "input/output error",
    errno.ENOMEM: "no memory left",
}


ALL = tuple(REFUSALS)


def refuse_everywhere(act, check, *, every=1):
    """Refuses the first, the second, ... durable step of `act` and all behind it, as a disk does.

    Args:
        act: `act()` runs in a forked process, and must end with a `FastPOError`.
        check: `check()` runs here after each.
        every: Steps from one trial to the next.

    Returns:
        The trials that were refused; each had another error number, in turn.
    """
    for trial in count():
        number = ALL[trial % len(ALL)]

        def refused(trial=trial, number=number):
            steps = count()

            def commit(kind, path):
                if next(steps) >= trial * every:
                    raise OSError(number, os.strerror(number), str(path))

            files._commit = commit
            act()

        told = outcome(refused)
        if told is None:
            return trial
        assert REFUSALS[number] in told, f"trial {trial}: {told}"
        assert_one_line(told)
        check()


def outcome(act):
    """Runs `act()` in a forked process; the text of the `FastPOError` that it ended with, or None.

    Any other exception fails the test.
    """
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_tell_outcome, args=(act, send))
    process.start()
    send.close()
    kind, told = receive.recv()
    process.join(300)
    assert kind in (None, "FastPOError"), f"{kind}: {told}"
    return told


def _tell_outcome(act, send):
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what is printed is no file that may grow too large
    os.dup2(nowhere, 2)
    try:
        act()
    except FastPOError as error:
        send.send(("FastPOError", str(error)))
    except BaseException as error:
        send.send((type(error).__name__, str(error)))
    else:
        send.send((None, None))
    os._exit(0)


def assert_one_line(told):
    assert "\n" not in told
    assert " a file cannot" not in f" {told}", told
    assert not re.search(r"\.(partial|old)-[^/]*\+", told), told


def half_written(folder):
    return [str(p) for p in folder.rglob(".*") if files._TEMPORARY.fullmatch(p.name)]


def content(folder):
    """All but locks, a memo that holds times of change, and the mark, whose number is drawn."""
    aside = (".claims", ".writer", "unet.json", ".fastpo")
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name not in aside]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def few_bytes(act, size):
    """`act`, with no file allowed to grow beyond a size: what a full disk does to large files."""

    def limited():
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        act()

    return limited


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A finished run's configuration, from which every command but `prepare` can start."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = load_config(base, [f"train.output_dir={folder}", "train.trackers=[tensorboard]"])
    train(config, progress=False)
    return config


@pytest.fixture(scope="module")
def base(tiny_data, light_pipelines, tiny_caches, tmp_path_factory):
    raw = raw_config("sdxl", light_pipelines["sdxl"], tiny_data, tiny_caches)
    path = tmp_path_factory.mktemp("base") / "base.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def commands(config, folder):
    """Every command that writes, as a function that starts from the finished run."""
    run = folder / "run"
    if not run.exists():
        shutil.copytree(config.train.output_dir, run)
    raw = config.model_dump(mode="json")
    raw["train"]["output_dir"] = str(run)
    raw["evaluate"] |= {"prompts": ["a"], "seeds_per_prompt": 1, "num_inference_steps": 1}
    here = parse_config(raw)

    def again(**options):
        shutil.rmtree(run / "checkpoints" / "step-00000004")
        shutil.rmtree(run / "final")
        train(here, progress=False, **options)

    return {
        "train": lambda: again(resume=True),
        "evaluate": lambda: evaluate(here, progress=False),
        "report": lambda: write_report([run], folder / "page", title="t"),
        "consolidate": lambda: consolidate(run, folder / "out"),
    }


EVERY = {"train": 12, "evaluate": 6, "report": 6, "consolidate": 4}


@pytest.mark.parametrize("name", EVERY)
def test_a_refused_step_is_told_in_one_line(finished, tmp_path, name):
    act = commands(finished, tmp_path)[name]
    before = content(tmp_path / "run" / "checkpoints" / "step-00000002")

    def check():
        assert half_written(tmp_path) == []
        kept = tmp_path / "run" / "checkpoints" / "step-00000002"
        assert content(kept) == before
        shutil.rmtree(tmp_path / "run")
        commands(finished, tmp_path)

    assert refuse_everywhere(act, check, every=EVERY[name]) >= 1


@pytest.mark.long
@pytest.mark.slow
def test_every_refused_step_of_training_is_told_in_one_line(finished, tmp_path):
    act = commands(finished, tmp_path)["train"]

    def check():
        assert half_written(tmp_path) == []
        train(load(tmp_path / "run"), progress=False, resume=True)
        assert content(tmp_path / "run" / "final") == content(finished.train.output_dir / "final")
        shutil.rmtree(tmp_path / "run")
        commands(finished, tmp_path)

    def load(run):
        raw = finished.model_dump(mode="json")
        raw["train"]["output_dir"] = str(run)
        return parse_config(raw)

    assert refuse_everywhere(act, check) > 20


SHORT = [("train", 100), ("train", 20_000), ("consolidate", 5_000), ("report", 100)]


@pytest.mark.parametrize(("name", "size"), SHORT)
def test_a_file_that_comes_out_short_is_told_in_one_line(finished, tmp_path, name, size):
    act = commands(finished, tmp_path)[name]
    before = content(tmp_path / "run" / "checkpoints" / "step-00000002")
    told = outcome(few_bytes(act, size))
    assert told is not None, "nothing was refused"
    assert_one_line(told)
    assert str(tmp_path) in told
    assert half_written(tmp_path) == []
    assert content(tmp_path / "run" / "checkpoints" / "step-00000002") == before


def test_a_refused_step_of_preparing_is_told_and_preparing_goes_on(
    config_for, tmp_path, monkeypatch, one_thread
):
    write_folder(tmp_path / "data", 3, prompts=1)

    def config(name):
        return config_for(prepare={"cache_dir": str(tmp_path / name)})

    encoders = Encoders.load(config("whole"))
    monkeypatch.setattr(Encoders, "load", lambda *_, **__: encoders)
    prepare(config("whole"), progress=False)
    whole = content(tmp_path / "whole")

    def check():
        assert half_written(tmp_path) == []
        prepare(config("cache"), progress=False)
        assert content(tmp_path / "cache") == whole
        shutil.rmtree(tmp_path / "cache")

    def act():
        prepare(config("cache"), progress=False)

    assert refuse_everywhere(act, check, every=9) >= 2
    check()  # what the last trial made, which nothing refused
    told = outcome(few_bytes(act, 100))
    assert told is not None and str(tmp_path) in told
    assert_one_line(told)
    check()


def test_a_refused_step_of_the_reference_is_told_and_goes_on(
    experiment, tiny_caches, tmp_path, one_thread
):
    path = experiment(family="sd15", reference="cached")
    cache = shutil.copytree(tiny_caches / "sd15", tmp_path / "cache")
    config = load_config(path, [f"prepare.cache_dir={cache}"])

    def act():
        prepare_reference(config, 1, progress=False)

    def check():
        assert half_written(tmp_path) == []

    assert refuse_everywhere(act, check, every=6) >= 2
    shutil.rmtree(cache / "reference", ignore_errors=True)
    told = outcome(few_bytes(act, 100))
    assert told is not None
    assert_one_line(told)
    assert half_written(tmp_path) == []


def test_the_command_line_ends_with_two(finished, tmp_path, capsys, monkeypatch):
    commands(finished, tmp_path)

    def commit(kind, path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(files, "_commit", commit)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page")])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "read-only" in told and str(tmp_path / "page") in told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "here cannot be written or read: the d"),
        (OSError(errno.EACCES, "x", "there"), "there cannot be written or read: permission"),
        (OSError(errno.EXDEV, "x", "one", None, "other"), None),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5 vs 4"),
            "short",
        ),
        (
            RuntimeError(
                "[enforce fail at inline_container.cc:747] . open file failed with strerror: "
                "Too many open files"
            ),
            "raise its limit (`ulimit -n`)",
        ),
        (RuntimeError("basic_ios::clear: iostream error"), "short"),
        (RuntimeError("shapes differ"), None),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), None),
        (StorageError("known already", errno.EIO), None),
    ],
)
def test_what_the_system_says_is_understood(error, told):
    explained = explain(error, Path("here"))
    assert (explained is None) == (told is None)
    if told is not None:
        assert told in str(explained)


def test_a_storage_error_is_still_an_error_of_the_system():
    with pytest.raises(OSError) as raised, storage_errors(Path("here")):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert isinstance(raised.value, FastPOError)
    assert raised.value.errno == errno.ENOSPC


def test_the_demo_says_what_it_could_not_write(tmp_path, monkeypatch):
    """Its marker, preferences and summary; what its commands write is tried above."""
    import fastpo.demo.run as demo

    for name in ("prepare", "sample_base", "train", "evaluate", "sections"):
        monkeypatch.setattr(demo, name, lambda *_, **__: {})
    monkeypatch.setattr(demo, "N_PAIRS_SHORT", 2)
    monkeypatch.setattr(demo, "build_base", lambda out, **_: out)
    monkeypatch.setattr(demo, "summarize", lambda *_: {"runs": {}})
    monkeypatch.setattr(demo, "write_report", lambda *_, **__: tmp_path / "report")
    out = tmp_path / "demo"

    def check():
        assert not half_written(out)
        for summary in out.rglob("summary.json"):
            assert yaml.safe_load(summary.read_text())["short"]

    trials = refuse_everywhere(lambda: demo.run_demo(out, short=True), check)
    assert trials > 5
