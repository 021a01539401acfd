"""Rows of tensors in many files: right, bounded in open files, from any thread and process."""

import os
import pickle
import threading

import pytest
import torch
from safetensors.torch import save_file

from fastpo.data.cache.tensors import TensorFiles, bytes_of
from fastpo.errors import CacheError

FILES, ROWS = 40, 3


@pytest.fixture
def folder(tmp_path):
    for k in range(FILES):
        values = torch.arange(ROWS * 2 * 5).reshape(ROWS, 2, 5) + 100 * k
        tensors = {"half": values.half(), "bf": values.bfloat16(), "full": values.float()}
        save_file(tensors, tmp_path / f"{k}.safetensors", metadata={"a": "b"})
    return tmp_path


def read(files, k, row, key="full", dtype=torch.float32):
    found = torch.empty(2, 5, dtype=dtype)
    files.read(f"{k}.safetensors", key, row, bytes_of(found))
    return found


@pytest.mark.parametrize(
    ("key", "dtype"), [("half", torch.float16), ("bf", torch.bfloat16), ("full", torch.float32)]
)
def test_a_row_is_read_into_its_parts(folder, key, dtype):
    files = TensorFiles(folder)
    for k, row in ((0, 0), (7, 2), (39, 1)):
        expected = (torch.arange(10).reshape(2, 5) + 100 * k + 10 * row).to(dtype)
        assert torch.equal(read(files, k, row, key, dtype), expected)
    assert files.rows("0.safetensors", key).shape == (2, 5)
    assert files.rows("0.safetensors", key).dtype == dtype


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_open_files_are_bounded(folder):
    before, files = descriptors(), TensorFiles(folder, keep=5)
    for _ in range(2):
        for k in range(FILES):
            read(files, k, 0)
            assert files.open_files <= 5
    assert descriptors() - before == 5
    del files
    assert descriptors() == before


def test_threads_read_while_files_are_let_go(folder):
    files, wrong = TensorFiles(folder, keep=2), []

    def work(first):
        for i in range(300):
            k, row = (first + 7 * i) % FILES, i % ROWS
            if read(files, k, row)[0, 0] != 100 * k + 10 * row:
                wrong.append((k, row))

    threads = [threading.Thread(target=work, args=(f,)) for f in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert files.open_files <= 2


def test_a_fork_and_a_copy_open_their_own(folder):
    files = TensorFiles(folder, keep=8)
    expected = read(files, 3, 1)
    assert torch.equal(read(pickle.loads(pickle.dumps(files)), 3, 1), expected)
    files._lock.acquire()  # as if another thread were opening a file
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(read(files, 3, 1), expected) else 1)
    files._lock.release()
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda data: b"", "no safetensors file"),
        (lambda data: b"\xff" * len(data), "no safetensors file"),
        (lambda data: data[:8] + b"x" * (len(data) - 8), "JSONDecodeError"),
        (lambda data: data[:-1], "does not fit into the file"),
    ],
)
def test_damage_is_named(folder, change, complaint):
    path = folder / "1.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CacheError, match=f"{path}: cannot read full.*{complaint}"):
        read(TensorFiles(folder), 1, 0)


def test_what_is_not_there_is_named(folder):
    files = TensorFiles(folder)
    with pytest.raises(CacheError, match=r"0\.safetensors: cannot read none: KeyError"):
        read(files, 0, 0, "none")
    with pytest.raises(CacheError, match=r"cannot read full\[3\]: it has 3 rows"):
        read(files, 0, 3)
    with pytest.raises(CacheError, match=r"cannot read half\[0\]: a row has 20 bytes"):
        read(files, 0, 0, "half")
    with pytest.raises(CacheError, match=r"99\.safetensors: cannot read full: FileNotFound"):
        read(files, 99, 0)


def test_short_answers_of_the_system_are_completed(folder, monkeypatch):
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: original(fd, [views[0][:7]], at))
    expected = torch.arange(10.0).reshape(2, 5) + 10
    assert torch.equal(read(TensorFiles(folder), 0, 1), expected)
