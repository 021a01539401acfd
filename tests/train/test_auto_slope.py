"""A slope that follows the margins."""

import pytest
import torch

from fastpo.config import load_config
from fastpo.data.cache import PairCache
from fastpo.errors import ConfigError
from fastpo.ledger import PairLedger
from fastpo.models.folder import ModelFolder
from fastpo.train import train
from fastpo.train.auto_slope import RANGE, AutoSlope
from fastpo.train.distributed import joined
from fastpo.train.loop import setup
from fastpo.train.run_folder import RunFolder
from fastpo.train.slope import Slope


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
    for option in ({"auto_slope": 0.1}, {"slope_by_timestep": True}):
        with pytest.raises(ConfigError, match=r"which .* has not"):
            load_config(experiment(objective={"name": name}, **option))


def test_the_ledger_tells_how_large_margins_are_at_a_timestep():
    ledger = PairLedger(4000)
    assert ledger.bin_sizes().eq(1.0).all()
    index, t = torch.arange(4000), torch.arange(4000) % 1000
    margins = torch.where(t < 500, 1e-3, 4e-3) * torch.tensor([1.0, -1.0]).repeat(2000)
    ledger.update(index, margins, t)
    sizes = ledger.bin_sizes()
    assert sizes[:5].tolist() == pytest.approx([0.5] * 5, rel=0.1)
    assert sizes[5:].tolist() == pytest.approx([2.0] * 5, rel=0.1)
    slope = Slope(100.0, sizes, ledger.bins).at(torch.tensor([0, 999]))
    assert slope.tolist() == pytest.approx([200.0, 50.0], rel=0.1)
    assert Slope(100.0).at(t) == 100.0


def test_a_slope_by_timestep_multiplies_each_pairs_margin(experiment):
    config = load_config(experiment(slope_by_timestep=True, micro_batch_size=4))
    with joined(config.train) as processes:
        trainer = setup(config, processes, RunFolder(config.train.output_dir, main=True)).trainer
        ledger = trainer.state.ledger
        ledger.moments[0] = 1000.0
        ledger.moments[1] = 1000.0 * torch.linspace(-7, -3, 10)
        judged = trainer.judged(trainer_batch(config), step=0)
        policy = judged.noised.noisy_latents + torch.randn_like(judged.noised.noisy_latents)
        out = trainer.pair_loss(judged, policy)
        slopes = 500.0 / ledger.bin_sizes()[judged.noised.index // 100]
        assert len(slopes.unique()) > 1
        expected = torch.nn.functional.softplus(-slopes * out.margin).mean()
        torch.testing.assert_close(out.loss, expected)


def trainer_batch(config):
    model = ModelFolder.resolve(config.model)
    return PairCache.open(config, model=model).read([0, 1, 2, 4], visit=0)
