"""The ledger against numbers worked by hand, and its independence from batches and processes."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastpo.ledger import ABSURD, BINS, CERTAIN, DOUBT, LEVEL, PRIOR, WINDOW, PairLedger
from tests.faults.two_ranks import two_ranks


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def stream(pairs, visits, *, flip_rate=0.2, seed=0, loudness=None):
    """Margins as the model behind the votes has them: `(index, margin, timestep, flipped)`.

    `loudness(t)` multiplies the margins of timestep t. Later timesteps tell more.
    """
    generator = torch.Generator().manual_seed(seed)
    flipped = torch.rand(pairs, generator=generator) < flip_rate
    index = torch.cat([torch.randperm(pairs, generator=generator) for _ in range(visits)])
    timestep = torch.randint(1000, index.shape, generator=generator)
    signal = timestep / 1000 * torch.where(flipped, -1.0, 1.0)[index]
    margin = signal + torch.randn(index.shape, generator=generator)
    return index, margin * (1.0 if loudness is None else loudness(timestep)), timestep, flipped


def fed(index, margin, timestep, *, step, pairs=None):
    ledger = PairLedger(pairs or int(index.max()) + 1)
    for rows in zip(index.split(step), margin.split(step), timestep.split(step), strict=True):
        ledger.update(*rows)
    return ledger


def auroc(ledger, flipped):
    doubt = -ledger.total
    return (doubt[flipped][:, None] > doubt[~flipped][None]).double().mean().item()


def leveled(y):
    return y / math.sqrt(1 + (y / LEVEL) ** 2) / (1 + (y / ABSURD) ** 2)


def test_two_steps_worked_by_hand():
    """Step 1: margins 3, -1, 2 in one bin, whose mean logarithm is log(6)/3.

    The mean logarithm of a standard normal number's size is -0.635, so y = d / exp(log(6)/3 +
    0.635). With the sums of z and z^2, rms = sqrt(sum z^2 / 3), the overall mean is
    (sum z / rms) / (3 + DOUBT) and s = (sum z / rms + PRIOR * overall) / (3 + PRIOR). Step 2 adds
    margin 1 in the same bin, after the older moments have faded by exp(-1/WINDOW).
    """
    ledger = PairLedger(4)
    ledger.update(torch.tensor([0, 1, 2]), torch.tensor([3.0, -1.0, 2.0]), torch.full((3,), 950))
    count = logs = total = power = 0.0
    votes = [0.0] * 4
    for step in ({0: 3.0, 1: -1.0, 2: 2.0}, {1: 1.0}):
        fade = math.exp(-len(step) / WINDOW)
        count = count * fade + len(step)
        logs = logs * fade + sum(math.log(abs(d)) for d in step.values())
        scale = math.exp(logs / count + 0.5772156649 / 2 + math.log(2) / 2)
        z = {pair: leveled(d / scale) for pair, d in step.items()}
        total = total * fade + sum(z.values())
        power = power * fade + sum(v * v for v in z.values())
        rms = math.sqrt(power / count)
        overall = total / rms / (count + DOUBT)
        s = (total / rms + PRIOR * overall) / (count + PRIOR)
        for pair, v in z.items():
            votes[pair] += v / rms * s / (1 - s * s)
    ledger.update(torch.tensor([1]), torch.tensor([1.0]), torch.tensor([999]))
    assert ledger.visits.tolist() == [1, 2, 1, 0]
    torch.testing.assert_close(ledger.total, torch.tensor(votes))
    torch.testing.assert_close(ledger.mean(), torch.tensor([votes[0], votes[1] / 2, votes[2], 0.0]))
    u = [sigmoid(-2 * v) for v in votes[:3]] + [0.0]
    torch.testing.assert_close(ledger.minority(), torch.tensor(u))


@pytest.mark.parametrize("place", [0, 9, 500], ids=["first", "tenth", "late"])
@pytest.mark.parametrize("step", [1, 50])
def test_an_outlier_silences_nobody(place, step):
    """Votes of one bin with one margin of a thousand times the others, against the same without."""
    index, margin, timestep, _ = stream(1000, 1)
    margin = 1e-3 * margin
    timestep[:] = 950
    wild = margin.clone()
    wild[place] = -1.0
    plain, struck = (fed(index, m, timestep, step=step) for m in (margin, wild))
    assert struck.total[index[place]].abs() < 0.1  # it says nothing about its own label
    later = index[place + 1 :]
    loss = [t.total[later][:200].abs().mean() for t in (struck, plain)]
    assert loss[0] > 0.7 * loss[1]
    loss = [t.total[later][200:].abs().mean() for t in (struck, plain)]
    assert loss[0] > 0.95 * loss[1]


def test_wrong_labels_are_found_among_outliers():
    index, margin, timestep, flipped = stream(2000, 4)
    generator = torch.Generator().manual_seed(1)
    struck = torch.rand(margin.shape, generator=generator) < 0.01
    wild = torch.where(struck, 1e3 * torch.randn(margin.shape, generator=generator), margin)
    plain, among = (fed(index, m, timestep, step=20) for m in (margin, wild))
    assert auroc(among, flipped) > auroc(plain, flipped) - 0.01


def test_margins_may_grow_while_training():
    """With the square of time over the first eighth of the margins, as in a warm-up."""
    index, margin, timestep, flipped = stream(2000, 4)
    grown = margin * (torch.arange(1, len(margin) + 1) / 1000).clamp_max(1.0).square()
    plain, growing = (fed(index, m, timestep, step=20) for m in (margin, grown))
    assert auroc(growing, flipped) > auroc(plain, flipped) - 0.01


def test_the_larger_u_the_more_labels_are_wrong():
    index, margin, timestep, flipped = stream(20_000, 3)
    u = fed(index, margin, timestep, step=100).minority()
    edges = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    bands = [(u >= low) & (u < high) for low, high in itertools.pairwise(edges)]
    wrong = [flipped[band].double().mean().item() for band in bands]
    assert wrong == sorted(wrong)
    assert wrong[0] < 0.1
    assert wrong[-1] > 0.7


def test_the_scale_of_a_timestep_does_not_matter():
    """Whatever factor a prediction type or a weighting puts on the margins of a timestep bin."""
    index, margin, timestep, flipped = stream(2000, 4)
    plain = fed(index, margin, timestep, step=20)
    factor = 10.0 ** -(timestep * BINS // 1000).double()
    loud = fed(index, margin * factor, timestep, step=20)
    torch.testing.assert_close(loud.total, plain.total)
    assert auroc(plain, flipped) > 0.9
    # ... while the raw margins of the loudest bins, which tell least, drown all others:
    raw = PairLedger(2000)
    raw.total.index_add_(0, index, (margin * factor).float())
    assert auroc(raw, flipped) < auroc(plain, flipped) - 0.1


@pytest.mark.parametrize("step", [1, 4, 500])
def test_steps_of_one_pair_find_as_much_as_big_ones(step):
    index, margin, timestep, flipped = stream(1000, 4)
    big, small = (fed(index, margin, timestep, step=n) for n in (100, step))
    assert auroc(small, flipped) == pytest.approx(auroc(big, flipped), abs=0.01)
    sign = PairLedger(1000)
    sign.total.index_add_(0, index, margin.sign())  # all that the rms of a single pair leaves
    assert auroc(small, flipped) > auroc(sign, flipped) + 0.01


def test_the_result_is_the_same_to_the_bit_however_a_step_was_spread():
    index, margin, timestep, _ = stream(64, 4)
    one, two = PairLedger(64), PairLedger(64)
    for rows in zip(index.split(32), margin.split(32), timestep.split(32), strict=True):
        one.update(*rows)
        shuffled = torch.randperm(32)
        two.update(*(r[shuffled] for r in rows))
    assert all(torch.equal(one.state_dict()[k], two.state_dict()[k]) for k in one.state_dict())


def test_pairs_with_too_few_visits_are_neutral():
    index, margin, timestep, _ = stream(100, 2)
    one, two = PairLedger(101), PairLedger(101, min_visits=3)
    for ledger in (one, two):
        for rows in zip(index.split(50), margin.split(50), timestep.split(50), strict=True):
            ledger.update(*rows)
    assert one.minority()[:100].min() > 0
    assert two.minority().max() == 0
    assert one.minority()[100] == 0  # never visited


def test_u_exceeds_a_half_exactly_where_the_votes_are_negative():
    index, margin, timestep, _ = stream(64, 5)
    ledger = fed(index, margin, timestep, step=8)
    assert torch.equal(ledger.minority() > 0.5, ledger.mean() < 0)


def test_no_vote_is_cast_where_nothing_is_known():
    """Margins of zero (the first step), not finite, or labels that the margins contradict."""
    ledger = PairLedger(4)
    ledger.update(torch.tensor([0, 1]), torch.zeros(2))
    ledger.update(torch.tensor([0, 1]), torch.tensor([math.nan, math.inf]))
    ledger.update(torch.tensor([0, 1, 2, 3]), torch.tensor([-1.0, -2.0, -1.5, 0.5]))
    assert ledger.visits.tolist() == [0, 0, 0, 0]
    assert ledger.minority().tolist() == [0.0, 0.0, 0.0, 0.0]
    assert ledger.moments.isfinite().all()


def test_one_vote_never_decides_alone():
    ledger = PairLedger(1000)
    for _ in range(5):
        ledger.update(torch.arange(1000), torch.ones(1000))
    assert ledger.total.max() <= 5 * CERTAIN / (1 - CERTAIN**2) + 1e-3


def test_record_and_merge_are_one_update():
    index, margin, timestep, _ = stream(60, 2)
    one, two = PairLedger(60), PairLedger(60)
    for step in range(4):
        rows = slice(30 * step, 30 * step + 30)
        one.update(index[rows], margin[rows], timestep[rows])
        for part in range(rows.start, rows.stop, 7):
            micro = slice(part, min(part + 7, rows.stop))
            two.record(index[micro], margin[micro].requires_grad_(), timestep[micro])
        with pytest.raises(RuntimeError, match="merge"):
            two.state_dict()
        two.merge()
    assert all(torch.equal(one.state_dict()[k], two.state_dict()[k]) for k in one.state_dict())
    two.merge()  # of nothing
    assert torch.equal(one.total, two.total)


def record_a_share(words):
    """One of two processes, which merges what both have recorded after every step."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    index, margin, timestep = torch.load(words[0])
    ledger = PairLedger(60)
    for step in range(3):
        rows = torch.arange(20 * step, 20 * step + 20)
        share = rows[:13] if rank == 0 else rows[13:]
        if step == 2:  # one process without a pair
            share = rows if rank == 0 else rows[:0]
        for row in share:
            ledger.record(index[row, None], margin[row, None], timestep[row, None])
        ledger.merge()
    torch.save(ledger.state_dict(), f"{words[0]}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_with_batches_of_one_pair_equal_one_with_all(tmp_path):
    index, margin, timestep, _ = stream(60, 1)
    torch.save((index, margin, timestep), tmp_path / "rows")
    with two_ranks(tmp_path, lambda _: [tmp_path / "rows"], act=record_a_share) as ranks:
        assert ranks.exit_codes() == [0, 0], ranks.text(0) + ranks.text(1)
    whole = fed(index, margin, timestep, step=20, pairs=60).state_dict()
    for rank in range(2):
        state = torch.load(tmp_path / f"rows.{rank}")
        assert all(torch.equal(state[k], whole[k]) for k in whole)


def test_state_goes_round_and_a_strangers_is_refused():
    index, margin, timestep, _ = stream(40, 2)
    ledger, other = PairLedger(40), PairLedger(40)
    ledger.update(index[:40], margin[:40], timestep[:40])
    other.load_state_dict({k: v.clone() for k, v in ledger.state_dict().items()})
    for each in (ledger, other):
        each.update(index[40:], margin[40:], timestep[40:])
    assert torch.equal(other.minority(), ledger.minority())
    with pytest.raises(ValueError, match="holds 3 pairs, the saved one 40"):
        PairLedger(3).load_state_dict(ledger.state_dict())
    old = {"visits": torch.zeros(40, dtype=torch.int32), "total": torch.zeros(40)}
    with pytest.raises(ValueError, match="another scale"):
        other.load_state_dict(old)


@pytest.mark.parametrize(
    ("slot", "time", "complaint"),
    [
        (4, 0, r"slots must lie in \[0, 4\), got 0 to 4"),
        (-1, 0, r"slots must lie in \[0, 4\), got -1 to 0"),
        (1, 1000, r"timesteps must lie in \[0, 1000\), got 0 to 1000"),
    ],
)
def test_a_step_out_of_range_is_refused_whole(slot, time, complaint):
    ledger = PairLedger(4)
    ledger.update(torch.arange(4), torch.ones(4))
    before = {k: v.clone() for k, v in ledger.state_dict().items()}
    rows = torch.tensor([0, slot]), torch.tensor([1.0, 2.0]), torch.tensor([0, time])
    with pytest.raises(ValueError, match=complaint):
        ledger.update(*rows)
    ledger.record(*rows)
    with pytest.raises(ValueError, match=complaint):
        ledger.merge()
    assert all(torch.equal(v, before[k]) for k, v in ledger.state_dict().items())
    ledger.merge()  # the bad rows are gone


def test_margins_at_the_ends_of_float_are_harmless():
    ledger = PairLedger(4)
    margin = torch.tensor([1e300, -1e-300, 5e-324, 1e-3], dtype=torch.float64)
    for _ in range(3):
        ledger.update(torch.arange(4), margin)
    assert ledger.moments.isfinite().all() and ledger.total.isfinite().all()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="positive"):
        PairLedger(0)
    with pytest.raises(ValueError, match="one length"):
        PairLedger(2).update(torch.tensor([0]), torch.zeros(2))
    with pytest.raises(ValueError, match=r"\[0, 4\), got 4 to 4"):
        PairLedger(2, num_timesteps=4).update(torch.tensor([0]), torch.ones(1), torch.tensor([4]))


