"""Reading ahead: the same batches however they are read, and a position that is one number."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from fastpo.data.loader import TimedIterator, make_loader
from fastpo.data.sampler import PairSampler
from fastpo.system.read_ahead import AHEAD
from fastpo.types import PairBatch

SAMPLER = PairSampler(torch.tensor([0, 1, 0, 0, 1, 0, 1, 0, 0]), 2, seed=3)
STEPS = 12  # more than two epochs


class Reader:
    """Gives back what was asked for, slower for some pairs, and counts the calls."""

    def __init__(self):
        self.calls, self.threads, self._lock = 0, set(), threading.Lock()

    def read(self, indices, visit):
        with self._lock:
            self.calls += 1
            self.threads.add(threading.current_thread())
        time.sleep(0.002 * (indices[0] % 3))
        index = torch.tensor(indices)
        empty = torch.zeros(len(index), 1)
        return PairBatch(
            index=index,
            pair_key=index,
            visit=torch.full_like(index, visit),
            flipped=index > 100,
            latent_mean=empty,
            latent_logvar=empty,
            conditions={"prompt_embeds": empty},
        )


def loader(reader=None, **options):
    return make_loader(reader or Reader(), SAMPLER, total_steps=STEPS, **options)


def seen(batches):
    return [(batch.index.tolist(), batch.visit.tolist()) for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 7, 24])
def test_a_restored_loader_gives_exactly_the_rest(workers, taken):
    whole = seen(loader(accumulation_steps=2))
    first = loader(accumulation_steps=2, workers=workers)
    batches = iter(first)
    before = seen(next(batches) for _ in range(taken))
    state = first.state_dict()
    assert state == {"micro_batches": taken}
    again = loader(accumulation_steps=2, workers=workers)
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert before + seen(again) == whole
    assert seen(again) == whole, "the next pass begins anew"


def test_batches_read_ahead_do_not_count_as_taken():
    reader = Reader()
    ahead = loader(reader, workers=2)
    next(batches := iter(ahead))
    deadline = time.monotonic() + 60
    while reader.calls < 2 * AHEAD + 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert reader.calls == 2 * AHEAD + 1
    assert ahead.state_dict() == {"micro_batches": 1}
    assert all(thread.name.startswith("read") for thread in reader.threads)
    batches.close()
    assert not any(thread.is_alive() for thread in reader.threads)


def test_an_epochs_shuffle_is_the_reading_threads_work(monkeypatch):
    threads, original = set(), PairSampler._shuffle

    def shuffle(self, epoch):
        threads.add(threading.current_thread().name)
        return original(self, epoch)

    monkeypatch.setattr(PairSampler, "_shuffle", shuffle)
    sampler = PairSampler(torch.tensor([0, 1, 0, 0]), 2, seed=3)
    seen(make_loader(Reader(), sampler, total_steps=STEPS, workers=2))
    assert {name[:4] for name in threads} == {"read"}


def test_an_error_while_drawing_reaches_the_caller():
    class Empty(PairSampler):
        def micro_batch(self, n):
            if n == 5:
                raise RuntimeError("nothing to draw")
            return super().micro_batch(n)

    sampler = Empty(torch.tensor([0, 0, 0]), 2, seed=0)
    batches = iter(make_loader(Reader(), sampler, total_steps=STEPS, workers=2))
    assert len(seen(next(batches) for _ in range(5))) == 5
    with pytest.raises(RuntimeError, match="nothing to draw"):
        next(batches)


LEFT_OPEN = """
import torch
from fastpo.data.loader import make_loader
from fastpo.data.sampler import PairSampler

class Reader:
    def read(self, indices, visit):
        return torch.tensor(indices)

sampler = PairSampler(torch.zeros(99, dtype=torch.int64), 2, seed=0)
kept = iter(make_loader(Reader(), sampler, total_steps=99, workers=2))
next(kept)
"""


def test_a_pass_left_open_does_not_keep_the_interpreter_alive(fastpo):
    fastpo(launcher=("-c", LEFT_OPEN))


def test_a_pass_that_fails_ends_its_threads():
    reader = Reader()
    try:
        with TimedIterator(loader(reader, workers=2)) as batches:
            next(batches)
            raise RuntimeError("the loss is not finite")
    except RuntimeError as error:  # its traceback keeps the frames, and with them the pass
        assert error.__traceback__
        assert reader.threads
        assert not any(thread.is_alive() for thread in reader.threads)


def test_another_number_of_processes_goes_on_where_they_stood():
    """Two processes take five rounds; one process, and three, take the rest of the stream."""
    pairs = [iter(loader(rank=r, world_size=2)) for r in range(2)]
    taken = [batch for _ in range(3) for it in pairs for batch in seen([next(it)])]
    running = loader(rank=1, world_size=2)
    for _ in zip(range(3), running, strict=False):
        pass
    state = running.state_dict()
    assert state == {"micro_batches": 6}
    alone = loader()
    alone.load_state_dict(state)
    assert taken + seen(alone) == seen(loader())
    shares = []
    for rank in range(3):
        share = loader(rank=rank, world_size=3)
        share.load_state_dict(state)
        shares.append(seen(share))
    mixed = [batch for round_ in zip(*shares, strict=True) for batch in round_]
    assert mixed[: STEPS - 6] == seen(loader())[6:]


def test_a_start_step_and_a_state_agree():
    late = loader(start_step=5, rank=1, world_size=2, accumulation_steps=2)
    assert late.state_dict() == {"micro_batches": 20}
    restored = loader(rank=1, world_size=2, accumulation_steps=2)
    restored.load_state_dict(late.state_dict())
    assert seen(restored) == seen(late)


@pytest.mark.parametrize("taken", [3, -2, 100])
def test_a_position_that_does_not_fit_is_refused(taken):
    with pytest.raises(ValueError, match=f"cannot go on after {taken} micro-batches: .* 0 to 23"):
        loader(rank=0, world_size=2).load_state_dict({"micro_batches": taken})


def test_the_length_is_known():
    assert len(loader(accumulation_steps=3)) == len(seen(loader(accumulation_steps=3))) == 3 * STEPS


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_while_reading_reaches_the_caller(workers):
    class Broken(Reader):
        def read(self, indices, visit):
            if self.calls == 3:
                raise RuntimeError("disk on fire")
            return super().read(indices, visit)

    with pytest.raises(RuntimeError, match="disk on fire"):
        seen(loader(Broken(), workers=workers))


def test_waiting_is_measured_and_reading_ahead_hides_it(monkeypatch):
    """By a clock of its own, on which a read takes 0.01 s where it is waited for."""
    now = [0.0]

    class Slow(Reader):
        def read(self, indices, visit):
            if threading.current_thread() is threading.main_thread():
                now[0] += 0.01
            return super().read(indices, visit)

    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("fastpo.data.loader.time", clock)

    def share(workers):
        batches = TimedIterator(loader(Slow(), workers=workers))
        next(batches)
        batches.taken()
        began = now[0]
        for _ in range(6):
            next(batches)
            now[0] += 0.04
        return batches.taken() / (now[0] - began)

    assert share(0) == pytest.approx(0.2)
    assert share(2) == 0.0
    assert TimedIterator([]).taken() == 0.0
