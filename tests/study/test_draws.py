"""Several draws a visit: how votes are counted, what they cost, and that they only look on."""

import numpy as np
import torch

from fastpo.config import load_config
from fastpo.ledger import PairLedger
from fastpo.study.draws import DRAW, FAR, VISIT, DrawingTrainer, doubt, draws_table, passes
from fastpo.study.ledger import Results
from fastpo.study.own_steps import train_with
from fastpo.train import train


def recorded(steps, draws=2, pairs=3):
    """Random margins of all pairs in each step, by draw: pairs, timesteps, margins."""
    rng = np.random.default_rng(0)
    index = np.arange(pairs, dtype=np.float64)
    return [
        np.stack(
            [[index, rng.integers(0, 1000, pairs), rng.normal(size=pairs)] for _ in range(draws)]
        )
        for _ in range(steps)
    ]


def test_draws_of_a_visit_enter_the_ledger_together():
    drawn = recorded(3)
    one, both = PairLedger(3), PairLedger(3)
    for step in drawn[:2]:
        for ledger, count in ((one, 1), (both, 2)):
            rows = torch.from_numpy(np.concatenate(list(step[:count]), axis=1))
            ledger.update(rows[0].long(), rows[2], rows[1].long())
    assert doubt(drawn, 3, 1, 2).tolist() == (-one.total.double()).tolist()
    assert doubt(drawn, 3, 2, 2).tolist() == (-both.total.double()).tolist()
    assert doubt(drawn, 3, 2, 3).tolist() != doubt(drawn, 3, 2, 2).tolist(), "a visit more"


def test_passes_and_table_by_hand(tmp_path):
    assert passes(1, 3, VISIT) == 12 and passes(4, 2, VISIT) == 2 * (4 + 6)
    assert passes(4, 2, DRAW) == 2 * (3 + 3)
    results = Results(tmp_path / "ledger.csv")
    assert draws_table(results) == ""
    for visits, auroc in ((1, 0.75), (2, 0.9)):
        labels = {"part": "draws", "flip_rate": 0.2, "seed": 0, "method": "2 draws"}
        results.add(**labels, case=f"{visits} visits", auroc=auroc)
    table = draws_table(results).splitlines()
    assert table[0].endswith("| AUROC after 1 visit | AUROC after 2 visits |")
    assert table[2] == "| 20% | 0 | 2 | 0.750 (6, 4) | 0.900 (12, 8) |"


def test_further_draws_change_nothing_of_a_run(experiment):
    options = {"max_steps": 3, "checkpoint_every": 9}
    plain = train(load_config(experiment(name="plain", **options)), progress=False)
    drawn = []
    config = load_config(experiment(name="drawn", **options))
    run = train_with(config, lambda run: DrawingTrainer(**vars(run.trainer), drawn=drawn, more=2))
    for name in ("final/pytorch_lora_weights.safetensors", "minority.csv"):
        assert (run / name).read_bytes() == (plain / name).read_bytes()
    assert not drawn[0][:, 2].any(), "policy and reference agree"
    index, timestep, margin = np.concatenate(drawn[1:], axis=2).transpose(1, 0, 2)
    assert (index == index[:1]).all() and margin.all() and len(margin) == 1 + 2
    assert len({tuple(row) for row in timestep.tolist()}) == 3, "other timesteps"
    assert FAR > config.train.max_steps
