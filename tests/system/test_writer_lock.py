"""One writer a folder: a second one is refused by name, and a dead one's place is taken."""

import errno
import os
import re
import time

import pytest

import fastpo.system.writer_lock as module
from fastpo.errors import BusyFolderError
from fastpo.system.alive import ProcessName, _stat
from fastpo.system.writer_lock import LOCK_FILE, Holder, boot_id, sole_writer
from tests.forked import FORK


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits that a test can wait for."""
    for name, seconds in (("BEAT", 0.02), ("SILENCE", 0.4), ("SETTLE", 0.3)):
        monkeypatch.setattr(module, name, seconds)


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that has none."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(module.fcntl, "flock", refuse)


def hold(folder, pipe):
    with sole_writer(folder):
        pipe.send("held")
        pipe.poll(60)


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder; the function ends it, by a kill if asked to."""
    mine, its = FORK.Pipe()  # an Event cannot be set when who waits for it was killed
    process = FORK.Process(target=hold, args=(tmp_path / "run", its), daemon=True)
    process.start()
    assert mine.poll(60)

    def stop(*, kill=False):
        process.kill() if kill else mine.send("end")
        process.join(300)

    stop.pid = process.pid
    yield stop
    stop()


def leave(folder, **changes):
    """What a holder left that did not end well."""
    own = ProcessName.own()
    holder = Holder(
        host=own.host, space=own.space, pid=1, started="1", boot="b", since="noon", token="t"
    )
    folder.mkdir(exist_ok=True)
    (folder / LOCK_FILE).write_text(holder.model_copy(update=changes).model_dump_json())


def test_a_second_writer_is_refused_by_name(tmp_path, other):
    wanted = re.escape(f"is being written by process {other.pid} on host {os.uname().nodename} ")
    with pytest.raises(BusyFolderError, match=wanted + "since 20"), sole_writer(tmp_path / "run"):
        pass
    other()
    with sole_writer(tmp_path / "run"):
        pass


def test_a_second_call_in_the_process_is_refused(tmp_path):
    with sole_writer(tmp_path), pytest.raises(BusyFolderError, match=str(os.getpid())):
        with sole_writer(tmp_path):
            pass


def test_a_killed_writers_place_is_taken_at_once(tmp_path, other, monkeypatch):
    monkeypatch.setattr(module, "SILENCE", 60.0)
    other(kill=True)
    assert (tmp_path / "run" / LOCK_FILE).read_text()
    began = time.monotonic()
    with sole_writer(tmp_path / "run"):
        pass
    assert time.monotonic() - began < module.SILENCE


def test_another_hosts_writer_is_watched_before_its_place_is_taken(tmp_path, capsys):
    leave(tmp_path, host="elsewhere", pid=123)
    began = time.monotonic()
    with sole_writer(tmp_path) as lock:
        lock.confirm()
    assert time.monotonic() - began >= module.SILENCE
    assert "being written by process 123 on host elsewhere since noon" in capsys.readouterr().out


def test_another_hosts_writer_that_lives_is_not_disturbed(tmp_path, monkeypatch):
    """As where the file system keeps locks for each host alone."""
    monkeypatch.setattr(module, "SILENCE", 60.0)  # it looks once a second: one beat is enough
    leave(tmp_path, host="elsewhere", pid=123)

    def beat():
        while True:
            os.utime(tmp_path / LOCK_FILE)
            time.sleep(0.02)

    process = FORK.Process(target=beat, daemon=True)
    process.start()
    with pytest.raises(BusyFolderError, match="process 123 on host elsewhere"):
        with sole_writer(tmp_path):
            pass
    process.kill()
    process.join()


def test_a_holder_beats(tmp_path):
    with sole_writer(tmp_path):
        before = (tmp_path / LOCK_FILE).stat().st_mtime_ns
        end = time.monotonic() + 60
        while (tmp_path / LOCK_FILE).stat().st_mtime_ns == before and time.monotonic() < end:
            time.sleep(module.BEAT)
        assert (tmp_path / LOCK_FILE).stat().st_mtime_ns > before
    assert not (tmp_path / LOCK_FILE).read_text()


def test_one_whose_place_was_taken_stops(tmp_path):
    with sole_writer(tmp_path) as lock:
        lock.confirm()
        leave(tmp_path, host="elsewhere")
        with pytest.raises(BusyFolderError, match="on host elsewhere"):
            lock.confirm()
    assert (tmp_path / LOCK_FILE).read_text(), "it is the other's"


@pytest.mark.parametrize(
    ("changes", "alive"),
    [
        ({}, True),
        ({"started": "12345"}, False),
        ({"boot": "an earlier one"}, False),
        ({"pid": 2**22 + 1}, False),
    ],
    ids=["alive", "another process of this number", "before a reboot", "gone"],
)
def test_without_the_systems_lock_a_holder_is_looked_up(
    tmp_path, without_locks, other, changes, alive
):
    started = _stat(other.pid)[1]
    leave(tmp_path, **{"pid": other.pid, "started": started, "boot": boot_id(), **changes})
    if not alive:
        with sole_writer(tmp_path):
            return
    with pytest.raises(BusyFolderError, match=f"process {other.pid} "), sole_writer(tmp_path):
        pass


def test_without_the_systems_lock_one_of_two_wins(tmp_path, without_locks, monkeypatch):
    monkeypatch.setattr(module, "SETTLE", 1.0)  # longer than a busy machine lets one wait
    barrier, won, told = FORK.Barrier(2), FORK.Queue(), FORK.Event()

    def race():
        barrier.wait(60)
        try:
            with sole_writer(tmp_path):
                won.put(True)
                told.wait(60)
        except BusyFolderError:
            won.put(False)

    racers = [FORK.Process(target=race) for _ in range(2)]
    for racer in racers:
        racer.start()
    outcomes = sorted(won.get(timeout=300) for _ in racers)
    told.set()
    for racer in racers:
        racer.join(300)
    assert outcomes == [False, True]


def test_a_folder_in_which_nothing_was_put_is_gone_again(tmp_path):
    with sole_writer(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with sole_writer(tmp_path / "old"):
        pass
    assert (tmp_path / "old").exists()
