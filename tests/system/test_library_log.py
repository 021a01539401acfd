"""Other libraries' messages: off the console, in a file, errors shown all the same."""

import io
import logging
import warnings

import pytest

from fastpo import cli
from fastpo.cli import main
from fastpo.data.cache import PairCache
from fastpo.system.library_log import kept_apart, write_library_log
from fastpo_kernels import pair_loss


@pytest.fixture
def printed():
    """What a library's own handler prints; `library.old` exists before a command, others do not."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    library = logging.getLogger("some_library")
    library.addHandler(handler)
    library.propagate = False
    logging.getLogger("some_library.old")
    yield stream
    library.removeHandler(handler)


def say(names=("some_library.old",)):
    for name in names:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.info("an info")
        logger.warning("a warning\nin two lines of %s", name)
        logger.error("an error")


def test_warnings_go_to_the_file_and_errors_are_printed_too(printed, tmp_path):
    names = ("some_library.old", f"some_library.new{id(printed)}")
    with kept_apart(shown=False) as log:
        say(names[:1])
        assert log.waiting == 2
        write_library_log(tmp_path)
        say(names[1:])
        assert log.waiting == 0
    assert printed.getvalue().splitlines() == ["an error", "an error"]
    lines = (tmp_path / "libraries.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        f"{kind} {name}: {text}"
        for name in names
        for kind, text in (
            ("WARNING", f"a warning in two lines of {name}"),
            ("ERROR", "an error"),
        )
    ]


def test_everything_is_printed_when_asked_for_and_after_the_command(printed):
    with kept_apart(shown=True):
        say()
    assert printed.getvalue().count("a") > 0 and "an info" in printed.getvalue()
    before = printed.getvalue()
    say()
    assert printed.getvalue() == 2 * before
    assert logging.getLoggerClass() is logging.Logger


def test_python_warnings_of_others_are_kept_and_ours_are_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    with kept_apart(shown=False) as log:
        warnings.showwarning(UserWarning("theirs"), UserWarning, "/x/diffusers/a.py", 1)
        warnings.showwarning(UserWarning("ours"), UserWarning, cli.__file__, 1)
        warnings.showwarning(UserWarning("kernels"), UserWarning, pair_loss.__file__, 1)
        logging.getLogger("fastpo.anything").warning("also ours")
    assert shown == ["ours", "kernels"] and log.waiting == 1


def test_each_process_has_a_file_of_its_own_and_prints_no_warning(printed, tmp_path, monkeypatch):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    with kept_apart(shown=True):
        say()
        write_library_log(tmp_path)
    assert printed.getvalue() == "an error\n"
    assert [path.name for path in tmp_path.iterdir()] == ["libraries-rank3.log"]


def test_a_run_s_folder_has_them(experiment, printed, tmp_path, monkeypatch, capsys):
    opened = PairCache.open
    monkeypatch.setattr(
        PairCache, "open", lambda *words, **more: (say(), opened(*words, **more))[1]
    )
    path = experiment("sd15", max_steps=1)
    with pytest.raises(SystemExit) as end:
        main(["train", str(path)])
    assert end.value.code == 0
    assert "WARNING some_library.old: a warning in two lines" in (
        (tmp_path / "run" / "libraries.log").read_text()
    )
    assert "not shown" not in capsys.readouterr().err
    assert printed.getvalue() == "an error\n"
    main_shows = main_told(["train", str(path), "--overwrite", "--verbose"], printed)
    assert "an info" in main_shows and "a warning" in main_shows


def main_told(words, printed):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    return printed.getvalue()
