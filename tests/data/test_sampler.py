"""The stream of micro-batches."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo.data.loader import make_loader, micro_batch_numbers
from fastpo.data.mixing import MixedSampler
from fastpo.data.sampler import PairSampler
from fastpo.types import PairBatch

BUCKETS = st.lists(st.integers(0, 3), min_size=1, max_size=40).map(torch.tensor)
SIZE = st.integers(1, 6)
SEED = st.integers(0, 2**31)


class EchoCache:
    """Gives back which pairs were asked for."""

    def read(self, indices, visit):
        index = torch.tensor(indices)
        return PairBatch(
            index=index,
            pair_key=index + 100,
            visit=torch.full_like(index, visit),
            flipped=torch.zeros(len(indices), dtype=torch.bool),
            latent_mean=torch.zeros(2 * len(indices), 1),
            latent_logvar=torch.zeros(2 * len(indices), 1),
            conditions={"prompt_embeds": torch.zeros(len(indices), 1)},
        )


@settings(deadline=None)
@given(bucket=BUCKETS, size=SIZE, seed=SEED, epoch=st.integers(0, 5))
def test_every_pair_comes_once_an_epoch_in_batches_of_one_bucket(bucket, size, seed, epoch):
    sampler = PairSampler(bucket, size, seed)
    first = epoch * sampler.micro_batches_per_epoch
    seen = []
    for n in range(first, first + sampler.micro_batches_per_epoch):
        got, indices = sampler.micro_batch(n)
        assert got == epoch
        assert 1 <= len(indices) <= size
        assert len(set(bucket[indices].tolist())) == 1
        seen += indices
    assert sorted(seen) == list(range(len(bucket)))


@settings(deadline=None)
@given(bucket=BUCKETS, size=SIZE, seed=SEED, numbers=st.lists(st.integers(0, 200), max_size=10))
def test_a_micro_batch_depends_on_its_number_only(bucket, size, seed, numbers):
    sampler = PairSampler(bucket, size, seed)
    for n in numbers:
        assert sampler.micro_batch(n) == PairSampler(bucket, size, seed).micro_batch(n)


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 20), min_size=1, max_size=4), size=SIZE)
def test_only_each_buckets_last_batch_is_short(counts, size):
    bucket = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    sampler = PairSampler(bucket, size, 0)
    expected = Counter()
    for count in counts:
        expected[size] += count // size
        expected[count % size] += count % size > 0
    lengths = Counter(
        len(sampler.micro_batch(n)[1]) for n in range(sampler.micro_batches_per_epoch)
    )
    assert lengths == +expected


def test_epochs_and_seeds_differ():
    bucket = torch.zeros(64, dtype=torch.int64)
    orders = [PairSampler(bucket, 64, seed).micro_batch(n)[1] for seed in (0, 1) for n in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] != sorted(orders[0])


def test_order_is_pinned():
    """A change would make a resumed run see other pairs than the run it continues."""
    sampler = PairSampler(torch.tensor([0, 1, 0, 0, 1, 0, 1, 0]), 2, seed=5)
    assert [sampler.micro_batch(n) for n in range(6)] == [
        (0, [6]),
        (0, [5, 0]),
        (0, [7]),
        (0, [4, 1]),
        (0, [2, 3]),
        (1, [3]),
    ]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"N > 0, got \(0,\)"):
        PairSampler(torch.zeros(0), 1, 0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        PairSampler(torch.zeros(3), 0, 0)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        make_loader(
            EchoCache(), PairSampler(torch.zeros(3), 1, 0), rank=2, world_size=2, total_steps=1
        )


@settings(deadline=None)
@given(
    world=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    start=st.integers(0, 5),
    steps=st.integers(0, 5),
)
def test_ranks_share_each_step_without_overlap(world, accumulation, start, steps):
    end = start + steps
    shares = [
        list(
            micro_batch_numbers(
                rank=rank,
                world_size=world,
                accumulation_steps=accumulation,
                start_step=start,
                total_steps=end,
            )
        )
        for rank in range(world)
    ]
    per_step = world * accumulation
    for step in range(steps):
        block = [n for s in shares for n in s[step * accumulation : (step + 1) * accumulation]]
        first = (start + step) * per_step
        assert sorted(block) == list(range(first, first + per_step))
    assert all(len(share) == steps * accumulation for share in shares)
    assert all(n % world == rank for rank, share in enumerate(shares) for n in share)


def batches(loader):
    return [(batch.index.tolist(), batch.visit.tolist()) for batch in loader]


SAMPLER = PairSampler(torch.tensor([0, 1, 0, 0, 1, 0, 1, 0, 0]), 2, seed=3)


def loaded(**options):
    return batches(make_loader(EchoCache(), SAMPLER, total_steps=7, **options))


def test_a_steps_pairs_do_not_depend_on_the_processes():
    """World 1 with 4 accumulated micro-batches, world 2 with 2, world 4 with 1."""

    def steps(world):
        accumulation = 4 // world
        ranks = [
            loaded(rank=r, world_size=world, accumulation_steps=accumulation) for r in range(world)
        ]
        return [
            sorted(b for rank in ranks for b in rank[s * accumulation : (s + 1) * accumulation])
            for s in range(7)
        ]

    assert steps(1) == steps(2) == steps(4)


@pytest.mark.parametrize("start", [0, 1, 4, 7])
def test_resuming_is_a_start_step(start):
    whole = loaded(accumulation_steps=3)
    assert loaded(accumulation_steps=3, start_step=start) == whole[3 * start :]


def test_reading_threads_give_the_same_batches_in_order():
    assert loaded(workers=2) == loaded()


def test_visit_counts_the_epochs():
    seen = Counter()
    for indices, visits in loaded(accumulation_steps=4):
        assert visits == [seen[i] for i in indices]
        seen.update(indices)
    assert max(seen.values()) > 2


def test_loading_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    loaded()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_epoch_visits_the_given_pairs_alone_each_once():
    bucket, pairs = torch.tensor([0, 1, 0, 0, 1, 0]), torch.tensor([0, 1, 3, 5])
    sampler = PairSampler(bucket, 2, seed=0, pairs=pairs)
    drawn = [sampler.micro_batch(n)[1] for n in range(sampler.micro_batches_per_epoch)]
    assert sorted(i for batch in drawn for i in batch) == pairs.tolist()
    assert all(len(set(bucket[batch].tolist())) == 1 for batch in drawn)


def test_repeats_and_held_out_pairs_go_together():
    bucket, source = torch.tensor([0, 1, 0, 0, 1, 0]), torch.tensor([0, 0, 0, 1, 1, 1])
    kept = torch.tensor([0, 1, 3, 5])
    sampler = MixedSampler(bucket, 2, 0, source=source, visits=[1.0, 3.0], pairs=kept)
    batches = [sampler.draw(n) for n in range(sampler.micro_batches_per_epoch)]
    drawn = Counter(i for _, pairs in batches for i in pairs)
    assert drawn == {0: 1, 1: 1, 3: 3, 5: 3}
    needed = sampler.needed(sampler.micro_batches_per_epoch)
    assert [pairs.tolist() for pairs in needed] == [[0, 1, 3, 5], [3, 5], [3, 5]]
