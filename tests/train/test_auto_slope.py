"""A slope that follows the margins."""

import pytest
import torch

from fastpo.config import load_config
from fastpo.errors import ConfigError
from fastpo.train import train
from fastpo.train.auto_slope import RANGE, AutoSlope


def test_the_stated_share_of_exponential_margins_is_saturated():
    slope, draws = AutoSlope(2500.0, 0.2), torch.Generator().manual_seed(0)

    def margins(scale):
        sizes = torch.empty(1000, dtype=torch.float64).exponential_(generator=draws)
        return scale * sizes * torch.randint(2, (1000,), generator=draws).mul(2).sub(1)

    for scale in (1e-2, 1e-3):  # the slope follows a change of the scale
        for _ in range(120):
            slope.follow(margins(scale))
        saturated = (slope.value * margins(scale)).abs() > 4.0
        assert saturated.double().mean().item() == pytest.approx(0.2, abs=0.05)


def test_the_slope_stays_within_bounds_and_waits_for_margins():
    slope = AutoSlope(10.0, 0.1)
    slope.follow(torch.zeros(4))
    slope.follow(torch.tensor([torch.nan, torch.inf]))
    assert slope.value == 10.0
    for _ in range(200):
        slope.follow(torch.tensor([1e-9, -1e-9]))
    assert slope.value == 10.0 * RANGE


def test_margins_in_another_order_move_it_alike():
    margins = torch.randn(64, generator=torch.Generator().manual_seed(1))
    one, two = AutoSlope(10.0, 0.1), AutoSlope(10.0, 0.1)
    one.follow(margins)
    two.follow(margins.flip(0))
    assert one.value == two.value


def test_a_run_moves_its_slope_and_resumes_to_the_bit(experiment, read_metrics):
    options = {"max_steps": 6, "auto_slope": 0.3}
    whole = read_metrics(train(load_config(experiment(name="whole", **options)), progress=False))
    slopes = [m["slope"] for m in whole]
    assert slopes[:2] == [500.0, 500.0]  # no margin before the first update
    assert len(set(slopes[1:])) == 5
    path = experiment(name="parts", **options)
    train(load_config(path, ["train.max_steps=4"]), progress=False)
    assert read_metrics(train(load_config(path), resume=True, progress=False)) == whole


@pytest.mark.parametrize("name", ["ipo", "kto", "mapo", "sft", "adaptive_ipo"])
def test_an_objective_without_a_logit_is_refused(experiment, name):
    with pytest.raises(ConfigError, match=r"which .* has not"):
        load_config(experiment(auto_slope=0.1, objective={"name": name}))
