"""The ledger against numbers worked by hand, and its independence from batches."""

import math

import pytest
import torch

from fastpo.ledger import PairLedger


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_two_steps_worked_by_hand():
    """Step 1: margins 3, -4 have rms sqrt(12.5); step 2: margin 2 alone votes 1."""
    ledger = PairLedger(3)
    ledger.update(torch.tensor([0, 1]), torch.tensor([3.0, -4.0]))
    ledger.update(torch.tensor([0]), torch.tensor([2.0]))
    a, b = 3 / math.sqrt(12.5), -4 / math.sqrt(12.5)
    assert ledger.visits.tolist() == [2, 1, 0]
    torch.testing.assert_close(ledger.mean(), torch.tensor([(a + 1) / 2, b, 0.0]))
    u = torch.tensor([1 - sigmoid(2 * (a + 1) / 2 * math.sqrt(2)), 1 - sigmoid(2 * b), 0.0])
    torch.testing.assert_close(ledger.minority(), u)


def test_pairs_with_too_few_visits_are_neutral():
    ledger = PairLedger(2, min_visits=2)
    for _ in range(2):
        ledger.update(torch.tensor([0]), torch.tensor([-1.0]))
    ledger.update(torch.tensor([1]), torch.tensor([-1.0]))
    assert ledger.minority(torch.tensor([1])).item() == 0.0
    assert ledger.minority(torch.tensor([0])).item() > 0.5


def test_u_exceeds_a_half_exactly_where_the_mean_is_negative():
    ledger = PairLedger(64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        ledger.update(torch.arange(64), torch.randn(64, generator=generator))
    assert torch.equal(ledger.minority() > 0.5, ledger.mean() < 0)


def test_the_order_within_a_step_does_not_matter():
    index, margin = torch.tensor([4, 0, 2]), torch.tensor([1.0, -2.0, 0.5])
    one, two = PairLedger(5), PairLedger(5)
    one.update(index, margin)
    two.update(index.flip(0), margin.flip(0))
    assert torch.equal(one.total, two.total)


def test_a_zero_margin_is_no_vote():
    """At the first step all margins are zero; a gate must not shut those pairs out."""
    ledger = PairLedger(3)
    ledger.update(torch.tensor([0, 1]), torch.zeros(2))
    assert ledger.minority().tolist() == [0.0, 0.0, 0.0]
    ledger.update(torch.tensor([0, 1]), torch.tensor([0.0, -1.0]))
    assert ledger.visits.tolist() == [0, 1, 0]
    assert ledger.minority()[0] == 0.0


def test_state_goes_round_and_a_strangers_is_refused():
    ledger = PairLedger(2)
    ledger.update(torch.tensor([0, 1]), torch.tensor([1.0, -3.0]))
    other = PairLedger(2)
    other.load_state_dict({k: v.clone() for k, v in ledger.state_dict().items()})
    assert torch.equal(other.minority(), ledger.minority())
    with pytest.raises(ValueError, match="holds 3 pairs, the saved one 2"):
        PairLedger(3).load_state_dict(ledger.state_dict())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="positive"):
        PairLedger(0)
    with pytest.raises(ValueError, match="one length"):
        PairLedger(2).update(torch.tensor([0]), torch.zeros(2))