def test_ten_million_pairs_take_eight_bytes_each_and_cost_a_step_nothing_more():
    """Counted, not timed: the tensors' bytes, and the sizes that a step's operators touch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func._schema.is_mutable:
                self.made = max(self.made, out.numel())
            return out

    ledger = PairLedger(10_000_000)
    state = ledger.state_dict()
    size = sum(t.numel() * t.element_size() for t in state.values())
    assert size <= 8 * 10_000_000 + 1024
    index = torch.randint(10_000_000, (128,))
    with Largest() as largest:
        ledger.update(index, torch.randn(128), torch.randint(1000, (128,)))
        ledger.minority(index)
    assert 128 <= largest.made <= 2 * 128


def readme_example():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return next(b for b in blocks if "PairLedger(" in b)


def test_the_readmes_example_runs_and_finds_the_wrong_labels():
    """A linear denoiser; the winner's latents are darker, in a quarter of the pairs the loser's."""
    torch.manual_seed(0)
    pairs, flipped = 64, torch.arange(64) % 4 == 0
    side = torch.where(flipped, 1.0, -1.0)[:, None]
    model = torch.nn.Linear(8, 8)
    reference = torch.nn.Linear(8, 8)
    reference.load_state_dict(model.state_dict())
    direction = torch.randn(8)

    def batches():
        for _ in range(12):
            for rows in torch.randperm(pairs).split(4):
                t, noise = torch.randint(1000, (4,)), torch.randn(4, 8)
                shift = 0.5 * side[rows] * direction
                latents = torch.cat([noise - shift, noise + shift])
                with torch.no_grad():
                    ref_pred = reference(latents)
                yield rows, t, model(latents), ref_pred, noise

    optimizer, taken = torch.optim.Adam(model.parameters(), lr=1e-3), itertools.count(1)

    def step_taken():
        if next(taken) % 4:
            return False
        optimizer.step()
        optimizer.zero_grad()
        return True

    example = readme_example()
    assert len(example.strip().splitlines()) <= 10
    scope = {"num_pairs": pairs, "micro_batches": batches, "step_taken": step_taken}
    scope["accumulation_steps"] = 4
    exec(example, scope)
    ledger = scope["judge"]
    assert ledger.visits.max() > 4
    assert auroc(ledger, flipped) > 0.9


def test_a_round_that_keeps_no_votes_closes_no_pair():
    index, margin, timestep, _ = stream(60, 6)
    ledger = fed(index, margin, timestep, step=20)
    before = ledger.minority()
    assert 0 < int((before >= 0.5).sum()) < 60
    ledger.begin_round(0.5)
    assert torch.equal(ledger.minority() >= 0.5, before >= 0.5)
    ledger.begin_round(0.0)
    assert not bool(ledger.minority().any())
    ledger.update(index[:20], margin[:20], timestep[:20])
    assert bool((ledger.minority() >= 0.5).any()) or ledger.min_visits > 1
