"""Many processes make one cache: they meet in its folder only, and may be killed at any time."""

import errno
import fcntl
import json
import os
import shutil
import signal
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastpo.config import dump_config, parse_config
from fastpo.data.cache import PairCache
from fastpo.data.cache.manifest import Range
from fastpo.data.cache.parts import CachePart
from fastpo.data.prepare import prepare
from fastpo.data.prepare.partition import partition_ranges
from fastpo.data.sources import open_source
from fastpo.errors import CacheError, ConfigError
from fastpo.models.encoders import Encoders
from fastpo.system import work
from fastpo.system.locks import FolderLocks
from fastpo.system.process import Rank
from fastpo.testing import write_folder
from tests.faults.two_ranks import two_ranks
from tests.forked import FORK

PAIRS = 23


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(work, "POLL_SECONDS", 0.02)
    yield
    torch.set_num_threads(threads)


def raw_config(pipeline, data, cache, **prepare_options):
    options = {"resolution": 32, "shard_size": 2, "batch_size": 2, "workers": 1}
    return {
        "model": {"path": str(pipeline)},
        "data": {"source": "folder", "path": str(data)},
        "prepare": {"cache_dir": str(cache), **options, **prepare_options},
        "train": {"output_dir": "unused", "objective": {"name": "sft"}, "max_steps": 1},
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two shapes, five prompts, names that come twice (once across shards, once in quarantine)."""
    folder = write_folder(
        tmp_path_factory.mktemp("workers") / "data", PAIRS, sizes=[(48, 48), (80, 48)], prompts=5
    )
    for broken in (3, 12):
        (folder / f"loser{broken}.png").write_bytes(b"broken")
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    for number, name in ((1, "twice"), (12, "twice"), (20, "twice"), (7, "p6")):
        lines[number]["id"] = name
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def whole(tiny_pipelines, data, tmp_path_factory):
    """What one process makes alone."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    prepare(parse_config(raw_config(tiny_pipelines["sdxl"], data, folder)), progress=False)
    return folder


@pytest.fixture
def config_for(tiny_pipelines, data, tmp_path):
    def config(limit=None, **options):
        raw = raw_config(tiny_pipelines["sdxl"], data, tmp_path / "cache", **options)
        raw["data"]["limit"] = limit
        return parse_config(raw)

    return config


def content(folder):
    """Every file but the lock and the marker; the manifest with everything it says."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    hidden = (".claims", ".fastpo")
    return {name: path.read_bytes() for name, path in files.items() if name not in hidden}


def start(config, rank, world_size, change=lambda: None):
    """Prepares in a forked process that a launcher could have started."""

    def run():
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        change()
        prepare(config, progress=False)

    process = FORK.Process(target=run, daemon=True)
    process.start()
    return process


def log_parts(path, seconds=0.03):
    """Notes who made what, and lets every part take a while."""

    def change():
        original = CachePart.write

        def write(self, *arguments, **options):
            time.sleep(seconds)
            original(self, *arguments, **options)
            with path.open("a") as file:
                file.write(f"{os.environ['RANK']} {self.name}\n")

        CachePart.write = write

    return change


def join(processes):
    for process in processes:
        process.join(90)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_processes_makes_the_same_bytes(config_for, tmp_path, whole, world_size):
    log = tmp_path / "log"
    workers = [start(config_for(), r, world_size, log_parts(log)) for r in range(world_size)]
    assert join(workers) == [0] * world_size
    assert content(tmp_path / "cache") == content(whole)
    made = [line.split() for line in log.read_text().splitlines()]
    assert {rank for rank, _ in made} == {str(r) for r in range(world_size)}
    assert len({name for _, name in made}) == len(made) == 15, "a part was made twice"


def test_a_killed_process_leaves_its_part_to_the_others(config_for, tmp_path, whole):
    stuck = tmp_path / "stuck"

    def hang():
        def encode(self, pixels):
            stuck.touch()
            time.sleep(600)

        Encoders.encode_images = encode

    victim = start(config_for(), 1, 3, hang)
    while not stuck.exists() and victim.is_alive():
        time.sleep(0.01)
    others = [start(config_for(), rank, 3) for rank in (0, 2)]
    held = {f"shard-{k:05d}" for k in range(12)}
    deadline = time.monotonic() + 60
    while len(held) > 1 and time.monotonic() < deadline:
        held = {name for name in held if not (tmp_path / "cache" / name).is_dir()}
        time.sleep(0.01)
    assert len(held) == 1, "the others do everything but the part in work"
    assert all(process.is_alive() for process in others), "and wait for it"
    victim.kill()
    assert join([victim, *others]) == [-signal.SIGKILL, 0, 0]
    assert content(tmp_path / "cache") == content(whole)
    PairCache.open(config_for(), verify=True)


def test_all_processes_killed_and_started_again(config_for, tmp_path, whole):
    for killed_at in (2, 6, 9):
        workers = [start(config_for(), r, 2, log_parts(tmp_path / "log")) for r in range(2)]
        deadline = time.monotonic() + 60
        while len([*(tmp_path / "cache").glob("shard-*")]) < killed_at:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        for worker in workers:
            worker.kill()
        join(workers)
        with pytest.raises(CacheError, match="unfinished"):
            PairCache.open(config_for())
    before = (tmp_path / "log").read_text().count("shard-")
    assert join([start(config_for(), 0, 1, log_parts(tmp_path / "log"))]) == [0]
    assert (tmp_path / "log").read_text().count("shard-") <= 12
    assert (tmp_path / "log").read_text().count("shard-") > before
    assert content(tmp_path / "cache") == content(whole)


def test_names_are_numbered_over_all_parts(whole, data, config_for):
    cache = PairCache.open(config_for(cache_dir=str(whole)))
    names = [pair.pair_id for pair in open_source(config_for().data)]
    left_out = {"p3", "twice#2"}
    assert cache.pair_ids == [name for name in names if name not in left_out]
    assert {"twice", "twice#3", "p6", "p6#2"} <= set(cache.pair_ids)
    assert cache.report["duplicates"] == 3
    lines = [json.loads(line) for line in (whole / "quarantine.jsonl").read_text().splitlines()]
    assert [line["pair_id"] for line in lines] == ["p3", "twice#2"]
    assert cache.quarantined == 2


def no_locks(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_locks_the_result_is_the_same(config_for, tmp_path, whole):
    def change():
        fcntl.lockf = no_locks

    assert join([start(config_for(), rank, 2, change) for rank in range(2)]) == [0, 0]
    assert content(tmp_path / "cache") == content(whole)


@pytest.mark.parametrize("locks", [True, False])
def test_only_locks_show_that_an_unfinished_file_is_nobodys(
    config_for, tmp_path, monkeypatch, locks
):
    """Without them a process in the same place would lose its file between writing and renaming."""
    if not locks:
        monkeypatch.setattr(fcntl, "lockf", no_locks)
    (tmp_path / "cache").mkdir()
    theirs = tmp_path / "cache" / ".index.arrow.partial-elsewhere-1"
    theirs.write_bytes(b"index")
    prepare(config_for(limit=2), progress=False)
    assert theirs.exists() == (not locks)


def test_a_part_is_put_in_place_once(tmp_path):
    part = CachePart("shard", 0, Range(start=0, stop=2))
    for text in ("first", "second"):
        part.write(tmp_path, {"a": lambda path, text=text: path.write_text(text)})
    assert (tmp_path / "shard-00000" / "a").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["shard-00000"]


def test_another_limit_waits_for_the_processes_at_work(config_for, tmp_path):
    ready, go = FORK.Event(), FORK.Event()
    prepare(config_for(limit=4), progress=False)

    def hold():
        with FolderLocks(tmp_path / "cache"):
            ready.set()
            go.wait(60)

    holder = FORK.Process(target=hold, daemon=True)
    holder.start()
    assert ready.wait(60)
    with pytest.raises(
        CacheError, match=r"another process is preparing .* data.limit 4, here it is 6"
    ):
        prepare(config_for(limit=6), progress=False)
    go.set()
    join([holder])
    assert len(prepare(config_for(limit=6), progress=False)) == 5


def test_limits_may_shrink_and_grow_while_unfinished(config_for, tmp_path, whole, monkeypatch):
    original = Encoders.encode_images
    left = iter(range(3))

    def stop(self, pixels):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return original(self, pixels)

    monkeypatch.setattr(Encoders, "encode_images", stop)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")  # begins in the middle
    with pytest.raises(KeyboardInterrupt):
        prepare(config_for(), progress=False)
    monkeypatch.undo()
    assert (tmp_path / "cache" / "shard-00004").is_dir()
    small = prepare(config_for(limit=9), progress=False)
    names = PairCache.open(config_for(cache_dir=str(whole))).pair_ids
    assert small.pair_ids == names[:8]
    assert small.prompts == ["", *(f"prompt {i}" for i in range(5))]
    large = prepare(config_for(), progress=False)
    assert large.pair_ids == names
    for i in (0, 8, 12, 20):
        one = PairCache.open(config_for(cache_dir=str(whole))).read([i], 0)
        assert torch.equal(large.read([i], 0).latent_mean, one.latent_mean)
        for name, states in one.conditions.items():
            assert torch.equal(large.read([i], 0).conditions[name], states)


@given(
    size=st.integers(1, 9),
    totals=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    done=st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_a_plan_covers_everything_once_and_keeps_what_is_done(size, totals, done):
    spans = []
    for total in totals:
        finished = done[: len(spans)]
        new = partition_ranges(total, size, spans, finished)
        assert new[0].start == 0
        assert all(a.stop == b.start for a, b in pairwise(new))
        assert new[-1].start < total <= new[-1].stop
        for k, (span, ready) in enumerate(zip(spans, finished, strict=True)):
            assert not ready or span.start >= total or new[k] == span
        spans = new


def test_parts_without_a_manifest_are_refused(config_for, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").unlink()
    with pytest.raises(CacheError, match=r"holds shard-00\d+ but no manifest.json"):
        prepare(config_for(), progress=False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Rank(0, 1, 0)),
        ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}, Rank(9, 16, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Rank(1, 2, 0)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}, Rank(3, 4, 1)),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "3", "SLURM_NTASKS": "4"},
            Rank(0, 2, 0),
        ),
    ],
)
def test_the_launcher_says_who_we_are(environment, expected):
    assert Rank.of_launch(environment) == expected


@pytest.mark.parametrize("rank", ["x", "2", "-1"])
def test_a_wrong_launch_is_named(rank):
    with pytest.raises(ConfigError, match=f"RANK='{rank}', WORLD_SIZE='2'"):
        Rank.of_launch({"RANK": rank, "WORLD_SIZE": "2"})


def test_two_processes_of_a_launcher_prepare_together(config_for, tmp_path, whole):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config_for()))
    with two_ranks(tmp_path / "out", lambda _: ["prepare", path]) as ranks:
        assert ranks.exit_codes() == [0, 0], ranks.text(0) + ranks.text(1)
    assert content(tmp_path / "cache") == content(whole)
